"""Fetch tokenised FineWeb: the validation shard and the first N training shards, 100,000,000 GPT-2 tokens
(200 MB) each, from a public dataset repository. Files that are already whole are kept, so a run that was stopped
goes on with the first file it lacks when the same command is given again. prefixes.bin beside them (described in
data/text.py; 50,257 int32) is then made from the tokens of tiktoken's "gpt2", which tiktoken fetches.

    python data/fineweb.py        # what the five-minute recipe opens: ten training shards, 2.2 GB; gpt2 needs about 5
    python data/fineweb.py 1      # the least that can be trained on
"""

import argparse
import hashlib
import os
import shlex
from pathlib import Path

import numpy as np
from text import (HEADER_WORDS, SHARD_MAGIC, SHARD_VERSION, Parser, UserError, open_streams, prefix_table, say, shown,
                  token_bytes, typed_path)

HERE = Path(__file__).resolve().parent
REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAINING_SHARDS = 103
FIVE_MINUTE_SHARDS = 10
DEFAULT_FOLDER = HERE / "fineweb10B"
VOCABULARY = 50_257
PREFIXES_SHA256 = "4ca9d79796b4a5756a57b6f4447946e5d6027c807b3fc3c037a2fa37c7bd87b6"


def main(arguments: list[str] | None = None) -> None:
    """Command line. Raises UserError for a bad count, a damaged file, an unusable folder, or what cannot be fetched."""
    options = parse(arguments)
    folder, again = options.out, command(options.count, options.out)
    names = shard_names(options.count)
    # All that is there is checked before anything is fetched: a damaged file is then told at once, not 2 GB later.
    missing = [name for name in names if not os.path.exists(folder / name)]
    tokens = sum(checked(folder / name, again) for name in names if name not in missing)
    if len(missing) < len(names):
        say(f"{len(names) - len(missing)} of {len(names)} shards are already whole in {shown(folder)}")
    if missing:
        tokens += fetch(missing, folder, again)
    say(f"{len(names)} shards, {tokens:,} tokens in {shown(folder)}")
    write_prefixes(folder / "prefixes.bin", again)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", metavar="N", type=int, default=FIVE_MINUTE_SHARDS,
                        help=f"training shards to fetch, 1 to {TRAINING_SHARDS} (default {FIVE_MINUTE_SHARDS})")
    parser.add_argument("--out", type=typed_path, default=DEFAULT_FOLDER, metavar="DIR",
                        help="folder of the shards (default fineweb10B beside this script)")
    options = parser.parse_args(arguments)
    if not 1 <= options.count <= TRAINING_SHARDS:
        parser.error(f"there are {TRAINING_SHARDS} training shards; {options.count} is not from 1 to {TRAINING_SHARDS}")
    return options


def shard_names(count: int) -> list[str]:
    """The validation shard, which is number 0, and `count` training shards, which start at 1."""
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{number:06d}.bin" for number in range(1, count + 1)]


def fetch(names: list[str], folder: Path, again: str) -> int:
    """Download `names` into `folder`; returns their tokens. Raises UserError, with what came before it kept."""
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import HfHubHTTPError
    except ImportError:
        raise UserError(f"the package huggingface_hub is missing: pip install huggingface_hub && {again}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from None
    tokens, name = 0, names[0]
    try:
        try:
            # The download itself meets a dead network with half a minute of retries; one request without them tells
            # at once. An answer that is an error is left to the download, which knows which ones are worth waiting for.
            get_hf_file_metadata(hf_hub_url(REPOSITORY, name, repo_type="dataset"), token=False)
        except HfHubHTTPError:
            pass
        for position, name in enumerate(names, 1):
            # Without a token: the repository is public, and an expired login would be turned away.
            hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=folder, token=False)
            tokens += checked(folder / name, again)
            say(f"[{position}/{len(names)}] {name}")
    except KeyboardInterrupt:
        raise UserError(f"stopped while fetching {name}; what is whole is kept, go on with: {again}") from None
    except Exception as error:  # noqa: BLE001  each version of the client lets other libraries' errors through
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"cannot fetch {name} from {constants.ENDPOINT}: {reason or type(error).__name__}; "
                      f"what is whole is kept, go on with: {again}") from None
    return tokens


def write_prefixes(path: Path, again: str) -> None:
    """Make the table beside the shards, unless it is there and right. Raises UserError."""
    try:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == PREFIXES_SHA256:
            return
        import tiktoken

        table = prefix_table(token_bytes(tiktoken.get_encoding("gpt2"), VOCABULARY))
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(table.tobytes())
        os.replace(partial, path)
    except ImportError:
        raise UserError(f"the package tiktoken is missing: pip install tiktoken && {again}") from None
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  tiktoken lets its HTTP library's errors through
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot make {path} from tiktoken's gpt2: {reason}; the shards are whole, "
                        f"go on with: {again}") from None
    say(f"wrote {shown(path)}")


def checked(path: Path, again: str) -> int:
    """Tokens of a whole shard. Raises UserError with the command that replaces a damaged one."""
    try:
        if not path.is_file():
            raise ValueError("is not a regular file")
        header = np.fromfile(path, "<i4", HEADER_WORDS)
        found = (os.path.getsize(path) - 4 * HEADER_WORDS) / 2
        if len(header) < HEADER_WORDS or (*header[:2],) != (SHARD_MAGIC, SHARD_VERSION):
            raise ValueError(f"is no token shard of version {SHARD_VERSION}")
        if header[2] <= 0 or header[2] != found:
            raise ValueError(f"promises {header[2]} tokens but holds {found:g}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} {error}; fetch it again: rm -f {shlex.quote(shown(path))} && {again}") from None
    return int(header[2])


def command(count: int, folder: Path) -> str:
    """The command line, to be given in the current folder, that does what this run was asked to do."""
    words = ["python", shown(Path(__file__).resolve()), str(count)]
    return shlex.join(words + ["--out", shown(folder)] * (folder != DEFAULT_FOLDER))


if __name__ == "__main__":
    open_streams()
    main()
