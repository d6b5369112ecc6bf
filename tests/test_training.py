"""Whole runs on one process: what is learned, what is written, and that the same numbers come out however it is cut."""

import dataclasses
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import train_gpt2
from tools import (
    RECIPE,
    ROOT,
    SMALL,
    command,
    configuration,
    dense_mask,
    losses,
    metrics,
    random_documents,
    run_folders,
    run_here,
    weights,
    write_corpus,
    write_shard,
)
from train_gpt2 import GPT, PRESETS, Batch, Config, Processes, Refusal, Span, TokenStream, first_visible_key

sys.path[:0] = [str(ROOT / "records"), str(ROOT / "data")]
import check  # noqa: E402

STORED = json.loads((ROOT / "tests" / "five_minute_losses.json").read_text(encoding="utf-8"))
# The hundred-second recipe through all its stages: 1, 2, 1 and 2 steps; embedding and head are untied after the fourth.
SIX_STEPS = {**RECIPE, "steps": 6, "val_every": 3}
ODD_STEPS = {**RECIPE, "steps": 5}  # ends on a step in which Adam is not due
ALONE = Processes(0, 1, torch.device("cpu"))


def short(parameter) -> str:
    """A recipe's name in place of all its settings, where tests are listed."""
    return parameter["preset"] if isinstance(parameter, dict) else str(parameter)




@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=(9000, 4000, 8000, 12_000))


@pytest.fixture(scope="module")
def run(corpus):
    return run_here(corpus, steps=30, val_every=8)


@pytest.fixture(scope="module")
def recipe_run(corpus):
    return run_here(corpus, base=SIX_STEPS)


def trained(corpus, dtype=torch.float64, steps: int = 3, **changes):
    """A model after a few steps, and its groups: not the symmetric beginning, where most gradients are zero."""
    config = configuration(corpus, dtype=str(dtype)[6:], **changes)
    model = GPT(config, 257, dtype)
    groups = train_gpt2.optimizer_groups(model, config, dtype, ALONE)
    for step, batch in enumerate(batches(config, steps)):
        train_gpt2.train_step(model, groups, batch, step)
    return model, groups


def batches(config, steps: int) -> list[Batch]:
    """All rows of each of the first steps."""
    return list(itertools.islice(train_gpt2.step_batches(TokenStream(config.train_files), config, ALONE), steps))


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_the_loss_falls_from_that_of_guessing(run):
    trained_losses, judged = losses(run), losses(run, "val_loss")
    assert trained_losses[0] == pytest.approx(math.log(320), abs=1e-5)  # the vocabulary of 257, padded
    assert judged[0] == pytest.approx(math.log(320), abs=1e-5)
    assert judged == sorted(judged, reverse=True)
    assert judged[-1] < 3.2 and sum(trained_losses[-5:]) / 5 < 3.2  # the ids alone: 3.3 nats


def test_metrics_have_a_line_per_step_and_per_validation(run):
    records = metrics(run)
    steps = [record for record in records if "train_loss" in record]
    judged = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert [record["step"] for record in judged] == [0, 8, 16, 24, 30]
    assert all(set(record) == {"step", "tokens", "train_loss", "train_time_s"} for record in steps)
    assert all(set(record) == {"step", "tokens", "val_loss", "train_time_s", "peak_memory_mib"} for record in judged)
    assert all(record["tokens"] == 1024 * record["step"] for record in records)
    assert all(type(record[name]) is (int if name in ("step", "tokens") else float)
               for record in records for name in record)
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    times = [record["train_time_s"] for record in records]
    assert times == sorted(times) and times[0] < 0.1 < times[-1]
    assert 50 < judged[0]["peak_memory_mib"] <= judged[-1]["peak_memory_mib"] < 100_000


def test_every_stage_is_counted_with_its_own_batch(recipe_run):
    """Two steps in the first stage, one in the second, one in the third and two in the extension."""
    per_step = [1024] * 2 + [2048] + [3072] * 3
    for record in metrics(recipe_run):
        assert record["tokens"] == sum(per_step[:record["step"]])
    assert losses(recipe_run)[0] == pytest.approx(math.log(320), abs=0.1)
    assert losses(recipe_run, "val_loss") == sorted(losses(recipe_run, "val_loss"), reverse=True)


@pytest.mark.parametrize("every, expected", [(0, [0, 8]), (3, [0, 3, 6, 8]), (8, [0, 8]), (100, [0, 8])])
def test_validation_comes_first_every_so_many_steps_and_last(corpus, every, expected):
    records = metrics(run_here(corpus, val_every=every))
    assert [record["step"] for record in records if "val_loss" in record] == expected


