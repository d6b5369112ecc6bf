"""Turn text into token shards to train on: text files, folders of them (read recursively), `.jsonl` (field `text`) and
`.parquet` (column `text`). Each file or record is one document. Without a PATH it takes the sources of the Python
standard library, so that a first run needs no download. Without --out the shards go to data/text, where ./run.sh looks,
unless that holds another text.

    python data/text.py                                  # Python's own sources, into data/text
    python data/text.py input.txt --out data/mine
    python data/text.py corpus/ more.jsonl --encoding gpt2 --val-fraction 0.02 --out data/mine
    python data/text.py corpus/ --encoding mine.tiktoken --out data/mine       # your own tokenizer

Documents are shuffled with --seed. The tail of the shuffled text is held out for validation: a tenth of its bytes, or
as --val-fraction says. A document that reaches across that point is cut in two, which the output says.

The shards are text_train_000001.bin ... and text_val_000000.bin ...: a header of 256 little-endian int32 (20240520,
version 1, number of tokens, vocabulary, separator), then the tokens as uint16. The shards of a part, in name order, are
one stream. One separator opens each document, and nothing else starts a document. A full shard ends in the middle of a
document, and the next one goes on without a separator, so that --shard-tokens does not change the stream.

prefixes.bin beside them has for each token of the vocabulary, as little-endian int32 without a header, the longest
other token that its bytes begin with: -1 where there is none, as for single bytes and the separator.
"""

import argparse
import base64
import codecs
import contextlib
import glob
import itertools
import json
import os
import re
import shlex
import signal
import sys
import sysconfig
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

try:
    from tqdm import tqdm
except ValueError as error:  # it reads its environment when it is imported
    names = " ".join(name for name in os.environ if name.startswith("TQDM_"))
    sys.exit(f"the progress bar cannot use the environment variables {names}: {error}; unset {names}")

HERE = Path(__file__).resolve().parent
DEFAULT_FOLDER = HERE / "text"
INPUTS = "text_inputs.json"  # beside the shards: the paths they were made from
PREFIXES = "prefixes.bin"  # beside the shards as well
SHARD_MAGIC, SHARD_VERSION, HEADER_WORDS = 20240520, 1, 256
LARGEST_COUNT = 2**31 - 1  # the header holds the number of tokens as int32
LARGEST_VOCABULARY = 2**16
TOO_LARGE = ("cl100k", "o200k")  # how the names begin of tiktoken's encodings with more tokens
SHORTEST_ROW, TINY_TOKENS = 128, 655_360  # tokens in a row, at least; in the whole run of --preset tiny
MANY_TOKENS = 2**14  # with more, the table of token pairs in tiny is too slow for a CPU
NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


class UserError(SystemExit):
    """Bad input. Ends the script with one line on stderr and exit status 1."""

    def __init__(self, line: str):
        super().__init__(" ".join(line.splitlines()))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}; --help lists the options")


