"""The hundred-second recipe, technique by technique, against references that are written out with loops, in float64."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tools import random_batch, small_model

import train_gpt2
from train_gpt2 import (GPT, HEAD_UNIT, HIDDEN_UNIT, PRESETS, SLOPE_UNIT, Batch, ChunkedLoss, Config, Processes,
                        attention_masks, bigram_rows, float8, last_tied_step, layer_plan, loss_of_chunk,
                        multi_token_weights, offset_keys, optimizer_groups, rotate, smear, softcap,
                        train_step, value_at, warm_up, windows_at, yarn_schedule)

# Each technique of the recipe switched off, or set to another value that its reference has to follow.
OFF = {
    "paired_layers": (), "short_layers": (), "attention_free": (), "qk_norm": False, "attention_scale": 0.0,
    "rotary_share": 0.0, "yarn": 0, "key_offset": False, "attention_gates": False, "attention_mix": False,
    "value_layers": (), "value_gates": False, "bigram": 0, "smear": False, "x0_shortcut": False, "gated_skip": (),
    "backout": (), "softcap": (0.0, 1.0, 0.0), "predicted_tokens": 1, "tied_until": 0.0,
}
OTHER = [dict(rotary_share=1.0), dict(cross_document=False), dict(value_tables=1), dict(value_residual=True),
         dict(unet_skips=True, gated_skip=()), dict(rms_epsilon=2.0**-7), dict(softcap=(5.0, 7.0, -2.0)),
         dict(mlp_ratio=2), dict(paired_layers=(0, 3, 10), key_offset=False), dict(document_mask=False),
         dict(gated_skip=(2, 9, 0, 3, 2, 4)), dict(second_embedding=True), dict(embedding_norm=False),
         dict(gate_channels=5)]


def recipe(**changes) -> GPT:
    """A small model of the recipe, none of whose parameters is at its first value."""
    return small_model(preset="gpt2", spread=0.4, **changes)


def first_step(stage: int, config: Config) -> int:
    return [0, *train_gpt2.stage_borders(config)][stage]


# ---- the model once more, as the ledger of the records has it --------------------------------------------------------


def norm(x, epsilon):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def bigram_row(token: int, before: int, rows: int) -> int:
    return (int32(36_313 * token) ^ int32(27_191 * before)) % (rows - 1)


def reference_frequencies(config: Config, stage: int) -> tuple[list[float], float]:
    """YaRN, one frequency after the other, over the window changes up to this stage."""
    size = config.width // config.heads
    count = round(config.rotary_share * size / 2)
    frequencies = [config.rotary_base ** (-k / count) for k in range(count)]
    scale = config.attention_scale or 1 / math.sqrt(size)
    windows = [value_at(config.window, s) for s in range(stage + 1)]
    for old, new in list(pairwise(windows))[:config.yarn]:
        for k, f in enumerate(frequencies):
            turns = old * f / (2 * math.pi)
            if turns <= 1:
                frequencies[k] = f * old / new
            elif turns < 32:
                share = (turns - 1) / 31
                frequencies[k] = f * (share + (1 - share) * old / new)
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


def turned(x, positions, frequencies):
    """Rotary embedding of one head (T, K), channels j and j + n as one complex number turned clockwise."""
    n = len(frequencies)
    number = torch.complex(x[:, :n], x[:, n:2 * n])
    angles = torch.outer(torch.tensor(positions, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))
    number = number * torch.exp(-1j * angles)
    return torch.cat((number.real, number.imag, x[:, 2 * n:]), -1)


def visible(documents: list[int], window: int):
    """(T, T) bool, query by query and key by key."""
    places = range(len(documents))
    return torch.tensor([[j <= i and documents[i] == documents[j] and i - j <= window for j in places] for i in places])


def reference_attention(c: Config, i: int, z, weights, plan, first_values, tokens, documents, alone, stage, windows):
    """Layer i over one row: z (T, D), normalised -> its addition to the stream (T, D), and its own values (T, D)."""
    size, half, places = c.width // c.heads, c.heads // 2, range(len(tokens))
    frequencies, scale = reference_frequencies(c, stage)
    into, out = (weights[f"blocks.{i}.{name}"] if c.attention_mix else 1 for name in ("into", "out"))
    query_weight, key_weight, value_weight, out_weight = weights[f"blocks.{i}.attention"]
    window = windows[1] if i in c.short_layers else windows[0]
    own = z @ (into * value_weight).T
    queries, keys, values = [], [], []
    for h in range(c.heads):
        part = slice(h * size, (h + 1) * size)
        q, k, v = z @ (into * query_weight[part]).T, z @ (into * key_weight[part]).T, own[:, part]
        if c.qk_norm:
            q, k = norm(q, c.rms_epsilon), norm(k, c.rms_epsilon)
        positions = [2 * t + h % 2 for t in places] if i in c.paired_layers else list(places)
        q, k = turned(q, positions, frequencies), turned(k, positions, frequencies)
        if first_values is not None and i > 0:
            mix = weights[f"blocks.{i}.value_mix"]
            v = (1 - mix) * v + mix * first_values[:, part]
        if i in c.value_layers:
            place = sorted(c.value_layers).index(i)
            embedded = weights[f"value_tables.{place % c.value_tables}"][tokens.long()][:, part]
            if c.value_gates:
                seen_by_gate = z[:, :c.gate_channels] @ weights[f"blocks.{i}.value_gate"][h]
                embedded = 2 * sigmoid(seen_by_gate)[:, None] * embedded
            v = v + embedded
        if c.key_offset and i not in c.short_layers + c.paired_layers:
            still = 2 * len(frequencies)
            k = torch.stack([k[t] if alone[t] else torch.cat((k[t, :still], k[t - 1, still:])) for t in places])
        queries, keys, values = [*queries, q], [*keys, k], [*values, v]
    seen = [None] * c.heads
    if i in c.paired_layers:
        mask = visible([documents[n // 2] for n in range(2 * len(tokens))], window)
        for g in range(half):
            q, k, v = (torch.stack([x[g + half * (n % 2)][n // 2] for n in range(2 * len(tokens))])
                       for x in (queries, keys, values))
            both = torch.softmax((scale * q @ k.T).masked_fill(~mask, -math.inf), -1) @ v
            seen[g], seen[g + half] = both[0::2], both[1::2]
    else:
        mask = visible(documents, window)
        for h in range(c.heads):
            scores = scale * queries[h] @ keys[h].T
            seen[h] = torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ values[h]
    if c.attention_gates:
        gates = [sigmoid(z[:, :c.gate_channels] @ weight) for weight in weights[f"blocks.{i}.attention_gate"]]
        seen = [y * gate[:, None] for y, gate in zip(seen, gates, strict=True)]
    return torch.cat(seen, -1) @ (out * out_weight).T, own


def reference_hidden(model: GPT, tokens, starts, stage: int, windows: tuple[int, int], tied: bool):
    """(T,) tokens of one row -> (T, D), layer by layer and head by head."""
    c, weights, plan = model.config, dict(model.named_parameters()), layer_plan(model.config)
    places, epsilon = range(len(tokens)), c.rms_epsilon
    documents = starts.long().cumsum(0).tolist() if c.document_mask else [0] * len(tokens)
    alone = [t == 0 or (not c.cross_document and bool(starts[t])) for t in places]
    e = weights["head" if tied else "embedding"][tokens.long()]
    if c.smear:
        e = torch.stack([e[t] if alone[t] else e[t] + weights["smear_mix"] * e[t - 1] * sigmoid(
            (weights["smear_gate"] * e[t, :c.gate_channels]).sum()) for t in places])
    if c.bigram:
        last = len(weights["bigram_table"]) - 1
        rows = [last if alone[t] else bigram_row(int(tokens[t]), last if alone[t - 1] else int(tokens[t - 1]), last + 1)
                for t in places]
        b = weights["bigram_table"][rows]
    x = x0 = norm(e, epsilon) if c.embedding_norm else e
    outputs, first_values, half = {}, None, c.layers // 2
    for i in range(c.layers):
        if c.unet_skips and i >= c.layers - half:
            x = x + weights["skip_mix"][i - (c.layers - half)] * outputs[c.layers - 1 - i]
        for k in range(len(c.gated_skip) // 2):
            if i == c.gated_skip[2 * k + 1]:
                share = 2 * sigmoid(weights["skip_mix"][k]) * sigmoid(
                    x0[:, :c.gate_channels] @ weights["skip_gate"][k])
                x = x + share[:, None] * outputs[c.gated_skip[2 * k]]
        if c.x0_shortcut:
            x = weights[f"blocks.{i}.residual"] * x + weights[f"blocks.{i}.x0"] * x0
        if c.bigram:
            x = x + weights[f"blocks.{i}.bigram"] * b
        if c.second_embedding:
            x = x + weights[f"blocks.{i}.second"] * norm(weights["second_table"][tokens.long()], epsilon)
        if i not in c.attention_free:
            added, own = reference_attention(c, i, norm(x, epsilon), weights, plan, first_values, tokens, documents,
                                             alone, stage, windows)
            x = x + added
            if c.value_residual and i == 0:
                first_values = own
        up, down = weights[f"blocks.{i}.mlp"]
        x = x + torch.relu(norm(x, epsilon) @ up.T) ** 2 @ down
        outputs[i] = x
    for source in c.backout:
        x = x - weights["backout_mix"] * outputs[source]
    return norm(x, epsilon)


def reference_losses(states, head, targets, cap, weights) -> tuple:
    """(R, T, D) and (R, T) targets -> sums over all tokens, term by term: of all targets weighted, of the next only."""
    height, extent, shift = cap
    logits = states @ head.T
    if height:  # by the logistic function; what it adds to every logit no softmax sees
        logits = 2 * height * sigmoid((logits + shift) * 2 / extent)
    scores, (rows, tokens) = logits.log_softmax(-1), targets.shape
    weighted = next_token = 0
    for row in range(rows):
        for t in range(tokens):
            for k, weight in enumerate(weights):
                if t + k < tokens and (target := targets[row, t + k]) >= 0:
                    weighted = weighted - weight * scores[row, t, target]
                    next_token = next_token - scores[row, t, target] * (k == 0)
    return weighted, next_token


def assert_agrees(model: GPT, stage: int, tied: bool, tokens: int = 40):
    """Hidden states, both losses and all gradients of a model, over two rows at the first step of a stage."""
    config, step = model.config, first_step(stage, model.config)
    batch, windows, weights = random_batch(2, tokens, seed=stage), windows_at(step, config), (1.0, 0.5, 0.2)
    weights = weights[:max(1, config.predicted_tokens - stage)]
    model.tied = tied
    model.enter_stage(stage)
    masks = attention_masks(model, batch.starts, windows)
    expected = torch.stack([reference_hidden(model, *row, stage, windows, tied)
                            for row in zip(batch.inputs, batch.starts, strict=True)])
    expected_losses = reference_losses(expected, model.head, batch.targets, config.softcap, weights)
    with torch.no_grad():
        found = model(batch.inputs, batch.starts, masks)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)
    losses = model.loss(batch, masks, weights)
    torch.testing.assert_close(losses, tuple(loss.detach() for loss in expected_losses), rtol=1e-11, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    slopes, expected_slopes = (torch.autograd.grad(loss, parameters, materialize_grads=True)
                               for loss in (losses[0], expected_losses[0]))
    for name, slope, expected_slope in zip(names, slopes, expected_slopes, strict=True):
        torch.testing.assert_close(slope, expected_slope, rtol=1e-8, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")
    return dict(zip(names, slopes, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", range(4))
def test_forward_loss_and_gradients_are_the_ledgers(stage, tied):
    slopes = assert_agrees(recipe(), stage, tied)
    assert (slopes.pop("embedding") != 0).any() != tied  # while tied, the lookup takes the head, and nothing the table
    for name, slope in slopes.items():  # else a parameter could be used wrongly and nobody would see it
        if name.startswith("blocks") and slope.dim() > 1:
            assert (slope.abs().amax((-2, -1)) > 0).all(), name
        else:
            assert (slope != 0).any() and (name in ("head", "bigram_table") or name.startswith("value_tables")
                                           or (slope != 0).all()), name


@pytest.mark.parametrize("preset, stage, tied", [("gpt2-medium", 0, True), ("gpt2-medium", 2, False),
                                                 ("gpt2-medium", 4, False), ("gpt2-xl", 0, True), ("gpt2-xl", 1, True)])
def test_larger_models_are_the_ledgers(preset, stage, tied):
    slopes = assert_agrees(small_model(preset=preset, spread=0.4), stage, tied)
    assert ("embedding" in slopes) == (preset == "gpt2-medium")
    unused = [name for name, slope in slopes.items() if not (slope != 0).any()]
    assert unused == (["embedding"] if tied and preset == "gpt2-medium" else [])


@pytest.mark.parametrize("name", OFF)
def test_each_technique_off_is_the_ledger_without_it(name):
    stage = 2 if name in ("yarn", "attention_scale") else 0
    model = recipe(**{name: OFF[name]})
    assert_agrees(model, stage, model.tied)


@pytest.mark.parametrize("changes", OTHER, ids=str)
def test_other_values_of_the_techniques(changes):
    assert_agrees(recipe(**changes), 1, True)


def test_all_techniques_off_at_once():
    model = recipe(**OFF)
    assert [name for name, _ in model.named_parameters() if "." not in name] == ["embedding", "head"]
    assert_agrees(model, 2, False)


NEUTRAL = {  # where a learned weight says "nothing": what it is then, and the settings that leave the technique out
    "smear": ({"smear_mix": 0.0}, dict(smear=False)),
    "bigram": ({"bigram": 0.0}, dict(bigram=0)),
    "x0": ({"residual": 1.0, "x0": 0.0}, dict(x0_shortcut=False)),
    "attention mix": ({"into": 1.0, "out": 1.0}, dict(attention_mix=False)),
    "value gates": ({"value_gate": 0.0}, dict(value_gates=False)),
    "value tables": ({"value_tables.0": 0.0, "value_tables.1": 0.0, "value_tables.2": 0.0}, dict(value_layers=())),
    "skip": ({"skip_mix": -math.inf}, dict(gated_skip=())),
    "backout": ({"backout_mix": 0.0}, dict(backout=())),
}


@pytest.mark.parametrize("technique", NEUTRAL)
def test_neutral_weights_are_the_technique_off(technique):
    values, off = NEUTRAL[technique]
    full, without, batch = recipe(), small_model(preset="gpt2", **off), random_batch(2, 64)
    for name, parameter in full.named_parameters():
        kind = name.split(".")[-1] if name.startswith("blocks") else name
        parameter.data.fill_(values[kind]) if kind in values else None
    assert len(list(full.parameters())) > len(list(without.parameters()))
    without.load_state_dict({name: p for name, p in full.state_dict().items() if name in without.state_dict()})
    with torch.no_grad():
        found, expected = (model(batch.inputs, batch.starts, attention_masks(model, batch.starts, (24, 8)))
                           for model in (full, without))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_attention_gates_of_zero_halve_every_head():
    full, without, batch = recipe(), small_model(preset="gpt2", attention_gates=False), random_batch(2, 64)
    without.load_state_dict({name: p for name, p in full.state_dict().items() if "attention_gate" not in name})
    for one, other in zip(full.blocks, without.blocks, strict=True):
        if one.attends:
            one.attention_gate.data.zero_()
            other.out.data /= 2
    with torch.no_grad():
        found, expected = (model(batch.inputs, batch.starts, attention_masks(model, batch.starts, (24, 8)))
                           for model in (full, without))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# ---- sizes, plan and first values ------------------------------------------------------------------------------------


def test_layers_are_those_of_record_62():
    rows = ["paired short - 0", "plain short - 1", "paired short - -", "plain long offset -", "plain short - -",
            "paired short - -", "none", "plain short - -", "plain short - 2", "paired short - 0", "plain long offset 1"]
    found = [f"{'paired' if layer.paired else 'plain'} {'short' if layer.short else 'long'} "
             f"{'offset' if layer.offset else '-'} {'-' if layer.table is None else layer.table}" if layer.attends
             else "none" for layer in layer_plan(Config())]
    assert found == rows


def test_gpt2_model_has_the_parameters_of_record_62():
    with torch.device("meta"):
        model = GPT(Config(), 50257, torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "." not in name}
    assert shapes == {
        "embedding": (50304, 768), "head": (50304, 768), "bigram_table": (251_520, 768),
        "smear_gate": (12,), "skip_gate": (1, 12), "smear_mix": (), "backout_mix": (), "skip_mix": (1,)}
    per_layer = [{name: tuple(p.shape) for name, p in block.named_parameters()} for block in model.blocks]
    count = {name: sum(name in layer for layer in per_layer) for layer in per_layer for name in layer}
    assert count == {"attention": 10, "mlp": 11, "residual": 11, "x0": 11, "bigram": 11, "into": 10, "out": 10,
                     "attention_gate": 10, "value_gate": 5}
    assert per_layer[1] == {"attention": (4, 768, 768), "mlp": (2, 3072, 768), "residual": (), "x0": (), "bigram": (),
                            "into": (), "out": (), "attention_gate": (6, 12), "value_gate": (6, 12)}

    def millions(*parameters) -> float:
        return round(sum(p.numel() for p in parameters) / 1e6, 1)

    assert millions(*(block.attention for block in model.blocks if block.attends)) == 23.6
    assert millions(*(block.mlp for block in model.blocks)) == 51.9  # 56.6 with the padding of the record's bank
    assert millions(model.head, model.embedding) == 77.3
    assert millions(*model.value_tables) == 115.9 and len(model.value_tables) == 3
    assert millions(model.bigram_table) == 193.2
    assert {p.dtype for p in model.parameters() if p.dim() > 1 and min(p.shape) > 100} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.numel() < 100} == {torch.float32}


def test_first_values_are_those_of_record_62():
    model = small_model(1000, torch.float32, preset="gpt2", width=768, heads=6, layers=3, short_layers=(0,),
                        paired_layers=(0,), attention_free=(1,), value_layers=(0, 2), gated_skip=(0, 2), backout=(1,))
    for block in model.blocks:
        drawn = [(weight, 0.0625) for weight in block.attention.detach()[:3]] if block.attends else []
        for weight, bound in [*drawn, (block.mlp.detach()[0], 0.03125)]:
            assert 0.999 * bound < weight.abs().max() <= bound
            assert abs(weight.mean()) < 0.01 * bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert (block.mlp[1] == 0).all() and (not block.attends or (block.attention[3] == 0).all())
    assert model.head.std().item() == pytest.approx(0.005, rel=0.01) and abs(model.head.mean()) < 1e-4
    assert (model.head / 0.005).pow(4).mean().item() == pytest.approx(3, rel=0.03)  # as of a normal distribution
    assert torch.equal(model.head, model.embedding)
    for block in model.blocks:
        assert (block.residual.item(), block.x0.item(), block.bigram.item()) == pytest.approx((1.1, 0, 0.1))
        assert not block.attends or (block.into.item(), block.out.item()) == (0.5, 1.0)
    assert (model.smear_mix.item(), model.backout_mix.item(), model.skip_mix.item()) == (0, 0.5, -1.5)
    gates = [p for name, p in model.named_parameters() if name.endswith("_gate")]
    assert len(gates) == 2 + 2 + 2  # of the two layers that attend and have value embeddings, of the smear, of the skip
    for table in (*model.value_tables, model.bigram_table, *gates):
        assert (table == 0).all()


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_bigram_rows_of_the_ledger():
    tokens = torch.tensor([[50256, 464, 2068, 7586, 21831, 50256, 11]], dtype=torch.int32)
    alone = torch.zeros(1, 7, dtype=torch.bool)
    alone[:, 0] = True
    expected = [251519, 204580, 28927, 57630, 129154, 77266, 141340]
    assert bigram_rows(tokens, alone, 251_520).tolist() == [expected]
    alone[0, 5] = True  # a document of its own: its second token is hashed as that of a row
    assert bigram_rows(tokens, alone, 251_520).tolist() == [[*expected[:5], 251519, bigram_row(11, 251_519, 251_520)]]


def test_bigram_rows_of_random_pairs():
    batch = random_batch(3, 500, 50257)
    for rows in (320, 251_520):
        found = bigram_rows(batch.inputs, batch.starts, rows)
        for row in range(3):
            for t in range(1, 500):
                before = rows - 1 if batch.starts[row, t - 1] else int(batch.inputs[row, t - 1])
                expected = rows - 1 if batch.starts[row, t] else bigram_row(int(batch.inputs[row, t]), before, rows)
                assert found[row, t] == expected
        assert found.min() >= 0 and found.max() == rows - 1


def test_smear_and_key_offset_word_for_word():
    torch.manual_seed(0)
    x, keys = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 9, 3, 8, dtype=torch.float64)
    weight, gate_weight = torch.tensor(0.7, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    alone = torch.rand(2, 9) < 0.3
    alone[:, 0] = True
    smeared, offset = x.clone(), keys.clone()
    for row in range(2):
        for t in range(9):
            if not alone[row, t]:
                smeared[row, t] += 0.7 / (1 + math.exp(-(gate_weight @ x[row, t, :12]))) * x[row, t - 1]
                offset[row, t, :, 6:] = keys[row, t - 1, :, 6:]
    torch.testing.assert_close(smear(x, weight, gate_weight, alone), smeared, rtol=1e-13, atol=1e-13)
    assert torch.equal(offset_keys(keys, 6, alone), offset)


def test_rotary_frequencies_and_scales_of_the_ledger():
    config = Config()
    frequency, scale = yarn_schedule(0, config)
    expected = torch.tensor([1024 ** (-k / 31) for k in range(32)], dtype=torch.float64)
    torch.testing.assert_close(frequency, expected, rtol=1e-12, atol=0)
    assert scale == 0.1
    for stage, rounded in enumerate((0.1, 0.116946, 0.127518, 0.131778)):
        frequency, scale = yarn_schedule(stage, config)
        expected, expected_scale = reference_frequencies(config, stage)
        torch.testing.assert_close(frequency, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        assert scale == pytest.approx(expected_scale, rel=1e-12) and round(scale, 6) == rounded
    assert frequency[0] == 1  # 61 turns in the first window: kept
    assert frequency[-1] == pytest.approx(384 / 1664 / 1024)  # less than one turn in any window: stretched with it
    assert yarn_schedule(3, replace(config, yarn=0))[1] == 0.1


def test_a_stage_fills_the_tables_in_place():
    """In place, because a graph that is captured or compiled keeps reading the same memory."""
    model = recipe()
    places = [getattr(model, name).data_ptr() for name in ("cosine", "sine", "scale")]
    assert model.cosine.shape == (2 * 128, 2)  # paired layers have two positions per token
    for stage in (1, 3, 0, 2):
        model.enter_stage(stage)
        frequencies, scale = reference_frequencies(model.config, stage)
        for position in (0, 1, 77, 255):
            for k, f in enumerate(frequencies):
                assert model.cosine[position, k].item() == pytest.approx(math.cos(position * f), abs=1e-12)
                assert model.sine[position, k].item() == pytest.approx(math.sin(position * f), abs=1e-12)
        assert model.scale.item() == pytest.approx(scale, rel=1e-12)
    assert [getattr(model, name).data_ptr() for name in ("cosine", "sine", "scale")] == places


def test_half_rotary_leaves_the_last_channels_alone():
    model, x = recipe(), torch.randn(1, 64, 4, 8, dtype=torch.float64)
    found = rotate(x, model.cosine[:64, None], model.sine[:64, None])
    assert torch.equal(found[..., 4:], x[..., 4:]) and (found[:, 1:, :, :4] != x[:, 1:, :, :4]).all()


# ---- loss ------------------------------------------------------------------------------------------------------------


def test_logit_rescale_is_the_ledgers_up_to_a_constant():
    raw = torch.linspace(-60, 60, 4001, dtype=torch.float64, requires_grad=True)
    found, slope = softcap(raw, Config().softcap)
    torch.testing.assert_close(found + 11.5, 23 * sigmoid((raw + 5) / 7.5), rtol=0, atol=1e-13)
    expected, = torch.autograd.grad(found.sum(), raw)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-14)


def test_multi_token_weights_of_the_ledger():
    config = Config()
    for step in range(1600):
        x = step / 1560
        if step < 520:
            expected = [1, 0.5, 0.25 * (1 - 3 * x)]
        elif step < 1040:
            expected = [1, 0.5 * (2 - 3 * x)]
        else:
            expected = [1]
        assert multi_token_weights(step, config) == pytest.approx(expected, abs=1e-12), step
    for step in (0, 700, 1599):
        assert multi_token_weights(step, replace(config, predicted_tokens=1)) == [1]
        assert multi_token_weights(step, Config(**PRESETS["five-minute"])) == [1]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5), (0.3, 2.0, 0.1), (1.0, 0.5, 0.25, 0.125)])
def test_multi_token_loss_is_the_sum_of_its_terms(weights):
    model, batch = recipe(), random_batch(3, 20)
    masks = attention_masks(model, batch.starts, (24, 8))
    loss, next_token = model.loss(batch, masks, weights)
    with torch.no_grad():
        states = model(batch.inputs, batch.starts, masks)
        expected = reference_losses(states, model.head, batch.targets, (11.5, 15, 5), weights)
        assert (loss.item(), next_token.item()) == pytest.approx(tuple(x.item() for x in expected), rel=1e-12)
        torch.testing.assert_close(next_token, model.loss(batch, masks)[1], rtol=1e-14, atol=0)
        torch.testing.assert_close(model.loss(batch, masks, weights), (loss, next_token), rtol=1e-14, atol=0)
    assert loss.requires_grad and not next_token.requires_grad


def test_loss_before_training_is_near_that_of_a_uniform_guess():
    """The head starts small, so that no token is far ahead of another; the records' logs say 10.8308."""
    model, batch = small_model(preset="gpt2", vocabulary=1000, width=64), random_batch(2, 64, 1000)
    loss = model.loss(batch, attention_masks(model, batch.starts, (24, 8)))[1] / (batch.targets >= 0).sum()
    assert loss.item() == pytest.approx(math.log(1024), abs=0.01)


