"""Both recipes, technique by technique, against a model that is written out with loops, in float64."""

import math
from itertools import pairwise

import pytest
import torch
from tools import dense_mask, made_up_prefixes, random_batch, small_model

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


def hashed(tokens, rows: int) -> list[int]:
    """The bigram row of each token. The first has the last one, whose number the second sees in its place."""
    before = [rows - 1, rows - 1, *tokens[1:].tolist()]
    return [bigram_row(int(token), before[t], rows) if t else rows - 1 for t, token in enumerate(tokens)]


def signed(tokens, rows: int) -> list[int]:
    return [(int(tokens[t]) ^ int(tokens[t - 1])) % rows if t else 0 for t in range(len(tokens))]


def pad_channels(part, width):
    """(T, n) -> (T, width)."""
    wide = part.new_zeros(len(part), width)
    wide[:, :part.shape[1]] = part
    return wide


def mudd(of, prefix, x):
    """(T, D) -> (n, T, 1): weights of each token."""
    hidden = x @ of[f"{prefix}mudd.mudd_in"].T
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return 0.1 * (hidden @ of[f"{prefix}mudd.mudd_out"].T + of[f"{prefix}mudd.mudd_bias"]).T[..., None]


def mixed(weights, streams):
    """Of the streams that there are."""
    return sum(weight * x for weight, x in zip(weights, streams, strict=True) if x is not None)


