"""Parts of the model and first values, what a state depends on, the loss in chunks and in float8, compiled parts."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_techniques import FIVE_LAYERS, bigram_row, norm, sigmoid
from tools import random_batch, small_model
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from train_gpt2 import (
    GPT,
    GRADIENT_UNIT,
    HEAD_UNIT,
    HIDDEN_UNIT,
    ChunkedLoss,
    Config,
    attention,
    bigram_rows,
    chunk_loss,
    offset_keys,
    phase_at,
    rms_norm,
    rotary,
    rotary_tables,
    smear,
    softcap,
    to_float8,
    wide,
    yarn,
)


def loss_of(model: GPT, batch, step: int = 0) -> torch.Tensor:
    return model.loss(batch, phase_at(step, model.config))[0]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- parts ------------------------------------------------------------------------------------------------


def test_rms_norm_adds_the_given_epsilon():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, dtype=torch.float64, generator=draw) * torch.logspace(-4, 1, 50).double()[:, None]
    for epsilon in (2.0**-7, 2.0**-23, 0.5):
        torch.testing.assert_close(rms_norm(x, epsilon), norm(x, epsilon), rtol=1e-14, atol=0)
        narrow = rms_norm(x.bfloat16(), epsilon)
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.double(), norm(x.bfloat16().double(), epsilon), rtol=2**-8, atol=0)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_rotary_products_depend_on_the_distance_only(share):
    frequencies, _ = yarn(0, Config(width=32, heads=2, rotary_share=share))
    cosine, sine = rotary_tables(frequencies, 200, torch.float64)
    assert cosine.shape == sine.shape == (200, 8 * share)
    query, key = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key = (rotary(x.expand(1, 200, 1, 16), cosine[:, None], sine[:, None])[0, :, 0] for x in (query, key))
    products = query @ key.T
    for distance in (0, 1, 37, 150):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-10, atol=1e-10)
    turning = int(16 * share)
    assert products[:, 0].std() > 0.1 and (query[1:, :turning] != query[:1, :turning]).all()
    assert torch.equal(query[:, turning:], query[:1, turning:].expand(200, -1))  # the others stay still


def test_bigram_rows():
    tokens = torch.tensor([[50256, 464, 2068, 7586, 21831, 50256, 11]], dtype=torch.int32)
    expected = [251519, 204580, 28927, 57630, 129154, 77266, 141340]  # as record 62 has them
    for count in range(1, 8):
        assert bigram_rows(tokens[:, :count], 251_520).tolist() == [expected[:count]]
    inputs = random_batch(3, 500, 50257).inputs
    for rows in (320, 251_520):
        found = bigram_rows(inputs, rows)
        for row, tokens in zip(found.tolist(), inputs.tolist(), strict=True):
            pairs = zip(tokens[2:], tokens[1:], strict=False)
            assert row[0] == rows - 1 and row[2:] == [bigram_row(*pair, rows) for pair in pairs]
        assert 0 <= found.min() and found.max() == rows - 1


def test_smear_and_key_offset_look_back_everywhere_but_at_the_start():
    draw = torch.Generator().manual_seed(0)
    x, keys = (torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in ((2, 9, 16), (2, 9, 3, 8)))
    weight, gate_weight = torch.tensor(0.7).double(), torch.randn(12, dtype=torch.float64, generator=draw)
    smeared, offset = x.clone(), keys.clone()
    for t in range(1, 9):
        smeared[:, t] += 0.7 * sigmoid(x[:, t, :12] @ gate_weight)[:, None] * x[:, t - 1]
        offset[:, t, :, 6:] = keys[:, t - 1, :, 6:]
    torch.testing.assert_close(smear(x, weight, gate_weight), smeared, rtol=1e-6, atol=0)
    assert torch.equal(offset_keys(keys, 6), offset)


def test_softcap_is_a_logistic_function_and_this_is_its_derivative():
    z = torch.linspace(-60, 60, 4001, dtype=torch.float64, requires_grad=True)
    found, derivative = softcap(z, Config().softcap)
    torch.testing.assert_close(found + 11.5, 23 * sigmoid((z + 5) / 7.5), rtol=0, atol=1e-13)
    expected, = torch.autograd.grad(found.sum(), z)
    torch.testing.assert_close(derivative, expected, rtol=1e-9, atol=1e-14)


def test_logits_are_capped_and_leave_the_padding_out():
    hidden = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for height in (30.0, 0.0):
        model = small_model(spread=4.0, softcap=(height, 30.0, 0.0))
        raw = hidden @ model.head[:50].T
        assert model.head.shape[0] == 64 and raw.abs().max() > 40
        expected = 30 * torch.tanh(raw / 30) if height else raw
        torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-12, atol=1e-12)


NO_LAYERS = dict(paired_layers=(), short_layers=(), attention_free=(), value_layers=(), gated_skip=(), backout=())  # in one layer


# ---- first values -----------------------------------------------------------------------------------------

WIDE = {"five-minute": dict(width=256, layers=4, heads=2),
        "gpt2": dict(width=256, layers=3, short_layers=(0,), paired_layers=(0,), attention_free=(1,),
                     value_layers=(0, 2), gated_skip=(0, 2), backout=(1,))}
# Of all parameters of a kind; the others are drawn.
FIRST = {"five-minute": dict(residual=1, x0=0, value_mix=0.5, skip_mix=1, head=0),
         "gpt2": dict(residual=1.1, x0=0, bigram=0.1, in_scale=0.5, out_scale=1, smear_mix=0, backout_mix=0.5,
                      skip_mix=-1.5, bigram_table=0, value_tables=0, attention_gate=0, value_gate=0, smear_gate=0,
                      skip_gate=0)}


@pytest.mark.parametrize("preset, attention_bound, mlp_bound, table", [
    ("five-minute", 1.0, 1.0, 1.0), ("gpt2", 3**0.5, 3**0.5 / 2, 0.005)])
def test_first_values(preset, attention_bound, mlp_bound, table):
    model = small_model(1000, "float32", preset=preset, **WIDE[preset])
    for block in model.blocks:
        drawn = [(weight, attention_bound / 16) for weight in block.attention.detach()[:3]] if block.attends else []
        for weight, bound in [*drawn, (block.mlp.detach()[0], mlp_bound / 16)]:
            assert 0.999 * bound < weight.abs().max() <= bound and abs(weight.mean()) < 0.01 * bound
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)  # of a uniform distribution
        assert (block.mlp[1] == 0).all() and (not block.attends or (block.attention[3] == 0).all())
    assert model.embedding.shape == model.head.shape == (1024, 256) and abs(model.embedding.mean()) < 0.01 * table
    assert model.embedding.std().item() == pytest.approx(table, rel=0.01)
    assert (model.embedding / table).pow(4).mean().item() == pytest.approx(3, rel=0.03)  # normally distributed
    assert preset == "five-minute" or torch.equal(model.head, model.embedding)
    seen = {}
    for name, p in model.named_parameters():
        kind = [word for word in name.split(".") if not word.isdigit()][-1]
        seen.setdefault(kind, set()).update(p.flatten().tolist() if kind in FIRST[preset] else ())
    assert {*seen} == {*FIRST[preset], "attention", "mlp", "embedding", "head"}  # no other parameters
    for kind, value in FIRST[preset].items():
        assert [*seen[kind]] == pytest.approx([value], rel=1e-6), kind


def test_first_values_depend_on_the_seed_alone():
    for preset in ("five-minute", "gpt2"):
        first, again, other = (small_model(preset=preset, seed=seed).state_dict() for seed in (0, 0, 1))
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name])
            drawn = name in ("embedding", "head") or name.endswith((".attention", ".mlp"))
            drawn = drawn and (preset, name) != ("five-minute", "head")
            assert torch.equal(tensor, other[name]) != drawn, name


@pytest.mark.parametrize("preset, matrices, head", [
    ("five-minute", torch.float32, torch.float32), ("gpt2", torch.bfloat16, torch.bfloat16)])
def test_dtypes_of_the_records(preset, matrices, head):
    model, batch = small_model(dtype="bfloat16", preset=preset), random_batch(1, 64)
    tables = {p.dtype for name, p in model.named_parameters() if "table" in name or name == "embedding"}
    assert tables == {torch.bfloat16} and model.head.dtype == head
    assert {p.dtype for block in model.blocks for p in (block.attention, block.mlp) if p is not None} == {matrices}
    assert {p.dtype for p in model.parameters() if p.dim() < 2} == {model.scales.dtype} == {torch.float32}
    assert model.frequencies.dtype == torch.float64
    hidden = model(batch.inputs, batch.starts, phase_at(0, model.config))
    assert hidden.dtype == torch.bfloat16
    assert loss_of(model, batch).dtype == model.logits(hidden).dtype == torch.float32


@pytest.mark.parametrize("preset, vocabulary, padded, tolerance", [
    ("five-minute", 50257, 50304, 1e-9), ("five-minute", 50304, 50304, 1e-9), ("five-minute", 65, 128, 1e-9),
    ("gpt2", 1000, 1024, 0.01)])  # whose head starts small: no token is far ahead of another
def test_loss_before_training_is_that_of_a_uniform_guess(preset, vocabulary, padded, tolerance):
    model = small_model(vocabulary, preset=preset, width=8, layers=1, **NO_LAYERS)
    batch = random_batch(1, 64, vocabulary)
    next_token = model.loss(batch, phase_at(0, model.config))[1].item() / (batch.targets >= 0).sum().item()
    assert model.head.shape[0] == padded and next_token == pytest.approx(math.log(padded), abs=tolerance)


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


ONE_LAYER = NO_LAYERS | dict(layers=1, smear=False, bigram=0, key_offset=False)


@pytest.mark.parametrize("changes, reach, leaks", [
    ({}, 9, []), (dict(paired_layers=(0,)), 5, []), (dict(smear=True), 10, None), (dict(bigram=5), 10, None),
    (dict(attention_free=(0,), smear=True), 1, [[20, 19]]), (dict(attention_free=(0,), bigram=5), 1, [[20, 19]]),
    # The key of token 20 leaks: the window after it sees it; for token 20 itself it is the only key.
    (dict(key_offset=True), 10, [[t, 19] for t in range(21, 30)]),
    (dict(key_offset=True, smear=True, bigram=5), 11, None)], ids=str)
def test_reach_of_one_layer_within_a_document_and_over_its_border(changes, reach, leaks):
    """Window 9; in a paired layer it counts two positions per token. The first token of a document takes
    up the last one before it, as in the record, and no other does."""
    model = small_model(preset="gpt2", spread=0.4, **ONE_LAYER | changes)
    moved = influence(model, starts_at(), (9, 9))
    assert moved[:, 20].nonzero().flatten().tolist() == list(range(20, 20 + reach + 1))
    over = torch.zeros(48, 48, dtype=torch.bool)
    over[20:, :20] = True
    moved = influence(model, starts_at(20), (9, 9)) & over
    assert leaks is None or moved.nonzero().tolist() == leaks


@pytest.mark.parametrize("layers, window", [(1, 0), (1, 19), (3, 7), (3, 1)])
def test_a_token_reaches_layers_times_window(layers, window):
    moved = influence(small_model(spread=0.4, layers=layers), starts_at(), (window, window))
    assert moved[:, 20].nonzero().flatten().tolist() == list(range(20, 20 + layers * window + 1))


@pytest.mark.parametrize("preset", ["five-minute", "gpt2"])
def test_recomputing_changes_memory_only(preset):
    batch, outcomes, visits = random_batch(2, 64), [], []
    for recompute in (False, True):
        model = small_model(preset=preset, spread=0.4, recompute=recompute)
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: visits.append(1))
        loss = loss_of(model, batch)
        loss.backward()
        outcomes.append({"loss": loss.detach(), **gradients(model)})
        assert len(visits) == len(model.blocks) * (2 if recompute else 1)
        visits.clear()
    with torch.no_grad():
        loss_of(model, batch)
    assert len(visits) == len(model.blocks)  # without gradients nothing is recomputed
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-12, atol=1e-12)


# ---- loss -------------------------------------------------------------------------------------------------

CAPS = {"none": (0.0, 1.0, 0.0), "symmetric": (2.0, 2.0, 0.0), "record 62": (11.5, 15.0, 5.0)}


def operands(tokens=41, width=6, vocabulary=11, dtype=torch.float64, columns=1):
    """Leaves that need gradients, with logits large enough for the cap to bend, and targets, some of -1."""
    draw = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(tokens, width, generator=draw, dtype=torch.float64)
    head = 4 * torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens, columns), generator=draw)
    for k in range(columns):
        targets[k::6, k] = -1
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


def chunked(hidden, head, targets, weights=(1.0,), chunk=10, cap=CAPS["record 62"], with_gradient=True, float8=False):
    """Both losses. Of the model only what the loss reads."""
    model = SimpleNamespace(config=Config(loss_chunk=chunk, softcap=cap), float8=float8, chunk_loss=chunk_loss)
    weights = [torch.tensor(weight, dtype=wide(hidden.dtype)) for weight in weights]
    return ChunkedLoss.apply(hidden, head, targets, weights, model, with_gradient)


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
    for chunk in (1, 7, 40, 41, 1000):  # also a last one that is shorter
        found = chunked(hidden, head, targets, weights, chunk, CAPS[cap])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert found[0].requires_grad and not found[1].requires_grad
        torch.testing.assert_close(torch.autograd.grad(0.3 * found[0], (hidden, head)), slopes, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            without = chunked(hidden, head, targets, weights, chunk, CAPS[cap], with_gradient=False)
        torch.testing.assert_close(without, expected, rtol=1e-12, atol=0)


def test_gradients_of_the_loss_are_those_of_finite_differences():
    hidden, head, targets = operands(tokens=7, columns=3)
    assert torch.autograd.gradcheck(lambda x, w: chunked(x, w, targets, (0.7, 0.4, 0.1), 3)[0], (hidden, head))


def test_loss_without_any_target_is_zero():
    hidden, head, targets = operands()
    loss, _ = chunked(hidden, head, torch.full_like(targets, -1))
    assert loss.item() == 0 and all((slope == 0).all() for slope in torch.autograd.grad(loss, (hidden, head)))


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


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation hands out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_full_logits_never_exist():
    hidden, head, targets = operands(tokens=240, width=4, vocabulary=30, columns=3)
    with LargestTensor() as largest:
        chunked(hidden, head, targets, (1.0, 0.5, 0.25), chunk=40)[0].backward()
    assert largest.elements == 40 * 30  # the logits of one chunk, not 240 x 30


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
    found = to_float8(x, unit, kind).float() * unit / largest
    assert found[4:].tolist() == pytest.approx([1, 1, 1, -1, -1])
    assert found[:4].tolist() == pytest.approx([0, 0.5, 0.99, 1], rel=1 / 8)
    assert to_float8(x.bfloat16(), unit, kind).float().isfinite().all()


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
    x, w = (to_float8(part.bfloat16(), unit, E4M3).double() * unit
            for part, unit in ((hidden, HIDDEN_UNIT), (head, HEAD_UNIT)))
    logits = (x @ w.T).requires_grad_()
    slope, = torch.autograd.grad(plain(logits, targets, weights, CAPS["record 62"])[0], logits)
    slope = to_float8(slope.float(), GRADIENT_UNIT, E5M2).double() * GRADIENT_UNIT
    assert deviation(found[1], slope @ w) < 0.01 and deviation(found[2], slope.T @ x) < 0.01


def test_states_weights_and_gradients_beyond_the_range_saturate():
    hidden, head, targets = head_data()
    far_hidden, far_head = hidden.clone(), head.clone()
    far_hidden[:, 3], hidden[:, 3] = 300.0, 100.0
    head[:, 3] = far_head[:, 3] = 0.01  # so that the cap still bends the logits of the large channel
    far_head[5, 9], head[5, 9] = -40.0, -1.6
    near, far = (head_loss(*pair, targets, True) for pair in ((hidden, head), (far_hidden, far_head)))
    assert near[0] == far[0] and all(torch.equal(a, b) for a, b in zip(near[1:], far[1:], strict=True))
    # A weight of 1000 makes gradients of up to 767; what is left of them is 96.
    _, by_hidden, by_head = head_loss(hidden, head, targets, True, (1000.0,))
    x, w = hidden.bfloat16().double(), head.bfloat16().double()
    logits = (x @ w.T).requires_grad_()
    slope, = torch.autograd.grad(plain(logits, targets, (1000.0,), CAPS["record 62"])[0], logits)
    clipped = slope.clamp(-96, 96)
    assert slope.abs().max() > 2 * 96 and by_hidden.isfinite().all() and by_head.isfinite().all()
    assert deviation(by_hidden, clipped @ w) < 0.12 and deviation(by_head, clipped.T @ x) < 0.12
    assert deviation(by_hidden, slope @ w) > 0.3  # the clip is what happened, and no small matter


def test_validation_never_takes_the_float8_head():
    settings = dict(preset="gpt2", dtype="bfloat16", spread=0.2, loss_chunk=32, **FIVE_LAYERS)
    models, batch = [small_model(**settings, float8=float8) for float8 in (False, True)], random_batch(1, 64)
    training = [loss_of(model, batch).item() for model in models]
    with torch.no_grad():
        validation = [loss_of(model, batch).item() for model in models]
    assert training[0] == validation[0] == validation[1] != training[1]


# ---- compiled parts ---------------------------------------------------------------------------------------


def attention_to_copies(query, key, value, mask):
    """On a CPU torch 2.13's FlexAttention takes a view for the start of its storage."""
    return attention(query, key.clone(), value.clone(), mask)