# ---- the head in float8 ----------------------------------------------------------------------------------------------


def head_loss(hidden, head, targets, in_float8: bool, weights=(1.0,), chunk: int = 32):
    """The weighted loss of bfloat16 states (N, D) and its slopes, as the model takes them."""
    hidden, head = hidden.bfloat16().requires_grad_(), head.bfloat16().requires_grad_()
    model = SimpleNamespace(config=Config(loss_chunk=chunk), float8=in_float8, loss_of_chunk=loss_of_chunk)
    weights = [torch.tensor(weight) for weight in weights]
    loss, next_token = ChunkedLoss.apply(hidden, head, targets, weights, model, True)
    assert loss.dtype == next_token.dtype == torch.float32
    return loss.item(), *torch.autograd.grad(loss, (hidden, head))


def head_data(tokens: int = 96, width: int = 128, vocabulary: int = 64, ahead: int = 3):
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(tokens, width, generator=draw), 0.3 * torch.randn(vocabulary, width, generator=draw)
    targets = torch.randint(0, vocabulary, (tokens, ahead), generator=draw)
    targets[::7] = -1
    return hidden, head, targets


def deviation(found, expected) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_float8_units_reach_the_largest_values_of_the_ledger():
    largest = {kind: torch.finfo(kind).max for kind in (torch.float8_e4m3fn, torch.float8_e5m2)}
    assert HIDDEN_UNIT * largest[torch.float8_e4m3fn] == pytest.approx(100)
    assert HEAD_UNIT * largest[torch.float8_e4m3fn] == pytest.approx(1.6)
    assert SLOPE_UNIT * largest[torch.float8_e5m2] == pytest.approx(96)