def projection(of, c: Config, number: int, h: int):
    """(K, D): the queries' (0) or keys' (1) of head h, from matrices of `together` heads each."""
    size, together = c.width // c.heads, c.qk_heads or c.heads
    return of["qk"][(number * c.heads + h) // together][h % together * size:(h % together + 1) * size]


def reference_attention(c: Config, i: int, h_in, of, added, first_values, starts, phase):
    """Layer i over one row: h_in (T, D), normed -> its output and its values, (T, D). added: to the values."""
    size, half, places = c.width // c.heads, c.heads // 2, range(len(h_in))
    frequencies, scale = reference_frequencies(c, phase.stage)
    scale_in, scale_out = (of["in_scale"], of["out_scale"]) if c.attention_mix else (1, 1)
    window, (value_weight, out_weight) = phase.windows[i in c.short_layers], of["vo"]
    own, queries, keys, values = h_in @ (scale_in * value_weight).T, [], [], []
    for h in range(c.heads):
        part = slice(h * size, (h + 1) * size)
        q, k = (h_in @ (scale_in * projection(of, c, number, h)).T for number in (0, 1))
        v = own[:, part]
        if c.qk_norm:
            q, k = norm(q, c.rms_epsilon), norm(k, c.rms_epsilon)
        positions = [2 * t + h % 2 if i in c.paired_layers else t for t in places]
        q, k = scale * turned(q, positions, frequencies), turned(k, positions, frequencies)
        if c.value_residual and i > 0:
            v = (1 - of["value_mix"]) * v + of["value_mix"] * first_values[:, part]
        if c.key_offset and i not in c.short_layers + c.paired_layers:
            still = 2 * len(frequencies)
            k = torch.stack([torch.cat((k[t, :still], k[max(0, t - 1), still:])) for t in places])
        queries, keys, values = [*queries, q], [*keys, k], [*values, v + added[:, part]]
    if i in c.paired_layers:  # heads g and g + half are one, with two positions for each token
        doubled, seen = torch.stack((starts, torch.zeros_like(starts)), 1).flatten(), [None] * c.heads
        for g in range(half):
            q, k, v = (torch.stack((x[g], x[g + half]), 1).flatten(0, 1) for x in (queries, keys, values))
            both = softmax_attention(q, k, v, doubled, window)
            seen[g], seen[g + half] = both[0::2], both[1::2]
    else:
        seen = [softmax_attention(*qkv, starts, window) for qkv in zip(queries, keys, values, strict=True)]
    for h, v in enumerate(values):
        if i in c.xsa_layers:
            u = v / v.norm(dim=-1, keepdim=True)
            seen[h] = seen[h] - torch.tanh(of["xsa"][h]) * (seen[h] * u).sum(-1, keepdim=True) * u
        if c.attention_gates:
            seen[h] = seen[h] * sigmoid(h_in[:, :12] @ of["attention_gate"][h])[:, None]
    return torch.cat(seen, -1) @ (scale_out * out_weight).T, own


def reference_hidden(model: GPT, tokens, starts, phase):
    """(T,) tokens of one row -> (T, D), layer by layer and head by head."""
    c, weights, ids = model.config, dict(model.named_parameters()), tokens.long()
    half, size, last = c.layers // 2, c.width // c.heads, c.layers - 1
    e = weights["head" if phase.tied else "embedding"][ids]
    if c.smear:
        share = weights["entrance.smear_mix"] * sigmoid(e[:, :12] @ weights["entrance.smear_gate"])
        e = torch.stack([e[t] + share[t] * e[t - 1] if t else e[0] for t in range(len(tokens))])
    x0 = norm(e, c.rms_epsilon)
    if c.bigram:
        b = weights["bigram_table"][hashed(tokens, len(weights["bigram_table"]))]
        b = pad_channels(b * model.signs[signed(tokens, c.bigram_signs)] if c.bigram_signs else b, c.width)
        x0 = x0 + weights["entrance.bigram_mix"][0] * b
    of_layer = {i: weights[f"value_tables.{n}"][ids] for n, i in enumerate(sorted(c.value_layers))}
    attending = [i for i in range(c.layers - c.mudd) if i not in c.attention_free]
    take_x0 = {"sublayers": attending, "blocks": range(c.layers - c.mudd), "none": []}[c.mixing]
    take_bigram = [0, *attending[attending[0] == 0:]] if c.bigram else []  # layer 0 has it in x0
    x, outputs, source, first_values = x0, [], None, None
    for i in range(c.layers):
        prefix, before = f"blocks.{i}.", x
        of = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
        if c.unet_skips and i >= c.layers - half:
            x = x + of["skip_mix"] * outputs[last - i]
        if c.gated_skip and i == c.gated_skip[1]:
            share = 2 * sigmoid(of["skip_mix"]) * sigmoid(x0[:, :12] @ of["skip_gate"])
            x = x + share[:, None] * outputs[c.gated_skip[0]]
        taken, by_attention, by_mlp = torch.zeros_like(x), (1, 1), (1, 1)
        if i in take_x0:
            taken = taken + weights["entrance.x0_mix"][[*take_x0].index(i)] * x0
        if i in take_bigram and i > 0:
            taken = taken + weights["entrance.bigram_mix"][take_bigram.index(i)] * b
        if i in take_x0 and c.mixing == "blocks":
            x, taken = of["residual"] * x + taken, 0
        if c.mixing == "sublayers" and not (c.mudd and i == last):
            by_mlp = of["residual"][-1], of["output"][-1]
            by_attention = of["residual"][0], of["output"][0]
        h, added = norm(x if source is None else source, c.rms_epsilon), torch.zeros_like(x)
        mu = mudd(of, "", x) if c.mudd and i == last else None
        if i in c.value_layers:
            ve = of_layer[i]
            for head in range(c.heads):
                if mu is not None:
                    share = mu[6 if head < c.heads / 2 else 7]
                elif c.value_gates:
                    share = torch.cat((h[:, :6], ve[:, :6]), -1) @ of["value_gate"][head]
                    share = 2 * sigmoid(share)[:, None]
                else:
                    share = 1
                part = torch.zeros_like(x)
                part[:, head * size:(head + 1) * size] = ve[:, head * size:(head + 1) * size]
                added = added + share * part
        if mu is not None:
            streams = x0, source, x
            added, x = added + mixed(mu[:3], streams), x + mixed(mu[3:6], streams)
            by_attention, by_mlp = (mu[8], mu[9]), (mu[12], mu[13])
            taken = mu[10] * x0 + (mu[11] * b if c.bigram else 0)
        if i not in c.attention_free:
            out, own = reference_attention(c, i, h, of, added, first_values, starts, phase)
            x, first_values = by_attention[0] * x + by_attention[1] * out, own if i == 0 else first_values
        x, (up, down) = x + taken, of["mlp"]
        x = by_mlp[0] * x + by_mlp[1] * (torch.relu(norm(x, c.rms_epsilon) @ up.T) ** 2 @ down)
        outputs.append(x)
        source = x if i in c.attention_source else source
    if c.mudd:
        skipped = outputs[c.gated_skip[0]] if c.gated_skip else outputs[0] if c.unet_skips else None
        early = of_layer[min(c.value_layers)] if c.value_layers else None
        x = x + mixed(mudd(weights, "", x), (x0, source, before, early, skipped))
    return norm(x, c.rms_epsilon)


def reference_losses(states, head, targets, cap, weights, prefixes, prefix_weight) -> tuple:
    """(R, T, D), (R, T) targets -> sums over tokens: of all targets, weighted, and of the next alone."""
    height, extent, shift = cap
    logits = states @ head.T
    if height:
        logits = height * torch.tanh((logits + shift) / extent)
    scores, sums = logits.log_softmax(-1), [0.0] * (len(weights) + 1)
    for r, row in enumerate(targets.tolist()):
        for t in range(len(row)):
            wanted = [row[t + k] if t + k < len(row) else -1 for k in range(len(weights))]
            wanted.append(int(prefixes[row[t]]) if row[t] >= 0 else -1)
            sums = [total - scores[r, t, token] if token >= 0 else total
                    for total, token in zip(sums, wanted, strict=True)]
    return sum(weight * total for weight, total in zip((*weights, prefix_weight), sums, strict=True)), sums[0]


def assert_agrees(model: GPT, stage: int, tied: bool | None = None, tokens: int = 40) -> dict:
    """Hidden states, losses and gradients over two rows in the first step of a stage. Returns gradients."""
    step = stage_borders(model.config)[stage]
    phase, batch = phase_at(step, model.config), random_batch(2, tokens, seed=stage)
    weights = (1.0, 0.5, 0.2, 0.1)[:len(phase.token_weights)]  # at the start of a stage none is near 0
    phase = phase._replace(token_weights=weights, tied=phase.tied if tied is None else tied)
    expected = torch.stack([reference_hidden(model, *row, phase)
                            for row in zip(batch.inputs, batch.starts, strict=True)])
    expected_losses = reference_losses(expected, model.head, batch.targets, model.config.softcap, weights,
                                       made_up_prefixes(model.vocabulary), phase.prefix_weight)
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
    return Config(**values) != Config(**values | TECHNIQUES[name])


ONE_BY_ONE = [(preset, name) for name in TECHNIQUES for preset in ("gpt2", "five-minute") if settled(preset, name)]
assert {name for _, name in ONE_BY_ONE} == {*TECHNIQUES}

# gpt2 in six layers, which have among them all that its eleven have.
SIX_LAYERS = dict(layers=6, paired_layers=(0, 4), short_layers=(0, 3, 4), attention_free=(2,),
                  value_layers=(0, 3, 4, 5), xsa_layers=(1, 3, 5), gated_skip=(1, 2), attention_source=(3,))


def recipe(preset: str = "gpt2", without=(), **changes) -> GPT:
    """A small model none of whose parameters is at its first value."""
    settings = SIX_LAYERS if preset == "gpt2" else {}
    for name in without:
        settings = settings | TECHNIQUES[name]
    return small_model(preset=preset, spread=0.4, **settings | changes)


@pytest.mark.parametrize("preset, stage, tied", [
    *(("gpt2", stage, tied) for stage in range(4) for tied in (True, False)), ("five-minute", 0, False)])
def test_states_losses_and_gradients_are_the_reference(preset, stage, tied):
    gradients = assert_agrees(small_model(preset=preset, spread=0.4), stage, tied)
    assert (gradients.pop("embedding") != 0).any() != tied  # while tied, its place is the head's
    for name, gradient in gradients.items():  # else a parameter could be used wrongly, and nobody would see it
        if name.endswith((".qk", ".vo", ".mlp")):
            assert (gradient.abs().amax((-2, -1)) > 0).all(), name
        else:
            of_some = name in ("head", "bigram_table") or "value_tables" in name or name.endswith("mudd_in")
            if name.endswith("mudd_out"):  # a unit of GELU may be shut, but each coefficient is used
                gradient = gradient.abs().amax(-1)
            assert (gradient != 0).any() and (of_some or (gradient != 0).all()), name


@pytest.mark.parametrize("preset, name", ONE_BY_ONE)
def test_each_technique_off_is_the_reference_without_it(preset, name):
    assert_agrees(recipe(preset, [name]), stage=1)


OTHER = [dict(rotary_share=1.0), dict(rotary_share=0.0), dict(attention_scale=0.0), dict(value_residual=True),
         dict(unet_skips=True, gated_skip=()), dict(rms_epsilon=2.0**-7), dict(softcap=(5.0, 7.0, -2.0)),
         dict(paired_layers=(1, 5), key_offset=False), dict(gated_skip=(0, 4)), dict(predicted_tokens=5),
         dict(value_layers=(3,)), dict(window=(1,), window_short=(1,)), dict(qk_heads=1), dict(qk_heads=4),
         dict(mixing="none"), dict(mixing="none", mudd=False), dict(mudd=False, mixing="blocks"),
         dict(mudd=False, unet_skips=True, gated_skip=()), dict(value_layers=(), bigram=0, attention_source=()),
         dict(attention_source=(0,), xsa_layers=(0, 4)), dict(bigram_width=32, bigram_signs=1), dict(prefix_weight=3.0),
         dict(attention_free=(0,), value_layers=(1,)), dict(attention_free=(), gated_skip=(2, 5))]


@pytest.mark.parametrize("changes", OTHER, ids=str)
def test_other_values_of_the_techniques(changes):
    assert_agrees(recipe(**changes), stage=1)


@pytest.mark.parametrize("preset, changes", [
    ("gpt2", {}), ("five-minute", {}), ("five-minute", dict(layers=1)), ("five-minute", dict(layers=5, heads=1))])
def test_all_techniques_off_at_once(preset, changes):
    model = recipe(preset, reversed(TECHNIQUES), **changes)  # mixing by blocks, then none
    assert {name.split(".")[-1] for name, _ in model.named_parameters()} == {
        "embedding", "head", "qk", "vo", "mlp"}
    assert_agrees(model, stage=2)
    assert_agrees(recipe(preset, **changes), stage=2)



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
