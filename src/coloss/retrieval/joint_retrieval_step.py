"""One training step of a retriever and a reader: the retriever learns which documents help, the reader to answer from them."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from coloss.metrics.inference import evaluation_mode
from coloss.ops import full_precision
from coloss.retrieval.marginal import Level, marginal_nll
from coloss.retrieval.reader_ranked import (
    Rescale,
    best_documents,
    check_loss_options,
    reader_agreement,
    reader_ranked_loss,
    sample_documents,
)

JointKind = Literal["pairwise", "listwise", "marginal"]


class JointRetrievalStep(nn.Module):
    """Losses of one step in which a reader learns to answer from retrieved documents and a retriever learns which ones help.

    Of the K candidates of each query `n_sampled` are drawn by their scores. For `"pairwise"` and `"listwise"` the reader tries each of them
    alone, in evaluation mode and without a graph, and the retriever learns from these losses (`rank_loss`); then the reader learns on the
    `n_used` best of all candidates together, the best one last (`reader_loss`). Each loss reaches one of the two. For `"marginal"` one loss
    reaches both: the reader learns on each drawn document alone, and the likelihoods are averaged under the retriever's softmax over them.

    Args:
        retriever: `(queries, documents) -> (batch, K)` scores.
        reader_loss: `(queries, documents, targets) -> (rows,)` losses in nats, or (rows, tokens) of them, where documents are (rows, read
            together, ...). A module that also answers otherwise is best wrapped; a function that is no module cannot be brought to
            evaluation mode, so its dropout, if it has any, enters the order that the retriever learns.
        n_sampled: documents tried for the retriever's loss, >= 2 and at most K.
        n_used: documents that the reader learns to read together, >= 1 and at most K.
        kind: what the retriever learns from: `"pairwise"` (JMLR), `"listwise"` (PDist of Atlas) or `"marginal"` (RAG).
        weight: of `rank_loss` in `loss`, >= 0.
        temperature, reader_temperature, margin, rescale: as for `reader_ranked_loss`; draws are made at the same temperature.
        level: of the marginal, see `marginal_nll`.

    Returns:
        From `forward(queries, documents, targets, *, ignore=None, token_mask=None, generator=None)`: a dict of scalars `loss`,
        `reader_loss`, `rank_loss` (0 for `"marginal"`, whose one loss is `reader_loss`) and `agreement`, Kendall's tau of scores and reader
        losses over the drawn documents. Queries, targets and documents are tensors or nests of them, with (batch, ...), and
        (batch, K, ...) for documents; `ignore` (batch, K) is True where a document is not there, `token_mask` (batch, tokens)
        where a token counts. An answer without such a token teaches neither network and enters neither `reader_loss` nor `agreement`.

    Raises:
        ValueError: for a value out of range, or fewer candidates than `n_sampled` or `n_used`.

    Cost:
        Ranked: n_sampled passes of the reader without a graph and one with it. Marginal: n_sampled with a graph.

    Source:
        Wang et al. 2024 (JMLR), arXiv 2402.17887.

    Examples:
        >>> from coloss.nn import MLP, DualEncoder
        >>> from coloss.retrieval import DenseRetriever, MeanReader, ReaderLoss
        >>> tower = nn.Linear(8, 4)
        >>> reader = MeanReader(query_features=8, document_features=8, num_outputs=3)
        >>> step = JointRetrievalStep(
        ...     DenseRetriever(DualEncoder(tower, tower)), ReaderLoss(reader), n_sampled=4, n_used=2
        ... )
        >>> losses = step(torch.randn(16, 8), torch.randn(16, 10, 8), torch.randint(3, (16,)))
        >>> losses["loss"].backward()
        >>> list(losses), tower.weight.grad is not None
        (['loss', 'reader_loss', 'rank_loss', 'agreement'], True)
    """

    def __init__(
        self,
        retriever: Callable[[Any, Any], Tensor],
        reader_loss: Callable[[Any, Any, Any], Tensor],
        n_sampled: int = 10,
        n_used: int = 5,
        *,
        kind: JointKind = "pairwise",
        weight: float = 1.0,
        temperature: float = 1.0,
        reader_temperature: float = 1.0,
        margin: float = 0.0,
        rescale: Rescale = None,
        level: Level = "token",
    ) -> None:
        super().__init__()
        check_joint_options(kind, n_sampled, n_used, weight, temperature, reader_temperature, margin, rescale)
        if level not in ("token", "sequence"):
            raise ValueError(f'level must be "token" or "sequence", got {level!r}')
        self.retriever, self.reader_loss = retriever, reader_loss
        self.n_sampled, self.n_used, self.kind, self.weight, self.level = (
            n_sampled,
            n_used,
            kind,
            weight,
            level,
        )
        self.temperature, self.reader_temperature = temperature, reader_temperature
        self.margin, self.rescale = margin, rescale

    def forward(
        self,
        queries: Any,
        documents: Any,
        targets: Any,
        *,
        ignore: Bool[Tensor, "batch documents"] | None = None,
        token_mask: Bool[Tensor, "batch tokens"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        scores = self.retriever(queries, documents)
        columns = sample_documents(
            scores, self.n_sampled, self.temperature, generator, rescale=self.rescale, ignore=ignore
        )
        drawn = scores.gather(1, columns)
        answered = scores.new_ones(len(scores), dtype=torch.bool) if token_mask is None else token_mask.any(1)
        unknown = ~answered.unsqueeze(1).expand_as(drawn)
        if self.kind == "marginal":
            costs = self._alone(queries, documents, targets, columns, token_mask)
            mask = torch.ones_like(costs[:, 0], dtype=torch.bool) if token_mask is None else token_mask
            loss = marginal_nll(drawn, -costs, mask, self.level, temperature=self.temperature)
            agreement = mean_agreement(drawn, _of_answers(costs.detach(), mask), unknown)
            return {
                "loss": loss,
                "reader_loss": loss,
                "rank_loss": torch.zeros_like(loss),
                "agreement": agreement,
            }
        scored = (
            evaluation_mode(self.reader_loss) if isinstance(self.reader_loss, nn.Module) else nullcontext()
        )
        with torch.no_grad(), scored:
            costs = self._alone(queries, documents, targets, columns, token_mask)
        losses = _of_answers(costs, token_mask)
        rank_loss = reader_ranked_loss(
            drawn,
            losses,
            kind=self.kind,
            temperature=self.temperature,
            reader_temperature=self.reader_temperature,
            margin=self.margin,
            rescale=self.rescale,
            ignore=unknown,
        )
        best = best_documents(scores, self.n_used, ignore=ignore)
        together = _of_answers(
            self.reader_loss(queries, pick_documents(documents, best), targets), token_mask
        )
        reader_loss = together.sum() / answered.sum().clamp(min=1)
        return {
            "loss": reader_loss + self.weight * rank_loss,
            "reader_loss": reader_loss,
            "rank_loss": rank_loss,
            "agreement": mean_agreement(drawn, losses, unknown),
        }

    def _alone(
        self, queries: Any, documents: Any, targets: Any, columns: Tensor, token_mask: Tensor | None
    ) -> Tensor:
        """Costs (batch, columns, tokens) of the answer with each document alone."""
        batch, n = columns.shape
        rows, single = each_alone(queries, pick_documents(documents, columns))
        answers = tree_map(lambda part: part.repeat_interleave(n, 0), targets)
        costs = self.reader_loss(rows, single, answers)
        if costs.ndim not in (1, 2) or len(costs) != batch * n:
            raise ValueError(
                f"reader_loss must give ({batch * n},) losses, or (rows, tokens), got {tuple(costs.shape)}"
            )
        if token_mask is not None and costs.shape[1:] != token_mask.shape[1:]:
            raise ValueError(
                f"reader_loss must give (rows, {token_mask.shape[1]}) losses for token_mask, got {tuple(costs.shape)}"
            )
        return costs.reshape(batch, n, -1)


def pick_documents(documents: Any, columns: Int[Tensor, "batch n"]) -> Any:
    """Some of the candidates of each query, from a tensor (batch, K, ...) or a nest of such.

    Examples:
        >>> documents = torch.tensor([[10, 11, 12], [20, 21, 22]])
        >>> pick_documents(documents, torch.tensor([[2, 0], [1, 1]]))
        tensor([[12, 10],
                [21, 21]])
    """
    rows = torch.arange(len(columns), device=columns.device).unsqueeze(1)
    return tree_map(lambda part: part[rows, columns], documents)


def each_alone(queries: Any, documents: Any) -> tuple[Any, Any]:
    """Rows in which each document (batch, n, ...) stands alone beside its query: (batch * n, ...) and (batch * n, 1, ...).

    Examples:
        >>> each_alone(torch.tensor([7, 8]), torch.tensor([[1, 2], [3, 4]]))
        (tensor([7, 7, 8, 8]), tensor([[1],
                [2],
                [3],
                [4]]))
    """
    together = next(part for part in tree_leaves(documents) if isinstance(part, Tensor)).shape[1]
    single = tree_map(lambda part: part.flatten(0, 1).unsqueeze(1), documents)
    return tree_map(lambda part: part.repeat_interleave(together, 0), queries), single


def check_joint_options(
    kind: str,
    n_sampled: int,
    n_used: int,
    weight: float,
    temperature: float,
    reader_temperature: float,
    margin: float,
    rescale: str | None,
) -> None:
    """Refuse options that cannot work.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    if kind not in ("pairwise", "listwise", "marginal"):
        raise ValueError(f'kind must be "pairwise", "listwise" or "marginal", got {kind!r}')
    if n_sampled < 2:
        raise ValueError(f"n_sampled must be >= 2, got {n_sampled}")
    if n_used < 1:
        raise ValueError(f"n_used must be >= 1, got {n_used}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be >= 0 and finite, got {weight}")
    ranked = "pairwise" if kind == "marginal" else kind
    check_loss_options(ranked, temperature, reader_temperature, margin, rescale)


def _of_answers(costs: Tensor, token_mask: Tensor | None) -> Tensor:
    """Loss of each answer: the mean over its tokens that count, from costs (batch[, documents], tokens); one loss for each is kept.

    At least float32, as sums in half precision make ties; 0 for an answer without a token that counts.
    """
    costs = full_precision(costs)
    if token_mask is None:
        return costs if costs.ndim == 1 else costs.mean(-1)
    mask = token_mask if costs.ndim == 2 else token_mask.unsqueeze(1)
    return torch.where(mask, costs, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def mean_agreement(scores: Tensor, losses: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Mean over the queries that have an order; NaN where none has."""
    return reader_agreement(scores, losses, ignore=ignore).nanmean()