def test_float8_head_is_close_to_the_wide_one():
    """Rounding to 3 bits after the point errs by at most 1/16, in the mean of squares by some 3 %, and to 2 bits by
    twice that; errors of different numbers are independent, so a product of two errs by about 4 % and by 7 %."""
    hidden, head, targets = head_data()
    for weights in ((1.0, 0.5, 0.25), (1.0,)):
        wide, narrow = (head_loss(hidden, head, targets[:, :len(weights)], kind, weights) for kind in (False, True))
        assert narrow[0] == pytest.approx(wide[0], rel=0.01) and narrow[0] != wide[0]
        for slope, exact in zip(narrow[1:], wide[1:], strict=True):
            assert slope.dtype == torch.bfloat16 and 0.02 < deviation(slope, exact) < 0.1


def test_float8_head_takes_exactly_the_rounded_operands():
    """All three products again, in float64, of what the casts left: nothing but the rounding of results remains."""
    hidden, head, targets = head_data(ahead=2)
    _, hidden_slope, head_slope = head_loss(hidden, head, targets, True, (1.0, 0.5))
    x = float8(hidden.bfloat16(), HIDDEN_UNIT, torch.float8_e4m3fn).double() * HIDDEN_UNIT
    w = float8(head.bfloat16(), HEAD_UNIT, torch.float8_e4m3fn).double() * HEAD_UNIT
    logits = (x @ w.T).requires_grad_()
    expected, _ = reference_losses(logits[None], torch.eye(64, dtype=torch.float64), targets[None, :, 0],
                                   Config().softcap, (0.0,))
    scores = (23 * sigmoid((logits + 5) / 7.5)).log_softmax(-1)
    for k, weight in enumerate((1.0, 0.5)):
        chosen = scores.gather(1, targets[:, k:k + 1].clamp_min(0))[:, 0]
        expected = expected - (weight * chosen)[targets[:, k] >= 0].sum()
    slope, = torch.autograd.grad(expected, logits)
    slope = float8(slope.float(), SLOPE_UNIT, torch.float8_e5m2).double() * SLOPE_UNIT
    assert deviation(hidden_slope, slope @ w) < 0.01 and deviation(head_slope, slope.T @ x) < 0.01


