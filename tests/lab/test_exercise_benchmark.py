"""The benchmark of the exercise monitor at tiny sizes: every row is whole. No test looks at a time."""

import json
import math

from coloss.lab.benchmarks import exercise


def test_the_rows_are_whole():
    shares: list[float] = []
    rows = exercise.measure(shares.append, frames=10, hidden=2, window=6, rounds=1)
    assert shares[-1] == 1.0 and len(rows) == 4 and "every 4 frames" in rows[0].case
    assert all(math.isfinite(row.value) and row.cpu > 0 and row.limit == exercise.LIMIT for row in rows)
    json.dumps([row.as_dict() for row in rows], allow_nan=False)
