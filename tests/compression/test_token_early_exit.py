"""Facts about tokens that leave a stack of blocks early: the card's unit checks, packing, padding, and models built on it."""

import copy
import math
from typing import get_args

import pytest
import torch
from torch import nn

from coloss.compression import (
    EarlyExitLanguageModel,
    EarlyExitSegmenter,
    TokenEarlyExit,
    compress_model,
    early_exit_cost,
    evaluate_segmenter,
    load_compressed,
    multiply_adds,
    segmentation_loss,
    token_multiply_adds,
)
from coloss.data import IndexedDataset
from coloss.nn import CausalLanguageModel, LinearTokenHead, SegmentationQueryHead, Transformer
from coloss.nn.causal_language_model import Positions
from coloss.ops import token_probabilities

DEPTH, EXITS = 6, (2, 4, 6)


def network(threshold=0.5, keep=1, head=LinearTokenHead, **options):
    torch.manual_seed(3)
    heads = [head(8, 4) for _ in EXITS]
    for one in heads:
        for parameter in one.parameters():
            parameter.data *= 2
    blocks = Transformer(8, DEPTH, 2).blocks
    return TokenEarlyExit(blocks, heads, EXITS, threshold, keep, **options).double().eval()


def tokens(batch=3, count=14):
    return torch.randn(batch, count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_a_threshold_of_one_gives_bit_for_bit_the_whole_network():
    exits = network(1.0)
    found, x = exits(tokens()), tokens()
    for number, block in enumerate(exits.blocks, 1):
        x = block(x)
        if number in EXITS:
            stage = EXITS.index(number)
            assert torch.equal(found.stages[stage].logits, exits.heads[stage](x).logits)
    assert (found.active_counts == 14).all() and (found.exit_stages == 2).all()


@pytest.mark.parametrize("head", [LinearTokenHead, SegmentationQueryHead])
def test_a_threshold_of_zero_without_survivors_stops_everything_at_the_first_head(head):
    exits = network(0.0, 0, head)
    called = []
    exits.blocks[2].register_forward_hook(lambda *_: called.append(1))
    found = exits(tokens())
    x = exits.blocks[1](exits.blocks[0](tokens()))
    first = exits.heads[0](x)
    assert torch.equal(found.final.logits, first.logits) and not called
    assert torch.equal(token_probabilities(*found.final).argmax(1), token_probabilities(*first).argmax(1))
    assert found.active_counts.tolist() == [[14] * 3] * 2 + [[0] * 3] * 4
    assert len(found.stages) == 3 and (found.exit_stages == 0).all()


def test_final_tokens_stay_final_and_keep_their_logits_and_every_class_keeps_its_few():
    found = network(0.4, 2)(tokens())
    counts = found.active_counts
    assert (counts[1:] <= counts[:-1]).all() and (counts[-1] < counts[0]).any()
    assert (found.exit_stages == 0).any() and (found.exit_stages == 2).any()
    for stage in (0, 1):
        left = (found.exit_stages == stage)[:, None].expand_as(found.final.logits)
        assert torch.equal(found.final.logits[left], found.stages[stage].logits[left])
    confidence, predicted = token_probabilities(*found.stages[0]).max(1)
    for c in range(4):
        candidates = (confidence > 0.4) & (predicted == c)
        stayed = (candidates & (found.exit_stages > 0)).sum(1)
        assert torch.equal(stayed, candidates.sum(1).clamp(max=2))


@pytest.mark.parametrize("head", [LinearTokenHead, SegmentationQueryHead])
@pytest.mark.parametrize("training", [False, True])
def test_packing_and_masking_give_equal_outputs_and_gradients(head, training):
    """Samples end with different numbers of tokens; one of them, of equal tokens, may be done before the others."""
    exits = network(0.6, 0, head).train(training)
    x = tokens()
    x[1] = x[1, :1]
    found = []
    for gather in (True, False):
        exits.gather = gather
        exits.zero_grad()
        inputs = x.clone().requires_grad_()
        outputs = exits(inputs)
        sum((stage.logits**2).sum() for stage in outputs.stages).backward()
        found.append((outputs, inputs.grad))
    (packed, packed_gradient), (masked, masked_gradient) = found
    assert torch.equal(packed.active_counts, masked.active_counts)
    assert packed.active_counts[-1].unique().numel() > 1
    torch.testing.assert_close(packed.final.logits, masked.final.logits)
    torch.testing.assert_close(packed_gradient, masked_gradient)
    if packed.final.presence is not None:
        torch.testing.assert_close(packed.final.presence, masked.final.presence)


@pytest.mark.parametrize("head", [LinearTokenHead, SegmentationQueryHead])
def test_a_batch_gives_what_its_samples_give_alone(head):
    exits, x = network(0.4, 1, head), tokens()
    together = exits(x)
    for row in range(len(x)):
        alone = exits(x[row : row + 1])
        torch.testing.assert_close(alone.final.logits[0], together.final.logits[row])
        assert torch.equal(alone.active_counts[:, 0], together.active_counts[:, row])
        if alone.final.presence is not None:
            torch.testing.assert_close(alone.final.presence[0], together.final.presence[row])


def test_padding_is_never_active_and_changes_nothing():
    exits, x = network(0.4, 1), tokens()
    padded = torch.cat([x, torch.full((3, 4, 8), 9.0, dtype=torch.float64)], dim=1)
    mask = torch.zeros(3, 18, dtype=torch.bool)
    mask[:, 14:] = True
    found = exits(padded, mask)
    torch.testing.assert_close(found.final.logits[..., :14], exits(x).final.logits)
    assert not found.final.logits[..., 14:].any() and (found.exit_stages[:, 14:] == -1).all()
    assert torch.equal(found.active_counts, exits(x).active_counts)


def test_in_training_every_parameter_has_a_finite_gradient_though_all_tokens_stopped():
    """Otherwise data-parallel processes would wait for one another."""
    for blocks in (None, [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(DEPTH)]):
        exits = network(0.0, 0).float()
        if blocks is not None:
            exits.blocks = nn.ModuleList(blocks)
        exits.train()(tokens().float()).final.logits.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in exits.blocks.parameters())
        assert not any(p.grad.any() for p in exits.blocks[3].parameters())


