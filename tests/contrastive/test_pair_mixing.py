"""Mixes for each anchor: which examples, how similar, and that one formula serves mixes of embeddings and of anything else."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.contrastive import (
    PAIR_LOSSES,
    contrastive,
    find_pair_loss,
    metric_mix_loss,
    mixed_pair_loss,
    mixed_pairs,
    mixed_similarities,
    multi_similarity,
    utilization,
)
from coloss.ops import hardest_keys

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])


def rows_of(count: int = 8, width: int = 5, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=1).requires_grad_()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 100))
@settings(max_examples=25)
def test_each_negative_is_mixed_once_with_one_positive(labels, seed):
    labels = torch.tensor(labels)
    mixes = mixed_pairs(labels, generator=generator(seed))
    wanted = [
        (a, n)
        for a in range(len(labels))
        for n in range(len(labels))
        if labels[a] != labels[n] and (labels == labels[a]).sum() > 1
    ]
    assert list(zip(mixes.anchor.tolist(), mixes.second.tolist())) == wanted
    assert (labels[mixes.first] == labels[mixes.anchor]).all()
    assert (mixes.first != mixes.anchor).all()


def test_every_positive_is_drawn_equally_often():
    labels = torch.tensor([0] * 5 + [1] * 4000)
    mixes = mixed_pairs(labels, generator=generator())
    counts = torch.bincount(mixes.first[mixes.anchor == 2], minlength=5)[:5]
    assert counts[2] == 0
    assert counts[[0, 1, 3, 4]].float().std() < 100


def test_the_anchor_may_be_the_positive_itself():
    mixes = mixed_pairs(torch.tensor([4, 4, 9]), "anchor-neg")
    assert [part.tolist() for part in mixes] == [[0, 1, 2, 2], [0, 1, 2, 2], [2, 2, 0, 1]]


def test_the_hardest_negatives_are_the_most_similar_and_indices_are_those_of_the_batch():
    rows = rows_of().detach()
    chosen = hardest_keys(rows, rows, 2, ids=(LABELS, LABELS))[1]
    mixes = mixed_pairs(LABELS, "anchor-neg", negatives=chosen)
    for a in range(8):
        scores = (rows @ rows[a]).masked_fill(LABELS[a] == LABELS, -2.0)
        assert set(mixes.second[mixes.anchor == a].tolist()) == set(scores.topk(2).indices.tolist())


def test_proxies_as_anchors_take_any_example_of_their_class_and_are_not_mixed(as_users_call):
    mixes = mixed_pairs(torch.tensor([0, 1]), proxy_labels=torch.arange(3))
    assert [part.tolist() for part in mixes] == [[0, 1], [0, 1], [1, 0]]
    with pytest.raises(ValueError, match="got the kind anchor-neg too"):
        mixed_pairs(LABELS, "anchor-neg", proxy_labels=torch.arange(3))


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [5]])
def test_batches_without_a_mix_cost_nothing(labels):
    labels, rows = torch.tensor(labels), rows_of(len(labels))
    mixes = mixed_pairs(labels)
    assert len(mixes.anchor) == 0
    loss = metric_mix_loss(rows, labels, contrastive(), 0.3)
    assert loss == 0 and torch.autograd.grad(loss, rows)[0].eq(0).all()


@given(st.floats(0, 1), st.integers(0, 50))
@settings(max_examples=15)
def test_similarities_are_those_of_the_mixed_vectors(weight, seed):
    leaf = rows_of(seed=seed)
    rows = F.normalize(leaf, dim=1)
    mixes = mixed_pairs(LABELS, generator=generator(seed))
    made = F.normalize(weight * rows[mixes.first] + (1 - weight) * rows[mixes.second], dim=1)
    expected = (rows[mixes.anchor] * made).sum(1)
    for kept in (slice(None), slice(0, 3)):  # by the matrix of all products, and by the listed ones alone
        part = type(mixes)(*(side[kept] for side in mixes))
        found = mixed_similarities(rows, rows, part, weight)
        torch.testing.assert_close(found, expected[kept], rtol=1e-6, atol=1e-6)
        one, other = (
            torch.autograd.grad((value**2).sum(), leaf, retain_graph=True)[0]
            for value in (found, expected[kept])
        )
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_mix_without_normalisation_would_be_less_similar():
    mixes = mixed_pairs(torch.tensor([0, 1]), "anchor-neg")
    found = mixed_similarities(torch.eye(2), torch.eye(2), mixes, 0.5)
    assert found.tolist() == pytest.approx([0.5**0.5] * 2)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert mixed_similarities(opposite, opposite, mixes, 0.5).isfinite().all()


@pytest.mark.parametrize("name", ["contrastive", "multi-similarity", "lifted-structure"])
def test_weight_one_is_the_loss_of_the_positives_and_weight_zero_that_of_the_negatives(name):
    rows, labels, loss = rows_of(6), torch.tensor([0, 0, 1, 1, 2, 2]), find_pair_loss(name)
    scores = rows @ rows.T
    apart = labels[:, None] != labels
    # With two samples of a class the positive of each of its 4 negatives is the other one.
    positives = scores[torch.arange(6), torch.arange(6) ^ 1]
    anchor = torch.arange(6).repeat_interleave(4)
    for weight, values in ((1.0, positives.repeat_interleave(4)), (0.0, scores[apart])):
        expected = mixed_pair_loss(values, anchor, weight, loss)
        torch.testing.assert_close(metric_mix_loss(rows, labels, loss, weight), expected)
    negatives = metric_mix_loss(rows, labels, contrastive(), 0.0)
    torch.testing.assert_close(
        negatives, (scores[apart] - 0.5).relu().sum() / (scores[apart] > 0.5).sum().clamp(min=1)
    )


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("kind", ["pos-neg", "anchor-neg"])
@pytest.mark.parametrize("k_hard", [None, 2])
def test_mixes_made_elsewhere_cost_the_same(name, kind, k_hard):
    loss, rows = find_pair_loss(name), rows_of()
    proxies = rows_of(4, seed=1) if loss.proxies else None
    values = []
    unit = F.normalize(rows, dim=1)
    for mix in (None, lambda first, second: 0.3 * unit[first] + 0.7 * unit[second]):
        options = {"proxies": proxies, "k_hard": k_hard, "generator": generator(), "mix": mix}
        values.append(metric_mix_loss(2 * rows, LABELS, loss, 0.3, kind, **options))
    torch.testing.assert_close(*values)
    assert name == "lifted-structure" or values[0] != 0
    leaves = [rows] if proxies is None else [rows, proxies]
    for one, other in zip(*(torch.autograd.grad(value, leaves) for value in values)):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_proxies_are_never_mixed_and_every_proxy_judges_a_mix_of_nca():
    rows, proxies = torch.eye(3), torch.eye(3)
    loss = metric_mix_loss(rows, torch.arange(3), find_pair_loss("nca"), 0.5, proxies=proxies)
    # Similarity 1 / sqrt(2) with the two classes in the mix at weight 1/2 each, 0 with the third.
    half = torch.tensor(10 / 2**0.5).exp()
    torch.testing.assert_close(loss, -half.log() + (half + 1).log(), rtol=1e-4, atol=1e-6)


def test_slopes_are_those_of_differences():
    rows = rows_of()
    assert torch.autograd.gradcheck(
        lambda z: metric_mix_loss(z, LABELS, multi_similarity(2.0, 5.0), 0.4, generator=generator()), (rows,)
    )


def test_half_precision_stays_finite():
    rows = (100 * rows_of().detach()).bfloat16().requires_grad_()
    loss = metric_mix_loss(rows, LABELS, multi_similarity(50.0, 75.0), 0.5)
    (slope,) = torch.autograd.grad(loss, rows)
    assert loss.dtype == torch.float32 and loss.isfinite() and slope.isfinite().all()


def test_utilization_is_zero_of_a_set_with_itself_and_the_mean_squared_distance_else():
    queries, base = rows_of(9, seed=1).detach(), rows_of(20, seed=2).detach()
    assert utilization(base, base) == 0
    assert utilization(3 * queries, base) == pytest.approx(
        (torch.cdist(queries, base) ** 2).min(1).values.mean().item()
    )
    assert utilization(queries, torch.cat([base, queries[:4]])) < utilization(queries, base)
    far = utilization(3 * queries, base, normalize=False)
    assert far == pytest.approx((torch.cdist(3 * queries, base) ** 2).min(1).values.mean().item())


def test_bad_input_is_named(as_users_call):
    rows = rows_of()
    for call, message in (
        (lambda: mixed_pairs(LABELS, "neg-neg"), "kind must be"),
        (lambda: mixed_pairs(LABELS, negatives=torch.zeros(3, 1, dtype=torch.int64)), "must have 8 rows"),
        (lambda: metric_mix_loss(rows, LABELS, contrastive(), 1.5), r"weight must be in \[0, 1\], got 1.5"),
        (lambda: metric_mix_loss(rows, LABELS, contrastive(), 0.5, k_hard=0), "k_hard must be >= 1, got 0"),
        (lambda: metric_mix_loss(rows, LABELS, find_pair_loss("nca"), 0.5), "nca needs proxies, got none"),
        (lambda: utilization(rows[:0], rows), "queries and base must have rows, got 0 and 8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
