"""Attentive pooling: what it equals in limits, what it does not depend on."""

import pytest
import torch

from coloss.nn import AttentivePool


def pool(**options) -> AttentivePool:
    torch.manual_seed(0)
    made = AttentivePool(8, **({"heads": 2} | options)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


TOKENS = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_softmax_attention_head_by_head(queries: int) -> None:
    made = pool(n_queries=queries, out=4)
    keys, values = made.keys_and_values(TOKENS).split(8, -1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = made.queries[:, part] @ keys[..., part].transpose(1, 2) / 2
        heads.append(scores.softmax(-1) @ values[..., part])
    expected = made.output(torch.cat(heads, -1))
    torch.testing.assert_close(made(TOKENS), expected[:, 0] if queries == 1 else expected)


def test_queries_of_zero_take_the_mean_of_the_values() -> None:
    made = pool(out=4)
    with torch.no_grad():
        made.queries.zero_()
    values = made.keys_and_values(TOKENS)[..., 8:].mean(1)
    torch.testing.assert_close(made(TOKENS), made.output(values))


def test_order_of_tokens_does_not_matter_and_padding_is_not_there() -> None:
    made = pool()
    expected = made(TOKENS)
    torch.testing.assert_close(made(TOKENS.flip(1)), expected)
    longer = torch.cat([TOKENS, torch.full((3, 2, 8), 1e3, dtype=torch.float64)], 1)
    padding = torch.tensor([[False] * 5 + [True] * 2] * 3)
    torch.testing.assert_close(made(longer, padding), expected)
    assert made(longer, torch.ones_like(padding)).isfinite().all()


def test_half_precision_tokens_under_autocast() -> None:
    made = AttentivePool(8, 2, out=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(TOKENS.float()).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must divide dim 8, got 3"),
        ({"n_queries": 0}, "n_queries must be >= 1, got 0"),
        ({"out": 0}, "out must be >= 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        pool(**options)
