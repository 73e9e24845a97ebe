"""The distillation benchmark at tiny sizes: both ways are one loss, and every row is whole. No test looks at a time."""

import json

import pytest
import torch

from coloss.lab.benchmarks import distillation
from coloss.lab.benchmarks.measure import cost_here


def test_the_rows_are_whole_and_the_limits_where_they_belong(monkeypatch):
    monkeypatch.setattr(distillation, "cost_in_fresh_process", cost_here)
    rows = distillation.measure(vocabulary=20, rows=4, calls=1, rounds=2)
    assert [row.case for row in rows if row.limit is not None] == [
        "KL: two softmaxes / one pass",
        "KL: memory saved",
        "decoupled: two softmaxes / one pass",
        "decoupled: memory saved",
    ]
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


@pytest.mark.parametrize("loss", ["KL", "decoupled"])
def test_both_ways_are_one_loss(loss):
    student, teacher = torch.randn(2, 6, 30, dtype=torch.float64)
    targets = torch.arange(6)
    student.requires_grad_()
    ways = [
        distillation.LOSSES[loss, way](student, teacher, targets)
        for way in (distillation.ONE_PASS, distillation.USUAL)
    ]
    torch.testing.assert_close(*ways)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in ways))
