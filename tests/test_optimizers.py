"""Orthogonalisers, Muon and Adam against references in float64 and torch's own; groups; whole runs."""

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_model import kind_of, plain_attention
from test_schedules import at, reference
from test_techniques import SIX_LAYERS, ONE_BY_ONE
from tools import ALONE, random_batch, small_config, small_model, write_corpus
from torch import nn

import train_gpt2
from train_gpt2 import (
    TECHNIQUES, Adam, Group, Muon, Processes, join_bits, micro_batches, muon_update, normuon, open_data,
    optimizer_groups, orthogonalise, phase_at, split_bits, train_step, validate, warm_up)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters_of(*shapes, dtype=torch.float64):
    return [nn.Parameter(random(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


def host(dtype="float64", **changes):
    """Of the model only what optimizers read: record 12 at a constant rate, unless told otherwise."""
    config = small_config(**dict(steps=20, cooldown=0.0) | changes)
    return type("Model", (), dict(config=config, dtype=getattr(torch, dtype), compiled=False))


# ---- orthogonalisers --------------------------------------------------------------------------------------

POLAR_EXPRESS = {  # by power of x, its coefficient in the five iterations
    1: [8.156554524902461, 4.042929935166739, 3.8916678022926607, 3.285753657755655, 2.3465413258596377],
    3: [-22.48329292557795, -2.808917465908714, -2.772484153217685, -2.3681294933425376, -1.7097828382687081],
    5: [15.878769915207462, 0.5000178451051316, 0.5060648178503393, 0.46449024233003106, 0.42323551169305323]}
KINDS = {"none": (1.0, []), "newton-schulz": (1.0, [(3.4445, -4.7750, 2.0315)] * 5),
         "polar-express": (1.02, list(zip(*POLAR_EXPRESS.values(), strict=True)))}


def orthogonalised(matrix, kind="newton-schulz"):
    """By way of the singular value decomposition: the iteration does to each value what it says."""
    margin, quintics = KINDS[kind]
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / (margin * values.square().sum(-1, keepdim=True).sqrt())
    for a, b, c in quintics:
        values = a * values + b * values**3 + c * values**5
    return left * values[..., None, :] @ right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 24, 6), (2, 1, 5), (1, 1, 1), (3, 16, 4), (6, 4, 12)])
def test_the_quintics_are_applied_to_singular_values(shape, kind):
    found = orthogonalise(random(*shape), kind, torch.float64)
    torch.testing.assert_close(found, orthogonalised(random(*shape), kind), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind, dtype, low, high", [
    ("newton-schulz", torch.float64, 0.68, 1.14), ("newton-schulz", torch.bfloat16, 0.65, 1.17),
    ("polar-express", torch.float64, 0.858, 1.142), ("polar-express", torch.bfloat16, 0.85, 1.15)])
@pytest.mark.parametrize("rows, columns", [(48, 12), (12, 48), (24, 24)])
def test_singular_values_end_in_the_band(rows, columns, kind, dtype, low, high):
    """Those above a hundredth of the norm, whatever the spectrum and however large or small the matrix."""
    count = min(rows, columns)
    spectra = torch.stack([torch.logspace(-2, 0, count), torch.ones(count), torch.arange(1.0, count + 1)]).double()
    left, right = (torch.linalg.qr(random(3, size, count, seed=size)).Q for size in (rows, columns))
    for scale in (1.0, 1e-30, 1e30):
        matrices = scale * (left * spectra[:, None]) @ right.mT
        found = orthogonalise(matrices if dtype == torch.float64 else matrices.float(), kind, dtype)
        assert found.dtype == dtype
        for values, matrix in zip(spectra, found.double(), strict=True):
            reached = torch.linalg.svdvals(matrix)[:(values / values.norm() > 0.0101).sum()]
            assert low <= reached.min() and reached.max() <= high


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_not_seen_and_zeros_stay(kind):
    matrices = random(3, 10, 20, dtype=torch.float32)
    matrices[1] = 0
    found = orthogonalise(matrices, kind, torch.float32)
    for scale in (2.0**-100, 2.0**-66, 2.0**-3, 2.0**90):  # powers of two change no digit
        assert torch.equal(orthogonalise(matrices * scale, kind, torch.float32), found)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = orthogonalise(matrices, kind, dtype)
        assert (found[1] == 0).all()
        for i in (0, 2):  # a zero matrix leaves its neighbours alone
            torch.testing.assert_close(found[i:i + 1], orthogonalise(matrices[i:i + 1], kind, dtype))
            assert (found[i] - orthogonalised(matrices[i].double(), kind)).norm() < 0.03 * found[i].norm()


