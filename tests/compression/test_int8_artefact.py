"""One file for all precisions: equal to the training-time forward at each of them, as large as its integers, refused when altered."""

import json

import pytest
import torch
from torch import nn

from coloss import save_model
from coloss.compression import (
    IntegerWeight,
    SwitchableLinear,
    compress_model,
    export_int8,
    load_compressed,
    load_int8,
    make_switchable,
    set_bits,
    to_plain,
)
from coloss.compression.int8_artefact import narrow_weight
from coloss.errors import InputError
from coloss.nn import Classifier, ConvNet

BITS = (8, 6, 4, 2)


def network() -> nn.Module:
    return Classifier(ConvNet(1, (4, 8, 8)), 3)


def images() -> torch.Tensor:
    return torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def trained(**options) -> nn.Module:
    """Every precision has seen a batch, so that norms and steps differ."""
    torch.manual_seed(0)
    model = network()
    make_switchable(model, BITS, **options)
    for number, bits in enumerate(BITS):
        set_bits(model, bits)
        model(images() * (1 + number))
    return model.eval()


@pytest.mark.parametrize(
    ("rounding", "per_channel"), [("nearest", False), ("nearest", True), ("floor", True), ("middle", False)]
)
def test_switching_the_file_equals_the_forward_pass_of_training(tmp_path, rounding, per_channel):
    model = trained(activations=True, rounding=rounding, per_channel=per_channel)
    artefact = load_int8(export_int8(model).save(tmp_path / "model.coloss"))
    assert artefact.bits == BITS
    for bits in (2, 8, 4, 6):
        set_bits(model, bits)
        exact = artefact.set_bits(bits).load_into(network(), activations=True).eval()
        assert torch.equal(exact(images()), model(images()))


def test_without_rounded_inputs_the_plain_model_is_exact_too(tmp_path):
    model = trained()
    artefact = load_int8(export_int8(model).save(tmp_path / "model.coloss"))
    mixed = {"backbone.stages.1.0": 2}
    set_bits(model, 8)
    set_bits(model, mixed)
    plain = artefact.set_bits(8).set_bits(mixed).load_into(network()).eval()
    assert torch.equal(plain(images()), model(images()))
    assert plain.backbone.stages[1][0].weight.unique().numel() <= 4
    with pytest.raises(InputError, match="activations were not rounded in training"):
        artefact.load_into(network(), activations=True)


def test_transitional_norms_follow_the_layers_around_them(tmp_path):
    model = trained(transitional=True)
    wanted = {"backbone.stages.1.0": 2, "backbone.stages.2.0": 6}
    set_bits(model, wanted)
    model.train()(images() + 3)
    model.eval()
    artefact = load_int8(export_int8(trained(transitional=True)).save(tmp_path / "a"))
    assert artefact.set_bits(wanted).compressed.weights["backbone.stages.1.1.weight"].key == "2_6"
    artefact = load_int8(export_int8(model).save(tmp_path / "b")).set_bits(8).set_bits(wanted)
    assert torch.equal(artefact.load_into(network()).eval()(images()), model(images()))


def test_the_export_leaves_the_model_alone_and_keeps_its_precision():
    model = trained()
    set_bits(model, 4)
    before = {n: v.clone() for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    assert set(export_int8(model).bits_of().values()) == {4}
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items() if n in before)


def test_the_file_is_as_large_as_its_integers_say(tmp_path):
    model = nn.Sequential(nn.Linear(8, 256), nn.Linear(256, 256), nn.Linear(256, 8))
    make_switchable(model, BITS)
    artefact = export_int8(model)
    path = artefact.save(tmp_path / "model.coloss")
    ends = 4 * (8 * 256 + 256 + 256 * 8 + 8 + 256)
    assert artefact.nbytes == 256 * 256 + 4 + ends
    assert artefact.nbytes < path.stat().st_size < artefact.nbytes + 4000
    assert artefact.set_bits(2).nbytes == artefact.nbytes
    plain = nn.Sequential(nn.Linear(8, 256), nn.Linear(256, 256), nn.Linear(256, 8))
    assert path.stat().st_size < 0.4 * save_model(plain, tmp_path / "plain.safetensors").stat().st_size


