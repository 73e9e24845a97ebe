from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from coloss.ops import pack_codes, unpack_codes


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_codes_come_back_and_take_the_bytes_that_their_bits_need(bits: int, values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.long) % 2**bits
    packed = pack_codes(codes, bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert unpack_codes(packed, bits, len(values)).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_lie_as_numpy_packs_them_little_endian(bits: int) -> None:
    codes = torch.randint(2**bits, (37,), generator=torch.Generator().manual_seed(bits))
    ones = (codes.numpy()[:, None] >> np.arange(bits)) & 1
    expected = np.packbits(ones.reshape(-1).astype(np.uint8), bitorder="little")
    assert pack_codes(codes, bits).tolist() == expected.tolist()


def test_a_matrix_is_packed_row_by_row() -> None:
    codes = torch.arange(6).reshape(2, 3).T
    assert unpack_codes(pack_codes(codes, 3), 3, 6).tolist() == [0, 3, 1, 4, 2, 5]


def test_unpacking_gives_memory_of_its_own() -> None:
    packed = pack_codes(torch.tensor([1, 2]), 8)
    unpack_codes(packed, 8, 2)[0] = 9
    assert packed.tolist() == [1, 2]


def test_packing_gives_memory_of_its_own() -> None:
    codes = torch.tensor([1, 2], dtype=torch.uint8)
    packed = pack_codes(codes, 8)
    codes.zero_()
    assert packed.tolist() == [1, 2]


@pytest.mark.parametrize("bits", range(1, 9))
def test_wide_integers_are_made_of_a_piece_at_a_time_only(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("coloss.ops.bit_packing"), "_AT_ONCE", 64)

    class Widest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.long:
                self.nbytes = max(self.nbytes, found.nbytes)
            return found

    codes = torch.randint(2**bits, (1003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    with Widest() as widest:
        packed = pack_codes(codes, bits)
        again = unpack_codes(packed, bits, 1003)
    assert widest.nbytes <= 8 * 64 and torch.equal(again, codes)
    ones = (codes.numpy()[:, None] >> np.arange(bits)) & 1
    assert packed.tolist() == np.packbits(ones.reshape(-1), bitorder="little").tolist()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"bits must be in 1..8, got 9"):
        pack_codes(torch.tensor([1]), 9)
    with pytest.raises(ValueError, match=r"codes must be in \[0, 4\), got 0 to 4"):
        pack_codes(torch.tensor([0, 4]), 2)
    with pytest.raises(ValueError, match=r"codes must be in \[0, 4\), got -1 to 0"):
        pack_codes(torch.tensor([-1, 0]), 2)
    with pytest.raises(ValueError, match="packed must have 2 bytes for 5 codes of 2 bits, got 1"):
        unpack_codes(torch.zeros(1, dtype=torch.uint8), 2, 5)
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        unpack_codes(torch.zeros(0, dtype=torch.uint8), 2, -1)
