"""Whole runs on one process: what is learned, what is written, and that the same numbers come out however it is cut."""

import dataclasses
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
    ROOT,
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
from train_gpt2 import GPT, Batch, Processes, Refusal, Span, TokenStream, first_visible_key

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=(9000, 4000, 8000, 12_000))


@pytest.fixture(scope="module")
def run(corpus):
    return run_here(corpus, steps=30, val_every=8)


def trained(corpus, dtype=torch.float64, steps: int = 3, **changes):
    """A model after a few steps, and its groups: not the symmetric beginning, where most gradients are zero."""
    config = configuration(corpus, dtype=str(dtype)[6:], **changes)
    model = GPT(config, 257, dtype)
    groups = train_gpt2.optimizer_groups(model, config, dtype, ALONE)
    for step in range(steps):
        train_gpt2.train_step(model, groups, rows(config, step), 2, step)
    return model, groups


def rows(config, step: int) -> Batch:
    """All rows of a step."""
    position, count = step * config.tokens_per_step, config.tokens_per_step // config.row_tokens
    return train_gpt2.read_rows(TokenStream(config.train_files), position, count, config.row_tokens,
                                position + config.tokens_per_step)


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


def test_the_checkpoint_is_plain_and_gives_the_same_validation_loss(run, corpus):
    saved = torch.load(run / "model.pt", weights_only=True)
    config = configuration(corpus, steps=30, val_every=8)
    assert saved["config"] == dataclasses.asdict(config)
    assert (saved["vocabulary"], saved["separator"], saved["dtype"], saved["step"]) == (257, 256, "float32", 30)
    assert saved["val_loss"] == losses(run, "val_loss")[-1]
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
               for tensor in saved["weights"].values())  # not one more copy of the group that a parameter is a view of
    model, values = train_gpt2.load_model(run / "model.pt")
    assert {name: value for name, value in values.items() if name != "weights"} == {
        name: value for name, value in saved.items() if name != "weights"}
    loss = train_gpt2.validate(model, TokenStream(config.val_files), 2000, 8, 30, ALONE)
    assert loss == saved["val_loss"]


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


@pytest.mark.parametrize("micro", [128, 256, 512])
@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_do_not_change_the_result(corpus, micro, recompute):
    changes = dict(steps=5, dtype="float64", loss_chunk=96)
    whole = run_here(corpus, micro_tokens=1024, **changes)
    parts = run_here(corpus, micro_tokens=micro, recompute=recompute, **changes)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-9)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-9, atol=1e-9 * tensor.abs().max().item())


@torch.no_grad()
def plain_loss(model: GPT, stream: TokenStream, position: int, counted: int) -> float:
    """Mean cross-entropy, row by row at its true length, with the whole mask and all logits at once."""
    config, sums = model.config, []
    tokens, starts = stream.read(position, counted + 1)
    tokens, starts = torch.from_numpy(tokens.astype("int64")), torch.from_numpy(starts)
    for begin in range(0, counted, config.row_tokens):
        row = slice(begin, min(counted, begin + config.row_tokens))
        everything = slice(0, row.stop - row.start)
        span = Span(everything, everything, dense_mask(starts[None, row], config.window)[:, None])
        logits = (model(tokens[None, row], [span])[0] @ model.head.T).double()
        logits = config.softcap * torch.tanh(logits / config.softcap)
        sums.append(F.cross_entropy(logits, tokens[row.start + 1:row.stop + 1], reduction="sum").item())
    return math.fsum(sums) / counted


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("counted", [1, 127, 128, 1000, 2699])
def test_validation_is_the_mean_over_all_tokens_whatever_the_micro_size(corpus, dtype, tolerance, counted):
    model, _ = trained(corpus, dtype)
    stream = TokenStream(model.config.val_files)
    expected = plain_loss(model, stream, 0, counted)
    for micro_rows in (1, 2, 3, 5, 8, 30):
        loss = train_gpt2.validate(model, stream, counted, micro_rows, 3, ALONE)
        assert loss == pytest.approx(expected, rel=tolerance), micro_rows


@pytest.mark.parametrize("micro_rows", [1, 4, 8])
def test_the_loss_of_a_step_is_the_mean_over_its_tokens_before_the_update(corpus, micro_rows):
    model, groups = trained(corpus)
    batch, stream = rows(model.config, 3), TokenStream(model.config.train_files)
    expected = plain_loss(model, stream, 3 * 1024, 1024)
    loss, = train_gpt2.train_step(model, groups, batch, micro_rows, 3)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


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

    def spoilt_step(model, groups, batch, micro_rows, step):
        done.append(step)
        result = train_step(model, groups, batch, micro_rows, step)
        return result * value if step == bad else result

    monkeypatch.setattr(train_gpt2, "train_step", spoilt_step)
    line, folder = failed_run(corpus, tmp_path, val_every=0)
    assert f"training loss of step {bad + 1} is not finite in process 0" in line
    assert done[-1] <= bad + 1
    assert [record["step"] for record in metrics(folder) if "train_loss" in record] == list(range(1, bad + 1))


def test_the_processes_with_the_bad_loss_are_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "train_step", lambda *_: torch.tensor([1.0, math.nan, 1.0, math.inf]))
    assert "in process 1, 3;" in failed_run(corpus, tmp_path)[0]


def test_huge_learning_rates_stop_the_run(corpus, tmp_path):
    line, folder = failed_run(corpus, tmp_path, muon_lr=1e38, embed_lr=1e38, val_every=0, steps=20)
    assert "not finite" in line and "--muon-lr" in line
    assert all(math.isfinite(loss) for loss in losses(folder))


def test_a_validation_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "validate", lambda model, stream, tokens, micro_rows, step, processes:
                        math.nan if step == 8 else 1.0)
    assert "validation loss after 8 steps is not finite" in failed_run(corpus, tmp_path)[0]


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


def test_warming_up_leaves_every_number_as_it_was(corpus):
    model, groups = trained(corpus)
    numbers = [tensor for group in groups for tensor in (group.weights, group.gradients, *group.state)]
    assert all(tensor.abs().sum() > 0 for group in groups for tensor in group.state)
    before, checked, changed = [tensor.clone() for tensor in numbers], [], []

    def check(step):
        checked.append(step)
        changed.append([not torch.equal(tensor, old) for tensor, old in zip(numbers, before, strict=True)])

    try:
        seconds = train_gpt2.warm_up(model, groups, rows(model.config, 3), check, 2, ALONE)
    finally:
        torch.compiler.set_stance("default")
    assert seconds > 0 and checked == [0, 1]
    assert sum(changed[1]) == sum(1 + len(group.state) for group in groups)  # all but the gradients, zero again
    assert all(torch.equal(tensor, old) for tensor, old in zip(numbers, before, strict=True))


def test_a_warmed_up_run_is_the_same_run(corpus):
    config = configuration(corpus)
    results = []
    for warm in (False, True):
        model, groups = trained(corpus, steps=0)
        if warm:
            try:
                train_gpt2.warm_up(model, groups, rows(config, 0), lambda _: None, 4, ALONE)
            finally:
                torch.compiler.set_stance("default")
        step_losses = [train_gpt2.train_step(model, groups, rows(config, step), 4, step) for step in range(4)]
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
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert errors == "interrupted: losses so far are in the run folder; no model was written\n"
    folder, = run_folders(tmp_path)
    assert not list(folder.glob("model*"))
