"""Facts about clips mixed of two, and about the losses of their regions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.motion import (
    mix_contrastive_loss,
    queue_contrast_loss,
    region_features,
    skeleton_mix,
)
from coloss.nn import SkeletonEncoder, masked_pool
from coloss.ops import graph_partition

PARTS = {"trunk": (0, 1), "left": (2, 3), "right": (4,)}
NONE = torch.zeros(0, 3)


@settings(max_examples=30)
@given(st.integers(2, 6), st.booleans(), st.booleans(), st.integers(0, 200))
def test_the_mask_is_the_set_of_changed_blocks(count: int, per_clip: bool, persons: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = (count, 3, 12, 6, 2) if persons else (count, 3, 12, 6)
    clips = torch.rand(shape, generator=draw)
    mixed = skeleton_mix(clips, PARTS, (1, 2), (1, 3), 3, draw, per_clip=per_clip)
    changed = (mixed.clips != clips).any(1).unflatten(1, (4, 3))
    assert torch.equal(changed.any(2), changed.all(2)), "a block is pasted whole"
    joints = changed.any(2)
    joints = joints.all(-1) if persons else joints
    assert torch.equal(joints, mixed.mask.expand(count, 4, 6))
    source = torch.where(mixed.mask.expand(count, 4, 6)[:, None].repeat_interleave(3, 2)[..., None], 1, 0)
    source = source.bool().expand(count, 3, 12, 6, shape[-1] if persons else 1).reshape(shape)
    assert torch.equal(mixed.clips, torch.where(source, clips[mixed.partner], clips))
    assert bool((mixed.partner != torch.arange(count)).all()), "nobody is his own partner"
    assert not mixed.mask[..., 5].any(), "a joint in no part stays"
    assert 1 <= int(mixed.mask.any(-1).sum(-1).max()) <= 3


def test_every_shift_count_of_parts_and_window_is_drawn() -> None:
    """Traps: two clips alone, the largest shift, and the longest window at the last place."""
    draw = torch.Generator().manual_seed(0)
    shifts, parts, lengths, ends = set(), set(), set(), set()
    for _ in range(80):
        mixed = skeleton_mix(torch.zeros(4, 1, 8, 5), PARTS, (1, 3), (2, 3), 2, draw)
        shifts.add(int(mixed.partner[0]))
        parts.add(int(mixed.mask[:, [0, 2, 4]].any(0).sum()))
        rows = mixed.mask.any(1).nonzero().flatten()
        lengths.add(len(rows))
        ends.add((int(rows[0]), int(rows[-1])))
    assert shifts == {1, 2, 3}
    assert parts == {1, 2, 3}
    assert lengths == {2, 3}
    assert ends == {(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)}
    assert skeleton_mix(torch.zeros(2, 1, 4, 5), PARTS, stride=2, blocks=(1, 1)).partner.tolist() == [1, 0]


def encoder() -> SkeletonEncoder:
    torch.manual_seed(0)
    return SkeletonEncoder(graph_partition([-1, 0, 1, 0, 3]), widths=(4, 6), strides=(2, 1), kernel=3)


def test_a_whole_paste_is_the_partner() -> None:
    model, clips = encoder().eval(), torch.randn(3, 3, 8, 5)
    mixed = skeleton_mix(clips, PARTS, (3, 3), (4, 4), model.stride)
    assert mixed.mask.all()
    inside, outside = region_features(model.maps(mixed.clips), mixed.mask, mixed.clips)
    torch.testing.assert_close(inside, model(clips)[mixed.partner])
    assert outside.abs().max() == 0


def test_both_regions_together_are_the_global_mean() -> None:
    model, clips = encoder().eval(), torch.randn(3, 3, 8, 5)
    mixed = skeleton_mix(clips, PARTS, (1, 2), (1, 3), model.stride)
    maps = model.maps(mixed.clips)
    inside, outside = region_features(maps, mixed.mask, mixed.clips)
    size = mixed.mask.sum()
    whole = inside * size + outside * (mixed.mask.numel() - size)
    torch.testing.assert_close(whole, mixed.mask.numel() * model(mixed.clips))


def test_persons_who_are_not_there_do_not_enter_the_mean() -> None:
    model, alone = encoder().eval(), torch.randn(4, 3, 8, 5, 1)
    padded = torch.cat([alone, torch.zeros_like(alone)], -1)
    mask = skeleton_mix(alone, PARTS, (1, 2), (1, 3), 2, per_clip=True).mask
    for one, other in zip(
        region_features(model.maps(alone), mask, alone), region_features(model.maps(padded), mask, padded)
    ):
        torch.testing.assert_close(one, other)
    # A partner with one person pasted into a clip with two: the second is outside only.
    both = torch.randn(1, 3, 8, 5, 2)
    inner = mask[:1].repeat_interleave(2, 1)[:, None, :, :]
    both[..., 1] = both[..., 1].masked_fill(inner, 0)
    maps = model.maps(both)
    inside, outside = region_features(maps, mask[:1], both)
    first, second = (masked_pool(maps[[person]], mask[0]) for person in (0, 1))
    torch.testing.assert_close(inside, first[0])
    torch.testing.assert_close(outside, (first[1] + second[1]) / 2)


def slow(q, k, negatives, tau, extra=None):
    """Row by row, in NumPy."""
    unit = [np.asarray(x, float) / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k)]
    rows = []
    for i in range(len(q)):
        others = [row / np.linalg.norm(row) for row in np.asarray(negatives, float)]
        if extra is not None:
            others.append(np.asarray(extra[i], float) / np.linalg.norm(extra[i]))
        positive = np.exp(unit[0][i] @ unit[1][i] / tau)
        total = positive + sum(np.exp(unit[0][i] @ row / tau) for row in others)
        rows.append(-np.log(positive / total))
    return np.mean(rows)


@pytest.mark.parametrize("beside", [False, True])
def test_the_loss_is_its_formula(beside: bool) -> None:
    q, k, e = torch.randn(3, 4, 5, dtype=torch.float64)
    negatives = torch.randn(7, 5, dtype=torch.float64)
    found = queue_contrast_loss(q, k, negatives, 0.2, extra=e if beside else None)
    expected = slow(q.numpy(), k.numpy(), negatives.numpy(), 0.2, e.numpy() if beside else None)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_the_whole_objective_is_the_sum_of_its_parts() -> None:
    q, p, c, k = torch.randn(4, 4, 3, dtype=torch.float64)
    partner, negatives = torch.tensor([1, 2, 3, 0]), torch.randn(6, 3, dtype=torch.float64)
    tau = 0.3
    expected = slow(q, k, negatives, tau)
    expected += (slow(p, k[partner], negatives, tau, c) + slow(c, k, negatives, tau, p)) / 2
    assert mix_contrastive_loss(q, p, c, k, partner, negatives, tau).item() == pytest.approx(expected)


def test_limits() -> None:
    """With an empty queue and a rest across to everything, a region costs log(1 + e^((0 - <p, k>) / tau))."""
    p, c = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]])
    k = torch.tensor([[0.6, 0.8, 0.0]])
    found = queue_contrast_loss(p, k, NONE, 0.2, extra=c)
    assert found.item() == pytest.approx(math.log(1 + math.exp((0 - 0.6) / 0.2)))
    q = torch.randn(2, 3, requires_grad=True)
    alone = queue_contrast_loss(q, q.detach(), NONE, 0.2)
    alone.backward()
    assert alone == 0
    assert q.grad.abs().max() == 0
    sharp = queue_contrast_loss(p, -k, k.expand(4, 3), 1e-4)
    assert sharp.isfinite()
    assert sharp.item() == pytest.approx(1.2e4, rel=1e-3)
    assert queue_contrast_loss(p.bfloat16(), k.bfloat16(), NONE, extra=c.bfloat16()).dtype == torch.float32
    assert queue_contrast_loss(torch.full((1, 3), torch.nan), k, k).isnan()


def test_keys_of_the_own_clip_are_no_negatives() -> None:
    q, k, negatives = torch.randn(2, 3), torch.randn(2, 3), torch.randn(5, 3)
    ids = torch.tensor([3, 9])
    stored = torch.tensor([9, 1, 3, -1, 3])
    found = queue_contrast_loss(q, k, negatives, query_ids=ids, negative_ids=stored)
    parts = [queue_contrast_loss(q[[i]], k[[i]], negatives[stored != ids[i]]) for i in range(2)]
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_gradients() -> None:
    q, p, c = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    k, negatives = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    partner = torch.tensor([2, 0, 1])

    def loss(q, p, c):
        return mix_contrastive_loss(q, p, c, k, partner, negatives, 0.5)

    # The other region is a negative that stands still.
    def held(q, p, c):
        one = queue_contrast_loss(p, k[partner], negatives, 0.5, extra=c.detach())
        other = queue_contrast_loss(c, k, negatives, 0.5, extra=p.detach())
        return queue_contrast_loss(q, k, negatives, 0.5) + (one + other) / 2

    for one, other in zip(*(torch.autograd.grad(f(q, p, c), (q, p, c)) for f in (loss, held))):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda q: queue_contrast_loss(q, k, negatives, 0.5, extra=k), (q,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: skeleton_mix(torch.zeros(1, 3, 8, 5), PARTS), "clips must hold at least 2.*got 1"),
        (lambda: skeleton_mix(torch.zeros(2, 3, 30, 5), PARTS), "stride must divide the 30 frames, got 4"),
        (lambda: skeleton_mix(torch.zeros(2, 3, 8, 5), PARTS), r"blocks must be .* in \[1, 2\]"),
        (lambda: skeleton_mix(torch.zeros(2, 3, 8, 5), PARTS, (2, 4)), r"n_parts must be .* \[1, 3\]"),
        (
            lambda: skeleton_mix(torch.zeros(2, 3, 8, 4), PARTS),
            r"parts must hold joints in \[0, 4\), got 0 to 4",
        ),
        (lambda: skeleton_mix(torch.zeros(2, 3, 8, 5), [[0], []]), "parts must be at least one"),
        (lambda: queue_contrast_loss(NONE, NONE, NONE, 0.0), "temperature must be > 0"),
        (
            lambda: queue_contrast_loss(NONE, NONE, NONE, query_ids=torch.zeros(0).long()),
            "must be given together",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
