"""An exponential moving average of a module's weights: a teacher, a target network, or an averaged model."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn


class ModuleEMA(nn.Module):
    """A copy of a module that follows it slowly: `average <- d average + (1 - d) weights` at every `update`.

    After `t` updates towards constant weights `w`, the average is `w + d^t (start - w)`. Call `update()`
    after the optimizer's step (and not when a step was skipped). The copy is always in evaluation mode and
    takes no gradients. The followed module is not part of this one: its parameters appear neither here nor in
    `state_dict()`.

    Averages of half-precision weights are kept in float32 beside the copy (in `state_dict()`, too), which holds them rounded: steps of
    `1 - d` are too small for its own precision.

    Args:
        module: the module to follow; its present weights are the start.
        decay: `d` in [0, 1], or a function of the number of updates made so far (0 at the first).
        buffers: `"copy"` takes buffers such as batch-norm statistics over as they are; `"ema"` averages those
            of floating type too. Integer buffers are copied in both cases.

    Attributes:
        module: the averaged copy.
        updates: int64 buffer, the number of updates made; saved with the state.

    Returns:
        From `forward`: the averaged copy's output, without gradients.

    Raises:
        ValueError: for a decay outside [0, 1], an unknown `buffers`, or a module whose parameters or buffers
            were added, removed or reshaped since.

    Source: Polyak and Juditsky 1992; Tarvainen and Valpola 2017, arXiv 1703.01780 (mean teacher).

    Examples:
        >>> import torch
        >>> from coloss.nn import ModuleEMA
        >>> model = torch.nn.Linear(2, 2)
        >>> teacher = ModuleEMA(model, decay=lambda update: min(0.99, (1 + update) / (10 + update)))
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> teacher.update()
        >>> round((model.weight - teacher.module.weight).mean().item(), 4)
        0.1
    """

    updates: Tensor

    def __init__(
        self,
        module: nn.Module,
        decay: float | Callable[[int], float] = 0.999,
        *,
        buffers: Literal["copy", "ema"] = "copy",
    ) -> None:
        super().__init__()
        if not callable(decay):
            _check_decay(decay)
        if buffers not in ("copy", "ema"):
            raise ValueError(f'buffers must be "copy" or "ema", got {buffers!r}')
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.buffer_mode = buffers
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.exact = nn.Module()
        averaged = [*self.module.named_parameters()]
        averaged += self.module.named_buffers() if buffers == "ema" else []  # type: ignore[arg-type]
        for name, average in averaged:
            if _is_half(average):
                self.exact.register_buffer(_key(name), average.detach().float())
        # In a tuple, so that it is not registered as a submodule.
        self._followed = (module,)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average one step towards the followed module's present weights."""
        decay = self.decay(int(self.updates)) if callable(self.decay) else self.decay
        _check_decay(decay)
        followed = self._followed[0]
        averaged = _pairs(self.module.named_parameters(), followed.named_parameters())
        for name, average, target in _pairs(self.module.named_buffers(), followed.named_buffers()):
            if self.buffer_mode == "ema" and average.is_floating_point():
                averaged.append((name, average, target))
            else:
                average.copy_(target)
        # At 1 even infinite weights leave the average alone.
        if averaged and decay < 1:
            exact = [self._exact(name, average) for name, average, _ in averaged]
            targets = [target.to(mean) for mean, (_, _, target) in zip(exact, averaged, strict=True)]
            torch._foreach_lerp_(exact, targets, 1 - decay)
            for mean, (_, average, _) in zip(exact, averaged, strict=True):
                if average is not mean:
                    average.copy_(mean)
        self.updates += 1

    def _exact(self, name: str, average: Tensor) -> Tensor:
        """What is averaged: the copy's tensor, or in half precision the float32 one that it is the rounding of."""
        if not _is_half(average):
            return average
        key = _key(name)
        exact = self.exact._buffers.get(key)
        if exact is None:
            exact = average.float()
        # Whoever wrote to the copy since means what stands there.
        exact = torch.where(exact.to(average) == average, exact.float(), average.float())
        self.exact.register_buffer(key, exact)
        return exact

    def train(self, mode: bool = True) -> "ModuleEMA":
        """Leaves the averaged copy in evaluation mode, whatever `mode` says."""
        super().train(mode)
        self.module.eval()
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _key(name: str) -> str:
    return name.replace(".", "/")  # the name of a buffer holds no dot


def _pairs(averages: Any, targets: Any) -> list[tuple[str, Tensor, Tensor]]:
    averages, targets = dict(averages), dict(targets)
    same = averages.keys() == targets.keys()
    if not same or any(averages[name].shape != targets[name].shape for name in averages):
        changed = sorted(averages.keys() ^ targets.keys()) or "another shape"
        raise ValueError(f"the followed module must keep its parameters and buffers, got changes: {changed}")
    return [(name, averages[name], targets[name]) for name in averages]


def _check_decay(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
