"""Small changes of the inputs that do a network the most harm: the inner maximisation of adversarial training, and its yardstick."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from coloss.metrics import evaluation_mode
from coloss.ops import full_precision

Norm = Literal["linf", "l2"]

Attack = Callable[[nn.Module, Tensor, Callable[[Any], Tensor]], Tensor]
"""(model, inputs, objective of the outputs) -> changed inputs."""


def projected_gradient_attack(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    objective: Callable[[Any], Tensor],
    eps: float = 8 / 255,
    step: float | None = None,
    steps: int = 10,
    norm: Norm = "linf",
    *,
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *shape"]:
    """Inputs within a small distance of the given ones at which an objective of the model's outputs is high.

        x_0  = x + a random point of the ball
        x_k+1 = project(x_k + step * g / |g|),    g = gradient of objective(model(x_k)),    k < steps

    with |g| taken entry by entry for `"linf"` (so that the sign is left) and over a whole sample for `"l2"`. The model is in
    evaluation mode meanwhile, and gets its modes back; its parameters gain no gradient.

    Args:
        model: called as `model(inputs)`; samples must not influence each other in evaluation mode.
        inputs: x, in the unit of `eps`.
        objective: outputs -> one number for each sample, or their sum, such as `lambda outputs: F.cross_entropy(outputs, target,
            reduction="sum")`.
        eps: radius >= 0 of the ball; 0 gives the inputs back.
        step: length > 0 of one step; default: 2.5 eps / steps.
        steps: >= 1.
        norm: the ball's norm over the entries of a sample.
        bounds: lowest and highest value that an input can have, such as (0, 1) for images.
        generator: of the random start; default: torch's global one.

    Returns:
        Inputs in the type of the given ones, without a graph. NaN gradients move nothing.

    Raises:
        ValueError: if a value is out of range, inputs lie outside the bounds, or the objective does not depend on the outputs.

    Cost: `steps` forward and backward passes; the memory of one.

    Source: Madry et al., 2018, arXiv 1706.06083.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> projected_gradient_attack(model, torch.zeros(1, 2), lambda outputs: outputs, eps=0.1)
        tensor([[0.1000, 0.1000]])
    """
    step = 2.5 * eps / steps if step is None and steps >= 1 else step
    _check(eps, step, steps, norm, bounds)
    if eps == 0 or not inputs.numel():
        return inputs.detach().clone()
    clean = full_precision(inputs.detach())
    if bounds is not None and not bool(((clean >= bounds[0]) & (clean <= bounds[1])).all()):
        raise ValueError(
            f"inputs must lie within bounds {bounds}, got {float(clean.min())} to {float(clean.max())}"
        )
    assert step is not None
    shift = _within(clean, _random_start(clean, eps, norm, generator), bounds)
    with evaluation_mode(model), torch.enable_grad():
        for _ in range(steps):
            changed = (clean + shift).to(inputs.dtype).requires_grad_()
            total = objective(model(changed)).sum()
            if not total.requires_grad:
                raise ValueError("objective must depend on the model's outputs, got a constant")
            (gradient,) = torch.autograd.grad(total, changed)
            gradient = full_precision(gradient).nan_to_num()
            direction = gradient.sign() if norm == "linf" else gradient / _lengths(gradient)
            shift = _project(shift + step * direction, eps, norm)
            shift = _within(clean, shift, bounds)
    return (clean + shift).to(inputs.dtype)


def robust_accuracy(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    target: Integer[Tensor, " batch"],
    attack: Attack | None = None,
) -> Float[Tensor, ""]:
    """Share of samples that a classifier gets right as they are, and still gets right when attacked.

    Args:
        model: gives logits (batch, classes); looked at in evaluation mode.
        inputs: samples.
        target: their class numbers.
        attack: (model, inputs, objective) -> changed inputs; default: `projected_gradient_attack` with 8/255 in 20 steps. It climbs the
            cross-entropy. The share is an upper bound on the true robustness: stronger attacks find more.

    Returns:
        A scalar in [0, 1]; NaN for an empty batch.

    Cost: that of the attack, and two forward passes.

    Examples:
        >>> model = nn.Linear(1, 2)
        >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0], [-1.0]]), "bias": torch.zeros(2)})
        >>> attack = partial(projected_gradient_attack, eps=0.5)
        >>> robust_accuracy(model, torch.tensor([[2.0], [0.2], [-1.0]]), torch.tensor([0, 0, 0]), attack)
        tensor(0.3333)
    """
    attack = partial(projected_gradient_attack, steps=20) if attack is None else attack
    changed = attack(model, inputs, lambda outputs: F.cross_entropy(outputs, target, reduction="sum"))
    with evaluation_mode(model):
        right = (model(inputs).argmax(1) == target) & (model(changed).argmax(1) == target)
    return right.float().mean()


def _random_start(clean: Tensor, eps: float, norm: Norm, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else clean.device
    if norm == "linf":
        drawn = torch.rand(clean.shape, generator=generator, device=device, dtype=clean.dtype)
        return (2 * drawn - 1).to(clean.device) * eps
    drawn = torch.randn(clean.shape, generator=generator, device=device, dtype=clean.dtype).to(clean.device)
    radius = torch.rand(len(clean), generator=generator, device=device, dtype=clean.dtype).to(clean.device)
    share = radius ** (1 / max(clean[0].numel(), 1))
    return drawn / _lengths(drawn) * (eps * share).reshape(-1, *[1] * (clean.ndim - 1))


def _project(shift: Tensor, eps: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return shift.clamp(-eps, eps)
    return shift * (eps / _lengths(shift)).clamp(max=1)


def _within(clean: Tensor, shift: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return shift if bounds is None else (clean + shift).clamp(*bounds) - clean


def _lengths(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, kept above 0, in a shape that broadcasts."""
    length = torch.linalg.vector_norm(x.flatten(1), dim=1) if x.ndim > 1 else x.abs()
    return length.clamp(min=torch.finfo(x.dtype).tiny).reshape(-1, *[1] * (x.ndim - 1))


def _check(eps: float, step: float | None, steps: int, norm: str, bounds: tuple[float, float] | None) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be >= 0 and finite, got {eps}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if step is not None and not (0 < step < math.inf or (eps == 0 and step == 0)):
        raise ValueError(f"step must be > 0 and finite, got {step}")
    if norm not in ("linf", "l2"):
        raise ValueError(f'norm must be "linf" or "l2", got {norm!r}')
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
