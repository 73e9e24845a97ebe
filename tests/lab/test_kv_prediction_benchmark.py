"""The benchmark of predicted caches at tiny sizes: rows are whole and operations ordered. No test looks at a time."""

import json
import math

import torch

from coloss.lab.benchmarks import kv_prediction


def test_the_rows_are_whole_and_the_limits_where_they_belong():
    shares = []
    threads = torch.get_num_threads()
    rows = kv_prediction.measure(shares.append, prompts=(8, 256), dim=16, depth=4, rounds=1)
    assert torch.get_num_threads() == threads
    assert shares[-1] == 1.0
    assert all(row.value is not None and math.isfinite(row.value) and row.value > 0 for row in rows)
    cases = [f"{name}, {tokens} tokens" for tokens in (8, 256) for name in kv_prediction.NAMES]
    assert [row.case for row in rows[:12]] == cases * 2
    assert [row.unit for row in rows[:12]] == ["ms"] * 6 + ["GFLOP"] * 6
    assert [row.limit for row in rows[12:]] == [None, None, 1.6, None]
    base, predicted, small = (row.value for row in rows[9:12])
    assert base > 2 * predicted > 2 * small
    json.dumps([row.as_dict() for row in rows], allow_nan=False)
