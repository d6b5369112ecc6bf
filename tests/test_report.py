"""Reading logs of runs, ours and those of the public speedrun; is it a record, which of two sets is better, is a run
where its recipe goes, and the picture."""

import csv
import hashlib
import json
import math
import statistics
import struct
import sys

import numpy as np
import pytest
from scipy import stats
from tools import ROOT, metrics, run_here, start, write_corpus

sys.path.insert(0, str(ROOT / "records"))
import report

import train_gpt2

HUNDRED = ROOT / "records" / "2026-11-24_hundred-second_tiny_2-core_cpu"
FIVE = ROOT / "records" / "2026-11-24_tiny_shakespeare_2-core_cpu"
RULE = "=" * 100
SMI = "\n".join(["| GPU  Name                 Persistence-M | Bus-Id          Disp.A |", f"|{'=' * 41}+{'=' * 24}|",
                 *(f"|   {card}  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |" for card in range(8))])


def say(capsys, *arguments) -> tuple[int, str, str]:
    """(status, output, error output) of the command."""
    status = report.main([str(word) for word in arguments])
    return status, *capsys.readouterr()


def refused(capsys, *arguments) -> str:
    """The one line with which the command refuses."""
    status, out, error = say(capsys, *arguments)
    assert status == 2 and out == "" and error.count("\n") == 1 and len(error) < 400
    return error


