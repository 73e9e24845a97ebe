import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coloss.report.quantities import Quantity, cosine, count, describe_metric, duration, memory


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("accuracy", [0.5, 0.9], "50.0%"),
        ("recall@5", [0.5, 0.9], "50.0%"),
        ("accuracy", [0.5, 0.5003], "50.00%"),
        ("accuracy", [0.5, 90.0], "0.50"),
        ("nll", [0.5, 0.9], "0.5000"),
        ("steps to target", [0.5, 4000.0, 4100.0], "0"),
        ("rank", [], "0.500"),
    ],
)
def test_metrics_are_shares_or_plain_numbers(name, values, text):
    assert describe_metric(name, values).value(0.5) == text


def test_underscores_become_words_and_the_axis_names_the_unit():
    assert describe_metric("test_accuracy").axis == "test accuracy (%)"
    assert describe_metric("nll").axis == "nll"


def test_signs():
    percent = Quantity("accuracy", 100, "%", "points", 1)
    assert percent.number(-0.012, signed=True) == "−1.2"
    assert percent.number(0.012, signed=True) == "+1.2"
    assert percent.number(-0.00001, signed=True) == "0.0"
    assert percent.amount(-0.012) == "1.2 points"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_number_is_a_dash(value):
    assert Quantity("x", unit="%").value(value) == "–"
    assert Quantity("x", difference_unit="points").amount(value) == "–"
    assert duration(value) == count(value) == memory(value) == cosine(value) == "–"


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=8), st.floats())
def test_any_values_can_be_described_and_written(values, value):
    text = describe_metric("loss", values).number(value, signed=True)
    assert text == "–" or math.isfinite(float(text.replace("−", "-"))) or abs(value) > 1.7e308


@given(st.floats(0, 1e7))
def test_durations_never_show_sixty_of_anything(seconds):
    assert not {"60 s", "60.0 s", "60 min"} & {
        " ".join(pair) for pair in zip(*[iter(duration(seconds).split())] * 2)
    }
