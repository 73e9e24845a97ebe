from itertools import combinations

import numpy as np
import pytest

from coloss.report.palette import HUES, INTERFACE, arm_styles, dark_of_light

# Machado, Oliveira and Fernandes 2009, full severity, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Ottosson 2020: linear RGB -> cone responses -> OKLab.
CONES = [
    [0.4122215, 0.5363325, 0.0514460],
    [0.2119035, 0.6806995, 0.1073970],
    [0.0883025, 0.2817188, 0.6299787],
]
OKLAB = [
    [0.2104543, 0.7936178, -0.0040720],
    [1.9779985, -2.4285922, 0.4505937],
    [0.0259040, 0.7827718, -0.8086758],
]


def linear(color):
    channels = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(first, second):
    low, high = sorted(linear(color) @ [0.2126, 0.7152, 0.0722] for color in (first, second))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_marks_stand_out_from_the_page(theme):
    page = INTERFACE["page"][theme]
    for role in ("ink", "muted", "better", "worse"):
        assert contrast(INTERFACE[role][theme], page) >= 4.5, role
        assert contrast(INTERFACE[role][theme], INTERFACE["surface"][theme]) >= 4.5, role
    for hue in HUES:
        assert contrast(hue[theme], page) >= 3, hue


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("sight", list(SIGHT))
def test_arms_stay_apart_for_every_kind_of_sight(theme, sight):
    colors = [hue[theme] for hue in HUES] + [INTERFACE["ink"][theme]]
    seen = {
        color: np.array(OKLAB)
        @ np.cbrt(np.array(CONES) @ np.clip(np.array(SIGHT[sight]) @ linear(color), 0, 1))
        for color in colors
    }
    assert min(np.linalg.norm(seen[a] - seen[b]) for a, b in combinations(colors, 2)) > 0.075


def test_no_two_arms_are_drawn_alike():
    names = [f"arm {number}" for number in range(25)]
    styles = arm_styles(names, "arm 3")
    assert len({(style.color, style.symbol, style.dash) for style in styles.values()}) == 25
    assert len({style.key for style in styles.values()}) == 25
    assert styles["arm 3"].color == INTERFACE["ink"][0]


def test_an_arm_keeps_its_style_when_arms_are_added():
    few, many = arm_styles(["b", "x"], "b"), arm_styles(["b", "x", "y"], "b")
    assert few["x"] == many["x"]


def test_every_light_colour_has_one_dark_partner():
    assert len(dark_of_light()) == len({light for light, _ in (*INTERFACE.values(), *HUES)})
    assert set(dark_of_light().values()) == {dark for _, dark in (*INTERFACE.values(), *HUES)}
