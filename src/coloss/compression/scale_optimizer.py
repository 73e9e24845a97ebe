"""How the scales of a switchable network learn: Adam with moments for each precision, at a rate adapted to it (ALRS).

With D = h - b for b bits of h, L layers, and the gradient g_i of the scale of layer i, clipped to norm 1, the rate is

    relative   eta_b lambda (1 - mean_i min(max|g_i|, 1))
    literal    eta_b max(lambda - mean_i min(max|g_i|, 1), 0)
    eta_b      10^(-D/2) for even D, 5 * 10^(-(D+1)/2) for odd D

"literal" is as printed, and mostly 0: gradients of 1e-2 are larger than a lambda of 5e-4. Scales are learned by their logarithms, so
that the rate is the largest relative step.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from coloss.compression.multibit_quantizers import FullPrecisionModule
from coloss.compression.switchable_layers import find_switchable
from coloss.errors import InputError

Adaptation: TypeAlias = Literal["relative", "literal"]


def precision_rate_factor(high_bits: int, bits: int) -> float:
    """How much slower scales move at fewer bits: eta_b, a tenth for each two bits.

    Raises:
        ValueError: unless bits <= high_bits.

    Examples:
        >>> [precision_rate_factor(8, bits) for bits in (8, 7, 6, 5, 4, 3, 2)]
        [1.0, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001]
    """
    fewer = high_bits - bits
    if fewer < 0:
        raise ValueError(f"bits must be <= high_bits {high_bits}, got {bits}")
    return 10.0 ** -(fewer // 2) if fewer % 2 == 0 else 5.0 / 10 ** ((fewer + 1) // 2)


def adaptive_scale_rate(
    gradients: Sequence[Tensor], rate: float, high_bits: int, bits: int, mode: Adaptation = "relative"
) -> float:
    """Learning rate of the scales at one precision, smaller where their gradients are large (ALRS).

    Args:
        gradients: of the scales, one tensor for each layer, at least one.
        rate: lambda > 0.
        high_bits, bits: the highest precision and the present one.
        mode: "relative", or "literal" for the formula as printed, which is clamped at 0.

    Raises:
        ValueError: for an unknown mode, no gradient or bits out of order.

    Source:
        Double Rounding 2025, arXiv 2502.01199, section 3.3. Which of the two its authors run is not known.

    Examples:
        >>> gradients = [torch.tensor(0.2), torch.tensor(-4.0)]
        >>> round(adaptive_scale_rate(gradients, 0.1, high_bits=8, bits=6), 6)
        0.004
        >>> adaptive_scale_rate(gradients, 0.1, high_bits=8, bits=6, mode="literal")
        0.0
    """
    if mode not in ("relative", "literal"):
        raise ValueError(f'mode must be "relative" or "literal", got {mode!r}')
    if not gradients:
        raise ValueError("gradients must hold at least one tensor, got none")
    clipped = [g.abs().max() / g.norm().clamp_min(1.0) for g in (g.detach().float() for g in gradients)]
    mean = float(torch.stack(clipped).clamp_max(1.0).mean())
    found = rate * (1 - mean) if mode == "relative" else max(rate - mean, 0.0)
    return precision_rate_factor(high_bits, bits) * found


class ScaleAdam(FullPrecisionModule):
    """Adam for the scales of a switchable model, with moments of their own for each precision and no weight decay.

    Precisions take turns on a shared scale, and their gradients differ by orders of magnitude: one memory for all would mix them. Its
    state dict holds the moments, so a loop that saves it beside the model goes on as if never stopped. Moments stay in float32 where it is
    turned to half precision.

    Args:
        model: with switchable layers.
        betas: decay of the two moments.
        eps: added to the root of the second.

    Examples:
        >>> import math
        >>> from coloss.compression import make_switchable
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = make_switchable(model, (8, 4))
        >>> scales = ScaleAdam(model)
        >>> before = model[1].weight_quantizer.scale.item()
        >>> scales.step({id(parameter): torch.ones(()) for parameter in scales.in_use()[8]}, {8: 0.1})
        >>> round(model[1].weight_quantizer.scale.item() / before, 4) == round(math.exp(-0.1), 4)
        True
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__()
        self.betas, self.eps = betas, eps
        self._slots: dict[int, list[Any]] = {}
        self.high_bits = 2
        for layer in find_switchable(model).values():
            self.high_bits = max(self.high_bits, layer.weight_quantizer.high_bits)
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                for bits in quantizer.bits if quantizer is not None else ():
                    self._slots.setdefault(bits, []).append(quantizer)
        for bits, quantizers in self._slots.items():
            flat = torch.cat([q.log_scale_at(bits).detach().reshape(-1) for q in quantizers])
            for name in ("first", "second", "count"):
                self.register_buffer(f"{name}_{bits}", torch.zeros_like(flat))

    def in_use(self) -> dict[int, list[nn.Parameter]]:
        """The scales that the model's present precisions use, by precision; their logarithms."""
        return {
            bits: [q.log_scale_at(bits) for q in quantizers if q.current == bits]
            for bits, quantizers in self._slots.items()
            if any(q.current == bits for q in quantizers)
        }

    def parameters_of_scales(self) -> set[int]:
        """The `id` of every scale's parameter, so that others leave them alone."""
        return {id(q.log_scale_at(bits)) for bits, quantizers in self._slots.items() for q in quantizers}

    @torch.no_grad()
    def step(self, gradients: Mapping[int, Tensor | None], rates: Mapping[int, float]) -> None:
        """Move the scales in use.

        Args:
            gradients: of their logarithms, by `id` of the parameter; None for those that the loss did not reach.
            rates: learning rate by precision.
        """
        for bits, rate in rates.items():
            quantizers = self._slots[bits]
            parameters = [q.log_scale_at(bits) for q in quantizers]
            found = [
                gradients.get(id(p)) if q.current == bits else None for p, q in zip(parameters, quantizers)
            ]
            flat = torch.cat(
                [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, found)]
            )
            moved = torch.cat(
                [torch.full_like(p, float(g is not None)).reshape(-1) for p, g in zip(parameters, found)]
            ).bool()
            first, second, count = (getattr(self, f"{name}_{bits}") for name in ("first", "second", "count"))
            count.add_(moved)
            first.copy_(torch.where(moved, torch.lerp(flat, first, self.betas[0]), first))
            second.copy_(torch.where(moved, torch.lerp(flat.square(), second, self.betas[1]), second))
            seen = count.clamp_min(1)
            size = (second / (1 - self.betas[1] ** seen)).sqrt() + self.eps
            step = torch.where(moved, rate * first / (1 - self.betas[0] ** seen) / size, 0.0)
            for parameter, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
                parameter.sub_(part.view_as(parameter))


def scale_rates(
    scales: ScaleAdam, gradients: Mapping[int, Tensor | None], rate: float, adaptation: Adaptation | None
) -> dict[int, float]:
    """Learning rates of the precisions in use, by `adaptive_scale_rate` on the gradients of the scales themselves."""
    rates = {}
    for bits, parameters in scales.in_use().items():
        reached = [(p, gradients[id(p)]) for p in parameters if gradients.get(id(p)) is not None]
        if adaptation is None or not reached:
            rates[bits] = rate
            continue
        # d/ds = d/d(log s) / s
        own = [gradient / p.detach().exp() for p, gradient in reached if gradient is not None]
        rates[bits] = adaptive_scale_rate(own, rate, scales.high_bits, bits, adaptation)
    return rates


def read_adaptation(alrs: bool | Adaptation) -> Adaptation | None:
    """What `alrs=` of the methods stands for: None where the rate is not adapted.

    Raises:
        InputError: for another value.
    """
    if alrs not in (True, False, "relative", "literal"):
        raise InputError(f'alrs must be True, False, "relative" or "literal", got {alrs!r}')
    return ("relative" if alrs else None) if isinstance(alrs, bool) else alrs
