"""The command line: what it takes, what it refuses, and that a refusal is one line."""

import contextlib
import os
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tools import (ALONE, ROOT, SMALL, command, metrics, random_documents, run_folders, run_here, start, write_corpus,
                   write_shard)
from worker import printing, together, train

import train_gpt2
from train_gpt2 import (
    ELSEWHERE, PRESETS, TECHNIQUES, Config, Processes, UserError, check_config, flag, parse_command_line, preset_values,
    spelled, texts, typed)

OPTIONS = {option.name: option for option in fields(Config)}


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as error:
        parse_command_line([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_help_names_every_setting_and_technique(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help"])
    said = capsys.readouterr().out
    assert not ended.value.code and all(f"{flag(name)} " in said for name in OPTIONS)
    assert all(f"  {name} " in said for name in TECHNIQUES)
    assert said.index("--steps") < said.index("--rotary-base")  # basic settings first
    assert "h tanh((z + s) / r)" in said  # of the setting, not of the technique of the same name


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_are_read_as_they_are_spelled(preset):
    config = Config(**preset_values(preset))
    assert Config(**{name: typed(OPTIONS[name], text) for name, text in texts(config).items()}) == config
    arguments = [f"{flag(name)}={text}" for name, text in texts(config).items()]
    assert parse_command_line(arguments) == config


def test_forms():
    config = parse_command_line(["--row-tokens", "256", "--tokens-per-step=1024", "--short-layers=none", "--smear",
                                 "false", "--steps=3", "--steps", "5"])
    assert (config.row_tokens, config.tokens_per_step, config.short_layers, config.smear, config.steps) == (
        (256,), (1024,), (), False, 5)


@pytest.mark.parametrize(("name", "text"), [
    ("steps", "0"), ("steps", "1.5"), ("steps", "many"), ("steps", ""), ("muon_lr", "nan"), ("muon_lr", "-1"),
    ("muon_lr", "inf"), ("smear", "yes"), ("long_documents", "cut"), ("dtype", "float16"), ("window", "none"),
    ("window", "1,2,3,4,5"), ("window", "1,,2"), ("adam_head", "0.1,0.9"), ("softcap", "1,2,3,4"),
    ("short_layers", "-1"), ("tied_until", "1"), ("preset", "gpt3"), ("timeout", "0"), ("seed", str(2**63)),
    ("adam_epsilon", "0")])
def test_a_value_out_of_bounds_is_refused(name, text):
    said = refusal(f"{flag(name)}={text}")
    assert flag(name) in said and (text in said or not text)


@pytest.mark.parametrize(("name", "changes"), [
    ("width", dict(width=770)), ("heads", dict(heads=3, width=768)), ("row_tokens", dict(row_tokens=(100,))),
    ("val_row_tokens", dict(val_row_tokens=100)), ("tokens_per_step", dict(tokens_per_step=(131_073,))),
    ("gated_skip", dict(gated_skip=(3,))),
    ("gated_skip", dict(gated_skip=(6, 3))), ("gated_skip", dict(unet_skips=True)),
    ("attention_free", dict(value_residual=True, attention_free=(0,), value_layers=())),
    ("attention_free", dict(value_layers=(6,))), ("attention_source", dict(attention_source=(1, 2))),
    ("softcap", dict(softcap=(1.0, 0.0, 0.0))), ("out", dict(out=os.fsdecode(b"logs\xff"))),
    ("paired_layers", dict(paired_layers=(11,)))])
def test_settings_that_contradict_each_other_are_refused(name, changes):
    with pytest.raises(UserError) as error:
        check_config(replace(Config(), **changes))
    assert str(error.value).startswith(flag(name)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_other_trainers_get_a_hint(name):
    meant = flag(ELSEWHERE[name])
    assert f"is {meant} meant" in refusal(f"--{name}", "3") and ELSEWHERE[name] in OPTIONS
    assert meant in refusal(f"{flag(name)}=3")


def test_unknown_options():
    assert "--window" in refusal("--wndow", "3") and "--row-tokens" in refusal("--row_tokens=3")
    assert "meant" not in refusal("--zzz", "3") and "meant" not in refusal("train.py")
    assert "--steps" in refusal("--steps") and "no value" in refusal("--width=--")
    assert "quotes" in refusal("--train-files", "a_0.bin", "a_1.bin")  # a pattern that the shell has spelled out


def test_folders_that_hold_or_can_hold_no_run(tmp_path):
    assert "--out" in refusal("--out", "") and "no checkpoint" in refusal("--resume", str(tmp_path))
    assert "--bigram" in refusal("--bigram", "1" + 18 * "0")


def test_what_differs_between_processes_is_named(monkeypatch):
    monkeypatch.setattr(Processes, "gather_values", lambda self, facts: [facts, facts | {"train shard 1": "7"}])
    with pytest.raises(UserError, match="train shard 1 than process 0: 7, not None"):
        Processes(0, 2, torch.device("cpu")).check_agreement({"steps": "1"})


@pytest.mark.parametrize("save_every, files", [(0, 1), (2, 3), (1, 5)])
def test_room_is_asked_for_what_will_be_saved(monkeypatch, save_every, files):
    """The model, and of a run of four steps no thousand checkpoints. 12 bytes a weight."""
    groups = {"any": SimpleNamespace(weights=torch.zeros(10))}
    config = Config(steps=4, keep=1000, save_every=save_every)
    for free in (files * 120 - 1, files * 120):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError, match="room") if free % 120 else contextlib.nullcontext():
            train_gpt2.check_disk(config, groups, ALONE)


def test_validation_shards_stand_beside_training_shards(tmp_path):
    config = parse_command_line(["--train-files", f"{tmp_path}/train/my_train_*.bin"])
    assert config.val_files == f"{tmp_path}/train/my_val_*.bin"
    assert parse_command_line(["--val-files", config.val_files]).train_files == config.train_files
    for val, other in (("val/evaluation_val_*.bin", "val/evaluation_train_*.bin"), ("wikival.bin", "wikitrain.bin")):
        assert parse_command_line(["--val-files", val]).train_files == other  # the last one in the name
    both = parse_command_line(["--val-files", "b_val.bin", "--train-files", "a_train.bin"])
    assert (both.train_files, both.val_files) == ("a_train.bin", "b_val.bin")
    with pytest.raises(UserError, match="quotes"):
        train_gpt2.TokenStream(str(tmp_path))


def run(*arguments, **options):
    return start([ROOT / "train_gpt2.py", *arguments], **options)


def test_missing_data_names_the_way_out(tmp_path):
    done = run("--device", "cpu", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    script = re.search(r"python (\S*data/fineweb.py) 10 --out data/fineweb10B", done.stderr)[1]
    assert (tmp_path / script).samefile(ROOT / "data/fineweb.py") and "tiny" in done.stderr


BAD_SHARDS = {
    "magic": lambda path: write_shard(path, random_documents(3000), magic=1),
    "version": lambda path: write_shard(path, random_documents(3000), version=2),
    "count": lambda path: write_shard(path, random_documents(3000), 257, 256, count=2999),
    "odd byte": lambda path: path.write_bytes(write_shard(path, random_documents(3000), 257, 256).read_bytes() + b"x"),
    "short": lambda path: path.write_bytes(b"abc"),
    "empty": lambda path: path.touch(),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "separator": lambda path: write_shard(path, random_documents(3000), 257, 300),
    "another vocabulary": lambda path: write_shard(path, random_documents(3000, 200, 199), 200, 199),
    "token beyond the vocabulary": lambda path: write_shard(path, np.full(3000, 300), 257, 256),
}


@pytest.mark.parametrize("what", BAD_SHARDS)
def test_bad_shards_are_refused_before_anything_is_written(tmp_path, capsys, what):
    write_corpus(tmp_path)
    BAD_SHARDS[what](tmp_path / "text_train_000009.bin")
    with pytest.raises(SystemExit) as ended:
        train_gpt2.main(command(tmp_path))
    said = capsys.readouterr().err
    assert ended.value.code == 1 and len(said.strip().splitlines()) == 1 and "text_train_000009.bin" in said
    assert not run_folders(tmp_path / "logs")


def test_too_few_tokens(corpus, capsys):
    for changes, needle in ((dict(steps=100), "--repeat"),
                            (dict(row_tokens=65_536, tokens_per_step=65_536), "expected")):
        with pytest.raises(SystemExit):
            train_gpt2.main(command(corpus, **changes))
        assert needle in capsys.readouterr().err


def test_a_shard_that_vanishes_ends_the_run_with_a_line(corpus, tmp_path, monkeypatch, capsys):
    read, reads = train_gpt2.read_tokens, []

    def vanishing(shard, *place):
        reads.append(1)
        return read(shard._replace(path=f"{shard.path}.gone") if len(reads) > 350 else shard, *place)

    monkeypatch.setattr(train_gpt2, "read_tokens", vanishing)
    with pytest.raises(SystemExit):
        train_gpt2.main(command(corpus, out=tmp_path))
    assert "can no longer be read" in capsys.readouterr().err


@pytest.mark.parametrize("stdout", ["closed", "left", "ascii", "notebook"])
def test_a_reader_that_leaves_and_a_screen_without_letters(corpus, tmp_path, stdout):
    """Closed stdout, a pipe that nobody reads, an ASCII terminal, no terminal at all: the run ends well."""
    out = tmp_path / "Läufe"
    ended, = together(tmp_path, 1, printing, stdout, *command(corpus, out=out, steps=2, val_tokens=500))
    assert ended.status == 0 and not ended.err.count("Traceback"), ended.err
    run, = run_folders(out)
    assert (run / "model.pt").exists()


def test_a_port_in_use(corpus, tmp_path):
    import socket
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended, = together(tmp_path, 1, train, *command(corpus, out=tmp_path, timeout=3), RANK=0, WORLD_SIZE=2,
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert ended.status == 1 and port in ended.err and "Traceback" not in ended.err


def test_float8_and_rows_that_processes_cannot_share(corpus, capsys):
    for changes in (dict(head_dtype="float8"), dict(device="cuda")):
        with pytest.raises(SystemExit):
            train_gpt2.main(command(corpus, **changes))
        assert flag(next(iter(changes))) in capsys.readouterr().err or "device" in changes
    processes = train_gpt2.Processes(0, 3, train_gpt2.torch.device("cpu"))
    with pytest.raises(UserError, match="3 processes"):
        train_gpt2.for_device(parse_command_line(command(corpus)), processes)


def test_fuzzed_settings_are_accepted_or_refused_in_one_line():
    draw = np.random.default_rng(0)
    words = ["0", "-1", "1", "3", "128", "1e9", "none", "true", "auto", "0.5", "nan", "1,2", "1,2,3", "", "x",
             "0,1,2,3,4"]
    accepted = 0
    for _ in range(300):
        names = draw.choice(sorted(OPTIONS.keys() - {"resume"}), draw.integers(1, 4), replace=False)
        arguments = [f"{flag(name)}={draw.choice(words)}" for name in names]
        try:
            parse_command_line(arguments)
            accepted += 1
        except UserError as error:
            assert "\n" not in str(error.value if hasattr(error, "value") else error), arguments
    assert 0 < accepted < 300


def test_fuzzed_shards_are_read_or_refused_in_one_line(tmp_path):
    draw, path = np.random.default_rng(0), tmp_path / "shard.bin"
    good = write_shard(path, random_documents(300), 257, 256).read_bytes()
    for _ in range(300):
        content = bytearray(good)
        for _ in range(draw.integers(1, 4)):
            content[draw.integers(0, 24 if draw.random() < 0.7 else len(content))] = draw.integers(0, 256)
        path.write_bytes(content[:draw.integers(0, len(content) + 1)] if draw.random() < 0.2 else content)
        try:
            stream = train_gpt2.TokenStream(str(path))
            stream.read(0, stream.tokens)
        except UserError as error:
            assert "\n" not in str(error) and path.name in str(error)


def test_fuzzed_checkpoints_are_read_or_refused_in_one_line(corpus, tmp_path):
    run_folder = run_here(corpus, base=SMALL, out=tmp_path, steps=2, save_every=1, width=16)
    assert metrics(run_folder)
    good, draw = train_gpt2.checkpoints(run_folder)[0].read_bytes(), np.random.default_rng(0)
    path = tmp_path / "spoilt.pt"
    for _ in range(60):
        content = bytearray(good)
        for _ in range(3):
            content[draw.integers(0, len(content))] ^= 1 << draw.integers(0, 8)
        path.write_bytes(content[:draw.integers(0, len(content) + 1)] if draw.random() < 0.2 else content)
        try:
            train_gpt2.load_model(path)
        except UserError as error:
            assert "\n" not in str(error) and path.name in str(error)


def test_spelled():
    assert [spelled(value) for value in (True, (), (1, 2), 0.1, "auto")] == ["true", "none", "1,2", "0.1", "auto"]


def test_a_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_command_line(["--out", "~/logs"]).out == str(tmp_path / "logs")
    assert "there is no" in refusal("--resume", "~/none") and str(tmp_path) in refusal("--resume", "~/none")
