import copy

import pytest
import torch
from torch import nn

from coloss.compression import compress_module_, decompress_module_
from coloss.compression.coded_layers import is_coded
from coloss.errors import InputError


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.int16), second.view(torch.int16))


def tied() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(300, 64), "head": nn.Linear(64, 300, bias=False)})
    model["head"].weight = model["embed"].weight
    return model.bfloat16().eval().requires_grad_(False)


def test_a_saved_state_dict_is_as_small_as_the_plain_one_and_loads(tmp_path):
    """It carries nothing of coloss along."""
    layer, model = nn.Linear(200, 100).bfloat16(), tied()
    torch.save({"plain": layer.state_dict()}, tmp_path / "plain.pt")
    compress_module_(layer.eval().requires_grad_(False))
    state = layer.state_dict()
    torch.save({"plain": state}, tmp_path / "coded.pt")
    assert (tmp_path / "coded.pt").stat().st_size == (tmp_path / "plain.pt").stat().st_size
    loaded = torch.load(tmp_path / "coded.pt", weights_only=True)["plain"]
    assert same_bits(loaded["weight"], state["weight"]) and not vars(state).keys() - {"_metadata"}
    # Tied layers share a tensor within one dict, and dicts share none.
    compress_module_(model)
    first, second = model.state_dict(), model.state_dict()
    first["head.weight"].zero_()
    assert not first["embed.weight"].any()
    assert same_bits(second["embed.weight"], tied()["embed"].weight)
    assert second["embed.weight"] is second["head.weight"]


def test_another_type_is_refused_and_its_traces_can_be_undone():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 256), nn.Linear(256, 256)).bfloat16().eval().requires_grad_(False)
    model = copy.deepcopy(plain)
    compress_module_(model)
    with pytest.raises(InputError, match=r"layers before it were changed, and bfloat16\(\) brings back"):
        model.float()
    inputs = torch.randn(2, 10).bfloat16()
    assert model[0].weight.dtype == torch.float32
    assert same_bits(model.bfloat16()(inputs), plain(inputs))


def test_layers_of_a_transformer_of_torch_are_coded_with_what_reads_their_weights():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 512, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).bfloat16().eval().requires_grad_(False)
    model = copy.deepcopy(plain)
    with pytest.raises(InputError, match=r"'layers.0.linear1' cannot be replaced: .*blocks=\[...\]"):
        compress_module_(model)
    assert not any(is_coded(part) for part in model.modules())
    inputs = torch.randn(2, 5, 64).bfloat16()
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    compress_module_(model, blocks="layers")
    assert same_bits(model(inputs), plain(inputs))
    with pytest.raises(AttributeError, match=r"name the module that reads it in blocks"):
        model(inputs, src_key_padding_mask=padding)  # here the encoder reads the weights of its layers
    compress_module_(decompress_module_(model), blocks="")
    found, expected = (m(inputs, src_key_padding_mask=padding) for m in (model, plain))
    assert same_bits(found[~padding[:, : found.shape[1]]], expected[~padding[:, : found.shape[1]]])
    # A decoder calls its layers.
    decoder = nn.TransformerDecoderLayer(64, 4, 512, batch_first=True).bfloat16().eval().requires_grad_(False)
    expected = decoder(inputs, inputs)
    compress_module_(decoder)
    assert is_coded(decoder.linear1) and same_bits(decoder(inputs, inputs), expected)


def test_compilation_leaves_coded_layers_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.Tanh()).bfloat16().eval().requires_grad_(False)
    inputs = torch.randn(2, 200).bfloat16()
    expected = model(inputs)
    compress_module_(model)
    assert same_bits(torch.compile(model, backend="eager")(inputs), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_an_accelerator_the_codes_stay_with_the_cpu():
    torch.manual_seed(0)
    model = nn.Linear(200, 100).bfloat16().eval().requires_grad_(False).cuda()
    inputs = torch.randn(2, 200).bfloat16().cuda()
    expected = model(inputs)
    compress_module_(model)
    assert model._coded.stored.sign_mantissa.device.type == "cpu"
    assert same_bits(model(inputs), expected)
    assert model.state_dict()["weight"].is_cuda
