"""Turn text into token shards to train on: text files, folders of them (read recursively), `.jsonl` (field `text`) and
`.parquet` (column `text`). Each file or record is one document. With no PATH, the sources of the Python standard
library are taken, so a first run needs no download.

    python data/text.py                                  # Python's own sources
    python data/text.py input.txt                        # one document: its last tenth is held out
    python data/text.py corpus/ more.jsonl --encoding gpt2 --out data/mine
    python data/text.py corpus/ --encoding mine.tiktoken # an own tokenizer: on each line a token in base64, its rank

Writes text_train_000001.bin ... and text_val_000000.bin ... as `train_gpt2.open_shard` describes them. The held-out
part is whole documents of a seeded shuffle; the training documents keep that shuffled order.
"""

import argparse
import base64
import json
import os
import shlex
import sys
import sysconfig
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from train_gpt2 import HEADER_WORDS, SHARD_MAGIC, SHARD_VERSION, Refusal, nearest, parse_command_line, tokens_until

DEFAULT_FOLDER = HERE / "text"
UINT16_VALUES = 2**16
KNOWN_VOCABULARIES = {"gpt2": 50_257, "r50k_base": 50_257, "p50k_base": 50_281, "p50k_edit": 50_284,
                      "cl100k_base": 100_277, "o200k_base": 200_019, "o200k_harmony": 201_088}  # of tiktoken's names
MANY_TOKENS = 2**14  # more make the tables of token pairs in tiny too slow for a CPU
FITTING = [name for name, vocabulary in KNOWN_VOCABULARIES.items() if vocabulary <= UINT16_VALUES]
LARGEST_COUNT = 2**31 - 1  # the header holds the token count as int32
NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


def main(arguments: list[str] | None = None) -> None:
    """Command line. Raises Refusal for bad input; the shards of an earlier run are then untouched."""
    options = parse(arguments)
    folder = options.out
    encoding = encoding_named(options.encoding)
    is_new = not folder.exists()
    try:
        files = list_files(options.paths) if options.paths else standard_library()
        folder.mkdir(parents=True, exist_ok=True)
        # In the output folder because that is where there is room, and opened first because that shows, before a
        # long reading, that the folder can be written to.
        with tempfile.TemporaryFile(dir=folder) as spool:
            corpus = list_documents(files, spool)
            training, held_out, documents = split(corpus, options.val_fraction, options.seed)
            with tqdm(total=documents, desc="writing", unit=" documents", disable=None) as progress:
                parts = {"text_val": (0, held_out), "text_train": (1, training)}
                counts = write_parts(parts, folder, encoding, options.shard_tokens, progress)
    except OSError as error:
        raise Refusal(f"cannot go on at {error.filename or folder}: {error.strerror}; mend that or name another folder "
                      "with --out") from None
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()
    for reason, paths in sorted(corpus.skipped.items()):
        print(f"skipped {len(paths):,} file{'s' * (len(paths) > 1)}: {reason} ({paths[0]}{', ...' * (len(paths) > 1)})")
    where = shown(folder)
    print(f"{documents:,} document{'s' if documents > 1 else ''}: {counts['text_train']:,} training and "
          f"{counts['text_val']:,} validation tokens in {where}", end="; ")
    tiny = parse_command_line(["--preset", "tiny"])
    if counts["text_train"] <= max(tiny.row_tokens):
        print(f"too few to train on: a row of tiny has {max(tiny.row_tokens)}")
        return
    if options.encoding not in ("bytes", "gpt2"):  # which evals/sample.py finds out by itself
        print(f"vocabulary {encoding.vocabulary:,} with separator {encoding.separator:,}; sample from a model of it "
              f"with --encoding {shlex.quote(options.encoding)}", end="; ")
    print("train on them with:")
    print(f"python {shlex.quote(shown(HERE.parent / 'train_gpt2.py'))} --preset tiny "
          f"--train-files {shlex.quote(where + '/text_train_*.bin')} "
          f"--val-files {shlex.quote(where + '/text_val_*.bin')}"
          + " --repeat true" * (counts["text_train"] <= tokens_until(tiny.steps, tiny))
          + " --bigram 0" * (encoding.vocabulary > MANY_TOKENS))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH",
                        help="text files, folders, .jsonl or .parquet (default: the Python standard library)")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, metavar="DIR",
                        help="folder of the shards (default text beside this script)")
    parser.add_argument("--encoding", default="bytes", metavar="NAME|FILE",
                        help="bytes: vocabulary 257; a name that tiktoken knows and fetches, as gpt2: vocabulary "
                             "50257; or a file, X.tiktoken; text is then split by the regular expression in X.pattern "
                             "where that lies beside it, else as for gpt2 (default bytes)")
    parser.add_argument("--val-fraction", default=0.1, metavar="F",
                        type=number("--val-fraction", float, lambda value: 0 < value < 1, "a fraction between 0 and 1"),
                        help="part of the documents to hold out; of a single one, its last characters (default 0.1)")
    parser.add_argument("--seed", default=0, metavar="S",
                        type=number("--seed", int, lambda value: value >= 0, "a whole number from 0"),
                        help="of the shuffle (default 0)")
    parser.add_argument("--shard-tokens", default=100_000_000, metavar="N",
                        type=number("--shard-tokens", int, lambda value: 1 <= value <= LARGEST_COUNT,
                                    f"1 to {LARGEST_COUNT}"),
                        help="largest shard, in tokens (default 100000000)")
    return parser.parse_args(arguments)


