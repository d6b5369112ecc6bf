"""The command line, and bad input: one clear line, an exit status that is not 0, and nothing left behind."""

import dataclasses
import os
import pickle
import stat
import subprocess
import sys

import pytest
import torch

import train_gpt2
from tools import RECIPE, ROOT, command, random_documents, run_here, start, write_corpus, write_shard
from train_gpt2 import PRESETS, Config, Refusal, load_model, parse_command_line, spelled


def refusal(call, *arguments) -> str:
    """The one line with which a call turns bad input down; python prints it on stderr and exits with status 1."""
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    line = caught.value.code
    assert isinstance(line, str) and line and "\n" not in line
    return line


def refused_option(*arguments) -> str:
    return refusal(parse_command_line, list(arguments))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def refused_run(corpus, tmp_path, capfd):
    """A function that starts a run which must be turned down before it computes, prints or leaves anything."""
    def refused(**changes) -> str:
        out = tmp_path / "logs"
        line = refusal(train_gpt2.main, command(corpus, **{"out": out, **changes}))
        assert capfd.readouterr() == ("", "")
        assert not out.exists()
        return line
    return refused


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("arguments", [["--muon-lr", "0.5"], ["--muon_lr", "0.5"], ["--muon-lr=0.5"],
                                       ["--muon_lr=0.5"]])
def test_every_spelling_of_an_option(arguments):
    assert parse_command_line(arguments) == dataclasses.replace(Config(), muon_lr=0.5)


@pytest.mark.parametrize("name, text, value", [
    ("steps", "17", 17), ("muon_lr", "1e-3", 1e-3), ("out", "a=b", "a=b"), ("repeat", "true", True),
    ("repeat", "false", False), ("qk_norm", "false", False), ("dtype", "float64", "float64"),
    ("compile", "none", "none"), ("window", "2000", (2000,)), ("window", "1000,2000", (1000, 2000)),
    ("window_short", "1,2,3,4", (1, 2, 3, 4)), ("rate_levels", "1,2.5", (1.0, 2.5)),
    ("softcap", "0,1,0", (0.0, 1.0, 0.0)),
    ("adam_head", "1e-3,0.5,0.9,0", (1e-3, 0.5, 0.9, 0.0)), ("short_layers", "none", ()), ("short_layers", "4", (4,)),
    ("paired_layers", "2,10", (2, 10)), ("gated_skip", "2,10", (2, 10)), ("backout", "none", ())])
def test_values_have_the_type_of_their_field(name, text, value):
    for arguments in ([f"--{name}", text], [f"--{name}={text}"]):
        parsed = getattr(parse_command_line(arguments), name)
        assert parsed == value and type(parsed) is type(value)
        if isinstance(value, tuple):
            assert [type(part) for part in parsed] == [type(part) for part in value]


