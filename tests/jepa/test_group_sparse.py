"""Facts about group lasso, its proximal step, maps with columns that vanish, and Gaussian multi-information."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.jepa import (
    GroupSparseMap,
    ProximalStep,
    activation_group_penalty,
    group_l2_norms,
    group_lasso,
    multi_information_gaussian,
    prox_group_lasso_,
)
from coloss.nn import MLP, ModuleEMA


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prox(weights: Tensor, threshold: float) -> Tensor:
    weights = weights.clone()
    prox_group_lasso_(weights, 0.5, 2 * threshold)
    return weights


def test_a_column_of_length_two_loses_a_half() -> None:
    column = F.normalize(normal(1, 5, 1), dim=1) * 2
    torch.testing.assert_close(prox(column, 0.5), column * 0.75, rtol=0, atol=1e-15)


def test_columns_up_to_the_threshold_become_exactly_zero_and_nothing_else_does() -> None:
    lengths = torch.tensor([0.0, 0.1, 0.4999, 0.5, 0.5001, 3.0])
    weights = F.normalize(normal(2, 4, 6), dim=1) * lengths
    weights[:, :, 3] = torch.tensor([0.5, 0.0, 0.0, 0.0])
    found = prox(weights, 0.5)
    assert (found[0] == 0).all(0).tolist() == [True, True, True, True, False, False]
    torch.testing.assert_close(group_l2_norms(found)[1, 4:], lengths[4:].double() - 0.5)


def test_no_strength_is_the_identity_and_directions_stay() -> None:
    weights = normal(3, 4, 5)
    weights[1, :, 2] = 0
    assert torch.equal(prox(weights, 0.0), weights)
    found = prox(weights, 0.1)
    left = group_l2_norms(found) > 0
    cosines = F.cosine_similarity(found, weights, dim=1)
    torch.testing.assert_close(cosines[left], torch.ones_like(cosines[left]))


def test_one_row_is_soft_thresholding() -> None:
    weights = normal(2, 1, 30)
    torch.testing.assert_close(prox(weights, 0.3), F.softshrink(weights, 0.3), rtol=0, atol=1e-15)


@given(st.integers(0, 10_000), st.floats(0, 3))
@settings(max_examples=25, deadline=None)
def test_it_is_firmly_non_expansive(seed: int, threshold: float) -> None:
    first, second = normal(1, 3, 4, seed=seed), normal(1, 3, 4, seed=seed + 1)
    moved = prox(first, threshold) - prox(second, threshold)
    assert moved.square().sum() <= (moved * (first - second)).sum() + 1e-12


@pytest.mark.parametrize("threshold", [0.2, 1.0, 5.0])
def test_it_solves_its_minimisation(threshold: float) -> None:
    start = normal(4).numpy()

    def value(v: np.ndarray) -> float:
        return 0.5 * ((v - start) ** 2).sum() + threshold * math.sqrt((v**2).sum())

    found = prox(torch.from_numpy(start)[None, :, None], threshold).flatten().numpy()
    best = min(
        (
            minimize(value, x, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000})
        ).fun
        for x in (start, 0.1 * start)
    )
    assert value(found) <= best + 1e-9


def test_nan_is_not_hidden_and_half_precision_stays() -> None:
    weights = torch.full((1, 2, 1), torch.nan)
    prox_group_lasso_(weights, 1.0, 1.0)
    assert weights.isnan().all()
    half = torch.tensor([[[3.0], [4.0]]], dtype=torch.bfloat16)
    prox_group_lasso_(half, 1.0, 2.5)
    assert half.dtype == torch.bfloat16
    assert half.flatten().tolist() == [1.5, 2.0]


def test_the_penalty_scales_and_has_a_gradient_everywhere() -> None:
    weights = normal(2, 3, 4)
    assert group_lasso(-2.5 * weights).item() == pytest.approx(2.5 * group_lasso(weights).item())
    assert group_lasso(weights.bfloat16()).dtype == torch.float32
    torch.autograd.gradcheck(group_lasso, weights.requires_grad_())
    zeros = torch.zeros(2, 3, 4, requires_grad=True)
    group_lasso(zeros).backward()
    assert torch.equal(zeros.grad, torch.zeros(2, 3, 4))


def test_the_gradient_of_the_penalty_never_gives_a_zero_as_the_proximal_step_does() -> None:
    by_gradient, by_prox = normal(1, 3, 8).requires_grad_(), normal(1, 3, 8)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(group_lasso(by_gradient), by_gradient)
        with torch.no_grad():
            by_gradient -= 0.03 * gradient
        prox_group_lasso_(by_prox, 0.03, 1.0)
    assert (group_l2_norms(by_gradient) > 0).all()
    assert (by_prox == 0).all()


def test_groups_of_activations_are_another_penalty() -> None:
    embeddings = normal(5, 6)
    by_hand = sum(
        math.sqrt(4) * float(np.linalg.norm(row[:4])) + math.sqrt(2) * float(np.linalg.norm(row[4:]))
        for row in embeddings.numpy()
    )
    assert activation_group_penalty(embeddings, (4, 2)).item() == pytest.approx(by_hand / 5)
    assert activation_group_penalty(embeddings, [1] * 6).item() == pytest.approx(
        embeddings.abs().sum().item() / 5
    )
    assert activation_group_penalty(embeddings[:0], (4, 2)) == 0
    zeros = torch.zeros(3, 6, requires_grad=True)
    activation_group_penalty(zeros, (4, 2)).backward()
    assert torch.equal(zeros.grad, torch.zeros(3, 6))


def correlated(correlation: float) -> Tensor:
    """Two columns whose sample correlation is exactly that."""
    first, second = torch.linalg.qr(normal(200, 3) - normal(200, 3).mean(0))[0][:, :2].T
    second = correlation * first + math.sqrt(1 - correlation**2) * second
    return torch.stack([3 * first + 7, -0.1 * second], 1)


@pytest.mark.parametrize("correlation", [0.0, 0.3, -0.9])
def test_multi_information_of_two_numbers(correlation: float) -> None:
    expected = -0.5 * math.log(1 - correlation**2)
    assert multi_information_gaussian(correlated(correlation)) == pytest.approx(expected, abs=1e-9)


def test_multi_information_is_the_difference_of_log_determinants_and_zero_between_uncorrelated_groups() -> (
    None
):
    mixed = normal(300, 6) @ normal(6, 6, seed=1)
    covariance = np.cov(mixed.numpy().T)
    blocks = [np.linalg.slogdet(covariance[a:b, a:b])[1] for a, b in ((0, 3), (3, 5), (5, 6))]
    expected = 0.5 * (sum(blocks) - np.linalg.slogdet(covariance)[1])
    assert multi_information_gaussian(mixed, (3, 2, 1)) == pytest.approx(expected)
    basis = torch.linalg.qr(normal(300, 6) - normal(300, 6).mean(0))[0]
    blocks_alone = torch.cat([basis[:, :4] @ normal(4, 4), basis[:, 4:] @ normal(2, 2)], 1)
    assert multi_information_gaussian(blocks_alone, (4, 2)) == pytest.approx(0, abs=1e-9)
    assert multi_information_gaussian(blocks_alone) > 0.1


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_no_linear_map_of_a_group_raises_it_and_none_that_can_be_undone_changes_it(seed: int) -> None:
    mixed = normal(100, 7, seed=seed) @ normal(7, 7, seed=seed + 1)
    first, second = mixed[:, :4], mixed[:, 4:]
    before = multi_information_gaussian(mixed, (4, 3))
    assert before <= multi_information_gaussian(mixed) + 1e-9
    mapped = torch.cat([first @ normal(4, 2, seed=seed + 2), second @ normal(3, 5, seed=seed + 3)], 1)
    assert multi_information_gaussian(mapped, (2, 5)) <= before + 1e-8
    undone = torch.cat([first @ (normal(4, 4, seed=seed + 4) + 3 * torch.eye(4)), 5 - second], 1)
    assert multi_information_gaussian(undone, (4, 3)) == pytest.approx(before, rel=1e-6)


def test_multi_information_where_nothing_or_everything_is_shared() -> None:
    values = normal(50, 3)
    with_constant = torch.cat([values, torch.full((50, 1), 0.1, dtype=torch.float64)], 1)
    assert multi_information_gaussian(with_constant) == pytest.approx(multi_information_gaussian(values))
    twice = torch.cat([values, values[:, :1] * 2], 1)
    assert multi_information_gaussian(twice) == math.inf
    assert multi_information_gaussian(twice[:, [0, 3, 1, 2]], (2, 1, 1)) == pytest.approx(
        multi_information_gaussian(values)
    )
    assert multi_information_gaussian(values[:3]) == math.inf
    assert multi_information_gaussian(values[:1]) == 0
    assert multi_information_gaussian(torch.ones(5, 2)) == 0


def test_a_map_is_that_of_the_definition_group_by_group() -> None:
    sparse = GroupSparseMap(5, (2, 4, 1), width=3, hidden=(6,)).double()
    codes = normal(2, 7, 5)
    found = []
    for group, size in enumerate((2, 4, 1)):
        inner = codes @ sparse.weight[group].T
        inner = F.gelu(inner @ sparse.layers[0][group] + sparse.biases[0][group])
        found.append((inner @ sparse.layers[1][group] + sparse.biases[1][group])[..., :size])
    torch.testing.assert_close(sparse(codes), torch.cat(found, -1))
    torch.testing.assert_close(sparse.influence(), sparse.weight.norm(dim=1).detach())
    assert sparse.penalty().item() == pytest.approx(sparse.influence().sum().item())
    others = [*sparse.layers, *sparse.biases]
    assert sparse.prior().item() == pytest.approx(sum(p.square().sum().item() for p in others) / 2)


def test_a_group_does_not_see_a_latent_whose_column_is_zero() -> None:
    sparse = GroupSparseMap(4, (2, 2), hidden=(3,)).double()
    sparse.weight.data[0, :, 1] = 0
    codes, other = normal(6, 4), normal(6, 4, seed=1)
    other[:, [0, 2, 3]] = codes[:, [0, 2, 3]]
    changed = (sparse(codes) - sparse(other)).abs().amax(0) > 1e-9
    assert changed.tolist() == [False, False, True, True]


def bars() -> Tensor:
    """512 images of 8 x 8 with one lit row and a little noise."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(8, (512,), generator=generator)
    images = F.one_hot(rows, 8).float()[:, :, None].expand(-1, -1, 8)
    return (images + 0.05 * torch.randn(512, 8, 8, generator=generator)).flatten(1)