def write_run(folder, losses: dict[int, float], planned: int = 0, seed: int = 0, script: str = "x = 1\n",
              pace: float = 0.1, exact: bool = True, shards: str = '{"train": 0}',
              **settings):
    """A run folder as train_gpt2.py leaves it, with these validations. Returns it."""
    folder.mkdir(parents=True)
    planned = planned or max(losses)
    config = {"preset": "gpt2", "train_files": "fineweb_train_*.bin", "val_files": "fineweb_val_*.bin",
              "val_tokens": 10_485_760, "tokens_per_step": [1024], "seed": seed, "out": str(folder), **settings}
    lines = ["python 3.11.7, torch 2.13.0+cpu, CUDA None, Linux x86_64, 1 process(es)",
             "CPU, 2 threads per process, 2 cores, with avx512_bf16", json.dumps(config), f"shards {shards}"]
    lines += [f"step:{step}/{planned} val_loss:{loss:.4f} train_time:{1000 * pace * step:.0f}ms "
              f"step_avg:{1000 * pace:.2f}ms" for step, loss in losses.items()]
    (folder / "log.txt").write_text("\n".join([f"{script}\n{RULE}", *lines]) + "\n")
    if exact:
        records = [{"step": step, "tokens": 1024 * step, "val_loss": loss, "train_time_s": pace * step}
                   for step, loss in losses.items()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_set(folder, finals, first_seed: int = 1, **options):
    """Runs that end with these losses. Returns the folder of them all."""
    for place, final in enumerate(finals):
        write_run(folder / f"run{place}", {0: 10.8, 50: final + 1 + 1e-3 * place, 100: final},
                  **{**options, "seed": first_seed + place})
    return folder


def write_public(path, losses: dict[int, float], planned: int = 0, kind: str = "val", above: bool = False):
    """A log as the public speedrun's scripts write it. above: with a line of '=' before the source, as in 2024."""
    planned = planned or max(losses)
    steps = [f"step:{step}/{planned} {kind}_loss:{loss:.4f} train_time:{100 * step}ms "
             f"step_avg:{'nan' if step < 11 else f'{100 * step / (step - 10):.2f}'}ms" for step, loss in losses.items()]
    head = [RULE] * above + ["import torch\nprint(f'step:{step}/{n} val_loss:{loss:.4f}')  # torch 1.0\n", RULE]
    machine = ["Running Python 3.12", "Running PyTorch 2.6.0.dev20241119+cu124 compiled for CUDA 12.4", SMI, RULE]
    path.write_text("\n".join([*head, *machine, f"step:1/{planned} train_time:90ms step_avg:nanms", *steps,
                               "peak memory allocated: 30 MiB", ""]))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Reading.


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    return run_here(write_corpus(tmp_path_factory.mktemp("corpus")), seed=3)


def test_a_run_made_now_is_read_in_full(real_run):
    run, = report.read_runs([str(real_run)])
    records = metrics(real_run)
    assert run.script == hashlib.sha256((ROOT / "train_gpt2.py").read_bytes()).hexdigest()[:12] and not run.changed
    assert (run.steps, run.planned, run.seed, run.finished) == (8, 8, 3, True)
    assert [point.loss for point in run.val] == [record["val_loss"] for record in records if "val_loss" in record]
    assert [point.loss for point in run.train] == [record["train_loss"] for record in records if "train_loss" in record]
    assert run.val[-1].tokens == 8 * 1024 and run.seconds == records[-1]["train_time_s"]
    assert run.average == pytest.approx(1000 * run.seconds / 8)
    assert run.hardware.startswith("CPU, ") and run.torch == train_gpt2.torch.__version__


def test_metrics_give_the_exact_losses_and_a_contradiction_is_refused(capsys, tmp_path):
    folder = write_run(tmp_path / "run", {10: 3.123456, 20: 3.0})
    assert report.read_runs([str(folder)])[0].val[0].loss == 3.123456
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "tok')  # as a crash leaves it
    assert report.read_runs([str(folder)])[0].val[1].loss == 3.0
    (folder / "metrics.jsonl").write_text('{"step": 20, "tokens": 1, "val_loss": 2.9, "train_time_s": 2.0}\n')
    assert "two val_loss for step 20" in refused(capsys, "show", folder)


@pytest.mark.parametrize("above", [False, True])
def test_public_logs_are_read(tmp_path, above):
    path = write_public(tmp_path / "a.txt", {0: 10.8, 250: 4.0, 500: 3.3}, above=above)
    run, = report.read_runs([str(path)])
    source = path.read_text().split(RULE)[above].removeprefix("\n" * above)
    assert run.script == hashlib.sha256(source.removesuffix("\n").encode()).hexdigest()[:12]
    assert [(point.step, point.loss) for point in run.val] == [(0, 10.8), (250, 4.0), (500, 3.3)]
    assert run.hardware == "8 x NVIDIA H100 80GB HBM3" and run.torch == "2.6.0.dev20241119+cu124"
    assert run.seed is None and run.val[1].tokens is None and run.seconds == 50 and run.finished
    assert run.average == pytest.approx(50_000 / 490, abs=0.01), "its own way of counting: the first ten are free"
    staged, = report.read_runs([str(path)], (10, 20, 30))
    shape = train_gpt2.Config(steps=500, tokens_per_step=(10, 20, 30))
    assert [point.tokens for point in staged.val] == [train_gpt2.tokens_until(step, shape) for step in (0, 250, 500)]


def test_a_log_with_training_losses_only(tmp_path, capsys):
    path = write_public(tmp_path / "a.txt", {step: 5 - step / 100 for step in range(1, 101)}, kind="train")
    run, = report.read_runs([str(path)])
    assert not run.val and len(run.train) == 100 and run.points[-1].loss == 4 and run.finished
    assert "4.0000 (train, step 100)" in say(capsys, "show", path)[1]
    assert "no val_loss" in refused(capsys, "verify", path)


def test_a_resumed_run_counts_the_steps_after_its_checkpoint(tmp_path):
    folder = write_run(tmp_path / "run", {10: 5.0, 20: 4.0, 30: 3.9}, planned=40, exact=False)
    with open(folder / "log.txt", "a") as file:
        file.write("resumed after step 10 from here\n"
                   "step:20/40 val_loss:4.5000 train_time:2100ms step_avg:105.00ms\n")
    run, = report.read_runs([str(folder)])
    assert [(point.step, point.loss) for point in run.val] == [(10, 5.0), (20, 4.5)] and run.steps == 20
    assert run.seconds == 2.1 and not run.finished and not run.changed
    with open(folder / "log.txt", "a") as file:
        file.write(f"y = 2\n\n{RULE}\nresumed after step 20 from here\n"
                   "step:40/40 val_loss:4.0000 train_time:4100ms step_avg:102.50ms\n")
    run, = report.read_runs([str(folder)])
    assert run.changed and run.finished


def test_runs_are_found_by_folder_pattern_and_list_once_each(tmp_path):
    write_set(tmp_path / "a", [3.2, 3.3])
    write_set(tmp_path / "b", [3.2], first_seed=7)
    (tmp_path / "a" / "notes.txt").write_text("no run")
    words = [str(tmp_path / "a"), f"{tmp_path}/*/run0", f"{tmp_path}/a/run1,{tmp_path}/b/run0/log.txt"]
    runs = report.read_runs(words)
    assert [run.name for run in runs] == ["a/run0", "run1", "b/run0"] and [run.seed for run in runs] == [1, 2, 7]


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "picture.txt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "empty").mkdir()
    assert "nothing is at" in refused(capsys, "show", tmp_path / "absent")
    for name in ("notes.txt", "picture.txt", "empty"):
        assert "holds no log of a run" in refused(capsys, "show", tmp_path / name)
    assert "no run is named" in refused(capsys, "show", ",")
    assert "required" in refused(capsys)
    assert "invalid choice" in refused(capsys, "shwo", tmp_path)
    assert "--frob" in refused(capsys, "show", tmp_path, "--frob")
    assert "unrecognized" in refused(capsys, "compare", "a", "b", "c")
    for wrong in (["--target", "nan"], ["--target", "-1"], ["--planned", "0"], ["--alpha", "0.7"], ["--spread", "x"]):
        assert f"argument {wrong[0]}" in refused(capsys, "verify", HUNDRED, *wrong)


def test_status_and_stream_of_the_command_itself(tmp_path):
    done = start([ROOT / "records" / "report.py", "show", tmp_path])
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["show", "verify", "compare", "plot", "band"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        report.main([command, "--help"])
    assert end.value.code == 0 and f"report.py {command}" in capsys.readouterr().out


def test_show_has_a_line_for_each_run_and_the_settings_that_differ(tmp_path, capsys):
    write_run(tmp_path / "a", {10: 4.0, 20: 3.0}, seed=1, muon_lr=0.02, val_row_tokens=[64])
    write_run(tmp_path / "b", {10: 4.0}, planned=20, seed=2, muon_lr=0.03, val_row_tokens=64, script="x = 2\n")
    status, out, _ = say(capsys, "show", tmp_path)
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in out.splitlines() if line.startswith("|")}
    digest = [hashlib.sha256(text).hexdigest()[:12] for text in (b"x = 1\n", b"x = 2\n")]
    machine = ["CPU, 2 threads per process, 2 cores, with avx512_bf16", "2.13.0+cpu"]
    assert status == 0
    assert lines["a"] == ["1", "20", "20,480", "2.00", "100.00", "3.0000", *machine, digest[0]]
    assert lines["b"] == ["2", "10/20", "10,240", "1.00", "100.00", "4.0000 (val, step 10)", *machine, digest[1]]
    assert lines["muon_lr"] == ["0.02", "0.03"]
    assert not {"seed", "out", "val_row_tokens"} & set(lines), "of no matter, or the same in another form"


# ----------------------------------------------------------------------------------------------------------------------
# Is it a record?

GOOD = [3.2775, 3.2781, 3.2768, 3.2790, 3.2779, 3.2772, 3.2785, 3.2776]


def test_the_two_tests_are_the_textbook_ones():
    found = report.judge(GOOD, 3.28, 0.0013)
    assert found.by_t == pytest.approx(stats.ttest_1samp(GOOD, 3.28, alternative="less").pvalue)
    assert found.by_known == pytest.approx(stats.norm.cdf((np.mean(GOOD) - 3.28) / 0.0013 * 8**0.5))
    assert math.isnan(report.judge([3.2], 3.28, 0.0013).by_t)
    assert report.judge([3.29] * 3, 3.28, 0.0013).by_t == 1 and report.judge([3.27] * 3, 3.28, 0.0013).by_t == 0
    assert [report.runs_needed(margin, known, 0.01) for known in (0.0014, 0.002)
            for margin in (0.0015, 0.001, 0.0005)] == [5, 11, 43, 10, 22, 87]


def test_a_clean_set_is_a_record(tmp_path, capsys):
    status, out, _ = say(capsys, "verify", "--planned", 8, write_set(tmp_path / "set", GOOD))
    assert status == 0 and "warning" not in out and "yes: " in out
    assert f"mean     {statistics.fmean(GOOD):.5f}" in out and f"spread   {statistics.stdev(GOOD):.5f}" in out


def test_the_mean_must_be_below_the_target(tmp_path, capsys):
    status, out, _ = say(capsys, "verify", "--planned", 8, "--target", 3.27, write_set(tmp_path / "set", GOOD))
    assert status == 1 and "no: the mean is not below the target" in out


def test_a_lucky_small_spread_is_named(tmp_path, capsys):
    folder = write_set(tmp_path / "set", [3.2792, 3.2793, 3.2791, 3.2792])
    status, out, _ = say(capsys, "verify", "--planned", 4, folder)
    assert status == 1 and "the tests disagree: these 4 runs lie closer together" in out
    assert "at this margin 15 runs would pass" in out
    status, out, _ = say(capsys, "verify", "--planned", 4, "--spread", 0.0003, folder)
    assert status == 0 and "warning" not in out


def test_a_spread_that_was_taken_too_small_is_named(tmp_path, capsys):
    folder = write_set(tmp_path / "set", [3.270, 3.279, 3.274, 3.283])
    status, out, _ = say(capsys, "verify", "--planned", 4, folder)
    assert status == 1 and "the t-test knows only these 4 runs" in out and "take a larger --spread" in out


@pytest.mark.parametrize("change, said", [
    ({}, "planned and 8 are here"), ({"seed": 1}, "seed 1 repeats"), ({"script": "x = 2\n"}, "the scripts differ"),
    ({"shards": '{"train": 1}'}, "the data differ: shards of the same names with other tokens"),
    ({"val_tokens": 1000}, "the first 10,485,760 validation tokens of FineWeb"),
    ({"train_files": "other_*.bin"}, "the data differ: train_files"), ({"muon_lr": 1}, "settings differ: muon_lr"),
    ({"planned": 120}, "stopped early, at step 100 of 120"), ({"copy": True}, "one run counted twice"),
    ({"final": math.nan}, "without a finite loss")])
def test_what_breaks_a_rule_makes_the_answer_no(tmp_path, capsys, change, said):
    folder = write_set(tmp_path / "set", GOOD[:7])
    final, planned = change.pop("final", GOOD[7]), 8 if change or said.startswith("without") else 7
    losses = {0: 10.8, 50: 4.5, 100: final}
    if change.pop("copy", False):
        losses = {0: 10.8, 50: GOOD[0] + 1, 100: GOOD[0]}
    write_run(folder / "last", losses, **{"seed": 99, **change})
    status, out, _ = say(capsys, "verify", "--planned", planned, folder)
    assert status == 1 and said in out and out.splitlines()[-1].startswith("no: ")


def test_what_cannot_be_checked_is_said(tmp_path, capsys):
    status, out, _ = say(capsys, "verify", write_set(tmp_path / "set", GOOD))
    assert status == 0 and "the number of runs fixed beforehand is not stated" in out
    for place, final in enumerate(GOOD):
        write_public(tmp_path / f"{place}.txt", {50: 4 + place / 100, 100: final})
    status, out, _ = say(capsys, "verify", "--planned", 8, f"{tmp_path}/*.txt")
    assert status == 0 and "8 of 8 logs state no seed" in out and "as far as the warnings allow" in out


def test_one_run_and_no_finished_run(tmp_path, capsys):
    status, out, _ = say(capsys, "verify", "--planned", 1, write_run(tmp_path / "a", {100: 3.1}))
    assert status == 1 and "one run shows no spread" in out
    assert "has ended" in refused(capsys, "verify", write_run(tmp_path / "b", {50: 3.1}, planned=100))


# ----------------------------------------------------------------------------------------------------------------------
# Comparison.


def rows(out: str) -> dict[str, list[str]]:
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in out.splitlines() if line.startswith("|")}


