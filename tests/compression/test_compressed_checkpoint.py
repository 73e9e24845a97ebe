import base64
import json
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from coloss.compression import (
    CompressedCheckpoint,
    compress_checkpoint,
    decompress_checkpoint,
    load_compressed,
)
from coloss.compression import compressed_checkpoint as checkpoint_module
from coloss.compression.tensor_forms import Float32Weight, restored_bytes, store_bytes
from coloss.errors import InputError
from coloss.train import load_model, save_model

# A coded bfloat16 and a coded float32 tensor and a plain one, written by the first version of the format; deflated here.
FIRST_VERSION = (
    "eNrt3HtMU1ccB/BLh5gYwenMQBGRCvjCcfugLaDgEN0QBel0SJSU2/ZWEEYZLSJTBMxiRRBFTfGBQ1GegiI6RAcThpP5WlFcQRii"
    "Mk0UFXEK0YnuVEm2ZMq/RPc995d+en7nd369Ocn5t5Vm1KuxmiuTfcVqGSWjZWQyrsdqrkIdpdZoZIpwVhEZo46I1nI9uDyuC1cZ"
    "EcsqtOrYBDL/57sLVxPO8N1EJCmnJUKlSMQTKUUqlVDJE/HcxayIFskVtJAvEPDdJCwtFgvEDF8pkAjkjEoo4tOMRC7i8/k8oYDm"
    "Jrpw4yOUbDSrNL2HUpsQw5K2iyWvf8Q0Wcpzl0gkoeRlTK+rVqk0rFZD0rTL6wVTBzZiebh2gAZuEuF/G7za7iJwF4r5piYxUUxE"
    "9Ft7vOEFXu007ZfQpv3/Oqu39BDTgjd2kdAuQponEYQmJk4YaOytSaZmTQgDAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAADAIGI8khHXuaTeI65EYedBJnZkkkEm9WSiIBOyXEKWjWS5E7Wo/T/WUhSVjLNBLWoHriX3xAbng1rUDlxL7kkMzge1"
    "qB24ltyTBqp/nOt/BnVwOGbUII+a5GTyOQsAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACDSFmdlSeJeyTK"
    "SNSRsEIOuXc9R5EEo7NbSaKZBENCR8IOOeTe9RxFErjnyL2POdqUwFkg9x7mrpME1T+O9z8cajDH4P//GOVF1ZhY1bJnUWiarefw"
    "vmnMd3Xyp7P1fzXrXqQ6ml/Vx8+OX+6japHqn/euyNa3RllHd1maj7vzx+dGd2PnllOu/BH2olTOs/uqHTnNFldqqPSQKtbsyCH3"
    "3Kk2/g7nF0nzt2vY9d9OdlDJNvoZ9fqail9G0sPP9Tguu1VeXv1A19E95+NDVQ+7K+29wg+E5lvPvK87HLszsLEypS+m7YFOXTB1"
    "/xXbwk/aDZeDcrLbRuwyjl+tHKqveDYzvKQxoPRi+YXIc1E8c50uYFJBfcGt6a31gclJC5rOVqRmd+959PxCQffmF9dGtfQWevgV"
    "5NY9OXnJ4FE050zCyZJ5VS9OrvU+fufR5RE5gR1jx7T8eTrtaGfSj9mGxMqXjpEGznCxkyG3dm3pglNNt433Nl4QO1o1HVxvWBNi"
    "bPmhbdNjxmtmRr31+KzGGZrDcWOtL9dZNWR6T25yLUxni1tK141u9GwduaPd4WnC1JzN7fn+e5J+OlaW37XqS33H0fTN5xvXBAf1"
    "rVqSUlc1P8tLX1tsb2sujGouXpBi6xkZ+elHM8RdPgtdpey67CUXz7ptMFc7ju6YaBkf4CpSSFs586ac+Ea9u3nusgkfFu4POjAr"
    "rmHYnNQ8B+djYfIOX7emivJbd/yzKOmGntqFVNcHIacrf+29XdM7pM97V5t/T7C8etIXWu9tL7kNSZnOwcFmu/fJnXbu2MdzCrwW"
    "NtuMvukTu3VdYGZxRLEyzStvhXSYUXoiy9npfKnPpe+3OpYtn/9z2MqR1dN5n1lxUpZOsZm4wq8rrnb7zXHSh8Yb1ULj6aGxmblD"
    "+pgiw9eJZ7umaVo3qdeH5ge1340VW7zUeW9L22vxOGThmhuFdnOfTHK3zy5d7MMJsIzLumtus1MT/ptce4b7+7gnrc49Qya7hY4p"
    "kuy+ssU3aob+uq1fntw3vXfrQctReU5FW5rHZPhyLB5vkiVR069W2PwNktXxHw=="
)


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tensors() -> dict[str, torch.Tensor]:
    """Something of everything."""
    weight = bf16(300, 100)
    odd = bf16(200, 100, seed=1)
    odd.view(-1)[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3e38])
    odd.view(torch.int16).view(-1)[6:8] = torch.tensor([0x7F81, -0x7F]).short()  # NaN with payloads
    return {
        "layer.weight": weight,
        "layer.odd": odd,
        "tied": weight.clone(),
        "layer.bias": bf16(100, seed=2),
        "float": torch.randn(150, 120, generator=torch.Generator().manual_seed(3)),
        "widened": weight.float() * 2,
        "pruned": bf16(160, 128).float() * torch.ones(160, 128).tril().clamp(min=0),
        "half": bf16(50, 50).half(),
        "double": torch.tensor([1 / 3]).double(),
        "mask": torch.ones(64, 64).tril().bool(),
        "ids": torch.arange(2000),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "float8": torch.linspace(-3, 3, 33).to(torch.float8_e4m3fn),
        "complex": torch.tensor([[1.5 - 2j], [0.25j]]),
        "unsigned": torch.arange(5).to(torch.uint16),
        "scalar": torch.tensor(2.5).bfloat16(),
        "empty": torch.zeros(0, 4).bfloat16(),
        'naïve "name" | 名': torch.ones(2),
    }


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    parts = [part.reshape(-1).view(torch.uint8) for part in (first, second)]
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*parts)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with everything, and its compressed file."""
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, {"format": "pt", "note": "ä"})
    return path, compress_checkpoint(path).path


def test_the_restored_file_is_the_original_byte_for_byte(written, tmp_path):
    path, compressed = written
    report = decompress_checkpoint(compressed, tmp_path / "deep" / "again.safetensors")
    assert report.path.read_bytes() == path.read_bytes()
    assert compressed.name == "model.safetensors.coloss"
    path.unlink()
    assert decompress_checkpoint(compressed).path == path
    assert path.exists()


def test_files_of_other_writers_come_back_as_they_were(tmp_path):
    """Odd white space in the header, names out of order, values that are not aligned."""
    weight = bf16(150, 150)
    values = b"\1\2\3" + weight.view(torch.uint8).numpy().tobytes() + struct.pack("<f", 1.5)
    header = (
        '{ "z" : {"shape":[3], "data_offsets":[0,3], "dtype":"U8"},\n "b":{"dtype":"F32","shape":[],'
        f'"data_offsets":[{3 + weight.nbytes},{7 + weight.nbytes}]}}, "a":{{"dtype":"BF16","shape":[150,150],'
        f'"data_offsets":[3,{3 + weight.nbytes}]}}  }}'
    ).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)
    report = compress_checkpoint(path)
    rows = {row.name: row for row in report.tensors}
    assert rows["a"].kind == "dfloat11" and rows["a"].bound < rows["a"].bytes_after < 0.68 * weight.nbytes
    restored = decompress_checkpoint(report.path, tmp_path / "again").path
    assert restored.read_bytes() == path.read_bytes()
    assert CompressedCheckpoint(report.path).tensor("b").item() == 1.5


def test_the_report_counts_files_and_bounds(written):
    path, compressed = written
    report = CompressedCheckpoint(compressed).report()
    assert report.bytes_before == path.stat().st_size and report.bytes_after == compressed.stat().st_size
    rows = {row.name: row for row in report.tensors}
    kinds = {name: row.kind for name, row in rows.items()}
    assert kinds["layer.weight"] == kinds["layer.odd"] == "dfloat11"
    assert kinds["tied"] == "same" and rows["tied"].bytes_after == 0
    assert kinds["float"] == kinds["widened"] == "float32"
    assert kinds["mask"] == kinds["ids"] == "deflated"
    assert kinds["pruned"] in ("sparse", "float32")
    assert sum(row.bytes_before for row in report.tensors) == sum(t.nbytes for t in tensors().values())
    weight = rows["layer.weight"]
    assert weight.bound < weight.bytes_after < 1.015 * weight.bound < 0.68 * weight.bytes_before
    # float32: three bytes of four cannot be coded, so a sixth is saved; none of a bfloat16 number's lower half is stored.
    assert 0.82 < rows["float"].bytes_after / rows["float"].bytes_before < 0.85
    assert rows["widened"].bytes_after < 0.34 * rows["widened"].bytes_before


def test_large_units_come_within_a_percent_of_the_bound_and_below_70_percent(tmp_path):
    save_file({"weight": bf16(512, 512)}, tmp_path / "model.safetensors")
    report = compress_checkpoint(tmp_path / "model.safetensors")
    assert report.ratio <= 0.70
    assert report.bytes_after < 1.01 * report.tensors[0].bound


def test_one_tensor_is_read_and_checked_alone(written):
    path, compressed = written
    opened = CompressedCheckpoint(compressed)
    assert opened.metadata == {"format": "pt", "note": "ä"}
    for name, tensor in tensors().items():
        assert same_bits(opened.tensor(name), tensor), name
    content = bytearray(compressed.read_bytes())
    with safe_open(compressed, "pt") as file:
        place = file.get_tensor("layer.weight").numpy().tobytes()
    content[content.index(place) + 40_000] ^= 4
    compressed.write_bytes(content)
    damaged = CompressedCheckpoint(compressed)
    assert same_bits(damaged.tensor("float"), tensors()["float"])
    for name in ("layer.weight", "tied"):
        with pytest.raises(InputError, match="altered since it was written: layer.weight does not fit"):
            damaged.tensor(name)
    with pytest.raises(InputError, match="has no tensor 'nothing'"):
        damaged.tensor("nothing")


def test_the_compressed_file_is_a_safetensors_file_that_can_be_mapped(written):
    _, compressed = written
    entries = load_file(compressed)
    assert {entry.dtype for entry in entries.values()} == {torch.uint8}
    assert "tied" not in entries
    with compressed.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    offsets = [entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]
    assert not any(offset % 8 for offset in [8 + length, *offsets])


@pytest.mark.parametrize("cut", [0, 5, 300, -1])
def test_a_file_that_was_cut_off_is_refused_in_one_line(written, cut):
    _, compressed = written
    compressed.write_bytes(compressed.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"cannot read the safetensors file .*coloss") as caught:
        decompress_checkpoint(compressed, force=True)
    assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_changed_bit_passes(tmp_path_factory, place, bit):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "altered.safetensors"
    compressed = folder / "altered.coloss"
    if not path.exists():
        save_file({"w": bf16(130, 130), "f": torch.ones(3)}, path, {"a": "b"})
        compress_checkpoint(path, compressed)
        (folder / "kept").write_bytes(compressed.read_bytes())
    content = bytearray((folder / "kept").read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    compressed.write_bytes(content)
    again = folder / "altered.again"
    try:
        opened = CompressedCheckpoint(compressed)
        opened.report()
        for name in ("w", "f"):
            opened.stored(name)
        decompress_checkpoint(compressed, again, force=True)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert again.read_bytes() == path.read_bytes()  # a bit of the header that means nothing


def test_a_file_of_the_first_version_keeps_loading(tmp_path):
    (tmp_path / "old.coloss").write_bytes(zlib.decompress(base64.b64decode(FIRST_VERSION)))
    opened = CompressedCheckpoint(tmp_path / "old.coloss")
    assert torch.equal(
        opened.tensor("weight"), torch.arange(16384).remainder(7).sub(3).bfloat16().view(128, 128).mul(0.5)
    )
    assert opened.tensor("plain").tolist() == [1.5, -2.0]
    assert torch.equal(opened.tensor("widened"), opened.tensor("weight").float() + 0.25)
    assert opened.metadata == {"from": "version 1"}


def test_newer_and_other_files_are_refused(written, tmp_path, monkeypatch):
    path, compressed = written
    with pytest.raises(InputError, match="is a safetensors file, but no compressed checkpoint of coloss"):
        decompress_checkpoint(path, tmp_path / "x")
    with pytest.raises(InputError, match="is compressed already"):
        compress_checkpoint(compressed)
    with pytest.raises(InputError, match="no compressed model of coloss"):
        load_compressed(compressed)
    (tmp_path / "text.safetensors").write_text("hello there, this is no checkpoint")
    with pytest.raises(InputError, match="cannot read the safetensors file"):
        compress_checkpoint(tmp_path / "text.safetensors")
    monkeypatch.setattr(checkpoint_module, "VERSION", 99)
    newer = compress_checkpoint(path, tmp_path / "newer.coloss").path
    monkeypatch.undo()
    with pytest.raises(
        InputError, match="has format version 99, this coloss reads up to 1: install a newer one"
    ):
        CompressedCheckpoint(newer)


def test_nothing_is_overwritten_unless_asked_and_nothing_half_written_stays(written, tmp_path, monkeypatch):
    path, compressed = written
    with pytest.raises(InputError, match="exists: say force to replace it"):
        compress_checkpoint(path)
    with pytest.raises(InputError, match="exists: say force"):
        decompress_checkpoint(compressed)
    with pytest.raises(InputError, match="target must be another path than the source"):
        compress_checkpoint(path, path, force=True)
    with pytest.raises(InputError, match="target must be a file, got the folder"):
        compress_checkpoint(path, tmp_path, force=True)
    with pytest.raises(InputError, match="there is no file or folder .*none"):
        compress_checkpoint(tmp_path / "none")
    with pytest.raises(InputError, match="does not end in .coloss: say where"):
        decompress_checkpoint(path)
    before = compressed.read_bytes()

    def broken(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "store_bytes", broken)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(path, force=True)
    assert compressed.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors",
        "model.safetensors.coloss",
    ]


def test_a_codec_that_is_not_exact_is_never_used(monkeypatch):
    weight = bf16(200, 100)
    wrong = Float32Weight.of(weight.float()).upper
    monkeypatch.setattr("coloss.compression.tensor_forms.encode_bf16", lambda tensor: wrong)
    other = bf16(200, 100, seed=5)
    content = other.reshape(-1).view(torch.uint8)
    stored = store_bytes(content, "BF16", (200, 100))
    assert stored.kind != "dfloat11" and torch.equal(restored_bytes(stored), content)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["BF16", "F16", "F32", "F64", "I32", "BOOL", "F8_E5M2"]),
    st.sampled_from([0, 1, 3, 4097, 16_385, 20_000]),
    st.sampled_from(["random", "few", "zeros", "ones"]),
    st.integers(0, 2**31),
)
def test_any_bytes_of_any_type_come_back(dtype, count, content, seed):
    size = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I32": 4}.get(dtype, 1)
    draw = np.random.default_rng(seed)
    if content == "random":
        values = draw.integers(0, 2 if dtype == "BOOL" else 256, count * size)
    elif content == "few":
        values = draw.choice([0, 1] if dtype == "BOOL" else [0, 0x80, 0x3F, 0xFF], count * size)
    else:
        values = np.full(count * size, content == "ones")
    flat = torch.from_numpy(values.astype(np.uint8))
    stored = store_bytes(flat, dtype, (count,))
    assert torch.equal(restored_bytes(stored), flat)
    assert stored.nbytes <= flat.numel()


def test_signs_of_zeros_survive_pruning():
    weight = bf16(256, 256) * (torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) > 0.9)
    assert (weight.view(torch.int16) == -0x8000).any()
    content = weight.reshape(-1).view(torch.uint8)
    assert torch.equal(restored_bytes(store_bytes(content, "BF16", (256, 256))), content)
    positive = weight + 0.0
    stored = store_bytes(positive.reshape(-1).view(torch.uint8), "BF16", (256, 256))
    assert stored.kind == "sparse" and stored.nbytes < 0.2 * weight.nbytes


def test_models_of_coloss_keep_their_values(tmp_path):
    class Counting(nn.Linear):
        seen = 3

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    model = Counting(200, 100).bfloat16()
    model.seen = 7
    compressed = compress_checkpoint(save_model(model, tmp_path / "model.safetensors")).path
    restored = decompress_checkpoint(compressed, tmp_path / "again.safetensors").path
    other = load_model(Counting(200, 100).bfloat16(), restored)
    assert other.seen == 7 and torch.equal(other.weight, model.weight)


def test_memory_is_that_of_one_tensor(tmp_path, monkeypatch):
    """No tensor is coded before the one before it is gone."""
    import weakref

    save_file({f"w{n}": bf16(200, 100, seed=n) for n in range(6)}, tmp_path / "m.safetensors")
    alive: list[weakref.ref] = []
    most = 0
    real = checkpoint_module.store_bytes

    def watched(content, dtype, shape):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        stored = real(content, dtype, shape)
        alive.append(weakref.ref(stored))
        return stored

    monkeypatch.setattr(checkpoint_module, "store_bytes", watched)
    compress_checkpoint(tmp_path / "m.safetensors")
    assert len(alive) == 6 and most <= 1


def test_two_threads_may_write_beside_one_another(tmp_path):
    save_file({"w": bf16(150, 150)}, tmp_path / "m.safetensors")
    threads = [
        threading.Thread(
            target=compress_checkpoint, args=(tmp_path / "m.safetensors", tmp_path / f"{n}.coloss")
        )
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(tmp_path / f"{n}.coloss").read_bytes() for n in range(3)}) == 1


def test_an_altered_name_in_the_header_is_refused(tmp_path):
    save_file({"weight": bf16(130, 130)}, tmp_path / "m.safetensors")
    compressed = compress_checkpoint(tmp_path / "m.safetensors").path
    content = compressed.read_bytes()
    compressed.write_bytes(content.replace(b'"weight"', b'"seight"', 1))
    with pytest.raises(InputError, match="was altered since it was written: its header does not fit"):
        CompressedCheckpoint(compressed)
