"""Orthogonalisers, Muon and Adam against references in float64 and torch's own, how groups slice, a whole run."""

import copy
import math

import pytest
import torch
from tools import random_batch, small_model
from torch import nn

import train_gpt2
from train_gpt2 import (PRESETS, Adam, Config, Group, Muon, Processes, adam_update, apply_updates, attention_masks,
                        equalise_rows, joined, muon_update, optimizer_groups, orthogonalise, split, stage_of,
                        train_step, untie, warm_up)

ALONE = Processes(0, 1, torch.device("cpu"))


def five_minute(**changes) -> Config:
    return Config(**{**PRESETS["five-minute"], "preset": "five-minute", **changes})


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- orthogonalisers -------------------------------------------------------------------------------------------------

NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = list(zip(
    (8.156554524902461, 4.042929935166739, 3.8916678022926607, 3.285753657755655, 2.3465413258596377),
    (-22.48329292557795, -2.808917465908714, -2.772484153217685, -2.3681294933425376, -1.7097828382687081),
    (15.878769915207462, 0.5000178451051316, 0.5060648178503393, 0.46449024233003106, 0.42323551169305323),
    strict=True))
KINDS = {"none": (1.0, []), "newton-schulz": (1.0, NEWTON_SCHULZ), "polar-express": (1.02, POLAR_EXPRESS)}


def orthogonalised(matrix, kind="newton-schulz"):
    """The iteration by way of the singular value decomposition: it does to each singular value what it says."""
    margin, quintics = KINDS[kind]
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / (margin * values.square().sum(-1, keepdim=True).sqrt())
    for a, b, c in quintics:
        values = a * values + b * values**3 + c * values**5
    return left * values[..., None, :] @ right