def test_differences_and_intervals_are_the_textbook_ones():
    a, b = [3.30, 3.29, 3.31, 3.27], [3.28, 3.275, 3.30, 3.255]
    paired = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert report.difference(a, b, True)[1:] == pytest.approx((paired.low, paired.high))
    welch = stats.ttest_ind(b[:3], a, equal_var=False).confidence_interval(0.95)
    assert report.difference(a, b[:3], False)[1:] == pytest.approx((welch.low, welch.high))
    assert math.isnan(report.difference(a, b[:1], False).low)
    assert report.Difference(0.1, -0.1, 0.3).verdict() == "inside the noise"
    assert report.Difference(-0.2, -0.3, -0.1).verdict() == "B is lower"
    assert report.Difference(0.2, 0.1, 0.3).verdict() == "B is higher"


def test_runs_of_the_same_seeds_are_compared_in_pairs(tmp_path, capsys):
    base = [3.30, 3.29, 3.31]
    a = write_set(tmp_path / "a", base)
    b = write_set(tmp_path / "b", [loss - gain for loss, gain in zip(base, (0.0010, 0.0012, 0.0011), strict=True)],
                  pace=0.09)
    status, out, _ = say(capsys, "compare", a, b)
    found = rows(out)
    assert status == 0 and "paired by seed: 1, 2, 3" in out and "warning" not in out
    assert found["loss at 102,400 tokens"] == ["3.3000", "3.2989", "-0.0011", "-0.0013 to -0.0009", "B is lower"]
    assert found["milliseconds per step"][2] == "-10.000" and found["milliseconds per step"][4] == "B is lower"
    c = write_set(tmp_path / "c", [3.2989, 3.2878, 3.3089], first_seed=11)
    status, out, _ = say(capsys, "compare", a, c)
    assert "Welch's interval" in out and rows(out)["loss at 102,400 tokens"][4] == "inside the noise"


