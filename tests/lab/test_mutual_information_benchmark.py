"""The benchmark of mutual-information estimators at tiny sizes: every row is whole. No test looks at a time."""

import json
import math

from coloss.lab.benchmarks import mutual_information


def test_every_way_is_timed_and_held_against_the_network():
    shares = []
    rows = mutual_information.measure(shares.append, sizes=(16, 24), columns=1, rounds=2, steps=1)
    ways = mutual_information.estimates(16, 1, 1)
    assert shares[-1] == 1.0
    assert [row.case for row in rows] == [
        case
        for samples in (16, 24)
        for case in (
            *(f"{name}, {samples} samples" for name in ways),
            f"time: InfoNCE, estimate / mist, estimate, {samples} samples",
        )
    ]
    assert all(math.isfinite(row.value) and row.low <= row.value <= row.high for row in rows)
    assert [row.ratio for row in rows if row.case.startswith("mist, estimate")] == [1.0, 1.0]
    assert [row.limit for row in rows if row.limit is not None] == [10.0, 10.0]
    json.dumps([row.as_dict() for row in rows], allow_nan=False)
