"""A run that is stopped, killed, or out of luck goes on from its last checkpoint as if nothing had happened."""

import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint_worker
import train_gpt2
from tools import (
    RECIPE,
    ROOT,
    SMALL,
    command,
    losses,
    metrics,
    run_folders,
    run_here,
    runs_by_settings,
    start,
    torchrun,
    weights,
    write_corpus,
    write_shard,
)
from train_gpt2 import Refusal

sys.path.insert(0, str(ROOT / "evals"))
import sample  # noqa: E402

WORKER = Path(checkpoint_worker.__file__)
SAVING = {"save_every": 1, "keep": 100}
# Stages begin after 3, 6 and 9 steps; embedding and head are untied after 8; steps 2, 4, 6, 8 and 10 can be saved.
WHOLE = {**RECIPE, "tokens_per_step": "256,512,768", "val_tokens": 1000, "val_every": 4, **SAVING}
DROP = {**WHOLE, "repeat": True}  # the shards are used up in the last stage
SHUFFLED = {**WHOLE, "repeat": True, "shuffle": True, "seed": 3}
CONTINUE = {**WHOLE, "long_documents": "continue", "cross_document": False}
THIRDS = {**WHOLE, "adam_every": 3, "shuffle": True}  # saved where the stages begin; untied after the last of those
NARROW = {**SHUFFLED, "dtype": "bfloat16"}  # matrices in two halves, the lower one beside the optimizer
FIVE = {**SMALL, "shuffle": True, "val_every": 3, "val_tokens": 1000, **SAVING}
FIVE_NARROW = {**SMALL, "dtype": "bfloat16", "repeat": True, **SAVING}
RECIPES = {"drop": DROP, "shuffled": SHUFFLED, "continue": CONTINUE, "thirds": THIRDS, "narrow": NARROW,
           "five-minute": FIVE, "five-minute narrow": FIVE_NARROW}
# Eight rows in each step for up to eight processes, in double precision.
SHARED = {**RECIPE, "dtype": "float64", "shuffle": True, "repeat": True, "steps": 8, "tied_until": 0.5, "val_every": 3,
          "val_tokens": 1000, "layers": 11, **SAVING}
KILLED = {**SMALL, "tokens_per_step": 512, "steps": 12, "val_every": 5, "val_tokens": 1000, "save_every": 2,
          "resume": "auto", "patience": 60}


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """A function: the unbroken run of one process with these settings, its checkpoints kept."""
    return runs_by_settings(corpus, tmp_path_factory.mktemp("unbroken"))


def checkpoint(run: Path, step: int) -> Path:
    return run / f"checkpoint_{step:07}.pt"


def saved_steps(run: Path) -> list[int]:
    return [int(path.stem.removeprefix("checkpoint_")) for path in train_gpt2.checkpoints(run)]


def resumed(path: Path, out: Path, **changes) -> Path:
    """Go on in this process from a checkpoint that has later ones beside it: a new folder below `out`."""
    settings = {"resume": path, "out": out, **changes}
    train_gpt2.main([f"--{name.replace('_', '-')}={value}" for name, value in settings.items()])
    run, = run_folders(out)
    return run


def cut_off(run: Path, step: int, out: Path) -> Path:
    """A copy of a run as a kill after this step's checkpoint, and some steps more, would have left it."""
    copy = out / run.name
    copy.mkdir(parents=True)
    for path in [run / "log.txt", run / "metrics.jsonl", *train_gpt2.checkpoints(run)]:
        if not path.stem.startswith("checkpoint") or path <= checkpoint(run, step):
            shutil.copy(path, copy)
    return copy


def without_times(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in ("train_time_s", "peak_memory_mib")}
            for record in records]


