"""The contract of maskers: which tokens an encoder sees, and which must be predicted from them.

A masker is any callable `masker(request) -> Masks`:

    def first_half(request):
        context = torch.arange(request.num_tokens // 2).expand(1, request.batch_size, -1)
        return Masks(context, context + request.num_tokens // 2)

The `MaskRequest` says how many samples and which grid of tokens there are, brings
the randomness, and carries what a masker may look at to choose by content: the inputs, the target encoder and its tokens. Sizes and other
choices that all processes must share come from `shared_generator`, positions from `generator`. Indices are in rising order, and count the
parts of an input alone: column j of a table is index j, whatever learned tokens an encoder keeps in front.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.ops import mask_to_padded_indices


@dataclass(frozen=True, eq=False)
class Masks:
    """Visible and hidden tokens of a batch, as indices.

    Args:
        context: tokens that the encoder sees: one set for all targets (contexts = 1), or one for each set of targets.
        targets: tokens to predict from them, in M sets.
        context_valid: False for entries of `context` that only fill up a row; None where all count.
        target_valid: likewise of `targets`. A sample without a target in some set has a row of False there.

    Raises:
        ValueError: if the parts do not fit one another.

    Examples:
        >>> masks = Masks(torch.tensor([[[0, 1]]]), torch.tensor([[[2]], [[3]]]))
        >>> masks.context.shape, masks.targets.shape
        (torch.Size([1, 1, 2]), torch.Size([2, 1, 1]))
    """

    context: Int[Tensor, "contexts batch visible"]
    targets: Int[Tensor, "sets batch hidden"]
    context_valid: Bool[Tensor, "contexts batch visible"] | None = None
    target_valid: Bool[Tensor, "sets batch hidden"] | None = None

    def __post_init__(self) -> None:
        contexts, sets = len(self.context), len(self.targets)
        if contexts not in (1, sets):
            raise ValueError(
                f"context must hold one set, or one for each of {sets} of targets, got {contexts}"
            )
        if self.context.shape[1] != self.targets.shape[1]:
            raise ValueError(
                f"context and targets must be of one batch, got {self.context.shape[1]} and {self.targets.shape[1]}"
            )
        for name, valid, like in (
            ("context_valid", self.context_valid, self.context),
            ("target_valid", self.target_valid, self.targets),
        ):
            if valid is not None and valid.shape != like.shape:
                raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(valid.shape)}")

    @classmethod
    def of(
        cls,
        context: Bool[Tensor, "contexts batch tokens"],
        targets: Bool[Tensor, "sets batch tokens"],
    ) -> "Masks":
        """From boolean masks with rows of any size, filled up to the largest and marked by `valid`.

        Args:
            context: True for visible tokens.
            targets: True for tokens to predict.

        Examples:
            >>> visible = torch.tensor([[[True, True, False], [True, False, False]]])
            >>> masks = Masks.of(visible, ~visible)
            >>> masks.targets.tolist(), masks.target_valid.tolist()
            ([[[2, 0], [1, 2]]], [[[True, False], [True, True]]])
        """
        (seen, seen_valid), (hidden, hidden_valid) = map(mask_to_padded_indices, (context, targets))
        return cls(seen, hidden, seen_valid, hidden_valid)

    @classmethod
    def partition(cls, hidden: Bool[Tensor, "batch tokens"]) -> "Masks":
        """Everything hidden is one set of targets, everything else the context; each row hides as many tokens as the others.

        Args:
            hidden: True for hidden tokens.

        Raises:
            ValueError: if rows hide different numbers of tokens.

        Examples:
            >>> Masks.partition(torch.tensor([[True, False, True]])).targets.tolist()
            [[[0, 2]]]
        """
        counts = hidden.sum(-1)
        if len(counts) and bool((counts != counts[0]).any()):
            raise ValueError(
                f"hidden must have equally many True in every row, got {counts.unique().tolist()}"
            )
        keep = hidden.shape[-1] - (int(counts[0]) if len(counts) else 0)
        order = hidden.to(torch.uint8).argsort(dim=-1, stable=True)
        return cls(order[None, :, :keep], order[None, :, keep:])

    def to(self, device: torch.device | str) -> "Masks":
        """The same masks on a device.

        Examples:
            >>> masks = Masks(torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 1).long())
            >>> masks.to("cpu").context.device
            device(type='cpu')
        """
        parts = (self.context, self.targets, self.context_valid, self.target_valid)
        return Masks(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class MaskRequest:
    """What a masker is asked for, and what it may look at.

    Args:
        batch_size: number of samples.
        grid: tokens along each axis: (rows, columns) of an image, (tokens,) of a series or a table row.
        generator: randomness of positions, which may differ between processes; None for torch's global generator.
        shared_generator: randomness of sizes and choices, equal on all processes; None for `generator`.
        progress: share of training done, in [0, 1], for schedules.
        tokens: what the target encoder made of the whole batch, (batch, tokens, dim); None where nobody offers it.
        inputs: the batch's inputs; None likewise.
        encoder: the target encoder; None likewise.

    Examples:
        >>> MaskRequest(8, (4, 4)).num_tokens
        16
    """

    batch_size: int
    grid: tuple[int, ...]
    generator: torch.Generator | None = None
    shared_generator: torch.Generator | None = None
    progress: float = 0.0
    tokens: Float[Tensor, "batch tokens dim"] | None = None
    inputs: Any = None
    encoder: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise ValueError(f"batch_size must be >= 0, got {self.batch_size}")
        if not self.grid or min(self.grid) < 1:
            raise ValueError(f"grid must hold at least one token along each axis, got {self.grid}")

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample."""
        return math.prod(self.grid)

    def shared_uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number from [low, high), the same on all processes."""
        generator = self.shared_generator or self.generator
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def shared_count(self, share: tuple[float, float]) -> int:
        """ceil(u * tokens) for one u uniform in a range of shares, at least 1 and at most all; the same on all processes."""
        return min(self.num_tokens, max(1, math.ceil(self.shared_uniform(*share) * self.num_tokens)))


Masker: TypeAlias = Callable[[MaskRequest], Masks]


class MaskSchedule:
    """One masker at first, another one with growing probability: one draw for a whole batch, equal on all processes.

    Args:
        base: taken with probability 1 - p.
        alternative: taken with probability p.
        probability: p, a number in [0, 1] or a function of progress. Nothing is drawn where it is 0 or 1.

    Returns:
        From `masker(request)`: the masks of the one that was drawn.

    Raises:
        ValueError: for a probability outside [0, 1].

    Source:
        He et al., 2025 (DSeq-JEPA), arXiv 2511.17354, with p rising in a straight line from 0 to 1.

    Examples:
        >>> from coloss.data import RandomTokens
        >>> schedule = MaskSchedule(RandomTokens((0.5, 0.5)), RandomTokens((0.25, 0.25)), lambda share: share)
        >>> [schedule(MaskRequest(1, (8,), progress=share)).context.shape[2] for share in (0.0, 1.0)]
        [4, 2]
    """

    def __init__(
        self, base: Masker, alternative: Masker, probability: float | Callable[[float], float]
    ) -> None:
        if not callable(probability):
            _check_probability(probability)
        self.base, self.alternative, self.probability = base, alternative, probability

    def __call__(self, request: MaskRequest, /) -> Masks:
        probability = self.probability(request.progress) if callable(self.probability) else self.probability
        _check_probability(probability)
        certain = probability in (0, 1)
        chosen = probability == 1 if certain else request.shared_uniform() < probability
        return (self.alternative if chosen else self.base)(request)


def check_range(name: str, ends: tuple[float, float], most: float) -> None:
    """Refuse a pair that is not a rising range of positive numbers up to `most`."""
    low, high = ends
    if not 0 < low <= high <= most:
        upper = "" if most == math.inf else f", at most {most:g}"
        raise ValueError(f"{name} must be a rising pair of numbers > 0{upper}, got {ends}")


def _check_probability(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