def with_singular_values(rows, columns, values, seed=0):
    left = torch.linalg.qr(random(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(random(columns, len(values), seed=seed + 1)).Q
    return left * values @ right.T


SHAPES = [(8, 8), (24, 6), (6, 24), (1, 5), (5, 1), (1, 1), (3, 16, 4), (2, 3, 4, 12)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_quintics_are_applied_to_singular_values(shape, kind):
    matrix = random(*shape)
    found = orthogonalise(matrix, kind, torch.float64)
    assert found.shape == matrix.shape
    torch.testing.assert_close(found, orthogonalised(matrix, kind), rtol=1e-10, atol=1e-10)


BANDS = {("newton-schulz", torch.float64): (0.68, 1.14), ("newton-schulz", torch.float32): (0.68, 1.14),
         ("newton-schulz", torch.bfloat16): (0.65, 1.17), ("polar-express", torch.float64): (0.858, 1.142),
         ("polar-express", torch.float32): (0.858, 1.142), ("polar-express", torch.bfloat16): (0.85, 1.15)}


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-30, 1e30])
@pytest.mark.parametrize("kind, dtype", BANDS)
@pytest.mark.parametrize("rows, columns", [(48, 12), (12, 48), (24, 24)])
def test_singular_values_end_in_the_band(rows, columns, kind, dtype, scale):
    low, high = BANDS[kind, dtype]
    count = min(rows, columns)
    spectra = [torch.logspace(-2, 0, count, dtype=torch.float64), torch.ones(count, dtype=torch.float64),
               torch.logspace(0, -2, count, dtype=torch.float64) ** 0.3, torch.arange(1.0, count + 1).double()]
    matrices = torch.stack([with_singular_values(rows, columns, values) for values in spectra])
    found = orthogonalise((scale * matrices).float() if dtype != torch.float64 else scale * matrices, kind, dtype)
    assert found.dtype == dtype
    for values, matrix in zip(spectra, found.double(), strict=True):
        counted = (values / values.norm() > 0.0101).sum()
        reached = torch.linalg.svdvals(matrix)[:counted]
        assert low <= reached.min() and reached.max() <= high


def test_polar_express_ends_within_a_seventh_of_one_from_a_five_hundredth_on():
    """Matrices of two singular values, one of them anything from 1 / 500 of the norm to all of it."""
    small = torch.logspace(math.log10(0.002 * 1.02), 0, 4000, dtype=torch.float64)
    matrices = torch.diag_embed(torch.stack((small, (1 - small.square()).clamp_min(0).sqrt()), dim=-1))
    reached = orthogonalise(matrices, "polar-express", torch.float64)[:, 0, 0]
    assert reached.min() == pytest.approx(1 - 0.14113, abs=1e-4) and reached.max() == pytest.approx(1.14113, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_not_seen(kind):
    matrix = random(3, 10, 20, dtype=torch.float32)
    for scale in (2.0**-100, 2.0**-66, 2.0**-3, 2.0**90):  # powers of two change no digit
        scaled = orthogonalise(matrix * scale, kind, torch.float32)
        assert torch.equal(scaled, orthogonalise(matrix, kind, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_matrices_stay_zero_and_leave_their_neighbours_alone(dtype, kind):
    matrices = random(3, 6, 10, dtype=torch.float32)
    matrices[1] = 0
    found = orthogonalise(matrices, kind, dtype)
    assert (found[1] == 0).all()
    for i in (0, 2):
        torch.testing.assert_close(found[i], orthogonalise(matrices[i], kind, dtype))
        assert found[i].norm() > 0.99


@pytest.mark.parametrize("kind", ["newton-schulz", "polar-express"])
def test_in_bfloat16_it_is_close_to_float64(kind):
    matrices = random(4, 32, 64)
    found, exact = orthogonalise(matrices.float(), kind, torch.bfloat16), orthogonalise(matrices, kind, torch.float64)
    assert (found - exact).norm() < 0.03 * exact.norm()


# ---- NorMuon ---------------------------------------------------------------------------------------------------------


def equalised(matrix, average, beta2):
    """One matrix, row by row. Returns it equalised, and the new averages."""
    squares = [float(row @ row) / len(row) for row in matrix]
    average = [beta2 * old + (1 - beta2) * square for old, square in zip(average, squares, strict=True)]
    divided = torch.stack([row / math.sqrt(max(mean, 1e-10)) for row, mean in zip(matrix, average, strict=True)])
    return divided * matrix.norm() / max(float(divided.norm()), 1e-10), average


@pytest.mark.parametrize("rows, columns", [(12, 5), (7, 7), (5, 12), (1, 4), (4, 1)])
def test_rows_are_equalised_by_their_running_mean_square(rows, columns):
    """Over some steps; only the ratios of the averages count, so that they need no correction for starting at zero."""
    average, expected = torch.zeros(3, rows, 1, dtype=torch.float64), [[0.0] * rows] * 3
    for step in range(6):
        update = random(3, rows, columns, seed=step) * torch.logspace(-2, 1, rows).double()[:, None]
        found = equalise_rows(update, average, 0.9)
        for i in range(3):
            wanted, expected[i] = equalised(update[i], expected[i], 0.9)
            torch.testing.assert_close(found[i], wanted, rtol=1e-12, atol=1e-14)
            assert average[i].flatten().tolist() == pytest.approx(expected[i], rel=1e-12, abs=0)
        torch.testing.assert_close(found.norm(dim=(1, 2)), update.norm(dim=(1, 2)), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("rows, columns", [(12, 5), (7, 7), (5, 12)])
def test_after_the_first_step_all_rows_are_of_one_size(rows, columns):
    update = random(2, rows, columns) * torch.logspace(-2, 1, rows).double()[:, None]
    update = update * torch.logspace(1, -1, columns).double()
    for beta2 in (0.5, 0.95):
        average = update.new_zeros(2, rows, 1)
        squares = equalise_rows(update, average, beta2).square().mean(-1)
        torch.testing.assert_close(squares, squares[:, :1].expand_as(squares), rtol=1e-9, atol=0.0)
        torch.testing.assert_close(average, (1 - beta2) * update.square().mean(-1, keepdim=True))


def test_equalising_zero_matrices_leaves_zeros():
    update = random(3, 4, 4)
    update[1] = 0
    found = equalise_rows(update, torch.zeros(3, 4, 1, dtype=torch.float64), 0.95)
    assert (found[1] == 0).all() and found.isfinite().all() and found[2].norm() == pytest.approx(update[2].norm())


# ---- Muon ------------------------------------------------------------------------------------------------------------


def fill_gradients(parameters, seed):
    for number, parameter in enumerate(parameters):
        parameter.grad.copy_(random(*parameter.shape, seed=100 * seed + number) * 10.0 ** (number % 5 - 6))


def due(groups, step):
    return [group for group in groups.values() if group.is_due(step)]


def test_muon_is_the_reference_over_a_whole_run():
    """The groups of a model as training makes them; the reference takes one matrix after the other, rows = outputs."""
    model = small_model(spread=0.3, steps=20, momentum_warmup=0.5, cooldown=0.3, layers=2, mlp_ratio=4)
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    state = {}
    for i, block in enumerate(model.blocks):
        for j, name in enumerate("query key value output".split()):
            state[i, name] = (block.attention, j, False)
        state[i, "up"], state[i, "down"] = (block.mlp, 0, False), (block.mlp, 1, True)

    def oriented(tensor, j, transposed):
        return tensor[j].T if transposed else tensor[j]

    weight = {key: oriented(parameter.detach(), *place).clone() for key, (parameter, *place) in state.items()}
    average = {key: torch.zeros_like(matrix) for key, matrix in weight.items()}
    for step in range(20):
        fill_gradients(model.parameters(), step)
        mu = 0.85 + 0.10 * min(step / 10, 1)
        rate = 0.04 * min(1, (20 - step) / 6)
        for key, (parameter, *place) in state.items():
            gradient = oriented(parameter.grad, *place)
            average[key] = mu * average[key] + (1 - mu) * gradient
            rows, columns = gradient.shape
            factor = math.sqrt(max(1, rows / columns))
            weight[key] -= rate * factor * orthogonalised(mu * average[key] + (1 - mu) * gradient)
        apply_updates(due(groups, step), step)
        for key, (parameter, *place) in state.items():
            torch.testing.assert_close(oriented(parameter.detach(), *place), weight[key], rtol=1e-9, atol=1e-9)
    assert weight[0, "up"].shape == (64, 16) and weight[0, "down"].shape == (16, 64)


@pytest.mark.parametrize("preset, ratio, up, down", [
    ("five-minute", 4, 2.0, 1.0), ("five-minute", 9, 3.0, 1.0), ("five-minute", 1, 1.0, 1.0),
    ("gpt2", 4, 2.0, 4.0), ("gpt2", 9, 3.0, 4.0)])
def test_shape_factors(preset, ratio, up, down):
    model = small_model(preset=preset, mlp_ratio=ratio)
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    scales = {name: group.scale.flatten().tolist() for name, group in groups.items() if isinstance(group, Muon)}
    attending = sum(block.attends for block in model.blocks)
    assert scales == {"mlp": [up, down] * len(model.blocks), "attention": [1.0] * 4 * attending}


@pytest.mark.parametrize("shape, factor", [((32, 8), 2.0), ((8, 32), 1.0), ((16, 16), 1.0)])
def test_muon_is_torchs_muon(shape, factor):
    """torch's iterates in bfloat16, averages in the same form, and knows the factor sqrt(max(1, rows / columns))."""
    config = five_minute(steps=8, cooldown=0, muon_momentum_start=0.95, muon_momentum=0.95, muon_lr=0.02)
    ours, theirs = (nn.Parameter(random(*shape, dtype=torch.float32)) for _ in range(2))
    first = ours.detach().clone()
    group = Muon("one", [ours], [factor], config, torch.bfloat16, ALONE)
    optimizer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0, momentum=0.95, nesterov=True, ns_steps=5)
    for step in range(8):
        gradient = random(*shape, seed=step + 1, dtype=torch.float32)
        ours.grad.copy_(gradient)
        theirs.grad = gradient.clone()
        group.update(step)
        optimizer.step()
        moved = theirs.detach() - first
        assert (ours - theirs).norm() < 0.05 * moved.norm(), step  # what bfloat16 costs either of them


def one_muon_update(weight, gradient, scale=1.0, rate=0.04, inertia=0.9, decay=0.0, low=None):
    momentum = torch.zeros_like(gradient)
    muon_update(weight, gradient, momentum, momentum[..., :1].clone(), low, torch.tensor(scale).view(-1, 1, 1),
                torch.tensor(rate), torch.tensor(inertia), decay, 0.0, "polar-express", gradient.dtype)


def test_muon_update_moves_by_the_scale_and_the_rate():
    for scale, rate in ((1.0, 0.04), (2.0, 0.04), (1.0, 0.01), (1.0, 0.0)):
        weight = torch.zeros(1, 6, 6, dtype=torch.float64)
        one_muon_update(weight, random(1, 6, 6), scale, rate)
        wanted = -scale * rate * orthogonalised(random(1, 6, 6), "polar-express")
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-9)


def test_muon_decays_where_the_update_shrinks_the_weight_anyway():
    """Entry by entry with each combination of signs; of the two rates only one comes with the matrix's factor."""
    old, gradient, rate, scale, decay = 3 * random(2, 6, 8, seed=1), random(2, 6, 8), 0.25, (1.0, 4.0), 0.7
    old[0, 0, 0] = 0.0
    weight = old.clone()
    one_muon_update(weight, gradient, list(scale), rate, decay=decay)
    seen = set()
    for i, update in enumerate(orthogonalised(gradient, "polar-express")):
        for j in range(6):
            for k in range(8):
                p, o = float(old[i, j, k]), float(update[j, k])
                shrinks = o * p >= 0
                expected = p - scale[i] * rate * (o + decay * rate * p * shrinks)
                assert float(weight[i, j, k]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
                seen.add((shrinks, p > 0))
    assert len(seen) == 4


def test_muon_decay_is_full_where_the_update_is_zero():
    """Zero counts as shrinking: a matrix without a gradient fades."""
    weight = random(1, 4, 4)
    one_muon_update(weight, torch.zeros(1, 4, 4, dtype=torch.float64), 2.0, 0.1, decay=0.5)
    torch.testing.assert_close(weight, random(1, 4, 4) * (1 - 2 * 0.1 * 0.1 * 0.5), rtol=1e-7, atol=0.0)


# ---- bfloat16 matrices with their low bits beside --------------------------------------------------------------------


def bit_patterns() -> torch.Tensor:
    """float32 of every kind: any bits that are not NaN, ordinary numbers, denormals, zeros, borders of bfloat16."""
    draw = torch.Generator().manual_seed(0)
    anything = torch.randint(-2**31, 2**31, (200_000,), generator=draw).int().view(torch.float32)
    tiny = torch.randint(0, 2**23, (1000,), generator=draw).int().view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-126, -(2.0**-149), 3.4028234e38, -3.4028234e38, math.inf,
                            -math.inf, 1 + 2.0**-7, 1 + 2.0**-8, 1 + 2.0**-23, -1 - 2.0**-8 + 2.0**-23])
    return torch.cat((anything[~anything.isnan()], random(10_000, dtype=torch.float32), tiny, -tiny, special))


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_splitting_and_joining_are_inverse_bit_for_bit():
    numbers = bit_patterns()
    high, low = split(numbers)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert same_bits(joined(high, low), numbers)
    every_tail = torch.arange(-2**15, 2**15).to(torch.int16)
    for top in (1.0, -1.0, 0.0, -0.0, 1e-40, -3e38):
        high = torch.full((2**16,), top, dtype=torch.bfloat16)
        again_high, again_low = split(joined(high, every_tail))
        assert torch.equal(again_high.view(torch.int16), high.view(torch.int16)) and torch.equal(again_low, every_tail)


def test_what_is_split_is_cut_towards_zero():
    numbers = bit_patterns()
    numbers = numbers[numbers.isfinite()]
    high = split(numbers)[0].double()
    exact = numbers.double()
    assert (high.abs() <= exact.abs()).all() and (high * exact >= 0).all()
    magnitude = 2.0 ** exact.abs().clamp_min(2.0**-126).log2().floor()
    assert ((exact - high).abs() < magnitude * 2.0**-7 * (1 + 1e-9)).all()  # less than one digit of bfloat16
    assert (split(numbers)[0] != numbers.bfloat16()).float().mean() > 0.3  # which rounding to nearest would not give


def test_a_tail_of_zero_changes_nothing():
    weight = random(1000, dtype=torch.bfloat16)
    assert torch.equal(joined(weight, torch.zeros(1000, dtype=torch.int16)), weight.float())


def test_split_weights_train_as_float32_ones_where_bfloat16_alone_stands_still():
    """Steps far below what bfloat16 resolves, over 200 of them, with decay."""
    config = Config(steps=200, muon_lr=2e-5, cooldown=0, extension=0.0, rate_levels=(1.0,), muon_decay=40.0)
    first = (random(2, 16, 12) + torch.sign(random(2, 16, 12))).bfloat16()
    narrow, wide = nn.Parameter(first.clone()), nn.Parameter(first.float())
    groups = [Muon("one", [parameter], [1.0, 2.0], config, torch.float32, ALONE) for parameter in (narrow, wide)]
    alone, momentum = first.clone(), torch.zeros(2, 16, 12)
    average, low = torch.zeros(2, 16, 1), groups[0].state[2]
    assert low.dtype == torch.int16 and (low == 0).all() and len(groups[1].state) == 2
    assert groups[0].state[0].dtype == groups[0].state[1].dtype == torch.float32
    for step in range(200):
        gradient = (random(2, 16, 12, seed=step + 1) + random(2, 16, 12, seed=999)).bfloat16()
        for group in groups:
            group.gradients.copy_(gradient)
            group.update(step)
        exact = joined(narrow.detach(), low)
        assert (exact - wide).abs().max() <= 2.0**-23 * wide.abs().max(), step
        assert (narrow.float().abs() <= exact.abs()).all()
        assert ((exact - narrow.float()).abs() < 2.0**-7 * exact.abs()).all()
        muon_update(alone, gradient, momentum, average, None, groups[0].scale, torch.tensor(2e-5), torch.tensor(0.95),
                    40.0, 0.95, "polar-express", torch.float32)
    moved = (wide.detach() - first.float()).abs()
    assert moved.mean() > 5e-4
    assert torch.equal(alone, first)  # every step was rounded away
    assert (low != 0).float().mean() > 0.9


# ---- Adam ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("betas, epsilon", [((0.9, 0.95), 1e-8), ((0.8, 0.9), 1e-3)])
def test_adam_is_torchs_adam(dtype, tolerance, betas, epsilon):
    """Twenty steps with rates that fall, gradients around epsilon among them, and an entry that never gets one."""
    config = five_minute(steps=20, cooldown=0.8, adam_epsilon=epsilon)
    ours, theirs = (nn.Parameter(random(40, 8, dtype=dtype)) for _ in range(2))
    group = Adam("one", [ours], 1, [(0.05, *betas, 0.0)], config, ALONE)
    optimizer = torch.optim.Adam([theirs], betas=betas, eps=epsilon)
    for step in range(20):
        gradient = random(40, 8, seed=step + 1, dtype=dtype) * torch.logspace(-10, 1, 40, dtype=dtype)[:, None]
        gradient[3] = 0
        ours.grad.copy_(gradient)
        theirs.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = 0.05 * min(1, (20 - step) / 16)
        group.update(step)
        optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[3], random(40, 8, dtype=dtype)[3])


def test_each_parameter_of_an_adam_group_has_its_own_settings():
    settings = [(0.05, 0.9, 0.95, 0.0), (0.01, 0.5, 0.99, 0.0), (0.2, 0.0, 0.9, 0.0)]
    config = five_minute(steps=10, cooldown=0)
    shapes = [(3, 5), (), (7,)]
    ours, theirs = ([nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)] for _ in range(2))
    group = Adam("small", ours, 0, settings, config, ALONE)
    optimizers = [torch.optim.Adam([parameter], rate, betas, 1e-8)
                  for parameter, (rate, *betas, _) in zip(theirs, settings, strict=True)]
    assert group.learning_rate == 0.2
    for step in range(10):
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad.copy_(random(*mine.shape, seed=10 * step + i))
            other.grad = mine.grad.clone()
        group.update(step)
        for optimizer in optimizers:
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def adam_reference(weight, gradient, mean, square, rate, beta1, beta2, decay, count, epsilon):
    """One update of whole tensors; returns the new weight and moments."""
    mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
    move = rate * (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)) ** 0.5 + epsilon)
    shrinks = (move > 0) & (weight > 0) | (move < 0) & (weight < 0)
    return weight - move - rate**2 * decay * torch.where(shrinks, weight, 0), mean, square


