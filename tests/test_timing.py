"""records/timing.py: FLOP and memory against counts by other means, the tool at a small size."""

import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tools import ALONE, RECIPE, ROOT, SMALL, command, dense_mask, random_batch, small_config, small_model, torchrun
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2
from train_gpt2 import GPT, Config, Processes, UserError, optimizer_groups, phase_at, preset_values

sys.path.insert(0, str(ROOT / "records"))
import timing

GIB, MIB = 2**30, 2**20
GPT2 = Config(dtype="bfloat16")
SIZES = timing.model_sizes(GPT2, 50257)
EIGHT_ROWS = {"row_tokens": (256,), "val_row_tokens": 256, "tokens_per_step": (2048,), "micro_tokens": 2048,
              "window": (64,), "window_short": (32,), "loss_chunk": 256, "width": 64, "heads": 2}
FEW_LAYERS = {
    "five-minute": {"layers": 4},
    "gpt2": {"layers": 5, "short_layers": (1, 3), "paired_layers": (0,), "attention_free": (2,),
             "value_layers": (0, 1, 4),
             "gated_skip": (0, 2), "attention_source": (1,), "xsa_layers": (0, 1, 4), "bigram_width": 16,
             "bigram_signs": 50}}
FEW = {name: train_gpt2.spelled(value) for name, value in FEW_LAYERS["gpt2"].items()}


