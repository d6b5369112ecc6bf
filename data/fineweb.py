"""Fetch tokenised FineWeb: the validation shard and the first N training shards, 100,000,000 GPT-2 tokens
(200 MB) each, from a public dataset repository. Files that are already whole are kept, so a run that was stopped
goes on with the first file it lacks when the same command is given again.

    python data/fineweb.py        # what the five-minute recipe opens: ten training shards, 2.2 GB; gpt2 needs about six
    python data/fineweb.py 1      # the least that can be trained on
"""

import argparse
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from train_gpt2 import Refusal, open_shard

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAINING_SHARDS = 103
FIVE_MINUTE_SHARDS = 10
DEFAULT_FOLDER = HERE / "fineweb10B"


def main(arguments: list[str] | None = None) -> None:
    """Command line. Raises Refusal for a bad count, a damaged file, an unusable folder or an unreachable hub."""
    options = parse(arguments)
    folder, again = options.out, command(options.count, options.out)
    names = shard_names(options.count)
    # All that is there is judged before anything is fetched: a damaged file is then told at once, not 2 GB later.
    missing = [name for name in names if not (folder / name).exists()]
    tokens = sum(checked(folder / name, again) for name in names if name not in missing)
    if len(missing) < len(names):
        print(f"{len(names) - len(missing)} of {len(names)} shards are already whole in {shown(folder)}")
    if missing:
        tokens += fetch(missing, folder, again)
    print(f"{len(names)} shards, {tokens:,} tokens in {shown(folder)}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", metavar="N", type=shard_count, default=FIVE_MINUTE_SHARDS,
                        help=f"training shards to fetch, 1 to {TRAINING_SHARDS} (default {FIVE_MINUTE_SHARDS})")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, metavar="DIR",
                        help="folder of the shards (default fineweb10B beside this script)")
    return parser.parse_args(arguments)


def shard_count(text: str) -> int:
    """A number of training shards. Raises Refusal outside 1 to TRAINING_SHARDS."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= TRAINING_SHARDS:
        raise Refusal(f"{text!r} is no number of training shards, expected 1 to {TRAINING_SHARDS}: "
                      f"{command(FIVE_MINUTE_SHARDS, DEFAULT_FOLDER)}")
    return count


def shard_names(count: int) -> list[str]:
    """The validation shard, which is number 0, and `count` training shards, which start at 1."""
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{number:06d}.bin" for number in range(1, count + 1)]


def fetch(names: list[str], folder: Path, again: str) -> int:
    """Download `names` into `folder`; returns their tokens. Raises Refusal, with what came before it kept."""
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import HfHubHTTPError
    except ImportError:
        raise Refusal(f"the package huggingface_hub is missing: pip install huggingface_hub && {again}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from None
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
            print(f"[{position}/{len(names)}] {name}", flush=True)
    except KeyboardInterrupt:
        raise Refusal(f"stopped while fetching {name}; what is whole is kept, go on with: {again}") from None
    except Exception as error:  # noqa: BLE001  each version of the client lets other libraries' errors through
        reason = " ".join(str(error.__cause__ or error).split())
        raise Refusal(f"cannot fetch {name} from {constants.ENDPOINT}: {reason or type(error).__name__}; "
                      f"what is whole is kept, go on with: {again}") from None
    return tokens


def checked(path: Path, again: str) -> int:
    """Tokens of a whole shard. Raises Refusal with the command that replaces a damaged one."""
    try:
        return open_shard(path).tokens
    except Refusal as refusal:
        # The trainer's line ends with its own mending command, which cannot know this run's count and folder.
        found = str(refusal).rsplit("; ", 1)[0]
        raise Refusal(f"{found}; fetch it again: rm {shlex.quote(shown(path))} && {again}") from None


def command(count: int, folder: Path) -> str:
    """The command line, to be given in the current folder, that does what this run was asked to do."""
    words = ["python", shown(Path(__file__).resolve()), str(count)]
    return shlex.join(words + (["--out", str(folder)] if folder != DEFAULT_FOLDER else []))


def shown(path: Path) -> str:
    """A path as short as it can be typed in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
