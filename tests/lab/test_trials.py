"""What surrounds a trial: its randomness, its threads, its rehearsal."""

import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from coloss import Arm, Budget, Comparison, Method
from coloss.compression import LowRankWeight
from coloss.errors import InputError
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
    blind = replace(task, test=lambda model, splits: {"accuracy": float("nan")})
    result = Comparison(blind, [Arm("plain")], seeds=1).run(tmp_path)
    assert result.failures == {("plain", 0): "plain, seed 0: accuracy is no finite number"}


def test_a_rehearsal_takes_one_step_in_smoke_mode(task):
    seen = []
    arm = Arm("plain", lambda setting: seen.append((setting.smoke, setting.budget.steps)) or [])
    rehearse(Comparison(task, [arm], seeds=[7]).record, task, arm)
    assert seen == [(True, 1)]


class Factors(Method):
    """Says that the first layer is of rank 1, and makes it so."""

    def __init__(self, change: float = 0.0, unknown: bool = False) -> None:
        super().__init__()
        self.change, self.unknown = change, unknown

    def finish(self, state):
        weight = state.model[0].weight.data
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        self.left, self.right = left[:, :1] * values[:1], right[:1]
        weight.copy_(self.left @ self.right + self.change)

    def stored_weights(self, model):
        if self.unknown:
            raise InputError("stored_weights are there after the run: call fit first")
        return {"0.weight": LowRankWeight(self.left, self.right, "channel", (64, 4))}


def test_the_size_of_a_model_counts_forms_that_methods_give_where_they_fit(task):
    task = replace(task, model=lambda splits: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)))
    record = Comparison(task, [Arm("plain")], seeds=1).record
    sizes = [
        train_arm(record, task, Arm("factors", lambda setting, method=method: [method]), 0).cost.stored_bytes
        for method in (Factors(), Factors(change=1.0), Factors(unknown=True))
    ]
    assert None not in sizes
    # 68 numbers instead of 256; where the form is refused, the file holds what there is.
    assert sizes[0] < sizes[1] - 500 and abs(sizes[1] - sizes[2]) < 16


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
