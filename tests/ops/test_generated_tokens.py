"""Straight-through tokens, soft embeddings, batch label entropy and disagreement."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coloss.ops import (
    batch_label_entropy,
    disagreement,
    gumbel_noise,
    soft_embed,
    straight_through_tokens,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_tokens_are_exactly_one_hot_with_the_gradient_of_the_soft_choice(temperature):
    logits = torch.randn(5, 3, 7, generator=seeded(), dtype=torch.float64, requires_grad=True)
    noise = gumbel_noise(logits, seeded(1))
    incoming = torch.randn(5, 3, 7, generator=seeded(2), dtype=torch.float64)
    tokens = straight_through_tokens(logits, temperature, noise=noise)
    assert torch.equal(tokens, F.one_hot((logits + noise).argmax(-1), 7).double())
    (found,) = torch.autograd.grad(tokens, logits, incoming)
    (expected,) = torch.autograd.grad(((logits + noise) / temperature).softmax(-1), logits, incoming)
    assert torch.equal(found, expected)


def test_ids_given_take_the_place_of_the_argmax():
    logits = torch.randn(4, 6, generator=seeded())
    ids = torch.tensor([5, 0, 0, 2])
    assert torch.equal(straight_through_tokens(logits, ids=ids).argmax(1), ids)


def test_impossible_tokens_are_never_chosen_and_have_no_gradient():
    logits = torch.zeros(1000, 4).index_fill(1, torch.tensor([1]), -math.inf).requires_grad_()
    tokens = straight_through_tokens(logits, 0.5, noise=gumbel_noise(logits, seeded()))
    assert tokens[:, 1].sum() == 0
    (tokens * torch.randn(4, generator=seeded())).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[:, 1].abs().sum() == 0


def test_half_precision_logits_give_float32_tokens_and_half_gradients():
    logits = torch.randn(3, 5, generator=seeded()).bfloat16().requires_grad_()
    tokens = straight_through_tokens(logits)
    (tokens * torch.arange(5.0)).sum().backward()
    assert tokens.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16


def test_gumbel_noise_is_finite_repeatable_and_has_the_mean_of_its_law():
    like = torch.zeros(200_000)
    noise = gumbel_noise(like, seeded())
    assert noise.isfinite().all() and torch.equal(noise, gumbel_noise(like, seeded()))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gumbel_noise_is_drawn_in_float32_at_least(dtype):
    noise = gumbel_noise(torch.zeros(1000, dtype=dtype), seeded())
    assert torch.equal(noise, gumbel_noise(torch.zeros(1000), seeded()))
    assert gumbel_noise(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64


def test_embedding_of_one_hot_tokens_is_the_lookup_and_its_gradient_the_similarity():
    table = nn.Embedding(9, 4)
    ids = torch.tensor([[3, 8], [0, 3]])
    tokens = F.one_hot(ids, 9).float().requires_grad_()
    vectors = soft_embed(tokens, table.weight)
    assert torch.equal(vectors, table(ids))
    pull = torch.randn(2, 2, 4, generator=seeded())
    (vectors * pull).sum().backward()
    assert torch.allclose(tokens.grad, pull @ table.weight.T)


@pytest.mark.parametrize("classes", [2, 5])
def test_label_entropy_is_log_classes_for_a_balanced_batch_and_zero_for_a_collapsed_one(classes):
    certain = 1e4 * torch.eye(classes, dtype=torch.float64)
    assert batch_label_entropy(certain).item() == pytest.approx(math.log(classes), abs=1e-12)
    assert batch_label_entropy(torch.zeros(3, classes)).item() == pytest.approx(math.log(classes), abs=1e-6)
    assert batch_label_entropy(certain[:1].expand(4, -1)).item() == 0


def test_label_entropy_pulls_towards_missing_classes():
    logits = torch.tensor([[3.0, 0.0, 0.0], [2.5, 0.0, 0.0], [2.0, 0.5, 0.0]], requires_grad=True)
    batch_label_entropy(logits).backward()
    assert (logits.grad[:, 0] < 0).all() and (logits.grad[:, 1:] > 0).all()


def test_label_entropy_has_the_right_gradient_and_stays_finite_at_extremes():
    logits = torch.randn(4, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(batch_label_entropy, (logits,))
    extreme = torch.tensor([[1e4, -1e4, -math.inf]], requires_grad=True)
    batch_label_entropy(extreme).backward()
    assert extreme.grad.isfinite().all()
    assert batch_label_entropy(torch.tensor([[math.nan, 0.0]])).isnan()


@pytest.mark.parametrize("kind", ["kl", "l1", "js"])
def test_disagreement_is_zero_with_zero_gradients_where_both_agree(kind):
    logits = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    teacher, student = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = disagreement(teacher, student, kind, 2.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert teacher.grad.abs().max() < 1e-12 and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["kl", "l1", "js"])
def test_disagreement_has_gradients_to_both_sides(kind):
    teacher, student = (
        torch.randn(4, 3, generator=seeded(n), dtype=torch.float64, requires_grad=True) for n in (0, 1)
    )
    assert torch.autograd.gradcheck(lambda t, z: disagreement(t, z, kind, 2.0), (teacher, student))


@pytest.mark.usefixtures("as_users_call")
def test_bad_input_is_named():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        straight_through_tokens(logits, 0.0)
    with pytest.raises(ValueError, match=r"noise must have the shape \(2, 3\), got \(3,\)"):
        straight_through_tokens(logits, noise=torch.zeros(3))
    with pytest.raises(ValueError, match=r"ids must have the shape \(2,\)"):
        straight_through_tokens(logits, ids=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token"):
        straight_through_tokens(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="tokens must weigh the 4 rows of embedding, got 3 weights"):
        soft_embed(logits, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="logits must hold a sample and a class"):
        batch_label_entropy(torch.zeros(0, 3))
    with pytest.raises(ValueError, match='kind must be "kl", "l1" or "js", got'):
        disagreement(logits, logits, "l2")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        disagreement(logits, torch.zeros(2, 4), "l1")
