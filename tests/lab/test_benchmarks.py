"""The benchmarks' code at tiny sizes: what is compared is equal work, and every row is whole. No test looks at a time."""

import inspect
import json
import logging
import math
import subprocess
import sys
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from coloss.errors import InputError
from coloss.lab.benchmarks import loop, rankme, runner, startup
from coloss.lab.benchmarks.measure import cost_here, cost_in_fresh_process, interleaved
from coloss.lab.benchmarks.row import Row
from coloss.lab.catalog import import_name

FIELDS = {"case", "unit", "value", "low", "high", "cpu", "ratio", "limit", "at_least", "note", "met"}


def assert_whole(rows):
    assert len({row.case for row in rows}) == len(rows)
    for row in rows:
        assert set(row.as_dict()) == FIELDS
        assert row.case
        if row.value is None:
            assert row.note
        else:
            assert math.isfinite(row.value)
            assert row.low <= row.value <= row.high
        assert (row.met is None) == (row.limit is None or row.value is None)
    json.dumps([row.as_dict() for row in rows], allow_nan=False)


def test_a_row_holds_the_quartiles_of_the_wall_clock_and_the_median_processor_time():
    row = Row.of("case", [[1.0, 9.0], [5.0, 7.0], [3.0, 8.0]], "s")
    assert (row.low, row.value, row.high, row.cpu) == (2.0, 3.0, 4.0, 8.0)


def test_the_ratio_compares_repeats_of_the_same_round():
    # The machine was ten times slower in the second round; the case takes half as long as the reference in every round.
    assert Row.of("case", [1.0, 10.0, 2.0], "s", over=[2.0, 20.0, 4.0]).ratio == 0.5


@pytest.mark.parametrize(
    ("value", "at_least", "met"),
    [(1.0, False, True), (1.1, False, False), (1.0, True, True), (0.9, True, False)],
)
def test_a_limit_holds_at_its_own_value(value, at_least, met):
    assert Row.of("case", [value], "s", limit=1.0, at_least=at_least).met is met


def test_a_row_needs_a_repeat():
    with pytest.raises(ValueError, match="at least one number, got none for 'case'"):
        Row.of("case", [], "s")


def test_rounds_take_every_case_in_turn_and_turn_around():
    order, shares = [], []
    cases = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    found = interleaved(cases, 3, shares.append)
    assert "".join(order) == "abccbaabc"
    assert found["a"].tolist() == [1.0, 6.0, 7.0]
    assert shares == pytest.approx(np.arange(1, 10) / 9)


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        interleaved({"a": lambda: 0.0}, 0)


def test_memory_counts_the_work_and_not_its_preparation(monkeypatch):
    def prepare(prepared, worked):
        kept = torch.ones(prepared * 250_000)
        return lambda: len(kept) + torch.ones(worked * 250_000).sum().item()

    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(prepare=prepare))
    cost = cost_here("made_up.prepare", prepared=200, worked=50)
    assert cost.result == 250 * 250_000
    assert 45 < cost.peak_mb < 80


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"nowhere\.at_all failed .*cannot import 'nowhere\.at_all'"):
        cost_in_fresh_process("nowhere.at_all")


def test_every_loop_sees_the_same_batches_and_ends_with_the_same_weights():
    pytest.importorskip("lightning")
    before = torch.get_rng_state()
    ends = {}
    for name, course in loop.loops().items():
        work = loop.Work(steps=5, epochs=3)
        ends[name] = torch.nn.utils.parameters_to_vector(course(work).parameters()).detach()
        assert len(work.began) == 3
    start = torch.nn.utils.parameters_to_vector(loop.Work(1, 3).network().parameters()).detach()
    assert len(ends) == 8
    for name, end in ends.items():
        assert torch.equal(end, ends[loop.PLAIN]), name
    assert not torch.equal(start, ends[loop.PLAIN])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_is_the_median_epoch_after_the_first_over_its_steps():
    work = loop.Work(steps=10, epochs=4)
    work.began = [(0.0, 0.0), (9.0, 9.0), (10.0, 9.5), (13.0, 11.5)]
    assert work.seconds_per_step() == pytest.approx((0.2, 0.125))


def test_the_loop_benchmark_gives_whole_rows_and_leaves_no_trace():
    pytest.importorskip("lightning")
    threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    shares = []
    rows = loop.measure(shares.append, steps=2, epochs=3, rounds=1)
    assert_whole(rows)
    named = {row.case: row for row in rows}
    assert set(loop.loops()) < set(named)
    assert named[loop.PLAIN].ratio == 1.0
    assert sum(row.limit is not None for row in rows) == 4
    assert shares[-1] == 1.0
    assert torch.get_num_threads() == threads
    assert logging.getLogger("lightning.pytorch").level == level