def assert_unbroken(run: Path, expected: Path, tolerance: float = 0) -> None:
    """The same parameters and losses, bit by bit or within a tolerance; every record once; a clock that goes on."""
    ours, theirs, found, wanted = weights(run), weights(expected), metrics(run), metrics(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    if tolerance:
        assert [list(record) for record in found] == [list(record) for record in wanted]
        for one, other in zip(without_times(found), without_times(wanted), strict=True):
            assert one == pytest.approx(other, rel=tolerance)
    else:
        assert without_times(found) == without_times(wanted)
    times = [record["train_time_s"] for record in found]
    assert times == sorted(times) and times[-1] > times[0]


def refused(*arguments) -> str:
    """The one line with which this command line ends."""
    with pytest.raises(Refusal) as refusal:
        train_gpt2.main([str(argument) for argument in arguments])
    line = str(refusal.value)
    assert line and "\n" not in line
    return line


def last_line(run: Path) -> str:
    return (run / "log.txt").read_text(encoding="utf-8").splitlines()[-1]


def command_of(text: str) -> list[str]:
    """The options of the command line that a message ends with or holds."""
    return shlex.split(re.search(r"go on with: python \S*train_gpt2\.py ([^;\n]*)", text)[1])


def finite(path: Path) -> bool:
    saved = train_gpt2.read_saved(path)
    return all(tensor.isfinite().all() for tensor in (*saved["weights"].values(), *saved["state"].values()))


# ----------------------------------------------------------------------------------------------------------------------
# Exactness on one process


def test_the_recipe_under_test_has_every_border():
    for settings, borders, last_tied in ((WHOLE, [3, 6, 9], 7), (THIRDS, [3, 6, 9], 8)):
        config = train_gpt2.parse_command_line(command(Path("nowhere"), base=settings))
        assert train_gpt2.stage_borders(config) == borders and train_gpt2.last_tied_step(config) == last_tied
    config = train_gpt2.parse_command_line(command(Path("nowhere"), base=SHARED))
    assert train_gpt2.stage_borders(config) == [2, 4, 6] and train_gpt2.last_tied_step(config) == 3


@pytest.mark.parametrize("name, steps", [("drop", [2, 4, 6, 8, 10]), ("thirds", [3, 6, 9]),
                                         ("five-minute", [1, 2, 3, 4, 5, 6, 7])])
def test_saved_whenever_no_gradient_waits_for_adam(unbroken, name, steps):
    assert saved_steps(unbroken(RECIPES[name])) == steps


@pytest.mark.parametrize("every, steps", [(3, [4, 8]), (5, [6]), (6, [6]), (10, [10]), (12, []), (100, [])])
def test_save_every_is_rounded_up_to_where_adam_is_due(corpus, tmp_path, every, steps):
    assert saved_steps(run_here(corpus, base=WHOLE, save_every=every, out=tmp_path)) == steps


@pytest.mark.parametrize("name, steps", [
    ("drop", (2, 6, 8, 10)), ("shuffled", (4, 6, 10)), ("continue", (8,)), ("thirds", (3, 6, 9)), ("narrow", (4, 10)),
    ("five-minute", (1, 3, 7)), ("five-minute narrow", (5,))])
def test_a_resumed_run_equals_the_unbroken_one(unbroken, tmp_path, name, steps):
    run = unbroken(RECIPES[name])
    for step in steps:
        again = resumed(checkpoint(run, step), tmp_path / str(step))
        assert_unbroken(again, run)
        before = [record for record in metrics(run) if record["step"] <= step]
        assert metrics(again)[:len(before)] == before  # the records so far were copied, with their times
        assert all(record["train_time_s"] > before[-1]["train_time_s"] for record in metrics(again)[len(before):])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_can_be_resumed_at_each_of_its_steps(unbroken, tmp_path, name):
    run = unbroken(RECIPES[name])
    assert len(saved_steps(run)) >= 3
    for step in saved_steps(run):
        assert_unbroken(resumed(checkpoint(run, step), tmp_path / str(step)), run)


def test_saving_changes_nothing(corpus, unbroken, tmp_path, monkeypatch):
    run = unbroken(DROP)
    monkeypatch.setattr(train_gpt2, "save_checkpoint", lambda *_, **__: pytest.fail("saved"))
    plain = run_here(corpus, base=DROP, save_every=0, out=tmp_path)
    assert_unbroken(plain, run)
    assert saved_steps(plain) == [] and "checkpoint_" not in (plain / "log.txt").read_text().split("=" * 100)[1]


def test_the_last_checkpoint_goes_on_in_its_own_folder(unbroken, tmp_path):
    """Cut back to the checkpoint: the records of steps that are taken again, and one that a crash has cut off."""
    run = unbroken(SHUFFLED)
    copy = cut_off(run, 4, tmp_path)
    (copy / "checkpoint_0000006.123.partial").write_bytes(b"half")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "tok')
    train_gpt2.main([f"--resume={copy}"])
    assert run_folders(tmp_path) == {copy}
    assert_unbroken(copy, run)
    assert saved_steps(copy) == [2, 4, 6, 8, 10] and not list(copy.glob("*.partial"))
    text = (copy / "log.txt").read_text(encoding="utf-8")
    assert "resumed after step 4 from" in text and text.count('"""Train a GPT-2-class model') == 1


def test_a_run_resumed_twice(unbroken, tmp_path):
    run = unbroken(SHUFFLED)
    first = resumed(checkpoint(run, 2), tmp_path / "first")
    assert_unbroken(resumed(checkpoint(first, 8), tmp_path / "second"), run)


def test_no_validation_is_doubled_or_lost(unbroken, tmp_path):
    """In a run that goes on where a validation was due."""
    run = unbroken(DROP)
    for record in metrics(resumed(checkpoint(run, 8), tmp_path)), metrics(run):
        assert [line["step"] for line in record if "val_loss" in line] == [0, 4, 8, 12]
        assert [line["step"] for line in record if "train_loss" in line] == list(range(1, 13))


def test_auto_finds_the_newest_checkpoint_of_this_run(corpus, unbroken, tmp_path, capsys):
    """Not that of other settings; what is incidental may differ. Where that run is finished, nothing is left to do."""
    run, other = unbroken(SHUFFLED), unbroken(DROP)
    copy = cut_off(run, 6, tmp_path)
    later = cut_off(other, 8, tmp_path / "other")
    later.rename(tmp_path / "99999999-000000-ffff")
    options = command(corpus, base=SHUFFLED, out=tmp_path, resume="auto", keep=1, patience=60)
    train_gpt2.main(options)
    assert_unbroken(copy, run)
    assert saved_steps(copy) == [10]
    assert "resumed after step 6" in capsys.readouterr().out
    before = run_folders(tmp_path)
    contents = {path: path.read_bytes() for path in copy.iterdir()}
    train_gpt2.main(options)
    output = capsys.readouterr().out
    assert output.startswith("this run is finished") and str(copy) in output and output.count("\n") == 1
    assert run_folders(tmp_path) == before and {path: path.read_bytes() for path in copy.iterdir()} == contents
    train_gpt2.main([*options[:-3], "--resume=auto", "--seed=5"])
    assert "starting from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped", "cut", "partial"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(unbroken, tmp_path, damage, capsys):
    run = unbroken(FIVE)
    copy = cut_off(run, 4, tmp_path)
    path = checkpoint(copy, 4)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:len(content) // 2] if damage == "cut" else content)
    if damage == "partial":
        path.rename(copy / "checkpoint_0000004.99.partial")
    train_gpt2.main([f"--resume={copy}", f"--out={tmp_path}"])
    assert "resumed after step 3" in capsys.readouterr().out
    newest = max(run_folders(tmp_path), key=lambda folder: (folder / "model.pt").exists())
    assert_unbroken(newest, run)


def test_keep(corpus, tmp_path):
    run = run_here(corpus, base=FIVE, keep=3, save_every=2, steps=11, out=tmp_path)
    assert saved_steps(run) == [6, 8, 10]


def test_saving_is_outside_the_clock(corpus, tmp_path, monkeypatch):
    """On a clock that gains 1000 s in each save, and in each validation that a save calls for."""
    clock, save, validate, gained = time.perf_counter, train_gpt2.save_checkpoint, train_gpt2.validate, [0]

    def slow(call):
        def gaining(*arguments, **more):
            gained[0] += 1000
            return call(*arguments, **more)
        return gaining

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + gained[0])
    monkeypatch.setattr(train_gpt2, "save_checkpoint", slow(save))
    monkeypatch.setattr(train_gpt2, "validate", slow(validate))
    run = run_here(corpus, base=FIVE, out=tmp_path)
    assert gained[0] > 12_000
    assert all(record["train_time_s"] < 500 for record in metrics(run))


