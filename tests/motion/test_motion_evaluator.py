from pathlib import Path
from typing import Any

import pytest
import torch
from contract import check_resume, check_two_processes
from lightning_fabric import Fabric
from torch import Tensor

import coloss
from coloss import Budget, Method
from coloss.data import Batch, IndexedDataset
from coloss.motion import (
    PAPER_EVALUATOR,
    TextMotionEmbeddings,
    TextMotionEvaluator,
    TextMotionMatching,
    margin_contrastive_loss,
)

NUMBERS, WORDS = 9, 6


def new_evaluator(dropout: float | None = None) -> TextMotionEvaluator:
    evaluator = TextMotionEvaluator(
        NUMBERS, WORDS, 5, conv_width=6, motion_hidden=4, text_hidden=4, word_dim=3
    )
    if dropout is not None:
        evaluator.dropout.p = dropout
    return evaluator


def new_pairs(count: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = torch.tensor([8, 4, 6, 8] * (count // 4))
    return torch.randn(count, 8, NUMBERS), lengths, torch.randint(WORDS, (count, 4)), 1 + lengths // 3


# The evaluator


def test_the_published_sizes_are_arguments() -> None:
    with torch.device("meta"):
        evaluator = TextMotionEvaluator(263, 5000, **PAPER_EVALUATOR)
    assert evaluator.first.in_channels == 259, "foot contacts are left out"
    assert evaluator.motion.gru.hidden_size == 1024
    assert evaluator.text.gru.hidden_size == 512
    assert evaluator.motion.head[-1].out_features == evaluator.text.head[-1].out_features == 512


@pytest.mark.parametrize("filling", [0.0, 5.0, torch.nan])
def test_what_fills_up_a_clip_or_a_sentence_does_not_matter(filling: float) -> None:
    evaluator = new_evaluator().eval()
    features, lengths, words, word_lengths = new_pairs(4)
    for row in range(4):
        features[row, lengths[row] :] = filling
    together = evaluator((features, lengths, words, word_lengths))
    for row in range(4):
        clip, sentence = features[row : row + 1, : lengths[row]], words[row : row + 1, : word_lengths[row]]
        torch.testing.assert_close(evaluator.embed_motion(clip)[0], together.motion[row])
        torch.testing.assert_close(evaluator.embed_text(sentence)[0], together.text[row])


def test_rows_come_back_in_the_order_in_which_they_went_in() -> None:
    # The original sorts by length inside: whoever does not sort the texts alike compares the wrong pairs.
    evaluator, (features, lengths, _, _) = new_evaluator().eval(), new_pairs(4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        evaluator.embed_motion(features[order], lengths[order]),
        evaluator.embed_motion(features, lengths)[order],
    )


def test_foot_contacts_are_not_looked_at() -> None:
    evaluator, (features, lengths, _, _) = new_evaluator().eval(), new_pairs(4)
    other = features.clone()
    other[..., -4:] += 1
    assert torch.equal(evaluator.embed_motion(features, lengths), evaluator.embed_motion(other, lengths))


def test_the_first_state_of_both_networks_is_learnt() -> None:
    evaluator = new_evaluator()
    found = evaluator(new_pairs(4))
    (found.motion.sum() + found.text.square().sum()).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in (evaluator.motion.first_state, evaluator.text.first_state)
    )


def test_no_clips_and_no_sentences_have_no_vectors() -> None:
    evaluator = new_evaluator()
    assert evaluator.embed_motion(torch.zeros(0, 8, NUMBERS)).shape == (0, 5)
    assert evaluator.embed_text(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 5)


# The loss


def slow_loss(text: Tensor, motion: Tensor, ids: list[int], margin: float) -> float:
    own = [(text[i] - motion[i]).square().sum().item() for i in range(len(text))]
    others = [
        max(0.0, margin - (text[i] - motion[j]).norm().item()) ** 2
        for i in range(len(text))
        for j in range(len(text))
        if ids[i] != ids[j]
    ]
    return sum(own) / len(own) + (sum(others) / len(others) if others else 0.0)


def test_the_loss_is_that_of_a_loop_over_pairs() -> None:
    text, motion = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    for ids in ([0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 3], [4] * 6):
        found = margin_contrastive_loss(text, motion, torch.tensor(ids), margin=2.5)
        assert found.item() == pytest.approx(slow_loss(text, motion, ids, 2.5))
    assert margin_contrastive_loss(text, motion, margin=2.5) == margin_contrastive_loss(
        text, motion, torch.arange(6), margin=2.5
    )


def test_gradients_of_the_loss_are_right_and_finite_where_vectors_meet() -> None:
    text, motion = torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, m: margin_contrastive_loss(t, m, margin=3.0), (text, motion))
    same = torch.ones(4, 3, requires_grad=True)
    margin_contrastive_loss(same, same).backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_no_pairs_and_a_single_pair_have_a_loss() -> None:
    assert margin_contrastive_loss(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    assert margin_contrastive_loss(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])) == 25


def test_half_precision_vectors_have_a_float32_loss() -> None:
    text, motion = torch.randn(4, 3).half(), torch.randn(4, 3).half()
    found = margin_contrastive_loss(text, motion)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, margin_contrastive_loss(text.float(), motion.float()))


