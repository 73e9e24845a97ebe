"""Who answers whom in a collection, with a grade for each judged pair: a list, since nearly all pairs are unjudged."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def _no_pairs() -> Tensor:
    return torch.zeros(0, 2, dtype=torch.int64)


@dataclass(frozen=True)
class Judgements:
    """Relevant pairs of queries and documents, and pairs that take no part in an evaluation.

    They go into `coloss.metrics.retrieval_metrics_from_embeddings` as they are: `pairs` as relevance, `grades`, `ignore`.

    Args:
        queries: how many there are, those without a relevant document included.
        documents: how many there are.
        pairs: row of a query and row of a document that answers it, each pair once; all others are irrelevant.
        grades: how well, > 0; 1 where judges said only yes or no.
        ignore: likewise pairs that count neither way, such as a document that is the query itself.

    Examples:
        >>> judged = Judgements(2, 3, torch.tensor([[0, 2], [1, 0], [1, 1]]), torch.tensor([1.0, 2.0, 1.0]))
        >>> judged.dense()
        tensor([[0., 0., 1.],
                [2., 1., 0.]])
    """

    queries: int
    documents: int
    pairs: Int[Tensor, "pairs 2"]
    grades: Float[Tensor, " pairs"]
    ignore: Int[Tensor, "ignored 2"] = field(default_factory=_no_pairs)

    def dense(self) -> Float[Tensor, "queries documents"]:
        """Grade of every pair, 0 where irrelevant: what `coloss.metrics.retrieval_metrics` and `threshold_report` take.

        Cost:
            O(queries * documents) memory.
        """
        grades = torch.zeros(self.queries, self.documents)
        grades[self.pairs[:, 0], self.pairs[:, 1]] = self.grades.float()
        return grades

    def ignored(self) -> Bool[Tensor, "queries documents"]:
        """Which pairs to leave out, as a mask.

        Cost:
            O(queries * documents) memory.

        Examples:
            >>> Judgements(1, 2, torch.tensor([[0, 1]]), torch.ones(1), torch.tensor([[0, 0]])).ignored()
            tensor([[ True, False]])
        """
        mask = torch.zeros(self.queries, self.documents, dtype=torch.bool)
        mask[self.ignore[:, 0], self.ignore[:, 1]] = True
        return mask

    def of(self, rows: Int[Tensor, " some"]) -> "Judgements":
        """Judgements of some queries, which are then numbered in the order given.

        Args:
            rows: of queries, each once.

        Examples:
            >>> judged = Judgements(3, 2, torch.tensor([[0, 1], [2, 0]]), torch.tensor([1.0, 3.0]))
            >>> judged.of(torch.tensor([2, 1])).pairs
            tensor([[0, 0]])
        """
        place = torch.full((self.queries,), -1)
        place[rows] = torch.arange(len(rows))
        kept, ignored = (place[part[:, 0]] >= 0 for part in (self.pairs, self.ignore))
        return Judgements(
            len(rows),
            self.documents,
            torch.stack([place[self.pairs[kept, 0]], self.pairs[kept, 1]], 1),
            self.grades[kept],
            torch.stack([place[self.ignore[ignored, 0]], self.ignore[ignored, 1]], 1),
        )
