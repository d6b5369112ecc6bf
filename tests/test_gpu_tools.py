"""What is run on a machine with a GPU, tried without one: tests/gpu.sh, records/kernels.py, records/side_by_side.py."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools import RECIPE, ROOT, SMALL, command

import train_gpt2
from train_gpt2 import Refusal

sys.path.insert(0, str(ROOT / "records"))
import kernels
import side_by_side

RULE = "=" * 100 + "\n"


# ---- kernels ---------------------------------------------------------------------------------------------------------


def event(name: str, begin: float, length: float, thread: int = 1, kind: str = "cpu_op", launch: int | None = None):
    return {"ph": "X", "name": name, "cat": kind, "pid": 0, "tid": thread, "ts": begin, "dur": length,
            "args": {} if launch is None else {"correlation": launch}}


def test_an_event_is_charged_without_those_within_it():
    """On the same thread, at any depth; what follows at once or runs on another thread is no part of it."""
    events = [event("c", 20, 10), event("b", 10, 30), event("a", 0, 100), event("d", 40, 20),
              event("e", 5, 50, thread=2), event("a", 100, 7)]
    assert sorted(kernels.own_times(events)) == [("a", 7), ("a", 50), ("b", 20), ("c", 10), ("d", 20), ("e", 50)]


def test_busy_time_counts_every_moment_once():
    events = [event("a", 0, 10), event("b", 5, 10, thread=2), event("c", 6, 2, thread=3), event("d", 30, 5)]
    assert kernels.busy_time(events) == 20


def test_kernels_count_by_when_they_were_launched():
    """Two steps between 1,000 and 2,000 us. A kernel of the steps before still runs then; the last of theirs ends after
    the host has gone on. Copies count, the marks that the profiler draws on the device's own row do not."""
    def launched(name: str, launch: int, at: float, begin: float, length: float, kind: str = "kernel") -> list:
        return [event("cudaLaunchKernel", at, 1, kind="cuda_runtime", launch=launch),
                event(name, begin, length, thread=7, kind=kind, launch=launch)]

    trace = {"traceEvents": [
        {"ph": "M", "name": "process_name"}, event(kernels.COUNTED, 1000, 1000, kind="user_annotation"),
        event(kernels.COUNTED, 1100, 2000, thread=7, kind="gpu_user_annotation"),
        event("aten::mm", 1005, 3), event("aten::item", 1500, 10), event("aten::item", 2500, 10),
        event("cudaStreamSynchronize", 1501, 8, kind="cuda_runtime", launch=90),
        *launched("before", 1, 900, 1100, 100), *launched("gemm", 2, 1010, 1200, 400),
        *launched("gemm", 3, 1020, 1700, 200), *launched("Memcpy", 4, 1600, 1900, 100, "gpu_memcpy"),
        *launched("tail", 5, 1990, 2900, 100), *launched("after", 6, 2100, 3000, 100)]}
    figures = kernels.summary(trace, steps=2)
    assert figures["kind"] == "kernel" and figures["ms"] == 0.9  # from 1,200 to 3,000
    assert figures["idle share"] == pytest.approx(1 - 800 / 1800)
    assert figures["host waits"] == {"aten::item": 0.5, "cudaStreamSynchronize": 0.5}
    assert [(k["name"], k["ms"], k["calls"]) for k in figures["costliest"]] == [
        ("gemm", 0.3, 1.0), ("Memcpy", 0.05, 0.5), ("tail", 0.05, 0.5)]
    assert figures["costliest"][0]["share"] == pytest.approx(600 / 1800)
    text = kernels.text_of(figures)
    assert re.search(r"^gemm +0\.300 +33\.3 % +1$", text, re.MULTILINE)
    assert "step 0.90 ms, idle 55.6 %, 2 kernels of 3 names" in text and "aten::item 0.5" in text


def test_operators_of_a_step_on_a_cpu(corpus, tmp_path, capsys):
    """Two steps of the last stage, of which one has Adam's updates."""
    path = tmp_path / "trace.json.gz"
    figures = kernels.main([*command(corpus, RECIPE, layers=2, tokens_per_step=256, row_tokens=128,
                                     short_layers="1", paired_layers="0", backout="0",
                                     attention_free="none", value_layers="1", gated_skip="none"), f"--trace={path}"])
    said = capsys.readouterr().out
    assert figures["kind"] == "operator" and len(figures["costliest"]) == 10
    assert {"aten::mm", "aten::mul"} <= {one["name"] for one in figures["costliest"]}
    times = [one["ms"] for one in figures["costliest"]]
    assert times == sorted(times, reverse=True) and 0 < sum(times) < 1.01 * figures["ms"]
    assert 0 <= figures["idle share"] < 0.7 and "stage 2" in said and str(path) in said
    with gzip.open(path, "rt") as file:
        trace = json.load(file)["traceEvents"]
    mark, = [one for one in trace if one["name"] == kernels.COUNTED]
    backwards = [one for one in trace if one["name"] == "aten::_scaled_dot_product_flash_attention_for_cpu_backward"]
    inside = [one for one in backwards if mark["ts"] < one["ts"] < mark["ts"] + mark["dur"]]
    assert 0 < 2 * len(inside) == len(backwards)  # as many steps before as there are that count


