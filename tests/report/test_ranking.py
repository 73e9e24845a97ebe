import math

import pytest

from coloss.lab.records import ArmRecord
from coloss.report.ranking import rank_arms


def by_arm(rows):
    return {row.arm: row for row in rows}


def test_arms_are_ordered_from_best_to_worst_mean(results):
    values = {"plain": [0.8, 0.8], "worst": [0.1, 0.2], "best": [0.9, 0.9], "middle": [0.85, 0.83]}
    assert [row.arm for row in rank_arms(*results(values))] == ["best", "middle", "plain", "worst"]
    lower = rank_arms(*results(values, direction="lower", metric="loss"))
    assert [row.arm for row in lower] == ["worst", "plain", "middle", "best"]


def test_hand_worked_comparison(results):
    # differences 0.01, 0.02, 0.03: mean 0.02, sd 0.01, t(0.975, 2 df) = 4.30265, half width 4.30265 * 0.01 / sqrt(3)
    rows = by_arm(rank_arms(*results({"plain": [0.80, 0.82, 0.84], "method": [0.81, 0.84, 0.87]})))
    row = rows["method"]
    assert row.mean == pytest.approx(0.84)
    assert row.sd == pytest.approx(0.03)
    assert row.differences == pytest.approx({0: 0.01, 1: 0.02, 2: 0.03})
    assert row.difference == pytest.approx(0.02)
    assert row.interval == pytest.approx((0.02 - 0.0248414, 0.02 + 0.0248414), abs=1e-6)
    assert row.p_value == pytest.approx(0.25)
    assert row.effect_size == pytest.approx(2.0)
    assert row.verdict == "not separable"
    assert rows["plain"].verdict == "baseline"
    assert rows["plain"].difference is None and rows["plain"].differences == {}


@pytest.mark.parametrize(
    ("direction", "higher", "lower"), [("higher", "better", "worse"), ("lower", "worse", "better")]
)
def test_verdict_follows_the_direction_of_the_metric(results, direction, higher, lower):
    values = {"plain": [0.5, 0.6, 0.7], "up": [0.6, 0.71, 0.8], "down": [0.4, 0.49, 0.6]}
    rows = by_arm(rank_arms(*results(values, direction=direction)))
    assert (rows["up"].verdict, rows["down"].verdict) == (higher, lower)


def test_only_seeds_of_both_arms_are_paired(results):
    rows = by_arm(rank_arms(*results({"plain": [0.5, 0.6, None], "method": [None, 0.7, 0.9]})))
    assert rows["method"].differences == pytest.approx({1: 0.1})
    assert rows["method"].difference == pytest.approx(0.1)
    assert rows["method"].mean == pytest.approx(0.8)


def test_one_seed_has_no_interval_and_is_not_separable(results):
    row = by_arm(rank_arms(*results({"plain": [0.5], "method": [0.9]})))["method"]
    assert (row.interval, row.sd, row.effect_size, row.verdict) == (None, None, None, "not separable")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_run_is_not_dropped_but_stops_the_comparison(results, bad):
    rows = rank_arms(*results({"plain": [0.5, 0.6], "diverged": [0.99, bad], "fine": [0.6, 0.7]}))
    assert [row.arm for row in rows] == ["fine", "plain", "diverged"]
    row = rows[-1]
    assert math.isnan(row.mean) and row.failed == 1
    assert (row.difference, row.interval, row.verdict) == (None, None, "not compared")


def test_a_trial_without_the_metric_counts_as_no_number(results):
    record, trials = results({"plain": [0.5, 0.6]})
    trials[0].metrics.pop("accuracy")
    assert rank_arms(record, trials)[0].failed == 1


def test_arms_without_trials_come_last_with_empty_costs(results):
    record, trials = results({"plain": [0.5, 0.6], "waiting": [None, None]})
    row = rank_arms(record, trials)[-1]
    assert (row.arm, row.verdict, row.values) == ("waiting", "not compared", {})
    assert (row.seconds, row.steps, row.parameters, row.time_to_target) == (None, None, None, None)


def test_costs_are_means_over_finished_seeds(results):
    record, trials = results({"plain": [0.95, 0.5], "method": [0.5, 0.5]})
    rows = by_arm(rank_arms(record, trials))
    assert rows["plain"].seconds == pytest.approx(12.15)
    assert rows["method"].prepare_seconds == pytest.approx(4.0)
    assert rows["method"].parameters == 12_445
    assert (rows["plain"].reached, rows["plain"].time_to_target) == (1, 6.0)
    assert (rows["method"].reached, rows["method"].time_to_target) == (0, None)


def test_order_of_trials_does_not_matter(results):
    record, trials = results({"plain": [0.5, 0.6, 0.7], "method": [0.6, 0.5, 0.9]})
    assert rank_arms(record, trials) == rank_arms(record, trials[::-1])


def test_a_foreign_trial_is_refused(results):
    record, trials = results({"plain": [0.5], "method": [0.6]})
    record.arms = [ArmRecord(name="plain")]
    with pytest.raises(
        ValueError, match=r"trials must be of the plan's arms \['plain'\], got one of 'method'"
    ):
        rank_arms(record, trials)
