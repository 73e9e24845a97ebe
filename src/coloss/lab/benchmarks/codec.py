"""Lossless coding of bfloat16 weights: size, encoding and decoding beside zstd, zlib and lzma on the same bytes.

The bytes are the matrices of a small network, trained on digits and rounded to bfloat16, followed by Gaussian tensors with the standard
deviations of its matrices, up to the wanted number of weights: trained weights are alike in their exponents, and a network of 16 MB would
take longer to train than all the rest. "On planes" is a coder on all exponents, and then on all bytes of sign and mantissa: the split that
the codec of coloss makes too, by the same compiled loops, which count as part of the work. Every decoder gives new memory. Slow coders get
the first part of the same bytes; their rows say so.
"""

import importlib.util
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.compression import bf16_codec, codec_arrays, encode_bf16, exponent_stats
from coloss.data import load
from coloss.lab.benchmarks.measure import Report, interleaved, now, silent
from coloss.lab.benchmarks.row import Row

OURS = "coloss"
FALLBACK = "coloss without numba"
PEER = "zstd -3"


@dataclass(frozen=True)
class Coder:
    """One way to code the weights.

    Attributes:
        encode: weights to whatever it keeps.
        nbytes: of what it keeps.
        decode: back to the weights, as 16-bit words.
        share: of the weights that it gets, from the first on: slow coders get less.
    """

    encode: Callable[[Tensor], Any]
    nbytes: Callable[[Any], int]
    decode: Callable[[Any], np.ndarray]
    share: float = 1.0


def measure(
    report: Report = silent, *, weights: int = 8_000_000, hidden: int = 512, epochs: int = 10, rounds: int = 3
) -> list[Row]:
    """Size and speed of lossless codecs on bfloat16 weights: size over 2 bytes a weight, then MB of weights a second.

    Args:
        report: told the share done.
        weights: how many, with the padding.
        hidden: width of the network that is trained.
        epochs: that it is trained for.
        rounds: how often each coder runs.
    """
    trained = trained_weights(hidden, epochs)
    tensor = padded(trained, weights)
    note = f"{sum(map(torch.numel, trained)):,} trained, {tensor.numel():,} with padding"
    cases = {name: partial(_once, coder, tensor) for name, coder in coders().items()}
    for case in cases.values():
        case(warm=True)
    found = interleaved(cases, rounds, report)
    ways = coders()
    bound = (8 + exponent_stats(tensor).entropy) / 16
    ours = [name for name in ways if name.startswith(f"{OURS}, ")]
    first = next(iter(ways))
    rows = [Row.of("entropy of the exponents: (8 + H) / 16", [bound], "", note=note)]
    for name, figures in found.items():
        if name.startswith(OURS) and name != first:  # the same bytes, whatever the threads
            continue
        limit = 0.70 if name == first else None
        rows.append(
            Row.of(
                f"size, {name.split(',')[0]}", figures[:, 0], "", limit=limit, note=_part(ways[name], tensor)
            )
        )
    above = found[first][:, 0] / bound
    rows.append(Row.of("size of coloss over that of the entropy", above, "x", limit=1.01))
    alone = [encode_bf16(trained).nbytes / sum(weight.nbytes for weight in trained)]
    rows.append(Row.of("size, coloss, trained weights alone", alone, "", limit=0.70))
    for title, columns in (("encode", slice(1, 3)), ("decode", slice(3, 5))):
        reference: Any = found[PEER][:, columns] if PEER in found else None
        for name, figures in found.items():
            over = None if name == PEER else reference
            rows.append(
                Row.of(
                    f"{title}, {name}", figures[:, columns], "MB/s", over=over, note=_part(ways[name], tensor)
                )
            )
    if PEER in found and ours:
        for name in ours:
            ratio = found[name][:, 3] / found[PEER][:, 3]
            limit = 1.0 if name == ours[-1] else None
            rows.append(Row.of(f"decoding, {name} over {PEER}", ratio, "x", limit=limit, at_least=True))
    for module, names in (("numba", OURS), ("zstandard", "zstd")):
        if importlib.util.find_spec(module) is None:
            rows.append(Row(names, note=f"needs {module}: pip install coloss[codec]"))
    return rows


