"""records/bench.py, with stand-ins for training that print or write what they are told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))
import bench
from report import UserError


def lines(milliseconds: float, loss: float = 4.0) -> str:
    """A log whose first ten steps take a second longer."""
    return "".join(f"step:{step}/40 {'val' if step == 40 else 'train'}_loss:{loss:.4f} "
                   f"train_time:{milliseconds * step + 1000 * (step > 0):.0f}ms step_avg:1ms\n"
                   for step in range(0, 41, 10))


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A function: compare runs that print these texts in turn. Returns what --json holds, and who ran when."""
    monkeypatch.chdir(tmp_path)
    Path("next.py").write_text("import sys\nbefore = open('order', 'a+')\nbefore.seek(0)\n"
                               "print(open(f'{len(before.read())}').read())\nbefore.write(sys.argv[1])\n")

    def compare(*texts: str) -> tuple[dict, str]:
        for number, text in enumerate(texts):
            Path(str(number)).write_text(text)
        bench.main(["python next.py A", "python3 next.py B", "--rounds", str(len(texts) // 2), "--json", "found.json"])
        return json.loads(Path("found.json").read_text()), Path("order").read_text()
    return compare


def test_differences_are_within_rounds(planned, capsys):
    a, b = [102.0, 104.0, 99.0, 101.0], [100.0, 101.5, 97.5, 98.0]
    found, order = planned(*map(lines, (a[0], b[0], b[1], a[1], a[2], b[2], b[3], a[3])))
    assert order == "ABBAABBA" and found["measure"] == bench.PER_STEP
    assert [run["times"][bench.PER_STEP] for run in found["runs"]["A"]] == pytest.approx(a)
    low, high = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert found["difference_ms"] == pytest.approx({"mean": -2.25, "low": low, "high": high})
    assert f"B - A in ms per step: -2.250, 95 % interval {low:+.3f} to {high:+.3f}; -2.22 % of A\nverdict: " in (
        capsys.readouterr().out)


@pytest.mark.parametrize(("first", "second", "verdict"), [
    (lines(100), lines(104), "times differ inside the noise; all losses are equal"),
    (lines(103), lines(103.5, 3.9), "A is faster by 3.250 ms, 3.25 %; losses differ inside the noise"),
    (lines(90, 4.1), lines(90, 4.1), "B is faster by 10.000 ms, 10.00 %; B has the higher loss, by 0.1000"),
    (lines(90), lines(90, float("nan")), "B is faster by 10.000 ms, 10.00 %; not every run has a finite loss")])
def test_the_verdict(planned, first, second, verdict):
    assert planned(lines(100), first, second, lines(100))[0]["verdict"] == verdict
    assert "NaN" not in Path("found.json").read_text(), "which JSON has not"


@pytest.mark.parametrize("rounds", [2, 3, 6])
def test_a_steady_drift_of_the_machine_cancels(planned, rounds):
    """Each run is 2 ms slower than the one before; B takes 5 ms more than A."""
    labels = ("ABBA" * rounds)[:2 * rounds]
    found, order = planned(*(lines(100 + 2 * turn + 5 * (label == "B")) for turn, label in enumerate(labels)))
    assert order == labels and found["difference_ms"]["low"] < 5 < found["difference_ms"]["high"]
    assert found["difference_ms"]["mean"] == pytest.approx(5 + (2 / rounds if rounds % 2 else 0))


def test_without_lines_the_whole_command_is_timed(planned):
    found, _ = planned(lines(100), "no step", "", lines(100))
    assert found["measure"] == bench.WHOLE and "difference_loss" not in found
    bench.main(["sleep 0.15", "sleep 0.05", "--rounds", "2", "--json", "found.json"])
    assert json.loads(Path("found.json").read_text())["difference_ms"]["mean"] == pytest.approx(-100, abs=60)
    before = Path("found.json").read_text()
    with pytest.raises(UserError, match="ended with status 1"):  # what is there stays
        bench.main(["false x", "false x", "--json", "found.json"])
    assert Path("found.json").read_text() == before


def measured(text: str, skip: int, batch: int = 0, out: Path = Path("nowhere")) -> tuple[dict, float]:
    found = bench.measured(bench.Contender("", [], Path(), out, {}, batch), text, 9.0, skip)
    return {name: pytest.approx(value) for name, value in found["times"].items()}, found["loss"]


def test_lines_of_ours_and_of_the_public_speedrun():
    """Its later scripts print no training loss, its earlier ones set the clock back after ten steps."""
    assert measured("noise\n" + lines(100), 10) == ({bench.WHOLE: 9000, bench.PER_STEP: 100}, 4)
    assert measured(lines(100), 0)[0][bench.PER_STEP] == 125
    text = "\n".join(f"step:{n}/125 train_time:{57 * n + 300}ms step_avg:nanms" for n in range(1, 125))
    assert measured(text + "\nstep:125/125 val_loss:4.6412 train_time:7425ms step_avg:59.41ms", 10, batch=1000) == (
        {bench.WHOLE: 9000, bench.PER_STEP: 57, bench.PER_TOKENS: 57}, 4.6412)
    old = "\n".join(f"step:{n}/30 train_loss:5.0 train_time:{9000 * n if n < 11 else 150 * (n - 10)}ms step_avg:nanms"
                    for n in range(1, 31))
    assert measured(old, 0) == ({bench.WHOLE: 9000, bench.PER_STEP: 150}, 5)


def test_metrics_count_before_lines_and_later_records_take_back_earlier_ones(tmp_path):
    records = [(step, "train_loss", 5, 0.1 * step) for step in range(1, 7)] + [(6, "val_loss", 5, 0.6)]
    records += [(4, "train_loss", 4, 0.8), (5, "train_loss", 4, 1.0), (5, "val_loss", 3, 1.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "tokens": 500 * step, kind: loss, "train_time_s": seconds}) + "\n"
        for step, kind, loss, seconds in records))
    assert measured(lines(7), 3, out=tmp_path) == ({bench.WHOLE: 9000, bench.PER_STEP: 350, bench.PER_TOKENS: 700}, 3)


TRAINER = """import glob, json, os, sys
out, files = sys.argv[sys.argv.index("--out") + 1], [word.partition("=")[2] for word in sys.argv if "-files=" in word]
data = [open(path).read() for pattern in files or ["data/text/*.bin"] for path in glob.glob(pattern)]
with open(os.environ["NOTES"], "a") as file:
    print(json.dumps([os.getcwd(), sys.executable, os.environ["VIRTUAL_ENV"], data, sys.argv[1:]]), file=file)
os.makedirs(out + "/run")
with open(out + "/run/metrics.jsonl", "w") as file:
    for step in (20, 40):
        print(json.dumps({"step": step, "tokens": step, "train_loss": 4, "train_time_s": step * MS / 1000}), file=file)
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits, the second faster, with data that git does not track; this process stands in it."""
    folder = tmp_path / "a repository"
    (folder / "data" / "text").mkdir(parents=True)
    (tmp_path / "temporary").mkdir()
    (folder / ".gitignore").write_text("data/*/\n")
    (folder / "data" / "prepare.py").touch()
    (folder / "data" / "text" / "train.bin").write_text("tokens")
    git = ("git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false")
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    for milliseconds in (100, 90):
        (folder / "train_gpt2.py").write_text(TRAINER.replace("MS", str(milliseconds)))
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", f"takes {milliseconds}"], check=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(bench.tempfile, "tempdir", None)  # which was looked up before
    return folder


def nothing_is_left(folder: Path) -> bool:
    status = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, check=True).stdout
    return not status and not list((folder.parent / "temporary").iterdir())


