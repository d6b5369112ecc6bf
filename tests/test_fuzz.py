"""Many thousands of bad inputs: shards, command lines, settings, checkpoints and what a stopped run has left behind.
The answer to each is one clear line, or work that is right; never a traceback, and nothing damaged is taken for whole.

Each kind is a strategy that makes cases and a judge that says whether the script took the case, after it has compared
what came out with a plain account of its own. The short form runs always; `-m slow` tries many more cases and prints
how many of each kind were taken and refused.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_origin

# For its few notes, of characters and the like; the folder goes with the temporary ones.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "train_gpt2_hypothesis"))

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools import command, metrics, random_documents, run_here, write_corpus, write_shard

import train_gpt2

ALONE = train_gpt2.Processes(0, 1, torch.device("cpu"))
OPTIONS = dataclasses.fields(train_gpt2.Config)
VOCABULARY, SEPARATOR = 60, 59

# The run whose checkpoints are damaged: two layers with most of what a layer can have, matrices in two halves.
BASE = dict(preset="tiny", layers=2, heads=2, width=8, row_tokens=128, tokens_per_step=256, window=90, steps=4,
            save_every=2, keep=1, val_every=0, val_tokens=100, val_row_tokens=128, value_layers=1, paired_layers=0,
            bigram=1, backout=0, device="cpu", dtype="bfloat16", compile="none", loss_chunk=512)


class Place:
    """What all cases share: shards, one real checkpoint and model file, and a model to restore into."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_corpus(folder, train=(3000, 1500), val=(500,), vocabulary=VOCABULARY, separator=SEPARATOR)
        run = run_here(folder, **BASE)
        self.checkpoint, self.model_file = (run / name for name in ("checkpoint_0000002.pt", "model.pt"))
        self.bytes = {path: path.read_bytes() for path in (self.checkpoint, self.model_file)}
        self.saved = {path: torch.load(path, weights_only=True) for path in self.bytes}
        self.records = metrics(run)
        self.config = train_gpt2.parse_command_line(command(folder, **BASE))
        self.stream = train_gpt2.TokenStream(self.config.train_files)
        self.model = train_gpt2.GPT(self.config, VOCABULARY, torch.bfloat16)
        self.groups = train_gpt2.optimizer_groups(self.model, self.config, torch.bfloat16, ALONE)
        self.scratch = folder / "scratch"
        self.count = 0

    def fresh(self) -> Path:
        """An empty folder; the one before is gone."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.count += 1
        self.scratch = self.folder / f"scratch{self.count}"
        self.scratch.mkdir()
        return self.scratch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("fuzz"))


def attempt(call: Callable, *arguments) -> tuple:
    """(True, what the call returns), or (False, its line) where it refuses; the line is one, and says something."""
    try:
        return True, call(*arguments)
    except train_gpt2.Refusal as refusal:
        line = refusal.code
        assert isinstance(line, str) and line.strip() and len(line.splitlines()) == 1, f"no clear line: {line!r}"
        return False, line


def damage(content: bytes, changes: list[tuple]) -> bytes:
    """The bytes after these changes: (what, where as a share of the length, value)."""
    for what, share, value in changes:
        at = min(int(share * len(content)), max(0, len(content) - 1))
        if what == "cut":
            content = content[:at]
        elif what == "grow":
            content = content + value.to_bytes(4, "little")[:1 + value % 4]
        elif what == "drop":
            content = content[:at] + content[at + 1 + value % 9:]
        elif what == "double":
            content = content[:at] + content[at:at + 1 + value % 9] + content[at:]
        elif content and what == "bit":
            content = content[:at] + bytes([content[at] ^ 1 << value % 8]) + content[at + 1:]
        elif what == "zero":
            content = content[:at] + bytes(len(content[at:at + 1 + value % 600])) + content[at + 1 + value % 600:]
    return content


def damages(*kinds: str) -> st.SearchStrategy:
    change = st.tuples(st.sampled_from(kinds or ("cut", "grow", "drop", "double", "bit", "bit", "bit", "zero")),
                       st.floats(0, 1), st.integers(0, 2**32 - 1))
    return st.lists(change, min_size=1, max_size=2)


# ----------------------------------------------------------------------------------------------------------------------
# Shards.

WORDS = st.sampled_from([0, 1, -1, 2, 7, 2**31 - 1, -2**31, 2**30, -2**30, 65_535, 65_536, 65_537, 50_256, 50_257,
                         20240520, 2**30 - 512]) | st.integers(-2**31, 2**31 - 1)
TOKENS = st.lists(st.integers(0, 59) | st.sampled_from([59, 60, 255, 50_256, 50_257, 65_535]), max_size=40)
SHARDS = st.tuples(TOKENS, st.sampled_from([0, 60, 256, 65_536]), st.sampled_from([0, 59, 1]),
                   st.lists(st.tuples(st.sampled_from([0, 1, 2, 2, 3, 4, 5, 255]), WORDS), max_size=1),
                   damages("cut", "grow", "bit", "zero", "drop") | st.just([]))


def shard_of(content: bytes) -> tuple | None:
    """(tokens, vocabulary, separator) that the bytes of a shard hold by its definition; None if they are no shard."""
    if len(content) < 1024:
        return None
    magic, version, count, vocabulary, separator = struct.unpack_from("<5i", content)
    vocabulary = vocabulary or 50_257
    separator = separator or (50_256 if vocabulary > 50_256 else 0)
    if (magic, version, len(content)) != (20240520, 1, 1024 + 2 * count) or count < 1:
        return None
    if not 1 <= vocabulary <= 65_536 or not 0 <= separator < vocabulary:
        return None
    tokens = [content[i] + 256 * content[i + 1] for i in range(1024, len(content), 2)]
    return (tokens, vocabulary, separator) if max(tokens) < vocabulary else None


def judge_shard(place: Place, case: tuple) -> bool:
    """Taken exactly when it is a shard; then every token is the file's. As one of the training and validation shards
    too."""
    tokens, vocabulary, separator, words, changes = case
    folder = place.fresh()
    path = write_shard(folder / "text_val_000000.bin", tokens, vocabulary, separator)
    content = bytearray(path.read_bytes())
    for index, word in words:
        struct.pack_into("<i", content, 4 * index, word)
    content = damage(bytes(content), changes)
    path.write_bytes(content)
    expected = shard_of(content)
    taken, stream = attempt(train_gpt2.TokenStream, str(path))
    assert taken == (expected is not None), (expected, stream)
    if taken:
        read, starts = stream.read(0, stream.tokens)
        assert (read.tolist(), stream.vocabulary, stream.separator) == expected
        assert starts.tolist() == [i == 0 or token == stream.separator for i, token in enumerate(read.tolist())]
    config = dataclasses.replace(place.config, val_files=str(path))
    opened, _ = attempt(train_gpt2.open_data, config)
    alike = expected is not None and expected[1:] == (VOCABULARY, SEPARATOR) and len(expected[0]) > 1
    assert opened == alike
    return taken


READS = st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(-200, 500), st.integers(0, 400),
                  st.integers(-700, 120), st.integers(-20, 120) | st.sampled_from([2**31, 2**40]))


def judge_read(place: Place, case: tuple) -> bool:
    """Any read of a stream is that part of the shards laid end to end without end; any read of a shard is that part of
    its tokens, or refused where there is no such part."""
    sizes, position, count, start, length = case
    folder, pieces = place.fresh(), []
    for number, size in enumerate(sizes):
        pieces.append(random_documents(size, VOCABULARY, SEPARATOR, number, length=5))
        write_shard(folder / f"{number}.bin", pieces[-1], VOCABULARY, SEPARATOR)
    stream, whole = train_gpt2.TokenStream(str(folder / "*.bin")), np.concatenate(pieces)
    tokens, starts = stream.read(position, count)
    wanted = np.arange(position, position + count) % len(whole)
    assert tokens.tolist() == whole[wanted].tolist()
    assert starts.tolist() == [token == SEPARATOR for token in tokens.tolist()]  # each shard opens with one
    shard = stream.shards[-1]
    taken, read = attempt(train_gpt2.read_tokens, shard, start, length)
    assert taken == (0 <= start and 0 <= length and start + length <= shard.tokens), (start, length, read)
    if taken:
        assert read.tolist() == pieces[-1][start:start + length].tolist()
    return taken


CHANGES = st.tuples(st.sampled_from(["none", "cut", "grown", "replaced", "written", "deleted", "folder"]),
                    st.integers(2, 60), st.floats(0, 1), st.integers(1, 40))


def judge_changed(place: Place, case: tuple) -> bool:
    """A shard is changed between opening and reading: refused, whatever the change."""
    what, size, share, amount = case
    folder = place.fresh()
    path = write_shard(folder / "x.bin", random_documents(size, VOCABULARY, SEPARATOR), VOCABULARY, SEPARATOR)
    stream, content = train_gpt2.TokenStream(str(path)), path.read_bytes()
    if what == "cut":
        os.truncate(path, int(share * (len(content) - 1)))
    elif what == "grown":
        path.write_bytes(content + bytes(amount))
    elif what == "replaced":  # by another of the same size, as of the same time
        write_shard(folder / "y", random_documents(size, VOCABULARY, SEPARATOR, amount), VOCABULARY, SEPARATOR)
        shutil.copystat(path, folder / "y")
        os.replace(folder / "y", path)
    elif what == "written":  # in place, some time later: clocks of file systems are coarse
        path.write_bytes(content[:-2] + bytes(2))
        os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**6 * amount))
    elif what in ("deleted", "folder"):
        path.unlink()
        if what == "folder":
            path.mkdir()
    taken, _ = attempt(stream.read, 0, min(size, amount))
    assert taken == (what == "none")
    return taken


# ----------------------------------------------------------------------------------------------------------------------
# Command lines.

NASTY = ["", " ", "-", "--", "=", ",", ",,", "0", "-0", "-1", "1e400", "-1e400", "nan", "inf", "-inf", "1e308",
         "1e-400", "5e-324", "9" * 30, "9" * 400, "9" * 5000, "0x10", "1_000", "1.0", "1.5", " 7 ", "07", "+3", "1,2",
         "1,2,3,4,5", "1,,2", "1,nan", "none", "None", "auto", "true", "True", "false", "TRUE", "\x00", "a\x00b",
         "a\nb", "\r\n", "\t", "\u2028", "\ud800", "é", "日本語", "١٢", "½", "💥", "--steps", "--help=1", "-h ",
         "gpt2", "tiny",
         "five-minute", "cpu", "cuda", "float16", "../..", "/", "/dev/null", "~", "*", "[", "[!]", "$(x)", "'", '"',
         "%s%n", "{}", "x" * 3000, "2147483647", "2147483648", "9223372036854775807", "9223372036854775808", "128",
         "256", "1,1", "0.5", "1", "2", "3", "64"]


def spelled_value(option) -> st.SearchStrategy:
    """Mostly values of the kind that the option takes, and others."""
    unit, _, low, high = option.metadata.values()
    words = list(train_gpt2.PRESETS) if option.name == "preset" else unit.split("|")
    if len(words) > 1:
        good = st.sampled_from(words)
    elif option.type is str:
        good = st.text(max_size=8) | st.just("none")
    else:
        is_list = get_origin(option.type) is tuple
        kind = get_args(option.type)[0] if is_list else option.type
        most = min(high, 300 if kind is int else 10)
        number = (st.integers(int(low), int(most)) | st.sampled_from([128, 256, 384])) if kind is int else (
            st.floats(low, most))
        good = st.lists(number, max_size=6).map(lambda each: ",".join(map(repr, each)) or "none") if is_list else (
            number.map(repr))
        good |= st.just(train_gpt2.spelled(option.default, exact=True))
    return good | good | good | st.sampled_from(NASTY) | st.text(max_size=6)


def words_of(option) -> st.SearchStrategy:
    """One option as it may be typed."""
    flag = st.sampled_from(["--" + option.name.replace("_", "-"), "--" + option.name])
    return st.tuples(flag, spelled_value(option), st.booleans()).map(
        lambda parts: [f"{parts[0]}={parts[1]}"] if parts[2] else list(parts[:2]))


ONE_OPTION = st.sampled_from(OPTIONS).flatmap(words_of)
STRAY = st.one_of(st.sampled_from(NASTY), st.text(max_size=6).map("--".__add__), st.sampled_from(["--help", "-h"]),
                  st.sampled_from(OPTIONS).map(lambda option: "--" + option.name)).map(lambda word: [word])
COMMANDS = st.tuples(st.lists(ONE_OPTION, max_size=4), st.just([]) | st.just([]) | st.lists(STRAY, max_size=2),
                     st.integers(0, 99))


def judge_command(place: Place, case: tuple) -> bool:
    """What is taken lies in the ranges that the settings state, and its own spelling means the same. Any number of
    processes shares the rows of a step, or is told that it cannot."""
    options, stray, order = case
    pieces = options + stray
    random.Random(order).shuffle(pieces)
    words, said = [word for piece in pieces for word in piece], io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            taken, config = attempt(train_gpt2.parse_command_line, words)
    except SystemExit as leaving:
        assert leaving.code == 0 and {"--help", "-h"} & set(words) and "--train-files" in said.getvalue()
        return True
    if not taken:
        return False
    assert said.getvalue() == ""
    names = [words[0].partition("=")[0].replace("-", "_") for words in options]
    assert stray or len({*names}) == len(names)
    for option in OPTIONS:
        value, (unit, _, low, high) = getattr(config, option.name), option.metadata.values()
        is_list = get_origin(option.type) is tuple
        kind = get_args(option.type)[0] if is_list else option.type
        values = value if is_list else (value,)
        assert isinstance(value, tuple) == is_list and all(type(each) is kind for each in values)
        if kind in (int, float):
            assert all(low <= each <= high and math.isfinite(each) for each in values)
        elif kind is str and "|" in unit:
            assert value in unit.split("|")
        if is_list and unit != "layers":
            assert len(values) in (range(1, config.stages + 2) if "by stage" in unit else [len(option.default)])
    typed = [f"--{option.name}={train_gpt2.spelled(getattr(config, option.name), exact=True)}" for option in OPTIONS]
    assert train_gpt2.parse_command_line(typed) == config
    for world in (1, 2, 3, 5, 8, 48, 64):
        shared, _ = attempt(train_gpt2.check_processes, config, world)
        stages = range(17)
        rows = [config.tokens_per_step[min(i, len(config.tokens_per_step) - 1)]
                // config.row_tokens[min(i, len(config.row_tokens) - 1)] for i in stages]
        assert shared == all(count % world == 0 for count in rows)
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Settings: whatever small run is taken trains.

SIZES = st.sampled_from([0.0, -0.0, 1e-300, 1e-30, 1e-8, 0.01, 0.5, 0.9999, 1.0, 2.5, 1e3, 1e30, 1e38, 1e300])
LAYERS = st.lists(st.integers(0, 3), max_size=3).map(tuple)
SMALL_VALUES = {
    "layers": st.integers(1, 4), "heads": st.sampled_from([1, 2, 4]), "width": st.sampled_from([4, 8, 16, 24, 32]),
    "mlp_ratio": st.integers(1, 3), "steps": st.integers(1, 3), "row_tokens": st.sampled_from([128, 256, (128, 256)]),
    "tokens_per_step": st.sampled_from([256, 512, (256, 768)]), "micro_tokens": st.sampled_from([0, 1, 128, 300]),
    "loss_chunk": st.sampled_from([16, 50, 256, 10**12]), "val_every": st.integers(0, 2),
    "val_tokens": st.sampled_from([1, 100, 10**15]), "val_row_tokens": st.sampled_from([128, 384]),
    "window": st.lists(st.sampled_from([1, 5, 90, 128, 10**12]), min_size=1, max_size=4).map(tuple),
    "window_short": st.lists(st.integers(1, 90), min_size=1, max_size=4).map(tuple),
    "window_final": st.sampled_from([0, 1, 400, 10**12]), "value_tables": st.integers(1, 4),
    "bigram": st.integers(0, 3), "predicted_tokens": st.sampled_from([1, 2, 5, 64]), "adam_every": st.integers(1, 3),
    "document_tokens": st.sampled_from([0, 1, 5, 60, 10**12]), "seed": st.sampled_from([0, 1, 2**63 - 1]),
    "save_every": st.integers(0, 2), "keep": st.integers(1, 2), "patience": st.just(5), "rotary_base": st.sampled_from(
        [1.0, 1.5, 1e4, 1e300]), "stages": st.integers(1, 5),
    "gated_skip": st.sampled_from([(), (0, 1), (1, 3), (2, 2), (1, 3, 0, 2)]),
    "backout": LAYERS.map(lambda layers: layers[:1]), "attention_free": LAYERS,
    "dtype": st.sampled_from(["float32", "bfloat16", "float64"]),
    "head_dtype": st.sampled_from(["auto", "wide", "float8"]), "preset": st.sampled_from(list(train_gpt2.PRESETS))}
FIXED = ("train_files", "val_files", "out", "device", "compile", "resume", "preset")


def small_value(option) -> st.SearchStrategy:
    unit, _, low, high = option.metadata.values()
    if option.name in SMALL_VALUES:
        return SMALL_VALUES[option.name]
    if unit == "layers":
        return LAYERS
    if "|" in unit:
        return st.sampled_from(unit.split("|"))
    number = st.one_of(st.floats(low, min(high, 1.0)), SIZES.filter(lambda value: low <= value <= high))
    if get_origin(option.type) is tuple:
        count = st.integers(1, 4) if "stage" in unit else st.just(len(option.default))
        return count.flatmap(lambda size: st.lists(number, min_size=size, max_size=size)).map(tuple)
    return number


FREE = [option for option in OPTIONS if option.name not in FIXED]
SETTINGS = st.tuples(st.sampled_from(list(train_gpt2.PRESETS)), st.lists(
    st.sampled_from(FREE).flatmap(lambda option: st.tuples(st.just(option.name), small_value(option))), max_size=9))
SMALLEST = dict(layers=4, heads=2, width=16, row_tokens=128, tokens_per_step=256, steps=2, window="90,100",
                window_short=30, short_layers="0,2", paired_layers="0", attention_free="none", value_layers="0,3",
                gated_skip="none", backout="1", bigram=1, val_tokens=200, val_row_tokens=128, repeat=True,
                stages=3, dtype="float32", loss_chunk=512, document_tokens=60, device="cpu", compile="none")


def judge_settings(place: Place, case: tuple) -> bool:
    """A run with these settings ends with finite losses and a model that can be read again, or with one line."""
    preset, chosen = case
    folder = place.fresh()
    chosen = {name: train_gpt2.spelled(value, exact=True) for name, value in chosen}
    base = {"preset": preset, **SMALLEST, "train_files": place.config.train_files, "val_files": place.config.val_files}
    base["unet_skips"] = preset == "five-minute"
    taken, config = attempt(train_gpt2.parse_command_line, command(folder, {**base, **chosen}))
    if not taken:
        return False
    finished, run = attempt(train_gpt2.train, config, ALONE)
    records = [record for path in (folder / "logs").glob("*/metrics.jsonl") for record in metrics(path.parent)]
    assert all(math.isfinite(value) for record in records for value in record.values())
    if finished:
        assert sum("train_loss" in record for record in records) == config.steps
        model, saved = train_gpt2.load_model(run / "model.pt")
        assert saved["step"] == config.steps and all(torch.equal(tensor, saved["weights"][name])
                                                     for name, tensor in model.state_dict().items())
    return finished


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints.


def same(found, expected) -> bool:
    """Whether two nested values are equal; tensors bit by bit, in shape and kind."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and [*found] == [*expected] and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, torch.Tensor):
        found, expected = (tensor.contiguous().view(*tensor.shape, 1) for tensor in (found, expected))
        return (found.dtype, found.shape) == (expected.dtype, expected.shape) and torch.equal(
            found.view(torch.uint8), expected.view(torch.uint8))
    return type(found) is type(expected) and found == expected