def typed(value) -> str:
    """Any setting as one types it, to the last digit."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_field_is_an_option(preset):
    config = parse_command_line(["--preset", preset])
    for f in dataclasses.fields(Config):
        if f.name != "preset":
            flag, value = f"--{f.name.replace('_', '-')}", getattr(config, f.name)
            assert parse_command_line(["--preset", preset, flag, typed(value)]) == config, f.name
            shown = getattr(parse_command_line(["--preset", preset, flag, spelled(value)]), f.name)
            if f.type in (float, tuple[float, ...]):  # printed with six digits
                assert shown == pytest.approx(value, rel=1e-5), f.name
            else:
                assert shown == value, f.name


def test_no_arguments_give_the_hundred_second_recipe():
    config = parse_command_line([])
    assert config == Config() and config.preset == "gpt2"
    assert (config.layers, config.heads, config.width, config.attention_free) == (11, 6, 768, (6,))
    assert config.tokens_per_step == tuple(8 * tokens for tokens in config.row_tokens) == (131_072, 262_144, 393_216)


def test_fewer_stages_name_every_list_that_is_too_long():
    line = refused_option("--preset", "gpt2-medium", "--stages", "2")
    for name in ("tokens-per-step", "row-tokens", "window", "window-short", "rate-levels"):
        assert f"--{name}" in line
    assert parse_command_line(["--stages", "1", *"--tokens-per-step 16384 --row-tokens 16384 --window 384,896 "
                               "--window-short 128 --rate-levels 1".split()]).stages == 1
    line = refused_option("--stages", "2", "--window-short", "128")
    assert line.startswith("--window 384,896,1408,1664 is longer") and line.endswith("--window 384,896,1408")


@pytest.mark.parametrize("given, better", [("3", "none"), ("6,3", "3,6"), ("3,6,2,6", "2,6"), ("3,6,4", "3,6"),
                                           ("4,4", "none")])
def test_skips_are_pairs(given, better):
    assert refused_option("--gated-skip", given).endswith(f"TO once; the nearest is --gated-skip {better}")
    assert parse_command_line(["--gated-skip", better])


def test_the_five_minute_recipe_is_a_preset():
    config = parse_command_line(["--preset", "five-minute"])
    assert (config.layers, config.heads, config.width, config.window) == (12, 6, 768, (1023,))
    assert config.tokens_per_step == (8 * config.row_tokens[0],) == (524_288,)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_defaults_and_what_is_given_wins(preset):
    config = parse_command_line(["--preset", preset])
    assert config == Config(**{**PRESETS[preset], "preset": preset})
    for arguments in (["--preset", preset, "--layers", "16"], ["--layers", "16", f"--preset={preset}"]):
        assert parse_command_line(arguments) == dataclasses.replace(config, layers=16)


def test_an_unknown_option_names_the_nearest():
    assert "unknown option --layer;" in refused_option("--layer", "3")
    assert "nearest is --layers " in refused_option("--layer", "3")
    assert "nearest is --micro-tokens " in refused_option("--micro_token=8")
    assert "nearest is --paired-layers " in refused_option("--paired-layer", "0")
    assert "steps is no option: options begin with --" in refused_option("steps", "8")
    assert "unknown option -steps" in refused_option("-steps", "8")
    assert "unknown option --" in refused_option("--", "8")
    assert "unknown option " in refused_option("")


def test_a_missing_value():
    assert refused_option("--layers", "3", "--steps").startswith("--steps needs a value")


@pytest.mark.parametrize("name, value, expected", [
    ("steps", "many", "a whole number"), ("steps", "1.5", "a whole number"), ("steps", "", "a whole number"),
    ("steps", "--layers", "a whole number"), ("muon-lr", "fast", "a number"),
    ("row-tokens", "128;256", "a list of 1 to 17 whole numbers"),
    ("row-tokens", "128,,256", "a list of 1 to 17 whole numbers"),
    ("window", "64,1.5", "a list of 1 to 17 whole numbers"), ("window", "64,", "a list of 1 to 17 whole numbers"),
    ("short-layers", "all", "a list of whole numbers"), ("short-layers", "none,1", "a list of whole numbers"),
    ("adam-head", "0.1,fast,0.9,0", "a list of 4 numbers"), ("repeat", "yes", "true, false"),
    ("repeat", "True", "the nearest is --repeat true"),
    ("preset", "tinny", "the nearest is --preset tiny"), ("dtype", "float16", "auto, bfloat16, float32, float64"),
    ("device", "gpu", "auto, cpu, cuda"), ("compile", "max", "auto, none"),
    ("long-documents", "cut", "drop, continue"), ("head-dtype", "float9", "the nearest is --head-dtype float8"),
    ("orthogonaliser", "polar", "the nearest is --orthogonaliser polar-express")])
def test_a_value_of_the_wrong_type(name, value, expected):
    for arguments in ([f"--{name}", value], [f"--{name}={value}"]):
        line = refused_option(*arguments)
        assert line.startswith(f"--{name} ") and value in line and expected in line
        parse_command_line([f"--{name}", value_named_last(line, f"--{name}")])


def example_in_refusal(name: str, value: str) -> tuple:
    """The value that the refusal of another one recommends, as it is typed and as it is parsed."""
    flag = "--" + name.replace("_", "-")
    line = refused_option(flag, value)
    assert line.startswith(f"{flag} {value} ")
    example = value_named_last(line, flag)
    return example, getattr(parse_command_line([flag, example]), name)


def value_named_last(line: str, flag: str) -> str:
    """The value that a refusal recommends for an option."""
    return line.rsplit(flag + " ", 1)[1].split()[0]


@pytest.mark.parametrize("name, value", [
    ("steps", "0"), ("steps", "-3"), ("tokens_per_step", "0"), ("row_tokens", "0"), ("micro_tokens", "-128"),
    ("loss_chunk", "0"), ("val_every", "-1"), ("val_tokens", "0"), ("val_row_tokens", "0"), ("layers", "0"),
    ("heads", "0"), ("width", "0"), ("mlp_ratio", "0"), ("value_tables", "0"), ("rotary_base", "0"),
    ("rotary_share", "1.01"), ("rms_epsilon", "-1e-6"), ("muon_lr", "nan"), ("muon_lr", "inf"), ("muon_momentum", "1"),
    ("normuon_beta2", "1"), ("adam_epsilon", "nan"), ("adam_every", "0"), ("momentum_warmup", "1.01"),
    ("cooldown", "2"), ("cooldown", "-0.1"), ("extension", "0.95"), ("tied_until", "1.5"), ("predicted_tokens", "0"),
    ("bigram", "-1"), ("document_tokens", "-1"), ("seed", "-1"), ("seed", str(2**64))])
def test_a_value_out_of_range_names_one_that_works(name, value):
    example, found = example_in_refusal(name, value)
    assert found == pytest.approx(tuple(map(float, example.split(","))) if isinstance(found, tuple) else float(example))


@pytest.mark.parametrize("name, value", [
    ("tokens_per_step", "131072,-1"), ("row_tokens", "none"), ("row_tokens", "128,256,384,512,640"),
    ("window", "none"), ("window", "64,-1"), ("window", "0,64"), ("window_short", "1,2,3,4,5"), ("rate_levels", "none"),
    ("rate_levels", "1,nan"), ("rate_levels", "1,-1"), ("short_layers", "-1"), ("value_layers", "0,-3"),
    ("softcap", "30"), ("softcap", "30,30"), ("softcap", "-30,30,0"), ("softcap", "none"), ("softcap", "1,2,3,4"),
    ("softcap", "30,0,0"), ("adam_head", "0.1"), ("adam_gates", "0.1,0.9,0.9"), ("adam_x0", "0.1,0.9,0.9,0,0"),
    ("adam_embedding", "-0.1,0.9,0.9,0"), ("adam_head", "0.1,1,0.9,0"), ("adam_tables", "0.1,0.9,1.5,0"),
    ("adam_scalars", "0.1,-0.5,0.9,0"), ("backout", "1,2"), ("gated_skip", "3"), ("gated_skip", "1,2,3")])
def test_a_list_of_the_wrong_length_or_out_of_range_names_one_that_works(name, value):
    example, found = example_in_refusal(name, value)
    assert found == pytest.approx(() if example == "none" else tuple(map(float, example.split(","))))


@pytest.mark.parametrize("name", ["micro_tokens", "document_tokens", "val_every", "seed", "bigram", "cooldown",
                                  "momentum_warmup", "momentum_cooldown", "muon_momentum", "muon_momentum_start",
                                  "muon_lr", "muon_decay", "normuon_beta2", "extension", "tied_until", "rotary_share",
                                  "attention_scale", "window_final", "rate_floor"])
def test_zero_where_it_means_something(name):
    assert getattr(parse_command_line([f"--{name}", "0"]), name) == 0


@pytest.mark.parametrize("again", [["--steps", "5"], ["--steps=4"]])
def test_twice_given(again):
    assert "--steps is given twice" in refused_option("--steps", "4", *again)
    assert "--row_tokens is given twice" in refused_option("--row-tokens", "256", "--row_tokens", "256")


FIVE = ["--preset", "five-minute"]
ROWS = ["--row-tokens", "128,256"]


@pytest.mark.parametrize("arguments, expected", [
    ([*FIVE, "--row-tokens", "1000"], "the nearest is --row-tokens 1024"),
    ([*FIVE, "--row-tokens", "1"], "the nearest is --row-tokens 128"),
    (["--row-tokens", "128,200,1,1000"], "the nearest is --row-tokens 128,256,128,1024"),
    (["--val-row-tokens", "1000"], "the nearest is --val-row-tokens 1024"),
    ([*FIVE, "--tokens-per-step", "100000"], "the nearest is --tokens-per-step 131072"),
    ([*FIVE, "--tokens-per-step", "5"], "the nearest is --tokens-per-step 65536"),
    ([*ROWS, "--tokens-per-step", "1024,700"], "the nearest is --tokens-per-step 1024,768"),
    ([*ROWS, "--tokens-per-step", "640"], "the nearest is --tokens-per-step 640,512"),  # a row of the second stage
    (["--heads", "5", "--width", "768", "--paired-layers", "none"], "the nearest is --width 770"),
    (["--heads", "4", "--width", "12"], "the nearest is --width 16"),
    (["--heads", "3"], "the nearest is --heads 4"),
    (["--layers", "9"], "the nearest is --short-layers 0,1,2,4,5,7,8"),
    (["--short-layers", "0,11,2"], "the nearest is --short-layers 0,2"),
    (["--paired-layers", "11"], "the nearest is --paired-layers none"),
    (["--attention-free", "6,99"], "the nearest is --attention-free 6"),
    (["--value-layers", "10,11"], "the nearest is --value-layers 10"),
    (["--backout", "11"], "the nearest is --backout none"),
    (["--gated-skip", "3,11"], "the nearest is --gated-skip none"),
    (["--gated-skip", "6,3"], "the nearest is --gated-skip 3,6"),
    (["--gated-skip", "6,6"], "the nearest is --gated-skip none"),
    ([*FIVE, "--attention-free", "0,2"], "the nearest is --attention-free 2"),  # value_residual mixes layer 0's values
    ([*FIVE, "--gated-skip", "3,6"], "the nearest is --gated-skip none")])
def test_settings_that_exclude_each_other_name_the_nearest_that_work(arguments, expected):
    line = refused_option(*arguments)
    assert expected in line
    flag, value = line.rsplit("nearest is ", 1)[1].split()
    mended = dict(zip(arguments[::2], arguments[1::2], strict=True)) | {flag: value}
    words = [word for pair in mended.items() for word in pair]
    if "--layers" not in mended:  # which the lists of the other layers go beyond as well
        parse_command_line(words)
    else:
        assert not refused_option(*words).startswith(flag)


def test_lists_of_layers_can_be_mended_one_by_one():
    """Fewer layers than the preset's: following each refusal leads to a configuration that works."""
    arguments = {"--layers": "3"}
    for _ in range(8):
        try:
            config = parse_command_line([word for pair in arguments.items() for word in pair])
            break
        except Refusal as refused:
            flag, value = refused.code.rsplit("nearest is ", 1)[1].split()
            assert flag not in arguments
            arguments[flag] = value
    assert (config.short_layers, config.paired_layers, config.value_layers) == ((0, 1, 2), (0, 2), (0, 1))
    assert (config.attention_free, config.gated_skip, config.backout) == ((), (), ())