def main(arguments: list[str] | None = None) -> None:
    """Command line. Raises UserError for bad input; the shards of an earlier run are then untouched."""
    options = parse(arguments)
    folder = options.out or DEFAULT_FOLDER
    inputs = sorted(map(os.path.realpath, options.paths)) or ["Python's own sources"]
    is_new = not os.path.exists(folder)
    try:
        check_replaceable(folder, inputs if options.paths and not options.out else None)
        encoding = encoding_named(options.encoding)
        if encoding.vocabulary > LARGEST_VOCABULARY:
            raise UserError(f"--encoding {options.encoding} has {encoding.vocabulary} tokens with its separator, "
                            f"expected at most {LARGEST_VOCABULARY}, as shards hold 16-bit tokens")
        files = list_files(options.paths)
        folder.mkdir(parents=True, exist_ok=True)
        # In the output folder because there is room, and before a long reading to see that it can be written to.
        with tempfile.TemporaryFile(dir=folder) as spool:
            corpus, skipped = read_documents(files, spool)
            order, index, cut = split(corpus, options.val_fraction, options.seed)
            parts = {"text_val": token_runs(corpus, encoding, order[index:], begin=cut),
                     "text_train": token_runs(corpus, encoding, order[:index + (cut > 0)], end=cut or None)}
            counts = write_parts(parts, folder, encoding, options.shard_tokens, inputs)
    except OSError as error:
        raise UserError(f"cannot go on at {error.filename or folder}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        raise UserError("stopped before the shards were complete") from None
    finally:
        if is_new and os.path.isdir(folder) and not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()
    for reason, paths in sorted(skipped.items()):
        say(f"skipped, {reason}: {paths[0]}" + f" and {len(paths) - 1:,} more" * (len(paths) > 1))
    if cut:
        say(f"cut {corpus.name(order[index])} after {cut:,} bytes: the rest is held out")
    where = shown(folder)
    say(f"documents: {len(corpus.source):,}; training tokens: {counts['text_train']:,}; "
        f"validation tokens: {counts['text_val']:,}; in {where}")
    if options.encoding not in ("bytes", "gpt2"):  # evals/sample.py knows these two by their numbers
        say(f"vocabulary {encoding.vocabulary:,}, separator {encoding.separator:,}; sample from a model of it with "
            f"--encoding {shlex.quote('./' * options.encoding.startswith('-') + options.encoding)}")
    say("train on them with:")
    say(shlex.join(["python", shown(HERE.parent / "train_gpt2.py"), "--preset", "tiny",
                    "--train-files", glob.escape(where) + "/text_train_*.bin",
                    "--val-files", glob.escape(where) + "/text_val_*.bin"]
                   + ["--repeat", "true"] * (counts["text_train"] <= TINY_TOKENS)
                   + ["--bigram", "0"] * (encoding.vocabulary > MANY_TOKENS)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="*", type=typed_path, metavar="PATH",
        help="text files, folders, .jsonl or .parquet (default: the Python standard library)")
    add("--out", type=typed_path, metavar="DIR",
        help="folder of the shards (default text beside this script, where ./run.sh looks)")
    add("--encoding", default="bytes", metavar="NAME|FILE",
        help="bytes; a name that tiktoken knows and fetches, as gpt2; or a file X.tiktoken: on each line a token in "
             "base64 and its rank. X.pattern beside it may hold the regular expression that splits text (default "
             "bytes)")
    add("--val-fraction", default=0.1, type=float, metavar="F", help="part of the text to hold out (default 0.1)")
    add("--seed", default=0, type=int, metavar="S", help="of the shuffle (default 0)")
    add("--shard-tokens", default=100_000_000, type=int, metavar="N", help="of a full shard (default 100000000)")
    options = parser.parse_args(arguments)
    if not 0 < options.val_fraction < 1:
        parser.error(f"--val-fraction {options.val_fraction} is not between 0 and 1")
    if options.seed < 0:
        parser.error(f"--seed {options.seed} is below 0")
    if not 1 <= options.shard_tokens <= LARGEST_COUNT:
        parser.error(f"--shard-tokens {options.shard_tokens} is not from 1 to {LARGEST_COUNT}")
    return options


def check_replaceable(folder: Path, inputs: list[str] | None) -> None:
    """Raises UserError if `folder` holds shards that were made from anything but `inputs`, unless these are None, or
    folders and the like in the place of files."""
    names = ("text_*.bin", ".text_*.partial", f"{INPUTS}*", f".{INPUTS}*", f"{PREFIXES}*", f".{PREFIXES}*")
    for path in itertools.chain.from_iterable(map(folder.glob, names)):
        if not path.is_file():
            raise UserError(f"{shown(path)} is not a regular file; remove it, or name another folder: --out FOLDER")
    if inputs and any(folder.glob("text_*.bin")):
        try:
            made_from = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            made_from = None
        if made_from != inputs:
            raise UserError(f"{shown(folder)} holds shards of other text; name a folder for these: --out FOLDER")


def open_streams() -> None:
    """Instead of a closed stdin, stdout or stderr take one that leads nowhere: else progress could not be shown, and a
    file that is opened would get its number, and with it what others write there."""
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))


