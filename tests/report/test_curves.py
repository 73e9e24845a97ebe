import math

import numpy as np
import pytest

from coloss.lab.records import ConflictPoint, HistoryPoint
from coloss.report.curves import MOST_COLUMNS, conflict_map, logged_names, summarize_conflicts, training_curve


@pytest.fixture
def runs(results):
    """Three finished seeds of one arm without anything logged."""
    return results({"plain": [0.5, 0.6, 0.7]}, history=False)[1]


def log(trial, *points):
    trial.history = [
        HistoryPoint(step=step, epoch=0, seconds=seconds, terms={"loss": value})
        for step, seconds, value in points
    ]


def test_shared_steps_are_averaged_point_by_point(runs):
    log(runs[0], (0, 0.0, 4.0), (10, 1.0, 2.0))
    log(runs[1], (0, 0.0, 6.0), (10, 3.0, 1.0))
    steps = training_curve(runs, "terms", "loss", "steps")
    assert (steps.x, steps.mean, steps.low, steps.high) == ([0, 10], [5, 1.5], [4, 1], [6, 2])
    assert steps.seeds == 2
    assert training_curve(runs, "terms", "loss", "seconds").x == [0, 2.0]


def test_different_steps_are_interpolated_where_all_seeds_were_logged(runs):
    log(runs[0], (0, 0.0, 0.0), (100, 10.0, 100.0))
    log(runs[1], (20, 2.0, 20.0), (60, 6.0, 60.0), (80, 8.0, 80.0))
    curve = training_curve(runs, "terms", "loss", "steps")
    assert (curve.x[0], curve.x[-1]) == (20, 80)
    np.testing.assert_allclose(curve.mean, curve.x)  # both seeds lie on the line value = step
    np.testing.assert_allclose(curve.high, curve.low)


def test_seeds_without_a_common_stretch_show_their_last_points(runs):
    log(runs[0], (10, 1.0, 4.0))
    log(runs[1], (20, 2.0, 2.0))
    curve = training_curve(runs, "terms", "loss", "steps")
    assert (curve.x, curve.mean, curve.low, curve.high) == ([15], [3], [2], [4])


def test_a_seed_without_a_finite_value_leaves_a_gap(runs):
    log(runs[0], (0, 0.0, 1.0), (10, 1.0, math.inf))
    log(runs[1], (0, 0.0, 1.0), (10, 1.0, 1.0))
    curve = training_curve(runs, "terms", "loss", "steps")
    assert curve.mean[0] == 1 and math.isnan(curve.mean[1])


def test_nothing_logged_gives_no_curve(runs):
    assert training_curve(runs, "terms", "loss", "steps") is None
    assert logged_names(runs, "terms") == []
    assert conflict_map(runs) is None
    assert summarize_conflicts(runs) == []


def test_conflicts_by_hand(runs):
    for trial, cosines in zip(runs, [(-0.5, 0.5), (-0.1, math.nan)]):
        trial.conflicts = [
            ConflictPoint(step=step, cosine={"a|b": cosine}, norm={"a": 4.0, "b": norm})
            for step, cosine, norm in zip((0, 50), cosines, (1.0, 4.0))
        ]
    found = conflict_map(runs)
    assert (found.steps, found.pairs, found.seeds) == ([0, 50], [("a", "b")], 2)
    np.testing.assert_allclose(found.cosine, [[-0.3, 0.5]])
    assert found.norms == {"a": [4, 4], "b": [1, 4]}
    (pair,) = summarize_conflicts(runs)
    assert (pair.first, pair.second, pair.looks) == ("a", "b", 3)
    assert pair.cosine == pytest.approx(-0.1 / 3)
    assert pair.opposed == pytest.approx(2 / 3)
    assert pair.ratio == pytest.approx(2.0)  # geometric mean of 4, 1, 4, 1


def test_long_runs_are_averaged_into_even_columns(runs):
    runs[0].conflicts = [
        ConflictPoint(step=step, cosine={"a|b": 1.0 if step % 2 else -1.0}, norm={})
        for step in range(4 * MOST_COLUMNS)
    ]
    found = conflict_map(runs)
    assert len(found.steps) == MOST_COLUMNS
    assert found.steps[:2] == [1.5, 5.5]
    np.testing.assert_allclose(found.cosine, 0.0)


def test_a_pair_that_never_had_a_cosine(runs):
    runs[0].conflicts = [ConflictPoint(step=0, cosine={"a|b": math.nan}, norm={"a": 0.0, "b": 1.0})]
    (pair,) = summarize_conflicts(runs)
    assert pair.looks == 0
    assert all(map(math.isnan, (pair.cosine, pair.opposed, pair.ratio)))