def test_without_lightning_its_rows_are_left_out_with_a_note(monkeypatch):
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    rows = loop.measure(steps=1, epochs=3, rounds=1)
    assert_whole(rows)
    absent = next(row for row in rows if row.case == loop.TRAINER)
    assert absent.value is None
    assert "coloss[lightning]" in absent.note


def test_the_first_epoch_is_never_the_only_one():
    with pytest.raises(ValueError, match="epochs must be >= 3, got 2"):
        loop.measure(epochs=2)


def test_imports_are_compared_with_the_first_and_commands_with_their_limit():
    imports = {"import json": None, "import json, decimal": 0.3}
    rows = startup.measure(rounds=1, imports=imports, commands=["--help"])
    assert_whole(rows)
    assert [(row.case, row.limit) for row in rows] == [
        ("import json", None),
        ("import json, decimal", None),
        ("import json, decimal - import json", 0.3),
        ("coloss --help", 1.5),
        ("of these, commands that import torch", 0.0),
    ]
    assert rows[-1].met


def test_a_command_that_imports_torch_is_named(monkeypatch):
    monkeypatch.setattr(startup, "_COMMAND", "import sys; print('warning\\nTrue', file=sys.stderr)")
    row = startup.measure(rounds=1, imports={"pass": None}, commands=["heavy"])[-1]
    assert (row.value, row.met, row.note) == (1.0, False, "heavy")


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(subprocess.CalledProcessError):
        startup.measure(rounds=1, imports={"pass": None}, commands=["show no-such-system"])


def test_the_rankme_routes_agree(monkeypatch):
    monkeypatch.setattr(rankme, "cost_in_fresh_process", cost_here)
    rows = rankme.measure(samples=300, features=16, rounds=1)
    assert_whole(rows)
    named = {row.case: row for row in rows}
    exact, single = (
        named[f"relative difference from {rankme.SVD64}: {name}"] for name in (rankme.GRAM, rankme.SVD32)
    )
    assert exact.met
    assert exact.value < 1e-12 < single.value < 1e-4


def test_embeddings_have_a_falling_spectrum():
    values = torch.linalg.svdvals(rankme.correlated_embeddings(5000, 8).double())
    expected = 5000**0.5 / torch.arange(1, 9)
    assert torch.allclose(values, expected.double(), rtol=0.1)


@pytest.mark.parametrize("path", runner.BENCHMARKS.values())
def test_every_benchmark_takes_a_report_and_has_defaults_for_the_rest(path):
    first, *rest = inspect.signature(import_name(path)).parameters.values()
    assert first.name == "report"
    assert all(parameter.default is not parameter.empty for parameter in rest)


def test_all_benchmarks_or_one_are_run_and_printed(monkeypatch):
    def measure(report):
        """What takes [how] long.

        More about it.
        """
        report(0.5)
        return [
            Row.of("first [s]", [2.0, 4.0], "s", limit=1.0),
            Row("second", note="not installed: pip install 'x[y]'"),
        ]

    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(measure=measure))
    monkeypatch.setattr(runner, "BENCHMARKS", {"a": "made_up.measure", "b": "made_up.measure"})
    text = StringIO()
    console = Console(file=text, width=120)
    results = runner.run_benchmarks(None, console)
    assert [(row["benchmark"], row["case"]) for row in results] == [
        ("a", "first [s]"),
        ("a", "second"),
        ("b", "first [s]"),
        ("b", "second"),
    ]
    for row in results:
        assert set(row) == FIELDS | {"benchmark", "machine"}
        assert torch.__version__ in row["machine"]
    assert json.loads(json.dumps(results)) == results
    for part in ("a: What takes [how] long.", "first [s]", "3 s", "2.5 to 3.5", "≤ 1 ✗", "'x[y]'"):
        assert part in text.getvalue()
    assert [row["benchmark"] for row in runner.run_benchmarks("b", console)] == ["b", "b"]


def test_an_unknown_benchmark_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="no benchmark named 'rank-me'; did you mean 'rankme'"):
        runner.run_benchmarks("rank-me", Console(file=StringIO()))


def test_no_ratio_is_told_over_a_reference_of_zero():
    """A case that is small enough takes no memory beyond what its process already holds."""
    assert Row.of("some", [1.0, 2.0], "MB", over=[0.0, 4.0]).ratio is None
    assert Row.of("none", [0.0, 0.0], "MB", over=[0.0, 0.0]).ratio is None
    json.dumps(Row.of("none", [0.0], "MB", over=[0.0]).as_dict(), allow_nan=False)