def say(line: str) -> None:
    """Print. A stdout that is closed or cannot show a path must not change the outcome of a job."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails at its exit


def typed_path(text: str) -> Path:
    """A path as it is typed: a shell leaves a quoted `~` as it is. Raises UserError for an empty one, as of a variable
    that is not set, which would be the current folder."""
    if not text:
        raise UserError("expected a file or folder, found an empty name; the current folder is .")
    return Path(os.path.expanduser(text))


def shown(path: Path) -> str:
    """A path as short as it can be typed in the current folder."""
    text = str(path)
    with contextlib.suppress(ValueError, OSError):  # not below the current folder, which may have been removed
        text = str(path.relative_to(Path.cwd()))
    return "./" * text.startswith(("-", "~")) + text


def list_files(paths: list[Path]) -> list[Path]:
    """The files of `paths`, those of a folder in sorted order, each once; without paths, the sources of the standard
    library. Raises UserError for what is no file or folder."""
    if not paths:
        folder = Path(sysconfig.get_paths()["stdlib"])
        return [path for path in sorted(folder.rglob("*.py"))
                if path.is_file() and NOT_STANDARD_LIBRARY.isdisjoint(path.relative_to(folder).parts)]
    found = {}
    for path in paths:
        if not path.is_dir() and not path.is_file():  # opening a pipe would wait for its writer
            raise UserError(f"{path} is not {'a regular file or folder' if path.exists() else 'there'}")
        # A folder that cannot be read is listed as a file: it is then skipped as one, with a notice.
        walk = os.walk(path, onerror=lambda error: found.setdefault(error.filename, Path(error.filename)))
        inside = sorted(Path(above, name) for above, _, names in walk for name in names) if path.is_dir() else [path]
        for member in inside:
            if member.is_file() and member.name != INPUTS:
                found.setdefault(os.path.realpath(member), member)
    return list(found.values())


class Corpus(NamedTuple):
    """`spool` is a temporary file of all texts in UTF-8, so that a corpus larger than memory can be shuffled. Document
    i is from line or row `number[i]` of `files[source[i]]`; it is in the spool from byte `end[i]` to `end[i + 1]`."""

    files: list[Path]
    spool: BinaryIO
    source: array
    number: array
    end: array

    def name(self, document: int) -> str:
        path = self.files[self.source[document]]
        unit = {".jsonl": "line", ".parquet": "row"}.get(path.suffix.lower())
        return f"{path} {unit} {self.number[document]}" if unit else str(path)

    def content(self, document: int) -> bytes:
        self.spool.seek(self.end[document])
        return self.spool.read(self.end[document + 1] - self.end[document])


def read_documents(files: list[Path], spool: BinaryIO) -> tuple[Corpus, dict[str, list[Path]]]:
    """The corpus without empty documents, and the skipped files by reason. Raises UserError, OSError."""
    corpus, skipped = Corpus(files, spool, array("L"), array("q"), array("q", [0])), {}
    with tqdm(desc="reading", unit=" documents", disable=None) as progress:
        for index, path in enumerate(files):
            read = {".jsonl": jsonl_lines, ".parquet": parquet_rows}.get(path.suffix.lower(), text_file)
            try:
                for number, content in read(path):
                    if content:
                        spool.write(content)
                        corpus.source.append(index)
                        corpus.number.append(number)
                        corpus.end.append(corpus.end[-1] + len(content))
                        progress.update()
            except ValueError as reason:
                skipped.setdefault(str(reason), []).append(path)
    if not corpus.source:
        reasons = "".join(f", {paths[0]} is {reason}" for reason, paths in skipped.items())
        raise UserError(f"no text in {len(files)} files{reasons}; expected UTF-8 text, .jsonl or .parquet")
    return corpus, skipped


def text_file(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (0, text in UTF-8). Raises ValueError with the reason to skip the file."""
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError("not readable" if isinstance(error, OSError) else "not UTF-8") from None
    if not content or b"\0" in content:
        raise ValueError("not text" if content else "empty")
    yield 0, content


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line, its text in UTF-8), without blank lines. Raises UserError for a bad line, OSError."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line = line.decode("utf-8-sig")
                record = json.loads(line) if line.strip() else {"text": ""}
                content = in_utf8(record.get("text") if isinstance(record, dict) else None)
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f'{path} line {number} is not {{"text": "..."}}: {error}') from None
            yield number, content


