"""Facts about losses of pairs and triplets: plain sums over all of them, in double precision, for any tile."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import pair_margin_loss, pairwise_logistic_loss, sigmoid_pair_loss, triplet_margin_loss

TILES = st.one_of(st.none(), st.integers(1, 20))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))


def assert_equal_with_gradients(value, plain, *leaves):
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(plain, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 8), st.integers(0, 5), TILES, st.floats(-2, 1.5), st.booleans(), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_sigmoid_loss_equals_the_logistic_cost_of_each_pair(count, extra, tile, power, with_ids, seed):
    temperature = 10.0**power
    q, k = (
        randn(count, 3, seed=seed).requires_grad_(),
        randn(count + extra, 3, seed=seed + 1).requires_grad_(),
    )
    q_ids, k_ids = labels_of(count, seed), labels_of(count + extra, seed + 1)
    belong = q_ids.unsqueeze(1) == k_ids if with_ids else torch.eye(count, count + extra, dtype=torch.bool)
    value = sigmoid_pair_loss(
        q, k, temperature, -2.0, ids=(q_ids, k_ids) if with_ids else None, chunk_size=tile
    )
    plain = -F.logsigmoid(torch.where(belong, 1, -1) * (q @ k.T / temperature - 2.0)).sum() / count
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-10)
    assert_equal_with_gradients(value / (1 + 1 / temperature), plain / (1 + 1 / temperature), q, k)


@given(st.integers(1, 10), TILES, st.sampled_from([1, 2]), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_margin_loss_averages_over_the_pairs_that_cost(count, tile, power, seed):
    z, labels = F.normalize(randn(count, 3, seed=seed)).requires_grad_(), labels_of(count, seed)
    value = pair_margin_loss(z, labels, 0.9, 0.2, power=power, chunk_size=tile)
    scores, others = z @ z.T, ~torch.eye(count, dtype=torch.bool)
    same = labels.unsqueeze(1) == labels
    plain = (z * 0).sum()
    for kind, hinge in ((same & others, F.relu(0.9 - scores)), (~same, F.relu(scores - 0.2))):
        costly = hinge[kind & (hinge > 0)]
        plain = plain + (costly**power).mean() if len(costly) else plain
    assert_equal_with_gradients(value, plain, z)


def plain_triplets(z, labels, margin, distance, mining):
    """Hinges of the chosen triplets, one by one."""
    squared = (z.unsqueeze(1) - z).square().sum(-1)
    d = {"squared": squared, "cosine": 1 - z @ z.T, "euclidean": (squared + 1e-300).sqrt()}[distance]
    hinges = []
    everyone = range(len(z))
    for a in everyone:
        positives = [p for p in everyone if p != a and labels[p] == labels[a]]
        negatives = [n for n in everyone if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        triplets = list(itertools.product(positives, negatives))
        if mining == "hard":
            triplets = [
                (max(positives, key=lambda p: d[a, p].item()), min(negatives, key=lambda n: d[a, n].item()))
            ]
        if mining == "semi-hard":
            beyond = {p: [n for n in negatives if d[a, n] > d[a, p]] for p in positives}
            triplets = [(p, min(far, key=lambda n: d[a, n].item())) for p, far in beyond.items() if far]
        hinges += [F.relu(d[a, p] - d[a, n] + margin) for p, n in triplets]
    return torch.stack(hinges) if hinges else (z * 0).sum(1)[:0]


@pytest.mark.parametrize("mining", ["hard", "semi-hard", "all"])
@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@given(st.integers(1, 9), TILES, st.integers(0, 100))
@settings(max_examples=12, deadline=None)
def test_triplets_equal_those_listed_one_by_one(mining, distance, count, tile, seed):
    z, labels = F.normalize(randn(count, 4, seed=seed)).requires_grad_(), labels_of(count, seed)
    options = {"mining": mining, "distance": distance, "chunk_size": tile}
    hinges = plain_triplets(z, labels, 0.3, distance, mining)
    value = triplet_margin_loss(z, labels, 0.3, **options)
    assert_equal_with_gradients(value, hinges.sum() / max(len(hinges), 1) + (z * 0).sum(), z)
    torch.testing.assert_close(triplet_margin_loss(z, labels, 0.3, reduction="sum", **options), hinges.sum())
    costly = hinges[hinges > 0]
    torch.testing.assert_close(
        triplet_margin_loss(z, labels, 0.3, reduction="mean-active", **options),
        costly.sum() / max(len(costly), 1),
    )


def test_hard_triplets_are_the_cold_limit_of_info_nce():
    """tau times InfoNCE tends to the margin-0 hardest-negative triplet of similarities."""
    from coloss.ops import supervised_contrastive_loss

    z, labels = F.normalize(randn(8, 4)), torch.arange(8) % 4  # one positive each
    hard = triplet_margin_loss(z, labels, 0.0, distance="cosine")
    cold = 1e-3 * supervised_contrastive_loss(z, labels, 1e-3)
    assert cold.item() == pytest.approx(hard.item(), abs=2e-3)


def test_samples_at_one_place_have_no_distance_and_no_gradient():
    z = torch.ones(6, 3, requires_grad=True)
    value = triplet_margin_loss(z, torch.tensor([0, 0, 0, 1, 1, 1]), 0.5)
    value.backward()
    assert value.item() == pytest.approx(0.5)
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_scores_with_a_common_offset_keep_their_digits():
    p, n = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.5, 2.5])
    near = pairwise_logistic_loss(p, n, 0.1)
    torch.testing.assert_close(pairwise_logistic_loss(p + 4096, n + 4096, 0.1), near, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: sigmoid_pair_loss(x[:4], x[4:], t, t - 2, chunk_size=2),
        lambda x, t: pairwise_logistic_loss(x[:, 0], x[:, 1], t, chunk_size=3),
    ],
    ids=["sigmoid", "pairwise-logistic"],
)
def test_temperature_and_bias_can_be_learned(loss):
    assert torch.autograd.gradcheck(
        loss, (randn(8, 3).requires_grad_(), torch.tensor(0.7).double().requires_grad_())
    )


@pytest.mark.parametrize("mining", ["hard", "semi-hard", "all"])
def test_memory_is_that_of_a_few_anchors(mining, largest_tensor):
    x = torch.randn(200, 4, requires_grad=True)
    with largest_tensor() as meter:
        triplet_margin_loss(x, torch.arange(200) // 4, mining=mining, chunk_size=8).backward()
    assert meter.numel <= 8 * 201
    with largest_tensor() as meter:
        pair_margin_loss(x, torch.arange(200) // 4, chunk_size=16).backward()
        sigmoid_pair_loss(x, x, chunk_size=16).backward()
    assert meter.numel <= 200 * 5


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sigmoid_pair_loss(x, x[:3]), "keys must have at least 4 rows of width 3"),
        (
            lambda x: sigmoid_pair_loss(x, x, reduction="none"),
            'reduction must be "mean" or "sum", got \'none\'',
        ),
        (
            lambda x: sigmoid_pair_loss(x, x, ids=(torch.arange(3), torch.arange(4))),
            r"ids must have shapes \(4,\) and \(4,\), got \(3,\) and \(4,\)",
        ),
        (lambda x: pair_margin_loss(x, torch.arange(4), power=3), "power must be 1 or 2, got 3"),
        (lambda x: pair_margin_loss(x, torch.arange(5)), r"labels must have shape \(4,\), got \(5,\)"),
        (
            lambda x: triplet_margin_loss(x, torch.arange(4), mining="easy"),
            "mining must be one of hard, semi-hard, all, got 'easy'",
        ),
        (lambda x: triplet_margin_loss(x, torch.arange(4), float("nan")), "margin must be finite, got nan"),
        (lambda x: triplet_margin_loss(x, torch.arange(4), chunk_size=0), "chunk_size must be >= 1, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 3))
