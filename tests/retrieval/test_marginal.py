"""The marginal likelihood over retrieved documents: limits, a plain twin, its gradient, and what must not count."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import nll_loss

from coloss.retrieval.marginal import document_log_prior, marginal_class_log_probs, marginal_nll


def _case(seed=0, queries=3, documents=4, tokens=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(queries, documents, generator=generator, dtype=dtype)
    logprobs = -torch.rand(queries, documents, tokens, generator=generator, dtype=dtype) * 4
    mask = torch.rand(queries, tokens, generator=generator) < 0.7
    mask[:, 0] = True
    return logits, logprobs, mask


def _twin(logits, logprobs, mask, level, temperature):
    losses = []
    for row, answer, kept in zip(logits.numpy(), logprobs.numpy(), mask.numpy(), strict=True):
        prior = np.exp(row / temperature) / np.exp(row / temperature).sum()
        probabilities = np.exp(answer[:, kept])
        if level == "token":
            losses.append(-np.log(prior @ probabilities).sum())
        else:
            losses.append(-np.log(prior @ probabilities.prod(1)))
    return np.mean(losses)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_equals_sums_of_plain_probabilities(level, temperature):
    case = _case()
    loss = marginal_nll(*case, level, temperature=temperature)
    assert loss.item() == pytest.approx(_twin(*case, level, temperature), rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_document_is_the_plain_likelihood(level):
    logits, logprobs, mask = _case(documents=1)
    plain = -(logprobs[:, 0] * mask).sum(1).mean()
    torch.testing.assert_close(marginal_nll(logits, logprobs, mask, level), plain)


@pytest.mark.parametrize("level", ["token", "sequence"])
@given(seed=st.integers(0, 1000), scale=st.floats(0, 100))
@settings(max_examples=20, deadline=None)
def test_documents_that_say_the_same_leave_the_plain_likelihood_under_any_prior(level, seed, scale):
    logits, logprobs, mask = _case(seed)
    same = logprobs[:, :1].expand(-1, 4, -1)
    plain = -(same[:, 0] * mask).sum(1).mean()
    torch.testing.assert_close(marginal_nll(scale * logits, same, mask, level), plain)


def test_levels_agree_on_one_token_and_have_no_order_otherwise():
    logits, logprobs, _ = _case(tokens=1)
    token = marginal_nll(logits, logprobs, reduction="none")
    torch.testing.assert_close(marginal_nll(logits, logprobs, None, "sequence", reduction="none"), token)
    # Alike answers of one document favour "sequence", each token known to another document favours "token".
    uniform = torch.zeros(1, 2)
    expert = torch.tensor([[[0.9, 0.9], [0.1, 0.1]]]).log()
    shared = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).log()
    assert marginal_nll(uniform, expert, level="sequence") < marginal_nll(uniform, expert)
    assert marginal_nll(uniform, shared, level="sequence") > marginal_nll(uniform, shared)


def test_gradient_of_the_retriever_is_posterior_minus_prior():
    logits, logprobs, mask = _case()
    temperature = 0.7
    logits.requires_grad_()
    prior = (logits.detach() / temperature).softmax(1)
    loss = marginal_nll(logits, logprobs, mask, temperature=temperature, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    joint = prior.unsqueeze(2) * logprobs.exp()
    posterior = joint / joint.sum(1, keepdim=True)
    expected = -((posterior - prior.unsqueeze(2)) * mask.unsqueeze(1)).sum(2) / temperature
    torch.testing.assert_close(gradient, expected)

    step = 1e-6
    for row, column in [(0, 0), (1, 3), (2, 2)]:
        moved = logits.detach().clone()
        values = []
        for sign in (1, -1):
            moved[row, column] = logits[row, column].item() + sign * step
            values.append(marginal_nll(moved, logprobs, mask, temperature=temperature, reduction="sum"))
        finite = (values[0] - values[1]) / (2 * step)
        assert gradient[row, column].item() == pytest.approx(finite.item(), abs=1e-7)

    (gradient,) = torch.autograd.grad(
        marginal_nll(logits, logprobs, mask, "sequence", temperature=temperature, reduction="sum"), logits
    )
    posterior = (prior.log() + (logprobs * mask.unsqueeze(1)).sum(2)).softmax(1)
    torch.testing.assert_close(gradient, -(posterior - prior) / temperature)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(level):
    logits, logprobs, mask = _case(queries=2, documents=3, tokens=3)
    ignore = torch.tensor([[False, True, False], [False, False, False]])
    assert torch.autograd.gradcheck(
        lambda a, b: marginal_nll(a, b, mask, level, ignore=ignore),
        (logits.requires_grad_(), logprobs.requires_grad_()),
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_and_missing_documents_may_hold_anything(level):
    logits, logprobs, mask = _case()
    mask[0] = torch.tensor([True, True, False, False, False])
    short = marginal_nll(logits[:1, :2], logprobs[:1, :2, :2], level=level)
    ignore = torch.zeros(3, 4, dtype=torch.bool)
    ignore[0, 2:] = True
    logits[0, 2:], logprobs[0, 2:] = math.nan, math.nan
    logprobs[0, :, 2:] = math.nan
    logits.requires_grad_()
    logprobs.requires_grad_()
    losses = marginal_nll(logits, logprobs, mask, level, ignore=ignore, reduction="none")
    torch.testing.assert_close(losses[0], short)
    losses.sum().backward()
    assert logits.grad.isfinite().all() and logprobs.grad.isfinite().all()
    assert (logits.grad[ignore] == 0).all() and (logprobs.grad[0, 2:] == 0).all()
    assert (logprobs.grad[0, :, 2:] == 0).all()


def test_a_score_of_minus_infinity_is_a_missing_document():
    logits, logprobs, mask = _case()
    ignore = torch.zeros(3, 4, dtype=torch.bool)
    ignore[:, 1] = True
    for level in ("token", "sequence"):
        marked = marginal_nll(logits, logprobs, mask, level, ignore=ignore)
        torch.testing.assert_close(
            marginal_nll(logits.masked_fill(ignore, -math.inf), logprobs, mask, level), marked
        )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_queries_without_documents_or_tokens_do_not_count(level):
    logits, logprobs, mask = _case()
    alone = marginal_nll(logits[:1], logprobs[:1], mask[:1], level)
    logits[1], mask[2] = -math.inf, False
    logits.requires_grad_()
    logprobs.requires_grad_()
    loss = marginal_nll(logits, logprobs, mask, level)
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert (logits.grad[1:] == 0).all() and (logprobs.grad[1:] == 0).all()
    nothing = marginal_nll(logits[:0], logprobs[:0], mask[:0], level)
    assert nothing.item() == 0 and nothing.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_not_missing_documents(value):
    logits, logprobs, mask = _case()
    logits[0, 1] = value
    readers = logprobs.log_softmax(2)
    for level in ("token", "sequence"):
        losses = marginal_nll(logits, logprobs, mask, level, reduction="none")
        assert losses.isnan().tolist() == [True, False, False]
        assert marginal_nll(logits[:1], logprobs[:1], mask[:1], level).isnan()
    assert marginal_class_log_probs(logits, readers).isnan().all(1).tolist() == [True, False, False]
    ignore = torch.zeros(3, 4, dtype=torch.bool)
    ignore[0, 1] = True
    assert marginal_nll(logits, logprobs, mask, ignore=ignore).isfinite()
    assert marginal_class_log_probs(logits, readers, ignore=ignore).isfinite().all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_values_stay_finite_and_impossible_answers_are_infinite(level):
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    logprobs = torch.tensor([[[-1e4, -5.0], [-2.0, -1e3]]], requires_grad=True)
    loss = marginal_nll(logits, logprobs, level=level)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logprobs.grad.isfinite().all()
    impossible = torch.full((1, 2, 2), -math.inf, requires_grad=True)
    loss = marginal_nll(torch.zeros(1, 2), impossible, level=level)
    loss.backward()
    assert loss.item() == math.inf and (impossible.grad == 0).all()


def test_temperature_decides_between_one_document_and_all():
    logits = torch.tensor([[40.0, 30.0, 20.0]])  # inner products of unnormalised embeddings
    assert document_log_prior(logits).exp()[0, 0] > 0.9999
    torch.testing.assert_close(
        document_log_prior(logits, temperature=math.inf).exp(), torch.full((1, 3), 1 / 3)
    )
    torch.testing.assert_close(
        document_log_prior(logits, temperature=10.0), torch.tensor([[4.0, 3.0, 2.0]]).log_softmax(1)
    )


def test_prior_is_unmoved_by_a_constant_and_by_missing_documents():
    logits, _, _ = _case()
    ignore = torch.tensor([False, False, True, True]).expand(3, 4)
    prior = document_log_prior(logits, ignore=ignore)
    torch.testing.assert_close(prior[:, :2], logits[:, :2].log_softmax(1))
    assert (prior[:, 2:] == -math.inf).all()
    torch.testing.assert_close(document_log_prior(logits + 100, ignore=ignore), prior)


def test_classes_are_a_normalised_mixture_and_their_loss_the_marginal_one():
    logits, _, _ = _case()
    generator = torch.Generator().manual_seed(1)
    readers = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64).log_softmax(2)
    mixture = marginal_class_log_probs(logits, readers, temperature=2.0)
    torch.testing.assert_close(mixture.exp(), ((logits / 2).softmax(1).unsqueeze(2) * readers.exp()).sum(1))
    targets = torch.tensor([5, 0, 2])
    chosen = readers[torch.arange(3), :, targets].unsqueeze(2)
    torch.testing.assert_close(nll_loss(mixture, targets), marginal_nll(logits, chosen, temperature=2.0))


def test_classes_without_some_or_all_documents():
    logits, _, _ = _case()
    readers = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    readers = readers.log_softmax(2)
    ignore = torch.zeros(3, 4, dtype=torch.bool)
    ignore[0, 1:], ignore[1] = True, True
    readers[ignore] = math.nan
    readers.requires_grad_()
    mixture = marginal_class_log_probs(logits, readers, ignore=ignore)
    torch.testing.assert_close(mixture[0], readers[0, 0])
    assert (mixture[1] == -math.inf).all()
    mixture[[0, 2]].sum().backward()
    assert readers.grad.isfinite().all() and (readers.grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, logprobs, mask = _case(dtype=torch.float32)
    half, half_tokens = logits.to(dtype).requires_grad_(), logprobs.to(dtype).requires_grad_()
    loss = marginal_nll(half, half_tokens, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, marginal_nll(half.float(), half_tokens.float(), mask))
    loss.backward()
    assert half.grad.dtype == dtype and half.grad.isfinite().all() and half_tokens.grad.isfinite().all()
    assert marginal_class_log_probs(half, half_tokens).dtype == torch.float32


def test_reductions_fit_together():
    case = _case()
    each = marginal_nll(*case, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(marginal_nll(*case, reduction="sum"), each.sum())
    torch.testing.assert_close(marginal_nll(*case), each.mean())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_bad_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0, got"):
        document_log_prior(torch.zeros(1, 2), temperature=temperature)


def test_bad_input():
    logits, logprobs, mask = _case()
    loss, prior = inspect.unwrap(marginal_nll), inspect.unwrap(document_log_prior)
    with pytest.raises(ValueError, match=r"each of the \(3, 3\) documents, got shape \(3, 4, 5\)"):
        loss(logits[:, :3], logprobs)
    with pytest.raises(ValueError, match=r"each of the \(2, 4\) documents, got shape \(3, 4, 5\)"):
        inspect.unwrap(marginal_class_log_probs)(logits[:2], logprobs)
    with pytest.raises(ValueError, match=r"mask must have shape \(batch, tokens\) = \(3, 5\), got \(3, 4\)"):
        loss(logits, logprobs, mask[:, :4])
    with pytest.raises(ValueError, match=r"ignore must have the shape of doc_logits \(3, 4\), got \(2, 4\)"):
        prior(logits, ignore=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match='level must be "token" or "sequence", got \'word\''):
        loss(logits, logprobs, mask, "word")
    with pytest.raises(ValueError, match="reduction must be"):
        loss(logits, logprobs, mask, reduction="max")
