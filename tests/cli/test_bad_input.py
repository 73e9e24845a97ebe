"""Whatever a person gets wrong: one line on stderr that says what, where and how to mend it, and exit code 2."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coloss.cli.app import main
from coloss.data import data_directory

FAST = ("--seeds", "1", "--budget", "2steps")
ROWS = "".join(f"{number},{number % 7},{'yes' if number % 2 else 'no'}\n" for number in range(30))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files and folders with one thing wrong each."""
    (tmp_path / "good.csv").write_text("a,b,target\n" + ROWS)
    (tmp_path / "holes.csv").write_text("a,b,target\n,3,yes\n" + ROWS)
    (tmp_path / "one-class.csv").write_text("a,b,target\n" + ROWS.replace("no", "yes"))
    (tmp_path / "no-rows.csv").write_text("a,b,target\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "few.csv").write_text("a,b,target\n1,2,yes\n2,3,no\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "odd.txt").write_text("hello")
    (tmp_path / "odd.doc").write_text("hello")
    np.savez(tmp_path / "whole.npz", x=np.zeros((20, 3)), y=np.arange(20) % 2)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    np.savez(tmp_path / "strange.npz", u=np.zeros(3))
    (tmp_path / "no-images" / "a").mkdir(parents=True)
    for label in ("dark", "light"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), 40 * (label == "light")).save(
                tmp_path / "images" / label / f"{number}.png"
            )
    (tmp_path / "images" / "dark" / "0.png").write_bytes(b"no picture")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.yaml").write_text("task: [digits\n")
    (tmp_path / "unknown.yaml").write_text("task: digits\nmethod: trp\nmethods: [trp]\n")
    (tmp_path / "wrong.yaml").write_text("task: digits\nmethods: [trp]\nseeds: five\n")
    (tmp_path / "unitless.yaml").write_text("task: iris\nmethods: [trp]\nbudget: 60\n")
    (tmp_path / "nomethods.yaml").write_text("task: digits\n")
    (tmp_path / "list.yaml").write_text("- digits\n")
    (tmp_path / "mymodels.py").write_text(
        "from torch import nn\n"
        "def small(splits):\n    return nn.Linear(4, 3)\n"
        "def narrow(splits):\n    return nn.Linear(3, 3)\n"
        "def number(splits):\n    return 3\n"
        "def nothing():\n    return nn.Linear(4, 3)\n"
        "three = 3\n"
    )
    (tmp_path / "raising.py").write_text("1 / 0\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["compare", "digit", "--methods", "trp"],
            ["no task named 'digit'", "did you mean 'digits'", "coloss data"],
        ),
        (["compare", "camvid", "--methods", "trp"], ["'camvid'", "segmentation", "coloss data camvid"]),
        (["compare", "digits"], ["methods must name at least one arm", "--methods"]),
        (["compare", "digits", "--methods", ""], ["methods must name"]),
        (["compare", "iris", "--methods", "cross-entropy,,trp"], ["must name methods", "''"]),
        (
            ["compare", "iris", "--methods", "crossentropy"],
            ["'crossentropy'", "did you mean 'cross-entropy'"],
        ),
        (
            ["compare", "iris", "--methods", "tpr"],
            ["no method named 'tpr'", "did you mean 'trp'", "for this task"],
        ),
        (
            ["compare", "iris", "--methods", "trp:enrgy=0.5"],
            ["no parameter 'enrgy'", "did you mean 'energy'"],
        ),
        (["compare", "iris", "--methods", "trp:energy"], ["name=value", "'energy'"]),
        (["compare", "iris", "--methods", "trp:energy=high"], ["energy of trp must be float", "'high'"]),
        (["compare", "iris", "--methods", "trp:every=2.5"], ["every of trp must be int", "2.5"]),
        (["compare", "iris", "--methods", "trp:scheme=diagonal"], ["scheme of trp", "spatial", "'diagonal'"]),
        (["compare", "iris", "--methods", "trp:energy=3", *FAST], ["energy must be in (0, 1], got 3"]),
        (["compare", "iris", "--methods", "trp:energy=1:energy=0.5"], ["once", "energy"]),
        (["compare", "iris", "--methods", "cross-entropy:weight=2"], ["cross-entropy takes no parameters"]),
        (["compare", "diabetes", "--methods", "dhkd"], ["dhkd is made for classification", "regression"]),
        (["compare", "iris", "--methods", "trp,trp"], ["arms must have names that differ", "trp, trp"]),
        (
            ["compare", "iris", "--methods", "trp", "--baseline", "tpr"],
            ["baseline must be one of the arms", "'trp'"],
        ),
        (
            ["compare", "iris", "--methods", "trp", "--metric", "acuracy", *FAST],
            ["'acuracy'", "'accuracy'", "nll"],
        ),
        (
            ["compare", "iris", "--methods", "trp", "--direction", "up"],
            ["direction must be higher or lower", "'up'"],
        ),
        (["compare", "iris", "--methods", "trp", "--reach", "nan"], ["reach must be a finite number"]),
        (
            ["compare", "iris", "--methods", "trp", "--logger", "tensorbord"],
            ["'tensorbord'", "'tensorboard'"],
        ),
        (["compare", "iris", "--methods", "trp", "--budget", "60"], ["budget must look like 60s", "'60'"]),
        (["compare", "iris", "--methods", "trp", "--budget", "-3s"], ["budget seconds must be > 0"]),
        (["compare", "iris", "--methods", "trp", "--seeds", "0"], ["seeds must be at least 1, got 0"]),
        (
            ["compare", "iris", "--methods", "trp", "--seeds", "five"],
            ["--seeds", "valid integer", "coloss compare --help"],
        ),
        (["compare", "iris", "--methods", "trp", "--workers", "0"], ["workers must be >= 1, got 0"]),
        (["compare", "iris", "--methods", "trp", "--limit", "0"], ["limit must be >= 1, got 0"]),
        (
            ["compare", "iris", "--methods", "trp", "--target", "species"],
            ["'iris' has one target", "'species'"],
        ),
        (["compare", "iris", "--methods", "trp", "--kind", "regresion"], ["kind", "'regresion'"]),
        (
            ["compare", "iris", "--methods", "trp", "--label-noise", "1.5"],
            ["label noise must be in [0, 1], got 1.5"],
        ),
        (
            ["compare", "iris", "--methods", "trp", "--label-noise", "40%"],
            ["--label-noise", "valid float|valid number"],
        ),
        (["compare", "iris", "--methods", "trp", "--imbalance", "0"], ["imbalance must be in (0, 1], got 0"]),
        (
            ["compare", "iris", "--methods", "trp", "--label-noise", "0.1", "--noise-kind", "pairs"],
            ["noise_kind must be symmetric or pairwise, got 'pairs'"],
        ),
        (
            ["compare", "iris", "--methods", "trp", "--imbalance-kind", "step"],
            ["imbalance_kind goes with imbalance, which is not given"],
        ),
        (
            ["compare", "diabetes", "--methods", "trp", "--label-noise", "0.1"],
            ["for classification, diabetes is a regression set"],
        ),
        (
            ["compare", "digits-ssl", "--methods", "lejepa", "--imbalance", "0.1"],
            ["for classification tasks, digits-ssl is a self-supervised one"],
        ),
        (["compare", "digits-halves", "--methods", "info-nce", "--target", "x"], ["digits-halves", "target"]),
        (
            ["compare", "ag-news", "--methods", "trp", "--text-features", "tf", "--limit", "20"],
            ["text_features", "'tf'"],
        ),
        (
            ["compare", "iris", "--metods", "trp"],
            ["No such option: --metods|No such option '--metods'", "--methods"],
        ),
        (["compare"], ["Missing argument 'task'|Missing argument 'TASK'"]),
        (["compair", "iris"], ["No such command 'compair'", "compare"]),
        (["compare", "missing.csv", "--methods", "trp"], ["no file or folder 'missing.csv'"]),
        (["compare", "./digits", "--methods", "trp"], ["no file or folder './digits'"]),
        (
            ["compare", "good.csv", "--methods", "trp", "--target", "tarjet"],
            ["no column 'tarjet'", "'target'"],
        ),
        (["compare", "holes.csv", "--methods", "trp"], ["'a'", "1 missing", "row 1", "fill"]),
        (["compare", "one-class.csv", "--methods", "trp"], ["'target'", "one value only (yes)"]),
        (["compare", "no-rows.csv", "--methods", "trp"], ["no-rows.csv has 0 rows", "at least 10"]),
        (["compare", "empty.csv", "--methods", "trp"], ["empty.csv is empty", "column names"]),
        (["compare", "few.csv", "--methods", "trp"], ["few.csv has 2 rows"]),
        (
            ["compare", "good.csv", "--methods", "trp", "--kind", "regression"],
            ["must hold numbers for a regression"],
        ),
        (["compare", "odd.doc", "--methods", "trp"], ["odd.doc must be a folder of images, or end in"]),
        (["compare", "cut.parquet", "--methods", "trp"], ["cut.parquet cannot be read as parquet"]),
        (["compare", "cut.npz", "--methods", "trp"], ["cut.npz cannot be read as npz"]),
        (["compare", "strange.npz", "--methods", "trp"], ["strange.npz must hold x and y", "it holds u"]),
        (
            ["compare", "no-images", "--methods", "trp"],
            ["no-images must hold one folder of images for each class"],
        ),
        (
            ["compare", "images", "--methods", "trp"],
            ["0.png cannot be read as an image", "replace or delete"],
        ),
        (["compare", "hf:", "--methods", "trp"], ["hf:NAME"]),
        (["compare", "missing.yaml"], ["no experiment file missing.yaml"]),
        (["compare", "broken.yaml"], ["broken.yaml is not valid YAML", "line 2"]),
        (["compare", "unknown.yaml"], ["unknown entry 'method'", "did you mean 'methods'"]),
        (["compare", "wrong.yaml"], ["wrong.yaml: seeds", "'five'"]),
        (["compare", "unitless.yaml"], ["budget must look like 60s", "'60'"]),
        (["compare", "nomethods.yaml"], ["nomethods.yaml: methods: Field required"]),
        (["compare", "list.yaml"], ["must hold entries like 'task: digits'", "list"]),
        (["compare", "iris", "--methods", "trp", "--model", "mymodel:small"], ["cannot import 'mymodel'"]),
        (["compare", "iris", "--methods", "trp", "--model", "mymodels:smal"], ["no 'smal'", "'small'"]),
        (["compare", "iris", "--methods", "trp", "--model", "mymodels:three"], ["must be callable, got int"]),
        (
            ["compare", "iris", "--methods", "trp", "--model", "raising:build"],
            ["importing 'raising:build' failed", "ZeroDivisionError"],
        ),
        (
            ["compare", "iris", "--methods", "trp", "--model", "mymodels:number", *FAST],
            ["torch.nn.Module, got int"],
        ),
        (
            ["compare", "iris", "--methods", "trp", "--model", "mymodels:nothing", *FAST],
            ["callable with the splits"],
        ),
        (
            ["compare", "iris", "--methods", "cross-entropy", "--model", "mymodels:narrow", *FAST],
            ["model 'mymodels:narrow' does not work on classification on iris", "shapes"],
        ),
        (
            ["compare", "iris", "--methods", "trp", "--out", "odd.txt/below", *FAST],
            ["cannot write odd.txt/below", "writable"],
        ),
        (["list", "--family", "distilation"], ["no family named 'distilation'", "'distillation'"]),
        (["show", "dhdk"], ["no system named 'dhdk'", "did you mean 'dhkd'", "coloss list"]),
        (["data", "mnits"], ["no data set is called 'mnits'", "'mnist'"]),
        (["verify", "dhdk"], ["no system named 'dhdk'", "did you mean 'dhkd'"]),
        (["verify", "trp", "--seeds", "3"], ["seeds must be >= 5 for evidence, got 3", "--smoke"]),
        (["verify", "trp", "--evidence", "odd.txt/below"], ["cannot write odd.txt/below", "--evidence"]),
        (["run", "dhdk"], ["no system named 'dhdk'"]),
        (["run", "trp"], ["trp is no complete system", "lejepa", "coloss show trp"]),
        (["run", "lejepa", "--budget", "soon"], ["budget must look like 60s", "'soon'"]),
        (["report", "nothing"], ["comparison.json", "is this the folder of a comparison?"]),
        (["report", "missing"], ["comparison.json", "is this the folder of a comparison?"]),
    ],
    ids=lambda value: " ".join(value)[:70] if "compare" in value[:1] else None,
)
def test_one_line_says_what_is_wrong(coloss, folder, arguments, parts):
    code, out, err = coloss(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("coloss: ") and err.count("\n") == 1, err
    for part in parts:  # A|B where releases of typer differ
        assert any(words in err for words in part.split("|")), (part, err)
    assert "Traceback" not in err and not (folder / "runs").exists()


def test_a_missing_package_is_named(coloss, folder, monkeypatch):
    for module, arguments, extra in (
        ("datasets", ["compare", "hf:org/name", "--methods", "trp"], "coloss[hf]"),
        (
            "tensorboard",
            ["compare", "iris", "--methods", "trp", "--logger", "tensorboard"],
            "coloss[lightning,loggers]",
        ),
        (
            "mlflow",
            ["compare", "iris", "--methods", "trp", "--logger", "mlflow"],
            "coloss[lightning,loggers]",
        ),
        ("ray", ["compare", "iris", "--methods", "trp", "--ray", "local", *FAST], "coloss[ray]"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        code, _, err = coloss(*arguments)
        assert code == 2 and f"pip install '{extra}'" in err and err.count("\n") == 1


def test_a_data_file_that_is_absent_is_named_with_its_source(coloss, monkeypatch, tmp_path):
    monkeypatch.setenv("COLOSS_DATA", str(tmp_path))
    code, _, err = coloss("compare", "mnist", "--methods", "cross-entropy")
    assert code == 2 and "image_mnist_10k.npz" in err and str(tmp_path) in err and "COLOSS_DATA" in err
    assert data_directory() == tmp_path


def test_no_folder_is_touched_that_holds_something_else(coloss, folder):
    assert coloss("compare", "iris", "--methods", "cross-entropy", "--out", "a", *FAST).code == 0
    before = (folder / "a" / "comparison.json").read_bytes()
    code, _, err = coloss(
        "compare", "iris", "--methods", "cross-entropy", "--out", "a", "--seeds", "1", "--budget", "3steps"
    )
    assert code == 2 and "a holds another comparison" in err and "'steps': 2" in err and "--out" in err
    assert (folder / "a" / "comparison.json").read_bytes() == before
    code, _, err = coloss("compare", "wine", "--methods", "cross-entropy,trp", "--out", "a", *FAST)
    assert code == 2 and "task iris, now wine" in err and "arms cross-entropy, now cross-entropy, trp" in err


def test_wrong_labels_make_another_comparison(coloss, folder):
    arguments = ("compare", "iris", "--methods", "cross-entropy", "--out", "a", *FAST)
    assert coloss(*arguments, "--label-noise", "0.4").code == 0
    for other in ((), ("--label-noise", "0.2"), ("--label-noise", "0.4", "--imbalance", "0.1")):
        code, _, err = coloss(*arguments, *other)
        assert code == 2 and "a holds another comparison" in err and "'label_noise': 0.4" in err


def test_data_that_changed_are_another_comparison(coloss, folder):
    assert coloss("compare", "good.csv", "--methods", "cross-entropy", "--out", "a", *FAST).code == 0
    (folder / "good.csv").write_text("a,b,target\n3,3,no\n" + ROWS)
    code, _, err = coloss("compare", "good.csv", "--methods", "cross-entropy", "--out", "a", *FAST)
    assert code == 2 and "the data have changed" in err


FINISHED = ("compare", "iris", "--methods", "cross-entropy,trp", *FAST, "--out")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a comparison that went well."""
    folder = tmp_path_factory.mktemp("finished") / "a"
    with pytest.raises(SystemExit) as ended:
        main([*FINISHED, str(folder)])
    assert ended.value.code == 0
    return folder


@pytest.mark.parametrize("name", ["comparison.json", "trials/cross-entropy--seed0.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"arm": 1}', "\xff\xfe", ""])
def test_a_damaged_result_is_named_and_nothing_else_lost(coloss, folder, finished, name, content):
    shutil.copytree(finished, folder / "a")
    kept = (folder / "a" / "trials" / "trp--seed0.json").read_bytes()
    (folder / "a" / name).write_bytes(content.encode("latin-1"))
    for command in ([*FINISHED, "a"], ["report", "a"]):
        code, _, err = coloss(*command)
        assert code == 2 and err.count("\n") == 1 and f"a/{name} is damaged" in err and "delete it" in err
    assert (folder / "a" / "trials" / "trp--seed0.json").read_bytes() == kept


def test_damaged_evidence_is_named_with_the_command_that_mends_it(coloss, folder, monkeypatch):
    monkeypatch.setattr("coloss.lab.evidence.evidence_folder", lambda: folder)
    for content in (b"{", b'{"verdict": "reproduced"}', b"[]", b"\xff", b'{"interval": null}'):
        (folder / "trp.json").write_bytes(content)
        for command in (["show", "trp"], ["list"], ["list", "--json"]):
            code, out, err = coloss(*command)
            assert code == 2 and out == "" and err.count("\n") == 1
            assert "trp.json is damaged" in err and "coloss verify trp" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(coloss, folder):
    (folder / "nothing").chmod(0o500)
    code, _, err = coloss("compare", "iris", "--methods", "trp", "--out", "nothing/a", *FAST)
    assert code == 2 and "nothing/a" in err and "Permission denied" in err
