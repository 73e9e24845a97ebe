r"""Trains a retriever by what its documents are worth to a reader: no relevance labels, only how well the reader answers with each.

Junda Wang, Zhichao Yang, Zonghai Yao, Hong Yu 2024 (JMLR), arXiv 2402.17887; listwise after Izacard et al. 2022 (Atlas, PDist), arXiv
2208.03299, and Shi et al. 2023 (REPLUG), arXiv 2301.12652.

With s_j the retriever's score of document j for a query, l_j the reader's loss on the answer with that document alone, c = s, or s brought
to [-1, 1] (`rescale="minmax"`), and sums over the documents that were tried:

    pairwise   mean over i < j of  t softplus(-(c_i - c_j) / tau) + (1 - t) softplus((c_i - c_j) / tau),   t = 1, 1/2, 0 for l_i <, =, > l_j
    listwise   KL( softmax(-l / tau_r) || softmax(c / tau) )
    agreement  Kendall's tau of c and -l

The pairwise form reads the order of the losses alone, so it does not change with their scale; the listwise one also how much worse a
document is. The paper divides by the number of pairs plus one, adds log(sigmoid) terms, gives ties to the second document, and always
rescales: here it is the number of pairs, softplus, one half, and an option. The gradient reaches the retriever only.

Rescaled scores differ by 2 at most, so with tau = 1 no pair costs less than softplus(-2) = 0.127 and no retriever gets sure of itself; and
where all scores are equal there is nothing to rescale and no gradient.

`coloss.retrieval.JointRetrievalStep` takes one step of both networks in a loop of your own, `coloss.retrieval.JointRetrieval` is the
method for `fit`, with the claim and what it measured.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coloss.ops import distillation_kl_loss, full_precision, sample_without_replacement

RankKind = Literal["pairwise", "listwise"]
Rescale = Literal["minmax"] | None


def reader_ranked_loss(
    retriever_scores: Float[Tensor, "*batch documents"],
    reader_losses: Float[Tensor, "*batch documents"],
    *,
    kind: RankKind = "pairwise",
    temperature: float = 1.0,
    reader_temperature: float = 1.0,
    margin: float = 0.0,
    rescale: Rescale = None,
    ignore: Bool[Tensor, "*batch documents"] | None = None,
) -> Float[Tensor, ""]:
    r"""Cost of a retriever's scores that do not order documents as a reader's losses do.

    The equations are at the head of this module, averaged over queries.

    Args:
        retriever_scores: $s$, not divided by the temperature.
        reader_losses: $l$, lower is better: from any reader, a classifier, an API's log-probabilities, a simulator. No gradient reaches them;
            $+\infty$ is a document with which the answer is impossible.
        kind: `"pairwise"` or `"listwise"`.
        temperature: $\tau > 0$ of the scores.
        reader_temperature: $\tau_r > 0$ of the losses, listwise only.
        margin: >= 0, pairwise only: pairs whose losses differ by less do not count, as the reader's noise orders them. At 0 only exact ties
            are in doubt, which pull their two scores together.
        rescale: `"minmax"` as published, or None, which lets the retriever become as sure as it likes.
        ignore: True for documents that do not count; they may hold anything, NaN included.

    Returns:
        A scalar, at least float32. Queries without a pair that counts, or (listwise) without a document that can answer, add 0.

    Raises:
        ValueError: if shapes differ, a value is out of range, or a reader loss that counts is NaN or $-\infty$.

    Cost:
        O(batch * documents^2) pairwise, O(batch * documents) listwise.

    Source:
        Wang et al. 2024 (JMLR), arXiv 2402.17887; Izacard et al. 2022 (Atlas), arXiv 2208.03299.

    Examples:
        >>> scores = torch.tensor([2.0, 0.0])
        >>> reader_ranked_loss(scores, torch.tensor([0.1, 3.0]))  # in order: softplus(-2)
        tensor(0.1269)
        >>> reader_ranked_loss(scores, torch.tensor([3.0, 0.1]))
        tensor(2.1269)
    """
    check_loss_options(kind, temperature, reader_temperature, margin, rescale)
    scores, losses, there = _comparable(retriever_scores, reader_losses, ignore)
    if not scores.numel():
        return scores.sum()
    scores = _rescaled(scores, there, rescale) / temperature
    if kind == "listwise":
        there = there & (losses < math.inf)
        # Rows that nothing is known of compare a uniform distribution with itself.
        there_or_empty = there | ~there.any(-1, keepdim=True)
        student = torch.where(there, scores, 0.0).masked_fill(~there_or_empty, -math.inf)
        teacher = torch.where(there, -losses / reader_temperature, 0.0).masked_fill(
            ~there_or_empty, -math.inf
        )
        costs = distillation_kl_loss(student, teacher, temperature=1.0, reduction="none")
        return costs.mean()
    gaps = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    better = losses.unsqueeze(-1) < losses.unsqueeze(-2)
    equal = losses.unsqueeze(-1) == losses.unsqueeze(-2)
    apart = torch.where(equal, 0.0, losses.unsqueeze(-1) - losses.unsqueeze(-2)).abs()
    counted = there.unsqueeze(-1) & there.unsqueeze(-2) & (better | equal) & (apart >= margin)
    # Each ordered pair stands once, with the better document first; ties stand twice, once each way round, at half the weight.
    counted = counted & ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    weights = torch.where(equal, 0.5, 1.0).to(scores.dtype) * counted
    costs = (weights * F.softplus(-gaps)).sum((-2, -1)) / weights.sum((-2, -1)).clamp(min=1)
    return costs.mean()


def reader_agreement(
    retriever_scores: Float[Tensor, "*batch documents"],
    reader_losses: Float[Tensor, "*batch documents"],
    *,
    ignore: Bool[Tensor, "*batch documents"] | None = None,
) -> Float[Tensor, "*batch"]:
    """How far a retriever ranks documents as a reader would: Kendall's tau-b of scores and negative losses, for each query.

    Args:
        retriever_scores: higher is better.
        reader_losses: lower is better.
        ignore: True for documents that do not count.

    Returns:
        In [-1, 1], 1 for the same order, about 0 for none, at least float32; NaN for queries in which all scores, or all losses, are equal.

    Raises:
        ValueError: if shapes differ, or a reader loss that counts is NaN or minus infinity.

    Cost:
        O(batch * documents^2).

    Source:
        Kendall 1945 (tau-b).

    Examples:
        >>> reader_agreement(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.1, 0.3, 0.2]]))
        tensor([0.3333])
    """
    scores, losses, there = _comparable(retriever_scores.detach(), reader_losses, ignore)
    pairs = there.unsqueeze(-1) & there.unsqueeze(-2)

    def order(values: Tensor) -> Tensor:
        above, below = (
            compare(values.unsqueeze(-1), values.unsqueeze(-2)) for compare in (torch.gt, torch.lt)
        )
        return (above.to(scores.dtype) - below.to(scores.dtype)) * pairs

    by_score, by_loss = order(scores), -order(losses)
    untied = by_score.square().sum((-2, -1)) * by_loss.square().sum((-2, -1))
    return (by_score * by_loss).sum((-2, -1)) / untied.sqrt()


def sample_documents(
    scores: Float[Tensor, "*batch documents"],
    n: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    rescale: Rescale = None,
    ignore: Bool[Tensor, "*batch documents"] | None = None,
) -> Int[Tensor, "*batch n"]:
    """Different documents of each query, drawn by the softmax of their scores, so that the reader also tries some that rank low.

    Args:
        scores: of the retriever, not divided by the temperature.
        n: documents to draw, in [0, those that each query has].
        temperature: > 0; larger draws more evenly.
        generator: of the draw.
        rescale: `"minmax"` as published: the likeliest document is then at most e^2 times likelier than another one (at temperature 1).
        ignore: True for documents that may not be drawn.

    Returns:
        int64 columns, in the order of the draw.

    Raises:
        ValueError: if n is out of range, as are more documents than there are, or temperature is.

    Source:
        Wang et al. 2024 (JMLR), arXiv 2402.17887.

    Examples:
        >>> sample_documents(torch.tensor([[0.0, 90.0, -90.0, 50.0]]), 2)
        tensor([[1, 3]])
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    there = _present(scores, ignore)
    logits = _rescaled(torch.where(there, full_precision(scores.detach()), 0.0), there, rescale)
    return sample_without_replacement(
        (logits / temperature).masked_fill(~there, -math.inf), n, generator=generator
    )


