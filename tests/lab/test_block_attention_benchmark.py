"""The block attention benchmark at tiny sizes: the mask is the same attention, and every row is whole. No test looks at a time."""

import json
import math

import torch

from coloss.lab.benchmarks import block_attention
from coloss.lab.benchmarks.measure import cost_here


def test_the_rows_are_whole_and_the_limits_where_they_belong(monkeypatch):
    monkeypatch.setattr(block_attention, "cost_in_fresh_process", cost_here)
    shares = []
    rows = block_attention.measure(shares.append, documents=(2, 5), tokens=4, calls=1, rounds=2)
    assert shares[-1] == 1.0
    assert [row.case for row in rows if not row.case.startswith("  ")] == [
        "block attention, 2 documents",
        "dense causal, 2 documents",
        "dense with a mask, 2 documents",
        "block attention, 5 documents",
        "dense causal, 5 documents",
        "dense with a mask, 5 documents",
        "log time over log tokens: block attention",
        "log time over log tokens: dense causal",
        "log time over log tokens: dense with a mask",
    ]
    assert all(row.value is not None and math.isfinite(row.value) for row in rows)
    assert [(row.limit, row.at_least) for row in rows[-3:]] == [(1.3, False), (1.5, True), (None, False)]
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def test_blocks_and_mask_are_one_attention_and_the_dense_rival_is_another():
    prompt = block_attention._prompt(4, 8)
    found = {way: attend(*prompt) for way, attend in block_attention.WAYS.items()}
    torch.testing.assert_close(found[block_attention.BLOCK], found[block_attention.MASK], atol=1e-5, rtol=0)
    assert not torch.allclose(found[block_attention.BLOCK], found[block_attention.CAUSAL], atol=1e-2)
    # The instruction, the first document and the last block see the same either way.
    for part in (slice(0, 16), slice(40, 48)):
        one, other = (found[way][:, :, part] for way in (block_attention.BLOCK, block_attention.CAUSAL))
        close = torch.isclose(one, other, atol=1e-5).all()
        assert close
