"""The benchmark of lossless codecs at a tiny size: every row is whole, and every coder gives back what it took. No test looks at a time."""

import json
import math

import pytest
import torch

from coloss.lab.benchmarks import codec


def test_the_rows_are_whole_and_the_limits_where_they_belong() -> None:
    pytest.importorskip("numba")
    pytest.importorskip("zstandard")
    shares: list[float] = []
    threads = torch.get_num_threads()
    rows = codec.measure(shares.append, weights=320_000, hidden=128, epochs=1, rounds=1)
    assert torch.get_num_threads() == threads and shares[-1] == 1.0
    assert all(row.value is not None and math.isfinite(row.value) and row.value > 0 for row in rows)
    named = {row.case: row for row in rows}
    assert len(named) == len(rows) == 1 + 8 + 2 + 2 * 10 + 2
    limits = {case: (row.limit, row.at_least) for case, row in named.items() if row.limit is not None}
    assert limits == {
        "size, coloss": (0.70, False),
        "size of coloss over that of the entropy": (1.01, False),
        "size, coloss, trained weights alone": (0.70, False),
        "decoding, coloss, 2 threads over zstd -3": (1.0, True),
    }
    assert named["size, coloss"].met and named["size of coloss over that of the entropy"].met
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def test_padding_has_the_scales_of_the_trained_weights() -> None:
    trained = [torch.full((10, 10), 0.5).bfloat16(), torch.full((100,), 8.0).bfloat16()]
    tensor = codec.padded(trained, 20_200).float()
    assert tensor[:200].tolist() == [0.5] * 100 + [8.0] * 100
    assert tensor[200:10_200].std().item() == pytest.approx(0.5, rel=0.03)
    assert tensor[10_200:].std().item() == pytest.approx(8.0, rel=0.03)