def parquet_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """(row, its text in UTF-8). Raises UserError without pyarrow, for another table, for a bad row."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as table:
            if "text" not in (columns := table.schema_arrow.names):
                raise UserError(f"{path} has no column text, only {', '.join(columns)}")
            batches = table.iter_batches(batch_size=256, columns=["text"])
            for row, value in enumerate(value for batch in batches for value in batch.column(0)):
                try:
                    content = in_utf8(value.as_py())
                except (ValueError, TypeError, OverflowError) as error:
                    raise UserError(f"{path} row {row} has no text: {error}") from None
                yield row, content
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def in_utf8(text: object) -> bytes:
    """Raises TypeError for what is no string, ValueError for half a surrogate pair, which JSON can escape."""
    if not isinstance(text, str):
        raise TypeError("text is missing" if text is None else f"text is {type(text).__name__}, expected a string")
    return text.removeprefix("\ufeff").encode()  # a byte-order mark is no text


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[np.ndarray, int, int]:
    """(order of the documents, index in it of the first held-out one, the byte of that one at which it is cut or 0).
    Raises UserError for too little text."""
    order = np.random.default_rng(seed).permutation(len(corpus.source))
    ends = np.cumsum(np.diff(np.array(corpus.end))[order])
    total = int(ends[-1])
    point = min(int(total * (1 - fraction) + 1e-6), total - 1)  # the first byte to hold out
    index = int(np.searchsorted(ends, point, side="right"))
    content = corpus.content(order[index])
    head = content[:len(content) - int(ends[index]) + point]
    cut = len(head.decode(errors="ignore").encode())  # not within a character
    if index == cut == 0:
        raise UserError(f"{total} bytes of text are too few for two parts at --val-fraction {fraction:g}")
    return order, index, cut


def token_runs(corpus: Corpus, encoding: "Encoding", documents: np.ndarray, begin: int = 0, end: int | None = None,
               ) -> Iterator[np.ndarray]:
    """uint16 (1 + T,) for each document: the separator, then its tokens. The first one is read from byte `begin` on,
    the last one up to byte `end`. Raises UserError."""
    last = len(documents) - 1
    for index, document in enumerate(tqdm(documents, desc="writing", unit=" documents", disable=None)):
        content = corpus.content(document)[begin if index == 0 else 0:end if index == last else None]
        try:
            tokens = encoding.encode(content.decode())
        except UserError as error:
            raise UserError(f"{corpus.name(document)}: {error}") from None
        yield np.concatenate([np.array([encoding.separator], "<u2"), tokens])


# ----------------------------------------------------------------------------------------------------------------------
# Encodings. They map a text to tokens, without a separator.


class Encoding(NamedTuple):
    """`encode` maps a text to uint16 (T,) tokens below `vocabulary`, none of them `separator`; `decode` maps one token
    to its bytes, which may be a part of a character; `tokens` lists the bytes of all, b"" for those not of text."""

    vocabulary: int
    separator: int
    encode: Callable[[str], np.ndarray]
    decode: Callable[[int], bytes] | None = None
    tokens: Callable[[], list[bytes]] | None = None


# A command line holds bytes that are not UTF-8 as escaped surrogates; documents have none.
BYTES = Encoding(257, 256, lambda text: np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype("<u2"),
                 lambda token: bytes([token]), lambda: [bytes([byte]) for byte in range(256)] + [b""])


def encoding_named(name: str) -> Encoding:
    """What --encoding says: bytes, a name that tiktoken knows, or a file. Raises UserError."""
    if name == "bytes":
        return BYTES
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"--encoding {name} needs the package tiktoken: pip install tiktoken") from None
    names = [known for known in tiktoken.list_encoding_names() if not known.startswith(TOO_LARGE)]
    if name in names:
        try:
            tokenizer = tiktoken.get_encoding(name)
        except Exception as error:  # noqa: BLE001  the loader lets its HTTP library's errors through
            raise UserError(f"--encoding {name} cannot be fetched ({type(error).__name__}); run once with a network, "
                            "or set TIKTOKEN_CACHE_DIR to a folder that holds it") from None
    elif os.path.isfile(os.path.expanduser(name)):
        tokenizer = file_tokenizer(typed_path(name))
    else:
        raise UserError(f"--encoding {name} is no regular file and no encoding of 16-bit tokens, expected bytes, "
                        f"{', '.join(names)} or a .tiktoken file")
    try:
        separator = tokenizer.eot_token
    except KeyError:  # no end of text: the next id
        separator = tokenizer.n_vocab

    def decode(token: int) -> bytes:
        try:
            return tokenizer.decode_single_token_bytes(token)
        except KeyError:  # ids may be left out; a model can draw them all the same
            return "\ufffd".encode()

    vocabulary = max(tokenizer.n_vocab, separator + 1)
    return Encoding(vocabulary, separator, lambda text: tiktoken_tokens(tokenizer, text), decode,
                    lambda: token_bytes(tokenizer, vocabulary))


def file_tokenizer(path: Path):
    """tiktoken's tokenizer of a file of ranks; its separator is the next id. Raises UserError."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    at, beside, pattern = path, path.with_suffix(".pattern"), r50k_pat_str
    try:
        ranks = read_ranks(path)
        if beside.exists():
            at = beside
            if not beside.is_file():
                raise ValueError("not a regular file")
            pattern = beside.read_text(encoding="utf-8-sig").rstrip("\r\n")
        return tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    except (OSError, ValueError) as error:
        raise UserError(f"{at} cannot be used: {str(error)[:300]}") from None