# ---- NorMuon ----------------------------------------------------------------------------------------------


def equalised(matrix, average, beta2):
    """One matrix, row by row, or if rows are the longer ones column by column. Returns it equalised, and the
    new averages."""
    if matrix.shape[0] < matrix.shape[1]:
        found, average = by_row(matrix.T, average, beta2)
        return found.T, average
    return by_row(matrix, average, beta2)


def by_row(matrix, average, beta2):
    squares = [float(row @ row) / len(row) for row in matrix]
    average = [beta2 * old + (1 - beta2) * square for old, square in zip(average, squares, strict=True)]
    divided = torch.stack([row / math.sqrt(max(mean, 1e-10)) for row, mean in zip(matrix, average, strict=True)])
    return divided * matrix.norm() / max(float(divided.norm()), 1e-10), average


@pytest.mark.parametrize("rows, columns", [(12, 5), (7, 7), (5, 12), (1, 4), (4, 1)])
def test_the_longer_side_is_equalised_by_its_running_mean_square(rows, columns):
    average = torch.zeros(3, *((rows, 1) if rows >= columns else (1, columns)), dtype=torch.float64)
    expected = [[0.0] * max(rows, columns)] * 3
    for step in range(6):
        update = random(3, rows, columns, seed=step) * torch.logspace(-2, 1, rows).double()[:, None]
        update = update * torch.logspace(1, -2, columns).double()
        update[2] = 0  # stays zero
        found = normuon(update, average, 0.9)
        for i in range(3):
            wanted, expected[i] = equalised(update[i], expected[i], 0.9)
            torch.testing.assert_close(found[i], wanted, rtol=1e-12, atol=1e-14)
            assert average[i].flatten().tolist() == pytest.approx(expected[i], rel=1e-12, abs=0)
        torch.testing.assert_close(found.norm(dim=(1, 2)), update.norm(dim=(1, 2)), rtol=1e-12, atol=0.0)
        squares = found.square().mean(-1 if rows >= columns else -2)
        assert step or torch.allclose(squares, squares[:, :1], rtol=1e-9, atol=0)  # at first all are of one size


# ---- Muon -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, factor", [((32, 8), 2.0), ((8, 32), 1.0), ((16, 16), 1.0)])
def test_muon_is_torchs_muon(shape, factor):
    """torch's iterates in bfloat16, and knows the factor sqrt(max(1, rows / columns))."""
    ours, theirs, first = (parameters_of(shape, dtype=torch.float32)[0] for _ in range(3))
    group = Muon("one", 2, [ours], [(factor,)], host("bfloat16", muon_momentum_start=0.95, muon_lr=0.02), ALONE)
    optimizer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0, momentum=0.95, nesterov=True, ns_steps=5)
    for step in range(8):
        theirs.grad = random(*shape, seed=step + 1, dtype=torch.float32)
        ours.grad.copy_(theirs.grad)
        group.update(step)
        optimizer.step()
        assert (ours - theirs).norm() < 0.05 * (theirs - first).norm(), step  # what bfloat16 costs them


