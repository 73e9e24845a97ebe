"""The small pair of encoders, what is measured of it, and a task whose trials do not touch each other."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.contrastive import (
    OPENMOJI_PROMPTS,
    ProjectedEncoder,
    class_embeddings,
    evaluate_image_text,
    image_text_model,
    image_text_task,
)
from coloss.data import ImageTextSplits, IndexedDataset, WordVocabulary, load_image_text
from coloss.nn import ConvNet, DualEncoder
from coloss.train import Budget, Setting


class Words(nn.Module):
    """The mean of one-hot words, padding left out."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, 6)[:, :, 3:].sum(1).float()


def toy(order: tuple[int, ...] = (0, 1, 2)) -> ImageTextSplits:
    """Images that are one-hot vectors of the words "cat", "dog" and "owl"; captions in a given order."""
    vocabulary = WordVocabulary(["cat", "dog", "owl"], max_words=2)
    words = ["cat", "dog", "owl"]
    ids = vocabulary.encode([words[i] for i in order])
    part = IndexedDataset((torch.eye(3), ids), torch.arange(3))
    return ImageTextSplits(
        "toy",
        "retrieval",
        part,
        part,
        part,
        (3,),
        3,
        tuple(words),
        vocabulary=vocabulary,
        captions=tuple(words),
    )


MODEL = DualEncoder(nn.Identity(), Words())


def test_a_perfect_match_scores_one():
    found = evaluate_image_text(MODEL, toy(), ks=(1,), templates=("{}",))
    assert set(found.values()) == {1.0}
    assert sorted(found) == [
        "class_map",
        "image_to_text_recall@1",
        "mrr",
        "recall@1",
        "text_to_image_recall@1",
        "zero_shot",
    ]


def test_metrics_of_wrong_partners_by_hand():
    # Captions of the first two pairs are exchanged: only the third finds its partner; images still match class names.
    found = evaluate_image_text(MODEL, toy((1, 0, 2)), ks=(1, 2), templates=("{}",))
    assert found["image_to_text_recall@1"] == found["text_to_image_recall@1"] == pytest.approx(1 / 3)
    assert found["zero_shot"] == 1.0
    # Of the two exchanged ones, the partner ties with the third caption at score 0.
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert found["class_map"] == found["mrr"]


def test_all_texts_of_a_class_count_for_class_map():
    splits = toy()
    part = IndexedDataset(splits.test.inputs, torch.tensor([0, 0, 1]))
    ties = evaluate_image_text(MODEL, replace(splits, test=part), templates=("{}",))
    # The first two images have two relevant texts, at ranks 1 and 2 (1 and 3 for the one whose tie is lost): 1 and (1 + 2/2) / 2.
    assert ties["class_map"] == pytest.approx(1.0)
    assert ties["zero_shot"] == pytest.approx(1 / 3)


def test_classes_are_the_mean_of_their_prompts():
    prompts = {"cat": ["cat", "dog"], "dog": ["dog"], "owl": ["owl"]}
    found = class_embeddings(MODEL, toy(), prompts, templates=("{}",))
    expected = torch.tensor([[2**-0.5, 2**-0.5, 0], [0, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(found, expected)


def test_a_diverged_model_scores_nan_and_data_without_classes_have_no_zero_shot():
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images * float("nan")

    found = evaluate_image_text(DualEncoder(Broken(), Words()), toy())
    assert all(value != value for value in found.values())
    bare = replace(toy(), class_names=None, test=IndexedDataset(toy().test.inputs))
    assert "zero_shot" not in evaluate_image_text(MODEL, bare)
    with pytest.raises(
        ValueError, match="splits must name classes to be told apart by prompts, toy has none"
    ):
        class_embeddings(MODEL, bare)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="prompts must hold some words for every class, got none for 'dog'"):
        class_embeddings(MODEL, toy(), {"cat": ["cat"], "dog": [], "owl": ["owl"]})
    with pytest.raises(ValueError, match=r"templates must each hold \{\}, at least one, got \['a thing'\]"):
        class_embeddings(MODEL, toy(), templates=["a thing"])
    with pytest.raises(ValueError, match="dim must be >= 1, got 0"):
        ProjectedEncoder(ConvNet(1, (4,)), 0)
    with pytest.raises(ValueError, match="backbone must have an integer out_features, got Identity"):
        ProjectedEncoder(nn.Identity(), 2)


def test_openmoji_has_prompts_for_every_group_in_words_of_captions():
    splits = load_image_text("openmoji", size=8)
    assert tuple(sorted(OPENMOJI_PROMPTS)) == tuple(sorted(splits.class_names))
    for words in OPENMOJI_PROMPTS.values():
        assert (splits.vocabulary.encode(list(words))[:, 0] > splits.vocabulary.mask_id).any()


def test_trials_of_a_task_begin_with_a_fresh_scale_and_equal_models():
    task = image_text_task(Budget(steps=3), size=8, limit=64, batch_size=32)
    runs = []
    for _ in range(2):
        setting = Setting.of(task, seed=1)
        runs.append(setting.fit(setting.new_model()).model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert task.objective.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)  # each run learns on a copy
    one, other = task.load(1).train.ids, task.load(2).train.ids
    assert len(one) == 64
    assert not torch.equal(one, other)
    test = task.load(1).test
    assert len(test) == 1354 - 64 + 297
    assert not set(test.ids.tolist()) & set(one.tolist())
    assert len(image_text_task(Budget(steps=1), size=8).load(1).test) == 297


def test_the_small_model_learns_its_training_pairs():
    task = image_text_task(Budget(steps=60), size=8, limit=64, batch_size=32)
    setting = Setting.of(task, seed=0)
    before = evaluate_image_text(setting.new_model(), setting.splits, "train")["recall@1"]
    after = evaluate_image_text(setting.fit(setting.new_model()).model, setting.splits, "train")["recall@1"]
    assert before < 0.1
    assert after > 0.5


def test_the_model_is_two_towers_with_backbones():
    splits = load_image_text("openmoji", size=8, limit=10)
    model = image_text_model(splits, dim=12, channels=(4, 8), width=16)
    images, texts = model(splits.test.inputs)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(10))
    features = model.query_encoder.backbone(splits.test.inputs[0])
    assert features.shape == (10, 8)
    assert model.document_encoder.backbone(splits.test.inputs[1]).shape == (10, 16)
    assert model.query_encoder.projection.bias is None
