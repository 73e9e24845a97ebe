"""How a collapsed classifier passes on small deviations of its features: exactly, and to first order; see `coloss.jepa.collapse_theory`."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.errors import InputError
from coloss.jepa.collapse_theory import check_decays, ufm_solution


class ResponseSpectrum(NamedTuple):
    """Leading-order singular values of the blocks of the response.

    Attributes:
        own_largest: of the block from a class to itself, in deviations that it hands on unchanged.
        own_smallest: of the same block, in those it attenuates most.
        cross: the one value of the block from a class to another.
    """

    own_largest: float
    own_smallest: float
    cross: float


def nc_response(
    num_classes: int,
    per_class: int,
    num_features: int,
    weight_decay: float,
    feature_decay: float,
    closeness: float,
) -> Float[Tensor, "deviations deviations"]:
    """F, the exact first-order response at collapse: a deviation of the given features becomes F times it in the minimiser.

    With A, B the second derivatives of N L in H and in W, and J the mixed one: F = closeness (A - J B^-1 J^T)^-1.

    Args:
        num_classes: K >= 2.
        per_class: n >= 1.
        num_features: >= num_classes.
        weight_decay, feature_decay: > 0, with a product below 1.
        closeness: > 0.

    Returns:
        Square matrix on deviations as `features.flatten()` lays them out: sample by sample, class by class. Float64.

    Raises:
        ValueError: for a value out of range.

    Cost:
        O((K n features)^3): for small cases.

    Source:
        Tirer, Huang, Niles-Weed 2023, arXiv 2210.16658, theorem 4.2.

    Examples:
        >>> response = nc_response(2, 1, 3, weight_decay=1.0, feature_decay=0.25, closeness=50.0)
        >>> response.shape, round(float(torch.linalg.svdvals(response)[0]), 3)
        (torch.Size([6, 6]), 1.0)
    """
    check_decays(weight_decay, feature_decay)
    _check_collapses(weight_decay, feature_decay)
    if not 0 < closeness < math.inf:
        raise InputError(f"closeness must be > 0 and finite, got {closeness}")
    weight, features = ufm_solution(num_classes, per_class, num_features, weight_decay, feature_decay)
    samples = len(features)
    errors = features @ weight.T - torch.eye(num_classes).double().repeat_interleave(per_class, 0)
    unit = torch.eye(num_features, dtype=torch.float64)
    decay = (feature_decay + closeness) * torch.eye(samples * num_features, dtype=torch.float64)
    own = torch.kron(torch.eye(samples, dtype=torch.float64), weight.T @ weight) + decay
    # Rows (sample, feature), columns (class, feature) of W: d/dW[k, j] of errors_i W is errors_ik e_j + h_ij w_k.
    mixed = torch.einsum("ik,fj->ifkj", errors, unit) + torch.einsum("ij,kf->ifkj", features, weight)
    mixed = mixed.reshape(samples * num_features, num_classes * num_features)
    last = torch.kron(
        torch.eye(num_classes, dtype=torch.float64),
        features.T @ features + per_class * weight_decay * unit,
    )
    return closeness * torch.linalg.inv(own - mixed @ torch.linalg.solve(last, mixed.T))


def predicted_response(weight_decay: float, feature_decay: float, closeness: float) -> ResponseSpectrum:
    """Singular values of the blocks of F to first order in 1 / closeness, for more features than classes.

    Args:
        weight_decay, feature_decay: > 0, with a product below 1.
        closeness: > 0, large.

    Raises:
        ValueError: for a value out of range.

    Source:
        Tirer, Huang, Niles-Weed 2023, arXiv 2210.16658, theorem 4.2.

    Examples:
        >>> found = predicted_response(weight_decay=2**0.5, feature_decay=0.1, closeness=100.0)
        >>> [round(value, 6) for value in found]
        [1.0, 0.997341, 0.001248]
    """
    check_decays(weight_decay, feature_decay)
    _check_collapses(weight_decay, feature_decay)
    if not 0 < closeness < math.inf:
        raise InputError(f"closeness must be > 0 and finite, got {closeness}")
    share = 1 - math.sqrt(feature_decay * weight_decay)
    return ResponseSpectrum(
        1.0, 1 - math.sqrt(feature_decay / weight_decay) / closeness, 2 * feature_decay * share / closeness
    )


def _check_collapses(weight_decay: float, feature_decay: float) -> None:
    if weight_decay * feature_decay >= 1:
        raise InputError(
            f"weight_decay * feature_decay must be < 1 for features other than 0, got {weight_decay * feature_decay}"
        )
