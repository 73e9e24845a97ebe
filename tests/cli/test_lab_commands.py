"""`coloss compare`, `verify`, `run`, `report`: what they print, write and leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO

import pytest
from rich.console import Console

from coloss import Comparison, Method
from coloss.cli.app import main
from coloss.cli.display import print_ranking
from coloss.lab.catalog import Entry, catalog
from coloss.lab.records import Cost, TrialRecord, read_comparison
from coloss.report import rank_arms
from coloss.train.loop import NonFiniteLossError

IRIS = ("compare", "iris", "--methods", "cross-entropy,trp", "--seeds", "2", "--budget", "10steps")


def test_compare_ranks_and_writes_a_report(coloss, tmp_path):
    code, out, err = coloss(*IRIS, "--out", "my results")
    assert code == 0 and err == ""
    lines = out.strip().splitlines()
    assert lines[0] == "classification on iris: accuracy (%) over 2 seeds, higher is better"
    assert lines[1].split("  ")[0] == "arm" and {"difference", "steps/s", "MB", "p"} <= set(lines[1].split())
    rows = {line.split()[0]: line for line in lines[2:4]}
    assert (
        set(rows) == {"cross-entropy", "trp"}
        and "baseline" in rows["cross-entropy"]
        and " to " in rows["trp"]
    )
    assert lines[-1] == "report: my results/report.html"
    page = (tmp_path / "my results" / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    record, trials = read_comparison(tmp_path / "my results")
    assert len(trials) == 4 and record.command == "coloss " + " ".join(IRIS) + " --out 'my results'"


def test_a_folder_is_made_where_none_is_named(coloss, tmp_path):
    assert (
        coloss("compare", "iris", "--methods", "cross-entropy", "--seeds", "1", "--budget", "1steps").code
        == 0
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("iris-") and (folder / "report.html").exists()


def test_json_and_nothing_else_on_stdout(coloss):
    code, out, err = coloss(*IRIS, "--out", "a", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and err == ""
    assert found["report"] == "a/report.html" and found["folder"] == "a" and found["failures"] == []
    assert found["metric"] == "accuracy" and found["baseline"] == "cross-entropy" and found["seeds"] == [0, 1]
    assert found["budget"] == {"steps": 10.0} and found["direction"] == "higher" and found["task"] == "iris"
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert len(arms["trp"]["interval"]) == 2 and arms["cross-entropy"]["verdict"] == "baseline"
    assert {"mean", "difference", "p_value", "steps_per_second", "peak_memory_mb"} <= arms["trp"].keys()


def test_an_experiment_file(coloss, tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "task: iris\nmethods: [cross-entropy, 'trp:energy=0.5']\nseeds: 1\nbudget: 3steps\nmetric: nll\nout: there\nreach: 1.5\n"
    )
    out = coloss("compare", "plan.yaml").out
    assert "nll over 1 seed, lower is better" in out and "report: there/report.html" in out
    assert read_comparison(tmp_path / "there")[0].target == 1.5
    found = json.loads(coloss("compare", "plan.yaml", "--seeds", "2", "--json").out)
    assert found["seeds"] == [0, 1] and {arm["arm"] for arm in found["arms"]} == {
        "cross-entropy",
        "trp:energy=0.5",
    }


def test_wrong_labels_and_rare_classes(coloss, tmp_path):
    found = coloss(*IRIS, "--out", "a", "--label-noise", "0.4", "--imbalance", "0.2", "--seeds", "1")
    title = (
        "classification on iris, 40% of the training labels wrong, rarest class at 0.2 of the most frequent"
    )
    assert found.code == 0 and found.out.strip().startswith(title)
    record, trials = read_comparison(tmp_path / "a")
    assert record.task == "iris" and record.title == title
    assert record.options["task"] == {"label_noise": 0.4, "imbalance": 0.2}
    assert {"accuracy", "balanced_accuracy", "macro_f1"} <= set(trials[0].metrics)
    assert title in (tmp_path / "a" / "report.html").read_text()
    (tmp_path / "plan.yaml").write_text(
        "task: iris\nmethods: [cross-entropy]\nseeds: 1\nbudget: 3steps\nlabel_noise: 0.4\nnoise_kind: pairwise\nout: b\n"
    )
    found = json.loads(coloss("compare", "plan.yaml", "--json").out)
    assert found["title"] == "classification on iris, 40% of the training labels pairwise wrong"
    (tmp_path / "more.yaml").write_text((tmp_path / "plan.yaml").read_text().replace("pairwise", "symmetric"))
    code, _, err = coloss("compare", "more.yaml")
    assert code == 2 and "b holds another comparison" in err and "pairwise" in err


def test_a_budget_in_seconds(coloss, tmp_path):
    code, _, _ = coloss(
        "compare", "iris", "--methods", "cross-entropy,trp", "--seeds", "1", "--budget", "0.5s", "--out", "a"
    )
    assert code == 0
    assert all(0.5 <= trial.cost.seconds < 3 for trial in read_comparison(tmp_path / "a")[1])


def test_more_workers_than_cores_are_noted_for_a_budget_in_seconds(coloss, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("coloss.lab.comparison.in_processes", lambda *given: iter(()))
    arguments = ("compare", "iris", "--methods", "cross-entropy", "--seeds", "1", "--workers", "2")
    err = coloss(*arguments, "--budget", "1s").err
    assert err.startswith("coloss: note: 2 workers share 1 cores") and err.count("\n") == 1
    assert coloss(*arguments, "--budget", "1steps").err == ""


def test_the_report_can_be_made_again(coloss, tmp_path):
    assert coloss(*IRIS, "--out", "a").code == 0
    (tmp_path / "a" / "report.html").unlink()
    assert coloss("report", "a").out == "report: a/report.html\n"
    assert coloss("report", "a", "--out", "elsewhere.html").code == 0
    assert (tmp_path / "elsewhere.html").read_text() == (tmp_path / "a" / "report.html").read_text()
    (tmp_path / "file").write_text("")
    code, _, err = coloss("report", "a", "--out", "file/below.html")
    assert code == 2 and "cannot write file/below.html" in err


class Diverge(Method):
    """Makes the loss NaN at a step."""

    def __init__(self, at: int = 5):
        super().__init__()
        self.at = at

    def terms(self, state):
        return {"shift": state.outputs.sum() * (float("nan") if state.step >= self.at else 0.0)}


def test_training_that_diverges_is_told_with_exit_code_1(coloss, monkeypatch):
    entry = Entry(
        "diverge", "", "", "jepa", ("loss",), (), "", "", method="diverge", kinds=("classification",)
    )
    monkeypatch.setattr("coloss.lab.catalog.catalog", lambda: (entry,))
    monkeypatch.setattr("coloss.lab.arms.catalog", lambda: (entry,))
    monkeypatch.setattr("coloss.lab.arms.import_name", lambda path: Diverge)
    arguments = (
        "compare",
        "iris",
        "--methods",
        "diverge:at=9,cross-entropy",
        "--seeds",
        "2",
        "--budget",
        "20steps",
        "--out",
        "a",
    )
    code, out, err = coloss(*arguments)
    line = "coloss: training diverged: diverge:at=9, seed 0: loss term 'shift' is nan at step 9 (and 1 more of the trials)\n"
    assert code == 1 and err == line and "report: a/report.html" in out and "cross-entropy" in out
    code, out, err = coloss(*arguments)
    assert (
        code == 1
        and err.startswith("coloss: training diverged: diverge:at=9, seed 0: ")
        and err.count("\n") == 1
    )
    assert "to try again delete a/trials/diverge_at=9--seed0.json" in err
    code, out, _ = coloss(*arguments, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 1 and len(found["failures"]) == 2 and found["arms"][-1]["mean"] is None


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_the_terminal(width, tmp_path):
    record = Comparison("iris", ["cross-entropy", "trp"], seeds=2, metric="accuracy").record
    cost = Cost(
        seconds=12,
        prepare_seconds=3.5,
        steps=300,
        steps_per_second=1234.5,
        peak_memory_mb=1234.5,
        parameters=5,
    )
    trials = [
        TrialRecord(arm=arm, seed=seed, fingerprint="", metrics={"accuracy": value}, cost=cost)
        for arm, seed, value in (
            ("cross-entropy", 0, 0.9),
            ("cross-entropy", 1, 0.7),
            ("trp", 0, 0.8),
            ("trp", 1, 1.0),
        )
    ]
    text = StringIO()
    print_ranking(Console(width=width, file=text), record, rank_arms(record, trials))
    lines = text.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines) and "…" not in text.getvalue()
    assert any(line.startswith("trp ") and "−244.1 to +264.1" in line for line in lines)
    assert ("1234" in text.getvalue()) == (width >= 80) and ("not separable" in text.getvalue()) == (
        width >= 100
    )


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path):
    # A test run in the background may have been started with Ctrl-C ignored, which children inherit.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listen}; from coloss.cli.app import main; main()"]
    arguments = [
        "compare",
        "wine",
        "--methods",
        "cross-entropy",
        "--seeds",
        "80",
        "--budget",
        "300steps",
        "--workers",
        "2",
    ]
    environment = os.environ | {"COLUMNS": "100"}
    process = subprocess.Popen(
        command + arguments,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("runs/*/trials/*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    out, err = process.communicate(timeout=60)
    (folder,) = (tmp_path / "runs").iterdir()
    again = f"coloss {' '.join(arguments)} --out runs/{folder.name}"
    assert process.returncode == 130 and out == ""
    assert err == f"coloss: stopped; finished trials are kept, go on with: {again}\n"
    trials = read_comparison(folder)[1]
    assert 1 <= len(trials) < 80 and not list(folder.glob("trials/.*"))


def test_ctrl_c_before_anything_began(coloss, monkeypatch):
    def stop(text):
        raise KeyboardInterrupt

    monkeypatch.setattr("coloss.cli.lab_commands.status", stop)
    assert coloss("compare", "iris", "--methods", "trp") == (130, "", "coloss: stopped\n")


def test_a_bug_keeps_its_traceback_and_an_input_error_shows_it_on_request(coloss, monkeypatch):
    def broken(text):
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coloss.cli.lab_commands.status", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            main(["compare", "iris", "--methods", "trp"])
    monkeypatch.setenv("COLOSS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no task named"):
        main(["compare", "digit", "--methods", "trp"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NonFiniteLossError("loss term 'a' is nan"), 1, "loss term 'a' is nan"),
        (OSError(28, "No space left on device", "/there"), 2, "/there: No space left on device"),
        (ValueError("x must be > 0,\n  got -1"), 2, "x must be > 0, got -1"),
    ],
)
def test_errors_from_below_come_out_as_one_line(coloss, monkeypatch, error, code, line):
    def fail(text):
        raise error

    monkeypatch.setattr("coloss.cli.lab_commands.status", fail)
    found = coloss("compare", "iris", "--methods", "trp")
    assert (found.code, found.err) == (code, f"coloss: {line}\n")


def test_a_smoke_run_measures_a_claim_and_writes_nothing(coloss, tmp_path):
    code, out, err = coloss("verify", "mw-loss", "--smoke", "--json")
    (found,) = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and err == "" and found["slug"] == "mw-loss" and found["seeds"] == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_verify_says_what_came_out_and_where_it_is(coloss, monkeypatch, tmp_path):
    found = {
        "slug": "trp",
        "verdict": "reproduced",
        "metric": "accuracy",
        "method": {"name": "trp", "mean": 0.875},
        "baseline": {"name": "plain", "mean": 0.75},
        "difference": 0.125,
        "interval": [0.1, 0.15],
        "seconds": 42.0,
    }
    asked = {}
    monkeypatch.setattr("coloss.lab.claims.verify", lambda slug, **given: asked.update(given) or found)
    out = coloss("verify", "trp", "--seeds", "6", "--workers", "2", "--evidence", "there").out
    assert out.splitlines() == [
        "trp reproduced: accuracy trp 0.875, plain 0.75, difference +0.125, 95% interval +0.1 to +0.15, 42 s",
        "evidence: there/trp.json",
    ]
    assert (
        asked["seeds"] == 6
        and asked["workers"] == 2
        and not asked["smoke"]
        and str(asked["evidence"]) == "there"
    )
    smoke = coloss("verify", "trp", "--smoke").out
    assert smoke.startswith("trp smoke run, no verdict: accuracy ") and "evidence" not in smoke


def recipe(data, folder, *, budget=None, seed=0, progress=None):
    """A complete system that notes what it was asked for."""
    progress(0.5)
    folder.mkdir(parents=True)
    (folder / "asked.txt").write_text(f"{data} {budget.steps if budget else None} {seed}")
    return {"accuracy": 0.5, "loss": float("nan")}


@pytest.fixture
def complete_system(monkeypatch):
    entry = Entry("whole", "", "", "jepa", ("model",), (), "", "", recipe="whole.recipe")
    entries = (*catalog(), entry)
    monkeypatch.setattr("coloss.lab.catalog.catalog", lambda: entries)
    monkeypatch.setattr("coloss.lab.catalog.import_name", lambda path: recipe)


def test_run_trains_a_complete_system(coloss, complete_system, tmp_path):
    code, out, err = coloss("run", "whole", "--budget", "7steps", "--seed", "3")
    assert (
        code == 0
        and err == ""
        and (tmp_path / "runs" / "whole-digits" / "asked.txt").read_text() == "digits 7 3"
    )
    assert out.splitlines() == [f"{'accuracy':24} 0.5", f"{'loss':24} nan", "model: runs/whole-digits"]
    found = json.loads(coloss("run", "whole", "--data", "iris", "--out", "there", "--json").out)
    assert found == {"folder": "there", "metrics": {"accuracy": 0.5, "loss": None}}
    code, _, err = coloss("run", "whole", "--seed", "-1")
    assert code == 2 and "seed must be >= 0, got -1" in err


def test_run_takes_the_example_of_the_system_where_no_data_are_named(
    coloss, complete_system, tmp_path, monkeypatch
):
    def with_example(data="my-plays", folder=None, *, budget=None, seed=0, progress=None):
        return recipe(data, folder, budget=budget, seed=seed, progress=progress)

    monkeypatch.setattr("coloss.lab.catalog.import_name", lambda path: with_example)
    assert coloss("run", "whole").code == 0
    assert (tmp_path / "runs" / "whole-my-plays" / "asked.txt").read_text() == "my-plays None 0"


def test_run_passes_options_of_the_system_on_and_refuses_what_it_lacks(
    coloss, complete_system, tmp_path, monkeypatch
):
    def sized(data="digits", folder=None, *, budget=None, seed=0, progress=None, size: str = "small"):
        return recipe(f"{data} {size}", folder, budget=budget, seed=seed, progress=progress)

    monkeypatch.setattr("coloss.lab.catalog.import_name", lambda path: sized)
    assert coloss("run", "whole", "--set", "size=paper").code == 0
    assert (tmp_path / "runs" / "whole-digits" / "asked.txt").read_text() == "digits paper None 0"
    for written, parts in (
        (["sise=paper"], ["no parameter 'sise'", "did you mean 'size'"]),
        (["seed=3"], ["no parameter 'seed'", "it has: size"]),
        (["size=3"], ["size of whole must be str, got 3"]),
        (["paper"], ["name=value", "'paper'"]),
        (["size=small", "size=paper"], ["set once", "size, size"]),
    ):
        code, _, err = coloss("run", "whole", *[part for text in written for part in ("--set", text)])
        assert code == 2 and all(part in err for part in parts), err


def test_select_names_the_chosen_arm_and_its_regret(coloss):
    arms = "lejepa:weight=0.0,lejepa:weight=0.1"
    assert coloss("compare", "iris-ssl", "--methods", arms, "--seeds", "2", "--budget", "5steps", "--out", "a").code == 0  # fmt: skip
    code, out, err = coloss("select", "a")
    assert code == 0 and err == ""
    lines = out.strip().splitlines()
    assert lines[0].split()[:2] == ["arm", "embedding_rankme"]
    assert (
        sum("chosen" in line for line in lines[1:3]) == 1 and sum("best" in line for line in lines[1:3]) == 1
    )
    assert lines[3].startswith("each of 2 seeds choosing for itself: ")
    found = json.loads(coloss("select", "a", "--by", "embedding_alignment", "--json").out)
    assert found["criterion_direction"] == "lower" and found["chosen"] in arms.split(",")
    assert found["regret"][0] >= 0
    code, out, err = coloss("select", "a", "--by", "rnkme")
    assert code == 2 and "no metric named 'rnkme' in a; did you mean" in err
