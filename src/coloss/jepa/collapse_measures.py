r"""How far the features of a classifier have collapsed onto their class means: NC1 to NC4 on tensors and on streamed moments.

With m_k = h_k - h_G the class means around the mean of class means (each class counts once, however many samples it has), M the matrix
with columns m_k, K the number of classes that have samples, N the number of samples:

    S_W = 1/N sum over samples (h - h_class) (h - h_class)^T        S_B = 1/K sum_k m_k m_k^T
    NC1   trace: tr S_W / tr S_B        pinv: 1/K tr(S_W pinv(S_B))        cdnv: mean over k != l of (v_k + v_l) / (2 |h_k - h_l|^2)
    NC2   | M^T M / |M^T M|_F  -  (I - 11^T / K) / sqrt(K - 1) |_F         0 for a simplex equiangular tight frame
    NC3   | W M / |W M|_F  -  (I - 11^T / K) / sqrt(K - 1) |_F             self-duality: | W^T / |W|_F  -  M / |M|_F |_F
    NC4   share of samples where argmax of the logits is the class with the nearest mean

where v_k is the mean squared distance of a sample of class k to h_k, and W the weights of the last layer. Everything is computed in
float64 from any float type. A class without samples is left out. Fewer than two classes with samples, or classes that all have the same
mean, give NaN; NC1 is infinite where means coincide and samples do not. Means that differ by less than the rounding of float64 sums
coincide.

Traps met here: papers divide S_W by N or by classes and NC1 by K or not; compare numbers only across one definition. pinv(S_B) has rank
K - 1 at most, and what lies below is rounding: it is cut at `rcond`. With ReLU features the means form a nearly orthogonal frame; only
centred do they form a simplex. NC1 by trace and by pinv weigh directions differently and may move in opposite ways.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.errors import InputError
from coloss.jepa.mean_differences import centred_means, mean_rounding, seen_classes, without_rounding
from coloss.ops import RunningMoments, RunningScatter, accumulation_dtype

Kind = Literal["trace", "pinv", "cdnv"]
RCOND = 1e-5


class WithinBetween(NamedTuple):
    """Covariance of samples within classes, and of the class means.

    Attributes:
        within: S_W, float64 (features, features).
        between: S_B, likewise.
    """

    within: Tensor
    between: Tensor


def class_means(
    features: Float[Tensor, "samples features"],
    classes: Int[Tensor, " samples"],
    num_classes: int | None = None,
) -> Float[Tensor, "classes features"]:
    """Mean feature of each class, in float64; a row of NaN for a class without samples.

    Args:
        features: any float type.
        classes: class of each sample, >= 0.
        num_classes: None takes the largest class plus one.

    Raises:
        ValueError: for a class out of range, or shapes that do not match.

    Examples:
        >>> class_means(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 2])).flatten()
        tensor([2., nan, 5.], dtype=torch.float64)
    """
    return moment_means(RunningMoments.of(features, classes, _count(classes, num_classes)))


def moment_means(moments: RunningMoments) -> Float[Tensor, "classes features"]:
    """Class means as the measures here want them: a row of NaN for a class without samples.

    Examples:
        >>> moment_means(RunningMoments.empty(2, 1)).flatten()
        tensor([nan, nan], dtype=torch.float64)
    """
    return torch.where(moments.count[:, None] > 0, moments.mean, math.nan)


def within_between(
    features: Float[Tensor, "samples features"],
    classes: Int[Tensor, " samples"],
    num_classes: int | None = None,
) -> WithinBetween:
    """S_W and S_B as matrices; for data that do not fit at once merge `coloss.ops.RunningScatter`s.

    Args:
        features: any float type.
        classes: class of each sample, >= 0.
        num_classes: None takes the largest class plus one.

    Raises:
        ValueError: for a class out of range, or shapes that do not match.

    Cost:
        O(samples * features^2); memory O(features^2).

    Examples:
        >>> features = torch.tensor([[-2.0, 1.0], [-2.0, -1.0], [2.0, 0.0]])
        >>> within, between = within_between(features, torch.tensor([0, 0, 1]))
        >>> within.diagonal().tolist(), between.diagonal().tolist()
        ([0.0, 0.6666666666666666], [4.0, 0.0])
    """
    scatter = RunningScatter.of(features, classes, _count(classes, num_classes))
    centred = centred_means(moment_means(scatter.moments))
    return WithinBetween(scatter.within / max(len(features), 1), centred.T @ centred / max(len(centred), 1))


def nc1(
    features: Float[Tensor, "samples features"],
    classes: Int[Tensor, " samples"],
    kind: Kind = "trace",
    *,
    rcond: float = RCOND,
) -> float:
    """Variability within classes relative to that between them; 0 for features that are their class means.

    Args:
        features: any float type.
        classes: class of each sample, >= 0.
        kind: "trace" (default; cheap and robust), "pinv" (as first published; invariant to invertible maps of the span of the means) or
            "cdnv" (pair by pair of classes, each class weighted alike).
        rcond: for "pinv": variances of S_B below this share of the largest are rounding; in [0, 1).

    Raises:
        ValueError: for an unknown kind, a class out of range, or shapes that do not match.

    Cost:
        O(samples * features); "pinv" O(samples * features^2).

    Source:
        Tirer, Huang, Niles-Weed 2023, arXiv 2210.16658 (trace); Papyan, Han, Donoho 2020, arXiv 2008.08186 (pinv); Galanti, Gyorgy,
        Hutter 2021, arXiv 2112.15121 (cdnv).

    Examples:
        >>> features = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
        >>> kinds = ("trace", "pinv", "cdnv")
        >>> [round(nc1(features, torch.tensor([0, 0, 1, 1]), kind), 6) for kind in kinds]
        [0.25, 0.125, 0.0625]
    """
    if kind not in ("trace", "pinv", "cdnv"):
        raise InputError(f'kind must be "trace", "pinv" or "cdnv", got {kind!r}')
    if not 0 <= rcond < 1:
        raise InputError(f"rcond must be in [0, 1), got {rcond}")
    count = _count(classes, None)
    if kind == "pinv":
        scatter = RunningScatter.of(features, classes, count)
        basis = between_whitener(moment_means(scatter.moments), rcond)
        return _pinv(scatter.moments, float((basis * (scatter.within @ basis)).sum()))
    moments = RunningMoments.of(features, classes, count)
    return _trace(moments) if kind == "trace" else _cdnv(moments)


def nc2(means: Float[Tensor, "classes features"]) -> float:
    """Distance of the centred class means from a simplex equiangular tight frame; 0 if they form one, below 2 always.

    Args:
        means: of each class, not yet centred; rows of NaN are classes without samples.

    Source:
        Zhu et al. 2021, arXiv 2105.02375.

    Examples:
        >>> round(nc2(torch.eye(4)), 6)  # an orthonormal frame, centred, is a simplex
        0.0
    """
    centred = centred_means(means)
    return _from_simplex(centred @ centred.T)


def equinorm(means: Float[Tensor, "classes features"]) -> float:
    """How unequal the lengths of the centred class means are: their standard deviation over their mean.

    Args:
        means: of each class, not yet centred; rows of NaN are classes without samples.

    Examples:
        >>> round(equinorm(torch.eye(3)), 6)
        0.0
    """
    lengths = centred_means(means).norm(dim=1)
    return float(lengths.std(correction=0) / lengths.mean()) if len(lengths) > 1 else math.nan


def equiangularity(means: Float[Tensor, "classes features"]) -> tuple[float, float]:
    """How unequal the angles between centred class means are, and how far from the widest possible.

    Args:
        means: of each class, not yet centred; rows of NaN are classes without samples.

    Returns:
        Standard deviation of the cosines over pairs of classes; mean of |cosine + 1 / (K - 1)|. NaN where a mean has no direction.

    Examples:
        >>> [round(value, 6) for value in equiangularity(torch.eye(3))]
        [0.0, 0.0]
    """
    centred = centred_means(means)
    count = len(centred)
    if count < 2:
        return math.nan, math.nan
    directions = centred / centred.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(count, count, 1)
    cosines = (directions[first] * directions[second]).sum(1)
    return float(cosines.std(correction=0)), float((cosines + 1 / (count - 1)).abs().mean())


def nc3(
    weight: Float[Tensor, "classes features"], means: Float[Tensor, "classes features"]
) -> tuple[float, float]:
    """How far the last layer's weights are from pointing at the class means.

    Args:
        weight: W of the last layer.
        means: of the features that enter it, not yet centred; rows of NaN are classes without samples.

    Returns:
        Distance of W M from a simplex (0 when W is aligned with simplex means), and the self-duality gap between W^T and M, each of norm
        one; both between 0 and 2.

    Raises:
        ValueError: if the two differ in shape.

    Source:
        Zhu et al. 2021, arXiv 2105.02375; Papyan, Han, Donoho 2020, arXiv 2008.08186.

    Examples:
        >>> means = torch.eye(3)
        >>> [round(value, 6) for value in nc3(5 * (means - means.mean(0)), means)]
        [0.0, 0.0]
    """
    if weight.shape != means.shape:
        raise InputError(
            f"weight must be (classes, features) as the means are, {tuple(means.shape)}, got {tuple(weight.shape)}"
        )
    centred = centred_means(means)
    rows = weight.detach().to(centred)[seen_classes(means)]
    if len(centred) < 2:
        return math.nan, math.nan
    gap = rows / rows.norm() - centred / centred.norm()
    return _from_simplex(rows @ centred.T), float(gap.norm())


def nc4(
    features: Float[Tensor, "samples features"],
    logits: Float[Tensor, "samples classes"],
    means: Float[Tensor, "classes features"],
) -> float:
    """Share of samples for which the network decides as the nearest class mean does; 1 after collapse.

    Some papers report 1 minus this. On test samples with the means of the training samples it is the "nearest class centre mismatch".

    Args:
        features: of the samples to decide on.
        logits: what the network says of them.
        means: of each class, from training features; rows of NaN are classes without samples, and never the nearest.

    Returns:
        In [0, 1]; NaN without samples or without means. The first of equally near means, or equal logits, decides.

    Raises:
        ValueError: if shapes do not match.

    Examples:
        >>> means = torch.tensor([[0.0], [4.0]])
        >>> nc4(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]]), means)
        0.5
    """
    if logits.shape != (len(features), len(means)):
        raise InputError(
            f"logits must be (samples, classes), {(len(features), len(means))}, got {tuple(logits.shape)}"
        )
    if len(features) == 0 or not bool(seen_classes(means).any()):
        return math.nan
    return float((logits.argmax(1) == nearest_mean(features, means)).double().mean())


def nearest_mean(
    features: Float[Tensor, "samples features"], means: Float[Tensor, "classes features"]
) -> Int[Tensor, " samples"]:
    """Class whose mean is nearest to each sample, by Euclidean distance.

    Args:
        features: any float type.
        means: of each class; rows of NaN are never the nearest.

    Examples:
        >>> nearest_mean(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [math.nan], [4.0]]))
        tensor([0, 2])
    """
    means = means.detach().to(accumulation_dtype(means.device))
    distances = torch.cdist(features.detach().to(means), means, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(seen_classes(means), distances, math.inf).argmin(1)


def collapse_metrics(
    moments: RunningMoments | RunningScatter, weight: Float[Tensor, "classes features"] | None = None
) -> dict[str, float]:
    """Everything about collapse that streamed statistics tell, without the samples.

    Args:
        moments: of each class. `RunningMoments` needs no matrix of features by features; only `RunningScatter` knows "nc1_pinv".
        weight: W of the last layer, for "nc3" and "self_duality".

    Returns:
        "nc1" (trace), "cdnv", "nc2", "equinorm", "equiangular", "angle_gap" (from the widest angle), and where known "nc1_pinv", "nc3" and
        "self_duality".

    Raises:
        ValueError: if the weights do not match the means.

    Examples:
        >>> features, classes = torch.randn(60, 5), torch.arange(3).repeat(20)
        >>> parts = [RunningMoments.of(*part, 3) for part in zip(features.split(25), classes.split(25))]
        >>> sorted(collapse_metrics(parts[0].merge(parts[1]).merge(parts[2])))
        ['angle_gap', 'cdnv', 'equiangular', 'equinorm', 'nc1', 'nc2']
    """
    scatter = moments if isinstance(moments, RunningScatter) else None
    plain = moments.moments if isinstance(moments, RunningScatter) else moments
    means = moment_means(plain)
    spread, gap = equiangularity(means)
    found = {
        "nc1": _trace(plain),
        "cdnv": _cdnv(plain),
        "nc2": nc2(means),
        "equinorm": equinorm(means),
        "equiangular": spread,
        "angle_gap": gap,
    }
    if scatter is not None:
        basis = between_whitener(means)
        found["nc1_pinv"] = _pinv(plain, float((basis * (scatter.within @ basis)).sum()))
    if weight is not None:
        found["nc3"], found["self_duality"] = nc3(weight, means)
    return found


def between_whitener(
    means: Float[Tensor, "classes features"], rcond: float = RCOND
) -> Float[Tensor, "features directions"]:
    """B with B B^T = pinv(S_B) / K: columns along the principal directions of the centred class means, at most K - 1.

    The squared length of (h - h_class) B, averaged over samples, is NC1 "pinv": a second pass over the data needs no covariance matrix.

    Args:
        means: of each class, not yet centred; rows of NaN are classes without samples.
        rcond: variances of S_B below this share of the largest are left out.

    Examples:
        >>> between_whitener(torch.tensor([[-2.0, 0.0], [2.0, 0.0]])).abs().round(decimals=3)
        tensor([[0.3540],
                [0.0000]], dtype=torch.float64)
    """
    centred = centred_means(means)
    if len(centred) < 2 or not bool(centred.isfinite().all()):
        return centred.new_zeros(centred.shape[1], 0)
    _, scale, directions = torch.linalg.svd(centred, full_matrices=False)
    scale, directions = scale[: len(centred) - 1], directions[: len(centred) - 1]
    kept = scale.square() > rcond * scale[0].square()
    return directions[kept].T / scale[kept]


def _pinv(moments: RunningMoments, projected: float) -> float:
    """NC1 "pinv" from the sum of squared lengths of whitened deviations."""
    trace = _trace(moments)
    # Without a spread of the means there is nothing to divide by, as for the trace.
    return projected / int(moments.count.sum()) if math.isfinite(trace) else trace


def _trace(moments: RunningMoments) -> float:
    centred = without_rounding(centred_means(moment_means(moments)), mean_rounding(moments))
    if len(centred) < 2:
        return math.nan
    return float(moments.squares.sum() / moments.count.sum() / (centred.square().sum() / len(centred)))


def _cdnv(moments: RunningMoments) -> float:
    seen = moments.count > 0
    means = moments.mean[seen]
    variances = moments.squares[seen].sum(1) / moments.count[seen]
    if len(means) < 2:
        return math.nan
    first, second = torch.triu_indices(len(means), len(means), 1)
    distances = without_rounding(means[first] - means[second], mean_rounding(moments)).square().sum(1)
    return float(((variances[first] + variances[second]) / (2 * distances)).mean())


def _from_simplex(gram: Tensor) -> float:
    count = len(gram)
    if count < 2:
        return math.nan
    simplex = torch.eye(count).to(gram) - 1 / count
    return float((gram / gram.norm() - simplex / math.sqrt(count - 1)).norm())


def _count(classes: Tensor, num_classes: int | None) -> int:
    if num_classes is not None:
        return num_classes
    return max(int(classes.max()), 0) + 1 if len(classes) else 1