def number(option: str, kind: type, fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """A reader of one numeric option, for argparse. It raises Refusal for what does not fit."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise Refusal(f"{option} is {text!r}, expected {expected}; "
                          f"see: python {shown(Path(__file__).resolve())} --help")
        return value

    return read


# ----------------------------------------------------------------------------------------------------------------------
# Paths to files. In: what the command line names. Out: regular files in a fixed order, each once.


def list_files(paths: Iterable[Path]) -> list[Path]:
    """The files of `paths`, those of a folder in sorted order. Raises Refusal for a path that is not there."""
    found = {}
    for path in paths:
        if path.is_dir():
            members = walk(path)
        elif path.is_file():
            members = [path]
        else:
            raise Refusal(f"{path} is {'no file or folder' if path.exists() else 'not there'}, expected text files, "
                          f"folders, .jsonl or .parquet; look with: ls {shlex.quote(str(path.parent))}")
        for member in members:
            # A file named twice must not stand in the training and in the validation part.
            found.setdefault(os.path.realpath(member), member)
    return list(found.values())


def walk(folder: Path, leave_out: frozenset[str] | set[str] = frozenset()) -> Iterator[Path]:
    """Regular files below `folder`, sorted; folders named in `leave_out` are not entered."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - leave_out)
        for name in sorted(names):
            if os.path.isfile(path := os.path.join(parent, name)):  # a pipe or socket would block the reading
                yield Path(path)


def standard_library() -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in walk(folder, NOT_STANDARD_LIBRARY) if path.suffix == ".py"]


# ----------------------------------------------------------------------------------------------------------------------
# Files to documents. In: files. Out: one pair of integers for each document, so that a corpus larger than memory can
# be shuffled, and `text`, which reads one document at a time.


class Corpus(NamedTuple):
    """Where each document begins. `source` (documents) indexes `files`; `offset` (documents) is in bytes, within the
    file for .jsonl and within `spool` for .parquet; `skipped` lists files by the reason they were left out."""

    files: list[Path]
    spool: BinaryIO
    source: array
    offset: array
    skipped: dict[str, list[Path]]

    def text(self, document: int) -> str:
        """One whole document. Raises OSError when its file has gone since it was listed."""
        path, offset = self.files[self.source[document]], self.offset[document]
        kind = path.suffix.lower()
        if kind == ".parquet":
            self.spool.seek(offset)
            return json.loads(self.spool.readline())["text"]
        if kind == ".jsonl":
            with open(path, "rb") as lines:
                lines.seek(offset)
                return json.loads(lines.readline())["text"]
        return path.read_bytes().decode()


