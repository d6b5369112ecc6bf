"""The model and its loss against references in float64, its structure, its initial values, and its compiled parts."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tools import dense_mask, random_batch, small_model
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from train_gpt2 import (GPT, PRESETS, Batch, ChunkedLoss, Config, attend, attention_masks, loss_of_chunk,
                        optimizer_groups, rms_norm, rotate, windows_at, yarn_schedule)

EPSILON = 2.0**-7
SWITCHES = {"qk_norm": False, "softcap": (0.0, 1.0, 0.0), "x0_shortcut": False, "value_residual": False,
            "unet_skips": False}


def masks_of(model: GPT, batch: Batch) -> dict:
    return attention_masks(model, batch.starts, windows_at(0, model.config))


def loss_of(model: GPT, batch: Batch) -> torch.Tensor:
    return model.loss(batch, masks_of(model, batch))[0]


def hidden_of(model: GPT, batch: Batch) -> torch.Tensor:
    return model(batch.inputs, batch.starts, masks_of(model, batch))


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- the model once more, as the formulas have it --------------------------------------------------------------------


def norm(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPSILON)


def turn(x, base):
    """Rotary embedding of one head (T, K): channel j and j + K/2 as one complex number, turned clockwise."""
    half = x.shape[-1] // 2
    number = torch.complex(x[:, :half], x[:, half:])
    frequencies = torch.tensor([base ** (-2 * j / x.shape[-1]) for j in range(half)], dtype=torch.float64)
    number = number * torch.exp(-1j * torch.arange(len(x))[:, None] * frequencies)
    return torch.cat((number.real, number.imag), -1)


def reference_hidden(model: GPT, tokens, visible):
    """(T,) tokens of one row and (T, T) bool -> (T, D): record 12, layer by layer and head by head."""
    c, weights = model.config, dict(model.named_parameters())
    size, half = c.width // c.heads, c.layers // 2
    x0 = norm(weights["embedding"][tokens.long()])
    x, pushed, first_values = x0, [], None
    for i in range(c.layers):
        if c.unet_skips and i >= c.layers - half:
            x = x + weights["skip_mix"][i - (c.layers - half)] * pushed.pop()
        if c.x0_shortcut:
            a, b = weights[f"blocks.{i}.residual"], weights[f"blocks.{i}.x0"]
            x = a * x + b * x0
        query_weight, key_weight, value_weight, out_weight = weights[f"blocks.{i}.attention"]
        z = norm(x)
        values = z @ value_weight.T
        if i == 0:
            first_values = values
        if c.value_residual and i > 0:
            mix = weights[f"blocks.{i}.value_mix"]
            values = (1 - mix) * values + mix * first_values
        heads = []
        for h in range(c.heads):
            part = slice(h * size, (h + 1) * size)
            q, k = (z @ query_weight.T)[:, part], (z @ key_weight.T)[:, part]
            if c.qk_norm:
                q, k = norm(q), norm(k)
            scores = turn(q, c.rotary_base) @ turn(k, c.rotary_base).T / math.sqrt(size)
            heads.append(torch.softmax(scores.masked_fill(~visible, -math.inf), -1) @ values[:, part])
        x = x + torch.cat(heads, -1) @ out_weight.T
        up, down = weights[f"blocks.{i}.mlp"]
        x = x + torch.relu(norm(x) @ up.T) ** 2 @ down
        if c.unet_skips and i < half:
            pushed.append(x)
    return norm(x)


def reference_states(model: GPT, batch: Batch, window: int):
    """(R, T, D), row by row."""
    rows = zip(batch.inputs, dense_mask(batch.starts, window), strict=True)
    return torch.stack([reference_hidden(model, tokens, visible) for tokens, visible in rows])


def reference_losses(model: GPT, batch: Batch, window: int):
    """Cross-entropy of every token, (R, T), over all columns of the head; tokens without a target 0."""
    logits = reference_states(model, batch, window) @ model.head.T
    if model.config.softcap[0]:
        logits = 30 * torch.tanh(logits / 30)
    chosen = logits.log_softmax(-1).gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0]
    return torch.where(batch.targets < 0, 0.0, -chosen)


@pytest.mark.parametrize("changes", [{}, dict(layers=5), dict(layers=1), SWITCHES,
                                     *({switch: off} for switch, off in SWITCHES.items()),
                                     dict(mlp_ratio=2, heads=4, rotary_base=50.0)])
def test_forward_and_loss_are_the_formulas(changes):
    model = small_model(spread=0.4, row_tokens=(300,), window=(12,), **changes)
    batch = random_batch(2, 300)
    with torch.no_grad():
        expected = reference_states(model, batch, 12)
        torch.testing.assert_close(hidden_of(model, batch), expected, rtol=1e-9, atol=1e-9)
        expected_loss = reference_losses(model, batch, 12).sum()
        assert loss_of(model, batch).item() == pytest.approx(expected_loss.item(), rel=1e-11)


@pytest.mark.parametrize("changes", [{}, dict(layers=5), SWITCHES])
def test_gradients_are_those_of_the_formulas(changes):
    model, batch = small_model(spread=0.4, **changes), random_batch(2, 64)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(reference_losses(model, batch, 23).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(loss_of(model, batch), parameters), expected, rtol=1e-8, atol=1e-9)


def test_every_parameter_matters():
    """Guards the tests above: a parameter without a gradient could be used wrongly and nobody would see it."""
    model = small_model(spread=0.4)
    loss_of(model, random_batch(2, 64)).backward()
    assert len(gradients(model)) == len(list(model.parameters()))
    for name, gradient in gradients(model).items():
        if gradient.dim() < 2:
            assert (gradient != 0).all(), name
        else:
            assert (gradient.abs().amax((-2, -1)) > 0).all(), name


@pytest.mark.parametrize("switch", ["x0_shortcut", "value_residual", "unet_skips"])
def test_neutral_mixing_weights_are_the_switch_off(switch):
    on, off = small_model(spread=0.4), small_model(**{switch: False})
    neutral = {"x0_shortcut": {"residual": 1.0, "x0": 0.0}, "value_residual": {"value_mix": 0.0},
               "unet_skips": {"skip_mix": 0.0}}[switch]
    moved = [(p, neutral[name.split(".")[-1]]) for name, p in on.named_parameters() if name.split(".")[-1] in neutral]
    for parameter, value in moved:
        parameter.data.fill_(value)
    assert len(list(on.parameters())) == len(list(off.parameters())) + len(moved)
    off.load_state_dict(on.state_dict(), strict=False)
    batch = random_batch(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(hidden_of(on, batch), hidden_of(off, batch))


def test_logits_are_capped_and_leave_the_padding_out():
    model = small_model(spread=4.0)
    hidden = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw = hidden @ model.head[:50].T
    assert model.head.shape[0] == 64 and raw.abs().max() > 40
    torch.testing.assert_close(model.logits(hidden), 30 * torch.tanh(raw / 30), rtol=1e-12, atol=1e-12)
    uncapped = small_model(spread=4.0, softcap=(0.0, 1.0, 0.0))
    torch.testing.assert_close(uncapped.logits(hidden), raw, rtol=1e-12, atol=1e-12)


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_rms_norm_adds_the_given_epsilon():
    torch.manual_seed(0)
    x = torch.randn(50, 12, dtype=torch.float64) * torch.logspace(-4, 1, 50, dtype=torch.float64)[:, None]
    expected = x / (x.square().mean(-1, keepdim=True) + 0.0078125).sqrt()
    torch.testing.assert_close(rms_norm(x, small_model().config.rms_epsilon), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(rms_norm(x, 0.5), x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt())
    narrow = x.bfloat16()
    exact = narrow.double() / (narrow.double().square().mean(-1, keepdim=True) + EPSILON).sqrt()
    assert rms_norm(narrow, EPSILON).dtype == torch.bfloat16
    torch.testing.assert_close(rms_norm(narrow, EPSILON).double(), exact, rtol=2**-8, atol=0)


def rotary_tables(tokens: int, size: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, 1, K / 2) cosines and sines as a model of these settings holds them."""
    model = small_model(row_tokens=(tokens,), val_row_tokens=tokens, width=2 * size, heads=2, rotary_base=base)
    assert len(yarn_schedule(0, model.config)[0]) == size // 2
    return model.cosine[:, None], model.sine[:, None]