@pytest.mark.parametrize(("arguments", "needle"), [
    (["--stage", "-1"], "--stage -1 is neither a number"), (["--stage", "first"], "the nearest is --stage last"),
    (["--preset", "tiny", "--device", "cpu", "--stage", "4"], "stage 4 has no step in this run"),
    (["--stage"], "--stage needs a value"), (["--trace", "/nowhere/at/all.gz"], "cannot write /nowhere"),
    (["--stagge", "1"], "unknown option")])
def test_kernels_refuses_in_one_line(arguments, needle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal) as refused:
        kernels.main(arguments)
    assert needle in str(refused.value) and "\n" not in str(refused.value)


# ---- side by side ----------------------------------------------------------------------------------------------------

# A script as the speedrun has them: its log begins with itself, its clock begins anew after ten steps.
PEER = '''
import glob, os, sys, time
code = open(sys.argv[0]).read()
updates, pause = 1000, 0
assert len(glob.glob("data/fineweb10B/fineweb_train_*.bin")) == 3 and len(glob.glob("data/fineweb10B/*_val_*")) == 2
assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]
rule = "=" * 100
os.makedirs("logs", exist_ok=True)
log = open("logs/a.txt", "w", buffering=1)
print(rule, code + rule, "Running pytorch 2.6.0", rule, sep="\\n", file=log)
for step in range(updates + 1):
    late = max(0, step - 10)
    if step % 10 == 0:
        mean = f"{40 if late else float('nan'):.2f}"
        losses = f"val_loss:{6 - step / 10:.4f} train_time:{40 * late}ms"
        print(f"step:{step}/{updates} {losses} step_avg:{mean}ms", file=log)
    time.sleep(pause)
'''


def compared(tmp_path: Path, corpus: Path, *options: str) -> tuple[int, Path]:
    """Status and entry."""
    entry = tmp_path / "entry"
    return side_by_side.main(["--corpus", str(corpus), "--out", str(entry), "--work", str(tmp_path / "work"),
                              *options]), entry


def test_ours_and_another_side_by_side(tmp_path, corpus, capsys):
    """The other one is cut out of a log."""
    (tmp_path / "log.txt").write_text(f"{RULE}{PEER}{RULE}Running pytorch 2.6.0\n{RULE}"
                                      "step:0/9 train_time:5ms step_avg:5ms\n")
    ours = " ".join(command(corpus, {**SMALL, "steps": 10, "val_every": 5, "val_tokens": 500})[3:])
    status, entry = compared(tmp_path, corpus, "--ours", f"ours={ours}", "--peer", f"other={tmp_path / 'log.txt'}",
                             "--batch", "other=2000", "--replace", r"other:^(updates, pause = )\d+=>\g<1>30")
    assert status == 0
    mine, other = json.loads((entry / "figures.json").read_text())
    assert mine["run"] == "ours-0" and [p["tokens"] for p in mine["points"]] == [0, 5 * 1024, 10 * 1024]
    # ten steps before its clock began, at the 40 ms of the others
    assert [p["seconds"] for p in other["points"]] == pytest.approx([0, 0.4, 0.8, 1.2])
    assert [p["tokens"] for p in other["points"]] == [0, 20_000, 40_000, 60_000]
    assert other["ms per 1000 tokens"] == pytest.approx(20)
    text = (entry / "README.md").read_text()
    assert "21,000 training and 2,700 validation tokens" in text and f"torch {train_gpt2.torch.__version__}" in text
    assert r"`^(updates, pause = )\d+` by `\g<1>30` (1)" in text and "the clock began after 10 steps" in text
    row, = [line.split("|") for line in text.splitlines() if line.startswith("| other-0")]
    assert "loss at 10,240 tokens" in text and float(row[7]) == pytest.approx(6 - 10_240 / 20_000, abs=1e-4)
    kept = {str(path.relative_to(entry)) for path in entry.rglob("*") if path.is_file()}
    assert kept == {"README.md", "figures.json", "ours-0/log.txt", "ours-0/metrics.jsonl"}
    written = "".join((entry / name).read_text() for name in kept)
    assert str(tmp_path) not in written and "class GPT" in written and "code = open" not in written
    assert "other-0: status 0, 4 losses" in capsys.readouterr().out


