"""Facts about edits of gradients, on their way and between two losses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import (
    first_order_only,
    gradient_cosine,
    project_conflicting,
    reverse_gradient,
    scale_gradient,
    straight_through,
    surrogate_gradient,
)


def gradients(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(4, 3), (7,), (2, 2, 2)]
    ]


def flat(parts: list[torch.Tensor | None], like: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate(
        [
            (torch.zeros_like(shape) if part is None else part).double().numpy().ravel()
            for part, shape in zip(parts, like)
        ]
    )


def test_straight_through_has_the_hard_value_exactly_and_the_soft_gradient():
    x = torch.tensor([0.1, 1e8, -3.7, 1e-30], requires_grad=True)
    hard = torch.tensor([1.0, 3.0, -math.inf, 0.2])
    y = straight_through(hard, x.sin())
    assert torch.equal(y, hard)
    y[:2].sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 1.0, 0.0, 0.0]) * x.detach().cos())


def test_straight_through_gives_the_hard_side_no_gradient():
    x = torch.ones(3, requires_grad=True)
    straight_through(2 * x, 5 * x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 5.0))


def test_straight_through_of_the_surrogate_itself_is_the_identity():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: straight_through(v.detach(), v**1), (x,)) is True


def test_scaling_by_one_changes_nothing_and_by_zero_stops():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    for factor, expected in ((1.0, [4.0, 6.0]), (0.0, [0.0, 0.0]), (-2.0, [-8.0, -12.0])):
        (gradient,) = torch.autograd.grad(scale_gradient(x, factor).square().sum(), x)
        assert gradient.tolist() == expected
    assert torch.equal(scale_gradient(x, 0.3), x)


def test_reversing_twice_is_the_identity():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(reverse_gradient(reverse_gradient(x)).square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach())


def test_a_scaled_gradient_is_scaled_again_in_the_second_derivative():
    x = torch.tensor(2.0, requires_grad=True)
    (first,) = torch.autograd.grad(scale_gradient(x, 0.5) ** 3, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert first.item() == 0.5 * 3 * 4
    assert second.item() == 0.25 * 6 * 2  # one factor for each pass through the scaled tensor


def test_batched_gradients_pass_through():
    x = torch.randn(3, requires_grad=True)
    y = straight_through(x.detach().round(), reverse_gradient(x, 2.0))
    (batched,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(batched, -2 * torch.eye(3))


@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_cosine_equals_numpys_and_ignores_scale(seed, scale):
    first, second = gradients(seed), gradients(seed + 1)
    a, b = flat(first, first), flat(second, second)
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert gradient_cosine(first, second).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert gradient_cosine([scale * g for g in first], second).item() == pytest.approx(
        expected, rel=1e-5, abs=1e-7
    )


def test_cosine_of_known_pairs():
    g = gradients(0)
    assert gradient_cosine(g, g).item() == pytest.approx(1.0)
    assert gradient_cosine(g, [-x for x in g]).item() == pytest.approx(-1.0)
    assert gradient_cosine([g[0], None, None], [None, g[1], None]) == 0
    assert gradient_cosine([None, None], [None, None]) == 0
    assert gradient_cosine([], []) == 0
    assert gradient_cosine([torch.zeros(3)], [torch.ones(3)]) == 0


def test_cosine_of_huge_and_tiny_gradients():
    huge, tiny = torch.full((8,), 1e30), torch.full((8,), 1e-30)
    assert gradient_cosine([huge], [tiny]).item() == pytest.approx(1.0)
    half = torch.full((100_000,), 200.0, dtype=torch.float16)
    assert gradient_cosine([half], [-half]).item() == pytest.approx(-1.0)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_projection_removes_conflict_exactly_and_nothing_else(seed):
    main, auxiliary = gradients(seed), gradients(seed + 1)
    merged, conflicted = project_conflicting(main, auxiliary)
    g1, g2 = flat(main, main), flat(auxiliary, main)
    changed = flat(merged, main) - g1
    assert bool(conflicted) == (g1 @ g2 < 0)
    if conflicted:
        np.testing.assert_allclose(changed, g2 - (g1 @ g2) / (g1 @ g1) * g1, rtol=1e-9, atol=1e-12)
        assert abs(g1 @ changed) < 1e-12 * np.linalg.norm(g1) * np.linalg.norm(g2)
    else:
        np.testing.assert_allclose(changed, g2, rtol=1e-9, atol=1e-12)


def test_projection_by_hand():
    merged, conflicted = project_conflicting([torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 5.0])])
    assert conflicted
    assert merged[0].tolist() == [2.0, 5.0]
    merged, conflicted = project_conflicting([torch.tensor([2.0, 0.0])], [torch.tensor([1.0, 5.0])])
    assert not conflicted
    assert merged[0].tolist() == [3.0, 5.0]


def test_opposite_gradients_leave_the_main_one():
    main = gradients(0)
    merged, conflicted = project_conflicting(main, [-3 * g for g in main])
    assert conflicted
    np.testing.assert_allclose(flat(merged, main), flat(main, main), atol=1e-12)


def test_disjoint_supports_are_left_alone():
    main, auxiliary = gradients(0), gradients(1)
    merged, conflicted = project_conflicting([main[0], None, None], [None, auxiliary[1], None])
    assert not conflicted
    assert torch.equal(merged[0], main[0])
    assert torch.equal(merged[1], auxiliary[1])
    assert merged[2] is None


def shared_and_own() -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """A shared backbone in conflict, a head of the main loss, a head of the auxiliary one."""
    backbone, main_head, auxiliary_head = gradients(3)
    return [backbone, main_head, None], [-2 * backbone + 0.1, None, auxiliary_head]


def test_over_all_also_lengthens_the_step_of_the_main_head():
    main, auxiliary = shared_and_own()
    merged, conflicted = project_conflicting(main, auxiliary, over="all")
    g1 = flat(main, gradients(3))
    g2 = flat(auxiliary, gradients(3))
    coefficient = -(g1 @ g2) / (g1 @ g1)
    assert conflicted
    assert coefficient > 0
    torch.testing.assert_close(merged[1], (1 + coefficient) * main[1])
    assert torch.equal(merged[2], auxiliary[2])
    assert g1 @ (flat(merged, gradients(3)) - g1) == pytest.approx(0, abs=1e-12)


def test_over_shared_leaves_both_heads_alone():
    main, auxiliary = shared_and_own()
    merged, conflicted = project_conflicting(main, auxiliary, over="shared")
    assert conflicted
    assert torch.equal(merged[1], main[1])
    assert torch.equal(merged[2], auxiliary[2])
    assert (main[0] * (merged[0] - main[0])).sum().item() == pytest.approx(0, abs=1e-12)


def test_flags_choose_the_entries_that_take_part():
    main, auxiliary = shared_and_own()
    by_name, _ = project_conflicting(main, auxiliary, over="shared")
    by_flag, _ = project_conflicting(main, auxiliary, over=[True, False, False])
    assert all(torch.equal(a, b) for a, b in zip(by_name, by_flag))
    untouched, conflicted = project_conflicting(main, auxiliary, over=[False, True, True])
    assert not conflicted
    assert torch.equal(untouched[0], main[0] + auxiliary[0])


def test_inputs_are_not_written_to():
    main, auxiliary = shared_and_own()
    project_conflicting(main, auxiliary)
    again = shared_and_own()
    for before, after in zip((*main, *auxiliary), (*again[0], *again[1])):
        assert before is None or torch.equal(before, after)


def test_a_zero_main_gradient_is_no_conflict():
    merged, conflicted = project_conflicting([torch.zeros(3)], [torch.ones(3)])
    assert not conflicted
    assert merged[0].tolist() == [1.0, 1.0, 1.0]
    assert project_conflicting([], [])[0] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_keep_their_type(dtype):
    main, auxiliary = gradients(0, dtype), [-g for g in gradients(0, dtype)]
    merged, conflicted = project_conflicting(main, auxiliary)
    assert conflicted
    for got, expected in zip(merged, main):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected)


def test_float32_projection_is_orthogonal_over_many_unlike_sizes():
    generator = torch.Generator().manual_seed(0)
    main = [torch.randn(20_000, generator=generator), 1e-4 * torch.randn(20_000, generator=generator)]
    auxiliary = [-0.01 * main[0] + torch.randn(20_000, generator=generator), -1e3 * main[1]]
    merged, conflicted = project_conflicting(main, auxiliary)
    g1 = flat(main, main)
    changed = flat(merged, main) - g1
    assert conflicted
    assert abs(g1 @ changed) < 1e-6 * np.linalg.norm(g1) * np.linalg.norm(changed)


def test_projection_holds_one_new_tensor_at_a_time(largest_tensor, monkeypatch):
    monkeypatch.setattr("coloss.ops.gradients._INNER_PRODUCT_BLOCK", 1000)
    main, auxiliary = [torch.ones(300, 100)], [-torch.ones(300, 100)]
    with largest_tensor() as meter:
        gradient_cosine(main, auxiliary)
        flattened = meter.numel
        merged, _ = project_conflicting(main, auxiliary)
    assert flattened <= 30_000  # views of the inputs; the float64 copies are blocks
    torch.testing.assert_close(merged[0], main[0])


class Square(torch.autograd.Function):
    """x squared, with a first derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @first_order_only("square")
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_a_missing_second_derivative_is_an_error_not_a_silent_zero():
    x = torch.tensor(3.0, requires_grad=True)
    (first,) = torch.autograd.grad(Square.apply(x), x, create_graph=True)
    assert first.item() == 6
    penalised = first**2 + x**2  # without the error, backward would return the derivative of x**2 alone
    with pytest.raises(RuntimeError, match="square can be differentiated only once"):
        penalised.backward()