@pytest.mark.parametrize("base", [10_000.0, 7.0])
def test_rotary_is_complex_multiplication(base):
    torch.manual_seed(0)
    x = torch.randn(2, 40, 3, 8, dtype=torch.float64)
    found = rotate(x, *rotary_tables(40, 8, base))
    for row in range(2):
        for head in range(3):
            torch.testing.assert_close(found[row, :, head], turn(x[row, :, head], base), rtol=1e-12, atol=1e-12)


def test_rotary_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    tables = rotary_tables(200, 16, 10_000.0)
    query, key = torch.randn(2, 16, dtype=torch.float64)
    turned_query, turned_key = (rotate(x.expand(1, 200, 1, 16), *tables)[0, :, 0] for x in (query, key))
    products = turned_query @ turned_key.T
    for distance in (0, 1, 37, 150):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-10, atol=1e-10)
    assert products[0, 0].item() == pytest.approx((query @ key).item()) and products[:, 0].std() > 0.1


# ---- sizes and first values ------------------------------------------------------------------------------------------


def test_five_minute_model_has_the_parameters_of_record_12():
    """All but layer 0's weight for mixing its own values into its own, which nothing could use."""
    with torch.device("meta"):
        model = GPT(Config(**PRESETS["five-minute"]), 50257, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 162_201_641
    assert model.embedding.shape == model.head.shape == (50304, 768)
    matrices = [p for p in model.blocks.parameters() if p.dim() > 1]
    assert sum(p.numel() for p in matrices) == 12 * 12 * 768**2


def test_first_values():
    model = small_model(vocabulary=1000, dtype=torch.float32, width=64, layers=4)
    assert model.embedding.shape == (1024, 64)
    assert abs(model.embedding.mean()) < 0.02 and abs(model.embedding.std() - 1) < 0.02
    bound = 64**-0.5
    for block in model.blocks:
        for drawn in (*block.attention.detach()[:3], block.mlp.detach()[0]):
            assert drawn.abs().max() <= bound and drawn.abs().max() > 0.99 * bound
            assert abs(drawn.mean()) < 0.05 * bound and drawn.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert (block.attention[3] == 0).all() and (block.mlp[1] == 0).all()
    assert (model.head == 0).all()
    for block in model.blocks:
        assert (block.residual.item(), block.x0.item()) == (1, 0)
    assert model.blocks[0].value_mix is None and [block.value_mix.item() for block in model.blocks[1:]] == [0.5] * 3
    assert model.skip_mix.tolist() == [1] * 2


def test_first_values_depend_on_the_seed_alone():
    first, again, other = (small_model(seed=seed).state_dict() for seed in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) == (name == "head" or tensor.dim() < 2), name  # zeros and scalars


def test_matrices_and_tables_have_the_dtypes_of_record_12():
    model = small_model(dtype=torch.bfloat16)
    assert model.embedding.dtype == model.cosine.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in (*model.blocks.parameters(), model.head)} == {torch.float32}
    batch = random_batch(1, 64)
    assert hidden_of(model, batch).dtype == torch.bfloat16
    assert loss_of(model, batch).dtype == model.logits(torch.zeros(16, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("vocabulary, padded", [(50257, 50304), (50304, 50304), (50, 64), (65, 128)])
def test_loss_before_training_is_that_of_a_uniform_guess(vocabulary, padded):
    model = small_model(vocabulary, width=8, layers=2)
    batch = random_batch(1, 64, vocabulary)
    assert model.head.shape[0] == padded
    mean = loss_of(model, batch).item() / (batch.targets >= 0).sum().item()
    assert mean == pytest.approx(math.log(padded), rel=1e-12)
    assert padded != 50304 or round(mean, 4) == 10.8258  # what the logs of the records say


def test_every_parameter_is_in_exactly_one_group():
    for off in ({}, SWITCHES, *({switch: value} for switch, value in SWITCHES.items())):
        model = small_model(**off)
        groups = optimizer_groups(model, model.config, torch.float64, train_gpt2.Processes(0, 1, torch.device("cpu")))
        held = [id(parameter) for group in groups.values() for parameter in group.parameters]
        assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


# ---- what a hidden state depends on ----------------------------------------------------------------------------------


def changed_tokens(model: GPT, batch: Batch, places) -> torch.Tensor:
    """(T,) bool: at which positions of row 0 the hidden state moves when the tokens at `places` become others."""
    tokens = batch.inputs.clone()
    tokens[0, places] = (tokens[0, places] + 1) % model.vocabulary
    with torch.no_grad():
        before, after = (hidden_of(model, batch._replace(inputs=inputs)) for inputs in (batch.inputs, tokens))
    assert torch.equal(before[1:], after[1:])  # rows know nothing of each other
    return ((before[0] - after[0]).abs() > 1e-13).any(-1)


def rows_with_documents_at(*starts) -> Batch:
    batch = random_batch(2, 300)
    begins = torch.zeros(2, 300, dtype=torch.bool)
    begins[:, list(starts)] = True
    return Batch(batch.inputs, batch.targets, begins)


def test_later_tokens_change_nothing_before_them():
    model = small_model(spread=0.4, row_tokens=(300,), window=(300,))
    for place in (1, 150, 256, 299):
        moved = changed_tokens(model, rows_with_documents_at(), slice(place, None))
        assert not moved[:place].any() and moved[place:].all()


def test_a_document_changes_no_other():
    model = small_model(spread=0.4, row_tokens=(300,), window=(300,))
    moved = changed_tokens(model, rows_with_documents_at(30, 128, 200), slice(30, 128))
    assert moved.nonzero().flatten().tolist() == list(range(30, 128))


@pytest.mark.parametrize("layers, window", [(1, 0), (1, 19), (3, 19), (3, 1)])
def test_a_token_reaches_layers_times_window(layers, window):
    model = small_model(spread=0.4, row_tokens=(300,), layers=layers, window=(window,))
    moved = changed_tokens(model, rows_with_documents_at(), 40)
    assert moved.nonzero().flatten().tolist() == list(range(40, 40 + layers * window + 1))


# ---- recomputation ---------------------------------------------------------------------------------------------------


def test_recomputing_changes_memory_only():
    batch, outcomes, visits = random_batch(2, 64), [], []
    for recompute in (False, True):
        model = small_model(spread=0.4, recompute=recompute)
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: visits.append(1))
        loss = loss_of(model, batch)
        loss.backward()
        outcomes.append({"loss": loss.detach(), **gradients(model)})
        assert len(visits) == (8 if recompute else 4)
        visits.clear()
    with torch.no_grad():
        loss_of(model, batch)
    assert len(visits) == 4  # without gradients nothing is recomputed
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-12, atol=1e-12)


