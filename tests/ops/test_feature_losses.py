import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from coloss.ops import (
    attention_transfer_loss,
    hint_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
    variational_information_loss,
)
from coloss.ops import feature_losses as module

RELATIONS = [similarity_preserving_loss, rkd_distance_loss, rkd_angle_loss]


def vid(student: Tensor, teacher: Tensor) -> Tensor:
    return variational_information_loss(student, teacher, torch.zeros(student.shape[1]).to(student))


ALL = [hint_loss, vid, attention_transfer_loss, *RELATIONS]


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def huber(gap: np.ndarray) -> np.ndarray:
    return np.where(np.abs(gap) < 1, gap**2 / 2, np.abs(gap) - 0.5)


def slow_attention(student: np.ndarray, teacher: np.ndarray) -> float:
    total = 0.0
    for s, t in zip(student, teacher):
        q = [np.mean(part**2, axis=0).ravel() for part in (s, t)]
        q = [part / np.linalg.norm(part) for part in q]
        total += float(((q[0] - q[1]) ** 2).sum())
    return total / len(student)


def slow_similarity(student: np.ndarray, teacher: np.ndarray) -> float:
    grams = []
    for part in (student, teacher):
        rows = part.reshape(len(part), -1)
        gram = rows @ rows.T
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    return float(((grams[0] - grams[1]) ** 2).sum()) / len(student) ** 2


def slow_distance(student: np.ndarray, teacher: np.ndarray) -> float:
    pairs = list(itertools.permutations(range(len(student)), 2))
    found = []
    for part in (student, teacher):
        d = np.array([np.linalg.norm(part[i] - part[j]) for i, j in pairs])
        found.append(d / d.mean())
    return float(huber(found[0] - found[1]).mean())


def slow_angle(student: np.ndarray, teacher: np.ndarray) -> float:
    triples = list(itertools.permutations(range(len(student)), 3))
    found = []
    for part in (student, teacher):
        rows = part.reshape(len(part), -1)
        cosines = []
        for i, j, k in triples:
            a, b = rows[i] - rows[j], rows[k] - rows[j]
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        found.append(np.array(cosines))
    return float(huber(found[0] - found[1]).mean())


@pytest.mark.parametrize(
    ("loss", "slow"),
    [
        (attention_transfer_loss, slow_attention),
        (similarity_preserving_loss, slow_similarity),
        (rkd_distance_loss, slow_distance),
        (rkd_angle_loss, slow_angle),
    ],
)
def test_the_slow_twin_agrees(loss: Callable[..., Tensor], slow: Callable[..., float]) -> None:
    student, teacher = maps(6, 3, 2, 2), maps(6, 5, 2, 2, seed=1)
    assert loss(student, teacher).item() == pytest.approx(slow(student.numpy(), teacher.numpy()), rel=1e-9)


def test_hint_is_the_mean_squared_difference() -> None:
    student, teacher = maps(4, 3, 2, 2), maps(4, 3, 2, 2, seed=1)
    torch.testing.assert_close(hint_loss(student, teacher), (student - teacher).square().mean())


def test_information_with_equal_variances_is_a_scaled_hint() -> None:
    student, teacher = maps(4, 3, 2), maps(4, 3, 2, seed=1)
    raw = torch.full((3,), 0.7, dtype=torch.float64)
    variance = torch.nn.functional.softplus(raw)[0] + 1e-5
    expected = hint_loss(student, teacher) / (2 * variance) + variance.log() / 2
    torch.testing.assert_close(variational_information_loss(student, teacher, raw), expected)


def test_information_is_least_where_the_variance_is_the_mean_squared_error() -> None:
    student, teacher = maps(50, 1), maps(50, 1, seed=1)
    error = (student - teacher).square().mean()
    raw = ((error - 1e-5).exp() - 1).log().view(1).requires_grad_()
    (gradient,) = torch.autograd.grad(variational_information_loss(student, teacher, raw), raw)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [attention_transfer_loss, *RELATIONS])
