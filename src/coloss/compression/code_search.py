"""How the code of each weight is searched for while codes and tables are learned: by logits of the codewords, or by a latent weight.

Both stand for a weight's code by numbers that a gradient moves: the code is that of the largest logit, or of the codeword nearest to the latent
weight. The rules of their gradients are in `coloss.compression.codebook_learning`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from coloss.errors import InputError
from coloss.ops import codebook_lookup, nearest_codes, nearest_codeword

CodeGradient = Literal["soft", "ste_nearest", "proximal"]
_GRADIENTS = ("soft", "ste_nearest", "proximal")
_HIDDEN = -torch.inf


@dataclass(frozen=True)
class CodeSearch:
    """How codes are learned.

    Args:
        gradient: "soft", "proximal" or "ste_nearest".
        steps: >= 0; 0 solves the tables alone.
        code_rate: Adam's rate for logits, or for latent weights in multiples of h; falls to 0 in a straight line. None: 0.2 for logits, 0.01
            for latent weights.
        table_rate: Adam's rate for codewords, in multiples of h; falls likewise.
        neighbours: how many codewords on either side of the present one have logits; None: all have. 1 takes three numbers for each weight,
            however long the table is. Not for "ste_nearest", which has no logits.

    Raises:
        InputError: for values out of range.

    Examples:
        >>> CodeSearch("proximal", steps=100).rate, CodeSearch("ste_nearest").rate
        (0.2, 0.01)
    """

    gradient: CodeGradient = "soft"
    steps: int = 300
    code_rate: float | None = None
    table_rate: float = 0.01
    neighbours: int | None = None

    def __post_init__(self) -> None:
        if self.gradient not in _GRADIENTS:
            raise InputError(f"gradient must be one of {', '.join(_GRADIENTS)}, got {self.gradient!r}")
        if self.steps < 0:
            raise InputError(f"steps must be >= 0, got {self.steps}")
        for name in ("code_rate", "table_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} must be finite and >= 0, got {value}")
        if self.neighbours is not None and (self.neighbours < 1 or self.gradient == "ste_nearest"):
            raise InputError(
                f"neighbours must be >= 1, and go with logits, got {self.neighbours} for {self.gradient}"
            )

    @property
    def rate(self) -> float:
        """The code rate in use."""
        if self.code_rate is not None:
            return self.code_rate
        return 0.01 if self.gradient == "ste_nearest" else 0.2


class LatentWeights:
    """Weights that are rounded to their nearest codeword, and followed as if they were not."""

    def __init__(self, rows: Tensor, gap: Tensor) -> None:
        self.values, self.gap = rows.clone(), gap

    def codes(self, tables: Tensor) -> Tensor:
        return nearest_codes(self.values, tables).long()

    def look_up(self, values: Tensor, tables: Tensor, temperature: float) -> Tensor:
        return nearest_codeword(values, tables[:, None, :])

    def move(self, direction: Tensor, rate: float) -> None:
        self.values -= rate * self.gap * direction

    def reorder(self, order: Tensor, mean: Tensor) -> Tensor:
        return mean


class CodeLogits:
    """Logits of all codewords, or of those near the present one: slot i stands for code `centre + i - reach`."""

    def __init__(self, codes: Tensor, rows: Tensor, tables: Tensor, gap: Tensor, search: CodeSearch) -> None:
        self.soft = search.gradient == "soft"
        self.count = tables.shape[1]
        self.reach = search.neighbours
        if self.reach is not None and 2 * self.reach + 1 >= self.count:
            self.reach = None
        self.centre, self.gap = codes, gap[:, :, None]
        self.values = -((rows[:, :, None] - self._codewords(tables)) / self.gap).square()
        self._hide()

    def _places(self) -> Tensor:
        assert self.reach is not None
        slots = torch.arange(-self.reach, self.reach + 1, device=self.centre.device)
        return self.centre[:, :, None] + slots

    def _codewords(self, tables: Tensor) -> Tensor:
        if self.reach is None:
            return tables[:, None, :].expand(*self.centre.shape, -1)
        places = self._places().clamp(0, self.count - 1)
        return tables.gather(1, places.flatten(1)).reshape(places.shape)

    def _hide(self) -> None:
        if self.reach is not None:
            places = self._places()
            self.values.masked_fill_((places < 0) | (places >= self.count), _HIDDEN)

    def codes(self, tables: Tensor) -> Tensor:
        lead = self.values.argmax(-1)
        return lead if self.reach is None else self.centre + lead - self.reach

    def look_up(self, values: Tensor, tables: Tensor, temperature: float) -> Tensor:
        rule: Any = "soft" if self.soft else "proximal"
        return codebook_lookup(
            values, self._codewords(tables), rule, temperature=temperature, spacing=self.gap
        )

    def move(self, direction: Tensor, rate: float) -> None:
        self.values -= rate * direction
        self._hide()

    def reorder(self, order: Tensor, mean: Tensor) -> Tensor:
        """Follow codewords that have changed places in their table."""
        if self.reach is not None:
            self.centre = order.argsort(1).gather(1, self.centre)
            self._hide()
            return mean
        places = order[:, None, :].expand_as(self.values)
        self.values = self.values.gather(2, places)
        return mean.gather(2, places)

    def recentre(self, tables: Tensor, mean: Tensor) -> Tensor:
        """Bring the leading codeword to the middle; codewords that come into reach begin as far behind as they are away."""
        if self.reach is None:
            return mean
        shift = self.values.argmax(-1) - self.reach
        if not bool(shift.any()):
            return mean
        lead = self.values.amax(-1, keepdim=True)
        self.centre = self.centre + shift
        slots = torch.arange(2 * self.reach + 1, device=shift.device) + shift[:, :, None]
        there = (slots >= 0) & (slots <= 2 * self.reach)
        slots = slots.clamp(0, 2 * self.reach)
        codewords = self._codewords(tables)
        away = -((codewords - codewords[:, :, self.reach : self.reach + 1]) / self.gap).square()
        kept = self.values.gather(2, slots)
        self.values = kept.where(there & kept.isfinite(), lead + away)
        self._hide()
        return mean.gather(2, slots).where(there, 0.0)