@pytest.mark.parametrize("preset", ["five-minute", "gpt2"])
def test_flops_of_weights_are_those_of_the_products_that_are_executed(preset, monkeypatch):
    """Without gates, whose 12 channels count as no work of the model."""
    model = small_model(preset=preset, dtype="float32", attention_gates=False, value_gates=False, gated_skip=(),
                        smear=False, row_tokens=(64,), tokens_per_step=(128,), loss_chunk=64, xsa_layers=())
    with FlopCounterMode(display=False) as counter:
        model.loss(random_batch(2, 64), phase_at(0, model.config))[0].backward()
    counted = sum(flop for op, flop in counter.get_flop_counts()["Global"].items()
                  if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
    monkeypatch.setattr(timing, "visited_keys", lambda *_: 0)
    sizes, stretch = timing.model_sizes(model.config, 50), timing.stretches(model.config)[0]
    assert timing.step_flops(model.config, sizes, stretch) == counted > 1e6
    monkeypatch.setattr(timing, "visited_keys", lambda _, starts, __: 100 * starts.numel())
    head_width, own = model.config.width // model.config.heads, replace(model.config, xsa_layers=(0, 2))
    assert timing.step_flops(model.config, sizes, stretch) == counted + 128 * 100 * 12 * head_width
    # Three sums or products of a number each, forward; backward twice as many; two layers.
    assert timing.step_flops(own, sizes, stretch) == counted + 128 * (100 * 12 * head_width + 2 * 18 * own.width)


def test_visited_keys_are_those_of_the_dense_mask():
    """Paired layers: 2 T positions, of which the first of a token may open a document, half the heads."""
    model, starts, expected = small_model(preset="gpt2"), random_batch(3, 64).starts, 0
    two = torch.stack((starts, torch.zeros_like(starts)), -1).flatten(1)
    for block in model.blocks:
        if block.attends:
            seen = int(dense_mask(two if block.paired else starts, (24, 8)[block.short]).sum())
            expected += seen * model.config.heads // (1 + block.paired)
    assert timing.visited_keys(model.config, starts, (24, 8)) == expected


def test_the_whole_run_costs_what_its_specification_says():
    """About 0.70 to 0.73 GFLOP a token: 114 million numbers of matrices and head, and some 130 keys of a layer."""
    stages = timing.stretches(GPT2)
    each = [timing.step_flops(GPT2, SIZES, s) / train_gpt2.value_at(GPT2.tokens_per_step, s.stages[0]) for s in stages]
    matrices = 6 * (50_304 * 768 + 10 * 4 * 768**2 + 11 * 8 * 768**2)
    assert all(low < high for low, high in zip(each, each[1:], strict=False))
    assert all(1.01 * matrices < flop < 1.09 * matrices for flop in each)
    total = sum((s.end - s.begin) * timing.step_flops(GPT2, SIZES, s) for s in stages)
    assert total == pytest.approx(260e15, rel=0.01)


@pytest.mark.parametrize(("preset", "dtype"), [("gpt2", "bfloat16"), ("gpt2", "float32"), ("tiny", "bfloat16")])
@pytest.mark.parametrize("world", [1, 4])
def test_weights_gradients_and_state_are_predicted_to_the_byte(preset, dtype, world, monkeypatch):
    monkeypatch.setattr(train_gpt2.dist, "broadcast", lambda *_: None)
    config = small_config(preset, dtype=dtype, bigram=3, **EIGHT_ROWS)
    model = GPT(config, 250, [0] * 250 if config.prefix_weight else None)
    groups = optimizer_groups(model, Processes(1 % world, world, ALONE.device)).values()
    found = timing.predicted_memory(config, timing.model_sizes(config, 250), world)
    assert found["weights"] == sum(g.weights.nbytes for g in groups)
    assert found["gradients"] == sum(g.gradients.nbytes + g.own_gradient.nbytes * (world > 1) for g in groups)
    state = [t for g in groups for t in (*g.state, g.scale if isinstance(g, train_gpt2.Muon) else g.settings)]
    assert found["optimizer"] == sum(t.nbytes for t in state)
    assert found["tables"] == sum(b.nbytes for b in model.buffers())


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "recompute"), [("five-minute", True), ("gpt2", False), ("five-minute", False)])
def test_compiled_activations_are_predicted_within_a_twentieth(preset, recompute, monkeypatch):
    """The GPU's partitioner decides what is kept, and works here as well; FlexAttention's backward does
    not, so SDPA stands in for it, but for the numbers that it makes of masks."""
    def masks(model, starts, windows):
        two = torch.stack((starts, torch.zeros_like(starts)), -1).flatten(1)
        return {(block.short, block.paired): dense_mask(two if block.paired else starts, windows[block.short])[:, None]
                for block in model.blocks if block.attends}

    def note(tensor):
        memory, (*_, heads, rows, columns) = tensor.untyped_storage(), (0, 0, 0, 0, *tensor.shape)
        if memory.data_ptr() not in own and not (heads == 1 and rows == columns):
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    compile_with = torch.compile
    monkeypatch.setattr(train_gpt2, "attention_masks", masks)
    monkeypatch.setattr(train_gpt2, "attention", lambda query, key, value, mask, _: scaled_dot_product_attention(
        query, key, value, mask, scale=1.0))
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_with(
        function, backend="aot_eager_decomp_partition", **options))
    torch._dynamo.config.recompile_limit = 1000
    config = small_config(preset, dtype="float32", recompute=recompute, **EIGHT_ROWS, **FEW_LAYERS[preset])
    model = GPT(config, 128, compiled=True)
    own, kept = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}, {}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch._dynamo.config.patch(
            recompile_limit=64):
        assert model.loss(random_batch(8, 256, 120), phase_at(0, config))[0].requires_grad
    predicted = timing.predicted_memory(config, timing.model_sizes(config, 128), 1)["activations"]
    assert predicted == pytest.approx(sum(kept.values()), rel=0.05)


def test_the_peak_that_an_h100_had_is_predicted():
    """With the chunks of the loss as they were then."""
    config = Config(**preset_values("five-minute") | {"dtype": "bfloat16", "loss_chunk": 8192})
    predicted = timing.predicted_memory(config, timing.model_sizes(config, 50257), 1)
    assert sum(predicted.values()) / MIB == pytest.approx(26_459, rel=timing.ACCURACY)


