"""The scripts that make shards: `data/fineweb.py` against a stand-in for the hub, `data/text.py` on generated text."""

import base64
import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from huggingface_hub import constants

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import fineweb
import text as text_script

from train_gpt2 import HEADER_WORDS, SHARD_MAGIC, SHARD_VERSION, Refusal, open_shard


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Printed commands and paths are those of a person who stands in the repository."""
    monkeypatch.chdir(ROOT)


def refused(main, *arguments) -> str:
    """The one line with which a script turns `arguments` down."""
    with pytest.raises(Refusal) as caught:
        main([str(argument) for argument in arguments])
    line = caught.value.code
    assert isinstance(line, str)  # a text as exit code is printed on stderr and exits with status 1
    assert "\n" not in line
    return line


# ----------------------------------------------------------------------------------------------------------------------
# data/fineweb.py


def shard_bytes(seed: int, tokens: int = 3000, promised: int | None = None) -> bytes:
    """A shard as the hub holds it: no vocabulary or separator in the header, which means GPT-2."""
    header = np.zeros(HEADER_WORDS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, promised or tokens
    return header.tobytes() + np.random.default_rng(seed).integers(0, 50257, tokens).astype("<u2").tobytes()


class Hub:
    """Serves `files` {name: bytes} as the dataset repository. `requests` are (method, name, Range header or None);
    a name in `cut` loses its connection halfway, once."""

    def __init__(self):
        self.files = {name: shard_bytes(seed) for seed, name in enumerate(fineweb.shard_names(4))}
        self.requests, self.cut = [], set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body: bool):
                folder, _, name = self.path.rpartition("/")
                asked = self.headers["Range"]
                content = None
                if folder == "/datasets/kjj0/fineweb10B-gpt2/resolve/main":  # the client also asks for other things
                    hub.requests.append((self.command, name, asked))
                    content = hub.files.get(name)
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.end_headers()
                    return
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
                self.send_response(206 if asked else 200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(content) - start))
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if with_body and name in hub.cut:
                    hub.cut.remove(name)
                    content = content[:len(content) // 2]
                if with_body:
                    self.wfile.write(content[start:])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        return [name for method, name, _ in self.requests if method == "GET"]


def point_to(address: str, monkeypatch, cache: Path) -> None:
    """Send the hub client of this process to `address`. It reads HF_ENDPOINT once, at import."""
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    served = Hub()
    point_to(served.address, monkeypatch, tmp_path / "cache")
    yield served
    served.close()


def fetch(count: int, folder: Path) -> None:
    fineweb.main([str(count), "--out", str(folder)])


def test_default_is_what_the_five_minute_recipe_opens():
    options = fineweb.parse([])
    assert (options.count, options.out) == (10, ROOT / "data" / "fineweb10B")
    assert fineweb.shard_names(103)[:2] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    assert fineweb.shard_names(103)[-1] == "fineweb_train_000103.bin"


def test_fetches_the_shards_byte_for_byte_and_then_needs_no_network(hub, tmp_path, capsys):
    fetch(2, tmp_path / "shards")
    assert hub.fetched() == fineweb.shard_names(2)
    for name in fineweb.shard_names(2):
        assert (tmp_path / "shards" / name).read_bytes() == hub.files[name]
    assert "3 shards, 9,000 tokens" in capsys.readouterr().out
    hub.requests.clear()
    fetch(2, tmp_path / "shards")
    assert hub.requests == []


def test_goes_on_with_the_shards_that_are_missing(hub, tmp_path):
    fetch(1, tmp_path)
    os.remove(tmp_path / "fineweb_val_000000.bin")
    kept = (tmp_path / "fineweb_train_000001.bin").stat()
    hub.requests.clear()
    fetch(2, tmp_path)
    assert hub.fetched() == ["fineweb_val_000000.bin", "fineweb_train_000002.bin"]
    assert (tmp_path / "fineweb_train_000001.bin").stat().st_mtime_ns == kept.st_mtime_ns


def test_goes_on_where_a_connection_broke(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # bytes; the client keeps whole chunks alone
    name = "fineweb_train_000001.bin"
    hub.cut.add(name)
    fetch(1, tmp_path)
    assert (tmp_path / name).read_bytes() == hub.files[name]
    ranges = [asked for method, requested, asked in hub.requests if (method, requested) == ("GET", name)]
    assert ranges == [None, "bytes=3000-"]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-2], lambda whole: whole + b"\0\0", lambda whole: whole[:100],
                                    lambda whole: b"<html>" + whole[6:]], ids=["short", "long", "stub", "not a shard"])
def test_refuses_a_damaged_file_that_is_there_before_it_fetches_anything(hub, tmp_path, damage):
    path = tmp_path / "fineweb_train_000002.bin"
    path.write_bytes(damaged := damage(shard_bytes(2)))
    line = refused(fineweb.main, 3, "--out", tmp_path)
    assert line.endswith(f"rm {path} && python data/fineweb.py 3 --out {tmp_path}")
    assert line.count("&&") == 1  # one mending command, not the trainer's beside it
    assert path.read_bytes() == damaged
    assert hub.requests == []


def test_refuses_a_damaged_download(hub, tmp_path):
    hub.files["fineweb_train_000001.bin"] = shard_bytes(1, tokens=3000, promised=4000)
    line = refused(fineweb.main, 2, "--out", tmp_path)
    assert f"rm {tmp_path / 'fineweb_train_000001.bin'} && python" in line
    assert open_shard(tmp_path / "fineweb_val_000000.bin").tokens == 3000
    assert "fineweb_train_000002.bin" not in hub.fetched()


def test_says_at_once_that_the_hub_cannot_be_reached(monkeypatch, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    point_to(address, monkeypatch, tmp_path / "cache")
    began = time.monotonic()
    line = refused(fineweb.main, 1, "--out", tmp_path)
    assert time.monotonic() - began < 5
    assert f"cannot fetch fineweb_val_000000.bin from {address}" in line
    assert line.endswith(f"go on with: python data/fineweb.py 1 --out {tmp_path}")


def test_an_error_of_the_hub_is_one_line(hub, tmp_path):
    del hub.files["fineweb_train_000001.bin"]
    line = refused(fineweb.main, 1, "--out", tmp_path)
    assert "cannot fetch fineweb_train_000001.bin" in line
    assert "404" in line


def test_a_stop_by_hand_tells_how_to_go_on(hub, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.hf_hub_download", stop)
    assert refused(fineweb.main, 1, "--out", tmp_path).endswith(f"fineweb.py 1 --out {tmp_path}")


def test_refuses_a_folder_that_cannot_be(hub, tmp_path):
    (tmp_path / "file").touch()
    assert "--out" in refused(fineweb.main, 1, "--out", tmp_path / "file")


@pytest.mark.parametrize("count", ["0", "-3", "104", "ten", "1.5", ""])
def test_refuses_a_bad_count(count, tmp_path):
    line = refused(fineweb.main, count, "--out", tmp_path / "shards")
    assert repr(count) in line
    assert "1 to 103" in line
    assert not (tmp_path / "shards").exists()


def test_the_mending_command_mends_in_the_folder_beside_the_script(hub, tmp_path):
    """The only test in processes of their own: HF_ENDPOINT, exit status, stderr and the default folder."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "data" / "fineweb10B").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(ROOT / "train_gpt2.py", project)
    shutil.copy(ROOT / "data" / "fineweb.py", project / "data")
    damaged = project / "data" / "fineweb10B" / "fineweb_train_000001.bin"
    damaged.write_bytes(shard_bytes(1)[:-2])
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path),
                                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    first = subprocess.run([sys.executable, project / "data" / "fineweb.py", "1"], cwd=elsewhere, env=environment,
                           capture_output=True, text=True, check=False)
    assert first.returncode == 1
    assert len(first.stderr.splitlines()) == 1
    mend = first.stderr.rpartition(": ")[2]
    second = subprocess.run(mend, shell=True, cwd=elsewhere, env=environment, capture_output=True, text=True,
                            check=False)
    assert second.returncode == 0, second.stderr
    for name in fineweb.shard_names(1):
        assert (damaged.parent / name).read_bytes() == hub.files[name]