def test_validation_never_takes_the_float8_head():
    settings = dict(preset="gpt2", dtype=torch.bfloat16, spread=0.2, loss_chunk=32)
    models, batch = [small_model(**settings), small_model(**settings)], random_batch(1, 64)
    models[1].float8 = True
    masks = attention_masks(models[0], batch.starts, (24, 8))
    training = [model.loss(batch, masks)[1].item() for model in models]
    with torch.no_grad():
        judging = [model.loss(batch, masks)[1].item() for model in models]
    assert training[0] == judging[0] == judging[1] != training[1]


def test_float8_clips_where_a_cast_alone_would_overflow():
    """Beyond the range e5m2 casts to infinity, and e4m3 on some machines to NaN."""
    for unit, kind in ((HIDDEN_UNIT, torch.float8_e4m3fn), (HEAD_UNIT, torch.float8_e4m3fn),
                       (SLOPE_UNIT, torch.float8_e5m2)):
        largest = unit * torch.finfo(kind).max
        x = torch.tensor([0.0, 0.5, 0.99, 1.0, 1.2, 7.0, 1e9, -1.2, -1e9]) * largest
        found = float8(x, unit, kind).float() * unit / largest
        assert found[4:].tolist() == pytest.approx([1, 1, 1, -1, -1])
        assert found[:4].tolist() == pytest.approx([0, 0.5, 0.99, 1], rel=1 / 8)
        assert float8(x.bfloat16(), unit, kind).float().isfinite().all()


