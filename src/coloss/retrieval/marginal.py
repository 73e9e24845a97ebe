"""Likelihood of an answer with the retrieved document summed out: one loss that trains reader and retriever.

A retriever scores K documents (demonstrations, passages) for each query, r_k; a reader gives log-probabilities of the answer once with
each of them. With tau the temperature and x the query:

    prior         p(k|x) = softmax_k(r_k / tau)                                                    over the documents that are there
    token         p(y|x) = prod_i sum_k p(k|x) p(y_i | x, k, y_<i)                                 each token may lean on another document
    sequence      p(y|x) = sum_k p(k|x) prod_i p(y_i | x, k, y_<i)                                 one document for the whole answer
    class         p(c|x) = sum_k p(k|x) p(c | x, k)                                                a mixture of K classifiers
    gradient      d log p(y_i|x) / d r_k = (posterior_k - prior_k) / tau,  posterior_k = p(k | x, y)

So a document that made the answer likelier than the others did is scored higher next time. Neither level bounds the other, and both
are the same where the answer has one token.

Patrick Lewis et al. 2020 (RAG), arXiv 2005.11401; with demonstrations for documents "Meta-training with Demonstration Retrieval for
Efficient Few-shot Learning" 2023, arXiv 2307.00119. Values belong to queries one by one, so nothing changes under several processes or
accumulated gradients but the weights of a mean over unequal batches.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coloss.ops import full_precision, masked_logsumexp

Level = Literal["token", "sequence"]
Reduction = Literal["mean", "sum", "none"]


def document_log_prior(
    doc_logits: Float[Tensor, "batch documents"],
    *,
    ignore: Bool[Tensor, "batch documents"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "batch documents"]:
    """Log-probability of each retrieved document before the answer is seen: log softmax_k(r_k / tau).

    Args:
        doc_logits: r, scores of the retriever, not divided by the temperature; one of -infinity is a document that is not there. A query
            with one of NaN or +infinity that is not ignored has no prior: it gets NaN, and so do losses and mixtures.
        ignore: True for documents that are not there; their scores may be anything, NaN included.
        temperature: tau > 0, in the unit of the scores. Inner products of unnormalised embeddings reach tens, which at 1 leaves the
            prior with one document; infinity makes it uniform over the documents that are there.

    Returns:
        The shape of `doc_logits`, at least float32; -infinity for documents that are not there, for all where none is.

    Raises:
        ValueError: if shapes differ or temperature is out of range.

    Source:
        Lewis et al. 2020, arXiv 2005.11401.

    Examples:
        >>> document_log_prior(torch.tensor([[2.0, 2.0, -torch.inf]])).exp()
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if ignore is not None and ignore.shape != doc_logits.shape:
        raise ValueError(
            f"ignore must have the shape of doc_logits {tuple(doc_logits.shape)}, got {tuple(ignore.shape)}"
        )
    logits = full_precision(doc_logits)
    missing = logits == -math.inf
    if ignore is not None:
        missing = missing | ignore
    logits = logits.masked_fill(missing, 0.0) / temperature
    total = masked_logsumexp(logits, ~missing)
    return (logits - total.masked_fill(missing.all(1), 0.0).unsqueeze(1)).masked_fill(missing, -math.inf)


