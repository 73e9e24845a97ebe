"""What surrounds a trial: its randomness, its threads, its rehearsal."""

import random
import threading

import numpy as np
import pytest
import torch

from coloss import Arm, Budget, Comparison
from coloss.lab.isolation import reproducible
from coloss.lab.trials import attempt_arm, plan_budget, rehearse, train_arm
from coloss.train.loop import NonFiniteLossError


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002


def test_all_global_randomness_follows_the_seed():
    found = []
    for seed in (1, 1, 2):
        with reproducible(seed):
            found.append(draw())
    assert found[0] == found[1] and all(a != b for a, b in zip(found[0], found[2]))


def test_the_state_outside_is_as_it_was_even_after_an_error():
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    before = draw()
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), reproducible(3):
        assert torch.get_num_threads() == 1
        draw()
        1 / 0  # noqa: B018
    assert draw() == before and torch.get_num_threads() == threads


def test_libraries_below_numpy_run_on_one_thread():
    from threadpoolctl import threadpool_info

    with reproducible(0):
        assert {library["num_threads"] for library in threadpool_info()} == {1}


@pytest.mark.parametrize("budget", [Budget(steps=3), Budget(epochs=1.5), Budget(seconds=2)])
def test_a_stored_budget_is_the_budget(task, budget):
    record = Comparison(task, [Arm("plain")], budget=budget).record
    stored = type(record).model_validate_json(record.model_dump_json())
    assert plan_budget(stored) == budget and stored.fingerprint() == record.fingerprint()


def test_a_run_that_diverges_is_an_outcome_with_a_reason(task, diverging):
    record = Comparison(task, [diverging(5)], seeds=1).record
    outcome = attempt_arm(record, task, diverging(5), 0)
    assert outcome.failure == "diverging, seed 0: loss term 'diverge' is nan at step 5"
    assert np.isnan(outcome.trials[0].metrics["accuracy"]) and outcome.trials[0].cost.steps <= 5
    with pytest.raises(NonFiniteLossError, match="diverging, seed 0: loss term 'diverge' is nan at step 5$"):
        train_arm(record, task, diverging(5), 0)
    rehearse(record, task, diverging(0), judge=True)


def test_a_metric_without_a_finite_value_is_an_outcome_with_a_reason(task, tmp_path):
    from dataclasses import replace

    blind = replace(task, test=lambda model, splits: {"accuracy": float("nan")})
    result = Comparison(blind, [Arm("plain")], seeds=1).run(tmp_path)
    assert result.failures == {("plain", 0): "plain, seed 0: accuracy is no finite number"}


def test_a_rehearsal_takes_one_step_in_smoke_mode(task):
    seen = []
    arm = Arm("plain", lambda setting: seen.append((setting.smoke, setting.budget.steps)) or [])
    rehearse(Comparison(task, [arm], seeds=[7]).record, task, arm)
    assert seen == [(True, 1)]


def test_progress_is_reported_from_the_calling_thread(task):
    shares = []
    record = Comparison(task, [Arm("plain")], seeds=1).record
    train_arm(
        record,
        task,
        Arm("plain"),
        0,
        progress=lambda share: shares.append((share, threading.current_thread())),
    )
    assert shares and all(0 <= share <= 1 for share, _ in shares)