def best_documents(
    scores: Float[Tensor, "*batch documents"],
    n: int,
    *,
    ignore: Bool[Tensor, "*batch documents"] | None = None,
) -> Int[Tensor, "*batch n"]:
    """The n highest-scoring documents of each query in rising order: what is read last stands next to the question.

    Args:
        scores: of the retriever.
        n: in [0, documents that each query has].
        ignore: True for documents that may not be taken.

    Returns:
        int64 columns, the best document last; which of equal scores is taken is up to `torch.topk`, and so to the machine.

    Raises:
        ValueError: if n is out of range.

    Examples:
        >>> best_documents(torch.tensor([[0.3, 0.9, 0.1, 0.5]]), 3)
        tensor([[0, 3, 1]])
    """
    there = _present(scores, ignore)
    fewest = int(there.sum(-1).min()) if there.numel() else scores.shape[-1]
    if not 0 <= n <= fewest:
        raise ValueError(f"n must be in [0, {fewest}], the fewest documents of a query, got {n}")
    return scores.detach().masked_fill(~there, -math.inf).topk(n, dim=-1).indices.flip(-1)


def check_loss_options(
    kind: str, temperature: float, reader_temperature: float, margin: float, rescale: str | None
) -> None:
    """Refuse options of `reader_ranked_loss` that are out of range, naming option, rule and value."""
    if kind not in ("pairwise", "listwise"):
        raise ValueError(f'kind must be "pairwise" or "listwise", got {kind!r}')
    for name, value in (("temperature", temperature), ("reader_temperature", reader_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be >= 0 and finite, got {margin}")
    if rescale not in (None, "minmax"):
        raise ValueError(f'rescale must be "minmax" or None, got {rescale!r}')


def _present(scores: Tensor, ignore: Tensor | None) -> Tensor:
    if ignore is None:
        return torch.ones_like(scores, dtype=torch.bool)
    if ignore.shape != scores.shape:
        raise ValueError(
            f"ignore must have the shape of the scores {tuple(scores.shape)}, got {tuple(ignore.shape)}"
        )
    return ~ignore


def _comparable(scores: Tensor, losses: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and losses in full precision with 0 where a document does not count, and where one does."""
    if losses.shape != scores.shape:
        raise ValueError(
            f"reader_losses must have the shape of the scores {tuple(scores.shape)}, got {tuple(losses.shape)}"
        )
    there = _present(scores, ignore)
    losses = torch.where(there, full_precision(losses.detach()), 0.0)
    if bool(losses.isnan().any() | (losses == -math.inf).any()):
        raise ValueError("reader_losses must be numbers or +infinity, got NaN or -infinity: set ignore there")
    return torch.where(there, full_precision(scores), 0.0), losses, there


def _rescaled(scores: Tensor, there: Tensor, rescale: str | None) -> Tensor:
    if rescale is None or not scores.numel():
        return scores
    low = scores.masked_fill(~there, math.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~there, -math.inf).amax(-1, keepdim=True)
    differ = high > low
    span = torch.where(differ, high - low, 1.0)
    return torch.where(there & differ, 2 * (scores - torch.where(differ, low, 0.0)) / span - 1, 0.0)
