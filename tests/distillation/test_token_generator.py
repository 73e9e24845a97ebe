"""The rewriter of texts: what it writes, what it never writes, and gradients through what classifiers read."""

import math

import pytest
import torch
import torch.nn.functional as F
from contract import check_resume
from torch import nn

from coloss import Budget, fit
from coloss.data import IndexedDataset
from coloss.distillation import (
    RewritingPretraining,
    TextRewriter,
    distinct_share,
    hide_words,
    read_tokens,
    small_text_classifier,
    word_embedding,
)
from coloss.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_rewriter(seed: int = 0, **options: float) -> TextRewriter:
    torch.manual_seed(seed)
    return TextRewriter(12, num_labels=3, length=5, dim=16, heads=2, **options)


SOURCES = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0], [0, 0, 0, 0, 0]]).repeat(40, 1)
LABELS = torch.arange(120) % 3


def test_texts_keep_their_length_and_hold_no_special_word():
    written = new_rewriter().write(SOURCES, LABELS, generator=seeded())
    assert torch.equal(written.ids == 0, SOURCES == 0)
    assert set(written.ids.unique().tolist()) == {0, *range(3, 12)}
    assert torch.equal(written.tokens.sum(-1), torch.ones(120, 5))
    assert torch.equal(written.read == 0, SOURCES == 0)


def test_the_same_generator_writes_the_same_text():
    rewriter = new_rewriter()
    first, second, other = (rewriter.write(SOURCES, LABELS, generator=seeded(n)).ids for n in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_preferences_of_a_label_reach_its_texts_alone():
    rewriter = new_rewriter(hidden=1.0)
    before = rewriter(SOURCES, LABELS)
    with torch.no_grad():
        rewriter.preferences[1, 7] = 3.0
    after = rewriter(SOURCES, LABELS)
    torch.testing.assert_close(after[LABELS != 1], before[LABELS != 1])
    torch.testing.assert_close(
        after[LABELS == 1][..., 7] - before[LABELS == 1][..., 7], torch.full((40, 5), 30.0)
    )
    ids = rewriter.write(SOURCES, LABELS, generator=seeded()).ids[LABELS == 1]
    assert set(ids.unique().tolist()) <= {0, 7}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_hiding_leaves_padding(share):
    hidden = hide_words(SOURCES, share, seeded())
    assert torch.equal(hidden, SOURCES if share == 0 else torch.where(SOURCES == 0, 0, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a generator of another device needs one")
def test_draws_are_on_the_device_of_the_generator():
    generator = torch.Generator("cuda").manual_seed(0)
    written = new_rewriter().cuda().write(SOURCES.cuda(), LABELS.cuda(), generator=generator)
    assert written.ids.is_cuda and 0 < (written.read == 2).float().mean() < 1


def test_pretraining_learns_to_copy_what_is_not_hidden():
    torch.manual_seed(0)
    texts = torch.randint(3, 12, (256, 5))
    rewriter = new_rewriter(hidden=0.2)
    fit(
        rewriter,
        IndexedDataset(texts),
        methods=[RewritingPretraining()],
        budget=Budget(steps=60),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-2),
    )
    read = hide_words(texts, 0.2, seeded())
    there = read != 2
    assert (rewriter.cpu()(read, torch.zeros(256, dtype=torch.long)).argmax(-1) == texts)[
        there
    ].float().mean() > 0.9


def test_pretraining_resumes_bit_identically(tmp_path):
    texts = torch.randint(3, 12, (40, 5), generator=seeded())
    check_resume(new_rewriter, RewritingPretraining, IndexedDataset(texts), tmp_path)


def test_classifiers_read_tokens_as_they_read_ids_and_pass_gradients_back():
    network = small_text_classifier(12, 3, dim=8, length=5)
    tokens = F.one_hot(SOURCES[:3], 12).float().requires_grad_()
    logits = read_tokens(network, tokens)
    assert torch.equal(logits, network(SOURCES[:3]))
    logits.sum().backward()
    assert (tokens.grad[0].abs().sum() > 0) and tokens.grad.isfinite().all()
    assert torch.equal(tokens.grad[1, 2:], torch.zeros(3, 12)), "words after the end have no say"
    assert not word_embedding(network, 12)._forward_hooks


def test_the_hook_is_gone_after_a_failure():
    network = nn.Sequential(nn.Embedding(12, 4), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        read_tokens(network, F.one_hot(SOURCES[:3], 12).float())
    assert not network[0]._forward_hooks


def test_distinct_share_counts_runs():
    slogan, varied = torch.full((4, 6), 7), torch.arange(3, 27).view(4, 6)
    assert distinct_share(slogan) == 1 / 20 and distinct_share(varied) == 1.0
    assert math.isnan(distinct_share(torch.tensor([[7, 0, 0]]))) and math.isnan(distinct_share(slogan, 7))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocabulary_size": 3}, "vocabulary_size must be > 3, the special ids, got 3"),
        ({"num_labels": 0}, "num_labels must be >= 1, got 0"),
        ({"hidden": 1.5}, r"hidden must be in \[0, 1\], got 1.5"),
        ({"preference_scale": 0.0}, "preference_scale must be > 0, got 0.0"),
    ],
)
def test_bad_sizes_are_named(values, message):
    sizes = {"vocabulary_size": 12, "num_labels": 2, "length": 5} | values
    with pytest.raises(ValueError, match=message):
        TextRewriter(**sizes)


def test_a_network_without_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="one nn.Embedding with the 12 rows of the vocabulary, got 0"):
        word_embedding(nn.Linear(2, 2), 12)
    several = nn.ModuleList([nn.Embedding(12, 2), nn.Embedding(12, 2), nn.Embedding(5, 2)])
    with pytest.raises(InputError, match="rows of the vocabulary, got 2: 0, 1"):
        word_embedding(several, 12)
    with pytest.raises(InputError, match="rows of the vocabulary at '2', got 2: 0, 1"):
        word_embedding(several, 12, "2")
    assert word_embedding(several, 12, "1") is several[1]
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        distinct_share(SOURCES, 0)