def test_a_checkpoint_is_a_model_too(corpus, unbroken, capsys):
    """For load_model, tied or not, and so for evals/sample.py."""
    run = unbroken(DROP)
    for step in (4, 8):
        model, saved = train_gpt2.load_model(checkpoint(run, step))
        stream = train_gpt2.TokenStream(model.config.val_files)
        loss = train_gpt2.validate(model, stream, 1000, step, train_gpt2.Processes(0, 1, torch.device("cpu")))
        said, = (record["val_loss"] for record in metrics(run) if record["step"] == step and "val_loss" in record)
        assert saved["val_loss"] == said and loss == pytest.approx(said, rel=1e-6)
        assert model.tied
    assert not train_gpt2.load_model(checkpoint(run, 10))[0].tied
    capsys.readouterr()
    sample.main([str(checkpoint(run, 10)), "--prompt", "ab", "--tokens", "5"])
    assert capsys.readouterr().out.startswith("ab")


# ----------------------------------------------------------------------------------------------------------------------
# Exactness on several processes


def together(world: int, folder: Path, *many: list[str]) -> None:
    """Several runs, one after the other, by these many processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(many))
    done = torchrun(world, WORKER, "jobs", folder / "jobs.json", timeout=240)
    assert done.returncode == 0, done.stderr


def only(folder: Path) -> Path:
    run, = run_folders(folder)
    return run


@pytest.fixture(scope="module")
def by_two(corpus, tmp_path_factory):
    """Runs of two processes: the whole one, and its continuations by as many after some steps; in single precision."""
    folder, single = tmp_path_factory.mktemp("two"), {**SHARED, "dtype": "float32"}
    jobs = [command(corpus, base=single, out=folder / "whole"), command(corpus, base=SHARED, out=folder / "double")]
    jobs += [command(corpus, base=KILLED, out=folder / "to be killed")]
    jobs += [[f"--resume={folder}/whole/*/checkpoint_{step:07}.pt", f"--out={folder / str(step)}"] for step in (4, 6)]
    together(2, folder, *jobs)
    return folder


@pytest.mark.parametrize("step", [4, 6])  # where a stage begins and embedding and head part; where another begins
def test_two_processes_go_on_as_two(by_two, step):
    assert_unbroken(only(by_two / str(step)), only(by_two / "whole"))


def test_a_checkpoint_does_not_depend_on_the_number_of_processes(by_two, unbroken):
    """Weights and optimizer buffers, whole."""
    for step in (2, 4, 6):
        two, one = (train_gpt2.read_saved(checkpoint(run, step)) for run in (only(by_two / "double"), unbroken(SHARED)))
        assert two["cursor"] == one["cursor"] and two["step"] == one["step"] == step
        for part in ("weights", "state"):
            assert two[part].keys() == one[part].keys()
            for name, tensor in one[part].items():
                torch.testing.assert_close(two[part][name], tensor, rtol=1e-9, atol=1e-9, msg=f"{part} {name}")


def test_one_process_goes_on_from_two(by_two, unbroken, tmp_path):
    assert_unbroken(resumed(checkpoint(only(by_two / "double"), 4), tmp_path), unbroken(SHARED), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 2), (8, 1), (1, 8)])
def test_any_number_of_processes_goes_on_from_any_other(corpus, unbroken, tmp_path, before, after):
    whole = unbroken(SHARED)
    together(before, tmp_path / "before", command(corpus, base=SHARED, out=tmp_path / "first"))
    first = only(tmp_path / "first")
    together(after, tmp_path / "after", *([f"--resume={checkpoint(first, step)}", f"--out={tmp_path / str(step)}"]
                                          for step in (2, 4, 6)))
    for step in (2, 4, 6):
        assert_unbroken(only(tmp_path / str(step)), whole, 1e-9)
        if step < 6:
            ours, theirs = (train_gpt2.read_saved(checkpoint(run, 6)) for run in (only(tmp_path / str(step)), whole))
            for name, tensor in theirs["state"].items():
                torch.testing.assert_close(ours["state"][name], tensor, rtol=1e-9, atol=1e-9, msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# Kills

@pytest.mark.parametrize("plan, steps", [("1:updates:5,0:writing:6", [4, 4]), pytest.param(
    "0:before:2,0:after:2,1:updates:4,0:writing:10,0:before:10", [2, 2, 8, 8], marks=pytest.mark.slow)])
def test_torchrun_brings_a_killed_run_back_by_itself(corpus, by_two, tmp_path, plan, steps):
    """One process is killed in the updates of a step; process 0 with half of a checkpoint written, or just before or
    after that gets its name."""
    options = command(corpus, base=KILLED, out=tmp_path / "killed")
    kills = plan.count(",") + 1
    done = start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={kills}",
                  WORKER, "kill", plan, *options])
    assert done.returncode == 0, done.stderr
    run = newest(tmp_path / "killed")
    assert_unbroken(run, only(by_two / "to be killed"))
    text = (run / "log.txt").read_text(encoding="utf-8")
    assert re.findall(r"resumed after step (\d+)", text) == [str(step) for step in steps]
    assert saved_steps(run) == [8, 10] and not list(run.glob("*.partial"))


def processes_of(events: Path) -> list[tuple[int, int, str, int]]:
    """What the worker's file of events holds: (rank, process id, what, step)."""
    lines = events.read_text().splitlines(keepends=True) if events.exists() else []
    words = [line.split() for line in lines if line.endswith("\n")]
    return [(int(rank), int(number), what, int(step)) for rank, number, what, step in words]


