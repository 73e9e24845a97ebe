"""The within-class scatter is NumPy's, however the samples are cut, and joins over processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor

from coloss.ops import RunningMoments, RunningScatter


def draw(samples: int = 40, features: int = 3, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        5 + torch.randn(samples, features, dtype=torch.float64, generator=generator),
        torch.randint(classes, (samples,), generator=generator),
    )


def test_it_is_the_scatter_of_numpy_and_its_diagonal_the_squares() -> None:
    features, classes = draw()
    found = RunningScatter.of(features, classes, 5)
    expected = sum(
        np.cov(features[classes == number].numpy().T, bias=True) * int((classes == number).sum())
        for number in range(4)
    )
    np.testing.assert_allclose(found.within, expected, atol=1e-10)
    torch.testing.assert_close(found.within.diagonal(), found.moments.squares.sum(0))


@pytest.mark.parametrize("cuts", [[7], [1, 2, 3], [0, 40], [20, 20, 33]])
def test_any_cut_in_any_order_gives_the_same(cuts: list[int]) -> None:
    features, classes = draw()
    parts = list(zip(features.tensor_split(cuts), classes.tensor_split(cuts)))
    whole = RunningScatter.of(features, classes, 4)
    for order in (parts, parts[::-1]):
        found = RunningScatter.empty(4, 3)
        for part in order:
            found = found.update(*part)
        torch.testing.assert_close(found.within, whole.within, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.moments.mean, whole.moments.mean, rtol=0, atol=1e-12)


def test_half_precision_is_counted_in_float64_and_a_large_mean_costs_no_digits() -> None:
    features, classes = draw()
    halved = features.bfloat16()
    found = RunningScatter.of(halved, classes, 4).within
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, RunningScatter.of(halved.double(), classes, 4).within)
    far = RunningScatter.of(features + 1e6, classes, 4).within
    torch.testing.assert_close(far, RunningScatter.of(features, classes, 4).within, rtol=1e-8, atol=1e-8)


def test_no_sample_and_one_sample_scatter_nothing() -> None:
    none = RunningScatter.of(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 3)
    single = RunningScatter.of(torch.ones(1, 2), torch.tensor([1]), 3)
    assert none.within.abs().max() == single.within.abs().max() == 0
    assert none.all_reduce() is none


def test_two_processes_join_to_one(tmp_path: Path) -> None:
    features, classes = draw()

    def count(fabric: Fabric) -> dict[str, Tensor]:
        share = slice(fabric.global_rank, None, fabric.world_size)
        found = RunningScatter.of(features[share], classes[share], 4).all_reduce()
        return {"within": found.within, "mean": found.moments.mean, "squares": found.moments.squares}

    check_two_processes(count, tmp_path)


def test_bad_input_is_refused(as_users_call: None) -> None:
    features, classes = draw()
    with pytest.raises(ValueError, match=r"classes must be in \[0, 3\), got 3"):
        RunningScatter.of(features, classes, 3)
    with pytest.raises(ValueError, match=r"moments must have \(4, 3\)"):
        RunningScatter.of(features, classes, 4).merge(RunningScatter.empty(5, 3))
    assert isinstance(RunningScatter.empty(1, 1).moments, RunningMoments)