def test_memory_falls_with_recomputation_and_processes():
    whole, shared = (timing.predicted_memory(GPT2, SIZES, world) for world in (1, 8))
    less = timing.predicted_memory(replace(GPT2, recompute=True, loss_chunk=2048), SIZES, 1)
    assert sum(less.values()) < 0.5 * sum(whole.values())
    assert 7.5 * shared["optimizer"] < whole["optimizer"] < 8 * shared["optimizer"]  # matrices are not divided


def fitting(gib: float, world: int = 1) -> dict | None:
    return timing.settings_that_fit(GPT2, SIZES, world, round(gib * GIB))


def test_the_first_settings_that_fit_change_no_more_than_they_must():
    """Fewer tokens of a pass first, then shorter chunks, then recomputation; nothing if nothing helps."""
    assert fitting(80) == fitting(40) == {} and fitting(2) is None
    seen = []
    for gib in range(36, 12, -1):
        if changes := fitting(gib):
            for name in changes:
                less = replace(GPT2, **{other: value for other, value in changes.items() if other != name})
                assert timing.needed_memory(less, SIZES, 1) > gib * GIB
            assert timing.needed_memory(replace(GPT2, **changes), SIZES, 1) <= gib * GIB
            seen.append(tuple(changes))
    assert list(dict.fromkeys(seen)) == [("micro_tokens",), ("micro_tokens", "loss_chunk"), ("recompute",),
                                         ("recompute", "loss_chunk")]


@pytest.mark.parametrize(("memories", "options", "printed"), [
    ([80, 80], [], ""), ([80, 31], [], "--micro-tokens 32768"), ([25], [], "--recompute true"), ([2], [], ""),
    ([20], ["--micro-tokens", "65536"], ""), ([20], ["--device", "cpu"], ""), ([], [], "")])
def test_fit_prints_what_the_smallest_gpu_needs_and_nothing_else(memories, options, printed, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memories))
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda gpu: SimpleNamespace(total_memory=memories[gpu] * GIB))
    timing.main(["--fit", "--train-files", "no_train_*.bin", *options])
    found = capsys.readouterr()
    assert found.out.strip() == printed
    assert ("GiB" in found.err) == bool(memories and not options) and (printed in found.err or not printed)


def test_gpu_memory_names_what_was_chosen_and_predicts_that(capsys, corpus):
    timing.main(["--gpu-memory", "20"])
    choice, kind, memory, _ = capsys.readouterr().out.splitlines()
    assert "--recompute true" in choice and "50,257" in kind
    assert 5 < float(re.search(r"training ([\d.]+) GiB", memory)[1]) < 20
    timing.main([*command(corpus, SMALL), "--memory-only", "true"])
    assert "257 different tokens" in capsys.readouterr().out  # those of the shards
    assert timing.vocabulary_of(Config(**preset_values("tiny"), )) == (257, 256)


def test_inner_sections_pause_the_outer_one(monkeypatch):
    clock = iter([0, 1, 3, 7, 15])  # begin outer, begin inner, end inner, end outer
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    sections = timing.Sections(ALONE.device)
    with sections.section("outer"), sections.section("inner"):
        pass
    assert sections.seconds == {"outer": 1 + 4, "inner": 2}


def test_steps_with_adam_and_without_weigh_as_often_as_they_occur():
    measured = [("with Adam", {"step": s}) for s in (4.0, 6.0, 100.0)] + [("without", {"step": 1.0})]
    assert timing.averaged(measured, Counter({"with Adam": 1, "without": 3})) == {"step": (6 + 3 * 1) / 4}
    assert timing.averaged(measured[3:], Counter({"with Adam": 1, "without": 3})) == {"step": 1.0}


