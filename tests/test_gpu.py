"""What only a GPU can show, against the same on a CPU: its attention kernels, float8 products, compiled updates and
whole runs. `pytest -m gpu` runs these on a machine with a GPU; a plain run takes the variants that need none."""

import dataclasses
import itertools
import math
import sys

import pytest
import torch
from tools import (
    RECIPE,
    ROOT,
    SMALL,
    dense_mask,
    losses,
    random_batch,
    run_here,
    small_model,
    weights,
)
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

import train_gpt2
from train_gpt2 import HEAD_UNIT, PRESETS, Batch, Config, Muon, Processes, attend, attention_masks

sys.path.insert(0, str(ROOT / "records"))
import doctor

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = pytest.param("cuda", marks=NEEDS_GPU)
on_gpu = pytest.mark.parametrize("device", [GPU])
on_both = pytest.mark.parametrize("device", ["cpu", GPU])
# Head widths that FlexAttention's kernels take, rows of whole mask blocks; the numbers of the tests are small else.
WIDE = {"width": 128, "heads": 4, "row_tokens": (256, 384), "val_row_tokens": 384, "loss_chunk": 128}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compilers know nothing of earlier tests, and what a test sets them to ends with it."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def alone(device: str) -> Processes:
    return Processes(0, 1, torch.device(device))


def moved(batch: Batch, device: str) -> Batch:
    return Batch(*(part.to(device) for part in batch[:3]))


def compiled_on_gpu(function, device: str):
    return torch.compile(function, dynamic=False, fullgraph=True) if device == "cuda" else function


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm. NaN where one of them is."""
    return doctor.relative_error(found.cpu(), expected.cpu())


# ---- attention -------------------------------------------------------------------------------------------------------

LAYOUTS = {  # (documents, window, paired heads)
    "plain": (False, 10_000, False), "windowed": (False, 200, False), "documents": (True, 10_000, False),
    "documents and window": (True, 90, False), "paired": (True, 300, True)}
# bfloat16 keeps 8 bits: results, softmax and slopes are off by 0.2 to 0.4 % each. float32 may go through units that
# keep 11 bits. A mask that is off by one token errs by 1 % and more.
TOLERANCE = {torch.bfloat16: (0.008, 0.015), torch.float32: (0.001, 0.002)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("device", "dtype"), [
    ("cpu", torch.float32), pytest.param("cuda", torch.float32, marks=NEEDS_GPU),
    pytest.param("cuda", torch.bfloat16, marks=NEEDS_GPU)])
def test_flex_attention_layouts(device, dtype, layout):
    """Forward and backward against a dense softmax in float32. On a CPU there is no backward, and what is not compiled
    takes the rule of the mask alone, not its blocks: see test_mask.py for these."""
    (documents, window, paired), width = LAYOUTS[layout], 128 if device == "cuda" else 16
    draw = torch.Generator().manual_seed(0)
    starts = torch.rand(2, 512, generator=draw) < 0.01 * documents
    positions = torch.stack((starts, torch.zeros_like(starts)), -1).flatten(1) if paired else starts
    visible = dense_mask(positions, window)
    model = small_model(preset="gpt2", layers=1, short_layers=(), paired_layers=(0,) if paired else (), value_layers=(),
                        attention_free=(), gated_skip=(), backout=())
    model.compiled = True
    mask, = attention_masks(model, starts.to(device), (window, window)).values()
    drawn = [torch.randn(2, 2, positions.shape[1], width, generator=draw).to(dtype) for _ in range(4)]
    drawn[0] *= width**-0.5
    wide = [x.float().requires_grad_() for x in drawn[:3]]
    scores = (wide[0] @ wide[1].mT).masked_fill(~visible[:, None], -math.inf)
    expected = scores.softmax(-1) @ wide[2]
    expected.backward(drawn[3].float())
    leaves = [x.to(device).requires_grad_(device == "cuda") for x in drawn[:3]]
    output = compiled_on_gpu(attend, device)(*leaves, mask)
    assert output.dtype == dtype and error_of(output, expected) < TOLERANCE[dtype][0]
    if device == "cuda":
        output.backward(drawn[3].to(device))
        for leaf, reference in zip(leaves, wide, strict=True):
            assert error_of(leaf.grad, reference.grad) < TOLERANCE[dtype][1]


@on_gpu
def test_one_attention_kernel_serves_all_documents_and_windows(device):
    draw, flex = torch.Generator().manual_seed(0), compiled_on_gpu(attend, device)
    query, key, value = torch.randn(3, 2, 2, 512, 64, generator=draw).to(device).requires_grad_()
    rng = torch.Generator().manual_seed(1)
    for number, window in enumerate((100, 300, 10_000)):
        starts = torch.rand(2, 512, generator=rng) < 0.01
        mask = train_gpt2.block_mask(train_gpt2.first_visible_key(starts.to(device), window))
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            output = flex(0.1 * query, key, value, mask)
        expected = scaled_dot_product_attention(0.1 * query, key, value,
                                                dense_mask(starts, window).to(device)[:, None], scale=1.0)
        assert error_of(output, expected) < TOLERANCE[torch.float32][0]


# ---- the head in float8 ----------------------------------------------------------------------------------------------


@on_gpu
def test_float8_head_is_close_to_the_bfloat16_one(device):
    """At its real width and vocabulary. Rounding to 3 and 2 bits after the leading one errs by 3 and 6 % in the mean of
    squares; a product of two such operands by about 4 and 7 %."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    draw, width, vocabulary, tokens = torch.Generator().manual_seed(0), 768, 50_304, 2048
    hidden = torch.randn(tokens, width, generator=draw).to(device, torch.bfloat16)
    head = (0.05 * torch.randn(vocabulary, width, generator=draw)).to(device, torch.bfloat16)
    targets = torch.randint(-1, vocabulary, (tokens, 2), generator=draw).to(device)
    narrow = train_gpt2.float8(head, HEAD_UNIT, torch.float8_e4m3fn)
    chunk = torch.compile(train_gpt2.loss_of_chunk, dynamic=False, fullgraph=True)
    weighted = [torch.tensor(1.0), torch.tensor(0.5)]
    wide, float8 = (chunk(hidden, weight, turned, targets, weighted, Config.softcap, True)
                    for weight, turned in ((head, None), (narrow, narrow.mT.contiguous())))
    for found, expected in zip(float8[:2], wide[:2], strict=True):
        assert error_of(found, expected) < 0.01
    for found, expected in zip(float8[2:], wide[2:], strict=True):
        assert 0.01 < error_of(found, expected) < 0.12  # less than 1 %: it was no float8


