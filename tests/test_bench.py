"""Two versions in turn on one machine: differences and their interval, drift, what is measured, commits and their
folders, bad input, and what a GPU says. Stand-ins take the place of training; they print lines as told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats
from tools import ROOT

sys.path.insert(0, str(ROOT / "records"))
import bench

from train_gpt2 import Refusal

PLANNED = """import json, pathlib, sys
order = pathlib.Path("order.txt")
before = order.read_text() if order.exists() else ""
order.write_text(before + sys.argv[1])
print(json.loads(pathlib.Path("plan.json").read_text())[len(before)])
"""
PAIR = ("python planned.py A", "python planned.py B")


def lines(milliseconds: float, steps: int = 40, loss: float = 4.0) -> str:
    """A log whose first steps take a second longer."""
    return "\n".join(f"step:{step}/{steps} {'val' if step == steps else 'train'}_loss:{loss:.4f} "
                     f"train_time:{milliseconds * step + 1000 * (step > 0):.0f}ms step_avg:{milliseconds + 9:.2f}ms"
                     for step in range(0, steps + 1, 10))


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A function: compare runs that print these texts, in the order in which they are started. Returns what --json
    holds and the order."""
    monkeypatch.chdir(tmp_path)
    Path("planned.py").write_text(PLANNED)

    def compare(texts: list[str], *options) -> tuple[dict, str]:
        Path("plan.json").write_text(json.dumps(texts))
        bench.main([*PAIR, "--rounds", str(len(texts) // 2), "--json", "found.json", *options])
        return json.loads(Path("found.json").read_text()), Path("order.txt").read_text()
    return compare


def refused(*arguments) -> str:
    """The one line with which it refuses."""
    with pytest.raises(Refusal) as caught:
        bench.main([str(word) for word in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Figures.


def test_differences_are_within_rounds_with_their_interval(planned, capsys):
    a, b = [102.0, 104.0, 99.0, 101.0], [100.0, 101.5, 97.5, 98.0]
    found, order = planned([lines(ms) for ms in (a[0], b[0], b[1], a[1], a[2], b[2], b[3], a[3])])
    assert order == "ABBAABBA"
    assert [run["times"][bench.BY_CLOCK] for run in found["runs"]["A"]] == pytest.approx(a)
    assert [run["times"][bench.BY_CLOCK] for run in found["runs"]["B"]] == pytest.approx(b)
    low, high = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert found["difference_ms"] == pytest.approx({"mean": -2.25, "low": low, "high": high})
    assert found["difference_percent"] == pytest.approx(100 * -2.25 / 101.5)
    assert found["verdict"] == "B is faster by 2.250 ms, 2.22 %"
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [f"A: {PAIR[0]}", f"B: {PAIR[1]}"] and "cores" in out[2] and "torch" in out[2]
    assert not any("command:" in line or "GPU" in line for line in out)
    assert out[3].startswith("A in round 1: 102.000 ms per step by train_time; 40 steps, last loss 4.0000, ")
    assert f"Compared: {bench.BY_CLOCK}." in out
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out if line.startswith("|")]
    assert cells[0] == ["round", "first", "A", "B", "B - A", "loss of A", "loss of B"]
    assert cells[3] == ["2", "B", "104.000", "101.500", "-2.500", "4.0000", "4.0000"] and len(cells) == 6
    assert any(line.startswith(f"B - A: -2.250 ms, 95 % interval {low:+.3f} to {high:+.3f} ms; in % of A -2.22, ")
               for line in out)
    assert out[-1] == "verdict: B is faster by 2.250 ms, 2.22 %"


@pytest.mark.parametrize(("b", "verdict"), [
    ((100.0, 104.0), "inside the noise"), ((103.0, 103.5), "A is faster by 3.250 ms, 3.25 %"),
    ((97.0, 96.5), "B is faster by 3.250 ms, 3.25 %")])
def test_the_verdict_names_the_faster_one_only_outside_the_noise(planned, b, verdict):
    assert planned([lines(100), lines(b[0]), lines(b[1]), lines(100)])[0]["verdict"] == verdict


@pytest.mark.parametrize("rounds", [2, 3, 5, 6])
def test_a_steady_drift_of_the_machine_cancels(planned, rounds):
    """Each run is 2 ms slower than the one before; B takes 5 ms more than A."""
    labels = "ABBA" * rounds
    found, order = planned([lines(100 + 2 * turn + 5 * (labels[turn] == "B")) for turn in range(2 * rounds)])
    assert order == labels[:2 * rounds]
    difference = found["difference_ms"]
    assert difference["low"] < 5 < difference["high"]
    assert difference["mean"] == pytest.approx(5 + (2 / rounds if rounds % 2 else 0))


def test_a_change_that_is_faster_but_worse_shows(planned, capsys):
    found, _ = planned([lines(100), lines(90, loss=4.1), lines(90, loss=4.12), lines(100)])
    assert found["verdict"] == "B is faster by 10.000 ms, 10.00 %", "two losses leave a wide interval"
    assert found["difference_loss"]["mean"] == pytest.approx(0.11)
    Path("order.txt").unlink()
    found, _ = planned([lines(100), lines(90, loss=4.1), lines(90, loss=4.1), lines(100)])
    assert found["verdict"] == "B is faster by 10.000 ms, 10.00 %; B has the higher loss, by 0.1000"
    assert "last loss, B - A: +0.1000, 95 % interval +0.1000 to +0.1000" in capsys.readouterr().out


def test_a_loss_that_is_no_number_shows(planned):
    found, _ = planned([lines(100), lines(90, loss=float("nan")), lines(90), lines(100)])
    assert found["verdict"] == "B is faster by 10.000 ms, 10.00 %; not every run has a loss that is finite"
    assert found["runs"]["B"][0]["loss"] is None and "difference_loss" not in found


def test_different_numbers_of_steps_are_warned_of(planned, capsys):
    planned([lines(100), lines(90, 50), lines(90, 50), lines(100)])
    assert "warning: not the same number of steps: A has 40, B 50\n" in capsys.readouterr().out
    Path("order.txt").unlink()
    planned([lines(100), lines(90), lines(90), lines(100)])
    assert "warning" not in capsys.readouterr().out


# What is measured.


def test_the_first_steps_do_not_count_and_the_last_loss_is_that_of_validation():
    text = "noise\n" + lines(100) + "\nstep:40/40 train_loss:9.0 train_time:5000ms step_avg:1ms"
    found = bench.read_output(text, 7, 10)
    assert found == ({bench.BY_CLOCK: 100.0, bench.BY_AVERAGE: 1.0, bench.WHOLE: 7000}, 40, 4.0)
    assert bench.read_output(lines(100), 7, 0).times[bench.BY_CLOCK] == 125.0
    assert bench.read_output(lines(100), 7, 21).times[bench.BY_CLOCK] == 100.0
    assert bench.read_output("step:8/8 train_loss:3.5 train_time:800ms step_avg:99ms", 1, 2).loss == 3.5


def test_lines_of_the_public_speedrun():
    """Its later scripts state no training loss, its earlier ones set the clock back after ten steps."""
    text = "\n".join(["step:0/1750 val_loss:10.8258 train_time:0ms step_avg:0.02ms",
                      *(f"step:{n}/1750 train_time:{57 * n + 300}ms step_avg:{57.5:.2f}ms" for n in range(1, 126)),
                      "step:125/1750 val_loss:4.6412 train_time:7426ms step_avg:59.41ms"])
    found = bench.read_output(text, 9, 10)
    assert found.times[bench.BY_CLOCK] == pytest.approx(57, abs=0.02) and found.loss == 4.6412 and found.steps == 125
    old = "\n".join(f"step:{n}/30 train_loss:5.0 train_time:{9000 * n if n < 11 else 150 * (n - 10)}ms step_avg:nanms"
                    for n in range(1, 31))
    assert bench.read_output(old, 9, 10).times == {bench.BY_CLOCK: 150, bench.WHOLE: 9000}


def test_the_finest_measure_that_all_runs_have_is_compared(planned, capsys):
    one = "step:40/40 val_loss:4.0 train_time:{}ms step_avg:{}ms"
    found, _ = planned([lines(100), one.format(1, 80), one.format(1, 81), lines(100)])
    assert found["measure"] == bench.BY_AVERAGE
    assert found["difference_ms"]["mean"] == pytest.approx(80.5 - 109)
    Path("order.txt").unlink()
    found, _ = planned([lines(100), "nothing of a step", "", lines(100)])
    assert found["measure"] == bench.WHOLE and "difference_loss" not in found
    assert found["difference_ms"]["mean"] < 1000, "milliseconds of starting Python"
    assert "Compared: ms of the whole command." in capsys.readouterr().out


def test_the_whole_command_is_timed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.main(["sleep 0.15", "sleep 0.05", "--rounds", "2", "--json", "found.json"])
    found = json.loads(Path("found.json").read_text())
    assert [run["times"][bench.WHOLE] >= 150 for run in found["runs"]["A"]] == [True, True]
    assert found["difference_ms"]["mean"] == pytest.approx(-100, abs=60)


def test_python_is_the_one_that_runs_the_comparison(tmp_path, monkeypatch, capsys):
    """Also where it has another name and another one stands beside it; torchrun is the one beside it."""
    monkeypatch.chdir(tmp_path)
    for name, milliseconds in (("python", 1), ("mine", 70), ("torchrun", 80)):
        Path(name).write_text(f"#!/bin/sh\necho step:9/9 val_loss:3.0 train_time:99ms step_avg:{milliseconds}ms\n")
        Path(name).chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(tmp_path / "mine"))
    bench.main(["python x", "python3 x", "--rounds", "2", "--skip", "1"])
    assert capsys.readouterr().out.count(" 70.000 ms per step by the last step_avg") == 4
    bench.main(["python x", "torchrun x", "--rounds", "2", "--skip", "1"])
    assert capsys.readouterr().out.count(" 80.000 ms per step by the last step_avg") == 2


def test_a_pause_between_runs(planned, monkeypatch):
    waited = []
    monkeypatch.setattr(bench.time, "sleep", waited.append)
    planned([lines(100)] * 4, "--cool", "2.5")
    assert waited == [2.5] * 3


# Commits.

TRAINER = """import glob, json, os, sys
with open(os.environ["NOTES"], "a") as file:
    given = [word.partition("=")[2] for word in sys.argv if word.startswith("--train_files=")]
    print(json.dumps({"at": os.getcwd(), "python": [sys.executable, sys.prefix], "options": sys.argv[1:],
                      "data": [open(path).read() for path in glob.glob((given + ["data/text/*.bin"])[0])]}), file=file)
os.makedirs(sys.argv[-1] + "/run", exist_ok=True)
open(sys.argv[-1] + "/run/model.pt", "w").close()
SLOW = 100
print(f"step:20/40 train_loss:5.0 train_time:{20 * SLOW}ms step_avg:1ms")
print(f"step:40/40 train_loss:4.0 train_time:{40 * SLOW}ms step_avg:1ms")
"""
GIT = ("git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits, the second faster, whose data git does not know; this process stands in it."""
    folder, temporary = tmp_path / "a repository", tmp_path / "temporary"
    (folder / "data" / "text").mkdir(parents=True)
    temporary.mkdir()
    (folder / ".gitignore").write_text("data/*/\n")
    (folder / "data" / "prepare.py").touch()
    (folder / "data" / "text" / "train.bin").write_text("tokens")
    subprocess.run([*GIT, "init", "-q", "-b", "main", folder], check=True)
    for slow in (100, 90):
        (folder / "train_gpt2.py").write_text(TRAINER.replace("SLOW = 100", f"SLOW = {slow}"))
        subprocess.run([*GIT, "add", "."], cwd=folder, check=True)
        subprocess.run([*GIT, "commit", "-q", "-m", f"takes {slow}"], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(bench.tempfile, "tempdir", None)  # which was looked up before
    return folder


def is_clean(folder: Path) -> bool:
    """Whether nothing is left of what was checked out."""
    told = [subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout
            for words in (["worktree", "list"], ["status", "--porcelain"])]
    return told[0].count("\n") == 1 and told[1] == "" and not list((folder.parent / "temporary").iterdir())


def notes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder.parent / "notes").read_text().splitlines()]


def test_two_commits_are_run_in_folders_of_their_own(repository, capsys):
    bench.main(["HEAD~1", "main", "--rounds", "2", "--command", "python train_gpt2.py --steps 40",
                "--json", str(repository.parent / "found.json")])
    found = json.loads((repository.parent / "found.json").read_text())
    assert found["A"].endswith(" takes 100") and found["B"].endswith(" takes 90")
    assert found["verdict"].startswith("B is faster by 10.000 ms, 10.00 %")
    assert is_clean(repository)
    seen = notes(repository)
    places = [Path(note["at"]) for note in seen]
    assert places[0] == places[3] != places[1] == places[2] and not {repository, *places[0].parents} & {places[1]}
    assert all(repository not in (place, *place.parents) for place in places)
    assert all(note["data"] == ["tokens"] for note in seen)
    assert all(note["python"] == [sys.executable, sys.prefix] for note in seen)
    assert all(note["options"][:3] == ["--steps", "40", "--out"] for note in seen)
    out = capsys.readouterr().out
    assert "command: python train_gpt2.py --steps 40\n" in out and "without the changes" not in out


def test_a_commit_against_the_files_as_they_are(repository, capsys):
    (repository / "train_gpt2.py").write_text(TRAINER.replace("SLOW = 100", "SLOW = 50"))
    (repository / "of no commit").touch()
    bench.main(["HEAD", ".", "--rounds", "2", "--command", "python train_gpt2.py --out mine"])
    out = capsys.readouterr().out
    assert " takes 90 (without the changes to 1 file(s) since; . takes them)\n" in out
    assert "B: the working tree, 1 file(s) changed since " in out and "verdict: B is faster by 40.000 ms" in out
    places = [Path(note["at"]) for note in notes(repository)]
    assert places[1] == places[2] == repository and places[0] != repository
    assert all(note["options"] == ["--out", "mine"] for note in notes(repository)), "a given --out stays"
    shutil.rmtree("mine")
    Path("of no commit").unlink()
    subprocess.run(["git", "checkout", "-q", "."], check=True)
    assert is_clean(repository)


def test_relative_shards_are_meant_from_where_one_stands(repository, monkeypatch):
    (repository / "data" / "text" / "other").mkdir()
    (repository / "data" / "text" / "other" / "x.bin").write_text("others")
    monkeypatch.chdir(repository / "data" / "text")
    bench.main(["main", "WORKING", "--rounds", "2", "--command", "python train_gpt2.py --train_files=other/*.bin"])
    assert [note["data"] for note in notes(repository)] == [["others"]] * 4
    assert bench.for_commit("python x.py --val-files b.bin --train-files /c.bin", Path("o")) == [
        "python", "x.py", "--val-files", str(Path.cwd() / "b.bin"), "--train-files", "/c.bin"]


def test_models_of_runs_do_not_pile_up(repository, monkeypatch):
    def check(side, *rest, real=bench.run_once):
        found = real(side, *rest)
        assert (side.out / "run").is_dir() and not list(side.out.rglob("model.pt"))
        return found
    monkeypatch.setattr(bench, "run_once", check)
    bench.main(["main", "HEAD", "--rounds", "2", "--command", "python train_gpt2.py"])


def test_nothing_is_left_after_a_failure(repository):
    line = refused("main", "HEAD~1", "--command", "python missing.py")
    assert line.startswith("A in round 1 (") and "takes 90) ended with status 2, expected 0; it said: " in line
    assert "can't open file" in line and line.endswith("its command: python missing.py")
    assert is_clean(repository)
    assert "'HEAD~9', is no commit" in refused("main", "HEAD~9")
    assert is_clean(repository)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_after_a_signal(repository, number, status):
    (repository.parent / "wait.py").write_text(
        "import os, sys, time\nopen(os.environ['NOTES'], 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, ROOT / "records" / "bench.py", "HEAD", "HEAD~1", "--command",
                                f"python {repository.parent / 'wait.py'}"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,  # background jobs ignore it
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # noqa: PLW1509
    deadline, pid = time.monotonic() + 60, repository.parent / "notes"
    while not (pid.exists() and pid.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in error, error
    assert (error == "interrupted; what was checked out is gone again\n") == (number == signal.SIGINT)
    assert is_clean(repository)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# Bad input.


@pytest.mark.parametrize(("arguments", "parts"), [
    (["mian", "HEAD"], ["A, 'mian', is no commit of ", "expected a commit, . for the working tree, or a command",
                        "the nearest is main"]),
    (["HEAD", ""], ["B, '', is no commit of "]),
    (["HEAD", "HEAD:data"], ["B, 'HEAD:data', is no commit of "]),
    (["HEAD"], ["required: B"]),
    (["HEAD", "HEAD", "--rounds", "1"], ["--rounds 1 gives no interval, expected 2 or more"]),
    (["HEAD", "HEAD", "--rounds", "x"], ["x is not a whole number of at least 1"]),
    (["HEAD", "HEAD", "--skip", "-1"], ["--skip -1 is below 0"]),
    (["HEAD", "HEAD", "--cool", "-1"], ["-1 is not a number of seconds"]),
    (["HEAD", "HEAD", "--timeout", "nan"], ["nan is not a number of seconds"]),
    (["HEAD", "HEAD", "--json", "no/such/file"], ["cannot write no/such/file, expected a file in a writable folder"]),
    (["HEAD", "HEAD", "--command", "python 'x"], ["\"python 'x\" is no command, expected words"]),
    (["HEAD", "HEAD", "--json", "data"], ["cannot write data, expected a file in a writable folder"]),
    (["HEAD", "HEAD", "--command", " "], ["' ' is no command, expected words"]),
    (["HEAD", "HEAD", "--rouns", "3"], ["unrecognized arguments: --rouns 3"]),
    (["HEAD", "no-such-program --x"], ["B in round 1: cannot start no-such-program: No such file"]),
    (["HEAD", "HEAD", "--skip", "40"], ["--skip 40 leaves none of 40 steps; the nearest is --skip 39"])])
def test_bad_input_is_one_line(repository, arguments, parts):
    line = refused(*arguments, *["--command", "python train_gpt2.py"] * ("--command" not in arguments))
    assert all(part in line for part in parts), line
    assert is_clean(repository)


def test_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for word in ("HEAD", "."):
        assert "cannot be looked up: git rev-parse says: fatal: not a git repository" in refused(word, "a b")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not installed" in refused("HEAD", "a b")


def test_a_program_is_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 'step:5/9 val_loss:3.0 train_time:100ms step_avg:20ms'\n")
    program.chmod(0o755)
    bench.main([str(program), "./program", "--rounds", "2", "--skip", "1"])
    assert "verdict: inside the noise\n" in capsys.readouterr().out


def test_a_failing_run_is_named_with_its_last_words(planned):
    Path("planned.py").write_text("import os, sys\nprint('first\\nlast', file=sys.stderr)\n"
                                  "if os.path.exists('once'):\n    os.kill(os.getpid(), 9)\nopen('once', 'w')\n"
                                  "print('step:40/40 train_loss:1 train_time:9ms step_avg:9ms')")
    line = refused(*PAIR)
    assert line == ("B in round 1 (python planned.py B) ended with status 137, expected 0; it said: last; its command: "
                    "python planned.py B")


def test_what_torchrun_adds_is_left_out():
    text = ("W1125 02:11:18 1 torch/distributed/run.py:851] Setting OMP_NUM_THREADS\nno shard matches x\n"
            "W1125 02:11:19 1 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 2 SIGTERM\n"
            "E1125 02:11:19 1 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)\nTraceback\n"
            "  raise ChildFailedError(\n======\n")
    assert bench.last_words(text, "printed") == "no shard matches x"
    assert bench.last_words("\n", "printed\n") == "printed"
    assert bench.last_words("", "") == "nothing"


def test_a_run_that_takes_too_long_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin = time.monotonic()
    line = refused("true", "sh -c 'sleep 60 & echo $! >child; wait'", "--timeout", "0.5")
    assert line.startswith("B in round 1 was still running after 0.5 s, so it was ended; expected less: ")
    assert time.monotonic() - begin < 10
    stat = Path("/proc", Path("child").read_text().strip(), "stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    else:
        raise AssertionError("what the run had started is still there")


def test_a_run_that_does_not_end_when_asked_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "GRACE", 0.3)
    begin = time.monotonic()
    assert "still running" in refused("true", "sh -c 'trap : TERM; sleep 50 & wait; sleep 50'", "--timeout", "0.3")
    assert time.monotonic() - begin < 10


# The machine.

SMI = """#!/bin/sh
case "$*" in
*clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2 ;;
*--query-gpu=index*)
    echo '0, NVIDIA H100 80GB HBM3, 580.65.06, 1755, 1980, 2619, 2619, 700.00, 41, 0x0000000000000001'
    echo '1, NVIDIA H100 80GB HBM3, 580.65.06, 345, 1980, 2619, 2619, 500.00, 84, 0x0000000000000024' ;;
*topo*) printf '\\033[4m\\tGPU0\\tGPU1\\033[0m\\nGPU0\\t X \\tNV18\\n' ;;
esac
"""


def test_gpus_are_stated_before_and_after(planned, tmp_path, monkeypatch, capsys):
    (tmp_path / "smi").mkdir()
    smi = tmp_path / "smi" / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    found, _ = planned([lines(100)] * 4)
    first = ("GPU 0: NVIDIA H100 80GB HBM3, driver 580.65.06, SM 1755 of 1980 MHz, memory 2619 of 2619 MHz, power "
             "limit 700.00 W, 41 degrees, not throttled")
    second = ("GPU 1: NVIDIA H100 80GB HBM3, driver 580.65.06, SM 345 of 1980 MHz, memory 2619 of 2619 MHz, power "
              "limit 500.00 W, 84 degrees, is held back by its power limit, is slowed down by heat")
    assert found["machine"][1:] == [first, second, "\tGPU0\tGPU1", "GPU0\t X \tNV18"]
    assert found["after"] == [first, second]
    out = capsys.readouterr().out
    assert out.index(first) < out.index("A in round 1") < out.index(f"after: {first}")
    smi.write_text("#!/bin/sh\necho broken driver\nexit 9\n")
    Path("order.txt").unlink()
    found, _ = planned([lines(100)] * 4)
    assert "nvidia-smi gives no answer: " in found["after"][0] and "broken driver" in found["after"][0]


def test_commits_run_what_the_machine_can(monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 8)
    assert bench.parse(["A", "B"]).command.startswith("torchrun --standalone --nproc_per_node=8 train_gpt2.py --steps ")
    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 0)
    assert bench.parse(["A", "B"]).command.startswith("python train_gpt2.py --preset tiny --steps ")
    assert bench.parse(["A", "B", "--command", "x y"]).command == "x y"
