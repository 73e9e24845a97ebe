import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coloss.report.evidence_figure import axis_ticks, difference_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_dots_mean_interval_and_zero_lie_where_they_should():
    svg = ElementTree.fromstring(difference_svg({0: 0.0, 1: 1.0, 2: 2.0}, (-1.0, 3.0)))
    circles = [float(circle.get("cx")) for circle in svg.iter(f"{SVG}circle")]
    zero, one, two = circles
    assert one - zero == pytest.approx(two - one, abs=0.02)
    paths = [path.get("d") for path in svg.iter(f"{SVG}path")]
    assert f"M{zero} 24V64" in paths  # the zero line passes through a difference of 0
    low, high = next(map(float, m.groups()) for d in paths if (m := re.fullmatch(r"M(\S+) 36H(\S+)", d)))
    assert (low, high) == pytest.approx((2 * zero - one, 2 * two - one), abs=0.03)
    assert paths[-1].startswith(f"M{one} 29.5")  # the diamond of the mean


def test_words_for_screen_readers():
    svg = difference_svg(
        [0.004, 0.009, 0.014], (-0.003, 0.021), unit="points", factor=100, label="dhkd - plain"
    )
    label = ElementTree.fromstring(svg).get("aria-label")
    assert label == "dhkd - plain: mean +0.90 points, 95% interval −0.30 to +2.10, 3 seeds"


def test_drawn_in_the_colour_of_the_page():
    svg = difference_svg([0.1, 0.2], (0.0, 0.3))
    assert "<script" not in svg and "#" not in svg
    assert set(re.findall(r'(?:fill|stroke)="([^"]+)"', svg)) == {"currentColor"}


def test_labels_are_escaped():
    svg = difference_svg([0.1], label='<script>"x"</script>', unit="<b>")
    ElementTree.fromstring(svg)
    assert "<script" not in svg and "<b>" not in svg


@pytest.mark.parametrize(
    ("differences", "interval", "message"),
    [
        ([], None, "differences must be at least one finite number, got "),
        ([float("nan")], None, "differences must be at least one finite number, got .nan"),
        ([1.0], (2.0, 1.0), "interval must be finite with low <= high, got "),
        ([1.0], (0.0, float("inf")), "interval must be finite with low <= high, got "),
    ],
)
def test_bad_input(differences, interval, message):
    with pytest.raises(ValueError, match=message):
        difference_svg(differences, interval)


@given(st.lists(st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-9), min_size=1, max_size=8))
def test_every_mark_lies_inside_the_figure(differences):
    svg = ElementTree.fromstring(difference_svg(differences))
    width = float(svg.get("viewBox").split()[2])
    assert all(0 <= float(circle.get("cx")) <= width for circle in svg.iter(f"{SVG}circle"))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_interval_evenly(low, width):
    ticks, _ = axis_ticks(low, low + width)
    assert ticks[0] <= low + 1e-6 * width and ticks[-1] >= low + width - 1e-6 * width
    assert 2 <= len(ticks) <= 8
