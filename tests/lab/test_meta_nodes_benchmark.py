"""The meta-node benchmark at tiny sizes: the exact ways are one loss, and every row is whole. No test looks at a time."""

import json
import math

import pytest
import torch

from coloss.lab.benchmarks import meta_nodes
from coloss.lab.benchmarks.measure import cost_here


def test_the_rows_are_whole_and_the_limits_where_they_belong(monkeypatch):
    monkeypatch.setattr(meta_nodes, "cost_in_fresh_process", cost_here)
    shares = []
    rows = meta_nodes.measure(shares.append, nodes=(20, 40), largest_matrix=20, calls=1, rounds=2)
    assert shares[-1] == 1.0
    assert [row.case for row in rows if not row.case.startswith("  ")] == [
        "meta-nodes, 20 nodes",
        "exact, streamed, 20 nodes",
        "exact, all scores in memory, 20 nodes",
        "meta-nodes, 40 nodes",
        "exact, streamed, 40 nodes",
        "log time over log nodes: meta-nodes",
        "log time over log nodes: exact, streamed",
    ]
    assert all(row.value is not None and math.isfinite(row.value) for row in rows)
    assert [(row.limit, row.at_least) for row in rows[-2:]] == [(1.3, False), (1.5, True)]
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def test_the_exact_ways_are_one_loss_and_all_ways_have_a_gradient():
    embeddings = torch.randn(30, 10, dtype=torch.float64).float().requires_grad_()
    edges = torch.stack([torch.arange(30), (torch.arange(30) + 7) % 30])
    assignments = torch.arange(30) % meta_nodes.CLUSTERS
    losses = {way: loss(embeddings, edges, assignments) for way, loss in meta_nodes.WAYS.items()}
    slopes = {way: torch.autograd.grad(loss, embeddings)[0] for way, loss in losses.items()}
    torch.testing.assert_close(losses[meta_nodes.EXACT], losses[meta_nodes.MATRIX])
    torch.testing.assert_close(slopes[meta_nodes.EXACT], slopes[meta_nodes.MATRIX], rtol=1e-3, atol=1e-6)
    assert slopes[meta_nodes.META].abs().sum() > 0


def test_the_slope_is_the_exponent():
    assert meta_nodes.slope([100, 200, 800], [3.0, 6.0, 24.0]) == pytest.approx(1.0)
