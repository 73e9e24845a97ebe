"""A cache of keys and values that keeps its newest tokens exactly and gives older ones fewer and fewer bits.

Fu Li 2024, arXiv 2410.18441, section on SAQ (staircase adaptive quantisation), on top of KIVI (Liu et al. 2024, arXiv 2402.02750). With
levels B_1 > B_2 > ... > B_q and a step of S tokens:

    the newest tokens, fewer than S of them, are kept as they are (B_1 = 16)
    when there are S of them they become a chunk of B_2 bits, the chunk before goes from B_2 to B_3 bits, and so on; chunks at B_q stay

Keys are quantised for each channel in groups of tokens, values for each token in groups of channels (`quantize_groups`). New tokens attend to
what is stored of those before and, exactly, to one another, so a prompt read at once is read exactly and stored with loss, as in KIVI; what
is stored does not depend on the pieces that tokens come in. Two levels are a uniform cache: `bits=(16, 4)`.

Keys are stored as attention uses them, turned by their positions (as KIVI does): nothing has to be turned again at each token, and the
cache knows nothing of positions. Channels of turned keys have wider ranges than before the turn.

The published form requantises what comes back ("ends"). On nested grids ("bins") going down a step drops low bits and adds no error, and the
last steps may have 1 bit: at equal size that is what pays (`coloss.compression.generative_optimization` has the numbers).

When it helps: attention that is mostly local, at 2 to 4 bits for each number. When not: far tokens that must be looked up exactly; above 4 bits
a uniform cache loses nothing either; beam search, as the cache cannot be reordered.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.compression.group_quantization import Grid, QuantizedGroups, quantize_groups
from coloss.nn import KeyValueCache

_Chunk = tuple[QuantizedGroups, QuantizedGroups] | tuple[Tensor, Tensor]


class StaircaseKVCache:
    """Keys and values of one attention layer in a staircase of precisions by age, really packed.

    Args:
        bits: of the levels from the newest tokens to the oldest, never rising. The first is 16; 16 keeps numbers as they come (or in
            `kept`), others are in 1..8. All 16: an exact cache.
        step: tokens of a chunk; a multiple of `group`.
        group: numbers that share a scale and a zero: tokens for keys, channels for values; divides the size of a head.
        grid: `"ends"` requantises what comes back, as published; `"bins"` leaves out low bits, without further error (`quantize_groups`).
        kept: type in which levels of 16 bits are stored, such as `torch.float16` for a float32 model; None: as they come.

    Raises:
        ValueError: for levels, step or group that break these rules; from `update`, for shapes that do not fit or numbers out of float16's
            range (`quantize_groups`), and the cache is then as before.

    Cost: a token is quantised once at each level, O(head_dim) each; `update` unpacks all tokens, as much work as attention to them.

    Source: Fu Li 2024, arXiv 2410.18441 (levels reconstructed); Liu et al. 2024, arXiv 2402.02750. No gradients pass through what is stored; to
    the new tokens of an `update` they do.

    Examples:
        >>> cache = StaircaseKVCache(bits=(16, 8, 2), step=32, group=16)
        >>> keys, values = cache.update(torch.rand(1, 2, 100, 16), torch.rand(1, 2, 100, 16))
        >>> len(cache), cache.bits_per_age()
        (100, [(4, 16), (32, 8), (64, 2)])
        >>> cache.update(torch.rand(1, 2, 1, 16), torch.rand(1, 2, 1, 16))[0].shape
        torch.Size([1, 2, 101, 16])
    """

    def __init__(
        self,
        bits: Sequence[int] = (16, 8, 4, 2),
        step: int = 128,
        group: int = 32,
        *,
        grid: Grid = "ends",
        kept: torch.dtype | None = None,
    ) -> None:
        bits = tuple(bits)
        allowed = all(level == 16 or 1 <= level <= 8 for level in bits)
        if not bits or bits[0] != 16 or not allowed or list(bits) != sorted(bits, reverse=True):
            raise ValueError(f"bits must begin with 16, never rise, and else be 16 or in 1..8, got {bits}")
        if group < 1 or step < 1 or step % group:
            raise ValueError(f"step must be a multiple of group, both >= 1, got {step} and {group}")
        if grid not in ("ends", "bins"):
            raise ValueError(f'grid must be "ends" or "bins", got {grid!r}')
        if kept is not None and not kept.is_floating_point:
            raise ValueError(f"kept must be a floating type, got {kept}")
        self.bits, self.step, self.group, self.grid, self.kept = bits, step, group, grid, kept
        self._chunks: list[_Chunk] = []  # from the oldest to the newest; the first may be several steps long
        self._newest: tuple[Tensor, Tensor] | None = None
        self._valid: Tensor | None = None

    def __len__(self) -> int:
        """Tokens stored."""
        newest = 0 if self._newest is None else self._newest[0].shape[2]
        return newest + sum(_tokens(chunk) for chunk in self._chunks)

    def update(
        self,
        keys: Float[Tensor, "batch heads tokens dim"],
        values: Float[Tensor, "batch heads tokens dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads all_tokens dim"], Float[Tensor, "batch heads all_tokens dim"]]:
        """Add tokens; get keys and values of all tokens, the new ones exactly and those before as they are stored.

        Args:
            keys: of the new tokens, as attention uses them.
            values: of the new tokens.
            valid: False for padding, which then has no say in the ranges of keys.
        """
        if keys.shape[-1] % self.group and len(self.bits) > 1:
            raise ValueError(f"group must divide the {keys.shape[-1]} channels of a head, got {self.group}")
        if valid is None:
            valid = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
        stored = self.stored(keys.dtype)
        if stored is not None and _sizes(stored[0]) != _sizes(keys):
            raise ValueError(
                f"keys must have batch, heads and channels {_sizes(stored[0])} as those before, got {_sizes(keys)}"
            )
        before = list(self._chunks), self._valid
        try:
            self._store(keys.detach(), values.detach(), valid)
        except BaseException:
            self._chunks, self._valid = before
            raise
        if stored is None:
            return keys, values
        return torch.cat([stored[0], keys], dim=2), torch.cat([stored[1], values], dim=2)

    def _store(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        new = [part.to(self.kept or part.dtype) for part in (keys, values)]
        if self._newest is not None:
            new = [torch.cat(pair, dim=2) for pair in zip(self._newest, new, strict=True)]
        self._valid = valid if self._valid is None else torch.cat([self._valid, valid], dim=1)
        while len(self.bits) > 1 and new[0].shape[2] >= self.step:
            self._age()
            place = self._valid.shape[1] - new[0].shape[2]
            self._chunks.append(
                self._chunk(new[0][:, :, : self.step], new[1][:, :, : self.step], self.bits[1], place)
            )
            new = [part[:, :, self.step :] for part in new]
            self._merge_tail()
        self._newest = new[0].clone(), new[1].clone()

    def stored(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all tokens as they are stored, in the order of the tokens; None before the first."""
        if self._newest is None:
            return None
        parts = [*(_numbers(chunk) for chunk in self._chunks), self._newest]
        keys, values = (
            torch.cat([part[side].to(dtype or part[side].dtype) for part in parts], 2) for side in (0, 1)
        )
        return keys, values

    def nbytes(self) -> int:
        """Bytes of all that is stored: packed codes, scales, zeros and the newest tokens; one bit a token for padding is not counted."""
        chunks: list[Any] = [part for chunk in self._chunks for part in chunk]
        return sum(part.nbytes for part in [*chunks, *(self._newest or ())])

    def numel(self) -> int:
        """How many numbers of keys and values are stored."""
        if self._newest is None:
            return 0
        batch, heads, _, dim = self._newest[0].shape
        return 2 * batch * heads * dim * len(self)

    def bits_per_age(self) -> list[tuple[int, int]]:
        """(tokens, bits of a code) from the newest tokens to the oldest, neighbours of equal bits together."""
        runs: list[tuple[int, int]] = []
        newest = 0 if self._newest is None else self._newest[0].shape[2]
        for tokens, bits in [
            (newest, 16),
            *((_tokens(chunk), _bits(chunk)) for chunk in reversed(self._chunks)),
        ]:
            if runs and runs[-1][1] == bits:
                runs[-1] = runs[-1][0] + tokens, bits
            elif tokens:
                runs.append((tokens, bits))
        return runs

    def _chunk(self, keys: Tensor, values: Tensor, bits: int, place: int) -> _Chunk:
        if bits == 16:
            return keys.clone(), values.clone()
        valid = self._valid_at(place, keys.shape[2])
        return (
            quantize_groups(keys, bits, self.group, axis=-2, grid=self.grid, valid=valid),
            quantize_groups(values, bits, self.group, axis=-1, grid=self.grid),
        )

    def _valid_at(self, place: int, tokens: int) -> Tensor:
        assert self._valid is not None
        return self._valid[:, None, place : place + tokens, None]

    def _age(self) -> None:
        """Take every chunk but those at the last level one level down."""
        place = sum(_tokens(chunk) for chunk in self._chunks)
        for age, number in enumerate(reversed(range(len(self._chunks)))):
            place -= _tokens(self._chunks[number])
            if age + 2 >= len(self.bits):
                break
            bits, chunk = self.bits[age + 2], self._chunks[number]
            if bits == _bits(chunk):
                continue
            if isinstance(chunk[0], QuantizedGroups) and isinstance(chunk[1], QuantizedGroups):
                valid = self._valid_at(place, self.step)
                self._chunks[number] = chunk[0].requantize(bits, valid), chunk[1].requantize(bits)
            else:
                self._chunks[number] = self._chunk(*_numbers(chunk), bits, place)

    def _merge_tail(self) -> None:
        """One piece of all chunks at the last level, which is unpacked faster than many."""
        spare = len(self._chunks) - (len(self.bits) - 2)
        if spare > 1:
            joined = tuple(_joined([chunk[side] for chunk in self._chunks[:spare]]) for side in (0, 1))
            self._chunks[:spare] = [joined]  # type: ignore[list-item]


