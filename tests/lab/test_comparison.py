"""A comparison is fair, keeps what is finished, and says what it cannot do before it trains."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from coloss import Arm, Budget, Comparison, Method
from coloss.errors import InputError
from coloss.lab.records import TrialRecord, read_comparison, read_record


def numbers(trials):
    """Everything a trial computed, without what it cost."""
    return {
        (trial.arm, trial.seed): (
            trial.metrics,
            [(point.step, point.terms, point.metrics) for point in trial.history],
            trial.conflicts,
        )
        for trial in trials
    }


def test_arms_share_split_initial_weights_and_batch_order(task, watched, tmp_path):
    plain, plain_notes = watched("plain", plain=True)
    busy, busy_notes = watched("busy")
    Comparison(task, [plain, busy], seeds=[3]).run(tmp_path)
    steps = 1 + 12  # the rehearsal's, and the trial's
    assert len(plain_notes) == len(busy_notes) == 2 + steps
    for ours, theirs in zip(plain_notes, busy_notes):
        for a, b in zip(ours, theirs) if isinstance(ours, list) else [(ours, theirs)]:
            assert torch.equal(a, b)
    assert isinstance(plain_notes[2], list) and not torch.equal(plain_notes[3], plain_notes[4])


def test_seeds_differ_in_split_and_initial_weights(task, watched, tmp_path):
    arm, notes = watched("plain", plain=True)
    Comparison(task, [arm], seeds=2, budget=Budget(steps=1)).run(tmp_path)
    weights = [note for note in notes if isinstance(note, list)]
    assert not torch.equal(weights[1][0], weights[2][0])
    assert not torch.equal(task.load(0).train.inputs, task.load(1).train.inputs)


def test_the_same_comparison_gives_the_same_numbers_whatever_ran_before(task, tmp_path):
    arms = [
        Arm("plain"),
        Arm(
            "smooth",
            objective=lambda outputs, targets: nn.functional.cross_entropy(
                outputs, targets, label_smoothing=0.2
            ),
        ),
    ]
    first = Comparison(task, arms, seeds=2).run(tmp_path / "a")
    torch.manual_seed(99)
    torch.rand(5)
    second = Comparison(task, arms[::-1], seeds=[1, 0], baseline="plain").run(tmp_path / "b")
    assert numbers(first.trials) == numbers(second.trials)
    assert numbers(first.trials)["plain", 0] != numbers(first.trials)["plain", 1]


def test_global_randomness_and_threads_are_left_alone(task, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    Comparison(task, [Arm("plain")], seeds=1).run(tmp_path)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


def test_finished_trials_are_not_run_again(task, tmp_path):
    built = []
    arms = [Arm("plain"), Arm("other", lambda setting: built.append((setting.seed, setting.smoke)) or [])]
    Comparison(task, arms, seeds=1).run(tmp_path)
    before = (tmp_path / "trials" / "other--seed0.json").read_bytes()
    assert built == [(0, True), (0, False)]
    reports = []
    result = Comparison(task, arms, seeds=3).run(tmp_path, report=lambda *report: reports.append(report))
    assert [seed for seed, smoke in built[2:] if not smoke] == [1, 2]
    assert (tmp_path / "trials" / "other--seed0.json").read_bytes() == before
    assert result.record.seeds == [0, 1, 2] and len(result.trials) == 6
    assert {report[:2] for report in reports if report[2] == 1.0} == {
        (arm, seed) for arm in ("plain", "other") for seed in range(3)
    }
    built.clear()
    again = Comparison(task, arms, seeds=2).run(tmp_path)
    assert not built and again.record.seeds == [0, 1, 2] and len(again.trials) == 6


def test_a_comparison_that_is_stopped_keeps_what_is_finished(task, tmp_path):
    def stop(arm, seed, share):
        if (arm, seed) == ("other", 0) and share < 1:
            raise KeyboardInterrupt

    arms = [Arm("plain"), Arm("other")]
    with pytest.raises(KeyboardInterrupt):
        Comparison(task, arms, seeds=2).run(tmp_path, report=stop)
    assert [(trial.arm, trial.seed) for trial in read_comparison(tmp_path)[1]] == [("plain", 0)]
    stored = (tmp_path / "trials" / "plain--seed0.json").stat().st_mtime_ns
    whole = Comparison(task, arms, seeds=2).run(tmp_path)
    assert len(whole.trials) == 4 and (tmp_path / "trials" / "plain--seed0.json").stat().st_mtime_ns == stored


def test_a_run_that_diverges_is_stored_as_such_and_the_others_go_on(task, diverging, tmp_path):
    comparison = Comparison(task, [diverging(5), Arm("plain")], seeds=2, baseline="plain")
    result = comparison.run(tmp_path)
    assert set(result.failures) == {("diverging", 0), ("diverging", 1)}
    assert result.failures["diverging", 1] == "diverging, seed 1: loss term 'diverge' is nan at step 5"
    assert all(map(math.isnan, result.values("diverging"))) and all(
        map(math.isfinite, result.values("plain"))
    )
    assert all(trial.cost.seconds > 0 for trial in result.trials)
    again = comparison.run(tmp_path)
    assert set(again.failures) == set(result.failures)


@pytest.mark.parametrize("budget", [Budget(seconds=0.4), Budget(epochs=2), Budget(steps=7)])
def test_every_arm_gets_the_budget(task, budget, tmp_path):
    slow = Arm("slow", lambda setting: [Slow()])
    result = Comparison(task, [Arm("plain"), slow], seeds=1, budget=budget).run(tmp_path)
    plain, slow_trial = result.trials
    if budget.seconds is not None:
        assert 0.4 <= plain.cost.seconds < 3 and 0.4 <= slow_trial.cost.seconds < 3
        assert slow_trial.cost.steps < plain.cost.steps
    else:
        assert plain.cost.steps == slow_trial.cost.steps == (7 if budget.steps else 8)


class Slow(Method):
    """Takes its time."""

    def on_batch(self, state):
        torch.linalg.matrix_power(torch.eye(200), 99)


def test_evaluation_is_on_one_schedule_for_all_arms(task, tmp_path):
    result = Comparison(task, [Arm("plain"), Arm("other")], seeds=1, budget=Budget(steps=100)).run(tmp_path)
    steps = [[point.step for point in trial.history if point.metrics] for trial in result.trials]
    assert steps[0] == steps[1] == [*range(10, 101, 10)]
    result = Comparison(task, [Arm("plain")], seeds=1, budget=Budget(epochs=3)).run(tmp_path / "epochs")
    assert [point.epoch for point in result.trials[0].history if point.metrics] == [1, 2, 3]
    result = Comparison(task, [Arm("plain")], seeds=1, budget=Budget(epochs=60)).run(tmp_path / "many")
    assert [point.step for point in result.trials[0].history if point.metrics] == [*range(12, 241, 12)]


def test_the_time_to_a_target_is_recorded(task, tmp_path):
    comparison = Comparison(task, [Arm("plain")], seeds=1, budget=Budget(epochs=10), reach=0.6)
    (trial,) = comparison.run(tmp_path).trials
    assert trial.time_to_target is not None and 0 < trial.time_to_target <= trial.cost.seconds
    comparison = Comparison(task, [Arm("plain")], seeds=1, metric="nll", reach=1e-6)
    assert comparison.run(tmp_path / "never").trials[0].time_to_target is None


def test_direction_follows_the_metric(task):
    def direction(**options):
        return Comparison(task, [Arm("plain")], **options).record.direction

    assert direction() == "higher" and direction(metric="nll") == "lower"
    assert direction(metric="balanced_accuracy") == "higher"
    assert direction(metric="nll", direction="higher") == "higher"
    lower = dataclasses.replace(task, direction="lower")
    assert Comparison(lower, [Arm("plain")]).record.direction == "lower"


def test_the_baseline_is_the_tasks_own_objective_if_it_takes_part(task):
    assert Comparison(task, [Arm("x"), Arm("cross-entropy")]).record.baseline == "cross-entropy"
    assert Comparison(task, [Arm("x"), Arm("y")]).record.baseline == "x"
    assert Comparison(task, [Arm("x"), Arm("y")], baseline="y").record.baseline == "y"
    with pytest.raises(InputError, match=r"baseline must be one of the arms \(x\), got 'z'"):
        Comparison(task, [Arm("x")], baseline="z")


def test_a_metric_that_the_task_does_not_give_is_refused_before_training(task, tmp_path):
    trained = []
    arm = Arm("plain", lambda setting: trained.append(setting.smoke) or [])
    comparison = Comparison(task, [arm], seeds=1, metric="acuracy")
    with pytest.raises(
        InputError, match="no metric named 'acuracy' in two clouds of points; did you mean 'accuracy'"
    ):
        comparison.run(tmp_path)
    assert trained == [True] and not list(tmp_path.iterdir())


def test_an_arm_that_cannot_work_is_refused_before_any_is_trained(task, tmp_path):
    def broken(setting):
        raise InputError("strength must be > 0, got -1")

    trained = []
    plain = Arm("plain", lambda setting: trained.append(setting.smoke) or [])
    with pytest.raises(InputError, match="^broken: strength must be > 0, got -1$"):
        Comparison(task, [plain, Arm("broken", broken)], seeds=1).run(tmp_path)
    assert trained == [True] and not (tmp_path / "comparison.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seeds": -2}, "seeds must be at least 1, got -2"),
        ({"seeds": [1, 1]}, "seeds must be different whole numbers >= 0"),
        ({"seeds": [-1]}, "seeds must be different whole numbers >= 0"),
        ({"arms": []}, "at least one arm"),
        ({"arms": [Arm("a"), Arm("a")]}, "names that differ"),
        ({"arms": [Arm("a b"), Arm("a_b")]}, "names that differ"),
        ({"arms": [Arm("")]}, "1 to 120 characters"),
        ({"arms": [Arm("x" * 121)]}, "1 to 120 characters"),
        ({"limit": 5}, "limit can be given for a task by name only"),
        ({"logger": "wandb"}, "no logger named 'wandb'"),
    ],
)
def test_a_plan_that_makes_no_sense(task, options, message):
    arms = options.pop("arms", [Arm("plain")])
    with pytest.raises(InputError, match=message):
        Comparison(task, arms, **options)


def test_options_must_be_storable(tmp_path):
    with pytest.raises(InputError, match="text_features must be text or a number"):
        Comparison("sst2", ["cross-entropy"], text_features=len)
    with pytest.raises(TypeError, match="limits"):
        Comparison("iris", ["cross-entropy"], limits=5)


def test_workers_need_names(task, tmp_path):
    comparison = Comparison(task, [Arm("plain")])
    with pytest.raises(InputError, match="by name"):
        comparison.run(tmp_path, workers=2)
    with pytest.raises(InputError, match="by name"):
        comparison.run(tmp_path, ray="local")
    with pytest.raises(InputError, match="workers must be >= 1, got 0"):
        comparison.run(tmp_path, workers=0)
    assert not list(tmp_path.iterdir())


def test_values_of_an_arm(task, tmp_path):
    result = Comparison(task, [Arm("plain")], seeds=2).run(tmp_path)
    assert result.values("plain") == [trial.metrics["accuracy"] for trial in result.trials]
    assert result.values("plain", "nll")[0] > 0 and math.isnan(result.values("plain", "x")[0])
    with pytest.raises(InputError, match="no arm named 'plane'; did you mean 'plain'"):
        result.values("plane")


def test_an_arm_that_needs_no_training_is_judged_as_it_is(tmp_path):
    result = Comparison("iris-ssl", ["untrained"], seeds=1, limit=40).run(tmp_path)
    (trial,) = result.trials
    assert trial.cost.steps == 0 and trial.cost.seconds == 0 and trial.cost.parameters > 0
    assert trial.cost.peak_memory_mb is None and 0 <= trial.metrics["knn"] <= 1


def test_a_stored_trial_holds_all_of_it(tmp_path):
    Comparison("iris", ["cross-entropy+trp"], seeds=[4], budget=Budget(steps=30), command="typed").run(
        tmp_path
    )
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["command"] == "typed" and record["versions"]["torch"] and record["machine"]["cores"]
    assert record["arms"] == [{"name": "cross-entropy+trp", "methods": [{"slug": "trp", "parameters": {}}]}]
    trial = read_record(tmp_path / "trials" / "cross-entropy+trp--seed4.json", TrialRecord)
    assert (
        trial.cost.steps == 30 and trial.history[-1].step == 30 and "cross_entropy" in trial.history[0].terms
    )
    assert set(trial.metrics) == {"accuracy", "balanced_accuracy", "ece", "macro_f1", "nll"}


def test_a_plan_without_trials_may_be_replaced(tmp_path):
    Comparison("iris", ["cross-entropy"], seeds=1, budget=Budget(steps=1)).run(tmp_path)
    (tmp_path / "trials" / "cross-entropy--seed0.json").unlink()
    result = Comparison("wine", ["cross-entropy"], seeds=1, budget=Budget(steps=1)).run(tmp_path)
    assert result.record.task == "wine"
