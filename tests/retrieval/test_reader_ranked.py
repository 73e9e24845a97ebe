"""Ranking documents by a reader's losses: values by hand, what leaves the loss alone, ties, bounds, draws."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from scipy.stats import kendalltau

from coloss.retrieval import best_documents, reader_agreement, reader_ranked_loss, sample_documents

INF = math.inf


def by_loops(scores: np.ndarray, losses: np.ndarray, margin: float = 0.0, tau: float = 1.0) -> float:
    """The pairwise form, pair by pair."""
    rows = []
    for c, cost in zip(scores / tau, losses, strict=True):
        pairs = []
        for i in range(len(c)):
            for j in range(i + 1, len(c)):
                if abs(cost[i] - cost[j]) < margin:
                    continue
                target = 0.5 if cost[i] == cost[j] else float(cost[i] < cost[j])
                chance = 1 / (1 + np.exp(-(c[i] - c[j])))
                pairs.append(-target * np.log(chance) - (1 - target) * np.log(1 - chance))
        rows.append(np.mean(pairs) if pairs else 0.0)
    return float(np.mean(rows))


def test_two_documents_cost_softplus_of_their_gap():
    """Unit check 1, with the divisor 1; the released divisor would be 2."""
    for first, second in ((2.0, 0.5), (-1.0, 3.0)):
        loss = reader_ranked_loss(torch.tensor([first, second]), torch.tensor([0.2, 0.9]))
        assert loss.item() == pytest.approx(math.log1p(math.exp(-(first - second))))


@pytest.mark.parametrize(("margin", "tau"), [(0.0, 1.0), (0.6, 1.0), (0.0, 0.3)])
def test_pair_by_pair_it_is_the_binary_cross_entropy(margin: float, tau: float):
    scores = torch.randn(5, 7, dtype=torch.float64)
    losses = torch.randn(5, 7, dtype=torch.float64).round(decimals=1).abs()
    losses[0, :3] = 0.4  # ties
    found = reader_ranked_loss(scores, losses, margin=margin, temperature=tau)
    assert found.item() == pytest.approx(by_loops(scores.numpy(), losses.numpy(), margin, tau))


def test_the_listwise_form_is_the_divergence_of_two_softmaxes():
    scores, losses = torch.randn(2, 4, 6, dtype=torch.float64)
    found = reader_ranked_loss(scores, losses, kind="listwise", temperature=0.5, reader_temperature=2.0)
    teacher, student = softmax(-losses.numpy() / 2, 1), softmax(scores.numpy() / 0.5, 1)
    assert found.item() == pytest.approx(rel_entr(teacher, student).sum(1).mean())
    agreeing = reader_ranked_loss(7 - losses, losses, kind="listwise")
    assert agreeing.item() == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_only_the_order_of_the_losses_counts_pairwise(seed: int):
    """Unit check 3, first half: any increasing transform."""
    generator = torch.Generator().manual_seed(seed)
    scores, losses = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    losses[:, 1] = losses[:, 0]
    plain = reader_ranked_loss(scores, losses)
    for transform in (torch.exp, lambda x: 1e6 * x - 5, lambda x: x**3, torch.tanh):
        assert reader_ranked_loss(scores, transform(losses)) == plain
    assert reader_ranked_loss(scores, 3 * losses, kind="listwise") != reader_ranked_loss(
        scores, losses, kind="listwise"
    )


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(["pairwise", "listwise"]))
def test_rescaled_scores_may_be_shifted_and_stretched(seed: int, kind: str):
    """Unit check 3, second half: each query by its own positive affine map."""
    generator = torch.Generator().manual_seed(seed)
    scores, losses = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    stretch = torch.rand(3, 1, generator=generator, dtype=torch.float64) + 0.1
    moved = scores * stretch + torch.randn(3, 1, generator=generator, dtype=torch.float64)
    plain, after = (reader_ranked_loss(s, losses, kind=kind, rescale="minmax") for s in (scores, moved))
    torch.testing.assert_close(after, plain)
    assert reader_ranked_loss(moved, losses, kind=kind) != reader_ranked_loss(scores, losses, kind=kind)


def test_a_right_order_costs_nothing_at_a_large_scale_but_not_when_rescaled():
    """Unit check 4, and the bound of min-max: softplus(-2) for the extreme pair, more for those between."""
    losses = torch.tensor([0.1, 0.5, 0.9])
    scores = torch.tensor([3.0, 2.0, 1.0])
    assert reader_ranked_loss(1000 * scores, losses) == 0.0
    bounded = reader_ranked_loss(1000 * scores, losses, rescale="minmax")
    expected = (math.log1p(math.exp(-2)) + 2 * math.log1p(math.exp(-1))) / 3
    assert bounded.item() == pytest.approx(expected)
    pair = reader_ranked_loss(1000 * scores[:2], losses[:2], rescale="minmax")
    assert pair.item() == pytest.approx(F.softplus(torch.tensor(-2.0)).item())
    # The way out for those who want the rescaling: a temperature.
    assert reader_ranked_loss(scores, losses, rescale="minmax", temperature=0.01) < 1e-6


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_no_rescaled_loss_is_below_the_bound(seed: int):
    generator = torch.Generator().manual_seed(seed)
    scores, losses = torch.randn(2, 4, 5, generator=generator) * 10
    assert reader_ranked_loss(scores, losses, rescale="minmax") >= F.softplus(torch.tensor(-2.0)) - 1e-6


def test_equal_scores_can_be_rescaled():
    """Trap: the published form divides by zero."""
    for documents in (1, 4):
        scores = torch.full((2, documents), 3.0, requires_grad=True)
        losses = torch.arange(2.0 * documents).view(2, documents)
        loss = reader_ranked_loss(scores, losses, rescale="minmax")
        assert loss.item() == pytest.approx(math.log(2) if documents > 1 else 0.0)
        assert not torch.autograd.grad(loss, scores)[0].any()
    sampled = sample_documents(torch.zeros(3, 4), 4, rescale="minmax")
    assert sampled.sort(1).values.tolist() == [[0, 1, 2, 3]] * 3


def test_the_gradient_passes_through_the_minimum_and_the_maximum():
    scores = torch.tensor([[0.3, -0.7, 1.9, 0.4]], dtype=torch.float64, requires_grad=True)
    losses = torch.tensor([[0.3, 0.1, 0.2, 0.9]], dtype=torch.float64)
    for kind in ("pairwise", "listwise"):
        for rescale in (None, "minmax"):
            assert torch.autograd.gradcheck(
                lambda s, k=kind, r=rescale: reader_ranked_loss(s, losses, kind=k, rescale=r), scores
            )
    gradient = torch.autograd.grad(reader_ranked_loss(scores, losses, rescale="minmax"), scores)[0]
    # Neither a shift nor a stretch changes the loss, so the gradient is at right angles to both.
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)
    assert (gradient * scores).sum().item() == pytest.approx(0, abs=1e-12)


def test_a_tie_asks_for_equal_scores_whichever_comes_first():
    """Trap: the released target of a tie is 0, so the first of the two should always lose."""
    scores = torch.tensor([1.5, 1.0], requires_grad=True)
    equal = torch.tensor([0.4, 0.4])
    loss = reader_ranked_loss(scores, equal)
    torch.testing.assert_close(loss, reader_ranked_loss(scores.flip(0), equal))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(0.5))) / 2)
    gradient = torch.autograd.grad(loss, scores)[0]
    assert gradient[0] > 0 > gradient[1]
    assert not torch.autograd.grad(
        reader_ranked_loss(torch.ones(2, requires_grad=True) * scores.mean(), equal), scores
    )[0].any()


def test_pairs_within_the_margin_do_not_count():
    scores = torch.tensor([0.0, 1.0, 2.0])
    losses = torch.tensor([0.30, 0.29, 0.9])
    found = reader_ranked_loss(scores, losses, margin=0.1)
    expected = (F.softplus(torch.tensor(2.0)) + F.softplus(torch.tensor(1.0))) / 2
    torch.testing.assert_close(found, expected)
    nothing = reader_ranked_loss(scores.requires_grad_(), losses, margin=10.0)
    assert nothing == 0.0 and not torch.autograd.grad(nothing, scores)[0].any()


def test_documents_to_ignore_may_hold_anything():
    scores, losses = torch.randn(2, 3, 4, dtype=torch.float64)
    more = torch.cat([scores, torch.tensor([[math.nan, INF]] * 3, dtype=torch.float64)], 1).requires_grad_()
    costs = torch.cat([losses, torch.tensor([[INF, math.nan]] * 3, dtype=torch.float64)], 1)
    ignore = torch.zeros(3, 6, dtype=torch.bool)
    ignore[:, 4:] = True
    for options in (
        {},
        {"kind": "listwise"},
        {"rescale": "minmax"},
        {"kind": "listwise", "rescale": "minmax"},
    ):
        found = reader_ranked_loss(more, costs, ignore=ignore, **options)
        torch.testing.assert_close(found, reader_ranked_loss(scores, losses, **options))
        gradient = torch.autograd.grad(found, more)[0]
        assert gradient.isfinite().all() and not gradient[:, 4:].any()
    torch.testing.assert_close(reader_agreement(more, costs, ignore=ignore), reader_agreement(scores, losses))
    drawn = sample_documents(more, 4, ignore=ignore)
    assert (drawn < 4).all()
    assert (best_documents(more, 2, ignore=ignore) == best_documents(scores, 2)).all()


def test_nothing_to_compare_is_zero():
    for kind in ("pairwise", "listwise"):
        for shape in ((0, 4), (3, 0), (3, 1)):
            scores = torch.randn(shape, requires_grad=True)
            loss = reader_ranked_loss(scores, torch.randn(shape), kind=kind, rescale="minmax")
            assert loss.item() == pytest.approx(0.0, abs=1e-7)
        hidden = torch.ones(2, 3, dtype=torch.bool)
        scores = torch.randn(2, 3, requires_grad=True)
        loss = reader_ranked_loss(scores, torch.randn(2, 3), kind=kind, ignore=hidden)
        assert loss == 0.0 and not torch.autograd.grad(loss, scores)[0].any()


def test_an_impossible_answer_is_the_worst_document():
    scores = torch.tensor([[0.0, 0.5, 1.0]], requires_grad=True)
    losses = torch.tensor([[0.1, INF, INF]])
    pairwise = reader_ranked_loss(scores, losses)
    softplus = F.softplus
    expected = (softplus(torch.tensor(0.5)) + softplus(torch.tensor(1.0)) + (softplus(torch.tensor(0.5)) + softplus(torch.tensor(-0.5))) / 2) / 3  # fmt: skip
    torch.testing.assert_close(pairwise.detach(), expected)
    # Listwise, documents of which nothing is known but that they cannot answer do not count.
    for kind in ("pairwise", "listwise"):
        for costs in (losses, torch.full((1, 3), INF)):
            loss = reader_ranked_loss(scores, costs, kind=kind)
            assert loss.isfinite() and torch.autograd.grad(loss, scores)[0].isfinite().all()


def test_no_gradient_reaches_the_reader():
    """Unit check 2, the function's half."""
    scores, losses = torch.randn(2, 3, 4, requires_grad=True)
    for kind in ("pairwise", "listwise"):
        loss = reader_ranked_loss(scores, losses, kind=kind)
        first, second = torch.autograd.grad(loss, (scores, losses), allow_unused=True)
        assert first.any() and second is None