def test_adam_decays_where_the_step_shrinks_the_weight_anyway():
    """Four combinations of signs and zeros, over three updates, with the rate's factor within the square."""
    def numbers(*values):
        return torch.tensor(values, dtype=torch.float64)

    weight, gradient = numbers(3, 3, -3, -3, 0, 2), numbers(0.1, -0.1, 0.1, -0.1, 0.1, 0)
    state, expected = [numbers(*[0] * 6), numbers(*[0] * 6)], [weight.clone(), numbers(*[0] * 6), numbers(*[0] * 6)]
    settings = numbers(0.4, 0.5, 0.9, 0.7).expand(6, 4)
    for count in (1, 2, 3):
        adam_update(weight, gradient, *state, settings, numbers(0.5).squeeze(), numbers(count).squeeze(), 1e-8)
        expected = adam_reference(expected[0], gradient, *expected[1:], 0.4 * 0.5, 0.5, 0.9, 0.7, count, 1e-8)
        torch.testing.assert_close((weight, *state), expected, rtol=1e-12, atol=0.0)
        if count == 1:  # by hand: the first step is as long as the rate
            by_hand = numbers(2.8 - 0.04 * 0.7 * 3, 3.2, -3.2, -2.8 + 0.04 * 0.7 * 3, -0.2, 2)
            torch.testing.assert_close(weight, by_hand, rtol=1e-6, atol=0.0)


