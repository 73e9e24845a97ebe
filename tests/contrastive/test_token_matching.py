"""Matching recovers what was planted, is the published limits at its ends, and its loss is InfoNCE over the chosen candidates."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from lightning_fabric import Fabric
from torch import Tensor

from coloss.contrastive import match_tokens, token_contrastive_loss, token_similarity
from coloss.ops import info_nce_loss, rank, world_size

SOLVERS = ["hungarian", "sinkhorn", "max"]


def tokens(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_strict_matching_is_the_best_of_all_permutations():
    scores = torch.randn(4, 4, dtype=torch.float64)
    assigned = match_tokens(scores)
    best = max(sum(scores[p, m] for m, p in enumerate(order)) for order in permutations(range(4)))
    assert (assigned * scores).sum().item() == pytest.approx(float(best))
    assert assigned.sum(0).tolist() == assigned.sum(1).tolist() == [1.0] * 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_permuted_identity_is_recovered(solver):
    order = torch.randperm(6)
    planted = torch.eye(6)[order]
    found = match_tokens(planted, solver=solver)
    torch.testing.assert_close(found, planted, atol=1e-4, rtol=0)


def test_capacity_bounds_what_a_patch_serves():
    scores = torch.randn(3, 6)
    scores[1] += 10  # every word likes this patch best
    for capacity in (2, 3):
        assigned = match_tokens(scores, capacity=capacity)
        assert assigned.sum(1).max().item() == capacity
        assert assigned.sum(0).tolist() == [1.0] * 6
    scores = 0.2 * torch.rand(3, 6)
    scores[1] += 0.5
    soft = match_tokens(scores, capacity=3, solver="sinkhorn", iterations=100)
    assert soft.sum(1).max().item() == pytest.approx(3, abs=0.05)
    torch.testing.assert_close(soft.sum(0), torch.ones(6))


def test_a_capacity_of_all_words_gives_each_its_best_patch():
    scores = torch.randn(5, 3, 4)
    expected = match_tokens(scores, solver="max")
    assert torch.equal(match_tokens(scores, capacity=4), expected)
    assert torch.equal(expected.argmax(1), scores.argmax(1))
    # With room for all but the exact solver in use, padding to one more word does not change it.
    wider = F.pad(scores, (0, 1))
    mask = torch.tensor([True] * 4 + [False]).expand(5, -1)
    assert torch.equal(match_tokens(wider, mask, capacity=4)[..., :4], expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_gets_no_patch_and_hidden_patches_no_words(solver):
    scores = torch.randn(2, 4, 5)
    words = torch.tensor([[True, True, True, False, False], [False] * 5])
    patches = torch.tensor([[True, True, True, False], [True] * 4])
    found = match_tokens(scores, words, patches, solver=solver)
    assert found.isfinite().all()
    assert found[0, :, 3:].sum() == found[0, 3].sum() == found[1].sum() == 0
    torch.testing.assert_close(found[0, :, :3].sum(0), torch.ones(3))


def test_more_words_than_room_leaves_some_without_a_patch():
    found = match_tokens(torch.rand(2, 5))
    assert found.sum() == 2
    assert found.sum(1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinkhorn_in_half_precision_does_not_overflow(dtype):
    found = match_tokens((20 * torch.randn(4, 4)).to(dtype), solver="sinkhorn")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0), torch.ones(4))


# Similarity


def by_formula(patches: Tensor, words: Tensor, mask: Tensor) -> np.ndarray:
    table = np.zeros((len(patches), len(words)))
    for i, image in enumerate(patches.numpy()):
        for j, text in enumerate(words.numpy()):
            text = text[mask[j].numpy()]
            scores = image @ text.T
            best = max(
                sum(scores[p, m] for m, p in enumerate(order))
                for order in permutations(range(len(image)), len(text))
            )
            table[i, j] = best / len(text)
    return table


def test_similarity_is_the_mean_over_matched_words():
    patches, words = tokens(3, 4, 5), tokens(2, 3, 5)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = token_similarity(patches, words, mask)
    np.testing.assert_allclose(found.numpy(), by_formula(patches, words, mask))


def test_one_patch_and_one_word_give_the_cosine():
    patches, words = tokens(3, 1, 5), tokens(4, 1, 5)
    for solver in SOLVERS:
        torch.testing.assert_close(
            token_similarity(patches, words, solver=solver), patches[:, 0] @ words[:, 0].T
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_chunks_change_neither_values_nor_gradients(solver):
    found = []
    given = [tokens(5, 4, 3).requires_grad_(), tokens(4, 2, 3).requires_grad_()]
    for chunk_size in (None, 2):
        scores = token_similarity(*given, solver=solver, chunk_size=chunk_size)
        found.append((scores, *torch.autograd.grad(scores.square().sum(), given)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_gradients_flow_through_the_matched_scores_alone():
    patches, words = torch.eye(3)[None].requires_grad_(), torch.eye(3)[None, :1]
    (gradient,) = torch.autograd.grad(token_similarity(patches, words).sum(), patches)
    assert gradient[0, 0, 0] == 1
    assert gradient.sum() == 1


# Loss


def test_all_candidates_give_symmetric_info_nce_of_the_similarities():
    patches, words, images, texts = tokens(5, 3, 4), tokens(5, 2, 4), tokens(5, 4), tokens(5, 4)
    similarity = token_similarity(patches, words)
    loss = token_contrastive_loss(patches, words, images, texts, temperature=0.2, candidates=5)
    own = torch.arange(5)
    expected = (F.cross_entropy(similarity / 0.2, own) + F.cross_entropy(similarity.T / 0.2, own)) / 2
    torch.testing.assert_close(loss, expected)
    single = token_contrastive_loss(
        images[:, None], texts[:, None], images, texts, temperature=0.2, candidates=99
    )
    torch.testing.assert_close(single, info_nce_loss(images, texts, 0.2, symmetric=True))


def test_few_candidates_are_those_that_look_most_alike():
    patches, words, images, texts = tokens(6, 3, 4), tokens(6, 2, 4), tokens(6, 4), tokens(6, 4)
    similarity, alike = token_similarity(patches, words) / 0.2, images @ texts.T
    total = 0.0
    for scores, guide in ((similarity, alike), (similarity.T, alike.T)):
        for i in range(6):
            near = [j for j in guide[i].argsort(descending=True).tolist() if j != i][:2]
            total += float(scores[i, [i, *near]].logsumexp(0) - scores[i, i]) / 12
    loss = token_contrastive_loss(patches, words, images, texts, temperature=0.2, candidates=3)
    assert loss.item() == pytest.approx(total)


@pytest.mark.parametrize("count", [0, 1])
def test_batches_of_none_and_one_cost_nothing(count):
    patches = tokens(count, 3, 4).requires_grad_()
    loss = token_contrastive_loss(patches, tokens(count, 2, 4), tokens(count, 4), tokens(count, 4))
    assert loss.item() == pytest.approx(0)
    assert torch.autograd.grad(loss, patches)[0].isfinite().all()


def test_bad_input_is_named(as_users_call):
    patches, words, rows = tokens(2, 3, 4), tokens(2, 3, 4), tokens(2, 4)
    for call, message in (
        (lambda: match_tokens(torch.eye(2), capacity=0), "capacity must be >= 1, got 0"),
        (lambda: match_tokens(torch.eye(2), solver="greedy"), "solver must be .* got 'greedy'"),
        (lambda: match_tokens(torch.full((2, 2), float("nan"))), "scores must be finite"),
        (lambda: token_similarity(patches, words[..., :2]), "words must have width 4, got 2"),
        (lambda: token_similarity(patches, words, chunk_size=0), "chunk_size must be >= 1, got 0"),
        (
            lambda: token_contrastive_loss(patches, words, rows, rows, candidates=1),
            "candidates must be >= 2, got 1",
        ),
        (
            lambda: token_contrastive_loss(patches, words[:1], rows, rows),
            r"of as many pairs, got \[2, 1, 2, 2\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("candidates", [3, 8])
def test_two_processes_find_the_candidates_of_one(tmp_path: Path, candidates: int):
    everyone = [tokens(8, 3, 4), tokens(8, 2, 4), tokens(8, 4), tokens(8, 4)]

    def work(fabric: Fabric) -> dict[str, Tensor]:
        own = [part.tensor_split(world_size())[rank()].clone().requires_grad_() for part in everyone]
        loss = token_contrastive_loss(*own, candidates=candidates)
        gradients = torch.autograd.grad(loss, own[:2])
        found = {"loss": loss}
        for name, part, gradient in zip(("patches", "words"), everyone, gradients):
            whole = torch.zeros_like(part)
            whole.tensor_split(world_size())[rank()][:] = gradient / world_size()
            if world_size() > 1:
                torch.distributed.all_reduce(whole)
            found[name] = whole
        return found

    check_two_processes(work, tmp_path)
