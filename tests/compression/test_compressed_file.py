import base64
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from coloss.compression.compressed_file import compress_model, load_compressed
from coloss.compression.stored_weights import LowRankWeight
from coloss.errors import InputError
from coloss.ops import nm_mask

# A 2:4 sparse, a one-bit and a plain weight, written by the first version of the format.
FIRST_VERSION = (
    "QAMAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJzaGEyNTYiOiJlNGEzNDc1MjFjMjliNDBmZjVlNWUwMDc4YTBiYmNlZjNiYjc5MWVk"
    "Zjg2YTA2NzlhMGM5Mzc4NDgzODQ1YTdiIiwiY29sb3NzX2NvbXByZXNzZWQiOiJ7XCJ2ZXJzaW9uXCI6IDEsIFwid2VpZ2h0c1wi"
    "OiB7XCJzcGFyc2VcIjoge1wia2luZFwiOiBcIm46bVwiLCBcInNoYXBlXCI6IFsxLCA4XSwgXCJuXCI6IDIsIFwibVwiOiA0LCBc"
    "ImRpbVwiOiAtMSwgXCJ2YWx1ZXNcIjoge1wia2luZFwiOiBcImRlbnNlXCIsIFwiZHR5cGVcIjogXCJmbG9hdDMyXCJ9fSwgXCJz"
    "aWduc1wiOiB7XCJraW5kXCI6IFwiY29kZWJvb2tcIiwgXCJzaGFwZVwiOiBbMSwgOF0sIFwiYm91bmRzXCI6IFswLCAxXSwgXCJk"
    "dHlwZVwiOiBcImZsb2F0MzJcIn0sIFwicGxhaW5cIjoge1wia2luZFwiOiBcImRlbnNlXCIsIFwiZHR5cGVcIjogXCJmbG9hdDMy"
    "XCJ9fSwgXCJ0aWVkXCI6IHt9LCBcInZhbHVlc1wiOiB7fSwgXCJub3Rlc1wiOiB7fX0ifSwicGxhaW58dmFsdWVzIjp7ImR0eXBl"
    "IjoiRjMyIiwic2hhcGUiOlsxXSwiZGF0YV9vZmZzZXRzIjpbMCw0XX0sInNpZ25zfHRhYmxlIjp7ImR0eXBlIjoiRjE2Iiwic2hh"
    "cGUiOlsxLDJdLCJkYXRhX29mZnNldHMiOls0LDhdfSwic3BhcnNlfHZhbHVlcy52YWx1ZXMiOnsiZHR5cGUiOiJGMTYiLCJzaGFw"
    "ZSI6WzRdLCJkYXRhX29mZnNldHMiOls4LDE2XX0sInNpZ25zfGNvZGVzIjp7ImR0eXBlIjoiVTgiLCJzaGFwZSI6WzFdLCJkYXRh"
    "X29mZnNldHMiOlsxNiwxN119LCJzcGFyc2V8cGF0dGVybnMiOnsiZHR5cGUiOiJVOCIsInNoYXBlIjpbMV0sImRhdGFfb2Zmc2V0"
    "cyI6WzE3LDE4XX19ICAgq6qqPgC4ADgAPgDAADQAQjkT"
)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False))
    network[0].weight.data.mul_(nm_mask(network[0].weight))
    network[2].weight.data.sign_()
    return network


def test_a_file_is_read_into_the_original_class(tmp_path: Path) -> None:
    network = _network().eval()
    path = compress_model(network, notes={"accuracy": 0.9}).save(tmp_path / "deep" / "model.coloss")
    read = load_compressed(path)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False)).eval()
    inputs = torch.randn(5, 16)
    assert torch.equal(read.load_into(other)(inputs), network(inputs))
    assert read.notes == {"accuracy": 0.9}
    kinds = {name: stored.kind for name, stored in read.weights.items()}
    assert (kinds["0.weight"], kinds["2.weight"]) == ("n:m", "codebook")


