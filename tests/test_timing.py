"""records/timing.py: the work of a step against counts by other means, memory against what a step really takes, and the
whole tool at a small size."""

import gc
import json
import re
import sys
import time
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2
from tools import RECIPE, ROOT, SMALL, command, dense_mask, random_batch, small_model, torchrun, write_corpus
from train_gpt2 import PRESETS, Config, Processes, Refusal, attention_masks, optimizer_groups, train_step

sys.path.insert(0, str(ROOT / "records"))
import timing

HERE = Processes(0, 1, torch.device("cpu"))
SIZES = dict(width=64, heads=2, row_tokens=(256,), val_row_tokens=256, tokens_per_step=(2048,), micro_tokens=2048,
             window=(64,), window_short=(32,), loss_chunk=256)


def sized(preset: str, **changes) -> Config:
    return Config(**{**PRESETS[preset], "preset": preset, **SIZES, **changes})


@pytest.mark.parametrize("preset", ["five-minute", "gpt2"])
def test_linear_flops_are_those_of_the_products_that_are_executed(preset):
    """Gates are switched off: their 12 channels count as no work of the model."""
    model = small_model(preset=preset, dtype=torch.float32, loss_chunk=64, attention_gates=False, value_gates=False,
                        gated_skip=(), smear=False)
    batch = random_batch(2, 64)
    masks = attention_masks(model, batch.starts, (24, 8))
    with FlopCounterMode(display=False) as counter:
        loss = model.loss(batch, masks)[0]
        counted = Counter({str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()})
        loss.backward()
    products = ("aten.mm", "aten.addmm", "aten.bmm")
    forward = sum(counted[name] for name in products)
    everything = sum(flop for op, flop in counter.get_flop_counts()["Global"].items() if str(op) in products)
    expected = timing.model_flops(model.config, timing.model_shapes(model.config, 50, torch.float32), 2 * 64, 0)
    assert forward == expected["forward"] + expected["loss"]
    assert everything == sum(expected.values())
    weights = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 3) + model.head.numel()
    assert sum(expected.values()) == 6 * 2 * 64 * weights


def test_attention_flops_are_four_per_head_channel_and_key_and_twice_that_backward():
    shapes = timing.model_shapes(sized("gpt2"), 256, torch.float32)
    with_keys, without = (timing.model_flops(sized("gpt2"), shapes, 10, keys) for keys in (1000, 0))
    assert with_keys["forward"] - without["forward"] == 4 * 32 * 1000  # heads are 32 wide
    assert with_keys["backward"] - without["backward"] == 8 * 32 * 1000


def test_visited_keys_are_those_of_the_dense_mask():
    """Paired layers: 2 T positions, a document's two positions of a token belong to it, half the heads."""
    model = small_model(preset="gpt2")  # layers 0, 2, 5, 9 paired, 6 without attention
    config, starts = model.config, random_batch(3, 64).starts
    expected = 0
    for layer in model.plan:
        if layer.attends:
            window = (24, 8)[layer.short]
            if layer.paired:
                seen = torch.zeros(3, 128, dtype=torch.bool)
                seen[:, ::2] = starts
                expected += int(dense_mask(seen, window).sum()) * config.heads // 2
            else:
                expected += int(dense_mask(starts, window).sum()) * config.heads
    assert timing.visited_keys(config, starts, (24, 8)) == expected


@pytest.mark.parametrize("preset, dtype", [("gpt2", torch.bfloat16), ("gpt2", torch.float32),
                                           ("five-minute", torch.bfloat16)])
