"""Unrolled SGD: equal to torch's optimizer, differentiable in data, rate and start, and the same when steps are computed again."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.train import FlatParameters, unroll


def squares(theta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return 0.5 * (x @ theta - y).square().mean()


def problem(steps: int = 4) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    start = torch.randn(3, dtype=torch.float64)
    return start, [
        (torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)) for _ in range(steps)
    ]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_path_is_that_of_torch_sgd(momentum: float) -> None:
    start, batches = problem()
    path = unroll(start, squares, batches, 0.1, momentum=momentum)
    theta = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=momentum)
    for batch, ours in zip(batches, path[1:], strict=True):
        optimizer.zero_grad()
        squares(theta, batch).backward()
        optimizer.step()
        torch.testing.assert_close(ours, theta.detach(), rtol=1e-12, atol=1e-12)


def test_one_step_of_a_linear_regression_has_the_gradient_worked_by_hand() -> None:
    # theta_1 = theta - a (x theta - y) x for one sample: d(w theta_1)/dx_j = -a w.(theta_j x + (x theta - y) e_j)
    theta, w = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y, rate = (
        torch.tensor(0.7, dtype=torch.float64),
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
    )
    end = unroll(theta, lambda t, _: 0.5 * (x @ t - y).square(), [None], rate)[-1]
    found, of_rate = torch.autograd.grad(w @ end, [x, rate])
    with torch.no_grad():
        residual = x @ theta - y
        torch.testing.assert_close(found, -rate * ((w @ x) * theta + residual * w), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_rate, -residual * (w @ x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_equal_finite_differences(checkpoint: bool) -> None:
    start, batches = problem(3)
    x, rate = batches[0][0].requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def end(start: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        given = [(x, batches[0][1]), *batches[1:]]
        return unroll(start, squares, given, rate, momentum=0.5, checkpoint=checkpoint)[-1]

    assert torch.autograd.gradcheck(end, (start.requires_grad_(), x, rate))


def test_steps_computed_again_give_the_same_bits_and_keep_less() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
    flat = FlatParameters(model)
    images = torch.randn(40, 6, requires_grad=True)
    targets = torch.arange(40) % 3
    found, kept = [], []
    for checkpoint in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            path = unroll(
                flat.vector(),
                lambda theta, _: F.cross_entropy(flat(theta, images), targets),
                range(5),
                0.5,
                momentum=0.9,
                checkpoint=checkpoint,
            )
            loss = path[-1].square().sum()
        kept.append(sum(sizes))
        found.append(torch.autograd.grad(loss, images)[0])
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0
    assert kept[1] < 0.2 * kept[0]


def test_truncation_leaves_values_and_lets_the_last_steps_alone_pass_gradients() -> None:
    start, batches = problem(4)
    inputs = [x.requires_grad_() for x, _ in batches]
    whole, cut = (unroll(start, squares, batches, 0.1, truncate=steps)[-1] for steps in (None, 2))
    assert torch.equal(whole, cut)
    of_whole = torch.autograd.grad(whole.sum(), inputs)
    of_cut = torch.autograd.grad(cut.sum(), inputs, allow_unused=True)
    assert [g is None for g in of_cut] == [True, True, False, False]
    torch.testing.assert_close(of_cut[2:], of_whole[2:])
    assert torch.equal(unroll(start, squares, batches, 0.1, truncate=9)[-1], whole)


def test_tensors_by_name_walk_as_a_vector_does_and_no_grad_leaves_no_graph() -> None:
    model = nn.Linear(3, 2)
    flat = FlatParameters(model)
    x = torch.randn(4, 3)
    by_vector = unroll(flat.vector(), lambda t, _: flat(t, x).square().sum(), range(2), 0.1)[-1]
    named = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        by_name = unroll(
            named,
            lambda t, _: torch.func.functional_call(model, t, (x,)).square().sum(),
            range(2),
            0.1,
        )[-1]
    assert not by_name["weight"].requires_grad
    torch.testing.assert_close(flat.unflatten(by_vector.detach()), by_name)


def test_an_unused_parameter_stays_and_autocast_has_no_say() -> None:
    start = {"used": torch.ones(2, 2), "unused": torch.ones(2)}
    x = torch.full((2, 2), 1 / 3)
    loss = lambda t, _: (x @ t["used"]).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = unroll(start, loss, [0], 1.0)[-1]
    outside = unroll(start, loss, [0], 1.0)[-1]
    assert torch.equal(inside["used"], outside["used"])
    assert torch.equal(inside["unused"], start["unused"])


def test_no_steps_give_the_start_and_bad_values_are_named() -> None:
    start = torch.ones(2)
    assert unroll(start, squares, [], 0.1) == [start]
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        unroll(start, squares, [], 0.1, momentum=1.0)
    with pytest.raises(ValueError, match="truncate must be >= 1, got 0"):
        unroll(start, squares, [], 0.1, truncate=0)


def test_a_vector_round_trips_and_shared_or_frozen_parameters_count_once_or_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    flat = FlatParameters(model)
    assert flat.names == ("0.weight", "2.bias")
    assert flat.size == 12
    vector, x = torch.randn(12), torch.randn(2, 3)
    before = flat.vector()
    given = flat(vector, x)
    assert torch.equal(flat.vector(), before)
    flat.load(vector)
    assert torch.equal(flat.vector(), vector)
    torch.testing.assert_close(model(x), given)


def test_models_and_vectors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="model must have a trainable parameter, got none"):
        FlatParameters(nn.ReLU())
    with pytest.raises(ValueError, match="parameters must be of one type on one device"):
        FlatParameters(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double()))
    with pytest.raises(ValueError, match=r"vector must have shape \(2,\), got \(3,\)"):
        FlatParameters(nn.Linear(1, 1)).unflatten(torch.ones(3))
