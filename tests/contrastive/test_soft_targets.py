"""Softened targets equal their formula, are label smoothing at one limit and hard at the other, and never favour another pair."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_two_processes
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import Tensor

from coloss.contrastive import (
    clip_loss,
    progressive_softening,
    soft_target_clip_loss,
    soft_targets,
    softened_targets,
)
from coloss.ops import rank, world_size


def by_formula(similarities: np.ndarray, alpha: float, temperature: float) -> np.ndarray:
    table = np.zeros_like(similarities)
    for i in range(len(table)):
        others = [j for j in range(len(table)) if j != i]
        powers = {j: math.exp(similarities[i, j] / temperature) for j in others}
        for j in others:
            table[i, j] = alpha * powers[j] / sum(powers.values())
        table[i, i] = 1 - alpha
    return table


def test_targets_equal_the_formula_and_carry_no_gradient():
    similarities = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    found = soft_targets(similarities, 0.3, temperature=0.4)
    assert not found.requires_grad
    np.testing.assert_allclose(found.numpy(), by_formula(similarities.detach().numpy(), 0.3, 0.4))


@given(st.integers(1, 7), st.floats(0, 0.499), st.floats(0.01, 10), st.floats(0, 100))
def test_rows_sum_to_one_and_a_pair_s_own_target_is_the_largest(count, alpha, temperature, size):
    similarities = size * torch.randn(count, count, dtype=torch.float64)
    found = soft_targets(similarities, alpha, temperature=temperature)
    torch.testing.assert_close(found.sum(1), torch.ones(count, dtype=torch.float64))
    assert bool((found.diagonal() >= found.amax(1)).all())


def test_a_duplicate_takes_the_whole_share_and_still_not_the_lead():
    similarities = torch.eye(4)
    similarities[0, 3] = 1.0
    row = soft_targets(similarities, 0.4, temperature=0.01)[0]
    torch.testing.assert_close(row, torch.tensor([0.6, 0.0, 0.0, 0.4]))


def test_uniform_weights_are_label_smoothing():
    images, texts = (F.normalize(torch.randn(5, 3), dim=1) for _ in range(2))
    targets = soft_targets(images @ texts.T, 0.2, "uniform")
    smoothed = clip_loss(images, texts, 5.0, label_smoothing=0.2 * 5 / 4)
    torch.testing.assert_close(soft_target_clip_loss(images, texts, targets, targets, 0.2), smoothed)


def test_a_share_of_zero_is_clip():
    images, texts = (F.normalize(torch.randn(5, 3), dim=1) for _ in range(2))
    targets = softened_targets(images, texts, 0.0)
    assert torch.equal(soft_targets(images @ texts.T, 0.0), torch.eye(5))
    loss = soft_target_clip_loss(images, texts, targets, targets, 0.2)
    torch.testing.assert_close(loss, clip_loss(images, texts, 5.0))


def test_a_tile_of_the_function_is_that_part_of_the_table():
    images, texts = (F.normalize(torch.randn(9, 3, dtype=torch.float64), dim=1) for _ in range(2))
    table = soft_targets(images @ texts.T, 0.3, temperature=0.2)
    function = softened_targets(images, texts, 0.3, 0.2, chunk_size=4)
    rows, columns = torch.arange(2, 7)[:, None], torch.arange(1, 9)[None]
    torch.testing.assert_close(function(rows, columns), table[2:7, 1:9])


def test_the_share_rises_with_progress():
    straight, curved = progressive_softening(0.2), progressive_softening(0.2, "cosine")
    for progress in (0.0, 0.25, 0.5, 1.0):
        assert straight(progress) == pytest.approx(0.2 * progress)
        assert curved(progress) == pytest.approx(0.1 * (1 - math.cos(math.pi * progress)))
    assert progressive_softening(0.1, "constant")(0.0) == 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_extreme_similarities_give_finite_float32_targets(dtype):
    found = soft_targets((1e4 * torch.randn(5, 5)).to(dtype), 0.3, temperature=0.01)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(5))


def test_bad_input_is_named(as_users_call):
    square = torch.eye(3)
    for call, message in (
        (lambda: soft_targets(square, 0.5), r"softened share must be in \[0, 0.5\).* got 0.5"),
        (lambda: soft_targets(square[:2], 0.1), r"similarities must be square, got shape \(2, 3\)"),
        (
            lambda: soft_targets(square, 0.1, "text"),
            'weights must be "similarity" or "uniform", got \'text\'',
        ),
        (lambda: soft_targets(square, 0.1, temperature=0.0), "temperature must be > 0 and finite, got 0.0"),
        (lambda: softened_targets(square, square[:2], 0.1), r"keys must have shape \(3, 3\), got \(2, 3\)"),
        (lambda: progressive_softening(0.2, "steps"), "shape must be .* got 'steps'"),
        (lambda: progressive_softening(0.7), "got 0.7"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_two_processes_soften_over_the_joint_batch(tmp_path: Path):
    pairs = [F.normalize(torch.randn(8, 3, dtype=torch.float64), dim=1) for _ in range(2)]

    def work(fabric: Fabric) -> dict[str, Tensor]:
        images, texts = (part.tensor_split(world_size())[rank()] for part in pairs)
        there, back = softened_targets(images, texts, 0.3), softened_targets(texts, images, 0.3)
        return {"loss": soft_target_clip_loss(images, texts, there, back, 0.2)}

    check_two_processes(work, tmp_path)