def test_stages_cover_the_run_once_and_equal_ones_are_measured_together():
    apart, together = (timing.stretches(config) for config in (Config(), Config(**preset_values("five-minute"))))
    assert [s.name for s in apart] == ["0", "1", "2", "3"] and [s.name for s in together] == ["0-2"]
    assert [(s.begin, s.end) for s in apart] == [(0, 455), (455, 910), (910, 1365), (1365, 1375)]
    assert together[0][1:] == (0, 1875)
    assert apart[1].steps(4, 2) == [682, 683, 684, 685]
    short = timing.Stretch((0,), 4, 7)
    assert short.steps(2, 2) == [5, 6] and short.steps(5, 2) == [5, 4, 5, 4, 5]
    assert short.steps(4, 1) == [5, 6, 4, 5] and timing.Stretch((0,), 4, 5).steps(3, 2) == [4, 4, 4]


def test_watched_steps_train_as_others_do(corpus):
    """The sections only look on: same weights, and nothing stays behind."""
    config = train_gpt2.parse_command_line(command(corpus, RECIPE | FEW))
    stream, ends, untouched = train_gpt2.TokenStream(config.train_files), [], train_gpt2.apply_updates
    for run in (timing.sectioned_steps, timing.whole_steps):
        model = GPT(config, stream.vocabulary)
        groups = optimizer_groups(model, ALONE)
        batches = timing.stretch_batches(stream, config, 0, 3, ALONE)
        list(run(model, groups, batches, [0, 1, 2], ALONE))
        batches.close()
        ends.append(torch.cat([g.weights.flatten() for g in groups.values()]))
    assert torch.equal(*ends) and train_gpt2.apply_updates is untouched


def test_communication_is_the_time_of_waiting(corpus):
    config = train_gpt2.parse_command_line(command(corpus, SMALL))
    model = GPT(config, 257)
    groups = optimizer_groups(model, ALONE)
    groups["mlp.early"].work = SimpleNamespace(wait=lambda: time.sleep(0.2))
    batches = timing.stretch_batches(train_gpt2.TokenStream(config.train_files), config, 0, 2, ALONE)
    (_, slow), (_, fast) = timing.sectioned_steps(model, groups, batches, [0, 1], ALONE)
    batches.close()
    assert slow["communication"] >= 0.2 and fast["communication"] < 0.1


def test_the_whole_tool_and_the_run_is_the_sum_of_its_stages(corpus, tmp_path, capsys):
    path, shards = tmp_path / "timing.json", str(corpus / "text_train_*.bin")
    figures = timing.main([*command(corpus, RECIPE | FEW), "--timed-steps", "2", f"--json={path}"])
    text, stages = capsys.readouterr().out, figures["stages"]
    assert json.loads(path.read_text())["stages"] == stages and f"rows of {shards}" in text
    assert figures["run seconds"] == pytest.approx(sum(s["steps"] * s["ms/step"] for s in stages) / 1000)
    assert [(s["stage"], s["steps"], s["tokens/step"], s["windows"]) for s in stages] == [
        ("0", 3, 1024, "64/16"), ("1", 3, 2048, "96/32"), ("2", 3, 3072, "128/48"), ("3", 3, 3072, "160/64")]
    for stage in stages:
        sections = {name: stage[f"ms in {name}"] for name in timing.SECTIONS}
        assert min(sections.values()) > 0 and sum(sections.values()) == pytest.approx(stage["ms in sections"])
        assert stage["tokens/s"] == pytest.approx(1000 * stage["tokens/step"] / stage["ms/step"], abs=1)
        assert stage["ms with Adam"] > 0 and stage["ms without Adam"] > 0 and stage["peak GiB"] > 0.1
    rows = [line for line in text.splitlines() if line.split("  ")[0] in stages[0]]
    known = [name for name, value in stages[0].items() if value is not None]
    assert [line.split("  ")[0] for line in rows] == known and len({len(line) for line in rows}) == 1
    assert f"{figures['run seconds']:,.1f} s" in text


