"""Both recipes, technique by technique, against a model that is written out with loops, in float64."""

import math
from itertools import pairwise

import pytest
import torch
from tools import dense_mask, random_batch, small_model

from train_gpt2 import GPT, TECHNIQUES, Config, phase_at, preset_values, stage_borders, value_at, yarn


def norm(x, epsilon):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def bigram_row(token: int, before: int, rows: int) -> int:
    return (int32(36_313 * token) ^ int32(27_191 * before)) % (rows - 1)


def reference_frequencies(c: Config, stage: int) -> tuple[list[float], float]:
    """YaRN, one frequency after the other, over the window changes up to this stage."""
    size = c.width // c.heads
    count = round(c.rotary_share * size / 2)
    frequencies = [c.rotary_base ** (-k / count) for k in range(count)]
    scale = c.attention_scale or 1 / math.sqrt(size)
    for old, new in list(pairwise(value_at(c.window, s) for s in range(stage + 1)))[:c.yarn]:
        for k, f in enumerate(frequencies):
            turns = old * f / (2 * math.pi)
            share = min(1, max(0, (turns - 1) / 31))
            frequencies[k] = f * (share + (1 - share) * old / new)
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


def turned(x, positions, frequencies):
    """Rotary embedding of a head (T, K): channels j and j + n are a complex number, turned clockwise."""
    n = len(frequencies)
    positions, frequencies = (torch.tensor(each, dtype=torch.float64) for each in (positions, frequencies))
    number = torch.complex(x[:, :n], x[:, n:2 * n]) * torch.exp(-1j * torch.outer(positions, frequencies))
    return torch.cat((number.real, number.imag, x[:, 2 * n:]), -1)


def softmax_attention(q, k, v, starts, window):
    scores = (q @ k.T).masked_fill(~dense_mask(starts[None], window)[0], -math.inf)
    return torch.softmax(scores, -1) @ v


def reference_attention(c: Config, i: int, z, weights, first_values, tokens, starts, phase):
    """Layer i over one row: z (T, D), normed -> its addition to the stream (T, D), its values (T, D)."""
    size, half, places = c.width // c.heads, c.heads // 2, range(len(tokens))
    frequencies, scale = reference_frequencies(c, phase.stage)
    scale_in, scale_out = (weights[f"blocks.{i}.{name}_scale"] if c.attention_mix else 1
                           for name in ("in", "out"))
    query_weight, key_weight, value_weight, out_weight = weights[f"blocks.{i}.attention"]
    window = phase.windows[i in c.short_layers]
    own, queries, keys, values = z @ (scale_in * value_weight).T, [], [], []
    for h in range(c.heads):
        part = slice(h * size, (h + 1) * size)
        q, k = (z @ (scale_in * weight[part]).T for weight in (query_weight, key_weight))
        v = own[:, part]
        if c.qk_norm:
            q, k = norm(q, c.rms_epsilon), norm(k, c.rms_epsilon)
        positions = [2 * t + h % 2 if i in c.paired_layers else t for t in places]
        q, k = scale * turned(q, positions, frequencies), turned(k, positions, frequencies)
        if c.value_residual and i > 0:
            mix = weights[f"blocks.{i}.value_mix"]
            v = (1 - mix) * v + mix * first_values[:, part]
        if i in c.value_layers:
            table = weights[f"value_tables.{sorted(c.value_layers).index(i) % 3}"]
            share = 2 * sigmoid(z[:, :12] @ weights[f"blocks.{i}.value_gate"][h]) if c.value_gates else z.new_ones(1)
            v = v + share[:, None] * table[tokens.long()][:, part]
        if c.key_offset and i not in c.short_layers + c.paired_layers:
            still = 2 * len(frequencies)
            k = torch.stack([torch.cat((k[t, :still], k[max(0, t - 1), still:])) for t in places])
        queries, keys, values = [*queries, q], [*keys, k], [*values, v]
    if i in c.paired_layers:  # heads g and g + half are one, with two positions for each token
        doubled, seen = torch.stack((starts, torch.zeros_like(starts)), 1).flatten(), [None] * c.heads
        for g in range(half):
            q, k, v = (torch.stack((x[g], x[g + half]), 1).flatten(0, 1) for x in (queries, keys, values))
            both = softmax_attention(q, k, v, doubled, window)
            seen[g], seen[g + half] = both[0::2], both[1::2]
    else:
        seen = [softmax_attention(*qkv, starts, window) for qkv in zip(queries, keys, values, strict=True)]
    if c.attention_gates:
        seen = [y * sigmoid(z[:, :12] @ weight)[:, None]
                for y, weight in zip(seen, weights[f"blocks.{i}.attention_gate"], strict=True)]
    return torch.cat(seen, -1) @ (scale_out * out_weight).T, own


