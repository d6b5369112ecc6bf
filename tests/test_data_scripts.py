"""The scripts that make shards: `data/fineweb.py` against a stand-in for the hub, `data/text.py` on generated text."""

import base64
import functools
import glob
import hashlib
import http.server
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from huggingface_hub import constants

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))

import fineweb
import text as text_script

import train_gpt2

GPT2_CACHE = os.environ.get("TIKTOKEN_CACHE_DIR")
SETTINGS = ("HF_", "HUGGING", "TIKTOKEN_", "DATA_GYM_", "PYTHONIOENCODING", "PYTHONUTF8")
VAL, TRAIN_1, TRAIN_2, TRAIN_3 = fineweb.shard_names(3)
MARK = b"\xef\xbb\xbf"  # byte-order mark
BYTES = [bytes([255 - i]) for i in range(256)]  # not in the usual order
MERGES = [b"th", b"the", b" the", b"\xe2\x98", b"e ", b"<|", b"nd", b"  ", b"\n\n", b"\n\n\n", b"    "]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """The repository as current folder, and no settings of the user for the hub, tiktoken and stdout."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(SETTINGS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def refused(main, *arguments) -> str:
    """The one line with which a script refuses `arguments`."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    line = caught.value.code
    assert isinstance(line, str) and "\n" not in line  # a text as exit code goes to stderr; the status is 1
    return line


def prefixes(tokens: list[bytes], vocabulary: int) -> bytes:
    """prefixes.bin of these tokens by brute force: of all that others begin with, the longest."""
    table = np.full(vocabulary, -1, "<i4")
    for i, token in enumerate(tokens):
        shorter = [j for j, other in enumerate(tokens) if other and other != token and token.startswith(other)]
        table[i] = max(shorter, key=lambda j: len(tokens[j]), default=-1)
    return table.tobytes()


def shard_bytes(seed: int, promised: int = 3000) -> bytes:
    """A shard as the hub holds it: no vocabulary or separator in the header, which means GPT-2."""
    header = np.array([20240520, 1, promised] + 253 * [0], "<i4")
    return header.tobytes() + np.random.default_rng(seed).integers(0, 50257, 3000).astype("<u2").tobytes()


