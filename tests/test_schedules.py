"""What changes in the course of a run, against formulas in whole numbers, and the values of the records."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from test_techniques import ONE_BY_ONE

from train_gpt2 import (
    TECHNIQUES, Config, last_tied_step, learning_rate_factor, momentum_at, phase_at, prefix_weight, preset_values,
    row_lengths, stage_borders, stage_of, token_weights, tokens_until, windows_at)

GPT2, FIVE_MINUTE = (Config(**preset_values(name)) for name in ("gpt2", "five-minute"))


def at(values: tuple, stage: int):
    return values[min(stage, len(values) - 1)]


def borders_of(c: Config) -> list[int]:
    """Where stages begin and the run ends: thirds of the schedule, rounded to whole steps."""
    end = c.steps - round(c.extension * c.steps)
    return [*((2 * part * end + 3) // 6 for part in range(4)), c.steps]


def stage_at(step: int, c: Config) -> int:
    return sum(min(step, c.steps - 1) >= border for border in borders_of(c)[1:4])


def reference(step: int, c: Config) -> list:
    """Everything that depends on the step."""
    stage, borders = stage_at(step, c), borders_of(c)
    end = borders[3]
    fall = math.ceil(c.cooldown * end - 1e-6)
    left = min(Fraction(1), Fraction(max(0, end - step), max(1, fall))) if c.cooldown else 1
    rise, drop = (max(1, round(share * c.steps)) for share in (c.momentum_warmup, c.momentum_cooldown))
    high = min(Fraction(1), Fraction(step, rise), Fraction(c.steps - step, drop))
    ahead = 1 - Fraction(step - borders[stage], borders[stage + 1] - borders[stage])  # of the stage
    weights = [Fraction(1, 2**k) for k in range(max(1, c.predicted_tokens - stage))]
    if len(weights) > 1 and stage < 3:
        weights[-1] *= ahead
    tied = bool(c.tied_until) and step <= next(
        n for n in itertools.count() if n >= c.tied_until * end - 1e-6 and (n + 1) % c.adam_every == 0)
    long = c.window_final if step == c.steps and c.window_final else at(c.window, stage)
    momentum = c.muon_momentum_start + (c.muon_momentum - c.muon_momentum_start) * float(high)
    rate = float(at(c.rate_levels, stage) * left + c.rate_floor * (1 - left))
    return [stage, long, at(c.window_short, stage), tied, rate, momentum,
            c.prefix_weight * float((1, ahead, 0, 0)[stage]), *map(float, weights)]


def assert_agrees(steps, config: Config) -> None:
    for step in steps:
        stage, windows, weights, prefix, tied = phase_at(step, config)
        found = [stage, *windows, tied, learning_rate_factor(step, config), momentum_at(step, config), prefix, *weights]
        pairs = zip(found, reference(step, config), strict=True)
        assert all(math.isclose(*pair, rel_tol=1e-12, abs_tol=1e-14) for pair in pairs), (step, found)
    sizes = [at(config.tokens_per_step, stage_at(step, config)) for step in range(config.steps)]
    sums = [0, *itertools.accumulate(sizes)]
    assert [tokens_until(step, config) for step in steps] == [sums[step] for step in steps]


@pytest.mark.parametrize("preset, technique", [("gpt2", None), ("five-minute", None), *ONE_BY_ONE])
def test_schedules_are_the_formulas(preset, technique):
    """In each step of the two recipes, and around every border of those without one of their techniques."""
    neutral = TECHNIQUES[technique] if technique else {}
    config = Config(**preset_values(preset) | neutral)
    borders = [*stage_borders(config), last_tied_step(config)]
    near = {min(max(0, border + k), config.steps) for border in borders for k in (-2, -1, 0, 1, 2)}
    assert_agrees(sorted(near | {*range(0, config.steps, 197)}) if technique else range(config.steps + 1), config)


def test_the_values_of_record_88():
    assert stage_borders(GPT2) == [0, 455, 910, 1365, 1375]
    for step, rate in ((0, 1), (454, 1), (455, 1.52), (546, 1.52), (547, 1.518327), (909, 0.912784), (910, 1.027778),
                       (1000, 0.854151), (1250, 0.371856), (1364, 0.151929), (1365, 0.15), (1374, 0.15)):
        assert learning_rate_factor(step, GPT2) == pytest.approx(rate, abs=6e-7)
    for step, momentum in ((0, 0.85), (150, 0.9), (300, 0.95), (1325, 0.95), (1374, 0.852)):
        assert momentum_at(step, GPT2) == pytest.approx(momentum)
    for step, long, short in ((0, 3, 1), (454, 3, 1), (455, 7, 3), (909, 7, 3), (910, 11, 5), (1364, 11, 5),
                              (1365, 13, 6), (1374, 13, 6), (1375, 20, 6)):
        assert windows_at(step, GPT2) == (128 * long, 128 * short)
    for step, size, longest in ((0, 1, 896), (454, 1, 896), (455, 2, 2048), (910, 3, 2048), (1374, 3, 2048)):
        assert tokens_until(step + 1, GPT2) - tokens_until(step, GPT2) == 131_072 * size
        assert row_lengths(stage_of(step, GPT2), GPT2) == (16_384 * size, longest)
    for step, prefix, *weights in ((0, 0.25, 1, 0.5, 0.25), (91, 0.25, 1, 0.5, 0.2), (455, 0.25, 1, 0.5),
                                   (819, 0.05, 1, 0.1), (910, 0, 1), (1374, 0, 1)):
        assert token_weights(step, GPT2) == pytest.approx(tuple(weights))
        assert prefix_weight(step, GPT2) == pytest.approx(prefix)
    assert tokens_until(1375, GPT2) == 361_758_720 and row_lengths(0, FIVE_MINUTE) == (65_536, 65_537)
    assert [last_tied_step(replace(GPT2, adam_every=every)) for every in (1, 2, 3, 4)] == [910, 911, 911, 911]
    assert [last_tied_step(replace(GPT2, tied_until=share)) for share in (0.0, 0.99)] == [-1, 1353]


def test_the_values_of_record_12():
    rates = [learning_rate_factor(step, FIVE_MINUTE) for step in range(1875)]
    assert rates[:1314] == [1.0] * 1314 and rates[1314] < 1
    assert rates[1314:] == pytest.approx([(1875 - step) / 562 for step in range(1314, 1875)], rel=1e-15)
    for step, momentum in ((0, 0.85), (250, 0.9), (500, 0.95), (1874, 0.95)):
        assert momentum_at(step, FIVE_MINUTE) == pytest.approx(momentum, rel=1e-15)
    assert {windows_at(step, FIVE_MINUTE)[0] for step in range(1876)} == {1023}
    assert {token_weights(step, FIVE_MINUTE) for step in range(1876)} == {(1.0,)}
    assert tokens_until(1875, FIVE_MINUTE) == 524_288 * 1875 and last_tied_step(FIVE_MINUTE) == -1


CHANGES = [{}, dict(extension=0.0), dict(extension=0.5), dict(extension=0.9), dict(cooldown=1.0), dict(adam_every=3),
           dict(cooldown=0.0, momentum_cooldown=0.0), dict(rate_floor=0.0, predicted_tokens=7), dict(tied_until=0.5)]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_length_of_a_run(changes):
    """No stage goes back, and what the formulas give stays within its bounds."""
    for steps in (*range(1, 20), 101):
        config = replace(GPT2, steps=steps, **changes)
        assert_agrees(range(steps + 1), config)
        stages = [stage_of(step, config) for step in range(steps + 1)]
        assert stages == sorted(stages) and {*stages} <= {0, 1, 2, 3} and stages[-1] == stages[-2]
        assert (last_tied_step(config) + 1) % config.adam_every == 0
        for step in range(steps):
            assert 0 <= prefix_weight(step, config) <= 0.25
            assert config.rate_floor - 1e-12 <= learning_rate_factor(step, config) <= 1.73
            assert 0.85 - 1e-12 <= momentum_at(step, config) <= 0.95 + 1e-12
            assert token_weights(step, config)[0] == 1 and min(token_weights(step, config)) > 0