# ----------------------------------------------------------------------------------------------------------------------
# data/text.py


def make(*arguments) -> None:
    text_script.main([str(argument) for argument in arguments])


def stream(folder: Path, part: str, vocabulary: int = 257, separator: int = 256) -> np.ndarray:
    """uint16 (T,): the tokens of all shards of a part, in name order."""
    tokens = []
    for path in sorted(folder.glob(f"text_{part}_*.bin")):
        shard = open_shard(path)
        assert (shard.vocabulary, shard.separator) == (vocabulary, separator)
        tokens.append(np.fromfile(path, "<u2", offset=4 * HEADER_WORDS))
    return np.concatenate(tokens)


def documents(folder: Path, part: str) -> list[bytes]:
    """The documents of a part of byte tokens, in stream order."""
    tokens = stream(folder, part)
    assert tokens[0] == 256
    return [piece[1:].astype(np.uint8).tobytes() for piece in np.split(tokens, np.flatnonzero(tokens == 256))[1:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Twelve documents of 50 to 160 bytes in one file of records."""
    return write_jsonl(tmp_path / "corpus.jsonl", [f"{i:02} " + "word " * (10 + 2 * i) for i in range(12)])


def test_bytes_of_every_document_come_back(tmp_path, capsys):
    source = tmp_path / "source"
    (source / "deep" / "deeper").mkdir(parents=True)
    texts = {"a.txt": b"line\r\nline\rline\n\n", "deep/b.md": "naïve 数 \U0001f600\n".encode(),
             "deep/deeper/c": b"\xef\xbb\xbfwith a mark", "deep/twin.txt": b"line\r\nline\rline\n\n"}
    for name, text in texts.items():
        (source / name).write_bytes(text)
    (source / "picture.png").write_bytes(b"\x89PNG\0")
    (source / "latin1.txt").write_bytes("café".encode("latin-1"))
    (source / "empty.txt").touch()
    os.mkfifo(source / "pipe")
    records = ["one\r\nrecord", "two ☃", "<|endoftext|>", "x" * 500]
    lines = [json.dumps({"text": record}) for record in records]
    (source / "records.jsonl").write_text("\n".join([lines[0] + "\r", "", *lines[1:], '{"text": ""}', "\r", ""]))
    make(source, source / "a.txt", "--out", tmp_path / "out", "--shard-tokens", 60)
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert Counter(found) == Counter([*texts.values(), *(record.encode() for record in records)])
    assert len(documents(tmp_path / "out", "val")) == 1
    out = capsys.readouterr().out
    for reason in ("empty", "not text", "not UTF-8"):
        assert f"skipped 1 file: {reason} ({source}" in out


def test_summary_gives_the_counts_and_the_command_to_train(corpus, tmp_path, capsys):
    folder = tmp_path / "my shards"
    make(corpus, "--out", folder)
    summary, train = capsys.readouterr().out.splitlines()
    counts = [f"{len(stream(folder, part)):,} {word}" for part, word in (("train", "training"), ("val", "validation"))]
    assert summary.startswith(f"12 documents: {counts[0]} and {counts[1]} tokens in {folder}")
    expected = (f"python train_gpt2.py --preset tiny --train-files '{folder}/text_train_*.bin' "
                f"--val-files '{folder}/text_val_*.bin'")
    assert train == expected + " --repeat true"  # less text than the run reads
    (tmp_path / "long.txt").write_text("So much to read. " * 50_000)
    make(tmp_path / "long.txt", "--out", folder)
    assert capsys.readouterr().out.splitlines()[-1] == expected
    (tmp_path / "short.txt").write_text("Hello, world!")
    make(tmp_path / "short.txt", "--out", folder)
    assert capsys.readouterr().out.endswith("too few to train on: a row of tiny has 128\n")


def test_shards_are_numbered_full_and_one_stream(corpus, tmp_path):
    make(corpus, "--out", tmp_path / "cut", "--shard-tokens", 100, "--val-fraction", 0.3)
    make(corpus, "--out", tmp_path / "whole", "--val-fraction", 0.3)
    names = sorted(contents(tmp_path / "cut"))
    train, val = [n for n in names if "train" in n], [n for n in names if "val" in n]
    assert train == [f"text_train_{i:06d}.bin" for i in range(1, len(train) + 1)]
    assert val == [f"text_val_{i:06d}.bin" for i in range(len(val))]
    assert len(train) > 2 < len(val)
    for part in (train, val):
        sizes = [open_shard(tmp_path / "cut" / name).tokens for name in part]
        assert set(sizes[:-1]) == {100}
        assert 0 < sizes[-1] <= 100
    for part in ("train", "val"):
        np.testing.assert_array_equal(stream(tmp_path / "cut", part), stream(tmp_path / "whole", part))


def test_a_shard_that_ends_with_the_text_is_not_followed_by_an_empty_one(tmp_path):
    write_jsonl(tmp_path / "two.jsonl", ["a" * 39, "b" * 39])
    make(tmp_path / "two.jsonl", "--out", tmp_path / "out", "--shard-tokens", 20)
    assert sorted(contents(tmp_path / "out")) == ["text_train_000001.bin", "text_train_000002.bin",
                                                  "text_val_000000.bin", "text_val_000001.bin"]


@pytest.mark.parametrize(("number", "fraction", "held_out"),
                         [(10, 0.1, 1), (12, 0.25, 3), (10, 0.9, 9), (10, 0.3, 3), (2, 0.1, 1), (2, 0.9, 1)])
def test_the_held_out_part_is_that_fraction_of_whole_documents(tmp_path, number, fraction, held_out):
    write_jsonl(tmp_path / "all.jsonl", [f"document {i}" for i in range(number)])
    make(tmp_path / "all.jsonl", "--out", tmp_path / "out", "--val-fraction", fraction)
    assert len(documents(tmp_path / "out", "val")) == held_out
    assert len(documents(tmp_path / "out", "train")) == number - held_out


def test_the_seed_alone_decides_the_order(corpus, tmp_path):
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        make(corpus, "--out", tmp_path / name, "--seed", seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "again")
    order = documents(tmp_path / "first", "train") + documents(tmp_path / "first", "val")
    other = documents(tmp_path / "other", "train") + documents(tmp_path / "other", "val")
    assert order != sorted(order)
    assert order != other
    assert sorted(order) == sorted(other)


@pytest.mark.parametrize(("fraction", "cut"), [(0.1, 1_003_854), (0.25, 836_545)])
def test_a_single_document_is_cut_by_characters(tmp_path, fraction, cut):
    text = ("Ünïcode\r\nlines, " * 70_000)[:1_115_394]
    (tmp_path / "one.txt").write_bytes(text.encode())
    make(tmp_path / "one.txt", "--out", tmp_path / "out", "--val-fraction", fraction)
    assert [d.decode() for d in documents(tmp_path / "out", "train")] == [text[:cut]]
    assert [d.decode() for d in documents(tmp_path / "out", "val")] == [text[cut:]]


def test_without_a_path_it_takes_the_sources_of_the_standard_library(tmp_path, monkeypatch):
    for name in ("os.py", "json/tool.py", "json/notes.txt", "site-packages/np.py", "dist-packages/np.py",
                 "test/test_os.py", "idlelib/idle.py"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(text_script.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    make("--out", tmp_path / "out")
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert sorted(found) == [b"json/tool.py", b"os.py"]
    assert text_script.parse([]).out == ROOT / "data" / "text"


class FakeEncoding:
    """Stands for tiktoken's GPT-2 encoding, which needs a download: a character is one token."""

    n_vocab, eot_token = 50257, 50256

    def encode_ordinary(self, text: str) -> list[int]:
        return [ord(character) + 1000 for character in text]


def test_gpt2_tokens_and_header(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": FakeEncoding()}.__getitem__)
    (tmp_path / "one.txt").write_text("abcdefghij")
    make(tmp_path / "one.txt", "--out", tmp_path / "out", "--encoding", "gpt2")
    assert stream(tmp_path / "out", "train", 50257, 50256).tolist() == [50256, *range(1097, 1106)]
    assert stream(tmp_path / "out", "val", 50257, 50256).tolist() == [50256, 1106]


def test_refuses_an_encoding_that_cannot_be_had_or_does_not_fit(corpus, tmp_path, monkeypatch):
    def unreachable(name):
        raise ConnectionError(f"no route\nto {name}")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    assert "TIKTOKEN_CACHE_DIR" in refused(text_script.main, corpus, "--out", tmp_path / "out", "--encoding", "gpt2")
    large = FakeEncoding()
    large.n_vocab = 65_537
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    assert "65536" in refused(text_script.main, corpus, "--out", tmp_path / "out", "--encoding", "gpt2")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "pip install tiktoken" in refused(text_script.main, corpus, "--out", tmp_path / "out", "--encoding", "gpt2")
    assert not (tmp_path / "out").exists()


def made_up_encoding(monkeypatch, tokens: int, end_of_text: int | None, name: str = "gpt2") -> None:
    """Lets tiktoken have an encoding of that many ids under this name: a character is one token."""

    class Encoding(FakeEncoding):
        n_vocab = tokens

        @property
        def eot_token(self) -> int:
            return {"<|endoftext|>": end_of_text}["" if end_of_text is None else "<|endoftext|>"]  # as tiktoken's

        def decode_single_token_bytes(self, token: int) -> bytes:
            return {1097: b"a"}[token]

    monkeypatch.setattr(tiktoken, "get_encoding", {name: Encoding()}.__getitem__)


@pytest.mark.parametrize(("tokens", "end_of_text", "vocabulary", "separator"), [
    (50_281, 50_256, 50_281, 50_256),  # ids behind the end of text, as in p50k_base
    (50_000, None, 50_001, 50_000),
    (50_300, 0, 50_301, 50_300),  # the trainer reads a separator of 0 as none stated
    (65_536, 65_535, 65_536, 65_535),
    (65_535, None, 65_536, 65_535)])
def test_any_name_that_tiktoken_knows(tmp_path, monkeypatch, capsys, tokens, end_of_text, vocabulary, separator):
    made_up_encoding(monkeypatch, tokens, end_of_text, "p50k_base")
    (tmp_path / "one.txt").write_text("abcdefghij" * 200)
    make(tmp_path / "one.txt", "--out", tmp_path / "out", "--encoding", "p50k_base")
    found = stream(tmp_path / "out", "val", vocabulary, separator)
    assert found.tolist() == [separator, *[*range(1097, 1107)] * 20]
    summary, command = capsys.readouterr().out.splitlines()
    assert f"vocabulary {vocabulary:,} with separator {separator:,}; sample from " in summary
    assert "--encoding p50k_base" in summary
    assert command.endswith(" --repeat true --bigram 0")
    decode = text_script.encoding_named("p50k_base").decode
    assert [decode(1097), decode(1098)] == [b"a", "\ufffd".encode()]  # the latter is an id that stands for nothing


@pytest.mark.parametrize(("tokens", "end_of_text"), [(65_537, 50_256), (65_536, None)])
def test_refuses_a_name_with_too_many_ids(corpus, tmp_path, monkeypatch, tokens, end_of_text):
    made_up_encoding(monkeypatch, tokens, end_of_text)
    line = refused(text_script.main, corpus, "--out", tmp_path / "out", "--encoding", "gpt2")
    assert "a vocabulary of 65537 " in line
    assert "at most 65536" in line


def test_refuses_names_that_cannot_be_before_anything_is_fetched(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pytest.fail(f"{name} was fetched"))
    assert set(text_script.KNOWN_VOCABULARIES) == set(tiktoken.list_encoding_names())
    too_large = {"cl100k_base": 100_277, "o200k_base": 200_019, "o200k_harmony": 201_088}
    faults = [(name, f"has a vocabulary of {found} ") for name, found in too_large.items()]
    faults += [(name, "gpt2, r50k_base, p50k_base, p50k_edit fit") for name in too_large]
    faults += [("gtp2", "is no encoding, expected bytes, gpt2, "), ("byte", "the nearest is --encoding bytes"),
               ("", "is no encoding"), ("x" * 5000, "is no encoding"), (tmp_path, "is a folder"),
               (tmp_path / "no.tiktoken", "is not there"), (tmp_path / "no.tiktoken", f"ls {tmp_path}")]
    for name, fault in faults:
        line = refused(text_script.main, corpus, "--out", tmp_path / "out", "--encoding", name)
        assert line.startswith(f"--encoding {name} ")
        assert fault in line
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_separator_in_a_text_is_text(tmp_path, monkeypatch):
    bytes_alone = {bytes([i]): i for i in range(256)}
    special = {"<|endoftext|>": 300, "<|fim_prefix|>": 310}
    tokenizer = tiktoken.Encoding("made up", pat_str=r"[\s\S]", mergeable_ranks=bytes_alone, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"p50k_edit": tokenizer}.__getitem__)
    text = "a<|endoftext|>b<|fim_prefix|>"
    (tmp_path / "one.txt").write_text(text * 2)
    make(tmp_path / "one.txt", "--out", tmp_path / "out", "--encoding", "p50k_edit", "--val-fraction", 0.5)
    for part in ("train", "val"):
        assert stream(tmp_path / "out", part, 311, 300).tolist() == [300, *text.encode()]


def test_gpt2_itself_takes_the_name_of_its_separator_for_text():
    url = b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    if not (Path(os.environ.get("TIKTOKEN_CACHE_DIR", "none")) / hashlib.sha1(url).hexdigest()).is_file():
        pytest.skip("needs GPT-2's encoding in TIKTOKEN_CACHE_DIR")
    gpt2 = text_script.encoding_named("gpt2")
    assert gpt2[:2] == (50_257, 50_256)
    tokens = gpt2.encode("a<|endoftext|>b").tolist()
    assert tokens == [64, 27, 91, 437, 1659, 5239, 91, 29, 65]
    assert b"".join(map(gpt2.decode, tokens)) == b"a<|endoftext|>b"


MERGES = [b"th", b"the", b" the", b"\xe2\x98", b"e ", b"<|", b"nd"]


def write_ranks(path: Path, merges: list[bytes] = MERGES) -> Path:
    """A .tiktoken file: the 256 bytes, the last one first, then `merges`. Its lines are not in order of rank."""
    tokens = [bytes([255 - i]) for i in range(256)] + merges
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines[100:] + lines[:100]))
    return path


