"""Mixing samples with each other: convex combinations, and the random weights they are made with."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def mix_pairs(
    first: Float[Tensor, "samples *features"],
    second: Float[Tensor, "samples *features"],
    weight: float | Float[Tensor, " samples"],
) -> Float[Tensor, "samples *features"]:
    r"""Convex combinations $\lambda_i a_i + (1 - \lambda_i) b_i$ of two batches, in new memory.

    Args:
        first: $a$, of any shape with samples first: inputs, feature maps or embeddings.
        second: $b$, of the same shape.
        weight: $\lambda$ in [0, 1], of the first: one number, or one for each sample.

    Returns:
        The mixed samples; those of weight 1 are exactly the first's.

    Raises:
        ValueError: if shapes differ.

    Examples:
        >>> mix_pairs(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([1.0, 0.25])).flatten()
        tensor([1.0000, 0.2500])
    """
    if first.shape != second.shape:
        raise ValueError(
            f"second must have the shape of first, {tuple(first.shape)}, got {tuple(second.shape)}"
        )
    if not isinstance(weight, Tensor):
        return weight * first + (1 - weight) * second
    if weight.shape != first.shape[:1]:
        raise ValueError(f"weight must have shape ({len(first)},), got {tuple(weight.shape)}")
    share = weight.to(first).reshape(-1, *[1] * (first.ndim - 1))
    return share * first + (1 - share) * second


def beta_weights(
    count: int, alpha: float, generator: torch.Generator | None = None, *, beta: float | None = None
) -> Float[Tensor, " count"]:
    """Independent draws from a Beta distribution on [0, 1], on the CPU.

    Args:
        count: how many.
        alpha: > 0; below 1 most draws lie near 0 and 1.
        generator: of randomness; None for torch's global one.
        beta: second parameter, > 0; None for a symmetric distribution.

    Raises:
        ValueError: for a parameter out of range.

    Examples:
        >>> weights = beta_weights(1000, 0.15, torch.Generator().manual_seed(0))
        >>> round(weights.mean().item(), 1), bool(((weights - 0.5).abs() > 0.4).float().mean() > 0.6)
        (0.5, True)
    """
    beta = alpha if beta is None else beta
    if not (0 < alpha < np.inf and 0 < beta < np.inf):
        raise ValueError(f"alpha and beta must be > 0 and finite, got {alpha} and {beta}")
    # NumPy's draws stay in range for tiny parameters, where the ratio of two gamma draws is 0 / 0.
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (), generator=generator, device=device).item()
    return torch.from_numpy(np.random.default_rng(int(seed)).beta(alpha, beta, count)).float()
