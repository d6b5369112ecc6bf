"""records/ladder.py: its rungs, equal budgets, statistics, and small ladders run end to end."""

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
    moved = [field for rung in ladder.all_rungs() for field in rung.fields]
    different = [name for name, value in asdict(Config()).items() if value != getattr(FIVE_MINUTE, name)]
    assert len(moved) == len(set(moved)) and set(different) <= set(moved)
    names = [rung.name for rung in ladder.all_rungs()]
    assert len(names) == len(set(names)) and {"smear", "gated-skip", "epsilons"} < set(names)


def test_a_forgotten_field_is_found(monkeypatch):
    rest = {name: technique for name, technique in train_gpt2.TECHNIQUES.items() if name != "smear"}
    monkeypatch.setattr(ladder, "TECHNIQUES", rest)
    with pytest.raises(AssertionError, match="belongs to no rung"):
        ladder.climb(*ladder.both_ends())


@pytest.mark.parametrize("size", ladder.SIZES)
def test_every_rung_and_every_omission_is_valid_and_has_the_same_budget(size):
    start, end = ladder.both_ends(size)
    path = ladder.climb(start, end)
    configs = {rung.name: config for rung, config in path} | {"gpt2": end}
    for rung, _ in path[1:]:
        configs[f"without {rung.name}"] = left_out = ladder.without(rung, start, end)
        for name, value in asdict(left_out).items():
            assert value == getattr(start if name in rung.fields else end, name)
    steps = 160 if size == "tiny" else Config.steps
    fitted, budget = ladder.equal_budgets(configs, end, steps), tokens_until(steps, replace(end, steps=steps))
    for name, config in fitted.items():
        check_config(config)
        assert replace(config, steps=configs[name].steps) == configs[name]
        assert abs(tokens_until(config.steps, config) / budget - 1) < 0.01
    assert fitted["gpt2"].steps == steps and fitted["five-minute"].steps == round(budget / start.tokens_per_step[0])


def test_tiny_keeps_each_role_and_the_ratios():
    tiny, real = ladder.both_ends("tiny"), ladder.both_ends()
    for mine, theirs in zip(tiny, real, strict=True):
        for name in ("row_tokens", "tokens_per_step"):
            ratios = [{value / getattr(ends[1], name)[0] for value in getattr(own, name)}
                      for own, ends in ((mine, tiny), (theirs, real))]
            assert ratios[0] == ratios[1]
        assert [8 * window for window in mine.window[1:]] == list(theirs.window[1:])
        rates = [name for name in asdict(mine) if name.startswith("adam") or name.endswith("lr")]
        assert all(getattr(mine, name) == getattr(theirs, name) for name in rates) and len(rates) > 7
    stands_for = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 4, 8: 4, 9: 4, 10: 5}
    for name in ("attention_free", "gated_skip", "value_layers", "xsa_layers"):
        assert getattr(tiny[1], name) == tuple(sorted({stands_for[layer] for layer in getattr(real[1], name)}))
    assert tiny[1].attention_source == (2,)  # after 4 only the last layer attends, and 4 is its own input
    long = {stands_for[i] for i in range(11) if i not in real[1].short_layers}
    assert set(range(6)) - set(tiny[1].short_layers) == long
    assert set(tiny[1].paired_layers) == {stands_for[i] for i in real[1].paired_layers} - long


def test_too_few_steps_for_equal_budgets_are_refused():
    start, end = ladder.both_ends("tiny")
    with pytest.raises(UserError, match="--steps 7 "):
        ladder.equal_budgets({"five-minute": start}, end, 7)