def reference_hidden(model: GPT, tokens, starts, phase):
    """(T,) tokens of one row -> (T, D), layer by layer and head by head."""
    c, weights, half = model.config, dict(model.named_parameters()), model.config.layers // 2
    e = weights["head" if phase.tied else "embedding"][tokens.long()]
    if c.smear:
        share = weights["smear_mix"] * sigmoid(e[:, :12] @ weights["smear_gate"])
        e = torch.stack([e[t] + share[t] * e[t - 1] if t else e[0] for t in range(len(tokens))])
    if c.bigram:
        last = len(weights["bigram_table"]) - 1
        before = [last, last, *tokens[1:].tolist()]  # the second token is hashed with no real one before it
        rows = [bigram_row(int(token), before[t], last + 1) if t else last for t, token in enumerate(tokens)]
        b = weights["bigram_table"][rows]
    x = x0 = norm(e, c.rms_epsilon)
    outputs, first_values = [], None
    for i in range(c.layers):
        if c.unet_skips and i >= c.layers - half:
            x = x + weights["skip_mix"][i - (c.layers - half)] * outputs[c.layers - 1 - i]
        if c.gated_skip and i == c.gated_skip[1]:
            share = 2 * sigmoid(weights["skip_mix"]) * sigmoid(x0[:, :12] @ weights["skip_gate"])
            x = x + share[:, None] * outputs[c.gated_skip[0]]
        if c.x0_shortcut:
            x = weights[f"blocks.{i}.residual"] * x + weights[f"blocks.{i}.x0"] * x0
        if c.bigram:
            x = x + weights[f"blocks.{i}.bigram"] * b
        if i not in c.attention_free:
            added, own = reference_attention(
                c, i, norm(x, c.rms_epsilon), weights, first_values, tokens, starts, phase)
            x, first_values = x + added, own if i == 0 else first_values
        up, down = weights[f"blocks.{i}.mlp"]
        x = x + torch.relu(norm(x, c.rms_epsilon) @ up.T) ** 2 @ down
        outputs.append(x)
    for source in c.backout:
        x = x - weights["backout_mix"] * outputs[source]
    return norm(x, c.rms_epsilon)


def reference_losses(states, head, targets, cap, weights) -> tuple:
    """(R, T, D), (R, T) targets -> sums over tokens: of all targets, weighted, and of the next alone."""
    height, extent, shift = cap
    logits = states @ head.T
    if height:  # a logistic function, but for what it adds to every logit, which no softmax sees
        logits = 2 * height * sigmoid((logits + shift) * 2 / extent)
    scores, sums = logits.log_softmax(-1), []
    for k in range(len(weights)):
        rows, tokens = (targets[:, k:] >= 0).nonzero(as_tuple=True)
        sums.append(-scores[rows, tokens, targets[rows, tokens + k]].sum())
    return sum(weight * total for weight, total in zip(weights, sums, strict=True)), sums[0]


def assert_agrees(model: GPT, stage: int, tied: bool | None = None, tokens: int = 40) -> dict:
    """Hidden states, losses and gradients over two rows in the first step of a stage. Returns gradients."""
    step = [0, *stage_borders(model.config)][stage]
    phase, batch = phase_at(step, model.config), random_batch(2, tokens, seed=stage)
    weights = (1.0, 0.5, 0.2, 0.1)[:len(phase.token_weights)]  # at the start of a stage none is near 0
    phase = phase._replace(token_weights=weights, tied=phase.tied if tied is None else tied)
    expected = torch.stack([reference_hidden(model, *row, phase)
                            for row in zip(batch.inputs, batch.starts, strict=True)])
    expected_losses = reference_losses(expected, model.head, batch.targets, model.config.softcap, weights)
    with torch.no_grad():
        found = model(batch.inputs, batch.starts, phase)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.loss(batch, phase), expected_losses, rtol=1e-11, atol=0)
    losses = model.loss(batch, phase)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-11, atol=0)
    assert losses[0].requires_grad and not losses[1].requires_grad
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, expected = (dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))
                       for loss in (losses[0], expected_losses[0]))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    return found