def learn_bars(strength: float) -> Tensor:
    """Influence of 8 latents on the 8 rows of bars, after training an autoencoder on them."""
    torch.manual_seed(0)
    images = bars()
    encoder = nn.Sequential(MLP(64, (32,), 8, norm=None), nn.LayerNorm(8, elementwise_affine=False))
    decoder = GroupSparseMap(8, [8] * 8, width=4)
    others = [p for p in (*encoder.parameters(), *decoder.parameters()) if p is not decoder.weight]
    adam = torch.optim.Adam(others, lr=1e-2)
    sparse = ProximalStep(torch.optim.SGD([decoder.weight], lr=1.0), [decoder.weight], 1.0, strength)
    for step in range(400):
        batch = images[step % 4 :: 4]
        loss = (decoder(encoder(batch)) - batch).square().mean() + 1e-4 * decoder.prior()
        for optimizer in (adam, sparse):
            optimizer.zero_grad()
        loss.backward()
        adam.step()
        sparse.step()
    return decoder.influence()


def test_known_groups_are_found_with_the_proximal_step_and_not_without() -> None:
    found, dense = learn_bars(8e-3), learn_bars(0.0)
    assert ((found > 0).sum(1) == 1).all()
    assert ((found > 0).sum(0) == 1).all()
    assert (dense > 0).all()
    assert ((dense / dense.sum(1, keepdim=True)).amax(1) < 0.5).all()