def test_adam_in_bfloat16_rounds_only_what_it_stores():
    """One step after the other from the same stored weight: arithmetic and moments in float32, the weight rounded to
    nearest at the store."""
    weight = random(2000).bfloat16()
    mean, square = (1e-3 * random(2000, seed=1)).float(), (1e-5 * random(2000, seed=2) ** 2).float()
    settings = torch.tensor([[0.02, 0.9, 0.95, 0.0]]).expand(2000, 4)
    for step in range(20):
        gradient = (3e-3 * random(2000, seed=3 + step)).bfloat16()
        new_weight, new_mean, new_square = adam_reference(weight.float(), gradient.float(), mean, square, 0.02, 0.9,
                                                          0.95, 0.0, step + 1, 1e-8)
        before = weight.clone()
        adam_update(weight, gradient, mean, square, settings, torch.tensor(1.0), torch.tensor(step + 1.0), 1e-8)
        torch.testing.assert_close((mean, square), (new_mean, new_square), rtol=1e-5, atol=1e-9)
        assert (weight == new_weight.bfloat16()).float().mean() > 0.998  # all but numbers at the middle of two
        assert (weight != before).float().mean() > 0.5
    group = Adam("one", [nn.Parameter(random(6, 4).bfloat16())], 1, [(0.1, 0.9, 0.95, 0.0)], Config(), ALONE)
    assert [state.dtype for state in group.state] == [torch.float32] * 2 and group.shard.dtype == torch.bfloat16


