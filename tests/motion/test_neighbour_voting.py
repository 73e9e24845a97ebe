"""Facts about votes on who is alike, and about BYOL's loss with more positives than one."""

from pathlib import Path

import pytest
import torch
from contract import run_processes
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import Tensor

from coloss.motion import (
    byol_loss,
    cosine_similarity_matrix,
    nearest_mask,
    neighbour_votes,
    soft_positive_loss,
)


def test_two_of_three_votes_carry_and_one_does_not() -> None:
    yes, no = torch.ones(1, 1), torch.zeros(1, 1)
    for found, ballots in ((True, (yes, no, yes)), (False, (yes, no, no)), (True, (yes, yes, yes))):
        assert neighbour_votes(ballots, lambda s: s > 0.5, min_votes=2).item() is found


def test_readings_of_one_source_must_all_agree() -> None:
    both, one = torch.tensor([[[1.0]], [[1.0]]]), torch.tensor([[[1.0]], [[0.0]]])
    assert neighbour_votes([both], lambda s: s > 0.5, 1).item()
    assert not neighbour_votes([one], lambda s: s > 0.5, 1).item()
    assert neighbour_votes([both, one, both[0]], lambda s: s > 0.5, 2).item()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_more_votes_needed_means_fewer_pairs(rows: int, columns: int, sources: int, seed: int) -> None:
    draws = torch.rand(sources, rows, columns, generator=torch.Generator().manual_seed(seed))
    pairs = [neighbour_votes(list(draws), lambda s: s > 0.5, votes) for votes in range(1, sources + 1)]
    assert all(bool((more | ~fewer).all()) for more, fewer in zip(pairs, pairs[1:]))
    assert torch.equal(pairs[0], (draws > 0.5).any(0))
    assert torch.equal(pairs[-1], (draws > 0.5).all(0))


def test_the_nearest_of_each_row_and_their_equals() -> None:
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.4, 0.4, 0.3]])
    assert nearest_mask(similarity, 1).tolist() == [[False, True, False], [True, True, False]]
    assert nearest_mask(similarity, 9).all()
    assert nearest_mask(similarity[:, :0], 2).shape == (2, 0)


def test_the_diagonal_alone_gives_byols_loss_and_gradient() -> None:
    p = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    soft, plain = soft_positive_loss(p, z, torch.eye(6).bool()), byol_loss(p, z)
    torch.testing.assert_close(soft, plain)
    one, other = (torch.autograd.grad(loss, (p, z), allow_unused=True) for loss in (soft, plain))
    torch.testing.assert_close(one[0], other[0])
    assert one[1] is None
    assert other[1] is None


def test_it_is_the_mean_over_the_pairs_that_count() -> None:
    p, z = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    positives = torch.rand(3, 5) > 0.5
    positives[0, 0] = True
    pairs = [2 - 2 * torch.cosine_similarity(p[i], z[j], dim=0) for i, j in positives.nonzero().tolist()]
    torch.testing.assert_close(soft_positive_loss(p, z, positives), torch.stack(pairs).mean())


def test_limits() -> None:
    p, none = torch.randn(2, 3), torch.zeros(2, 2, dtype=torch.bool)
    assert soft_positive_loss(p, p, none) == 0
    assert soft_positive_loss(p[:0], p, none[:0]) == 0
    assert soft_positive_loss(p.bfloat16(), p.bfloat16(), ~none).dtype == torch.float32
    assert cosine_similarity_matrix(torch.zeros(1, 3), p).abs().sum() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cosine_similarity_matrix(p, p).diagonal().round(decimals=5), torch.ones(2))
    broken = p.clone()
    broken[0, 0] = torch.nan
    assert soft_positive_loss(broken, p, torch.eye(2).bool()).isnan()


def test_processes_with_different_numbers_of_pairs_average_to_the_whole(tmp_path: Path) -> None:
    p, z = torch.randn(4, 3), torch.randn(4, 3)
    positives = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()

    def work(fabric: Fabric) -> dict[str, Tensor]:
        mine = slice(2 * fabric.global_rank, 2 * fabric.global_rank + 2)
        return {"loss": soft_positive_loss(p[mine], z, positives[mine], across_processes=True)}

    parts = run_processes(work, tmp_path)
    whole = soft_positive_loss(p, z, positives)
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neighbour_votes([]), "at least one source, got none"),
        (lambda: neighbour_votes([torch.eye(2)]), r"min_votes must be in \[1, 1\].*got 2"),
        (lambda: neighbour_votes([torch.eye(2), torch.eye(3)]), "the same rows and columns"),
        (lambda: nearest_mask(torch.eye(2), 0), "k must be >= 1, got 0"),
        (
            lambda: soft_positive_loss(torch.eye(2), torch.eye(2), torch.ones(2, 3).bool()),
            r"positives must be \(2, 2\), got \(2, 3\)",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
