"""The figure of size against worth."""

import math
import re
from xml.etree import ElementTree

import pytest

from coloss.report.size_figure import size_svg, sizes_of

SVG = "{http://www.w3.org/2000/svg}"
ARMS = {
    "plain": {"stored_bytes": [400_000.0, 400_000.0], "accuracy": [0.90, 0.92]},
    "tenth": {"stored_bytes": [40_000.0, 40_000.0], "accuracy": [0.80, 0.80]},
    "hundredth": {"stored_bytes": [4_000.0, 4_000.0], "accuracy": [0.86, 0.86]},
}


def test_dots_lie_at_log_size_and_mean_metric():
    svg = ElementTree.fromstring(size_svg(ARMS, "accuracy"))
    plain, tenth, hundredth = ((float(c.get("cx")), float(c.get("cy"))) for c in svg.iter(f"{SVG}circle"))
    assert plain[0] - tenth[0] == pytest.approx(tenth[0] - hundredth[0], abs=0.2)
    assert tenth[1] - plain[1] == pytest.approx(
        11 / 6 * (tenth[1] - hundredth[1]), rel=0.01
    )  # 91, 80 and 86 %
    assert [c.find(f"{SVG}title").text for c in svg.iter(f"{SVG}circle")][0] == "plain: 91.0%, 400.0 kB"


def test_labels_do_not_lie_on_one_another_nor_outside():
    arms = {f"an arm with a name {i}": {"stored_bytes": [1e4 + i], "nll": [1.0 + 1e-5 * i]} for i in range(8)}
    svg = ElementTree.fromstring(size_svg(arms, "nll"))
    places = [(float(t.get("x")), float(t.get("y"))) for t in svg.iter(f"{SVG}text") if "arm" in t.text]
    heights = sorted(y for _, y in places)
    assert len(places) == 8 and all(b - a >= 12 for a, b in zip(heights, heights[1:]))


def test_names_are_escaped_and_colours_are_those_of_the_page():
    svg = size_svg({'<b>"x"</b>': {"stored_bytes": [10.0], "nll": [1.0]}}, "nll")
    ElementTree.fromstring(svg)
    assert "<b>" not in svg and set(re.findall(r'fill="(?!none)([^"]+)"', svg)) == {"currentColor"}


def test_a_comparison_gives_what_is_drawn(results):
    record, trials = results({"plain": [0.5, 0.6], "lost": [0.7, math.nan], "waiting": [None, None]})
    assert sizes_of(record, trials) == {
        "plain": {"stored_bytes": [50_000.0, 50_000.0], "accuracy": [0.5, 0.6]}
    }


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="arms must be at least one, got none"):
        size_svg({}, "accuracy")
    with pytest.raises(ValueError, match="arms must have finite stored_bytes > 0 and nll, got plain"):
        size_svg({"plain": {"stored_bytes": [0.0], "nll": [1.0]}}, "nll")
