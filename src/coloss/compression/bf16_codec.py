"""bfloat16 tensors in about 11 bits a weight, and back bit for bit.

Lossless Huffman coding of the exponents (Zhang et al. 2025, "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference
via Dynamic-Length Float", arXiv 2504.11651, DFloat11). A 16-bit word w falls into

    exponent       e  = (w >> 7) & 255                         coded, see `coloss.compression.exponent_coding`
    sign, mantissa sm = ((w >> 8) & 128) | (w & 127)           a byte as it is: there is nothing to gain in it
    word           w  = ((sm & 128) << 8) | (e << 7) | (sm & 127)

With the entropy H of the exponents, 2.55 bits for Gaussian weights of any scale, that is at best (8 + H) / 16 of the bytes; `encode_bf16`
takes half a percent more. NaN with any payload, infinities and zeros of both signs are words like all others.

What is kept of the published format, and what not. The same: the split, one canonical code of at most 32 bits for a unit (a tensor, or the
weights of a transformer block together), highest bits first. Different: theirs serves thousands of GPU threads, each of which starts
anywhere in the stream and needs 5 bits for each 64 to find its first code, and has byte-wise tables that give up 16 exponents (|w| >=
2^113, infinities, NaN) for pointers. Here cores are few: blocks of 4,096 weights each start at a 32-bit word, and their lengths are stored.
With what fills up last words that is 4 bytes for each 5,400 (0.07 %), where the offsets of the published format take 2 %; and all 256
exponents are symbols. Files are not those of the authors' library.

Speed, MB of bfloat16 a second of one processor core, Gaussian weights, Xeon 2.5 GHz (`coloss bench codec` measures it where you are):

                            decode   encode   size
    numba, this format       1,300      520   0.662
    numpy, this format          65       38   0.662     runs without numba; one thread only
    zstd -3 on the words       820      370   0.780
    zstd -3 on both planes     440      130   0.703

So numba, which is an extra (`pip install coloss[codec]`), and not a C extension: it is 20 times as quick as whole-array operations and
passes zstd's C code, without a compiler at installation; it costs about 5 s of compiling at the first use on a machine (kept on disk), and
under a second in each process. Blocks are shared among `torch.get_num_threads()` threads.

When it helps: weights at rest, on disk or in memory, that must come back exactly. When not: in float32 three of four bytes are mantissa,
so only 17 % could be saved, and in float16 less (neither is coded here, unless all values are exactly bfloat16: see `store_exactly`);
pruned or quantised weights have smaller exact forms (`store_exactly` looks for them and takes this one where it is smallest); and below
16,384 weights there is little to win: these stay raw. A weight must be decoded before each use that is to save memory: that costs time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from coloss.compression import codec_arrays
from coloss.compression.exponent_coding import (
    canonical_codes,
    code_lengths,
    decoding_tables,
    entropy_bits,
)
from coloss.compression.weight_forms import StoredWeight
from coloss.errors import InputError

MINIMUM_WEIGHTS = 16_384
BLOCK = 4096
_SPARE_WORDS = 2
_WEIGHTS_PER_THREAD = 1 << 18
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ExponentStats:
    """What the exponents of a tensor allow.

    Attributes:
        entropy: least bits that any code of single exponents needs, mean over the weights.
        mean_code_length: bits that the best prefix code needs.
        symbols: how many of the 256 exponents occur.
        ratio: bytes that `encode_bf16` will take, over 2 bytes a weight; 1 where it will leave the tensor raw. Exact but for the up to 31
            bits that fill up the last word of each block, of which it counts half.
    """

    entropy: float
    mean_code_length: float
    symbols: int
    ratio: float


@dataclass(frozen=True)
class DFloat11Tensor(StoredWeight):
    """A bfloat16 tensor with coded exponents; made by `encode_bf16`.

    Attributes:
        sign_mantissa: (weights,) uint8.
        encoded: int32 words of codes, the first code in the highest bits of the first word; each block starts at a word of its own; two
            words of zeros at the end.
        block_words: (blocks,) int16, words of each block of 4,096 weights (the last may be shorter).
        code_lengths: (256,) uint8, bits of each exponent's code.
        raw: the tensor itself where coding does not pay; the other four are empty then.
        shape: of the tensor.
        dtype: what `restore` gives; `decode` always gives bfloat16.

    Raises:
        InputError: if the parts do not fit together.
    """

    kind: ClassVar[str] = "dfloat11"
    sign_mantissa: Tensor
    encoded: Tensor
    block_words: Tensor
    code_lengths: Tensor
    shape: tuple[int, ...]
    raw: Tensor | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.raw is not None:
            _require(self.raw.dtype == torch.bfloat16, "raw must be bfloat16", self.raw.dtype)
            _require(self.raw.shape == self.shape, f"raw must have shape {self.shape}", tuple(self.raw.shape))
            return
        parts = {"sign_mantissa": torch.uint8, "encoded": torch.int32, "block_words": torch.int16}
        for name, dtype in {**parts, "code_lengths": torch.uint8}.items():
            part = getattr(self, name)
            fits = part.dtype == dtype and part.ndim == 1 and part.device.type == "cpu"
            _require(fits, f"{name} must be a row of {dtype} on the CPU", f"{part.dtype} {tuple(part.shape)}")
        weights = math.prod(self.shape)
        _require(
            len(self.sign_mantissa) == weights,
            f"sign_mantissa must have {weights} bytes",
            len(self.sign_mantissa),
        )
        blocks = -(-weights // BLOCK)
        _require(
            len(self.block_words) == blocks,
            f"block_words must have {blocks} entries",
            len(self.block_words),
        )
        _require(len(self.code_lengths) == 256, "code_lengths must have 256 entries", len(self.code_lengths))
        self._starts()

    @property
    def coded(self) -> bool:
        """Whether the exponents are coded, and not the tensor kept raw."""
        return self.raw is None

    def decode(self, out: Tensor | None = None) -> Tensor:
        """The tensor, bit for bit.

        Args:
            out: a contiguous bfloat16 tensor of this shape to write into: nothing of the tensor's size is allocated then, if it lies on
                the CPU. On another device it is filled by a copy. Autograd counts it as written to.

        Returns:
            `out`, or a new tensor on the CPU.

        Raises:
            ValueError: if `out` is of another dtype or shape, or not contiguous.
            InputError: if the codes were altered in a way that shows; `out` is then left with anything in it.

        Cost: O(weights), over `torch.get_num_threads()` threads from 2^18 weights a thread on.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=torch.bfloat16)
        elif out.dtype != torch.bfloat16 or out.shape != self.shape or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous bfloat16 of shape {self.shape}, got {out.dtype} {tuple(out.shape)}"
                f"{'' if out.is_contiguous() else ', not contiguous'}"
            )
        if self.raw is not None:
            out.detach().copy_(self.raw)
            return out
        if not len(self.block_words):
            return out
        if out.device.type != "cpu":
            out.detach().copy_(self.decode())
            return out
        bad = _over_blocks(
            loops().read,
            len(self.block_words),
            _unsigned(self.encoded),
            self._starts(),
            decoding_tables(self.code_lengths.numpy()),
            self.sign_mantissa.numpy(),
            _unsigned(out.detach().reshape(-1)),
            BLOCK,
        )
        if not out.is_inference():
            increment_version(out)
        if any(bad):
            raise InputError(f"encoded must end where its blocks end, got {sum(bad)} altered places")
        return out

    def tensors(self) -> dict[str, Tensor]:
        if self.raw is not None:
            return {"raw": self.raw}
        names = ("sign_mantissa", "encoded", "block_words", "code_lengths")
        return {name: getattr(self, name) for name in names}

    def settings(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    def restore(self) -> Tensor:
        return self.decode().to(self.dtype)

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "DFloat11Tensor":
        shape, dtype = tuple(settings["shape"]), getattr(torch, settings["dtype"])
        if "raw" in tensors:
            return replace(_raw(tensors["raw"]), dtype=dtype)
        names = ("sign_mantissa", "encoded", "block_words", "code_lengths")
        if missing := [name for name in names if name not in tensors]:
            raise InputError(f"a dfloat11 tensor must have {', '.join(names)}, got no {', '.join(missing)}")
        sign_mantissa, encoded, block_words, lengths = (tensors[name] for name in names)
        return cls(sign_mantissa, encoded, block_words, lengths, shape, dtype=dtype)

    def _starts(self) -> Any:
        words = self.block_words.numpy().astype(np.int64)
        _require(not len(words) or words.min() >= 0, "block_words must be >= 0", words.min(initial=0))
        starts = np.concatenate([[0], words.cumsum()])
        whole = int(starts[-1]) + _SPARE_WORDS
        _require(len(self.encoded) == whole, f"encoded must have {whole} words", len(self.encoded))
        return starts


def encode_bf16(tensor: Tensor | Sequence[Tensor]) -> DFloat11Tensor:
    """Code the exponents of a tensor, or of several under one code.

    Args:
        tensor: bfloat16, of any shape, layout and device; or a sequence of such, which are taken as one flat tensor, end to end (all
            weights of a transformer block: one table for all).

    Returns:
        On the CPU. Its `raw` holds the tensor where there are fewer than 16,384 weights or coding saves nothing.

    Raises:
        ValueError: if a tensor is not bfloat16.

    Examples:
        >>> weight = torch.randn(300, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
        >>> stored = encode_bf16(weight)
        >>> torch.equal(stored.decode(), weight), round(stored.nbytes / weight.nbytes, 2)
        (True, 0.67)
    """
    tensors, shape = _flat(tensor)
    weights = math.prod(shape)
    if weights >= MINIMUM_WEIGHTS:
        coded = _coded(tensors, shape)
        if coded.nbytes < 2 * weights:
            return coded
    return _raw(torch.cat([torch.empty(0, dtype=torch.bfloat16), *tensors]).reshape(shape))


def exponent_stats(tensor: Tensor | Sequence[Tensor]) -> ExponentStats:
    """How small coding will make a tensor, without coding it.

    Args:
        tensor: as for `encode_bf16`.

    Raises:
        ValueError: if a tensor is not bfloat16.

    Cost: one histogram.

    Examples:
        >>> stats = exponent_stats(torch.ones(200, 100).bfloat16())
        >>> stats.entropy, stats.mean_code_length, stats.symbols, round(stats.ratio, 2)
        (0.0, 1.0, 1, 0.57)
    """
    tensors, shape = _flat(tensor)
    counts = np.zeros(256, dtype=np.int64)
    scratch = np.empty((2, _AT_ONCE), dtype=np.uint8)
    for part in (piece for whole in tensors for piece in whole.split(_AT_ONCE)):
        loops().split(_unsigned(part), scratch[0, : len(part)], scratch[1, : len(part)], counts)
    weights = max(math.prod(shape), 1)
    bits = int((counts * code_lengths(counts)).sum())
    blocks = -(-weights // BLOCK)
    nbytes = weights + bits / 8 + blocks * 4 + 4 * _SPARE_WORDS + 256
    coded = weights >= MINIMUM_WEIGHTS and nbytes < 2 * weights
    return ExponentStats(
        entropy=entropy_bits(counts),
        mean_code_length=bits / weights,
        symbols=int((counts > 0).sum()),
        ratio=nbytes / (2 * weights) if coded else 1.0,
    )


@cache
def loops() -> ModuleType:
    """The compiled loops where numba is installed, else those of whole arrays."""
    try:
        from coloss.compression import codec_kernels
    except ImportError:
        return codec_arrays
    return codec_kernels


def code_always(tensor: Tensor | Sequence[Tensor]) -> DFloat11Tensor:
    """Code the exponents without looking whether that pays.

    Args:
        tensor: as for `encode_bf16`.

    Raises:
        ValueError: if a tensor is not bfloat16.

    Examples:
        >>> code_always(torch.tensor([0.5, 1.0, -2.0]).bfloat16()).decode()
        tensor([ 0.5000,  1.0000, -2.0000], dtype=torch.bfloat16)
    """
    return _coded(*_flat(tensor))


def _coded(tensors: list[Tensor], shape: tuple[int, ...]) -> DFloat11Tensor:
    weights = math.prod(shape)
    sign_mantissa, exponents = torch.empty(weights, dtype=torch.uint8), np.empty(weights, dtype=np.uint8)
    counts = np.zeros(256, dtype=np.int64)
    low = 0
    for part in tensors:
        here = slice(low, low + len(part))
        loops().split(_unsigned(part), sign_mantissa.numpy()[here], exponents[here], counts)
        low = here.stop
    lengths = code_lengths(counts)
    blocks = -(-weights // BLOCK)
    block_words = torch.empty(blocks, dtype=torch.int16)
    _over_blocks(loops().measure, blocks, exponents, lengths, BLOCK, after=(block_words.numpy(),))
    starts = np.concatenate([[0], block_words.numpy().astype(np.int64).cumsum()])
    encoded = torch.zeros(int(starts[-1]) + _SPARE_WORDS, dtype=torch.int32)
    codes = canonical_codes(lengths)
    after = (starts, _unsigned(encoded))
    _over_blocks(loops().write, blocks, exponents, lengths, codes, BLOCK, after=after)
    return DFloat11Tensor(sign_mantissa, encoded, block_words, torch.from_numpy(lengths), shape)


def _over_blocks(
    loop: Callable[..., Any], blocks: int, *before: Any, after: tuple[Any, ...] = ()
) -> list[Any]:
    """Share the blocks among threads; what the loop gives for each share."""
    most = 1 if loops() is codec_arrays else torch.get_num_threads()
    shares = max(1, min(most, blocks * BLOCK // _WEIGHTS_PER_THREAD))
    bounds = [round(k * blocks / shares) for k in range(shares + 1)]
    ranges = list(zip(bounds, bounds[1:], strict=False))
    if shares == 1:
        return [loop(*before, *ranges[0], *after)]
    with ThreadPoolExecutor(shares) as pool:
        return [
            share.result() for share in [pool.submit(loop, *before, *range_, *after) for range_ in ranges]
        ]


def _flat(tensor: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Flat parts on the CPU, and the shape of all."""
    whole = isinstance(tensor, Tensor)
    parts: Sequence[Tensor] = [tensor] if isinstance(tensor, Tensor) else list(tensor)
    for part in parts:
        if part.dtype != torch.bfloat16:
            raise ValueError(f"tensor must be bfloat16, got {part.dtype}")
    flat = [part.detach().cpu().reshape(-1) for part in parts]
    return flat, tuple(parts[0].shape) if whole else (sum(len(part) for part in flat),)


def _raw(tensor: Tensor) -> DFloat11Tensor:
    none = torch.empty(0, dtype=torch.uint8)
    return DFloat11Tensor(none, none.int(), none.short(), none, tuple(tensor.shape), tensor)


def _unsigned(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy().view(np.uint32)


def _require(fits: Any, rule: str, found: Any) -> None:
    if not fits:
        raise InputError(f"{rule}, got {found}")