# ---- the optimizers --------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_on_the_gpu_is_that_on_the_cpu(device, dtype):
    """All groups of the hundred-second recipe, three compiled updates. What is compared is how far the weights went. In
    bfloat16 the orthogonalisation rounds each of its products to 8 bits, in another order on each device."""
    def prepared(device: str) -> dict:
        model = small_model(preset="gpt2", spread=0.05, dtype=dtype, **WIDE).to(device)
        return train_gpt2.optimizer_groups(model, model.config, dtype, alone(device))

    def exact(group) -> torch.Tensor:
        split = isinstance(group, Muon) and len(group.state) == 3
        return (train_gpt2.joined(group.weights, group.state[2]) if split else group.weights).cpu().double()

    here, there, draw = prepared("cpu"), prepared(device), torch.Generator().manual_seed(0)
    first = {name: exact(group) for name, group in here.items()}
    for group in there.values():
        group.compile_update()
    for step, name in itertools.product((1, 3, 5), here):
        gradient = 0.01 * torch.randn(here[name].gradients.shape, generator=draw)
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            for group in (here[name], there[name]):
                group.gradients.copy_(gradient)
                group.update(step)
    for name, before in first.items():
        went = exact(here[name]) - before
        assert went.norm() > 0
        assert error_of(exact(there[name]) - before, went) < (0.001 if dtype == torch.float32 else 0.05), name


