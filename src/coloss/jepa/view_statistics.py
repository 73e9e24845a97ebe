"""Second moments of two views of the same samples, in a basis where they are nearly diagonal."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.errors import InputError

Basis = Literal["pca", "cca"]
View = Float[Tensor, "samples ..."]


class ViewMoments(NamedTuple):
    """Second moments of two views, feature by feature.

    Attributes:
        covariance: lambda of each feature, float64.
        regression: rho of each feature; 0 for one without variance.
        directions_x: (values of x, features): a centred x times this gives the features.
        directions_y: likewise for y; the same as of x, but for "cca".
        off_diagonal: share of energy off the diagonal, in [0, 1], of E[x x^T] or E[y x^T], whichever has more.
    """

    covariance: Tensor
    regression: Tensor
    directions_x: Tensor
    directions_y: Tensor
    off_diagonal: float


def view_moments(x: View, y: View, basis: Basis | None = "pca", *, rcond: float = 1e-6) -> ViewMoments:
    """Covariance and regression coefficient of each feature between two views, in a basis where they are nearly diagonal.

    Args:
        x: one view; row i belongs to row i of `y`. More than one dimension is flattened. Centred here.
        y: the other, of the same size, but for "cca".
        basis: None takes the values as they are; "pca" the principal directions of x, in which the theory holds for the raw views as far as
            `off_diagonal` is small; "cca" the canonical directions of each view, of length one, in which it holds exactly for views that are
            mapped into them.
        rcond: directions with less than this share of the largest variance are left out, in [0, 1); with None nothing is.

    Returns:
        Features by falling variance ("pca"), falling correlation ("cca") or as they come.

    Raises:
        ValueError: for fewer than 2 rows, views that do not match, values that are not finite, an unknown basis, or rcond out of range.

    Cost:
        O(samples * values^2 + values^3).

    Examples:
        >>> x = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
        >>> found = view_moments(x, 0.5 * x, basis=None)
        >>> found.covariance.tolist(), found.regression.tolist(), found.off_diagonal
        ([0.5, 2.0], [0.5, 0.5], 0.0)
    """
    if basis not in (None, "pca", "cca"):
        raise InputError(f'basis must be "pca", "cca" or None, got {basis!r}')
    if not 0 <= rcond < 1:
        raise InputError(f"rcond must be in [0, 1), got {rcond}")
    if len(x) != len(y) or len(x) < 2:
        raise InputError(f"views must have the same rows, at least 2, got {len(x)} and {len(y)}")
    first, second = (_centred(view) for view in (x, y))
    if basis != "cca" and first.shape != second.shape:
        raise InputError(
            f"views must be of one size, got {first.shape[1]} and {second.shape[1]} values (or take basis='cca')"
        )
    if basis == "cca":
        turn_x, turn_y = _canonical(first, second, rcond)
    else:
        turn_x = turn_y = torch.eye(first.shape[1]).to(first)
        if basis == "pca":
            turn_x = turn_y = _principal(first, rcond)[1].T.contiguous()
    features_x, features_y = first @ turn_x, second @ turn_y
    variances = features_x.T @ features_x / len(x)
    shared = features_y.T @ features_x / len(x)
    covariance, variance = shared.diagonal().clone(), variances.diagonal()
    return ViewMoments(
        covariance,
        torch.where(variance > 0, covariance / variance.where(variance > 0, 1.0), 0.0),
        turn_x,
        turn_y,
        max(_off_diagonal(variances), _off_diagonal(shared)),
    )


def _centred(view: Tensor) -> Tensor:
    rows = view.detach().to("cpu", torch.float64).flatten(1)
    if not bool(rows.isfinite().all()):
        raise InputError("views must be finite, got an infinity or NaN")
    return rows - rows.mean(0)


def _principal(rows: Tensor, rcond: float) -> tuple[Tensor, Tensor]:
    """Standard deviations along the principal directions, and these as rows."""
    _, scale, directions = torch.linalg.svd(rows, full_matrices=False)
    kept = scale.square() > rcond * scale[0].square()
    return scale[kept] / len(rows) ** 0.5, directions[kept]


def _canonical(first: Tensor, second: Tensor, rcond: float) -> tuple[Tensor, Tensor]:
    """Directions of length one in each view, uncorrelated but pair by pair; correlations fall and are not negative."""
    (scale_x, basis_x), (scale_y, basis_y) = _principal(first, rcond), _principal(second, rcond)
    white_x, white_y = basis_x.T / scale_x, basis_y.T / scale_y
    left, _, right = torch.linalg.svd(
        (second @ white_y).T @ (first @ white_x) / len(first), full_matrices=False
    )
    found = white_x @ right.T, white_y @ left
    return found[0] / found[0].norm(dim=0), found[1] / found[1].norm(dim=0)


def _off_diagonal(matrix: Tensor) -> float:
    total = matrix.square().sum()
    return float(1 - matrix.diagonal().square().sum() / total) if total > 0 else 0.0
