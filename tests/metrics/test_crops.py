"""Averages over crops."""

import pytest
import torch
from torch import nn

from coloss.metrics import crop_average

SERIES = torch.randn(3, 2, 11, generator=torch.Generator().manual_seed(0))


def test_it_is_the_mean_over_the_crops_and_the_last_ends_with_the_series() -> None:
    expected = torch.stack([SERIES[..., start : start + 4] for start in (0, 3, 6, 7)]).mean(0)
    torch.testing.assert_close(crop_average(nn.Identity(), SERIES, 4, 3), expected)
    exact = torch.stack([SERIES[..., start : start + 5] for start in (0, 3, 6)]).mean(0)
    torch.testing.assert_close(crop_average(nn.Identity(), SERIES, 5, 3), exact)


def test_one_crop_of_everything_is_the_model_itself() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(22, 3))
    torch.testing.assert_close(crop_average(model, SERIES, 11, 4), model(SERIES))


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [(0, 1, r"size must be in \[1, 11\]"), (12, 1, "got 12"), (4, 0, "stride must be >= 1, got 0")],
)
def test_values_out_of_range_are_refused(size, stride, message) -> None:
    with pytest.raises(ValueError, match=message):
        crop_average(nn.Identity(), SERIES, size, stride)
