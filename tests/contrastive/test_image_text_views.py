"""Captions keep their words but for the edits that were asked for, at the level of ids and of strings."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coloss.contrastive import CaptionViews, TextAugment, WordAugment, strong_image_views
from coloss.data import WordVocabulary


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CAPTIONS = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 9, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_views_are_captions_of_known_words_with_padding_behind(seed, stop, share):
    augment = WordAugment(3, stop_ids=[3, 9], synonyms={5: [11, 12]}, stop=stop, share=share)
    views = augment(CAPTIONS, seeded(seed))
    assert views.shape == (3, 4, 6)
    assert torch.equal(views, augment(CAPTIONS, seeded(seed)))
    for view in views:
        for caption, row in zip(CAPTIONS.tolist(), view.tolist()):
            words = [word for word in row if word]
            assert row == words + [0] * (6 - len(words))
            assert bool(words) == any(caption)
            allowed = Counter(caption) + Counter({11: 6, 12: 6} if 5 in caption else {})
            assert not Counter(words) - allowed


def test_stop_words_go_together_and_never_all_words():
    augment = WordAugment(1, stop_ids=[3, 9], stop=1.0, share=0.0)
    assert augment(CAPTIONS)[0].tolist() == [
        [4, 5, 6, 7, 8, 0],
        [3, 9, 0, 0, 0, 0],
        [5, 0, 0, 0, 0, 0],
        [0] * 6,
    ]
    some = WordAugment(2000, stop_ids=[3], stop=0.8, share=0.0)(CAPTIONS[:1], seeded())[:, 0]
    gone = (some[:, 0] != 3).float().mean()
    assert abs(gone - 0.8) < 0.03


def test_each_edit_does_what_it_says():
    swapped = WordAugment(200, stop=0.0, synonym=0, swap=1, delete=0, share=0.2)(CAPTIONS[:1], seeded())[:, 0]
    assert torch.equal(swapped.sort(1).values, CAPTIONS[:1].sort(1).values.expand(200, -1))
    moved = (swapped != CAPTIONS[:1]).sum(1)
    assert set(moved.tolist()) == {0, 2}  # one swap of a fifth of six words; a word may be drawn twice
    dropped = WordAugment(3000, stop=0.0, synonym=0, swap=0, delete=1, share=0.3)(CAPTIONS[:1], seeded())[
        :, 0
    ]
    assert abs((dropped == 0).float().mean() - 0.3) < 0.02
    for row in dropped[:50].tolist():
        kept = [word for word in row if word]
        assert kept == sorted(kept)  # the order of the caption
    exchange = WordAugment(
        500, synonyms={4: [20], 5: [21, 22]}, stop=0.0, synonym=1, swap=0, delete=0, share=0.1
    )
    views = exchange(CAPTIONS[:1], seeded())[:, 0]
    assert ((views != CAPTIONS[:1]).sum(1) == 1).all()
    assert set(views[:, 1].tolist()) == {4, 20}
    assert set(views[:, 2].tolist()) == {5, 21, 22}


def test_edits_are_drawn_by_their_weights():
    augment = WordAugment(6000, synonyms={5: [30]}, stop=0.0, share=1.0)
    views = augment(torch.tensor([[5, 6, 7]]), seeded())[:, 0]
    exchanged = (views == 30).any(1).float().mean()
    dropped = (views == 0).any(1).float().mean()
    assert abs(exchanged - 0.4) < 0.02
    assert abs(dropped - 0.2) < 0.02
    with_none = WordAugment(6000, stop=0.0, share=1.0)(torch.tensor([[5, 6, 7]]), seeded())[:, 0]
    assert abs((with_none == 0).any(1).float().mean() - 1 / 3) < 0.02


def test_strings_keep_one_word_and_take_new_ones_from_synonyms():
    captions = ["The cat, in a hat", "a", "", "of the"]
    augment = TextAugment(synonyms={"cat": ["kitten"]}, stop=1.0, swap=0, delete=0)
    assert [augment(text, seeded()) for text in captions] == ["kitten hat", "a", "", "of the"]
    generator = seeded(1)
    swap = TextAugment(stop=0.0, synonym=0, swap=1, delete=0, share=0.5)
    for _ in range(30):
        assert sorted(swap("one two three four", generator).split()) == ["four", "one", "three", "two"]
    drop = TextAugment(stop=0.0, synonym=0, swap=0, delete=1, share=0.4)
    lengths = [len(drop("one two three four five", generator).split()) for _ in range(600)]
    assert min(lengths) >= 1
    assert abs(sum(lengths) / 600 - 3.0) < 0.15
    everything = TextAugment(stop=0.0, synonym=0, swap=0, delete=1, share=1.0)
    assert len(everything("one two three").split()) == 1


def test_captions_are_edited_as_they_were_written():
    vocabulary = WordVocabulary(["kitten", "hat"], max_words=3)
    views = CaptionViews(
        ["a hat", "the CAT"],
        vocabulary,
        TextAugment(synonyms={"cat": ["kitten"]}, stop=1.0, swap=0, delete=0),
        views=2,
    )
    assert views.of_ids(torch.tensor([1, 0])).tolist() == [[[3, 0, 0], [4, 0, 0]]] * 2


def test_strong_images_are_random_by_the_generator_alone():
    images = torch.rand(3, 3, 12, 12)
    one, again = (strong_image_views(images, 2, seeded(4)) for _ in range(2))
    assert torch.equal(one, again)
    assert one.shape == (2, 3, 3, 12, 12)
    assert one.min() >= 0
    assert one.max() <= 1
    assert not torch.equal(one[0], one[1])
    sharp = strong_image_views(images, 2, seeded(4), blur=0.0)
    blurred = strong_image_views(images, 2, seeded(4), blur=1.0)
    assert blurred.diff(dim=3).abs().mean() < sharp.diff(dim=3).abs().mean()
    assert strong_image_views(images[:0], 2).shape == (2, 0, 3, 12, 12)


def test_bad_input_is_named():
    for call, message in (
        (lambda: WordAugment(0), "views must be >= 1, got 0"),
        (lambda: WordAugment(stop=1.5), r"stop must be in \[0, 1\], got 1.5"),
        (lambda: WordAugment(share=-0.1), r"share must be in \[0, 1\], got -0.1"),
        (lambda: WordAugment(synonym=1, swap=0, delete=0), "one that applies > 0, got 1, 0, 0"),
        (lambda: TextAugment(delete=-1), "synonym, swap and delete must be >= 0"),
        (lambda: CaptionViews([], WordVocabulary([]), views=0), "views must be >= 1, got 0"),
        (lambda: strong_image_views(torch.rand(1, 3, 4, 4), blur=2.0), r"blur must be in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_captions_must_be_rows_of_ids(as_users_call):
    with pytest.raises(
        ValueError, match=r"word_ids must be integers \(batch, words\), got torch.float32 \(2, 3\)"
    ):
        WordAugment()(torch.rand(2, 3))