def marginal_nll(
    doc_logits: Float[Tensor, "batch documents"],
    token_logprobs: Float[Tensor, "batch documents tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    level: Level = "token",
    *,
    ignore: Bool[Tensor, "batch documents"] | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Negative log-likelihood of answers, each retrieved document weighed by how well it was retrieved.

        token       -sum_i log sum_k p(k|x) p(y_i | x, k, y_<i)
        sequence    -log sum_k p(k|x) prod_i p(y_i | x, k, y_<i)

    Gradients reach the reader through `token_logprobs` and the retriever through `doc_logits`; detach either to freeze it.

    Args:
        doc_logits: r, scores of the retriever, see `document_log_prior`.
        token_logprobs: log p(y_i | x, k, y_<i) <= 0, of each token of the right answer under the reader with document k.
        mask: True for tokens that count; the others (padding, prompt) may hold anything. None: all.
        level: `"token"` or `"sequence"`.
        ignore: True for documents that are not there; all that belongs to them may be anything, NaN included.
        temperature: tau > 0 of the prior.
        reduction: `"mean"` over the queries that have a document and a token that counts, `"sum"`, or `"none"`.

    Returns:
        A scalar, or (batch,) for `"none"`, at least float32, in nats per answer. Queries without a document or without a token add 0
        with a zero gradient. Infinite where a token has no probability with any document.

    Raises:
        ValueError: if shapes differ, or a value is out of range.

    Cost:
        O(batch * documents * tokens) time and memory; the reader's K forward passes are what costs.

    Source:
        Lewis et al. 2020, arXiv 2005.11401 (RAG-Token, RAG-Sequence); arXiv 2307.00119, 2023.

    Examples:
        >>> scores = torch.zeros(1, 2, requires_grad=True)
        >>> tokens = torch.tensor([[[0.5, 0.1], [0.1, 0.5]]]).log()  # each document knows one of two tokens
        >>> token = marginal_nll(scores, tokens)  # 0.3 each
        >>> sequence = marginal_nll(scores, tokens, level="sequence")  # 0.05
        >>> f"{token.exp():.2f} {sequence.exp():.2f}"
        '11.11 20.00'
    """
    _check(doc_logits, token_logprobs)
    if level not in ("token", "sequence"):
        raise ValueError(f'level must be "token" or "sequence", got {level!r}')
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    queries, _, tokens = token_logprobs.shape
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=token_logprobs.device)
    elif mask.shape != (queries, tokens):
        raise ValueError(
            f"mask must have shape (batch, tokens) = {(queries, tokens)}, got {tuple(mask.shape)}"
        )
    log_prior = document_log_prior(doc_logits, ignore=ignore, temperature=temperature)
    there = log_prior != -math.inf
    counted = there.any(1) & mask.any(1)
    useful = (there & counted.unsqueeze(1)).unsqueeze(2) & mask.unsqueeze(1)
    logprobs = full_precision(token_logprobs).masked_fill(~useful, 0.0)
    if level == "token":
        log_likelihood = masked_logsumexp(log_prior.unsqueeze(2) + logprobs, useful, dim=1)
        loss = -log_likelihood.masked_fill(~(mask & counted.unsqueeze(1)), 0.0).sum(1)
    else:
        loss = -masked_logsumexp(log_prior + logprobs.sum(2), there, dim=1).masked_fill(~counted, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


def marginal_class_log_probs(
    doc_logits: Float[Tensor, "batch documents"],
    class_log_probs: Float[Tensor, "batch documents classes"],
    *,
    ignore: Bool[Tensor, "batch documents"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "batch classes"]:
    """Log-probabilities of classes under the mixture of the readers of each retrieved document.

        log p(c|x) = log sum_k p(k|x) p(c | x, k)

    Its negative at the right class is `marginal_nll` of an answer of one token.

    Args:
        doc_logits: r, scores of the retriever, see `document_log_prior`.
        class_log_probs: log p(c | x, k), such as a log-softmax over the classes.
        ignore: True for documents that are not there; all that belongs to them may be anything, NaN included.
        temperature: tau > 0 of the prior.

    Returns:
        At least float32; normalised wherever `class_log_probs` is; -infinity for all classes of a query without a document.

    Raises:
        ValueError: if shapes differ or temperature is out of range.

    Source:
        arXiv 2307.00119, 2023.

    Examples:
        >>> readers = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]).log()
        >>> marginal_class_log_probs(torch.tensor([[3.0, 1.0]]), readers, temperature=math.inf).exp()
        tensor([[0.5500, 0.4500]])
    """
    _check(doc_logits, class_log_probs)
    log_prior = document_log_prior(doc_logits, ignore=ignore, temperature=temperature).unsqueeze(2)
    there = log_prior != -math.inf
    log_probs = full_precision(class_log_probs).masked_fill(~there, 0.0)
    return masked_logsumexp(log_prior + log_probs, there, dim=1)


def _check(doc_logits: Tensor, logprobs: Tensor) -> None:
    if logprobs.shape[:2] != doc_logits.shape:
        raise ValueError(
            f"log-probabilities must be given for each of the {tuple(doc_logits.shape)} documents, got shape {tuple(logprobs.shape)}"
        )
