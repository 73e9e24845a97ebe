r"""Losses that hold a network to its own earlier outputs: those of some epochs ago, or those of its averaged weights.

For any training loop; `coloss.classification.sharpness_free` wraps them as methods for `fit`.

$T^2 \frac{1}{B} \sum_i \mathrm{KL}(\mathrm{softmax}(z_i'/T) \,\|\, \mathrm{softmax}(z_i/T))$ with $z_i$ the present and $z_i'$ the
earlier logits of sample $i$, which are constants. The gradient with respect to $z_i$ is
$\frac{T}{B} (\mathrm{softmax}(z_i/T) - \mathrm{softmax}(z_i'/T))$.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.classification.logit_history import LogitHistory
from coloss.errors import InputError
from coloss.nn import ModuleEMA
from coloss.ops import distillation_kl_loss
from coloss.ops.precision import full_precision


def trajectory_loss(
    logits: Float[Tensor, "batch classes"],
    past_logits: Float[Tensor, "batch classes"],
    seen: Bool[Tensor, " batch"] | None = None,
    temperature: float = 5.0,
) -> Float[Tensor, ""]:
    """How far each prediction has moved from an earlier one of the same sample.

    Args:
        logits: present ones.
        past_logits: earlier ones; no gradient reaches them.
        seen: which samples have earlier logits; the others count 0. None: all have.
        temperature: T > 0.

    Returns:
        A scalar, at least float32: the sum over seen samples, divided by the number of all; 0 for an empty batch.

    Raises:
        ValueError: on unequal shapes, or a temperature not above 0.

    Examples:
        >>> now, before = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([[2.0, 0.0], [9.0, 1.0]])
        >>> round(trajectory_loss(now, before, torch.tensor([True, False]), temperature=1.0).item(), 4)
        0.1639
    """
    losses = distillation_kl_loss(logits, past_logits.detach(), temperature, "none")
    if seen is not None:
        losses = torch.where(seen, losses, 0.0)
    return losses.sum() / max(len(losses), 1)


class _Window(nn.Module):
    """What both losses share: a weight, a temperature, and epochs between which they act."""

    def __init__(self, weight: float, temperature: float, start_epoch: int, end_epoch: int | None) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise InputError(f"weight must be >= 0 and finite, got {weight}")
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be > 0 and finite, got {temperature}")
        if end_epoch is not None and end_epoch <= start_epoch + 1:
            raise InputError(
                f"end_epoch must leave an epoch after start_epoch = {start_epoch}, got {end_epoch}"
            )
        self.weight, self.temperature = float(weight), float(temperature)
        self.start_epoch, self.end_epoch = start_epoch, end_epoch

    def is_active(self, epoch: int) -> bool:
        """Whether the term counts in this epoch: start_epoch < epoch < end_epoch, epochs counted from 0."""
        return epoch > self.start_epoch and (self.end_epoch is None or epoch < self.end_epoch)

    def _none(self, logits: Tensor) -> Tensor:
        # Zero, but with a graph, so that a loss made of this term alone can be differentiated.
        return full_precision(logits[:0]).sum()


class TrajectoryLoss(_Window):
    """Remembers each sample's logits, and penalises their change since some epochs ago (SAF).

    Args:
        history: where logits are kept; default: one that grows with the ids and is deep enough.
        weight: of the term, >= 0, applied after the factor T^2: a loss without that factor needs 25 times as much.
        temperature: T > 0.
        lag: epochs between the two predictions, >= 1; the authors use 2 or 3.
        start_epoch: the term acts in epochs after this one (counted from 0); the authors' 5, or about 30% of a short training.
        end_epoch: and before this one; None acts to the end. With wrong labels, stop before the network memorises them.

    Returns:
        From `forward`: weight times the term, a scalar; exactly 0 outside the epochs in which it acts.

    Raises:
        InputError: for values out of range, or a history too short for the lag.

    Cost:
        One row of the history read and written for each sample: no forward pass, no noticeable time. Memory: see `LogitHistory`.

    Source:
        Du et al., 2022, arXiv 2205.14083, section 3.2.

    Examples:
        >>> loss = TrajectoryLoss(lag=1, start_epoch=0, weight=1.0, temperature=1.0)
        >>> ids = torch.tensor([4, 7])
        >>> loss(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), ids, epoch=0)
        tensor(0.)
        >>> round(
        ...     loss(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), ids, epoch=1).item(), 3
        ... )  # moved by (2, 0) and (0, 0)
        0.217
    """

    def __init__(
        self,
        history: LogitHistory | None = None,
        *,
        weight: float = 0.3,
        temperature: float = 5.0,
        lag: int = 3,
        start_epoch: int = 5,
        end_epoch: int | None = None,
    ) -> None:
        super().__init__(weight, temperature, start_epoch, end_epoch)
        if lag < 1:
            raise InputError(f"lag must be >= 1 epoch, got {lag}")
        self.history = LogitHistory(lag + 1) if history is None else history
        needed = slots_for(lag, self.history.every)
        if self.history.depth < needed:
            raise InputError(f"history must have depth >= {needed} for lag {lag}, got {self.history.depth}")
        self.lag = lag

    def forward(
        self,
        logits: Float[Tensor, "batch classes"],
        ids: Int[Tensor, " batch"],
        epoch: int,
        *,
        mixed_ids: Int[Tensor, " batch"] | None = None,
        mixed_share: Float[Tensor, "..."] | float | None = None,
    ) -> Float[Tensor, ""]:
        """The term for one batch, whose logits are remembered.

        Args:
            logits: of the network in training, with their graph.
            ids: stable number of each sample in its data set.
            epoch: from 0; equal on all processes.
            mixed_ids: if inputs are mixtures (mixup, cutmix): ids of the second samples. The earlier logits are mixed in the same
                shares, and this batch is not remembered, since it says nothing about single samples.
            mixed_share: share of the first sample in each mixture, a number or (batch), in [0, 1].
        """
        if (mixed_ids is None) != (mixed_share is None):
            raise InputError("mixed_ids and mixed_share must be given together, got one of them")
        if mixed_ids is None and self._is_wanted(epoch):
            self.history.write(ids, epoch, logits)
        if not self.is_active(epoch) or (self.history.num_classes is None):
            return self._none(logits)
        past, seen = self.history.read(ids, epoch - self.lag)
        if mixed_ids is not None:
            other, also_seen = self.history.read(mixed_ids, epoch - self.lag)
            share = torch.as_tensor(mixed_share, device=past.device).to(past.dtype).reshape(-1, 1)
            past, seen = share * past + (1 - share) * other, seen & also_seen
        return self.weight * trajectory_loss(logits, past, seen, self.temperature)

    def _is_wanted(self, epoch: int) -> bool:
        """Whether any later epoch will ask for this one."""
        later = range(epoch + self.lag, epoch + self.lag + self.history.every)
        return self.history.is_recorded(epoch) and any(self.is_active(e) for e in later)


class EMATeacherLoss(_Window):
    """Penalises the distance between a network's prediction and that of its averaged weights on the same input (MESA).

    Unlike `TrajectoryLoss` it needs no sample ids and no table, and sees the same augmented or mixed input on both sides; it
    costs a forward pass instead.

    Args:
        model: the network in training. The averaged copy is no part of it, and starts from its present weights.
        decay: of the average, in [0, 1]; 1 / (1 - decay) steps is about what it looks back on, so choose it by the length of
            training: the authors' 0.9995 is for 10^5 steps.
        weight: of the term, >= 0, applied after the factor T^2.
        temperature: T > 0.
        start_epoch: the term acts in epochs after this one (counted from 0).
        end_epoch: and before this one; None acts to the end.

    Attributes:
        average: the averaged network, a `coloss.nn.ModuleEMA`: in evaluation mode, batch-norm statistics averaged as well.

    Returns:
        From `forward`: weight times the term, a scalar; exactly 0 outside the epochs in which it acts.

    Raises:
        InputError: for values out of range.

    Cost:
        A copy of the network and, where the term acts, one more forward pass: about 15% of a step with large networks.

    Source:
        Du et al., 2022, arXiv 2205.14083, section 3.3.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> loss, inputs = EMATeacherLoss(model, start_epoch=0), torch.ones(1, 2)
        >>> loss(model(inputs), inputs, epoch=1).item() < 1e-6  # the average has not moved away yet
        True
        >>> loss.update()  # after each step of the optimizer
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.9995,
        weight: float = 0.8,
        temperature: float = 5.0,
        start_epoch: int = 5,
        end_epoch: int | None = None,
    ) -> None:
        super().__init__(weight, temperature, start_epoch, end_epoch)
        self.average = ModuleEMA(model, decay, buffers="ema")

    def update(self) -> None:
        """Move the average towards the network's present weights."""
        self.average.update()

    def forward(self, logits: Float[Tensor, "batch classes"], inputs: Any, epoch: int) -> Float[Tensor, ""]:
        """The term for one batch.

        Args:
            logits: of the network in training for these inputs, with their graph.
            inputs: what the network was called with.
            epoch: from 0.
        """
        if not self.is_active(epoch):
            return self._none(logits)
        return self.weight * trajectory_loss(logits, self.average(inputs), None, self.temperature)


def slots_for(lag: int, every: int = 1) -> int:
    """Recorded epochs that a history must remember, to look back by a lag.

    Examples:
        >>> slots_for(3), slots_for(3, every=2)
        (4, 3)
    """
    return (lag + every - 1) // every + 1
