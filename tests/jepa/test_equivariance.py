"""What single views tell about a change, and what a summary tells about the class: encoders whose answer is known."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from coloss.jepa import (
    ActionConditionedAggregator,
    Rotations,
    SequenceEncoder,
    Shifts,
    action_probe,
    draw_views,
    evaluate_equivariance,
    evaluate_invariance,
)
from coloss.metrics import linear_probe


def points(count: int, seed: int = 0) -> Tensor:
    """Images of one bright point each, near the middle."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(6, 10, (count, 2), generator=generator)
    images = torch.zeros(count, 1, 16, 16)
    images[torch.arange(count), 0, places[:, 0], places[:, 1]] = 1
    return images


class Centre(nn.Module):
    """Where the light is: shifts can be read off, up to where it began."""

    def forward(self, images: Tensor) -> Tensor:
        axis = torch.linspace(-1, 1, images.shape[2])
        mass = images.sum((1, 2, 3)).clamp(min=1e-6)
        return torch.stack([(images.sum((1, 3)) @ axis) / mass, (images.sum((1, 2)) @ axis) / mass], dim=1)


class Brightness(nn.Module):
    """Says nothing about where."""

    def forward(self, images: Tensor) -> Tensor:
        return images.amax((2, 3))


def test_an_encoder_that_keeps_the_place_tells_the_shift_and_one_that_does_not_cannot() -> None:
    train, test = points(300), points(200, seed=1)
    knows = evaluate_equivariance(Centre(), Shifts(0.2), train, test, hidden=(32,))
    blind = evaluate_equivariance(Brightness(), Shifts(0.2), train, test, hidden=(32,))
    assert knows["action_r2_linear"] > 0.99 and knows["action_r2"] > 0.8
    assert blind["action_r2_linear"] < 0.1 and blind["action_r2"] < 0.1
    for name in ("action_r2_down", "action_r2_right"):
        assert knows[name] > 0.8
    mean = (knows["action_r2_down"] + knows["action_r2_right"]) / 2
    assert knows["action_r2"] == pytest.approx(mean)


def test_a_perceptron_finds_what_is_there_in_another_form_and_a_line_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(900, 2, generator=generator) * 2 - 1
    pairs = torch.stack([angles.abs(), (angles > 0).float() * 2 - 1], dim=-1)
    actions = angles[:, 1:] - angles[:, :1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curved = action_probe(pairs[:600], actions[:600], pairs[600:], actions[600:], hidden=(64, 64))
    again = action_probe(pairs[:600], actions[:600], pairs[600:], actions[600:], hidden=(64, 64))
    straight = action_probe(pairs[:600], actions[:600], pairs[600:], actions[600:], hidden=())
    assert curved.r2 > 0.95 > straight.r2 and curved.r2 == again.r2
    assert curved.predictions.shape == (300, 1)


def test_the_encoder_is_left_as_it_was_and_views_are_drawn_by_the_seed() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.BatchNorm1d(4)).train()
    before = torch.get_rng_state()
    found = [
        evaluate_equivariance(
            encoder, Rotations(), points(60), points(30), hidden=(4,), epochs=2, pairs=2, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder.training and encoder[2].num_batches_tracked == 0
    assert found[0] == found[1] != found[2]
    assert set(found[0]) == {"action_r2", "action_r2_linear"}


def test_quaternions_have_four_numbers() -> None:
    class Turned:
        names = ("a", "b", "c", "d", "hue")
        spread = (1.0,) * 5

        def __call__(self, inputs: Tensor, generator=None):
            return inputs, torch.randn(len(inputs), 5, generator=generator)

    found = evaluate_equivariance(
        nn.Flatten(), Turned(), points(40), points(20), action="quaternion", hidden=(4,), epochs=1
    )
    assert {"action_r2_x", "action_r2_w", "action_r2_hue"} <= set(found)


def test_the_fair_baseline_is_the_mean_of_the_same_views() -> None:
    images, classes = points(90), torch.arange(90) % 3
    images = images + classes[:, None, None, None] * 0.1
    train, test = (images[:60], classes[:60]), (images[60:], classes[60:])
    aggregator = ActionConditionedAggregator(256, 2, 64, depth=0)
    both = SequenceEncoder(nn.Flatten(), aggregator).eval()
    found = evaluate_invariance(both, Shifts(0.1), train, test, views=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    means = [draw_views(Shifts(0.1), part[0], 3, generator)[0].flatten(2).mean(1) for part in (train, test)]
    assert found["accuracy_mean"] == linear_probe(means[0], train[1], means[1], test[1]).accuracy
    assert set(found) == {
        "accuracy_aggregate",
        "accuracy_mean",
        "accuracy_view",
        "parameters_r2_aggregate",
        "parameters_r2_view",
    }


def test_a_summary_without_the_place_keeps_the_class() -> None:
    class Both(nn.Module):
        """Class in the first two entries, place in the others."""

        def forward(self, images: Tensor) -> Tensor:
            bright = images.amax((1, 2, 3))
            return torch.cat(
                [(bright > 0.25)[:, None].float(), (bright <= 0.25)[:, None].float(), Centre()(images)], 1
            )

    class Forgetful(ActionConditionedAggregator):
        def forward(self, features: Tensor, actions: Tensor | None = None) -> Tensor:
            return features[..., :2].mean(1)

    classes = torch.arange(120) % 2
    images = points(120) * (0.1 + 0.9 * classes)[:, None, None, None]
    both = SequenceEncoder(Both(), Forgetful(4, 2, 4, depth=0))
    found = evaluate_invariance(both, Shifts(0.2), (images[:80], classes[:80]), (images[80:], classes[80:]))
    assert found["accuracy_aggregate"] == 1
    assert found["parameters_r2_aggregate"] < 0.2 < 0.5 < found["parameters_r2_view"]


def test_bad_input_is_named(as_users_call: None) -> None:
    pairs, actions = torch.zeros(30, 2, 4), torch.zeros(30, 1)
    for call, message in (
        (
            lambda: action_probe(pairs, actions[:3], pairs, actions),
            "train_pairs and train_actions must be as many",
        ),
        (lambda: action_probe(pairs, actions, pairs[:0], actions[:0]), "at least one, got 0 and 0"),
        (
            lambda: action_probe(pairs / 0, actions, pairs, actions),
            "train_pairs and train_actions must be finite",
        ),
        (lambda: action_probe(pairs, actions, pairs, actions, epochs=0), "epochs must be >= 1, got 0"),
        (lambda: action_probe(pairs[:9], actions[:9], pairs, actions), "train_pairs must be >= 20"),
        (
            lambda: evaluate_equivariance(nn.Flatten(), Shifts(), points(30), points(9), pairs=0),
            "pairs must be >= 1, got 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