def test_what_was_logged_before_the_limit_counts_and_rounds_alternate(tmp_path, corpus):
    (tmp_path / "slow.py").write_text(PEER.replace("pause = 1000, 0", "pause = 1000, 0.02"))
    (tmp_path / "fast.py").write_text(PEER.replace("pause = 1000, 0", "pause = 30, 0"))
    status, entry = compared(tmp_path, corpus, "--limit", "2", "--rounds", "2", *(
        word for name in ("slow", "fast") for word in (f"--peer={name}={tmp_path / name}.py", f"--batch={name}=1000")))
    runs = json.loads((entry / "figures.json").read_text())
    assert status == 0 and [run["run"] for run in runs] == ["slow-0", "fast-0", "slow-1", "fast-1"]
    assert all(20 <= run["points"][-1]["step"] < 1000 for run in runs)
    assert [run["remarks"][:1] == ["ended by --limit"] for run in runs] == [True, False] * 2


def test_what_is_ended_leaves_no_process(tmp_path, corpus):
    """Neither itself nor what it has started."""
    (tmp_path / "peer.py").write_text("import subprocess, time\nchild = subprocess.Popen(['sleep', '60'])\n"
                                      "print(child.pid, flush=True)\ntime.sleep(60)\n")
    begin = time.monotonic()
    status, entry = compared(tmp_path, corpus, "--limit", "1.5", "--peer", f"peer={tmp_path / 'peer.py'}",
                             "--batch", "peer=1")
    output, = (tmp_path / "work").rglob("output.txt")
    assert status == 1 and time.monotonic() - begin < 20 and "ended by --limit" in (entry / "README.md").read_text()
    child = int(output.read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or ") Z " in state.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} still runs")


def test_one_that_fails_is_in_the_table_and_hides_nothing(tmp_path, corpus, capsys):
    script = PEER.replace("updates, pause = 1000", "updates, pause = 20")
    (tmp_path / "good.py").write_text(script)
    (tmp_path / "bad.py").write_text(script + "raise SystemExit('no such kernel')\n")
    status, entry = compared(tmp_path, corpus, *(f"--peer={name}={tmp_path / name}.py" for name in ("bad", "good")),
                             "--batch=bad=1000", "--batch=good=1000")
    text, said = (entry / "README.md").read_text(), capsys.readouterr().out
    assert status == 1 and "no such kernel" in said
    for name, remarks in (("bad", "FAILED, status 1; the clock"), ("good", "the clock")):
        assert re.search(rf"^\| {name}-0 +\| +20 \| 20,000 \| +0.80 .*\| {remarks}", text, re.MULTILINE)


@pytest.mark.parametrize(("options", "needle"), [
    ([], "one or more of --ours and --peer"), (["--peer", "PEER"], "--peer PEER is not NAME=VALUE"),
    (["--peer", "a=PEER"], "--batch a= is not a number"),
    (["--peer", "a=nothing.py", "--batch", "a=1"], "cannot read nothing.py"),
    (["--peer", "a=PEER", "--batch", "a=1", "--replace", "a:no such text=>1"], "changes nothing in PEER"),
    (["--peer", "a=PEER", "--batch", "a=1", "--replace", "a:updates"], "changes nothing in PEER"),
    (["--peer", "a=PEER", "--batch", "a=1", "--replace", "a:(=>1"], "expected a regular expression"),
    (["--peer", "a=PEER", "--batch", "b=1"], "for b, which is no --peer; the nearest is a"),
    (["--ours", "a=--stepz 3"], "unknown option --stepz"), (["--rounds", "0"], "not a whole number"),
    (["--ours", "a=--steps 3", "--peer", "a=PEER", "--batch", "a=1"], "a NAME of its own"),
    (["--ours", "a=--steps 3", "--out", "."], "exists, expected a new folder"),
    (["--ours", "a=--steps 3", "--corpus", "."], "expected shards")])
def test_side_by_side_refuses_in_one_line(options, needle, tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("PEER").write_text(PEER)
    with pytest.raises(Refusal) as refused:
        compared(tmp_path, corpus, *options)
    assert needle in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "entry").exists() and not (tmp_path / "work").exists()


