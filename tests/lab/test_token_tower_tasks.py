"""Captions find images by two towers that keep their tokens: by name, from a folder of one's own, for methods that read tokens or not."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from coloss import Budget, Comparison
from coloss.errors import InputError
from coloss.lab import find_task
from coloss.lab.known_tasks import TOKEN_TOWERS
from coloss.lab.token_tower_tasks import caption_loss, caption_metrics
from coloss.retrieval import TokenDualEncoder
from coloss.train import Setting


@pytest.fixture
def pictures(tmp_path):
    """Pictures of one colour, half of them with two captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file,caption"]
    for number in range(16):
        Image.new("RGB", (8, 8), (15 * number, 90, 0)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,shade {number} of red")
        if number % 2:
            lines.append(f"{number}.png,colour {number}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return str(folder)


def test_by_name_for_methods_that_read_tokens_and_those_that_do_not(needs, tmp_path):
    needs("openmoji")
    arms = ["info-nce", "cfam:num_queries=2:depth=1:warm_up=0.5", "mw-loss", "cfam+mw-loss"]
    result = Comparison(TOKEN_TOWERS, arms, seeds=1, budget=Budget(steps=4), limit=30).run(tmp_path)
    assert not result.failures and result.record.metric == "mrr"
    assert all({"mrr", "recall@1", "recall@10", "msd"} <= set(trial.metrics) for trial in result.trials)
    terms = [set(trial.history[-1].terms) for trial in result.trials]
    assert terms[1] == {"warm_up", "sdm_global", "sdm_granularity", "match"}
    assert terms[3] == terms[1] | {"mann_whitney"}


def test_fine_and_coarse_captions_of_a_drawing_share_its_identity(needs):
    needs("openmoji")
    splits = find_task(TOKEN_TOWERS, limit=40).load(0)
    for part in (splits.train, splits.validation, splits.test):
        identity = part.extras["identity"]
        assert torch.equal(part.targets, identity) and torch.equal(part.extras["document"], identity)
        assert identity.bincount().max() == 2 and len(identity.unique()) <= 40
        for number in identity.unique()[:5]:
            images = part.inputs[1][identity == number]
            assert torch.equal(images, images[:1].expand_as(images))
    assert splits.num_identities == len(splits.train.targets.unique())


def test_a_folder_of_ones_own(pictures, tmp_path):
    task = find_task(pictures, kind="token-retrieval")
    splits = task.load(0)
    assert task.title == "token-retrieval on pictures" and isinstance(task.model(splits), TokenDualEncoder)
    assert sum(len(part.targets.unique()) for part in (splits.train, splits.validation, splits.test)) == 16
    comparison = Comparison(
        pictures, ["info-nce", "cfam"], seeds=1, budget=Budget(steps=2), kind="token-retrieval"
    )
    assert not comparison.run(tmp_path / "run").failures
    assert find_task(pictures).kind == "retrieval"  # plain towers, if tokens are not asked for


def test_captions_are_ranked_against_each_image_once():
    class Numbers(nn.Module):
        def encode_query(self, words):
            return nn.functional.one_hot(words[:, 0], 4).float()

        def encode_document(self, images):
            return nn.functional.one_hot(images[:, 0, 0, 0].long(), 4).float()

    from coloss.data import IndexedDataset

    identity = torch.tensor([2, 0, 2, 1])
    images = identity.float().view(-1, 1, 1, 1)
    right = IndexedDataset((identity[:, None], images), identity, extras={"identity": identity})
    assert caption_metrics(Numbers(), right)["mrr"] == 1.0
    wrong = IndexedDataset(
        (torch.tensor([[2], [0], [2], [0]]), images), identity, extras={"identity": identity}
    )
    # The last caption names image 0: its own image ties with image 2 for what is left, and stands second or third.
    assert caption_metrics(Numbers(), wrong)["recall@1"] == 0.75


def test_captions_of_one_image_are_no_negatives():
    generator = torch.Generator().manual_seed(0)
    outputs = tuple(nn.functional.normalize(torch.randn(3, 4, generator=generator)) for _ in range(2))
    apart = caption_loss(outputs, torch.tensor([0, 1, 2]))
    together = caption_loss(outputs, torch.tensor([5, 5, 2]))
    assert together < apart and caption_loss.batch_statistic


def test_the_first_half_of_a_run_warms_up(needs):
    """Weights of the terms change once, from InfoNCE to the method's own."""
    from coloss.retrieval import CrossModalGranularity

    setting = Setting.of(find_task(TOKEN_TOWERS, limit=30), 0, Budget(steps=2))
    method = CrossModalGranularity.for_setting(setting, num_queries=2, depth=1)
    weights = {
        name: [float(np.round(weight(p), 3)) for p in (0.0, 0.49, 0.5, 1.0)]
        for name, weight in method.term_weights.items()
    }
    assert weights.pop("warm_up") == [1, 1, 0, 0]
    assert all(found == [0, 0, 1, 1] for found in weights.values())
    assert set(weights) == {"sdm_global", "sdm_granularity", "match", "identity"}
    assert CrossModalGranularity().term_weights == {}
    with pytest.raises(InputError, match=r"warm_up must be in \[0, 1\), got 1"):
        CrossModalGranularity(warm_up=1)


def test_what_does_not_fit_is_refused(pictures):
    with pytest.raises(
        InputError, match="cfam is made for token-retrieval tasks, digits is a classification task"
    ):
        Comparison("digits", ["cfam"])
    with pytest.raises(InputError, match="leave target, label noise, imbalance and other kinds out"):
        find_task(pictures, kind="token-retrieval", target="caption")
    with pytest.raises(
        InputError, match="token-retrieval is for images with captions in a folder or npz, digits holds none"
    ):
        find_task("digits", kind="token-retrieval")
