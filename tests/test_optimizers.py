"""Newton-Schulz, Muon and Adam against references in float64 and torch's own, how groups slice, and the schedules."""

import math
from fractions import Fraction

import pytest
import torch
from tools import random_batch, small_model
from torch import nn

from train_gpt2 import (Adam, Config, Group, Muon, Processes, adam_update, apply_updates, attention_mask,
                        momentum_schedule, muon_update, newton_schulz, optimizer_groups, rate_schedule, window_schedule)

ALONE = Processes(0, 1, torch.device("cpu"))


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- Newton-Schulz ---------------------------------------------------------------------------------------------------


def quintic(s, steps=5):
    """What the iteration does to one singular value."""
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def orthogonalised(matrix, steps=5):
    """Newton-Schulz by way of the singular value decomposition."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = quintic(values / values.square().sum(-1, keepdim=True).sqrt(), steps)
    return left * values[..., None, :] @ right


def with_singular_values(rows, columns, values, seed=0):
    left = torch.linalg.qr(random(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(random(columns, len(values), seed=seed + 1)).Q
    return left * values @ right.T


SHAPES = [(8, 8), (24, 6), (6, 24), (1, 5), (5, 1), (1, 1), (3, 16, 4), (2, 3, 4, 12)]


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_applies_the_quintic_to_singular_values(shape, steps):
    matrix = random(*shape)
    found = newton_schulz(matrix, steps, torch.float64)
    assert found.shape == matrix.shape
    torch.testing.assert_close(found, orthogonalised(matrix, steps), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-30, 1e30])
@pytest.mark.parametrize("dtype, low, high", [(torch.float64, 0.68, 1.14), (torch.float32, 0.68, 1.14),
                                              (torch.bfloat16, 0.65, 1.17)])
@pytest.mark.parametrize("rows, columns", [(48, 12), (12, 48), (24, 24)])
def test_singular_values_end_in_the_band(rows, columns, dtype, low, high, scale):
    count = min(rows, columns)
    spectra = [torch.logspace(-2, 0, count, dtype=torch.float64), torch.ones(count, dtype=torch.float64),
               torch.logspace(0, -2, count, dtype=torch.float64) ** 0.3, torch.arange(1.0, count + 1).double()]
    matrices = torch.stack([with_singular_values(rows, columns, values) for values in spectra])
    found = newton_schulz((scale * matrices).float() if dtype != torch.float64 else scale * matrices, 5, dtype)
    assert found.dtype == dtype
    for values, matrix in zip(spectra, found.double(), strict=True):
        counted = (values / values.norm() > 0.0101).sum()
        reached = torch.linalg.svdvals(matrix)[:counted]
        assert low <= reached.min() and reached.max() <= high


def test_newton_schulz_does_not_see_the_scale():
    matrix = random(3, 10, 20, dtype=torch.float32)
    for scale in (2.0**-100, 2.0**-66, 2.0**-3, 2.0**90):  # powers of two change no digit
        assert torch.equal(newton_schulz(matrix * scale, 5, torch.float32), newton_schulz(matrix, 5, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_matrices_stay_zero_and_leave_their_neighbours_alone(dtype):
    matrices = random(3, 6, 10, dtype=torch.float32)
    matrices[1] = 0
    found = newton_schulz(matrices, 5, dtype)
    assert (found[1] == 0).all()
    for i in (0, 2):
        torch.testing.assert_close(found[i], newton_schulz(matrices[i], 5, dtype))
        assert found[i].norm() > 1


def test_newton_schulz_in_bfloat16_is_close_to_float64():
    matrices = random(4, 32, 64)
    found, exact = newton_schulz(matrices.float(), 5, torch.bfloat16), newton_schulz(matrices, 5, torch.float64)
    assert (found - exact).norm() < 0.045 * exact.norm()


# ---- Muon ------------------------------------------------------------------------------------------------------------


def fill_gradients(parameters, seed):
    for number, parameter in enumerate(parameters):
        parameter.grad.copy_(random(*parameter.shape, seed=100 * seed + number) * 10.0 ** (number % 5 - 6))


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
        apply_updates(groups, step)
        for key, (parameter, *place) in state.items():
            torch.testing.assert_close(oriented(parameter.detach(), *place), weight[key], rtol=1e-9, atol=1e-9)
    assert weight[0, "up"].shape == (64, 16) and weight[0, "down"].shape == (16, 64)


@pytest.mark.parametrize("ratio, up, down", [(4, 2.0, 1.0), (9, 3.0, 1.0), (1, 1.0, 1.0)])
def test_shape_factors(ratio, up, down):
    model = small_model(mlp_ratio=ratio)
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    scales = {group.name: group.scale.flatten().tolist() for group in groups if isinstance(group, Muon)}
    assert scales == {"mlp": [up, down] * 4, "attention": [1.0] * 16}


@pytest.mark.parametrize("shape, factor", [((32, 8), 2.0), ((8, 32), 1.0), ((16, 16), 1.0)])
def test_muon_is_torchs_muon(shape, factor):
    """torch's iterates in bfloat16, averages in the same form, and knows the factor sqrt(max(1, rows / columns))."""
    config = Config(steps=8, cooldown=0, muon_momentum_start=0.95, muon_momentum=0.95, muon_lr=0.02)
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


