"""The benchmark of sliced statistics at a tiny size: equal work on every route, and whole rows. No test looks at a time."""

import pytest

from coloss.lab.benchmarks import slices
from coloss.lab.benchmarks.measure import cost_here

SIZES = {"samples": 40, "dim": 6, "slices": 16, "knots": 9}


def test_without_a_compiler_its_row_says_so_and_the_gradients_agree(monkeypatch):
    monkeypatch.setattr(slices, "cost_in_fresh_process", cost_here)
    monkeypatch.setattr(slices, "compiler_obstacle", lambda: "no C++ compiler was found")
    shares = []
    rows = {row.case: row for row in slices.measure(shares.append, rounds=1, repeats=2, **SIZES)}
    assert shares[-1] == 1.0
    absent = rows[f"time: {slices.COMPILED} / {slices.STREAMED}"]
    assert absent.value is None
    assert "no C++ compiler" in absent.note
    assert rows["relative difference of the gradient's norm"].met
    assert rows[slices.PRODUCTS].ratio == 1.0
    assert {row.limit for row in rows.values() if row.limit} == {8.0, 0.1, 1e-4}


def test_with_a_compiler_its_route_is_measured_too(monkeypatch):
    asked = []

    def cost(path, **arguments):
        asked.append(arguments["route"])
        return cost_here(path, **arguments | {"route": slices.PLAIN})

    monkeypatch.setattr(slices, "cost_in_fresh_process", cost)
    monkeypatch.setattr(slices, "compiler_obstacle", lambda: None)
    rows = {row.case: row for row in slices.measure(rounds=1, repeats=1, **SIZES)}
    assert asked.count(slices.COMPILED) == 2
    assert rows[f"time: {slices.COMPILED} / {slices.STREAMED}"].limit == 2.5
    assert rows["relative difference of the gradient's norm"].value == 0


def test_a_compiler_that_is_missing_is_an_obstacle(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert slices.compiler_obstacle() == "no C++ compiler was found"


@pytest.mark.parametrize("route", [slices.STREAMED, slices.PLAIN])
def test_both_routes_have_the_same_gradient(route):
    exact = slices.single_route(slices.PLAIN, **SIZES)()
    assert slices.single_route(route, **SIZES)() == pytest.approx(exact, rel=1e-4)