def list_documents(files: list[Path], spool: BinaryIO) -> Corpus:
    """Read every file once and note where its documents begin; empty ones are left out. Raises Refusal for a record
    without text and when nothing is left, OSError for a record file that cannot be read."""
    corpus = Corpus(files, spool, array("l"), array("q"), {})
    with tqdm(total=sum(os.path.getsize(path) for path in files), desc="reading", unit="B", unit_scale=True,
              disable=None) as progress:
        for index, path in enumerate(files):
            kind = path.suffix.lower()
            if kind == ".jsonl":
                offsets = jsonl_offsets(path, progress)
            elif kind == ".parquet":
                offsets = parquet_offsets(path, spool)
                progress.update(os.path.getsize(path))
            else:
                reason, offsets = why_not_text(path), [0]
                progress.update(os.path.getsize(path))
                if reason:
                    corpus.skipped.setdefault(reason, []).append(path)
                    continue
            for offset in offsets:
                corpus.source.append(index)
                corpus.offset.append(offset)
    if not corpus.source:
        skipped = "".join(f", {paths[0]} is {reason}" for reason, paths in corpus.skipped.items())
        change = "; another encoding is changed with: iconv -f LATIN1 -t UTF-8" * ("not UTF-8" in corpus.skipped)
        raise Refusal(f"no text found in {len(files)} file{'s' * (len(files) != 1)}{skipped}; expected UTF-8 text, "
                      f".jsonl or .parquet{change}")
    return corpus


def why_not_text(path: Path) -> str:
    """Why a file is left out, or an empty string for UTF-8 text."""
    try:
        content = path.read_bytes()
    except OSError:
        return "not readable"
    if not content:
        return "empty"
    if b"\0" in content:
        return "not text"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def jsonl_offsets(path: Path, progress: tqdm) -> Iterator[int]:
    """The byte offset of each record that holds text. Raises Refusal naming the file and line of a bad one."""
    with open(path, "rb") as lines:
        offset = 0
        for position, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise Refusal(f"{path} line {position} is not JSON: {error}; look with: "
                                  f"sed -n {position}p {shlex.quote(str(path))}") from None
                text = record.get("text") if isinstance(record, dict) else None
                if fault := why_not_string(text):
                    raise Refusal(f"{path} line {position} {fault}, expected {{\"text\": \"...\"}}; look with: "
                                  f"sed -n {position}p {shlex.quote(str(path))}")
                if text:
                    yield offset
            offset += len(line)
            progress.update(len(line))


def parquet_offsets(path: Path, spool: BinaryIO) -> Iterator[int]:
    """Copy the column `text` to `spool` as JSON lines and yield their byte offsets. Raises Refusal without pyarrow,
    without the column, and for a row without text."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Refusal(f"{path} needs the package pyarrow to be read: pip install pyarrow") from None
    try:
        with ParquetFile(path) as table:
            if "text" not in (columns := table.schema_arrow.names):
                raise Refusal(f"{path} has no column text, only {', '.join(columns)}; rename the one that holds text")
            # One record of Parquet costs the decoding of its whole row group, too much for reading in shuffled order.
            batches = table.iter_batches(batch_size=256, columns=["text"])
            for row, text in enumerate(text for batch in batches for text in batch.column(0).to_pylist()):
                if fault := why_not_string(text):
                    raise Refusal(f"{path} row {row} {fault}, expected a string; leave such rows out of it")
                if text:
                    yield spool.tell()
                    spool.write(json.dumps({"text": text}).encode() + b"\n")
    except pyarrow.ArrowException as error:
        raise Refusal(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}; write it again") from None


def why_not_string(text: object) -> str:
    """Why a record's text cannot be used, or an empty string. JSON can escape half a surrogate pair, UTF-8 cannot."""
    if not isinstance(text, str):
        return f"has {type(text).__name__} for text" if text is not None else "has no text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# Documents to two parts. In: the corpus. Out: iterators over the texts of the training and the held-out part.


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Iterable[str], Iterable[str], int]:
    """(training texts, held-out texts, number of documents). Whole documents are held out, at least one and never
    all; a single document is cut by characters. Raises Refusal when a cut leaves a part empty."""
    documents = len(corpus.source)
    if documents == 1:
        text = corpus.text(0)
        cut = int(len(text) * (1 - fraction))
        if not 0 < cut < len(text):
            raise Refusal(f"one document of {len(text)} characters leaves the {'validation' if cut else 'training'} "
                          f"part empty at --val-fraction {fraction:g}; give more text or another fraction")
        return [text[:cut]], [text[cut:]], 1
    order = np.random.default_rng(seed).permutation(documents)
    kept = documents - min(max(round(documents * fraction), 1), documents - 1)
    return map(corpus.text, order[:kept]), map(corpus.text, order[kept:]), documents


# ----------------------------------------------------------------------------------------------------------------------
# Texts to tokens. Out: uint16 (T,) for each text, without its separator.


