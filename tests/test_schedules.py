"""What changes in the course of a run: stages, rates, momentum, windows, batches, weights of the losses, the tie."""

import itertools
import math
from collections import Counter

import pytest

from train_gpt2 import (PRESETS, Config, last_tied_step, momentum_schedule, multi_token_weights, rate_schedule,
                        stage_borders, stage_of, tokens_until, value_at, windows_at)


def five_minute(**changes) -> Config:
    return Config(**{**PRESETS["five-minute"], "preset": "five-minute", **changes})


# ---- the hundred-second run, against the values of the record --------------------------------------------------------


def test_stages_are_thirds_of_the_schedule_and_the_extension():
    assert stage_borders(Config()) == [520, 1040, 1560]
    borders = 0, 519, 520, 1039, 1040, 1559, 1560, 1599, 1600  # the last: where only validation is left
    assert [stage_of(step, Config()) for step in borders] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert Counter(stage_of(step, Config()) for step in range(1600)) == {0: 520, 1: 520, 2: 520, 3: 40}


@pytest.mark.parametrize("step, rate", [
    (0, 1), (519, 1), (520, 1), (521, 1.52), (701, 1.52), (702, 1.52), (703, 1.518345), (1040, 0.960606),
    (1041, 1.085979), (1559, 0.101900), (1560, 0.1), (1561, 0.1), (1599, 0.1)])
def test_rates_at_the_borders(step, rate):
    assert rate_schedule(step, Config()) == pytest.approx(rate, abs=6e-7)


def test_rates_of_the_whole_run():
    """By the formula in fractions of the schedule; the level changes after a border, not on it."""
    for step in range(1600):
        x = step / 1560
        level = 1.0 if x <= 1 / 3 else 1.52 if x <= 2 / 3 else 1.73
        left = 1.0 if x < 0.45 else max(0.0, (1 - x) / 0.55)
        assert rate_schedule(step, Config()) == pytest.approx(level * left + 0.1 * (1 - left), rel=1e-12), step


def test_momentum_of_the_whole_run():
    for step in range(1600):
        expected = 0.95 - 0.10 * (step - 1550) / 50 if step > 1550 else 0.85 + 0.10 * min(step / 300, 1)
        assert momentum_schedule(step, Config()) == pytest.approx(expected, rel=1e-12), step
    assert momentum_schedule(1599, Config()) == pytest.approx(0.852)


@pytest.mark.parametrize("step, long, short", [
    (0, 3, 1), (519, 3, 1), (520, 7, 3), (1039, 7, 3), (1040, 11, 5), (1559, 11, 5), (1560, 13, 6), (1599, 13, 6),
    (1600, 20, 6)])
def test_windows_in_blocks_of_128_and_at_the_last_validation(step, long, short):
    assert windows_at(step, Config()) == (128 * long, 128 * short)
    if step == 1600:
        assert windows_at(step, Config(window_final=0)) == (128 * 13, 128 * short)


@pytest.mark.parametrize("step, batch, row", [
    (0, 131_072, 16_384), (519, 131_072, 16_384), (520, 262_144, 32_768), (1039, 262_144, 32_768),
    (1040, 393_216, 49_152), (1559, 393_216, 49_152), (1560, 393_216, 49_152), (1599, 393_216, 49_152)])
def test_batches_and_rows_at_the_borders(step, batch, row):
    stage = stage_of(step, Config())
    assert value_at(Config().tokens_per_step, stage) == batch == tokens_until(step + 1, Config()) - tokens_until(
        step, Config())
    assert value_at(Config().row_tokens, stage) == row


def test_tokens_of_the_run():
    assert tokens_until(0, Config()) == 0
    assert tokens_until(520, Config()) == 68_157_440
    assert tokens_until(1600, Config()) == 424_673_280


def test_multi_token_weights_of_the_whole_run():
    for step in range(1600):
        x = step / 1560
        expected = [1, 0.5, 0.25 * (1 - 3 * x)] if step < 520 else [1, 0.5 * (2 - 3 * x)] if step < 1040 else [1]
        assert multi_token_weights(step, Config()) == pytest.approx(expected, rel=1e-12, abs=1e-15), step
    assert multi_token_weights(519, Config())[2] > 0 and multi_token_weights(1039, Config())[1] > 0


def test_more_predicted_tokens_become_fewer_stage_by_stage():
    config = Config(predicted_tokens=6)
    for step, count in ((0, 6), (519, 6), (520, 5), (1040, 4), (1559, 4), (1560, 3), (1599, 3)):
        weights = multi_token_weights(step, config)
        assert len(weights) == count and weights[:-1] == [0.5**k for k in range(count - 1)] and weights[-1] > 0
    assert {tuple(multi_token_weights(step, five_minute())) for step in range(1875)} == {(1.0,)}


def test_the_last_tied_step_is_the_first_update_of_adam_from_two_thirds_on():
    assert last_tied_step(Config()) == 1041
    assert last_tied_step(Config(adam_every=1)) == 1040
    assert last_tied_step(Config(adam_every=3)) == 1040
    assert last_tied_step(Config(adam_every=4)) == 1043
    assert last_tied_step(Config(tied_until=0)) == -1
    assert last_tied_step(Config(tied_until=1)) == 1600  # to the end
    assert last_tied_step(five_minute()) == -1


# ---- the five-minute run ---------------------------------------------------------------------------------------------


