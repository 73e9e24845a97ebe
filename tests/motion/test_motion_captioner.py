from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import coloss
from coloss import Budget
from coloss.data import IndexedDataset
from coloss.motion import (
    FromEmbeddings,
    GenericTextEncoder,
    LanguageMotionModel,
    MotionCaptioner,
    caption_loss,
    sentence_perplexity,
    train_generic_text,
)
from coloss.nn import CausalLanguageModel
from coloss.train import load_model, save_model

WORDS = torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]])


def new_motion_model() -> LanguageMotionModel:
    return LanguageMotionModel(9, 3, max_tokens=4, dim=8, layers=1, heads=2, max_words=5)


def new_captioner() -> MotionCaptioner:
    return MotionCaptioner.on(new_motion_model(), GenericTextEncoder(9, dim=8, depth=1, heads=2))


# The text encoder


def test_padding_changes_no_vector_of_a_text() -> None:
    encoder = GenericTextEncoder(9, dim=8, depth=2, heads=2)
    torch.testing.assert_close(encoder(WORDS)[1:], encoder(WORDS[1:, :2]))
    logits = encoder.next_word_logits(WORDS)
    torch.testing.assert_close(logits[1:, :3], encoder.next_word_logits(WORDS[1:, :2]))


def test_a_text_encoder_learns_its_sentences(as_users_call: None) -> None:
    words = WORDS.repeat(8, 1)
    trained = train_generic_text(
        words, 9, dim=8, depth=1, heads=2, budget=Budget(steps=12), batch_size=8, learning_rate=3e-2
    )
    assert sentence_perplexity(trained, words) < 4 < sentence_perplexity(GenericTextEncoder(9, dim=8), words)


# The captioner


def test_vectors_stand_for_their_ids_padding_included() -> None:
    model = CausalLanguageModel(9, dim=8, depth=2, heads=2)
    valid = WORDS > 0
    vectors = model.embedding(WORDS)
    torch.testing.assert_close(FromEmbeddings(model)(vectors, valid), model(WORDS, valid))
    assert not model.embedding._forward_hooks


def test_words_see_the_motion_and_earlier_words_alone() -> None:
    captioner, motions = new_captioner().double(), torch.randn(2, 4, 3).double()
    before = captioner((motions, WORDS))
    other = WORDS.clone()
    other[0, 1] = 8
    after = captioner((motions, other))
    assert torch.equal(before[0, :2], after[0, :2])
    assert not torch.equal(before[0, 2], after[0, 2])
    moved = captioner((motions + torch.randn(2, 4, 3).double(), WORDS))
    assert (before != moved).any(2).all()


def test_a_masked_motion_token_says_nothing() -> None:
    captioner, motions = new_captioner(), torch.randn(2, 4, 3)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    changed = motions.clone()
    changed[1, 2:] = 9.0
    torch.testing.assert_close(captioner((motions, WORDS, valid)), captioner((changed, WORDS, valid)))


def test_it_learns_to_say_which_motion_it_sees_and_can_be_stored(tmp_path: Path, as_users_call: None) -> None:
    motions = torch.stack([torch.full((4, 3), 2.0), torch.full((4, 3), -2.0)]).repeat(4, 1, 1)
    motions = motions + torch.randn(8, 4, 3) * 0.1
    words = WORDS.repeat(4, 1)
    captioner = new_captioner()
    run = coloss.fit(
        captioner,
        IndexedDataset((motions, words), words),
        partial(caption_loss, captioner=captioner),
        budget=Budget(steps=16),
        batch_size=8,
        optimizer=partial(torch.optim.AdamW, lr=3e-2),
    )
    written = run.model.write(motions[:2], max_words=4, beams=3)
    assert written.tolist() == WORDS.tolist()
    prompted = run.model.write(motions[:2], max_words=4, beams=2, prompt=torch.tensor([3]))
    assert prompted[0].tolist() == [4, 5, 0, 0]
    save_model(run.model, tmp_path / "model.safetensors")
    fresh = new_captioner()
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh.write(motions[:2], max_words=4, beams=3), written)


def test_any_callable_from_embeddings_to_logits_will_do() -> None:
    embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def language_model(vectors: Tensor, valid: Tensor) -> Tensor:
        return head(vectors.cumsum(1) * valid[..., None])

    captioner = MotionCaptioner(new_motion_model(), embedding, language_model, begin_id=1, end_id=2)
    captioner((torch.randn(2, 4, 3), WORDS)).sum().backward()
    assert all(p.grad is not None for p in (captioner.prefix.weight, embedding.weight, head.weight))
    written = captioner.write(torch.randn(2, 4, 3), max_words=3, beams=2)
    assert not torch.isin(written, torch.tensor([1, 2])).any()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="end_id must be in 0 .. 8, got 9"):
        MotionCaptioner(new_motion_model(), nn.Embedding(9, 6), lambda v, m: v, begin_id=1, end_id=9)
    with pytest.raises(ValueError, match="padding_id must be in 0 .. 8, got 9"):
        GenericTextEncoder(9, padding_id=9)
    with pytest.raises(ValueError, match="words must hold at least one sentence"):
        train_generic_text(WORDS[:0], 9)
    with pytest.raises(ValueError, match="learning_rate must be > 0 and finite, got 0"):
        train_generic_text(WORDS, 9, learning_rate=0.0)
