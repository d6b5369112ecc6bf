"""Stopping, going on, and files that cannot be trusted."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tools import RECIPE, ROOT, SMALL, command, losses, metrics, run_folders, run_here, weights, write_corpus
from worker import Launched, spoiled, together, train

import train_gpt2
from train_gpt2 import UserError, checkpoints, main, read_checkpoint

# Untied after step 4; borders at 3, 6 and 9, where the extension begins.
STAGES = {**RECIPE, "tokens_per_step": "256,512,768", "dtype": "float64", "steps": 12, "tied_until": 0.4,
          "repeat": True, "save_every": 1, "keep": 100,
          "val_tokens": 500}
SHUFFLED = {**SMALL, "shuffle": True, "repeat": True, "tokens_per_step": 2048, "steps": 10, "save_every": 1,
            "keep": 100}


def only_run(out) -> Path:
    run, = run_folders(Path(out))
    return run


def assert_equal_runs(run, expected):
    assert losses(run) == losses(expected) and losses(run, "val_loss") == losses(expected, "val_loss")
    ours, theirs = weights(run), weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def refused(arguments, capsys=None) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run with a checkpoint after every second step, kept as it is."""
    return run_here(corpus, base=STAGES, out=tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copy(finished, tmp_path):
    """A copy without its model, to spoil."""
    run = shutil.copytree(finished, tmp_path / "logs" / finished.name)
    (run / "model.pt").unlink()
    return run


@pytest.mark.parametrize("step", [4, 10, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 6))])
def test_going_on_is_equal_to_the_bit(corpus, finished, copy, step):
    """Tied and not, within a stage and at its border, in the extension."""
    main(["--resume", str(copy / f"checkpoint_{step:07}.pt")])
    assert_equal_runs(copy, finished)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    assert len(lines) > len(metrics(copy))  # the first run's records are still there
    assert (copy / "log.txt").read_text().count("def train_step") == 1


@pytest.mark.parametrize(("here", "options"), [
    (".", ["--resume=logs/RUN/checkpoint_0000010.pt", "--out=logs/../logs"]),
    ("logs/RUN", ["--resume=checkpoint_0000010.pt", "--out=.."]), ("logs/RUN", ["--resume=checkpoint_0000010.pt"])])
def test_a_run_goes_on_in_its_folder_however_that_is_spelled(copy, monkeypatch, here, options):
    monkeypatch.chdir(copy.parent.parent / here.replace("RUN", copy.name))
    main([option.replace("RUN", copy.name) for option in options])
    assert run_folders(copy.parent) == {copy} and (copy / "model.pt").exists()


def test_a_finished_run_is_not_overwritten(copy, finished, tmp_path, capsys, monkeypatch):
    """Not from one of its checkpoints, whose command may be in the shell's history; but elsewhere it may go on."""
    shutil.copy(finished / "model.pt", copy)
    before = (copy / "model.pt").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    for path in (copy, copy.relative_to(tmp_path)):
        main(["--resume", str(path / "checkpoint_0000010.pt"), "--out", str(copy.parent)])
        assert "this run is finished" in capsys.readouterr().out and (copy / "model.pt").stat().st_mtime_ns == before
    main(["--resume", str(copy / "checkpoint_0000010.pt"), "--out", str(tmp_path / "elsewhere")])
    ours, theirs = weights(only_run(tmp_path / "elsewhere")), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_older_checkpoints_of_the_run_are_removed(copy):
    """Not what a user has put beside them, and not the one just written, though a later one is there."""
    mine = shutil.copy(copy / "checkpoint_0000002.pt", copy / "checkpoint_best.pt")
    for path in checkpoints(copy)[1:-2]:
        path.unlink()
    main(["--resume", str(copy / "checkpoint_0000002.pt"), "--keep", "1", "--save-every", "8"])
    assert [path.name for path in checkpoints(copy)] == ["checkpoint_0000008.pt"] and Path(mine).exists()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [STAGES, SHUFFLED], ids=["stages", "shuffled"])
def test_going_on_after_every_step(corpus, tmp_path, settings):
    expected = run_here(corpus, base=settings, out=tmp_path / "whole")
    for checkpoint in checkpoints(expected):
        run = shutil.copytree(expected, tmp_path / checkpoint.stem / expected.name)
        (run / "model.pt").unlink()
        main(["--resume", str(run / checkpoint.name)])
        assert_equal_runs(run, expected)


