"""Trains a retriever and a reader together from questions and answers: no labels of relevance, the reader's losses rank the documents.

Junda Wang, Zhichao Yang, Zonghai Yao, Hong Yu 2024 (JMLR), arXiv 2402.17887. With s_k the retriever's scores of the K candidates of a
question x with answer y, tau the temperature, and l_j = loss of the reader on y given document j alone and x:

    draw       n documents without replacement by softmax(s / tau)
    rank       pairwise  mean over drawn i < j of softplus(-+(s_i - s_j) / tau), by which of l_i, l_j is smaller     retriever only
               listwise  KL( softmax(-l / tau_r) || softmax(s / tau) ) over the drawn (PDist of Atlas)              retriever only
    objective  loss of y given the m best documents together and x                                                  reader only
    marginal   -log sum over the m best of softmax(s / tau)_k p(y | document k, x) (RAG), in place of both          both

`coloss.retrieval.reader_ranked_loss` says what differs from the published code: proper divisor, softplus, ties, no rescaling by default.

When it helps: answers are known and relevant documents are not, and the retriever at hand is not of the field. Measured (Banking77, TF-IDF in
128 directions, 1,500 questions to learn from, five of 8,503 labelled ones to read, a linear retriever that starts as the cosine, 150 steps, 5
seeds; mean test accuracy, agreement of scores and reader losses over 20 candidates, share of the documents read that have the right intent):

                                   accuracy   agreement   right intent
    frozen retriever                 0.707       0.13         0.58
    jmlr (pairwise)                  0.772       0.29         0.70       +0.065, 95 % interval 0.055 to 0.076
    jmlr, min-max, as published      0.760       0.27         0.69
    listwise                         0.774       0.28         0.71
    frozen retriever, marginal       0.719       0.12         0.58
    marginal                         0.775       0.22         0.68

So any of the three teaches the retriever, and which one hardly matters here. Other learning rates, widths, dropouts and numbers of candidates
(one seed, on training questions held out) leave the frozen retriever between 0.67 and 0.69, pairwise between 0.73 and 0.75.

When not: the reader cannot use what it reads. On PubMedQA (yes, no or maybe; bags of words, 500 questions to learn from, one seed) pairwise
answered 0.55 of the questions and marginal 0.53, where the commonest answer is right in 0.55. Nor is there much to gain where the frozen
retriever ranks as the reader would already.

The answer of `"marginal"` is a mixture of readings of single documents, the others read all at once: part of the difference between them is
the reading. A loss of single documents cannot see that two documents only help together. The paper's medical question answering with a large
language model is out of reach here and was not tested; its sample sizes, the weight of 1 and refreshing the index are read from code and
summaries. In the released trainer the retriever's group of parameters seems empty and most of the retriever frozen: here everything
that requires a gradient is trained, and what shall not be is frozen by the user.

Each question's terms depend on its own candidates alone, so batches may be split over processes or accumulated; what is drawn differs by
process, unless all candidates are. With `refresh_every` the encoded collection is part of the checkpoint.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.retrieval.document_scorers import Exclude
from coloss.retrieval.joint_reader_trial import TEMPERATURE, FrozenRetriever, question_task
from coloss.retrieval.joint_retrieval_step import JointKind, check_joint_options, each_alone, mean_agreement
from coloss.retrieval.reader_ranked import Rescale, reader_ranked_loss, sample_documents
from coloss.retrieval.retrieval_reader import RetrievalReader, row_cross_entropy
from coloss.train import Arm, Budget, Claim, Method, Schedule, State, System


class JointRetrieval(Method):
    """Trains the retriever of a `RetrievalReader` beside its reader, from how well the reader answers with each document.

    The objective trains the reader on the documents that the model chose; this method adds the term `rank`, which trains the retriever. With
    `kind="marginal"` it adds none: it lets the model read documents apart, so that the objective (cross-entropy) is the marginal
    likelihood, which trains both. A model keeps that reading but its state dict does not hold it: to load such weights, build the model with
    `reading="apart"` and the temperature of training. Logs `agreement`: Kendall's tau of scores and reader losses over the drawn documents,
    a mean over questions (at every tenth step for `"marginal"`, as it costs a pass there).

    Inputs are `(queries, candidates)`, as `with_candidates` makes them, or queries alone, for which the collection is searched at each step.
    If the questions themselves stand in the collection, `batch.extras["own_document"]` must hold their numbers, to be left out of searches;
    if copies of them may stand there too, give all copies one id in `document_ids`, and that id in place of the number: a copy hands over
    the answer as well.

    Args:
        kind: `"pairwise"`, `"listwise"` or `"marginal"`.
        n_sampled: documents of each question that the reader tries alone, >= 2 and at most the number of candidates (`"marginal"` takes all
            where there are fewer).
        weight: of the term `rank`: a number >= 0, or a schedule.
        temperature, reader_temperature, margin, rescale: as for `reader_ranked_loss`. The temperature also governs draws and the marginal's
            mixture; for cosines about 0.1.
        reader_loss: `(outputs, targets) -> (rows,)`, the reader's loss of each answer; default: cross-entropy.
        refresh_every: find candidates anew at each step, in a collection that is encoded anew every so many steps; None keeps those given.
        document_ids: (documents,), an id of each document, equal for copies; `batch.extras["own_document"]` is compared with it. Default: their
            numbers.

    Raises:
        InputError: for a value out of range; in a run, for a model that is no `RetrievalReader`, `document_ids` of another number of documents,
            fewer candidates than `n_sampled`, or a `reader_loss` that is not one number for each row.

    Cost:
        n_sampled passes of the reader without a graph, over single documents. A search encodes the collection where the index is not kept.

    Source:
        Wang et al. 2024 (JMLR), arXiv 2402.17887.

    Examples:
        >>> import coloss
        >>> from coloss.nn import DualEncoder
        >>> from coloss.retrieval import DenseRetriever, MeanReader, RetrievalReader, with_candidates
        >>> facts, tower = torch.randn(60, 8), torch.nn.Linear(8, 4)
        >>> retriever = DenseRetriever(DualEncoder(tower, tower))
        >>> model = RetrievalReader(retriever, MeanReader(8, 8, 3), facts)
        >>> data = coloss.data.IndexedDataset(torch.randn(64, 8), torch.randint(3, (64,)))
        >>> run = coloss.fit(
        ...     model,
        ...     with_candidates(model, data),
        ...     torch.nn.functional.cross_entropy,
        ...     [JointRetrieval()],
        ...     budget=coloss.Budget(epochs=2),
        ... )
        >>> sorted(run.history[-1].terms), list(run.history[-1].metrics)
        (['cross_entropy', 'rank'], ['agreement'])
        >>> run.model(torch.randn(2, 8)).shape  # searches the whole collection
        torch.Size([2, 3])
    """

    def __init__(
        self,
        *,
        kind: JointKind = "pairwise",
        n_sampled: int = 10,
        weight: Schedule = 1.0,
        temperature: float = 1.0,
        reader_temperature: float = 1.0,
        margin: float = 0.0,
        rescale: Rescale = None,
        reader_loss: Callable[[Any, Any], Tensor] = row_cross_entropy,
        refresh_every: int | None = None,
        document_ids: Int[Tensor, " documents"] | None = None,
    ) -> None:
        super().__init__()
        try:
            check_joint_options(
                kind,
                n_sampled,
                1,
                1.0 if callable(weight) else weight,
                temperature,
                reader_temperature,
                margin,
                rescale,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        if refresh_every is not None and refresh_every < 1:
            raise InputError(f"refresh_every must be >= 1 or None, got {refresh_every}")
        self.kind, self.n_sampled = kind, n_sampled
        self.temperature, self.reader_temperature = temperature, reader_temperature
        self.margin, self.rescale = margin, rescale
        self.reader_loss, self.refresh_every = reader_loss, refresh_every
        self.document_ids = document_ids
        self.term_weights = {"rank": weight}

    def setup(self, state: State) -> None:
        model = state.model
        if not isinstance(model, RetrievalReader):
            raise InputError(f"the model must be a RetrievalReader, got {type(model).__name__}")
        if self.document_ids is not None and self.document_ids.shape != (len(model.documents),):
            raise InputError(
                f"document_ids must have shape ({len(model.documents)},), got {tuple(self.document_ids.shape)}"
            )
        if self.kind == "marginal":
            model.reading, model.temperature = "apart", self.temperature
        state.tap("retriever_scores", "retriever")
        self._index_parts = 0
        if self.refresh_every is not None:
            self._refresh(model)

    def on_batch(self, state: State) -> None:
        inputs, model = state.batch.inputs, state.model
        assert isinstance(model, RetrievalReader)
        if self.refresh_every is None and not isinstance(inputs, Tensor):
            return
        queries = inputs if isinstance(inputs, Tensor) else inputs[0]
        own = state.batch.extras.get("own_document")
        exclude: Exclude | None = None
        if own is not None:
            ids = torch.arange(len(model.documents)) if self.document_ids is None else self.document_ids
            exclude = (own, ids)
        if self.refresh_every is None:
            candidates = model.search(queries, exclude=exclude)
        else:
            if state.step % self.refresh_every == 0 and state.micro_batch == 0:
                self._refresh(model)
            kept = model.index
            model.index = tuple(getattr(self, f"index_{part}") for part in range(self._index_parts))
            try:
                candidates = model.search(queries, exclude=exclude)
            finally:
                model.index = kept
        state.batch = replace(state.batch, inputs=(queries, candidates))

    def terms(self, state: State) -> dict[str, Tensor]:
        if self.kind == "marginal" and state.step % 10:
            return {}
        scores: Tensor = state.features["retriever_scores"]
        # The marginal is not made of the documents that are drawn: they only say how far the networks agree.
        drawn_each = min(self.n_sampled, scores.shape[1]) if self.kind == "marginal" else self.n_sampled
        try:
            columns = sample_documents(
                scores, drawn_each, self.temperature, state.local_generator, rescale=self.rescale
            )
        except ValueError as error:
            raise InputError(f"n_sampled must fit the candidates of each query: {error}") from error
        drawn, losses = scores.gather(1, columns), self._losses(state, columns)
        agreement = mean_agreement(drawn, losses).item()
        if math.isfinite(agreement):
            state.log({"agreement": agreement})
        if self.kind == "marginal":
            return {}
        loss = reader_ranked_loss(
            drawn,
            losses,
            kind=self.kind,
            temperature=self.temperature,
            reader_temperature=self.reader_temperature,
            margin=self.margin,
            rescale=self.rescale,
        )
        return {"rank": loss}

    def _losses(self, state: State, columns: Tensor) -> Tensor:
        """What the answer costs the reader with each document alone."""
        model: Any = state.model
        queries, candidates = state.batch.inputs
        rows, single = each_alone(queries, model.read_contents(candidates.gather(1, columns)))
        targets = state.batch.targets.repeat_interleave(columns.shape[1], 0)
        with state.features.set_aside(), evaluation_mode(model.reader):
            losses = self.reader_loss(model.reader(rows, single), targets)
        if losses.shape != (columns.numel(),):
            raise InputError(
                f"reader_loss must give one loss for each of {columns.numel()} rows, got shape {tuple(losses.shape)}"
            )
        return losses.view(columns.shape)

    def _refresh(self, model: RetrievalReader) -> None:
        retriever: Any = model.retriever
        with evaluation_mode(retriever):
            index = retriever.encode_documents(model.documents)
        self._index_parts = len(index)
        for part, values in enumerate(index):
            self.register_buffer(f"index_{part}", values.detach().clone())


SYSTEM = System(
    slug="jmlr",
    title="JMLR: Joint Medical LLM and Retrieval Training for Enhancing Reasoning and Professional Question Answering Capability",
    paper="Wang et al. 2024, arXiv 2402.17887",
    family="retrieval",
    acts_on=("batch", "loss"),
    api=(
        "coloss.retrieval.JointRetrieval",
        "coloss.retrieval.JointRetrievalStep",
        "coloss.retrieval.reader_ranked_loss",
        "coloss.retrieval.reader_agreement",
        "coloss.retrieval.sample_documents",
        "coloss.retrieval.RetrievalReader",
        "coloss.retrieval.DenseRetriever",
        "coloss.retrieval.LateInteractionRetriever",
        "coloss.retrieval.late_interaction_scores",
        "coloss.retrieval.with_candidates",
        "coloss.retrieval.train_retrieval_reader",
        "coloss.ops.sample_without_replacement",
    ),
    recipe="coloss.retrieval.train_retrieval_reader",
)

CLAIM = Claim(
    statement=(
        "Questions to a bank (Banking77), answered with five labelled ones out of 8,503: a retriever trained by the order of the reader's losses "
        "(pairwise) makes the reader more accurate on unseen questions than the same retriever frozen at its start, at as many steps. "
        "(No claim against the listwise loss and the marginal likelihood, which are measured beside it.)"
    ),
    metric="accuracy",
    baseline="frozen retriever",
    method="jmlr",
    task=question_task(Budget(steps=150)),
    arms=(
        Arm("frozen retriever", lambda setting: [FrozenRetriever()]),
        Arm("jmlr", lambda setting: [JointRetrieval(temperature=TEMPERATURE)]),
        Arm("jmlr, min-max", lambda setting: [JointRetrieval(rescale="minmax")]),
        Arm("listwise", lambda setting: [JointRetrieval(kind="listwise", temperature=TEMPERATURE)]),
        Arm("marginal", lambda setting: [JointRetrieval(kind="marginal", temperature=TEMPERATURE)]),
        Arm(
            "frozen retriever, marginal",
            lambda setting: [FrozenRetriever(), JointRetrieval(kind="marginal", temperature=TEMPERATURE)],
        ),
    ),
)
