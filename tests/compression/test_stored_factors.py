"""Weights of low rank in a file: the bytes of their factors, and the network of the original class back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coloss.compression import (
    TrainedRankPruning,
    compress_model,
    load_compressed,
    low_rank_weight,
    store_low_rank,
)
from coloss.nn.causal_language_model import CausalLanguageModel, next_token_loss
from coloss.train import Budget, State, fit


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_give_back_a_weight_of_their_rank(scheme, dtype):
    weight = low_rank_weight(randn(12, 10, 3, 3, dtype=dtype), scheme, rank=2)
    stored = store_low_rank(weight, 2, scheme)
    torch.testing.assert_close(stored.restore(), weight)
    sizes = {"channel": 12 + 90, "spatial": 30 + 36, "decoupled": 12 * (10 + 9)}
    assert stored.nbytes == 2 * sizes[scheme] * weight.element_size()


def test_a_wide_weight_with_a_common_mean_is_stored_as_closely_as_a_file_asks():
    """Its first singular value is large beside its entries: float32 factors were 1.5e-5 of the largest entry off."""
    both = randn(256, 10, dtype=torch.float64) @ randn(10, 768, seed=1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(768, 256))
    with torch.no_grad():
        model[0].weight.copy_(1 + both / 300)
    weight = model[0].weight.detach()
    stored = store_low_rank(weight, 11)
    assert (stored.restore() - weight).abs().max() <= 1e-6 * weight.abs().max()
    assert stored.left.dtype == stored.right.dtype == torch.float32
    assert compress_model(model, {"0.weight": stored}).weights["0.weight"].kind == stored.kind


def test_a_network_that_is_one_layer_is_stored_under_the_name_of_its_weight():
    model = nn.Linear(32, 32)
    method = TrainedRankPruning(layers="", decompose=False)
    method.setup(State(model))
    method.set_extra_state({"rank_history": [[0, {"": 2}]]})
    method.finish(State(model))
    given = method.stored_weights(model)
    assert list(given) == ["weight"]
    assert compress_model(model, given).weights["weight"].nbytes == 4 * 2 * 64


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="weight must be float32 or float64, got torch.bfloat16"):
        store_low_rank(torch.ones(4, 4, dtype=torch.bfloat16), 1)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 4\], got 5"):
        store_low_rank(torch.ones(4, 4), 5)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
def test_a_network_trained_at_low_rank_and_shipped_whole_takes_the_bytes_of_its_factors(scheme, tmp_path):
    images, targets = randn(32, 1, 6, 6), torch.arange(32) % 3
    method = TrainedRankPruning(scheme=scheme, energy=0.4, every=2, decompose=False)
    run = fit(
        convolutional(), (images, targets), F.cross_entropy, [method], budget=Budget(steps=6), batch_size=16
    )
    given = method.stored_weights(run.model)
    compressed = compress_model(run.model, given)
    if scheme == "decoupled":
        # Eight times rank * (8 + 9) values are no fewer than 8 * 8 * 9, from rank 5 on.
        assert set(given) <= {"3.weight"}
    else:
        assert set(given) == {"3.weight"}
        rank = method.ranks()["3"]
        assert compressed.weights["3.weight"].nbytes == 4 * rank * {"channel": 8 + 72, "spatial": 48}[scheme]
        assert compressed.nbytes < compress_model(run.model).nbytes
    read = load_compressed(compressed.save(tmp_path / "thin.coloss")).load_into(convolutional()).eval()
    torch.testing.assert_close(read(images), run.model(images), rtol=1e-4, atol=1e-5)


def test_the_factorised_network_is_stored_as_it_is_and_can_be_trained_on(tmp_path):
    images, targets = randn(32, 1, 6, 6), torch.arange(32) % 3
    method = TrainedRankPruning(energy=0.4, every=2)
    run = fit(
        convolutional(), (images, targets), F.cross_entropy, [method], budget=Budget(steps=6), batch_size=16
    )
    assert isinstance(run.model[3], nn.Sequential)
    assert method.stored_weights(run.model) == {}
    before = F.cross_entropy(run.model(images), targets)
    shapes = [parameter.shape for parameter in run.model.parameters()]
    tuned = fit(run.model, (images, targets), F.cross_entropy, budget=Budget(steps=10), batch_size=16).model
    assert F.cross_entropy(tuned(images), targets) < before
    assert [parameter.shape for parameter in tuned.parameters()] == shapes
    fresh = convolutional().eval()
    fresh[3] = nn.Sequential(*[nn.Conv2d(*part.weight.shape[1::-1], part.kernel_size) for part in tuned[3]])
    fresh[3][0].bias = None
    read = load_compressed(compress_model(tuned).save(tmp_path / "tuned.coloss")).load_into(fresh)
    assert torch.equal(read(images), tuned(images))


@pytest.mark.parametrize("decompose", [False, True])
def test_the_blocks_of_a_language_model(decompose, tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(11, (16, 9))

    def new_model():
        torch.manual_seed(1)
        return CausalLanguageModel(11, dim=32, depth=1, heads=2)

    method = TrainedRankPruning(energy=0.3, every=2, layers="transformer.blocks", decompose=decompose)
    run = fit(
        new_model(), (ids[:, :-1], ids[:, 1:]), next_token_loss, [method], budget=Budget(steps=4), batch_size=8
    )  # fmt: skip
    assert len(method.ranks()) == 4
    given = method.stored_weights(run.model)
    assert len(given) == (0 if decompose else 4)
    if not decompose:
        file = compress_model(run.model, given).save(tmp_path / "model.coloss")
        read = load_compressed(file).load_into(new_model()).eval()
        torch.testing.assert_close(read(ids), run.model(ids), rtol=1e-4, atol=1e-4)
    whole = sum(parameter.numel() for parameter in new_model().parameters())
    thin = sum(parameter.numel() for parameter in run.model.parameters())
    assert (thin < whole) == decompose
    assert run.model(ids).isfinite().all()
