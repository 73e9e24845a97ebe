from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

from coloss.nn import ResidualVectorQuantizer, VectorQuantizerEMA
from coloss.nn.vector_quantizer import _Batch


def ready(codes: Tensor, **options: Any) -> VectorQuantizerEMA:
    """A quantiser with these codes."""
    quantizer = VectorQuantizerEMA(len(codes), codes.shape[1], start="normal", **options).to(codes.dtype)
    quantizer.codes.copy_(codes)
    quantizer.sums.copy_(codes)
    return quantizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Nearest codes


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_code_is_that_of_plain_numpy(seed: int) -> None:
    draws = generator(seed)
    codes = torch.randn(7, 3, generator=draws, dtype=torch.float64) + 100
    rows = torch.randn(4, 5, 3, generator=draws, dtype=torch.float64) + 100
    found = ready(codes).eval()(rows)
    distances = np.square(rows.numpy()[:, :, None] - codes.numpy()).sum(-1)
    assert np.array_equal(found.indices.numpy(), distances.argmin(-1))
    assert torch.equal(found.quantized, codes[found.indices])
    assert found.commitment.item() == pytest.approx(distances.min(-1).mean() / 3)


def test_of_equally_near_codes_the_first_is_taken() -> None:
    quantizer = ready(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]))
    assert quantizer.nearest(torch.zeros(4, 2)).tolist() == [0] * 4


def test_many_vectors_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, rows = VectorQuantizerEMA(8, 3), torch.randn(50, 3)
    whole = quantizer.nearest(rows)
    monkeypatch.setattr("coloss.nn.vector_quantizer._DISTANCES", 24)
    assert torch.equal(quantizer.nearest(rows), whole)


def test_inputs_that_are_codes_cost_nothing() -> None:
    quantizer = VectorQuantizerEMA(8, 5).eval()
    found = quantizer(quantizer.codes.clone())
    assert found.indices.tolist() == list(range(8))
    assert found.commitment.item() == 0
    assert found.perplexity.item() == pytest.approx(8)


def test_one_used_code_is_a_perplexity_of_one() -> None:
    assert ready(torch.eye(3)).eval()(torch.eye(3)[[1, 1, 1, 1]]).perplexity.item() == pytest.approx(1)


# Gradients


def test_the_gradient_of_the_reconstruction_passes_straight_through() -> None:
    decoder = nn.Linear(4, 6)
    rows = torch.randn(3, 5, 4, requires_grad=True)
    quantizer = VectorQuantizerEMA(8, 4)
    found = quantizer(rows)
    shown = found.quantized.detach().requires_grad_()
    decoder(shown).square().sum().backward()
    decoder(found.quantized).square().sum().backward()
    torch.testing.assert_close(rows.grad, shown.grad, rtol=0, atol=0)


def test_the_commitment_draws_vectors_to_codes_and_leaves_codes_alone() -> None:
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0]], dtype=torch.float64)
    rows = torch.tensor([[1.0, 2.0], [9.0, 0.0]], dtype=torch.float64, requires_grad=True)
    quantizer = ready(codes).eval()
    commitment = quantizer(rows).commitment
    commitment.backward()
    assert commitment.item() == pytest.approx((1 + 4 + 1) / 4)
    torch.testing.assert_close(rows.grad, 2 * (rows.detach() - codes) / 4)
    assert not any(buffer.requires_grad for buffer in quantizer.buffers())
    assert torch.autograd.gradcheck(lambda x: quantizer(x).commitment, rows)


# The moving average


def test_without_memory_and_reset_a_pass_is_a_step_of_k_means() -> None:
    rows = torch.randn(40, 3, dtype=torch.float64)
    quantizer = ready(torch.randn(6, 3, dtype=torch.float64) * 3, decay=0.0, reset_below=0.0)
    before = quantizer.codes.clone()
    found = quantizer(rows)
    assert torch.equal(found.quantized, before[found.indices]), "the codes as they were are given back"
    expected = before.clone()
    for code in found.indices.unique():
        expected[code] = rows[found.indices == code].mean(0)
    torch.testing.assert_close(quantizer.codes, expected)
    assert len(found.indices.unique()) < 6, "the case of a code without vectors is in this test"


def test_codes_are_quotients_of_averages_worked_by_hand() -> None:
    quantizer = ready(torch.tensor([[0.0], [10.0]]), decay=0.75, reset_below=0.0)
    quantizer(torch.tensor([[1.0], [3.0], [8.0]]))
    # N = 0.75 + 0.25 * 2 and 0.75 + 0.25 * 1; M = 0.25 * 4 and 7.5 + 0.25 * 8.
    torch.testing.assert_close(quantizer.counts, torch.tensor([1.25, 1.0]))
    torch.testing.assert_close(quantizer.codes, torch.tensor([[0.8], [9.5]]))