def test_nothing_is_kept_between_calls():
    exits = network(0.4, 1)
    first = exits(tokens())
    exits(torch.randn(1, 30, 8, dtype=torch.float64))
    assert torch.equal(exits(tokens()).final.logits, first.final.logits)


def test_a_rule_of_ones_own_may_choose():
    exits = network(select=lambda probabilities, active: torch.arange(14).expand(3, -1) % 2 == 0)
    assert exits(tokens()).active_counts[:, 0].tolist() == [14, 14, 7, 7, 7, 7]


def test_half_precision_and_autocast_are_finite():
    exits = network(0.4, 1).bfloat16()
    assert exits(tokens().bfloat16()).final.logits.dtype == torch.bfloat16
    exits = network(0.4, 1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exits(tokens().float()).final.logits.isfinite().all()


def test_multiply_adds_are_those_counted_on_one_image():
    assert token_multiply_adds(torch.tensor([10, 5]), 8, 2.0) == 15 * 8 * 64 + 2 * 8 * 125
    model = EarlyExitSegmenter((12, 16), 2, 3, dim=8, depth=3, heads=2, threshold=0.36).eval()
    image = torch.rand(1, 3, 12, 16)
    counts = model.stages(image).active_counts
    assert 0 < counts[-1] < 48
    patches = 48 * 8 * 12
    assert model.early_exit.multiply_adds(counts, 8) == multiply_adds(model, image) - patches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_after": (4, 2, 6)}, "exit_after must rise"),
        ({"exit_after": (2, 4, 5)}, "exit_after must rise"),
        ({"exit_after": (3, 6)}, "heads must be as many as exit_after, 2"),
        ({"threshold": 2.0}, "threshold must be in"),
        ({"keep_per_class": -1}, "keep_per_class must be >= 0"),
    ],
)
def test_bad_input_is_refused(change, message):
    parts = {"exit_after": EXITS, "threshold": 0.5, "keep_per_class": 5} | change
    with pytest.raises(ValueError, match=message):
        TokenEarlyExit(Transformer(8, 6, 2).blocks, [LinearTokenHead(8, 2)] * 3, **parts)


@pytest.mark.parametrize("head", ["linear", "query"])
def test_a_segmenter_learns_from_pixels_and_leaves_unlabelled_ones_out(head):
    torch.manual_seed(0)
    model = EarlyExitSegmenter((8, 12), 4, 3, dim=8, depth=3, heads=2, head=head)
    images, targets = torch.rand(2, 3, 8, 12), torch.randint(3, (2, 8, 12))
    targets[:, :4] = -100
    loss = segmentation_loss(model(images), targets)
    loss.backward()
    assert loss.isfinite() and model.tokenizer.projection.weight.grad.any()
    maps = model.class_maps(model(images))
    assert maps.shape == targets.shape
    with pytest.raises((ValueError, TypeError), match="head"):
        EarlyExitSegmenter((8, 12), 4, 3, head="linar")