class Encoding(NamedTuple):
    """`encode` maps a text to uint16 (T,) tokens below `vocabulary`, none of them `separator`; `decode` maps one token
    to its bytes, which may be a part of a character."""

    vocabulary: int
    separator: int
    encode: Callable[[str], np.ndarray]
    decode: Callable[[int], bytes] | None = None


# A command line holds bytes that are not UTF-8 as escaped surrogates; documents have none.
BYTES = Encoding(257, 256, lambda text: np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype("<u2"),
                 lambda token: bytes([token]))


def encoding_named(name: str) -> Encoding:
    """What --encoding says: bytes, a name that tiktoken knows, or a file of ranks. Raises Refusal when it cannot be had
    or its ids do not fit the shards."""
    if name == "bytes":
        return BYTES
    try:
        import tiktoken
    except ImportError:
        raise Refusal(f"the package tiktoken is missing, expected by --encoding {name}: pip install tiktoken") from None
    names = tiktoken.list_encoding_names()
    if name not in names:
        if os.path.isfile(name):
            return file_encoding(Path(name))
        what, mend = "is no encoding", f"the nearest is --encoding {nearest(name, ['bytes', *FITTING])}"
        if Path(name).suffix or os.sep in name:
            what = "is a folder" if os.path.isdir(name) else "is not there"
            mend = f"look with: ls {shlex.quote(str(Path(name).parent))}"
        raise Refusal(f"--encoding {name} {what}, expected bytes, {', '.join(FITTING)} or a .tiktoken file; {mend}")
    check_fit(name, KNOWN_VOCABULARIES.get(name, 0))  # before it is fetched
    try:
        tokenizer = tiktoken.get_encoding(name)
    except Exception as error:  # noqa: BLE001  the loader lets its HTTP library's errors through
        raise Refusal(f"the encoding {name} is not here and cannot be fetched "
                      f"({getattr(error, 'strerror', None) or type(error).__name__}); run once with "
                      "a network, or set TIKTOKEN_CACHE_DIR to a folder that holds it (bytes and files need no "
                      "download)") from None
    try:
        separator = tokenizer.eot_token or tokenizer.n_vocab  # 0 in a header means that none is stated
    except KeyError:  # no end of text among its own: the next id
        separator = tokenizer.n_vocab
    check_fit(name, vocabulary := max(tokenizer.n_vocab, separator + 1))

    def decode(token: int) -> bytes:
        try:
            return tokenizer.decode_single_token_bytes(token)
        except KeyError:  # ids may be left out; a model can draw them all the same
            return "\ufffd".encode()

    return Encoding(vocabulary, separator, lambda text: np.array(tokenizer.encode_ordinary(text), "<u2"), decode)


def check_fit(name: str | Path, vocabulary: int) -> None:
    """Raises Refusal for more ids than 16 bits tell apart. vocabulary: with the separator."""
    if vocabulary > UINT16_VALUES:
        raise Refusal(f"--encoding {name} has a vocabulary of {vocabulary} with its separator, but shards hold 16-bit "
                      f"tokens, expected at most {UINT16_VALUES}; {', '.join(FITTING)} fit, for example: "
                      f"--encoding {FITTING[0]}")