def test_muon_moves_by_scale_and_rate_and_decays_where_the_update_shrinks_the_weight():
    """Entry by entry with each combination of signs; of the two rates only one has the matrix's factor."""
    old, gradient, rate, scales, decay = 3 * random(3, 6, 8, seed=1), random(3, 6, 8), 0.25, (1.0, 4.0, 2.0), 0.7
    old[0, 0, 0], gradient[2] = 0.0, 0.0  # an update of zero counts as shrinking: the matrix fades
    weight, average = old.clone(), torch.zeros_like(old)
    muon_update(weight, gradient, torch.tensor(scales)[:, None, None], torch.tensor(rate), torch.tensor(0.9), decay,
                0.0, "polar-express", torch.float64, average, average[..., :1].clone())
    seen = set()
    for i, update in enumerate([*orthogonalised(gradient[:2], "polar-express"), gradient[2]]):
        for p, o, found in zip(old[i].flatten(), update.flatten(), weight[i].flatten(), strict=True):
            shrinks = bool(o * p >= 0)
            expected = p - scales[i] * rate * (o + decay * rate * p * shrinks)
            assert found.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
            seen.add((shrinks, bool(p > 0)))
    assert len(seen) == 4


# ---- bfloat16 matrices with their low bits beside ---------------------------------------------------------


def test_splitting_and_joining_are_inverse_bit_for_bit():
    """For float32 of every kind that is not NaN; what is split is cut towards zero."""
    draw = torch.Generator().manual_seed(0)
    anything = torch.randint(-2**31, 2**31, (200_000,), generator=draw).int().view(torch.float32)
    tiny = torch.randint(0, 2**23, (1000,), generator=draw).int().view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-126, 3.4028234e38, math.inf, -math.inf, 1 + 2.0**-8])
    numbers = torch.cat((anything[~anything.isnan()], random(10_000, dtype=torch.float32), tiny, -tiny, special))
    high, low = split_bits(numbers)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_bits(high, low).view(torch.int32), numbers.view(torch.int32))
    cut = (numbers.view(torch.int32) & -65_536).view(torch.float32)
    assert torch.equal(high.float(), cut) and torch.equal(join_bits(high, torch.zeros_like(low)), cut)
    every_tail = torch.arange(-2**15, 2**15).to(torch.int16)
    for top in (1.0, -1.0, 0.0, -0.0, 1e-40, -3e38):
        tops = torch.full((2**16,), top, dtype=torch.bfloat16)
        again, tail = split_bits(join_bits(tops, every_tail))
        assert torch.equal(again.view(torch.int16), tops.view(torch.int16)) and torch.equal(tail, every_tail)


def test_split_weights_train_as_float32_ones_where_bfloat16_alone_stands_still():
    """Steps far below what bfloat16 resolves, with decay."""
    model = host("float32", steps=100, muon_lr=2e-5, muon_decay=40.0, normuon_beta2=0.95)
    first = (random(2, 16, 12) + torch.sign(random(2, 16, 12))).bfloat16()
    narrow, full = nn.Parameter(first.clone()), nn.Parameter(first.float())
    groups = [Muon("one", 2, [parameter], [(1.0, 2.0)], model, ALONE) for parameter in (narrow, full)]
    assert [len(group.state) for group in groups] == [3, 2]
    alone, low, average = first.clone(), groups[0].state[2], torch.zeros(2, 16, 12)
    mean_square = average[..., :1].clone()
    for step in range(100):
        gradient = (random(2, 16, 12, seed=step + 1) + random(2, 16, 12, seed=999)).bfloat16()
        for group in groups:
            group.gradients.copy_(gradient)
            group.update(step)
        exact = join_bits(narrow.detach(), low)
        assert (exact - full).abs().max() <= 2.0**-23 * full.abs().max(), step
        muon_update(alone, gradient, groups[0].scale, torch.tensor(2e-5), torch.tensor(0.95), 40.0, 0.95,
                    "newton-schulz", torch.float32, average, mean_square)
    assert (full - first.float()).abs().mean() > 2e-4 and (low != 0).float().mean() > 0.9
    assert torch.equal(alone, first)  # every step was rounded away