def test_states_weights_and_slopes_beyond_the_range_saturate():
    hidden, head, targets = head_data(ahead=1)
    far_hidden, far_head = hidden.clone(), head.clone()
    far_hidden[:, 3], hidden[:, 3] = 300.0, 100.0
    head[:, 3] = far_head[:, 3] = 0.01  # keeps the logits of the large channel where the cap still bends
    far_head[5, 9], head[5, 9] = -40.0, -1.6
    near, far = head_loss(hidden, head, targets, True), head_loss(far_hidden, far_head, targets, True)
    assert near[0] == far[0] and all(torch.equal(a, b) for a, b in zip(near[1:], far[1:], strict=True))
    # A weight of 1000 makes slopes of up to 767; what is left of them is 96.
    _, hidden_slope, head_slope = head_loss(hidden, head, targets, True, (1000.0,))
    x, w = hidden.bfloat16().double(), head.bfloat16().double()
    logits = (x @ w.T).requires_grad_()
    loss = 1000 * reference_losses(x[None], w, targets[None, :, 0], Config().softcap, (0.0,))[0]
    scores = (23 * sigmoid((logits + 5) / 7.5)).log_softmax(-1).gather(1, targets.clamp_min(0))
    loss = loss - 1000 * scores[targets >= 0].sum()
    slope, = torch.autograd.grad(loss, logits)
    assert slope.abs().max() > 2 * 96
    assert hidden_slope.isfinite().all() and head_slope.isfinite().all()
    clipped = slope.clamp(-96, 96)
    assert deviation(hidden_slope, clipped @ w) < 0.12 and deviation(head_slope, clipped.T @ x) < 0.12
    assert deviation(hidden_slope, slope @ w) > 0.3  # the clip is what happened, and no small matter


