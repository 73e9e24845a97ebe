import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from coloss.errors import InputError
from coloss.lab.records import ArmRecord, HistoryPoint
from coloss.report.html import render_report, write_report

VALUES = {"cross-entropy": [0.92, 0.925, 0.93], "dhkd": [0.93, 0.937, 0.939], "lsskd": [0.91, 0.93, 0.94]}
HOSTILE = "<script>alert('x')</script>&amp; \"quoted\" </script><!-- ]]> {{ 7*7 }} %{x}"


class Page(HTMLParser):
    """Collects what a reader sees, the elements, and the contents of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.scripts, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.words.append(data)
        elif self.inside[-1] == "script":
            self.scripts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    @property
    def charts(self):
        return json.loads(self.scripts[0])["charts"]

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


@pytest.fixture
def render(results):
    return lambda values, **changes: Page(render_report(*results(values, **changes)))


def test_page_says_what_was_found_and_how_it_was_made(render):
    page = render(VALUES)
    for words in (
        "Distillation on digits",
        "dhkd is 1.0 points better than cross-entropy: 95% interval 0.7 to 1.4, 3 seeds.",
        "93.5 ± 0.5",
        "+0.7 to +1.4",
        "▲ better",
        "not separable",
        "coloss compare digits --methods dhkd,lsskd --seeds 3",
        "torch 2.13.0",
        "processor: a processor",
        "batch_size: 64",
        "20 epochs",
        "dhkd(weight=1.0)",
    ):
        assert words in page.text, words
    assert "trials finished" not in page.text


def test_every_chart_has_its_place_and_every_place_a_chart(render):
    page = render(VALUES)
    places = [attributes["id"] for _, attributes in page.elements if attributes.get("class") == "plot"]
    assert places == list(page.charts)
    assert {"ranking", "curve", "cost", "term0", "term1", "heat-arm1", "norms-arm2"} <= set(places)
    assert len(set(page.ids)) == len(page.ids)


def test_switches_offer_exactly_the_views_there_are(render):
    page = render(VALUES)
    offered = {}
    for _, attributes in page.elements:
        if "data-choice" in attributes:
            offered.setdefault(attributes["data-group"], set()).add(attributes["data-choice"])
    views = {}
    for chart in page.charts.values():
        if len(chart["views"]) > 1:
            views.setdefault(chart["group"], set()).update(chart["views"])
    assert offered == views


def test_tables_have_captions_and_headed_rows(render):
    page = render(VALUES)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") >= 4
    scopes = [attributes.get("scope") for tag, attributes in page.elements if tag == "th"]
    assert set(scopes) == {"row", "col"}


def test_names_are_escaped_everywhere(results):
    record, trials = results(
        {HOSTILE: [0.9, 0.91], "other " + HOSTILE: [0.92, 0.93]}, title=HOSTILE, command=HOSTILE
    )
    record.options = {HOSTILE: HOSTILE}
    record.machine = {HOSTILE: HOSTILE}
    for trial in trials:
        trial.fingerprint = record.fingerprint()
        for point in trial.history:
            point.terms = {HOSTILE: 1.0}
            point.metrics[HOSTILE] = 1.0
        for conflict in trial.conflicts:
            conflict.cosine = {f"{HOSTILE}|b": 0.5}
            conflict.norm = {HOSTILE: 1.0, "b": 2.0}
    html = render_report(record, trials)
    assert "<script>alert" not in html and "alert('x')</script>" not in html
    page = Page(html)
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert page.text.count("<script>alert('x')</script>&amp;") > 10  # shown as typed
    assert "{{ 7*7 }}" in page.text
    assert all("<script" not in json.dumps(chart) for chart in page.charts.values())


def test_nothing_outside_the_file_is_referred_to(render):
    page = render(VALUES)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy


def test_conflicts_are_absent_where_nothing_was_monitored(render):
    page = render(VALUES, conflicts=False)
    assert "conflict" not in page.text
    assert not any(key.startswith(("heat", "norms")) for key in page.charts)


def test_diagnostics_of_a_method_are_drawn_beside_the_losses(results):
    """One arm reports a rank at steps of its own, which no evaluation shares."""
    record, trials = results(VALUES)
    for trial in trials:
        if trial.arm == "dhkd":
            trial.history += [
                HistoryPoint(step=step, epoch=0, seconds=step, metrics={"rank": 10.0 + step})
                for step in (400, 450)
            ]
    page = Page(render_report(record, trials))
    assert "Other metrics" in page.text
    drawn = [
        trace
        for chart in page.charts.values()
        for view in chart["views"].values()
        for trace in view["data"]
        if trace.get("x") == [400, 450] and trace.get("y") == [410, 460] and trace["type"] == "scatter"
    ]
    assert {trace["name"] for trace in drawn} == {"dhkd"}


def test_no_history_leaves_ranking_and_cost(render):
    page = render(VALUES, history=False, conflicts=False)
    assert list(page.charts) == ["ranking", "cost"]
    assert "Learning curves" not in page.text


def test_unfinished_comparison_says_so(render):
    page = render({"cross-entropy": [0.9, None, None], "dhkd": [0.91, None, None]})
    assert "2 of 6 trials finished" in page.text
    assert "an interval needs at least two seeds" in page.text
    assert "not run" in page.text


def test_nothing_finished_still_gives_a_page(render):
    page = render({"cross-entropy": [None], "dhkd": [None]})
    assert "No trial has finished yet." in page.text and "0 of 2 trials finished" in page.text
    assert page.charts == {}


def test_one_arm_is_described_by_itself(render):
    page = render({"cross-entropy": [0.92, 0.93, 0.94]})
    assert "cross-entropy reaches 93.0% accuracy: 95% interval 90.5 to 95.5, 3 seeds." in page.text
    assert "Verdict" not in page.text
    assert list(page.charts["ranking"]["views"]) == ["value"]


def test_a_diverged_run_is_shown_as_such(render):
    page = render({"cross-entropy": [0.92, 0.93], "dhkd": [0.94, math.nan], "lsskd": [0.9, 0.91]})
    assert "no number in 1 of 2" in page.text and "not compared" in page.text


def test_twelve_arms_have_twelve_legends(render):
    page = render({f"arm {number}": [0.9 + number / 1000, 0.91] for number in range(12)})
    pressed = [attributes["data-arm"] for _, attributes in page.elements if "data-arm" in attributes]
    assert len(set(pressed)) == 12


def test_arm_without_methods_or_parameters(render):
    page = render(VALUES, arms=[ArmRecord(name=name, methods=[{"slug": "z-loss"}] * 2) for name in VALUES])
    assert "dhkd: z-loss, z-loss" in page.text


def test_written_beside_the_results_or_where_asked(result_folder, tmp_path_factory):
    folder, other = result_folder(VALUES), tmp_path_factory.mktemp("other")
    assert write_report(folder) == folder / "report.html"
    assert write_report(str(folder), other) == other / "report.html"
    assert (
        write_report(folder, other / "deep" / "page.html").read_text() == (folder / "report.html").read_text()
    )
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "report.html", "trials"]


def test_missing_results_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*comparison\.json: is this the folder of a comparison\?"):
        write_report(tmp_path)


def test_needs_no_torch(result_folder):
    folder = result_folder({"cross-entropy": [0.9, 0.91], "dhkd": [0.92, 0.9]})
    code = f"import sys; from coloss.report import write_report; write_report({str(folder)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
