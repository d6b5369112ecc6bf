"""Several processes do what one does: the same weights and losses, one log, one message when something is wrong."""

import json
import time
from pathlib import Path

import pytest
import torch

import train_gpt2
from tools import ROOT, SMALL, command, losses, metrics, run_folders, run_here, torchrun, weights, write_corpus

WORKER = Path(__file__).with_name("worker.py")
COMMON = dict(tokens_per_step=2048, steps=10, val_every=5, micro_tokens=128)
EXACT = {**COMMON, "dtype": "float64", "shuffle": "true"}
SINGLE = {**COMMON, "dtype": "float32"}
# Six rows for three processes; 2 layers have 4 MLP and 8 attention matrices, so that both groups need padding.
SIX_ROWS = {**EXACT, "shuffle": "false", "layers": 2, "tokens_per_step": 768, "steps": 6}
MICRO_ROWS = [1, 3, 4]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """A function: the run of one process with these settings."""
    runs, out = {}, tmp_path_factory.mktemp("alone")

    def run(settings: dict) -> Path:
        key = json.dumps(settings)
        if key not in runs:
            runs[key] = run_here(corpus, out=out / str(len(runs)), **settings)
        return runs[key]
    return run


def run_together(corpus, alone, folder: Path, world: int, many: list[dict]) -> tuple[list[Path], dict]:
    """One run by `world` processes for each of many settings, and their validation of what one process trained."""
    models = [str(alone(settings) / "model.pt") for settings in many]
    outs = [folder / str(number) for number in range(len(many))]
    train = [command(corpus, out=out, **settings) for out, settings in zip(outs, many, strict=True)]
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
    runs, validated = run_together(corpus, alone, tmp_path_factory.mktemp("together"), request.param, [EXACT, SINGLE])
    return request.param, *runs, validated


def assert_same_run(run: Path, expected: Path) -> None:
    """Every loss and every parameter within 1e-9."""
    for kind in ("train_loss", "val_loss"):
        assert losses(run, kind) == pytest.approx(losses(expected, kind), rel=1e-9)
    ours, theirs = weights(run), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-9 * tensor.abs().max().item(), msg=name)


def test_any_number_of_processes_trains_the_same_model(alone, together):
    _, exact, _, _ = together
    expected = alone(EXACT)
    assert_same_run(exact, expected)
    assert losses(expected)[-1] < losses(expected)[0] - 1  # something was learned that could have differed
    keys = [{key: record[key] for key in ("step", "tokens")} for record in metrics(exact)]
    assert keys == [{key: record[key] for key in ("step", "tokens")} for record in metrics(expected)]


def test_in_single_precision_only_rounding_differs(alone, together):
    _, _, single, _ = together
    assert losses(single) == pytest.approx(losses(alone(SINGLE)), abs=1e-4)
    assert len(losses(single)) == 10


def test_any_number_of_processes_validates_alike(alone, together):
    _, _, _, validated = together
    for settings, tolerance in ((EXACT, 1e-12), (SINGLE, 1e-6)):
        expected = losses(alone(settings), "val_loss")[-1]
        found = validated[str(alone(settings) / "model.pt")]
        assert found == {str(rows): pytest.approx(expected, rel=tolerance) for rows in MICRO_ROWS}


def test_the_log_states_the_number_of_processes(together):
    world, exact, _, _ = together
    text = (exact / "log.txt").read_text(encoding="utf-8").split("=" * 100)[-1]
    assert f"{world} process(es) on cpu, float64, {16 // world} x 1 rows each" in text


def test_groups_that_do_not_divide_are_padded(corpus, alone, tmp_path):
    (run,), validated = run_together(corpus, alone, tmp_path, 3, [SIX_ROWS])
    assert_same_run(run, alone(SIX_ROWS))
    loss = losses(run, "val_loss")[-1]
    assert list(validated[str(alone(SIX_ROWS) / "model.pt")].values()) == [pytest.approx(loss, rel=1e-9)] * 3


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


