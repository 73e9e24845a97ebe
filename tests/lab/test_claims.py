"""`verify` on made-up claims: the verdict follows from the numbers, and nothing finished is lost or mixed with other code."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import coloss.lab.claims
from coloss.errors import InputError
from coloss.lab import verify
from coloss.lab.evidence import Evidence
from coloss.lab.records import ComparisonRecord, read_record
from coloss.lab.trials import Outcome, run_trials
from coloss.train.loop import NonFiniteLossError

SCRIPT = Path(__file__).parent / "support" / "fake_systems.py"


@pytest.fixture
def fake(monkeypatch):
    """The made-up systems in place of the catalog."""
    spec = importlib.util.spec_from_file_location("fake_systems", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("coloss.lab.catalog.catalog", module.entries)
    monkeypatch.setattr("coloss.lab.claims.load_claim", module.load_claim)
    return module


@pytest.fixture
def places(tmp_path):
    return {"folder": tmp_path / "work", "evidence": tmp_path / "evidence"}


@pytest.mark.parametrize(
    ("slug", "verdict", "sign"),
    [
        ("better", "reproduced", 1),
        ("worse", "contradicted", -1),
        ("equal", "inconclusive", 0),
        ("lower", "reproduced", -1),
    ],
)
def test_the_verdict_follows_from_the_interval(fake, places, slug, verdict, sign):
    found = verify(slug, **places)
    low, high = found["interval"]
    assert found["verdict"] == verdict
    assert (low > 0) == (sign > 0) and (high < 0) == (sign < 0)
    assert found["difference"] == pytest.approx(found["method"]["mean"] - found["baseline"]["mean"])


def test_evidence_is_complete(fake, places):
    found = verify("worse", command="coloss verify worse", **places)
    stored = json.loads((places["evidence"] / "worse.json").read_text())
    assert stored == found and Evidence.model_validate(stored)
    assert (
        stored["seeds"] == [0, 1, 2, 3, 4] and stored["tried"] == "A hammer." and stored["task"] == "points"
    )
    assert stored["budget"] == {"steps": 4.0} and stored["command"] == "coloss verify worse"
    assert stored["p_value"] == 0.0625 and stored["seconds"] > 0 and stored["versions"]["torch"]
    assert stored["machine"]["cores"] and stored["created"] and stored["statement"] == "worse beats plain."
    plain, worse = stored["arms"]["plain"], stored["arms"]["worse"]
    assert len(worse["metrics"]["score"]["values"]) == 5 and worse["metrics"]["steps"]["mean"] == 4
    assert plain["metrics"]["odd"] == {"mean": None, "values": [None] * 5}
    assert plain["parameters"] == 10 and plain["seconds"] > 0
    assert not places["folder"].exists() or not list(places["folder"].iterdir())


def test_the_evidence_file_is_strict_json(fake, places):
    verify("better", **places)

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((places["evidence"] / "better.json").read_text(), parse_constant=refuse)


def test_seeds_and_budget_of_the_claim_hold_unless_more_seeds_are_asked_for(fake, places):
    found = verify("many", **places)
    assert found["seeds"] == list(range(7)) and found["budget"] == {"steps": 2.0}
    assert verify("many", seeds=5, **places)["seeds"] == list(range(5))


def test_fewer_than_five_seeds_are_no_evidence(fake, places):
    with pytest.raises(InputError, match="seeds must be >= 5 for evidence, got 4"):
        verify("better", seeds=4, **places)
    with pytest.raises(InputError, match="got 3"):
        verify("few", **places)
    assert not places["evidence"].exists() and not places["folder"].exists()


def test_a_smoke_run_writes_nothing(fake, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reports = []
    found = verify("better", smoke=True, report=lambda *report: reports.append(report), **places)
    assert found["seeds"] == [0, 1] and found["arms"]["better"]["metrics"]["steps"]["mean"] == 3
    assert list(tmp_path.iterdir()) == [] and {report[:2] for report in reports} == {
        (a, s) for a in ("plain", "better") for s in (0, 1)
    }
    assert verify("trial", smoke=True, **places)["verdict"] == "reproduced"


def test_a_claim_may_measure_all_arms_itself(fake, places):
    found = verify("trial", **places)
    assert found["verdict"] == "reproduced" and found["difference"] == pytest.approx(1.0)
    assert found["interval"] == pytest.approx([1.0, 1.0]) and found["effect_size"] is None
    assert (
        list(found["arms"]) == ["before", "after", "beside"] and found["budget"] == {} and found["task"] == ""
    )
    assert found["arms"]["before"]["metrics"]["data"]["values"] == [0.0] * 5
    assert len(set(found["baseline"]["values"])) == 5
    on_task = verify("trial-on-task", **places)
    assert on_task["budget"] == {"steps": 4.0} and on_task["task"] == "points"
    assert on_task["arms"]["before"]["metrics"]["data"]["values"] == [1.0] * 5


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("wrong-metric", "names metric 'scor', which arm 'plain' does not give; did you mean 'score'"),
        ("wrong-arm", "names an arm 'plane' that it does not have"),
        ("no-task", "a claim needs a task, or a trial function"),
        ("trial-incomplete", "must measure the arm 'missing', it gave before, after, beside"),
    ],
)
def test_a_claim_that_cannot_be_measured(fake, places, slug, message):
    with pytest.raises(InputError, match=message):
        verify(slug, **places)
    assert not list(places["evidence"].glob("*")) if places["evidence"].exists() else True


def test_a_system_without_a_claim(places):
    with pytest.MonkeyPatch.context() as patch:
        spec = importlib.util.spec_from_file_location("fake_systems", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setattr("coloss.lab.catalog.catalog", module.entries)
        with pytest.raises(InputError, match="without-claim has no claim to verify yet"):
            verify("without-claim", **places)
        with pytest.raises(InputError, match="no system named 'bettr'; did you mean 'better'"):
            verify("bettr", **places)


def test_a_run_that_diverges_leaves_no_verdict(fake, places):
    with pytest.raises(NonFiniteLossError, match="nan-metric: odd of arm 'plain' is nan with seed 0"):
        verify("nan-metric", **places)
    with pytest.raises(NonFiniteLossError, match="better, seed 0: loss term 'bad' is nan at step 0$"):
        verify("nan-loss", **places)
    assert not list(places["evidence"].iterdir())
    assert [path.name for path in (places["folder"] / "nan-loss" / "trials").iterdir()] == [
        "plain--seed0.json"
    ]


def stop_after(count):
    """A report that stops the measurement once so many trials are stored."""
    done = []

    def report(arm, seed, share):
        if share == 1.0:
            done.append((arm, seed))
            if len(done) == count:
                raise KeyboardInterrupt

    return report


def test_a_measurement_that_was_stopped_goes_on(fake, places):
    with pytest.raises(KeyboardInterrupt):
        verify("better", report=stop_after(3), **places)
    trials = places["folder"] / "better" / "trials"
    kept = {path.name: path.stat().st_mtime_ns for path in trials.iterdir()}
    assert set(kept) == {"plain--seed0.json", "better--seed0.json", "plain--seed1.json"}
    earlier = json.loads((places["folder"] / "better" / "seconds.json").read_text())
    with pytest.raises(KeyboardInterrupt):
        verify("better", report=stop_after(5), **places)
    now = {path.name: path.stat().st_mtime_ns for path in trials.iterdir()}
    assert len(now) == 5 and kept.items() <= now.items()
    found = verify("better", **places)
    assert found["seconds"] > earlier and found == json.loads(
        (places["evidence"] / "better.json").read_text()
    )
    whole = verify("better", folder=places["folder"], evidence=places["evidence"])
    for field in ("verdict", "difference", "interval", "p_value", "method", "baseline"):
        assert found[field] == whole[field]


def test_trials_of_other_code_are_not_used(fake, places, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        verify("better", report=stop_after(3), **places)
    monkeypatch.setattr(coloss.lab.claims, "code_fingerprint", lambda family: "other")
    with pytest.raises(KeyboardInterrupt):
        verify("better", report=stop_after(1), **places)
    assert [path.name for path in (places["folder"] / "better" / "trials").iterdir()] == ["plain--seed0.json"]


def test_a_damaged_working_folder(fake, places):
    with pytest.raises(KeyboardInterrupt):
        verify("better", report=stop_after(3), **places)
    (places["folder"] / "better" / "trials" / "plain--seed0.json").write_text("{")
    with pytest.raises(InputError, match="plain--seed0.json is damaged .* delete it to run it again"):
        verify("better", **places)
    (places["folder"] / "better" / "comparison.json").write_text("{")
    assert verify("better", **places)["verdict"] == "reproduced"


def test_folders_are_checked_before_the_work(fake, places, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("folder", "evidence"):
        with pytest.raises(InputError, match="cannot write .*file/below"):
            verify("better", **(places | {name: tmp_path / "file" / "below"}))


def test_the_code_fingerprint_follows_what_makes_the_numbers(monkeypatch, tmp_path):
    for folder in ("ops", "lab", "jepa", "report"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text("one = 1\n")
    monkeypatch.setattr(coloss.lab.claims, "PACKAGE", tmp_path)
    before = coloss.lab.claims.code_fingerprint("jepa")
    (tmp_path / "report" / "module.py").write_text("one = 2\n")
    assert (
        coloss.lab.claims.code_fingerprint("jepa")
        == before
        != coloss.lab.claims.code_fingerprint("retrieval")
    )
    (tmp_path / "jepa" / "module.py").write_text("one = 2\n")
    assert coloss.lab.claims.code_fingerprint("jepa") != before


@pytest.mark.parametrize(
    ("slug", "arms"), [("better", ["plain", "better"]), ("trial", ["before", "after", "beside"])]
)
def test_a_worker_gives_the_numbers_that_are_given_here(fake, places, monkeypatch, slug, arms):
    monkeypatch.setattr("coloss.lab.trials.load_claim", fake.load_claim)
    with pytest.raises(KeyboardInterrupt):
        verify(slug, report=stop_after(2), **places)
    plan = read_record(places["folder"] / slug / "comparison.json", ComparisonRecord)
    todo = [(None, 0)] if slug == "trial" else [(arm, 0) for arm in arms]
    outcomes = [
        Outcome.model_validate_json(run_trials(plan.model_dump_json(), arm, seed)) for arm, seed in todo
    ]
    there = {trial.arm: trial.metrics for outcome in outcomes for trial in outcome.trials}
    here = verify(slug, **places)["arms"]
    assert list(there) == arms
    for arm in arms:
        assert there[arm]["score"] == here[arm]["metrics"]["score"]["values"][0]


def test_a_killed_measurement_goes_on_without_repeating_a_trial(fake, places):
    arguments = [sys.executable, SCRIPT, "better", places["folder"], places["evidence"]]
    process = subprocess.Popen(list(map(str, arguments)))
    trials = places["folder"] / "better" / "trials"
    deadline = time.monotonic() + 120
    while len(list(trials.glob("*.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in trials.glob("*.json")}
    assert 2 <= len(kept) < 10 and not list(places["evidence"].glob("*.json"))
    seen = {}

    def look(arm, seed, share):
        seen.update({path.name: path.stat().st_mtime_ns for path in trials.glob("*.json")})

    found = verify("better", report=look, **places)
    assert found["verdict"] == "reproduced" and len(seen) == 10 and kept.items() <= seen.items()