# ---- Adam -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance, epsilon", [(torch.float64, 1e-12, 1e-3), (torch.float32, 2e-6, 1e-8)])
def test_adam_is_torchs_adam_with_settings_of_each_parameter(dtype, tolerance, epsilon):
    """Rates that fall, gradients around epsilon among them, and an entry that never gets one."""
    settings = [(0.05, 0.9, 0.95, 0.0), (0.01, 0.5, 0.99, 0.0), (0.2, 0.0, 0.9, 0.0)]
    ours, theirs = (parameters_of((40, 5), (), (7,), dtype=dtype) for _ in range(2))
    group = Adam("small", 0, ours, settings, host(cooldown=0.8, adam_epsilon=epsilon), ALONE)
    optimizer = torch.optim.Adam([dict(params=[p], lr=rate, betas=betas, eps=epsilon)
                                  for p, (rate, *betas, _) in zip(theirs, settings, strict=True)])
    for step in range(20):
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            other.grad = random(*mine.shape, seed=10 * step + i, dtype=dtype)
            if i == 0:
                other.grad *= torch.logspace(-10, 1, 40, dtype=dtype)[:, None]
                other.grad[3] = 0
            mine.grad.copy_(other.grad)
            optimizer.param_groups[i]["lr"] = settings[i][0] * min(1, (20 - step) / 16)
        group.update(step)
        optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[0][3], parameters_of((40, 5), dtype=dtype)[0][3])


def adam_reference(weight, gradient, mean, square, rate, beta1, beta2, decay, count, epsilon):
    """One update of whole tensors; returns the new weight and moments."""
    mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
    move = rate * (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)) ** 0.5 + epsilon)
    shrinks = (move > 0) & (weight > 0) | (move < 0) & (weight < 0)
    return weight - move - rate**2 * decay * torch.where(shrinks, weight, 0), mean, square


