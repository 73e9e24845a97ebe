"""How good predictions are: accuracy and its class-balanced forms, mean squared error, r2.

Every function returns a scalar tensor. An empty batch has no mean and gives NaN. A row of logits that holds a
NaN predicts no class at all and counts as wrong, so a diverged network never scores by accident; equal logits
predict the lowest class.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def accuracy(logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Share of samples whose largest logit belongs to the target class.

    Args:
        logits: class scores; probabilities do as well.
        targets: class indices in [0, classes).

    Returns:
        A scalar in [0, 1]; NaN for an empty batch.

    Raises:
        ValueError: if the sizes disagree or a target is no class index.

    Examples:
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
        tensor(0.6667)
    """
    _check_classes(logits, targets)
    return (_predicted_classes(logits) == targets).float().mean()


def balanced_accuracy(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Recall averaged over the classes that occur, so that a rare class weighs as much as a frequent one.

        mean over classes c with n_c > 0 of (correct samples of c) / n_c,    n_c = samples with target c

    Args:
        logits: class scores; probabilities do as well.
        targets: class indices in [0, classes). Classes that occur in no target are left out of the mean.

    Returns:
        A scalar in [0, 1]; equal to `accuracy` if all samples share one class; NaN for an empty batch.

    Raises:
        ValueError: if the sizes disagree or a target is no class index.

    Examples:
        >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        >>> balanced_accuracy(logits, torch.tensor([0, 0, 0, 1]))
        tensor(0.5000)
    """
    hits, support, _ = _class_counts(logits, targets)
    occurs = support > 0
    return (hits[occurs] / support[occurs]).mean()


def macro_f1(logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """F1 score averaged over the classes that occur among targets or predictions.

        F1_c = 2 * hits_c / (targets_c + predictions_c)

    Args:
        logits: class scores; probabilities do as well.
        targets: class indices in [0, classes).

    Returns:
        A scalar in [0, 1]. A class that is predicted but occurs in no target counts with F1 = 0, one that
        appears on neither side is left out, as in scikit-learn. NaN for an empty batch.

    Raises:
        ValueError: if the sizes disagree or a target is no class index.

    Examples:
        >>> macro_f1(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
        tensor(0.6667)
    """
    hits, support, predicted = _class_counts(logits, targets)
    total = support + predicted
    return (2 * hits[total > 0] / total[total > 0]).mean()


def mean_squared_error(
    predictions: Float[Tensor, "batch *outputs"], targets: Float[Tensor, "batch *outputs"]
) -> Float[Tensor, ""]:
    """Squared difference averaged over samples and outputs.

    Args:
        predictions: predicted values.
        targets: true values, of the same shape. Shapes are never broadcast: (batch, 1) against (batch,) is an
            error.

    Returns:
        A scalar >= 0 in the squared unit of the targets; NaN for an empty batch.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)
    """
    predictions, targets = _as_values(predictions, targets)
    return (predictions - targets).square().mean()


def r2_score(
    predictions: Float[Tensor, "batch *outputs"], targets: Float[Tensor, "batch *outputs"]
) -> Float[Tensor, ""]:
    """Share of the targets' variance that the predictions explain, averaged over outputs.

        r2 = 1 - sum_i (y_i - p_i)^2 / sum_i (y_i - mean(y))^2

    with targets y and predictions p; 1 is perfect, 0 is as good as predicting the mean, below 0 is worse than
    that.

    Args:
        predictions: predicted values.
        targets: true values, of the same shape.

    Returns:
        A scalar <= 1. An output whose targets are constant scores 1 if predicted exactly and 0 otherwise, as
        in scikit-learn. Fewer than 2 samples have no variance: NaN.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> r2_score(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor(0.5000)
    """
    predictions, targets = _as_values(predictions, targets)
    if len(targets) < 2:
        return predictions.new_tensor(float("nan"))
    residual = (targets - predictions).square().sum(0)
    constant = (targets == targets[0]).all(0)
    total = (targets - targets.mean(0)).square().sum(0)
    score = 1 - residual / torch.where(constant, torch.ones_like(total), total)
    return torch.where(constant, (residual == 0).to(score.dtype), score).mean()


def _check_classes(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            "logits must be (batch, classes) and targets (batch,), "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        low, high = int(targets.min()), int(targets.max())
        raise ValueError(f"targets must be in [0, {logits.shape[1]}), got values from {low} to {high}")


def _predicted_classes(logits: Tensor) -> Tensor:
    if not len(logits):
        return torch.empty(0, dtype=torch.long, device=logits.device)
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def _class_counts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count hits, targets and predictions of each class."""
    _check_classes(logits, targets)
    targets, predictions, classes = targets.long(), _predicted_classes(logits), logits.shape[1]
    hits = torch.bincount(targets[predictions == targets], minlength=classes)
    support = torch.bincount(targets, minlength=classes)
    return hits, support, torch.bincount(predictions[predictions >= 0], minlength=classes)


def _as_values(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if predictions.shape != targets.shape:
        shapes = f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"predictions and targets must have one shape, got {shapes}")
    dtype = torch.promote_types(torch.promote_types(predictions.dtype, targets.dtype), torch.float32)
    return predictions.to(dtype), targets.to(dtype)
