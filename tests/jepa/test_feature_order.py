"""Moments of two views, the order foretold from them, the warning where they are not diagonal; and the claim."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from coloss.data import load
from coloss.jepa import (
    OffDiagonalWarning,
    audit_features,
    jepa_time,
    learning_order,
    mae_time,
    view_moments,
)
from coloss.lab.claims import verify


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves() -> tuple[Tensor, Tensor]:
    images = load("digits", seed=0).train.inputs.view(-1, 8, 8)
    return images[:, :, :4], images[:, :, 4:]


def test_the_moments_are_those_of_numpy() -> None:
    x, y = normal(50, 3) + 4, normal(50, 3, seed=1) - 2
    found = view_moments(x, y, None)
    covariance = np.cov(x.numpy().T, y.numpy().T, bias=True)
    shared, variances = covariance[3:, :3], covariance[:3, :3]
    np.testing.assert_allclose(found.covariance, np.diag(shared))
    np.testing.assert_allclose(found.regression, np.diag(shared) / np.diag(variances))
    outside = [1 - (np.diag(m) ** 2).sum() / (m**2).sum() for m in (shared, variances)]
    assert found.off_diagonal == pytest.approx(max(outside))


def test_principal_directions_undo_a_rotation() -> None:
    signal = normal(4000, 3) * torch.tensor([3.0, 2.0, 1.0])
    x, y = signal + 0.5 * normal(4000, 3, seed=1), signal + 0.5 * normal(4000, 3, seed=2)
    turn = torch.linalg.qr(normal(3, 3, seed=3))[0]
    mixed, plain = view_moments(x @ turn, y @ turn, None), view_moments(x, y, None)
    found = view_moments(x @ turn, y @ turn, "pca")
    assert mixed.off_diagonal > 0.1 > 0.01 > found.off_diagonal
    torch.testing.assert_close(found.covariance, plain.covariance, rtol=0.02, atol=0)
    torch.testing.assert_close(
        found.directions_x.T @ found.directions_x, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_canonical_directions_are_exactly_diagonal_on_real_halves() -> None:
    x, y = halves()
    found = view_moments(x, y, "cca", rcond=1e-3)
    assert found.off_diagonal < 1e-20
    assert bool((found.covariance >= 0).all())
    torch.testing.assert_close(found.directions_x.norm(dim=0), torch.ones(len(found.covariance)).double())
    # The correlations are scikit-learn's, and fall.
    flat = [(view.flatten(1) - view.flatten(1).mean(0)).double() for view in (x, y)]
    pair = [view @ turn for view, turn in zip(flat, (found.directions_x, found.directions_y))]
    correlation = found.covariance / (pair[0].std(0, correction=0) * pair[1].std(0, correction=0))
    assert bool((correlation.diff() <= 1e-12).all()) and float(correlation[0]) < 1
    bases = [np.linalg.svd(view.numpy(), full_matrices=False) for view in flat]
    left, right = (u[:, s**2 > 1e-3 * s[0] ** 2] for u, s, _ in bases)
    expected = np.linalg.svd(left.T @ right, compute_uv=False)
    np.testing.assert_allclose(correlation, expected, atol=1e-10)
    assert view_moments(x, y, "pca").off_diagonal > 0.05


def test_views_of_different_size_have_canonical_directions_only(as_users_call: None) -> None:
    x, y = normal(30, 2, 2), normal(30, 3)
    assert view_moments(x, y, "cca").covariance.shape == (3,)
    with pytest.raises(ValueError, match="views must be of one size, got 4 and 3 values"):
        view_moments(x, y, "pca")


def test_the_two_models_of_data() -> None:
    rows = 40000
    z, noise = 1.5 * normal(rows, 1), normal(2, rows, 1, seed=1)
    static = view_moments(z + noise[0], z + noise[1], None)
    assert static.covariance.item() == pytest.approx(2.25, rel=0.05)
    assert static.regression.item() == pytest.approx(2.25 / 3.25, rel=0.03)
    later = 0.8 * z + 1.5 * math.sqrt(1 - 0.64) * normal(rows, 1, seed=2)
    temporal = view_moments(z + noise[0], later + noise[1], None)
    assert temporal.covariance.item() == pytest.approx(0.8 * 2.25, rel=0.05)
    assert temporal.regression.item() == pytest.approx(0.8 * 2.25 / 3.25, rel=0.03)


def views_of(covariance: list[float], regression: list[float], rows: int = 60) -> tuple[Tensor, Tensor]:
    """Views with exactly these moments, diagonal."""
    lam, rho = (torch.tensor(values, dtype=torch.float64) for values in (covariance, regression))
    noise = normal(rows, 2 * len(lam))
    noise = torch.linalg.qr(noise - noise.mean(0))[0] * rows**0.5
    deviation = torch.where(rho != 0, lam / rho.where(rho != 0, 1.0), 1.0).sqrt()
    x = noise[:, : len(lam)] * deviation
    return x, x * rho + noise[:, len(lam) :]


def test_the_order_turns_with_depth_for_jepa_alone() -> None:
    """Feature 0 is less covariant and more predictable."""
    views = views_of([1.0, 1.2], [0.9, 0.3])
    for depth in (1, 2, 3):
        jepa = learning_order(*views, depth, 0.004, basis=None)
        assert jepa.tolist() == ([1, 0] if depth == 1 else [0, 1])
        assert learning_order(*views, depth, 0.004, "mae", basis=None).tolist() == [1, 0]


def test_what_is_never_learned_comes_last() -> None:
    views = views_of([-1.0, 1.0, 0.02, 2.0, 0.0], [-0.5, 0.9, 0.1, 0.8, 0.0])
    audit = audit_features(*views, depth=2, start=0.01, basis=None)
    moments = audit.moments
    torch.testing.assert_close(
        audit.jepa_times, jepa_time(moments.covariance, moments.regression, 2, 0.01), equal_nan=True
    )
    torch.testing.assert_close(
        audit.mae_times, mae_time(moments.covariance, moments.regression, 2, 0.01), equal_nan=True
    )
    assert audit.jepa_order.tolist()[:3] == [3, 1, 2]  # the third does not rise: 0.1^2 / 2 < 0.01
    assert audit.jepa_times[2].isnan() and audit.jepa_times[0].isinf()
    assert set(audit.jepa_order.tolist()[3:]) == {0, 4}
    assert audit.mae_order.tolist()[:3] == [3, 1, 2]
    table = audit.table()
    assert table.index.tolist() == audit.jepa_order.tolist()
    assert table["jepa_place"].tolist() == [1, 2, 3, 4, 5]
    assert [table["mae_place"][feature] for feature in audit.mae_order.tolist()] == [1, 2, 3, 4, 5]
    assert table["jepa_time"][3] == audit.jepa_times[3] and table["covariance"][3] == moments.covariance[3]


def test_it_warns_of_moments_off_the_diagonal_only() -> None:
    views = views_of([1.0, 1.2], [0.9, 0.3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit_features(*views, basis=None)
    turn = torch.linalg.qr(normal(2, 2, seed=3))[0]
    mixed = [view @ turn for view in views]
    with pytest.warns(
        OffDiagonalWarning, match=r"\d+% of the moments' energy is off the diagonal \(limit 1%\)"
    ):
        audit_features(*mixed, basis=None, max_off_diagonal=0.01)
    with pytest.warns(OffDiagonalWarning):
        audit_features(*halves(), max_off_diagonal=0.05)


def test_constant_values_half_precision_and_few_rows() -> None:
    x = torch.cat([normal(20, 2), torch.ones(20, 1)], 1)
    found = view_moments(x, x, None)
    assert found.regression.tolist() == pytest.approx([1, 1, 0])
    assert found.covariance[2] == 0
    assert len(view_moments(x, x, "pca").covariance) == len(view_moments(x, x, "cca").covariance) == 2
    assert audit_features(x, x, basis=None, max_off_diagonal=1.0).jepa_order[-1] == 2
    halved = x.bfloat16()
    assert (
        view_moments(halved, halved, None).covariance.tolist()
        == view_moments(halved.double(), halved.double(), None).covariance.tolist()
    )
    two = view_moments(normal(2, 5), normal(2, 5, seed=1), "pca")
    assert two.covariance.shape == (1,) and bool(two.regression.isfinite().all())
    still = view_moments(torch.zeros(3, 2), torch.zeros(3, 2), None)
    assert still.off_diagonal == 0 and still.covariance.tolist() == [0, 0]


def test_bad_input_is_named(as_users_call: None) -> None:
    x = normal(5, 2)
    for call, message in (
        (lambda: view_moments(x, x[:3]), "views must have the same rows, at least 2, got 5 and 3"),
        (lambda: view_moments(x[:1], x[:1]), "views must have the same rows, at least 2, got 1 and 1"),
        (lambda: view_moments(x, x, "ica"), 'basis must be "pca", "cca" or None, got \'ica\''),
        (lambda: view_moments(x, x, rcond=1.0), r"rcond must be in \[0, 1\), got 1.0"),
        (lambda: view_moments(x, x * math.nan), "views must be finite, got an infinity or NaN"),
        (lambda: learning_order(x, x, 0), "depth must be >= 1, got 0"),
        (lambda: learning_order(x, x, 1, objective="vae"), 'objective must be "jepa" or "mae"'),
        (lambda: audit_features(x, x, start=0.0), "start must be > 0 and finite, got 0.0"),
        (
            lambda: audit_features(x, x, max_off_diagonal=2.0),
            r"max_off_diagonal must be in \[0, 1\], got 2.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_claim_runs() -> None:
    found = verify("jepa-implicit-bias", smoke=True, seeds=1)
    assert {"spearman_jepa", "spearman_mae", "spearman_gaussian"} <= set(
        found["arms"]["exact solution"]["metrics"]
    )
