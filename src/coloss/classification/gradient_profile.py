"""What a loss asks of a sample, by how right the sample is already: value and slope over the margin, for any loss on logits.

The picture that explains the losses of this family: each is cross-entropy with its slope bent, cut, ranked or replaced.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["multiclass", "binary"]


@dataclass(frozen=True)
class GradientProfile:
    """Value and slope of one loss over the margin.

    Attributes:
        name: of the loss.
        margins: (points), by how much the right class outscores every other one; the score times +-1 for binary losses.
        gradient: (points), d loss / d score of the right class, for one sample; below 0 where the loss pulls the margin up.
        value: (points), of one sample; None where the loss has no value of a single sample.
        spread: (points), standard deviation of the gradient over draws; None for losses that draw nothing.

    Examples:
        >>> profile = gradient_profile(torch.nn.functional.cross_entropy, torch.tensor([0.0]))
        >>> profile.as_data()["gradient"]
        [-0.5]
    """

    name: str
    margins: Float[Tensor, " points"]
    gradient: Float[Tensor, " points"]
    value: Float[Tensor, " points"] | None = None
    spread: Float[Tensor, " points"] | None = None

    def as_data(self) -> dict[str, Any]:
        """The profile in plain lists, for JSON and for any plotting library; numbers that are not finite become None."""
        found: dict[str, Any] = {"name": self.name}
        for key in ("margins", "value", "gradient", "spread"):
            tensor = getattr(self, key)
            found[key] = None if tensor is None else [_plain(number) for number in tensor.tolist()]
        return found


def gradient_profile(
    loss: Loss,
    margins: Float[Tensor, " points"] | None = None,
    *,
    kind: Kind = "multiclass",
    num_classes: int = 2,
    draws: int = 1,
    whole_batch: bool | None = None,
    name: str | None = None,
) -> GradientProfile:
    """Value and slope of a loss over the margin.

    The sample at margin m has the logit m for its class and 0 for all others (`"multiclass"`), or the logit m and the target 1
    (`"binary"`). The slope is the derivative with respect to that logit, the others held: for losses that a common offset of the logits
    does not change, the derivative with respect to the margin.

    Args:
        loss: `(logits, targets) -> scalar`, a mean or sum over samples; targets are class numbers, 1.0 or 0.0 for binary losses that take
            nothing else. Its value need not match its gradient, which autograd gives.
        margins: where to look; default: 161 points from -4 to 4.
        kind: what the loss takes: logits (batch, classes) and class numbers, or logits (batch) and 0 / 1.
        num_classes: of the logits.
        draws: how often to draw where the loss is random; the mean is given, and the spread.
        whole_batch: True for losses that compare samples with each other: they see all margins at once, in every class, and have no value of
            a single sample. Default: what the loss says of itself (`batch_statistic`).
        name: default: that of the loss.

    Returns:
        The profile, in float32.

    Raises:
        ValueError: if a value is out of range, there are no margins, or the loss gives no scalar that depends on the logits.

    Cost: one call of the loss for each point and draw; one for each draw with `whole_batch`.

    Examples:
        >>> from coloss.classification import comp_sum_loss
        >>> from functools import partial
        >>> for tau in (1.0, 2.0):  # a hopeless sample, an undecided one, a safe one
        ...     profile = gradient_profile(partial(comp_sum_loss, tau=tau), torch.tensor([-4.0, 0.0, 4.0]))
        ...     print(profile.gradient)
        tensor([-0.9820, -0.5000, -0.0180])
        tensor([-0.0177, -0.2500, -0.0177])
    """
    if kind not in ("multiclass", "binary"):
        raise ValueError(f'kind must be "multiclass" or "binary", got {kind!r}')
    if num_classes < 2 or draws < 1:
        raise ValueError(f"num_classes must be >= 2 and draws >= 1, got {num_classes} and {draws}")
    margins = torch.linspace(-4, 4, 161) if margins is None else margins.detach().float()
    if not len(margins):
        raise ValueError("margins must hold at least one point, got none")
    together = _declares(loss, "batch_statistic") if whole_batch is None else whole_batch
    classes = 2 if kind == "binary" else num_classes
    drawn = []
    value: Tensor | None = None
    with torch.enable_grad():
        for _ in range(draws):
            if together:
                drawn.append(_joint_slopes(loss, margins, kind, classes))
            else:
                slopes, value = _single_slopes(loss, margins, kind, classes)
                drawn.append(slopes)
    gradients = torch.stack(drawn)
    if _declares(loss, "gradient_only"):
        value = None
    spread = gradients.std(0) if draws > 1 else None
    return GradientProfile(name or _name(loss), margins, gradients.mean(0), value, spread)


@dataclass(frozen=True)
class LossProfiles:
    """A choice of losses whose profiles explain a system: what a room names `PROFILE`.

    Args:
        losses: name -> loss.
        kind, num_classes, draws: as for `gradient_profile`.
        low, high, points: the margins.
        caption: one sentence on what to see.

    Examples:
        >>> chosen = LossProfiles({"cross-entropy": torch.nn.functional.cross_entropy}, points=3)
        >>> [profile.name for profile in chosen.measure()], chosen.as_data()["profiles"][0]["margins"]
        (['cross-entropy'], [-4.0, 0.0, 4.0])
    """

    losses: Mapping[str, Loss]
    kind: Kind = "multiclass"
    num_classes: int = 2
    draws: int = 1
    low: float = -4.0
    high: float = 4.0
    points: int = 81
    caption: str = ""

    def measure(self) -> Sequence[GradientProfile]:
        """The profile of each loss, the same at every call; the global random state is left as it was."""
        margins = torch.linspace(self.low, self.high, self.points)
        found = []
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would reseed every GPU, of which none is put back.
            torch.default_generator.manual_seed(0)
            for name, loss in self.losses.items():
                # A loss that draws nothing need not be looked at more than once.
                draws = self.draws if _declares(loss, "batch_statistic") else 1
                found.append(
                    gradient_profile(
                        loss, margins, kind=self.kind, num_classes=self.num_classes, draws=draws, name=name
                    )
                )
        return found

    def as_data(self) -> dict[str, Any]:
        """Everything in plain lists: `caption`, and `profiles` as `GradientProfile.as_data` gives them."""
        return {"caption": self.caption, "profiles": [profile.as_data() for profile in self.measure()]}


def _single_slopes(loss: Loss, margins: Tensor, kind: Kind, classes: int) -> tuple[Tensor, Tensor]:
    """One call for each margin, so that no reduction has to be undone."""
    logits, targets = _samples(margins, 1, kind, classes)
    values = [_call(loss, logits[row : row + 1], targets[row : row + 1]) for row in range(len(margins))]
    (gradient,) = torch.autograd.grad(torch.stack(values).sum(), logits)
    return _of_target(gradient, targets, kind), torch.stack(values).detach().float()


def _joint_slopes(loss: Loss, margins: Tensor, kind: Kind, classes: int) -> Tensor:
    """One call on every margin in every class, each in the place of one sample; the mean over classes."""
    parts = [_samples(margins, target, kind, classes) for target in range(classes)]
    logits = torch.cat([part[0] for part in parts]).detach().requires_grad_()
    targets = torch.cat([part[1] for part in parts])
    (gradient,) = torch.autograd.grad(_call(loss, logits, targets), logits)
    sign = torch.where(targets == 1, 1.0, -1.0) if kind == "binary" else 1.0
    # The slopes of a mean over samples are 1 / samples of each one's own.
    size = 1 if getattr(loss, "reduction", "mean") == "sum" else len(targets)
    return (sign * _of_target(gradient, targets, kind) * size).reshape(classes, -1).mean(0)


def _samples(margins: Tensor, target: int, kind: Kind, classes: int) -> tuple[Tensor, Tensor]:
    targets = torch.full((len(margins),), target, dtype=torch.int64)
    if kind == "binary":
        return (margins if target else -margins).clone().requires_grad_(), targets
    logits = torch.zeros(len(margins), classes)
    logits[:, target] = margins
    return logits.requires_grad_(), targets


def _of_target(gradient: Tensor, targets: Tensor, kind: Kind) -> Tensor:
    return gradient if kind == "binary" else gradient.gather(1, targets.unsqueeze(1)).squeeze(1)


def _call(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    try:
        found = loss(logits, targets)
    except RuntimeError:
        # PyTorch's binary losses take their targets as floats only.
        if logits.ndim != 1:
            raise
        found = loss(logits, targets.to(logits.dtype))
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"loss must give one number that depends on the logits, got {shape}")
    return found.reshape(())


def _declares(loss: Any, attribute: str) -> bool:
    """What a loss, or the function behind a `functools.partial`, says of itself."""
    while loss is not None:
        if getattr(loss, attribute, False):
            return True
        loss = getattr(loss, "func", None)
    return False


def _name(loss: Any) -> str:
    loss = getattr(loss, "func", loss)
    return getattr(loss, "__name__", None) or type(loss).__name__


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None