def file_encoding(path: Path) -> Encoding:
    """The encoding of a file of ranks; its separator is the next id. A pattern, which the file cannot hold, is read
    from beside it, so that sampling splits text as these shards did. Raises Refusal."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks, beside = read_ranks(path), path.with_suffix(".pattern")
    check_fit(path, vocabulary := len(ranks) + 1)
    try:
        pattern = beside.read_text(encoding="utf-8").rstrip("\r\n") if os.path.exists(beside) else r50k_pat_str
        tokenizer = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens={"<|endoftext|>": vocabulary - 1})
    except (OSError, ValueError) as error:
        raise Refusal(f"{beside} cannot be used: {' '.join(str(error).split())[:200]}; expected a regular expression "
                      f"of tiktoken's kind; mend it, or split as GPT-2 does: rm {shlex.quote(str(beside))}") from None
    lengths = np.zeros(vocabulary, np.int64)
    lengths[list(ranks.values())] = [len(token) for token in ranks]

    def encode(text: str) -> np.ndarray:
        text = text.encode(errors="surrogateescape").decode(errors="replace")
        try:
            tokens = np.array(tokenizer.encode_ordinary(text), "<u2")
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # which is tiktoken's own and no Exception
                raise
            tokens = None
        if tokens is None or lengths[tokens].sum() != len(text.encode()):
            raise Refusal(f"the pattern in {beside} does not split all text, as in the {len(text):,} characters that "
                          f"begin with {text[:40]!r}; expected one that matches every character and nothing empty; "
                          f"mend it, or split as GPT-2 does: rm {shlex.quote(str(beside))}")
        return tokens

    return Encoding(vocabulary, vocabulary - 1, encode, tokenizer.decode_single_token_bytes)


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a .tiktoken file and their ranks, which are 0, 1, 2 ... in any order. Raises Refusal for others.
    tiktoken's own reader keeps a copy under the path's name, and would go on with that when the file has changed."""
    ranks, line_of = {}, {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise Refusal(f"--encoding {path} cannot be read: {error.strerror}; mend that or name another file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            word, rank = line.split()
            token, rank = base64.b64decode(word, validate=True), int(rank)
        except ValueError:
            rank = -1
        fault = ""
        if not 0 <= rank < 2**31:
            fault = f"is {line.decode(errors='replace')[:40]!r}"
        elif token in ranks or rank in line_of:
            fault = f"has the {'token' if token in ranks else 'rank'} of line {line_of[ranks.get(token, rank)]}"
        if fault:
            raise Refusal(f"{path} line {number} {fault}, expected a token in base64 and its rank, each once, as "
                          f"'SGk= 300'; look with: sed -n {number}p {shlex.quote(str(path))}")
        ranks[token], line_of[rank] = rank, number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    gap = next(rank for rank in range(len(ranks) + 1) if rank not in line_of)
    if missing or gap < len(ranks):
        fault = ("no token" if not ranks else f"no token for the single byte {missing[0]}" if missing else
                 f"no rank {gap} though others up to {max(line_of)}")
        raise Refusal(f"{path} holds {fault}, expected ranks from 0 without a gap, the 256 single bytes among them; "
                      "write it again with the program that made it, or take --encoding bytes")
    return ranks


# ----------------------------------------------------------------------------------------------------------------------
# Tokens to shards. A shard gets its name only when all of them are complete.


def write_parts(parts: dict[str, tuple[int, Iterable[str]]], folder: Path, encoding: Encoding, shard_tokens: int,
                progress: tqdm) -> dict[str, int]:
    """Write {stem: (first shard number, texts)} and return {stem: tokens}. The shards of an earlier run are replaced
    only once the new ones are complete; on any error they stay, and nothing else does."""
    counts, written = {}, []
    try:
        for stem, (first, texts) in parts.items():
            before = len(written)
            for shard in shards(token_runs(texts, encoding, progress), shard_tokens):
                name = f"{stem}_{first + len(written) - before:06d}.bin"
                written.append((folder / f".{name}.partial", folder / name))
                counts[stem] = counts.get(stem, 0) + write_shard(written[-1][0], shard, encoding)
        for partial, path in written:
            os.replace(partial, path)
    except BaseException:
        for partial, _ in written:
            partial.unlink(missing_ok=True)
        raise
    # A shard that is left from a longer run would be read together with the new ones.
    new = {path for _, path in written}
    for stem in parts:
        for path in [*folder.glob(f"{stem}_??????.bin"), *folder.glob(f".{stem}_??????.bin.partial")]:
            if path not in new:
                path.unlink()
    return counts


def token_runs(texts: Iterable[str], encoding: Encoding, progress: tqdm) -> Iterator[np.ndarray]:
    """uint16 (1 + T,) for each text: the separator, then its tokens."""
    for text in texts:
        yield np.concatenate([np.array([encoding.separator], "<u2"), encoding.encode(text)])
        progress.update()


def shards(runs: Iterator[np.ndarray], limit: int) -> Iterator[Iterator[np.ndarray]]:
    """Group runs of tokens into shards of exactly `limit` tokens, the last one shorter. A document that does not fit
    goes on in the next shard, because the shards are read as one stream. Each group must be used up before the next."""
    rest = next(runs, None)

    def shard() -> Iterator[np.ndarray]:
        nonlocal rest
        room = limit
        while rest is not None and room:
            piece, rest = rest[:room], rest[room:]
            room -= len(piece)
            yield piece
            if not len(rest):
                rest = next(runs, None)

    while rest is not None:
        yield shard()


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


def shown(path: Path) -> str:
    """A path as short as it can be typed in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
