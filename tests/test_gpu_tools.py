"""What is run on a machine with a GPU, tried without one: tests/gpu.sh, records/kernels.py."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools import RECIPE, ROOT, command

from train_gpt2 import Refusal

sys.path.insert(0, str(ROOT / "records"))
import kernels

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
    (tmp_path / "records" / "bench.py").write_text(
        "import sys\nprint(sys.argv[1:])\nprint('verdict: B is faster by 2.000 ms, 2.00 %')\n")
    (tmp_path / "peers" / "small.args").write_text("--peer\n12\na b.txt\n")
    done, rows = gpu_script(tmp_path / "tests" / "gpu.sh", "--device", "cpu", "--patience", "0.06",
                            "--out", tmp_path / "out", "--peers", tmp_path / "peers")
    assert done.returncode == 1, done.stdout + done.stderr
    assert {name: line.split()[1] for name, line in rows.items()} == {
        "tests": "ok", "time-five-minute": "TIMEOUT", "time-gpt2": "FAILED", "time-gpt2-warm": "ok",
        "training": "skipped", "kernels": "ok", "peers-small": "ok", "logs": "in"}
    for name, said in (("time-five-minute", ""), ("time-gpt2", "no such kernel")):
        assert f"see {tmp_path / 'out' / name}.log: {said}" in done.stdout
    assert "compiled in 7.5 s;ms/step 12.50 3.00" in rows["time-gpt2-warm"]
    assert "B is faster by 2.000 ms, 2.00 %" in rows["peers-small"]
    assert "'--peer', '12', 'a b.txt', '--corpus'" in (tmp_path / "out" / "peers-small.log").read_text()


@pytest.mark.parametrize(("options", "needle"), [
    (["--devise", "cpu"], "unknown option --devise"), (["--device", "tpu"], "give --device cpu"),
    (["--out"], "--out needs a value"), (["--corpus", "/nowhere"], "/nowhere is no folder"),
    (["--patience", "long"], "for example --patience 2")])
def test_gpu_script_refuses_in_one_line(options, needle):
    done, _ = gpu_script(ROOT / "tests" / "gpu.sh", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and needle in done.stderr


def test_kernels_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit) as ended:
        kernels.main(["--help"])
    assert not ended.value.code and "--stage" in capsys.readouterr().out
