"""The attentive probe finds what a mean over tokens dilutes."""

import pytest
import torch
from torch import Tensor

from coloss.metrics import attentive_probe, linear_probe


def needle(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """One token of 24, marked by its first entry, tells the class by the sign of its second; the others carry signs of their own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(samples, 24, 8, generator=generator)
    tokens[..., 0] = 0
    place = torch.randint(24, (samples,), generator=generator)
    classes = torch.randint(2, (samples,), generator=generator)
    tokens[torch.arange(samples), place, 0] = 6.0
    tokens[torch.arange(samples), place, 1] = (2.0 * classes - 1) * 1.5
    return tokens, 3 + 4 * classes


def test_it_finds_a_token_that_the_mean_hides() -> None:
    train, classes = needle(200, 0)
    test, test_classes = needle(200, 1)
    found = attentive_probe(train, classes, test, test_classes, heads=2, steps=100, batch_size=64)
    pooled = linear_probe(train.mean(1), classes, test.mean(1), test_classes)
    assert found.accuracy > 0.9 > pooled.accuracy + 0.1
    assert set(found.predictions.tolist()) == {3, 7}
    assert found.labels == 200


def test_scale_of_the_tokens_does_not_matter_and_neither_does_global_randomness() -> None:
    train, classes = needle(60, 0)
    options = {"heads": 2, "steps": 20, "labels": 40, "batch_size": 16}
    first = attentive_probe(train, classes, train, classes, **options)
    before = torch.get_rng_state()
    torch.rand(3)
    second = attentive_probe(1024 * train, classes, 1024 * train, classes, **options)
    assert torch.equal(first.predictions, second.predictions)
    assert first.labels == 40
    torch.set_rng_state(before)


def test_one_class_is_predicted_for_all_and_constant_tokens_are_no_fault() -> None:
    tokens = torch.ones(6, 3, 4)
    found = attentive_probe(tokens, torch.full((6,), 2), tokens, torch.tensor([2, 2, 2, 5, 2, 2]), steps=2)
    assert found.predictions.tolist() == [2] * 6
    assert found.accuracy == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_targets": torch.zeros(2).long()},
            "train_tokens and train_targets must hold the same samples",
        ),
        ({"test_tokens": torch.full((6, 3, 4), torch.nan)}, "test_tokens must be finite"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0"),
        ({"heads": 3}, "heads must divide dim 4, got 3"),
    ],
)
def test_bad_input_is_refused(changes, message, as_users_call: None) -> None:
    tokens, classes = torch.randn(6, 3, 4), torch.arange(6) % 2
    given = {"train_tokens": tokens, "train_targets": classes, "test_tokens": tokens, "test_targets": classes}
    with pytest.raises(ValueError, match=message):
        attentive_probe(**(given | changes))


def test_it_learns_the_same_under_autocast() -> None:
    train, classes = needle(60, 0)
    options = {"heads": 2, "steps": 100, "batch_size": 64}
    found = attentive_probe(train, classes, train, classes, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = attentive_probe(train, classes, train, classes, **options)
    assert torch.equal(under.predictions, found.predictions) and found.accuracy > 0.9
