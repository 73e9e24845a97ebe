r"""A classifier whose features are free variables near given ones: its exact minimiser, its flow, and its response to deviations.

Tirer, Huang, Niles-Weed 2023, "Perturbation Analysis of Neural Collapse", ICML 2023, arXiv 2210.16658.

K classes, N samples, features h_i (rows of H), last layer W, one-hot targets y_i, and features h0_i of a shallower layer:

    L(W, H) = 1/(2N) sum_i |W h_i - y_i|^2 + weight_decay/(2K) |W|^2 + feature_decay/(2N) |H|^2 + closeness/(2N) |H - H0|^2

1 / closeness is how much the layers between H0 and H can change. With closeness 0 (`ufm_solution`) and n samples in each class the
minimisers are an orthogonal frame: with c = sqrt(feature_decay weight_decay) < 1

    h_i = sqrt(rho) r_class      r_k orthonormal      rho = (1 - c) sqrt(weight_decay / feature_decay)
    W = sqrt(feature_decay / weight_decay) H_bar^T    H_bar with columns sqrt(rho) r_k

and 0 for c >= 1. The deeper features minimise L near H0, so as 1 / closeness grows they follow the flow (`central_path`)

    dh_i/dt = -(W*^T (W* h_i - y_i) + feature_decay h_i)        W* the best last layer for the present features,  t ~ 1 / closeness

along which NC1 falls strictly, e^(2 feature_decay t) tr S_W falls and e^(2 feature_decay t) tr S_B rises. Around collapse a deviation
of H0 becomes F times it (`coloss.jepa.nc_response`). For large closeness the block of F from a class to itself has singular values
between 1 - sqrt(feature_decay / weight_decay) / closeness and 1, the block between two classes has rank one with value 2 feature_decay
(1 - c) / closeness (`coloss.jepa.predicted_response`): deviations come from the own class, and the decay of the features, not that of
the last layer, is what attenuates them.

When it helps: to see what a measured NC1 could be, to reason about which decay matters, to test the measures. When not: it takes the
features for free variables and a squared error; real networks only roughly follow.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from coloss.errors import InputError
from coloss.jepa.time_courses import check_times, solve_course

SLOWEST = 10_000


class FreeFeatures(NamedTuple):
    """A last layer and the features it sees.

    Attributes:
        weight: W (classes, features).
        features: H (samples, features).
    """

    weight: Tensor
    features: Tensor


class FeaturePath(NamedTuple):
    """Features on their way to collapse.

    Attributes:
        times: (points).
        features: (points, samples, features).
    """

    times: Tensor
    features: Tensor


def ufm_solution(
    num_classes: int,
    per_class: int,
    num_features: int,
    weight_decay: float,
    feature_decay: float,
    frame: Float[Tensor, "features classes"] | None = None,
) -> FreeFeatures:
    """The minimiser of the unconstrained features model, in closed form: exact collapse.

    Args:
        num_classes: K >= 2.
        per_class: n >= 1 samples of each class; they come class by class.
        num_features: >= num_classes.
        weight_decay: of the last layer, > 0.
        feature_decay: of the features, > 0. With `weight_decay * feature_decay >= 1` all is 0.
        frame: orthonormal columns that turn the solution; None for the first unit vectors.

    Returns:
        Last layer (K, features) and features (K n, features), float64.

    Raises:
        ValueError: for a value out of range, or a frame that is not orthonormal.

    Source:
        Tirer, Huang, Niles-Weed 2023, arXiv 2210.16658, section 3.

    Examples:
        >>> weight, features = ufm_solution(2, 1, 2, weight_decay=0.25, feature_decay=0.25)
        >>> features.round(decimals=4).tolist(), (weight @ features.T).round(decimals=4).tolist()
        ([[0.866, 0.0], [0.0, 0.866]], [[0.75, 0.0], [0.0, 0.75]])
    """
    check_decays(weight_decay, feature_decay)
    if num_classes < 2:
        raise InputError(f"num_classes must be >= 2, got {num_classes}")
    if per_class < 1:
        raise InputError(f"per_class must be >= 1, got {per_class}")
    if num_features < num_classes:
        raise InputError(f"num_features must be >= num_classes ({num_classes}), got {num_features}")
    if frame is None:
        frame = torch.eye(num_features, num_classes, dtype=torch.float64)
    frame = frame.double()
    if frame.shape != (num_features, num_classes):
        raise InputError(
            f"frame must be (features, classes), {(num_features, num_classes)}, got {tuple(frame.shape)}"
        )
    if float((frame.T @ frame - torch.eye(num_classes)).abs().max()) > 1e-6:
        raise InputError("frame must have orthonormal columns")
    energy = max(1 - math.sqrt(feature_decay * weight_decay), 0.0) * math.sqrt(weight_decay / feature_decay)
    means = math.sqrt(energy) * frame.T
    return FreeFeatures(
        math.sqrt(feature_decay / weight_decay) * means, means.repeat_interleave(per_class, 0)
    )


def free_features_loss(
    weight: Float[Tensor, "classes features"],
    features: Float[Tensor, "samples features"],
    classes: Int[Tensor, " samples"],
    weight_decay: float,
    feature_decay: float,
    anchors: Float[Tensor, "samples features"] | None = None,
    closeness: float = 0.0,
) -> Float[Tensor, ""]:
    """L: squared error of the last layer on free features, with decay of both, and closeness to given features.

    Args:
        weight: W.
        features: H.
        classes: of each sample, in [0, classes).
        weight_decay: of W, >= 0.
        feature_decay: of H, >= 0.
        anchors: H0; None for none.
        closeness: >= 0.

    Returns:
        A scalar with gradients, in the type of the inputs.

    Raises:
        ValueError: for a value or a class out of range, or classes that do not match the features.

    Examples:
        >>> weight, features = ufm_solution(2, 1, 2, 0.25, 0.25)
        >>> free_features_loss(weight, features, torch.tensor([0, 1]), 0.25, 0.25).item()
        0.21875
    """
    for name, value in (
        ("weight_decay", weight_decay),
        ("feature_decay", feature_decay),
        ("closeness", closeness),
    ):
        if not 0 <= value < math.inf:
            raise InputError(f"{name} must be >= 0 and finite, got {value}")
    targets = _one_hot(features, classes, len(weight))
    loss = (features @ weight.T - targets).square().sum() + feature_decay * features.square().sum()
    if anchors is not None:
        loss = loss + closeness * (features - anchors).square().sum()
    return loss / (2 * len(features)) + weight_decay / (2 * len(weight)) * weight.square().sum()


def best_weight(
    features: Float[Tensor, "samples features"],
    targets: Float[Tensor, "samples classes"],
    weight_decay: float,
) -> Float[Tensor, "classes features"]:
    """W*, the last layer that minimises L for given features: a ridge regression.

    Args:
        features: H.
        targets: one-hot, or any.
        weight_decay: > 0; scaled by samples per class.

    Examples:
        >>> best_weight(torch.eye(2), torch.eye(2), weight_decay=1.0).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    samples, dim = features.shape
    ridge = samples / targets.shape[1] * weight_decay
    gram = features.T @ features + ridge * torch.eye(dim).to(features)
    return torch.linalg.solve(gram, features.T @ targets).T