def end(numbers) -> None:
    for number in numbers:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.slow
def test_twenty_kills_cost_only_the_steps_since_the_last_save(corpus, tmp_path):
    """A run of two processes with slow saves, killed 20 times: one of them, both, or with torchrun; started again with
    the same command each time."""
    settings = {**KILLED, "steps": 150, "repeat": True, "val_every": 20}
    events, draw = tmp_path / "events", random.Random(5)
    options = command(corpus, base=settings, out=tmp_path / "killed")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER), "slow",
            str(events), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    table = []
    while len(table) < 20:
        seen = len(processes_of(events))
        run = subprocess.Popen(line, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        whom, wait = draw.choice(["one", "both", "all"]), draw.choice(["step", "write", "rename", "start"])
        delay = draw.uniform(0, 0.03)
        patience, wanted = time.monotonic() + 60, draw.randint(0, 12 if wait == "step" else 3 if wait != "start" else 0)
        while True:
            new = processes_of(events)[seen:]
            if sum(what == wait for *_, what, _ in new) > wanted and len({number for _, number, *_ in new}) == 2:
                break
            assert run.poll() is None and time.monotonic() < patience, "ended before it was killed"
            time.sleep(0.002)
        time.sleep(delay * (10 if wait == "start" else 1))
        workers = sorted({number for _, number, *_ in new})
        end({"one": draw.sample(workers, 1), "both": workers, "all": [run.pid, *workers]}[whom])
        try:
            run.wait(60)
        finally:
            end([run.pid, *workers])
            run.wait()
        where = [f"{what} {step}" for rank, _, what, step in processes_of(events) if rank == 0][-1]
        folder = newest(tmp_path / "killed")
        done = max([record["step"] for record in metrics_of_killed(folder)], default=0)
        kept = max(saved_steps(folder) if folder else [], default=0)
        table.append((len(table) + 1, whom, where, done, kept, done - kept))
        assert done - kept <= settings["save_every"], table
        for path in train_gpt2.checkpoints(folder) if folder else ():
            train_gpt2.find_checkpoint(path)
    print("\nkill  whom  process 0 was at   steps done   saved   lost")
    for row in table:
        print("{:4}  {:5} {:18} {:10} {:7} {:6}".format(*row))
    done = start(line[1:], timeout=240)
    assert done.returncode == 0, done.stderr
    together(2, tmp_path / "jobs", command(corpus, base=settings, out=tmp_path / "whole"))
    assert_unbroken(newest(tmp_path / "killed"), only(tmp_path / "whole"))
    taken = sum(what == "step" for rank, _, what, _ in processes_of(events) if rank == 0)
    print(f"{taken} steps taken for {settings['steps']}")
    assert taken <= settings["steps"] + 20 * (settings["save_every"] + 1)


def newest(out: Path) -> Path | None:
    """The run folder that was written to last: before its first checkpoint, a run starts over in a new one."""
    return max(run_folders(out), key=lambda run: (run / "log.txt").stat().st_mtime_ns, default=None)


def metrics_of_killed(run: Path | None) -> list[dict]:
    """All whole lines; a kill may have cut off the last."""
    if run is None or not (run / "metrics.jsonl").exists():
        return []
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            if line.endswith("\n")]


