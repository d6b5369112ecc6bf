"""Parts of the model and first values, what a state depends on, the loss in chunks and in float8, compiled parts."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_techniques import SIX_LAYERS, hashed, signed
from tools import random_batch, small_model
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from train_gpt2 import (
    GPT, GRADIENT_UNIT, HEAD_UNIT, HIDDEN_UNIT, ChunkedLoss, Config, attention, bigram_rows, chunk_gradient,
    chunk_losses, gpu_sigmoid, phase_at, quantised, sign_rows, wide, xsa)


def loss_of(model: GPT, batch, step: int = 0) -> torch.Tensor:
    return model.loss(batch, phase_at(step, model.config))[0]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- parts ------------------------------------------------------------------------------------------------


def test_rows_of_bigrams_and_signs():
    tokens = torch.tensor([[50256, 464, 2068, 7586, 21831, 50256, 11]], dtype=torch.int32)
    rows = [754559, 22202, 28717, 559816, 127596, 73724, 137718]  # as records 62 and 83 have them
    signs = [0, 1408, 2500, 5558, 2277, 4375, 1115]
    for count in range(1, 8):
        assert bigram_rows(tokens[:, :count], 754_560).tolist() == [rows[:count]]
        assert sign_rows(tokens[:, :count], 8192).tolist() == [signs[:count]]
    inputs = random_batch(3, 500, 50257).inputs
    for rows in (320, 754_560):
        assert bigram_rows(inputs, rows).tolist() == [hashed(row, rows) for row in inputs]
        assert sign_rows(inputs, rows).tolist() == [signed(row, rows) for row in inputs]
        assert 0 <= bigram_rows(inputs, rows).min() and bigram_rows(inputs, rows)[:, 1:].max() < rows - 1


def test_signs_are_drawn_once_and_not_trained():
    model = small_model(preset="gpt2", bigram_signs=8192)
    assert model.signs.shape == (8192, 20) and (model.signs.abs() == 1).all() and abs(model.signs.mean()) < 0.01
    assert not model.signs.requires_grad and "signs" in model.state_dict()  # so that a checkpoint keeps them


def test_the_part_along_its_own_value_leaves_an_output():
    """At infinity all of it; a value of zero has none."""
    out, value = torch.randn(2, 3, 5, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value[0, 0, 0] = 0
    found = xsa(out, value, torch.tensor([0.0, 40.0, -40.0, 40.0]))
    assert torch.equal(found[:, :, 0], out[:, :, 0]) and torch.equal(found[0, 0, 0], out[0, 0, 0])
    along = [((x * value).sum(-1)) for x in (out, found)]
    torch.testing.assert_close(along[1], along[0] * torch.tensor([1.0, 0, 2, 0]), rtol=1e-12, atol=1e-12)
    u = value / value.norm(dim=-1, keepdim=True).clamp_min(1e-9)
    torch.testing.assert_close(found[:, :, 1], (out - (out * u).sum(-1, keepdim=True) * u)[:, :, 1])


NO_LAYERS = dict(paired_layers=(), short_layers=(), attention_free=(), value_layers=(), gated_skip=(),
                 attention_source=(), xsa_layers=())


def test_logits_are_capped_and_leave_the_padding_out():
    hidden = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for height in (30.0, 0.0):
        model = small_model(spread=4.0, softcap=(height, 30.0, 0.0))
        raw = hidden @ model.head[:50].T
        expected = 30 * torch.tanh(raw / 30) if height else raw
        assert model.head.shape[0] == 64 and raw.abs().max() > 40
        torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-12, atol=1e-12)


# ---- first values -----------------------------------------------------------------------------------------

WIDE = {"five-minute": dict(width=256, layers=4, heads=2),
        "gpt2": dict(width=256, layers=4, heads=4, short_layers=(0,), paired_layers=(0,), attention_free=(2,),
                     value_layers=(0, 3), gated_skip=(0, 2), attention_source=(1,), xsa_layers=(1, 3))}
# Of all parameters of a kind; the others are drawn.
FIRST = {"five-minute": dict(residual=1, x0_mix=0, value_mix=0.5, skip_mix=1, head=0),
         "gpt2": dict(residual=1.1**0.5, output=1, x0_mix=0, bigram_mix=0.05, in_scale=0.5, out_scale=1, xsa=0,
                      smear_mix=0, skip_mix=-1.5, bigram_table=0, attention_gate=0, value_gate=0, smear_gate=0,
                      skip_gate=0, mudd_out=0)}
DRAWN = {"five-minute": {"qk", "vo", "mlp", "embedding"},
         "gpt2": {"qk", "vo", "mlp", "embedding", "head", "value_tables", "mudd_in"}}


def kind_of(name: str) -> str:
    return [word for word in name.split(".") if not word.isdigit()][-1]


def assert_uniform(weight, bound):
    assert 0.999 * bound < weight.abs().max() <= bound and abs(weight.mean()) < 0.01 * bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def assert_normal(table, spread):
    assert abs(table.mean()) < 0.01 * spread and table.std().item() == pytest.approx(spread, rel=0.01)
    assert (table / spread).pow(4).mean().item() == pytest.approx(3, rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize("preset, bound, table", [("five-minute", 1.0, 1.0), ("gpt2", 3**0.5 / 2, 0.005)])
def test_first_values(preset, bound, table):
    model = small_model(1000, "float32", preset=preset, **WIDE[preset])
    for block in model.blocks:
        for weight in [*block.qk, block.vo[0], block.mlp[0]] if block.attends else [block.mlp[0]]:
            assert_uniform(weight, bound / 16)
        assert (block.mlp[1] == 0).all()
        if block.attends and preset == "gpt2":
            assert block.qk.shape == (4, 128, 256)  # two heads each
            assert_uniform(block.vo[1], bound / 16)
        elif block.attends:
            assert block.qk.shape == (2, 256, 256) and (block.vo[1] == 0).all()
    assert model.embedding.shape == model.head.shape == (1024, 256)
    assert_normal(model.embedding, table)
    assert preset == "five-minute" or torch.equal(model.head, model.embedding)
    for values in model.value_tables:
        assert_normal(values, 0.01)
    if preset == "gpt2":
        first, last = model.blocks[-1].mudd, model.mudd
        for part in (first, last):
            assert_uniform(part.mudd_in, 1 / 16)
        expected = [0] * 6 + [2, 2, 1.1**0.5, 1, 0, 0.05, 1.1**0.5, 1]
        for part, coefficients in ((first, expected), (last, [0, -0.5, 0, 0, 0])):
            found = torch.cat(sum(part(torch.randn(2, 3, 256)), ()), -1)  # the same for every token
            assert torch.allclose(found, torch.tensor(coefficients).expand(2, 3, -1), rtol=1e-6)
    seen = {}
    for name, p in model.named_parameters():
        seen.setdefault(kind_of(name), set()).update(p.flatten().tolist() if kind_of(name) in FIRST[preset] else ())
    assert {*seen} == {*FIRST[preset], *DRAWN[preset]} | ({"mudd_bias"} if preset == "gpt2" else set())  # no others
    for kind, value in FIRST[preset].items():
        assert [*seen[kind]] == pytest.approx([value], rel=1e-6), kind


def test_first_values_depend_on_the_seed_alone():
    for preset in ("five-minute", "gpt2"):
        first, again, other = (small_model(preset=preset, seed=seed).state_dict() for seed in (0, 0, 1))
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name])
            drawn = kind_of(name) in DRAWN[preset] | {"signs"}
            assert torch.equal(tensor, other[name]) != drawn, name


@pytest.mark.parametrize("preset, matrices, head", [
    ("five-minute", torch.float32, torch.float32), ("gpt2", torch.bfloat16, torch.bfloat16)])
def test_dtypes_of_the_records(preset, matrices, head):
    model, batch = small_model(dtype="bfloat16", preset=preset), random_batch(1, 64)
    tables = {p.dtype for name, p in model.named_parameters() if "table" in name or name == "embedding"}
    assert tables == {torch.bfloat16} and model.head.dtype == head
    assert {p.dtype for block in model.blocks for p in (block.qk, block.vo, block.mlp)
            if p is not None} == {matrices}
    small = {p.dtype for name, p in model.named_parameters() if p.dim() < 2 and "mudd" not in name}
    assert small == {model.scales.dtype} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "mudd" in name} <= {torch.bfloat16}  # as it was tried
    assert model.frequencies.dtype == torch.float64
    hidden = model(batch.inputs, batch.starts, phase_at(0, model.config))
    assert hidden.dtype == torch.bfloat16
    assert loss_of(model, batch).dtype == model.logits(hidden).dtype == torch.float32


# ---- what a hidden state depends on -----------------------------------------------------------------------


def influence(model: GPT, starts, windows) -> torch.Tensor:
    """(T,) document starts -> (T, T) bool, [position, token]: which tokens move which hidden states. Row j
    of the batch has another token j."""
    count, phase = len(starts), phase_at(0, model.config)._replace(windows=windows)
    tokens = random_batch(1, count).inputs.expand(count + 1, -1).clone()
    tokens[range(count), range(count)] = (tokens[range(count), range(count)] + 1) % model.vocabulary
    with torch.no_grad():
        states = model(tokens, starts.expand(count + 1, -1), phase)
    return ((states[:-1] - states[-1]).abs().amax(-1) > 1e-13).T


def starts_at(*places: int) -> torch.Tensor:
    return F.one_hot(torch.tensor([0, *places]), 48).any(0)


@pytest.mark.parametrize("preset", ["five-minute", "gpt2"])
def test_later_tokens_change_nothing_before_them(preset):
    moved = influence(small_model(preset=preset, spread=0.4), starts_at(30), (24, 8))
    assert not moved.triu(1).any() and moved.diagonal().all() and moved[47].sum() > 15
    assert preset == "gpt2" or not moved[30:, :30].any()  # nothing there looks over a border of documents


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_visits_blocks_twice(recompute):
    """That the numbers stay the same is in test_optimizers."""
    model, visits, batch = small_model(spread=0.4, recompute=recompute), [], random_batch(2, 64)
    sublayer = model.run_mlp
    model.run_mlp = lambda *arguments: visits.append(1) or sublayer(*arguments)
    with torch.no_grad():
        loss_of(model, batch)
    assert len(visits) == 4  # without gradients nothing is recomputed
    loss_of(model, batch).backward()
    assert len(visits) == 4 + (8 if recompute else 4)


# ---- loss -------------------------------------------------------------------------------------------------

CAPS = {"none": (0.0, 1.0, 0.0), "far": (2000.0, 40.0, 0.0),
        "symmetric": (2.0, 2.0, 0.0), "record 62": (11.5, 15.0, 5.0)}


def operands(tokens=41, width=6, vocabulary=11, dtype=torch.float64, columns=1):
    """Leaves that need gradients, with logits large enough for the cap to bend, and targets, some of -1."""
    draw = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(tokens, width, generator=draw, dtype=torch.float64)
    head = 4 * torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens, columns), generator=draw)
    for k in range(columns):
        targets[k::6, k] = -1
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


def chunked(hidden, head, targets, weights=(1.0,), chunk=10, cap=CAPS["record 62"], float8=False):
    """Both losses. Of the model only what the loss reads."""
    model = SimpleNamespace(config=Config(loss_chunk=chunk, softcap=cap), float8=float8, run_quantised=quantised,
                            run_losses=chunk_losses, run_gradient=chunk_gradient)
    weights = [torch.tensor(weight, dtype=wide(hidden.dtype)) for weight in weights]
    return ChunkedLoss.apply(hidden, head, targets[:, :len(weights)], weights, model)


def plain(logits, targets, weights, cap):
    logits = cap[0] * torch.tanh((logits + cap[2]) / cap[1]) if cap[0] else logits
    terms = [F.cross_entropy(logits, targets[:, k], ignore_index=-1, reduction="sum") for k in range(len(weights))]
    return sum(weight * term for weight, term in zip(weights, terms, strict=True)), terms[0]


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5), (0.3, 2.0, 0.1), (1.0, 0.5, 0.25, 0.125)])
def test_loss_in_chunks_is_the_plain_one(weights, cap):
    hidden, head, targets = operands(columns=len(weights))
    expected = plain(hidden @ head.T, targets, weights, CAPS[cap])
    slopes = torch.autograd.grad(0.3 * expected[0], (hidden, head))
    assert (slopes[0][(targets < 0).all(1)] == 0).all()
    nothing = chunked(hidden, head, torch.full_like(targets, -1), weights)[0]
    assert nothing == 0 and (torch.autograd.grad(nothing, head)[0] == 0).all()
    for chunk in (1, 7, 40, 41, 1000):  # also a last one that is shorter
        found = chunked(hidden, head, targets, weights, chunk, CAPS[cap])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert found[0].requires_grad and not found[1].requires_grad
        torch.testing.assert_close(torch.autograd.grad(0.3 * found[0], (hidden, head)), slopes, rtol=1e-10, atol=1e-12)
        without = chunked(hidden.detach(), head, targets, weights, chunk, CAPS[cap])  # as in validation
        torch.testing.assert_close(without, expected, rtol=1e-12, atol=0)


def test_the_sigmoid_of_gpus_is_the_plain_one():
    x = torch.linspace(-80, 80, 4001)
    torch.testing.assert_close(gpu_sigmoid(x), torch.sigmoid(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(gpu_sigmoid(x.double()), torch.sigmoid(x.double()), rtol=1e-13, atol=0)
    ends = torch.tensor([-1e4, 1e4, -torch.inf, torch.inf, torch.nan])
    assert gpu_sigmoid(ends).nan_to_num(9).tolist() == [0, 1, 0, 1, 9]


def test_loss_of_bfloat16_states_is_summed_in_float32():
    """Only products are in bfloat16: once logits are rounded, all is exact up to their gradients, and
    those of many chunks add up in float32."""
    hidden, head, targets = operands(tokens=500, dtype=torch.bfloat16)
    master = head.detach().float().requires_grad_()
    found, _ = chunked(hidden, master, targets, chunk=4)
    logits = (hidden @ head.T).detach().double().requires_grad_()
    expected, _ = plain(logits, targets, (1.0,), CAPS["record 62"])
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    by_hidden, by_head = torch.autograd.grad(found, (hidden, master))
    by_logits, = torch.autograd.grad(expected, logits)
    assert (by_hidden.dtype, by_head.dtype) == (torch.bfloat16, torch.float32)
    for slope, exact in ((by_hidden, by_logits @ head.double()), (by_head, by_logits.T @ hidden.double())):
        assert deviation(slope, exact) < 0.004


def test_full_logits_never_exist():
    sizes, (hidden, head, targets) = [], operands(tokens=240, width=4, vocabulary=30, columns=3)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            parts = result if isinstance(result, (tuple, list)) else [result]
            sizes.extend(part.numel() for part in parts if isinstance(part, torch.Tensor))
            return result

    with Sizes():
        chunked(hidden, head, targets, (1.0, 0.5, 0.25), chunk=40)[0].backward()
    assert max(sizes) == 40 * 30  # the logits of one chunk, not 240 x 30


# ---- the head in float8 -----------------------------------------------------------------------------------

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def head_loss(hidden, head, targets, float8: bool, weights=(1.0,)):
    """The weighted loss of bfloat16 states (N, D) and its gradients."""
    hidden, head = (x.bfloat16().requires_grad_() for x in (hidden, head))
    loss, next_token = chunked(hidden, head, targets, weights, chunk=32, float8=float8)
    assert loss.dtype == next_token.dtype == torch.float32
    return loss.item(), *torch.autograd.grad(loss, (hidden, head))


def head_data():
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(96, 128, generator=draw), 0.3 * torch.randn(64, 128, generator=draw)
    targets = torch.randint(0, 64, (96, 3), generator=draw)
    targets[::7] = -1
    return hidden, head, targets


def deviation(found, exact) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("unit, kind, largest", [
    (HIDDEN_UNIT, E4M3, 100), (HEAD_UNIT, E4M3, 1.6), (GRADIENT_UNIT, E5M2, 96)])
def test_float8_clips_where_a_cast_alone_would_overflow(unit, kind, largest):
    assert unit * torch.finfo(kind).max == pytest.approx(largest, rel=1e-6)
    x = torch.tensor([0.0, 0.5, 0.99, 1.0, 1.2, 7.0, 1e9, -1.2, -1e9]) * largest
    narrow, across = quantised(x.repeat(2, 1), unit, kind)
    assert narrow.is_contiguous() and across.is_contiguous() and torch.equal(across.float(), narrow.float().mT)
    found = narrow[0].float() * unit / largest
    assert found[4:].tolist() == pytest.approx([1, 1, 1, -1, -1])
    assert found[:4].tolist() == pytest.approx([0, 0.5, 0.99, 1], rel=1 / 8)
    assert quantised(x.bfloat16()[None], unit, kind)[0].float().isfinite().all()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.25)])
def test_float8_head_is_close_to_the_wide_one_and_takes_exactly_the_rounded_operands(weights):
    """Rounding to 3 bits errs in the mean of squares by some 3 %, to 2 bits by twice that; a product of
    two errs by about 4 % and by 7 %. The three products again, in float64, of what the casts left: only
    the rounding of results remains."""
    hidden, head, targets = head_data()
    exact, found = (head_loss(hidden, head, targets, kind, weights) for kind in (False, True))
    assert found[0] == pytest.approx(exact[0], rel=0.01) and found[0] != exact[0]
    for slope, wide_slope in zip(found[1:], exact[1:], strict=True):
        assert slope.dtype == torch.bfloat16 and 0.02 < deviation(slope, wide_slope) < 0.1
    x, w = (quantised(part.bfloat16(), unit, E4M3)[0].double() * unit
            for part, unit in ((hidden, HIDDEN_UNIT), (head, HEAD_UNIT)))
    logits = (x @ w.T).requires_grad_()
    slope, = torch.autograd.grad(plain(logits, targets, weights, CAPS["record 62"])[0], logits)
    slope = quantised(slope.float(), GRADIENT_UNIT, E5M2)[0].double() * GRADIENT_UNIT
    assert deviation(found[1], slope @ w) < 0.01 and deviation(found[2], slope.T @ x) < 0.01


def test_states_weights_and_gradients_beyond_the_range_saturate():
    hidden, head, targets = head_data()
    far_hidden, far_head = hidden.clone(), head.clone()
    far_hidden[:, 3], hidden[:, 3] = 300.0, 100.0
    head[:, 3] = far_head[:, 3] = 0.01  # so that the cap still bends the logits of the large channel
    far_head[5, 9], head[5, 9] = -40.0, -1.6
    near, far = (head_loss(*pair, targets, True) for pair in ((hidden, head), (far_hidden, far_head)))
    assert near[0] == far[0] and all(torch.equal(a, b) for a, b in zip(near[1:], far[1:], strict=True))
    _, by_hidden, by_head = head_loss(hidden, head, targets, True, (1000.0,))  # gradients of up to 767
    assert by_hidden.isfinite().all() and by_head.isfinite().all() and (by_head != 0).any()


def test_validation_never_takes_the_float8_head():
    settings = dict(preset="gpt2", dtype="bfloat16", spread=0.2, loss_chunk=32, **SIX_LAYERS)
    models, batch = [small_model(**settings, float8=float8) for float8 in (False, True)], random_batch(1, 64)
    training = [loss_of(model, batch).item() for model in models]
    with torch.no_grad():
        validation = [loss_of(model, batch).item() for model in models]
    assert training[0] == validation[0] == validation[1] != training[1]


# ---- compiled parts ---------------------------------------------------------------------------------------


COMPILED = dict(preset="gpt2", spread=0.3, **NO_LAYERS | dict(
    layers=2, paired_layers=(0,), value_layers=(0, 1), xsa_layers=(0, 1), attention_source=(0,), loss_chunk=128))


def attention_to_copies(query, key, value, mask, _):
    """On a CPU torch 2.13's FlexAttention takes a view for the start of its storage."""
    return attention(query, key.clone(), value.clone(), mask)