def test_a_shuffled_run_goes_on_in_its_order(corpus, tmp_path):
    expected = run_here(corpus, base=SHUFFLED, out=tmp_path / "whole")
    run = shutil.copytree(expected, tmp_path / "part" / expected.name)
    (run / "model.pt").unlink()
    main(["--resume", str(run / "checkpoint_0000005.pt")])
    assert_equal_runs(run, expected)


def test_another_number_of_processes_goes_on(copy, finished, tmp_path):
    """Four steps of one process, four of two, the last four of one."""
    for world, step in ((2, 4), (1, 8)):
        (copy / "model.pt").unlink(missing_ok=True)  # else the run is finished
        ends = together(tmp_path / str(step), world, train, "--resume", copy / f"checkpoint_{step:07}.pt")
        assert all(end.status == 0 for end in ends), ends[0].err
        assert losses(copy) == pytest.approx(losses(finished), rel=1e-9)
    for name, tensor in weights(finished).items():
        atol = 1e-9 * max(1e-3, tensor.abs().max().item())
        torch.testing.assert_close(weights(copy)[name], tensor, rtol=1e-9, atol=atol, msg=name)


@pytest.mark.parametrize("place", ["writing", *(pytest.param(place, marks=pytest.mark.slow)
                                               for place in ("updates", "before", "after"))])
def test_a_kill_loses_little(corpus, tmp_path, finished, place):
    settings = {**STAGES, "save_every": 2, "out": tmp_path / "logs", "resume": "auto"}
    arguments = command(corpus, base=settings)
    ended, = together(tmp_path / "killed", 1, spoiled, f"0:8:{place}", *arguments)
    assert ended.status == -9, ended.err
    ended, = together(tmp_path / "again", 1, train, *arguments)
    assert ended.status == 0 and "resumed after step" in ended.out, ended.err
    assert int(ended.out.split("resumed after step ")[1].split()[0]) >= (8 if place == "after" else 6)
    run = only_run(tmp_path / "logs")
    assert losses(run) == losses(finished) and not list(run.glob("*.partial"))
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(run).items())


