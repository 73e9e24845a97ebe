"""Ships a language model that reads and writes through a cache of few bits, so that what this costs is judged with the model."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.compression.group_quantization import Grid
from coloss.compression.staircase_cache import StaircaseCache
from coloss.errors import InputError
from coloss.nn import CausalLanguageModel
from coloss.train import Method, State


class CachedReader(nn.Module):
    """A language model whose evaluation passes read each text piece by piece through a fresh `StaircaseCache`, as generation does.

    Training passes are the model's own. Gradients of an evaluation pass stay within a piece, as what is stored gives none.

    Args:
        model: its parameters and state names are those of this module too, below `model`.
        piece: tokens read at once, >= 1; those of a piece see one another exactly.
        options: of `StaircaseCache`.

    Returns:
        From `forward(ids, valid=None)`: logits (batch, tokens, vocabulary); `valid` is False for padding, as in the model.

    Raises:
        InputError: if the model is no `CausalLanguageModel`, piece < 1, or `bits` are lists for another number of layers than the model's;
            ValueError for options of the cache out of range.

    Examples:
        >>> reader = CachedReader(
        ...     CausalLanguageModel(10, dim=32, depth=1, heads=2), bits=(16,), step=16, group=16
        ... ).eval()
        >>> ids = torch.randint(10, (2, 20))
        >>> torch.allclose(reader(ids), reader.model(ids), atol=1e-5)
        True
        >>> reader.generate(ids, 3).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module, *, piece: int = 1, **options: Any):
        super().__init__()
        if not isinstance(model, CausalLanguageModel):
            raise InputError(
                f"model must be a CausalLanguageModel, which takes a cache, got {type(model).__name__}"
            )
        if piece < 1:
            raise InputError(f"piece must be >= 1, got {piece}")
        StaircaseCache(**options)  # refuses what is out of range
        lists = [levels for levels in options.get("bits", ()) if isinstance(levels, Sequence)]
        if lists and len(lists) != model.depth:
            raise InputError(
                f"bits must hold levels for the {model.depth} layers of the model, got {len(lists)} lists"
            )
        self.model, self.piece, self.options = model, piece, options

    def new_cache(self) -> StaircaseCache:
        """An empty cache of the reader's options."""
        return StaircaseCache(**self.options)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        if self.training:
            return self.model(ids, valid)
        cache = self.new_cache()
        pieces = ids.split(self.piece, 1)
        seen = [None] * len(pieces) if valid is None else valid.split(self.piece, 1)
        return torch.cat(
            [self.model(part, own, cache=cache) for part, own in zip(pieces, seen, strict=True)], dim=1
        )

    def generate(
        self,
        ids: Int[Tensor, "batch tokens"],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch max_tokens"]:
        """Continue a prompt through a fresh cache; the prompt is read at once, so its tokens see one another exactly.

        Args:
            ids, max_tokens, temperature, generator: as for `CausalLanguageModel.generate`.
        """
        return self.model.generate(
            ids, max_tokens, temperature=temperature, cache=self.new_cache(), generator=generator
        )


class QuantizedCache(Method):
    """Trains a language model as it is, and ships it behind a cache that gives older tokens fewer bits.

    What the cache costs then shows in every metric of the shipped model; `report` adds its size. Nothing changes while training.

    Args:
        bits: of each level, newest first, see `StaircaseCache`; one value for all tokens after the newest with `(16, b)`.
        step, group, grid, kept: see `StaircaseCache`; `step` is a multiple of `group`, and `group` divides a head's dimensions.
        piece: tokens read at once when the shipped model is evaluated.

    Raises:
        InputError, ValueError: for options out of range; in `setup`, for a model that takes no cache.

    Cost: none in training. Reading a text of n tokens takes n / piece forward passes.

    Examples:
        >>> import coloss
        >>> from coloss.nn import next_token_loss
        >>> ids = torch.randint(9, (8, 33))
        >>> model = CausalLanguageModel(9, dim=32, depth=1, heads=2)
        >>> data = (ids[:, :-1], ids[:, 1:])
        >>> method = QuantizedCache(bits=(16, 4), step=16, group=16)
        >>> run = coloss.fit(model, data, next_token_loss, [method], budget=coloss.Budget(steps=1))
        >>> method.report(run.model, data)["cache_bits"]
        6.0
    """

    def __init__(
        self,
        *,
        bits: Sequence[int] = (16, 4, 2, 1),
        step: int = 16,
        group: int = 16,
        grid: Grid = "bins",
        kept: torch.dtype | None = None,
        piece: int = 1,
    ):
        super().__init__()
        if piece < 1:
            raise InputError(f"piece must be >= 1, got {piece}")
        self.piece = piece
        self.options: dict[str, Any] = {
            "bits": tuple(bits),
            "step": step,
            "group": group,
            "grid": grid,
            "kept": kept,
        }
        StaircaseCache(**self.options)  # refuses what is out of range

    def setup(self, state: State) -> None:
        CachedReader(state.model, piece=self.piece, **self.options)  # refuses a model that takes no cache

    def finish(self, state: State) -> None:
        state.model = CachedReader(state.model, piece=self.piece, **self.options)

    @torch.no_grad()
    def report(self, model: nn.Module, data: Any) -> dict[str, float]:
        """`cache_bytes` of one text as long as those of the data at its end, and `cache_bits` for each number of keys and values."""
        inputs = data[0] if isinstance(data, tuple) else data.inputs
        reader: Any = model
        cache = reader.new_cache()
        device = next(model.parameters()).device
        was_training = reader.training
        reader.eval()
        try:
            for part in inputs[:1].to(device).split(self.piece, 1):
                reader.model(part, cache=cache)
        finally:
            reader.train(was_training)
        return {"cache_bytes": float(cache.nbytes()), "cache_bits": cache.bits_per_value()}