def plain_attention(query, key, value, mask, _):
    """Stands in for FlexAttention, which has no backward on a CPU. It reads the same block mask. Spelled out, as
    torch 2.11 does not compile its own attention's backward pass in float64."""
    row, position = torch.arange(query.shape[0])[:, None, None, None], torch.arange(query.shape[2])
    seen = mask.mask_mod(row, None, position[:, None], position)
    return (query @ key.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_compiled_parts_give_the_eager_loss_and_gradients(fresh_compiler, monkeypatch, backward):
    """Two layers with most that gpt2 has, as windows, stages and rows change."""
    dtype = "float64" if backward else "float32"  # which FlexAttention takes on a CPU; gradients cancel in it
    compiled, eager = (
        small_model(**COMPILED, dtype=dtype, compiled=each, recompute=backward) for each in (True, False))
    for seed, window in enumerate((24, 100, 1000)):
        batch, phase = random_batch(2, 256, seed=seed), phase_at(0, eager.config)._replace(windows=(window, 0))
        with torch.set_grad_enabled(backward):
            expected, _ = eager.loss(batch, phase)
            with monkeypatch.context() as patch, torch.compiler.set_stance(
                    "fail_on_recompile" if seed else "default"):
                patch.setattr(train_gpt2, "attention", plain_attention if backward else attention_to_copies)
                found, _ = compiled.loss(batch, phase)
                found.backward() if backward else None
            assert found.item() == pytest.approx(expected.item(), rel=1e-12 if backward else 1e-5)
            expected.backward() if backward else None
    for name, gradient in gradients(eager).items():  # of all batches, added up
        assert deviation(gradients(compiled)[name], gradient) < 1e-10, name


@pytest.mark.slow
def test_recomputation_compiles_the_same_graphs(fresh_compiler, monkeypatch):
    """So that a process with little memory can compile for another one."""
    compile_with, found = torch.compile, {}

    def note(graph, _):
        found[recompute].append(graph.code)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(train_gpt2, "attention", plain_attention)
    monkeypatch.setattr(torch, "compile", lambda function, options, **others: compile_with(
        function, backend=aot_autograd(fw_compiler=note, bw_compiler=note), **others))
    for recompute in (False, True):
        torch._dynamo.reset()
        found[recompute] = []
        model = small_model(**COMPILED, dtype="float64", compiled=True, recompute=recompute)
        model.loss(random_batch(2, 256), phase_at(0, model.config))[0].backward()
    assert sorted(found[False]) == sorted(found[True]) and len(found[True]) > 10
