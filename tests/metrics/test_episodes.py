"""Episodes: perfect and useless encoders, the spread of a mean, and one draw for one generator."""

from inspect import signature

import pytest
import torch
from torch import nn

from coloss.data import IndexedDataset
from coloss.metrics import evaluate_episodes


def data(spread: float, classes: int = 8, per_class: int = 12) -> IndexedDataset:
    targets = torch.arange(classes).repeat_interleave(per_class)
    return IndexedDataset(torch.eye(classes)[targets] + spread * torch.randn(len(targets), classes), targets)


def test_separate_classes_are_told_apart_and_noise_is_guessed():
    assert evaluate_episodes(nn.Identity(), data(0.01), 5, 1, 5, 10).mean == 1.0
    noise = evaluate_episodes(
        nn.Identity(), IndexedDataset(torch.randn(96, 3), data(0).targets), 4, 1, 8, 200
    )
    assert noise.mean == pytest.approx(0.25, abs=0.06)
    assert noise.interval[0] < noise.mean < noise.interval[1]


def test_more_shots_help_and_more_episodes_narrow_the_interval():
    noisy = data(0.6)
    one, five = (evaluate_episodes(nn.Identity(), noisy, 5, shots, 5, 60) for shots in (1, 5))
    assert five.mean > one.mean + 0.05
    longer = evaluate_episodes(nn.Identity(), noisy, 5, 1, 5, 240)
    width = [found.interval[1] - found.interval[0] for found in (one, longer)]
    assert width[1] == pytest.approx(width[0] / 2, rel=0.3)
    assert signature(evaluate_episodes).parameters["episodes"].default == 600


def test_the_generator_decides_and_the_encoder_is_left_as_it_was():
    noisy, encoder = data(0.6), nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = [
        evaluate_episodes(encoder, noisy, 5, 1, 5, 20, torch.Generator().manual_seed(seed)).mean
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert encoder.training and all(
        torch.equal(before[name], value) for name, value in encoder.state_dict().items()
    )


def test_bad_input_is_named(as_users_call):
    for options, message in (
        ({"ways": 1}, "ways must be >= 2, got 1"),
        ({"queries": 0}, "queries must be >= 1, got 0"),
        ({"episodes": 1}, "episodes must be >= 2, got 1"),
        ({"ways": 9}, "ways must be at most the number of classes"),
        ({"metric": "l1"}, "metric must be"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_episodes(
                nn.Identity(), data(0.1), **({"ways": 3, "shots": 1, "queries": 2, "episodes": 3} | options)
            )
    with pytest.raises(ValueError, match="data must have class indices as targets, got none"):
        evaluate_episodes(nn.Identity(), torch.zeros(4, 2), 2, 1)
