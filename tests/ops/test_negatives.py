"""The log-sum-exp over negatives equals its formula, and loses nothing where negatives are faint."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import check_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import Tensor

from coloss.ops import negative_logsumexp
from coloss.ops.distributed import rank, world_size


def by_formula(queries, keys, temperature, query_ids, key_ids):
    scores = queries.numpy() @ keys.numpy().T / temperature.numpy()[:, None]
    kept = [scores[i, key_ids.numpy() != query_ids[i].item()] for i in range(len(queries))]
    return [np.log(np.exp(row).sum()) if len(row) else -math.inf for row in kept], [len(row) for row in kept]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([None, 2]))
def test_equals_the_formula_for_any_ids(count, others, seed, chunk_size):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    keys = torch.randn(others, 3, dtype=torch.float64, generator=generator)
    temperature = 0.1 + torch.rand(count, dtype=torch.float64, generator=generator)
    query_ids, key_ids = (torch.randint(-2, 3, (n,), generator=generator) for n in (count, others))
    logs, counts = negative_logsumexp(
        queries, keys, temperature, query_ids=query_ids, key_ids=key_ids, chunk_size=chunk_size
    )
    expected, sizes = by_formula(queries, keys, temperature, query_ids, key_ids)
    torch.testing.assert_close(logs, torch.tensor(expected, dtype=torch.float64))
    assert counts.tolist() == sizes


def test_gradients_of_embeddings_and_of_each_temperature():
    queries, keys = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    temperature = (0.5 + torch.rand(4, dtype=torch.float64)).requires_grad_()
    ids = {"query_ids": torch.tensor([0, 1, 2, 2]), "key_ids": torch.tensor([0, 1, 2, 3, 3])}
    assert torch.autograd.gradcheck(
        lambda *parts: negative_logsumexp(*parts, **ids)[0], (queries, keys, temperature)
    )


def test_faint_negatives_are_not_lost_beside_the_positive():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    logs, _ = negative_logsumexp(rows, rows, 0.005, query_ids=torch.arange(2), key_ids=torch.arange(2))
    torch.testing.assert_close(logs, torch.tensor([-200.0, -200.0]))


def test_a_query_without_negatives_is_minus_infinity_without_gradient():
    rows = torch.randn(3, 2, requires_grad=True)
    same = torch.zeros(3, dtype=torch.int64)
    logs, count = negative_logsumexp(rows, rows, 0.1, query_ids=same, key_ids=same)
    assert logs.tolist() == [-math.inf] * 3 and count.tolist() == [0] * 3
    (gradient,) = torch.autograd.grad(logs.sum(), rows)
    assert gradient.abs().sum() == 0


def test_keys_of_all_processes_are_negatives(tmp_path: Path):
    rows = torch.randn(8, 3, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2, 3, 0, 1, 6, 7])

    def work(fabric: Fabric) -> dict[str, Tensor]:
        own = slice(rank(), None, world_size())
        leaf = rows[own].clone().requires_grad_()
        logs, count = negative_logsumexp(leaf, leaf, 0.3, query_ids=ids[own], key_ids=ids[own])
        (gradient,) = torch.autograd.grad(logs.sum(), leaf)
        whole = torch.zeros(8, 5, dtype=torch.float64)
        whole[own] = torch.cat([logs.detach()[:, None], count[:, None], gradient], 1)
        if world_size() > 1:
            torch.distributed.all_reduce(whole)
        return {"found": whole}

    check_two_processes(work, tmp_path)


def test_bad_input_is_named(as_users_call):
    rows, ids = torch.randn(3, 2), torch.arange(3)
    for arguments, message in (
        ({"keys": torch.randn(3, 4)}, "keys must have width 2, got 4"),
        ({"query_ids": ids[:2]}, r"query_ids must have shape \(3,\), got \(2,\)"),
        ({"key_ids": ids[:2]}, r"key_ids must have shape \(3,\), got \(2,\)"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    ):
        given_ones = {"keys": rows, "temperature": 1.0, "query_ids": ids, "key_ids": ids} | arguments
        with pytest.raises(ValueError, match=message):
            negative_logsumexp(rows, **given_ones)