# ---- what a hidden state depends on ----------------------------------------------------------------------------------

# All kinds of layers in four: paired, short, attention-free, long with key offset.
FOUR_LAYERS = dict(layers=4, paired_layers=(0,), short_layers=(0, 1), attention_free=(2,), value_layers=(0, 3),
                   gated_skip=(1, 2), backout=(1,))
# One layer, and nothing but attention and MLP in it.
BARE = dict(layers=1, paired_layers=(), short_layers=(), attention_free=(), value_layers=(), gated_skip=(), backout=(),
            smear=False, bigram=0, key_offset=False)


def influence(model: GPT, starts, windows: tuple[int, int]):
    """(T,) document starts -> (T, T) bool, [position, token]: which tokens move which hidden states. Row j of the batch
    has token j replaced by another one."""
    count = len(starts)
    tokens = random_batch(1, count).inputs.expand(count + 1, -1).clone()
    tokens[range(count), range(count)] = (tokens[range(count), range(count)] + 1) % model.vocabulary
    starts = starts.expand(count + 1, -1)
    with torch.no_grad():
        states = model(tokens, starts, attention_masks(model, starts, windows))
    return ((states[:-1] - states[-1]).abs().amax(-1) > 1e-13).T


def expected_influence(config: Config, starts, windows: tuple[int, int]):
    """The same by the rules: what each layer lets a position look at, one after the other."""
    places, documents = range(len(starts)), starts.long().cumsum(0).tolist()
    alone = [t == 0 or (not config.cross_document and bool(starts[t])) for t in places]
    reach = [{t} | ({t - 1} if (config.smear or config.bigram) and not alone[t] else set()) for t in places]
    for i, layer in enumerate(layer_plan(config)):
        if not layer.attends:
            continue
        window = windows[1] if i in config.short_layers else windows[0]
        before = [set(tokens) for tokens in reach]
        for t in places:  # in paired layers, of the four pairs of heads of two tokens the nearest counts
            seen = [j for j in range(t + 1) if documents[t] == documents[j]
                    and (max(0, 2 * (t - j) - 1) if layer.paired else t - j) <= window]
            reach[t] |= set().union(*(before[j] for j in seen))
            if layer.offset and len(seen) > 1:  # what the key of the only visible token says makes no difference
                reach[t] |= set().union(*(before[j - 1] for j in seen if not alone[j]))
    return torch.tensor([[j in reach[t] for j in places] for t in places])


