"""Counters: the rule at the ends, noise between the thresholds, one value at a time and many signals at once."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.errors import InputError
from coloss.motion import (
    HysteresisCounter,
    SwingCounter,
    autocorrelation_count,
    choose_counter,
    count_strides,
    count_swings,
    counter_signal,
    hysteresis_count,
    hysteresis_events,
    peak_count,
    phase_count,
)


def wave(periods: float, frames: int = 400, start: float = 0.0) -> torch.Tensor:
    return torch.sin(torch.linspace(start, start + 2 * math.pi * periods, frames))


@pytest.mark.parametrize("periods", [1, 2, 7])
def test_the_rule_at_the_ends(periods):
    assert hysteresis_count(wave(periods, start=-math.pi / 2), -0.5, 0.5) == periods  # -cos
    assert hysteresis_count(wave(periods), -0.5, 0.5) == periods - 1  # the first rise begins in the middle


def test_swings_inside_the_thresholds_count_nothing():
    signal = torch.cat([torch.tensor([-1.0]), 0.49 * wave(30), torch.tensor([1.0])])
    assert hysteresis_count(signal, -0.5, 0.5) == 1
    assert hysteresis_count(signal[1:-1], -0.5, 0.5) == 0


def test_hysteresis_beats_a_single_threshold_under_noise():
    generator = torch.Generator().manual_seed(0)
    signal = wave(8, 1200, -math.pi / 2) + 0.15 * torch.randn(1200, generator=generator)
    assert hysteresis_count(signal, -0.5, 0.5) == 8
    assert hysteresis_count(signal, 0.0, 0.0) > 16


@given(st.lists(st.one_of(st.floats(-3, 3, width=32), st.just(math.nan)), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_one_value_at_a_time_and_all_at_once_agree(values):
    counter = HysteresisCounter(-0.5, 0.75)
    counts = [counter.update(value) for value in values]
    signals = torch.tensor([values, values])
    events = hysteresis_events(signals, torch.tensor([-0.5, -9.0]), torch.tensor([0.75, 9.0]))
    assert events[0].long().cumsum(0).tolist() == counts
    assert not events[1].any()


def test_missing_values_change_nothing():
    signal = wave(5, 100, -math.pi / 2)
    gaps = signal.clone()
    gaps[::3] = torch.nan
    assert hysteresis_count(gaps, -0.5, 0.5) == 5
    assert hysteresis_count(torch.full((9,), torch.nan), -0.5, 0.5) == 0
    for count in (peak_count, lambda s: round(phase_count(s)), lambda s: round(autocorrelation_count(s))):
        assert count(gaps) == count(signal)
        assert count(torch.full((9,), torch.nan)) == 0


def test_a_swing_counts_wherever_it_lies():
    drifting = wave(6, 300, -math.pi / 2) + torch.linspace(0, 10, 300)
    counter = SwingCounter(1.0)
    for value in drifting.tolist():
        counter.update(value)
    assert counter.count == 6
    assert hysteresis_count(drifting, -0.5, 0.5) == 1
    counter.reset()
    assert counter.count == 0 and counter.update(5.0) == 0 and counter.update(5.9) == 0
    assert counter.update(math.inf) == counter.update(-math.inf) == counter.update(math.nan) == 0
    assert counter.update(6.0) == 1


@pytest.mark.parametrize("periods", [3, 6, 11])
def test_counts_without_thresholds(periods):
    signal = wave(periods)
    assert abs(autocorrelation_count(signal) - periods) < 0.1
    assert peak_count(signal) == periods
    assert abs(phase_count(signal) - periods) < 0.25


def test_a_second_harmonic_does_not_double_the_period():
    signal = wave(6) + 0.3 * wave(12)
    assert abs(autocorrelation_count(signal) - 6) < 0.1


def test_periods_at_the_ends_of_the_delays_are_found():
    every_fourth = torch.tensor([0.0, 1, 0, -1]).repeat(10)
    assert autocorrelation_count(every_fourth) == pytest.approx(39 / 4, abs=0.01)  # the shortest delay
    assert autocorrelation_count(torch.tensor([0.0, 1, 0]).repeat(10), shortest=1) == pytest.approx(
        29 / 3, abs=0.05
    )
    assert autocorrelation_count(wave(3, 31), 10, 10) == pytest.approx(3, abs=0.1)  # the only one


def test_a_straight_line_has_no_period_and_small_units_change_nothing():
    for slope in (0.1, 0.3, 1 / 7):
        assert autocorrelation_count(slope * torch.arange(60, dtype=torch.float64) + 5) == 0
    for count in (autocorrelation_count, peak_count, phase_count):
        assert count(1e-12 * wave(6)) == pytest.approx(count(wave(6)), abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_was_not_seen_at_the_ends_is_no_repetition(bad):
    signal = torch.cat([torch.full((150,), bad), wave(6, 300), torch.full((90,), bad)])
    for count in (autocorrelation_count, peak_count, phase_count):
        assert count(signal) == pytest.approx(count(wave(6, 300)))


def test_the_phase_follows_a_changing_speed():
    times = torch.linspace(0, 1, 500)
    assert abs(phase_count(torch.sin(2 * math.pi * (3 * times + 5 * times**2))) - 8) < 0.5


def test_constant_and_short_signals_count_nothing():
    for signal in (torch.full((50,), 3.0), torch.zeros(2), torch.zeros(1), torch.zeros(0)):
        assert autocorrelation_count(signal) == 0 and peak_count(signal) == 0 and phase_count(signal) == 0
        assert hysteresis_count(signal, 1.0, 2.0) == 0


def test_the_choice_takes_the_feature_that_counts_right():
    generator = torch.Generator().manual_seed(0)
    recordings, counts = [], []
    for periods in (3, 2):
        knee = 130 - 30 * torch.cos(torch.linspace(0, 2 * math.pi * periods, 40 * periods))
        twice = 130 - 40 * torch.cos(torch.linspace(0, 4 * math.pi * periods, 40 * periods))
        noise = 5 * torch.randn(40 * periods, generator=generator)
        recordings.append(torch.stack([noise, twice, knee + 0.5 * noise], 1))
        counts.append(periods)
    choice = choose_counter(recordings, counts)
    assert choice.feature in (2, -3) and choice.error == 0
    assert [choice.count(recording) for recording in recordings] == counts
    one_by_one = choice.new_counter()
    for value in counter_signal(recordings[0], choice.feature).tolist():
        one_by_one.update(value)
    assert one_by_one.count == counts[0]
    level = choice._replace(feature=2, kind="levels", low=115.0, high=145.0)
    assert level.count(recordings[0]) == 3 and isinstance(level.new_counter(), HysteresisCounter)


def test_strides_and_swings_from_positions():
    frames = 150
    phase = torch.linspace(0, 2 * math.pi * 5, frames)
    forward = torch.cumsum((0.5 - 0.5 * torch.cos(phase)).clamp_min(0) * 0.2, 0)
    lift = 0.3 * (0.5 - 0.5 * torch.cos(phase)) ** 2
    foot = torch.stack([forward, lift, torch.zeros(frames)], 1)
    assert count_strides(foot, foot, 30) == 5
    assert count_strides(torch.zeros(20, 3), torch.zeros(20, 3), 30) == 0
    hand = torch.stack([-0.3 * torch.cos(phase), torch.ones(frames), 0.1 * torch.ones(frames)], 1)
    assert count_swings(hand) == 5 and count_swings(hand, least=0.7) == 0


def test_bad_input():
    with pytest.raises(ValueError, match="low <= high, got 2 and 1"):
        HysteresisCounter(2, 1)
    with pytest.raises(ValueError, match="finite"):
        HysteresisCounter(0, math.nan)
    with pytest.raises(ValueError, match="swing must be > 0 and finite, got 0"):
        SwingCounter(0)
    with pytest.raises(ValueError, match="low must be <= high"):
        hysteresis_count(wave(2), 1.0, 0.0)
    with pytest.raises(ValueError, match="1 <= shortest <= longest, got 9 and 3"):
        autocorrelation_count(wave(2), 9, 3)
    with pytest.raises(ValueError, match="prominence must be > 0"):
        peak_count(wave(2), 0.0)
    with pytest.raises(InputError, match="recordings must each have a count >= 0"):
        choose_counter([torch.zeros(5, 2)], [])
    with pytest.raises(InputError, match="a feature that is there and moves"):
        choose_counter([torch.zeros(5, 2)], [1])
    assert np.isfinite(autocorrelation_count(wave(3, 20)))
