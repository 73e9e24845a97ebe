"""The loss: limits, hand-worked values, invariances, a slow twin; and what it tells apart that InfoNCE does not."""

import inspect
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from coloss.retrieval import MannWhitneyLoss, mann_whitney_loss, pooled_auc

SCOPES = ("global", "query")
scopes = pytest.mark.parametrize("scope", SCOPES)


def problem(seed, queries=6, documents=9, dtype=torch.float64):
    """Scores with ties and masks of every kind: queries without positives, without negatives, with ignored pairs."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, documents, generator=generator, dtype=dtype)
    scores[scores.abs() < 0.3] = 0.0
    relevance = torch.rand(queries, documents, generator=generator) < 0.3
    relevance[0], relevance[1] = False, True
    return scores, relevance, torch.rand(queries, documents, generator=generator) < 0.2


def twin(scores, relevance, ignore, temperature, scope, reduction):
    """Pair by pair, in NumPy."""
    scores, relevance, ignore = (part.numpy() for part in (scores, relevance, ignore))
    pools = [(scores, relevance, ignore)] if scope == "global" else list(zip(scores, relevance, ignore))
    sums, means = [], []
    for s, relevant, left_out in pools:
        costs = [
            np.log1p(np.exp(-(p - n) / temperature))
            for p in s[relevant & ~left_out]
            for n in s[~relevant & ~left_out]
        ]
        if costs:
            sums.append(np.sum(costs))
            means.append(np.mean(costs))
    return np.sum(sums) if reduction == "sum" else np.mean(means)


@scopes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_equals_a_slow_twin(scope, reduction, temperature):
    for seed in range(3):
        scores, relevance, ignore = problem(seed)
        found = mann_whitney_loss(
            scores, relevance, temperature=temperature, scope=scope, ignore=ignore, reduction=reduction
        )
        assert found.item() == pytest.approx(
            twin(scores, relevance, ignore, temperature, scope, reduction), rel=1e-12
        )


@scopes
def test_equal_scores_cost_log_2(scope):
    loss = mann_whitney_loss(torch.full((4, 7), 3.0), torch.eye(4, 7), scope=scope)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.001, 100))
def test_bounds_one_minus_auc_at_any_temperature(seed, temperature):
    scores, relevance, ignore = problem(seed)
    found = mann_whitney_loss(scores, relevance, temperature=temperature, ignore=ignore) / math.log(2)
    assert found >= 1 - pooled_auc(scores, relevance, ignore) - 1e-6
    of_rows = torch.stack([pooled_auc(*row) for row in zip(scores, relevance, ignore)])
    within = mann_whitney_loss(scores, relevance, temperature=temperature, ignore=ignore, scope="query")
    assert within / math.log(2) >= 1 - of_rows[~of_rows.isnan()].mean() - 1e-6


def test_one_negative_per_query_is_info_nce_over_two_candidates():
    scores = torch.randn(8, 2, dtype=torch.float64)
    found = mann_whitney_loss(
        scores, torch.eye(8, 2) * 0 + torch.tensor([1, 0]), temperature=1.0, scope="query"
    )
    torch.testing.assert_close(found, F.cross_entropy(scores, torch.zeros(8, dtype=torch.int64)))


def test_a_shift_of_all_scores_changes_nothing_a_shift_of_one_query_does():
    scores, relevance, ignore = problem(4)
    shift = torch.randn(6, 1, dtype=torch.float64)
    for scope in SCOPES:

        def loss(s, scope=scope):
            return mann_whitney_loss(s, relevance, scope=scope, ignore=ignore).item()

        assert loss(scores + 17) == pytest.approx(loss(scores), rel=1e-9)
        if scope == "query":
            assert loss(scores + shift) == pytest.approx(loss(scores), rel=1e-9)
        else:
            assert abs(loss(scores + shift) - loss(scores)) > 0.1


def test_sees_the_query_offsets_that_info_nce_does_not():
    generator = torch.Generator().manual_seed(0)
    scores = torch.eye(40, dtype=torch.float64) + 0.2 * torch.randn(
        40, 40, generator=generator, dtype=torch.float64
    )
    shifted = scores + torch.randn(40, 1, generator=generator, dtype=torch.float64)
    own, relevance = torch.arange(40), torch.eye(40)
    assert F.cross_entropy(shifted / 0.1, own).item() == pytest.approx(
        F.cross_entropy(scores / 0.1, own).item(), abs=1e-9
    )
    assert pooled_auc(shifted, relevance) < pooled_auc(scores, relevance) - 0.1
    assert mann_whitney_loss(shifted, relevance) > mann_whitney_loss(scores, relevance) + 1


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_at_small_temperature_counts_the_u_statistic(seed):
    scores, relevance, ignore = problem(seed)
    scores, temperature = scores.requires_grad_(), 1e-6
    mann_whitney_loss(scores, relevance, temperature=temperature, ignore=ignore, reduction="sum").backward()
    positive, negative = relevance & ~ignore, ~relevance & ~ignore
    lost = -temperature * scores.grad[positive].sum()
    pools = scores.detach()[positive], scores.detach()[negative]
    u = scipy.stats.mannwhitneyu(*(pool.numpy() for pool in pools)).statistic
    assert len(pools[0]) * len(pools[1]) - lost.item() == pytest.approx(u, abs=1e-6)
    assert scores.grad.sum().item() * temperature == pytest.approx(0, abs=1e-9)


@scopes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_finite_differences(scope, reduction):
    scores, relevance, ignore = problem(5)
    assert torch.autograd.gradcheck(
        lambda s: mann_whitney_loss(
            s, relevance, temperature=0.7, scope=scope, ignore=ignore, reduction=reduction, chunk_size=11
        ),
        scores.requires_grad_(),
        fast_mode=True,
    )


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 80), st.sampled_from(SCOPES))
def test_any_chunking_gives_the_same_value_and_gradient(chunk_size, scope):
    scores, relevance, ignore = problem(6)
    results = []
    for size in (chunk_size, 10**6):
        leaf = scores.clone().requires_grad_()
        loss = mann_whitney_loss(leaf, relevance, scope=scope, ignore=ignore, chunk_size=size)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(SCOPES))
def test_the_order_of_queries_and_documents_does_not_matter(seed, scope):
    scores, relevance, ignore = problem(seed)
    rows, columns = torch.randperm(6), torch.randperm(9)
    shuffled = [part[rows][:, columns] for part in (scores, relevance, ignore)]
    first, second = (
        mann_whitney_loss(s, r, scope=scope, ignore=i).item()
        for s, r, i in ((scores, relevance, ignore), shuffled)
    )
    assert first == pytest.approx(second, rel=1e-9)


@scopes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ignored_pairs_take_no_part_whatever_their_score(scope, value):
    scores, relevance, ignore = problem(7)
    expected = mann_whitney_loss(scores, relevance, scope=scope, ignore=ignore)
    spoilt = scores.masked_fill(ignore, value).requires_grad_()
    found = mann_whitney_loss(spoilt, relevance, scope=scope, ignore=ignore)
    found.backward()
    torch.testing.assert_close(found, expected)
    assert spoilt.grad.isfinite().all() and not spoilt.grad[ignore].any()


@scopes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "relevance", [torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(0, 4), torch.zeros(3, 0), torch.ones(1, 1)]
)
@pytest.mark.parametrize("num_negatives", [None, 2])
def test_nothing_to_compare_is_zero_with_a_zero_gradient(scope, reduction, relevance, num_negatives):
    scores = torch.randn(relevance.shape, requires_grad=True)
    loss = mann_whitney_loss(scores, relevance, scope=scope, reduction=reduction, num_negatives=num_negatives)
    loss.backward()
    assert loss == 0 and scores.grad is not None and not scores.grad.any()


@scopes
def test_scores_far_apart_neither_overflow_nor_vanish(scope):
    scores = torch.tensor([[-5000.0, 5000.0]], requires_grad=True)
    loss = mann_whitney_loss(scores, torch.tensor([[1, 0]]), temperature=0.1, scope=scope)
    loss.backward()
    assert loss.item() == pytest.approx(1e5)
    torch.testing.assert_close(scores.grad, torch.tensor([[-10.0, 10.0]]))


@scopes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_compared_in_float32(scope, dtype):
    scores = torch.randn(6, 9).to(dtype)
    found = mann_whitney_loss(scores, torch.eye(6, 9), scope=scope)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mann_whitney_loss(scores.float(), torch.eye(6, 9), scope=scope))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mann_whitney_loss(scores, torch.eye(6, 9), scope=scope), found)


@scopes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_drawn_negatives_estimate_the_loss_without_bias(scope, reduction):
    scores, relevance, ignore = problem(8)
    options = {"scope": scope, "ignore": ignore, "reduction": reduction, "temperature": 1.0}
    exact = mann_whitney_loss(scores, relevance, **options).item()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            mann_whitney_loss(scores, relevance, num_negatives=2, generator=generator, **options)
            for _ in range(150)
        ]
    )
    assert draws.std() > 0.01 * exact
    assert abs(draws.mean().item() - exact) < 4 * draws.std().item() / math.sqrt(150)
    everything = mann_whitney_loss(scores, relevance, num_negatives=1000, **options)
    assert everything.item() == pytest.approx(exact, rel=1e-12)


@scopes
def test_the_generator_decides_the_draw(scope):
    scores, relevance, _ = problem(9)
    first, again, other = (
        mann_whitney_loss(
            scores, relevance, scope=scope, num_negatives=2, generator=torch.Generator().manual_seed(seed)
        ).item()
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_numbers_in_relevance_count_by_their_sign():
    scores, relevance, _ = problem(10)
    torch.testing.assert_close(
        mann_whitney_loss(scores, relevance * torch.rand(6, 9) - (~relevance).float()),
        mann_whitney_loss(scores, relevance),
    )


def test_the_module_is_the_function_and_belongs_to_a_batch():
    scores, relevance, ignore = problem(11)
    module = MannWhitneyLoss(temperature=0.3, scope="query", chunk_size=5, reduction="sum")
    torch.testing.assert_close(
        module(scores, relevance, ignore),
        mann_whitney_loss(scores, relevance, temperature=0.3, scope="query", ignore=ignore, reduction="sum"),
    )
    assert module.batch_statistic and not list(module.parameters())
    halves = [module(*(part[rows] for part in (scores, relevance))) for rows in (slice(0, 3), slice(3, 6))]
    assert sum(halves).item() == pytest.approx(
        module(scores, relevance).item()
    )  # rows are apart within queries
    pooled = MannWhitneyLoss(reduction="sum")
    halves = [pooled(*(part[rows] for part in (scores, relevance))) for rows in (slice(0, 3), slice(3, 6))]
    assert sum(halves) < pooled(scores, relevance) / 1.5  # pooled over queries they are not


@pytest.mark.parametrize(
    "option, message",
    [
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"temperature": math.nan}, "temperature must be > 0 and finite, got nan"),
        ({"num_negatives": 0}, "num_negatives must be >= 1, got 0"),
        ({"chunk_size": -1}, "chunk_size must be >= 1, got -1"),
        ({"scope": "batch"}, 'scope must be "global" or "query", got \'batch\''),
        ({"reduction": "none"}, "compares samples with each other, so no value belongs to one sample"),
        ({"reduction": "max"}, 'reduction must be "mean" or "sum", got \'max\''),
    ],
)
def test_bad_options_are_refused(option, message):
    loss, module = inspect.unwrap(mann_whitney_loss), inspect.unwrap(MannWhitneyLoss.__init__)
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(2, 2), torch.eye(2), **option)
    with pytest.raises(ValueError, match=message):
        module(MannWhitneyLoss.__new__(MannWhitneyLoss), **option)


def test_masks_of_another_shape_are_refused():
    loss, scores = inspect.unwrap(mann_whitney_loss), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"relevance must have the shape of scores \(2, 3\), got \(2, 2\)"):
        loss(scores, torch.eye(2))
    with pytest.raises(ValueError, match=r"ignore must have the shape of scores \(2, 3\), got \(3,\)"):
        loss(scores, torch.eye(2, 3), ignore=torch.zeros(3, dtype=torch.bool))