@pytest.mark.parametrize("new_optimizer", [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam])
def test_a_proximal_optimizer_takes_the_step_and_then_shortens(new_optimizer) -> None:
    sparse = GroupSparseMap(4, (2, 2))
    twin = GroupSparseMap(4, (2, 2))
    twin.load_state_dict(sparse.state_dict())
    optimizer = ProximalStep(new_optimizer(sparse.parameters(), lr=0.1), [sparse.weight], 0.1, 3.0)
    plain = new_optimizer(twin.parameters(), lr=0.1)

    def loss(network: GroupSparseMap) -> Tensor:
        return network(torch.ones(1, 4)).square().sum()

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(sparse)
        value.backward()
        return value.item()

    assert optimizer.step(closure) == pytest.approx(loss(twin).item())
    loss(twin).backward()
    plain.step()
    assert not torch.equal(sparse.weight, twin.weight)
    twin.prox_step(0.1, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), twin.parameters()))
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    optimizer.load_state_dict(plain.state_dict())


def test_an_average_follows_the_zeros_and_takes_no_proximal_step() -> None:
    sparse = GroupSparseMap(4, (2, 2))
    average = ModuleEMA(sparse, 0.9)
    start = sparse.weight.detach().clone()
    sparse.prox_step(1.0, 100.0)
    average.update()
    assert (sparse.weight == 0).all()
    torch.testing.assert_close(average.module.weight, 0.9 * start)


