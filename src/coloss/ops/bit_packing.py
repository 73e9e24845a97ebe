"""Codes of 1 to 8 bits packed without gaps into bytes, and back."""

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

_AT_ONCE = 1 << 18
"""Codes that are packed at once, a multiple of 8: each is an integer of 8 bytes meanwhile."""


def pack_codes(codes: Integer[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Write every code with the same number of bits, one right after the other.

    The first code takes the lowest bits of the first byte (little-endian); the last byte is filled up with zeros.

    Args:
        codes: integers in [0, 2^bits), any shape, taken in row-major order.
        bits: of each code, in 1..8.

    Returns:
        ceil(codes * bits / 8) bytes.

    Raises:
        ValueError: if `bits` is not in 1..8, or a code does not fit.

    Cost: working memory of a few MB, however many codes; no loop over codes.

    Examples:
        >>> pack_codes(torch.tensor([1, 2, 3, 0]), bits=2).tolist()
        [57]
        >>> unpack_codes(torch.tensor([57], dtype=torch.uint8), bits=2, count=4).tolist()
        [1, 2, 3, 0]
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    if flat.numel() and not (int(flat.min()) >= 0 and int(flat.max()) < 2**bits):
        raise ValueError(f"codes must be in [0, {2**bits}), got {int(flat.min())} to {int(flat.max())}")
    if bits == 8:
        return flat.to(torch.uint8, copy=True)
    packed = flat.new_empty(_bytes(len(flat), bits), dtype=torch.uint8)
    for piece, place in zip(flat.split(_AT_ONCE), packed.split(_AT_ONCE // 8 * bits), strict=True):
        place.copy_(_pack_piece(piece, bits)[: len(place)])
    return packed


def unpack_codes(packed: UInt8[Tensor, "bytes"], bits: int, count: int) -> UInt8[Tensor, "count"]:
    """Read codes that `pack_codes` wrote.

    Args:
        packed: as `pack_codes` gives them.
        bits: of each code, in 1..8.
        count: how many there are, >= 0.

    Raises:
        ValueError: if `bits` is not in 1..8, or there are not exactly as many bytes as that many codes take.

    Cost: as for `pack_codes`.

    Examples:
        >>> unpack_codes(pack_codes(torch.arange(8), 3), bits=3, count=8).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    _check_bits(bits)
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    if len(packed) != _bytes(count, bits):
        raise ValueError(
            f"packed must have {_bytes(count, bits)} bytes for {count} codes of {bits} bits, got {len(packed)}"
        )
    if bits == 8:
        return packed.clone()
    codes = packed.new_empty(count)
    for piece, place in zip(packed.split(_AT_ONCE // 8 * bits), codes.split(_AT_ONCE), strict=True):
        place.copy_(_unpack_piece(piece, bits)[: len(place)])
    return codes


def _pack_piece(codes: Tensor, bits: int) -> Tensor:
    # Eight codes fill `bits` bytes exactly: put them into one integer, then cut that into bytes.
    padded = codes.new_zeros((-(-len(codes) // 8) * 8,), dtype=torch.long)
    padded[: len(codes)] = codes
    words = (padded.view(-1, 8) << (bits * torch.arange(8, device=codes.device))).sum(1, keepdim=True)
    packed = (words >> (8 * torch.arange(bits, device=codes.device))) & 255
    return packed.to(torch.uint8).reshape(-1)


def _unpack_piece(packed: Tensor, bits: int) -> Tensor:
    padded = packed.new_zeros((-(-len(packed) // bits) * bits,), dtype=torch.long)
    padded[: len(packed)] = packed
    words = (padded.view(-1, bits) << (8 * torch.arange(bits, device=packed.device))).sum(1, keepdim=True)
    codes = (words >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(-1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8, got {bits}")


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