def test_muon_update_moves_by_the_scale_and_the_rate():
    for scale, rate in ((1.0, 0.04), (2.0, 0.04), (1.0, 0.01), (1.0, 0.0)):
        weight, momentum = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
        scale, rate, decay = torch.tensor([[[scale]]]), torch.tensor(rate), torch.tensor(0.9)
        muon_update(weight, random(1, 6, 6), momentum, scale, rate, decay, 5, torch.float64)
        torch.testing.assert_close(weight, -scale * rate * orthogonalised(random(1, 6, 6)), rtol=1e-6, atol=1e-9)


# ---- Adam ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("changes", [{}, dict(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3)])
def test_adam_is_torchs_adam(dtype, tolerance, changes):
    """Twenty steps with rates that fall, gradients around epsilon among them, and an entry that never gets one."""
    config = Config(steps=20, cooldown=0.8, **changes)
    ours, theirs = (nn.Parameter(random(40, 8, dtype=dtype)) for _ in range(2))
    group = Adam("one", [ours], 1, 0.05, config, ALONE)
    optimizer = torch.optim.Adam([theirs], betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
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


def test_adam_in_bfloat16_rounds_only_what_it_stores():
    """One step after the other from the same stored numbers: arithmetic in float32, rounded to nearest at the store,
    the step taken with the moments before that rounding."""
    weight, mean = random(2000).bfloat16(), (1e-3 * random(2000, seed=1)).bfloat16()
    square = (1e-5 * random(2000, seed=2) ** 2).bfloat16()
    for step in range(20):
        gradient = (3e-3 * random(2000, seed=3 + step)).bfloat16()
        new_mean = 0.9 * mean.float() + 0.1 * gradient.float()
        new_square = 0.95 * square.float() + 0.05 * gradient.float() ** 2
        corrected = (new_square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
        expected = (weight.float() - 0.02 * (new_mean / (1 - 0.9 ** (step + 1))) / corrected).bfloat16()
        before = weight.clone()
        adam_update(weight, gradient, mean, square, torch.tensor(0.02), 0.9, 0.95, 1e-8, torch.tensor(step + 1.0))
        for stored, exact in ((mean, new_mean), (square, new_square)):
            assert (stored == exact.bfloat16()).float().mean() > 0.99  # all but numbers at the middle of two
        assert (weight == expected).float().mean() > 0.998
        assert (weight != before).float().mean() > 0.5


def test_adam_steps_on_one_parameter_do_not_move_others():
    first, second = nn.Parameter(random(6, 4)), nn.Parameter(random(3, 4, seed=1))
    group = Adam("two", [first, second], 1, 0.1, Config(cooldown=0), ALONE)
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
    group = Group("three", parameters, 2, 0.1, ALONE)
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
        group = Group("any", parameters, item, 0.1, Processes(rank, 3, torch.device("cpu")))
        covered[group.mine] += 1
        assert len(group.weights) == len(group.gradients) == length and group.weights.dim() == 1 + item
        assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))
        numbers = sum(value.numel() for value in before)
        assert (group.weights.flatten()[numbers:] == 0).all()
        assert len(group.shard) == len(group.shard_gradient) == length // 3
        group.shard.fill_(7)  # a view: updating the slice updates the parameters in it
        assert (group.weights[group.mine] == 7).all() and (group.weights == 7).sum() == group.shard.numel()
    assert (covered == 1).all()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_several_processes_together_are_one(world):
    """Each updates its slice with the whole gradient, as after the reduction; side by side they make one update."""
    config, shapes = Config(steps=10, cooldown=0), [(2, 12, 4)] * 3
    gradient = random(6, 12, 4, seed=9)
    results = []
    for processes in (1, world):
        slices = []
        for rank in range(processes):
            mlp = Muon("mlp", parameters_of(*shapes), [2.0, 1.0], config, torch.float64,
                       Processes(rank, processes, ALONE.device))
            padded = torch.zeros_like(mlp.weights)
            padded[:6] = gradient
            mlp.shard_gradient.copy_(padded[mlp.mine])
            mlp.update(0)
            mlp.update(1)
            slices.append(mlp.shard)
        results.append(torch.cat(slices)[:6])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert not torch.equal(results[0][:2], parameters_of(*shapes)[0])


def test_a_group_reduces_once_after_its_last_gradient(monkeypatch):
    first, second = parameters_of((3,), (3,))
    group, seen = Group("two", [first, second], 0, 0.1, ALONE), []
    monkeypatch.setattr(group, "reduce", lambda: seen.append(group.gradients.tolist()))
    (first.sum() + 2 * second.sum()).backward()  # a micro-batch that is not the last
    assert seen == []
    group.expect_gradients()
    (first.sum() + 2 * second.sum()).backward()
    (first.sum() + 2 * second.sum()).backward()
    assert seen == [[2.0] * 3 + [4.0] * 3]