def test_the_clock_counts_steps_and_nothing_else(corpus, monkeypatch):
    """On a clock that gains 1000 s in each training step and a million in each validation."""
    real_clock, gained = time.perf_counter, [0]

    def gaining(call, seconds):
        def slow(*arguments):
            gained[0] += seconds
            return call(*arguments)
        return slow

    monkeypatch.setattr(time, "perf_counter", lambda: real_clock() + gained[0])
    monkeypatch.setattr(train_gpt2, "train_step", gaining(train_gpt2.train_step, 1000))
    monkeypatch.setattr(train_gpt2, "validate", gaining(train_gpt2.validate, 1_000_000))
    for record in metrics(run_here(corpus, steps=6, val_every=2)):
        under_way = 1 if "train_loss" in record else 0  # a loss may be read when the next step has begun
        assert 0 <= record["train_time_s"] - 1000 * record["step"] < 1000 * under_way + 500


def test_the_log_holds_source_configuration_and_a_line_per_loss(run, corpus):
    text = (run / "log.txt").read_text(encoding="utf-8")
    with open(train_gpt2.__file__, encoding="utf-8") as file:
        assert text.startswith(file.read())
    lines = text.splitlines()
    config = configuration(corpus, steps=30, val_every=8)
    assert json.dumps(dataclasses.asdict(config)) in lines
    assert any(f"torch {torch.__version__}" in line for line in lines)
    shape = re.compile(r"step:(\d+)/30 (train_loss|val_loss):(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")
    found = [match.groups() for match in map(shape.fullmatch, lines) if match]
    written = {(record["step"], kind): record for record in metrics(run) for kind in ("train_loss", "val_loss")
               if kind in record}
    for step, kind, loss, milliseconds, average in found:
        record = written[int(step), kind]
        assert float(loss) == pytest.approx(record[kind], abs=6e-5)
        assert int(milliseconds) == pytest.approx(1000 * record["train_time_s"], abs=0.51)
        assert float(average) == pytest.approx(1000 * record["train_time_s"] / max(1, int(step)), abs=0.006)
    shown = {(int(step), kind) for step, kind, *_ in found}
    assert len(shown) == len(found)
    assert shown >= {key for key in written if key[1] == "val_loss"} | {(10, "train_loss"), (30, "train_loss")}
    assert f"val_loss {losses(run, 'val_loss')[-1]:.4f}" in lines[-1] and str(run) in lines[-1]


def test_the_log_is_also_shown(corpus, capsys):
    new = run_here(corpus, steps=2)
    shown = capsys.readouterr().out.splitlines()
    lines = (new / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in shown if line.startswith("step:")] == [line for line in lines if line.startswith("step:")]
    assert shown[-1] == lines[-1]


def test_the_run_folder_holds_three_files(run):
    assert {path.name for path in run.iterdir()} == {"log.txt", "metrics.jsonl", "model.pt"}


def test_the_checkpoint_is_plain(run, corpus):
    saved = torch.load(run / "model.pt", weights_only=True)
    assert saved["config"] == dataclasses.asdict(configuration(corpus, steps=30, val_every=8))
    assert (saved["vocabulary"], saved["separator"], saved["dtype"], saved["step"]) == (257, 256, "float32", 30)
    assert saved["val_loss"] == losses(run, "val_loss")[-1]
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
               for tensor in saved["weights"].values())  # not one more copy of the group that a parameter is a view of
    _, values = train_gpt2.load_model(run / "model.pt")
    assert values.pop("path") == str(run / "model.pt")
    assert {name: value for name, value in values.items() if name != "weights"} == {
        name: value for name, value in saved.items() if name != "weights"}


@pytest.mark.parametrize("tied", [None, False, True])
def test_a_checkpoint_gives_the_same_validation_loss(corpus, request, tied):
    """With the windows, the rotary tables and the tie of the end of the run; None: the five-minute recipe."""
    if tied:
        run = run_here(corpus, base=ODD_STEPS, tied_until=1)
    else:
        run = request.getfixturevalue("run" if tied is None else "recipe_run")
    model, saved = train_gpt2.load_model(run / "model.pt")
    assert model.tied == bool(tied)
    loss = train_gpt2.validate(model, TokenStream(model.config.val_files), 2000, saved["step"], ALONE)
    assert loss == saved["val_loss"] == losses(run, "val_loss")[-1]


