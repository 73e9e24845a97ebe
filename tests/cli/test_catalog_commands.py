"""`coloss list`, `show`, `data`: what a person and a script read there, without torch."""

import doctest
import importlib
import json
import subprocess
import sys

import pytest

from coloss.data import DATASETS
from coloss.lab.catalog import FAMILIES, catalog
from coloss.lab.evidence import Evidence, write_evidence

SYSTEMS = [entry.slug for entry in catalog()]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Evidence for one system, in a folder that stands in for the project's."""
    folder = tmp_path / "evidence"
    arms = {
        name: {
            "metrics": {"accuracy": {"mean": mean, "values": [mean] * 5}},
            "seconds": 1.0,
            "prepare_seconds": 0.0,
            "steps_per_second": 10.0,
            "parameters": 5,
        }
        for name, mean in (("plain", 0.75), ("trp", 0.875))
    }
    evidence = Evidence(
        slug="trp",
        statement="It [keeps] more.",
        verdict="reproduced",
        metric="accuracy",
        direction="higher",
        seeds=list(range(5)),
        baseline={"name": "plain", "mean": 0.75, "values": [0.75] * 5},
        method={"name": "trp", "mean": 0.875, "values": [0.875] * 5},
        difference=0.125,
        interval=(0.1, 0.15),
        p_value=0.0625,
        effect_size=None,
        arms=arms,
        task="digits",
        budget={"epochs": 12.0},
        tried="",
        seconds=42.0,
        command="coloss verify trp",
        versions={"torch": "2"},
        machine={"cores": "2"},
        created="2026-01-02T03:04:05+00:00",
    )
    write_evidence(folder, evidence)
    monkeypatch.setattr("coloss.lab.evidence.evidence_folder", lambda: folder)
    return evidence


def test_torch_is_not_imported():
    commands = [
        ["list"],
        ["list", "--json"],
        ["show", "trp"],
        ["data"],
        ["data", "digits"],
        ["--help"],
        ["--version"],
        [],
    ]
    script = (
        "import sys, json\n"
        "from coloss.cli.app import main\n"
        f"for command in json.loads({json.dumps(json.dumps(commands))}):\n"
        "    try:\n"
        "        main(command)\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == (0 if command else 2), (command, ended.code)\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)


def test_a_reader_that_stops_early_is_no_error():
    script = "from coloss.cli.app import main; main(['data'])"
    shell = f'{sys.executable} -c "{script}" | head -n 1; echo ${{PIPESTATUS[0]}}'
    found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert (
        found.stdout.startswith("name")
        and "Traceback" not in found.stderr
        and "Exception" not in found.stderr
    )


def test_the_list_as_json(coloss, measured):
    code, out, err = coloss("list", "--json")
    systems = {system["slug"]: system for system in json.loads(out)}
    assert code == 0 and err == "" and list(systems) == SYSTEMS
    for system in systems.values():
        assert {"title", "paper", "family", "acts_on", "api", "kinds", "evidence"} <= system.keys()
        assert system["family"] in FAMILIES and system["acts_on"] and system["api"] and system["summary"]
    found = systems["trp"]["evidence"]
    assert found["verdict"] == "reproduced" and found["interval"] == [0.1, 0.15] and found["seconds"] == 42.0
    assert {"seeds", "metric", "baseline", "method", "difference", "p_value"} <= found.keys()
    assert systems["dhkd"]["evidence"] is None


def test_the_list_for_a_person(coloss, measured):
    out = coloss("list").out
    assert all(slug in out for slug in SYSTEMS)
    assert "reproduced accuracy +0.125 (+0.1 to +0.15)" in out and "not measured" in out
    out = coloss("list", "--family", "compression").out
    assert "trp" in out and "dhkd" not in out
    empty = next(family for family in FAMILIES if family not in {entry.family for entry in catalog()})
    assert coloss("list", "--family", empty).out.strip() == f"no system in {empty} yet"
    assert json.loads(coloss("list", "--family", empty, "--json").out) == []


def test_a_card_tells_all_of_a_system(coloss, measured):
    out = coloss("show", "trp").out
    for part in (
        "TRP: Trained Rank Pruning",
        "arXiv 2004.14566",
        "    objective     min  L(W) + lambda * sum_l ||M_l||_*",
        "from coloss.compression import TrainedRankPruning",
        ">>> method = TrainedRankPruning(energy=0.5, every=5)",
        "coloss compare digits --methods cross-entropy,trp",
        "coloss verify trp",
        "reproduced: It [keeps] more.",
        "difference +0.125, 95% interval +0.1 to +0.15, p = 0.0625, 5 seeds, 42 s, 2026-01-02",
    ):
        assert part in out
    assert "none yet: coloss verify dhkd" in coloss("show", "dhkd").out
    assert "  size=small\n" in coloss("show", "lamp").out and "--set" not in out
    found = json.loads(coloss("show", "trp", "--json").out)
    assert found["slug"] == "trp" and "min  L(W)" in found["docstring"] and ">>>" in found["example"]


def test_a_loss_is_drawn(coloss):
    out = coloss("show", "comp-sum-losses").out
    assert "Slope of the loss" in out and "tau = 1.7" in out and "how far the right class is ahead" in out
    assert "Slope of the loss" not in coloss("show", "trp").out


@pytest.mark.parametrize("slug", SYSTEMS)
def test_what_the_catalog_says_of_a_system_is_true(slug):
    entry = next(entry for entry in catalog() if entry.slug == slug)
    for path in filter(None, (*entry.api, entry.method, entry.recipe)):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    room = importlib.import_module(entry.module)
    assert room.SYSTEM.slug == slug and hasattr(room, "CLAIM") == entry.has_claim
    assert hasattr(room, "PROFILE") == entry.has_profile


@pytest.mark.parametrize("slug", SYSTEMS)
def test_the_example_of_a_card_runs_when_pasted(slug):
    entry = next(entry for entry in catalog() if entry.slug == slug)
    example = doctest.DocTestParser().get_doctest(entry.example, {}, slug, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    assert example.examples and runner.run(example).failed == 0


def test_slugs_are_unique():
    assert len(set(SYSTEMS)) == len(SYSTEMS)


def test_data_sets(coloss, monkeypatch, tmp_path):
    monkeypatch.setenv("COLOSS_DATA", str(tmp_path / "nowhere"))
    out = coloss("data").out
    assert (
        all(name in out for name in DATASETS)
        and "embedded" in out
        and "missing" in out
        and "COLOSS_DATA" in out
    )
    rows = {row["name"]: row for row in json.loads(coloss("data", "--json").out)}
    assert rows.keys() == DATASETS.keys()
    assert rows["digits"]["found"] == "embedded" and rows["digits"]["tasks"] == ["digits", "digits-ssl"]
    assert rows["mnist"]["found"] == "missing" and "image_mnist_10k.npz" in rows["mnist"]["how to get it"]
    one = coloss("data", "cranfield").out
    assert "retrieval" in one and "licence" in one and "how to get it" in one
    assert json.loads(coloss("data", "iris", "--json").out)["classes"] == 3


def test_help_names_every_command(coloss):
    out = coloss("--help").out
    assert all(
        name in out for name in ("list", "show", "data", "compare", "verify", "run", "report", "bench")
    )
    for command in ("compare", "verify", "run", "report", "list"):
        assert coloss(command, "-h").code == 0
    assert coloss("--version").out.startswith("coloss ")
