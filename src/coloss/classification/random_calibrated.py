r"""Random derivatives of convex calibrated losses, and the loss that is known by them alone; equations stand in `coloss.classification.ensloss`."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from coloss.ops import full_precision, surrogate_gradient

Reduction = Literal["mean", "sum"]

_STRICTLY_BELOW = 1e-6
"""Taken off every slope at last: a draw of exactly 0 would not be calibrated."""


def random_calibrated_derivatives(
    margins: Float[Tensor, "batch *columns"],
    lam: float = 0.0,
    *,
    clip: float | None = 1.0,
    tail: float | None = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *columns"]:
    """Slopes phi'(m) of a loss drawn at random among the convex calibrated ones, at the margins of a batch.

        v_i = (1 + lam r_i)_+^(1/lam),  exp(r_i) at lam = 0,   r_i ~ N(0, 1)        inverse Box-Cox
        the steepest of the g = max(-v, -clip) to the smallest margin, and so on    so that phi is convex
        g * tail / m for margins m > tail                                          so that safe samples pull ever less
        g - 1e-6                                                                   so that phi'(0) < 0: calibrated

    Args:
        margins: m = y f(x), with y = +-1. Several columns are so many losses, drawn apart; samples are ranked within each.
        lam: finite, the Box-Cox parameter.
        clip: steepest slope > 0; None: none.
        tail: margin > 0 from which slopes fall as tail / m; None: nowhere.
        generator: of the draw; default: torch's global one.

    Returns:
        Slopes below 0 in the order of `margins`, at least float32, without a gradient. Equal margins share their slopes out at random.

    Raises:
        ValueError: for a value out of range; without `clip`, if lam < 0, where slopes could be infinite.

    Cost: O(batch log batch) for each column.

    Source: Dai, 2025, arXiv 2409.00908, algorithm 1.

    Examples:
        >>> margins = torch.tensor([2.0, -3.0, 0.5])
        >>> slopes = random_calibrated_derivatives(margins, generator=torch.Generator().manual_seed(0))
        >>> bool(slopes[1] <= slopes[2] <= slopes[0] < 0)
        True
    """
    check_options(lam, clip, tail)
    values = full_precision(margins.detach())
    device = generator.device if generator is not None else values.device
    normal = torch.randn(values.shape, generator=generator, device=device, dtype=values.dtype).to(
        values.device
    )
    slopes = -_inverse_box_cox(normal, lam)
    if clip is not None:
        slopes = slopes.clamp(min=-clip)
    order = values.argsort(dim=0)
    slopes = torch.empty_like(slopes).scatter_(0, order, slopes.sort(dim=0).values)
    if tail is not None:
        slopes = torch.where(values > tail, slopes * tail / values.clamp(min=tail), slopes)
    return slopes - _STRICTLY_BELOW


def ens_loss(
    input: Float[Tensor, "batch *classes"],
    target: Shaped[Tensor, "batch *rest"],
    weight: Float[Tensor, " weights"] | None = None,
    *,
    lam: float = 0.0,
    clip: float | None = 1.0,
    tail: float | None = 1.0,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """A loss drawn anew at each call, of which only the gradient exists: takes the place of `F.binary_cross_entropy_with_logits`.

    Its number is not that loss (which has none) but the logistic loss of the same scores, so that logs, early stopping and schedulers
    have something to read. Belongs to the batch as a whole (attribute `batch_statistic`): samples are ranked by their margins.

    Args:
        input: scores f: (batch,) or (batch, 1), positive for class 1; (batch, 2), read as one score, the second minus the first; or
            (batch, classes), each class against the rest, with a loss of its own.
        target: hard labels: 0 / 1 of any type in the shape of the scores, or class numbers (batch,).
        weight: > 0 of each class (two for one score), multiplies the slopes after they are ranked.
        lam, clip, tail, generator: as for `random_calibrated_derivatives`.
        reduction: `"mean"` or `"sum"` over samples (several columns of a sample are summed). There is no loss of a single sample.

    Returns:
        A scalar, at least float32: the logistic loss, weighted and reduced alike, whose gradient is y_i g_i w_i for each score. Second
        derivatives are 0.

    Raises:
        ValueError: if shapes do not fit, labels are not hard, or a value is out of range.

    Source: Dai, 2025, arXiv 2409.00908; more than two classes are ours.

    Examples:
        >>> scores = torch.tensor([0.0, 3.0], requires_grad=True)
        >>> loss = ens_loss(scores, torch.tensor([1.0, 0.0]), generator=torch.Generator().manual_seed(0))
        >>> loss.backward()
        >>> bool(
        ...     loss == torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor([1.0, 0.0]))
        ... )
        True
        >>> scores.grad.sign()  # up for the first, down for the second
        tensor([-1.,  1.])
    """
    check_options(lam, clip, tail, reduction)
    scores, signs, importance = signed_scores(input, target, weight)
    slopes = random_calibrated_derivatives(scores * signs, lam, clip=clip, tail=tail, generator=generator)
    return loss_from_slopes(scores, signs, slopes, importance, reduction)


ens_loss.batch_statistic = True  # type: ignore[attr-defined]
ens_loss.gradient_only = True  # type: ignore[attr-defined]


class EnsLoss(nn.Module):
    """A loss drawn anew at each call, of which only the gradient exists, as a module: takes the place of `nn.BCEWithLogitsLoss`.

    Args:
        weight, clip, tail, reduction: as for `ens_loss`.
        lam: Box-Cox parameter; the first one where it is drawn anew.
        lam_range: (low, high) of the uniform distribution that new ones are drawn from.
        period: calls in training mode after which lam is drawn anew; None: never (the authors' default).
        generator: of all draws; default: torch's global one. Its state is part of the module's state.

    Attributes:
        batch_statistic: always True: samples are ranked within the batch, so batches cannot be split.
        gradient_only: always True: the value is that of another loss.
        lam: the present Box-Cox parameter.
        calls: calls in training mode so far.

    Returns:
        From `forward(input, target)`: a scalar, see `ens_loss`. Outside training mode it is the same.

    Raises:
        ValueError: for a value out of range.

    Source: Dai, 2025, arXiv 2409.00908.

    Examples:
        >>> loss = EnsLoss(period=100, generator=torch.Generator().manual_seed(0))
        >>> loss(torch.zeros(4), torch.tensor([0, 1, 1, 0]))  # log 2, the logistic loss
        tensor(0.6931)
    """

    batch_statistic = True
    gradient_only = True
    lam: Tensor
    calls: Tensor
    weight: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, " weights"] | None = None,
        *,
        lam: float = 0.0,
        lam_range: Sequence[float] = (-1.0, 1.0),
        period: int | None = None,
        clip: float | None = 1.0,
        tail: float | None = 1.0,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_options(lam, clip, tail, reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("lam", torch.tensor(float(lam), dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.lam_range, self.period = check_redraws(lam_range, period, clip), period
        self.clip, self.tail, self.generator = clip, tail, generator
        self.reduction: Reduction = reduction

    def forward(
        self, input: Float[Tensor, "batch *classes"], target: Shaped[Tensor, "batch *rest"]
    ) -> Float[Tensor, ""]:
        if self.training:
            if self.period is not None and self.calls and int(self.calls) % self.period == 0:
                self.redraw()
            self.calls += 1
        return ens_loss(
            input,
            target,
            self.weight,
            lam=float(self.lam),
            clip=self.clip,
            tail=self.tail,
            reduction=self.reduction,
            generator=self.generator,
        )

    def redraw(self) -> None:
        """Draw a new lam from its range."""
        self.lam.fill_(uniform(self.lam_range, self.generator))

    def get_extra_state(self) -> dict[str, Any]:
        """The generator's state as hexadecimal text."""
        if self.generator is None:
            return {}
        return {"generator": bytes(self.generator.get_state().tolist()).hex()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put the generator back to where it was."""
        if self.generator is not None and "generator" in state:
            stored = list(bytes.fromhex(state["generator"]))
            self.generator.set_state(torch.tensor(stored, dtype=torch.uint8))

    def extra_repr(self) -> str:
        return f"lam={float(self.lam):g}, clip={self.clip}, tail={self.tail}"


def signed_scores(
    input: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores (batch,) or (batch, classes), the sign +-1 that each should have, and the weight of each sample in that shape.

    Raises:
        ValueError: if shapes do not fit, or labels are not hard.
    """
    if input.ndim not in (1, 2) or (input.ndim == 2 and input.shape[1] == 0):
        raise ValueError(f"input must be (batch,) or (batch, classes), got shape {tuple(input.shape)}")
    classes = 1 if input.ndim == 1 else input.shape[1]
    if target.shape not in ((len(input),), (len(input), 1)) or (target.ndim == 2 and classes > 1):
        raise ValueError(
            f"target must hold {len(input)} hard labels, got shape {tuple(target.shape)}; soft labels have no meaning here"
        )
    target = target.reshape(-1)
    labels = target.long()
    if not torch.compiler.is_compiling() and len(labels):
        if target.is_floating_point() and not bool((labels == target).all()):
            raise ValueError("target must hold hard labels, got fractions: soft labels have no meaning here")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= max(classes, 2):
            raise ValueError(
                f"target must hold class numbers in [0, {max(classes, 2)}), got {low if low < 0 else high}"
            )
    scores = full_precision(input)
    if classes <= 2:
        scores = scores.reshape(-1) if classes == 1 else scores[:, 1] - scores[:, 0]
        signs = (2 * labels - 1).to(scores.dtype)
    else:
        signs = (2 * nn.functional.one_hot(labels, classes) - 1).to(scores.dtype)
    if weight is None:
        return scores, signs, None
    if weight.shape != (max(classes, 2),) or not bool((weight > 0).all()):
        raise ValueError(
            f"weight must hold {max(classes, 2)} numbers > 0, got {weight.tolist() if weight.ndim == 1 else tuple(weight.shape)}"
        )
    importance = weight.to(scores.dtype)[labels]
    return scores, signs, importance.reshape(-1, *[1] * (scores.ndim - 1))


def loss_from_slopes(
    scores: Tensor, signs: Tensor, slopes: Tensor, importance: Tensor | None, reduction: Reduction
) -> Tensor:
    """The scalar that shows the logistic loss of the scores and has the given slopes as its gradient."""
    costs = nn.functional.softplus(-(scores.detach() * signs))
    gradient = signs * slopes
    if importance is not None:
        costs, gradient = costs * importance, gradient * importance
    size = max(len(scores), 1) if reduction == "mean" else 1
    return surrogate_gradient(scores, gradient / size, costs.sum() / size)


def uniform(bounds: tuple[float, float], generator: torch.Generator | None) -> float:
    """One number between two."""
    device = generator.device if generator is not None else None
    drawn = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    return bounds[0] + (bounds[1] - bounds[0]) * float(drawn)


def check_options(lam: float, clip: float | None, tail: float | None, reduction: str | None = None) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: naming the argument.
    """
    if not math.isfinite(lam):
        raise ValueError(f"lam must be finite, got {lam}")
    for name, value in (("clip", clip), ("tail", tail)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, or None, got {value}")
    if clip is None and lam < 0:
        raise ValueError(f"clip must be given where lam < 0 (slopes could be infinite), got None and {lam}")
    if reduction not in (None, "mean", "sum"):
        reason = (
            "samples are ranked in the batch, so none has a loss of its own"
            if reduction == "none"
            else "no other"
        )
        raise ValueError(f'reduction must be "mean" or "sum" ({reason}), got {reduction!r}')


def check_redraws(lam_range: Sequence[float], period: int | None, clip: float | None) -> tuple[float, float]:
    """The range of new lams as (low, high), if the plan of redraws can work.

    Raises:
        ValueError: naming the argument.
    """
    if len(lam_range) != 2 or not -math.inf < lam_range[0] <= lam_range[1] < math.inf:
        raise ValueError(f"lam_range must be (low, high) with low <= high, got {lam_range}")
    if period is not None and period < 1:
        raise ValueError(f"period must be >= 1, got {period}")
    if period is not None and clip is None and lam_range[0] < 0:
        raise ValueError(f"clip must be given where lam < 0 (slopes could be infinite), got {lam_range}")
    return float(lam_range[0]), float(lam_range[1])


def _inverse_box_cox(normal: Tensor, lam: float) -> Tensor:
    """exp(log(1 + lam r) / lam), which tends to exp(r); 0 or infinite where 1 + lam r is not above 0."""
    if lam == 0:
        return normal.exp()
    return torch.exp(torch.log1p((lam * normal).clamp(min=-1)) / lam)