@pytest.mark.parametrize("world, valid", [(3, 2), (5, 4), (7, 4), (17, 16), (1, None), (16, None)])
def test_the_nearest_valid_number_of_processes(corpus, world, valid):
    config = train_gpt2.parse_command_line(command(corpus, **EXACT))
    if valid is None:
        assert train_gpt2.rows_per_micro(config, world, torch.device("cpu")) == 1
        return
    with pytest.raises(train_gpt2.Refusal, match=f"--nproc_per_node={valid}\\b") as caught:
        train_gpt2.rows_per_micro(config, world, torch.device("cpu"))
    tokens = int(str(caught.value.code).split("--tokens-per-step ")[1].split()[0])
    mended = train_gpt2.parse_command_line(command(corpus, **{**EXACT, "tokens_per_step": tokens}))
    assert train_gpt2.rows_per_micro(mended, world, torch.device("cpu")) == 1


@pytest.mark.parametrize("rows, world, micro", [(4, 1, 4), (16, 1, 8), (16, 2, 8), (20, 1, 5), (14, 1, 7),
                                                (37, 1, 1)])
def test_on_a_cpu_a_forward_pass_takes_at_most_1024_tokens(corpus, rows, world, micro):
    settings = {**EXACT, "micro_tokens": 0, "tokens_per_step": 128 * rows}
    config = train_gpt2.parse_command_line(command(corpus, **settings))
    assert train_gpt2.rows_per_micro(config, world, torch.device("cpu")) == micro


def test_a_process_that_fails_alone_ends_the_job_with_its_message(corpus, tmp_path):
    begin = time.monotonic()
    done = torchrun(2, WORKER, "lose_shard", *command(corpus, out=tmp_path / "logs", **EXACT))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "can no longer be read" in line]
    assert len(lines) == 1 and ".vanished" in lines[0]
    assert time.monotonic() - begin < 60
    run, = run_folders(tmp_path / "logs")
    assert not (run / "model.pt").exists()


def test_an_output_folder_that_cannot_be_written_ends_the_job(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = torchrun(2, ROOT / "train_gpt2.py", *command(corpus, out=tmp_path / "file" / "logs", **EXACT))
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if "cannot write the run folder" in line]) == 1


def test_gradients_are_reduced_while_the_backward_pass_goes_on(corpus, tmp_path):
    done = torchrun(2, WORKER, "order", tmp_path, *command(corpus, **SMALL))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"order_{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    ended = first.index(["backward", "ended"])
    backward = first[:ended]
    starts = [name for kind, name in backward if kind == "reduce"]
    assert "wait" not in [kind for kind, _ in backward]  # nothing holds the backward pass up
    assert starts[0] == "head" and starts[-1] == "embedding"
    assert sorted(starts) == ["attention", "embedding", "head", "mlp", "scalars"]  # once each, not per micro-batch
    assert "reduce" not in [kind for kind, _ in first[ended:]]
    head = backward.index(["reduce", "head"])
    arrived, outstanding = ([name for kind, name in part if kind == "gradient"]
                            for part in (backward[:head], backward[head:]))
    every = {name for kind, name in backward if kind == "gradient"}
    assert len(every) == 2 + 2 * SMALL["layers"] + 3  # embedding, head, matrices, mixing weights
    assert sorted(arrived) == sorted([*every, "head"])  # all of the first micro-batch, then the head's
    assert sorted(outstanding) == sorted(every - {"head"})
    assert ["gradient", "embedding"] in backward[backward.index(["reduce", "mlp"]):]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
def test_fifty_steps_through_every_schedule(corpus, alone, tmp_path, world):
    """The window grows, the momentum warms up, the rate cools down, the shards are used up and dealt out anew."""
    settings = {**EXACT, "steps": 50, "val_every": 25, "window": 128, "window_start": 64, "repeat": "true"}
    (run,), _ = run_together(corpus, alone, tmp_path, world, [settings])
    assert_same_run(run, alone(settings))