# ---- loss ------------------------------------------------------------------------------------------------------------


def head_and_hidden(tokens=41, width=6, vocabulary=11, dtype=torch.float64, ahead=1):
    """Leaves that need gradients, with logits large enough for the cap to bend, and targets of which some are -1."""
    draw = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(tokens, width, generator=draw, dtype=torch.float64)
    head = 4 * torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens, ahead), generator=draw)
    for k in range(ahead):
        targets[k::6, k] = -1
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


def chunked(hidden, head, targets, chunk=10, softcap=30.0, with_gradient=True, weights=(1.0,)):
    """The weighted loss; of the model only what the loss reads."""
    model = SimpleNamespace(config=Config(loss_chunk=chunk, softcap=(softcap, softcap, 0.0)), float8=False,
                            loss_of_chunk=loss_of_chunk)
    weights = [torch.tensor(weight, dtype=train_gpt2.at_least_float32(hidden.dtype)) for weight in weights]
    return ChunkedLoss.apply(hidden, head, targets, weights, model, with_gradient)[0]


@pytest.mark.parametrize("softcap", [30.0, 2.0, 0.0])
@pytest.mark.parametrize("chunk", [1, 7, 40, 41, 1000])
def test_loss_is_cross_entropy_whatever_the_chunk(chunk, softcap):
    hidden, head, targets = head_and_hidden()
    logits = hidden @ head.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, targets[:, 0], ignore_index=-1, reduction="sum")
    expected_slopes = torch.autograd.grad(0.3 * expected, (hidden, head))
    found = chunked(hidden, head, targets, chunk, softcap)
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    slopes = torch.autograd.grad(0.3 * found, (hidden, head))
    torch.testing.assert_close(slopes, expected_slopes, rtol=1e-11, atol=1e-12)
    assert (expected_slopes[0][targets[:, 0] < 0] == 0).all()
    with torch.no_grad():
        assert chunked(hidden, head, targets, chunk, softcap, False).item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.4, 0.1)])