def test_a_smaller_validation_corpus_is_noticed(corpus):
    text = (run_here(corpus, steps=1, val_tokens=2700) / "log.txt").read_text(encoding="utf-8")
    notice, = [line for line in text.splitlines() if line.startswith("notice")]
    assert "2,699" in notice and "2700" in notice.replace(",", "")
    text = (run_here(corpus, steps=1, val_tokens=2699) / "log.txt").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if line.startswith("notice")]


def test_repeated_shards_start_over(tmp_path):
    folder = write_corpus(tmp_path, train=(700, 600))
    twice = write_corpus(tmp_path / "twice", train=(700, 600))
    tokens = random_documents(1300)
    for number in (2, 4, 6):
        write_shard(twice / f"text_train_{number:06}.bin", tokens[:700], 257, 256)
        write_shard(twice / f"text_train_{number + 1:06}.bin", tokens[700:], 257, 256)
    assert losses(run_here(folder, steps=5, repeat=True)) == losses(run_here(twice, steps=5))


# ----------------------------------------------------------------------------------------------------------------------
# The same again


def test_a_seed_gives_the_same_run_to_the_bit(corpus):
    first, again, other = (run_here(corpus, seed=seed) for seed in (1, 1, 2))
    for kind in ("train_loss", "val_loss"):
        assert losses(first, kind) == losses(again, kind)
        assert losses(first, kind)[-1] != losses(other, kind)[-1]
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(first).items())
    assert not torch.equal(weights(first)["embedding"], weights(other)["embedding"])


@pytest.fixture(scope="module")
def whole(corpus):
    """A function: the run of a recipe whose steps go through the model at once."""
    runs = {}

    def run(base: dict):
        name = base["preset"]
        if name not in runs:
            runs[name] = run_here(corpus, base=base, micro_tokens=4096, dtype="float64", loss_chunk=96)
        return runs[name]
    return run


FIVE_STEPS = {**SMALL, "steps": 5}


@pytest.mark.parametrize("base, micro, recompute", [
    *((FIVE_STEPS, micro, recompute) for micro in (128, 256, 512) for recompute in (False, True)),
    (ODD_STEPS, 500, True)])
def test_micro_batches_do_not_change_the_result(corpus, whole, base, micro, recompute):
    expected = whole(base)
    parts = run_here(corpus, base=base, micro_tokens=micro, recompute=recompute, dtype="float64", loss_chunk=96)
    for kind in ("train_loss", "val_loss"):
        assert losses(parts, kind) == pytest.approx(losses(expected, kind), rel=1e-9)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-9, atol=1e-9 * tensor.abs().max().item())


