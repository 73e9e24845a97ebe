import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coloss.compression import compress_checkpoint, decompress_checkpoint
from coloss.errors import InputError


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index, a config, and a second model in a folder inside."""
    place = tmp_path / "model"
    (place / "vae").mkdir(parents=True)
    shards = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    for number, (shard, name) in enumerate(shards.items()):
        save_file({name: bf16(200, 100, seed=number)}, place / shard)
    index = {"metadata": {"total_size": 80000}, "weight_map": {name: shard for shard, name in shards.items()}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "config.json").write_text('{"layers": 2}')
    save_file({"c": torch.ones(5)}, place / "vae" / "part.safetensors")
    return place


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_folder_in_a_folder_out(folder, tmp_path):
    shares: list[float] = []
    report = compress_checkpoint(folder, progress=shares.append)
    assert report.path.name == "model.coloss" and report.ratio < 0.72
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert "model-00001-of-00002.safetensors:a" in {row.name for row in report.tensors}
    assert set(listing(report.path)) == {
        "compressed_checkpoint.json",
        "config.json",
        "model-00001-of-00002.safetensors.coloss",
        "model-00002-of-00002.safetensors.coloss",
        "model.safetensors.index.json",
        "vae/part.safetensors.coloss",
    }
    restored = decompress_checkpoint(report.path, tmp_path / "again").path
    assert listing(restored) == listing(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model", "model.coloss"]


def test_what_is_wrong_with_a_folder_is_named(folder, tmp_path):
    compressed = compress_checkpoint(folder).path
    with pytest.raises(InputError, match="is compressed already"):
        compress_checkpoint(compressed, tmp_path / "twice")
    with pytest.raises(InputError, match="exists: say force"):
        compress_checkpoint(folder)
    compress_checkpoint(folder, force=True)
    with pytest.raises(InputError, match="target must lie outside of the source"):
        compress_checkpoint(folder, folder / "inside")
    (compressed / "config.json").write_text('{"layers": 3}')
    with pytest.raises(InputError, match="config.json was altered since the folder was compressed"):
        decompress_checkpoint(compressed, tmp_path / "again")
    (compressed / "vae" / "part.safetensors.coloss").unlink()
    with pytest.raises(InputError, match="misses vae/part.safetensors.coloss"):
        decompress_checkpoint(compressed, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="names shards that are not there: model-00002-of-00002.safetensors"):
        compress_checkpoint(folder, tmp_path / "again")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="has no .safetensors file in it"):
        compress_checkpoint(tmp_path / "bare")
    with pytest.raises(InputError, match="is no compressed checkpoint: it has no compressed_checkpoint.json"):
        decompress_checkpoint(tmp_path / "bare", tmp_path / "again")


def test_a_shard_of_another_checkpoint_is_noticed(folder, tmp_path):
    compressed = compress_checkpoint(folder).path
    first, second = (compressed / f"model-0000{n}-of-00002.safetensors.coloss" for n in (1, 2))
    first.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match="is not the file that .* names"):
        decompress_checkpoint(compressed, tmp_path / "again")
    listed = json.loads((compressed / "compressed_checkpoint.json").read_text())
    listed["copied"]["../outside"] = "0"
    (compressed / "compressed_checkpoint.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match="names a file outside the folder"):
        decompress_checkpoint(compressed, tmp_path / "again")


def test_linked_folders_and_files_are_copied(folder, tmp_path):
    (folder / "vae").rename(tmp_path / "elsewhere")
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    (folder / "linked.json").symlink_to(folder / "config.json")
    restored = decompress_checkpoint(compress_checkpoint(folder).path, tmp_path / "again").path
    assert (
        listing(restored)["vae/part.safetensors"]
        == (tmp_path / "elsewhere" / "part.safetensors").read_bytes()
    )
    assert listing(restored)["linked.json"] == (folder / "config.json").read_bytes()
    assert not (restored / "vae").is_symlink()


def test_what_could_not_be_copied_is_refused_by_name(folder, tmp_path, monkeypatch):
    refused = {
        "gone": "gone is a link to nothing",
        "vae/up": "vae/up is a link to a folder that it lies in",
        "pipe": "pipe is neither file nor folder",
    }
    for name, words in refused.items():
        place = folder / name
        if name == "pipe":
            os.mkfifo(place)
        else:
            place.symlink_to(tmp_path / "nowhere" if name == "gone" else folder)
        with pytest.raises(InputError, match=words):
            compress_checkpoint(folder)
        place.unlink()
    # Folders and files without the right to read them; the superuser may, so the system's answer is played.
    real_list, real_open, real_read = Path.iterdir, Path.open, Path.read_text

    def denied(real, name):
        def act(path, *given, **named):
            if path.name == name and "w" not in (*given, named.get("mode")) and path.is_relative_to(folder):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *given, **named)

        return act

    for kind, real, name, words in (
        ("iterdir", real_list, "vae", r"cannot read .*model/vae: Permission denied"),
        ("open", real_open, "config.json", r"cannot read .*model/config.json: Permission denied"),
        ("read_text", real_read, "model.safetensors.index.json", "cannot read the index .*Permission denied"),
    ):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=words):
            patch.setattr(Path, kind, denied(real, name))
            compress_checkpoint(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_index_that_names_no_file_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(InputError, match="cannot read the index"):
        compress_checkpoint(folder)


def test_an_interruption_between_the_two_renames_keeps_the_old_target(folder, tmp_path, monkeypatch):
    compressed = compress_checkpoint(folder).path
    before, real, calls = listing(compressed), Path.rename, []

    def rename(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(folder, force=True)
    assert len(calls) == 3 and listing(compressed) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.coloss"]


def test_a_folder_is_named_after_itself_however_it_is_given(folder, monkeypatch):
    for inside, given in ((folder / "vae", ".."), (folder, ".")):
        monkeypatch.chdir(inside)
        assert compress_checkpoint(given, force=True).path == folder.with_name("model.coloss")