class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
        self.send_header("ETag", f'"{self.path[-10:-4]}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def log_message(self, *_):
        if "/resolve/" in self.path:  # the client also asks for other things
            self.server.asked.append((self.command, Path(self.path).name))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server of the dataset repository: `files` is its folder, `asked` holds (method, name) of the requests. And a
    small encoding in the place of GPT-2's, which tiktoken would fetch."""
    small = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", special_tokens={"<|endoftext|>": 50_256},
                              mergeable_ranks={token: rank for rank, token in enumerate(BYTES + MERGES)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.__getitem__)
    monkeypatch.setattr(fineweb, "PREFIXES_SHA256", hashlib.sha256(prefixes(BYTES + MERGES, 50_257)).hexdigest())
    files = tmp_path / "hub" / "datasets" / "kjj0" / "fineweb10B-gpt2" / "resolve" / "main"
    files.mkdir(parents=True)
    for seed, name in enumerate((VAL, TRAIN_1, TRAIN_2)):
        (files / name).write_bytes(shard_bytes(seed))
    handler = functools.partial(Handler, directory=tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.files, server.asked, server.address = files, [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # it reads HF_ENDPOINT once, at import
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    yield server
    server.shutdown()
    server.server_close()


def test_fineweb_fetches_what_is_missing(hub, tmp_path):
    assert fineweb.parse([]).count == 10 and fineweb.shard_names(103)[-1] == "fineweb_train_000103.bin"
    for removed, fetched in (((), [VAL, TRAIN_1, TRAIN_2]), ((VAL, TRAIN_2), [VAL, TRAIN_2]), ((), [])):
        hub.asked.clear()
        for name in removed:
            (tmp_path / "out" / name).unlink()
        fineweb.main(["2", "--out", str(tmp_path / "out")])
        assert [name for method, name in hub.asked if method == "GET"] == fetched
        for name in (VAL, TRAIN_1, TRAIN_2):
            assert (tmp_path / "out" / name).read_bytes() == (hub.files / name).read_bytes()
    assert not hub.asked


def test_fineweb_says_in_one_line_what_went_wrong(hub, tmp_path, monkeypatch):
    again, path = f"python data/fineweb.py 3 --out {tmp_path}", tmp_path / TRAIN_2
    whole = shard_bytes(2)
    for damaged in (whole[:-2], whole + b"\0\0", whole[:100], b"<html>" + whole[6:], None):  # None: a pipe
        path.unlink(missing_ok=True)
        path.write_bytes(damaged) if damaged else os.mkfifo(path)
        assert refused(fineweb.main, 3, "--out", tmp_path).endswith(f"rm -f {path} && {again}")
        assert path.exists() and not hub.asked  # known before anything is fetched
    path.unlink()
    assert TRAIN_3 in (line := refused(fineweb.main, 3, "--out", tmp_path)) and "404" in line and again in line
    (tmp_path / TRAIN_1).unlink()
    (hub.files / TRAIN_1).write_bytes(shard_bytes(1, promised=4000))
    assert refused(fineweb.main, 3, "--out", tmp_path).endswith(f"rm -f {tmp_path / TRAIN_1} && {again}")
    assert "--out" in refused(fineweb.main, 1, "--out", tmp_path / VAL)
    for count in ("0", "-3", "104", "ten", "1.5", ""):
        assert count in refused(fineweb.main, count, "--out", tmp_path / "none") and not (tmp_path / "none").exists()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert refused(fineweb.main, 1, "--out", tmp_path / "stopped").endswith(f"1 --out {tmp_path}/stopped")
    hub.shutdown()
    hub.server_close()
    began = time.monotonic()
    assert hub.address in refused(fineweb.main, 1, "--out", tmp_path / "unreachable")
    assert time.monotonic() - began < 5


def test_fineweb_makes_the_prefixes_once_the_shards_are_whole(hub, tmp_path, monkeypatch, capsys):
    folder, again = tmp_path / "out", f"python data/fineweb.py 1 --out {tmp_path}/out"
    table, right = folder / "prefixes.bin", prefixes(BYTES + MERGES, 50_257)
    for stale in (None, b"", right[:-4], b"\xff" * 257 * 4):  # as of another vocabulary
        if stale is not None:
            table.write_bytes(stale)
        fineweb.main(["1", "--out", str(folder)])
        assert table.read_bytes() == right and f"wrote {table}" in capsys.readouterr().out
    monkeypatch.setattr(tiktoken, "get_encoding", {}.__getitem__)
    written = table.stat()
    fineweb.main(["1", "--out", str(folder)])
    assert table.stat() == written and "wrote" not in capsys.readouterr().out
    table.write_bytes(b"stale")

    def unreachable(_):
        raise ConnectionError("no route\nto host")

    def interrupted(_):
        raise KeyboardInterrupt

    for get, reason in ((unreachable, "no route to host"), (interrupted, "Interrupt")):
        monkeypatch.setattr(tiktoken, "get_encoding", get)
        line = refused(fineweb.main, 1, "--out", folder)
        assert str(table) in line and reason in line and line.endswith(again) and table.read_bytes() == b"stale"
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert refused(fineweb.main, 1, "--out", folder).endswith(f"pip install tiktoken && {again}")
    assert [(folder / name).read_bytes() for name in (VAL, TRAIN_1)] == [shard_bytes(0), shard_bytes(1)]
    assert sorted(folder.glob("*.bin")) == [folder / name for name in (TRAIN_1, VAL, "prefixes.bin")]


def test_prefixes_by_brute_force():
    for seed in range(50):
        draw = np.random.default_rng(seed)
        tokens = [*{bytes(draw.integers(97, 99, draw.integers(1, 8)).tolist()) for _ in range(60)}, b"", b""]
        tokens = [tokens[i] for i in draw.permutation(len(tokens))]
        assert text_script.prefix_table(tokens).tobytes() == prefixes(tokens, len(tokens))


@pytest.mark.skipif(not GPT2_CACHE, reason="needs TIKTOKEN_CACHE_DIR with the encoding gpt2")
def test_prefixes_of_gpt2(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", GPT2_CACHE)
    fineweb.write_prefixes(tmp_path / "prefixes.bin", "again")
    content, tokens = (tmp_path / "prefixes.bin").read_bytes(), text_script.encoding_named("gpt2").tokens()
    assert len(content) == 201_028 and hashlib.sha256(content).hexdigest() == fineweb.PREFIXES_SHA256
    table = np.frombuffer(content, "<i4").tolist()
    assert [token for token, prefix in zip(tokens, table, strict=True) if prefix < 0 and len(token) != 1] == [b""]
    assert table[50_256] == -1 and table.count(-1) == 257
    known = set(tokens)
    for token, prefix in zip(tokens, table, strict=True):
        if prefix >= 0:
            size = len(tokens[prefix])
            assert 0 < size < len(token) and token.startswith(tokens[prefix])
            assert not any(token[:longer] in known for longer in range(size + 1, len(token)))


def test_fineweb_mends_with_the_command_that_it_prints(hub, tmp_path):
    """In processes of their own: HF_ENDPOINT, exit status, stderr, the default folder, and no torch."""
    data = tmp_path / "pro [1] ject's" / "data"
    shutil.copytree(ROOT / "data", data, ignore=lambda _, names: {name for name in names if not name.endswith(".py")})
    (data / "fineweb10B").mkdir()
    (data / "fineweb10B" / TRAIN_1).write_bytes(shard_bytes(1)[:-2])
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "tiktoken.py").write_text("def get_encoding(name): raise OSError('offline')")
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path),
                                "PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    run = functools.partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    first = run([sys.executable, data / "fineweb.py", "1"])
    assert first.returncode == 1 and len(first.stderr.splitlines()) == 1
    second = run(command := first.stderr.rpartition(": ")[2], shell=True)
    assert second.returncode == 1 and "offline" in second.stderr and second.stderr.endswith(command.partition("&& ")[2])
    (tmp_path / "tiktoken.py").write_text("class get_encoding:\n    __init__ = lambda *_: None\n"
                                          "    token_byte_values = lambda _: []\n")
    third = run(second.stderr.rpartition(": ")[2], shell=True)
    assert third.returncode == 0, third.stderr
    assert (data / "fineweb10B" / "prefixes.bin").read_bytes() == b"\xff" * 201_028
    for name in (VAL, TRAIN_1):
        assert (data / "fineweb10B" / name).read_bytes() == (hub.files / name).read_bytes()


# data/text.py from here on


def make(*arguments) -> None:
    text_script.main([str(argument) for argument in arguments])


def documents(folder: Path, part: str, encoding=text_script.BYTES) -> list[bytes]:
    """The documents of a part, in stream order, from files that hold what their headers promise."""
    stream, paths = [], sorted(folder.glob(f"text_{part}_*.bin"))
    for number, path in enumerate(paths, part == "train"):
        header, tokens = np.fromfile(path, "<i4", 256).tolist(), np.fromfile(path, "<u2", offset=1024).tolist()
        assert header == [20240520, 1, len(tokens), *encoding[:2]] + 251 * [0]
        assert tokens and path.name == f"text_{part}_{number:06}.bin"
        stream += tokens
    starts = [i for i, token in enumerate(stream) if token == encoding.separator]
    assert starts[0] == 0
    return [b"".join(map(encoding.decode, stream[start + 1:end]))
            for start, end in itertools.pairwise([*starts, len(stream)])]


def texts(folder: Path, is_cut: bool = False, encoding=text_script.BYTES) -> list[bytes]:
    """All documents; the one that is cut is the last of training and the first that is held out."""
    train, val = (documents(folder, part, encoding) for part in ("train", "val"))
    return [*train[:-1], train[-1] + val[0], *val[1:]] if is_cut else train + val


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Twenty documents of equal size in one file of records."""
    lines = [json.dumps({"id": i, "text": f"{i:02} " + "words" * 19 + "\r\n"}) for i in range(20)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return tmp_path / "corpus.jsonl"


def test_every_document_comes_back(tmp_path, capsys):
    source, records = tmp_path / "source", [b"one\r\nrecord", "two ☃".encode(), b"<|endoftext|>", b"x" * 500]
    (source / "deep" / "deeper").mkdir(parents=True)
    files = {"a.txt": b"line\r\nline\rline\n\n", "deep/b.md": "naïve 数 \U0001f600\n".encode(),
             "deep/deeper/c": b"no mark " + MARK, "deep/twin.txt": b"line\r\nline\rline\n\n"}
    skipped = {"picture.png": b"PNG\0", "latin1.txt": "café".encode("latin-1"), "empty.txt": MARK}
    for name, content in (files | skipped).items():
        (source / name).write_bytes(MARK * (name == "deep/deeper/c") + content)
    os.mkfifo(source / "pipe")
    lines = [json.dumps({"text": "\ufeff" * (i < 2) + record.decode()}).encode() for i, record in enumerate(records)]
    (source / "a.jsonl").write_bytes(MARK + b"\n".join([lines[0] + b"\r", b"", *lines[1:], b'{"text": ""}', b"\r"]))
    for _ in range(2):  # the second time, the shards of the first are among what it reads
        make(source, source / "a.txt", "--out", source / "out", "--shard-tokens", 60)
        out = capsys.readouterr().out
        assert sorted(texts(source / "out", "cut " in out)) == sorted([*files.values(), *records])
        assert all(str(source / name) in out for name in skipped)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("sizes", [(5001,), (3000, 3000), (42_000, 2100, 2700), (100,) * 20], ids=len)
def test_how_much_is_held_out_and_cut_into_shards(tmp_path, capsys, sizes, fraction):
    letter, streams = "x☃é"[len(sizes) % 3], []
    written = [f"{i:02} " + letter * size for i, size in enumerate(sizes)]
    for i, text in enumerate(written):
        (tmp_path / f"{i:02}").write_text(text)
    for size in (2**31 - 1, 997, 2101):
        options = ["--out", tmp_path / "out", "--shard-tokens", size, "--val-fraction", fraction]
        make(*sorted(tmp_path.glob("??")), *options)
        is_cut = "cut " in capsys.readouterr().out
        found, held_out = texts(tmp_path / "out", is_cut), documents(tmp_path / "out", "val")
        assert sorted(text.decode() for text in found) == written
        excess = sum(map(len, held_out)) - fraction * sum(map(len, found))
        assert -1e-6 < excess < len(letter.encode())  # of one text, what nanoGPT holds out
        assert held_out[0].decode() and is_cut == (len(sizes) < 20)  # no character is cut
        for part in ("train", "val"):
            counts = [path.stat().st_size // 2 - 512 for path in sorted((tmp_path / "out").glob(f"text_{part}_*.bin"))]
            assert set(counts[:-1]) <= {size} and 0 < counts[-1] <= size
        streams.append(texts(tmp_path / "out"))
    assert streams[0] == streams[1] == streams[2]


def test_the_seed_alone_decides_the_order(corpus, tmp_path):
    first, again, other = (make(corpus, "--out", tmp_path / f"{i}", "--seed", seed) or contents(tmp_path / f"{i}")
                           for i, seed in enumerate((5, 5, 6)))
    order, reordered = texts(tmp_path / "0"), texts(tmp_path / "2")
    assert first == again != other and sorted(order) == sorted(reordered) and sorted(order) != order != reordered


def test_the_default_folder_keeps_its_text(tmp_path, monkeypatch, corpus):
    assert text_script.DEFAULT_FOLDER == ROOT / "data" / "text"
    monkeypatch.setattr(text_script, "DEFAULT_FOLDER", out := tmp_path / "text")
    for name in ("os.py", "json/tool.py", "a.txt", "site-packages/np.py", "test/test_os.py", "idlelib/idle.py"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(name * 20)
    monkeypatch.setattr(text_script.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    make(corpus)
    make(corpus, "--seed", 1)  # the same text may be replaced
    make()  # Python's own sources may replace any
    before = contents(out)
    assert sorted(texts(out, is_cut=True)) == [b"json/tool.py" * 20, b"os.py" * 20]
    assert "--out" in refused(text_script.main, corpus) and contents(out) == before
    (out / "text_inputs.json").unlink()
    assert "--out" in refused(text_script.main, corpus)  # nobody knows what the shards were made from
    make(corpus, "--out", out)
    assert len(texts(out)) == 20


def test_the_printed_command_finds_the_shards(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words" * 50)
    for folder in ("my [1] 'own' \"shards\"*", "-dash"):
        make("text.txt", f"--out={folder}")
        words = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert words[:4] == ["python", str(ROOT / "train_gpt2.py"), "--preset", "tiny"]
        patterns = [words[words.index(option) + 1] for option in ("--train-files", "--val-files")]
        assert [[os.path.realpath(path) for path in glob.glob(pattern)] for pattern in patterns] == [
            [f"{tmp_path / folder}/text_{part}.bin"] for part in ("train_000001", "val_000000")]
        assert "-" not in {pattern[0] for pattern in patterns}


def test_a_folder_that_cannot_be_read_is_skipped_with_a_notice(tmp_path, capsys, monkeypatch):
    """The system's refusal is made up, as root may read all."""
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("words" * 50)
    monkeypatch.setattr(os, "scandir", closed)
    make(tmp_path / "in", "--out", tmp_path / "out")
    assert f"skipped, not readable: {tmp_path}/in/closed\n" in capsys.readouterr().out


def test_streams_that_are_closed_change_no_outcome(tmp_path):
    (tmp_path / "text.txt").write_text("words" * 50)
    for folder, closed in (("open", ">/dev/null"), ("stderr", ">/dev/null 2>&-"), ("all", "<&- >&- 2>&-")):
        call = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/data/text.py text.txt --out {folder} {closed}"
        subprocess.run(call, shell=True, cwd=tmp_path, check=True)
        assert contents(tmp_path / folder) == contents(tmp_path / "open")


def test_a_run_that_is_terminated_leaves_nothing(tmp_path):
    """When all shards are written, but before they have their names."""
    (tmp_path / "text.txt").write_text("words" * 50)
    code = ("import os, runpy, sys; os.replace = lambda *_: os.kill(os.getpid(), 15); sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, ROOT / "data/text.py", "text.txt", "--out", "out"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "stopped before the shards were complete\n")
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_tokenizer_whose_name_begins_with_a_dash_is_printed_as_a_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words" * 50)
    (tmp_path / "-own.tiktoken").write_bytes(b"\n".join(rank_lines()))
    make("text.txt", "--out", "out", "--encoding=-own.tiktoken")
    assert "with --encoding ./-own.tiktoken\n" in capsys.readouterr().out


def test_too_little_to_train_on_replaces_nothing(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    for size, trains in ((143, True), (142, False), (2000, True)):  # a tenth is held out, a separator put before
        text.write_text("x" * size)
        if trains:
            make(text, "--out", out)
            before = contents(out)
            continue
        for folder in (out, tmp_path / "new"):
            line = refused(text_script.main, text, "--out", folder)
            assert line.startswith("128 training tokens are too few, expected more than 128; give more text")
        assert contents(out) == before and not (tmp_path / "new").exists()


def test_a_variable_that_tqdm_cannot_read_is_named_in_one_line():
    environment = os.environ | {"TQDM_NCOLS": "wide"}
    for script in ("data/text.py", "data/fineweb.py", "evals/sample.py", "evals/hellaswag.py", "evals/export.py"):
        done = subprocess.run([sys.executable, script, "--help"], env=environment, capture_output=True, text=True,
                              check=False)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.count("\n") == 1 and done.stderr.endswith("'wide'; unset TQDM_NCOLS\n")


def test_a_stdout_that_takes_nothing_changes_no_outcome(tmp_path, corpus):
    reader, closed = os.pipe()
    os.close(reader)
    for folder, stdout, name in (("é", subprocess.DEVNULL, "ascii"), ("o", closed, "utf-8")):
        done = subprocess.run([sys.executable, "data/text.py", corpus, "--out", tmp_path / folder], stdout=stdout,
                              stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": name}, check=False)
        assert (done.returncode, done.stderr) == (0, b"") and len(texts(tmp_path / folder)) == 20
    os.close(closed)


@pytest.mark.parametrize(("name", "tokens", "end_of_text", "vocabulary", "separator"), [
    ("gpt2", 50_257, 50_256, 50_257, 50_256),
    ("p50k_base", 50_281, 50_256, 50_281, 50_256),  # ids behind the end of text
    ("gpt2", 50_000, None, 50_001, 50_000),
    ("gpt2", 50_300, 0, 50_300, 0),
    ("gpt2", 65_535, None, 65_536, 65_535), ("gpt2", 65_536, None, 65_537, 65_536), ("gpt2", 65_537, 9, 65_537, 9)])
def test_a_name_that_tiktoken_knows(tmp_path, monkeypatch, name, tokens, end_of_text, vocabulary, separator):
    special = {"<|last|>": tokens - 1} | ({} if end_of_text is None else {"<|endoftext|>": end_of_text})
    ranks = {byte: rank for rank, byte in enumerate(BYTES)}
    made_up = tiktoken.Encoding(name, pat_str=r"[\s\S]", special_tokens=special, mergeable_ranks=ranks)
    monkeypatch.setattr(tiktoken, "get_encoding", {name: made_up}.__getitem__)
    (tmp_path / "one.txt").write_text("a<|endoftext|>b<|last|>" * 20)  # these names are text as any
    arguments = [tmp_path / "one.txt", "--out", tmp_path / "out", "--encoding", name, "--val-fraction", 0.5]
    if vocabulary > 65_536:
        assert str(vocabulary) in refused(text_script.main, *arguments)
        return
    make(*arguments)
    encoding = text_script.encoding_named(name)
    assert encoding[:2] == (vocabulary, separator)
    stream = train_gpt2.TokenStream(str(tmp_path / "out" / "text_train_*.bin"))
    assert (stream.vocabulary, stream.separator) == (vocabulary, separator)
    assert texts(tmp_path / "out", encoding=encoding) == 2 * [b"a<|endoftext|>b<|last|>" * 10]
    assert encoding.decode(1098) == "\ufffd".encode()  # an id that stands for nothing
    assert (tmp_path / "out" / "prefixes.bin").read_bytes() == b"\xff" * 4 * vocabulary


def rank_lines(merges: list[bytes] = MERGES) -> list[bytes]:
    """The lines of a .tiktoken file of the bytes and `merges`, not in order of rank."""
    return [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(BYTES + merges)][::-1]


def test_text_comes_back_from_the_tokens_of_a_file(tmp_path):
    own = tmp_path / "my own.tiktoken"
    own.write_bytes(b"\n".join(rank_lines()))
    lines = ["the end of the day \u2603", "<|endoftext|>", "a<|endoftext|>\r\n\tb", "\U0001f600 na\u00efve  x\u0663",
             "x" * 3000]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    make(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--encoding", own)
    encoding, rank = text_script.encoding_named(str(own)), {token: i for i, token in enumerate(BYTES + MERGES)}
    assert sorted(text.decode() for text in texts(tmp_path / "out", True, encoding)) == sorted(lines)
    assert encoding[:2] == (268, 267)
    assert (tmp_path / "out" / "prefixes.bin").read_bytes() == prefixes(BYTES + MERGES, 268)
    assert encoding.encode("the end").tolist() == [rank[b"the"], rank[b" "], rank[b"e"], rank[b"nd"]]
    assert encoding.encode("of the").tolist() == [rank[b"o"], rank[b"f"], rank[b" the"]]
    assert encoding.encode("\u2603").tolist() == [rank[b"\xe2\x98"], rank[b"\x83"]]
    assert encoding.encode("a\udcff").tolist() == encoding.encode("a\ufffd").tolist()  # of a command line
    for mark in (b"", MARK):  # a pattern beside the file splits text, as GPT-2's does not here
        (tmp_path / "my own.pattern").write_bytes(mark + b"[\\s\\S]+\n")
        assert rank[b"e "] in text_script.encoding_named(str(own)).encode("one two")
        own.write_bytes(mark + b"\n".join(rank_lines(MERGES[:5])))  # a file that has changed is read anew
        assert text_script.encoding_named(str(own))[0] == 262


def test_long_runs_of_whitespace(tmp_path, capfd):
    """tiktoken panics at a million of them. Its own tokens of shorter runs are the reference."""
    own = tmp_path / "own.tiktoken"
    own.write_bytes(b"\n".join(rank_lines()))
    encoding, tokenizer = text_script.encoding_named(str(own)), text_script.file_tokenizer(own)
    for text in ("a" + " " * 1001 + "b", "the " + "\n" * 5000 + "\x1cx", "\r\n \u3000\x85" * 999 + " the" + " " * 3000,
                 " " * 999 + "\x1f" + "\n\n " * 700 + "end" + "\t" * 1000 + "\n"):
        assert encoding.encode(text).tolist() == tokenizer.encode_ordinary(text)
    text = "a" + "\n" * 1_000_001 + " the"
    assert b"".join(map(encoding.decode, encoding.encode(text).tolist())).decode() == text
    (tmp_path / "own.pattern").write_text(r"\s+(?!\S)|\S+|\s")
    (tmp_path / "long.txt").write_text(text * 2)
    line = refused(text_script.main, tmp_path / "long.txt", "--out", tmp_path / "out", "--encoding", own)
    assert str(tmp_path / "long.txt") in line and "1,000,00" in line and not (tmp_path / "out").exists()
    assert "panicked" not in capfd.readouterr().err


RANKS = rank_lines()
DAMAGED_RANKS = [[], [b"", b" "], [b"{", b'"model": 1}'], [b"\x00\xff" * 30],
                 *([line.replace(*change) for line in RANKS] for change in ((b"AA==", b"SGk="), (b" 258", b" 1"))),
                 *([*RANKS, line] for line in (b"SGk= 268", b"SGk 267", b"SG!k= 267", b"SGk=", b"SGk= 267 1", b"SGk= x",
                                               b"SGk= -1", b"= 267", b"dGg= 267", b"SGk= 256"))]
BAD_RECORDS = [b'{"title": "no text"}', b'{"text": null}', b'{"text": 7}', b'["text"]', b'"text"', b'{"text": "open}',
               b'{"text": "\\ud83d"}', b'{"text": "\xff"}', b'{"text": ' + b"[" * 99_999, b"1" * 5000]
UNKNOWN = ["cl100k_base", "o200k_base", "o200k_harmony", "gtp2", "", "x" * 5000, ".", "none", "pipe.tiktoken"]
GOOD = {"a.txt": b"a few words"}
OWN = GOOD | {"own.tiktoken": b"\n".join(RANKS)}


@pytest.mark.parametrize(("files", "arguments", "named"), [
    *(({"a.jsonl": b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}'}, "a.jsonl", "a.jsonl line 3 ")
      for line in BAD_RECORDS),
    *((GOOD | {"own.tiktoken": b"\n".join(lines)}, "a.txt --encoding own.tiktoken", "own.tiktoken")
      for lines in DAMAGED_RANKS),
    *((OWN | {"own.pattern": pattern}, "a.txt --encoding own.tiktoken", named) for pattern, named in (
        (b"(((\n", "own.pattern"), (b"\\w+\n", "a.txt"), (b"\\s*", "a.txt"), (b"\xff", "own.pattern"),
        (None, "own.pattern"))),
    (OWN | {"own.pattern": rb"((a|aa)+)+(?=c)|[\s\S]", "b.txt": b"a" * 500}, "b.txt --encoding own.tiktoken",
     "mend the tokenizer's pattern"),  # which backtracks
    *((GOOD | {"pipe.tiktoken": None}, f"a.txt --encoding={name}", "p50k_edit") for name in UNKNOWN),
    *(({name: content}, name, name) for name, content in (
        ("pipe", None), ("pipe.jsonl", None), ("pipe.parquet", None), ("zero.bin", b"\0\0"))),
    (GOOD, "a.txt --out=", "empty name"), ({}, "absent", "absent"), ({}, ".", ".jsonl"), ({}, "x" * 5000, "x" * 5000),
    *(({"a.txt": text}, f"a.txt --val-fraction {fraction}", "--val-fraction") for text, fraction in (
        (b"a", "0.1"), (b"\xc3\xa9", "0.5"), (b"ab", "0.9"))),
    *((GOOD, f"a.txt {option} {value}", option) for option, value in (
        ("--val-fraction", "0"), ("--val-fraction", "1"), ("--val-fraction", "-0.5"), ("--val-fraction", "nan"),
        ("--val-fraction", "half"), ("--seed", "-1"), ("--shard-tokens", "0"), ("--shard-tokens", "2147483648"),
        ("--seeds", "1"))),
    *((GOOD, f"a.txt --out {out}", "a.txt") for out in ("a.txt", "a.txt/below")),
    ({"a.parquet": b"PAR1"}, "a.parquet", "pip install pyarrow"),
    (GOOD, "a.txt --encoding gpt2", "TIKTOKEN_CACHE_DIR"), (GOOD, "a.txt --encoding gpt2", "pip install tiktoken"),
])
def test_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, files, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    if named == "pip install tiktoken":
        monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setattr(tiktoken, "get_encoding", {}.__getitem__)  # as without a network
    for name, content in files.items():
        os.mkfifo(name) if content is None else Path(name).write_bytes(content)
    before = sorted(os.listdir())
    assert named in refused(text_script.main, *["--out", "out"] * ("--out" not in arguments), *arguments.split())
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("name", ["text_train_000001.bin", ".text_val_000000.bin.partial", "text_inputs.json",
                                  ".text_inputs.json.partial", "prefixes.bin"])
def test_what_stands_in_the_place_of_a_file_is_refused_before_anything_is_read(corpus, tmp_path, name):
    """A pipe would wait for ever, a folder would be met when half of the files are new."""
    for make_it in (os.mkfifo, os.mkdir):
        folder = tmp_path / make_it.__name__
        make(corpus, "--out", folder)
        (folder / name).unlink(missing_ok=True)
        make_it(folder / name)
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert name in refused(text_script.main, corpus, "--out", folder)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_ctrl_c_while_a_tokenizer_is_fetched_ends_in_one_line(corpus, tmp_path, monkeypatch):
    def fetched(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiktoken, "get_encoding", fetched)
    assert "stopped" in refused(text_script.main, corpus, "--encoding", "gpt2", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    (tmp_path / "large.jsonl").write_text('{"text": "%s"}\n' % ("x" * 4000) * 4000)
    tracemalloc.start()
    try:
        make(tmp_path / "large.jsonl", "--out", tmp_path / "out", "--shard-tokens", 5_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6, f"{peak:,} bytes held for a corpus of 16,000,000"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt("stopped")])
def test_only_a_complete_run_replaces_shards(corpus, tmp_path, monkeypatch, error):
    folder, whole, seen, during = tmp_path / "out", text_script.BYTES, [], {}
    make(corpus, "--out", folder, "--shard-tokens", 300)
    (folder / "text_notes.bin").write_bytes(b"not a shard of this script")
    before = contents(folder)

    def encode(text: str) -> np.ndarray:
        seen.append(text)
        if len(seen) == 15:
            during.update(contents(folder))
            raise error
        return whole.encode(text)

    with monkeypatch.context() as patch:
        patch.setattr(text_script, "BYTES", whole._replace(encode=encode))
        line = refused(text_script.main, corpus, "--out", folder, "--seed", 1, "--shard-tokens", 100)
    assert before.items() < during.items() and all(name[0] == "." for name in during.keys() - before.keys())
    assert error.args[-1] in line and contents(folder) == before
    (folder / ".text_train_000099.bin.partial").write_bytes(b"of a run that was killed")
    (folder / "prefixes.bin").write_bytes(prefixes(BYTES + MERGES, 268))  # of another vocabulary
    make(corpus, "--out", folder)
    assert sorted(contents(folder)) == [
        "prefixes.bin", "text_inputs.json", "text_notes.bin", "text_train_000001.bin", "text_val_000000.bin"]
    assert (folder / "prefixes.bin").read_bytes() == b"\xff" * 4 * 257
    with pytest.raises(ZeroDivisionError):  # a file whose writing was cut off is no shard
        text_script.write_shard(folder / "x", (np.arange(10 // i, dtype="<u2") for i in (1, 0)), text_script.BYTES)
    assert not np.fromfile(folder / "x", "<i4", 256).any()


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(name: str, column, title: str = "text") -> Path:
        parquet.write_table(pyarrow.table({title: column}), tmp_path / name, row_group_size=100)
        return tmp_path / name

    rows = [f"row {i:03}\r\nünï" for i in range(700)]
    make(write("a.parquet", rows[:400]), write("b.parquet", [*rows[400:], ""]), "--out", tmp_path / "out")
    assert sorted(text.decode() for text in texts(tmp_path / "out")) == rows
    buffers = [None, pyarrow.py_buffer(np.array([0, 4, 6], "<i4").tobytes()), pyarrow.py_buffer(b"good\xff\xfe")]
    not_utf8 = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    for path, fault in ((write("null.parquet", ["good", None]), "row 1"), (write("utf8.parquet", not_utf8), "row 1"),
                        (write("int.parquet", [1, 2]), "row 0"), (write("list.parquet", [["good"]]), "row 0"),
                        (write("other.parquet", ["good"], "body"), "body"), (tmp_path / "broken.parquet", "Parquet")):
        line = refused(text_script.main, path, "--out", tmp_path / "new")
        assert str(path) in line and fault in line and not (tmp_path / "new").exists()


@pytest.mark.parametrize("out", ["~/shards", "./~root"])
def test_a_tilde_means_what_it_means_in_the_shell(tmp_path, monkeypatch, capsys, out):
    """Quoted, the home folder; after ./, a name. What is printed finds it."""
    home = tmp_path / "home"
    (home / "here").mkdir(parents=True)
    (home / "t.txt").write_text("to be or not to be\n" * 500)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "here")
    text_script.main(["~/t.txt", "--out", out])
    assert (home / "shards").exists() == (out == "~/shards")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert glob.glob(os.path.expanduser(words[words.index("--train-files") + 1]))
