"""Several processes do what one does: the same weights and losses, one log, one message when something is wrong."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from test_presets import SIBLINGS
from tools import (
    RECIPE,
    ROOT,
    SMALL,
    command,
    losses,
    metrics,
    run_folders,
    runs_by_settings,
    start,
    torchrun,
    weights,
)

import train_gpt2

CPU = torch.device("cpu")
WORKER = Path(__file__).with_name("worker.py")
COMMON = dict(SMALL, tokens_per_step=2048, steps=10, val_every=5, micro_tokens=128)
EXACT = {**COMMON, "dtype": "float64", "shuffle": "true"}
SINGLE = {**COMMON, "dtype": "float32"}
# Six rows for three processes; 2 layers have 4 MLP and 8 attention matrices, so that both groups need padding.
SIX_ROWS = {**EXACT, "shuffle": "false", "layers": 2, "tokens_per_step": 768, "steps": 6}
# The hundred-second recipe: two steps in each stage and two in the extension, embedding and head untied after four. The
# embedding and the other Adam groups are updated twice from there on, Muon in every step.
DROP = {**RECIPE, "dtype": "float64", "steps": 8, "tied_until": 0.5, "val_every": 3, "repeat": "true"}
# The larger models: 26 gates, 16 and 8 layers of them for three processes, six rows to each step.
LARGER = [{**{name: COMMON[name] for name in ("val_every", "val_tokens", "val_row_tokens", "device", "compile")},
           **SIBLINGS[preset], "preset": preset, "dtype": "float64", "steps": 6, "extension": 0, "tokens_per_step": 768,
           "row_tokens": 128, "repeat": "true"} for preset in SIBLINGS]
CONTINUE = {**DROP, "long_documents": "continue", "cross_document": "false", "micro_tokens": 400}
MICRO_ROWS = [1, 3, 4]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """A function: the run of one process with these settings."""
    return runs_by_settings(corpus, tmp_path_factory.mktemp("alone"))


def run_together(corpus, alone, folder: Path, world: int, many: list[dict]) -> tuple[list[Path], dict]:
    """One run by `world` processes for each of many settings, and their validation of what one process trained."""
    models = [str(alone(settings) / "model.pt") for settings in many]
    outs = [folder / str(number) for number in range(len(many))]
    train = [command(corpus, base=settings, out=out) for out, settings in zip(outs, many, strict=True)]
    (folder / "jobs.json").write_text(json.dumps({"train": train, "models": models, "micro": MICRO_ROWS}))
    done = torchrun(world, WORKER, "jobs", folder / "jobs.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final val_loss") == len(many)  # one process speaks
    runs = []
    for out in outs:
        run, = run_folders(out)  # and writes
        runs.append(run)
    return runs, json.loads((folder / "validated.json").read_text())


@pytest.fixture(scope="module", params=[2, 4, 8])
def together(request, corpus, alone, tmp_path_factory):
    """The number of processes, their runs by settings, and their validation."""
    many = [EXACT, SINGLE, DROP, CONTINUE]
    runs, validated = run_together(corpus, alone, tmp_path_factory.mktemp("together"), request.param, many)
    return request.param, dict(zip(("exact", "single", "drop", "continue"), runs, strict=True)), validated


def assert_same_run(run: Path, expected: Path) -> None:
    """Every loss and every parameter within 1e-9."""
    for kind in ("train_loss", "val_loss"):
        assert losses(run, kind) == pytest.approx(losses(expected, kind), rel=1e-9)
    ours, theirs = weights(run), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-9 * tensor.abs().max().item(), msg=name)


@pytest.mark.parametrize("name, settings", [("exact", EXACT), ("drop", DROP), ("continue", CONTINUE)],
                         ids=["five-minute", "drop", "continue"])
def test_any_number_of_processes_trains_the_same_model(alone, together, name, settings):
    _, runs, _ = together
    expected = alone(settings)
    assert_same_run(runs[name], expected)
    assert losses(expected)[-1] < losses(expected)[0] - 0.5  # something was learned that could have differed
    keys = [{key: record[key] for key in ("step", "tokens")} for record in metrics(runs[name])]
    assert keys == [{key: record[key] for key in ("step", "tokens")} for record in metrics(expected)]


def test_the_recipe_under_test_has_every_border():
    config = train_gpt2.parse_command_line(command(Path("nowhere"), base=DROP))
    assert train_gpt2.stage_borders(config) == [2, 4, 6] and config.steps == 8
    assert train_gpt2.last_tied_step(config) == 3 and config.adam_every == 2


def test_in_single_precision_only_rounding_differs(alone, together):
    _, runs, _ = together
    assert losses(runs["single"]) == pytest.approx(losses(alone(SINGLE)), abs=1e-4)
    assert len(losses(runs["single"])) == 10


def test_any_number_of_processes_validates_alike(alone, together):
    _, _, validated = together
    for settings, tolerance in ((EXACT, 1e-12), (SINGLE, 1e-6), (DROP, 1e-12), (CONTINUE, 1e-12)):
        expected = losses(alone(settings), "val_loss")[-1]
        found = validated[str(alone(settings) / "model.pt")]
        assert found == {str(rows): pytest.approx(expected, rel=tolerance) for rows in MICRO_ROWS}


def test_the_log_states_the_number_of_processes(together):
    world, runs, _ = together
    text = (runs["exact"] / "log.txt").read_text(encoding="utf-8").split("=" * 100)[-1]
    assert f"{world} process(es) on cpu, float64" in text


def test_groups_that_do_not_divide_are_padded(corpus, alone, tmp_path):
    many = [SIX_ROWS, *LARGER]
    runs, validated = run_together(corpus, alone, tmp_path, 3, many)
    for run, settings in zip(runs, many, strict=True):
        assert_same_run(run, alone(settings))
        loss = losses(run, "val_loss")[-1]
        assert list(validated[str(alone(settings) / "model.pt")].values()) == [pytest.approx(loss, rel=1e-9)] * 3


def test_torchrun_on_the_script_itself(corpus, alone, tmp_path):
    done = torchrun(2, ROOT / "train_gpt2.py", *command(corpus, out=tmp_path, **EXACT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final val_loss") == 1
    run, = run_folders(tmp_path)
    assert_same_run(run, alone(EXACT))


def test_a_number_of_processes_that_does_not_divide_is_refused(corpus, tmp_path):
    done = torchrun(3, ROOT / "train_gpt2.py", *command(corpus, out=tmp_path / "logs", **EXACT))
    assert done.returncode != 0
    line, = [line for line in done.stderr.splitlines() if "3 processes cannot share 16 rows" in line]
    assert "--nproc_per_node=2" in line and "--tokens-per-step 2304" in line
    assert done.stdout == "" and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("rows, world, valid", [
    ((16,), 3, 2), ((16,), 5, 4), ((16,), 7, 4), ((16,), 17, 16), ((16,), 1, None), ((16,), 16, None),
    ((8, 8, 8), 4, None), ((6, 8, 8), 4, 2), ((8, 6, 8), 4, 2), ((8, 8, 6), 4, 2), ((8, 8, 8, 6), 4, 2),
    ((8, 12, 6), 5, 2), ((4, 6, 9), 2, 1)])
def test_the_nearest_valid_number_of_processes(corpus, rows, world, valid):
    """It shares the rows of every stage. So does the batch that is named instead, stage by stage."""
    config = train_gpt2.parse_command_line(command(corpus, **EXACT))
    config = dataclasses.replace(config, row_tokens=(128, 256)[:len(rows)], tokens_per_step=tuple(
        count * (256 if stage else 128) for stage, count in enumerate(rows)))
    if valid is None:
        return train_gpt2.check_processes(config, world)
    with pytest.raises(train_gpt2.Refusal, match=f"--nproc_per_node={valid}\\b") as caught:
        train_gpt2.check_processes(config, world)
    train_gpt2.check_processes(config, valid)
    named = str(caught.value.code).split("--tokens-per-step ")[1].split()[0]
    tokens = train_gpt2.parse_command_line([f"--tokens-per-step={named}", "--row-tokens=128"]).tokens_per_step
    mended = dataclasses.replace(config, tokens_per_step=tokens)
    train_gpt2.check_processes(mended, world)
    for stage in range(4):
        before, after = (train_gpt2.value_at(c.tokens_per_step, stage) for c in (config, mended))
        assert before <= after < before + world * train_gpt2.value_at(config.row_tokens, stage)


@pytest.mark.parametrize("rows, at_once", [(4, 4), (16, 8), (20, 5), (14, 7), (37, 1)])
def test_on_a_cpu_a_forward_pass_takes_at_most_1024_tokens(corpus, monkeypatch, rows, at_once):
    """And as many rows as the passes before and after it."""
    settings = {**EXACT, "micro_tokens": 0, "tokens_per_step": 128 * rows, "layers": 1, "width": 16}
    config = train_gpt2.parse_command_line(command(corpus, **settings))
    model, processes, passes = train_gpt2.GPT(config, 257, torch.float64), train_gpt2.Processes(0, 1, CPU), []
    groups = train_gpt2.optimizer_groups(model, config, torch.float64, processes)
    real = train_gpt2.attention_masks

    def noted(model, starts, windows):
        passes.append(len(starts))
        return real(model, starts, windows)

    monkeypatch.setattr(train_gpt2, "attention_masks", noted)
    stream = train_gpt2.TokenStream(config.train_files)
    train_gpt2.train_step(model, groups, next(train_gpt2.step_batches(stream, config, processes)), 0)
    assert passes == [at_once] * (rows // at_once)


def test_a_process_that_fails_alone_ends_the_job_with_its_message(corpus, tmp_path):
    begin = time.monotonic()
    done = torchrun(2, WORKER, "lose_shard", *command(corpus, out=tmp_path / "logs", **EXACT))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "can no longer be read" in line]
    assert len(lines) == 1 and ".vanished" in lines[0]
    assert time.monotonic() - begin < 60
    run, = run_folders(tmp_path / "logs")
    assert not (run / "model.pt").exists()
    last = (run / "log.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith("ended: the connection to another process is lost") and "--save-every" in last


def test_an_output_folder_that_cannot_be_written_ends_the_job(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = torchrun(2, ROOT / "train_gpt2.py", *command(corpus, out=tmp_path / "file" / "logs", **EXACT))
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if "cannot write the run folder" in line]) == 1


def happened(corpus, folder: Path, steps: list[int], **settings) -> list[list]:
    """What two processes did, in order, in each of these steps; the same in both."""
    done = torchrun(2, WORKER, "order", folder, ",".join(map(str, steps)), *command(corpus, **settings))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((folder / f"order_{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return [first[str(step)] for step in steps]


def test_gradients_are_reduced_while_the_backward_pass_goes_on(corpus, tmp_path):
    events, = happened(corpus, tmp_path, [0], micro_tokens=256)
    ended = events.index(["backward", "ended"])
    backward = events[:ended]
    starts = [name for kind, name in backward if kind == "reduce"]
    assert "wait" not in [kind for kind, _ in backward]  # nothing holds the backward pass up
    assert starts[0] == "head" and starts[-1] == "embedding"
    assert sorted(starts) == ["attention", "embedding", "head", "mlp", "small"]  # once each, not per micro-batch
    assert "reduce" not in [kind for kind, _ in events[ended:]]
    head = backward.index(["reduce", "head"])
    arrived, outstanding = ([name for kind, name in part if kind == "gradient"]
                            for part in (backward[:head], backward[head:]))
    every = {name for kind, name in backward if kind == "gradient"}
    config = train_gpt2.parse_command_line(command(corpus))
    assert every == {name for name, _ in train_gpt2.GPT(config, 257, torch.float32).named_parameters()}
    assert sorted(arrived) == sorted([*every, "head"])  # all of the first micro-batch, then the head's
    assert sorted(outstanding) == sorted(every - {"head"})
    assert ["gradient", "embedding"] in backward[backward.index(["reduce", "mlp"]):]


def test_groups_are_reduced_in_the_steps_in_which_they_are_due(corpus, tmp_path):
    """Adam's in every second step, the embedding's once it is a table of its own."""
    steps = [0, 1, 2, 3, 4, 5]
    for step, events in zip(steps, happened(corpus, tmp_path, steps, base=DROP, micro_tokens=256), strict=True):
        ended = events.index(["backward", "ended"])
        starts = [name for kind, name in events[:ended] if kind == "reduce"]
        due = ["attention", "mlp"] + ["bigrams", "head", "small", "values"] * (step % 2) + ["embedding"] * (step == 5)
        assert sorted(starts) == sorted(due), step
        assert {kind for kind, _ in events[:ended]} == {"gradient", "reduce"}
        assert {name for kind, name in events[ended:] if kind == "wait"} == set(due)
        assert "reduce" not in [kind for kind, _ in events[ended:]]
        assert (["gradient", "embedding"] in events) == (step > 3)  # tied up to step 3
        if step == 1:  # the shared table is complete when the embedding has had its share
            assert events[:ended].index(["reduce", "head"]) > events[:ended].index(["reduce", "mlp"])
        if step == 5:
            assert starts[0] == "head"


def test_warming_up_exchanges_nothing_and_the_first_process_goes_first(corpus, tmp_path):
    """Through every stage, from the fifth step on untied; all that was changed is put back."""
    done = torchrun(2, WORKER, "warm", tmp_path, *command(corpus, base=DROP, long_documents="continue", steps=5))
    assert done.returncode == 0, done.stderr
    both = [json.loads((tmp_path / f"warm_{rank}.json").read_text()) for rank in (0, 1)]
    ends, begins = [], []
    for result in both:
        kinds = [kind for kind, *_ in result["events"]]
        warm = kinds.index("warm")
        assert kinds[:warm] == ["step"] * 5
        assert "exchange" in kinds[warm:]  # the step after it is an ordinary one
        begins.append(result["events"][0][1])
        ends.append(result["events"][warm - 1][2])
        assert result["restored"]
    assert ends[0] <= begins[1]


COMPILE = """
import sys, torch, train_gpt2
from pathlib import Path
from torch._dynamo.utils import counters
out, task = sys.argv[1:]
if task == "load":
    print(train_gpt2.load_compile_cache(train_gpt2.Config(out=out)))