def test_the_file_is_as_large_as_its_tensors_and_header(tmp_path: Path) -> None:
    model = nn.Linear(1024, 256, bias=False)
    model.weight.data.sign_()
    compressed = compress_model(model)
    size = compressed.save(tmp_path / "model.coloss").stat().st_size
    assert compressed.nbytes == 1024 * 256 // 8 + 2 * 2
    assert compressed.nbytes < size < compressed.nbytes + 1024


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    compressed = load_compressed(compress_model(model).save(tmp_path / "tied.coloss"))
    state = compressed.state_dict()
    assert list(compressed.weights) == ["embed.weight"]
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_a_form_is_taken_under_any_name_of_a_tied_weight() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(32, 2), torch.randn(2, 16)
    weight = left @ right
    tied = {"x": weight, "y": weight}
    factors = LowRankWeight(left, right, "channel", (32, 16))
    compressed = compress_model(tied, {"y": factors})
    assert dict(compressed.weights) == {"x": factors} and compressed.tied == {"y": "x"}
    with pytest.raises(InputError, match="given weight y must restore to the model's weight"):
        compress_model(tied, {"y": LowRankWeight(left + 1, right, "channel", (32, 16))})


def test_a_table_for_each_row_takes_the_bytes_that_it_says(tmp_path: Path) -> None:
    weight = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    compressed = compress_model({"weight": weight.sign() * weight.abs().mean(1, keepdim=True)})
    assert compressed.weights["weight"].kind == "codebook"
    size = compressed.save(tmp_path / "model.coloss").stat().st_size
    assert compressed.nbytes < size < compressed.nbytes + 1024
    read = load_compressed(tmp_path / "model.coloss").state_dict()
    assert torch.equal(read["weight"], compressed.state_dict()["weight"])


def test_a_file_of_the_first_version_keeps_loading(tmp_path: Path) -> None:
    path = tmp_path / "old.coloss"
    path.write_bytes(base64.b64decode(FIRST_VERSION))
    state = load_compressed(path).state_dict()
    assert state["sparse"].tolist() == [[0.0, 1.5, -2.0, 0.0, 0.25, 0.0, 0.0, 3.0]]
    assert state["signs"].tolist() == [[0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -0.5, -0.5]]
    assert torch.equal(state["plain"], torch.tensor([1 / 3]))


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    path = compress_model(_network()).save(tmp_path / "model.coloss")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="cannot read the compressed model .*model.coloss"):
        load_compressed(path)


def test_a_changed_byte_is_noticed_in_the_tensors_and_in_the_header(tmp_path: Path) -> None:
    path = compress_model(_network(), notes={"score": 1}).save(tmp_path / "model.coloss")
    content = path.read_bytes()
    for place in (len(content) - 3, content.index(b"score")):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"was altered since it was written|cannot read"):
            load_compressed(path)


def test_files_of_others_and_of_newer_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from coloss.compression import compressed_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is a safetensors file, but no compressed model of coloss"):
        load_compressed(tmp_path / "other.safetensors")
    monkeypatch.setattr(compressed_file, "VERSION", 99)
    path = compress_model(nn.Linear(2, 2)).save(tmp_path / "new.coloss")
    monkeypatch.undo()
    with pytest.raises(
        InputError, match="has format version 99, this coloss reads up to 2: install a newer one"
    ):
        load_compressed(path)
    with pytest.raises(InputError, match="cannot read the compressed model .*missing"):
        load_compressed(tmp_path / "missing")


def test_the_header_is_plain_json(tmp_path: Path) -> None:
    content = compress_model(_network()).save(tmp_path / "model.coloss").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["coloss_compressed"])["weights"]["0.weight"]["kind"] == "n:m"


def test_weights_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="weights do not fit this model: .*size mismatch"):
        compress_model(nn.Linear(2, 2)).load_into(nn.Linear(3, 2))
    with pytest.raises(InputError, match="^notes must be plain JSON"):
        compress_model(nn.Linear(2, 2), notes={"loss": float("nan")}).save("unwritten")
    with pytest.raises(InputError, match="^values of the state dict must be plain JSON"):
        compress_model({"weight": torch.ones(2), "state": float("nan")}).save("unwritten")


def test_factors_are_taken_if_they_are_the_weight() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(32, 2), torch.randn(2, 16)
    model = nn.Linear(16, 32, bias=False)
    model.weight.data.copy_(left @ right)
    given = {"weight": LowRankWeight(left, right, "channel", (32, 16))}
    assert compress_model(model, given).nbytes == 4 * (64 + 32)
    model.weight.data[0, 0] += 1
    with pytest.raises(
        InputError, match="given weight weight must restore to the model's weight, got a difference of 1"
    ):
        compress_model(model, given)
    with pytest.raises(InputError, match="given must name weights of the model, got wight"):
        compress_model(model, {"wight": given["weight"]})
    with pytest.raises(
        InputError, match=r"must restore to torch.float32 \(32, 16\), got torch.float32 \(16, 32\)"
    ):
        compress_model(model, {"weight": LowRankWeight(right.T, left.T, "channel", (16, 32))})