def resume(place: Place, path: Path) -> tuple[dict, dict]:
    """What a run that goes on from this file does first, down to the weights and buffers of its model."""
    config = train_gpt2.parse_command_line([f"--resume={path}"])
    plain, saved = train_gpt2.open_checkpoint(config, place.stream, ALONE)
    train_gpt2.restore(saved, plain["step"], place.model, place.groups, ALONE)
    return plain, saved


def judge_whole(place: Place, path: Path) -> bool:
    """A file in place of the checkpoint or of the model: what is taken is, tensor by tensor, what was saved; what is
    refused leaves the model that it was meant for untouched."""
    is_model = path.name == "model.pt"
    original = place.saved[place.model_file if is_model else place.checkpoint]
    loaded, answer = attempt(train_gpt2.load_model, path)
    if loaded:
        model, saved = answer
        assert saved.pop("path") == str(path) and same(saved, original)
        assert same({**model.state_dict()}, original["weights"])
    before = {name: tensor.clone() for name, tensor in place.model.state_dict().items()}
    resumed, answer = attempt(resume, place, path)
    assert not (is_model and resumed) and (is_model or loaded == resumed), (loaded, answer)
    if resumed:
        _, saved = answer
        assert saved.pop("path") == str(path) and same(saved, original)
        assert same({**place.model.state_dict()}, original["weights"])
        buffers = {f"{group.name}.{number}": buffer for group in place.groups.values()
                   for number, buffer in enumerate(group.state)}
        assert same({name: group_buffer[:len(original["state"][name])] for name, group_buffer in buffers.items()},
                    original["state"])
    else:
        assert same({**place.model.state_dict()}, before)
    return loaded