def test_seeds_are_matched_and_not_places(tmp_path, capsys):
    for name, seeds in (("a", (1, 2, 3)), ("b", (3, 1, 2))):
        for place, seed in enumerate(seeds):
            write_run(tmp_path / name / f"run{place}", {50: 4.0, 100: 3.3 + seed / 100}, seed=seed)
    found = rows(say(capsys, "compare", tmp_path / "a", tmp_path / "b")[1])
    assert found["loss at 102,400 tokens"][2:] == ["+0.0000", "+0.0000 to +0.0000", "inside the noise"]


def test_the_time_to_a_loss_lies_between_validations(tmp_path, capsys):
    a = write_run(tmp_path / "a", {0: 10.0, 50: 4.0, 100: 3.0}, seed=1)
    b = write_run(tmp_path / "b", {0: 10.0, 50: 3.5, 100: 3.1}, seed=1)
    found = rows(say(capsys, "compare", a, b, "--loss", 3.25)[1])
    assert found["seconds to a loss of 3.2500"] == ["8.750", "8.125", "-0.625", "", "one run: no interval"]
    assert rows(say(capsys, "compare", a, b)[1])["seconds to a loss of 3.1000"][:2] == ["9.500", "10.000"]
    assert rows(say(capsys, "compare", a, b, "--loss", 3.05)[1])["seconds to a loss of 3.0500"] == [
        "1 of 1", "0 of 1", "", "", "not reached by all"]
    points = report.read_runs([str(a)])[0].val
    assert report.seconds_to(points, 10.0) == 0 and math.isnan(report.seconds_to(points, 2.9))