def test_loss_slopes_are_those_of_finite_differences(weights):
    hidden, head, targets = head_and_hidden(tokens=7, ahead=len(weights))
    assert torch.autograd.gradcheck(lambda x, w: chunked(x, w, targets, 3, weights=weights), (hidden, head))


def test_loss_without_any_target_is_zero():
    hidden, head, targets = head_and_hidden()
    loss = chunked(hidden, head, torch.full_like(targets, -1))
    assert loss.item() == 0
    assert all((slope == 0).all() for slope in torch.autograd.grad(loss, (hidden, head)))


def test_loss_of_bfloat16_states_is_summed_in_float32():
    """Only products are in bfloat16: after logits have been rounded once, everything up to their slopes is exact, and
    the slopes of many chunks add up in float32."""
    hidden, head, targets = head_and_hidden(tokens=500, dtype=torch.bfloat16)
    master = head.detach().float().requires_grad_()
    found = chunked(hidden, master, targets, chunk=4)
    logits = (hidden @ head.T).detach().double().requires_grad_()
    expected = F.cross_entropy(30 * torch.tanh(logits / 30), targets[:, 0], ignore_index=-1, reduction="sum")
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-5)
    hidden_slope, head_slope = torch.autograd.grad(found, (hidden, master))
    logit_slope, = torch.autograd.grad(expected, logits)
    exact = logit_slope @ head.double(), logit_slope.T @ hidden.double()
    assert (hidden_slope.dtype, head_slope.dtype) == (torch.bfloat16, torch.float32)
    for slope, reference in zip((hidden_slope, head_slope), exact, strict=True):
        assert (slope - reference).norm() < 0.004 * reference.norm()


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation hands out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.25)])
def test_full_logits_never_exist(weights):
    hidden, head, targets = head_and_hidden(tokens=240, width=4, vocabulary=30, ahead=len(weights))
    with LargestTensor() as largest:
        chunked(hidden, head, targets, chunk=40, weights=weights).backward()
    assert largest.elements == 40 * 30  # the logits of one chunk, not 240 x 30