def test_two_processes_can_share_the_compilation_of_a_stage(corpus, monkeypatch):
    """One of them compiles backward graphs at once, and leaves validation to the other."""
    calls, step = [], train_gpt2.train_step
    monkeypatch.setattr(train_gpt2, "validate", lambda *_: calls.append("validation"))
    monkeypatch.setattr(train_gpt2, "train_step", lambda *anything: calls.append(
        torch._functorch.config.force_non_lazy_backward_lowering) or step(*anything))
    monkeypatch.setattr(torch._functorch.config, "force_non_lazy_backward_lowering", False)  # and put back
    for options, expected in (([], [False, False, "validation"]), (["--backward-first"], [True, True])):
        calls.clear()
        assert timing.main([*command(corpus, RECIPE | FEW), "--timed-steps=0", "--stages=0", *options]) == {}
        assert calls == expected


@pytest.mark.slow
def test_made_up_rows_where_no_shard_is_and_one_stage_alone(tmp_path, capsys):
    small = [f"--{name.replace('_', '-')}={value}" for name, value in (RECIPE | FEW).items()]
    figures = timing.main([*small, "--bigram=0", f"--train-files={tmp_path}/no_train_*.bin",
                           "--timed-steps=2", "--stages=2"])
    assert [s["stage"] for s in figures["stages"]] == ["2"] and "made-up" in figures["rows"]
    tokens = timing.made_up_tokens(10**6)
    assert 0.9 < (tokens == 50256).sum() * timing.TYPICAL_DOCUMENT / len(tokens) < 1.1


@pytest.mark.slow
def test_two_processes_share_a_step_and_wait_for_each_other(corpus, tmp_path):
    path = tmp_path / "timing.json"
    done = torchrun(2, ROOT / "records" / "timing.py", *command(corpus, SMALL), "--timed-steps=2", f"--json={path}")
    assert done.returncode == 0, done.stderr
    stage, = json.loads(path.read_text())["stages"]
    assert done.stdout.count("predicted run") == 1 and stage["ms in communication"] > 0
    assert stage["tokens/step"] == 1024


@pytest.mark.parametrize(("arguments", "needle"), [
    (["--timed-steps", "1"], "--adam-every 2"), (["--timed-steps"], "--timed-steps"), (["--stages", "7"], "--stages"),
    (["--preset", "tiny", "--json", "/nowhere/at/all.json"], "/nowhere"), (["--memory-only", "yes"], "--memory-only"),
    (["--timed-stepz", "3"], "--timed-stepz"), (["--gpu-memory", "lots"], "--gpu-memory"),
    *(([f"--gpu-memory={value}"], "is not from 0 to 1e6 GiB") for value in ("nan", "inf", "-5"))])
def test_bad_input_is_one_line(arguments, needle):
    with pytest.raises(UserError) as error:
        timing.main(arguments)
    assert needle in str(error.value) and "\n" not in str(error.value)
    assert "WORLD_SIZE" not in os.environ


def test_figures_are_printed_where_their_file_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr(timing, "measure", lambda *_: {"run seconds": 1.0})
    monkeypatch.setattr(timing, "table", lambda _: "the table")
    with pytest.raises(UserError, match="No space left"):
        timing.main(["--preset", "tiny", "--train-files", "no_train_*.bin", "--json", "/dev/full"])
    assert capsys.readouterr().out == "the table\n"


def test_a_number_of_gpus_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(train_gpt2.UserError, match="WORLD_SIZE"):
        timing.main(["--preset", "tiny", "--memory-only", "true"])


def test_bytes_between_processes_are_those_of_reducing_and_gathering(monkeypatch, capsys):
    sent = timing.exchanged(SIZES, 8)
    assert list(sent) == [group.name for group in SIZES.groups] and not any(timing.exchanged(SIZES, 1).values())
    matrices = 11 * 2 * 4 * 768**2 * 2  # of the MLPs, in bfloat16
    assert sent["mlp.early"] + sent["mlp.late"] == pytest.approx(2 * matrices * 7 / 8)
    assert sent["head"] == pytest.approx(50304 * 768 * 2 * 7 / 8)  # every second step
    monkeypatch.setenv("WORLD_SIZE", "8")
    timing.main(["--memory-only", "true"])
    assert "mlp.late" in capsys.readouterr().out.splitlines()[-1]
