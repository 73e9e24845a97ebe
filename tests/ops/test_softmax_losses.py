"""Facts about the streaming softmax losses: plain formulas in double precision, for any tile, temperature, mask and type."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import (
    decoupled_softmax_loss,
    info_nce_loss,
    soft_contrastive_loss,
    supervised_contrastive_loss,
)

TEMPERATURES = st.floats(-3, 3).map(lambda power: 10.0**power)
TILES = st.one_of(st.none(), st.integers(1, 20))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))


def assert_equal_with_gradients(value, plain, *leaves):
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(plain, leaves)):
        scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-9, atol=1e-9)


def plain_info_nce(scores: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    own = torch.eye(*scores.shape, dtype=torch.bool)
    return F.cross_entropy(scores.masked_fill(dropped & ~own, -math.inf), torch.arange(len(scores)))


def plain_supervised(anchors, around, labels, around_labels, temperature):
    """Pair by pair, straight from the equation."""
    others = ~torch.eye(len(anchors), len(around), dtype=torch.bool)
    scores = anchors @ around.T / temperature
    logs = scores.masked_fill(~others, -math.inf).log_softmax(1)
    positive = (labels.unsqueeze(1) == around_labels) & others
    with_positive = positive.any(1)
    each = -torch.where(positive, logs, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    return each[with_positive].mean() if with_positive.any() else (anchors * 0).sum()


@given(st.integers(1, 9), st.integers(0, 6), TILES, TEMPERATURES, st.booleans(), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_info_nce_with_ids_leaves_out_those_that_are_equal(count, extra, tile, temperature, symmetric, seed):
    q, k = (
        randn(count, 3, seed=seed).requires_grad_(),
        randn(count + extra, 3, seed=seed + 1).requires_grad_(),
    )
    ids = labels_of(count + extra, seed)
    value = info_nce_loss(q, k, temperature, symmetric=symmetric, ids=ids, chunk_size=tile)
    scores = q @ k.T / temperature
    dropped = ids[:count].unsqueeze(1) == ids
    plain = plain_info_nce(scores, dropped)
    if symmetric:
        plain = (plain + plain_info_nce(scores[:, :count].T, dropped[:, :count].T)) / 2
    assert_equal_with_gradients(value, plain, q, k)


@given(st.integers(1, 12), TILES, TEMPERATURES, st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_supervised_contrast_equals_the_sum_over_pairs(count, tile, temperature, seed):
    z, labels = randn(count, 3, seed=seed).requires_grad_(), labels_of(count, seed)
    value = supervised_contrastive_loss(z, labels, temperature, chunk_size=tile)
    assert_equal_with_gradients(value, plain_supervised(z, z, labels, labels, temperature), z)


@given(st.integers(1, 9), st.integers(0, 5), TILES, st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_references_are_positives_and_negatives_but_no_anchors(count, extra, tile, seed):
    z, queue = randn(count, 3, seed=seed).requires_grad_(), randn(extra, 3, seed=seed + 1).requires_grad_()
    labels, queue_labels = labels_of(count, seed), labels_of(extra, seed + 1)
    value = supervised_contrastive_loss(
        z, labels, 0.5, references=queue, reference_labels=queue_labels, chunk_size=tile
    )
    around, around_labels = torch.cat([z, queue]), torch.cat([labels, queue_labels])
    plain = plain_supervised(z, around, labels, around_labels, 0.5) + (queue * 0).sum()
    assert_equal_with_gradients(value, plain, z, queue)


@given(st.integers(1, 9), st.integers(1, 9), TILES, TEMPERATURES, st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_soft_targets_in_all_three_forms_are_one_cross_entropy(count, width, tile, temperature, seed):
    q, k = randn(count, 3, seed=seed).requires_grad_(), randn(width, 3, seed=seed + 1).requires_grad_()
    targets = randn(count, width, seed=seed + 2).softmax(1)
    forms = [targets, targets.to_sparse(), lambda i, j: targets[i, j]]
    for form in forms:
        value = soft_contrastive_loss(q, k, form, temperature, chunk_size=tile)
        plain = F.cross_entropy(q @ k.T / temperature, targets)
        assert_equal_with_gradients(value, plain, q, k)


def test_soft_targets_with_the_identity_are_info_nce():
    q, k = randn(6, 3), randn(6, 3, seed=1)
    torch.testing.assert_close(
        soft_contrastive_loss(q, k, lambda i, j: i == j, 0.2), info_nce_loss(q, k, 0.2), rtol=1e-12, atol=0
    )


def test_soft_targets_leave_out_pairs_of_equal_ids_and_rows_without_targets():
    q, k, ids = randn(4, 3), randn(4, 3, seed=1), torch.arange(4)
    targets = torch.zeros(4, 4, dtype=torch.float64)
    targets[0, 1], targets[2, 3] = 1.0, 2.0
    value = soft_contrastive_loss(q, k, targets, 1.0, ids=(ids, ids), reduction="none")
    logs = (q @ k.T).fill_diagonal_(-math.inf).log_softmax(1)
    torch.testing.assert_close(value, torch.stack([-logs[0, 1], 0 * value[0], -2 * logs[2, 3], 0 * value[0]]))


@given(st.integers(1, 7), st.integers(1, 9), TILES, TEMPERATURES, st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_decoupled_softmax_equals_a_softmax_for_each_positive(count, width, tile, temperature, seed):
    q, k = randn(count, 3, seed=seed).requires_grad_(), randn(width, 3, seed=seed + 1).requires_grad_()
    kind = torch.randint(4, (count, width), generator=torch.Generator().manual_seed(seed))
    positive, ignored = kind == 0, kind == 1
    weight = torch.rand(int(positive.sum()), generator=torch.Generator().manual_seed(seed)).double() + 0.1
    order = torch.randperm(
        len(weight), generator=torch.Generator().manual_seed(seed)
    )  # pairs come in any order
    value = decoupled_softmax_loss(
        q,
        k,
        positive.nonzero().T[:, order],
        temperature,
        weight=weight[order],
        ignore=ignored.nonzero().T,
        chunk_size=tile,
    )
    scores = q @ k.T / temperature
    rows = []
    for i in range(count):
        mine, weights = positive[i].nonzero().flatten(), weight[positive.nonzero()[:, 0] == i]
        if len(mine):
            negatives = scores[i][kind[i] > 1]
            terms = [
                torch.logsumexp(torch.cat([scores[i, p, None], negatives]), 0) - scores[i, p] for p in mine
            ]
            rows.append((weights * torch.stack(terms)).sum() / weights.sum())
    plain = torch.stack(rows).mean() if rows else (q * 0).sum() + (k * 0).sum()
    assert_equal_with_gradients(value, plain, q, k)


def test_decoupled_positives_are_never_pushed_away():
    scores = torch.tensor([[3.0, 0.0, 0.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    positives = torch.tensor([[0, 0, 0], [0, 1, 2]])
    x, y = torch.ones(1, 1, dtype=torch.float64), scores.T.clone().requires_grad_()
    (slope,) = torch.autograd.grad(3 * decoupled_softmax_loss(x, y, positives, 1.0), y)
    assert slope[0].item() == pytest.approx(-0.0521, abs=1e-4)  # with the usual softmax it is +1.5985
    usual = -3 * F.log_softmax(y.T, 1)[0, :3].mean()
    assert torch.autograd.grad(usual, y)[0][0].item() == pytest.approx(1.5985, abs=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        lambda q, k, t: info_nce_loss(q, k, t, chunk_size=3),
        lambda q, k, t: supervised_contrastive_loss(q, torch.tensor([0, 1, 0, 1, 2]), t, chunk_size=2),
        lambda q, k, t: soft_contrastive_loss(q, k, lambda i, j: (i + j) % 2 / 2.0, t, chunk_size=2),
        lambda q, k, t: decoupled_softmax_loss(q, k, torch.tensor([[4, 0, 0], [1, 3, 0]]), t, chunk_size=2),
    ],
    ids=["info-nce", "supervised", "soft", "decoupled"],
)
@pytest.mark.parametrize("temperature", [torch.tensor(0.4), torch.tensor([0.4, 0.1, 0.9, 2.0, 0.6])])
def test_gradients_reach_embeddings_and_learned_temperatures(loss, temperature):
    q, k = randn(5, 3).requires_grad_(), randn(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (q, k, temperature.double().requires_grad_()))


def test_one_value_for_each_query_averages_to_the_mean():
    q, k, labels = randn(5, 3), randn(5, 3, seed=1), torch.tensor([0, 1, 0, 1, 2])
    each = supervised_contrastive_loss(q, labels, reduction="none")
    assert each[4] == 0
    torch.testing.assert_close(each.sum() / 4, supervised_contrastive_loss(q, labels))
    torch.testing.assert_close(
        info_nce_loss(q, k, reduction="none").sum(), info_nce_loss(q, k, reduction="sum")
    )


@pytest.mark.parametrize("temperature", [1e-3, 0.07, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype, temperature):
    q, k = (F.normalize(randn(300, 16, seed=seed)).to(dtype) for seed in (0, 1))
    value = info_nce_loss(q, k, temperature, symmetric=True, chunk_size=64)
    exact = info_nce_loss(q.double(), k.double(), temperature, symmetric=True)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_scores_of_any_size_in_float32(scale):
    """Past the size where exponentials need a shift, values and gradients stay those of double precision."""
    q, k = (F.normalize(randn(70, 8, seed=seed)).float() for seed in (0, 1))
    leaves, wide = (
        (
            (scale * q).requires_grad_(),
            k.clone().requires_grad_(),
        ),
        ((scale * q).double().requires_grad_(), k.double().requires_grad_()),
    )
    value, exact = (info_nce_loss(*pair, 1.0, symmetric=True, chunk_size=16) for pair in (leaves, wide))
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(exact, wide)):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-5 * b.abs().max().item())


def test_one_sample_and_samples_without_positives_cost_nothing():
    for z, labels in ((randn(1, 3), [5]), (randn(3, 3), [0, 1, 2]), (randn(0, 3), [])):
        z = z.requires_grad_()
        value = supervised_contrastive_loss(z, torch.tensor(labels))
        value.backward()
        assert value == 0
        assert torch.equal(z.grad, torch.zeros_like(z))
    z = randn(2, 3).requires_grad_()
    value = decoupled_softmax_loss(z, z, torch.zeros(2, 0, dtype=torch.int64))
    value.backward()
    assert value == 0
    # A positive without negatives is certain.
    assert decoupled_softmax_loss(z, z[:1], torch.tensor([[0], [0]])) == 0


def test_ties_share_the_gradient():
    q, k = torch.ones(1, 1), torch.ones(4, 1, requires_grad=True)
    (slope,) = torch.autograd.grad(info_nce_loss(q, k, 1.0), k)
    torch.testing.assert_close(slope.flatten(), torch.tensor([-0.75, 0.25, 0.25, 0.25]))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: info_nce_loss(x, x, symmetric=True, chunk_size=16),
        lambda x: supervised_contrastive_loss(x, torch.arange(len(x)) // 4, chunk_size=16),
        lambda x: soft_contrastive_loss(x, x, lambda i, j: (i // 2 == j // 2) / 2.0, chunk_size=16),
        lambda x: decoupled_softmax_loss(x, x, torch.arange(len(x)).expand(2, -1), chunk_size=16),
    ],
    ids=["info-nce", "supervised", "soft", "decoupled"],
)
def test_no_score_matrix_exists(loss, largest_tensor):
    x = torch.randn(300, 4, requires_grad=True)
    with largest_tensor() as meter:
        loss(x).backward()
    assert meter.numel <= 300 * 4


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: info_nce_loss(x, x, torch.tensor(-1.0)), "temperature must be > 0, got -1.0"),
        (lambda x: info_nce_loss(x, x, torch.ones(3)), r"temperature must be a scalar or have shape \(4,\)"),
        (
            lambda x: info_nce_loss(x, x, torch.ones(4), symmetric=True),
            "temperature must be one number where symmetric=True",
        ),
        (lambda x: info_nce_loss(x, x, ids=torch.arange(3)), r"ids must have shape \(4,\), got \(3,\)"),
        (lambda x: info_nce_loss(x, x, reduction="max"), "reduction must be .* got 'max'"),
        (lambda x: supervised_contrastive_loss(x, torch.arange(3)), r"labels must have shape \(4,\)"),
        (
            lambda x: supervised_contrastive_loss(x, torch.arange(4), references=x),
            "references and reference_labels must be given together",
        ),
        (
            lambda x: soft_contrastive_loss(x, x, torch.eye(3)),
            r"targets must have shape \(4, 4\), got \(3, 3\)",
        ),
        (
            lambda x: soft_contrastive_loss(x, x, lambda i, j: i * 1.0),
            r"targets must give shape \(4, 4\) for a tile, got \(4, 1\)",
        ),
        (
            lambda x: decoupled_softmax_loss(x, x, torch.tensor([[0], [4]])),
            r"positives must hold key numbers in \[0, 4\), got 4",
        ),
        (
            lambda x: decoupled_softmax_loss(x, x, torch.tensor([[0], [1]]), weight=torch.ones(2)),
            r"weight must have shape \(1,\), got \(2,\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3))
