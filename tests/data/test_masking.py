"""Masks: what the cards of masked latent prediction demand of them, for every masker."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.data import (
    BlockMask1d,
    MaskRequest,
    Masks,
    MaskSchedule,
    MultiBlock2d,
    RandomColumns,
    RandomTokens,
    sample_block_mask_1d,
    sample_column_masks,
)
from coloss.ops import indices_to_mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ask(
    batch: int, grid: tuple[int, ...], seed: int = 0, shared: int = 0, progress: float = 0.0
) -> MaskRequest:
    return MaskRequest(batch, grid, seeded(seed), seeded(shared), progress)


MASKERS = [
    (MultiBlock2d(), (9, 7)),
    (BlockMask1d((0.2, 0.6), 3), (24,)),
    (RandomTokens((0.2, 0.6)), (24,)),
    (RandomColumns(), (24,)),
    (MaskSchedule(RandomTokens(), BlockMask1d((0.2, 0.6), 3), 0.5), (24,)),
]


@pytest.mark.parametrize(("masker", "grid"), MASKERS, ids=lambda part: type(part).__name__)
def test_indices_rise_stay_in_range_and_come_from_the_generators(masker, grid) -> None:
    for seed in range(5):
        masks = masker(ask(6, grid, seed, seed))
        for indices in (masks.context, masks.targets):
            assert indices.dtype == torch.int64
            assert indices.min() >= 0
            assert indices.max() < ask(6, grid).num_tokens
            assert (indices.diff(dim=-1) > 0).all()
        assert masks.context.shape[:2] == (1, 6)
        again = masker(ask(6, grid, seed, seed))
        assert torch.equal(masks.context, again.context)
        assert torch.equal(masks.targets, again.targets)


@pytest.mark.parametrize(("masker", "grid"), MASKERS, ids=lambda part: type(part).__name__)
def test_processes_share_sizes_and_choices_but_not_positions(masker, grid) -> None:
    for shared in range(5):
        one, other = masker(ask(6, grid, 1, shared)), masker(ask(6, grid, 2, shared))
        assert one.targets.shape == other.targets.shape
        assert not torch.equal(one.targets, other.targets)


@pytest.mark.parametrize(("masker", "grid"), MASKERS, ids=lambda part: type(part).__name__)
def test_samples_differ_and_an_empty_batch_has_empty_masks(masker, grid) -> None:
    targets = masker(ask(8, grid)).targets
    assert len({tuple(rows.flatten().tolist()) for rows in targets.unbind(1)}) > 4
    empty = masker(ask(0, grid))
    assert empty.targets.shape[1] == empty.context.shape[1] == 0


@pytest.mark.parametrize(("masker", "grid"), MASKERS, ids=lambda part: type(part).__name__)
def test_the_global_generator_is_left_alone(masker, grid) -> None:
    before = torch.get_rng_state()
    masker(ask(4, grid))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("masker", "grid"), MASKERS, ids=lambda part: type(part).__name__)
def test_no_target_is_in_the_context_where_there_is_room(masker, grid) -> None:
    masks, tokens = masker(ask(16, grid)), ask(1, grid).num_tokens
    seen = indices_to_mask(masks.context, tokens)
    assert not (seen & indices_to_mask(masks.targets, tokens)).any()


def test_blocks_of_patches_are_rectangles_of_one_size() -> None:
    for seed in range(20):
        masks = MultiBlock2d()(ask(5, (14, 14), seed, seed))
        rows, columns = masks.targets // 14, masks.targets % 14
        heights, widths = rows.amax(-1) - rows.amin(-1) + 1, columns.amax(-1) - columns.amin(-1) + 1
        assert len(heights.unique()) == len(widths.unique()) == 1
        height, width = heights.unique().item(), widths.unique().item()
        assert height * width == masks.targets.shape[2]
        # Within the rounding of both sides.
        assert (height + 0.5) * (width + 0.5) >= 0.15 * 196
        assert (height - 0.5) * (width - 0.5) <= 0.2 * 196
        assert (height + 0.5) / (width - 0.5) >= 0.75
        assert (height - 0.5) / (width + 0.5) <= 1.5


def test_target_blocks_reach_every_patch_and_overlap_one_another_at_times() -> None:
    masks = MultiBlock2d()(ask(400, (6, 6)))
    hidden = indices_to_mask(masks.targets, 36)
    assert hidden.flatten(0, 1).any(0).all()
    overlapping = hidden.sum(0).amax(-1) > 1
    assert 0 < overlapping.sum() < 400


def test_a_context_is_the_block_without_targets_cut_at_random_places() -> None:
    masks = MultiBlock2d(num_targets=1, context_scale=(1.0, 1.0))(ask(200, (8, 8)))
    size = masks.targets.shape[2]
    assert masks.context.shape == (1, 200, 64 - size)
    several = MultiBlock2d(context_scale=(1.0, 1.0))(ask(400, (8, 8)))
    free = ~indices_to_mask(several.targets, 64).any(0)
    seen = indices_to_mask(several.context[0], 64)
    assert (free & ~seen).any()
    # Cutting at the end would leave out the last rows: here first and last row are kept equally often.
    shares = [(seen & free)[:, rows].sum() / free[:, rows].sum() for rows in (slice(0, 8), slice(56, 64))]
    assert shares[0].item() == pytest.approx(shares[1].item(), abs=0.1)


def test_a_context_that_would_be_too_small_sees_part_of_a_target() -> None:
    # Two targets of half the grid each leave little more than nothing in many samples.
    masker = MultiBlock2d(2, (0.5, 0.5), (1.0, 1.0), (1.0, 1.0), min_keep=12)
    masks = masker(ask(200, (6, 6)))
    assert masks.context.shape[2] == 12
    seen, hidden = indices_to_mask(masks.context[0], 36), indices_to_mask(masks.targets, 36)
    assert not (seen & hidden[0]).any()
    relaxed = (seen & hidden[1]).any(-1)
    assert 0 < relaxed.sum() < 200
    # Let in only where it had to be: elsewhere 12 patches are free of both.
    assert ((~hidden.any(0)).sum(-1)[relaxed] < 12).all()


def test_small_grids_keep_an_eighth_and_large_ones_ten() -> None:
    assert MultiBlock2d()(ask(300, (4, 4))).context.shape[2] >= 2
    assert MultiBlock2d()(ask(300, (14, 14))).context.shape[2] >= 10
    with pytest.raises(ValueError, match="min_keep must be at most the context block's 4 patches, got 5"):
        MultiBlock2d(min_keep=5, context_scale=(0.9, 0.9))(ask(1, (2, 2)))


@settings(max_examples=25)
@given(st.integers(0, 60), st.data(), st.integers(1, 12), st.integers(0, 10**6))
def test_hidden_spans_are_as_many_and_as_long_as_they_should_be(n, data, min_block, seed) -> None:
    keep = data.draw(st.integers(0, n))
    hidden = sample_block_mask_1d(n, keep, min_block, seeded(seed))
    assert hidden.shape == (n,)
    assert hidden.sum() == n - keep
    runs = [len(list(group)) for value, group in itertools.groupby(hidden.tolist()) if value]
    assert all(run >= min(min_block, n - keep) for run in runs)


def test_hidden_spans_reach_every_place_and_prefer_no_end() -> None:
    generator = seeded()
    share = torch.stack([sample_block_mask_1d(12, 6, 2, generator) for _ in range(1500)]).float().mean(0)
    assert share.mean().item() == pytest.approx(0.5)
    assert (share - share.flip(0)).abs().max() < 0.08
    assert share.min() > 0.15


def test_all_kept_hides_nothing_and_a_masker_keeps_at_least_one() -> None:
    assert not sample_block_mask_1d(9, 9).any()
    assert sample_block_mask_1d(9, 0).all()
    masks = BlockMask1d((1.0, 1.0))(ask(3, (9,)))
    assert masks.targets.shape == (1, 3, 0)
    assert BlockMask1d((0.01, 0.01), 2)(ask(3, (9,))).context.shape == (1, 3, 1)


@pytest.mark.parametrize("masker", [BlockMask1d((0.15, 0.25), 10), RandomTokens((0.15, 0.25))])
def test_context_and_targets_are_a_partition_of_the_series(masker) -> None:
    for seed in range(10):
        masks = masker(ask(4, (200,), seed, seed))
        assert 30 <= masks.context.shape[2] <= 50
        both = torch.cat([masks.context, masks.targets], 2).sort().values
        assert torch.equal(both, torch.arange(200).expand(1, 4, 200))


@settings(max_examples=25)
@given(st.integers(2, 40), st.integers(0, 10**6))
def test_columns_of_context_and_targets_are_disjoint_and_fit(columns: int, seed: int) -> None:
    context, targets = sample_column_masks(5, columns, (0.1, 0.5), (0.1, 0.7), 4, seeded(seed))
    assert context.shape[1] >= 1
    assert targets.shape[2] >= 1
    assert context.shape[1] + targets.shape[2] <= columns
    assert not (indices_to_mask(context, columns) & indices_to_mask(targets, columns)).any()


def test_sets_of_target_columns_are_drawn_independently() -> None:
    # Slices of one array that is shuffled in place share memory, and all sets would be the last one.
    _, targets = sample_column_masks(50, 40, (0.2, 0.2), (0.3, 0.3), 4, seeded())
    for one, other in itertools.combinations(targets, 2):
        assert (one != other).any(-1).all()
    assert len({part.data_ptr() for part in targets}) == 4


def test_every_column_is_context_and_target_equally_often() -> None:
    context, targets = sample_column_masks(4000, 5, (0.4, 0.4), (0.2, 0.2), 2, seeded())
    assert torch.allclose(indices_to_mask(context, 5).float().mean(0), torch.tensor(0.4), atol=0.03)
    assert torch.allclose(indices_to_mask(targets, 5).float().mean((0, 1)), torch.tensor(0.2), atol=0.03)


def test_column_sizes_are_drawn_again_until_they_fit() -> None:
    for seed in range(50):
        context, targets = sample_column_masks(1, 10, (0.1, 0.9), (0.1, 0.9), 1, seeded(seed))
        assert context.shape[1] + targets.shape[2] <= 10
    with pytest.raises(
        ValueError, match=r"must leave room for one another in 10 columns, got at least \(6, 5\)"
    ):
        sample_column_masks(1, 10, (0.6, 0.6), (0.5, 0.5))


def test_a_schedule_is_one_masker_at_first_and_the_other_in_the_end() -> None:
    base, alternative = RandomTokens((0.5, 0.5)), BlockMask1d((0.25, 0.25), 2)
    schedule = MaskSchedule(base, alternative, lambda progress: progress)
    for progress, masker in ((0.0, base), (1.0, alternative)):
        found, expected = schedule(ask(3, (16,), progress=progress)), masker(ask(3, (16,)))
        assert torch.equal(found.targets, expected.targets)
    shared = seeded(3)
    chosen = [
        schedule(MaskRequest(1, (16,), seeded(), shared, 0.3)).context.shape[2] == 4 for _ in range(300)
    ]
    assert sum(chosen) / 300 == pytest.approx(0.3, abs=0.08)


def test_masks_of_unequal_rows_are_filled_up() -> None:
    hidden = torch.tensor([[True, False, False, True], [False, False, True, False]])
    masks = Masks.of(~hidden[None], hidden[None])
    assert masks.targets.tolist() == [[[0, 3], [2, 0]]]
    assert masks.target_valid.tolist() == [[[True, True], [True, False]]]
    assert masks.context_valid.sum(-1).tolist() == [[2, 3]]
    with pytest.raises(ValueError, match=r"equally many True in every row, got \[1, 2\]"):
        Masks.partition(hidden)


def test_a_masker_may_look_at_the_target_encoders_tokens() -> None:
    def hide_the_largest(request: MaskRequest) -> Masks:
        norms = request.tokens.norm(dim=-1)
        return Masks.partition(norms >= norms.amax(-1, keepdim=True))

    tokens = torch.zeros(2, 3, 4)
    tokens[0, 2], tokens[1, 0] = 1.0, 1.0
    schedule = MaskSchedule(hide_the_largest, hide_the_largest, 0.5)
    assert schedule(MaskRequest(2, (3,), tokens=tokens)).targets.tolist() == [[[2], [0]]]


INDICES = torch.zeros(2, 3, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Masks(INDICES, INDICES[:1]), "one for each of 1 of targets, got 2"),
        (lambda: Masks(INDICES[:, :2], INDICES), "of one batch, got 2 and 3"),
        (
            lambda: Masks(INDICES, INDICES, target_valid=INDICES[..., :1] > 0),
            r"target_valid must be \(2, 3, 4\)",
        ),
        (lambda: MaskRequest(-1, (3,)), "batch_size must be >= 0, got -1"),
        (lambda: MaskRequest(1, ()), r"grid must hold at least one token along each axis, got \(\)"),
        (
            lambda: MultiBlock2d(target_scale=(0.3, 0.2)),
            r"target_scale must be a rising pair .* got \(0.3, 0.2\)",
        ),
        (lambda: MultiBlock2d(context_scale=(0.5, 1.5)), "context_scale must be .* at most 1, got"),
        (lambda: MultiBlock2d(num_targets=0), "num_targets must be >= 1, got 0"),
        (lambda: MultiBlock2d(retries=0), "retries must be >= 1, got 0"),
        (lambda: MultiBlock2d()(ask(1, (4,))), r"grid must be \(rows, columns\)"),
        (lambda: BlockMask1d()(ask(1, (4, 4))), r"grid must be \(tokens,\)"),
        (lambda: BlockMask1d((0.0, 0.5)), "keep must be a rising pair of numbers > 0"),
        (lambda: BlockMask1d(min_block=0), "min_block must be >= 1, got 0"),
        (lambda: sample_block_mask_1d(5, 6), r"n_keep must be in \[0, n = 5\], got 6"),
        (lambda: sample_block_mask_1d(5, 2, 0), "min_block must be >= 1, got 0"),
        (lambda: RandomTokens((0.5, 2.0)), "keep must be"),
        (lambda: RandomColumns(num_targets=0), "num_targets must be >= 1, got 0"),
        (lambda: RandomColumns(target=(0.0, 0.5)), "target must be"),
        (lambda: sample_column_masks(2, 5, n_targets=0), "n_targets must be >= 1, got 0"),
        (
            lambda: MaskSchedule(RandomTokens(), RandomTokens(), 1.5),
            r"probability must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: MaskSchedule(RandomTokens(), RandomTokens(), lambda p: -1.0)(ask(1, (4,))),
            r"probability must be in \[0, 1\], got -1",
        ),
    ],
)
def test_values_out_of_range_are_refused(call, message, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        call()
