"""Facts about VICReg: the published formula, its limits, and the method in every loop."""

from functools import partial
from pathlib import Path

import pytest
import torch
from contract import check_loops, check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor, nn

import coloss
from coloss.errors import InputError
from coloss.jepa import VICReg, vicreg_terms
from coloss.nn import MLP

SMALL = {"projector": (8, 4), "view": lambda inputs, generator: torch.stack([inputs, 1.3 * inputs])}


def published(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """The two-view formula, written out view by view."""
    covariance, variance = torch.zeros(()), torch.zeros(())
    for z in (first, second):
        c = torch.cov(z.T)
        covariance = covariance + (c - torch.diag(c.diagonal())).square().sum() / z.shape[1]
        variance = variance + (1 - (z.var(0) + 1e-4).sqrt()).relu().mean() / 2
    return {
        "invariance": nn.functional.mse_loss(first, second),
        "variance": variance,
        "covariance": covariance,
    }


def test_two_views_give_the_published_values_and_gradients() -> None:
    views = torch.randn(2, 10, 5, dtype=torch.float64).mul(0.7).requires_grad_()
    found, expected = vicreg_terms(views), published(*views)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.to(found[name]))
        one, other = (torch.autograd.grad(v, views, retain_graph=True)[0] for v in (found[name], value))
        torch.testing.assert_close(one, other)


def test_more_views_of_the_same_kind_do_not_change_the_weights() -> None:
    views = torch.randn(2, 10, 5)
    found, doubled = vicreg_terms(views), vicreg_terms(views.repeat(2, 1, 1))
    for name in ("variance", "covariance"):
        torch.testing.assert_close(found[name], doubled[name])
    # Of the 6 pairs among 4 views, 2 are equal.
    torch.testing.assert_close(doubled["invariance"], found["invariance"] * 4 / 6)


def test_limits() -> None:
    collapsed = vicreg_terms(torch.ones(2, 6, 3))
    assert collapsed["invariance"] == collapsed["covariance"] == 0
    assert collapsed["variance"].item() == pytest.approx(0.99)
    half = vicreg_terms(torch.randn(2, 6, 3).bfloat16())
    assert all(value.dtype == torch.float32 and value.isfinite() for value in half.values())
    whitened = 2 * torch.linalg.qr(torch.randn(50, 4)).Q * 50**0.5
    whitened = whitened - whitened.mean(0)
    assert vicreg_terms(whitened.expand(2, 50, 4))["variance"] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vicreg_terms(torch.ones(1, 4, 2)), "at least 2 views of 2 samples, got 1 of 4"),
        (lambda: vicreg_terms(torch.ones(2, 1, 2)), "at least 2 views of 2 samples, got 2 of 1"),
        (lambda: vicreg_terms(torch.ones(2, 4, 2), eps=0.0), "eps must be > 0, got 0.0"),
        (lambda: VICReg(views=1), "views must be >= 2, got 1"),
        (lambda: VICReg(covariance=-1.0), "covariance must be >= 0, or a schedule, got -1.0"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises((ValueError, InputError), match=message):
        call()


def test_every_loop_takes_the_same_steps() -> None:
    batches = [(torch.randn(8, 6),) for _ in range(3)]
    check_loops(lambda: MLP(6, [5], 4, norm=None), lambda: VICReg(**SMALL), batches)


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resume(
        lambda: MLP(6, [5], 4),
        lambda: VICReg(invariance=1.0, variance=1.0, **SMALL),
        (torch.randn(40, 6),),
        tmp_path,
    )


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    def train(fabric: Fabric) -> dict[str, Tensor]:
        model = MLP(6, [5], 4, norm=None).double()
        coloss.fit(
            model,
            (torch.randn(48, 6, dtype=torch.float64),),
            methods=[VICReg(**SMALL)],
            batch_size=16,
            budget=coloss.Budget(epochs=3),
            optimizer=partial(torch.optim.SGD, lr=0.01),
            fabric=fabric,
        )
        return dict(model.state_dict())

    check_two_processes(train, tmp_path)


def test_without_variance_and_covariance_it_collapses_and_with_them_not() -> None:
    found = {}
    for weight in (0.0, 25.0):
        torch.manual_seed(0)
        method = VICReg(variance=weight, covariance=weight / 25, projector=(16, 8))
        data = torch.rand(128, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        run = coloss.fit(MLP(64, [32], 16), (data,), methods=[method], budget=coloss.Budget(steps=60))
        found[weight] = method.report(run.model, coloss.data.IndexedDataset(data))
    assert found[25.0]["embedding_scale"] > 1.5 * found[0.0]["embedding_scale"]
    assert found[25.0]["embedding_rankme"] > found[0.0]["embedding_rankme"]