def notes(folder: Path) -> list[list]:
    return [json.loads(line) for line in (folder.parent / "notes").read_text().splitlines()]


def test_commits_run_in_clones_and_the_working_tree_in_place(repository, capsys):
    command = ("--rounds", "2", "--command", "python train_gpt2.py --seed {seed}")
    bench.main(["HEAD~1", "main", *command])
    out = capsys.readouterr().out
    assert " takes 100\n" in out and " takes 90\n" in out and "verdict: B is faster by 10.000 ms, 10.00 %" in out
    assert nothing_is_left(repository)
    (repository / "train_gpt2.py").write_text(TRAINER.replace("MS", "50"))
    bench.main(["HEAD", ".", *command])
    out = capsys.readouterr().out
    assert "takes 90 (without the changes to 1 file(s)" in out and "takes 90 (with the changes to 1 file(s)" in out
    assert "verdict: B is faster by 40.000 ms" in out
    places = [Path(note[0]) for note in notes(repository)]
    assert places[0] == places[3] != places[1] == places[2] and places[5] == places[6] == repository
    assert repository not in {place for clone in places[:5] for place in (clone, *clone.parents)}
    assert [note[4][:2] for note in notes(repository)] == [["--seed", seed] for seed in "11221122"]
    assert all(note[1:4] == [sys.executable, sys.prefix, ["tokens"]] for note in notes(repository))


