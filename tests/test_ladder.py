"""The ladder from one recipe to the other: its rungs, equal budgets, statistics, and small ladders run end to end."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tools import ROOT, write_corpus

sys.path.insert(0, str(ROOT / "records"))
import ladder
import train_gpt2
from train_gpt2 import Config, UserError, check_config, preset_values, tokens_until

FIVE_MINUTE = Config(**preset_values("five-minute") | {"preset": "gpt2"})


def test_the_rungs_lead_exactly_from_one_preset_to_the_other():
    (_, first), *_, (_, last) = ladder.climb(*ladder.both_ends())
    assert first == FIVE_MINUTE and last == Config()
    moved = [field for rung in ladder.RUNGS for field in rung.fields]
    different = [name for name, value in asdict(Config()).items() if value != getattr(FIVE_MINUTE, name)]
    assert sorted(moved) == sorted(set(different) - {"preset"}), "every field that differs, in exactly one rung"
    names = [rung.name for rung in ladder.RUNGS]
    assert len(names) == len(set(names)) and len(names) + 1 == len(ladder.climb(*ladder.both_ends()))


def test_a_forgotten_field_is_found(monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", tuple(rung for rung in ladder.RUNGS if rung.name != "smear"))
    with pytest.raises(AssertionError, match="belongs to no rung"):
        ladder.climb(*ladder.both_ends())


@pytest.mark.parametrize("size", ladder.SIZES)
def test_every_rung_and_every_omission_is_valid_and_has_the_same_budget(size):
    start, end = ladder.both_ends(size)
    left_out = [ladder.without(rung, start, end) for rung in ladder.RUNGS]
    for rung, config in zip(ladder.RUNGS, left_out, strict=True):
        for name, value in asdict(config).items():
            assert value == getattr(start if name in rung.fields else end, name)
    configs = [config for _, config in ladder.climb(start, end)] + left_out
    steps = 160 if size == "tiny" else 1600
    fitted = ladder.equal_budgets(configs, end, steps)
    budget = tokens_until(steps, replace(end, steps=steps))
    for before, config in zip(configs, fitted, strict=True):
        check_config(config)
        assert replace(config, steps=before.steps) == before
        assert abs(tokens_until(config.steps, config) / budget - 1) < 0.01
    assert fitted[len(configs) - len(left_out) - 1].steps == steps  # gpt2 itself
    assert fitted[0].steps == round(budget / start.tokens_per_step[0])


def test_tiny_keeps_each_role_and_the_ratios():
    """Where the text of the table says that something scales with the recipes, it does."""
    tiny, real = ladder.both_ends("tiny"), ladder.both_ends()
    for mine, theirs in zip(tiny, real, strict=True):
        for name in ("row_tokens", "tokens_per_step"):
            ratios = [{value / getattr(tiny[1], name)[0] for value in getattr(mine, name)},
                      {value / getattr(real[1], name)[0] for value in getattr(theirs, name)}]
            assert ratios[0] == ratios[1]
        assert [8 * window for window in mine.window[1:]] == list(theirs.window[1:])
        rates = [name for name in asdict(mine) if name.startswith("adam") or name.endswith("lr")]
        assert all(getattr(mine, name) == getattr(theirs, name) for name in rates) and len(rates) > 7
    stands_for = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 4, 8: 4, 9: 4, 10: 5}
    for name in ("attention_free", "gated_skip", "backout", "value_layers"):
        assert getattr(tiny[1], name) == tuple(sorted({stands_for[layer] for layer in getattr(real[1], name)}))
    long_ones = [{stands_for[i] for i in range(11) if i not in real[1].short_layers}, set(range(6))]
    assert set(range(6)) - set(tiny[1].short_layers) == long_ones[0]
    assert set(tiny[1].paired_layers) == {stands_for[i] for i in real[1].paired_layers} - long_ones[0]


def test_too_few_steps_for_equal_budgets_are_refused():
    start, end = ladder.both_ends("tiny")
    with pytest.raises(UserError, match="the nearest is --steps (\\d+)") as refusal:
        ladder.equal_budgets([start, end], end, 21)
    enough = int(str(refusal.value).rsplit(" ", 1)[1])
    ladder.equal_budgets([start, end], end, enough)
    with pytest.raises(UserError):
        ladder.equal_budgets([start, end], end, enough - 1)


def test_statistics_against_a_calculation_by_hand():
    """Differences 0.1, 0.2, 0.6 of three seeds: mean 0.3, deviations -0.2, -0.1, 0.3, variance 0.14 / 2 = 0.07."""
    found = ladder.effect({0: 1.1, 1: 2.2, 2: 3.6, 7: 9.0}, {2: 3.0, 0: 1.0, 1: 2.0, 5: 0.0})
    assert found.mean == pytest.approx(0.3) and found.error == pytest.approx(math.sqrt(0.07 / 3))
    assert found.verdict() == "within noise" and found.text(3) == "+0.300 ± 0.153"
    assert ladder.Effect(-0.3, 0.14).verdict() == "lower" and ladder.Effect(0.3, 0.14).verdict() == "higher"
    one = ladder.effect({0: 1.0}, {0: 1.5})
    assert one.mean == -0.5 and math.isnan(one.error) and one.verdict() == "" and one.text(1) == "-0.5"
    assert ladder.effect({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).verdict() == "none here"
    assert ladder.mean_and_spread({0: 1.0, 1: 2.0, 2: 6.0}, 2) == "3.00 ± 2.65"  # sqrt((4 + 1 + 9) / 2)
    # Student's t beyond 2 in closed form: one degree of freedom 1 - 2 atan(2) / pi, two 1 - 2 / sqrt(6).
    assert ladder.chance_beyond(2, 2) == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=1e-4)
    assert ladder.chance_beyond(2, 3) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-4)
    assert ladder.chance_beyond(2, 10_000) == pytest.approx(math.erfc(2 / math.sqrt(2)), abs=1e-3)


def test_rows_compare_with_the_row_before_or_with_the_full_recipe():
    rungs = ladder.RUNGS[:3]
    named = [(rung, rung.name) for rung in rungs]
    results = {(rung.name, seed): {"loss": 3.0 - place + seed, "seconds": 10.0 * 2**place, "steps": 5 + place}
               for place, rung in enumerate(rungs) for seed in range(2)}
    del results[rungs[2].name, 1]  # a run that failed
    one, two, three = ladder.rows_of(named, results, range(2))
    assert one.loss_effect is None and two.loss_effect == (-1.0, 0.0) and two.time_effect == (10.0, 0.0)
    assert three.loss_effect.mean == -1.0 and math.isnan(three.loss_effect.error) and three.losses == {0: 1.0}
    one, two, three = ladder.rows_of(named, results, range(2), against=rungs[0].name)
    assert one.loss_effect is None and three.loss_effect.mean == -2.0 and three.time_effect.mean == 30.0
    text = ladder.table([one, two, three], "rung", "to the first")
    assert f"| {rungs[1].name} | {rungs[1].what} | #13 #19 #35 #39 #62 | 6 | 2.5000 ± 0.7071 |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


TOY = {**ladder.TINY, "tokens_per_step": ((512,), (128, 256, 384)), "row_tokens": ((512,), (128, 256, 384)),
       "width": 32, "val_tokens": 1000, "val_row_tokens": 512, "dtype": "float32"}


def toy_options(folder: Path, *more) -> list[str]:
    return ["--train-files", f"{folder}/text_train_*.bin", "--val-files", f"{folder}/text_val_*.bin", "--steps", "8",
            "--out", str(folder / "out"), "--device", "cpu", "--rungs", "tied-head,bigrams", *more]


def test_a_small_ladder_end_to_end_and_again(tmp_path, monkeypatch, capsys):
    """The second command has another seed and leave-one-out to add, and repeats no run; the third has nothing to do."""
    monkeypatch.setitem(ladder.SIZES, "tiny", TOY)
    folder, out = write_corpus(tmp_path), tmp_path / "out"
    ladder.main(toy_options(folder, "--seeds", "1"))
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["tied-head", "bigrams"]
    tokens = tokens_until(8, replace(ladder.both_ends("tiny")[1], steps=8))
    for line in map(json.loads, lines):
        assert line["tokens"] == tokens and line["steps"] == 8 and 2 < line["loss"] < 6 and line["seconds"] > 0
    picture = (out / "ladder.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and not list(out.rglob("model.pt"))
    (out / "runs.jsonl").write_text("\n".join(lines) + '\n{"key": "cut of')
    capsys.readouterr()
    ladder.main(toy_options(folder, "--seeds", "2", "--leave-one-out", "--jobs", "2"))
    printed, table = capsys.readouterr().out, (out / "ladder.md").read_text()
    assert "8 runs, 2 of them in" in printed and table in printed, "2 rungs and 2 omissions, with 2 seeds"
    assert (out / "runs.jsonl").read_text().splitlines()[:2] == lines and (out / "ladder.png").read_bytes() != picture
    monkeypatch.setattr(ladder, "train_once", None)
    ladder.main(toy_options(folder, "--seeds", "2", "--leave-one-out"))
    assert "8 runs, 8 of them in" in capsys.readouterr().out and (out / "ladder.md").read_text() == table


def test_the_script_the_data_and_the_configuration_make_a_run(monkeypatch, tmp_path):
    """A stored result counts for exactly what computed it; only the folder it went to does not matter."""
    run = ladder.Run("any", Config(seed=3))
    key = run.key((5, 6))
    assert key == ladder.Run("other", Config(seed=3, out="elsewhere")).key((5, 6))
    assert key not in (ladder.Run("any", Config(seed=4)).key((5, 6)), run.key((5, 7)))
    changed = tmp_path / "train_gpt2.py"
    changed.write_text(Path(train_gpt2.__file__).read_text() + "\n")
    monkeypatch.setattr(train_gpt2, "__file__", str(changed))
    assert run.key((5, 6)) != key


def test_ctrl_c_keeps_finished_runs(tmp_path):
    folder, path = write_corpus(tmp_path), tmp_path / "out" / "runs.jsonl"
    script = (f"import sys; sys.path[:0] = {[str(ROOT / 'records'), str(ROOT)]!r}; import ladder\n"
              f"ladder.SIZES['tiny'] = {TOY!r}\nladder.main({toy_options(folder, '--seeds', '99')!r})")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.strip().startswith("interrupted: finished runs are in"), stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert len(path.read_text().splitlines()) == stdout.count("of training; about") >= 1


@pytest.mark.parametrize("options, message", [
    (["--size", "small"], "--size small is not one of tiny, 124M"),
    (["--device", "gpu"], "--device gpu is not one of auto, cpu, cuda"),
    (["--rungs", "smears,backout"], "--rungs smears is no rung"),
    (["--rungs", "none"], "--rungs none leaves nothing to run; give --leave-one-out as well"),
    (["--rungs", "float8-head", "--device", "cpu"], "change nothing at --size tiny on this machine"),
    (["--steps", "0"], "argument --steps: 0 is not a whole number of at least 1; python records/ladder.py --help"),
    (["--step", "5"], "unrecognized arguments: --step 5; python records/ladder.py --help lists all options"),
    (["--steps", "7"], "the nearest is --steps "),
    (["--train-files", "nowhere/*.bin"], "no shard matches nowhere/*.bin"),
])
def test_bad_input_is_refused_in_one_line(options, message):
    with pytest.raises(UserError) as refusal:
        ladder.main(options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_runs_that_fail_are_named_and_the_others_kept(tmp_path, monkeypatch, capsys):
    """Two of four runs fail: their last words are shown, the table has the others, and the command says so."""
    folder = write_corpus(tmp_path)
    (tmp_path / "words.txt").write_text("before\nlast words\n")

    def some(runs, jobs, threads, out):
        for number, run in enumerate(runs):
            result = {"loss": 2.0 + run.config.seed, "seconds": 1.0, "tokens": 7}
            yield run, result if number % 2 else None, tmp_path / "words.txt"

    monkeypatch.setattr(ladder, "finish_all", some)
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        ladder.main(toy_options(folder, "--seeds", "2"))
    printed = capsys.readouterr().out
    assert "tied-head, seed 0: failed: last words" in printed and "failed |" in printed and "2.5000 ± 0.7071" in printed
    with pytest.raises(UserError, match="three runs have failed"):
        ladder.main(toy_options(folder, "--seeds", "9"))