WHICH = st.sampled_from(["checkpoint", "model"])
BYTES = st.tuples(WHICH, st.one_of(damages(), damages("bit"), st.just([])), st.booleans())


def source(place: Place, which: str) -> Path:
    return place.checkpoint if which == "checkpoint" else place.model_file


def judge_bytes(place: Place, case: tuple) -> bool:
    """Bytes of the file changed anywhere; half of the time not among the tensors' own, which are most of it."""
    which, changes, outside = case
    original = source(place, which)
    content = place.bytes[original]
    if outside:  # the same places, among the first bytes of each part and the list of them at the end
        spots = outer_bytes(content)
        changes = [(what, (spots[int(share * (len(spots) - 1))] + 0.5) / len(content), value)
                   for what, share, value in changes]
    path = place.fresh() / original.name
    changed = damage(content, changes)
    path.write_bytes(changed)
    taken = judge_whole(place, path)
    assert taken or changed != content
    return taken


def outer_bytes(content: bytes) -> list[int]:
    """Where a zip archive's own words are, and the pickle: all bytes but those of the larger parts."""
    inner = set()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for part in archive.infolist():
            if "/data/" in part.filename:
                begin = part.header_offset + 30 + sum(struct.unpack_from("<2H", content, part.header_offset + 26))
                inner.update(range(begin, begin + part.file_size))
    return [index for index in range(len(content)) if index not in inner]