def test_losses_are_compared_at_equal_tokens_and_not_at_equal_steps(tmp_path, capsys):
    a = write_run(tmp_path / "a", {0: 10.0, 50: 4.0, 100: 3.0}, exact=False)
    b = write_run(tmp_path / "b", {0: 10.0, 25: 3.9, 50: 3.1}, exact=False, tokens_per_step=[2048])
    out = say(capsys, "compare", a, b)[1]
    assert rows(out)["loss at 51,200 tokens"][:3] == ["4.0000", "3.9000", "-0.1000"]
    assert rows(out)["loss at 102,400 tokens"][:2] == ["3.0000", "3.1000"] and "differ in length" in out
    odd = write_run(tmp_path / "odd", {0: 10.0, 40: 4.4, 80: 3.4}, exact=False)
    assert rows(say(capsys, "compare", a, odd)[1])["loss at 81,920 tokens"][:2] == ["3.4000", "3.4000"]


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    good = write_run(tmp_path / "a", {50: 4.0, 100: 3.0})
    assert "not finite" in refused(capsys, "compare", good, write_run(tmp_path / "b", {100: math.nan}, exact=False))
    train = write_public(tmp_path / "t.txt", {100: 3.0}, kind="train")
    assert "no val_loss and others have" in refused(capsys, "compare", good, train)


# ----------------------------------------------------------------------------------------------------------------------
# Reference data, band, picture.