# ---- tests/gpu.sh ----------------------------------------------------------------------------------------------------


def gpu_script(script: Path, *options) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """Run it with the Python of these tests; the rows of its table by step."""
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(script), *map(str, options)], env=environment, capture_output=True, text=True,
                          timeout=150, check=False)
    table = done.stdout.partition("\nstep ")[2].splitlines()[1:]
    return done, {line.split()[0]: line for line in table if line[:1].strip()}


def test_gpu_script_in_small(corpus, tmp_path):
    """Its steps as they are, on a CPU: the tools take the options that it gives them, and their figures are found."""
    out = tmp_path / "out"
    done, rows = gpu_script(ROOT / "tests" / "gpu.sh", "--device", "cpu", "--corpus", corpus, "--out", out,
                            "--only", "tests,time-gpt2,training,kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[1] for name, line in rows.items() if name != "logs"] == ["ok"] * 4
    assert "5 passed" in rows["tests"] and "ms/step" in rows["time-gpt2"] and " idle " in rows["kernels"]
    assert re.search(r"5\.\d+ at 0 ms;[\d.]+ at \d+ ms;[\d.]+ at \d+ ms$", rows["training"])
    kept = {path.name for path in out.iterdir()}
    assert {"tests.log", "time-gpt2.log", "gpt2.json", "training.log", "run.txt", "run.jsonl", "kernels.log",
            "kernels.json.gz", "machine.txt", "table.txt"} <= kept
    assert (out / "table.txt").read_text() in done.stdout


def test_gpu_script_goes_on_after_what_fails_or_hangs(tmp_path):
    """All steps with stand-ins for the tools: one fails, one hangs, one comparison goes through."""
    for folder in ("records", "tests", "peers"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "tests" / "gpu.sh", tmp_path / "tests")
    (tmp_path / "tests" / "test_gpu.py").write_text("def test_layouts():\n    pass\n")
    (tmp_path / "records" / "timing.py").write_text(
        "import sys, time\nif 'five-minute' in sys.argv:\n    time.sleep(60)\n"
        "if '--timed-steps' not in sys.argv:\n    sys.exit('no such kernel')\n"
        "print('compiled in 7.5 s, untimed\\nms/step    12.50    3.00')\n")
    (tmp_path / "records" / "kernels.py").write_text("print('step 2.00 ms, idle 5.0 %, 3 kernels')\n")
    (tmp_path / "records" / "side_by_side.py").write_text(
        "import sys\nprint(sys.argv[1:])\nprint('| ours-0 | 20 | 20,480 | 1.49 | 72.801 | 3.2 |')\n")
    (tmp_path / "peers" / "small.args").write_text("--peer\nrecord=a b.py\n")
    done, rows = gpu_script(tmp_path / "tests" / "gpu.sh", "--device", "cpu", "--patience", "0.06",
                            "--out", tmp_path / "out", "--peers", tmp_path / "peers")
    assert done.returncode == 1, done.stdout + done.stderr
    assert {name: line.split()[1] for name, line in rows.items()} == {
        "tests": "ok", "time-five-minute": "TIMEOUT", "time-gpt2": "FAILED", "time-gpt2-warm": "ok",
        "training": "skipped", "kernels": "ok", "peers-small": "ok", "logs": "in"}
    for name, said in (("time-five-minute", ""), ("time-gpt2", "no such kernel")):
        assert f"see {tmp_path / 'out' / name}.log: {said}" in done.stdout
    assert "compiled in 7.5 s;ms/step 12.50 3.00" in rows["time-gpt2-warm"]
    assert "ours-0 72.801 ms per 1,000 tokens" in rows["peers-small"]
    assert "'--peer', 'record=a b.py'" in (tmp_path / "out" / "peers-small.log").read_text()


@pytest.mark.parametrize(("options", "needle"), [
    (["--devise", "cpu"], "unknown option --devise"), (["--device", "tpu"], "give --device cpu"),
    (["--out"], "--out needs a value"), (["--corpus", "/nowhere"], "/nowhere is no folder"),
    (["--patience", "long"], "for example --patience 2")])
def test_gpu_script_refuses_in_one_line(options, needle):
    done, _ = gpu_script(ROOT / "tests" / "gpu.sh", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and needle in done.stderr


@pytest.mark.parametrize(("tool", "needle"), [(kernels, "--stage"), (side_by_side, "r28")])
def test_the_tools_say_how_they_are_used(tool, needle, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert not ended.value.code and needle in capsys.readouterr().out