# ---- compiled parts --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    """Compilers know nothing of earlier tests, and what a test sets them to ends with it."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def test_compiled_parts_give_the_eager_loss(fresh_compiler, monkeypatch):
    """One layer with all that the hundred-second recipe has, as windows and stages change. Forward only, for
    FlexAttention has no backward on a CPU. There torch 2.13 also takes a view for the start of its storage, so keys and
    values, which are parts of larger tensors, are copied before they come to it."""
    def attend_to_copies(query, key, value, mask):
        return attend(query, key.clone(), value.clone(), mask)

    monkeypatch.setattr(train_gpt2, "attend", attend_to_copies)
    settings = dict(preset="gpt2", dtype=torch.float32, spread=0.3, layers=1, row_tokens=(256,), loss_chunk=128,
                    short_layers=(), paired_layers=(0,), attention_free=(), value_layers=(0,), gated_skip=(),
                    backout=(0,))
    compiled, eager = small_model(**settings), small_model(**settings)
    compiled.compile_parts()
    with torch.no_grad():
        for seed, window in enumerate((24, 100, 1000)):
            batch = random_batch(2, 256, seed=seed)
            masks, spans = (attention_masks(model, batch.starts, (window, 0)) for model in (compiled, eager))
            compiled.enter_stage(seed)
            eager.enter_stage(seed)
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                hidden = compiled(batch.inputs, batch.starts, masks)
                loss, _ = compiled.loss(batch, masks)
            expected = eager(batch.inputs, batch.starts, spans)
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
            assert loss.item() == pytest.approx(eager.loss(batch, spans)[0].item(), rel=1e-5)


def plain_attention(query, key, value, mask):
    """Stands in for FlexAttention, which has no backward on a CPU; the mask is a tensor."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)


def plain_masks(batch: Batch, window: int) -> dict:
    return {(False, False): dense_mask(batch.starts, window)[:, None]}


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_parts_give_the_eager_gradients(fresh_compiler, monkeypatch, recompute):
    monkeypatch.setattr(train_gpt2, "attend", plain_attention)
    settings = dict(dtype=torch.float32, spread=0.3, layers=2)
    compiled, eager = small_model(**settings, recompute=recompute), small_model(**settings)
    compiled.compile_parts()
    for step in range(2):
        batch = random_batch(2, 64, seed=step)
        masks = plain_masks(batch, 20 + step)
        eager.loss(batch, masks)[0].backward()
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            compiled.loss(batch, masks)[0].backward()
        for name, gradient in gradients(eager).items():  # of both steps, added up
            assert (gradients(compiled)[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_all_layers_share_few_graphs(fresh_compiler, monkeypatch):
    """Training and validation of a deep model need no more variants than the compiler keeps of one function."""
    monkeypatch.setattr(train_gpt2, "attend", plain_attention)
    model, graphs = small_model(layers=12), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.run_block = torch.compile(train_gpt2.run_block, backend=count, dynamic=False, fullgraph=True)
    batch = random_batch(2, 64)
    masks = plain_masks(batch, 20)
    model.loss(batch, masks)[0].backward()
    with torch.no_grad():
        model.loss(batch, masks)
    assert len(graphs) == 6  # the first layer, the rest of the first half, the second; with and without gradients