class StaircaseCache(KeyValueCache):
    """The cache of a whole `CausalLanguageModel` with a `StaircaseKVCache` for each layer.

    It goes where a `KeyValueCache` goes: `model(ids, cache=StaircaseCache())` token by token or in pieces, with padding, `model.generate`
    and `model.fill`. Padding takes room but has no say in any range.

    Args:
        bits: levels as for `StaircaseKVCache`, or one such list for each layer.
        step, group, grid, kept: as for `StaircaseKVCache`.

    Raises:
        ValueError: as `StaircaseKVCache`; while a model reads, for fewer lists than layers, and with the second piece (or from `nbytes` and
            `bits_per_value`) for more. After a refused piece the layers may differ in length: begin with a new cache.

    Examples:
        >>> from coloss.nn import CausalLanguageModel
        >>> model = CausalLanguageModel(10, dim=32, depth=2, heads=2)
        >>> cache = StaircaseCache(bits=(16, 4, 2), step=16, group=16, kept=torch.float16)
        >>> model.generate(torch.tensor([[1, 2, 3]]), 60, cache=cache).shape, len(cache)
        (torch.Size([1, 60]), 62)
        >>> cache.bits_per_age(), cache.nbytes(), round(cache.bits_per_value(), 2)
        ([(14, 16), (16, 4), (32, 2)], 7168, 7.23)
    """

    def __init__(
        self,
        bits: Sequence[int] | Sequence[Sequence[int]] = (16, 8, 4, 2),
        step: int = 128,
        group: int = 32,
        *,
        grid: Grid = "ends",
        kept: torch.dtype | None = None,
    ) -> None:
        self.valid = None
        self._bits = bits
        self._options: dict[str, Any] = {"step": step, "group": group, "grid": grid, "kept": kept}
        self._layers: list[StaircaseKVCache] = []
        for levels in bits if _by_layer(bits) else [bits]:
            StaircaseKVCache(levels, **self._options)  # type: ignore[arg-type]

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """(keys, values) of each layer as they are stored."""
        return [stored for layer in self._layers if (stored := layer.stored()) is not None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens to a layer; gives all tokens, the new ones exactly and those before as they are stored."""
        if layer == 0 and self._layers:
            self._check_lists()
        if layer == len(self._layers):
            if _by_layer(self._bits) and layer >= len(self._bits):
                raise ValueError(
                    f"bits must hold levels for every layer of the model, got {len(self._bits)} lists"
                )
            levels: Any = self._bits[layer] if _by_layer(self._bits) else self._bits
            self._layers.append(StaircaseKVCache(levels, **self._options))
        valid = None if self.valid is None else self.valid[:, self.valid.shape[1] - keys.shape[2] :]
        return self._layers[layer].update(keys, values, valid)

    def nbytes(self) -> int:
        """Bytes of all layers."""
        if self._layers:
            self._check_lists()
        return sum(layer.nbytes() for layer in self._layers)

    def bits_per_value(self) -> float:
        """Stored bits for each number of keys and values, scales and zeros included."""
        if not len(self):
            raise ValueError("the cache must hold at least one token, got none")
        return 8 * self.nbytes() / sum(layer.numel() for layer in self._layers)

    def bits_per_age(self, layer: int = 0) -> list[tuple[int, int]]:
        """As `StaircaseKVCache.bits_per_age` of one layer."""
        return self._layers[layer].bits_per_age()

    def _check_lists(self) -> None:
        if _by_layer(self._bits) and len(self._bits) > len(self._layers):
            raise ValueError(
                f"bits must hold levels for the {len(self._layers)} layers of the model, got {len(self._bits)} lists"
            )


def _by_layer(bits: Sequence[Any]) -> bool:
    return len(bits) > 0 and isinstance(bits[0], Sequence)


def _sizes(keys: Tensor) -> tuple[int, int, int]:
    return keys.shape[0], keys.shape[1], keys.shape[3]


def _tokens(chunk: _Chunk) -> int:
    return chunk[0].shape[2]


def _bits(chunk: _Chunk) -> int:
    return chunk[0].bits if isinstance(chunk[0], QuantizedGroups) else 16


def _numbers(chunk: _Chunk) -> tuple[Tensor, Tensor]:
    keys, values = (part.dequantize() if isinstance(part, QuantizedGroups) else part for part in chunk)
    return keys, values


def _joined(parts: Sequence[Any]) -> Any:
    return (
        parts[0].joined(parts[1:]) if isinstance(parts[0], QuantizedGroups) else torch.cat(list(parts), dim=2)
    )