def test_large_gaps_and_half_precision_are_finite():
    """Trap: log(sigmoid) and log(1 - sigmoid) overflow where softplus does not."""
    scores = torch.tensor([[0.0, 5000.0]], requires_grad=True)
    loss = reader_ranked_loss(scores, torch.tensor([[0.0, 1.0]]))
    assert loss.item() == 5000.0 and torch.autograd.grad(loss, scores)[0].tolist() == [[-1.0, 1.0]]
    half = torch.randn(4, 6).bfloat16()
    found = reader_ranked_loss(half, half.flip(1), rescale="minmax")
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, reader_ranked_loss(half.float(), half.float().flip(1), rescale="minmax")
    )
    assert reader_agreement(half, half.flip(1)).dtype == torch.float32


def test_agreement_is_kendalls_tau_of_scipy():
    scores = torch.randn(20, 8).round(decimals=1)
    losses = torch.randn(20, 8).round(decimals=1)
    losses[:, 1] = losses[:, 0]
    expected = [kendalltau(s, -c).statistic for s, c in zip(scores.numpy(), losses.numpy(), strict=True)]
    assert reader_agreement(scores, losses).tolist() == pytest.approx(expected, abs=1e-6)
    assert reader_agreement(-losses, losses).tolist() == [1.0] * 20
    assert reader_agreement(losses, losses).tolist() == [-1.0] * 20
    assert reader_agreement(torch.zeros(3, 4), torch.randn(3, 4)).isnan().all()
    assert reader_agreement(torch.randn(4), torch.randn(4)).shape == ()
    assert reader_agreement(torch.randn(0, 4), torch.randn(0, 4)).shape == (0,)