def test_micro_tokens_are_a_bound_that_need_divide_nothing(corpus, tmp_path):
    for micro in (1, 3 * 128, 10_000):
        assert (run_here(corpus, out=tmp_path / str(micro), steps=1, micro_tokens=micro) / "model.pt").exists()


@pytest.mark.parametrize("dtype, width, chunk", [("float32", 64, 512), ("float64", 64, 512), ("bfloat16", 72, 512),
                                                 ("bfloat16", 64, 500)])
def test_a_float8_head_is_refused_where_its_products_cannot_be_taken(refused_run, dtype, width, chunk):
    line = refused_run(head_dtype="float8", dtype=dtype, width=width, loss_chunk=chunk)
    assert f"found {dtype}, {width}, {chunk};" in line
    assert "--dtype bfloat16" in line and "multiples of 16" in line and "--head-dtype wide" in line


def test_help_lists_every_field_with_default_and_unit(capsys):
    for preset in PRESETS:
        with pytest.raises(SystemExit) as ended:
            parse_command_line(["--preset", preset, "--help"])
        assert ended.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        lines = out.splitlines()
        for f in dataclasses.fields(Config):
            line, = [line for line in lines if line.split()[:1] == ["--" + f.name.replace("_", "-")]]
            default = getattr(parse_command_line(["--preset", preset]), f.name)
            assert f"[{f.metadata['unit']}]" in line and line.rstrip().endswith(f.metadata["reason"])
            shown = line.split()[1]
            if f.type is float:
                assert float(shown) == pytest.approx(default, 1e-5)
            elif f.type == tuple[float, ...]:
                assert [float(part) for part in shown.split(",")] == pytest.approx(default, 1e-5)
            else:
                assert shown == typed(default)
        assert not [line for line in lines if len(line) > 160]