def token_bytes(tokenizer, vocabulary: int) -> list[bytes]:
    """The bytes of each token of tiktoken's; b"" for special ones, and for ids that are left out."""
    tokens = [b""] * vocabulary
    for token in tokenizer.token_byte_values():
        tokens[tokenizer.encode_single_token(token)] = token
    return tokens


def prefix_table(tokens: list[bytes]) -> np.ndarray:
    """int32 (vocabulary,): for each token the longest other one that its bytes begin with; -1: none."""
    ids = {token: i for i, token in enumerate(tokens) if token}
    return np.array([next((ids[token[:size]] for size in range(len(token) - 1, 0, -1) if token[:size] in ids), -1)
                     for token in tokens], "<i4")


def tiktoken_tokens(tokenizer, text: str) -> np.ndarray:
    """uint16 (T,). Raises UserError where the tokenizer's regular expression fails on this text."""
    from tiktoken_ext.openai_public import r50k_pat_str

    text, cuts, tokens = text.encode(errors="surrogateescape").decode(errors="replace"), [], []
    # GPT-2's pattern runs out of stack in a long run of whitespace with text after it. It splits such a run before its
    # last character, so that cutting there changes no token. (Rust's whitespace lacks four characters of Python's.)
    if is_gpt2 := getattr(tokenizer, "_pat_str", r50k_pat_str) == r50k_pat_str:
        cuts = [run.end() - 1 for run in re.finditer(r"[^\S\x1c-\x1f]{1000,}", text) if run.end() < len(text)]
    # Rust calls such a failure a panic: it writes a report to stderr and raises what is no Exception.
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        for begin, end in itertools.pairwise([0, *cuts, len(text)]):
            tokens += tokenizer.encode_ordinary(text[begin:end])
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        run = max(re.finditer(r"\s+|\S+|$", text), key=lambda run: len(run[0]))
        advice = "cut it" + ", or mend the tokenizer's pattern: it matches in too many ways, or nothing" * (not is_gpt2)
        raise UserError(f"tiktoken cannot split this text, whose longest run is {len(run[0]):,} characters from "
                        f"{run.start():,} on: {run[0][:20]!r}...; {advice}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
    if not is_gpt2 and tokenizer.decode_bytes(tokens) != text.encode():
        raise UserError(f"the pattern of {tokenizer.name} does not match every character of {text[:40]!r}...")
    return np.array(tokens, "<u2")


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a .tiktoken file and their ranks: 0, 1, 2 ... in any order. Raises ValueError, OSError. tiktoken's
    own reader keeps a copy under the path's name, and would go on with that when the file has changed."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if line.strip():
            try:
                word, rank = line.split()
                token, rank = base64.b64decode(word, validate=True), int(rank)
            except ValueError:
                token = b""
            if not token:
                raise ValueError(f"line {number} is {line.decode(errors='replace')[:40]!r}, expected a token in base64 "
                                 "and its rank, as 'SGk= 300'")
            ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"no token for the byte {missing[0]}")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once")
    return ranks


