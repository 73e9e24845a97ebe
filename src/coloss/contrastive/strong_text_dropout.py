"""Dropout and stochastic depth for the strong views of a text alone, put on a transformer from outside."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.nn import TransformerBlock


class StrongTextDropout:
    """Hooks on every block of a transformer that drop parts of what leaves it, in some rows of the batch alone.

    Args:
        encoder: holds the blocks.
        dropout: probability of each value of the residual stream.
        drop_path: probability that a row passes a block by.

    Attributes:
        weak_rows: rows at the front that stay whole.
        rows: of the whole batch; in a pass over another number of rows nothing can be told apart, which is refused.

    Raises:
        InputError: if the encoder has no `coloss.nn.TransformerBlock`.

    Examples:
        >>> block = TransformerBlock(4, 2)
        >>> dropped = StrongTextDropout(nn.Sequential(block), dropout=0.5)
        >>> dropped.weak_rows, dropped.rows = 1, 3
        >>> rows = block(torch.rand(3, 2, 4))
        >>> bool((rows[0] == 0).any()), bool((rows[1:] == 0).any())
        (False, True)
        >>> dropped.remove()
    """

    def __init__(self, encoder: nn.Module, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        blocks = [module for module in encoder.modules() if isinstance(module, TransformerBlock)]
        if not blocks:
            raise InputError(
                f"text_dropout and text_drop_path act on coloss.nn.TransformerBlock, {type(encoder).__name__} has none"
            )
        self.dropout, self.drop_path = dropout, drop_path
        self.weak_rows = self.rows = 0
        self._handles = [block.register_forward_hook(self._drop) for block in blocks]

    def remove(self) -> None:
        """Leave the encoder as it was."""
        for handle in self._handles:
            handle.remove()

    def _drop(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not block.training or not self.rows:
            return output
        if len(output) != self.rows:
            raise InputError(
                f"text_dropout and text_drop_path need all {self.rows} views in one forward pass, got {len(output)}: use accumulate=1"
            )
        before, after = args[0][self.weak_rows :], output[self.weak_rows :]
        if self.drop_path:
            kept = torch.rand(len(after), *[1] * (after.ndim - 1), device=after.device) >= self.drop_path
            after = before + (after - before) * kept / (1 - self.drop_path)
        return torch.cat([output[: self.weak_rows], F.dropout(after, self.dropout)])