def test_importing_has_no_side_effect(tmp_path):
    script = """
import os, threading, torch, torch.distributed
def state():
    random = torch.get_rng_state().tolist(), torch.initial_seed()
    return dict(os.environ), random, torch.get_default_dtype(), torch.get_num_threads()
before = state()
import train_gpt2
assert state() == before
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1
"""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "RANK": "1", "WORLD_SIZE": "2"}  # and no more
    done = subprocess.run([sys.executable, "-B", "-c", script, "--steps", "bad"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Bad input as a person sees it: in a process of its own


@pytest.mark.parametrize("bad", ["option", "shard"])
def test_one_line_on_stderr_and_an_exit_status(corpus, tmp_path, bad):
    shard = write_shard(tmp_path / "short.bin", random_documents(100), 257, 256, count=101)
    changes = {"tokens_per_stepp": 5} if bad == "option" else {"train_files": shard}
    done = start([train_gpt2.__file__, *command(corpus, out=tmp_path / "logs", **changes)])
    assert done.returncode == 1
    assert done.stdout == ""
    line, = done.stderr.splitlines()
    assert ("nearest is --tokens-per-step" if bad == "option" else str(shard)) in line
    assert "Traceback" not in line
    assert not (tmp_path / "logs").exists()


def test_processes_other_than_the_first_leave_it_the_word(monkeypatch):
    waits = []
    monkeypatch.setattr(train_gpt2.time, "sleep", waits.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        refusal(train_gpt2.main, ["--steps", "0"])
    wait, = waits
    assert wait >= 1


# ----------------------------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize("part", ["train_files", "val_files"])
def test_no_shard(refused_run, tmp_path, part):
    line = refused_run(**{part: tmp_path / "none_*.bin"})
    assert f"no shard matches {tmp_path}/none_*.bin" in line and "python data/text.py" in line
    assert "no shard matches ;" in refused_run(**{part: ""})
    assert "python data/fineweb.py" in refused_run(**{part: tmp_path / "fineweb_*.bin"})


@pytest.mark.parametrize("overrides, expected", [
    ({"magic": 20240521}, "its first word is 20240521, expected 20240520"),
    ({"version": 2}, "has shard version 2, expected 1"),
    ({"count": 5001}, "promises 5001 tokens but holds 5000: truncated"),
    ({"count": 4999}, "promises 4999 tokens but holds 5000: damaged"),
    ({"count": 0}, "promises 0 tokens"),
    ({"count": -1}, "promises -1 tokens"),
    ({"vocabulary": 70_000}, "states a vocabulary of 70000"),
    ({"vocabulary": -5}, "states a vocabulary of -5"),
    ({"separator": 257}, "vocabulary of 257 with separator 257"),
    ({"separator": -1}, "separator -1")])
@pytest.mark.parametrize("part", ["train_files", "val_files"])
def test_a_header_that_lies(refused_run, tmp_path, part, overrides, expected):
    claims = {"vocabulary": 257, "separator": 256, **overrides}
    path = write_shard(tmp_path / "bad.bin", random_documents(5000), **claims)
    line = refused_run(**{part: path})
    assert expected in line and str(path) in line and f"rm -f {path} && python data/text.py" in line


@pytest.mark.parametrize("size, expected", [(0, "0 bytes"), (1000, "1000 bytes"), (1024 + 9999, "truncated"),
                                            (1024, "truncated"), (1024 + 10_001, "damaged")])
def test_a_file_of_the_wrong_size(refused_run, tmp_path, size, expected):
    path = write_shard(tmp_path / "bad.bin", random_documents(5000), 257, 256)
    os.truncate(path, size)
    line = refused_run(train_files=path)
    assert expected in line and str(path) in line


def test_a_truncated_large_shard_is_counted_to_the_token(refused_run, tmp_path):
    path = write_shard(tmp_path / "bad.bin", [], 257, 256, count=100_000_000)
    os.truncate(path, 1024 + 2 * 99_999_998)  # takes no room: the file has a hole
    line = refused_run(train_files=path)
    assert "99999998" in line.replace(",", "") and "100000000" in line.replace(",", "")


def test_a_shard_without_tokens(refused_run, tmp_path):
    path = write_shard(tmp_path / "empty.bin", [], 257, 256)
    assert f"{path} promises 0 tokens" in refused_run(train_files=path)


def test_a_folder_in_place_of_a_shard(refused_run, tmp_path):
    (tmp_path / "folder.bin").mkdir()
    assert "Is a directory" in refused_run(train_files=tmp_path / "*.bin")
    assert "is a folder; expected a glob" in refused_run(train_files=tmp_path / "folder.bin")


def test_text_in_place_of_a_shard(refused_run, tmp_path):
    """What mends it makes shards of the text. No command that removes it is named."""
    (tmp_path / "book.txt").write_text("Call me Ishmael.\n" * 100)
    line = refused_run(train_files=tmp_path / "book.txt")
    assert f"python data/text.py {tmp_path}/book.txt --out FOLDER" in line and "rm " not in line


@pytest.mark.parametrize("part", ["train_files", "val_files"])
def test_ids_beyond_the_vocabulary(refused_run, tmp_path, part):
    tokens = random_documents(9000)
    tokens[1234] = 300
    path = write_shard(tmp_path / "bad.bin", tokens, 257, 256)
    line = refused_run(**{part: path})
    assert f"{path} holds token 300 at position 1234, beyond its vocabulary of 257" in line


def test_too_few_tokens(refused_run, corpus):
    line = refused_run(steps=21)  # 21 x 1024 + 1 tokens of 21,000
    assert "needs 21,505 training tokens" in line and "holds 21,000" in line
    assert "python data/text.py" in line and "--repeat true" in line and "--steps 20" in line
    line = refused_run(tokens_per_step=128 * 200)
    assert "--repeat true" in line and "--steps" not in line


@pytest.mark.parametrize("rule", ["drop", "continue"])
@pytest.mark.parametrize("steps", [20, 21, 50, 333])
def test_the_number_of_steps_that_is_named_fits(corpus, rule, steps):
    """Through three stages with batches of different sizes and rounded borders."""
    changes = dict(base=RECIPE, long_documents=rule)
    line = refusal(train_gpt2.open_data, parse_command_line(command(corpus, steps=steps, **changes)))
    fewer = int(value_named_last(line, "--steps"))
    assert fewer < steps
    train_gpt2.open_data(parse_command_line(command(corpus, steps=fewer, **changes)))


def test_too_few_tokens_name_the_download(refused_run, tmp_path):
    write_shard(tmp_path / "fineweb_train_1.bin", random_documents(1000), 257, 256)
    write_shard(tmp_path / "fineweb_train_2.bin", random_documents(1500), 257, 256)
    line = refused_run(train_files=tmp_path / "fineweb_train_*.bin", steps=5)
    assert "python data/fineweb.py 4;" in line  # 5,121 tokens are two more shards of 1,500


@pytest.mark.parametrize("steps, allowed", [(20, True), (21, False)])
def test_the_last_step_needs_one_token_more(tmp_path, steps, allowed):
    folder = write_corpus(tmp_path, train=(20 * 1024, 1024))
    config = parse_command_line(command(folder, steps=steps))
    if allowed:
        train_gpt2.open_data(config)
    else:
        assert "needs 21,505" in refusal(train_gpt2.open_data, config)
        train_gpt2.open_data(dataclasses.replace(config, repeat=True))


def test_long_documents_of_which_most_would_be_dropped(tmp_path, corpus):
    """One document of 9,000 tokens gives one row of 128: the run would see the same few tokens over and over."""
    book = random_documents(9000, length=10**9)
    write_shard(tmp_path / "book.bin", book, 257, 256)
    changes = dict(base=RECIPE, train_files=tmp_path / "book.bin", repeat=True)
    config = parse_command_line(command(corpus, **changes))
    line = refusal(train_gpt2.open_data, config)
    assert "--long-documents drop would keep one token in" in line and "give --long-documents continue" in line
    train_gpt2.open_data(dataclasses.replace(config, long_documents="continue"))
    train_gpt2.open_data(parse_command_line(command(corpus, base=RECIPE, repeat=True)))  # documents of usual length


@pytest.mark.parametrize("arguments, nearest", [
    (["--window", "64"], "64"), (["--window", "384,400"], "384,400"),
    (["--preset", "tiny", "--short-layers", "1"], "128")])
def test_a_short_window_longer_than_the_long_one(arguments, nearest):
    line = refused_option(*arguments)
    assert line.startswith("--window-short ") and line.endswith(f"the nearest is --window-short {nearest}")
    parse_command_line([*arguments, "--window-short", nearest])


def test_a_single_validation_token(refused_run, tmp_path):
    path = write_shard(tmp_path / "one.bin", [256], 257, 256)
    assert f"{path} holds 1 token, expected " in refused_run(val_files=path)


def test_shards_that_disagree_on_the_vocabulary(refused_run, tmp_path):
    other = write_shard(tmp_path / "a.bin", random_documents(5000, 300, 299), 300, 299)
    line = refused_run(val_files=other)
    assert "(257, 256)" in line and "(300, 299)" in line and "python data/text.py" in line
    write_shard(tmp_path / "b.bin", random_documents(5000), 257, 256)
    assert "disagree on (vocabulary, separator)" in refused_run(train_files=tmp_path / "?.bin")
    separator = write_shard(tmp_path / "c.bin", random_documents(5000, 257, 255), 257, 255)
    assert "(257, 255)" in refused_run(val_files=separator)


def test_an_output_folder_that_cannot_be_written(refused_run, corpus, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    line = refused_run(out=file / "logs")
    assert f"cannot write the run folder {file}/logs" in line and "--out FOLDER" in line
    assert file.read_text() == "in the way"


# ----------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A function that puts a stand-in for nvidia-smi, or nothing, on an otherwise empty PATH. torch can use no GPU."""
    def no_gpu():
        raise RuntimeError("No CUDA GPUs\nare available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", no_gpu)

    def put(script: str | None) -> None:
        folder = tmp_path / "driver"
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder))
        if script:
            (folder / "nvidia-smi").write_text("#!/bin/sh\n" + script + "\n")
            (folder / "nvidia-smi").chmod(stat.S_IRWXU)
    return put


TWO_GPUS = "echo 'GPU 0: NVIDIA H100 (UUID: x)'; echo 'GPU 1: NVIDIA H100 (UUID: y)'"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(refused_run, driver, device):
    driver(TWO_GPUS)
    line = refused_run(device=device)
    assert "GPU 0: NVIDIA H100, GPU 1: NVIDIA H100" in line and "No CUDA GPUs are available" in line
    assert torch.__version__ in line and "--device cpu" in line


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built for CUDA")
def test_a_torch_without_cuda_says_so(refused_run):
    assert "not compiled with CUDA" in refused_run(device="cuda")


def test_the_cpu_is_used_where_it_is_asked_for(corpus, driver, tmp_path):
    driver(TWO_GPUS)
    assert (run_here(corpus, device="cpu", out=tmp_path / "logs", steps=1) / "model.pt").exists()


@pytest.mark.parametrize("script", [None, "echo 'No devices were found'", f"{TWO_GPUS}; exit 9"])
def test_without_a_gpu_auto_means_the_cpu_and_cuda_is_refused(driver, script):
    driver(script)
    config = parse_command_line(["--preset", "tiny"])
    assert train_gpt2.start_processes(config)[:3] == (0, 1, torch.device("cpu"))
    line = refusal(train_gpt2.start_processes, dataclasses.replace(config, device="cuda"))
    assert "cannot use a GPU (the driver shows none)" in line and "--device cpu" in line


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    return run_here(corpus, steps=1, layers=1, out=tmp_path_factory.mktemp("checkpoint")) / "model.pt"


def refused_checkpoint(path) -> str:
    line = refusal(load_model, path)
    assert str(path) in line and "python train_gpt2.py --preset tiny" in line
    return line


def test_no_advice_to_load_unsafely(tmp_path):
    (tmp_path / "notes.md").write_text("# Notes")
    assert "weights_only" not in refused_checkpoint(tmp_path / "notes.md")


def test_a_missing_checkpoint(tmp_path):
    assert "No such file" in refused_checkpoint(tmp_path / "none.pt")
    assert "Is a directory" in refused_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0", b"garbage" * 100, b"PK\3\4" + b"\0" * 500,
                                     pickle.dumps({"config": 1}, 2)])
