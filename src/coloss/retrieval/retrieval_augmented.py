"""A classifier that reads labelled examples: one forward pass for each retrieved example, and the mixture of what it says.

    log p(c|x) = log sum_k p(k|x) p(c | x, z_k),    p(k|x) = softmax_k(r(x, z_k) / tau),    r(x, z) = <E_q(x), E_d(z)>

with z_k = (input, label) the k-th example, E_q the encoder of queries, which may learn, and E_d that of examples, which is its frozen
copy: a bank whose encoder moved would have to be embedded anew at every step.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.errors import InputError
from coloss.metrics import evaluation_mode
from coloss.nn import MLP, Frozen
from coloss.ops import full_precision
from coloss.retrieval.demonstration_bank import DemonstrationBank
from coloss.retrieval.document_scorers import ENCODED_AT_ONCE
from coloss.retrieval.marginal import document_log_prior, marginal_class_log_probs

Choice = Literal["nearest", "random", "none"]


class Demonstrated(NamedTuple):
    """Queries with the examples that were chosen for them.

    Attributes:
        inputs: (queries, ...).
        examples: (queries, k, ...), inputs of the examples; zeros where one is missing.
        labels: (queries, k), their labels; -1 where one is missing.
        embeddings: (queries, k, dimensions), of E_d; zeros where one is missing.
        missing: (queries, k), True where fewer than k examples could be found.
    """

    inputs: Tensor
    examples: Tensor
    labels: Tensor
    embeddings: Tensor
    missing: Tensor


class DemonstrationReader(nn.Module):
    """A perceptron that reads one example beside the query: logits from [x, z, one-hot label of z].

    Args:
        in_features: numbers in an input, once flattened.
        num_labels: labels that an example can carry, and classes to choose from.
        hidden: widths of the hidden layers.
        dropout: share of hidden units that are dropped in training.

    Returns:
        From `forward(inputs, examples, labels)`: logits (rows, num_labels). A label of -1 is no example: all zeros.

    Source:
        Stands in for the language model of arXiv 2307.00119; any module with these three arguments will do.

    Examples:
        >>> reader = DemonstrationReader(64, num_labels=5)
        >>> reader(torch.zeros(3, 64), torch.zeros(3, 64), torch.tensor([0, 4, -1])).shape
        torch.Size([3, 5])
    """

    def __init__(
        self, in_features: int, num_labels: int, hidden: tuple[int, ...] = (128,), *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.layers = MLP(2 * in_features + num_labels, hidden, num_labels, norm=None, dropout=dropout)

    def forward(
        self,
        inputs: Float[Tensor, "rows *shape"],
        examples: Float[Tensor, "rows *shape"],
        labels: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows classes"]:
        shown = F.one_hot(labels + 1, self.num_labels + 1)[:, 1:].to(inputs.dtype)
        return self.layers(torch.cat([inputs.flatten(1), examples.flatten(1), shown], 1))


class LabelVote(nn.Module):
    """Says what the example says: `RetrievalAugmented` with it is a nearest-neighbour classifier, the baseline without training.

    With a temperature of infinity the k neighbours vote with equal weight, else by the softmax of their scores.

    Args:
        num_labels: labels that an example can carry.

    Returns:
        From `forward(inputs, examples, labels)`: log-probabilities (rows, num_labels), 0 at the label and -infinity elsewhere; all equal
        without an example. There is nothing to train, and a class that no neighbour has is impossible, so its loss is infinite.

    Examples:
        >>> LabelVote(2)(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1, -1])).exp()
        tensor([[0.0000, 1.0000],
                [0.5000, 0.5000]])
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels

    def forward(
        self,
        inputs: Float[Tensor, "rows *shape"],
        examples: Float[Tensor, "rows *shape"],
        labels: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows classes"]:
        shown = F.one_hot(labels.clamp(min=0), self.num_labels).to(full_precision(inputs).dtype)
        return torch.where((labels < 0)[:, None], 1 / self.num_labels, shown).log()


class RetrievalAugmented(nn.Module):
    """Adds retrieved examples to any classifier `reader(inputs, examples, labels) -> logits`.

    Args:
        reader: called once with (queries * k) rows: the query repeated, the example, and its label (-1 for none).
        bank: of examples with payload `(inputs, labels)` and embeddings of the same encoder, see `new_bank`; None where each batch brings
            its own, or until `bank` is assigned.
        encoder: inputs -> (rows, dimensions); the model freezes it.
        k: examples for each query, >= 1.
        temperature: tau > 0 of the prior; infinity weighs all k alike. For inner products, which reach tens, it should be large.
        metric: of the scores, "cosine" or "inner".
        train_retriever: also train a copy of the encoder, for queries, by the same loss; that of the examples stays frozen.

    Returns:
        From `forward`: log-probabilities (queries, classes), normalised, so that cross-entropy and negative log-likelihood agree on them.
        Takes inputs, for which it searches the bank, or `Demonstrated`. Nothing is excluded from that search: in training use
        `DemonstrationTraining`, or `demonstrate` with ids and content. A query without any example is read once with none.

    Raises:
        ValueError: for a value out of range, or a bank of another metric; from `forward`, if there is no bank.

    Cost:
        k forward passes of the reader, in one batch: memory grows with k. Shorten long examples, not the question.

    Source:
        Meta-training with Demonstration Retrieval, arXiv 2307.00119, 2023; Lewis et al. 2020, arXiv 2005.11401.

    Examples:
        >>> inputs, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> model = RetrievalAugmented(LabelVote(2), None, nn.Identity(), k=1)
        >>> model.bank = model.new_bank(inputs, labels)
        >>> model(inputs).argmax(1)
        tensor([0, 0, 1, 1])
    """

    def __init__(
        self,
        reader: nn.Module,
        bank: DemonstrationBank | None,
        encoder: nn.Module,
        k: int = 5,
        *,
        temperature: float = 0.1,
        metric: Literal["cosine", "inner"] = "cosine",
        train_retriever: bool = False,
    ) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if metric not in ("cosine", "inner"):
            raise ValueError(f'metric must be "cosine" or "inner", got {metric!r}')
        if bank is not None and bank.metric != metric:
            raise ValueError(f"metric must be that of the bank, {bank.metric!r}, got {metric!r}")
        self.reader = reader
        self.example_encoder = Frozen(encoder, copy=train_retriever)
        self.query_encoder = encoder if train_retriever else None
        self.bank = bank
        self.k, self.temperature, self.metric = k, temperature, metric

    def new_bank(
        self,
        inputs: Float[Tensor, "items ..."],
        labels: Int[Tensor, " items"],
        *,
        ids: Int[Tensor, " items"] | None = None,
        content: Int[Tensor, " items"] | None = None,
    ) -> DemonstrationBank:
        """A bank of examples, embedded by this model's frozen encoder.

        Args:
            inputs, labels: of the examples.
            ids, content: see `DemonstrationBank`; give the `content_keys` of texts where inputs are features of them.

        Raises:
            InputError: for a label that the reader does not know.
            ValueError: as from `DemonstrationBank`.

        Cost:
            Inputs pass through the encoder 512 at a time.
        """
        check_labels(self.reader, labels)
        embeddings = torch.cat([self.example_encoder(part) for part in inputs.split(ENCODED_AT_ONCE)])
        return DemonstrationBank(
            embeddings,
            (inputs, labels),
            ids=ids,
            content=content,
            metric="inner" if self.metric == "inner" else "cosine",
        )

    @torch.no_grad()
    def demonstrate(
        self,
        inputs: Float[Tensor, "queries ..."],
        bank: DemonstrationBank | None = None,
        *,
        exclude_ids: Int[Tensor, " queries"] | None = None,
        exclude_content: Int[Tensor, " queries"] | None = None,
        choice: Choice = "nearest",
        generator: torch.Generator | None = None,
    ) -> Demonstrated:
        """Choose examples for some queries.

        Args:
            inputs: the queries.
            bank: to choose from; None: the model's own.
            exclude_ids, exclude_content: of the queries: items that carry them are left out, see `DemonstrationBank.search`.
            choice: `"nearest"`, or for comparison `"random"` ones or `"none"`.
            generator: of random ones.

        Raises:
            ValueError: if there is no bank, or for an unknown choice.
        """
        bank = self.bank if bank is None else bank
        if bank is None:
            raise ValueError("bank must be given: this model has none of its own")
        if choice not in ("nearest", "random", "none"):
            raise ValueError(f'choice must be "nearest", "random" or "none", got {choice!r}')
        if choice == "random":
            options: dict[str, Any] = {"exclude_ids": exclude_ids, "exclude_content": exclude_content}
            positions = bank.draw(len(inputs), self.k, generator=generator, **options).positions
        elif choice == "none":
            positions = torch.full((len(inputs), self.k), -1, device=inputs.device)
        else:
            with evaluation_mode(self.example_encoder if self.query_encoder is None else self.query_encoder):
                queries = self.encode_query(inputs)
            positions = bank.search(
                queries, self.k, exclude_ids=exclude_ids, exclude_content=exclude_content
            ).positions
        examples, labels = bank.take(positions)
        missing = positions < 0
        return Demonstrated(
            inputs, examples, labels.masked_fill(missing, -1), bank.take_embeddings(positions), missing
        )

    def encode_query(self, inputs: Float[Tensor, "queries ..."]) -> Float[Tensor, "queries dimensions"]:
        """Embeddings of queries; with a gradient if the retriever is trained."""
        return (self.example_encoder if self.query_encoder is None else self.query_encoder)(inputs)

    def scores(self, shown: Demonstrated) -> Float[Tensor, "queries k"]:
        """r(x, z_k), with a gradient to the queries' encoder if it is trained; 0 where an example is missing."""
        queries, examples = full_precision(self.encode_query(shown.inputs)), full_precision(shown.embeddings)
        if self.metric == "cosine":
            queries, examples = F.normalize(queries, dim=-1), F.normalize(examples, dim=-1)
        return (queries.unsqueeze(1) * examples).sum(-1)

    def log_prior(self, shown: Demonstrated) -> Float[Tensor, "queries k"]:
        """log p(k|x): how much each example counts."""
        return document_log_prior(self.scores(shown), ignore=_unread(shown), temperature=self.temperature)

    def forward(self, inputs: Any) -> Float[Tensor, "queries classes"]:
        shown = inputs if isinstance(inputs, Demonstrated) else self.demonstrate(inputs)
        count = shown.labels.shape[1]
        repeated = shown.inputs.unsqueeze(1).expand(-1, count, *shown.inputs.shape[1:]).flatten(0, 1)
        logits = self.reader(repeated, shown.examples.flatten(0, 1), shown.labels.flatten())
        log_probs = full_precision(logits).log_softmax(-1).unflatten(0, (-1, count))
        return marginal_class_log_probs(
            self.scores(shown), log_probs, ignore=_unread(shown), temperature=self.temperature
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, temperature={self.temperature}, metric={self.metric!r}"


def check_labels(reader: nn.Module, labels: Tensor) -> None:
    """Refuse labels that a reader cannot take; one that does not say `num_labels` takes all.

    Raises:
        InputError: naming the rule and the value.
    """
    known = getattr(reader, "num_labels", None)
    if known is None or not labels.numel():
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < -1 or high >= known:
        raise InputError(
            f"labels of examples must be in [0, {known}), those that the reader knows, or -1 for none, got {high if high >= known else low}"
        )


def _unread(shown: Demonstrated) -> Bool[Tensor, "queries k"]:
    """Missing examples; where all are, the first stands for reading the query alone."""
    alone = shown.missing.all(1)
    first = torch.arange(shown.missing.shape[1], device=alone.device) == 0
    return shown.missing & ~(alone.unsqueeze(1) & first)