def solve_near(
    anchors: Float[Tensor, "samples features"],
    classes: Int[Tensor, " samples"],
    weight_decay: float,
    feature_decay: float,
    closeness: float,
    *,
    num_classes: int | None = None,
    tolerance: float = 1e-10,
) -> FreeFeatures:
    """Minimise L near given features by turns, W and H each in closed form, until they stand still.

    Args:
        anchors: H0, the features of a shallower layer; any float type.
        classes: of each sample, in [0, num_classes). Unequal classes are allowed, though the theory is for equal ones.
        weight_decay: of the last layer, > 0.
        feature_decay: of the features, > 0.
        closeness: > 0.
        num_classes: >= 1; None takes the largest class plus one.
        tolerance: largest relative change of the features in the last turn, > 0.

    Returns:
        Last layer and features, float64.

    Raises:
        ValueError: for a value out of range, features that are not finite, or if 10,000 turns are not enough.

    Cost:
        A turn: O(samples * features^2 + features^3). The smaller `closeness`, the more turns.

    Source:
        Tirer, Huang, Niles-Weed 2023, arXiv 2210.16658, section 3.

    Examples:
        >>> anchors = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> _, features = solve_near(anchors, torch.tensor([0, 0, 1, 1]), 0.1, 0.1, closeness=1.0)
        >>> bool((features[0] - features[1]).norm() < (anchors[0] - anchors[1]).norm())
        True
    """
    check_decays(weight_decay, feature_decay)
    if not 0 < closeness < math.inf:
        raise InputError(f"closeness must be > 0 and finite, got {closeness}")
    if not tolerance > 0:
        raise InputError(f"tolerance must be > 0, got {tolerance}")
    given, targets = _given(anchors, classes, num_classes)
    features, ridge = given, (feature_decay + closeness) * torch.eye(given.shape[1]).to(given)
    for _ in range(SLOWEST):
        weight = best_weight(features, targets, weight_decay)
        moved = torch.linalg.solve(weight.T @ weight + ridge, (targets @ weight + closeness * given).T).T
        change = float((moved - features).norm())
        features = moved
        if change <= tolerance * float(features.norm()):
            return FreeFeatures(best_weight(features, targets, weight_decay), features)
    raise InputError(f"closeness must be larger, or tolerance: {SLOWEST} turns were not enough")


