"""The latent prediction loss: distances by hand, tokens that do not count, nothing to predict, extreme values."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor

from coloss.ops import latent_prediction_loss

KINDS = ("l1", "smooth_l1", "mse", "cosine")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("l1", (3 + 0.5) / 4),
        ("smooth_l1", (2.5 + 0.125) / 4),
        ("mse", (9 + 0.25) / 4),
        ("cosine", (1 + 0.2) / 2),
    ],
)
def test_values_by_hand(kind: str, value: float) -> None:
    # cos([0, 3], [0, 0]) counts as 0, and [3, 4] with [3, 4.5] is replaced below by an angle of cosine 0.8.
    prediction, target = torch.tensor([[0.0, 3.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    if kind == "cosine":
        prediction[1], target[1] = torch.tensor([2.0, 0.0]), torch.tensor([4.0, 3.0])
    assert latent_prediction_loss(prediction, target, kind).item() == pytest.approx(value)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_if_and_only_if_equal(kind: str) -> None:
    target = torch.randn(3, 4, 5, dtype=torch.float64)
    assert latent_prediction_loss(target, target, kind).item() == pytest.approx(0, abs=1e-12)
    assert latent_prediction_loss(target + torch.randn(5), target, kind).item() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_definition(kind: str) -> None:
    prediction = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 3, 4, dtype=torch.float64)
    valid = torch.rand(2, 3) < 0.6
    assert torch.autograd.gradcheck(
        lambda p: latent_prediction_loss(p, target, kind, "layer", valid), prediction
    )


def test_gradient_of_l1_is_the_sign_over_the_number_of_entries() -> None:
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    target = torch.randn(2, 3, 4)
    latent_prediction_loss(prediction, target, "l1").backward()
    torch.testing.assert_close(prediction.grad, (prediction.detach() - target).sign() / 24)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_keeps_its_graph_for_who_wants_it(kind: str) -> None:
    prediction, target = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    latent_prediction_loss(prediction, target, kind).backward()
    assert target.grad.abs().max() > 0


def test_cosine_does_not_see_scale_however_large_or_small() -> None:
    prediction, target = torch.randn(6, 4), torch.randn(6, 4)
    plain = latent_prediction_loss(prediction, target, "cosine")
    assert plain.item() == pytest.approx(1 - F.cosine_similarity(prediction, target).mean().item())
    for scale in (1e-30, 1e30):
        found = latent_prediction_loss(scale * prediction, target, "cosine")
        assert found.item() == pytest.approx(plain.item(), abs=1e-6)
    assert 0 <= plain <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_zero_vectors_have_finite_gradients(kind: str) -> None:
    prediction = torch.zeros(2, 3, requires_grad=True)
    latent_prediction_loss(prediction, torch.zeros(2, 3), kind, "layer").backward()
    assert prediction.grad.isfinite().all()


def test_layer_norm_of_targets_forgets_their_shift_and_scale() -> None:
    prediction, target = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    plain = latent_prediction_loss(prediction, target, "smooth_l1", "layer")
    moved = latent_prediction_loss(prediction, 300 * target - 7, "smooth_l1", "layer")
    torch.testing.assert_close(plain, moved, rtol=1e-4, atol=0)
    normed = F.layer_norm(target, (16,))
    torch.testing.assert_close(plain, F.smooth_l1_loss(prediction, normed))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_do_not_count_are_as_if_they_were_not_there(kind: str) -> None:
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    target = torch.randn(2, 3, 4)
    valid = torch.tensor([[True, False, True], [False, False, True]])
    with torch.no_grad():
        prediction[0, 1], target[1, 0] = torch.nan, torch.inf
    loss = latent_prediction_loss(prediction, target, kind, "layer", valid)
    (gradient,) = torch.autograd.grad(loss, prediction)
    kept = latent_prediction_loss(prediction[valid], target[valid], kind, "layer")
    (expected,) = torch.autograd.grad(kept, prediction)
    torch.testing.assert_close(loss, kept)
    torch.testing.assert_close(gradient[valid], expected[valid])
    assert (gradient[~valid] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["no tokens", "none valid"])
def test_nothing_to_predict_is_zero_with_a_graph(kind: str, case: str) -> None:
    shape = (2, 0, 4) if case == "no tokens" else (2, 3, 4)
    prediction = torch.full(shape, torch.nan, requires_grad=True)
    valid = None if case == "no tokens" else torch.zeros(2, 3, dtype=torch.bool)
    loss = latent_prediction_loss(prediction, torch.ones(shape), kind, "layer", valid)
    loss.backward()
    assert loss.item() == 0
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    prediction = (300 * torch.randn(4, 8)).to(dtype).requires_grad_()
    target = (300 * torch.randn(4, 8)).to(dtype)
    loss = latent_prediction_loss(prediction, target, kind)
    assert loss.dtype == torch.float32
    wide = latent_prediction_loss(prediction.detach().float(), target.float(), kind)
    assert loss.item() == pytest.approx(wide.item(), rel=1e-6)
    loss.backward()
    assert prediction.grad.isfinite().all()


def test_processes_with_different_numbers_of_tokens_average_to_the_mean_over_all(tmp_path: Path) -> None:
    def work(fabric: Fabric) -> dict[str, Tensor]:
        prediction, target = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 3).double()
        valid = torch.rand(4, 5) < torch.tensor([0.9, 0.9, 0.2, 0.2])[:, None]
        rows = slice(None)
        if fabric.world_size > 1:
            rows = slice(2 * fabric.global_rank, 2 * fabric.global_rank + 2)
        loss = latent_prediction_loss(prediction[rows], target[rows], "l1", valid=valid[rows])
        return {"loss": fabric.all_reduce(loss, reduce_op="mean")}

    check_two_processes(work, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "huber"}, "kind must be one of l1, smooth_l1, mse, cosine, got 'huber'"),
        ({"target_norm": "batch"}, "target_norm must be \"layer\" or None, got 'batch'"),
        ({"target": torch.zeros(2, 4)}, r"must have one shape, got \(2, 3\) and \(2, 4\)"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"valid must be \(2,\), got \(3,\)"),
    ],
)
def test_bad_input_is_refused(changes: dict, message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        latent_prediction_loss(**({"prediction": torch.zeros(2, 3), "target": torch.zeros(2, 3)} | changes))