def starts_at(*places: int, tokens: int = 48):
    starts = torch.zeros(tokens, dtype=torch.bool)
    starts[list(places)] = True
    return starts


@pytest.mark.parametrize("cross_document", [True, False])
@pytest.mark.parametrize("places", [(), (0, 7, 8, 20, 41)])
@pytest.mark.parametrize("windows", [(4, 3), (9, 2), (100, 100)])
def test_a_token_reaches_exactly_what_the_rules_let_it(windows, places, cross_document):
    model, starts = recipe(**FOUR_LAYERS, cross_document=cross_document), starts_at(*places)
    moved = influence(model, starts, windows)
    assert torch.equal(moved, expected_influence(model.config, starts, windows))
    assert not moved.triu(1).any() and moved.diagonal().all()  # later tokens change nothing before them


@pytest.mark.parametrize("stage", [0, 3])
def test_later_tokens_change_nothing_in_the_full_recipe(stage):
    model, starts = recipe(), starts_at(0, 30)
    model.enter_stage(stage)
    moved = influence(model, starts, windows_at(first_step(stage, model.config), model.config))
    assert not moved.triu(1).any() and moved.diagonal().all() and moved[47].sum() > 15


def test_a_document_changes_no_other():
    starts = starts_at(0, 10, 11, 30)
    moved = influence(recipe(cross_document=False), starts, (100, 50))
    document = starts.long().cumsum(0)
    assert torch.equal(moved, (document[:, None] == document).tril())