# ---- groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes, axes", [
    ([(4, 6, 6)] * 2, 2), ([(10, 5)], 1), ([(4, 3), (5,), (), ()], 0), ([(9, 2), (3, 2)], 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_cover_everything_once_and_parameters_begin_on_sixteen_bytes(shapes, axes, dtype):
    """Layers share compiled kernels, which rely on the alignment that they met in the first layer."""
    covered, numbers = 0, sum(math.prod(shape) for shape in shapes)
    for rank in range(3):
        parameters = parameters_of(*shapes, dtype=dtype)
        group = Group("any", axes, parameters, host().config, Processes(rank, 3, ALONE.device))
        covered = covered + F.one_hot(torch.arange(len(group.weights))[group.own_slice], len(group.weights)).sum(0)
        for parameter, value in zip(parameters, parameters_of(*shapes, dtype=dtype), strict=True):
            assert torch.equal(parameter, value) and (parameter.grad == 0).all()
            assert parameter.data_ptr() % 16 == parameter.grad.data_ptr() % 16 == 0
            parameter.data.fill_(1)
            parameter.sum().backward()  # adds to the gradient in place
        assert group.weights.dim() == 1 + axes and group.weights.sum() == group.gradients.sum() == numbers  # else 0
        assert len(group.weights) == len(group.gradients) == 3 * len(group.own) == 3 * len(group.own_gradient)
        group.own.fill_(7)  # a view: updating the slice updates the parameters in it
        assert (group.weights[group.own_slice] == 7).all() and (group.weights == 7).sum() == group.own.numel()
    assert (covered == 1).all()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("kind, shape", [("muon", (12, 4)), ("muon", (4, 12)), ("adam", None)])
def test_several_processes_together_are_one(world, kind, shape):
    """Each updates its slice with the reduced gradient, as Muon with different factors and Adam with
    different settings. Padding, also between parameters, stays zero. State goes from any world to any."""
    def group_of(rank, size):
        processes = Processes(rank, size, ALONE.device)
        if kind == "muon":
            return Muon("mlp", 2, parameters_of(*[(2, *shape)] * 3), [(2.0, 1.0), (3.0, 0.5), (1.0, 4.0)],
                        host(muon_decay=1.0, normuon_beta2=0.9), processes)
        settings = [(0.1, 0.9, 0.95, 0.1), (0.02, 0.5, 0.9, 0.0), (0.3, 0.7, 0.99, 1.0)]
        return Adam("small", 0, parameters_of((3, 4), (), (9,)), settings, host(), processes)

    alone, several = group_of(0, 1), [group_of(rank, world) for rank in range(world)]
    for step in range(3):
        if step == 2:  # from a checkpoint of one process
            for group in several:
                for buffer, other in zip(group.state, alone.state, strict=True):
                    buffer.fill_(math.nan)
                    group.load(buffer, alone.whole(other))
        for number, parameter in enumerate(alone.parameters):
            parameter.grad.copy_(random(*parameter.shape, seed=10 * step + number))
        alone.update(step)
        for group in several:
            group.gradients[:alone.length] = alone.gradients[:alone.length]
            group.own_gradient.copy_(group.gradients[group.own_slice])
            group.update(step)
        joined = torch.cat([group.own for group in several])
        torch.testing.assert_close(joined[:alone.length], alone.weights[:alone.length], rtol=1e-12, atol=1e-12)
        assert joined[alone.length:].abs().sum() == 0 and joined.isfinite().all()
    used = sum(parameter.numel() for parameter in alone.parameters)
    assert (joined != 0).sum() == used and not torch.equal(alone.parameters[0], group_of(0, 1).parameters[0])


def test_reductions_of_due_groups_start_within_the_last_backward_pass(monkeypatch):
    model = small_model(preset="gpt2", spread=0.05, micro_tokens=64, row_tokens=(64,), tokens_per_step=(128,))
    groups, log, loss = optimizer_groups(model, ALONE), [], model.loss
    monkeypatch.setattr(model, "loss", lambda *arguments: log.append("pass") or loss(*arguments))
    monkeypatch.setattr(train_gpt2, "apply_updates", lambda *_: log.append("updates"))
    for group in groups.values():
        monkeypatch.setattr(group, "reduce", lambda name=group.name: log.append(name))
    muon = {f"{kind}.{depth}" for kind in ("mlp", "qk", "vo") for depth in ("early", "late")}
    for step, due in ((0, muon), (1, {*groups} - {"embedding"})):
        log.clear()
        train_step(model, groups, random_batch(2, 64), step)
        assert log[:2] == ["pass", "pass"] and log[-1] == "updates"
        assert sorted(log[2:-1]) == sorted(due)
        assert max(map(log.index, due & {"mlp.late", "qk.late", "vo.late"})) < log.index("mlp.early")


def adam_settings(name: str, c) -> tuple:
    """Rate, betas and decay of a parameter that Adam trains."""
    kind, (rate, beta1, beta2, decay) = kind_of(name), c.adam_gates
    special = {
        "embedding": c.adam_embedding, "head": c.adam_head, "value_tables": c.adam_tables,
        "bigram_table": c.adam_tables, "attention_gate": c.adam_gates, "value_gate": c.adam_gates,
        "residual": c.adam_residual,
        "smear_gate": (rate / 100, beta1, beta2, 0), "skip_gate": (rate / 20, beta1, beta2, 0),
        "mudd_in": (rate / 4, beta1, beta2, decay), "mudd_out": (rate / 4, beta1, beta2, decay),
        "mudd_bias": (rate / 4, beta1, beta2, 0)}
    mixing = dict.fromkeys(("output", "x0_mix", "bigram_mix", "xsa"), c.adam_mixing)
    scalars = dict.fromkeys(("in_scale", "out_scale", "value_mix", "smear_mix", "skip_mix"), c.adam_scalars)
    return (special | mixing | scalars)[kind]


def by_muon(name: str) -> bool:
    return kind_of(name) in ("qk", "vo", "mlp")


@pytest.mark.parametrize("preset", ["gpt2", "five-minute", "tiny"])
def test_every_parameter_is_in_one_group_with_its_settings(preset):
    model = small_model(preset=preset, **SIX_LAYERS if preset == "gpt2" else {})
    groups, config = optimizer_groups(model, ALONE), model.config
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(id(p) for group in groups.values() for p in group.parameters) == sorted(names)
    for group in groups.values():
        for p, part in zip(group.parameters, group.slices, strict=True):
            name = names[id(p)]
            assert isinstance(group, Muon) == by_muon(name)
            if by_muon(name):
                scales = [2.0, config.down_scale] if name.endswith("mlp") else [1.0] * len(p)
                assert group.scale[part].flatten().tolist() == scales
            else:
                expected = torch.tensor(adam_settings(name, config)).double()
                torch.testing.assert_close(group.settings[part], expected.expand(part.stop - part.start, 4))


def test_queries_and_keys_are_orthogonalised_two_heads_at_a_time():
    """In the first step: pairs of neighbours, queries apart from keys."""
    model = small_model(preset="gpt2", width=64, normuon_beta2=0.0, muon_decay=0.0, orthogonaliser="polar-express")
    groups, first = optimizer_groups(model, ALONE), model.blocks[0].qk.detach().clone()
    assert first.shape == (4, 32, 64)  # four heads of 16 channels
    train_step(model, groups, random_batch(2, 64), 0)
    moved = (first - model.blocks[0].qk.detach()) / model.config.muon_lr
    for matrix in moved:
        assert torch.linalg.svdvals(matrix).min() > 0.8 and torch.linalg.svdvals(matrix).max() < 1.2


# ---- whole runs -------------------------------------------------------------------------------------------

RUN = dict(steps=14, extension=2 / 14, tokens_per_step=(128, 256, 384), row_tokens=(64, 128, 128), adam_epsilon=1e-8,
           momentum_warmup=4 / 14, momentum_cooldown=3 / 14, bigram=3, micro_tokens=256, heads=2, width=16)
SHORT = RUN | dict(steps=6, extension=2 / 6, layers=2, paired_layers=(0,), short_layers=(0,), attention_free=(),
                   value_layers=(0,), xsa_layers=(1,), attention_source=(0,), gated_skip=(0, 1),
                   tokens_per_step=(64, 128, 192), row_tokens=(64,))


def reference_run(model, batch_of):
    """The recipe word for word; the model only computes gradients. Yields the parameters after each step,
    and the mean loss of the next token."""
    c = model.config
    weight = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean, square, summed, momentum = ({name: torch.zeros_like(p) for name, p in weight.items()} for _ in range(4))
    averages = {}
    for step in range(c.steps):
        stage, long, short, tied, factor, mu, prefix, *token_weights = reference(step, c)
        model.load_state_dict(weight, strict=False)  # without the signs
        model.zero_grad()
        phase = train_gpt2.Phase(stage, (long, short), tuple(token_weights), prefix, tied)
        loss, next_token = model.loss(batch_of(step), phase)
        (loss / c.tokens_per_step[0]).backward()
        for name, p in model.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            if by_muon(name):
                momentum[name] = mu * momentum[name] + (1 - mu) * gradient
                nesterov, new = mu * momentum[name] + (1 - mu) * gradient, []
                for i, (old, matrix) in enumerate(zip(weight[name], nesterov, strict=True)):
                    update = orthogonalised(matrix, c.orthogonaliser) if matrix.any() else matrix
                    if c.normuon_beta2:
                        before = averages.get((name, i), [0.0] * max(old.shape))
                        update, averages[name, i] = equalised(update, before, c.normuon_beta2)
                    scale = (2.0, c.down_scale)[i] if name.endswith("mlp") else 1.0
                    rate = c.muon_lr * factor
                    new.append(old - scale * rate * (update + c.muon_decay * rate * old * (update * old >= 0)))
                weight[name] = torch.stack(new)
                continue
            summed[name] = summed[name] + gradient
            if (step + 1) % c.adam_every == 0:
                rate, *betas_and_decay = adam_settings(name, c)
                if name != "embedding" or not tied:
                    weight[name], mean[name], square[name] = adam_reference(
                        weight[name], summed[name], mean[name], square[name], rate * factor, *betas_and_decay,
                        (step + 1) // c.adam_every, c.adam_epsilon)
                summed[name] = torch.zeros_like(p)
        if tied and not reference(step + 1, c)[3]:
            for table in (weight, mean, square):
                table["embedding"] = table["head"]
        yield dict(weight), next_token / at(c.tokens_per_step, stage)


def assert_trains(model):
    """Every parameter after every step of a run."""
    c, twin, groups = model.config, copy.deepcopy(model), optimizer_groups(model, ALONE)

    def batch_of(step):
        stage = reference(step, c)[0]
        size = at(c.row_tokens, stage)
        return random_batch(at(c.tokens_per_step, stage) // size, size, seed=step)

    for step, (expected, loss) in enumerate(reference_run(twin, batch_of)):
        found = train_step(model, groups, batch_of(step), step)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-7, atol=0)
        found = {name: p.detach() for name, p in model.named_parameters()}
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
        for group in groups.values():
            assert not group.is_due(step) or (group.gradients == 0).all(), group.name


@pytest.mark.parametrize("preset, changes", [
    ("gpt2", SIX_LAYERS | RUN), ("five-minute", dict(steps=10, momentum_warmup=0.5, cooldown=0.3, layers=2))])
def test_a_whole_run_is_the_recipe_word_for_word(preset, changes):
    assert_trains(small_model(preset=preset, spread=0.05, **changes))


OF_UPDATES = ("schedule", "polar-express", "adam-every-other", "normuon", "muon-decay", "rate-levels", "tied-head",
              "multi-token", "split-precision", "paired-orthogonalising", "prefix-loss")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in OF_UPDATES))
    for preset, name in ONE_BY_ONE if preset == "gpt2"])