def test_adam_steps_on_one_parameter_do_not_move_others():
    first, second = nn.Parameter(random(6, 4)), nn.Parameter(random(3, 4, seed=1))
    group = Adam("two", [first, second], 1, [(0.1, 0.9, 0.95, 0.0)] * 2, five_minute(cooldown=0), ALONE)
    first.grad.fill_(1.0)
    group.update(0)
    torch.testing.assert_close(first.detach(), random(6, 4) - 0.1)
    assert torch.equal(second, random(3, 4, seed=1))


# ---- groups ----------------------------------------------------------------------------------------------------------


def parameters_of(*shapes):
    return [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]


def test_parameters_and_gradients_are_views_of_one_tensor():
    parameters = parameters_of((4, 6, 6), (4, 6, 6), (2, 6, 6))
    before = [parameter.detach().clone() for parameter in parameters]
    group = Group("three", parameters, 2, Config(), ALONE)
    assert group.weights.shape == group.gradients.shape == (10, 6, 6)
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value) and (parameter.grad == 0).all()
    group.weights.add_(1)
    group.gradients[4:8] = 2
    for i, (parameter, value) in enumerate(zip(parameters, before, strict=True)):
        assert torch.equal(parameter, value + 1) and (parameter.grad == (2 if i == 1 else 0)).all()
    (3 * parameters[2]).sum().backward()  # adds to the gradient in place
    assert (group.gradients[8:] == 3).all() and (group.gradients[:4] == 0).all()


@pytest.mark.parametrize("shapes, item, length", [([(4, 6, 6), (4, 6, 6)], 2, 9), ([(10, 5)], 1, 12),
                                                  ([(4, 2), (5,), ()], 0, 15), ([(2,)], 0, 3), ([(9, 2)], 1, 9)])
def test_slices_of_three_processes_cover_everything_once(shapes, item, length):
    covered = torch.zeros(length, dtype=torch.int)
    for rank in range(3):
        parameters = parameters_of(*shapes)
        before = [parameter.detach().clone() for parameter in parameters]
        group = Group("any", parameters, item, Config(), Processes(rank, 3, torch.device("cpu")))
        covered[group.mine] += 1
        assert len(group.weights) == len(group.gradients) == length and group.weights.dim() == 1 + item
        assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))
        numbers = sum(value.numel() for value in before)
        assert (group.weights.flatten()[numbers:] == 0).all()
        assert len(group.shard) == len(group.shard_gradient) == length // 3
        group.shard.fill_(7)  # a view: updating the slice updates the parameters in it
        assert (group.weights[group.mine] == 7).all() and (group.weights == 7).sum() == group.shard.numel()
    assert (covered == 1).all()


def test_a_group_is_due_in_every_so_manyth_step_after_another():
    for every, after, expected in ((1, -1, [0, 1, 2, 3, 4, 5, 6, 7]), (2, -1, [1, 3, 5, 7]), (3, -1, [2, 5]),
                                   (1, 4, [5, 6, 7]), (2, 3, [5, 7]), (2, 4, [5, 7]), (2, 5, [7]), (1, 8, [])):
        group = Group("one", parameters_of((2,)), 0, Config(), ALONE, every, after)
        assert [step for step in range(8) if group.is_due(step)] == expected


