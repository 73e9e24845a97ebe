"""Pair losses of labels between 0 and 1: the formula in NumPy, clean forms equal to the streaming losses and to pytorch-metric-learning."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.contrastive import (
    PAIR_LOSSES,
    PairLoss,
    contrastive,
    euclidean_contrastive,
    find_pair_loss,
    lifted_structure,
    mean_pair_loss,
    multi_similarity,
    nca,
    pair_loss,
    proxy_anchor,
)
from coloss.errors import InputError
from coloss.ops import multi_similarity_loss, pair_margin_loss, proxy_anchor_loss

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])

PLAIN = {
    "contrastive": (lambda s: 1 - s, lambda s: max(s - 0.5, 0), None, None, None),
    "euclidean-contrastive": (
        lambda s: math.sqrt(2 - 2 * s),
        lambda s: max(0.5 - math.sqrt(2 - 2 * s), 0),
        None,
        None,
        None,
    ),
    "multi-similarity": (
        lambda s: math.exp(-2 * (s - 0.5)),
        lambda s: math.exp(50 * (s - 0.5)),
        lambda u: math.log(1 + u) / 2,
        lambda u: math.log(1 + u) / 50,
        None,
    ),
    "proxy-anchor": (
        lambda s: math.exp(-32 * (s - 0.1)),
        lambda s: math.exp(32 * (s + 0.1)),
        math.log1p,
        math.log1p,
        None,
    ),
    "nca": (lambda s: math.exp(10 * s), lambda s: math.exp(10 * s), lambda u: -math.log(u), math.log, None),
    "lifted-structure": (
        lambda s: math.exp(-s),
        lambda s: math.exp(s - 1),
        math.log,
        math.log,
        lambda x: max(x, 0),
    ),
}


def rows_of(count: int = 8, width: int = 5, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.requires_grad_()


def square(rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Similarities, labels and mask of all pairs of different samples."""
    unit = F.normalize(rows, dim=1)
    alike = (labels[:, None] == labels).to(rows.dtype)
    return unit @ unit.T, alike, ~torch.eye(len(rows), dtype=torch.bool)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_equals_the_formula_for_real_labels(name, seed):
    rng = np.random.default_rng(seed)
    s, y, mask = (
        rng.uniform(-0.99, 0.99, (3, 4)),
        rng.choice([0, 0.3, 0.7, 1], (3, 4)),
        rng.random((3, 4)) < 0.7,
    )
    found = pair_loss(*(torch.from_numpy(part) for part in (s, y, mask)), PAIR_LOSSES[name]())
    rho_pos, rho_neg, sigma_pos, sigma_neg, outer = PLAIN[name]
    for i in range(3):
        sides = 0.0
        for weight, rho, sigma in ((y, rho_pos, sigma_pos), (1 - y, rho_neg, sigma_neg)):
            listed = [weight[i, j] * rho(s[i, j]) for j in range(4) if mask[i, j] and weight[i, j] > 0]
            total = sum(listed)
            sides += (total if sigma is None else sigma(total)) if listed else 0.0
        assert found[i].item() == pytest.approx(sides if outer is None else outer(sides), rel=1e-9, abs=1e-12)


def test_clean_contrastive_is_the_margin_loss_of_the_core():
    rows = rows_of()
    scores, alike, mask = square(rows, LABELS)
    unit = F.normalize(rows, dim=1)
    total = pair_margin_loss(unit, LABELS, 1.0, 0.2, reduction="sum")
    torch.testing.assert_close(pair_loss(scores, alike, mask, contrastive(0.2)).sum(), total)
    mean = mean_pair_loss(scores, alike, mask, contrastive(0.2))
    torch.testing.assert_close(mean, pair_margin_loss(unit, LABELS, 1.0, 0.2))
    torch.testing.assert_close(mean, contrastive(0.2).clean(rows, LABELS))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_streaming_and_listed_scores_give_one_value_and_slope(name):
    loss, rows = find_pair_loss(name), rows_of()
    proxies = rows_of(5, seed=1) if loss.proxies else None
    leaves = [rows] if proxies is None else [rows, proxies]
    one, other = (
        loss.clean(rows, LABELS, proxies),
        loss._from_scores(
            F.normalize(rows, dim=1), LABELS, None if proxies is None else F.normalize(proxies, dim=1)
        ),
    )
    torch.testing.assert_close(one, other)
    for a, b in zip(torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves)):
        torch.testing.assert_close(a, b)


