import math

import pytest

from coloss.report.ranking import rank_arms
from coloss.report.wording import budget_text, headline, tally


def say(results, values, **changes):
    record, trials = results(values, **changes)
    return headline(record, rank_arms(record, trials))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            # differences 0.01, 0.01, 0.01, 0.02: mean 0.0125, sd 0.005, t = 3.18245, half width 0.00796
            {"plain": [0.80, 0.82, 0.84, 0.80], "dhkd": [0.81, 0.83, 0.85, 0.82]},
            "dhkd is 1.2 points better than plain: 95% interval 0.5 to 2.0, 4 seeds.",
        ),
        (
            {"plain": [0.81, 0.83, 0.85, 0.82], "dhkd": [0.80, 0.82, 0.84, 0.80]},
            "dhkd is 1.2 points worse than plain: 95% interval 0.5 to 2.0, 4 seeds.",
        ),
        (
            {"plain": [0.81, 0.83, 0.85], "a": [0.5, 0.52, 0.54], "b": [0.61, 0.63, 0.65]},
            "No method beats plain: the closest, b, is 20.0 points worse: 95% interval 20.0 to 20.0, 3 seeds.",
        ),
        (
            {"plain": [0.80, 0.82, 0.84], "dhkd": [0.81, 0.84, 0.87]},
            "Not separable with 3 seeds: dhkd is 2.0 points ahead of plain, 95% interval −0.5 to +4.5.",
        ),
        (
            {"plain": [0.80, 0.82], "a": [0.70, 0.92], "b": [0.7, 0.8]},
            "No method is separable from the baseline with 2 seeds: a and plain are level, 95% interval −127.1 to +127.1.",
        ),
        (
            {"plain": [0.80], "dhkd": [0.79]},
            "Not separable with 1 seed: dhkd is 1.0 points behind plain; an interval needs at least two seeds.",
        ),
        ({"plain": [0.80]}, "plain reaches 80.0% accuracy with 1 seed."),
        ({"plain": [0.80, math.nan]}, "plain gave no finite accuracy in 1 of 2 seeds."),
        ({"plain": [None], "dhkd": [None]}, "No trial has finished yet."),
        (
            {"plain": [None], "dhkd": [0.5]},
            "Nothing to compare yet: no trial of the baseline plain has finished.",
        ),
        (
            {"plain": [0.5], "dhkd": [None]},
            "Nothing to compare yet: only the baseline plain has finished trials.",
        ),
        (
            {"plain": [math.nan], "dhkd": [0.5]},
            "Nothing to compare: the baseline plain gave no finite accuracy in 1 of 1 seed.",
        ),
        (
            {"plain": [0.5], "dhkd": [math.inf]},
            "Nothing to compare: no method has a finite accuracy on every seed it shares with plain.",
        ),
        (
            {"plain": [0.81, 0.83], "bad": [0.61, 0.63], "lost": [0.9, math.nan]},
            "No method that could be compared beats plain: the closest, bad, is 20.0 points worse: "
            "95% interval 20.0 to 20.0, 2 seeds.",
        ),
    ],
)
def test_sentence(results, values, sentence):
    assert say(results, values) == sentence


def test_separable_arm_is_named_before_a_better_mean_that_is_not(results):
    values = {"plain": [0.50, 0.52, 0.54], "lucky": [0.3, 0.99, 0.8], "sure": [0.52, 0.54, 0.56]}
    assert say(results, values).startswith("sure is 2.0 points better than plain")


def test_gain_reads_forward_where_lower_is_better(results):
    values = {"plain": [2.41, 2.42, 2.44], "dhkd": [2.31, 2.32, 2.34]}
    sentence = say(results, values, metric="test_loss", direction="lower")
    assert sentence == "dhkd is 0.100 better than plain: 95% interval 0.100 to 0.100, 3 seeds."


def test_tally_counts_methods_alone(results):
    values = {"plain": [0.5, 0.6], "up": [0.7, 0.8], "more": [0.8, 0.9], "lost": [0.1, math.nan]}
    assert tally(rank_arms(*results(values))) == [("better", 2), ("not compared", 1)]


def test_budget():
    assert budget_text({"steps": 1.0}) == "1 step"
    assert budget_text({"epochs": 5.0, "seconds": 90.0}) == "5 epochs, 90 s"


def test_a_worse_arm_is_separable_too(tmp_path):
    """With one arm level and one clearly worse, nothing is better, but not everything is inseparable."""
    from coloss.lab.records import ArmRecord, ComparisonRecord, Cost, TrialRecord
    from coloss.report import headline, rank_arms

    values = {"plain": [0.90, 0.91, 0.92], "level": [0.91, 0.90, 0.92], "bad": [0.80, 0.81, 0.82]}
    plan = ComparisonRecord(
        title="t",
        task="digits",
        arms=[ArmRecord(name=name) for name in values],
        baseline="plain",
        seeds=[0, 1, 2],
        budget={"steps": 1},
        metric="accuracy",
    )
    cost = Cost(seconds=1, steps=1, steps_per_second=1, parameters=1)
    trials = [
        TrialRecord(arm=arm, seed=seed, fingerprint="", metrics={"accuracy": value}, cost=cost)
        for arm, found in values.items()
        for seed, value in enumerate(found)
    ]
    assert headline(plan, rank_arms(plan, trials)).startswith(
        "No method is better than the baseline with 3 seeds: level"
    )