def test_text_comes_back_from_the_tokens_of_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # its reader, the reference below, then keeps no copy
    own, out = write_ranks(tmp_path / "my own.tiktoken"), tmp_path / "out"
    texts = ["the end of the day \u2603", "<|endoftext|>", "a<|endoftext|>\r\n\tb", "\U0001f600 na\u00efve  x\u0663",
             "x" * 3000]
    make(write_jsonl(tmp_path / "texts.jsonl", texts), "--out", out, "--encoding", own)
    separator = 256 + len(MERGES)
    tokens = np.concatenate([stream(out, part, separator + 1, separator) for part in ("train", "val")])
    assert np.count_nonzero(tokens == separator) == len(texts)  # and not one more for the text <|endoftext|>
    ranks = tiktoken.load.load_tiktoken_bpe(str(own))
    assert set(ranks.values()) == set(range(separator))
    of_rank = {rank: token for token, rank in ranks.items()}
    found = [b"".join(of_rank[token] for token in document[1:].tolist())
             for document in np.split(tokens, np.flatnonzero(tokens == separator))[1:]]
    assert Counter(found) == Counter(text.encode() for text in texts)
    encoding = text_script.encoding_named(str(own))
    assert encoding.encode("the end").tolist() == [ranks[b"the"], ranks[b" "], ranks[b"e"], ranks[b"nd"]]
    assert encoding.encode("of the").tolist() == [ranks[b"o"], ranks[b"f"], ranks[b" the"]]
    assert [encoding.decode(token) for token in encoding.encode("\u2603")] == [b"\xe2\x98", b"\x83"]
    assert encoding.encode("a\udcff").tolist() == encoding.encode("a\ufffd").tolist()  # of a command line
    assert f"sample from a model of it with --encoding '{own}'; " in capsys.readouterr().out