def test_a_code_that_nothing_uses_stays_where_it_is_for_ever() -> None:
    quantizer = ready(torch.tensor([[0.0], [10.0]]), decay=1e-6, reset_below=0.0)
    for _ in range(8):  # 1e-48 is 0 in float32
        quantizer(torch.tensor([[0.0]]))
    assert quantizer.codes[1].item() == 10


def test_a_dead_code_becomes_a_random_vector_of_the_batch() -> None:
    rows = torch.arange(1.0, 41.0)[:, None] / 100
    places = []
    for seed in range(6):
        quantizer = ready(torch.tensor([[0.0], [500.0], [900.0]]), seed=seed)
        quantizer(rows)
        new = quantizer.codes[1:]
        assert (rows == new.T).any(0).all(), "they are vectors of the batch"
        assert new[0] != new[1]
        assert torch.equal(quantizer.sums[1:], new)
        assert quantizer.counts[1:].tolist() == [1, 1]
        places += (new.squeeze(1) * 100).round().tolist()
    assert max(places) > 20 and len(set(places)) > 5, "not the first of the batch"


def test_a_code_used_once_in_a_batch_is_not_dead() -> None:
    quantizer = ready(torch.tensor([[0.0], [10.0]]), decay=0.99)
    for _ in range(5):
        quantizer(torch.tensor([[0.5], [9.0]]))
    torch.testing.assert_close(quantizer.counts, torch.ones(2), rtol=0, atol=0)


def test_the_first_batch_gives_the_codes() -> None:
    rows = torch.randn(20, 4)
    quantizer = VectorQuantizerEMA(20, 4)
    found = quantizer(rows)
    assert found.commitment.item() == 0
    assert found.indices.sort().values.tolist() == list(range(20))


@pytest.mark.parametrize(("rows", "codes"), [(20, 16), (200, 128), (130, 128)])
def test_no_vector_is_drawn_twice_where_there_are_enough(rows: int, codes: int) -> None:
    for seed in range(3):
        quantizer = VectorQuantizerEMA(codes, 3, seed=seed)
        quantizer(torch.randn(rows, 3))
        assert len(quantizer.codes.unique(dim=0)) == codes


def test_every_vector_is_drawn_as_often_as_any_other() -> None:
    batch = _Batch(
        torch.arange(8.0)[:, None], torch.ones(8, dtype=torch.bool), torch.zeros(8, 1), generator()
    )
    shares = torch.cat([batch.draw(5).flatten() for _ in range(400)]).long().bincount() / 400
    assert (shares - 5 / 8).abs().max() < 0.1


def test_a_batch_of_fewer_vectors_than_codes_is_repeated_with_noise() -> None:
    quantizer = VectorQuantizerEMA(30, 4)
    quantizer(torch.randn(3, 4))
    assert len(quantizer.codes.unique(dim=0)) == 30
    # 0.01 / sqrt(4) is the noise's deviation: the codes stand around three vectors, ten around each.
    apart = torch.cdist(quantizer.codes, quantizer.codes)
    assert ((apart < 0.06).sum(1) == 10).all()


def test_a_reset_from_fewer_vectors_than_codes_adds_noise() -> None:
    rows = torch.tensor([[5.0, 5.0], [7.0, 7.0]])
    quantizer = ready(torch.tensor([[5.0, 5.0], [0.0, 0.0], [-1.0, 0.0]]))
    quantizer(rows[[0, 0]])
    assert quantizer.codes[0].tolist() == [5, 5], "in use: kept"
    assert len(quantizer.codes.unique(dim=0)) == 3
    assert 0 < (quantizer.codes[1:] - 5).abs().max() < 0.05


def test_evaluation_changes_nothing() -> None:
    quantizer = VectorQuantizerEMA(4, 3)
    quantizer(torch.randn(10, 3))
    before = state(quantizer)
    quantizer.eval()(torch.randn(10, 3))
    quantizer.train().nearest(torch.randn(10, 3))
    assert same(before, state(quantizer))


def test_reset_keeps_more_codes_in_use_than_a_random_start() -> None:
    rows = torch.randn(200, 8) * 0.1 + 3
    used = []
    for options in ({}, {"start": "normal", "reset_below": 0.0}):
        quantizer = VectorQuantizerEMA(32, 8, **options)
        for _ in range(5):
            quantizer(rows)
        used.append(len(quantizer.nearest(rows).unique()))
    assert used[0] > 2 * used[1]


# Padding, what is not finite, half precision


