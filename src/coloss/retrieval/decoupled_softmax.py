r"""Trains a retriever whose queries have many right answers: each positive competes with negatives only, not with other positives.

DEXML: Gupta, Devvrit, Rawat et al., "Dual-Encoders for Extreme Multi-Label Classification", ICLR 2024, arXiv 2310.10636.

With s_l = <f(x), g(l)> / tau, P the positives of query x and N all other labels:

    softmax     -1/|P| sum over l in P of  s_l - log sum over ALL j of e^{s_j}             gradient on a positive: p_l - 1/|P|
    decoupled    1/|P| sum over l in P of  softplus( log sum over j in N of e^{s_j} - s_l )  gradient on a positive: -(1 - q_l) / |P|
    topk        -1/|P| sum over l in P of  log sigma( alpha (s_l + t) ),  t such that  sum_j sigma( alpha (s_j + t) ) = k

In the softmax a positive whose probability exceeds 1/|P| is pushed down; decoupled, never. The third asks to be among the k best.

When it helps: queries have many positives, and unevenly many; most of all where only a few of them are drawn for a step. When not: with
one positive for each query all but the third are the same loss, and with about equally many the difference is small.
Measured (digits that look for the items of their class among 200, of which a class has 2 to 68; 300 steps, 5 seeds; mean average precision
and precision at 1 of test queries):

    decoupled                 0.904   0.910
    soft top-5                0.852   0.819
    softmax                   0.837   0.821
    decoupled, one positive   0.867   0.928
    softmax, one positive     0.728   0.735

A label that is right but not marked (missing judgement) is taken for a negative by all forms. Positives that were not drawn
(`positives_per_query`) are left out, never negatives.

Labels may be given in the batch's targets, by ids or by position; see `DecoupledSoftmax`. In a run of several processes documents of the
batch are compared across all of them; a table of labels, which every process has, is not.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coloss.data import Batch, IndexedDataset, Splits, load
from coloss.errors import InputError
from coloss.metrics import predict, retrieval_metrics
from coloss.nn import MLP
from coloss.ops import (
    all_reduce_mean,
    decoupled_softmax_loss,
    full_precision,
    gather_with_gradient,
    is_distributed,
    log_soft_topk,
)
from coloss.retrieval.joined_scores import positive_pairs
from coloss.retrieval.many_positives import (
    decoupled_score_loss,
    draw_positives,
    multi_positive_softmax_loss,
    soft_topk_loss,
)
from coloss.train import Arm, Budget, Claim, Method, Schedule, Setting, State, System, Task

Form = Literal["decoupled", "softmax", "topk"]


class DecoupledSoftmax(Method):
    """Train on queries with several positives, as the only loss or beside another.

    The model returns a pair, embeddings of queries (B, dim) and of documents or labels (M, dim), or one matrix of scores (B, M), such as the
    logits of a multi-label classifier. Positives are the entries > 0 of the batch's targets where these are (B, M); else what
    `positive_pairs` finds in the batch: `extras["relevance"]`, equal ids, or document i for query i. Adds the term of the form's name.

    Args:
        form: "decoupled", "softmax" (positives compete: the baseline) or "topk".
        temperature: tau > 0; 0.05 suits unit vectors, 1 logits.
        positives_per_query: draw so many of each query's positives at each step, in proportion to their relevance; None takes all.
        k, alpha: of the form "topk".
        replace_objective: train on this loss alone; False adds it to the run's objective.
        weight: of the term: a number >= 0, or a schedule of progress.

    Raises:
        InputError: for a value out of range; at a step, for outputs that are neither, or targets that do not fit.

    Cost:
        "decoupled" and "softmax" of embeddings: O(B M dim) time, memory of the embeddings. "topk": see `soft_topk_loss`.

    Source:
        arXiv 2310.10636.

    Examples:
        >>> import coloss
        >>> inputs, labels = torch.randn(64, 5), (torch.rand(64, 7) < 0.4).float()
        >>> run = coloss.fit(
        ...     nn.Linear(5, 7),
        ...     (inputs, labels),
        ...     methods=[DecoupledSoftmax(temperature=1.0)],
        ...     budget=coloss.Budget(epochs=2),
        ... )
        >>> sorted(run.history[-1].terms)
        ['decoupled_softmax']
    """

    batch_statistic = True

    def __init__(
        self,
        *,
        form: Form = "decoupled",
        temperature: float = 0.05,
        positives_per_query: int | None = None,
        k: float = 5,
        alpha: float = 2.0,
        replace_objective: bool = True,
        weight: Schedule = 1.0,
    ) -> None:
        super().__init__()
        if form not in _TERMS:
            raise InputError(f'form must be "decoupled", "softmax" or "topk", got {form!r}')
        for name, value in (("temperature", temperature), ("k", k), ("alpha", alpha)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be > 0 and finite, got {value}")
        if positives_per_query is not None and positives_per_query < 1:
            raise InputError(f"positives_per_query must be >= 1, got {positives_per_query}")
        if not callable(weight) and not 0 <= weight < math.inf:
            raise InputError(f"weight must be >= 0 and finite, or a schedule, got {weight}")
        self.form, self.temperature, self.k, self.alpha = form, temperature, k, alpha
        self.positives_per_query = positives_per_query
        self.replaces_objective = replace_objective
        self.term_weights = {_TERMS[form]: weight}

    def terms(self, state: State) -> dict[str, Tensor]:
        outputs = state.outputs
        if isinstance(outputs, Tensor) and outputs.ndim == 2:
            losses, answered = self._of_scores(outputs, state)
        elif (
            isinstance(outputs, tuple | list)
            and len(outputs) == 2
            and all(isinstance(part, Tensor) and part.ndim == 2 for part in outputs)
        ):
            losses, answered = self._of_embeddings(outputs[0], outputs[1], state)
        else:
            raise InputError(
                f"the model must return scores (queries, labels) or a pair of embeddings, got {type(outputs).__name__}"
            )
        # Gradients are averaged over processes, and so is the count: together they make the mean over the queries of all.
        count = all_reduce_mean(answered.sum().to(losses.dtype))
        return {_TERMS[self.form]: losses.sum() / count.masked_fill(count == 0, 1.0)}

    def _of_scores(self, scores: Tensor, state: State) -> tuple[Tensor, Tensor]:
        relevance = self._target_relevance(state.batch, tuple(scores.shape))
        if relevance is None:
            raise InputError(
                f"targets must hold the relevance of each label, shape {tuple(scores.shape)}, got {_shape(state.batch.targets)}"
            )
        ignore = None
        if self.positives_per_query is not None:
            pairs = (relevance > 0).nonzero().T
            kept = self._draw(pairs, relevance[pairs[0], pairs[1]].float(), state)
            ignore = torch.zeros_like(relevance, dtype=torch.bool)
            ignore[pairs[0, ~kept], pairs[1, ~kept]] = True
            relevance = (relevance > 0) & ~ignore
        answered = (relevance > 0).any(1)
        if self.form == "decoupled":
            losses = decoupled_score_loss(
                scores, relevance, self.temperature, ignore=ignore, reduction="none"
            )
            return losses, answered
        logits = full_precision(scores) / self.temperature
        if ignore is not None and self.form == "topk":
            logits = logits.masked_fill(ignore, -math.inf)
        shares = (relevance > 0).to(logits.dtype)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1)
        logs = logits.log_softmax(1) if self.form == "softmax" else log_soft_topk(logits, self.k, self.alpha)
        return -(logs.masked_fill(shares == 0, 0.0) * shares).sum(1), answered

    def _of_embeddings(self, queries: Tensor, keys: Tensor, state: State) -> tuple[Tensor, Tensor]:
        relevance = self._target_relevance(state.batch, (len(queries), len(keys)))
        weight: Tensor | None
        if relevance is not None:
            pairs = (relevance > 0).nonzero().T.contiguous()
            weight = relevance[pairs[0], pairs[1]].float()
        else:
            pairs, weight = positive_pairs(state.batch, len(queries), keys)
        dropped = None
        if self.positives_per_query is not None:
            kept = self._draw(pairs, weight, state)
            dropped, pairs, weight = pairs[:, ~kept], pairs[:, kept], None
        across = relevance is None  # a table of labels is the same on every process
        if self.form == "decoupled":
            losses = decoupled_softmax_loss(
                queries,
                keys,
                pairs,
                self.temperature,
                weight=weight,
                ignore=dropped,
                reduction="none",
                across_processes=across,
            )
        elif self.form == "softmax":
            losses = multi_positive_softmax_loss(
                queries, keys, pairs, self.temperature, across_processes=across
            )
        else:
            everyone = gather_with_gradient(keys) if across and is_distributed() else keys
            losses = soft_topk_loss(
                queries, everyone, pairs, self.k, self.temperature, alpha=self.alpha, ignore=dropped
            )
        return losses, torch.bincount(pairs[0], minlength=len(queries)) > 0

    @classmethod
    def for_setting(cls, setting: Setting, **parameters: Any) -> "DecoupledSoftmax":
        """Logits of a classifier take temperature 1, embeddings 0.05, unless told."""
        default = 1.0 if setting.task.kind == "multilabel" else 0.05
        return cls(**({"temperature": default} | parameters))

    def _draw(self, pairs: Tensor, weight: Tensor | None, state: State) -> Tensor:
        assert self.positives_per_query is not None
        return draw_positives(pairs, self.positives_per_query, weight, state.local_generator)

    def _target_relevance(self, batch: Batch, shape: tuple[int, ...]) -> Tensor | None:
        targets = batch.targets
        return targets if isinstance(targets, Tensor) and tuple(targets.shape) == shape else None


_TERMS: Mapping[str, str] = {
    "decoupled": "decoupled_softmax",
    "softmax": "multi_positive_softmax",
    "topk": "soft_topk",
}


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


SYSTEM = System(
    slug="decoupled-softmax",
    title="Dual-Encoders for Extreme Multi-Label Classification",
    paper="Gupta, Devvrit, Rawat, Bhojanapalli, Jain, Dhillon, 2024, arXiv 2310.10636",
    family="retrieval",
    acts_on=("loss",),
    api=(
        "coloss.retrieval.DecoupledSoftmax",
        "coloss.ops.decoupled_softmax_loss",
        "coloss.retrieval.decoupled_score_loss",
        "coloss.retrieval.multi_positive_softmax_loss",
        "coloss.retrieval.soft_topk_loss",
        "coloss.ops.soft_topk",
        "coloss.ops.log_soft_topk",
        "coloss.retrieval.draw_positives",
    ),
    method="coloss.retrieval.DecoupledSoftmax",
    kinds=("multilabel", "retrieval"),
)

GALLERY = 200


class LabelTable(nn.Module):
    """A query encoder beside one free embedding for each label; both of unit length.

    Args:
        encoder: of queries, with `out_features`.
        labels: how many.

    Examples:
        >>> queries, labels = LabelTable(MLP(4, (8,), 3), 7)(torch.zeros(5, 4))
        >>> queries.shape, labels.shape
        (torch.Size([5, 3]), torch.Size([7, 3]))
    """

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = nn.Parameter(torch.randn(labels, cast(int, encoder.out_features)))

    def forward(self, inputs: Any) -> tuple[Tensor, Tensor]:
        return F.normalize(self.encoder(inputs), dim=1), F.normalize(self.labels, dim=1)


def _gallery(seed: int) -> Splits:
    """Digits as queries; 200 gallery items as labels, of which 2 to 68 are of a query's class."""
    splits = cast(Splits, load("digits", seed=seed))
    parts = [part.all() for part in (splits.train, splits.validation, splits.test)]
    images, classes = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    sizes = torch.tensor([2, 3, 5, 8, 12, 17, 23, 28, 34, 68])[torch.randperm(10, generator=generator)]
    items = torch.arange(10).repeat_interleave(sizes)
    relevance = (classes[order][:, None] == items).float()
    everything = IndexedDataset(images[order].flatten(1), relevance)
    splits.train, splits.test = (
        everything.subset(torch.arange(300)),
        everything.subset(torch.arange(300, len(order))),
    )
    splits.validation = everything.subset(torch.arange(0))
    splits.kind = "multilabel"
    return splits


