import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coloss.ops import RunningMoments


def draw(samples: int = 40, features: int = 3, classes: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, features, dtype=torch.float64), torch.randint(classes, (samples,))


def assert_equal(first: RunningMoments, second: RunningMoments, tolerance: float = 1e-10) -> None:
    assert torch.equal(first.count, second.count)
    for name in ("mean", "squares"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=tolerance)


def test_the_moments_are_those_of_numpy() -> None:
    features, classes = draw()
    found = RunningMoments.of(features, classes, 5)
    for number in range(4):
        rows = features[classes == number].numpy()
        assert found.count[number] == len(rows)
        np.testing.assert_allclose(found.mean[number], rows.mean(0))
        np.testing.assert_allclose(found.variance()[number], rows.var(0))
        np.testing.assert_allclose(found.variance(correction=1)[number], rows.var(0, ddof=1))
    assert found.count[4] == 0 and found.variance()[4].abs().max() == 0
    centred = features - found.mean[classes]
    torch.testing.assert_close(found.pooled_variance(), centred.square().mean(0))
    torch.testing.assert_close(found.pooled_variance(unbiased=True), centred.square().sum(0) / (40 - 4))
    torch.testing.assert_close(found.overall().variance()[0], features.var(0, correction=0))


@given(st.lists(st.integers(0, 15), max_size=6), st.integers(0, 100))
def test_any_cut_in_any_order_gives_the_same(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = 100 + torch.randn(30, 2, dtype=torch.float64, generator=generator)
    classes = torch.randint(3, (30,), generator=generator)
    whole = RunningMoments.of(features, classes, 3)
    cuts = [min(int(cut), 30) for cut in np.cumsum(sizes)]
    parts = [
        RunningMoments.of(rows, labels, 3)
        for rows, labels in zip(features.tensor_split(cuts), classes.tensor_split(cuts))
    ]
    streamed = RunningMoments.empty(3, 2)
    for part in parts:
        streamed = streamed.merge(part)
    assert_equal(streamed, whole)
    backwards = RunningMoments.empty(3, 2)
    for part in reversed(parts):
        backwards = part.merge(backwards)
    assert_equal(backwards, whole)


def test_one_sample_after_the_other_is_the_whole() -> None:
    features, classes = draw()
    found = RunningMoments.empty(4, 3)
    for row, label in zip(features, classes):
        found = found.update(row[None], label[None])
    assert_equal(found, RunningMoments.of(features, classes, 4))


def test_a_large_mean_costs_no_digits() -> None:
    features, classes = draw()
    moved = (features.float() + 2**20).double()
    rows = moved[classes == 1]
    found = RunningMoments.of(moved.float(), classes, 4).variance()[1]
    torch.testing.assert_close(found, rows.var(0, correction=0), rtol=1e-9, atol=0)


def test_half_precision_is_counted_in_float64() -> None:
    features, classes = draw()
    halved = features.bfloat16()
    found = RunningMoments.of(halved, classes, 4)
    assert found.mean.dtype == torch.float64
    assert_equal(found, RunningMoments.of(halved.double(), classes, 4))


def test_constant_features_have_no_variance_and_no_sample_no_moments() -> None:
    constant = torch.full((7, 2), 0.1)
    assert RunningMoments.of(constant, torch.zeros(7, dtype=torch.int64), 1).squares.max() < 1e-30
    none = RunningMoments.of(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 3)
    assert_equal(none, RunningMoments.empty(3, 2))
    with pytest.raises(ValueError, match="at least one sample, got none"):
        none.pooled_variance()
    single = RunningMoments.of(torch.ones(1, 2), torch.tensor([2]), 3)
    assert single.pooled_variance(unbiased=True).tolist() == [0.0, 0.0]


def test_one_process_has_all_there_is() -> None:
    moments = RunningMoments.of(*draw(), 4)
    assert moments.all_reduce() is moments


def test_processes_join_by_the_same_rule_as_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two processes in one: a first pass records what each gives to every collective, the second adds the other's.
    import coloss.ops.moments as module

    features, classes = draw()
    parts = [
        RunningMoments.of(features[:13], classes[:13], 4),
        RunningMoments.of(features[13:], classes[13:], 4),
    ]
    monkeypatch.setattr(module, "is_distributed", lambda: True)
    count = parts[0].count + parts[1].count
    total = sum(part.mean * part.count[:, None] for part in parts)
    mean = total / count.clamp(min=1)[:, None]
    squares = sum(part.squares + (part.mean - mean).square() * part.count[:, None] for part in parts)
    for part in parts:
        sums = iter([count, total, squares])
        monkeypatch.setattr(module.dist, "all_reduce", lambda tensor, sums=sums: tensor.copy_(next(sums)))
        assert_equal(part.all_reduce(), RunningMoments.of(features, classes, 4))


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_refused() -> None:
    features, classes = draw()
    with pytest.raises(ValueError, match=r"classes must be in \[0, 3\), got 3"):
        RunningMoments.of(features, classes, 3)
    with pytest.raises(ValueError, match=r"classes must be in \[0, 4\), got -1"):
        RunningMoments.of(features, classes * 0 - 1, 4)
    with pytest.raises(ValueError, match=r"features must be \(samples, features\)"):
        RunningMoments.of(features[0], classes, 4)
    with pytest.raises(ValueError, match="num_classes must be >= 1, got 0"):
        RunningMoments.empty(0, 1)
    with pytest.raises(ValueError, match=r"moments must have \(4, 3\) classes and features, got \(5, 3\)"):
        RunningMoments.of(features, classes, 4).merge(RunningMoments.empty(5, 3))