# ----------------------------------------------------------------------------------------------------------------------
# Stops


def signalled(monkeypatch, name: str, at: int, number: int) -> None:
    """Have this process receive a signal at the `at`-th call of a function."""
    call, calls = getattr(train_gpt2, name), []

    def signalling(*arguments, **more):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return call(*arguments, **more)

    monkeypatch.setattr(train_gpt2, name, signalling)


@pytest.mark.parametrize("name, at, number, stopped", [
    ("train_step", 1, signal.SIGTERM, 2), ("train_step", 3, signal.SIGTERM, 4), ("train_step", 5, signal.SIGINT, 6),
    ("train_step", 8, signal.SIGTERM, 10), ("validate", 1, signal.SIGINT, 2), ("validate", 2, signal.SIGTERM, 6),
    ("apply_updates", 9, signal.SIGTERM, 10)], ids=str)
def test_a_signal_stops_the_run_when_its_step_is_done(corpus, unbroken, tmp_path, monkeypatch, name, at, number,
                                                      stopped):
    """The step that follows tells the others, and where that can be saved all stop. The log's last line says how to go
    on, which does."""
    with monkeypatch.context() as patch:
        signalled(patch, name, at, number)
        with pytest.raises(SystemExit) as end_of_run:
            run_here(corpus, base=SHUFFLED, save_every=0, out=tmp_path)
    assert end_of_run.value.code == 128 + number
    run, = run_folders(tmp_path)
    assert saved_steps(run) == [stopped] and not (run / "model.pt").exists()
    judged = [record["step"] for record in metrics(run) if "val_loss" in record]
    assert judged == [step for step in (0, 4, 8) if step < stopped]  # one that is due then waits for the resumed run
    line = last_line(run)
    assert f"{signal.Signals(number).name} after step {stopped} of 12, status {128 + number}" in line
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler  # as before the run
    train_gpt2.main(command_of(line))
    assert run_folders(tmp_path) == {run}
    assert_unbroken(run, unbroken(SHUFFLED))


def test_a_signal_in_the_last_step_lets_the_run_finish(corpus, unbroken, tmp_path, monkeypatch):
    signalled(monkeypatch, "train_step", 12, signal.SIGTERM)
    run = run_here(corpus, base=SHUFFLED, save_every=0, out=tmp_path)
    assert_unbroken(run, unbroken(SHUFFLED))
    assert "final val_loss" in last_line(run) and saved_steps(run) == []


def started(line: list, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, line)], env=environment, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def until(text: str, run: subprocess.Popen) -> None:
    for line in run.stdout:
        if text in line:
            return
    raise AssertionError(f"no {text} in its output; it ended with:\n{run.stderr.read()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stop_of_the_script_itself(corpus, tmp_path, number):
    run = started([ROOT / "train_gpt2.py", *command(corpus, out=tmp_path, steps=10_000, repeat=True, shuffle=True)])
    until("step:3/", run)
    run.send_signal(number)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number and "Traceback" not in errors
    folder, = run_folders(tmp_path)
    step, = saved_steps(folder)
    assert f"after step {step} of 10000, status {128 + number}" in last_line(folder)
    assert output.splitlines()[-1] == last_line(folder)
    assert command_of(output) == ["--resume", str(checkpoint(folder, step))]


def test_a_second_signal_ends_at_once(corpus, tmp_path):
    """While the save that the first one asked for is in the way."""
    worker = tmp_path / "worker.py"
    worker.write_text("import sys, time, train_gpt2\n"
                      "train_gpt2.save_checkpoint = lambda *_, **__: (print('saving', flush=True), time.sleep(100))\n"
                      "train_gpt2.main(sys.argv[1:])\n")
    run = started([worker, *command(corpus, out=tmp_path / "logs", steps=10_000, repeat=True)])
    until("step:2/", run)
    run.send_signal(signal.SIGINT)
    until("saving", run)
    begin = time.monotonic()
    while run.poll() is None and time.monotonic() < begin + 30:  # signals that come together may count as one
        run.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGTERM and time.monotonic() - begin < 15


def test_a_signal_to_torchrun_stops_all(corpus, tmp_path):
    run = started(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train_gpt2.py",
                   *command(corpus, out=tmp_path, steps=10_000, repeat=True)])
    until("step:3/", run)
    begin = time.monotonic()
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode and time.monotonic() - begin < 30
    folder, = run_folders(tmp_path)
    step, = saved_steps(folder)
    assert f"SIGTERM after step {step} of 10000, status 143" in last_line(folder)
    assert re.search(rf"--nproc_per_node=2 \S*train_gpt2.py --resume {checkpoint(folder, step)}$", last_line(folder))


