"""Whether a classifier's probabilities can be believed: calibration error, likelihood, Brier score.

The first argument may be logits or probabilities where its name says so. Rows that lie in [0, 1] and sum to 1
(within 0.01, as half precision needs) are taken for probabilities, anything else for logits; `from_logits`
settles it by hand. An empty batch and NaN inputs give NaN.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coloss.ops import full_precision

from .classification import _check_classes


def expected_calibration_error(
    logits_or_probabilities: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    bins: int = 15,
    *,
    from_logits: bool | None = None,
) -> Float[Tensor, ""]:
    """Mean gap between confidence and accuracy over bins of equal confidence width.

        ECE = sum_b (n_b / n) * |accuracy_b - confidence_b|

    where bin b of `bins` holds the n_b samples whose largest probability lies in ((b - 1) / bins, b / bins].

    Args:
        logits_or_probabilities: class scores.
        targets: class indices in [0, classes).
        bins: number of bins, >= 1. Values compare only at equal numbers of bins and of samples: few samples
            in a bin raise the error by chance.
        from_logits: True for logits, False for probabilities, None to tell by the values.

    Returns:
        A scalar in [0, 1]: 0 is perfectly calibrated.

    Raises:
        ValueError: if the sizes disagree, a target is no class index or bins < 1.

    Source:
        Guo et al. 2017, arXiv 1706.04599, section 2. The last bin is closed at 1, so certain predictions
        share it.

    Examples:
        >>> probabilities = torch.tensor([[0.75, 0.25]]).repeat(4, 1)
        >>> targets = torch.tensor([0, 0, 0, 1])  # 75 % sure, and right in 3 of 4
        >>> expected_calibration_error(probabilities, targets)
        tensor(0.)
    """
    _check_classes(logits_or_probabilities, targets)
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    probabilities = _probabilities(logits_or_probabilities, from_logits)
    if not len(targets) or bool(probabilities.isnan().any()):
        return probabilities.new_tensor(float("nan"))
    confidence, predictions = probabilities.max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    index = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    surplus = (predictions == targets).to(confidence.dtype) - confidence
    return confidence.new_zeros(bins).index_add(0, index, surplus).abs().sum() / len(targets)


def negative_log_likelihood(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean negative log-probability of the target class, in nats.

        NLL = mean_i ( logsumexp(logits_i) - logits_i[targets_i] )

    Args:
        logits: unnormalised log-probabilities; log-probabilities are left unchanged by the normalisation.
        targets: class indices in [0, classes).

    Returns:
        A scalar >= 0; infinite if a target class has logit -inf; log(classes) for a uniform prediction.

    Raises:
        ValueError: if the sizes disagree or a target is no class index.

    Examples:
        >>> negative_log_likelihood(torch.zeros(2, 4), torch.tensor([0, 3]))  # log 4
        tensor(1.3863)
    """
    _check_classes(logits, targets)
    return F.cross_entropy(full_precision(logits), targets.long())


def brier_score(
    logits_or_probabilities: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    *,
    from_logits: bool | None = None,
) -> Float[Tensor, ""]:
    """Mean squared distance between predicted probabilities and the one-hot target, summed over classes.

        Brier = mean_i sum_c (p_ic - [targets_i = c])^2

    Args:
        logits_or_probabilities: class scores.
        targets: class indices in [0, classes).
        from_logits: True for logits, False for probabilities, None to tell by the values.

    Returns:
        A scalar in [0, 2]: 0 is perfect, 2 is certain and always wrong. Two classes give twice the binary
        score.

    Raises:
        ValueError: if the sizes disagree or a target is no class index.

    Source:
        Brier 1950, Verification of forecasts expressed in terms of probability.

    Examples:
        >>> brier_score(torch.tensor([[0.8, 0.2]]), torch.tensor([0]))  # 0.2^2 + 0.2^2
        tensor(0.0800)
    """
    _check_classes(logits_or_probabilities, targets)
    target_share = F.one_hot(targets.long(), logits_or_probabilities.shape[1])
    return (_probabilities(logits_or_probabilities, from_logits) - target_share).square().sum(1).mean()


def _probabilities(values: Tensor, from_logits: bool | None) -> Tensor:
    values = full_precision(values)
    if from_logits is None:
        inside = bool(((values >= 0) & (values <= 1)).all())
        from_logits = not (inside and bool(((values.sum(1) - 1).abs() <= 0.01).all()))
    return values.softmax(1) if from_logits else values
