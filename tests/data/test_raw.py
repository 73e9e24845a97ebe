import gzip
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coloss.data import DATASETS, load_raw, locate
from coloss.data.formats import read_arrays, read_json_lines, read_table, read_text
from coloss.errors import DataNotFoundError, InputError

UCR = {"train_x", "train_y", "test_x", "test_y", "classes"}
MOTION = {"start", "length", "split"}
FIELDS: dict[str, set[str]] = {
    "digits": {"x", "y", "class_names"},
    "breast-cancer": {"x", "y", "feature_names", "class_names"},
    "wine": {"x", "y", "feature_names", "class_names"},
    "iris": {"x", "y", "feature_names", "class_names"},
    "diabetes": {"x", "y", "feature_names"},
    "cifar10": {"x_train", "y_train", "x_test", "y_test", "class_names"},
    "mnist": {"x", "y", "split"},
    "fashion-mnist": {"x", "y", "split", "class_names"},
    "omniglot": {"x", "y", "alphabet", "drawer", "alphabet_names", "char_names"},
    "openmoji": {
        *(
            "image",
            "caption",
            "tags",
            "group",
            "subgroup",
            "hexcode",
            "split",
            "group_names",
            "subgroup_names",
        ),
    },
    "spoken-digits": {
        "audio",
        "start",
        "length",
        "digit",
        "speaker",
        "index",
        "split",
        "speaker_names",
        "rate",
    },
    "asap-piano": {
        *(
            "onset",
            "offset",
            "pitch",
            "velocity",
            "note_start",
            "note_count",
            "beat",
            "downbeat",
            "beat_start",
        ),
        *("beat_count", "pedal_time", "pedal_value", "pedal_start", "pedal_count", "composer", "title"),
        *("performance", "composer_names", "split"),
    },
    "jsb-chorales": {"pitch", "start", "length", "split"},
    "etth1": {"values", "columns", "start", "splits"},
    "etth2": {"values", "columns", "start", "splits"},
    "los-loop": {"speed", "adjacency", "sensor"},
    "ecg5000": {"x", "y", "split", "class_names"},
    **dict.fromkeys(
        ["gun-point", "arrow-head", "osu-leaf", "italy-power-demand", "basic-motions", "japanese-vowels"], UCR
    ),
    "beijing-pm25": {"values", "wind", "columns", "wind_names", "start"},
    "tiny-shakespeare": {"text"},
    "cranfield": {"documents", "queries", "judgements"},
    "amazon-video-games": {"item", "start", "length"},
    **dict.fromkeys(
        ["sonar", "ionosphere", "breast-cancer-wisconsin", "glass", "wine-uci"], {"x", "y", "classes"}
    ),
    **dict.fromkeys(["wine-quality", "abalone"], {"x", "y"}),
    "bccd": {"image", "box", "label", "box_start", "box_count", "split", "class_names"},
    "camvid": {
        "train_image",
        "train_mask",
        "val_image",
        "val_mask",
        "test_image",
        "test_mask",
        "class_names",
    },
    "bandai": {
        *(
            "joints_mm",
            "action",
            "style",
            "part",
            "clip",
            "action_names",
            "style_names",
            "joint_names",
            "parents",
            "fps",
        ),
        *MOTION,
    },
    "msr-action3d": {"joints", "action", "subject", "trial", "action_names", *MOTION},
    "hdm05": {
        "joints",
        "action",
        "actor",
        "action_names",
        "actor_names",
        "joint_names",
        "parents",
        "fps",
        *MOTION,
    },
    "sfinge-hands": {"joints", "gesture", "take", "gesture_names", *MOTION},
}
COLUMNS: dict[str, list[str]] = {
    "clinc150": ["text", "intent", "split"],
    "banking77": ["text", "intent", "split"],
    "sst2": ["text", "label", "split"],
    "ag-news": ["label", "title", "text", "split"],
    "sick": ["sentence_A", "sentence_B", "score", "entailment", "split"],
    "sts": ["sentence_A", "sentence_B", "score", "year", "source"],
    "gsm8k": ["question", "solution", "answer", "split"],
    "reuters": ["id", "title", "body", "topics", "split"],
    "ud-english-ewt": ["words", "upos", "xpos", "heads", "deprels", "split", "genre"],
    "pubmedqa": ["pmid", "question", "context", "long_answer", "answer", "split"],
    "aqua": ["question", "a", "b", "c", "d", "e", "answer", "rationale", "split"],
    "adult": [
        *("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation"),
        *("relationship", "race", "sex", "capital_gain", "capital_loss", "hours_per_week", "native_country"),
        *("income", "split"),
    ],
    "kit-captions": ["motion", "text", "split", "name"],
}


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_set_has_its_documented_fields(name: str, needs) -> None:
    raw = load_raw(needs(name))
    if name in COLUMNS:
        assert set(raw) == {"table"} and list(raw["table"].columns) == COLUMNS[name]
    else:
        assert set(raw) == FIELDS[name]
    assert all(str(getattr(value, "dtype", "")) != "object" for value in raw.values())


