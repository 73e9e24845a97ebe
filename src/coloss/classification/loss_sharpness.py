"""How sharply a loss rises around a network's weights: a measurement, nothing is trained.

For a loss L at weights w with gradient g and Hessian H, and the unit vector u = g / ||g||:

    gap          L(w + rho * u) - L(w)      how much the worst small step costs, to first order
    curvature    u' H u                     the second derivative along that step

The gap is the quantity that sharpness-aware minimisation lowers (Foret, Kleiner, Mobahi, Neyshabur 2021, arXiv 2010.01412). It is
confounded with the loss: a network that fits its data perfectly has gap 0 however sharp the valley, since g vanishes. Compare
networks at equal training loss, or `relative_curvature` = curvature / loss, which has no unit of loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.metrics import evaluation_mode


class Sharpness(NamedTuple):
    """What `sharpness` measured.

    Attributes:
        loss: at the weights.
        gap: rise of the loss after a step of length rho along the gradient; 0 where the gradient is.
        gradient_norm: length of the gradient.
        curvature: second derivative of the loss along the gradient; 0 where the gradient is.
    """

    loss: float
    gap: float
    gradient_norm: float
    curvature: float

    @property
    def relative_curvature(self) -> float:
        """Curvature over loss; NaN where the loss is 0."""
        return self.curvature / self.loss if self.loss != 0 else float("nan")


def sharpness(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batch: tuple[Any, Any],
    rho: float = 0.05,
) -> Sharpness:
    """Rise and curvature of a loss along its own gradient, in weight space.

    The network runs in evaluation mode, and is left as it was: weights, modes, gradients and running statistics.

    Args:
        model: called as `model(inputs)`; its trainable parameters are what moves.
        loss: `(outputs, targets) -> scalar`.
        batch: (inputs, targets), as much of the training data as fits.
        rho: length of the step, > 0, in the unit of the weights.

    Returns:
        Loss, gap, gradient norm and curvature.

    Raises:
        InputError: if rho is not > 0, or the loss depends on no trainable parameter.

    Cost:
        Two forward passes and two backward passes; the memory of a double backward pass.

    Source:
        Foret et al. 2021, arXiv 2010.01412, equation 2, for the step.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(2.0)
        >>> found = sharpness(
        ...     model, lambda outputs, targets: outputs.square().mean(), (torch.ones(1, 1), None), 0.5
        ... )
        >>> found.loss, found.gap, found.gradient_norm, found.curvature  # w^2 at w = 2, and at 2.5
        (4.0, 2.25, 4.0, 2.0)
    """
    if not rho > 0:
        raise InputError(f"rho must be > 0, got {rho}")
    inputs, targets = batch
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with evaluation_mode(model), torch.enable_grad():
        value = loss(model(inputs), targets)
        if not parameters or not value.requires_grad:
            raise InputError("loss must depend on a trainable parameter of the model, and depends on none")
        gradients = torch.autograd.grad(
            value, list(parameters.values()), create_graph=True, allow_unused=True
        )
        moved = [(name, g) for name, g in zip(parameters, gradients, strict=True) if g is not None]
        norm = torch.cat([g.detach().flatten().double() for _, g in moved]).norm()
        if norm == 0:
            return Sharpness(float(value.detach()), 0.0, 0.0, 0.0)
        unit = [(g.detach() / norm).to(g.dtype) for _, g in moved]
        slope = sum((g * u).sum() for (_, g), u in zip(moved, unit, strict=True))
        bent: list[Tensor | None] = [None] * len(moved)
        if isinstance(slope, Tensor) and slope.requires_grad:
            bent = list(
                torch.autograd.grad(slope, [parameters[name] for name, _ in moved], allow_unused=True)
            )
        curvature = sum(
            float((h * u).sum().detach()) for h, u in zip(bent, unit, strict=True) if h is not None
        )
        there = {name: parameters[name].detach() + rho * u for (name, _), u in zip(moved, unit, strict=True)}
        with torch.no_grad():
            risen = loss(torch.func.functional_call(model, there, (inputs,)), targets)
    return Sharpness(float(value.detach()), float(risen) - float(value.detach()), float(norm), curvature)