torch.compile(lambda x: x @ x.T)(torch.ones(4, 4))
if task == "save":
    train_gpt2.save_compile_cache(Path(out) / "20260102-000000-b" / "compile_cache_0.bin")
print(*(counters["inductor"]["fxgraph_cache_" + kind] for kind in ("hit", "miss")))
"""


def test_a_process_reuses_what_another_one_compiled(tmp_path):
    """From the newest run that has a cache, and into an empty cache of its own."""
    for name in ("20260101-000000-a", "20260102-000000-b", "20260103-000000-c"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    (tmp_path / "logs" / "20260101-000000-a" / "compile_cache_0.bin").write_bytes(b"old")
    counts = []
    for task in ("save", "load"):
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / task), "TRITON_CACHE_DIR": str(tmp_path / task)}
        done = start(["-c", COMPILE, tmp_path / "logs", task], env=environment)
        assert done.returncode == 0, done.stderr
        *lines, count = done.stdout.splitlines()
        counts.append(count)
    assert counts == ["0 1", "1 0"]
    assert str(tmp_path / "logs" / "20260102-000000-b" / "compile_cache_0.bin") in lines[0]


DAMAGED = """
import sys, torch, train_gpt2
for out in sys.argv[1:]:
    print(train_gpt2.load_compile_cache(train_gpt2.Config(out=out)))