def test_draws_follow_the_softmax_of_scores():
    scores = torch.tensor([0.0, 1.0, 3.0])
    for rescale, logits in ((None, scores / 0.5), ("minmax", torch.tensor([-1.0, -1 / 3, 1.0]) / 0.5)):
        drawn = sample_documents(
            scores.expand(20_000, 3), 1, 0.5, torch.Generator().manual_seed(0), rescale=rescale
        )
        share = drawn.flatten().bincount(minlength=3) / 20_000
        torch.testing.assert_close(share, logits.softmax(0), atol=0.012, rtol=0)


def test_best_documents_stand_last():
    """Ascending order: the best document next to the question."""
    scores = torch.tensor([[0.5, -1.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    assert best_documents(scores, 3).tolist() == [[0, 3, 2], [2, 1, 0]]
    assert best_documents(scores, 0).shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "triplet"}, 'kind must be "pairwise" or "listwise", got \'triplet\''),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"reader_temperature": -1.0}, "reader_temperature must be > 0 and finite, got -1.0"),
        ({"margin": -0.1}, "margin must be >= 0 and finite, got -0.1"),
        ({"rescale": "z"}, "rescale must be \"minmax\" or None, got 'z'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, as_users_call):
    with pytest.raises(ValueError, match=message):
        reader_ranked_loss(torch.zeros(2, 3), torch.zeros(2, 3), **options)


def test_bad_input_is_refused(as_users_call):
    scores = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"reader_losses must have the shape of the scores \(2, 3\), got \(2, 4\)"
    ):
        reader_ranked_loss(scores, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"ignore must have the shape of the scores \(2, 3\), got \(3,\)"):
        reader_agreement(scores, scores, ignore=torch.zeros(3, dtype=torch.bool))
    for value in (math.nan, -INF):
        with pytest.raises(ValueError, match="reader_losses must be numbers or \\+infinity"):
            reader_ranked_loss(scores, torch.full((2, 3), value))
    with pytest.raises(ValueError, match=r"n must be in \[0, 3\], .* got 4"):
        sample_documents(scores, 4)
    with pytest.raises(ValueError, match=r"n must be in \[0, 1\]"):
        sample_documents(scores, 2, ignore=torch.tensor([[True, True, False]] * 2))
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        sample_documents(scores, 2, 0)
    with pytest.raises(ValueError, match=r"n must be in \[0, 3\], the fewest documents of a query, got 4"):
        best_documents(scores, 4)
