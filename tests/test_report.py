"""Reading logs, ours and public ones; is it a record, which set is better, is a run on track; the picture."""

import json
import os
import math
import subprocess
import sys

import pytest
from scipy import stats
from tools import ROOT, run_here, write_corpus

sys.path.insert(0, str(ROOT / "records"))
import report

HUNDRED = ROOT / "records" / "2026-11-24_hundred-second_tiny_2-core_cpu"
FIVE = ROOT / "records" / "2026-11-24_tiny_shakespeare_2-core_cpu"
RULE = "=" * 100
GOOD = [3.2775, 3.2781, 3.2768, 3.2790, 3.2779, 3.2772, 3.2785, 3.2776]
CLOSE = [3.2792, 3.2793, 3.2791, 3.2792]


def say(capsys, *arguments) -> tuple[int, str, str]:
    return report.main([str(word) for word in arguments]), *capsys.readouterr()


def refused(capsys, *arguments) -> str:
    status, out, error = say(capsys, *arguments)
    assert status == 2 and out == "" and error.count("\n") == 1
    return error


def rows(out: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in cells}


def write_run(folder, losses: dict[int, float], planned=0, seed=0, script="x = 1\n", pace=0.1, batch=1024,
              shards="{}", **settings):
    """A run folder as train_gpt2.py leaves it, with these validations."""
    folder.mkdir(parents=True)
    config = {"preset": "gpt2", "train_files": "fineweb_train_*.bin", "seed": seed, "out": str(folder), **settings}
    lines = [f"{script}\n{RULE}", "python 3.11.7, torch 2.13.0+cpu, 2 cores", json.dumps(config), f"shards {shards}"]
    lines += [f"step:{step}/{planned or max(losses)} val_loss:{loss:.4f} train_time:{1000 * pace * step:.0f}ms "
              f"step_avg:{1000 * pace:.2f}ms" for step, loss in losses.items()]
    records = [json.dumps({"step": step, "tokens": batch * step, "val_loss": loss, "train_time_s": pace * step})
               for step, loss in losses.items()]
    for name, text in (("log.txt", lines), ("metrics.jsonl", records)):
        (folder / name).write_text("\n".join(text) + "\n")
    return folder


def write_set(folder, finals, first_seed=1, **options):
    for place, final in enumerate(finals):
        write_run(folder / f"run{place}", {0: 10.8, 50: final + 1 + 1e-3 * place, 100: final},
                  **{"seed": first_seed + place, **options})
    return folder