def test_what_looks_back_over_a_border_sees_one_token():
    """The record's rule: the first token of a document takes up the last one before it, and no other does."""
    starts, inside = starts_at(0, 20), torch.ones(48, 48, dtype=torch.bool).tril()
    inside[20:, :20] = False

    def leaks(**changes) -> list[tuple[int, int]]:
        moved = influence(recipe(**{**BARE, **changes}), starts, (5, 5))
        return (moved & ~inside).nonzero().tolist()

    assert leaks() == []
    assert leaks(attention_free=(0,), smear=True) == leaks(attention_free=(0,), bigram=5) == [[20, 19]]
    # The key of token 20 is what leaks: seen by the window after it, but for token 20 itself it is the only one.
    assert leaks(key_offset=True) == [[t, 19] for t in range(21, 26)]
    for off in (dict(attention_free=(0,), smear=True), dict(attention_free=(0,), bigram=5), dict(key_offset=True)):
        assert leaks(**off, cross_document=False) == []


@pytest.mark.parametrize("changes, reach", [({}, 9), (dict(paired_layers=(0,)), 5), (dict(smear=True), 10),
                                            (dict(bigram=5), 10), (dict(key_offset=True), 10),
                                            (dict(key_offset=True, smear=True, bigram=5), 11)])
def test_reach_of_one_layer(changes, reach):
    """Window 9, tokens 0 to 47 one document; a paired layer counts two positions per token."""
    moved = influence(recipe(**{**BARE, **changes}), starts_at(), (9, 9))
    assert moved[:, 20].nonzero().flatten().tolist() == list(range(20, 20 + reach + 1))


# ---- embedding and head ----------------------------------------------------------------------------------------------


def test_while_tied_the_lookup_uses_the_head():
    model, batch = recipe(), random_batch(1, 40)
    masks = attention_masks(model, batch.starts, (24, 8))

    def moved_by(table) -> bool:
        with torch.no_grad():
            before = model(batch.inputs, batch.starts, masks)
            table.data += 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(2))
            return not torch.equal(model(batch.inputs, batch.starts, masks), before)

    assert model.tied and moved_by(model.head) and not moved_by(model.embedding)
    model.tied = False
    assert moved_by(model.embedding) and not moved_by(model.head)


def test_only_models_that_ever_tie_start_tied():
    for tied_until, tied in ((2 / 3, True), (1.0, True), (0.0, False)):
        assert small_model(preset="gpt2", tied_until=tied_until).tied == tied
    assert last_tied_step(Config()) == 1041


# ---- compiled parts --------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """The name of every function that is compiled meanwhile, once for each graph; they run as they are. In the place of
    FlexAttention, which has no backward on a CPU, stands one that reads the same block mask."""
    compiled, names, limit = torch.compile, [], torch._dynamo.config.recompile_limit

    def counting(function, **options):
        def backend(graph, inputs):
            names.append(function.__name__)
            return graph.forward

        return compiled(function, backend=backend, **options)

    def attend(query, key, value, mask):
        row, position = torch.arange(query.shape[0])[:, None, None, None], torch.arange(query.shape[2])
        seen = mask.mask_mod(row, None, position[:, None], position)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=1.0)

    monkeypatch.setattr(train_gpt2, "attend", attend)
    monkeypatch.setattr(torch, "compile", counting)
    torch._dynamo.reset()
    yield names
    torch.compiler.set_stance("default")
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def test_nothing_recompiles_after_a_warm_up_through_all_stages(graphs):
    config = dict(steps=12, extension=0.25, row_tokens=(128, 256, 384), tokens_per_step=(256, 512, 768), width=24,
                  heads=2, val_row_tokens=128)
    model = small_model(preset="gpt2", dtype=torch.float32, spread=0.1, **config)
    config, here = model.config, Processes(0, 1, torch.device("cpu"))
    groups = optimizer_groups(model, config, torch.float32, here)
    model.compile_parts()
    for group in groups.values():
        group.compile_update()

    def batch_of(step: int) -> Batch:
        stage = train_gpt2.stage_of(step, config)
        size = config.row_tokens[min(stage, 2)]
        return random_batch(config.tokens_per_step[min(stage, 2)] // size, size, seed=step)

    @torch.no_grad()
    def check(step: int) -> None:
        model.enter_stage(train_gpt2.stage_of(step, config))
        batch = random_batch(1, 128, seed=step)
        model.loss(batch, attention_masks(model, batch.starts, windows_at(step, config)))

    warm_up(model, groups, here, batch_of, check)
    kinds = {name: graphs.count(name) for name in set(graphs)}
    # Eight kinds of layers (layer 0 apart, whose input is the embedding itself), in three lengths of rows and in
    # validation. Losses of 3, 2 and 1 tokens, and validation. One update each for the tables of four shapes, the small
    # weights, and the two shapes of matrices.
    assert kinds["run_block"] == 8 * 4 and kinds["run_block"] <= torch._dynamo.config.recompile_limit / 2
    count = len(graphs)
    assert model.tied and model.stage == 0
    for step in range(config.steps):  # a recompilation would be an error
        check(step)
        assert train_step(model, groups, batch_of(step), step).isfinite().all()
    check(config.steps)
    assert not model.tied and len(graphs) == count