def test_a_signal_to_one_process_stops_all_at_the_same_step(corpus, tmp_path):
    done = torchrun(2, WORKER, "spoil", "signal", 1, 3, *command(corpus, base=FIVE, save_every=0, out=tmp_path))
    assert done.returncode
    folder, = run_folders(tmp_path)
    assert saved_steps(folder) == [4]
    assert "SIGTERM after step 4 of 8, status 143" in last_line(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def spoiled_at(monkeypatch, step: int, spoil) -> None:
    """Call spoil(model, groups) just before a step."""
    step_of = train_gpt2.train_step

    def spoilt(model, groups, batch, number, *more):
        if number + 1 == step:
            spoil(model, groups)
        return step_of(model, groups, batch, number, *more)

    monkeypatch.setattr(train_gpt2, "train_step", spoilt)


@pytest.mark.parametrize("tensor, value", [("blocks.3.mlp", math.nan), ("embedding", math.nan), ("smear_mix", math.inf),
                                           ("bigram_table", -math.inf)])
def test_a_weight_that_is_not_finite_stops_the_run_at_once(corpus, unbroken, tmp_path, monkeypatch, tensor, value):
    """Even one that takes no part, as the embedding while it is tied."""
    with monkeypatch.context() as patch:
        spoiled_at(patch, 5, lambda model, _: model.get_parameter(tensor).data.view(-1)[:1].fill_(value))
        line = refused(*command(corpus, base=SHUFFLED, save_every=2, out=tmp_path))
    run, = run_folders(tmp_path)
    assert f"parameter {tensor}" in line and "step 5 " in line and f"--resume {checkpoint(run, 4)}" in line
    assert last_line(run) == f"ended: {line}"
    assert saved_steps(run) == [2, 4] and finite(checkpoint(run, 4))
    assert losses(run) == losses(unbroken(SHUFFLED))[:4]
    train_gpt2.main(command_of(line))
    assert_unbroken(run, unbroken(SHUFFLED))


@pytest.mark.parametrize("step, steps, tied", [(6, 7, "0.714285714"), (8, 24, "0.208333333")])
def test_settings_that_move_the_parting_of_the_tables_over_the_checkpoint_are_refused(step, steps, tied, tmp_path):
    """Else an embedding that was never trained would be used, or a trained one forgotten."""
    folder = write_corpus(tmp_path / "corpus")
    run = run_here(folder, base=RECIPE, tied_until=0.4, extension=0, save_every=2, keep=9, repeat=True)
    place = run / f"checkpoint_{step:07}.pt"
    with pytest.raises(Refusal, match=f"is after step {step}, its embedding and head part after step 6") as refused:
        run_here(folder, base={}, resume=place, steps=steps, repeat=True)
    assert refused.value.code.endswith(f"--tied-until {tied}")
    again = run_here(folder, base={}, resume=place, steps=steps, repeat=True, tied_until=tied)
    assert train_gpt2.last_tied_step(train_gpt2.load_model(again / "model.pt")[0].config) == 5


def test_weights_that_are_not_finite_are_never_saved(corpus, tmp_path, monkeypatch):
    """NaN in the very update after which a save is due, in a tensor that the loss does not show."""
    updates = train_gpt2.apply_updates

    def spoilt(groups, step, *more):
        updates(groups, step, *more)
        if step + 1 == 4:
            next(group for group in groups if group.name == "embedding").weights[5, 5] = math.nan

    monkeypatch.setattr(train_gpt2, "apply_updates", spoilt)
    monkeypatch.setattr(train_gpt2.Group, "is_due", lambda group, step: (step + 1) % group.every == 0)
    line = refused(*command(corpus, base=SHUFFLED, save_every=2, out=tmp_path))
    run, = run_folders(tmp_path)
    assert "parameter embedding" in line and " 4 steps" in line and f"--resume {checkpoint(run, 2)}" in line
    assert saved_steps(run) == [2] and finite(checkpoint(run, 2))


@pytest.mark.parametrize("option", [{"muon_lr": 1e300}, {"adam_head": "1e38,0.5,0.95,0"}], ids=["muon", "head"])
def test_huge_rates_end_in_one_line(corpus, tmp_path, option):
    line = refused(*command(corpus, base={**FIVE, **option}, out=tmp_path))
    run, = run_folders(tmp_path)
    step = int(re.search(r"step (\d+) is not finite|after (\d+) steps", line)[1] or 0)
    assert step <= 3 and "--muon-lr" in line
    assert all(math.isfinite(loss) for loss in losses(run)) and len(losses(run)) <= 3
    assert all(finite(path) for path in train_gpt2.checkpoints(run))


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Shards in which token 200 occurs once: at position 1000 of the second."""
    folder = write_corpus(tmp_path_factory.mktemp("marked"), train=(3000, 4000, 3000))
    for path in folder.glob("text_train_*.bin"):
        words = np.fromfile(path, "<u2")
        words[512:][words[512:] == 200] = 3
        if path.name.endswith("1.bin"):
            words[512 + 1000] = 200
        words.tofile(path)
    return folder


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_tokens_of_a_bad_row_are_named(marked, tmp_path, monkeypatch, shuffle):
    for name, owner in (("__init__", train_gpt2.GPT), ("forward", train_gpt2.GPT), ("forward", train_gpt2.Block)):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    checkpoint_worker.spoil_rows_with(200)
    line = refused(*command(marked, steps=9, save_every=1, shuffle=shuffle, repeat=True, out=tmp_path))
    assert "output of blocks.1" in line
    path, place = re.search(r"tokens: (\S+) from (\d+)", line).groups()
    assert path == str(marked / "text_train_000001.bin")
    assert int(place) <= 1000 < int(place) + 128  # a row
    run, = run_folders(tmp_path)
    step = int(re.search(r"step (\d+) ", line)[1])
    assert shuffle or step == math.ceil(4001 / 1024)
    assert saved_steps(run)[-1:] == [step - 1][:step - 1] and all(map(finite, train_gpt2.checkpoints(run)))


@pytest.mark.parametrize("kind, found", [("weight", r"parameter blocks\.\d+\.mlp"), pytest.param(
    "row", r"output of blocks\.1; .*text_train_000001\.bin from \d+", marks=pytest.mark.slow)])
def test_trouble_in_one_process_ends_all_with_one_line(marked, tmp_path, kind, found):
    """In process 1: the last of the eight rows of step 4 holds the token."""
    done = torchrun(2, WORKER, "spoil", kind, 1, 4, *command(marked, steps=9, save_every=1, out=tmp_path))
    assert done.returncode
    run, = run_folders(tmp_path)
    line = last_line(run)
    assert line in [f"ended: {text}" for text in done.stderr.splitlines()]
    assert "step 4 " in line and "process 1" in line and re.search(found, line)
    assert saved_steps(run) == [2, 3] and f"--resume {checkpoint(run, 3)}" in line and finite(checkpoint(run, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Disk


def full_while(monkeypatch, owner, name: str, at, room: int = 50_000) -> None:
    """No file can grow beyond `room` bytes during the calls of a function that at(its arguments) picks."""
    call = getattr(owner, name)

    def limited(*arguments, **more):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if at(*arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            return call(*arguments, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(owner, name, limited)


@pytest.mark.parametrize("place, kept, names", [
    ("checkpoint", 4, "checkpoint_0000005.pt"), ("model", 7, "model.pt"), ("metrics", 4, "metrics.jsonl"),
    ("log", 4, "log.txt")])
def test_a_full_disk(corpus, unbroken, tmp_path, monkeypatch, place, kept, names):
    with monkeypatch.context() as patch:
        if place in ("checkpoint", "model"):
            full_while(patch, train_gpt2, "save_model", lambda path, *_: path.name == names)
        else:
            full_while(patch, train_gpt2.RunLog, "write", lambda log, file, text: file.name.endswith(names) and (
                '"step": 5,' in text or "step:5/" in text), room=1)
        line = refused(*command(corpus, base=FIVE, out=tmp_path))
    run, = run_folders(tmp_path)
    assert names in line and "File too large" in line and "make room" in line
    assert saved_steps(run)[-1] == kept and not list(run.glob("*.partial")) and not (run / "model.pt").exists()
    assert f"--resume {checkpoint(run, kept)}" in line + last_line(run)
    train_gpt2.main([f"--resume={run}"])
    assert_unbroken(run, unbroken(FIVE))


def test_two_processes_never_write_to_one_run(unbroken, tmp_path):
    """Even where torchrun alone was killed and its workers still train. The lock goes with the process that has it."""
    fcntl = pytest.importorskip("fcntl")
    copy = cut_off(unbroken(FIVE), 4, tmp_path)
    partial = copy / "checkpoint_0000005.7.partial"
    partial.write_bytes(b"half")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with open(copy / "log.txt", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        line = refused(f"--resume={copy}")
    assert str(copy) in line and "another process" in line and "--resume none" in line
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    train_gpt2.main([f"--resume={copy}"])
    assert_unbroken(copy, unbroken(FIVE))
    assert not partial.exists()


def test_the_run_folder_cannot_be_written_on_resume(unbroken, tmp_path):
    copy = cut_off(unbroken(FIVE), 4, tmp_path)
    (copy / "log.txt").unlink()
    (copy / "log.txt").mkdir()
    before = (copy / "metrics.jsonl").read_bytes()
    line = refused(f"--resume={copy}")
    assert str(copy) in line and "--out" in line
    assert (copy / "metrics.jsonl").read_bytes() == before and saved_steps(copy) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["gone", "cut", "replaced"])
def test_a_shard_that_changes_while_training(tmp_path, monkeypatch, damage):
    folder = write_corpus(tmp_path / "corpus")
    whole = run_here(folder, base=FIVE, out=tmp_path / "whole")
    spare = tmp_path / "spare"
    shutil.copytree(folder, spare)

    def change(*_):
        for path in folder.glob("text_train_*.bin"):
            content = path.read_bytes()
            if damage == "gone":
                path.unlink()
            elif damage == "cut":
                os.truncate(path, 2000)
            else:
                path.with_suffix(".new").write_bytes(content[:-2] + bytes(2))
                path.with_suffix(".new").rename(path)

    with monkeypatch.context() as patch:
        spoiled_at(patch, 4, change)
        line = refused(*command(folder, base=FIVE, out=tmp_path / "logs"))
    run, = run_folders(tmp_path / "logs")
    assert re.search(r"text_train_00000\d\.bin", line)
    assert saved_steps(run)[-1] in (3, 4, 5)
    assert last_line(run).startswith(f"ended: {line}") and "--resume" in last_line(run)
    for path in spare.iterdir():
        shutil.copy(path, folder)
    train_gpt2.main([f"--resume={run}"])
    assert_unbroken(run, whole)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def changed(path: Path, to: Path, change) -> Path:
    """A checkpoint like this one, after change(what it holds)."""
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, to)
    return to


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_no_checkpoint_is_refused(unbroken, tmp_path):
    run = unbroken(FIVE)
    for place, words in ((tmp_path / "nowhere.pt", "does not exist"), (tmp_path, "no checkpoint_*.pt"),
                         (run / "checkpoint_0000099.pt", "newest beside it is"),
                         (run / "model.pt", "without its optimizer"),
                         (run / "log.txt", "torch.save has not written it")):
        line = refused("--resume", place)
        assert str(place) in line and words in line and "checkpoint" in line


@pytest.mark.parametrize("options, words", [
    (["--steps", "4"], ["4", "--steps 5"]), (["--preset", "gpt2"], ["--preset five-minute", "gpt2"]),
    (["--width", "32"], ["leave out", "--width"]), (["--dtype", "bfloat16"], ["--dtype", "bfloat16", "float32"]),
    (["--layers", "2"], ["leave out", "--layers"]), (["--orthogonaliser", "fast"], ["--orthogonaliser"])])
def test_settings_that_do_not_fit_are_refused(unbroken, tmp_path, options, words):
    path = checkpoint(unbroken(FIVE), 4)
    line = refused("--resume", path, "--out", tmp_path, *options)
    assert all(word in line for word in words)


def test_other_shards_are_refused(unbroken, tmp_path):
    """One token more, or one other token in one of them."""
    path, other = checkpoint(unbroken(FIVE), 4), write_corpus(tmp_path)
    shard = other / "text_train_000001.bin"
    words = np.fromfile(shard, "<u2")[512:]
    for tokens, count in ((np.append(words, 3), 4001), (np.where(np.arange(4000) == 3999, words[-1] ^ 1, words), 4000)):
        write_shard(shard, tokens, 257, 256)
        line = refused("--resume", path, f"--train-files={other}/text_train_*.bin", "--out", tmp_path / "logs")
        assert all(word in line for word in ("text_train_000001.bin", f"[{count}, ", "[4000, ", "--train-files"))


@pytest.mark.parametrize("change, words", [
    (lambda saved: saved["config"].pop("smear"), ["smear", "missing", "version"]),
    (lambda saved: saved["config"].update(flash=1), ["flash", "unknown", "version"]),
    (lambda saved: saved["config"].update(width=63), ["width", "63"]),
    (lambda saved: saved["config"].update(width="wide"), ["width"]),
    (lambda saved: saved.pop("cursor"), ["cursor"]),
    (lambda saved: saved.update(cursor=(-1, 0, 0)), ["-1"]),
    (lambda saved: saved["state"].pop("mlp.0"), ["mlp.0"]),
    (lambda saved: saved["weights"].pop("head"), ["head"]),
    (lambda saved: saved["weights"].update(head=saved["weights"]["head"][:5]), ["head", "5"]),
    (lambda saved: saved.update(shards=None), ["shards"]),
    (lambda saved: saved["shards"].popitem(), ["other shards", "text_train_000002.bin"])],
    ids=lambda value: str(value)[:20])
def test_checkpoints_of_another_make_are_refused(unbroken, tmp_path, change, words):
    path = changed(checkpoint(unbroken(FIVE), 4), tmp_path / "checkpoint_0000004.pt", change)
    line = refused("--resume", path, "--out", tmp_path / "logs")
    assert all(word in line for word in words)
    assert not list(tmp_path.glob("logs/*/model.pt"))


def test_no_code_of_a_file_is_run(unbroken, tmp_path):
    path = changed(checkpoint(unbroken(FIVE), 4), tmp_path / "checkpoint_0000004.pt",
                   lambda saved: saved.update(more=Code(tmp_path / "made")))
    line = refused("--resume", path, "--out", tmp_path)
    assert str(path) in line and not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)  # which would have run it
    assert (tmp_path / "made").exists()


def test_one_flipped_byte_in_any_tensor_is_found(unbroken, tmp_path):
    path, copy = checkpoint(unbroken(FIVE), 4), tmp_path / "checkpoint_0000004.pt"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        parts = [part for part in archive.infolist() if "/data/" in part.filename]
    assert len(parts) > 10
    draw = random.Random(0)
    for part in parts:
        name, extra = np.frombuffer(content[part.header_offset + 26:part.header_offset + 30], "<u2").tolist()
        place = part.header_offset + 30 + name + extra + draw.randrange(part.file_size)
        content[place] ^= 1 << draw.randrange(8)
        copy.write_bytes(content)
        content[:] = path.read_bytes()
        with pytest.raises(Refusal, match="damaged"):
            train_gpt2.find_checkpoint(copy)


@pytest.mark.parametrize("share", [0, 0.3, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused(unbroken, tmp_path, share):
    path, copy = checkpoint(unbroken(FIVE), 4), tmp_path / "checkpoint_0000004.pt"
    content = path.read_bytes()
    copy.write_bytes(content[:int(share * len(content))])
    assert str(copy) in refused("--resume", copy, "--out", tmp_path)