def write_public(path, losses: dict[int, float], kind="val", head="", time="{0}00ms"):
    card = "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |"
    lines = [f"{head}x = 1\n\n{RULE}", "Running PyTorch 2.6.0 compiled for CUDA 12.4", card, card, RULE]
    lines += [f"step:{step}/{max(losses)} {kind}_loss:{loss:.4f} train_time:{time.format(step)} step_avg:102.00ms"
              for step, loss in losses.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_run_made_now_is_read_in_full(tmp_path):
    run, = report.read_runs([str(run_here(write_corpus(tmp_path), seed=3))])
    records = [json.loads(line) for line in (run.path.parent / "metrics.jsonl").read_text().splitlines()]
    assert (run.steps, run.planned, run.seed, run.finished) == (8, 8, 3, True)
    assert [point.loss for point in run.val] == [record["val_loss"] for record in records if "val_loss" in record]
    assert run.val[-1].tokens == 8 * 1024 and run.seconds == records[-1]["train_time_s"]
    assert run.script and "cores" in run.hardware and run.torch and run.val_targets == "" and run.shards


def test_a_resumed_run_takes_back_what_it_repeats(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {10: 5.123456, 20: 4.0, 30: 3.9}, planned=40)
    with open(folder / "log.txt", "a") as log, open(folder / "metrics.jsonl", "a") as metrics:
        log.write("step:20/40 val_loss:4.5000 train_time:2100ms step_avg:105.00ms\n")
        metrics.write('{"step": 20, "tokens": 20480, "val_loss": 4.5, "train_time_s": 2.1}\n')
    run = report.read_log(folder / "log.txt")
    assert [(point.step, point.loss) for point in run.val] == [(10, 5.123456), (20, 4.5)]
    assert (run.steps, run.seconds, run.finished) == (20, 2.1, False)
    (folder / "metrics.jsonl").write_text('{"step": 20, "tokens": 1, "val_loss": 2.9, "train_time_s": 2.0}\n')
    assert "step 20" in refused(capsys, "show", folder), "log and metrics contradict each other"


def test_a_garbled_line_is_the_only_one_lost(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {10: 5.0, 20: 4.0, 30: 3.0})
    for name, at, bad in (("log.txt", "step:20", "step:15/30 val_lo\n"),
                          ("metrics.jsonl", '{"step": 20', "[" * 100_000 + '\n{"step": 9, "tok\n'),
                          ("log.txt", "step:30", f"step:{'9' * 400}/30 val_loss:5 train_time:1ms step_avg:nanms\n")):
        (folder / name).write_text((folder / name).read_text().replace(at, bad + at))
    error = say(capsys, "show", folder)[2]
    assert error.count("skipped 2 garbled lines of") == 2 and error.count("\n") == 2
    assert [point.step for point in report.read_log(folder / "log.txt").val] == [10, 20, 30]


def test_a_byte_order_mark_and_strange_settings_change_nothing(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {10: 5.0, 20: 4.0, 30: 3.0})
    (folder / "metrics.jsonl").write_text("\ufeff" + (folder / "metrics.jsonl").read_text())
    text = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(text + '{"seed": [1], "preset": {"a": 1}}\n')
    assert "garbled" not in say(capsys, "show", folder)[2]
    for command in ("verify", "band"):
        assert "Traceback" not in say(capsys, command, folder)[2]


@pytest.mark.parametrize("head, time, seconds", [
    (RULE + "\n", "{0}00ms", 50), ("\ufeff", "{0}00ms", 50), ("", "{0}.0s", 500)])
def test_public_logs_are_read(tmp_path, head, time, seconds):
    run = report.read_log(write_public(tmp_path / "a.txt", {0: 10.8, 500: 3.3}, head=head, time=time), 10)
    assert [tuple(point) for point in run.val] == [(0, 0, 0, 10.8), (500, 5000, seconds, 3.3)]
    assert (run.hardware, run.torch, run.average) == ("2 x NVIDIA H100 80GB HBM3", "2.6.0", 102)
    assert run.finished and run.script == report.read_log(write_public(tmp_path / "b.txt", {9: 3.3})).script != ""


def test_logs_of_llm_c_and_logs_without_validations_are_read(tmp_path, capsys):
    log = tmp_path / "main.log"
    log.write_text("s:0 tel:11.0092\ns:0 trl:11.0 lr:0.000001 norm:15.37\ns:9 trl:4\ns:10 tel:3.2\n")
    assert [point.loss for point in report.read_log(log).val] == [11.0092, 3.2]
    for command in (["show"], ["compare", log], ["plot", tmp_path / "x.png"]):
        assert say(capsys, *command, log)[0] == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    status, out, _ = say(capsys, "verify", log)
    assert status == 1 and "state no seed" in out and "--planned" in out
    train = write_public(tmp_path / "a.txt", {step: 5 - step / 100 for step in range(1, 101)}, kind="train")
    assert "4.0000 (train, step 100)" in say(capsys, "show", train)[1]
    for command in (["verify"], ["compare", log]):
        assert "val_loss" in refused(capsys, *command, train)


def test_bad_input_is_refused_in_one_line_and_every_command_has_help(tmp_path, capsys):
    (tmp_path / "noise.txt").write_bytes(bytes(range(256)) * 9)
    for words in (["show", tmp_path / "absent"], ["show", tmp_path / "noise.txt"], ["show", ","], [], ["shwo"],
                  ["show", "x", "--y"], ["verify", HUNDRED, "--target", "x"],
                  *(["verify", HUNDRED, option, value] for option, value in (
                      ("--target", "inf"), ("--target", "nan"), ("--spread", "0"), ("--spread", "-1"),
                      ("--alpha", "nan"), ("--planned", "0"))),
                  ["compare", HUNDRED, HUNDRED, "--loss", "nan"], ["show", HUNDRED, "--tokens-per-step", "-5"],
                  ["band", HUNDRED],
                  ["plot", HUNDRED, HUNDRED], ["plot", tmp_path / "noise.txt" / "x.png", HUNDRED],
                  ["verify", write_run(tmp_path / "b", {50: 3.1}, planned=100)]):
        refused(capsys, *words)
    for command in ("show", "verify", "compare", "plot", "band"):
        with pytest.raises(SystemExit) as end:
            report.main([command, "--help"])
        assert end.value.code == 0 and f"report.py {command}" in capsys.readouterr().out


def test_a_closed_pipe_and_an_ascii_terminal_leave_the_verdict(tmp_path):
    folder = write_set(tmp_path / "naïve", GOOD)
    command = [sys.executable, ROOT / "records" / "report.py", "verify", "--planned", "8", folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1  # neither a yes nor a no
    command[2:] = ["compare", folder, folder]
    assert rb"na\xefve" in subprocess.check_output(command, env={"PYTHONIOENCODING": "ascii"})


def test_seeds_of_several_kinds_and_a_pipe_beside_the_log(tmp_path, capsys):
    for name, seed in (("a", "x"), ("b", 0), ("c", None)):
        write_run(tmp_path / name, {10: 4.0, 20: 3.0}, seed=seed)
    (tmp_path / "a" / "metrics.jsonl").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "a" / "metrics.jsonl")
    assert say(capsys, "compare", tmp_path, tmp_path)[0] == 0


def test_show_has_a_line_for_each_run_and_the_settings_that_differ(tmp_path, capsys):
    write_run(tmp_path / "a", {10: 4.0, 20: 3.0}, seed=1, muon_lr=0.02, window=64)
    write_run(tmp_path / "b", {10: 4.0}, planned=20, seed=2, muon_lr=0.03, window=64, script="x = 2\n")
    (tmp_path / "notes.txt").write_text("no run")
    assert [run.name for run in report.read_runs([f"{tmp_path}/a*,{tmp_path}/b", str(tmp_path)])] == ["a", "b"]
    found = rows(say(capsys, "show", tmp_path)[1])
    assert found["a"][:-1] == ["1", "20", "20,480", "2.00", "100.00", "3.0000", "2 cores", "2.13.0+cpu"]
    assert found["b"][:6] == ["2", "10/20", "10,240", "1.00", "100.00", "4.0000 (val, step 10)"]
    assert found["a"][-1] != found["b"][-1]
    assert found["muon_lr"] == ["0.02", "0.03"] and not {"seed", "out", "window"} & set(found)


@pytest.mark.parametrize("finals, more, status", [
    (GOOD, [], 0), (GOOD, ["--target", 3.27], 1), (GOOD, ["--alpha", 1e-9], 1), ([3.1], [], 1), (CLOSE, [], 1),
    (CLOSE, ["--spread", 0.0003], 0), ([3.270, 3.279, 3.274, 3.283], [], 1)])
def test_a_record_passes_both_tests(tmp_path, capsys, finals, more, status):
    folder = write_set(tmp_path / "set", finals)
    assert say(capsys, "verify", "--planned", len(finals), *more, folder)[0] == status
    by_t, by_known, _ = report.p_values(finals, 3.28, 0.0013)
    if len(finals) > 1:
        assert by_t == pytest.approx(stats.ttest_1samp(finals, 3.28, alternative="less").pvalue)
    assert by_known == pytest.approx(stats.norm.cdf((sum(finals) / len(finals) - 3.28) / 0.0013 * len(finals)**0.5))


@pytest.mark.parametrize("change, word", [
    ({}, "planned"), ({"seed": 1}, "seed"), ({"script": "x = 2\n"}, "scripts"), ({"shards": '{"train": 1}'}, "shards"),
    ({"val_tokens": 1000}, "FineWeb"), ({"train_files": "other_*.bin"}, "train_files"), ({"muon_lr": 1}, "muon_lr"),
    ({"planned": 120}, "not finished"), ({"final": GOOD[0]}, "same losses"), ({"final": math.nan}, "finite")])
def test_what_breaks_a_rule_makes_the_answer_no(tmp_path, capsys, change, word):
    folder, planned = write_set(tmp_path / "set", GOOD[:7]), 8 if change else 7
    final = change.pop("final", GOOD[7])
    write_run(folder / "last", {0: 10.8, 50: final + 1, 100: final}, **{"seed": 99, **change})
    status, out, _ = say(capsys, "verify", "--planned", planned, folder)
    assert status == 1 and word in out and out.splitlines()[-1].startswith("no: ")


def test_shards_are_the_same_in_logs_of_either_form(tmp_path):
    forms = ['{"train": {"0: a.bin": [9, 257]}}', '{"train": {"0: a.bin": "9,257"}}',
             '{"train shard 0: a.bin": "9,257"}', '{"train shard 0: a.bin": "9,25"}']
    logs = [write_run(tmp_path / str(i), {0: 10.8, 100: 3.2}, shards=shards) for i, shards in enumerate(forms)]
    oldest, old, new, other = (run.shards for run in report.read_runs([str(log) for log in logs]))
    assert oldest == old == new != other


def test_runs_of_the_same_seeds_are_compared_in_pairs(tmp_path, capsys):
    a, gains = [3.30, 3.29, 3.31], (0.0010, 0.0012, 0.0011)
    write_set(tmp_path / "a", a)
    for place in range(3):  # the folders are in another order than the seeds
        write_set(tmp_path / "b" / f"{2 - place}", [a[place] - gains[place]], first_seed=1 + place, pace=0.09)
    found = rows(say(capsys, "compare", tmp_path / "a", tmp_path / "b")[1])
    assert found["loss at tokens 102,400"] == ["3.3000", "3.2989", "-0.0011", "-0.0013 to -0.0009", "B is lower"]
    assert found["milliseconds per step"][2] == "-10.0000"
    c = write_set(tmp_path / "c", [loss - 0.0011 for loss in a], first_seed=11)
    assert rows(say(capsys, "compare", tmp_path / "a", c)[1])["loss at tokens 102,400"][4] == "within the noise"


def test_single_runs_are_compared_at_equal_tokens_and_by_the_time_to_a_loss(tmp_path, capsys):
    a = write_run(tmp_path / "a", {0: 10.0, 50: 4.0, 100: 3.0})
    b = write_run(tmp_path / "b", {0: 10.0, 25: 3.5, 50: 3.1}, batch=2048)
    out = say(capsys, "compare", a, b, "--loss", 3.25)[1]
    assert rows(out)["loss at tokens 51,200"] == ["4.0000", "3.5000", "-0.5000", "", ""]
    assert rows(out)["seconds to a loss of 3.2500"][:2] == ["8.7500", "4.0625"]
    assert out.count("give several seeds") == 1
    assert rows(say(capsys, "compare", a, b, "--loss", 3.05)[1])["seconds to a loss of 3.0500"][1] == "0 of 1"


@pytest.mark.parametrize("preset, record, beyond", [
    ("five-minute", "12", 0.13), ("gpt2", "62", 0.075), ("gpt2", "88", 0.05), ("gpt2-medium", "gpt2-medium", 0.045),
    ("gpt2-xl", "gpt2-xl", 0.05)])
def test_a_run_on_its_way_is_inside_the_band_and_a_sick_one_outside(preset, record, beyond, tmp_path, capsys):
    assert set(report.reference_curves()) == set(report.END_SPREAD)
    band = report.record_band("12")
    assert [round(band[step][1], 9) for step in (125, 500, 1000, 1875)] == [0.12, 0.06, 0.02, 0.02]
    assert report.record_band("62")[250] == pytest.approx(((4.573 + 4.606) / 2, 4 * (4.606 - 4.573) / 2.534))
    assert report.record_band("88")[1000] == pytest.approx(((3.4576 + 3.4575) / 2, 4 * 0.002))
    curve = {int(row["step"]): row["loss"] for row in report.reference_curves()[record]}
    end, step = max(curve), sorted(curve)[2]
    status, out, _ = say(capsys, "band", write_run(tmp_path / "a", curve, preset=preset))
    assert status == 0 and f"the curve of {record}, " in out and "expected" not in out
    public = write_public(tmp_path / "a.txt", curve)
    assert say(capsys, "band", public, "--record", record)[0] == 0
    for words in ([], ["--record", "13"], ["--record", "21"]):  # no preset, no such curve, another length
        refused(capsys, "band", public, *words)
    for loss, word in ((curve[step] + beyond, "above"), (curve[step] - beyond, "below"), (math.nan, "above")):
        folder = write_run(tmp_path / f"{loss}", {step: loss}, planned=end, preset=preset, train_files="my_*.bin")
        status, out, _ = say(capsys, "band", folder)
        assert status == 1 and word in out and "FineWeb" in out


@pytest.mark.parametrize("loss, status, words", [
    (3.4501, 0, "3.2707 is expected: a pass"), (3.459, 0, "3.2796 is expected: a pass"), (3.4591, 0, "too close"),
    (3.463, 0, "too close"), (3.4631, 1, "3.2837 is expected: a miss"), (3.47, 1, "a miss"), (math.nan, 1, "a miss")])
def test_step_1000_of_1375_tells_the_end(tmp_path, capsys, loss, status, words):
    early = {0: 10.83, 250: 4.52, 500: 4.21, 750: 3.76}
    run = write_run(tmp_path / "run", early | {1000: loss}, planned=1375)
    found, out, _ = say(capsys, "band", run)
    assert found == status and words in out and (rows(out)["1000"][-1] == "inside") == (3.4496 < loss < 3.4656)
    for name, curve in (("early", early), ("whole", early | {1000: 3.46, 1250: 3.33, 1375: 3.28})):
        found, out, _ = say(capsys, "band", write_run(tmp_path / name, curve, planned=1375))
        assert found == 0 and "expected" not in out
    assert "1375" in refused(capsys, "band", write_run(tmp_path / "short", {0: 10.8, 250: 4.5}, planned=1500))


def test_tiny_is_compared_with_the_runs_kept_here_or_with_ones_own(tmp_path, capsys):
    for seed in (10, 11, 12):
        assert say(capsys, "band", report.OWN_RUNS / f"seed{seed}")[0] == 0
    own = write_set(tmp_path / "own", [3.30, 3.31, 3.29], muon_lr=2)
    for words in ([FIVE / "seed0"], [FIVE / "seed0", "--against", HUNDRED], [own / "run0", "--against", own / "run0"]):
        refused(capsys, "band", *words)
    for final, status in ((3.305, 0), (3.36, 1)):
        run = write_run(tmp_path / f"{final}", {0: 10.8, 50: 4.30, 100: final}, muon_lr=1)
        found, out, _ = say(capsys, "band", run, "--against", own)
        assert found == status and "muon_lr" in out


def test_the_picture_holds_what_it_should(tmp_path, capsys, monkeypatch):
    figure, kept = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **_: path.touch() or kept.append(self))
    write_set(tmp_path / "set", [3.30, 3.31])
    write_run(tmp_path / "set" / "short", {0: 10.8, 50: 4}, planned=100)
    bad = write_run(tmp_path / "set" / "bad", {9: 3.0}) / "metrics.jsonl"
    bad.write_text(bad.read_text().replace("3.0", "2.9"))
    public = write_public(tmp_path / "a.txt", {0: 10.8, 250: 4.59, 1600: 3.278})
    status, _, error = say(capsys, "plot", tmp_path / "x.png", tmp_path / "set", public)
    assert status == 0 and error.count("notice: skipped") == 2, "an interrupted and an unreadable run"
    texts = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert texts[:3] == ["gpt2, 100 steps, seed 1", "gpt2, 100 steps, seed 2", "a"] and len(texts) == 3 + 5
    over_time, _, history = kept[0].axes
    assert list(over_time.lines[0].get_ydata()) == [4.30, 3.30] and len(history.lines[0].get_ydata()) == 80
    assert say(capsys, "plot", tmp_path / "y.png", HUNDRED, FIVE)[0] == 0
    assert [len(axes.lines) for axes in kept[1].axes] == [6, 6], "no public record beside tiny Shakespeare"
    before = (tmp_path / "y.png").read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: path.write_bytes(b"x") and 1 / 0)
    with pytest.raises(ZeroDivisionError):  # which stands for a full disk: the older picture stays
        report.main(["plot", str(tmp_path / "y.png"), str(HUNDRED)])
    assert (tmp_path / "y.png").read_bytes() == before
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    needed = os.path.relpath(ROOT / "requirements-dev.txt")
    assert f"pip install -r {needed}\n" in refused(capsys, "plot", tmp_path / "z.png", HUNDRED)