def test_the_general_reader_reads_it_at_the_precision_it_was_saved_at(tmp_path):
    model = trained()
    path = export_int8(model).set_bits(2).save(tmp_path / "model.coloss")
    set_bits(model, 2)
    assert torch.equal(load_compressed(path).load_into(network()).eval()(images()), model(images()))


def test_the_loaded_model_holds_nothing_but_torch():
    model = trained()
    plain = export_int8(model).set_bits(4).load_into(network())
    assert {type(m) for m in plain.modules()} == {type(m) for m in network().modules()}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())
    assert all(type(p) is nn.Parameter for p in plain.parameters())


def test_altered_and_foreign_files_are_refused(tmp_path):
    path = export_int8(trained()).save(tmp_path / "model.coloss")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="was altered"):
        load_int8(path)
    other = compress_model(nn.Linear(2, 2)).save(tmp_path / "other.coloss")
    with pytest.raises(InputError, match="none that switches its precision"):
        load_int8(other)


def test_unknown_precisions_and_layers_are_named():
    artefact = export_int8(trained())
    with pytest.raises(InputError, match="bits must be one of 8, 6, 4, 2, got 3"):
        artefact.set_bits(3)
    with pytest.raises(InputError, match="bits must name switchable layers"):
        artefact.set_bits({"head": 4})


def test_weights_without_integers_are_refused():
    model = trained(independent=True)
    with pytest.raises(InputError, match="independent scales"):
        export_int8(model)
    model = trained()
    model.backbone.stages[1][0].weight.data[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        export_int8(model)


@pytest.mark.parametrize("high", [2, 3, 5, 8])
def test_integers_of_any_width_are_packed_to_the_bit(high: int):
    low, top = -(2 ** (high - 1)), 2 ** (high - 1) - 1
    codes = torch.arange(low, top + 1).repeat(3)
    stored = IntegerWeight.from_codes(codes, torch.tensor(0.25), high)
    assert stored.codes.numel() == -(-codes.numel() * high // 8)
    assert torch.equal(stored.restore(), codes * 0.25)
    again = IntegerWeight.from_parts(stored.tensors(), json.loads(json.dumps(stored.settings())))
    assert torch.equal(again.restore(), stored.restore())


def test_a_model_is_switched_by_loading_again():
    model = trained(activations=True)
    artefact, plain = export_int8(model), network().eval()
    seen = []
    plain.backbone.stages[1][0].register_forward_pre_hook(lambda *_: seen.append(1))
    for bits in (2, 8, 2):
        set_bits(model, bits)
        artefact.set_bits(bits).load_into(plain, activations=True)
        assert torch.equal(plain(images()), model(images()))
    artefact.set_bits(2).load_into(plain)
    fresh = artefact.set_bits(2).load_into(network()).eval()
    assert torch.equal(plain(images()), fresh(images())) and len(seen) == 4


def test_the_model_that_training_left_is_switched_too():
    model = trained(activations=True)
    artefact = export_int8(model)
    set_bits(model, 2)
    expected = model(images())
    set_bits(model, 8)
    to_plain(model)
    assert torch.equal(artefact.set_bits(2).load_into(model, activations=True)(images()), expected)


def test_a_layer_that_is_the_whole_model_is_refused():
    with pytest.raises(InputError, match="model must contain its layers"):
        export_int8(SwitchableLinear(8, 4))


@pytest.mark.parametrize("options", [{"rounding": "floor"}, {"independent": True}, {}])
def test_a_weight_stored_narrow_is_that_of_its_precision(options):
    model = trained(**options)
    set_bits(model, 4)
    layer = model.backbone.stages[1][0]
    stored = narrow_weight(layer)
    assert torch.equal(stored.restore(), layer.quantized_weight().detach())
    assert stored.codes.numel() == layer.weight.numel() // 2