def test_a_run_without_a_technique(name):
    """Those of the model alone are in test_techniques, with their gradients; here in the slow tests."""
    assert_trains(small_model(preset="gpt2", spread=0.05, **SHORT | TECHNIQUES[name]))


@pytest.mark.parametrize("preset", ["gpt2", "five-minute"])
def test_the_size_of_micro_batches_does_not_matter(preset):
    """Nor do other settings of the run: recomputing, and how many logits are held at once."""
    outcomes, sizes, settings = [], [], SHORT | dict(row_tokens=(64,), tokens_per_step=(6 * 64,))
    for changes in ({}, dict(micro_tokens=1), dict(micro_tokens=200), dict(micro_tokens=64 * 4, loss_chunk=7),
                    dict(micro_tokens=10**6, recompute=True, loss_chunk=10**6)):
        model = small_model(preset=preset, spread=0.05, **settings | dict(micro_tokens=0) | changes)
        groups, batch = optimizer_groups(model, ALONE), random_batch(6, 64)
        micros = micro_batches(batch, model.config)
        for part in range(3):
            assert torch.equal(torch.cat([micro[part] for micro in micros]), batch[part])
        sizes.append(len(micros))
        losses = [train_step(model, groups, random_batch(6, 64, seed=step), step) for step in range(2)]
        outcomes.append({"losses": torch.stack(losses), **model.state_dict()})
    assert sizes == [1, 6, 2, 2, 1]
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-8, atol=1e-9)


