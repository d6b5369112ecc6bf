"""What only a GPU can show, against the same on a CPU: attention kernels, float8 products, compiled updates, whole
runs. `pytest -m gpu` runs these on a machine with a GPU; a plain run takes the variants that need none."""

import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tools import RECIPE, SMALL, configuration, dense_mask, losses, random_batch, random_starts, run_here, small_model
from torch.nn.functional import scaled_dot_product_attention

import train_gpt2
from train_gpt2 import (
    Batch, Muon, Processes, add_rows, attention, block_mask, checked_kernels, document_starts, first_visible_key, mlp,
    phase_at, sorted_rows)

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])
on_both = pytest.mark.parametrize("device", ["cpu", GPU])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def compiled(function, device):
    return torch.compile(function, dynamic=False, fullgraph=True) if device == "cuda" else function


def relative_error(found, expected):
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def needs(library):
    found = importlib.util.find_spec(library.split(".")[0]) and importlib.util.find_spec(library)
    return pytest.mark.skipif(not found, reason=f"needs {library}")


@on_both
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("dtype", "kernel"), [
    (torch.float32, "triton"), (torch.bfloat16, "triton"),
    pytest.param(torch.bfloat16, "flash", marks=needs("flash_attn.cute"))])
@pytest.mark.parametrize("window", [90, 10_000])
@pytest.mark.parametrize("size", [128, 64])
def test_flex_attention_layouts(device, dtype, kernel, window, size):
    """Forward, and on a GPU backward, of random documents against dense attention in float64."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("a GPU's")
    if size == 64 and (dtype, kernel) != (torch.bfloat16, "triton"):
        pytest.skip("takes blocks of 128")
    import numpy
    starts, draw = random_starts(2, 512, numpy.random.default_rng(1)), torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 2, 512, 128, generator=draw).to(dtype) * 0.7 for _ in range(3)]
    exact = [part.double().requires_grad_() for part in parts]
    expected = scaled_dot_product_attention(*exact, dense_mask(starts, window)[:, None], scale=1.0)
    moved = [part.detach().to(device).requires_grad_(device == "cuda") for part in parts]
    mask = block_mask(first_visible_key(document_starts(starts.to(device)), window), size)
    found = compiled(attention, device)(*moved, mask, kernel)
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.002
    assert relative_error(found, expected) < tolerance
    if device == "cuda":
        gradient = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
        expected.backward(gradient)
        found.backward(gradient.to(device, dtype))
        for one, other in zip(moved, exact, strict=True):
            assert relative_error(one.grad, other.grad) < 2 * tolerance


def stand_in_for_quack(monkeypatch, factor=1.0):
    """Its gradients are off by the factor."""
    def gemm_act(a, b, activation, tuned):
        assert activation == "relu_sq"
        return a @ b, (a @ b).relu().square()

    def gemm_dact(a, b, before, activation, tuned):
        assert activation == "relu_sq"
        return factor * 2 * before.relu() * (a @ b), before.relu().square()

    for name in ("quack", "quack.gemm_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["quack.gemm_interface"].__dict__.update(gemm_act=gemm_act, gemm_dact=gemm_dact)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU, needs("quack")])])
def test_products_with_relu_squared_give_the_gradients_of_the_plain_mlp(device, monkeypatch):
    if device == "cpu":
        stand_in_for_quack(monkeypatch)
    draw, dtype = torch.Generator().manual_seed(0), torch.float64 if device == "cpu" else torch.bfloat16
    parts = [torch.randn(shape, generator=draw).to(dtype) for shape in ((2, 256, 128), (512, 128), (512, 128))]
    exact = [part.double().requires_grad_() for part in parts]
    moved = [part.detach().to(device).requires_grad_() for part in parts]
    options = {"backend": "aot_eager"} if device == "cpu" else {}
    found = torch.compile(mlp, fullgraph=True, dynamic=False, **options)(*moved, "quack")
    expected, gradient = mlp(*exact), torch.randn(2, 256, 128, generator=draw).to(dtype)
    found.backward(gradient.to(device))
    expected.backward(gradient.double())
    tolerance = 1e-12 if device == "cpu" else 0.02
    for one, other in ((found, expected), *((one.grad, other.grad) for one, other in zip(moved, exact, strict=True))):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize(("case", "kernels", "notices"), [
    ("right", ("flash", "quack"), []),
    ("missing", ("triton", "torch"), [
        "--attention-kernel triton, not flash: ModuleNotFound", "--mlp-kernel torch, not quack: ModuleNotFound"]),
    ("wrong", ("triton", "torch"), 2 * ["other results"]),
    ("other process", ("triton", "torch"), 2 * ["no such card"]),
    ("eager", ("triton", "torch"), 2 * ["not compiled"])])
def test_a_librarys_kernel_is_used_where_it_agrees_with_the_plain_one(case, kernels, notices, tmp_path, monkeypatch):
    """Stand-ins for both libraries are right, missing, off by 3 %, or fail in another process."""
    factor, config = 1.03 if case == "wrong" else 1.0, configuration(
        tmp_path, attention_kernel="flash", mlp_kernel="quack", dtype="float32", width=64, heads=2)

    def dense(query, key, value, mask, kernel):
        position = torch.arange(query.shape[2])
        seen = mask.mask_mod(0, None, position[:, None], position)
        if kernel == "flash":
            query = factor * query
        return (query @ key.mT).masked_fill(~seen, -math.inf).softmax(-1) @ value

    if case == "missing":
        for name in ("quack", "flash_attn"):
            monkeypatch.setitem(sys.modules, name, None)
    else:
        stand_in_for_quack(monkeypatch, factor)
        for name in ("flash_attn", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(train_gpt2, "attention", dense)
    monkeypatch.setattr(train_gpt2, "compiled_if", lambda _, function, **options: torch.compile(
        function, backend="aot_eager", fullgraph=True))
    processes, lines = Processes(0, 1, torch.device("cpu")), []
    if case == "other process":
        monkeypatch.setattr(Processes, "gather_values", lambda self, value: [value, "no such card"])
    found = checked_kernels(config, processes, case != "eager", SimpleNamespace(line=lines.append))
    assert (found.attention_kernel, found.mlp_kernel) == kernels
    assert len(lines) == len(notices) and all(part in line for part, line in zip(notices, lines, strict=True))


@on_gpu
def test_the_float8_head_is_near_the_wide_one(device):
    results = []
    for float8 in (False, True):
        model = small_model(1000, "bfloat16", preset="gpt2", float8=float8, compiled=True, width=128, heads=4,
                            spread=0.02, row_tokens=(256,), val_row_tokens=256, loss_chunk=128).to(device)
        batch = Batch(*(part.to(device) for part in random_batch(2, 256, 1000)[:3]))
        loss, _ = model.loss(batch, phase_at(0, model.config))
        loss.backward()
        results.append((loss, model.head.grad, model.blocks[0].mlp.grad))
    for (wide, eight), tolerance in zip(zip(*results, strict=True), (0.01, 0.15, 0.2), strict=True):
        assert relative_error(eight, wide) < tolerance


@on_both
@pytest.mark.parametrize("width", [768, 192, 40])
def test_gradients_of_tables_are_added_up_row_by_row(device, width):
    """Some rows are there once, one a thousand times. No two programs write to one place: the same each time."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randint(300, (1, 3000), generator=draw), torch.full((1, 1000), 7)], dim=1)
    rows = rows[:, torch.randperm(4000, generator=draw)]
    parts, before = (torch.randn(n, width, generator=draw).bfloat16() for n in (4000, 310))
    exact = before.double().index_add_(0, rows[0], parts.double())
    order, found = sorted_rows(rows.to(device)), [before.to(device, copy=True) for _ in range(3)]
    for total in found:
        add_rows(total, parts.to(device), order)
    assert relative_error(found[0], exact) < 2.0**-8
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@on_both
@pytest.mark.parametrize("kind", ["matrices", "tables"])
def test_compiled_updates_are_the_eager_ones(device, kind):
    model = small_model(64, "bfloat16", preset="gpt2", spread=0.1)
    results = []
    for where, is_compiled in (("cpu", False), (device, device == "cuda")):
        clone = small_model(64, "bfloat16", preset="gpt2", spread=0.1, compiled=is_compiled).to(where)
        clone.load_state_dict(model.state_dict())
        groups = train_gpt2.optimizer_groups(clone, Processes(0, 1, torch.device(where)))
        group = groups["mlp.early" if kind == "matrices" else "bigram_table"]
        assert isinstance(group, Muon) == (kind == "matrices")
        draw = torch.Generator().manual_seed(3)
        for step in (1, 3, 5):  # Adam updates in odd steps
            group.gradients.copy_(torch.randn(group.gradients.shape, generator=draw).to(group.gradients.dtype))
            group.update(step)
        results.append(group.weights.float().cpu())
    assert results[0].isfinite().all() and relative_error(results[1], results[0]) < 0.02


@on_gpu
@pytest.mark.parametrize("base", [SMALL, RECIPE], ids=["five-minute", "gpt2"])
def test_whole_runs_are_those_of_a_cpu(device, base, corpus, tmp_path):
    """Compiled on a GPU, where after the warm-up a recompilation is an error."""
    sizes = dict(width=128, heads=4, repeat=True, dtype="float32", head_dtype="wide")
    expected = losses(run_here(corpus, base=base, out=tmp_path / "cpu", **sizes))
    found = losses(run_here(corpus, base={**base, "device": "cuda", "compile": "auto"}, out=tmp_path / "gpu", **sizes))
    assert found == pytest.approx(expected, abs=0.02)
