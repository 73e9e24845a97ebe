"""How far features are from what naive Bayes takes them for, Gaussian and independent within a class; and data that are just that."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops import RunningMoments, full_precision


@dataclass(frozen=True, eq=False)
class FeatureDiagnostics:
    """What speaks for and against a Gaussian naive Bayes head on some features.

    Attributes:
        deviation: of each feature around the mean of its class (features).
        non_gaussianity: KL divergence, in nats, of each feature's histogram within a class from the normal distribution of the same mean
            and variance, over the same bins; averaged over samples (features). Some of it is sampling noise, about
            (bins - 3) / (2 * samples of a class).
        dependence: mean absolute correlation of two features within a class, in [0, 1].
        overconfidence: how much more the log-odds of two classes vary within a class than they would if features were independent,
            averaged over pairs of classes; 1 for independent features, as many as there are for copies of one. Naive Bayes is right
            about classes more often than about probabilities when this is large.
    """

    deviation: Tensor
    non_gaussianity: Tensor
    dependence: float
    overconfidence: float


@torch.no_grad()
def feature_diagnostics(
    features: Float[Tensor, "samples features"], classes: Int[Tensor, " samples"], bins: int = 20
) -> FeatureDiagnostics:
    """Measure how Gaussian and how independent features are within their classes.

    Args:
        features: one row for each sample; finite.
        classes: class of each, >= 0.
        bins: of the histograms, >= 2, over 3 deviations on each side of the class mean and two tails.

    Returns:
        Values in float64. A feature that is constant within the classes has deviation and divergence 0, and is left out of the rest.

    Raises:
        ValueError: for bins out of range, or rows that do not match.

    Cost:
        O(samples * features^2), memory O(features^2 + samples * features).

    Examples:
        >>> classes = torch.arange(2).repeat(500)
        >>> features = torch.randn(1000, 1) + 2 * classes[:, None]
        >>> found = feature_diagnostics(
        ...     features.repeat(1, 3), classes
        ... )  # three copies of one Gaussian feature
        >>> (
        ...     round(found.overconfidence, 2),
        ...     round(found.dependence, 2),
        ...     bool(found.non_gaussianity.max() < 0.1),
        ... )
        (3.0, 1.0, True)
    """
    if bins < 2:
        raise ValueError(f"bins must be >= 2, got {bins}")
    if features.ndim != 2 or classes.shape != features.shape[:1] or len(classes) == 0:
        raise ValueError(
            f"features must be (samples, features) and classes (samples), at least one; got {tuple(features.shape)} "
            f"and {tuple(classes.shape)}"
        )
    wide = full_precision(features).double()
    classes = classes.unique(return_inverse=True)[1]
    moments = RunningMoments.of(wide, classes, int(classes.max()) + 1)
    variance = moments.pooled_variance()
    varies = variance > 1e-20 * wide.square().mean(0).clamp(min=1e-300)
    centred = (wide - moments.mean[classes])[:, varies]
    divergence = torch.zeros_like(variance)
    divergence[varies] = _divergence(centred, classes, moments, varies, bins)
    covariance = centred.T @ centred / len(centred)
    spread = covariance.diagonal().sqrt()
    correlation = covariance / torch.outer(spread, spread)
    width = len(spread)
    others = correlation.abs().sum() - correlation.diagonal().abs().sum()
    dependence = float(others / (width * (width - 1))) if width > 1 else 0.0
    slope = moments.mean[:, varies] / spread.square()
    # Of all pairs of classes at once: sum over pairs of (a - b)' C (a - b).
    actual, assumed = (
        float(len(slope) * (slope * (slope @ matrix)).sum() - slope.sum(0) @ matrix @ slope.sum(0))
        for matrix in (covariance, torch.diag(spread.square()))
    )
    return FeatureDiagnostics(
        variance.sqrt(), divergence, dependence, actual / assumed if assumed > 0 else 1.0
    )


def sample_gaussian_mixture(
    samples: int,
    num_features: int,
    num_classes: int = 2,
    *,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "samples features"], Int[Tensor, " samples"]]:
    """Data of which naive Bayes is the truth ("easy"), or would be if features were independent ("hard").

    Classes are equally likely. Class k has mean -1, 1, 2, 4, 8 ... in every feature. The first half of the features has variance
    `num_features`, the second half 1; "hard" adds a random positive semi-definite matrix off the diagonal.

    Args:
        samples: how many, >= 1.
        num_features: >= 2.
        num_classes: >= 2.
        hard: let features depend on each other.
        generator: of the samples, and of the covariance if `hard`.

    Returns:
        Features in float64 and classes.

    Raises:
        ValueError: for a number out of range.

    Source:
        Zheng et al. 2023, arXiv 2302.02334, section 5.1.

    Examples:
        >>> features, classes = sample_gaussian_mixture(5, 4)
        >>> features.shape, classes.shape
        (torch.Size([5, 4]), torch.Size([5]))
    """
    for name, value, least in (
        ("samples", samples, 1),
        ("num_features", num_features, 2),
        ("num_classes", num_classes, 2),
    ):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    classes = torch.randint(num_classes, (samples,), generator=generator)
    means = torch.cat([torch.tensor([-1.0]), 2.0 ** torch.arange(num_classes - 1)]).double()
    variance = torch.ones(num_features, dtype=torch.float64)
    variance[: num_features // 2] = num_features
    noise = torch.randn(samples, num_features, generator=generator, dtype=torch.float64)
    if hard:
        mixing = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
        matrix = mixing @ mixing.T / num_features
        # Off the diagonal only: scaled so that the variances stay what they are.
        spread = (variance / matrix.diagonal()).sqrt()
        noise = (
            noise
            @ torch.linalg.cholesky(matrix * torch.outer(spread, spread) + 1e-9 * torch.diag(variance)).T
        )
    else:
        noise = noise * variance.sqrt()
    return noise + means[classes][:, None], classes


def _divergence(
    centred: Tensor, classes: Tensor, moments: RunningMoments, varies: Tensor, bins: int
) -> Tensor:
    edges = torch.linspace(-3, 3, bins - 1, dtype=torch.float64)
    inner = torch.special.ndtr(edges)
    expected = torch.diff(torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)]))
    total = centred.new_zeros(centred.shape[1])
    for number, size in enumerate(moments.count.tolist()):
        if size == 0:
            continue
        rows = centred[classes == number]
        spread = moments.variance()[number, varies].sqrt()
        # A feature that is constant in this class, though not in others, is as far from Gaussian as the bins can tell.
        scores = torch.where(spread > 0, rows / spread.clamp(min=1e-300), 0.0)
        places = torch.bucketize(scores, edges)
        found = torch.zeros(bins, centred.shape[1], dtype=torch.float64)
        found.scatter_add_(0, places, torch.ones_like(scores))
        share = found / size
        total += size * torch.where(share > 0, share * (share / expected[:, None]).log(), 0.0).sum(0)
    return total / len(classes)
