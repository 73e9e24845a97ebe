import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coloss.train import Budget, cosine, gradual, linear, step_decay, value_at


@given(st.floats(0, 1), st.floats(0, 0.9))
def test_cosine_stays_between_its_ends(progress, warmup):
    assert -1e-12 <= cosine(1.0, 0.0, warmup)(progress) <= 1.0 + 1e-12


def test_cosine_meets_warmup_without_a_jump():
    schedule = cosine(warmup=0.2)
    assert schedule(0.2 - 1e-9) == pytest.approx(schedule(0.2), abs=1e-6)
    assert schedule(0.6) == pytest.approx(0.5)


def test_schedules_clamp_progress():
    assert linear(2.0, 4.0)(1.5) == 4.0
    assert cosine(1.0, 0.25)(7.0) == pytest.approx(0.25)


def test_gradual_is_the_formula():
    for progress in (0.1, 0.5, 0.9):
        assert gradual()(progress) == pytest.approx(2 / (1 + math.exp(-10 * progress)) - 1)


def test_numbers_pass_through():
    assert value_at(3, 0.5) == 3.0
    assert step_decay((0.5,), 0.2)(0.6) == pytest.approx(0.2)


def test_bad_warmup():
    with pytest.raises(ValueError, match=r"warmup must be in \[0, 1\), got 1"):
        cosine(warmup=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("60s", Budget(seconds=60)), ("2m", Budget(seconds=120)), ("1.5 min", Budget(seconds=90)), ("300steps", Budget(steps=300)),
     ("20 epochs", Budget(epochs=20)), ("0.5epoch", Budget(epochs=0.5))],
)  # fmt: skip
def test_budget_reads_what_people_type(text, expected):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize("text", ["", "60", "sixty s", "1.5steps", "3 hours", "s", "infsteps", "nansteps"])
def test_budget_refuses_the_rest(text):
    with pytest.raises(ValueError, match="budget must look like"):
        Budget.parse(text)


def test_a_budget_is_shared_among_stages_and_none_is_left_without_a_step():
    assert Budget(steps=100).part(0.6) == Budget(steps=60)
    assert Budget(steps=1).part(0.4) == Budget(steps=1)
    assert Budget(seconds=10.0).part(0.5) == Budget(seconds=5.0)
    assert Budget(epochs=3).part(1) == Budget(epochs=3)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        Budget(steps=10).part(0)


@pytest.mark.parametrize("limits", [{}, {"steps": 1, "epochs": 1}])
def test_budget_is_one_limit(limits):
    with pytest.raises(ValueError, match="exactly one of epochs, steps, seconds"):
        Budget(**limits)


@pytest.mark.parametrize(
    "limits", [{"steps": 0}, {"seconds": -1.0}, {"epochs": float("nan")}, {"seconds": float("inf")}]
)
def test_budget_is_positive(limits):
    with pytest.raises(ValueError, match="must be > 0"):
        Budget(**limits)