def _judge(model: nn.Module, splits: Any) -> dict[str, float]:
    queries, labels = predict(model, splits.test).outputs
    scores = queries @ labels[:GALLERY].T
    found = retrieval_metrics(scores, splits.test.targets, (1, 5))
    return {"precision@1": found["precision@1"], "map": found["map"]}


def _nothing(model: nn.Module, splits: Any) -> dict[str, float]:
    return {}


CLAIM = Claim(
    statement="Where only one of a query's 2 to 68 right labels is drawn for a step (digits that look for the items of their class among "
    "200), the decoupled softmax gives a higher mean average precision on test queries than the softmax over all labels.",
    metric="map",
    baseline="softmax, one positive",
    method="decoupled, one positive",
    task=Task(
        name="digits-gallery",
        kind="retrieval",
        title="find the items of a digit's class among 200, of which each class has 2 to 68",
        load=_gallery,
        model=lambda splits: LabelTable(MLP(64, (64,), 16, norm=None), GALLERY),
        objective=None,
        objective_name="untrained",
        validate=_nothing,
        test=_judge,
        metric="map",
        budget=Budget(steps=300),
        batch_size=300,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        learning_rate_schedule=None,
        evaluate_every=10**9,
    ),
    arms=(
        Arm("softmax, one positive", lambda _: [DecoupledSoftmax(form="softmax", positives_per_query=1)]),
        Arm("decoupled, one positive", lambda _: [DecoupledSoftmax(positives_per_query=1)]),
        Arm("softmax", lambda _: [DecoupledSoftmax(form="softmax")]),
        Arm("decoupled", lambda _: [DecoupledSoftmax()]),
        Arm("soft top-5", lambda _: [DecoupledSoftmax(form="topk", k=5, alpha=1.0)]),
    ),
)