def test_the_reference_data_are_whole():
    with open(ROOT / "records" / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    assert [row["record"] for row in history if row["record"].isdecimal()] == [str(n) for n in range(12, 90)]
    assert [row["date"] for row in history] == sorted(row["date"] for row in history)
    seconds = {row["record"]: float(row["seconds"]) for row in history}
    assert (seconds["12"], seconds["62"], seconds["89"]) == (301.8, 99.3, 73.8)
    assert all(later <= before for before, later in zip(list(seconds.values())[3 + 9:], list(seconds.values())[4 + 9:],
                                                        strict=False))
    assert all(10 < len(row["technique"]) < 100 or row["record"] == "66" for row in history)
    curves = report.reference_curves()
    assert list(curves) == [12, 21, 40, 62, 89, "gpt2-medium", "gpt2-xl"]
    ends = {12: (1875, 983_040_000, 301.825, 3.2783), 21: (1770, 695_992_320, 176.003, 3.2808),
            40: (2330, 610_795_520, 140.693, 3.2781), 62: (1600, 424_673_280, 98.031, 3.2770),
            89: (1390, None, 79.532, 3.2775), "gpt2-medium": (4740, 2_176_974_848, 1041.1, 2.9165),
            "gpt2-xl": (20_344, 9_999_482_880, 34957.6, 2.7297)}
    for record, rows in curves.items():
        assert tuple(rows[-1][name] for name in ("step", "tokens", "seconds", "loss")) == ends[record]
        for name, sign in (("step", 1), ("tokens", 1), ("seconds", 1), ("loss", -1)):
            values = [sign * row[name] for row in rows if row[name] is not None]
            assert values == sorted(set(values)), (record, name)


REFERENCES = pytest.mark.parametrize("preset, record", report.REFERENCE.items())


@REFERENCES
def test_reference_curves_belong_to_the_presets(preset, record):
    config = train_gpt2.Config(**train_gpt2.PRESETS[preset])
    for row in report.reference_curves()[record]:
        assert row["tokens"] == train_gpt2.tokens_until(row["step"], config)
        assert row["step"] % config.val_every == 0 or row["step"] == config.steps


@REFERENCES
def test_a_run_on_its_way_is_inside_the_band_and_a_sick_one_outside(preset, record, tmp_path, capsys):
    curve = {row["step"]: row["loss"] for row in report.reference_curves()[record]}
    config = {"preset": preset, "planned": max(curve), "tokens_per_step": [1]}
    status, out, _ = say(capsys, "band", write_run(tmp_path / "a", curve, **config))
    assert status == 0 and f"{len(curve)} of {len(curve)} validations are inside" in out
    assert (f"record {record}" if preset != record else f"the run of {record}") in out
    early = {step: loss for step, loss in curve.items() if step <= 500}
    beyond = {12: 0.13, 62: 0.075, "gpt2-medium": 0.045, "gpt2-xl": 0.05}
    assert say(capsys, "band", write_run(tmp_path / "b", early, **config))[0] == 0
    for place, step in enumerate(early):
        for sign in (-1, 1):
            sick = {**early, step: early[step] + sign * beyond[record]}
            status, out, _ = say(capsys, "band", write_run(tmp_path / f"c{place}{sign}", sick, **config))
            assert status == 1 and ("above it" if sign > 0 else "below it") in out and "no: " in out


def test_the_band_is_as_wide_as_stated():
    band = report.record_band(62)
    assert band[250] == pytest.approx(((4.573 + 4.606) / 2, 4 * (4.606 - 4.573) / 2.534))
    assert band[1500].half == pytest.approx(4 * (3.309 - 3.305) / 2.534) and band[1600].half < 0.006
    band = report.record_band(12)
    assert [round(band[step].half, 9) for step in (125, 500, 1000, 1875)] == [0.12, 0.06, 0.02, 0.02]


def test_tiny_is_compared_with_the_runs_kept_here_or_with_ones_own(tmp_path, capsys):
    for seed in (10, 11, 12):
        status, out, _ = say(capsys, "band", HUNDRED / f"seed{seed}")
        assert status == 0 and "against 2 runs of" in out and "not the same settings" not in out
    assert "no reference curve at 150 steps" in refused(capsys, "band", FIVE / "seed0")
    assert "expected one length" in refused(capsys, "band", FIVE / "seed0", "--against", HUNDRED)
    own = write_set(tmp_path / "own", [3.30, 3.31, 3.29])
    other = write_run(tmp_path / "other", {0: 10.8, 50: 4.30, 100: 3.305}, seed=9, muon_lr=1)
    status, out, _ = say(capsys, "band", other, "--against", own)
    assert status == 0 and "warning: not the same settings: muon_lr" in out
    other = write_run(tmp_path / "bad", {0: 10.8, 50: 4.30, 100: 3.36}, seed=9)
    assert say(capsys, "band", other, "--against", own)[0] == 1
    assert "has 0 other runs" in refused(capsys, "band", own / "run0", "--against", own / "run0")


def test_band_says_what_it_lacks(tmp_path, capsys):
    public = write_public(tmp_path / "a.txt", {250: 4.59, 1600: 3.278})
    assert "--record 12|21|40|62|89" in refused(capsys, "band", public)
    assert say(capsys, "band", public, "--record", 62)[0] == 0
    assert "expected one of" in refused(capsys, "band", public, "--record", 13)
    assert "schedules stretch" in refused(capsys, "band", public, "--record", 12)
    assert "expected one; the first" in refused(capsys, "band", HUNDRED)
    lonely = write_public(tmp_path / "b.txt", {7: 4.59}, planned=1600)
    assert "no val_loss at a step of the reference" in refused(capsys, "band", lonely, "--record", 62)
    mine = write_run(tmp_path / "mine", {250: 4.59}, planned=1600, train_files="my_*.bin", layers=5)
    out = say(capsys, "band", mine)[1]
    assert "warning: trained on my_*.bin" in out and "not the same settings" in out and "layers" in out
    sick = write_run(tmp_path / "sick", {250: math.nan}, planned=1600, exact=False)
    assert say(capsys, "band", sick)[0] == 1


def overlaps(figure) -> list[str]:
    """Labels that lie on others or over the edge of the picture."""
    from matplotlib.text import Text

    figure.canvas.draw()
    renderer, boxes, found = figure.canvas.get_renderer(), [], []
    for axes in figure.axes:
        texts = [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
        for axis, low, high in ((axes.xaxis, *sorted(axes.get_xlim())), (axes.yaxis, *sorted(axes.get_ylim()))):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes += [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts if text.get_text()]
    for place, (text, box) in enumerate(boxes):
        if box.x0 < 0 or box.x1 > figure.bbox.width or any(box.overlaps(other) for _, other in boxes[:place]):
            found.append(text)
    return found


def test_the_picture_holds_what_it_should(tmp_path, capsys, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    write_set(tmp_path / "set", [3.30, 3.31, 3.29])
    public = write_public(tmp_path / "a.txt", {0: 10.8, 250: 4.59, 1600: 3.278})
    status, out, _ = say(capsys, "plot", tmp_path / "new" / "x.png", tmp_path / "set", "--references", "auto", public)
    assert status == 0 and "4 runs in 2 groups, with reference curves" in out
    data = (tmp_path / "new" / "x.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", data[16:24]) > (1000, 800)
    over_time, over_tokens, history = kept[0].axes
    texts = [text.get_text() for text in kept[0].legends[0].get_texts()]
    ends = ((12, 302), (21, 176), (40, 141), (62, 98), (89, 80))
    assert texts[:5] == [f"record {record}, {seconds} s on 8 H100" for record, seconds in ends]
    assert texts[5:] == ["a", "gpt2, 100 steps, 3 runs"]
    assert len(over_time.lines) == 5 + 4 + 1 and len(over_tokens.lines) == 4 + 3 + 1  # 89 and `a` have no tokens
    drawn = np.array([line.get_ydata() for line in over_time.lines[5:9]])
    assert drawn == pytest.approx(np.array([[4.30, 3.30], [4.311, 3.31], [4.292, 3.29], [4.59, 3.278]]))
    assert "1 run without" in over_tokens.get_title("left")
    assert len(history.collections[0].get_offsets()) == 80 and history.get_yscale() == "log"
    assert not overlaps(kept[0])
    say(capsys, "plot", tmp_path / "z.png", "--references", "yes", HUNDRED, FIVE)
    assert not overlaps(kept.pop()), "over five powers of ten too"
    say(capsys, "plot", tmp_path / "y.png", HUNDRED)
    assert len(kept[1].axes[0].lines) == 3, "bytes of Shakespeare do not stand among losses on FineWeb"


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    assert "does not end in .png" in refused(capsys, "plot", HUNDRED, HUNDRED)
    assert "no loss after step 0" in refused(capsys, "plot", tmp_path / "x.png", write_run(tmp_path / "a", {0: 10.8}))
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, "plot", tmp_path / "file" / "x.png", HUNDRED)