def plain_attention(query, key, value, mask):
    """Stands in for FlexAttention, which has no backward on a CPU. It reads the same block mask."""
    row, position = torch.arange(query.shape[0])[:, None, None, None], torch.arange(query.shape[2])
    seen = mask.mask_mod(row, None, position[:, None], position)
    return F.scaled_dot_product_attention(query, key, value, seen, scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_compiled_parts_give_the_eager_loss_and_gradients(fresh_compiler, monkeypatch, backward):
    """One layer with all that record 62 has, as windows, stages and rows change."""
    settings = dict(preset="gpt2", dtype="float32", spread=0.3, **NO_LAYERS | dict(
        layers=1, paired_layers=(0,), value_layers=(0,), loss_chunk=128))
    compiled, eager = (small_model(**settings, compiled=each, recompute=backward) for each in (True, False))
    for seed, window in enumerate((24, 100, 1000)):
        batch, phase = random_batch(2, 256, seed=seed), phase_at(0, eager.config)._replace(windows=(window, 0))
        with torch.set_grad_enabled(backward):
            expected, _ = eager.loss(batch, phase)
            with monkeypatch.context() as patch, torch.compiler.set_stance(
                    "fail_on_recompile" if seed else "default"):
                patch.setattr(train_gpt2, "attention", plain_attention if backward else attention_to_copies)
                found, _ = compiled.loss(batch, phase)
                found.backward() if backward else None
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)
            expected.backward() if backward else None
    for name, gradient in gradients(eager).items():  # of all batches, added up
        assert deviation(gradients(compiled)[name], gradient) < 1e-4, name
