import json
import math

import pytest
from plotly import graph_objects

from coloss.report.conflict_figures import conflict_figure, norm_figure
from coloss.report.curves import conflict_map, training_curve
from coloss.report.figure_parts import log_axis, shorten, text
from coloss.report.figures import cost_figure, curve_figure, ranking_figure
from coloss.report.palette import arm_styles
from coloss.report.ranking import rank_arms
from coloss.report.wording import metric_quantity

VALUES = {"plain": [0.80, 0.82, 0.84], "dhkd": [0.81, 0.84, 0.87], "lost": [0.9, math.nan, 0.9]}


def checked(figure):
    """Plotly's own validators accept the figure, and it is JSON without NaN."""
    json.dumps(figure, allow_nan=False)
    return graph_objects.Figure(figure)


@pytest.fixture
def comparison(results):
    record, trials = results(VALUES)
    rows = rank_arms(record, trials)
    return record, trials, rows, arm_styles(list(VALUES), "plain"), metric_quantity(record, rows)


def test_ranking_shows_differences_in_points(comparison):
    _, _, rows, styles, quantity = comparison
    figure = checked(ranking_figure(rows, styles, quantity))
    seeds, interval, mean = figure.data  # the baseline is the zero line, the diverged arm has no difference
    assert seeds.x == pytest.approx((1, 2, 3))
    assert interval.x == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert mean.x == pytest.approx((2,))
    low, high = figure.layout.xaxis.range
    assert low < -0.48 and high > 4.48
    assert "0 is plain" in figure.layout.xaxis.title.text


def test_ranking_of_values_gives_a_diverged_arm_dots_but_no_mean(comparison):
    _, _, rows, styles, quantity = comparison
    figure = checked(ranking_figure(rows, styles, quantity, differences=False))
    traces = [trace for trace in figure.data if trace.name == "lost"]
    assert [trace.x for trace in traces] == [(90, 90)]
    assert len([trace for trace in figure.data if trace.name == "plain"]) == 3


def test_the_arrow_points_to_the_better_side(comparison):
    _, _, rows, styles, quantity = comparison
    titles = [
        ranking_figure(rows, styles, quantity, direction=direction)["layout"]["xaxis"]["title"]["text"]
        for direction in ("higher", "lower")
    ]
    assert "better →" in titles[0] and "← better" in titles[1]


def test_learning_curve_has_band_line_and_target(comparison):
    _, trials, _, styles, quantity = comparison
    curve = training_curve([trial for trial in trials if trial.arm == "dhkd"], "metrics", "accuracy", "steps")
    figure = checked(curve_figure([curve], styles, quantity, "steps", target=0.9))
    band, line = figure.data
    assert band.fill == "toself" and len(band.x) == 2 * len(line.x)
    assert line.line.color == styles["dhkd"].color == band.fillcolor
    assert line.y[0] == pytest.approx(100 * curve.mean[0], rel=1e-5)
    assert figure.layout.shapes[0].y0 == 90
    assert figure.layout.annotations[0].text == "target 90.0%"


def test_a_loss_over_decades_gets_a_logarithmic_axis(comparison, results):
    _, trials, _, styles, quantity = comparison
    for trial in trials:
        for point in trial.history:
            point.terms = {"loss": 10.0 ** (-point.step / 100)}
    curve = training_curve(trials[:3], "terms", "loss", "steps")
    assert checked(curve_figure([curve], styles, quantity, "steps")).layout.yaxis.type == "log"


def test_cosines_use_the_whole_scale_and_centre_at_zero(comparison):
    _, trials, *_ = comparison
    found = conflict_map([trial for trial in trials if trial.arm == "dhkd"])
    heat = checked(conflict_figure(found)).data[0]
    assert (heat.zmin, heat.zmid, heat.zmax) == (-1, 0, 1)
    assert list(heat.z[1]) == pytest.approx(found.cosine[0], abs=1e-5)


def test_each_term_has_its_own_dash_in_the_colour_of_the_arm(comparison):
    _, trials, _, styles, _ = comparison
    found = conflict_map([trial for trial in trials if trial.arm == "dhkd"])
    lines = checked(norm_figure(found, styles["dhkd"])).data
    assert [line.name for line in lines] == ["cross_entropy", "distillation"]
    assert [line.line.dash for line in lines] == ["solid", "dash"]
    assert {line.line.color for line in lines} == {styles["dhkd"].color}


def test_a_single_look_at_vanished_gradients_still_draws(comparison):
    _, trials, _, styles, _ = comparison
    trial = next(trial for trial in trials if trial.arm == "dhkd")
    del trial.conflicts[1:]
    trial.conflicts[0].norm = {"cross_entropy": 0.0, "distillation": math.nan}
    found = conflict_map([trial])
    checked(conflict_figure(found))
    assert checked(norm_figure(found, styles["dhkd"])).data[0].y == (None,)


@pytest.mark.parametrize(
    ("cost", "mean"),
    [("training", 12.3), ("preparation", 12.3), ("parameters", 12_345), ("stored", 50.0)],
)
def test_cost_has_seeds_and_means(comparison, cost, mean):
    record, trials, _, styles, quantity = comparison
    figure = checked(cost_figure(record, trials, styles, quantity, cost))
    small, large = (trace for trace in figure.data if trace.name == "plain")
    assert len(small.x) == 3 and large.x == pytest.approx((mean,))
    assert large.y == pytest.approx((82,)) and large.marker.size > small.marker.size
    assert len([trace for trace in figure.data if trace.name == "lost"]) == 1


def test_arms_without_a_stored_size_are_left_out_of_that_view(comparison):
    record, trials, _, styles, quantity = comparison
    for trial in trials:
        trial.cost.stored_bytes = None if trial.arm == "dhkd" else 4_000
    names = {trace.name for trace in checked(cost_figure(record, trials, styles, quantity, "stored")).data}
    assert "dhkd" not in names and "plain" in names


def test_markup_in_names_is_taken_literally():
    assert text("<a href='x'>%{y} $x$ &amp;") == "&lt;a href='x'&gt;&#37;{y} &#36;x&#36; &amp;amp;"


def test_shortened_names_keep_both_ends():
    short = shorten("method=dhkd,temperature=4.0,weight=0.25,seed=1", 20)
    assert len(short) == 20
    assert short.startswith("method=") and short.endswith("seed=1")


@pytest.mark.parametrize("span", [(1.0, 1.0), (0.81, 0.86), (0.3, 7.0), (1e-12, 1e9)])
def test_logarithmic_axes_hold_their_data_and_few_ticks(span):
    axis = log_axis(*span)
    low, high = axis["range"]
    assert low < math.log10(span[0]) and high > math.log10(span[1])
    assert len(axis.get("tickvals", [])) <= 9
    assert all(low <= math.log10(tick) <= high for tick in axis.get("tickvals", []))