def settled(preset: str, name: str) -> bool:
    """Whether turning the technique off changes the preset."""
    values = preset_values(preset)
    return Config(**values) != Config(**values | TECHNIQUES[name].neutral)


ONE_BY_ONE = [(preset, name) for name in TECHNIQUES for preset in ("gpt2", "five-minute") if settled(preset, name)]
assert {name for _, name in ONE_BY_ONE} == {*TECHNIQUES}

# Record 62 in five layers, which have among them all that its eleven have.
FIVE_LAYERS = dict(layers=5, paired_layers=(0, 3), short_layers=(0, 1, 3), attention_free=(2,),
                   value_layers=(0, 1, 3, 4), gated_skip=(1, 3), backout=(2,))


def recipe(preset: str = "gpt2", without=(), **changes) -> GPT:
    """A small model none of whose parameters is at its first value."""
    settings = FIVE_LAYERS if preset == "gpt2" else {}
    for name in without:
        settings = settings | TECHNIQUES[name].neutral
    return small_model(preset=preset, spread=0.4, **settings | changes)


@pytest.mark.parametrize("preset, stage, tied", [
    *(("gpt2", stage, tied) for stage in range(4) for tied in (True, False)), ("five-minute", 0, False)])
def test_states_losses_and_gradients_are_the_reference(preset, stage, tied):
    gradients = assert_agrees(small_model(preset=preset, spread=0.4), stage, tied)
    assert (gradients.pop("embedding") != 0).any() != tied  # while tied, its place is the head's
    for name, gradient in gradients.items():  # else a parameter could be used wrongly, and nobody would see it
        if name.endswith((".attention", ".mlp")):
            assert (gradient.abs().amax((-2, -1)) > 0).all(), name
        else:
            of_tokens = name in ("head", "bigram_table") or name.startswith("value_tables")
            assert (gradient != 0).any() and (of_tokens or (gradient != 0).all()), name


@pytest.mark.parametrize("preset, name", ONE_BY_ONE)
def test_each_technique_off_is_the_reference_without_it(preset, name):
    assert_agrees(recipe(preset, [name]), stage=1)


OTHER = [dict(rotary_share=1.0), dict(rotary_share=0.0), dict(attention_scale=0.0), dict(value_residual=True),
         dict(unet_skips=True, gated_skip=()), dict(rms_epsilon=2.0**-7), dict(softcap=(5.0, 7.0, -2.0)),
         dict(paired_layers=(1, 4), key_offset=False), dict(gated_skip=(0, 4)), dict(predicted_tokens=5),
         dict(value_layers=(3,)), dict(backout=(0,)), dict(window=(1,), window_short=(1,))]


@pytest.mark.parametrize("changes", OTHER, ids=str)
def test_other_values_of_the_techniques(changes):
    assert_agrees(recipe(**changes), stage=1)


@pytest.mark.parametrize("preset, changes", [
    ("gpt2", {}), ("five-minute", {}), ("five-minute", dict(layers=1)), ("five-minute", dict(layers=5, heads=1))])
def test_all_techniques_off_at_once(preset, changes):
    model = recipe(preset, TECHNIQUES, **changes)
    assert {name.split(".")[-1] for name, _ in model.named_parameters()} == {
        "embedding", "head", "attention", "mlp"}
    assert_agrees(model, stage=2)
    assert_agrees(recipe(preset, **changes if preset == "five-minute" else {}), stage=2)




def test_frequencies_and_scales_of_the_stages():
    """Those of the full recipe as its record has them; the model holds those of all stages."""
    config, model = Config(), small_model(preset="gpt2")
    for stage, rounded in enumerate((0.1, 0.116946, 0.127518, 0.131778)):
        frequencies, scale = yarn(stage, config)
        assert frequencies[0] == 1 and round(scale, 6) == rounded  # 61 turns in the first window: kept
        assert frequencies[-1].item() == pytest.approx(384 / config.window[stage] / 1024)  # never one: stretched
        held = model.frequencies[stage], model.scales[stage]
        for (found, found_scale), c in (((frequencies, scale), config), (held, model.config)):
            expected, expected_scale = reference_frequencies(c, stage)
            assert found.tolist() == pytest.approx(expected, rel=1e-12)
            assert float(found_scale) == pytest.approx(expected_scale, rel=1e-12)