ARCHIVES = st.tuples(WHICH, st.sampled_from(["remove", "rename", "double", "double first", "swap", "deflate", "comment",
                                             "add", "prefix", "none"]), st.integers(0, 40), st.integers(0, 40),
                     st.sampled_from(["x", "archive/data/0", "../up", "constants.pkl", "archive/constants.pkl", "/abs",
                                      "archive/data.pkl", "é"]))


def judge_archive(place: Place, case: tuple) -> bool:
    """The archive's parts removed, renamed, doubled with other content, exchanged, packed, or others added."""
    which, what, one, other, name = case
    original = source(place, which)
    path = place.fresh() / original.name
    with zipfile.ZipFile(io.BytesIO(place.bytes[original])) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    one, other = one % len(parts), other % len(parts)
    changed = (parts[one][0], bytes(byte ^ 1 for byte in parts[one][1]))
    name = name.replace("archive", parts[0][0].split("/")[0])
    if what == "remove":
        del parts[one]
    elif what == "rename":
        parts[one] = (name, parts[one][1])
    elif what in ("double", "double first"):
        parts.insert(one if what == "double first" else len(parts), changed)
    elif what == "swap":
        parts[one], parts[other] = (parts[one][0], parts[other][1]), (parts[other][0], parts[one][1])
    elif what == "add":
        parts.insert(other, (name, b"\x80\x02}."))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED * (what == "deflate")) as archive:
        warnings.simplefilter("ignore")  # doubled names
        if what == "comment":
            archive.comment = b"PK\x05\x06" * (one + 1)
        for part in parts:
            archive.writestr(*part)
    if what == "prefix":
        path.write_bytes(bytes(64 * (one + 1)) + path.read_bytes())
    if what == "swap":  # by hand, with right checksums: no file can be told from one that was meant so
        attempt(train_gpt2.load_model, path)
        attempt(resume, place, path)
        return False
    return judge_whole(place, path)