@torch.no_grad()
def plain_loss(model: GPT, batch: Batch, step: int, counted: int) -> float:
    """Mean cross-entropy of the next token over the first so many tokens, row by row at its true length, with whole
    masks and all logits at once."""
    config, sums, length = model.config, [], batch.inputs.shape[1]
    windows, (height, extent, shift) = train_gpt2.windows_at(step, config), config.softcap
    model.enter_stage(train_gpt2.stage_of(step, config))
    for row in range(-(-counted // length)):
        inputs, targets, starts = (part[row:row + 1, :counted - row * length] for part in batch[:3])
        masks = {}
        for short, paired in itertools.product((False, True), (False, True)):
            begins = torch.stack((starts, torch.zeros_like(starts)), -1).flatten(1) if paired else starts
            everything = slice(0, begins.shape[1])
            masks[short, paired] = [Span(everything, everything, dense_mask(begins, windows[short])[:, None])]
        logits = (model(inputs, starts, masks)[0] @ model.head.T).double()
        logits = height * torch.tanh((logits + shift) / extent)
        sums.append(F.cross_entropy(logits, targets[0], reduction="sum").item())
    return math.fsum(sums) / counted


@pytest.mark.parametrize("base, dtype, tolerance", [(SMALL, torch.float32, 1e-6), (SMALL, torch.float64, 1e-10),
                                                    (RECIPE, torch.float64, 1e-10)])
def test_validation_is_the_mean_over_all_tokens_whatever_the_micro_size(corpus, base, dtype, tolerance):
    model, _ = trained(corpus, dtype, base=base)
    config, stream = model.config, TokenStream(model.config.val_files)
    places = [(700, 3), (1500, config.steps)]
    if base is SMALL:
        places = [(counted, 3) for counted in (1, 127, 128, 1000, 2699)]
    for counted, step in places:
        batch = train_gpt2.read_rows(stream, 0, -(-counted // config.val_row_tokens), config.val_row_tokens, counted)
        expected = plain_loss(model, batch, step, counted)
        for micro_rows in (1, 3, 5, 30):
            model.config = dataclasses.replace(config, micro_tokens=micro_rows * config.val_row_tokens)
            loss = train_gpt2.validate(model, stream, counted, step, ALONE)
            assert loss == pytest.approx(expected, rel=tolerance), (counted, step, micro_rows)


@pytest.mark.parametrize("base, step", [(SMALL, 3), (RECIPE, 3), (RECIPE, 7)], ids=short)
@pytest.mark.parametrize("micro_tokens", [1, 600])
def test_the_loss_of_a_step_is_the_mean_over_its_tokens_before_the_update(corpus, base, step, micro_tokens):
    """Of the next token alone, also where later ones are predicted beside it."""
    model, groups = trained(corpus, steps=2, base=base, micro_tokens=micro_tokens)
    batch = batches(model.config, step + 1)[step]
    expected = plain_loss(model, batch, step, batch.inputs.numel())
    (loss, signal_number), = train_gpt2.train_step(model, groups, batch, step).tolist()
    assert signal_number == 0
    assert loss == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["float32", "odd", pytest.param("float64", marks=pytest.mark.slow)])
def test_with_every_switch_neutral_the_losses_are_those_of_the_five_minute_recipe(name):
    """Stored from the code that knew no other recipe. Its window counted the query itself."""
    changes, expected = STORED[name]["changes"], STORED[name]["losses"]
    sizes = {size: (changes[size],) for size in ("tokens_per_step", "row_tokens")}
    found = check.measure(Config(**{**PRESETS["five-minute"], **changes, **sizes, "window": (changes["window"] - 1,),
                                    "val_row_tokens": changes["row_tokens"]}))
    assert found == pytest.approx(expected, rel=0, abs=1e-9 if changes["dtype"] == "float64" else 1e-5)


def test_a_window_beyond_the_row_is_the_whole_row():
    starts = torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) < 0.01
    expected = first_visible_key(starts, 256)
    for window in (257, 2**31, 2**32 + 3, 2**40):
        assert torch.equal(first_visible_key(starts, window), expected), window


# ----------------------------------------------------------------------------------------------------------------------
# Runs that go wrong


def failed_run(corpus, tmp_path, **changes) -> tuple[str, object]:
    """What a run says that stops half way, and its folder, which must hold no model."""
    with pytest.raises(Refusal) as caught:
        train_gpt2.main(command(corpus, out=tmp_path / "logs", **changes))
    folder, = run_folders(tmp_path / "logs")
    assert {path.name for path in folder.iterdir()} == {"log.txt", "metrics.jsonl"}
    assert "\n" not in caught.value.code
    return caught.value.code, folder


@pytest.mark.parametrize("bad", [0, 3, 7])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_by_the_next_step(corpus, tmp_path, monkeypatch, bad, value):
    train_step, done = train_gpt2.train_step, []

    def spoilt_step(model, groups, batch, step, signal_number):
        done.append(step)
        result = train_step(model, groups, batch, step, signal_number)
        return result * value if step == bad else result

    monkeypatch.setattr(train_gpt2, "train_step", spoilt_step)
    line, folder = failed_run(corpus, tmp_path, val_every=0)
    assert f"training loss of step {bad + 1} is not finite in process 0" in line
    assert done[-1] <= bad + 1
    assert [record["step"] for record in metrics(folder) if "train_loss" in record] == list(range(1, bad + 1))


def test_the_processes_with_the_bad_loss_are_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "train_step", lambda *_: torch.tensor(
        [[1.0, 0], [math.nan, 0], [1.0, 0], [math.inf, 0]]))
    monkeypatch.setattr(train_gpt2.Processes, "told", lambda _, value: value)
    monkeypatch.setattr(train_gpt2.Processes, "gathered", lambda _, value: [value] if isinstance(value, dict) else
                        ["", "first bad tensor: x", "", ""])
    line = failed_run(corpus, tmp_path)[0]
    assert "in process 1, 3," in line and "first bad tensor: x" in line


def test_huge_learning_rates_stop_the_run(corpus, tmp_path):
    line, folder = failed_run(corpus, tmp_path, muon_lr=1e38, adam_embedding="1e38,0.9,0.95,0", val_every=0, steps=20)
    assert "not finite" in line and "--muon-lr" in line
    assert all(math.isfinite(loss) for loss in losses(folder))


def test_a_validation_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "validate", lambda model, stream, tokens, step, processes:
                        math.nan if step == 8 else 1.0)
    assert "after 8 steps the validation loss is nan" in failed_run(corpus, tmp_path)[0]


