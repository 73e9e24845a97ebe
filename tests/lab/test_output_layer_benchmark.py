"""The output-layer benchmark at tiny sizes: both layers do equal work, and every row is whole. No test looks at a time."""

import json
import math

import pytest
import torch

from coloss.classification import z_loss
from coloss.lab.benchmarks import output_layer


def test_the_rows_are_whole_and_the_limits_where_they_belong():
    shares = []
    threads = torch.get_num_threads()
    rows = output_layer.measure(shares.append, classes=(20, 100_000), features=2, batch=4, rounds=1)
    assert torch.get_num_threads() == threads
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert [row.case for row in rows] == [
        "factored, 20 classes",
        "dense, 20 classes",
        "factored, 100,000 classes",
        "dense, 100,000 classes",
        "dense / factored, 20 classes",
        "dense / factored, 100,000 classes",
        "factored, 100,000 / 20 classes",
    ]
    assert all(row.value is not None and math.isfinite(row.value) and row.value > 0 for row in rows)
    assert [(row.limit, row.at_least) for row in rows[-2:]] == [(100.0, True), (2.0, False)]
    assert [row.limit for row in rows[:-2]] == [None] * 5
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def test_both_layers_train_the_same_weights_on_the_same_batch():
    hidden, target = output_layer._batch(50, 4, 8)
    again = output_layer._batch(50, 4, 8)
    assert torch.equal(hidden, again[0]) and torch.equal(target, again[1])
    assert torch.equal(output_layer._linear(50, 4).weight, output_layer._linear(50, 4).weight)


def test_a_step_of_either_lowers_its_loss(monkeypatch):
    made = []
    original = output_layer.FactoredSphericalLinear.from_linear
    monkeypatch.setattr(
        output_layer, "_linear", lambda *sizes: made.append(torch.nn.Linear(4, 50)) or made[-1]
    )
    monkeypatch.setattr(
        output_layer.FactoredSphericalLinear,
        "from_linear",
        lambda *given: made.append(original(*given)) or made[-1],
    )
    hidden, target = output_layer._batch(50, 4, 8)
    output_layer.dense_step(50, 4, 8)()
    output_layer.factored_step(50, 4, 8)()
    dense, start, layer = made
    assert z_loss(layer.to_linear()(hidden), target) < z_loss(start(hidden), target)
    assert not torch.equal(dense.weight, start.weight)


def test_a_time_is_the_median_after_the_first(monkeypatch):
    marks = iter([(0.0, 0.0), (1.0, 0.5), (3.0, 1.5), (10.0, 1.6)])
    monkeypatch.setattr(output_layer, "now", lambda: next(marks))
    calls = []
    assert output_layer.timed(lambda: calls.append(1), 3) == pytest.approx((2000.0, 500.0))
    assert len(calls) == 4