def test_half_precision_and_autocast() -> None:
    sparse = GroupSparseMap(4, (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sparse(torch.ones(2, 4))
    torch.testing.assert_close(found.float(), sparse(torch.ones(2, 4)), rtol=0.05, atol=0.05)
    assert sparse.bfloat16().prior().dtype == torch.float32
    assert sparse.influence().dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: prox_group_lasso_(torch.ones(1, 2, 3), -1.0, 1.0),
            "step and strength must be finite and >= 0",
        ),
        (
            lambda: prox_group_lasso_(torch.ones(1, 2, 3), 1.0, math.inf),
            "must be finite and >= 0, got 1.0 and inf",
        ),
        (lambda: activation_group_penalty(torch.ones(2, 5), (2, 2)), r"add up to 5, got \(2, 2\)"),
        (lambda: activation_group_penalty(torch.ones(2, 2), (2, 0)), "sizes >= 1"),
        (lambda: multi_information_gaussian(torch.ones(2, 5), (6,)), "add up to 5"),
        (lambda: multi_information_gaussian(torch.full((2, 1), torch.nan)), "embeddings must be finite"),
        (lambda: GroupSparseMap(0, (2,)), "in_dim must be >= 1, got 0"),
        (lambda: GroupSparseMap(2, ()), "groups must be sizes >= 1"),
        (lambda: GroupSparseMap(2, (2,), width=0), "width must be >= 1, got 0"),
        (lambda: GroupSparseMap(2, (2,), hidden=(0,)), "hidden must hold sizes >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_weight_that_decays_is_refused() -> None:
    sparse = GroupSparseMap(4, (2, 2))
    with pytest.raises(InputError, match=r"weight_decay must be 0 .* got 0.01"):
        ProximalStep(torch.optim.AdamW(sparse.parameters()), [sparse.weight], 0.1, 1.0)
    with pytest.raises(InputError, match="number 0 is not"):
        ProximalStep(torch.optim.SGD(sparse.layers.parameters()), [sparse.weight], 0.1, 1.0)
