"""The benchmark of embedding meters at tiny sizes. No test looks at a time."""

import math

from coloss.lab.benchmarks import embedding
from coloss.lab.benchmarks.measure import cost_here


def test_every_case_is_timed_weighed_and_compared_with_its_formula(monkeypatch):
    monkeypatch.setattr(embedding, "cost_in_fresh_process", cost_here)
    rows = embedding.measure(samples=400, features=8, queries=10, pairs=100, rounds=1)
    cases = embedding.cases(400, 10, 100)
    formulas = sum(case.plain for case in cases)
    assert len({row.case for row in rows}) == len(rows) == 2 * (len(cases) + formulas) + formulas
    assert all(math.isfinite(row.value) for row in rows)
    for row in rows:
        if row.case.startswith("relative difference"):
            assert row.met, row
