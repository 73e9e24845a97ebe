from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coloss.compression import coded_memory, compress_checkpoint, decompress_module_, open_compressed
from coloss.compression.coded_layers import is_coded
from coloss.errors import InputError
from coloss.nn import CausalLanguageModel
from coloss.train import save_model

BLOCK_WEIGHTS = 128 * (3 * 128 + 128 + 2 * 512)
IDS = torch.arange(40).view(2, 20)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.int16), second.view(torch.int16))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CausalLanguageModel, Path]:
    torch.manual_seed(0)
    model = CausalLanguageModel(300, dim=128, depth=3, heads=4, context=64, positions="learned")
    model = model.bfloat16().eval().requires_grad_(False)
    return model, compress_checkpoint(save_model(model, tmp_path / "model.safetensors")).path


def on_meta() -> CausalLanguageModel:
    with torch.device("meta"):
        return CausalLanguageModel(300, dim=128, depth=3, heads=4, context=64, positions="learned")


def test_a_model_built_on_the_meta_device_runs_from_the_mapped_file(saved):
    plain, path = saved
    model = on_meta()
    memory = open_compressed(path, model, "transformer.blocks", blocks="transformer.blocks")
    assert same_bits(model(IDS), plain(IDS))
    assert memory.plain_bytes == 6 * BLOCK_WEIGHTS and memory.scratch_bytes == 2 * BLOCK_WEIGHTS
    assert memory == coded_memory(model)
    # Parts lie in one mapping of the file, not in memory of their own.
    stored = [part._coded.stored for part in model.modules() if is_coded(part)]
    assert len({s.sign_mantissa.untyped_storage().data_ptr() for s in stored}) == 1
    assert stored[0].sign_mantissa.untyped_storage().nbytes() == path.stat().st_size
    assert all(not p.requires_grad for p in model.parameters()) and not model.training
    assert model.embedding.weight.dtype == torch.bfloat16
    decompress_module_(model)
    assert same_bits(model(IDS), plain(IDS))


def test_a_folder_of_shards_is_opened(saved, tmp_path):
    plain, _ = saved
    folder = tmp_path / "shards"
    folder.mkdir()
    names = list(plain.state_dict())
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: plain.state_dict()[n] for n in part}, folder / f"{number}.safetensors")
    model = on_meta()
    open_compressed(compress_checkpoint(folder).path, model, "transformer")
    assert same_bits(model(IDS), plain(IDS))
    with pytest.raises(InputError, match="is no compressed checkpoint"):
        open_compressed(folder, on_meta())


def test_what_does_not_fit_is_named(saved, tmp_path):
    _, path = saved
    with torch.device("meta"):
        other = CausalLanguageModel(300, dim=128, depth=4, heads=4, context=64, positions="learned")
    with pytest.raises(InputError, match=r"has no transformer.blocks.3.attention_norm.weight"):
        open_compressed(path, other, "transformer")
    with torch.device("meta"):
        other = CausalLanguageModel(300, dim=128, depth=2, heads=4, context=64, positions="learned")
    with pytest.raises(InputError, match=r"the model has no transformer.blocks.2"):
        open_compressed(path, other, "transformer")
    with torch.device("meta"):
        other = CausalLanguageModel(301, dim=128, depth=3, heads=4, context=64, positions="learned")
    with pytest.raises(
        InputError, match=r"embedding.weight has shape \(301, 128\) in the model, \(300, 128\) in"
    ):
        open_compressed(path, other, "transformer")

    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(200, 100)
            self.register_buffer("table", torch.ones(3), persistent=False)

    compressed = compress_checkpoint(save_model(Buffered().bfloat16(), tmp_path / "b.safetensors")).path
    with torch.device("meta"):
        buffered = Buffered()
    with pytest.raises(InputError, match="no checkpoint holds the buffers table: build the model on the CPU"):
        open_compressed(compressed, buffered)
    open_compressed(compressed, Buffered())