def test_a_shard_cut_during_the_run_ends_it(corpus, tmp_path, monkeypatch):
    read, calls = train_gpt2.read_tokens, []

    def vanishing(shard, start, count):
        calls.append(shard)
        if len(calls) > 12:
            raise Refusal(f"shard {shard.path} is gone")
        return read(shard, start, count)

    monkeypatch.setattr(train_gpt2, "read_tokens", vanishing)
    assert "is gone" in failed_run(corpus, tmp_path)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up


WARMED = [(SMALL, torch.float64), (ODD_STEPS, torch.float32), (ODD_STEPS, torch.bfloat16)]


def warm_up(model, groups, check=lambda step: None) -> float:
    """As before a compiled run, with batches of the right size for each step."""
    config = model.config
    each = batches(config, config.steps)
    try:
        return train_gpt2.warm_up(model, groups, ALONE, lambda step: each[step], check)
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("base, dtype", WARMED, ids=short)
def test_warming_up_leaves_every_number_as_it_was(corpus, base, dtype):
    """Weights, their low bits, gradients, moments, rotary tables and softmax scale, and the tie."""
    model, groups = trained(corpus, dtype, steps=2, base=base)
    model.enter_stage(0)
    config, tied = model.config, model.tied
    lists = [[tensor for group in groups.values() for tensor in (group.weights, *group.state)],
             [group.gradients for group in groups.values()], list(model.buffers())]
    numbers = sum(lists, [])
    assert any(tensor.dtype == torch.int16 for tensor in numbers) == (dtype == torch.bfloat16)
    before, checked, visited, changed = [tensor.clone() for tensor in numbers], [], set(), set()

    def check(step):
        checked.append(step)
        visited.add((model.stage, model.tied))
        changed.update(i for i, old in enumerate(before) if not torch.equal(numbers[i], old))

    assert warm_up(model, groups, check) > 0
    assert checked[-1] == config.steps and set(checked) >= {0, *train_gpt2.stage_borders(config)[:2]}
    if base is ODD_STEPS:
        assert tied and {stage for stage, _ in visited} == {0, 1, 2, 3} and {tie for _, tie in visited} == {True, False}
    in_use = {i for i, old in enumerate(before[:len(lists[0])]) if old.any()}
    assert changed >= in_use and len(in_use) > len(groups)  # what is put back had become something else
    assert (model.tied, model.stage) == (tied, 0)
    assert all(torch.equal(tensor, old) for tensor, old in zip(numbers, before, strict=True))


@pytest.mark.parametrize("base, dtype", [WARMED[0], WARMED[2]], ids=short)
def test_a_warmed_up_run_is_the_same_run(corpus, base, dtype):
    results = []
    for warm in (False, True):
        model, groups = trained(corpus, dtype, steps=0, base=base)
        if warm:
            warm_up(model, groups)
        step_losses = [train_gpt2.train_step(model, groups, batch, step)
                       for step, batch in enumerate(batches(model.config, model.config.steps))]
        results.append([*step_losses, *(parameter.detach() for parameter in model.parameters())])
    assert all(torch.equal(cold, warm) for cold, warm in zip(*results, strict=True))


# ---- interruptions ---------------------------------------------------------------------------------------------------


def test_a_run_whose_reader_leaves_goes_on(corpus, tmp_path):
    """As behind `| head -1`: the pipe is closed after the first line."""
    arguments = [sys.executable, ROOT / "train_gpt2.py", *command(corpus, out=tmp_path, steps=20)]
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 0
    folder, = run_folders(tmp_path)
    assert (folder / "model.pt").exists() and "final val_loss" in (folder / "log.txt").read_text(encoding="utf-8")


def test_control_c_is_one_line(corpus, tmp_path):
    arguments = [sys.executable, ROOT / "train_gpt2.py", *command(corpus, out=tmp_path, steps=100_000, repeat=True)]
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "step:1/" not in run.stdout.readline():
        pass
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert len(errors.splitlines()) == 1 and errors.startswith("SIGINT: ")
    folder, = run_folders(tmp_path)
    checkpoint, = folder.glob("*.pt")
    assert "stopped by SIGINT" in output.splitlines()[-1] and f"--resume {checkpoint}" in output.splitlines()[-1]