def test_members_of_one_file_do_not_mix(needs) -> None:
    needs("wine-uci")
    assert load_raw("wine-uci")["x"].shape == (178, 13)
    assert load_raw("wine-quality")["x"].shape == (6497, 12)
    assert not np.array_equal(load_raw("etth1")["values"], load_raw("etth2")["values"])


def test_cranfield_tables(needs) -> None:
    raw = load_raw(needs("cranfield"))
    assert [len(raw[field]) for field in ("documents", "queries")] == [1400, 225]
    judgements = raw["judgements"]
    assert set(judgements["query"]) <= set(raw["queries"]["id"]) and (judgements["grade"] == 1).sum() == 1612


def test_text_is_the_whole_text(needs) -> None:
    text = load_raw(needs("tiny-shakespeare"))["text"]
    assert len(text) == 1_115_394 and len(set(text)) == 65


@pytest.mark.parametrize("name", ["ecg5000", "aqua", "cranfield", "tiny-shakespeare"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named_in_one_line(
    name: str, kept: float, needs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = locate(needs(name)).read_bytes()
    broken = tmp_path / str(DATASETS[name].file)
    broken.write_bytes(content[: int(len(content) * kept)])
    monkeypatch.setenv("COLOSS_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="broken or cut off .*get it anew") as caught:
        load_raw(name)
    assert str(broken) in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_byte_in_an_array_file_is_noticed(
    needs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = locate(needs("jsb-chorales"))
    content = bytearray(source.read_bytes())
    content[len(content) // 3] ^= 255
    (tmp_path / source.name).write_bytes(content)
    monkeypatch.setenv("COLOSS_DATA", str(tmp_path))
    with pytest.raises(InputError, match="cannot be read as npz"):
        load_raw("jsb-chorales")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, x=np.array([{}, []], dtype=object))
    with pytest.raises(InputError, match="holds Python objects, which are not read"):
        read_arrays(path)


def test_one_array_without_a_name_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    shutil.move(tmp_path / "x.npy", tmp_path / "x.npz")
    with pytest.raises(InputError, match="cannot be read as npz"):
        read_arrays(tmp_path / "x.npz")


def test_tables_of_each_format_are_equal(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "y z"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_csv(tmp_path / "t.csv.gz", index=False)
    table.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "t.parquet")
    for file in ("t.csv", "t.csv.gz", "t.tsv", "t.parquet"):
        pd.testing.assert_frame_equal(read_table(tmp_path / file), table)


def test_a_column_of_a_large_table_is_of_one_type(tmp_path: Path) -> None:
    """Read in parts, the 7 before and the 7 after the first word would be a number and a text."""
    head, *rows = ("item", *["7"] * 40_000, "word")
    lines = [",".join([head, *(f"c{i}" for i in range(39))]), *(row + 39 * "," for row in rows)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    assert read_table(tmp_path / "t.csv")["item"].unique().tolist() == ["7", "word"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2\n3,4,5,6\n", "broken or cut off"),
        (b"a,b\n\xff\xfe\xfa,1\n", "broken or cut off"),
        (b"a;b\n1;2\n", "separates its columns by semicolons"),
    ],
)
def test_bad_csv(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "t.csv")


def test_bad_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="cannot be read as text"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n{"id"'))
    with pytest.raises(InputError, match="cannot be read as JSON lines"):
        read_json_lines(tmp_path / "a.jsonl.gz")
    with pytest.raises(DataNotFoundError, match="there is no file"):
        read_text(tmp_path / "none.txt")