def test_applying_updates_clears_the_gradients():
    model = small_model(spread=0.3)
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    batch = random_batch(1, 64)
    for step in range(2):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model.loss(batch, attention_mask(model, batch.starts, 24)).backward()
        apply_updates(groups, step)
        for name, parameter in model.named_parameters():
            assert (parameter.grad == 0).all() and not torch.equal(parameter, before[name]), name


def test_first_step_moves_the_head_alone():
    """At the start only the head has a gradient: all others wait behind zeros. From step 2 on everything moves."""
    model = small_model()
    groups = optimizer_groups(model, model.config, torch.float64, ALONE)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved = []
    for step in range(3):
        batch = random_batch(1, 64, seed=step)
        model.loss(batch, attention_mask(model, batch.starts, 24)).backward()
        apply_updates(groups, step)
        moved.append({name for name, parameter in model.named_parameters() if not torch.equal(parameter, first[name])})
    assert moved[0] == {"head"}
    assert moved[2] == set(first)


def test_groups_have_the_rates_and_optimizers_of_record_12():
    model = small_model()
    groups = optimizer_groups(model, Config(), torch.float64, ALONE)
    assert {group.name: (type(group), group.learning_rate) for group in groups} == {
        "head": (Adam, 0.008), "embedding": (Adam, 0.6), "scalars": (Adam, 0.04),
        "mlp": (Muon, 0.04), "attention": (Muon, 0.04)}
    config = groups[0].config
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert groups[1].config.newton_schulz_steps == 5


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_rates_of_the_five_minute_run():
    rates = [rate_schedule(step, Config()) for step in range(1875)]
    assert rates[:1314] == [1.0] * 1314
    assert rates[1314:] == pytest.approx([(1875 - step) / 562 for step in range(1314, 1875)], rel=1e-15)
    assert rates[1314] < 1 and rates[-1] == 1 / 562


def test_momentum_of_the_five_minute_run():
    momenta = [momentum_schedule(step, Config()) for step in range(1875)]
    assert momenta == pytest.approx([0.85 + 0.10 * min(step / 500, 1) for step in range(1875)], rel=1e-15)
    assert momenta[0] == 0.85 and momenta[499] < 0.95 and momenta[500:] == pytest.approx([0.95] * 1375, rel=1e-15)
    assert momentum_schedule(0, Config(momentum_warmup=0)) == pytest.approx(0.85)  # of one step
    assert momentum_schedule(1, Config(momentum_warmup=0)) == pytest.approx(0.95)


def test_window_of_the_five_minute_run_is_constant():
    assert {window_schedule(step, Config()) for step in range(1876)} == {1024}
    assert {window_schedule(step, Config(window=100, window_start=100)) for step in range(1876)} == {100}


def test_growing_window_is_that_of_record_13():
    config = Config(steps=1750, window=1792, window_start=64)
    windows = [window_schedule(step, config) for step in range(1751)]
    assert windows == [64 * math.floor((64 + (1792 - 64) * Fraction(step, 1750)) / 64) for step in range(1751)]
    assert windows[0] == 64 and windows[64:66] == [64, 128] and windows[1749:] == [1728, 1792]


@pytest.mark.parametrize("start, end", [(64, 1000), (1, 64), (100, 1024), (640, 1792)])
def test_growing_window_stays_between_its_ends(start, end):
    windows = [window_schedule(step, Config(steps=77, window=end, window_start=start)) for step in range(78)]
    assert windows == sorted(windows) and windows[0] == start and start < windows[-1] <= end


@pytest.mark.parametrize("cooldown", [0, 1e-6, 562 / 1875, 0.5, 1])
def test_rates_are_never_negative_and_zero_only_after_the_end(cooldown):
    for steps in range(1, 80):
        config = Config(steps=steps, cooldown=cooldown)
        rates = [rate_schedule(step, config) for step in range(steps + 1)]
        assert all(0 < rate <= 1 for rate in rates[:-1]) and rates[-1] >= 0
        assert rates == sorted(rates, reverse=True)
        assert all(0.85 <= momentum_schedule(step, config) <= 0.95 + 1e-12 for step in range(steps + 1))
        assert rates[0] == 1  # also where all of the run is cooldown


# ---- compiled updates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["muon", "adam"])
def test_compiled_updates_give_the_eager_ones_and_compile_once(kind):
    """The rate, the momentum and the step count change from step to step; no new graph may follow from it."""
    config = Config(steps=5, momentum_warmup=1.0, cooldown=1.0)

    def group():
        parameter = nn.Parameter(random(4, 32, 16, dtype=torch.float32))
        if kind == "muon":
            return Muon("m", [parameter], [1.0, 2.0, 1.0, 1.0], config, torch.float32, ALONE)
        return Adam("a", [parameter], 1, 0.02, config, ALONE)

    eager, compiled = group(), group()
    torch._dynamo.reset()
    compiled.compile_update()
    for step in range(5):
        for each in (eager, compiled):
            each.gradients.copy_(random(*each.gradients.shape, seed=step, dtype=torch.float32))
        eager.update(step)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            compiled.update(step)
        torch.testing.assert_close(compiled.weights, eager.weights, rtol=1e-5, atol=1e-6)
    assert (eager.weights - group().weights).abs().max() > 0.01