@pytest.mark.parametrize("head", ["linear", "query"])
def test_mean_iou_is_that_of_a_loop_over_classes_and_absent_ones_do_not_count(head):
    torch.manual_seed(0)
    model = EarlyExitSegmenter((8, 12), 4, 6, dim=6, depth=1, heads=2, head=head).double()
    images, targets = torch.rand(4, 3, 8, 12, dtype=torch.float64), torch.randint(4, (4, 8, 12))
    targets[:, :3] = -100
    class_maps = model.class_maps
    model.class_maps = lambda outputs: class_maps(outputs).clamp(max=3)
    maps, counted = model.class_maps(model(images)), targets != -100
    overlaps = []
    for c in range(6):
        drawn, truth = (maps == c)[counted], (targets == c)[counted]
        if (drawn | truth).any():
            overlaps.append((drawn & truth).sum().item() / (drawn | truth).sum().item())
    assert len(overlaps) == 4
    found = evaluate_segmenter(model, IndexedDataset(images, targets))
    assert found["mean_iou"] == pytest.approx(sum(overlaps) / len(overlaps))
    assert found["pixel_accuracy"] == pytest.approx((maps == targets)[counted].double().mean().item())
    nothing = evaluate_segmenter(model, IndexedDataset(images, torch.full_like(targets, -100)))
    assert all(math.isnan(value) for value in nothing.values())
    one = EarlyExitSegmenter((8, 12), 4, 1, dim=6, depth=1, heads=2, head=head)
    assert evaluate_segmenter(one, IndexedDataset(images.float(), targets * 0)) == {
        "mean_iou": 1.0,
        "pixel_accuracy": 1.0,
    }


@pytest.mark.parametrize("positions", get_args(Positions))
def test_a_language_model_with_all_tokens_is_the_plain_one_and_predictions_know_nothing_of_what_follows(
    positions,
):
    torch.manual_seed(0)
    options = {"positions": positions, "normalize_keys": True, "key_value_heads": 1}
    model = CausalLanguageModel(12, 16, 4, 2, **options).double().eval()
    ids = torch.randint(12, (2, 15))
    valid = torch.arange(15) < torch.tensor([[15], [9]])
    gaps = (torch.arange(15) % 7 > 3) | (torch.arange(15) < torch.tensor([[3], [0]]))
    plain, padded, gappy = model(ids), model(ids, valid), model(ids, gaps)
    early = EarlyExitLanguageModel.adopt(model)
    assert early is model and torch.equal(model(ids), plain)
    torch.testing.assert_close(model(ids, valid)[valid], padded[valid])
    torch.testing.assert_close(model(ids, gaps)[gaps], gappy[gaps])
    model.early_exit.threshold = 0.22
    found, counts = model(ids), model.stages(ids).active_counts
    assert 0 < counts[-1].sum() < counts[0].sum()
    changed = ids.clone()
    changed[:, 9:] = (ids[:, 9:] + 1) % 12
    torch.testing.assert_close(model(changed)[:, :9], found[:, :9])
    torch.testing.assert_close(model(ids, valid)[1, :9], found[1, :9])
    gappy = model(ids, gaps)[gaps]
    model.early_exit.gather = False
    torch.testing.assert_close(model(ids), found)
    torch.testing.assert_close(model(ids, gaps)[gaps], gappy)
    assert model.generate(ids[:, :3], 2).shape == (2, 2)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.embedding.weight.zero_()
    torch.testing.assert_close(copied(ids), found)
    with pytest.raises(ValueError, match="model must be a CausalLanguageModel"):
        EarlyExitLanguageModel.adopt(model)
    with pytest.raises(ValueError, match="causal_attention must be None for early exit, got Identity"):
        EarlyExitLanguageModel(12, 16, 4, 2, causal_attention=nn.Identity())


def test_a_gap_in_a_text_is_as_if_it_were_not_there():
    torch.manual_seed(0)
    model = EarlyExitLanguageModel(12, 16, 4, 2).eval()
    ids, valid = torch.randint(12, (1, 15)), torch.ones(1, 15, dtype=torch.bool)
    valid[0, 4:7] = False
    confidence = token_probabilities(*model.stages(ids, valid).stages[0]).amax(1)
    model.early_exit.threshold = confidence[valid].median().item()
    found = model.stages(ids, valid)
    assert found.active_counts[:, 0].tolist()[:2] == [12, 6]
    together = model(ids[valid][None])[0]
    torch.testing.assert_close(model(ids, valid)[valid], together)


def test_cost_of_a_language_model_and_its_file(tmp_path):
    torch.manual_seed(0)
    model = EarlyExitLanguageModel(12, 16, 4, 2, threshold=0.16)
    ids = torch.randint(12, (4, 15))
    cost = early_exit_cost(model, ids)
    counts = model.eval().stages(ids).active_counts
    assert cost["token_layer_share"] == pytest.approx(counts.sum().item() / (4 * 60))
    heads = sum(counts[layers - 1].sum() for layers in model.early_exit.exit_after) * 16 * 12
    assert cost["multiply_adds"] == pytest.approx(
        ((token_multiply_adds(counts, 16).sum() + heads) / 4).item()
    )
    assert 0 < cost["multiply_adds_share"] < 1
    grouped = EarlyExitLanguageModel(12, 16, 4, 4, key_value_heads=1, exit_after=(4,))
    assert early_exit_cost(grouped, ids)["multiply_adds"] == multiply_adds(grouped.eval(), ids[:1])
    expected = model(ids)
    compress_model(model).save(tmp_path / "model.safetensors")
    fresh = EarlyExitLanguageModel(12, 16, 4, 2, threshold=0.16).eval()
    load_compressed(tmp_path / "model.safetensors").load_into(fresh)
    assert torch.equal(fresh(ids), expected)
