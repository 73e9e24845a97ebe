import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coloss.motion import guided_logits, iterative_decode

CODES, MASK = 20, 20


class Oracle:
    """Sure of one code for each place, surer of some places than of others; keeps what it was shown."""

    def __init__(self, truth: Tensor, sureness: Tensor) -> None:
        self.truth, self.sureness, self.seen = truth, sureness, []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        return torch.nn.functional.one_hot(self.truth, CODES) * self.sureness[..., None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_surest_places_are_shown_first_by_the_cosine_schedule() -> None:
    steps, length = 5, 12
    truth, sureness = torch.randint(CODES, (2, length)), 30 + torch.rand(2, length)
    oracle = Oracle(truth, sureness.double())
    found = iterative_decode(
        oracle, torch.tensor([length, length]), steps, mask_id=MASK, generator=generator()
    )
    assert torch.equal(found, truth)
    assert len(oracle.seen) == steps
    for step, tokens in enumerate(oracle.seen):
        number = max(1, round(length * math.cos(math.pi / 2 * step / (steps - 1))))
        hidden = tokens == MASK
        assert hidden.sum(1).tolist() == [number, number]
        assert torch.equal(tokens[~hidden], truth[~hidden])
        if step:
            least = sureness.argsort(1)[:, :number].sort(1).values
            assert torch.equal(hidden.nonzero()[:, 1].view(2, -1), least)


def test_what_was_shown_once_is_never_drawn_again() -> None:
    seen: list[Tensor] = []

    def shaky(tokens: Tensor) -> Tensor:
        seen.append(tokens.clone())
        return torch.randn(*tokens.shape, CODES, generator=noise) * 5

    noise = generator(1)
    found = iterative_decode(shaky, torch.tensor([15, 15]), 6, mask_id=MASK, generator=generator())
    for before, after in zip(seen, [*seen[1:], found]):
        shown = before != MASK
        assert torch.equal(after[shown], before[shown])
    assert (found != MASK).all()


def test_sequences_of_different_length_stand_in_one_batch() -> None:
    truth = torch.randint(CODES, (3, 9))
    oracle = Oracle(truth, torch.full((3, 9), 40.0))
    lengths = torch.tensor([9, 4, 1])
    found = iterative_decode(oracle, lengths, 4, mask_id=MASK)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(found[row, :length], truth[row, :length])
        assert (found[row, length:] == -1).all()
        assert all((tokens[row, length:] == -1).all() for tokens in oracle.seen)


def test_one_step_draws_all_at_once_and_no_sequence_needs_none() -> None:
    truth = torch.randint(CODES, (2, 5))
    oracle = Oracle(truth, torch.full((2, 5), 40.0))
    assert torch.equal(iterative_decode(oracle, torch.tensor([5, 5]), 1, mask_id=MASK), truth)
    assert len(oracle.seen) == 1
    assert iterative_decode(oracle, torch.zeros(0, dtype=torch.int64), 1, mask_id=MASK).shape == (0, 0)


def test_draws_follow_the_softmax_of_the_largest_logits() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0]).log_softmax(0)
    found = iterative_decode(
        lambda tokens: logits.expand(*tokens.shape, 4),
        torch.full((4000,), 1),
        1,
        mask_id=4,
        top_share=0.5,
        temperature=2.0,
        generator=generator(),
    )
    shares = found.flatten().bincount(minlength=4) / 4000
    expected = (torch.tensor([2.0, 1.0]) / 2).softmax(0)
    assert (shares[:2] - expected).abs().max() < 0.03
    assert (shares[2:] == 0).all()


def test_temperature_zero_takes_the_largest_logit() -> None:
    logits = torch.randn(1, 6, CODES)
    found = iterative_decode(
        lambda tokens: logits, torch.tensor([6]), 3, mask_id=MASK, temperature=0.0, top_share=1.0
    )
    assert torch.equal(found, logits.argmax(-1))


