"""Facts about which tokens stop, and about packing the others and putting them back."""

from inspect import unwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.ops import drop_tokens, restore_tokens, select_confident_tokens, token_probabilities


def drawn(seed, batch=3, classes=4, tokens=25):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(batch, classes, tokens, generator=generator)).softmax(1)
    return probabilities, torch.rand(batch, tokens, generator=generator) < 0.8


def slow_selection(probabilities, active, threshold, keep):
    """The card's words as loops over samples and classes."""
    final = np.zeros(active.shape, dtype=bool)
    for sample, (p, on) in enumerate(zip(probabilities.numpy(), active.numpy(), strict=True)):
        confidence, predicted = p.max(0), p.argmax(0)
        candidates = np.flatnonzero(on & (confidence > threshold))
        for c in np.unique(predicted[candidates]):
            of_class = candidates[predicted[candidates] == c]
            final[sample, of_class[np.argsort(-confidence[of_class], kind="stable")][keep:]] = True
    return torch.from_numpy(final)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.4, 0.7, 0.95]), st.integers(0, 7))
def test_selection_is_that_of_a_loop_over_samples_and_classes(seed, threshold, keep):
    probabilities, active = drawn(seed)
    found = select_confident_tokens(probabilities, active, threshold, keep)
    assert torch.equal(found, slow_selection(probabilities, active, threshold, keep))
    confidence, predicted = probabilities.max(1)
    assert torch.equal(
        found, select_confident_tokens(confidence, active, threshold, keep, predicted=predicted)
    )


def test_of_every_class_the_most_confident_few_survive_and_ties_go_to_the_earlier_token():
    probabilities, active = drawn(0)
    final = select_confident_tokens(probabilities, active, 0.5, 3)
    confidence, predicted = probabilities.max(1)
    candidates = active & (confidence > 0.5)
    for c in range(4):
        count = (candidates & (predicted == c)).sum(1)
        assert torch.equal((candidates & ~final & (predicted == c)).sum(1), count.clamp(max=3))
    tied = select_confident_tokens(torch.full((1, 1, 4), 0.75), torch.ones(1, 4, dtype=torch.bool), 0.5, 1)
    assert tied.tolist() == [[False, True, True, True]]


def test_threshold_one_selects_nothing_and_zero_without_survivors_all():
    probabilities, active = drawn(1)
    assert not select_confident_tokens(torch.ones(1, 2, 3), torch.ones(1, 3, dtype=torch.bool), 1.0, 0).any()
    assert torch.equal(select_confident_tokens(probabilities, active, 0.0, 0), active)


def test_half_precision_a_nan_and_no_tokens():
    probabilities, active = drawn(2)
    assert torch.equal(
        select_confident_tokens(probabilities.half(), active, 0.5, 2),
        slow_selection(probabilities.half(), active, 0.5, 2),
    )
    confidence = torch.tensor([[float("nan"), 0.9, 0.8]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    none = torch.zeros(1, 3, dtype=torch.int64)
    assert select_confident_tokens(confidence, everything, 0.5, 1, predicted=none).tolist() == [
        [False, False, True]
    ]
    assert select_confident_tokens(torch.rand(2, 3, 0), torch.ones(2, 0, dtype=torch.bool), 0.5).shape == (
        2,
        0,
    )


def test_the_rule_serves_any_classifier_of_tokens_such_as_a_linear_one():
    logits = torch.randn(2, 5, 9)
    probabilities = token_probabilities(logits)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 9))
    presence = torch.randn(2, 5, 2)
    expected = presence.softmax(-1)[..., 0, None] * logits.sigmoid()
    torch.testing.assert_close(
        token_probabilities(logits.bfloat16(), presence), expected, rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold must be in"),
        ({"threshold": float("nan")}, "threshold must be in"),
        ({"keep_per_class": -1}, "keep_per_class must be >= 0"),
        ({"predicted": torch.zeros(3, 25, dtype=torch.int64)}, "probabilities must be"),
        ({"active": torch.ones(1, 25, dtype=torch.bool)}, r"active must have shape \(3, 25\), got \(1, 25\)"),
        ({"active": torch.ones(3, 24, dtype=torch.bool)}, "active must have shape"),
        (
            {"probabilities": torch.rand(3, 25), "predicted": torch.zeros(1, 25, dtype=torch.int64)},
            r"predicted must have shape \(3, 25\), got \(1, 25\)",
        ),
        ({"probabilities": torch.rand(25)}, "probabilities must be"),
        ({"probabilities": torch.rand(3, 2, 1, 25)}, "probabilities must be"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    probabilities, active = drawn(0)
    given = {"probabilities": probabilities, "active": active, "threshold": 0.5} | arguments
    with pytest.raises(ValueError, match=message):
        unwrap(select_confident_tokens)(
            **given
        )  # without the type checker of tests, which looks at shapes too


def test_packed_tokens_go_back_where_they_came_from_with_their_gradients():
    tokens = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1], [0] * 6]).bool()
    packed = drop_tokens(tokens, keep)
    assert packed.tokens.shape == (3, 3, 2)
    assert torch.equal(packed.valid.sum(1), keep.sum(1))
    canvas = torch.full((3, 6, 2), 7.0, dtype=torch.float64, requires_grad=True)
    restored = restore_tokens(packed, canvas)
    assert torch.equal(restored, torch.where(keep[..., None], tokens, canvas))
    restored.sum().backward()
    assert torch.equal(tokens.grad, keep[..., None].double().expand(-1, -1, 2))
    assert torch.equal(canvas.grad, 1 - tokens.grad)
    assert drop_tokens(tokens, keep & False).tokens.shape == (3, 0, 2)
    assert drop_tokens(tokens, keep & False, least=1).tokens.shape == (3, 1, 2)
    with pytest.raises(ValueError, match="least must be in"):
        drop_tokens(tokens, keep, least=7)