def test_equal_features_cost_nothing_and_neither_scale_nor_width_is_seen(loss: Callable[..., Tensor]) -> None:
    student = maps(6, 3, 2, 2)
    twice = torch.cat([student, student], 1)
    for teacher in (student, 1e3 * student, 1e-3 * student, twice):
        torch.testing.assert_close(loss(student, teacher), student.new_zeros(()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_relations_do_not_see_shifts_and_rotations(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps(7, 4), maps(7, 4, seed=1)
    turn, _ = torch.linalg.qr(maps(4, 4, seed=2))
    torch.testing.assert_close(loss(student @ turn + 5, teacher), loss(student, teacher))


@pytest.mark.parametrize("loss", [attention_transfer_loss, *RELATIONS])
def test_the_order_of_samples_does_not_matter(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps(7, 4, 2), maps(7, 3, 2, seed=1)
    order = torch.randperm(7)
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))


def test_angles_of_a_line_and_a_right_triangle_by_hand() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # At the three vertices: 1, -1, 1 on the line; 0, 1 / sqrt 2, 1 / sqrt 2 at the corner.
    half = 0.5**0.5
    expected = (0.5 + (1 + half - 0.5) + (1 - half) ** 2 / 2) / 3
    assert rkd_angle_loss(line, corner).item() == pytest.approx(expected)


def test_angles_survive_a_large_common_offset_in_float32() -> None:
    student, teacher = maps(8, 4), maps(8, 4, seed=1)
    found = rkd_angle_loss((student + 1000).float(), teacher.float())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(rkd_angle_loss(student, teacher).item(), rel=1e-3)


def test_angles_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = maps(9, 4).requires_grad_(), maps(9, 3, seed=1)
    found = []
    for size in (1 << 17, 2 * 81):
        monkeypatch.setattr(module, "_ON_CPU", size)
        loss = rkd_angle_loss(student, teacher)
        found.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(found[0], found[1])


def test_no_tensor_of_all_triples_is_kept_for_the_backward_pass() -> None:
    student, teacher = maps(48, 4).requires_grad_(), maps(48, 3, seed=1)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rkd_angle_loss(student, teacher)
    assert max(kept) <= 48**2


@pytest.mark.parametrize("sizes", [((4, 4), (2, 2)), ((2, 4), (4, 2)), ((3,), (7,))])
def test_attention_of_maps_of_other_sizes_is_that_of_the_pooled_squares(
    sizes: tuple[tuple[int, ...], ...],
) -> None:
    student, teacher = maps(3, 2, *sizes[0]), maps(3, 5, *sizes[1], seed=1)
    size = tuple(min(pair) for pair in zip(*sizes))
    pool = getattr(torch.nn.functional, f"adaptive_avg_pool{len(size)}d")
    pooled = [pool(part.square().mean(1, keepdim=True), size).flatten(1) for part in (student, teacher)]
    unit = [torch.nn.functional.normalize(part, dim=1) for part in pooled]
    expected = (unit[0] - unit[1]).square().sum(1).mean()
    torch.testing.assert_close(attention_transfer_loss(student, teacher), expected)


@pytest.mark.parametrize("loss", ALL)
def test_gradients_are_those_of_finite_differences(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps(4, 2, 2, 2).requires_grad_(), maps(4, 2, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student, teacher))


def test_the_variance_has_the_gradient_of_finite_differences() -> None:
    raw = maps(3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(variational_information_loss, (maps(4, 3, 2), maps(4, 3, 2, seed=1), raw))


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    student, teacher = maps(6, 3, 2, 2, dtype=dtype), maps(6, 3, 2, 2, seed=1, dtype=dtype)
    student.requires_grad_()
    found = loss(student, teacher)
    torch.testing.assert_close(found, loss(student.float(), teacher.float()))
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient.dtype == dtype and bool(gradient.isfinite().all())


@pytest.mark.parametrize("loss", ALL)
def test_autocast_changes_nothing(loss: Callable[..., Tensor]) -> None:
    student, teacher = maps(6, 3, 2, 2).float(), maps(6, 3, 2, 2, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher)
    torch.testing.assert_close(found, loss(student, teacher))


@pytest.mark.parametrize("loss", [attention_transfer_loss, *RELATIONS])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_large_and_small_features_stay_in_range(loss: Callable[..., Tensor], scale: float) -> None:
    student, teacher = maps(6, 3, 2, 2).float(), maps(6, 3, 2, 2, seed=1).float()
    given = (student * scale).requires_grad_()
    found = loss(given, teacher)
    torch.testing.assert_close(found, loss(student, teacher), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(found, given)
    assert bool(gradient.isfinite().all()) and bool((gradient != 0).any())


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_samples_that_all_coincide_have_finite_gradients(loss: Callable[..., Tensor], value: float) -> None:
    student = torch.full((5, 3, 2, 2), value).requires_grad_()
    found = loss(student, maps(5, 3, 2, 2).float())
    (gradient,) = torch.autograd.grad(found, student)
    assert bool(found.isfinite()) and bool(gradient.isfinite().all())


def test_an_empty_map_costs_one_against_another_and_nothing_against_its_like() -> None:
    empty, other = torch.zeros(2, 3, 2, 2), maps(2, 3, 2, 2).float()
    assert attention_transfer_loss(empty, other).item() == pytest.approx(1)
    assert attention_transfer_loss(empty, empty).item() == 0


def test_a_repeated_sample_has_angles_of_zero() -> None:
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    zero = rkd_angle_loss(corner, torch.zeros(4, 2, dtype=torch.float64))
    rows = corner.numpy()
    cosines = []
    for i, j, k in itertools.permutations(range(4), 3):
        a, b = rows[i] - rows[j], rows[k] - rows[j]
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        cosines.append(a @ b / lengths if lengths else 0.0)
    expected = float(huber(np.array(cosines)).mean())
    assert zero.item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_tiny_batches_are_defined(loss: Callable[..., Tensor], rows: int) -> None:
    student = maps(rows, 3, 2, 2).requires_grad_()
    found = loss(student, maps(rows, 3, 2, 2, seed=1))
    (gradient,) = torch.autograd.grad(found, student)
    assert bool(found.isfinite()) and bool(gradient.isfinite().all())
    too_few = {rkd_distance_loss: 2, rkd_angle_loss: 3}.get(loss, 1)
    if rows < too_few:
        assert found.item() == 0


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(loss: Callable[..., Tensor], value: float) -> None:
    for side in range(2):
        parts = [maps(4, 3, 2, 2), maps(4, 3, 2, 2, seed=1)]
        parts[side][1, 1, 0, 0] = value
        assert not bool(loss(*parts).isfinite())


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_named() -> None:
    square, other = torch.zeros(4, 3, 2, 2), torch.zeros(5, 3, 2, 2)
    with pytest.raises(ValueError, match=r"one shape, got \(4, 3, 2, 2\) and \(5, 3, 2, 2\): bring them"):
        hint_loss(square, other)
    with pytest.raises(ValueError, match="one number for each channel"):
        variational_information_loss(square, other, torch.zeros(3))
    for loss in (attention_transfer_loss, *RELATIONS):
        with pytest.raises(ValueError, match="of the same samples, got 4 and 5"):
            loss(square, other)
    for teacher in (torch.zeros(4, 3), torch.zeros(4, 3, 2)):
        with pytest.raises(ValueError, match="student and teacher must be maps"):
            attention_transfer_loss(square, teacher)


@pytest.mark.parametrize("loss", [hint_loss, similarity_preserving_loss, rkd_distance_loss, rkd_angle_loss])
def test_one_number_for_each_sample_is_a_vector_of_length_one(loss: Callable[..., Tensor]) -> None:
    student, teacher = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(loss(student, teacher), loss(student[:, None], teacher[:, None]))


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_a_second_derivative_that_is_not_there_is_refused(loss: Callable[..., Tensor]) -> None:
    student = torch.randn(4, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(student, torch.randn(4, 3)), student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once|not implemented"):
        slope.square().sum().backward()