def test_decoding_is_a_function_of_the_generator() -> None:
    def flat(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, CODES)

    runs = [
        iterative_decode(flat, torch.tensor([30]), 3, mask_id=MASK, top_share=1.0, generator=generator(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_guidance_is_both_formulas() -> None:
    conditional, unconditional = torch.randn(5, 7), torch.randn(5, 7)
    paper = (1 + 3.0) * conditional - 3.0 * unconditional
    torch.testing.assert_close(guided_logits(conditional, unconditional, 4.0), paper, rtol=1e-5, atol=1e-5)
    assert guided_logits(conditional, unconditional, 1.0) is conditional
    assert guided_logits(conditional, unconditional, 0.0) is unconditional


def test_guidance_favours_what_the_condition_makes_likelier() -> None:
    with_condition, without = torch.tensor([1.0, 1.2, 0.0]), torch.tensor([0.0, 1.5, 0.0])
    found = iterative_decode(
        lambda tokens: with_condition.expand(*tokens.shape, 3),
        torch.tensor([4]),
        2,
        mask_id=3,
        unconditional=lambda tokens: without.expand(*tokens.shape, 3),
        guidance=4.0,
        temperature=0.0,
    )
    assert (found == 0).all()


def test_float32_logits_are_decoded_in_float32() -> None:
    # Some devices have no float64.
    class NoDouble(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            found = call(*arguments, **(options or {}))
            assert not (isinstance(found, Tensor) and found.dtype == torch.float64), call
            return found

    with NoDouble():
        iterative_decode(
            Oracle(torch.zeros(1, 4).long(), torch.ones(1, 4)), torch.tensor([4]), 2, mask_id=MASK
        )


def test_logits_of_padding_may_be_anything() -> None:
    logits = torch.zeros(2, 3, CODES)
    logits[1, 1:] = torch.nan
    found = iterative_decode(lambda tokens: logits, torch.tensor([3, 1]), 2, mask_id=MASK)
    assert found[0].min() >= 0 and found[0].max() < CODES
    assert found[1, 1:].tolist() == [-1, -1]


def test_half_precision_logits_will_do() -> None:
    found = iterative_decode(
        lambda tokens: torch.randn(*tokens.shape, CODES).half(), torch.tensor([4]), 2, mask_id=MASK
    )
    assert found.shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"temperature": -1.0}, "temperature must be >= 0 and finite, got -1.0"),
        ({"top_share": 0.0}, r"top_share must be in \(0, 1\], got 0.0"),
        ({"guidance": 2.0}, "guidance must be 1 without unconditional logits, got 2.0"),
        ({"guidance": math.nan, "unconditional": lambda tokens: None}, "guidance must be finite, got nan"),
        ({"guidance": math.inf, "unconditional": lambda tokens: None}, "guidance must be finite, got inf"),
        (
            {"guidance": 2.0, "unconditional": lambda tokens: torch.zeros(*tokens.shape, 1)},
            r"unconditional logits must have shape \(1, 4, 20\), got \(1, 4, 1\)",
        ),
        (
            {"logits_fn": lambda tokens: torch.full((*tokens.shape, CODES), math.nan)},
            "logits must be numbers, got NaN",
        ),
        ({"lengths": torch.tensor([3, 0])}, "lengths must be >= 1, got 0"),
        (
            {"mask_id": 3},
            r"logits must have shape \(1, 4, 'codes'\) with at most mask_id = 3 codes, got \(1, 4, 20\)",
        ),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, as_users_call: None) -> None:
    arguments: dict[str, Any] = {
        "logits_fn": lambda tokens: torch.zeros(*tokens.shape, CODES),
        "lengths": torch.tensor([4]),
        "mask_id": MASK,
    }
    with pytest.raises(ValueError, match=message):
        iterative_decode(**(arguments | options))


def test_guidance_that_is_not_finite_is_named(as_users_call: None) -> None:
    with pytest.raises(ValueError, match="guidance must be finite, got nan"):
        guided_logits(torch.zeros(2), torch.zeros(2), math.nan)
