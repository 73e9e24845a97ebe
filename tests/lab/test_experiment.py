"""An experiment file says what the command line would."""

import inspect
from pathlib import Path

import pytest
import yaml

from coloss.errors import InputError
from coloss.lab.experiment import Experiment, read_experiment

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"


def write(tmp_path, text):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return path


def test_every_entry_is_documented_and_the_documented_example_is_valid():
    documented = inspect.getdoc(Experiment).partition("```yaml\n")[2].partition("```")[0]
    content = yaml.safe_load(documented)
    assert list(content) and set(content) == set(Experiment.model_fields)
    assert Experiment.model_validate(content).methods == [
        "cross-entropy",
        "trp:energy=0.8:every=10",
        "dhkd+trp",
    ]


def test_the_example_in_the_project_is_valid():
    found = read_experiment(EXAMPLE, {})
    assert found["task"] == "digits" and found["baseline"] in found["methods"]


def test_every_entry_can_be_typed():
    from coloss.cli.lab_commands import compare

    assert set(Experiment.model_fields) <= set(inspect.signature(compare).parameters)


def test_what_is_typed_wins(tmp_path):
    path = write(tmp_path, "task: digits\nmethods: [trp]\nseeds: 3\nbudget: 60s\n")
    given = {"task": str(path), "seeds": 2, "methods": "dhkd", "out": "there"}
    assert read_experiment(path, given) == {
        "task": "digits",
        "methods": "dhkd",
        "seeds": 2,
        "budget": "60s",
        "out": "there",
    }


def test_a_path_is_relative_to_the_file_and_a_task_is_no_path(tmp_path):
    (tmp_path / "rows.csv").write_text("")
    (tmp_path / "digits").mkdir()
    assert read_experiment(write(tmp_path, "task: rows.csv\nmethods: trp\n"), {})["task"] == str(
        tmp_path / "rows.csv"
    )
    assert read_experiment(write(tmp_path, "task: digits\nmethods: trp\n"), {})["task"] == "digits"
    absolute = tmp_path / "rows.csv"
    assert read_experiment(write(tmp_path, f"task: {absolute}\nmethods: trp\n"), {})["task"] == str(absolute)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [trp]\n", "task: Field required$"),
        ("task: digits\nmethods: []\n", "methods: List should have at least 1 item"),
        ("task: digits\nmethods: [trp]\nseeds: 0\n", "seeds: .* greater than or equal to 1, got 0"),
        ("task: digits\nmethods: [trp]\nseeds: true\n", "seeds: .*, got True"),
        ("task: digits\nmethods: [trp]\nreach: high\n", "reach: .*, got 'high'"),
        ("task: digits\nmethods: [trp]\ndirection: up\n", "direction: .*'higher' or 'lower', got 'up'"),
        ("task: digits\nmethods: [1]\n", r"methods\.0: .*, got 1"),
        ("task: digits\nmethods: [trp]\nlimit: 0\n", "limit: .*, got 0"),
        ("task: digits\nmethods: [trp]\n3: 4\n", r"unknown entry 3 \(there are task, methods"),
        (
            "task: digits\nmethods: [trp]\nlabel_noise: 1.5\n",
            "label_noise: .* less than or equal to 1, got 1.5",
        ),
        ("task: digits\nmethods: [trp]\nimbalance: 0\n", "imbalance: .* greater than 0, got 0"),
        ("task: digits\nmethods: [trp]\nnoise_kind: odd\n", "noise_kind: .*'pairwise', got 'odd'"),
        ("task: digits\nmethods: {a: b}\n", "methods: Input should be a valid list"),
        ("just words\n", "must hold entries like 'task: digits', got str"),
        ("", "must hold entries like 'task: digits', got NoneType"),
        ("task: !!python/object:os.system {}\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_experiment(write(tmp_path, text), {})


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="folder.yaml cannot be read"):
        read_experiment(tmp_path / "folder.yaml", {})