def test_multi_similarity_and_proxy_anchor_are_those_of_the_core():
    rows, proxies = rows_of(), rows_of(5, seed=1)
    scores, alike, mask = square(rows, LABELS)
    expected = multi_similarity_loss(F.normalize(rows, dim=1), LABELS, reduction="none")
    torch.testing.assert_close(pair_loss(scores, alike, mask, multi_similarity()), expected)
    unit, centres = F.normalize(rows, dim=1), F.normalize(proxies, dim=1)
    belongs = (torch.arange(5)[:, None] == LABELS).to(unit.dtype)
    found = mean_pair_loss(
        centres @ unit.T, belongs, torch.ones_like(belongs, dtype=torch.bool), proxy_anchor()
    )
    torch.testing.assert_close(found, proxy_anchor_loss(unit, LABELS, centres))


def test_values_are_those_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    rows = rows_of()
    cosine = {"distance": distances.CosineSimilarity()}
    for ours, theirs in (
        (contrastive(0.3), losses.ContrastiveLoss(pos_margin=1.0, neg_margin=0.3, **cosine)),
        (euclidean_contrastive(0.9), losses.ContrastiveLoss(pos_margin=0.0, neg_margin=0.9)),
        (multi_similarity(3.0, 40.0, 0.6), losses.MultiSimilarityLoss(3.0, 40.0, 0.6)),
        (
            lifted_structure(0.2),
            losses.GeneralizedLiftedStructureLoss(neg_margin=0.2, pos_margin=0.0, **cosine),
        ),
    ):
        value, peer = ours.clean(rows, LABELS), theirs(rows, LABELS)
        assert value.item() == pytest.approx(peer.item(), abs=1e-5)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, rows)[0] for loss in (value, peer)), atol=1e-6, rtol=1e-5
        )
    peer = losses.ProxyAnchorLoss(5, 5).double()
    found = proxy_anchor().clean(rows, LABELS, peer.proxies)
    assert found.item() == pytest.approx(peer(rows, LABELS).item(), rel=1e-6)


def test_nca_with_its_own_proxy_in_the_denominator_is_softmax_cross_entropy():
    rows, proxies = rows_of(), rows_of(5, seed=1)
    odds = nca(0.1).clean(rows, LABELS, proxies)
    logits = F.normalize(rows, dim=1) @ F.normalize(proxies, dim=1).T / 0.1
    log_odds = logits.log_softmax(1).gather(1, LABELS[:, None]).squeeze(1)
    torch.testing.assert_close(odds, -(log_odds - torch.log1p(-log_odds.exp())).mean())


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_the_slope_of_a_mix_changes_sign_at_the_threshold_of_the_paper(weight):
    # With sigma the identity over beta and gamma: log(1 + u) has slopes of its own, and moves the place.
    beta, gamma, margin = 2.0, 20.0, 0.4
    loss = PairLoss(
        "plain",
        lambda s: (-beta * (s - margin)).exp(),
        lambda s: (gamma * (s - margin)).exp(),
        lambda u: u / beta,
        lambda u: u / gamma,
    )
    place = margin + math.log(weight / (1 - weight)) / (beta + gamma)
    for shift, sign in ((-1e-4, -1), (1e-4, 1)):
        s = torch.tensor([[place + shift]], dtype=torch.float64, requires_grad=True)
        value = pair_loss(s, torch.tensor([[weight]]).double(), torch.tensor([[True]]), loss)
        (slope,) = torch.autograd.grad(value.sum(), s)
        assert math.copysign(1, slope.item()) == sign


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_large_scales_missing_sides_and_masked_nonsense_stay_finite(name):
    loss = multi_similarity(75, 75) if name == "multi-similarity" else find_pair_loss(name)
    s = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, math.nan], [0.0, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, math.nan], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    value = pair_loss(s, y, mask, loss)
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert value.isfinite().all() and value[2] == 0
    assert slope.isfinite().all() and slope[2].eq(0).all()
    assert mean_pair_loss(s[:0], y[:0], mask[:0], loss) == 0


def test_half_precision_is_raised():
    s = torch.rand(2, 3, dtype=torch.bfloat16)
    value = pair_loss(s, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), contrastive())
    assert value.dtype == torch.float32


def test_bad_input_is_named(as_users_call):
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\], got 1.5 to 1.5"):
        pair_loss(torch.zeros(1, 1), torch.full((1, 1), 1.5), mask, contrastive())
    with pytest.raises(ValueError, match="proxy_anchor needs proxies, got none"):
        proxy_anchor().clean(torch.eye(2), torch.arange(2))
    with pytest.raises(ValueError, match="contrastive takes no proxies, got some"):
        contrastive().clean(torch.eye(2), torch.arange(2), torch.eye(2))
    with pytest.raises(InputError, match="did you mean 'contrastive'"):
        find_pair_loss("contrastve")
    for options, message in (
        ({"mean_over": "pairs"}, 'mean_over must be "anchors", "sides" or "active pairs", got \'pairs\''),
        ({"proxies": "all"}, "proxies must be"),
        ({"mean_over": "active pairs", "outer": torch.relu}, "is for sums of costs"),
    ):
        with pytest.raises(ValueError, match=message):
            PairLoss("x", torch.neg, torch.relu, **options)