def central_path(
    features: Float[Tensor, "samples features"],
    classes: Int[Tensor, " samples"],
    weight_decay: float,
    feature_decay: float,
    times: Sequence[float],
    *,
    num_classes: int | None = None,
    tolerance: float = 1e-8,
) -> FeaturePath:
    """Features that flow down L with the best last layer at each moment, as deeper and deeper layers would have them.

    Args:
        features: at time 0; any float type.
        classes: of each sample, in [0, num_classes).
        weight_decay: of the last layer, > 0.
        feature_decay: of the features, > 0.
        times: when to look, finite and increasing, the first >= 0; t stands for 1 / closeness.
        num_classes: >= 1; None takes the largest class plus one.
        tolerance: relative error of the integration, > 0.

    Returns:
        The times, and the features at each, float64.

    Raises:
        ValueError: for a value out of range, features that are not finite, or a path that cannot be integrated.

    Source:
        Tirer, Huang, Niles-Weed 2023, arXiv 2210.16658, theorem 3.1.

    Examples:
        >>> start, classes = torch.eye(4) + 0.3, torch.tensor([0, 0, 1, 1])
        >>> path = central_path(start, classes, 0.1, 0.1, times=[0.0, 1.0, 2.0])
        >>> [round(float((found[0] - found[1]).norm()), 2) for found in path.features]
        [1.41, 1.28, 1.16]
    """
    check_decays(weight_decay, feature_decay)
    given, targets = _given(features, classes, num_classes)
    grid = check_times(times)
    if not tolerance > 0:
        raise InputError(f"tolerance must be > 0, got {tolerance}")

    def velocity(_: float, flat: Any) -> Any:
        rows = torch.from_numpy(flat).view_as(given)
        weight = best_weight(rows, targets, weight_decay)
        return -((rows @ weight.T - targets) @ weight + feature_decay * rows).flatten().numpy()

    # An absolute tolerance of 0 would never be met where a feature is 0.
    allowed = tolerance * float(given.abs().max()) or tolerance
    found = solve_course(velocity, given.flatten().numpy(), grid, rtol=tolerance, atol=allowed)
    return FeaturePath(torch.from_numpy(grid), torch.from_numpy(found.T.copy()).view(len(grid), *given.shape))


def check_decays(weight_decay: float, feature_decay: float) -> None:
    """Refuse decays that the theory does not know.

    Raises:
        InputError: naming the argument, the rule and the value.

    Examples:
        >>> check_decays(0.0, 1.0)
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: weight_decay must be > 0 and finite, got 0.0
    """
    for name, value in (("weight_decay", weight_decay), ("feature_decay", feature_decay)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} must be > 0 and finite, got {value}")


def _given(features: Tensor, classes: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor]:
    """Features and one-hot targets in float64."""
    given = features.detach().double()
    targets = _one_hot(given, classes, num_classes)
    if not bool(given.isfinite().all()):
        raise InputError("features must be finite, got an infinity or NaN")
    return given, targets


def _one_hot(features: Tensor, classes: Tensor, num_classes: int | None) -> Tensor:
    """Targets in the type of the features, each of which has a class that there is."""
    if features.ndim != 2 or classes.shape != features.shape[:1] or len(features) == 0:
        raise InputError(
            f"features must be (samples, features), at least one, and classes (samples), got {tuple(features.shape)} "
            f"and {tuple(classes.shape)}"
        )
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes must be >= 1, got {num_classes}")
    low, high = int(classes.min()), int(classes.max())
    count = max(high, 0) + 1 if num_classes is None else num_classes
    if low < 0 or high >= count:
        raise InputError(f"classes must be in [0, {count}), got {low if low < 0 else high}")
    return one_hot(classes.long(), count).to(features)
