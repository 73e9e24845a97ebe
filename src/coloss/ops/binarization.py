"""Numbers of one bit, and what to take for the derivative of the sign that made them."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from coloss.ops.gradients import first_order_only
from coloss.ops.precision import full_precision

Estimator = Literal["ste", "reste", "polynomial", "tanh"]

_CLIP = {"ste": 1.0, "reste": 1.5, "polynomial": 1.0, "tanh": math.inf}


def binarize(
    x: Float[Tensor, "*shape"],
    estimator: Estimator = "reste",
    *,
    power: float | Tensor = 1.0,
    clip: float | None = None,
    small: float = 0.1,
) -> Float[Tensor, "*shape"]:
    r"""The sign of each entry, +1 for 0, with a chosen slope in its backward pass.

    The forward pass is the same for every estimator: $\mathrm{sign}(x)$, where both zeros give +1 and NaN stays NaN. The gradient is
    multiplied by `binarization_slope`.

    Args:
        x: weights or activations.
        estimator: "ste", "reste", "polynomial" or "tanh", see `binarization_slope`.
        power: of "reste" and "tanh", >= 1; a number or a scalar tensor, such as a buffer that a schedule fills.
        clip: no gradient beyond this |x|, > 0; None: 1.5 for "reste", 1 for "ste" and "polynomial", no limit for "tanh".
        small: |x| below which the slope of "reste" is that of a secant, > 0.

    Returns:
        -1 and +1 in the type of `x`.

    Raises:
        ValueError: for an unknown estimator, or power, clip or small out of range.

    Cost: keeps `x` for the backward pass, which computes the slope in at least float32.

    Source: Wu et al. 2023 (ReSTE), arXiv 2308.06689.

    Examples:
        >>> x = torch.tensor([-0.5, 0.0, 1.6], requires_grad=True)
        >>> binarize(x, power=3.0).sum().backward()
        >>> binarize(x).tolist(), x.grad
        ([-1.0, 1.0, 1.0], tensor([0.5291, 4.6416, 0.0000]))
    """
    _check(estimator, power, clip, small)
    scalar = power if isinstance(power, Tensor) else x.new_tensor(power, dtype=torch.float32)
    return _Binarize.apply(x, scalar, estimator, clip, small)


def binarization_slope(
    x: Float[Tensor, "*shape"],
    estimator: Estimator = "reste",
    *,
    power: float | Tensor = 1.0,
    clip: float | None = None,
    small: float = 0.1,
) -> Float[Tensor, "*shape"]:
    r"""What stands for the derivative of the sign in the backward pass of `binarize`.

    With o the `power`, m `small` and t the `clip`; 0 where |x| > t:

        ste         1
        reste       |x|^{(1 - o) / o} / o   where |x| > m;   m^{(1 - o) / o} where |x| <= m
        polynomial  2 - 2 |x|
        tanh        o (1 - tanh^2(o x))

    "reste" is the derivative of sign(x) |x|^{1/o}, which is x at o = 1 and nears the sign as o grows. At |x| = m it jumps by the factor o.
    As o grows the inner slope nears 1 / m, here 10: raise `small` or clip gradients then. "tanh" is the second half of the schedule of IR-Net.

    Args:
        x, estimator, power, clip, small: as in `binarize`.

    Returns:
        Slopes >= 0, at least float32.

    Raises:
        ValueError: as `binarize`.

    Examples:
        >>> binarization_slope(torch.tensor([0.05, 0.5, 1.6]), power=3.0)
        tensor([4.6416, 0.5291, 0.0000])
    """
    _check(estimator, power, clip, small)
    size = full_precision(x.detach()).abs()
    limit = _CLIP[estimator] if clip is None else clip
    if estimator == "ste":
        slope = torch.ones_like(size)
    elif estimator == "polynomial":
        slope = (2 - 2 * size).clamp(min=0)
    elif estimator == "tanh":
        slope = power * (1 - (power * size).tanh().square())
    else:
        inner = size <= small
        # Never below `small`: the power of 0 in the branch that is not taken would be infinite.
        slope = size.clamp(min=small) ** ((1 - power) / power)
        slope = torch.where(inner, slope, slope / power)
    return slope.to(size.dtype).masked_fill(size > limit, 0.0)


def rectified_power(x: Float[Tensor, "*shape"], power: float) -> Float[Tensor, "*shape"]:
    r"""$\mathrm{sign}(x) |x|^{1/o}$: the function whose derivative the ReSTE estimator takes for that of the sign.

    Args:
        x: any tensor.
        power: o >= 1; 1 is the identity, infinity the sign (0 at 0).

    Raises:
        ValueError: for power < 1.

    Examples:
        >>> rectified_power(torch.tensor([-8.0, 0.0, 1.0]), 3.0)
        tensor([-2.,  0.,  1.])
    """
    if not power >= 1:
        raise ValueError(f"power must be >= 1, got {power}")
    return x.sign() * x.abs() ** (1 / power)


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, power: Tensor, estimator: Any, clip: float | None, small: float
    ) -> Tensor:
        # A buffer that a schedule fills anew before the backward pass must not change this step.
        ctx.save_for_backward(x, power.detach().clone())
        ctx.options = estimator, clip, small
        return torch.where(x >= 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)

    @staticmethod
    @first_order_only("binarize")
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, power = ctx.saved_tensors
        estimator, clip, small = ctx.options
        slope = binarization_slope(x, estimator, power=power, clip=clip, small=small)
        return (gradient * slope).to(x.dtype), None, None, None, None


def _check(estimator: str, power: float | Tensor, clip: float | None, small: float) -> None:
    if estimator not in _CLIP:
        raise ValueError(f"estimator must be one of {', '.join(_CLIP)}, got {estimator!r}")
    # A tensor is not looked at: that would wait for the device at every call.
    if not isinstance(power, Tensor) and not 1 <= power < math.inf:
        raise ValueError(f"power must be >= 1 and finite, got {power}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    if not small > 0:
        raise ValueError(f"small must be > 0, got {small}")
