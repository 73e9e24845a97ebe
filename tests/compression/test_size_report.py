import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from coloss.compression import (
    CompressedModel,
    DenseWeight,
    compression_report,
    decompose_model,
    load_compressed,
    size_report,
)
from coloss.errors import InputError
from coloss.nn import CausalLanguageModel
from coloss.ops import nm_mask
from coloss.train import save_model


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64))


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    before = _network()
    model = copy.deepcopy(before)
    model[3].weight.data.mul_(nm_mask(model[3].weight, 1, 4))
    path = tmp_path / "model.coloss"
    report = compression_report(model, torch.ones(2, 1, 4, 4), before=before, path=path)
    assert report.bytes_after == path.stat().st_size
    assert report.ratio == report.bytes_after / report.bytes_before < 0.5
    assert report.density == pytest.approx((72 + 2048) / (72 + 8192))
    row = next(row for row in report.rows if row.name == "3.weight")
    assert (row.kind, row.density, row.bits) == ("n:m", 0.25, 8.5)
    assert report.largest_difference == 0
    # Products of the linear layer at a quarter, those of the convolution whole.
    assert report.multiply_adds_after == 2 * (16 * 72 + 8192)
    assert report.multiply_adds_nonzero == 2 * (16 * 72 + 2048)


def test_the_metric_is_measured_on_what_the_file_gives_back() -> None:
    before = _network()
    model = copy.deepcopy(before)
    model[3].weight.data.sign_()
    kept = copy.deepcopy(model.state_dict())
    report = compression_report(
        model,
        torch.ones(1, 1, 4, 4),
        before=before,
        evaluate=lambda m: float(m[3].weight.detach().abs().mean()),
    )
    assert report.metric_before == pytest.approx(float(before[3].weight.detach().abs().mean()))
    assert report.metric_after == 1
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())
    assert "metric" in str(report) and report.as_dict()["ratio"] == report.ratio


def test_thin_layers_cost_fewer_multiply_adds() -> None:
    before = _network()
    thin = copy.deepcopy(before)
    decompose_model(thin, rank={"3": 4}, layers=["3"])
    report = compression_report(thin, torch.ones(1, 1, 4, 4), before=before)
    assert report.multiply_adds_after == 16 * 72 + 4 * (128 + 64) < report.multiply_adds_before


def test_the_file_and_not_what_was_written_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(path: Path) -> CompressedModel:
        read = load_compressed(path)
        return replace(read, weights={**read.weights, "bias": DenseWeight(torch.ones(2), torch.float32)})

    monkeypatch.setattr(size_report, "load_compressed", altered)
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.bias)
    assert compression_report(layer, torch.zeros(1, 2)).largest_difference == 1


def test_tied_weights_count_once_before_and_after(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 500, bias=False))
    untied = compression_report(model, torch.tensor([1]))
    assert untied.bytes_before == save_model(model, tmp_path / "plain.safetensors").stat().st_size
    model[1].weight = model[0].weight
    report = compression_report(model, torch.tensor([1]))
    assert 500 * 64 * 4 < report.bytes_before < 500 * 64 * 4 + 1024
    assert report.ratio == pytest.approx(1, abs=0.01) and report.bits == 32


def test_floats_of_eight_bits_are_reported() -> None:
    layer = nn.Linear(4, 4)
    layer.register_buffer("scale", torch.tensor([0.0, 1.0]).to(torch.float8_e4m3fn))
    row = compression_report(layer, torch.ones(1, 4)).rows[-1]
    assert (row.name, row.density, row.bits) == ("scale", 0.5, 8)


def test_torch_attention_is_counted() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0)
    report = compression_report(layer, torch.randn(1, 5, 16))
    # Queries, keys, values and output; scores and mixture; two layers of the perceptron.
    assert report.multiply_adds_after == 5 * 4 * 16 * 16 + 2 * 5 * 5 * 16 + 5 * 2 * 16 * 32


def test_a_model_that_gives_no_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="model must give one tensor for inputs, got tuple"):
        compression_report(nn.LSTM(2, 2), torch.ones(1, 2))


def test_attention_is_counted_the_same_way_with_and_without_zeros():
    model = CausalLanguageModel(11, dim=8, depth=1, heads=2)
    report = compression_report(model, torch.randint(11, (2, 5)))
    assert report.multiply_adds_nonzero == report.multiply_adds_after == report.multiply_adds_before > 0
