"""Choosing by a number without labels: the choice, its regret, and what it refuses."""

import math

import pytest

from coloss.errors import InputError
from coloss.lab import select_arm
from coloss.lab.records import ArmRecord, ComparisonRecord, Cost, TrialRecord, trial_path, write_record

COST = Cost(seconds=1.0, steps=1, steps_per_second=1.0, parameters=1)


@pytest.fixture
def stored(tmp_path):
    """Stores values (arm -> seed -> metrics) as a finished comparison."""

    def store(values, metric="accuracy", direction="higher"):
        plan = ComparisonRecord(
            title="t",
            task="t",
            arms=[ArmRecord(name=arm) for arm in values],
            baseline=next(iter(values)),
            seeds=sorted({seed for trials in values.values() for seed in trials}),
            budget={"steps": 1.0},
            metric=metric,
            direction=direction,
            versions={},
            machine={},
            created="2026-01-01T00:00:00+00:00",
        )
        write_record(tmp_path / "comparison.json", plan)
        for arm, trials in values.items():
            for seed, metrics in trials.items():
                trial = TrialRecord(
                    arm=arm, seed=seed, fingerprint=plan.fingerprint(), metrics=metrics, cost=COST
                )
                write_record(trial_path(tmp_path, arm, seed), trial)
        return tmp_path

    return store


def trials(*pairs):
    return {seed: {"rank": rank, "accuracy": accuracy} for seed, (rank, accuracy) in enumerate(pairs)}


THREE = {
    "a": trials((1.0, 0.5), (1.0, 0.5)),
    "b": trials((2.0, 0.92), (4.0, 0.7)),
    "c": trials((3.0, 0.8), (2.0, 0.8)),
}


def test_the_choice_and_what_it_costs(stored):
    found = select_arm(stored(THREE), "rank")
    # Means of rank: 1, 3, 2.5; of accuracy: 0.5, 0.81, 0.8.
    assert (found.chosen, found.best) == ("b", "b")
    assert found.choices == {0: "c", 1: "b"}
    # Seed 0 takes c for b, seed 1 b for c: 0.12 and 0.1 short.
    assert found.regret.mean == pytest.approx(0.11) and found.regret.n == 2
    assert found.random_regret.mean == pytest.approx(((0.92 - 2.22 / 3) + (0.8 - 2 / 3)) / 2)
    assert found.rank_correlation == pytest.approx(0.5)


def test_directions_turn_both_sides(stored):
    down = {
        arm: {s: {"rank": -m["rank"], "error": 1 - m["accuracy"]} for s, m in t.items()}
        for arm, t in THREE.items()
    }
    found = select_arm(stored(down, metric="error", direction="lower"), "rank", direction="lower")
    assert found.choices == {0: "c", 1: "b"} and found.best == "b"
    assert found.regret.mean == pytest.approx(0.11)
    assert found.rank_correlation == pytest.approx(0.5)


def test_a_perfect_and_a_constant_criterion(stored):
    folder = stored(THREE)
    perfect = select_arm(folder, "accuracy")
    assert perfect.regret.mean == 0 and perfect.rank_correlation == pytest.approx(1.0)
    for metrics in (m for t in THREE.values() for m in t.values()):
        metrics["constant"] = 1.0
    constant = select_arm(stored(THREE), "constant")
    assert constant.chosen == "a" and math.isnan(constant.rank_correlation)


def test_seeds_in_which_a_run_diverged_are_left_out(stored):
    values = {arm: dict(found) for arm, found in THREE.items()}
    values["c"] = {0: {"rank": math.nan, "accuracy": 0.8}, 1: values["c"][1]}
    assert list(select_arm(stored(values), "rank").seeds) == [1]


def test_what_cannot_be_chosen(stored, tmp_path):
    with pytest.raises(InputError, match="is this the folder of a comparison"):
        select_arm(tmp_path / "nothing", "rank")
    with pytest.raises(InputError, match="must hold at least 2 arms to choose among, got 1"):
        select_arm(stored({"a": THREE["a"]}), "rank")
    with pytest.raises(InputError, match=r"no metric named 'rnak' in .*did you mean 'rank'\?"):
        select_arm(stored(THREE), "rnak")
    gone = {"a": {0: {"rank": math.inf, "accuracy": 1.0}}, "b": {0: {"rank": 1.0, "accuracy": 1.0}}}
    with pytest.raises(InputError, match="no seed of .* has a finite rank and accuracy in all 2 arms"):
        select_arm(stored(gone), "rank")