def slices_of(world, shapes, make, gradient, steps):
    """Each process updates its slice with the whole gradient, as after the reduction; the slices side by side."""
    slices = []
    for rank in range(world):
        group = make(parameters_of(*shapes), Processes(rank, world, ALONE.device))
        padded = torch.zeros_like(group.weights)
        padded[:len(gradient)] = gradient
        for step in steps:
            group.shard_gradient.copy_(padded[group.mine] * (step + 1))
            group.update(step)
        slices.append(group.shard)
    return torch.cat(slices)[:len(gradient)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_several_processes_together_are_one(world):
    """Muon with different factors, Adam with different settings: each slice takes those of its own items along."""
    def muon(parameters, processes):
        return Muon("mlp", parameters, [2.0, 1.0], Config(steps=10), torch.float64, processes)

    def adam(parameters, processes):
        settings = [(0.1, 0.9, 0.95, 0.1), (0.02, 0.5, 0.9, 0.0), (0.3, 0.7, 0.99, 1.0)]
        return Adam("small", parameters, 0, settings, Config(steps=10), processes)

    for make, shapes, gradient in ((muon, [(2, 12, 4)] * 3, random(6, 12, 4, seed=9)),
                                   (adam, [(3, 4), (), (10,)], random(23, seed=9))):
        one, several = (slices_of(count, shapes, make, gradient, (1, 3)) for count in (1, world))
        torch.testing.assert_close(one, several, rtol=1e-12, atol=1e-12)
        first = torch.cat([parameter.detach().reshape(-1, *one.shape[1:]) for parameter in parameters_of(*shapes)])
        assert (one - first).abs().min() > 0


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_padding_stays_zero(rank):
    """What fills up the last slice is no parameter; no update may make it anything, least of all NaN."""
    processes = Processes(rank, 3, ALONE.device)
    adam = Adam("small", parameters_of((4,), (3,)), 0, [(0.1, 0.9, 0.95, 0.1)] * 2, Config(), processes)
    muon = Muon("mlp", parameters_of((2, 6, 4), (2, 6, 4)), [2.0, 1.0], Config(), torch.float64, processes)
    for group, parameters in ((adam, 7), (muon, 4)):
        for step in (1, 3):
            padded = random(*group.weights.shape, seed=step)
            padded[parameters:] = 0  # as gradients are there
            group.shard_gradient.copy_(padded[group.mine])
            group.update(step)
        assert (group.weights[parameters:] == 0).all() and group.weights.isfinite().all(), group.name


def test_a_group_reduces_once_after_its_last_gradient(monkeypatch):
    first, second = parameters_of((3,), (3,))
    group, seen = Group("two", [first, second], 0, Config(), ALONE), []
    monkeypatch.setattr(group, "reduce", lambda: seen.append(group.gradients.tolist()))
    (first.sum() + 2 * second.sum()).backward()  # a micro-batch that is not the last
    assert seen == []
    group.expect_gradients()
    (first.sum() + 2 * second.sum()).backward()
    (first.sum() + 2 * second.sum()).backward()
    assert seen == [[2.0] * 3 + [4.0] * 3]


def backward(model, batch):
    model.loss(batch, attention_masks(model, batch.starts, (23, 23)))[0].backward()


def test_reductions_of_due_groups_start_within_the_last_backward_pass(monkeypatch):
    model = small_model(preset="gpt2", spread=0.05, micro_tokens=64, row_tokens=(64,), tokens_per_step=(128,))
    groups, log, loss = optimizer_groups(model, model.config, torch.float64, ALONE), [], model.loss
    monkeypatch.setattr(model, "loss", lambda *arguments: log.append("pass") or loss(*arguments))
    monkeypatch.setattr(train_gpt2, "apply_updates", lambda *_: log.append("updates"))
    for group in groups.values():
        monkeypatch.setattr(group, "reduce", lambda name=group.name: log.append(name))
    for step, due_ones in ((0, {"mlp", "attention"}), (1, {*groups} - {"embedding"})):
        log.clear()
        train_step(model, groups, random_batch(2, 64), step)
        assert log[:2] == ["pass", "pass"] and log[-1] == "updates"
        assert sorted(log[2:-1]) == sorted(due_ones)


def test_applying_updates_clears_the_gradients():
    model = small_model(spread=0.3)
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    for step in range(2):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        backward(model, random_batch(1, 64))
        apply_updates(list(groups.values()), step)
        for name, parameter in model.named_parameters():
            assert (parameter.grad == 0).all() and not torch.equal(parameter, before[name]), name


def test_first_step_moves_the_head_alone():
    """At the start only the head has a gradient: all others wait behind zeros. From step 2 on everything moves."""
    model = small_model()
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved = []
    for step in range(3):
        backward(model, random_batch(1, 64, seed=step))
        apply_updates(list(groups.values()), step)
        moved.append({name for name, parameter in model.named_parameters() if not torch.equal(parameter, first[name])})
    assert moved[0] == {"head"}
    assert moved[2] == set(first)


def settings_by_parameter(model, groups) -> dict:
    """Name of each parameter -> optimizer and settings, as its group keeps them for its items."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for group in groups.values():
        begin = 0
        for parameter in group.parameters:
            assert names[id(parameter)] not in found  # in one group only
            length = parameter.numel() // math.prod(group.weights.shape[1:])
            if isinstance(group, Adam):
                rows = group.settings[begin:begin + length]
                assert torch.equal(rows, rows[:1].expand_as(rows))
                found[names[id(parameter)]] = tuple(rows[0].tolist())
            else:
                found[names[id(parameter)]] = ("muon", group.learning_rate)
            begin += length
    assert {*found} == {*names.values()}
    by_kind = {}
    for name, settings in found.items():  # "blocks.3.x0" is an "x0"; all layers have the same settings
        kind = name.split(".")[-1] if name.startswith("blocks") else name
        assert by_kind.setdefault(kind, settings) == settings
    return by_kind


def test_groups_have_the_rates_and_optimizers_of_record_12():
    model = small_model()
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    assert {name: (type(group), group.learning_rate, group.every, group.after) for name, group in groups.items()} == {
        "head": (Adam, 0.008, 1, -1), "embedding": (Adam, 0.6, 1, -1), "small": (Adam, 0.04, 1, -1),
        "mlp": (Muon, 0.04, 1, -1), "attention": (Muon, 0.04, 1, -1)}
    found = settings_by_parameter(model, groups)
    adam = {name: settings for name, settings in found.items() if settings[0] != "muon"}
    assert adam == {"head": (0.008, 0.9, 0.95, 0.0), "embedding": (0.6, 0.9, 0.95, 0.0),
                    **dict.fromkeys(("residual", "x0", "value_mix", "skip_mix"), (0.04, 0.9, 0.95, 0.0))}
    config = groups["head"].config
    assert (config.adam_epsilon, config.orthogonaliser) == (1e-8, "newton-schulz")
    assert (config.muon_decay, config.normuon_beta2) == (0, 0)


# Rate, betas and decay of every parameter that Adam trains in the hundred-second recipe.
GATES, SCALARS, TABLES, HEAD = ((0.008, 0.9, 0.99, 0.005), (0.04, 0.9, 0.99, 0.0), (0.6, 0.75, 0.95, 0.025),
                                (0.008, 0.5, 0.95, 0.75))
RECIPE_ADAM = {
    "embedding": HEAD, "head": HEAD, "value_tables.0": TABLES, "value_tables.1": TABLES, "value_tables.2": TABLES,
    "bigram_table": TABLES, "attention_gate": GATES, "value_gate": GATES, "x0": (0.04, 0.65, 0.95, 0.0),
    "smear_gate": (0.00008, 0.9, 0.99, 0.0), "skip_gate": (0.0004, 0.9, 0.99, 0.0), "residual": SCALARS,
    "into": SCALARS, "out": SCALARS, "bigram": SCALARS, "smear_mix": SCALARS, "skip_mix": SCALARS,
    "backout_mix": SCALARS}


def test_groups_have_the_rates_and_optimizers_of_the_hundred_second_recipe():
    model = small_model(preset="gpt2")
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    found = settings_by_parameter(model, groups)
    adam = {name: settings for name, settings in found.items() if settings[0] != "muon"}
    assert {*adam} == {*RECIPE_ADAM}
    for name, settings in adam.items():
        assert settings == pytest.approx(RECIPE_ADAM[name], rel=1e-12, abs=0), name
    assert {settings for settings in found.values() if settings[0] == "muon"} == {("muon", 0.023)}
    assert {name: (group.every, group.after) for name, group in groups.items()} == {
        "head": (2, -1), "mlp": (1, -1), "attention": (1, -1), "small": (2, -1), "values": (2, -1), "bigrams": (2, -1),
        "embedding": (2, 1041)}
    assert groups["mlp"].config.adam_epsilon * 16_384 == pytest.approx(1e-10)  # of losses summed over a row
    assert groups["mlp"].config.muon_decay == 1.2 and groups["mlp"].config.normuon_beta2 == 0.95


def test_gates_begin_on_sixteen_bytes():
    """Layers share compiled kernels, which rely on the alignment that they met in the first layer."""
    for heads in (2, 6):
        model = small_model(preset="gpt2", dtype=torch.float32, width=96, heads=heads)
        optimizer_groups(model, model.config, torch.float32, ALONE)
        gates = [p for name, p in model.named_parameters() if name.endswith("_gate")]
        assert len(gates) == 10 + 5 + 2
        assert all(p.data_ptr() % 16 == 0 and p.grad.data_ptr() % 16 == 0 for p in gates)


def test_untying_copies_the_table_and_its_moments():
    model = small_model(preset="gpt2", spread=0.1)
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    fill_gradients(model.parameters(), 1)
    groups["head"].update(1)
    assert model.tied and not torch.equal(model.embedding, model.head)
    untie(model, groups)
    assert not model.tied and torch.equal(model.embedding, model.head)
    for mine, other in zip(groups["embedding"].state, groups["head"].state, strict=True):
        assert torch.equal(mine, other) and other.abs().min() > 0
        assert mine.data_ptr() != other.data_ptr()


# ---- a whole run -----------------------------------------------------------------------------------------------------

RUN = dict(steps=26, extension=2 / 26, tokens_per_step=(128, 256, 384), row_tokens=(64, 128, 128), adam_epsilon=1e-8,
           momentum_warmup=6 / 26, momentum_cooldown=4 / 26, bigram=3, micro_tokens=256, heads=2, width=16)


def reference_run(model, batch_of):
    """The recipe word for word, for RUN: 24 scheduled steps, stages from steps 8, 16 and 24 on, the embedding tied
    until step 17. The model only computes gradients. Yields the parameters after each step."""
    windows = [(24, 8), (40, 16), (60, 24), (90, 32)]
    weight = {name: p.detach().clone() for name, p in model.named_parameters()}
    zeros = {name: torch.zeros_like(p) for name, p in weight.items()}
    mean, square, summed, momentum = dict(zeros), dict(zeros), dict(zeros), dict(zeros)
    averages = {}
    for step in range(26):
        stage = (step >= 8) + (step >= 16) + (step >= 24)
        if step == 18:
            for of_table in (weight, mean, square):
                of_table["embedding"] = of_table["head"].clone()
        model.tied = step < 18
        model.enter_stage(stage)
        model.load_state_dict(weight)
        batch = batch_of(step)
        ahead = [[1, 0.5, 0.25 * (1 - step / 8)], [1, 0.5 * (2 - step / 8)], [1], [1]][stage]
        model.zero_grad()
        (model.loss(batch, attention_masks(model, batch.starts, windows[stage]), ahead)[0] / 128).backward()
        gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        # the common factor of all rates: the level follows the stage one step late, the rest falls over 13 of 24 steps
        level = 1 if step <= 8 else 1.52 if step <= 16 else 1.73
        left = min(1, max(0, (24 - step) / 13))
        factor = level * left + 0.1 * (1 - left)
        mu = 0.85 + 0.1 * min(step / 6, 1) if step <= 22 else 0.95 - 0.1 * (step - 22) / 4
        for name in weight:
            if name.endswith((".attention", ".mlp")):
                new = []
                momentum[name] = mu * momentum[name] + (1 - mu) * gradient[name]
                nesterov = mu * momentum[name] + (1 - mu) * gradient[name]
                for i, (old, matrix) in enumerate(zip(weight[name], nesterov, strict=True)):
                    before = averages.get((name, i), [0.0] * len(old))
                    update, averages[name, i] = equalised(orthogonalised(matrix, "polar-express"), before, 0.95)
                    scale = (2.0, 4.0)[i] if name.endswith("mlp") else 1.0
                    rate = 0.023 * factor
                    new.append(old - scale * rate * (update + 1.2 * rate * old * (update * old >= 0)))
                weight[name] = torch.stack(new)
            else:
                summed[name] = summed[name] + gradient[name]
                if step % 2 == 1:
                    if name != "embedding" or step > 17:
                        kind = name.split(".")[-1] if name.startswith("blocks") else name
                        rate, beta1, beta2, decay = RECIPE_ADAM[kind]
                        weight[name], mean[name], square[name] = adam_reference(
                            weight[name], summed[name], mean[name], square[name], rate * factor, beta1, beta2, decay,
                            (step + 1) // 2, 1e-8)
                    summed[name] = zeros[name]
        yield dict(weight)


def test_a_whole_run_is_the_recipe_word_for_word():
    model = small_model(preset="gpt2", spread=0.05, **RUN)
    twin = copy.deepcopy(model)
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)

    def batch_of(step):
        rows, tokens = ((2, 64), (2, 128), (3, 128))[min(2, step // 8)]
        return random_batch(rows, tokens, seed=step)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, expected in enumerate(reference_run(twin, batch_of)):
        train_step(model, groups, batch_of(step), step)
        moved = set()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-7, atol=1e-7,
                                       msg=lambda text, name=name, step=step: f"{name} after step {step}: {text}")
            if not torch.equal(parameter, before[name]):
                moved.add(name)
            before[name] = parameter.detach().clone()
        matrices = {name for name in before if name.endswith((".attention", ".mlp"))}
        assert moved - {"embedding"} == ({*before} - {"embedding"} if step % 2 else matrices)
        assert ("embedding" in moved) == (step >= 18 and (step == 18 or step % 2 == 1))  # at 18 it becomes the head
    assert not torch.equal(model.embedding, model.head)


@pytest.mark.parametrize("steps", [12, 13])
def test_warm_up_leaves_no_trace(steps):
    """Also where a stage begins in the middle of a pair of steps, so that gradients wait for Adam at the end."""
    changes = {**RUN, "steps": steps, "extension": 0.25, "tokens_per_step": (64,), "row_tokens": (64,)}
    model, other = (small_model(preset="gpt2", spread=0.05, **changes) for _ in range(2))
    groups, others = (optimizer_groups(each, each.config, torch.float64, ALONE) for each in (model, other))
    seen = []
    try:
        warm_up(model, groups, ALONE, lambda step: random_batch(1, 64, seed=step), seen.append)
    finally:
        torch.compiler.set_stance("default")
    assert seen[0] == 0 and seen[-1] == steps
    assert {stage_of(step, model.config) for step in seen} == {0, 1, 2, 3}
    assert model.tied and model.stage == 0
    for group, untouched in zip(groups.values(), others.values(), strict=True):
        assert group.work is None and group.processes == ALONE
        for one, first in zip((group.weights, group.gradients, *group.state),
                              (untouched.weights, untouched.gradients, *untouched.state), strict=True):
            assert torch.equal(one, first), group.name


# ---- compiled updates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["muon", "adam"])
def test_compiled_updates_give_the_eager_ones_and_compile_once(kind):
    """The rate, the momentum and the step count change from step to step; no new graph may follow from it."""
    config = Config(steps=6, momentum_warmup=1.0, cooldown=1.0)

    def group():
        parameter = nn.Parameter(random(4, 32, 16, dtype=torch.bfloat16 if kind == "muon" else torch.float32))
        if kind == "muon":
            return Muon("m", [parameter], [1.0, 2.0, 1.0, 1.0], config, torch.float32, ALONE)
        return Adam("a", [parameter], 1, [(0.02, 0.8, 0.9, 0.1)], config, ALONE)

    eager, compiled = group(), group()
    torch._dynamo.reset()
    compiled.compile_update()
    for step in range(1, 6):
        for each in (eager, compiled):
            each.gradients.copy_(random(*each.gradients.shape, seed=step, dtype=torch.float32))
        eager.update(step)
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            compiled.update(step)
        one, other = (joined(each.weights, each.state[2]) if kind == "muon" else each.weights
                      for each in (eager, compiled))
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert (eager.weights - group().weights).abs().max() > 0.01
