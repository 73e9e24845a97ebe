"""Facts about heads that classify tokens."""

import pytest
import torch

from coloss.nn import LinearTokenHead, SegmentationQueryHead
from coloss.nn.operation_count import count_operations


def test_mask_logits_are_the_last_attention_before_its_softmax():
    head = SegmentationQueryHead(8, 3, width=12, layers=2, heads=2).double()
    tokens = torch.randn(2, 7, 8, dtype=torch.float64)
    found = head(tokens)
    seen = {}
    head.layers[1].query.register_forward_hook(lambda m, i, o: seen.update(q=o))
    head.layers[1].key.register_forward_hook(lambda m, i, o: seen.update(k=o))
    head(tokens)
    by_head = [seen["q"][..., s] @ seen["k"][..., s].mT / 6**0.5 for s in (slice(6), slice(6, 12))]
    torch.testing.assert_close(found.logits, sum(by_head) / 2)
    assert found.presence.shape == (2, 3, 2)


def test_padding_changes_nothing_for_the_others_and_padding_alone_is_finite():
    head = SegmentationQueryHead(8, 3, layers=2, heads=2).double()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    padded = torch.cat([tokens, torch.randn(2, 3, 8, dtype=torch.float64)], dim=1)
    mask = torch.tensor([[False] * 5 + [True] * 3] * 2)
    plain, found = head(tokens), head(padded, mask)
    torch.testing.assert_close(found.logits[..., :5], plain.logits)
    torch.testing.assert_close(found.presence, plain.presence)
    assert head(padded, mask | True).presence.isfinite().all()


def test_order_of_tokens_does_not_matter():
    order = torch.randperm(6)
    tokens = torch.randn(1, 6, 8)
    for head in (SegmentationQueryHead(8, 3, layers=1, heads=2), LinearTokenHead(8, 3)):
        torch.testing.assert_close(head(tokens[:, order]).logits, head(tokens).logits[..., order])


@pytest.mark.parametrize(
    "head", [SegmentationQueryHead(8, 3, width=12, layers=2, heads=2), LinearTokenHead(8, 3)]
)
def test_multiply_adds_are_those_counted(head):
    assert head.multiply_adds(10) == count_operations(lambda: head(torch.randn(1, 10, 8))) // 2


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="num_classes must be >= 1"):
        LinearTokenHead(8, 0)
    with pytest.raises(ValueError, match="layers must be >= 1"):
        SegmentationQueryHead(8, 3, layers=0)
    with pytest.raises(ValueError, match="heads must divide width 8"):
        SegmentationQueryHead(8, 3, heads=3)
