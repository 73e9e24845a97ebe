"""`coloss compress` and `coloss decompress`, as a person types them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coloss.train import save_model


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(300, 200, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": weights().bfloat16(), "tied": weights().bfloat16(), "ids": torch.arange(9)}, path)
    return path


def test_there_and_back(coloss, checkpoint, tmp_path):
    outcome = coloss("compress", "model.safetensors")
    assert outcome.code == 0, outcome.err
    table = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line.strip()}
    assert table["BF16"][:2] == ["2", "240,000"] and table["I64"][0] == "1"
    assert float(table["BF16"][3].rstrip("%")) < 34 and table["BF16"][4].endswith("%")
    assert "save little" not in outcome.out  # the counters shrink, too
    assert "1 tensor equals another one and is stored once" in outcome.out
    assert "model.safetensors.coloss: " in outcome.out and "MB/s" in outcome.out
    before = checkpoint.read_bytes()
    checkpoint.unlink()
    assert coloss("decompress", "model.safetensors.coloss").code == 0
    assert checkpoint.read_bytes() == before


def test_json(coloss, checkpoint):
    found = json.loads(coloss("compress", checkpoint, "-o", "small", "--json").out)
    assert found["bytes_before"] == checkpoint.stat().st_size
    assert found["ratio"] == pytest.approx(found["bytes_after"] / found["bytes_before"])
    assert found["bound_ratio"] < found["ratio"] and found["types"][0]["type"] == "BF16"
    again = json.loads(coloss("decompress", "small", "--output", "again", "--json").out)
    assert again["bytes_before"] == found["bytes_before"]


def test_nothing_is_overwritten_without_force(coloss, checkpoint):
    assert coloss("compress", checkpoint).code == 0
    outcome = coloss("compress", checkpoint)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "exists: replace it with --force, or name another --output" in outcome.err
    assert coloss("compress", checkpoint, "--force").code == 0
    outcome = coloss("decompress", f"{checkpoint}.coloss")
    assert outcome.code == 2 and "--force" in outcome.err
    assert coloss("decompress", f"{checkpoint}.coloss", "--force").code == 0


def test_float32_saves_little_and_says_so(coloss, tmp_path):
    save_model(nn.Linear(200, 300), tmp_path / "model.safetensors")
    outcome = coloss("compress", "model.safetensors", "--json")
    assert 0.8 < json.loads(outcome.out)["ratio"] < 0.86
    outcome = coloss("compress", "model.safetensors", "--force")
    assert "no bfloat16 in it, and these types save little without loss: F32" in outcome.out
    save_file({"w": weights().bfloat16().float()}, tmp_path / "wide.safetensors")
    wide = coloss("compress", "wide.safetensors").out
    assert "much of its float32 needs fewer bits" in wide and "save little" not in wide
    mixed = {"w": weights().bfloat16(), "f": weights(), "mask": torch.ones(99, 99).bool()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    assert "not all is bfloat16, and these types save little without loss: F32\n" in (
        coloss("compress", "mixed.safetensors").out
    )


def test_a_folder(coloss, tmp_path):
    model = tmp_path / "step.ckpt"  # a folder may be called what no file may
    model.mkdir()
    for number in range(2):
        save_file({f"w{number}": weights(number).bfloat16()}, model / f"{number}.safetensors")
    (model / "config.json").write_text("{}")
    assert coloss("compress", "step.ckpt").code == 0
    assert coloss("decompress", "step.ckpt.coloss", "-o", "again").code == 0
    for name in ("0.safetensors", "1.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()


def test_what_is_wrong_is_one_line(coloss, checkpoint, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"pickle")
    (tmp_path / "cut.coloss").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for arguments, line in (
        (["compress", "nothing"], "there is no file or folder nothing"),
        (["compress", "model.pt"], "model.pt must be a safetensors file or a folder of such"),
        (
            ["decompress", checkpoint, "-o", "x"],
            "is a safetensors file, but no compressed checkpoint of coloss",
        ),
        (["decompress", checkpoint], "does not end in .coloss: say where to write it with --output"),
        (["decompress", "cut.coloss"], "cannot read the safetensors file cut.coloss"),
        (
            ["compress", checkpoint, "-o", checkpoint, "--force"],
            "target must be another path than the source",
        ),
    ):
        outcome = coloss(*arguments)
        assert outcome.code == 2 and outcome.err.startswith("coloss: ") and outcome.err.count("\n") == 1
        assert line in outcome.err, outcome.err
