import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coloss.classification import (
    best_conditional_risk,
    comp_sum_loss,
    consistency_bound,
    consistency_transform,
    minimizability_gap,
    minimizability_gap_bound,
)

TAUS = (0.0, 0.5, 1.0, 1.5, 1.8, 2.0, 3.0)


def random_distributions(seed: int, rows: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator).mul(2).double().softmax(1)


@pytest.mark.parametrize("tau", TAUS)
def test_the_bound_inverts_the_transform(tau: float) -> None:
    errors = torch.tensor([0.0, 1e-6, 1e-3, 0.3, 0.9, 1.0], dtype=torch.float64)
    excess = consistency_transform(errors, tau, 7)
    assert bool((excess.diff() > 0).all()) and excess[0] == 0
    # Near 1 the transform is flat for tau < 1, or infinitely steep: the inverse is checked from both sides.
    torch.testing.assert_close(consistency_bound(excess, tau, 7), errors, rtol=1e-6, atol=1e-8)
    again = consistency_transform(consistency_bound(excess, tau, 7), tau, 7)
    torch.testing.assert_close(again, excess, rtol=1e-9, atol=1e-15)


def test_the_sum_exponential_bound_has_a_closed_form() -> None:
    x = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(consistency_bound(x, 0.0, 2), (1 - (1 - x) ** 2).sqrt())


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 1.8, 2.0])
def test_for_two_classes_the_transform_is_the_least_excess_of_a_wrong_decision(tau: float) -> None:
    def phi(p: np.ndarray) -> np.ndarray:
        return -np.log(p) if tau == 1 else (p ** (tau - 1) - 1) / (1 - tau)

    q = np.linspace(1e-4, 1 - 1e-4, 200_001)
    for error in (0.1, 0.5, 0.9):
        p = (1 + error) / 2  # of the first class; deciding for the second costs an error of p - (1 - p)
        risk = p * phi(q) + (1 - p) * phi(1 - q)
        excess = risk[q <= 0.5].min() - risk.min()
        assert float(consistency_transform(error, tau, 2)) == pytest.approx(excess, abs=2e-4)


@settings(max_examples=25)
@given(st.integers(0, 200), st.sampled_from(TAUS), st.integers(2, 6))
def test_no_scores_have_less_excess_loss_than_their_excess_error_implies(
    seed: int, tau: float, classes: int
) -> None:
    p, q = random_distributions(seed, 50, classes), random_distributions(seed + 1, 50, classes)
    risk = sum(
        p[:, k] * comp_sum_loss(q.log(), torch.full((50,), k), tau=tau, reduction="none")
        for k in range(classes)
    )
    assert isinstance(risk, Tensor)
    excess = risk - best_conditional_risk(p, tau)
    error = p.amax(1) - p.gather(1, q.argmax(1, keepdim=True)).squeeze(1)
    assert bool((excess > -1e-10).all())
    assert bool((consistency_bound(excess.clamp(min=0), tau, classes) >= error - 1e-7).all())


@settings(max_examples=30)
@given(st.floats(1e-8, 3.0), st.sampled_from(TAUS), st.integers(2, 50))
def test_the_simple_bound_is_never_smaller(excess: float, tau: float, classes: int) -> None:
    tight, simple = (consistency_bound(excess, tau, classes, tight=tight) for tight in (True, False))
    assert tight <= simple + 1e-12


def test_bounds_are_continuous_in_tau_at_one() -> None:
    x = torch.tensor([1e-4, 0.05, 0.6], dtype=torch.float64)
    for tau in (1 - 1e-6, 1 + 1e-6, 1 - 1e-8, 1 + 1e-8):
        torch.testing.assert_close(
            consistency_bound(x, tau, 4), consistency_bound(x, 1.0, 4), rtol=1e-5, atol=1e-8
        )


def test_a_gap_adds_to_the_excess_and_a_hopeless_excess_says_nothing() -> None:
    torch.testing.assert_close(consistency_bound(0.1, 1.0, 5, gap=0.05), consistency_bound(0.15, 1.0, 5))
    assert consistency_bound(100.0, 1.5, 5) == consistency_bound(100.0, 3.0, 5) == 1


@pytest.mark.parametrize("tau", TAUS)
def test_the_best_conditional_risk_is_what_minimising_finds(tau: float) -> None:
    p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    logits = (p.log() / max(2 - tau, 0.02)).requires_grad_()  # near the solution for any tau
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = comp_sum_loss(logits, p, tau=tau)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(comp_sum_loss(logits, p, tau=tau).detach()) == pytest.approx(
        float(best_conditional_risk(p, tau)), abs=1e-6
    )


def test_the_gap_of_a_certain_world_is_the_best_risk_and_jensen_bounds_it() -> None:
    # Hypotheses z = (a, -a) with |a| <= 1/4 on points whose class is certain, one in five against its neighbours.
    scores = torch.linspace(-0.25, 0.25, 10_001, dtype=torch.float64)
    right = torch.stack([scores, -scores], 1)
    classes = torch.zeros(10_001, dtype=torch.int64)

    def risks(tau: float) -> Tensor:
        fits = comp_sum_loss(right, classes, tau=tau, reduction="none")
        return 0.8 * fits + 0.2 * fits.flip(0)

    best_exponential = float(risks(0.0).min())
    for tau in TAUS:
        at_each_point = float(comp_sum_loss(right[-1:], classes[:1], tau=tau))
        gap = float(risks(tau).min()) - at_each_point
        bound = float(minimizability_gap_bound(best_exponential, tau, 2, score_bound=0.25))
        assert 0 < gap <= bound + 1e-12
    certain = torch.eye(2, dtype=torch.float64)
    assert float(minimizability_gap(0.3, certain, 1.2)) == pytest.approx(0.3)
    assert float(minimizability_gap(-0.1, certain, 1.2)) == 0


def test_the_gap_bound_falls_with_tau() -> None:
    bounds = [float(minimizability_gap_bound(2.0, tau, 10)) for tau in TAUS]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] == pytest.approx(2.0)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: consistency_bound(0.1, -1.0, 3), "tau must be >= 0 and finite, got -1.0"),
        (lambda: consistency_bound(0.1, math.inf, 3), "tau must be >= 0 and finite, got inf"),
        (lambda: consistency_bound(0.1, 1.0, 1), "num_classes must be >= 2, got 1"),
        (lambda: consistency_bound(-0.1, 1.0, 3), "excess and gap must be >= 0"),
        (lambda: consistency_bound(math.nan, 1.0, 3), "excess and gap must be >= 0"),
        (lambda: consistency_bound(0.1, 1.0, 3, gap=-1.0), "excess and gap must be >= 0"),
        (lambda: consistency_transform(1.1, 1.0, 3), r"excess_error must be in \[0, 1\], got 1.1"),
        (lambda: best_conditional_risk(torch.ones(1, 3), 1.0), "sum to 1 in each row"),
        (lambda: minimizability_gap_bound(0.0, 1.0, 3, score_bound=1.0), "sum_exponential_risk must be >= "),
        (lambda: minimizability_gap_bound(1.0, 1.0, 3, score_bound=0.0), "score_bound must be > 0, got 0"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