@pytest.mark.parametrize("kind", ["single", "residual"])
def test_padding_has_no_part_in_anything(kind: str) -> None:
    new: Callable[[], nn.Module] = {
        "single": lambda: VectorQuantizerEMA(4, 3),
        "residual": lambda: ResidualVectorQuantizer(4, 3, 2, dropout=0.0),
    }[kind]
    rows = torch.randn(2, 6, 3)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 2:] = False
    padded = torch.where(valid[..., None], rows, torch.nan).requires_grad_()
    torch.manual_seed(1)
    first = new()
    torch.manual_seed(1)
    second = new()
    for _ in range(3):
        found, alone = first(padded, valid), second(rows[valid])
    torch.testing.assert_close(found.quantized[valid], alone.quantized)
    torch.testing.assert_close(found.commitment, alone.commitment)
    torch.testing.assert_close(found.perplexity, alone.perplexity)
    assert torch.equal(found.indices[valid], alone.indices)
    assert (found.indices[~valid] == -1).all()
    assert (found.quantized[~valid] == 0).all()
    assert same(state(first), state(second))
    (found.quantized.sum() + found.commitment).backward()
    assert padded.grad is not None
    assert padded.grad.isfinite().all()
    assert (padded.grad[~valid] == 0).all()


def test_a_batch_of_padding_alone_changes_and_costs_nothing() -> None:
    quantizer = VectorQuantizerEMA(4, 3)
    before = quantizer.codes.clone()
    found = quantizer(torch.randn(2, 3), torch.zeros(2, dtype=torch.bool))
    assert (found.commitment.item(), found.perplexity.item()) == (0, 0)
    assert torch.equal(quantizer.codes, before)
    assert not quantizer.initialized
    assert quantizer(torch.zeros(0, 3)).indices.shape == (0,)


def test_vectors_that_are_not_finite_reach_the_loss_but_not_the_codes() -> None:
    quantizer = VectorQuantizerEMA(4, 3)
    rows = torch.randn(10, 3)
    rows[3, 1], rows[7, 0] = torch.nan, torch.inf
    assert not quantizer(rows).commitment.isfinite()
    assert all(buffer.isfinite().all() for buffer in quantizer.buffers())


def test_codes_stay_in_float32_where_the_network_is_half() -> None:
    quantizer = VectorQuantizerEMA(4, 3).bfloat16()
    assert quantizer.codes.dtype == quantizer.counts.dtype == torch.float32
    found = quantizer(torch.randn(10, 3, dtype=torch.bfloat16))
    assert found.quantized.dtype == torch.bfloat16
    assert found.commitment.dtype == torch.float32
    assert quantizer.double().codes.dtype == torch.float64


