"""The loss equals its formula with the whole matrix, in value and gradient, in any tiles, over one process or two."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes

from coloss.ops import rank, sdm_loss, world_size
from coloss.ops.distribution_matching import softmax_negative_entropy
from coloss.ops.streaming import streaming_logsumexp


def problem(pairs=14, dim=5, identities=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, pairs, dim, generator=generator, dtype=torch.float64)
    return a, b, torch.randint(identities, (pairs,), generator=generator)


def twin(a, b, ids, tau, eps):
    """Jiang and Ye, with the label matrix divided by the sums of its own rows."""
    a, b = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (a.numpy(), b.numpy()))
    labels = (ids.numpy()[:, None] == ids.numpy()).astype(float)
    q = labels / labels.sum(1, keepdims=True)
    total = 0.0
    for scores in (a @ b.T / tau, b @ a.T / tau):
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        total += np.mean((p * (np.log(p) - np.log(q + eps))).sum(1))
    return total


@pytest.mark.parametrize("tau, eps", [(0.1, 1e-8), (1.0, 1e-3), (0.5, 1e-8)])
@pytest.mark.parametrize("identities", [1, 4, 100])
def test_equals_the_formula(tau, eps, identities):
    a, b, ids = problem(identities=identities)
    assert sdm_loss(a, b, ids, tau, eps).item() == pytest.approx(twin(a, b, ids, tau, eps), rel=1e-9)


def dense(a, b, ids, tau, eps):
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    same = (ids[:, None] == ids).double()
    log_q = torch.log(same / same.sum(1, keepdim=True) + eps)
    both = (a @ b.T / tau, b @ a.T / tau)
    return sum((z.softmax(1) * (z.log_softmax(1) - log_q)).sum(1).mean() for z in both)


@pytest.mark.parametrize("side", [None, 1, 5, 100])
def test_gradients_equal_those_of_the_whole_matrix_in_any_tiles(side):
    a, b, ids = problem()
    tau = torch.tensor(0.3, dtype=torch.float64)
    leaves = [part.clone().requires_grad_() for part in (a, b, tau)]
    others = [part.clone().requires_grad_() for part in (a, b, tau)]
    ours = sdm_loss(leaves[0], leaves[1], ids, leaves[2], chunk_size=side)
    theirs = dense(others[0], others[1], ids, others[2], 1e-8)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, others)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_gradcheck():
    a, b, ids = problem(pairs=5, dim=3, identities=2)
    assert torch.autograd.gradcheck(
        lambda x, y: sdm_loss(x, y, ids, 0.5, reduction="none"), (a.requires_grad_(), b.requires_grad_())
    )
    x, y = (part.detach().clone().requires_grad_() for part in (a, b))
    assert torch.autograd.gradcheck(
        lambda x, y: softmax_negative_entropy(x, y, streaming_logsumexp(x, y)[0]), (x, y)
    )


def test_equal_distributions_cost_nothing():
    vectors = torch.eye(3)[[0, 0, 1, 2, 2, 2]]
    assert sdm_loss(vectors, vectors, torch.tensor([0, 0, 1, 2, 2, 2])).item() == pytest.approx(0, abs=1e-5)


def test_each_leaked_probability_costs_about_log_of_one_over_eps():
    """Two identities, half of each row's mass at the other: KL = log(1/2) + (18.4 + 0) / 2 each way."""
    vectors = torch.ones(2, 3)
    expected = 2 * (math.log(0.5) + 0.5 * -math.log(1e-8))
    assert sdm_loss(vectors, vectors, torch.arange(2)).item() == pytest.approx(expected, rel=1e-5)


def test_it_is_not_cross_entropy_spreading_over_partners_is_not_asked_for():
    """All mass at one of two partners costs log 2; cross-entropy would be unbounded for sharp scores."""
    keys = torch.eye(2, dtype=torch.float64)
    ids = torch.zeros(2, dtype=torch.int64)
    assert sdm_loss(keys, keys, ids, 0.001).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert -(keys / 0.001).log_softmax(1).mean() > 100


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_small_eps(half):
    a, b, ids = problem()
    a, b = a.to(half).requires_grad_(), b.to(half)
    loss = sdm_loss(a, b, ids)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and a.grad.isfinite().all()
    torch.testing.assert_close(loss, sdm_loss(a.detach().float(), b.float(), ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sdm_loss(a.detach(), b, ids), loss.detach())


def test_one_pair_and_no_pair_cost_nothing():
    assert sdm_loss(torch.randn(1, 3), torch.randn(1, 3), torch.tensor([0])).item() == pytest.approx(
        0, abs=1e-5
    )
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = sdm_loss(empty, empty, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    a, b, ids = problem(pairs=4, identities=1)  # nothing to leak to
    a.requires_grad_()
    sdm_loss(a, b, ids).backward()
    assert a.grad.isfinite().all()


def test_the_smallest_temperature_stays_finite():
    a, b, ids = problem(pairs=6)
    a = a.float().requires_grad_()
    loss = sdm_loss(a, b.float(), ids, 1e-4)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all()


def test_reductions_agree():
    a, b, ids = problem()
    rows = sdm_loss(a, b, ids, reduction="none")
    assert rows.shape == (14,)
    torch.testing.assert_close(rows.sum(), sdm_loss(a, b, ids, reduction="sum"))
    torch.testing.assert_close(rows.mean(), sdm_loss(a, b, ids))


def _gradients(fabric):
    a, b, ids = problem()
    own = slice(0, 14) if world_size() == 1 else (slice(0, 5), slice(5, 14))[rank()]
    a, b = (part[own].clone().requires_grad_() for part in (a, b))
    loss = sdm_loss(a, b, ids[own], 0.2)
    loss.backward()
    found = [torch.zeros(14, 5, dtype=torch.float64) for _ in range(2)]
    for whole, part in zip(found, (a, b)):
        whole[own] = part.grad / world_size()
        if world_size() > 1:
            torch.distributed.all_reduce(whole)
    return {"loss": loss.detach(), "a": found[0], "b": found[1]}


def test_two_processes_give_the_loss_and_gradient_of_the_joined_batch(tmp_path):
    check_two_processes(_gradients, tmp_path)


def test_bad_input_is_named(as_users_call):
    a, b, ids = problem(pairs=4)
    for options, message in (
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"temperature": torch.ones(4)}, r"temperature must be one number, got shape \(4,\)"),
        ({"eps": 0.0}, "eps must be > 0 and finite, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
        ({"reduction": "max"}, "reduction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            sdm_loss(a, b, ids, **options)
    with pytest.raises(ValueError, match=r"keys must have shape \(4, 5\), got \(3, 5\)"):
        sdm_loss(a, b[:3], ids)
    with pytest.raises(ValueError, match=r"ids must have shape \(4,\), got \(3,\)"):
        sdm_loss(a, b, ids[:3])
