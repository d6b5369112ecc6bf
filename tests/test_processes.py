"""Several processes do what one does: the same weights and losses, one log, one message when something is wrong."""

import json

import pytest
import torch
from tools import RECIPE, ROOT, SMALL, command, losses, run_folders, runs_by_settings, torchrun, weights
from worker import compiled, order, spoiled, struck_at, together, train, train_many, warm

import train_gpt2

EXACT = {**SMALL, "tokens_per_step": 2048, "steps": 6, "val_every": 3, "micro_tokens": 128, "dtype": "float64",
         "shuffle": True}
# Two steps in each stage and in the extension; embedding and head part after the fourth step.
STAGES = {**RECIPE, "tokens_per_step": "512,1024,1536", "dtype": "float64", "steps": 8, "tied_until": 0.5,
          "val_every": 3, "repeat": True}
CONTINUE = {**STAGES, "long_documents": "continue", "micro_tokens": 400}
MANY = [STAGES, EXACT, CONTINUE]
SHORT = {**SMALL, "tokens_per_step": 512, "val_every": 0}
THREE = {**EXACT, "shuffle": False, "layers": 2, "tokens_per_step": 768}  # groups need padding


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """A function: the run of one process with these settings."""
    return runs_by_settings(corpus, tmp_path_factory.mktemp("alone"))


def assert_same_run(run, expected):
    """Every loss and every parameter within 1e-9."""
    for kind in ("train_loss", "val_loss"):
        assert losses(run, kind) == pytest.approx(losses(expected, kind), rel=1e-9)
    ours, theirs = weights(run), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        atol = 1e-9 * max(1e-3, tensor.abs().max().item())
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=atol, msg=name)