@dataclasses.dataclass
class Thing:
    """An object that is no plain value."""

    number: int = 1


class Trap:
    """Makes a file where it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


OBJECTS = {
    "dataclass": lambda folder: Thing(), "numpy scalar": lambda folder: np.float64(1.5),
    "numpy array": lambda folder: np.zeros(2), "path": lambda folder: Path("x"), "trap": lambda folder:
    Trap(folder / "sprung"), "module": lambda folder: torch.nn.Linear(1, 1), "function": lambda folder: os.system,
    "complex": lambda folder: 1j, "bytes": lambda folder: b"x", "none": lambda folder: None, "list": lambda folder: [1],
    "set": lambda folder: {1}, "empty": lambda folder: {}, "tensor": lambda folder: torch.ones(2), "path in itself":
    lambda folder: {"x": [folder]}, "config": lambda folder: train_gpt2.Config()}
PICKLES = st.tuples(WHICH, st.sampled_from(list(OBJECTS)), st.sampled_from(
    ["alone", "step", "config", "weights", "weights.head", "config.steps", "config.out", "cursor", "seconds", "shards",
     "extra", "config.window"]), st.sampled_from(["archive", "old archive", "plain pickle"]))


def put(values: dict, place: str, value) -> dict:
    """A copy with one value, by a name like config.steps, in the place of another."""
    outer, _, inner = place.partition(".")
    return {**values, outer: {**values[outer], inner: value} if inner else value}


def save_quietly(values, path: Path, **options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(values, path, **options)


def judge_pickle(place: Place, case: tuple) -> bool:
    """Other objects in the file, or in the place of one of its values: refused, and nothing of theirs is run."""
    which, what, where, how = case
    original, folder = source(place, which), place.fresh()
    path, thing = folder / original.name, OBJECTS[what](folder)
    values = thing if where == "alone" else put(place.saved[original], where, thing)
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(values if isinstance(values, dict) or where == "alone" else thing))
    else:
        save_quietly(values, path, _use_new_zipfile_serialization=how == "archive")
    loaded, answer = attempt(train_gpt2.load_model, path)
    resumed, _ = attempt(resume, place, path)
    assert not (folder / "sprung").exists()
    harmless = where == "extra" or which == "model" and where in ("cursor", "seconds", "shards")
    assert not loaded or harmless or where in ("cursor", "seconds", "shards"), answer
    assert not resumed or where == "extra"
    return loaded or resumed


def other_tensor(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """A tensor like the given one that does not hold what it does."""
    if how == "nan" and tensor.is_floating_point():
        return tensor.masked_fill(torch.ones_like(tensor, dtype=torch.bool), math.nan)
    if how == "one infinity" and tensor.is_floating_point():
        changed = tensor.clone()
        changed.view(-1)[-1] = math.inf
        return changed
    if how == "stretched" and tensor.numel() > 1:  # one number that claims to be all
        return tensor.new_ones(1).expand(tensor.shape)
    if how == "huge":
        return tensor.new_ones(1).expand(2**40, 2**20)
    if how == "meta":
        return tensor.to("meta")
    if how == "sparse" and tensor.dim():
        return tensor.to_sparse()
    if how == "complex":
        return tensor.to(torch.complex64)
    if how == "double":
        return tensor.double()
    if how == "longer":
        return torch.cat((tensor.reshape(-1), tensor.reshape(-1)))
    return tensor.reshape(-1)[:0]


NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 10**30, 10**600, True, 1.0, 0.5, math.nan, math.inf, -math.inf,
                           None, "1", "", "x", "a\nb", "auto", "none", "os", "nn", "float16", "float64", "int8",
                           "complex64", "__class__", (), (1,), (1, 2), [1], {}, {"a": 1}, (0, 0, 5), (0, 3, 9),
                           (10**30, 0, 0), (0, 10**30, 1), (-1, 0, 0), (0, 0, 0, 0), (0.0, 0, 0), (1, None, 2),
                           (True, 0, 0), ((1,),), "9" * 5000])
TENSORS = st.sampled_from(["nan", "one infinity", "stretched", "huge", "meta", "sparse", "complex", "double", "longer",
                           "empty"])
TOP = ["config", "vocabulary", "separator", "dtype", "step", "val_loss", "weights", "state", "shards", "random_state",
       "seconds", "validated", "cursor"]
VALUES = st.one_of(
    st.tuples(st.just("missing"), st.sampled_from(TOP), st.none()),
    st.tuples(st.just("value"), st.sampled_from(TOP), NUMBERS),
    st.tuples(st.just("value"), st.sampled_from(TOP), NUMBERS),
    st.tuples(st.just("value"), st.sampled_from([f"config.{option.name}" for option in OPTIONS]), NUMBERS),
    st.tuples(st.just("value"), st.sampled_from(["config.new", "weights.new", "state.new", "shards.new", "weights.head",
                                                 "state.mlp.0", "shards.0: text_train_000000.bin"]), NUMBERS),
    st.tuples(st.just("tensor"), st.tuples(st.sampled_from(["weights", "state", "random_state"]), st.integers(0, 40)),
              TENSORS),
    st.tuples(st.just("key"), st.sampled_from(["config", "weights", "state", "shards"]), st.sampled_from(
        [1, None, "a\nb", (1,), 1.5, b"x"])),
    st.tuples(st.just("sizes"), st.sampled_from(["width", "layers", "bigram", "mlp_ratio", "heads", "row_tokens",
                                                 "val_row_tokens", "steps", "value_tables", "vocabulary"]),
              st.sampled_from([2**10, 2**30, 2**40, 2**62])))
VALUE_CASES = st.tuples(WHICH, VALUES)


def changed_values(original: dict, case: tuple) -> dict:
    what, where, value = case
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in original.items()}
    if what == "missing":
        values.pop(where, None)
    elif what == "value":
        outer, _, inner = where.partition(".")
        if inner and not isinstance(values.get(outer), dict):
            values[outer] = {}
        values = put(values, where, value)
    elif what == "tensor":
        part, number = where
        held = values.get(part)
        if isinstance(held, dict):
            name = list(held)[number % len(held)]
            held[name] = other_tensor(held[name], value)
        elif held is not None:
            values[part] = other_tensor(held, value)
    elif what == "key":
        if isinstance(values.get(where), dict):
            values[where][value] = 1
    elif where == "vocabulary":
        values[where] = value
    else:
        values["config"][where] = (value,) if where == "row_tokens" else value
        if where == "row_tokens":
            values["config"]["tokens_per_step"] = (2 * value,)
    return values


def judge_values(place: Place, case: tuple) -> bool:
    """Values of a checkpoint missing, of another type or absurd, in an archive without fault. A model that is taken has
    the saved weights; a run that goes on from it ends well, and in its first steps does what the other did."""
    which, change = case
    original = source(place, which)
    folder = place.fresh() / "run"
    folder.mkdir()
    path, values = folder / original.name, changed_values(place.saved[original], change)
    save_quietly(values, path)
    loaded, answer = attempt(train_gpt2.load_model, path)
    if loaded:
        model, saved = answer
        assert same({**model.state_dict()}, place.saved[original]["weights"])
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert 0 < model.vocabulary <= 65_536 and saved["step"] >= 0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in place.records))
    taken, config = attempt(train_gpt2.parse_command_line,
                            [f"--resume={path}", f"--out={folder.parent / 'logs'}", "--repeat=true", "--steps=4",
                             "--save-every=0", "--val-every=0"])
    finished = False
    if taken:
        finished, run = attempt(train_gpt2.train, config, ALONE)
    if finished:
        assert which == "checkpoint" and set(TOP) <= {*values}
        assert all(math.isfinite(number) for record in metrics(run) for number in record.values())
        assert [record["step"] for record in metrics(run) if "train_loss" in record] == [1, 2, 3, 4]
        assert same(values["weights"], place.saved[original]["weights"])
        assert same(values["state"], place.saved[original]["state"])
    return loaded or finished


# ----------------------------------------------------------------------------------------------------------------------
# What a stopped run has left behind.

LINES = st.lists(st.one_of(
    st.sampled_from([b"", b"{}", b"[]", b"null", b"1", b'{"step": 1}', b'{"step": null}', b'{"step": NaN}',
                     b'{"step": 1e999}', b'{"step": "1"}', b'{"step": ' + b"9" * 5000 + b"}", b"[" * 100_000,
                     b'{"a":' * 50_000, b"\xff\xfe", b"\x00" * 50, b'{"step": 1, "train_loss": 2.5', b'\xef\xbb\xbf{}',
                     "{\"step\": 1, \"x\": \"\u2028\"}".encode()]), st.binary(max_size=30)), max_size=3)
LEFT = st.tuples(st.integers(0, 8), LINES, st.sampled_from(["metrics.jsonl", "log.txt"]), st.sampled_from(
    ["none", "garbage", "cut", "missing", "folder"]), st.binary(max_size=40), damages() | st.just([]),
                 st.sampled_from(["logs", "日 本", "\udcff"]))


def judge_left(place: Place, case: tuple) -> bool:
    """Files of a run folder damaged: a run goes on there all the same, and keeps the sound records before the damage; a
    damaged compile cache never comes to the compiler. Only a folder in a file's place is refused."""
    kept, lines, name, what, garbage, changes, out = case
    folder = place.fresh()
    run = folder / out / "run"
    run.mkdir(parents=True)
    shutil.copy(place.checkpoint, run)
    records = [json.dumps(record).encode() for record in place.records]
    (run / "metrics.jsonl").write_bytes(b"\n".join(records[:kept] + lines + records[kept:]))
    (run / "log.txt").write_bytes(garbage)
    if what in ("missing", "folder"):
        (run / name).unlink()
        if what == "folder":
            (run / name).mkdir()
    elif what == "cut":
        (run / name).write_bytes((run / name).read_bytes()[:-1])
    elif what == "garbage":
        (run / name).write_bytes((run / name).read_bytes() + garbage)
    config = dataclasses.replace(place.config, out=str(folder / out))
    taken, log = attempt(train_gpt2.RunLog, config, ALONE, {"path": str(run / place.checkpoint.name), "step": 2})
    assert taken == (what != "folder"), log
    if taken:
        log.line(f"on it goes in {run}, said 日", show=False)
        log.close()
        assert (run / "log.txt").read_bytes().endswith("said 日\n".encode())
        if not (name == "metrics.jsonl" and what in ("missing", "cut")):
            sound = [record for record in place.records[:kept] if record["step"] <= 2]
            found = (run / "metrics.jsonl").read_bytes().splitlines()
            assert [json.loads(line) for line in found[:len(sound)]] == sound
    assert not [*run.glob("*.partial")]
    # The compiler is stood in for: what it would be given.
    given_bytes, cache = [], run / train_gpt2.compile_cache_name()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"kernels" + garbage, None))
        patch.setattr(torch.compiler, "load_cache_artifacts", lambda content: given_bytes.append(content) or True)
        train_gpt2.save_compile_cache(cache)
        content = cache.read_bytes()
        cache.write_bytes(damage(content, changes))
        whole = cache.read_bytes() == content
        said = train_gpt2.load_compile_cache(config)
    assert given_bytes == [b"kernels" + garbage] * whole and ("damaged" in said) != whole
    return taken