# ---- warm-up and compiled updates -------------------------------------------------------------------------


def buffers(groups) -> list:
    return [tensor.clone() for group in groups.values() for tensor in (group.weights, group.gradients, *group.state)]


def small_run(folder, compiled=False, **changes):
    """A model of gpt2 in short rows, its groups, and data."""
    write_corpus(folder)
    files = {f"{part}_files": str(folder / f"text_{part}_*.bin") for part in ("train", "val")}
    sizes = SIX_LAYERS | RUN | dict(extension=0.25, document_tokens=(60, 90), spread=0.05)
    model = small_model(257, preset="gpt2", compiled=compiled, **files, **sizes | changes)
    return model, optimizer_groups(model, ALONE), open_data(model.config)


@pytest.mark.parametrize("steps", [12, 13])
def test_warm_up_leaves_no_trace(tmp_path, fresh_compiler, steps):
    """Also where a stage begins between two updates of Adam, so that gradients would wait for the next."""
    model, groups, data = small_run(tmp_path, steps=steps, tokens_per_step=(64,), row_tokens=(64,))
    first, phases = buffers(groups), []
    model.register_forward_pre_hook(lambda _, arguments: phases.append(arguments[2]))
    assert warm_up(model, groups, data, ALONE) > 0
    assert {phase.stage for phase in phases} == {0, 1, 2, 3}
    assert {phase.windows for phase in phases} == {phase_at(step, model.config).windows for step in range(steps + 1)}
    for found, expected in zip(buffers(groups), first, strict=True):
        assert torch.equal(found, expected)
    assert all(group.work is None and not group.pending and not group.communicates for group in groups.values())