def test_nothing_is_left_after_a_signal(repository):
    (repository.parent / "wait.py").write_text(
        "import os, time\nopen(os.environ['NOTES'], 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, ROOT / "records" / "bench.py", "HEAD", "HEAD~1", "--command",
                                f"python {repository.parent / 'wait.py'}"], stderr=subprocess.PIPE, text=True)
    deadline, pid = time.monotonic() + 60, repository.parent / "notes"
    while not (pid.exists() and pid.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and error == "" and nothing_is_left(repository)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# A script with what the patches of record 12 look for. Its clock begins anew after ten steps.
PEER = """import glob, os
import torch
class Settings:
    num_iterations : int = 1875
    warmdown_iters : int = 562
    val_loss_every : int = 125
    val_tokens : int = 99
    files = [glob.glob(f) for f in ('data/fineweb10B/fineweb_train_*.bin', 'data/fineweb10B/fineweb_val_*.bin')]
class F:
    rms_norm, size = lambda x, shape, eps=0: eps, abs
q, frac = F, 0.5
descent_tuning = True
assert (descent_tuning, F.rms_norm(q, (q.size(-1),))) == (False, 2**-7) and (1 - frac) * 0.85 + frac * 0.95 == 0.95
assert (Settings.num_iterations, Settings.warmdown_iters, Settings.val_tokens) == (50, 15, 1048576)
assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]
assert [len(files) for files in Settings.files] == [1, 1]
for step in range(0, 51, Settings.val_loss_every):
    print(f"step:{step}/50 val_loss:{3 + torch.seed / 10} train_time:{max(0, step - 10) * 524.288}ms step_avg:nanms")
"""


def test_our_script_against_a_patched_script_out_of_a_log(repository, monkeypatch, capsys):
    log, rule, corpus = repository.parent / "log.txt", "=" * 100, repository.parent / "corpus"
    log.write_text(f"{rule}\n{PEER}{rule}\nRunning pytorch\n{rule}\nstep:0/9 val_loss:1 train_time:5ms step_avg:5ms\n")
    corpus.mkdir()
    for name in ("a_train_1.bin", "a_val_0.bin", "torch.py"):
        (corpus / name).write_text("def manual_seed(number):\n    global seed\n    seed = number\n")
    monkeypatch.setenv("PYTHONPATH", str(corpus))
    monkeypatch.setattr(bench, "TRAINER", repository / "train_gpt2.py")
    bench.main(["--peer", "12", str(log), "--corpus", str(corpus), "--json", "../found.json"])
    found = json.loads(Path("../found.json").read_text())
    assert [run["times"][bench.PER_TOKENS] for run in found["runs"]["B"]] == pytest.approx([1, 1])
    assert [run["loss"] for run in found["runs"]["B"]] == pytest.approx([3.1, 3.2])
    assert found["measure"] == bench.PER_TOKENS and nothing_is_left(repository)
    assert [len(note[3]) for note in notes(repository)] == [2, 2]
    words = " ".join(notes(repository)[1][4])
    assert words.startswith(bench.PEERS["12"][0]) and "--muon-momentum-start 0.95" in words and "--seed 2" in words
    assert "patch of B, 1 times: (descent_tuning = )True" in capsys.readouterr().out
    log.write_text(PEER.replace("* 0.85", "* 0.9"))
    with pytest.raises(UserError, match=r"frac.*, so it is not the script of record 12; give its log"):
        bench.main(["--peer", "12", str(log), "--corpus", str(corpus)])


@pytest.mark.parametrize(("arguments", "needle"), [
    (["mian", "HEAD"], "'mian' is no commit (git says: "), (["HEAD", "HEAD:data"], "'HEAD:data' is no commit"),
    (["HEAD", ""], "'' is no commit"), (["HEAD"], "expected A and B"), (["HEAD", "x", "--rouns", "3"], "--rouns 3"),
    (["HEAD", "HEAD", "--rounds", "1"], "--rounds of at least 2"), (["HEAD", "HEAD", "--skip", "-1"], "below 0"),
    *((["HEAD", "HEAD", "--timeout", value], "to 1e9 seconds") for value in ("nan", "inf", "1e300", "0")),
    (["HEAD", "HEAD", "--command", "python 'x"], "invalid split"),
    (["HEAD", "HEAD", "--command", "sh -c 'echo step:4/4 train_time:9ms step_avg:9ms'"], "--skip 10 leaves none of 4"),
    (["--peer", "13", "log.txt", "--corpus", "."], "--peer with 12 or 28"), (["--peer", "12", "log.txt"], "--corpus"),
    (["HEAD", "HEAD", "--command", "python no.py"], "A in round 1 ended with status 2"),
    (["true x", "sh -c 'trap \"\" TERM; sleep 50 & echo $! >../child; wait'", "--timeout", "0.3"], "1 still ran")])
def test_bad_input_and_failures_are_one_line_and_leave_nothing(repository, monkeypatch, arguments, needle):
    monkeypatch.setattr(bench, "GRACE", 0.2)
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        bench.main(arguments)
    assert time.monotonic() - begin < 20
    assert needle in str(caught.value) and "\n" not in str(caught.value)
    assert nothing_is_left(repository)
    if Path("../child").exists():
        stat = Path("/proc", Path("../child").read_text().strip(), "stat")
        assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_gpus_and_what_commits_run_on_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 8)
    assert bench.options_of(["A", "B"]).command[:3] == ["torchrun", "--standalone", "--nproc_per_node=8"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n[ $1 = topo ] && printf '\\033[4mGPU0\\033[0m\\n' || echo 1 MHz\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    waited = []
    monkeypatch.setattr(bench.time, "sleep", waited.append)
    monkeypatch.setattr(bench.sys, "executable", "/bin/true")  # stands for python
    bench.main(["python x", "python3 x", "--rounds", "2", "--cool", "2.5"])
    assert waited == [0, 2.5, 2.5, 2.5]
    assert capsys.readouterr().out.count("1 MHz\nGPU0\n") == 2, "before and after"