def coders() -> dict[str, Coder]:
    """All ways by name; those whose libraries are missing are left out.

    Examples:
        >>> weights = torch.ones(20_000).bfloat16()
        >>> coder = coders()["zlib -9"]
        >>> hex(coder.decode(coder.encode(weights))[0])
        '0x3f80'
    """
    found = {}
    if importlib.util.find_spec("numba") is not None:
        for threads in (1, 2):
            found[f"{OURS}, {threads} thread{'s' * (threads > 1)}"] = Coder(
                partial(_with_threads, threads, encode_bf16),
                lambda stored: stored.nbytes,
                partial(_with_threads, threads, lambda stored: _words(stored.decode())),
            )
    found[FALLBACK] = Coder(
        partial(_without_numba, encode_bf16),
        lambda stored: stored.nbytes,
        partial(_without_numba, lambda stored: _words(stored.decode())),
        share=0.5,
    )
    plain: dict[str, tuple[Any, Any, float]] = {}
    if importlib.util.find_spec("zstandard") is not None:
        import zstandard

        for level, share in ((3, 1.0), (19, 1 / 16)):
            decode = zstandard.ZstdDecompressor().decompress
            plain[f"zstd -{level}"] = (zstandard.ZstdCompressor(level=level).compress, decode, share)
    plain["zlib -9"] = (partial(zlib.compress, level=9), zlib.decompress, 1 / 8)
    plain["lzma"] = (lzma.compress, lzma.decompress, 1 / 16)
    for name, (encode, decode, share) in plain.items():
        found[name] = Coder(partial(_encode_bytes, encode), len, partial(_decode_bytes, decode), share)
    for name, (encode, decode, share) in plain.items():
        if name != "lzma":
            found[f"{name} on planes"] = Coder(
                partial(_encode_planes, encode),
                lambda parts: sum(map(len, parts)),
                partial(_decode_planes, decode),
                share,
            )
    return found


def trained_weights(hidden: int, epochs: int) -> list[Tensor]:
    """Matrices of a network of two hidden layers, trained on digits with AdamW, in bfloat16.

    Examples:
        >>> [tuple(weight.shape) for weight in trained_weights(16, 1)]
        [(16, 64), (16, 16), (10, 16)]
    """
    data: Any = load("digits", seed=0)
    inputs, targets = data.train.inputs.flatten(1), data.train.targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs)).split(64):
                loss = F.cross_entropy(model(inputs[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return [parameter.detach().bfloat16() for parameter in model.parameters() if parameter.ndim > 1]


def padded(trained: list[Tensor], weights: int) -> Tensor:
    """Trained matrices end to end, then Gaussian tensors of their sizes' scales in turn, up to a number of weights.

    Examples:
        >>> padded([torch.ones(3, 2).bfloat16()], 10).shape
        torch.Size([10])
    """
    generator = torch.Generator().manual_seed(0)
    flat = torch.cat([weight.reshape(-1) for weight in trained])[:weights]
    missing = weights - len(flat)
    parts = [
        torch.randn(missing * (k + 1) // len(trained) - missing * k // len(trained), generator=generator)
        * weight.float().square().mean().sqrt()
        for k, weight in enumerate(trained)
    ]
    return torch.cat([flat, *(part.bfloat16() for part in parts)])


def _once(coder: Coder, tensor: Tensor, warm: bool = False) -> tuple[float, ...]:
    """Bytes over bytes, and MB a second by wall and processor time, of encoding and of decoding."""
    part = tensor[: 20_000 if warm else max(1, round(coder.share * len(tensor)))].clone()
    megabytes = part.nbytes / 1e6
    started = now()
    stored = coder.encode(part)
    encoded = now()
    decoded = coder.decode(stored)
    done = now()
    if not np.array_equal(decoded, _words(part)):
        raise RuntimeError("decoded weights differ from the encoded ones")
    spent = np.maximum([np.subtract(encoded, started), np.subtract(done, encoded)], 1e-9)
    return coder.nbytes(stored) / part.nbytes, *(megabytes / spent).reshape(-1).tolist()


def _part(coder: Coder, tensor: Tensor) -> str:
    return "" if coder.share == 1 else f"on the first {2 * coder.share * len(tensor) / 1e6:.3g} MB"


def _with_threads(threads: int, function: Callable[[Any], Any], given: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(given)
    finally:
        torch.set_num_threads(before)


def _without_numba(function: Callable[[Any], Any], given: Any) -> Any:
    with patch.object(bf16_codec, "loops", lambda: codec_arrays):
        return function(given)


def _encode_bytes(encode: Callable[[Any], bytes], weights: Tensor) -> bytes:
    return encode(_words(weights).data)


def _decode_bytes(decode: Callable[[Any], bytes], stored: bytes) -> np.ndarray:
    return np.frombuffer(decode(stored), np.uint16)


def _encode_planes(encode: Callable[[Any], bytes], weights: Tensor) -> tuple[bytes, bytes]:
    exponents, rest = np.empty((2, len(weights)), np.uint8)
    bf16_codec.loops().split(_words(weights), rest, exponents, np.zeros(256, np.int64))
    return encode(exponents.data), encode(rest.data)


def _decode_planes(decode: Callable[[Any], bytes], stored: tuple[bytes, bytes]) -> np.ndarray:
    exponents, rest = (np.frombuffer(decode(part), np.uint8) for part in stored)
    words = np.empty(len(rest), np.uint16)
    bf16_codec.loops().join(exponents, rest, words)
    return words


def _words(weights: Tensor) -> np.ndarray:
    return weights.view(torch.int16).numpy().view(np.uint16)