# ----------------------------------------------------------------------------------------------------------------------
# Tokens to shards. A shard gets its name only when all of them are complete.


def write_parts(parts: dict[str, Iterator[np.ndarray]], folder: Path, encoding: Encoding, shard_tokens: int,
                inputs: list[str]) -> dict[str, int]:
    """Write {stem: runs of tokens} and return {stem: tokens}. The shards of an earlier run are replaced only once the
    new ones are complete; on any error they stay, and nothing else does. Raises UserError for too few to train on."""
    counts, written = dict.fromkeys(parts, 0), {}
    try:
        for name, content in ((INPUTS, json.dumps(inputs).encode()), (PREFIXES, prefix_table(encoding.tokens()))):
            written[partial := folder / f".{name}.partial"] = folder / name
            partial.write_bytes(content)
        for stem, runs in parts.items():
            for number, pieces in itertools.groupby(shard_pieces(runs, shard_tokens), key=lambda piece: piece[0]):
                path = folder / f"{stem}_{number + (stem == 'text_train'):06d}.bin"
                written[partial := folder / f".{path.name}.partial"] = path
                counts[stem] += write_shard(partial, (piece for _, piece in pieces), encoding)
        if counts["text_train"] <= SHORTEST_ROW:  # a row, and the target of its last token
            raise UserError(f"{counts['text_train']} training tokens are too few, expected more than {SHORTEST_ROW}; "
                            "give more text, or a smaller --val-fraction")
        for partial, path in written.items():
            os.replace(partial, path)
    except BaseException:
        for partial in written:
            partial.unlink(missing_ok=True)
        raise
    # A shard that is left from a longer run would be read together with the new ones.
    for stem in parts:
        old = {*folder.glob(f"{stem}_??????.bin"), *folder.glob(f".{stem}_??????.bin.partial")}
        for path in old.difference(written.values()):
            path.unlink()
    return counts


def shard_pieces(runs: Iterator[np.ndarray], limit: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the shard, tokens) of shards with exactly `limit` tokens, the last one shorter."""
    number, room = 0, limit
    for run in runs:
        while len(run):
            yield number, run[:room]
            run, room = run[room:], room - len(run[:room])
            if not room:
                number, room = number + 1, limit


def write_shard(path: Path, pieces: Iterator[np.ndarray], encoding: Encoding) -> int:
    """Write one shard file and return its tokens. The header comes last, when the count is known, so that a file
    that was cut off cannot pass for a whole one."""
    header = np.zeros(HEADER_WORDS, "<i4")
    count = 0
    with open(path, "wb", buffering=1 << 20) as file:
        file.write(header.tobytes())
        for piece in pieces:
            file.write(piece.tobytes())
            count += len(piece)
        header[:5] = SHARD_MAGIC, SHARD_VERSION, count, encoding.vocabulary, encoding.separator
        file.seek(0)
        file.write(header.tobytes())
    return count


if __name__ == "__main__":
    open_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half-written goes, as on Ctrl-C
    try:
        main()
    except OSError as error:
        raise UserError(str(error)) from None