def test_effects_against_a_calculation_by_hand():
    """Differences 0.1, 0.2, 0.6 of three seeds: mean 0.3, deviations -0.2, -0.1, 0.3, variance 0.07."""
    found = ladder.effect({0: 1.1, 1: 2.2, 2: 3.6, 7: 9.0}, {2: 3.0, 0: 1.0, 1: 2.0, 5: 0.0})
    assert found.mean == pytest.approx(0.3) and found.error == pytest.approx(math.sqrt(0.07 / 3))
    assert not found.is_certain() and found.text() == "+0.3000 ± 0.1528"
    assert ladder.Effect(-0.3, 0.14).text() == "**-0.3000 ± 0.1400**"
    one = ladder.effect({0: 1.0}, {0: 1.5})
    assert one.mean == -0.5 and one.text() == "-0.5000" and ladder.effect({0: 1.0}, {}).text() == ""
    assert not ladder.effect({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).is_certain()
    assert ladder.mean_and_spread({0: 1.0, 1: 2.0, 2: 6.0}, 2) == "3.00 ± 2.65"  # sqrt((4 + 1 + 9) / 2)


def test_rows_compare_with_the_rung_before_and_with_the_full_recipe():
    names, rungs = ["a", "b", "c", "gpt2", "without b"], [ladder.Rung(name, "why", "1 2", ("x",)) for name in "abc"]
    results = {(name, seed): {"loss": 3.0 - place + seed, "seconds": 10.0 * 2**place, "steps": 5}
               for place, name in enumerate(names) for seed in range(2)}
    del results["c", 1]  # a run that failed
    one, two, three = ladder.rows_of(rungs, results)
    assert math.isnan(one.gain.mean) and two.gain == (-1.0, 0.0) and two.seconds == {0: 20.0, 1: 20.0}
    assert three.gain.mean == -1.0 and math.isnan(three.gain.error) and three.losses == {0: 1.0}
    assert two.omission == (-1.0, 0.0) and math.isnan(one.omission.mean)
    text = ladder.table([one, two, three])
    assert "| b | why | 1 2 | 2.5000 ± 0.7071 | **-1.0000 ± 0.0000** |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


BOTH, OLD, NEW = ladder.TINY
SIZES = {"width": 32, "val_tokens": 1000, "val_row_tokens": 512, "dtype": "float32"}
TOY = (BOTH | SIZES, OLD | {"tokens_per_step": (512,), "val_row_tokens": 512},
       NEW | {"tokens_per_step": (128, 256, 384), "val_row_tokens": 512})


def toy_options(folder: Path, *more) -> list[str]:
    return ["--train-files", f"{folder}/text_train_*.bin", "--val-files", f"{folder}/text_val_*.bin", "--steps", "8",
            "--out", str(folder / "out"), "--device", "cpu", "--rungs", "xsa,bigram-signs", *more]


def test_a_small_ladder_end_to_end_and_again(tmp_path, monkeypatch, capsys):
    """The second command has leave-one-out to add, and repeats no run; the third has nothing to do."""
    monkeypatch.setitem(ladder.SIZES, "tiny", TOY)
    folder, out = write_corpus(tmp_path), tmp_path / "out"
    ladder.main(toy_options(folder, "--seeds", "1"))
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["xsa", "bigram-signs"]
    tokens = tokens_until(8, replace(ladder.both_ends("tiny")[1], steps=8))
    for line in map(json.loads, lines):
        assert line["tokens"] == tokens and line["steps"] == 8 and 2 < line["loss"] < 6 and line["seconds"] > 0
    picture = (out / "ladder.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and not list(out.rglob("model.pt"))
    (out / "runs.jsonl").write_text("\n".join(lines) + '\n{"key": "cut of')
    capsys.readouterr()
    ladder.main(toy_options(folder, "--seeds", "1", "--leave-one-out", "--jobs", "2"))
    printed, text = capsys.readouterr().out, (out / "ladder.md").read_text()
    assert "3 runs, 2 of them in" in printed and text in printed, "without the last rung is the rung before"
    assert (out / "runs.jsonl").read_text().splitlines()[:2] == lines and (out / "ladder.png").read_bytes() != picture
    monkeypatch.setattr(ladder, "train_once", None)
    ladder.main(toy_options(folder, "--seeds", "1", "--leave-one-out"))
    assert "3 runs, 3 of them in" in capsys.readouterr().out and (out / "ladder.md").read_text() == text


def test_the_script_the_data_and_the_configuration_make_a_run(monkeypatch, tmp_path):
    """A stored result counts for exactly what computed it; only the folder it went to does not matter."""
    key = ladder.Run("any", Config(seed=3)).key((5, 6))
    assert key == ladder.Run("other", Config(seed=3, out="elsewhere")).key((5, 6))
    assert key not in (ladder.Run("any", Config(seed=4)).key((5, 6)), ladder.Run("any", Config(seed=3)).key((5, 7)))
    changed = tmp_path / "train_gpt2.py"
    changed.write_text(Path(train_gpt2.__file__).read_text() + "\n")
    monkeypatch.setattr(train_gpt2, "__file__", str(changed))
    assert ladder.Run("any", Config(seed=3)).key((5, 6)) != key


@pytest.mark.slow
def test_ctrl_c_keeps_finished_runs(tmp_path):
    folder, path = write_corpus(tmp_path), tmp_path / "out" / "runs.jsonl"
    script = (f"import sys; sys.path[:0] = {[str(ROOT / 'records'), str(ROOT)]!r}; import ladder\n"
              f"ladder.SIZES['tiny'] = {TOY!r}\nladder.main({toy_options(folder, '--seeds', '99')!r})")
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and len(stderr.strip().splitlines()) == 1, stderr
    assert len(path.read_text().splitlines()) == stdout.count(" s of training") >= 1


@pytest.mark.parametrize(("options", "message"), [
    (["--size", "small"], "--size"), (["--device", "gpu"], "--device"), (["--rungs", "smears,bigrams"], "smears"),
    (["--rungs", "float8-head", "--device", "cpu"], "float8-head"), (["--steps", "0"], "--steps"),
    (["--step", "5"], "--step 5"), (["--steps", "7"], "--steps 7"), (["--train-files", "nowhere/*.bin"], "nowhere/")])
def test_bad_input_is_one_line(options, message):
    with pytest.raises(UserError) as error:
        ladder.main(options)
    assert message in str(error.value) and "\n" not in str(error.value)


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
    assert "xsa, seed 0: failed: last words" in printed and "| failed |" in printed
    assert "2.5000 ± 0.7071" in printed
    with pytest.raises(UserError, match="three runs have failed"):
        ladder.main(toy_options(folder, "--seeds", "9"))