@pytest.mark.parametrize("world", [1, 4])
def test_weights_gradients_and_state_are_predicted_to_the_byte(preset, dtype, world, monkeypatch):
    monkeypatch.setattr(train_gpt2.dist, "broadcast", lambda *_: None)
    config = sized(preset, bigram=3 if preset == "gpt2" else 0)
    model = train_gpt2.GPT(config, 250, dtype)
    groups = optimizer_groups(model, config, dtype, Processes(1 % world, world, HERE.device)).values()
    predicted = timing.predicted_memory(config, 250, dtype, world, HERE.device)
    assert predicted["weights"] == sum(g.weights.nbytes for g in groups)
    assert predicted["gradients"] == sum(g.gradients.nbytes + (g.shard_gradient.nbytes if world > 1 else 0)
                                         for g in groups)
    extra = [getattr(g, "settings", None) if hasattr(g, "settings") else g.scale for g in groups]
    assert predicted["optimizer"] == sum(t.nbytes for g in groups for t in g.state) + sum(t.nbytes for t in extra)
    assert predicted["tables"] == sum(b.nbytes for b in model.buffers())


def kept_bytes(model, batch, masks) -> int:
    """What autograd keeps for backward, parameters and masks aside, each piece of memory once."""
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    own |= {span.visible.untyped_storage().data_ptr() for spans in masks.values() for span in spans}
    kept = {}

    def note(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = model.loss(batch, masks)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("preset, changes", [("gpt2", {}), ("five-minute", {}), ("tiny", dict(bigram=0, smear=False))])
def test_activations_are_predicted_within_a_twentieth(preset, changes, recompute):
    for dtype in (torch.float32, torch.bfloat16):
        config = sized(preset, recompute=recompute, **changes)
        model, batch = train_gpt2.GPT(config, 128, dtype), random_batch(8, 256, 120)
        actual = kept_bytes(model, batch, attention_masks(model, batch.starts, (64, 32)))
        predicted = timing.predicted_memory(config, 128, dtype, 1, HERE.device)["activations"]
        assert abs(predicted / actual - 1) < 0.05, (dtype, predicted, actual)


class PeakBytes(TorchDispatchMode):
    """Bytes of all tensors made inside it that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                memory = tensor.untyped_storage()
                self.alive.add(memory._cdata)
                self.now += memory.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self.freed, memory._cdata, memory.nbytes())
        return result

    def freed(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("vocabulary, changes", [(128, dict()), (128, dict(recompute=True)),
                                                 (1024, dict(loss_chunk=4096)), (128, dict(bigram=2000))])
def test_peak_of_an_eager_step_is_predicted_within_a_tenth(vocabulary, changes):
    """In turn it is activations, the backward pass, the loss and the update that need most."""
    config = sized("gpt2", long_documents="continue", **changes)
    batch = random_batch(8, 256, 120)
    with PeakBytes() as memory:
        model = train_gpt2.GPT(config, vocabulary, torch.float32)
        groups = optimizer_groups(model, config, torch.float32, HERE)
        gc.collect()
        before = memory.peak = memory.now
        train_step(model, groups, batch, 1)
    predicted = timing.predicted_memory(config, vocabulary, torch.float32, 1, HERE.device)
    still = sum(predicted[name] for name in ("weights", "gradients", "optimizer", "tables"))
    assert before == pytest.approx(still, rel=0.001)
    assert abs(sum(predicted.values()) / memory.peak - 1) < 0.1, (predicted, memory.peak)
    assert abs((sum(predicted.values()) - still) / (memory.peak - before) - 1) < 0.1


def test_prediction_for_a_gpu_needs_no_gpu_and_falls_with_recomputation_and_processes():
    gpu = torch.device("cuda")

    def predicted(world=1, **changes):
        return timing.predicted_memory(replace(Config(), **changes), 50257, torch.bfloat16, world, gpu)

    whole, small = sum(predicted().values()), sum(predicted(recompute=True, loss_chunk=2048).values())
    assert small < 22e9 < whole < 40e9
    shared = predicted(8)
    assert 7.9 * shared["optimizer"] < predicted()["optimizer"] < 8.1 * shared["optimizer"]


def test_peak_is_unknown_not_zero_where_the_machine_is(monkeypatch):
    assert timing.peak_rate(HERE.device, torch.bfloat16) is None
    for name, rate in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
                       ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12), ("Some GPU", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert timing.peak_rate(torch.device("cuda"), torch.bfloat16) == rate
        assert timing.peak_rate(torch.device("cuda"), torch.float32) is None


def test_inner_sections_pause_the_outer_one(monkeypatch):
    clock = iter([0, 1, 3, 7, 15])  # begin outer, begin inner, end inner, end outer
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    sections = timing.Sections(HERE.device)
    with sections.section("outer"), sections.section("inner"):
        pass
    assert sections.seconds == {"outer": 1 + 4, "inner": 2}


def test_steps_with_adam_and_without_weigh_as_often_as_they_occur():
    measured = [("with Adam", {"step": s}) for s in (4.0, 6.0, 100.0)] + [("without", {"step": 1.0})]
    assert timing.averaged(measured, Counter({"with Adam": 1, "without": 3})) == {"step": (6 + 3 * 1) / 4}
    assert timing.averaged(measured[3:], Counter({"with Adam": 1, "without": 3})) == {"step": 1.0}


def test_stages_cover_the_run_once_and_equal_ones_are_measured_together():
    apart, together = (timing.stretches(config) for config in (Config(), Config(**PRESETS["five-minute"])))
    assert [s.name for s in apart] == ["0", "1", "2", "3"] and [s.name for s in together] == ["0-2"]
    assert [(s.begin, s.end) for s in apart] == [(0, 520), (520, 1040), (1040, 1560), (1560, 1600)]
    assert together[0][1:] == (0, 1875)
    assert apart[1].steps(4, 2) == [780, 781, 782, 783]
    short = timing.Stretch((0,), 4, 7)
    assert short.steps(2, 2) == [5, 6] and short.steps(5, 2) == [5, 4, 5, 4, 5]
    assert short.steps(4, 1) == [5, 6, 4, 5] and timing.Stretch((0,), 4, 5).steps(3, 2) == [4, 4, 4]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_watched_steps_train_as_others_do(corpus):
    """The sections only look on: same weights, and nothing stays behind."""
    config = train_gpt2.parse_command_line(command(corpus, RECIPE))
    stream, ends, untouched = train_gpt2.TokenStream(config.train_files), [], train_gpt2.apply_updates
    for run in (timing.sectioned_steps, timing.whole_steps):
        model = train_gpt2.GPT(config, stream.vocabulary, torch.float32)
        groups = optimizer_groups(model, config, torch.float32, HERE)
        batches = timing.stretch_batches(stream, config, 0, 3, HERE)
        list(run(model, groups, batches, [0, 1, 2], HERE))
        batches.close()
        ends.append(torch.cat([g.weights.flatten() for g in groups.values()]))
    assert torch.equal(*ends) and train_gpt2.apply_updates is untouched


def test_communication_is_the_time_of_waiting(corpus):
    config = train_gpt2.parse_command_line(command(corpus, SMALL))
    model = train_gpt2.GPT(config, 257, torch.float32)
    groups = optimizer_groups(model, config, torch.float32, HERE)
    groups["mlp"].work = SimpleNamespace(wait=lambda: time.sleep(0.2))
    batches = timing.stretch_batches(train_gpt2.TokenStream(config.train_files), config, 0, 2, HERE)
    (_, slow), (_, fast) = timing.sectioned_steps(model, groups, batches, [0, 1], HERE)
    batches.close()
    assert slow["communication"] >= 0.2 > 0.1 > fast["communication"]


def test_whole_tool_prints_every_row_and_the_run_is_the_sum_of_its_stages(corpus, tmp_path, capsys):
    path = tmp_path / "timing.json"
    figures = timing.main([*command(corpus, RECIPE), "--timed-steps", "2", f"--json={path}"])
    written, text = json.loads(path.read_text()), capsys.readouterr().out
    stages = figures["stages"]
    assert [s["stage"] for s in stages] == ["0", "1", "2", "3"] and sum(s["steps"] for s in stages) == 12
    assert written["run seconds"] == figures["run seconds"] == pytest.approx(sum(
        s["steps"] * s["seconds"] for s in stages))
    table = text[text.index("\nstage  "):].strip().split("\n")
    assert [re.split(r"\s{2,}", line.strip())[0] for line in table] == [
        "stage", "steps", "tokens/step", "tokens/row", "windows, long/short", "softmax scale", "ms/step", "with Adam",
        "without", "ms/step in sections", *timing.SECTIONS, "rest", "tokens/s", "keys/query", "MFU of peak",
        "MFU of matmul rate", "peak MiB", "predicted", "predicted run, s"]
    assert all(len(line.split()) > 4 for line in table[:3]) and max(map(len, table)) <= 120
    assert {len(line) for line in table if line.endswith("%") or line.startswith(("steps", "ms/step  "))} == {
        len(table[0])}
    assert table[-5].split()[-5:] == ["unknown"] * 5 and f"rows of {corpus}" in text
    for stage, tokens, windows in zip(stages, (1024, 2048, 3072, 3072), ((64, 16), (96, 32), (128, 48), (160, 64)),
                                      strict=True):
        assert stage["tokens per step"] == tokens and tuple(stage["windows"]) == windows
        assert stage["tokens per second"] == pytest.approx(tokens / stage["seconds"])
        assert stage["with Adam"] > 0 and stage["without Adam"] > 0
        assert all(stage["sections"][name] > 0 for name in timing.SECTIONS)
        assert sum(stage["sections"].values()) == pytest.approx(stage["in sections"], rel=0.3)
        for name in ("forward", "loss", "backward", "optimizer"):
            assert stage["FLOP"][name] > 0 and stage["bytes"][name] > 0
        assert stage["bytes"]["communication"] == 0
        for name in timing.SECTIONS:
            assert f"stage {stage['stage']}, {name} " in text
    scales = [s["softmax scale"] for s in stages]
    assert scales == sorted(set(scales))  # YaRN: sharper with each window


def test_two_processes_share_a_step_and_wait_for_each_other(corpus, tmp_path):
    path = tmp_path / "timing.json"
    done = torchrun(2, ROOT / "records" / "timing.py", *command(corpus, SMALL), "--timed-steps=2", f"--json={path}")
    assert done.returncode == 0, done.stderr
    stage, = json.loads(path.read_text())["stages"]
    assert done.stdout.count("predicted run, s") == 1 and stage["sections"]["communication"] > 0
    assert stage["bytes"]["communication"] > 0 and stage["tokens per step"] == 1024


def test_made_up_rows_where_no_shard_is(tmp_path):
    stream, said = timing.open_rows(replace(sized("gpt2"), train_files=str(tmp_path / "none_*.bin")), str(tmp_path))
    assert "made-up" in said and stream.vocabulary == 50257
    starts = int(stream.read(0, stream.tokens)[1].sum())
    assert 0.5 < starts * timing.TYPICAL_DOCUMENT / stream.tokens < 2


@pytest.mark.parametrize("arguments, needle", [
    (["--timed-steps", "0"], "--timed-steps 0 is not a whole number"), (["--timed-steps"], "--timed-steps needs"),
    (["--timed-steps", "1"], "--timed-steps 2"), (["--json", "/nowhere/at/all.json"], "cannot write /nowhere"),
    (["--memory-only", "yes"], "--memory-only true"), (["--timed-stepz", "3"], "unknown option")])
def test_refusals_are_one_line_with_the_remedy(arguments, needle):
    with pytest.raises(Refusal) as refused:
        timing.main(arguments)
    assert needle in str(refused.value) and "\n" not in str(refused.value)


# What fits


GIB = 2**30
GPT2 = Config(), 50257, torch.bfloat16


def fitting(gib: float, config: Config = GPT2[0], world: int = 1) -> dict | None:
    return timing.settings_that_fit(config, *GPT2[1:], world, torch.device("cuda"), round(gib * GIB))


def test_what_fits_is_changed_in_nothing_and_what_cannot_is_given_up():
    assert fitting(80) == fitting(40) == {}
    assert fitting(24, world=8) == {}
    assert fitting(2) is None


def test_the_first_settings_that_fit_change_no_more_than_they_must():
    """Fewer tokens per pass first, then recomputation, then shorter chunks; the next smaller change does not fit."""
    gpu, seen = torch.device("cuda"), []
    for tenths in range(300, 60, -2):
        changes = fitting(tenths / 10)
        if not changes:
            continue
        peak = timing.peak_bytes(replace(GPT2[0], **changes), *GPT2[1:], 1, gpu)
        assert peak <= tenths / 10 * GIB < timing.peak_bytes(*GPT2, 1, gpu)
        for name in changes:
            less = {other: value for other, value in changes.items() if other != name}
            assert timing.peak_bytes(replace(GPT2[0], **less), *GPT2[1:], 1, gpu) > tenths / 10 * GIB
        seen.append(tuple(sorted(changes)))
    kinds = sorted(set(seen), key=seen.index)
    assert kinds[:2] == [("micro_tokens",), ("recompute",)] and any("loss_chunk" in kind for kind in kinds)


@pytest.mark.parametrize("gib, micro, taken", [(80, 0, {}), (24, 0, {"micro_tokens": 32_768}), (24, 65_536, {}),
                                               (16, 0, {"recompute": True}), (16, 65_536, {}), (4, 0, {})])
def test_micro_tokens_auto_takes_what_fits_before_anything_is_compiled(monkeypatch, gib, micro, taken):
    """Where the number was given, the settings that fit are only named."""
    lines = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * GIB))
    log = SimpleNamespace(line=lines.append)
    config = replace(GPT2[0], micro_tokens=micro)
    fitted = train_gpt2.fitted(config, *GPT2[1:], Processes(0, 1, torch.device("cuda")), log)
    assert fitted == replace(config, **taken)
    assert f"of {gib:.1f} GiB" in lines[0] and (("will not fit" in lines[0]) == (gib < 80))
    assert ("--micro-tokens 32768" in lines[0]) == (gib == 24) and ("--recompute true" in lines[0]) == (gib == 16)
    assert train_gpt2.fitted(config, *GPT2[1:], HERE, log) == config and len(lines) == 1 + bool(taken)


def test_memory_only_names_what_fits(capsys):
    timing.main(["--memory-only", "true", "--gpu-memory", "16"])
    kind, fits, training, *_ = capsys.readouterr().out.splitlines()
    assert "50,257 different tokens" in kind and fits.endswith("the same training fits with --recompute true")
    peak = float(re.search(r"process in training ([\d,.]+) MiB", training)[1].replace(",", ""))  # of what fits
    assert 1024 < peak < 16 * 1024 < sum(timing.predicted_memory(
        Config(), 50257, torch.bfloat16, 1, torch.device("cuda")).values()) / timing.MIB


def test_the_vocabulary_is_that_of_the_shards(corpus, capsys):
    timing.main([*command(corpus, SMALL), "--memory-only", "true"])
    assert "257 different tokens" in capsys.readouterr().out
    assert timing.vocabulary_of(Config(**PRESETS["tiny"])) == (257, 256)
    assert timing.vocabulary_of(Config(train_files="nothing*.bin")) == (50257, 50256)


def test_more_than_this_machine_has_is_refused(corpus, monkeypatch):
    monkeypatch.setattr(timing, "free_memory", lambda: 1e6)
    with pytest.raises(Refusal, match="0.0 GiB of memory free, fewer than these steps take"):
        timing.main(command(corpus, SMALL))
    with pytest.raises(Refusal, match="--gpu-memory lots is not a number"):
        timing.main(["--memory-only", "true", "--gpu-memory", "lots"])