def test_garbage_is_no_checkpoint(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    refused_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_checkpoint(tmp_path, checkpoint, share):
    content = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:int(share * len(content))])
    refused_checkpoint(tmp_path / "cut.pt")


def without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize("change", [
    lambda saved: saved["weights"],
    lambda saved: [saved],
    *(lambda saved, name=name: without(saved, name) for name in ("config", "vocabulary", "dtype", "weights")),
    lambda saved: {**saved, "weights": without(saved["weights"], "head")},
    lambda saved: {**saved, "weights": {**saved["weights"], "more": torch.zeros(1)}},
    lambda saved: {**saved, "weights": {**saved["weights"], "head": torch.zeros(3, 3)}},
    lambda saved: {**saved, "vocabulary": 50257},
    lambda saved: {**saved, "dtype": "float7"},
    lambda saved: {**saved, "config": {**saved["config"], "layers": 2}},
    lambda saved: {**saved, "config": {**saved["config"], "setting_of_next_year": 1}}])
def test_a_checkpoint_of_something_else(tmp_path, checkpoint, change):
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(change(saved), tmp_path / "other.pt")
    line = refusal(load_model, tmp_path / "other.pt")
    assert str(tmp_path / "other.pt") in line and "train_gpt2.py" in line


class Payload:
    """Unpickled without care it would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code_in_it_does_not_run_it(tmp_path, checkpoint, zipped):
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "step": Payload(tmp_path / "ran")}, tmp_path / "evil.pt",
               _use_new_zipfile_serialization=zipped)
    refused_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the file did hold code