"""


def test_a_damaged_compile_cache_is_one_line_and_no_more(tmp_path):
    """Empty, too short, garbage, a folder: the run goes on and compiles. None is said to be reused."""
    paths = [tmp_path / name / "run" / "compile_cache_0.bin" for name in ("empty", "short", "garbage", "folder")]
    for path, content in zip(paths, (b"", b"\0", b"garbage" * 1000, None), strict=True):
        path.parent.mkdir(parents=True)
        path.mkdir() if content is None else path.write_bytes(content)
    done = start(["-c", DAMAGED, *(path.parent.parent for path in paths), tmp_path / "none"])
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == len(paths) + 1
    for path, line in zip(paths, lines, strict=False):
        assert str(path) in line and "reusing" not in line and "damaged" in line
    assert "damaged" not in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("settings", [EXACT, DROP, CONTINUE], ids=["five-minute", "drop", "continue"])
def test_fifty_steps_through_every_schedule(corpus, alone, tmp_path, world, settings):
    """Windows and batches grow, the momentum rises and falls, embedding and head are untied, the rate cools down, the
    shards are used up and, where they are shuffled, dealt out anew."""
    settings = {**settings, "steps": 50, "val_every": 25, "repeat": "true"}
    (run,), _ = run_together(corpus, alone, tmp_path, world, [settings])
    assert_same_run(run, alone(settings))