@pytest.mark.slow
def test_twenty_kills_of_two_processes(corpus, tmp_path):
    settings = {**STAGES, "steps": 150, "save_every": 2, "keep": 2, "resume": "auto", "val_every": 0}
    ends = together(tmp_path / "whole", 2, train, *command(corpus, base=settings, out=tmp_path / "whole_logs"))
    assert ends[0].status == 0, ends[0].err
    arguments = command(corpus, base=settings, out=tmp_path / "logs")
    for kill in range(20):
        place = ("updates", "writing", "before", "after")[kill % 4]
        plan = f"{kill % 2 if place == 'updates' else 0}:{6 + 6 * kill}:{place}"
        ends = Launched(tmp_path / str(kill), 2, spoiled, plan, *arguments).wait()
        assert any(end.status == -9 for end in ends), ends
    ends = together(tmp_path / "last", 2, train, *arguments)
    assert ends[0].status == 0, ends[0].err
    ours, theirs = weights(only_run(tmp_path / "logs")), weights(only_run(tmp_path / "whole_logs"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_signals_save_and_say_how_to_go_on(corpus, tmp_path, finished, name):
    settings = {**STAGES, "save_every": 0, "out": tmp_path / "logs"}
    ended, = together(tmp_path / "first", 1, spoiled, f"0:5:{name}", *command(corpus, base=settings))
    assert ended.status == 128 + getattr(signal, name) and "Traceback" not in ended.err, ended.err
    run = only_run(tmp_path / "logs")
    last = (run / "log.txt").read_text().splitlines()[-1]
    assert name in last and "--resume" in last and [p.name for p in checkpoints(run)] == ["checkpoint_0000006.pt"]
    if name == "SIGHUP":  # the way is the same for all
        main(["--resume", str(run)])
        assert_equal_runs(run, finished)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train_gpt2.caught_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_neither_a_full_disk_nor_a_signal_loses_a_finished_run(corpus, tmp_path, monkeypatch, finished):
    """The log cannot be written from the first step on; the signal comes while the model is written."""
    loop, save = train_gpt2.training_loop, train_gpt2.save

    def full(model, groups, data, processes, log, *others):
        log.text, log.metrics = (open("/dev/full", "w", 1) for _ in range(2))
        return loop(model, groups, data, processes, log, *others)

    def interrupted(path, saved):
        if path.name == "model.pt":
            os.kill(os.getpid(), signal.SIGTERM)
        save(path, saved)

    monkeypatch.setattr(train_gpt2, "training_loop", full)
    monkeypatch.setattr(train_gpt2, "save", interrupted)
    main(command(corpus, base=STAGES, out=tmp_path / "logs"))
    ours, theirs = weights(only_run(tmp_path / "logs")), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("first, second", [("SIGINT", "SIGINT"), ("SIGHUP", "SIGHUP"), ("SIGUSR1", "SIGTERM")])
def test_only_a_second_interrupt_ends_at_once(corpus, tmp_path, first, second):
    """A terminal that closes may send SIGHUP twice, clusters warn before they end a job."""
    arguments = command(corpus, base=STAGES, out=tmp_path / "logs", steps=4000, save_every=0, val_every=0)
    ended, = together(tmp_path / "first", 1, spoiled, f"0:3:{second},0:3:{first}", *arguments)  # the last one first
    assert ended.status == 128 + getattr(signal, first)
    assert len(checkpoints(only_run(tmp_path / "logs"))) == (second != "SIGINT")


def test_torchrun_passes_a_signal_on(corpus, tmp_path):
    arguments = command(corpus, base=STAGES, out=tmp_path / "logs", steps=4000, save_every=0, val_every=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train_gpt2.py",
         *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    limit = time.monotonic() + 90
    while time.monotonic() < limit and not list((tmp_path / "logs").glob("*/metrics.jsonl")):
        time.sleep(0.1)
    while time.monotonic() < limit and len(losses(only_run(tmp_path / "logs"))) < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0 and len(checkpoints(only_run(tmp_path / "logs"))) == 1


# ---- which checkpoint ------------------------------------------------------------------------------------------------


def test_auto_says_what_it_found(corpus, copy, finished, capsys):
    auto = command(corpus, base=STAGES, out=copy.parent, resume="auto")
    newest, older = checkpoints(copy)[::-1][:2]
    shutil.copy(checkpoints(copy)[0], copy / "old.pt")  # not one of ours
    newest.write_bytes(newest.read_bytes()[:-1000])  # cut
    other = run_here(corpus, base={**STAGES, "seed": 1}, out=copy.parent)  # a newer run of another recipe
    assert losses(other) != losses(finished)
    main(auto)
    said = capsys.readouterr().out
    assert f"resumed after step {int(older.stem[-7:])}" in said and "passed over" in said and newest.name in said
    assert_equal_runs(copy, finished)
    with pytest.MonkeyPatch.context() as patched:  # a job that is repeated until it succeeds ends, though nobody reads
        patched.setattr(sys, "stdout", open("/dev/full", "w"))
        main(auto)
    main(auto)
    assert "finished" in capsys.readouterr().out
    main(command(corpus, base={**STAGES, "seed": 3, "steps": 4}, out=copy.parent, resume="auto"))
    assert "starting at step 0" in capsys.readouterr().out
    model = copy / "model.pt"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1  # a flipped bit
    model.write_bytes(content)
    main(auto)
    said = capsys.readouterr().out
    assert "passed over" in said and "model.pt" in said and "resumed after" in said


def test_a_damaged_model_is_passed_over(copy, finished):
    (copy / "model.pt").write_bytes(b"")
    main(["--resume", str(checkpoints(copy)[2])])
    assert_equal_runs(copy, finished)


def test_the_newest_run_is_the_one_that_was_written_last(copy):
    """Whatever its name: a run that went on keeps the name of its first start."""
    config = read_checkpoint(checkpoints(copy)[0])["config"]
    other = shutil.copytree(copy, copy.parent / "z-another-name")
    for seconds, expected in ((10, other), (-1e6, copy)):
        for path in other.iterdir():
            os.utime(path, (time.time() + seconds,) * 2)
        assert train_gpt2.newest(train_gpt2.saved_files(copy, other), config)["path"] == checkpoints(expected)[-1]


def flipped_seed(path: Path) -> bytes:
    content = path.read_bytes()
    at = content.index(b"seed") + 4
    at = content.index(b"0", at)
    return content[:at] + b"1" + content[at + 1:]


def repacked(path: Path, how: int) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for part, content in parts.items():
            archive.writestr(part, content)


@pytest.mark.parametrize("fault", ["cut", "flipped", "another seed", "compressed", "pipe", "setting"])
def test_auto_never_starts_over_a_run_that_it_cannot_read(corpus, copy, capsys, fault):
    path = checkpoints(copy)[0]
    for other in checkpoints(copy)[1:]:
        other.unlink()
    content = bytearray(path.read_bytes())
    if fault == "cut":
        path.write_bytes(content[:-500])
    elif fault == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "another seed":  # a flipped bit, by which it would be of another recipe
        path.write_bytes(flipped_seed(path))
    elif fault == "compressed":  # torch would take the compressed bytes for weights
        repacked(path, zipfile.ZIP_DEFLATED)
    elif fault == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        saved = torch.load(path, weights_only=True)
        del saved["config"]["smear"]  # as of an older script
        torch.save(saved, path)
    said = refused(command(corpus, base=STAGES, out=copy.parent, resume="auto"), capsys)
    assert path.name in said and "--resume none" in said and len(said.splitlines()) == 1
    assert len(run_folders(copy.parent)) == 1


def test_recipe_and_shards_must_be_the_same(corpus, copy, tmp_path, capsys):
    assert "--muon-lr" in refused(["--resume", copy, "--muon-lr", 0.5], capsys)
    other = write_corpus(tmp_path / "other", train=(9000, 4000, 8001))
    assert "train shard" in refused(["--resume", copy, "--train-files", other / "text_train_*.bin"], capsys)
    other = write_corpus(tmp_path / "val", val=(1500, 1201))
    assert "val shard" in refused(["--resume", copy, "--val-files", other / "text_val_*.bin"], capsys)
    assert "nothing.pt" in refused(["--resume", copy / "nothing.pt"], capsys)
    (tmp_path / "empty").mkdir()
    assert "checkpoint" in refused(["--resume", tmp_path / "empty"], capsys)


def test_settings_of_the_run_may_change(corpus, copy, tmp_path, finished):
    main(["--resume", str(copy / "checkpoint_0000006.pt"), "--out", str(tmp_path / "elsewhere"), "--save-every", "0",
          "--micro-tokens", "128"])
    run = only_run(tmp_path / "elsewhere")
    assert losses(run)[-1] == pytest.approx(losses(finished)[-1], rel=1e-9) and not checkpoints(run)


def test_one_process_writes_to_a_run(corpus, copy, capsys):
    import fcntl
    with open(copy / "log.txt", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in refused(["--resume", copy], capsys)


# ---- files that cannot be trusted ------------------------------------------------------------------------------------


class Runs:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["PYTEST_MARK"]) / "ran"),)


def nested(depth: int = 300) -> list:
    """Each list holds the next one twice: 2^depth, if someone prints it."""
    found = []
    for _ in range(depth):
        found = [found, found]
    return found


def deep_tuple():
    found = ()
    for _ in range(300):
        found = (found,)
    return found


SPOIL = {
    "config is a list": lambda s: s.update(config=[]),
    "a setting is no text": lambda s: s["config"].update(steps=0),
    "a setting is out of bounds": lambda s: s["config"].update(heads="0"),
    "a setting is strange": lambda s: s["config"].update(smear="perhaps"),
    "settings contradict": lambda s: s["config"].update(width="30"),
    "a setting is unknown": lambda s: s["config"].update(magic="1"),
    "a setting is missing": lambda s: s["config"].pop("smear"),
    "a setting is a list in itself": lambda s: s["config"].update(preset=nested()),
    "the name of a setting is nested": lambda s: s["config"].update({deep_tuple(): "1"}),
    "the name of a shard is nested": lambda s: s["shards"].update({deep_tuple(): [1]}),
    "the dtype is not settled": lambda s: s["config"].update(dtype="auto"),
    "seconds are no number": lambda s: s.update(seconds=math.nan),
    "seconds before the run": lambda s: s.update(seconds=-1e300),
    "no step": lambda s: s.pop("step"),
    "a step is a word": lambda s: s.update(step="x"),
    "seconds are missing": lambda s: s.update(seconds=None),
    "a step beyond the run": lambda s: s.update(step=13),
    "a step before it": lambda s: s.update(step=-1),
    "shards are a number": lambda s: s.update(shards=3),
    "shards are nested": lambda s: s["shards"].update(a=nested()),
    "no shards": lambda s: s.pop("shards"),
    "a vocabulary is huge": lambda s: s.update(vocabulary=10**12),
    "a weight is missing": lambda s: s["weights"].pop("head"),
    "a weight is of another shape": lambda s: s["weights"].update(head=torch.ones(3)),
    "a weight is no tensor": lambda s: s["weights"].update(head="x"),
    "state is missing": lambda s: s["state"].popitem(),
    "state is of another shape": lambda s: s["state"].update({"mlp.late": [torch.ones(())]}),
    "code": lambda s: s.update(step=Runs()),
}


@pytest.mark.parametrize("what", SPOIL)
def test_foreign_checkpoints_are_refused(copy, what, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_MARK", str(tmp_path))
    path = checkpoints(copy)[4]
    saved = torch.load(path, weights_only=True)
    SPOIL[what](saved)
    torch.save(saved, path)
    said = refused(["--resume", path], capsys)
    assert len(said.splitlines()) == 1 and len(said) < 1000 and (path.name in said or what == "settings contradict")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save({"model": {"weight": torch.ones(3)}, "config": {"n_layer": 12}}, tmp_path / "other.pt")
    for bad in (*tmp_path.glob("*.pt"), tmp_path):
        with pytest.raises(UserError, match="cannot use"):
            read_checkpoint(bad)


def test_models_for_evaluation_are_checked(finished, tmp_path):
    model, saved = train_gpt2.load_model(finished / "model.pt")
    assert saved["step"] == 12 and "state" not in saved and model.config.dtype == "float64"
    spoilt = torch.load(finished / "model.pt", weights_only=True)
    spoilt["weights"]["head"] = torch.ones(3)
    torch.save(spoilt, tmp_path / "model.pt")
    with pytest.raises(UserError, match="head"):
        train_gpt2.load_model(tmp_path / "model.pt")


# ---- the disk, the clock, the log ------------------------------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_full_disk_keeps_the_earlier_checkpoint(corpus, tmp_path, capsys, monkeypatch, everywhere):
    settings = command(corpus, base=STAGES, out=tmp_path / "logs", save_every=4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save = train_gpt2.save

    def limited(path, saved):
        if saved["step"] == 8 and (everywhere or "logs" in path.parts):
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            try:
                return save(path, saved)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return save(path, saved)

    monkeypatch.setattr(train_gpt2, "save", limited)
    if not everywhere:
        main(settings)
        elsewhere = tmp_path / only_run(tmp_path / "logs").name
        assert f"saved as {elsewhere / 'checkpoint_0000008.pt'}" in capsys.readouterr().out
        monkeypatch.undo()
        main([*settings, "--resume", str(elsewhere)])
        assert len(list(tmp_path.glob("logs/*/model.pt"))) == 2
        return
    said = refused(settings, capsys)
    assert "cannot" in said and len(said.strip().splitlines()) == 1
    run = only_run(tmp_path / "logs")
    assert [path.name for path in checkpoints(run)] == ["checkpoint_0000004.pt"] and not list(run.glob("*.partial"))
    read_checkpoint(checkpoints(run)[0])
    assert "--resume" in (run / "log.txt").read_text().splitlines()[-1]


def test_room_is_looked_for_at_the_start_and_at_the_end(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "--out" in refused(command(corpus, out=tmp_path / "logs"), capsys)
    save = train_gpt2.save

    def full(path, saved):
        if path.name == "model.pt" and "logs2" in path.parts:
            raise OSError(28, "No space left on device")
        save(path, saved)

    monkeypatch.setattr(train_gpt2, "save", full)
    main(command(corpus, out=tmp_path / "logs2", steps=2))
    model = tmp_path / only_run(tmp_path / "logs2").name / "model.pt"
    assert train_gpt2.load_model(model)[1]["step"] == 2 and str(model) in capsys.readouterr().out


def test_the_clock_counts_training_only(corpus, tmp_path, monkeypatch):
    validate = train_gpt2.validate
    monkeypatch.setattr(train_gpt2, "validate", lambda *given: (time.sleep(0.2), validate(*given))[1])
    began = time.perf_counter()
    run = run_here(corpus, out=tmp_path, steps=6, val_every=1)
    seconds = metrics(run)[-1]["train_time_s"]
    assert 0 < seconds < time.perf_counter() - began - 7 * 0.2
    log = (run / "log.txt").read_text()
    assert log.startswith((ROOT / "train_gpt2.py").read_text()) and "torch" in log.partition("=" * 100)[2]
    assert json.loads(next(line for line in log.splitlines() if line.startswith('{"preset"')))["steps"] == 6


def test_the_clock_does_not_count_steps_that_are_skipped(corpus, tmp_path, monkeypatch):
    run, batches = run_here(corpus, out=tmp_path, steps=6, save_every=4), train_gpt2.step_batches
    (run / "model.pt").unlink()

    def slow(*given):
        for number, batch in enumerate(batches(*given)):
            time.sleep(0.5 * (number < 4))
            yield batch

    monkeypatch.setattr(train_gpt2, "step_batches", slow)
    went_on = run_here(corpus, out=tmp_path, steps=6, save_every=4, resume=str(run / "checkpoint_0000004.pt"))
    before, after = (next(one["train_time_s"] for one in metrics(went_on) if one["step"] == step) for step in (4, 6))
    assert went_on == run and 0 < after - before < 1.5
