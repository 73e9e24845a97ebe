"""The local learning benchmark at a tiny size: bytes do not depend on the machine, so its limits can be tested."""

import json

from coloss.lab.benchmarks import local_learning


def test_the_rows_are_whole_and_the_limits_kept():
    rows = local_learning.measure(batch=4, size=8, blocks=(2, 4, 16))
    assert [row.case for row in rows[:2]] == ["backpropagation", "checkpointing"]
    assert "AugLocal, 14 blocks" in [row.case for row in rows]
    limits = [row for row in rows if row.limit is not None]
    assert len(limits) == 3 and all(row.met for row in limits)
    json.dumps([row.as_dict() for row in rows], allow_nan=False)
