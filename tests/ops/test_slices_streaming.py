"""Facts about the streaming of sliced statistics: exact in any blocks, lean, one exchange between processes, whole for the compiler."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coloss.ops import characteristic, epps_pulley, frequencies, random_directions, sliced_statistic


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(x: Tensor, t_max: float = 3.0, knots: int = 17) -> Tensor:
    """The definition, with a tensor of (..., samples, slices, knots), for autograd to differentiate."""
    t = torch.linspace(0, t_max, knots, dtype=x.dtype)
    normal = torch.exp(-(t**2) / 2)
    weight = torch.full_like(t, 2 * t_max / (knots - 1))
    weight[[0, -1]] /= 2
    angles = x.unsqueeze(-1) * t
    distance = (angles.cos().mean(-3) - normal) ** 2 + angles.sin().mean(-3) ** 2
    return x.shape[-2] * (distance * normal * weight).sum(-1)


def gradient_of(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return torch.autograd.grad((value * weight).sum(), inputs)


def allocations(work) -> tuple[int, int]:
    """The largest single allocation of some work and the peak of what it held, in bytes."""
    work()
    with torch.profiler.profile(profile_memory=True) as profile:
        result = work()
    sizes = [
        event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    assert sizes
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    del result
    return max(sizes), peak


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(2, 40),
    st.floats(0.5, 6),
    st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
)
def test_value_and_gradient_are_those_of_the_definition(batch, samples, slices, knots, t_max, scale):
    x = (scale * randn(*batch, samples, slices)).requires_grad_()
    value, expected = epps_pulley(x, t_max, knots), plain(x, t_max, knots)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient_of(value, x), gradient_of(expected, x), rtol=1e-9, atol=1e-9)


@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from([8, 64, 500]),
    st.booleans(),
)
@settings(max_examples=25)
def test_neither_chunks_nor_blocks_change_anything(sets, samples, slices, chunk_size, entries, of_directions):
    z = randn(sets, samples, 4).requires_grad_()
    directions = random_directions(4, slices, dtype=torch.float64).requires_grad_(of_directions)
    inputs = (z, directions) if of_directions else (z,)
    expected = plain(z @ directions, 2.0, 8).mean()
    with pytest.MonkeyPatch.context() as patch:
        # From a column of one sample at a time to all in one block.
        patch.setattr(frequencies, "_BLOCK_ENTRIES", entries)
        patch.setattr(characteristic, "_CHUNK_ENTRIES", entries)
        value = sliced_statistic(z, directions, partial(epps_pulley, t_max=2.0, knots=8), chunk_size)
        columns = epps_pulley(z @ directions, 2.0, 8)
        bare = epps_pulley((z @ directions).detach(), 2.0, 8)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(columns, plain(z @ directions, 2.0, 8), rtol=1e-10, atol=1e-10)
    assert torch.equal(bare, columns)
    wanted = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(columns.mean(), inputs), wanted, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 80))
def test_every_frequency_is_reached_from_the_products_of_two_factors(steps):
    maps = frequencies.FrequencyMaps.of(3 / steps, steps)
    angles = 7 * randn(3, 11)
    factors = frequencies.Factors(angles, 3, 11, maps.small, maps.large)
    factors.fill(angles)
    products = angles.new_zeros(3, 2 * maps.small + 1, maps.large)
    factors.add_products(products)
    frequency = torch.arange(1, steps + 1, dtype=torch.float64).view(-1, 1, 1)
    expected = torch.cat([(frequency * angles).cos().sum(-1), (frequency * angles).sin().sum(-1)])
    found = products.flatten(1) @ torch.from_numpy(maps.to_deviations.copy())
    torch.testing.assert_close(found.T, expected, rtol=0, atol=1e-10)
    assert (products[:, -1, 1] == 11).all()
    assert maps.to_deviations.shape[0] < 4 * steps + 12


@pytest.mark.parametrize("centre", [0.0, math.pi, math.pi / 2, 1.0])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
def test_factors_in_float32_are_off_by_a_few_roundings_near_every_angle(centre, spread):
    angles = (centre + spread * randn(1, 4000)).float()
    factors = frequencies.Factors(angles, 1, 4000, 4, 4)
    factors.fill(angles)
    frequency = torch.tensor([1, 1, 2, 2, 3, 3, 4, 4, 0, 8, 12]).view(-1, 1)
    exact = (frequency * angles.double()).cos()
    exact[0:8:2] = (frequency[0:8:2] * angles.double()).sin()
    # In roundings of 1. The recurrence over 2 cos(a) is off by a hundred at 12 a, near 0 and pi.
    error = (factors._matrix[0].double() - exact).abs().amax(1) / 2**-24
    assert (error <= 3 * frequency.flatten().clamp(min=1)).all()
    if spread < 1 and centre in (0.0, math.pi):
        assert error.max() < 2


@pytest.mark.parametrize("reach", [3.0, 100.0, 1000.0])
def test_in_float32_the_walk_is_as_exact_as_separate_cosines(reach):
    x = (reach * (2 * torch.rand(2000, 40, dtype=torch.float64) - 1)).float()
    exact, separate, walked = plain(x.double()), plain(x), epps_pulley(x)
    error, reference = ((found.double() - exact).abs().max() for found in (walked, separate))
    assert error <= max(4 * reference, 2e-4 * exact.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_columns_are_those_of_float32(dtype):
    x = randn(300, 4).to(dtype).requires_grad_()
    value = epps_pulley(x)
    assert value.dtype == torch.float32
    assert torch.equal(value, epps_pulley(x.float()))
    value.sum().backward()
    assert x.grad.dtype == dtype
    wide = x.detach().float().requires_grad_()
    epps_pulley(wide).sum().backward()
    assert torch.equal(x.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 5, 4), (1, 4)])
def test_no_samples_no_sets_and_one_sample(shape):
    z = randn(*shape).requires_grad_()
    directions = random_directions(4, 6, dtype=torch.float64)
    value = sliced_statistic(z, directions)
    value.backward()
    assert z.grad.shape == shape
    expected = plain(z.detach() @ directions).mean() if z.numel() else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(value.detach(), expected)
    assert z.grad.isfinite().all()


def test_layout_of_the_inputs_does_not_matter():
    z, directions = randn(6, 30).T, random_directions(6, 10, dtype=torch.float64).T.contiguous().T
    expected = sliced_statistic(z.contiguous(), directions.contiguous())
    torch.testing.assert_close(sliced_statistic(z, directions), expected)
    wide = randn(30, 2, 9)
    x = wide[:, :, ::3].transpose(0, 1)
    torch.testing.assert_close(epps_pulley(x), epps_pulley(x.contiguous()))


def test_sliced_statistic_allocates_its_gradient_and_what_a_cache_holds(saved_tensors):
    samples, dim, slices = 1500, 16, 2000
    z, directions = randn(samples, dim, dtype=torch.float32).requires_grad_(), random_directions(dim, slices)
    cache = 4 * max(characteristic._CHUNK_ENTRIES, 16 * frequencies._BLOCK_ENTRIES * torch.get_num_threads())
    with saved_tensors() as kept:
        value = sliced_statistic(z, directions)
        assert kept.numel == z.numel()  # its gradient, ready made
    value.backward()
    largest, peak = allocations(lambda: torch.autograd.grad(sliced_statistic(z, directions), z))
    assert largest <= cache < 4 * samples * slices
    assert peak <= 3 * cache
    # A chunk of the user's is kept to: 40 slices, and at most 16 factors of each of their samples.
    small = 4 * 17 * 40 * samples
    _, peak = allocations(lambda: torch.autograd.grad(sliced_statistic(z, directions, chunk_size=40), z))
    assert peak <= small + 4 * (4 * z.numel() + 150 * slices + directions.numel())


def test_columns_cost_their_gradient_and_what_a_cache_holds(saved_tensors):
    x = randn(4000, 300, dtype=torch.float32).requires_grad_()
    with saved_tensors() as kept:
        value = epps_pulley(x)
        assert kept.numel == x.numel()
    del value
    largest, _ = allocations(lambda: torch.autograd.grad(epps_pulley(x).sum(), x))
    assert largest <= 4 * x.numel()
    with torch.no_grad():
        _, peak = allocations(lambda: epps_pulley(x))
    assert peak <= 4 * (
        characteristic._CHUNK_ENTRIES + 17 * frequencies._BLOCK_ENTRIES * torch.get_num_threads()
    )


@given(st.integers(1, 5000), st.integers(0, 10**7), st.integers(1, 4096))
def test_default_chunks_hold_a_bounded_number_of_projections(slices, samples, dim):
    size = characteristic.default_chunk_size(slices, samples, dim)
    assert 1 <= size <= slices
    assert size == 1 or size * samples <= max(characteristic._CHUNK_ENTRIES, samples * dim // 8)


@pytest.fixture
def exchanges(monkeypatch) -> list[int]:
    """Two processes with the same rows: every exchange doubles. Sizes of what was exchanged."""
    seen: list[int] = []

    def all_reduce(x: Tensor) -> None:
        seen.append(x.numel())
        x.mul_(2)

    for module in (characteristic, frequencies):
        monkeypatch.setattr(module, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return seen


def test_processes_exchange_once_forward_and_once_backward(exchanges):
    z, directions = randn(20, 6).requires_grad_(), random_directions(6, 32, dtype=torch.float64)
    value = sliced_statistic(z, directions, chunk_size=5)
    assert len(exchanges) == 1
    assert exchanges[0] <= 32 * 3 * 17
    twice = torch.cat([z, z])
    expected = plain(twice @ directions).mean()
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, z)
    assert len(exchanges) == 2
    # Each process weighs the statistic with 1; its own rows take half of what both copies take.
    (joined,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, 2 * joined / 2)


def test_columns_exchange_once_forward_and_once_backward(exchanges):
    x = randn(2, 20, 6).requires_grad_()
    value = epps_pulley(x)
    torch.testing.assert_close(value, plain(torch.cat([x, x], 1)))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    (joined,) = torch.autograd.grad(plain(torch.cat([x, x], 1)).sum(), x)
    torch.testing.assert_close(gradient, joined)
    assert len(exchanges) == 2


@pytest.mark.usefixtures("as_users_call")
def test_the_compiler_takes_both_whole():
    fewer = partial(epps_pulley, t_max=2.0, knots=9)

    def loss(z: Tensor, directions: Tensor) -> Tensor:
        z = torch.tanh(z)
        return (
            sliced_statistic(z, directions) + sliced_statistic(z, directions, fewer) + epps_pulley(z).mean()
        )

    z, directions = randn(2, 20, 5).requires_grad_(), random_directions(5, 8, dtype=torch.float64)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, expected = compiled(z, directions), loss(z, directions)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, z))
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, directions), expected.detach())


@pytest.mark.parametrize("with_gradient", [True, False])
def test_operators_tell_the_compiler_the_truth(with_gradient):
    checks = ("test_schema", "test_faketensor")
    x = randn(2, 6, 3).requires_grad_(with_gradient)
    torch.library.opcheck(characteristic.column_statistic, (x, 0.25, 4, with_gradient), test_utils=checks)
    torch.library.opcheck(
        characteristic.sliced_total,
        (x, randn(3, 5), 0.25, 4, 2, with_gradient, not with_gradient),
        test_utils=checks,
    )


def test_a_partial_with_knots_out_of_range_is_refused():
    with pytest.raises(ValueError, match="knots must be >= 2, got 1"):
        sliced_statistic(torch.ones(4, 3), torch.ones(3, 2), partial(epps_pulley, knots=1))