def test_a_float32_checkpoint_is_opened_plain(tmp_path):
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 3)).eval()
    path = compress_checkpoint(save_model(trained, tmp_path / "model.safetensors")).path
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 3))
    memory = open_compressed(path, model)
    assert memory.plain_bytes == 0 and memory.ratio == 1 and memory.scratch_bytes == 0
    inputs = torch.randn(2, 200)
    assert torch.equal(model(inputs), trained(inputs))


def test_an_altered_file_is_refused_when_it_is_opened(saved):
    _, path = saved
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="was altered since it was written"):
        open_compressed(path, on_meta(), "transformer")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 3)).bfloat16()


def test_names_in_two_files_and_tied_ones_that_differ_are_refused(tmp_path):
    (tmp_path / "two").mkdir()
    for number in range(2):
        save_file({"weight": torch.full((2, 2), number)}, tmp_path / "two" / f"{number}.safetensors")
    with pytest.raises(
        InputError, match=r"weight is in two files: .*0.safetensors.coloss and .*1.safetensors"
    ):
        open_compressed(compress_checkpoint(tmp_path / "two").path, nn.Linear(2, 2, bias=False))

    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    for second, fits in ((1.0, False), (0.0, True)):
        path = tmp_path / f"{second}.safetensors"
        save_file({"0.weight": torch.zeros(2, 2), "1.weight": torch.full((2, 2), second)}, path)
        compressed = compress_checkpoint(path).path
        if fits:
            open_compressed(compressed, tied)
            assert not tied[1].weight.any() and tied[1].weight is tied[0].weight
        else:
            with pytest.raises(
                InputError, match="0.weight and 1.weight are one tensor in the model, but differ"
            ):
                open_compressed(compressed, tied)


@pytest.mark.parametrize("written", ["0.3", "[1]", "no json"])
def test_metadata_of_another_writer_is_refused_before_the_model_is_touched(tmp_path, written):
    save_file(layers().state_dict(), tmp_path / "m.safetensors", {"coloss": written})
    model = layers().train()
    with pytest.raises(InputError, match="has metadata 'coloss' that save_model did not write"):
        open_compressed(compress_checkpoint(tmp_path / "m.safetensors").path, model)
    assert model.training and not any(is_coded(part) for part in model)


def test_extra_state_is_set_when_all_else_is_done(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"seen": 7}

        def set_extra_state(self, state):
            self.seen = state["seen"], self.training

    path = save_model(
        nn.Sequential(Counting(4, 4), nn.Linear(200, 100)).bfloat16(), tmp_path / "m.safetensors"
    )
    model = nn.Sequential(Counting(4, 4), nn.Linear(200, 100))
    open_compressed(compress_checkpoint(path).path, model)
    assert model[0].seen == (7, False) and is_coded(model[1])


def test_float8_beside_bfloat16_is_opened(tmp_path):
    scales = torch.randn(33).to(torch.float8_e4m3fn)
    model = layers()
    model.register_buffer("scales", torch.zeros_like(scales))
    save_file({**layers().state_dict(), "scales": scales}, tmp_path / "m.safetensors")
    open_compressed(compress_checkpoint(tmp_path / "m.safetensors").path, model)
    assert torch.equal(model.scales.float(), scales.float()) and is_coded(model[0])


def test_what_is_read_may_be_written_to(tmp_path):
    """The file is mapped to be read only; writing to memory in it would end the process."""
    content = {
        "w": torch.randn(9).bfloat16(),
        "b": torch.randn(5),
        "n": torch.arange(3),
        "f": torch.zeros(999),
    }
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    for name, value in content.items():
        model.register_buffer(name, torch.zeros_like(value))
    content["0.weight"] = torch.randn(2, 2)
    save_file(content, tmp_path / "m.safetensors")
    open_compressed(compress_checkpoint(tmp_path / "m.safetensors").path, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value.add_(1), content[name] + 1), name
