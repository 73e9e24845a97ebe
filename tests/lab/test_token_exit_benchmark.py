"""The early exit benchmark at tiny sizes: the right share of patches leaves, and every row is whole. No test looks at a time."""

import json
import math

import torch

from coloss.lab.benchmarks import token_exit


def test_the_rows_are_whole():
    shares = []
    rows = token_exit.measure(shares.append, sizes=((2, 4, 8),), shares=(0.5,), rounds=1)
    assert shares[-1] == 1.0
    assert [row.case for row in rows] == [
        "8 patches of width 8",
        "8 patches of width 8, 50% gathered out",
        "8 patches of width 8, 50% hidden",
    ]
    assert rows[0].ratio == 1.0
    assert all(math.isfinite(row.value) and math.isfinite(row.cpu) for row in rows)
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def test_both_ways_are_one_network_and_a_share_of_none_is_the_plain_one():
    image = torch.rand(1, 3, 10, 20)
    gathered, hidden = (token_exit.one_image(image, 8, 0.25, gather=way)() for way in (True, False))
    torch.testing.assert_close(gathered, hidden)
    assert not torch.allclose(gathered, token_exit.one_image(image, 8, None)())
    active = torch.ones(1, 8, dtype=torch.bool)
    assert [int(token_exit._spread(active, share).sum()) for share in (0.25, 0.5, 0.75)] == [2, 4, 6]