# In fit


class Small(Method):
    """A second source of loss on the same run."""

    def terms(self, state: coloss.State) -> dict[str, Tensor]:
        return {"small": state.outputs.motion.square().mean()}


def test_the_same_words_are_no_negatives_unless_groups_say_otherwise() -> None:
    features, lengths, words, word_lengths = new_pairs(4)
    words[0], words[1] = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 5, 5])
    word_lengths = torch.tensor([2, 2, 4, 4])
    step = coloss.TrainingStep(new_evaluator(0.0), None, [TextMotionMatching(4.0), Small()])
    inputs = (features, lengths, words, word_lengths)
    terms = step(Batch(inputs))
    found = step.state.outputs
    ids = torch.tensor([0, 0, 1, 2])
    torch.testing.assert_close(
        terms["contrastive"], margin_contrastive_loss(found.text, found.motion, ids, margin=4.0)
    )
    grouped = step(Batch(inputs, extras={"groups": torch.tensor([5, 6, 6, 6])}))
    found = step.state.outputs
    ids = torch.tensor([0, 1, 1, 1])
    torch.testing.assert_close(
        grouped["contrastive"], margin_contrastive_loss(found.text, found.motion, ids, margin=4.0)
    )


def test_a_killed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    data = IndexedDataset(new_pairs(16))
    check_resume(new_evaluator, TextMotionMatching, data, tmp_path, steps=3, kill_at=2, checkpoint_every=1)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # How `fit` deals a batch out and joins gradients is shown elsewhere.
    features, lengths, words, word_lengths = new_pairs(4)
    words[2], word_lengths[2] = words[1], word_lengths[1]
    inputs = (features.double(), lengths, words, word_lengths)

    def train(fabric: Fabric) -> dict[str, Tensor]:
        share = slice(fabric.global_rank, None, fabric.world_size)
        step = coloss.TrainingStep(new_evaluator(0.0).double(), None, [TextMotionMatching(2.0)])
        loss = step(Batch(tuple(part[share] for part in inputs)))["contrastive"]
        gradients = torch.autograd.grad(loss, list(step.state.model.parameters()))
        found = torch.cat([loss.detach()[None], *map(torch.flatten, gradients)])
        if fabric.world_size > 1:
            torch.distributed.all_reduce(found)
        return {"loss and gradients": found / fabric.world_size}

    check_two_processes(train, tmp_path)


def test_mixed_precision_stays_finite() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    run = coloss.fit(
        new_evaluator(),
        IndexedDataset(new_pairs(8)),
        None,
        [TextMotionMatching()],
        budget=Budget(steps=1),
        fabric=fabric,
    )
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_last": 9}, r"drop_last must be in \[0, 9\), got 9"),
        ({"vocabulary": 0}, "vocabulary must be >= 1, got 0"),
        *(
            ({name: 0}, f"{name} must be >= 1, got 0")
            for name in ("embed_dim", "conv_width", "motion_hidden", "text_hidden", "word_dim")
        ),
    ],
)
def test_bad_sizes_are_named(options: dict[str, Any], message: str, as_users_call: None) -> None:
    with pytest.raises(ValueError, match=message):
        TextMotionEvaluator(**({"in_dim": 9, "vocabulary": 4, "embed_dim": 3} | options))


def test_bad_calls_are_named(as_users_call: None) -> None:
    evaluator = new_evaluator()
    with pytest.raises(ValueError, match="features must have 9 numbers a frame, got 8"):
        evaluator.embed_motion(torch.randn(1, 8, 8))
    with pytest.raises(ValueError, match=r"lengths must be in \[4, 8\], got 3 to 8"):
        evaluator.embed_motion(torch.randn(2, 8, 9), torch.tensor([8, 3]))
    with pytest.raises(ValueError, match=r"lengths must be in \[4, 2\], got 2 to 2"):
        evaluator.embed_motion(torch.randn(2, 2, 9))
    with pytest.raises(ValueError, match=r"lengths must have shape \(2,\), got \(1,\)"):
        evaluator.embed_motion(torch.randn(2, 8, 9), torch.tensor([8]))
    with pytest.raises(ValueError, match=r"lengths must have shape \(1,\), got \(2,\)"):
        evaluator.embed_text(torch.tensor([[2, 1]]), torch.tensor([2, 1]))
    with pytest.raises(ValueError, match=r"words must be in \[0, 6\), got -1 to 2"):
        evaluator.embed_text(torch.tensor([[2, -1]]))
    with pytest.raises(ValueError, match=r"lengths must be in \[1, 2\], got 0 to 0"):
        evaluator.embed_text(torch.tensor([[2, 1]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="margin must be > 0, got 0"):
        TextMotionMatching(0)
    with pytest.raises(ValueError, match="margin must be > 0, got -1"):
        margin_contrastive_loss(torch.zeros(2, 2), torch.zeros(2, 2), margin=-1)
    with pytest.raises(ValueError, match="the model must give TextMotionEmbeddings, got Tensor"):
        coloss.TrainingStep(torch.nn.Linear(2, 2), None, [TextMotionMatching()])(torch.randn(2, 2))


def test_embeddings_are_named() -> None:
    assert TextMotionEmbeddings._fields == ("motion", "text")