def test_processes_of_a_machine_share_the_stages_in_the_warm_up(tmp_path, fresh_compiler, monkeypatch):
    """First each has one; a process that shares it with an earlier one compiles backward graphs at once, and updates
    from the last."""
    model, groups, data = small_run(tmp_path, steps=12, tokens_per_step=(64,), row_tokens=(64,))
    options, calls = torch._functorch.config, []
    monkeypatch.setattr(train_gpt2, "train_step", lambda _, groups, batch, step: calls.append(
        (step, options.force_non_lazy_backward_lowering, next(iter(groups)))))
    monkeypatch.setattr(train_gpt2, "validate", lambda *anything: None)
    front, back = next(iter(groups)), next(reversed(groups))
    together = [(step, False, front) for begin in (0, 3, 6, 9) for step in (begin, begin + 1)]
    for rank, (begin, at_once) in enumerate(
            [(0, False), (3, False), (6, False), (9, True), (None, True), (0, True), (3, True), (6, True)]):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        warm_up(model, groups, data, ALONE)
        steps = [] if begin is None else [begin, begin + 1]  # the fifth only validates
        own = [(step, at_once, back if at_once else front) for step in steps]
        assert calls == own + together
        calls.clear()
    assert not options.force_non_lazy_backward_lowering


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up(tmp_path, fresh_compiler, monkeypatch):
    compiled, graphs = torch.compile, []

    def counting(function, **options):  # the graphs run as they are
        def run(graph, _, **_options):
            graphs.append(function.__name__)
            return graph.forward

        return compiled(function, backend=run, **options)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(train_gpt2, "attention", plain_attention)
    sizes = dict(dtype="float32", steps=12, row_tokens=(128, 256, 384), tokens_per_step=(256, 512, 768), width=24)
    model, groups, data = small_run(tmp_path, True, **sizes, val_row_tokens=128, repeat=True)
    warm_up(model, groups, data, ALONE)
    counts = Counter(graphs)  # in three lengths of rows and in validation
    assert counts["attention_sublayer"] == 6 * 4
    assert counts["mlp_sublayer"] == 3 * 4  # after attention, without it, weighed by MUDD
    assert {*graphs} == {
        "forward", "attention_sublayer", "mlp_sublayer", "final_states", "chunk_losses", "chunk_gradient",
        "muon_update", "adam_update"}
    count, batches = len(graphs), train_gpt2.step_batches(data.train, model.config, ALONE)
    for step, batch in enumerate(batches):  # a recompilation would be an error
        validate(model, data.val, 300, step, ALONE)
        assert train_step(model, groups, batch, step).isfinite()
    validate(model, data.val, 300, 12, ALONE)
    assert len(graphs) == count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "adam"])
def test_compiled_updates_give_the_eager_ones_and_compile_once(fresh_compiler, kind):
    """The rate, the momentum and the step count change from step to step; no new graph may follow from it."""
    def group(compiled):
        model = host("float32", steps=6, momentum_warmup=1.0, cooldown=1.0, normuon_beta2=0.95, muon_decay=1.2)
        model.compiled = compiled
        parameters = parameters_of((4, 32, 16), dtype=torch.bfloat16 if kind == "muon" else torch.float32)
        if kind == "muon":
            return Muon("m", 2, parameters, [(1.0, 2.0, 1.0, 1.0)], model, ALONE)
        return Adam("a", 1, parameters, [(0.02, 0.8, 0.9, 0.1)], model, ALONE)

    groups = [group(False), group(True)]
    for step in range(1, 6):
        for each in groups:
            each.gradients.copy_(random(*each.gradients.shape, seed=step, dtype=torch.float32))
            with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
                each.update(step)
        eager, compiled = (join_bits(g.weights, g.state[2]) if kind == "muon" else g.weights for g in groups)
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert (eager - group(False).weights).abs().max() > 0.01