def test_a_file_that_has_changed_is_read_anew(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for merges in (MERGES, MERGES[:3]):
        own = write_ranks(tmp_path / "own.tiktoken", merges)
        make(corpus, "--out", tmp_path / "out", "--encoding", own)
        stream(tmp_path / "out", "train", 257 + len(merges), 256 + len(merges))


def test_text_is_split_by_the_pattern_beside_the_file(tmp_path):
    own, beside = write_ranks(tmp_path / "own.tiktoken"), tmp_path / "own.pattern"
    (tmp_path / "one.txt").write_text("one two " * 100)
    across = 256 + MERGES.index(b"e ")  # which GPT-2's pattern cuts in two

    def tokens() -> list[int]:
        make(tmp_path / "one.txt", "--out", tmp_path / "out", "--encoding", own)
        return stream(tmp_path / "out", "train", 257 + len(MERGES), 256 + len(MERGES)).tolist()

    assert across not in tokens()
    beside.write_text("[\\s\\S]+\n")
    assert across in tokens()
    before = contents(tmp_path / "out")
    for pattern, fault in (("(((\n", "cannot be used: "), ("\\w+\n", "does not split all text"), ("\\s*", "split all")):
        beside.write_text(pattern)
        line = refused(text_script.main, tmp_path / "one.txt", "--out", tmp_path / "out", "--encoding", own)
        assert fault in line
        assert line.endswith(f"rm {beside}")
    assert contents(tmp_path / "out") == before


def without(rank: int):
    return lambda lines: [line for line in lines if not line.endswith(f" {rank}")]


def with_line(line: str):
    return lambda lines: [*lines, line]


@pytest.mark.parametrize(("damage", "fault"), [
    (lambda lines: [], "holds no token,"),
    (lambda lines: ["", " "], "holds no token,"),
    (without(255), "no token for the single byte 0,"),
    (without(258), "no rank 258 though others up to 262,"),
    (with_line("SGk= 264"), "no rank 263 though others up to 264,"),
    (with_line("SGk 263"), "line 264 is 'SGk 263',"),
    (with_line("SG!k= 263"), "line 264 is 'SG!k= 263',"),
    (with_line("SGk="), "line 264 is 'SGk=',"),
    (with_line("SGk= 263 1"), "line 264 is 'SGk= 263 1',"),
    (with_line("SGk= x"), "line 264 is 'SGk= x',"),
    (with_line("SGk= -1"), "line 264 is 'SGk= -1',"),
    (with_line("= 263"), "line 264 is '= 263',"),
    (with_line("dGg= 263"), "line 264 has the token of line 157,"),
    (with_line("SGk= 256"), "line 264 has the rank of line 157,"),
    (lambda lines: ["{", '"model": 1}'], "line 1 is '{',"),
    (lambda lines: ["\x00\xff" * 30], "line 1 is "),
], ids=["empty", "blank", "byte", "gap", "gap at the end", "cut base64", "bad base64", "no rank", "three words", "word",
        "negative", "no token", "token twice", "rank twice", "JSON", "binary"])
def test_refuses_a_damaged_file_of_ranks(corpus, tmp_path, damage, fault):
    own = write_ranks(tmp_path / "own.tiktoken")
    own.write_text("\n".join(damage(own.read_text().splitlines())), encoding="latin-1")
    line = refused(text_script.main, corpus, "--out", tmp_path / "out", "--encoding", own)
    assert line.startswith(f"{own} ")
    assert fault in line
    assert not (tmp_path / "out").exists()


def test_a_file_of_ranks_may_fill_16_bits_and_no_more(corpus, tmp_path):
    pairs = [bytes([a, b]) for a in range(256) for b in range(255)]
    own = write_ranks(tmp_path / "own.tiktoken", pairs[:65_279])
    assert text_script.encoding_named(str(own))[:2] == (65_536, 65_535)
    write_ranks(own, pairs[:65_280])
    assert "a vocabulary of 65537 " in refused(text_script.main, corpus, "--out", tmp_path, "--encoding", own)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    count, size = 8000, 2000
    with open(tmp_path / "large.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"{i} ".ljust(size, "x")}) + "\n" for i in range(count))
    tracemalloc.start()
    try:
        make(tmp_path / "large.jsonl", "--out", tmp_path / "out", "--shard-tokens", 5_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(stream(tmp_path / "out", "train")) + len(stream(tmp_path / "out", "val")) == count * (size + 1)
    assert peak < 4e6, f"{peak:,} bytes held for a corpus of {count * size:,}"


def failing_at(document: int, error: BaseException, folder: Path):
    """A stand-in for the byte encoding that raises at a document; until then it sees to it that no shard has a name
    of this run yet."""
    seen, whole = [], text_script.BYTES

    def encode(text: str) -> np.ndarray:
        seen.append(text)
        assert not list(folder.glob("text_*_00000[2-9].bin"))
        if len(seen) == document:
            raise error
        return whole.encode(text)

    return whole._replace(encode=encode)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
                         ids=["disk full", "stopped"])
def test_a_failed_run_leaves_the_earlier_shards_and_nothing_else(corpus, tmp_path, monkeypatch, error):
    folder = tmp_path / "out"
    make(corpus, "--out", folder)
    before = contents(folder)
    monkeypatch.setattr(text_script, "BYTES", failing_at(10, error, folder))
    with pytest.raises(Refusal if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        make(corpus, "--out", folder, "--seed", 1, "--shard-tokens", 100)
    assert contents(folder) == before
    if isinstance(error, OSError):
        assert "No space left on device" in caught.value.code


def test_shards_are_named_when_all_are_complete_and_older_ones_go_last(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    make(corpus, "--out", folder, "--shard-tokens", 100)
    (folder / ".text_train_000099.bin.partial").write_bytes(b"of a run that was killed")
    (folder / "text_notes.bin").write_bytes(b"not a shard of this script")
    older = set(contents(folder))
    replace, renamed = os.replace, []

    def watched(partial, path):
        if not renamed:
            assert older <= set(contents(folder))
        open_shard(partial)
        renamed.append(path.name)
        replace(partial, path)

    monkeypatch.setattr(os, "replace", watched)
    make(corpus, "--out", folder, "--shard-tokens", 400)
    assert sorted(contents(folder)) == ["text_notes.bin", *sorted(renamed)]
    assert len(renamed) < len(older) - 2


def test_a_file_with_a_cut_off_writing_is_no_shard(tmp_path):
    def pieces():
        yield np.arange(10, dtype="<u2")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text_script.write_shard(tmp_path / "shard", pieces(), text_script.BYTES)
    with pytest.raises(Refusal):
        open_shard(tmp_path / "shard")


@pytest.mark.parametrize(("line", "fault"), [
    ('{"title": "no text"}', "has no text"),
    ('{"text": null}', "has no text"),
    ('{"text": 7}', "has int for text"),
    ('["text"]', "has no text"),
    ('{"text": "unclosed}', "is not JSON"),
    ('{"text": "\\ud83d"}', "surrogate"),
], ids=["other field", "null", "number", "list", "not JSON", "half a pair"])
def test_refuses_a_bad_record_with_its_file_and_line(tmp_path, line, fault):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + '\n{"text": "good"}\n')
    message = refused(text_script.main, path, "--out", tmp_path / "out")
    assert f"{path} line 3 " in message
    assert fault in message
    assert contents(tmp_path / "out") == {}


def test_refuses_paths_without_text(tmp_path):
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    (tmp_path / "zero.bin").write_bytes(b"\0\0")
    os.mkfifo(tmp_path / "pipe")
    assert f"{tmp_path / 'absent'} is not there" in refused(text_script.main, tmp_path / "absent", "--out", out)
    assert "no file or folder" in refused(text_script.main, tmp_path / "pipe", "--out", out)
    assert "no text found in 0 files" in refused(text_script.main, empty, "--out", out)
    assert "zero.bin is not text" in refused(text_script.main, tmp_path / "zero.bin", "--out", out)
    assert contents(out) == {} if out.exists() else True


@pytest.mark.parametrize("arguments", [("--val-fraction", "0"), ("--val-fraction", "1"), ("--val-fraction", "-0.5"),
                                       ("--val-fraction", "nan"), ("--val-fraction", "half"), ("--seed", "-1"),
                                       ("--shard-tokens", "0"), ("--shard-tokens", "2147483648")], ids=" ".join)
def test_refuses_numbers_out_of_range(corpus, tmp_path, arguments):
    line = refused(text_script.main, corpus, "--out", tmp_path / "out", *arguments)
    assert line.startswith(f"{arguments[0]} is {arguments[1]!r}, expected ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "fraction", "part"), [("a", 0.1, "training"), ("ab", 1e-17, "validation")])
def test_refuses_a_cut_that_leaves_a_part_empty(tmp_path, text, fraction, part):
    (tmp_path / "one.txt").write_text(text)
    assert f"the {part} part empty" in refused(text_script.main, tmp_path / "one.txt", "--out", tmp_path / "out",
                                               "--val-fraction", fraction)
    assert contents(tmp_path / "out") == {}


def test_refuses_a_folder_it_cannot_write_to(corpus, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in refused(text_script.main, corpus, "--out", out)
    assert (tmp_path / "file").read_text() == "kept"


def test_parquet_without_pyarrow_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in refused(text_script.main, tmp_path, "--out", tmp_path / "out")


def test_parquet_records_come_back(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}\r\nünï" for i in range(700)]
    for name, rows in (("a", texts[:400]), ("b", [*texts[400:], ""])):
        parquet.write_table(pyarrow.table({"id": list(range(len(rows))), "text": rows}), tmp_path / f"{name}.parquet",
                            row_group_size=100)
    make(tmp_path / "a.parquet", tmp_path / "b.parquet", "--out", tmp_path / "out")
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert Counter(found) == Counter(text.encode() for text in texts)
    bad = {"null": {"text": ["good", None]}, "other": {"body": ["good"]}, "number": {"text": [1, 2]}}
    for name, columns in bad.items():
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    for name, fault in (("null", "row 1 has no text"), ("other", "only body"), ("number", "has int for text"),
                        ("broken", "cannot be read as Parquet")):
        assert fault in refused(text_script.main, tmp_path / f"{name}.parquet", "--out", tmp_path / "out")