def train_together(corpus, folder, world, many):
    """The run of `world` processes for each of these settings, and the validation losses of their models."""
    outs = [folder / str(number) for number in range(len(many))]
    jobs = [command(corpus, base=settings, out=out) for settings, out in zip(many, outs, strict=True)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ends = together(folder / "output", world, train_many, folder / "jobs.json")
    assert all(end.status == 0 for end in ends), [end.err for end in ends]
    assert ends[0].out.count("final val_loss") == len(many)  # one process speaks
    assert not any(end.out.count("final val_loss") for end in ends[1:])
    validated = [[json.loads(line.partition(": ")[2]) for line in end.out.splitlines() if line.startswith("validated")]
                 for end in ends]
    runs = [next(iter(run_folders(out))) for out in outs]
    assert all(len(run_folders(out)) == 1 for out in outs)  # and writes
    return runs, validated


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_any_number_of_processes_trains_the_same_model(corpus, alone, tmp_path, world):
    many = MANY if world > 2 else [STAGES]
    if world == 8:
        many = [settings | {"tokens_per_step": RECIPE["tokens_per_step"]} for settings in (STAGES, CONTINUE)]
    runs, validated = train_together(corpus, tmp_path, world, many)
    for number, settings in enumerate(many):
        expected = alone(settings)
        assert_same_run(runs[number], expected)
        for of_process in validated:  # in passes of one row and of three
            assert of_process[number] == pytest.approx([losses(expected, "val_loss")[-1]] * 2, rel=1e-9)


def test_three_processes_pad_their_groups(corpus, alone, tmp_path):
    (run,), _ = train_together(corpus, tmp_path, 3, [THREE])
    assert_same_run(run, alone(THREE))


def test_groups_are_reduced_in_the_backward_pass(corpus, tmp_path):
    """A group's reduction begins right after its last gradient, in the last micro-batch; only where it is due."""
    ends = together(tmp_path, 2, order, *command(corpus, base=STAGES, micro_tokens=128))
    for end in ends:
        assert end.status == 0, end.err
        for step, events in enumerate(json.loads(end.out)):
            reduced = [name for kind, name in events if kind == "reduce"]
            inside = events[:events.index(["backward", "ended"])]
            expected = {f"{kind}.{depth}" for kind in ("mlp", "qk", "vo") for depth in ("early", "late")}
            if step % 2:
                expected |= {"head", "small", "mudd", "bigram_table", *(f"value_tables.{n}" for n in range(5))}
                expected |= {"embedding"} if step > 4 else set()
            assert set(reduced) == expected and len(reduced) == len(expected)
            assert {name for kind, name in inside if kind == "reduce"} >= expected - {"head", "embedding"}
            for group in ("qk.late", "qk.early"):  # right after its first layer
                first, layer = inside.index(["reduce", group]), {"qk.late": 5, "qk.early": 0}[group]
                after = {name for kind, name in inside[first:] if kind == "gradient"}
                assert not any(f"blocks.{i}.qk" in after for i in range(layer, 11))
                assert f"blocks.{max(0, layer - 1)}.mlp" in after or group == "qk.early"
            waits = [name for kind, name in events[events.index(["backward", "ended"]):] if kind == "wait"]
            assert set(waits) == set(reduced) and len(waits) == 2 * len(reduced)


def test_warm_up_shares_stages_and_puts_numbers_back(corpus, tmp_path):
    """Process r compiles stage r by itself; once all have, they run all stages together, and exchange. Two steps
    are run of a stage."""
    ends = together(tmp_path, 2, warm, *command(corpus, base=STAGES))
    assert all(end.status == 0 for end in ends), [end.err for end in ends]
    first, second = (json.loads(end.out) for end in ends)
    assert first["restored"] and second["restored"]
    steps, expected = [], [[0, 1, *range(8)], [2, 3, *range(8)]]
    for events in (first["events"], second["events"]):
        kinds = [kind for kind, *_ in events]
        border, third = kinds.index("warm"), [i for i, kind in enumerate(kinds) if kind == "step"][2]
        begin = events[third][1]
        assert not any(kind == "exchange" and start < begin for kind, start, *_ in events)
        assert "exchange" in kinds[:border] and "exchange" in kinds[border:]
        steps.append([event for event in events[:border] if event[0] == "step"])
    assert [[step for *_, step in of_process] for of_process in steps] == expected
    assert max(end for of_process in steps for _, _, end, _ in of_process[:2]) <= min(
        of_process[2][1] for of_process in steps)


@pytest.mark.slow
def test_a_second_process_finds_compiled_code_on_disk(tmp_path):
    """Also if it compiles backward passes at once, and not after all forward ones."""
    results = [together(tmp_path / backward, 1, compiled, tmp_path / "cache", backward)[0]
               for backward in ("later", "at once")]
    (hits, misses, *values), (more, fewer, *again) = (result.out.split() for result in results)
    assert (int(hits), int(fewer), int(misses)) == (0, 0, 3) and int(more) == 3 and values == again


@pytest.mark.parametrize("what", ["weight", "loss"])
def test_a_number_that_is_not_finite_names_step_and_process(corpus, tmp_path, what):
    arguments = command(corpus, base=SHORT, out=tmp_path / "logs", save_every=1)
    ends = together(tmp_path, 2, spoiled, f"1:4:{what}", *arguments)
    assert all(end.status == 1 for end in ends)
    for end in ends:
        line = end.err.strip().splitlines()[-1]
        assert "not finite" in line and "step 4" in line and "text_train" in line and "process 1" in line
        assert "Traceback" not in end.err
    assert "--resume" in ends[0].err
    run, = run_folders(tmp_path / "logs")
    assert train_gpt2.checkpoints(run)[-1].name == "checkpoint_0000003.pt"
    train_gpt2.read_checkpoint(train_gpt2.checkpoints(run)[-1])
    assert "not finite" in (run / "log.txt").read_text().splitlines()[-1]


def test_a_process_that_dies_ends_the_others(corpus, tmp_path):
    launched = together(tmp_path, 2, spoiled, "1:3:SIGKILL", *command(corpus, base=SHORT, out=tmp_path / "logs"))
    assert launched[1].status == -9 and launched[0].status == 1
    assert launched[0].time - struck_at(launched[1].out) < 10
    assert "connection" in launched[0].err and "Traceback" not in launched[0].err


def test_processes_compare_settings_and_shards(corpus, tmp_path):
    jobs = [{"0": command(corpus, base=EXACT, out=tmp_path / "logs"),
             "1": command(corpus, base=EXACT, out=tmp_path / "logs", seed=1)}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    ends = together(tmp_path / "output", 2, train_many, tmp_path / "jobs.json")
    assert any("refused" in end.out and "seed" in end.out for end in ends)
    assert not (tmp_path / "logs").exists()


def test_a_refusal_under_torchrun(corpus, tmp_path):
    """The first line is ours. (A signal under torchrun: test_checkpoint.)"""
    refused = torchrun(2, ROOT / "train_gpt2.py", *command(corpus, out=tmp_path / "logs"), "--steps=0")
    lines = [line for line in refused.stderr.splitlines()
             if line and "OMP_NUM_THREADS" not in line and "***" not in line]
    assert refused.returncode == 1 and "--steps" in lines[0] and "Traceback" not in lines[0]


@pytest.mark.parametrize("environment", [
    {"RANK": "3", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"}])
def test_a_strange_environment_is_refused_in_one_line(corpus, tmp_path, environment):
    ended, = together(tmp_path, 1, train, *command(corpus, out=tmp_path / "logs"), **environment)
    assert ended.status == 1 and len(ended.err.strip().splitlines()) == 1, ended.err
    assert "WORLD_SIZE" in ended.err and "torchrun" in ended.err