def test_rates_of_the_five_minute_run():
    rates = [rate_schedule(step, five_minute()) for step in range(1875)]
    assert rates[:1314] == [1.0] * 1314
    assert rates[1314:] == pytest.approx([(1875 - step) / 562 for step in range(1314, 1875)], rel=1e-15)
    assert rates[1314] < 1 and rates[-1] == 1 / 562


def test_momentum_of_the_five_minute_run():
    momenta = [momentum_schedule(step, five_minute()) for step in range(1875)]
    assert momenta == pytest.approx([0.85 + 0.10 * min(step / 500, 1) for step in range(1875)], rel=1e-15)
    assert momenta[0] == 0.85 and momenta[499] < 0.95 and momenta[500:] == pytest.approx([0.95] * 1375, rel=1e-15)
    assert momentum_schedule(0, five_minute(momentum_warmup=0)) == pytest.approx(0.85)  # of one step
    assert momentum_schedule(1, five_minute(momentum_warmup=0)) == pytest.approx(0.95)


def test_nothing_else_changes_in_the_five_minute_run():
    config = five_minute()
    assert {windows_at(step, config)[0] for step in range(1876)} == {1023}
    assert [tokens_until(step, config) for step in range(1876)] == [524_288 * step for step in range(1876)]
    assert {value_at(config.row_tokens, stage_of(step, config)) for step in range(1876)} == {65_536}


# ---- runs of any length ----------------------------------------------------------------------------------------------


def test_a_run_of_half_the_length_is_the_same_run_seen_in_fractions():
    whole, half = Config(), Config(steps=800)
    assert stage_borders(half) == [260, 520, 780]
    for step in range(800):
        assert windows_at(step, half) == windows_at(2 * step, whole)
        assert momentum_schedule(step, half) == pytest.approx(momentum_schedule(2 * step, whole))
        assert multi_token_weights(step, half) == pytest.approx(multi_token_weights(2 * step, whole))
        if step not in (260, 520):  # where the level waits for one step, whatever a step is
            assert rate_schedule(step, half) == pytest.approx(rate_schedule(2 * step, whole))


EVERY_LENGTH = [dict(), dict(extension=0.0), dict(extension=0.5), dict(extension=0.9), dict(cooldown=1.0),
                dict(cooldown=0.0, momentum_cooldown=0.0), dict(rate_floor=0.0, predicted_tokens=7), dict(adam_every=3)]


@pytest.mark.parametrize("changes", EVERY_LENGTH, ids=str)
def test_every_length_of_a_run_has_sane_schedules(changes):
    for steps in range(1, 201):
        config = Config(steps=steps, **changes)
        borders = stage_borders(config)
        assert borders == sorted(borders) and 0 <= borders[0] and borders[2] <= steps
        stages = [stage_of(step, config) for step in range(steps + 1)]
        assert stages == sorted(stages) and {*stages} <= {0, 1, 2, 3} and stages[-1] == stages[-2]
        if borders[2] >= 3:  # every stage has a step; their lengths differ by one at most
            lengths = [after - before for before, after in itertools.pairwise([0, *borders])]
            assert max(lengths) - min(lengths) <= 1 and {0, 1, 2} <= {*stages}
        batches = [config.tokens_per_step[min(stage, 2)] for stage in stages[:-1]]
        assert [tokens_until(step, config) for step in range(steps + 1)] == [0, *itertools.accumulate(batches)]
        for step, stage in enumerate(stages):
            rate, momentum = rate_schedule(step, config), momentum_schedule(step, config)
            assert config.rate_floor - 1e-12 <= rate <= 1.73 and (rate > 0 or step >= borders[2])
            assert 0.85 - 1e-12 <= momentum <= 0.95 + 1e-12
            long, short = windows_at(step, config)
            assert short == config.window_short[stage]
            assert long == (2560 if step == steps else config.window[stage])
            weights = multi_token_weights(step, config)
            assert len(weights) == max(1, config.predicted_tokens - stage) and weights[0] == 1
            assert step == steps or min(weights) > 0
            assert weights == sorted(weights, reverse=True)
        tied = last_tied_step(config)
        assert (tied + 1) % config.adam_every == 0 and 0 <= tied - 2 / 3 * borders[2] + 1e-6 < config.adam_every + 1


@pytest.mark.parametrize("cooldown", [0, 1e-6, 562 / 1875, 0.5, 1])
def test_rates_are_never_negative_and_zero_only_after_the_end(cooldown):
    for steps in range(1, 80):
        config = five_minute(steps=steps, cooldown=cooldown)
        rates = [rate_schedule(step, config) for step in range(steps + 1)]
        assert all(0 < rate <= 1 for rate in rates[:-1]) and rates[-1] >= 0
        assert rates == sorted(rates, reverse=True)
        assert all(0.85 <= momentum_schedule(step, config) <= 0.95 + 1e-12 for step in range(steps + 1))
        assert rates[0] == 1  # also where all of the run is cooldown


@pytest.mark.parametrize("extension", [0.025, 0.25, 0.5])
def test_the_extension_runs_at_the_floor(extension):
    for steps in range(4, 201):
        config = Config(steps=steps, extension=extension)
        scheduled = stage_borders(config)[2]
        assert scheduled == steps - round(extension * steps)
        assert all(rate_schedule(step, config) == config.rate_floor for step in range(scheduled, steps))
        assert rate_schedule(scheduled - 1, config) > config.rate_floor
    assert math.isclose(rate_schedule(0, Config(steps=1)), 1)
