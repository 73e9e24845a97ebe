"""A fixed network inside a training one: a teacher, a reference model, a pretrained feature extractor."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn


class Frozen(nn.Module):
    """A module that stays as it is: evaluation mode, no gradients, whatever happens around it.

    Parameters stop requiring gradients (so an optimizer that skips such parameters leaves them), batch norm
    uses its stored statistics, dropout is off, `train()` on it or on any module around it changes nothing,
    and its outputs carry no graph. Gradients with respect to its inputs are cut as well.

    Args:
        module: the network. It is frozen in place, so a caller who goes on training the same object must say
            `copy`.
        copy: freeze a deep copy, and leave the module that was given untouched.

    Attributes:
        module: the frozen network.

    Returns:
        From `forward`: the network's output, detached.

    Examples:
        >>> import torch
        >>> from coloss.nn import MLP, Frozen
        >>> teacher = Frozen(MLP(4, [8], 3))
        >>> _ = teacher.train()
        >>> teacher.module.training, teacher(torch.rand(2, 4)).requires_grad
        (False, False)
    """

    def __init__(self, module: nn.Module, *, copy: bool = False) -> None:
        super().__init__()
        self.module = (deepcopy(module) if copy else module).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Changes nothing: the network stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