@on_both
def test_split_weights_hold_every_bit_of_a_float32(device):
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(257, 64, generator=draw) * 10.0 ** torch.randint(-30, 30, (257, 64), generator=draw)
    wide = torch.cat((wide, torch.tensor([0.0, -0.0, math.inf, 1e-40]).repeat(64).view(4, 64))).to(device)
    high, low = compiled_on_gpu(train_gpt2.split, device)(wide)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    back = compiled_on_gpu(train_gpt2.joined, device)(high, low)
    assert torch.equal(back.view(torch.int32), wide.view(torch.int32))


@on_both
def test_split_weights_go_as_far_as_float32_ones(device):
    """Thirty steps of which each alone is lost in bfloat16, that near 1 knows steps of 1/128 only."""
    config = Config(steps=100, muon_lr=1e-5, muon_decay=0.0, normuon_beta2=0.0, orthogonaliser="none", cooldown=0.0)
    first = (1 + torch.rand(2, 64, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    groups = []
    for dtype, where in ((torch.bfloat16, device), (torch.float32, "cpu")):
        parameter = torch.nn.Parameter(first.to(where, dtype))
        groups.append(Muon("m", [parameter], [1.0, 1.0], config, torch.float32, alone(where)))
    split, wide = groups
    if device == "cuda":
        split.compile_update()
    draw = torch.Generator().manual_seed(1)
    for step, group in itertools.product(range(30), groups):
        if group is split:
            gradient = torch.randn(first.shape, generator=draw)
        group.gradients.copy_(gradient.bfloat16())
        group.update(step)
    found = train_gpt2.joined(split.weights, split.state[2]).cpu()
    went = wide.weights - first.float()
    assert 0 < went.abs().max() < 1 / 256
    # float32 near 1 knows steps of 1.2e-7, of which thirty roundings leave one or two
    assert (found - wide.weights).abs().max() < 1e-6


# ---- the model -------------------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_gives_every_parameter_a_finite_gradient(device, preset, monkeypatch):
    """On a GPU the preset as it is, in two short rows; on a CPU a small one. No weight is zero, so no gradient is."""
    if device == "cpu":
        model = small_model(preset=preset, dtype=torch.float32, spread=0.3, row_tokens=(64,), tokens_per_step=(128,),
                            micro_tokens=64)
    else:
        row = 128 if preset == "tiny" else 2048
        config = dataclasses.replace(Config(**{**PRESETS[preset], "preset": preset}), row_tokens=(row,),
                                     tokens_per_step=(2 * row,), micro_tokens=row, val_row_tokens=row)
        dtype = train_gpt2.compute_dtype(config, torch.device(device))
        model = train_gpt2.GPT(config, 50_257, dtype).to(device)
        draw = torch.Generator(device).manual_seed(0)
        for parameter in model.parameters():
            parameter.data += (0.02 * torch.randn(parameter.shape, generator=draw, device=device)).to(parameter.dtype)
        model.float8 = train_gpt2.float8_head(config, dtype, torch.device(device))
        model.compile_parts()
    config, parameters = model.config, dict(model.named_parameters())
    groups = train_gpt2.optimizer_groups(model, config, model.dtype, alone(device))
    good, updates = [], train_gpt2.apply_updates

    def noted(*arguments) -> None:
        good.extend(name for name, p in parameters.items() if p.grad.isfinite().all() and p.grad.any())
        updates(*arguments)

    monkeypatch.setattr(train_gpt2, "apply_updates", noted)
    model.tied = "embedding" not in parameters  # where there are two tables, both take part
    reports = train_gpt2.train_step(model, groups, moved(random_batch(2, config.row_tokens[0]), device),
                                    config.adam_every - 1)
    assert math.isfinite(reports[0, 0].item()) and good == list(parameters)
    assert not train_gpt2.bad_parameters(model)


@on_gpu
@pytest.mark.parametrize("preset", ["five-minute", "gpt2"])
def test_compiled_gradients_on_the_gpu_are_the_eager_ones_of_the_cpu(device, preset):
    """float32 on both: what differs is the order of sums, and the 11 bits that some units keep."""
    here, there = (small_model(preset=preset, dtype=torch.float32, spread=0.2, **WIDE) for _ in range(2))
    there.to(device)
    there.compile_parts()
    batch = random_batch(2, 256)
    sums = []
    for model, rows in ((here, batch), (there, moved(batch, device))):
        loss, _ = model.loss(rows, attention_masks(model, rows.starts, (100, 30)), [1.0, 0.5])
        loss.backward()
        sums.append(loss.item())
    assert sums[1] == pytest.approx(sums[0], rel=1e-4)
    for (name, parameter), other in zip(here.named_parameters(), there.parameters(), strict=True):
        if parameter.grad is not None:
            assert error_of(other.grad, parameter.grad) < 0.005, name


# ---- whole runs ------------------------------------------------------------------------------------------------------


def assert_same_run(found, expected) -> None:
    """Every loss of two runs in float32, and the weights at the end, whose differences have grown from step to step."""
    for kind in ("train_loss", "val_loss"):
        assert losses(found, kind) == pytest.approx(losses(expected, kind), rel=0.002)
    for (name, weight), other in zip(weights(expected).items(), weights(found).values(), strict=True):
        assert error_of(other, weight) < 0.02, name


@on_gpu
@pytest.mark.parametrize(("base", "compiled"), [(SMALL, "auto"), (SMALL, "none"), (RECIPE, "none")],
                         ids=["five-minute", "five-minute-eager", "gpt2-eager"])
def test_a_run_on_the_gpu_is_that_on_the_cpu(device, corpus, tmp_path, base, compiled):
    """The hundred-second recipe, compiled, through all stages: see the test of the warm-up."""
    found, expected = (run_here(corpus, base=base, width=64, repeat=True, device=where, compile=compiled,
                                out=tmp_path / where) for where in (device, "cpu"))
    assert_same_run(found, expected)


def dense_masks(model, starts, windows) -> dict:
    """Stand-ins for the masks, whose kernels have no backward on a CPU: tensors, of one shape for all documents."""
    return {(layer.short, layer.paired): dense_mask(
        torch.stack((starts, torch.zeros_like(starts)), -1).flatten(1) if layer.paired else starts,
        windows[layer.short])[:, None] for layer in model.plan if layer.attends}


@on_both
def test_nothing_is_compiled_after_the_warm_up(device, corpus, tmp_path, monkeypatch):
    """All stages and the extension, each with its batch, row, windows, softmax scale and number of predicted tokens;
    the tables are untied on the way; rates and momentum change from step to step; validations in between. Three layers,
    each of its kind. The run is the eager one of a CPU. Without a GPU the compiler follows the same code and makes
    nothing of it."""
    changes = {"layers": 3, "short_layers": "1", "paired_layers": "0", "attention_free": "none", "value_layers": "0,2",
               "gated_skip": "0,2", "backout": "1", "width": 64 if device == "cuda" else 32,
               "tokens_per_step": "256,512,768", "momentum_warmup": 0.9, "momentum_cooldown": 0.1}
    expected = run_here(corpus, base=RECIPE, **changes, out=tmp_path / "expected")
    if device == "cpu":
        compile_with = torch.compile
        monkeypatch.setattr(train_gpt2, "attend", lambda query, key, value, mask: scaled_dot_product_attention(
            query, key, value, mask, scale=1.0))
        monkeypatch.setattr(train_gpt2, "attention_masks", dense_masks)
        monkeypatch.setattr(train_gpt2, "can_compile", lambda *_: True)
        monkeypatch.setattr(torch, "compile", lambda function, **options: compile_with(
            function, backend="eager", **options))
    counted, loop = [], train_gpt2.training_loop

    def watched(*arguments):
        counted.append(counters["stats"]["unique_graphs"])
        loss = loop(*arguments)
        counted.append(counters["stats"]["unique_graphs"])
        return loss

    monkeypatch.setattr(train_gpt2, "training_loop", watched)
    counters.clear()
    found = run_here(corpus, base=RECIPE, **changes | {"device": device, "compile": "auto", "out": tmp_path / "found"})
    assert counted[0] == counted[1] > 10 and not counters["graph_break"]
    assert_same_run(found, expected)