def test_a_graph_that_is_never_differentiated_again_does_no_harm():
    x = torch.tensor(3.0, requires_grad=True)
    (first,) = torch.autograd.grad(Square.apply(x) + x**3, x, create_graph=True)
    assert first.item() == 6 + 27


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_named():
    one, two = [torch.ones(3)], [torch.ones(3), torch.ones(3)]
    with pytest.raises(ValueError, match="surrogate must have the shape"):
        straight_through(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="factor must be finite, got inf"):
        scale_gradient(torch.ones(2), math.inf)
    with pytest.raises(ValueError, match=r"strength must be >= 0 and finite, got -1"):
        reverse_gradient(torch.ones(2), -1.0)
    with pytest.raises(ValueError, match="second must have 1 entries"):
        gradient_cosine(one, two)
    with pytest.raises(ValueError, match=r"auxiliary\[0\] must have the shape \(3,\), got \(4,\)"):
        project_conflicting(one, [torch.ones(4)])
    with pytest.raises(ValueError, match="over must be .* 1 flags"):
        project_conflicting(one, one, over=[True, False])
    with pytest.raises(ValueError, match="over must be .*, got 'some'"):
        project_conflicting(one, one, over="some")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_surrogate_has_the_given_gradient_and_shows_the_given_value(dtype):
    x = torch.tensor([[1.0, -2.0], [0.0, 500.0]], dtype=dtype, requires_grad=True)
    given = torch.tensor([[0.25, -1.0], [1e-3, 2.0]], dtype=torch.float32)
    plain, shown = surrogate_gradient(x, given), surrogate_gradient(x, given, torch.tensor(7.5))
    assert plain.item() == pytest.approx(0.25 + 2 + 1000)
    assert shown.item() == 7.5
    for scalar in (plain, shown):
        assert scalar.dtype in (torch.float32, torch.float64)
        (found,) = torch.autograd.grad(3 * scalar, x)
        torch.testing.assert_close(found, (3 * given).to(dtype))


def test_a_surrogate_holds_the_gradient_and_the_value_constant():
    x, given = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    value = x.square().sum()
    scalar = surrogate_gradient(x, given, value)
    assert torch.equal(scalar, value)
    scalar.backward()
    assert given.grad is None
    torch.testing.assert_close(x.grad, given.detach())
    infinite = surrogate_gradient(torch.tensor([float("inf")], requires_grad=True), torch.zeros(1), value)
    assert torch.equal(infinite, value)


@pytest.mark.usefixtures("as_users_call")
def test_a_surrogate_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"gradient must have the shape \(3,\) of x, got \(2,\)"):
        surrogate_gradient(torch.zeros(3), torch.zeros(2))