# ----------------------------------------------------------------------------------------------------------------------
# All kinds, with the number of cases in the short and in the long form.

KINDS = {
    "shard": (SHARDS, judge_shard, 400, 2500), "read": (READS, judge_read, 300, 1500),
    "changed shard": (CHANGES, judge_changed, 100, 500), "command line": (COMMANDS, judge_command, 600, 4000),
    "settings": (SETTINGS, judge_settings, 50, 300), "checkpoint bytes": (BYTES, judge_bytes, 250, 2500),
    "checkpoint parts": (ARCHIVES, judge_archive, 100, 500), "checkpoint objects": (PICKLES, judge_pickle, 120, 500),
    "checkpoint values": (VALUE_CASES, judge_values, 200, 1200), "left behind": (LEFT, judge_left, 120, 600)}


def examine(place: Place, kind: str, count: int) -> Counter:
    """Judge so many cases of a kind. Returns how many were taken, refused and, if one failed, otherwise."""
    strategy, judge, *_ = KINDS[kind]
    seen = Counter()

    @settings(max_examples=count, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def each(case) -> None:
        try:
            taken = judge(place, case)
        except (Exception, SystemExit):
            seen["other"] += 1
            raise
        seen["taken" if taken else "refused"] += 1

    try:
        each()
    except Exception as error:
        error.seen = seen
        raise
    return seen


def line_of(kind: str, seen: Counter) -> str:
    return f"{kind:20} {sum(seen.values()):7} {seen['taken']:8} {seen['refused']:7} {seen['other']:7}"


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_gets_one_line(place, kind):
    seen = examine(place, kind, KINDS[kind][2])
    assert seen["taken"] and seen["refused"], seen  # else nothing was tried


@pytest.mark.slow
def test_ten_thousand_bad_inputs_get_one_line_each(place, capfd):
    table = [f"{'kind':20} {'inputs':>7} {'accepted':>8} {'refused':>7} {'other':>7}"]
    total, broken = Counter(), None
    for kind in KINDS:
        try:
            seen = examine(place, kind, KINDS[kind][3])
        except Exception as error:  # the other kinds are tried all the same
            seen, broken = error.seen, broken or error
        total += seen
        table.append(line_of(kind, seen))
    with capfd.disabled():
        print("\n" + "\n".join([*table, line_of("all", total)]))
    if broken is not None:
        raise broken
    assert sum(total.values()) >= 10_000 and total["other"] == 0