def test_codes_are_float32_where_half_is_the_default_type() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantizer = VectorQuantizerEMA(4, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert quantizer.codes.dtype == quantizer.counts.dtype == quantizer.sums.dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    rows = torch.randn(64, 16) * 100
    plain, mixed = VectorQuantizerEMA(8, 16), VectorQuantizerEMA(8, 16)
    found = plain(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixed(rows).indices, found.indices)
    assert torch.equal(plain.codes, mixed.codes)


# State


def test_a_stored_and_loaded_quantizer_goes_on_to_the_bit() -> None:
    # The released code of the paper keeps its flag and sums outside the state: resuming draws the codebook anew.
    batches = [torch.randn(30, 3) + 5 * n for n in range(6)]
    whole, stopped = (
        ResidualVectorQuantizer(8, 3, 2, dropout=0.5),
        ResidualVectorQuantizer(8, 3, 2, dropout=0.5),
    )
    stopped.load_state_dict(whole.state_dict())
    for batch in batches:
        whole(batch)
    for batch in batches[:3]:
        stopped(batch)
    torch.manual_seed(99)
    resumed = ResidualVectorQuantizer(8, 3, 2, dropout=0.5)
    resumed.load_state_dict(stopped.state_dict())
    for batch in batches[3:]:
        resumed(batch)
    assert same(state(whole), state(resumed))


def test_a_generator_stands_in_for_the_seed() -> None:
    rows = torch.randn(50, 3)
    codes = []
    for seed in (5, 5, 6):
        quantizer = VectorQuantizerEMA(4, 3)
        quantizer(rows, generator=generator(seed))
        codes.append(quantizer.codes)
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_two_processes_make_the_codebook_of_one(tmp_path: Path) -> None:
    # 30 places and 6: enough vectors for the codes, and too few.
    rows = [torch.randn(samples, places, 3, dtype=torch.float64) for samples, places in ((6, 5), (2, 3))]
    valid = [torch.rand(batch.shape[:2]) < 0.7 for batch in rows]

    def train(fabric: Fabric) -> dict[str, Tensor]:
        quantizer = ResidualVectorQuantizer(16, 3, 2, dropout=0.5).double()
        share = slice(fabric.global_rank, None, fabric.world_size)  # as the loader deals them out
        costs, gradients = [], []
        for batch, there in zip(rows, valid):
            inputs = batch.clone().requires_grad_()
            found = quantizer(inputs[share], there[share])
            (gradient,) = torch.autograd.grad(found.commitment, inputs)
            # What data-parallel training does: the mean over processes.
            for value in (cost := found.commitment.detach(), gradient):
                if fabric.world_size > 1:
                    torch.distributed.all_reduce(value)
                value /= fabric.world_size
            costs.append(cost)
            gradients.append(gradient.flatten())
        return state(quantizer) | {"costs": torch.stack(costs), "gradients": torch.cat(gradients)}

    check_two_processes(train, tmp_path)


# Residual levels


def test_levels_refine_what_is_left_over() -> None:
    rows = torch.randn(200, 4)
    quantizer = ResidualVectorQuantizer(16, 4, 3, dropout=0.0)
    for _ in range(5):
        quantizer(rows)
    found = quantizer.eval()(rows)
    errors = []
    for count in range(1, 4):
        indices = torch.where(torch.arange(3) < count, found.indices, -1)
        errors.append((quantizer.lookup(indices) - rows).square().mean().item())
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(quantizer.lookup(found.indices), found.quantized)
    assert found.commitment.item() == pytest.approx(sum(errors) / 3, rel=1e-5)


def test_one_level_is_the_plain_quantizer() -> None:
    rows = torch.randn(30, 4, requires_grad=True)
    residual = ResidualVectorQuantizer(8, 4, 1, dropout=1.0)
    plain = VectorQuantizerEMA(8, 4, seed=1009)
    plain.load_state_dict(residual.levels[0].state_dict())
    for _ in range(3):
        first, second = residual(rows), plain(rows)
    assert torch.equal(first.quantized, second.quantized)
    assert torch.equal(first.indices.squeeze(-1), second.indices)
    assert first.commitment == second.commitment
    assert torch.equal(residual.levels[0].codes, plain.codes)


def test_the_gradient_passes_once_however_many_levels_there_are() -> None:
    rows = torch.randn(10, 4, requires_grad=True)
    ResidualVectorQuantizer(8, 4, 3)(rows).quantized.sum().backward()
    assert torch.equal(rows.grad, torch.ones(10, 4))


def test_levels_that_are_dropped_are_neither_used_nor_trained() -> None:
    quantizer = ResidualVectorQuantizer(8, 4, 3, dropout=1.0)
    seen = set()
    for _ in range(8):
        before = [state(level) for level in quantizer.levels]
        found = quantizer(torch.randn(20, 4))
        active = int((found.indices[0] >= 0).sum())
        assert (found.indices[:, active:] == -1).all()
        assert (found.perplexity[active:] == 0).all()
        changed = [not same(old, state(level)) for old, level in zip(before, quantizer.levels)]
        assert changed == [True] * active + [False] * (3 - active)
        seen.add(active)
    assert seen == {1, 2, 3}
    assert (quantizer.eval()(torch.randn(20, 4)).indices >= 0).all()


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes must be >= 1, got 0"),
        ({"dim": 0}, "dim must be >= 1, got 0"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"reset_below": -1.0}, r"reset_below must be in \[0, 1\], got -1.0"),
        ({"reset_below": 1.5}, r"reset_below must be in \[0, 1\], got 1.5"),
        ({"start": "zeros"}, "start must be .* got 'zeros'"),
    ],
)
def test_bad_sizes_are_named(options: dict[str, Any], message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantizerEMA(**({"num_codes": 4, "dim": 3} | options))


def test_bad_calls_are_named(as_users_call: None) -> None:
    quantizer = VectorQuantizerEMA(4, 3)
    with pytest.raises(ValueError, match=r"inputs must have width 3, got shape \(2, 4\)"):
        quantizer(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"valid must have shape \(2,\), got \(3,\)"):
        quantizer(torch.randn(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="inputs must be finite, got NaN or infinity"):
        quantizer.nearest(torch.tensor([[0.0, torch.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"indices must be in \[-1, 4\), got 0 to 4"):
        quantizer.lookup(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"indices must have 3 levels last, got \(2, 2\)"):
        ResidualVectorQuantizer(4, 3, 3).lookup(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="levels must be >= 1, got 0"):
        ResidualVectorQuantizer(4, 3, 0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\], got 2.0"):
        ResidualVectorQuantizer(4, 3, dropout=2.0)
