"""Joins the class scores of several networks by weights that are chosen on validation data."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor


def fuse_scores(
    scores: Sequence[Tensor],
    weights: Sequence[float] | Float[Tensor, " networks"] | None = None,
) -> Float[Tensor, "samples classes"]:
    """Weighted sum of the scores of several networks for the same samples.

    Args:
        scores: (samples, classes) of each network, all logits or all log-probabilities.
        weights: one for each network, >= 0; equal ones that sum to 1 by default. Choose others by `fit_fusion_weights` on validation data,
            never on test data.

    Raises:
        ValueError: for no scores, scores of different shapes, or weights that do not fit them or are negative.

    Examples:
        >>> fuse_scores([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 4.0]])], [2.0, 1.0])
        tensor([[2., 4.]])
    """
    _check(scores)
    stacked = torch.stack(list(scores))
    if weights is None:
        return stacked.mean(0)
    factors = torch.as_tensor(weights, dtype=stacked.dtype, device=stacked.device)
    if factors.shape != (len(scores),) or not bool((factors >= 0).all()):
        raise ValueError(f"weights must be {len(scores)} numbers >= 0, got {factors.tolist()}")
    return torch.einsum("n,nsc->sc", factors, stacked)


def fit_fusion_weights(
    scores: Sequence[Tensor],
    targets: Int[Tensor, " targets"],
    penalty: float = 0.01,
) -> Float[Tensor, " networks"]:
    """Weights >= 0 whose fused scores give the true classes the greatest probability.

        minimise  mean over samples of -log softmax(sum_i w_i s_i)[target] + penalty * sum_i (w_i - 1/n)^2

    Convex, so there is one answer; no search over accuracy, which has plateaus and many.

    Args:
        scores: (samples, classes) of each of n networks, on validation samples that none of them was trained on.
        targets: true classes.
        penalty: >= 0; how much a weight may differ from that of the mean.

    Returns:
        float32 weights, on the CPU.

    Raises:
        ValueError: for scores that do not fit, no samples, targets out of range, scores that are not finite, or a negative penalty.

    Examples:
        >>> targets = torch.tensor([0, 1, 1])
        >>> right, noise = torch.eye(2)[targets], torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        >>> weights = fit_fusion_weights([right, noise], targets)
        >>> bool(weights[0] > 1), round(weights[1].item(), 3)
        (True, 0.0)
    """
    _check(scores)
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty must be >= 0 and finite, got {penalty}")
    stacked = torch.stack([score.detach().double().cpu() for score in scores])
    wanted = targets.cpu()
    if not len(wanted) or len(wanted) != stacked.shape[1]:
        raise ValueError(f"targets must be {stacked.shape[1]}, at least one, got {len(wanted)}")
    if wanted.min() < 0 or wanted.max() >= stacked.shape[2]:
        raise ValueError(f"targets must be in [0, {stacked.shape[2]}), got {wanted.min()} to {wanted.max()}")
    if not bool(stacked.isfinite().all()):
        raise ValueError("scores must be finite")
    count = len(scores)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(values, requires_grad=True)
        fused = torch.einsum("n,nsc->sc", weights, stacked)
        total = (
            torch.nn.functional.cross_entropy(fused, wanted) + penalty * (weights - 1 / count).square().sum()
        )
        total.backward()
        assert weights.grad is not None
        return total.item(), weights.grad.numpy()

    start = np.full(count, 1 / count)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * count)
    return torch.from_numpy(found.x).float()


def _check(scores: Sequence[Tensor]) -> None:
    shapes = [tuple(score.shape) for score in scores]
    if not shapes or len(set(shapes)) != 1:
        raise ValueError(f"scores must be at least one, all of one shape, got {shapes}")
