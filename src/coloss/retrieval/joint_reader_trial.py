"""The small experiment on which JMLR is measured: customers' questions to a bank, answered with labelled ones from a collection."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from coloss.data import IndexedDataset, fit_text_encoder, load_raw
from coloss.metrics import nearest_neighbours, predict
from coloss.nn import DualEncoder
from coloss.retrieval.document_scorers import DenseRetriever
from coloss.retrieval.joint_retrieval_step import each_alone
from coloss.retrieval.reader_ranked import reader_agreement
from coloss.retrieval.retrieval_reader import MeanReader, RetrievalReader, row_cross_entropy
from coloss.train import Budget, Method, State, Task, cosine

FEATURES, TRAIN_QUESTIONS, TEST_QUESTIONS, CANDIDATES, READ = 128, 1500, 1000, 20, 5
TEMPERATURE = 0.1


@dataclass(frozen=True)
class QuestionBank:
    """Questions as vectors, and labelled ones to look up.

    Attributes:
        train: questions to learn from, with the candidates that unchanged vectors find: inputs (vectors, document numbers), targets intents.
        test: questions not seen, likewise.
        documents: vectors of the collection.
        intents: of its questions.
        num_intents: how many there are.
    """

    train: IndexedDataset
    test: IndexedDataset
    documents: Tensor
    intents: Tensor
    num_intents: int


def banking_questions(seed: int) -> QuestionBank:
    """Banking77: 1,500 training questions, 1,000 of the test part, and all other training questions as the collection.

    Examples:
        >>> bank = banking_questions(0)
        >>> len(bank.train), len(bank.test), len(bank.documents), bank.num_intents
        (1500, 1000, 8503, 77)
        >>> bank.train.inputs[1].shape
        torch.Size([1500, 20])
    """
    known, known_intents, unseen, unseen_intents = _vectors()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(known), generator=generator)
    asked, kept = order[:TRAIN_QUESTIONS], order[TRAIN_QUESTIONS:]
    tested = torch.randperm(len(unseen), generator=generator)[:TEST_QUESTIONS]
    documents = known[kept]

    def with_nearest(questions: Tensor, intents: Tensor) -> IndexedDataset:
        found = nearest_neighbours(questions, documents, CANDIDATES, metric="inner").indices
        return IndexedDataset((questions, found), intents)

    return QuestionBank(
        with_nearest(known[asked], known_intents[asked]),
        with_nearest(unseen[tested], unseen_intents[tested]),
        documents,
        known_intents[kept],
        int(known_intents.max()) + 1,
    )


def small_question_reader(bank: QuestionBank) -> RetrievalReader:
    """A retriever that starts as the cosine of unchanged vectors, and a perceptron that reads five questions with their intents.

    Examples:
        >>> model = small_question_reader(banking_questions(0))
        >>> sum(parameter.numel() for parameter in model.retriever.parameters())
        16384
    """
    tower = nn.Linear(FEATURES, FEATURES, bias=False)
    nn.init.eye_(tower.weight)
    labels = F.one_hot(bank.intents, bank.num_intents).to(bank.documents.dtype)
    return RetrievalReader(
        DenseRetriever(DualEncoder(tower, tower)),
        MeanReader(FEATURES, FEATURES + bank.num_intents, bank.num_intents, hidden=(128,), dropout=0.5),
        bank.documents,
        torch.cat([bank.documents, labels], 1),
        n_candidates=CANDIDATES,
        n_used=READ,
    )


def judge_reader(model: nn.Module, bank: QuestionBank) -> dict[str, float]:
    """How well unseen questions are answered, and how far the retriever ranks as the reader would.

    Returns:
        `accuracy` with documents searched for in the whole collection; `accuracy_in_list` with documents chosen among the 20 that the
        unchanged vectors find; `agreement`, the mean Kendall tau over these 20 of the scores and the reader's losses with
        each alone; `same_intent`, the share of documents read that have the intent of the question.
    """
    assert isinstance(model, RetrievalReader) and isinstance(bank.test.inputs, tuple)
    questions, listed = bank.test.inputs
    intents: Any = bank.test.targets
    found = model.search(questions, CANDIDATES)
    answers, in_list = (
        predict(model, IndexedDataset((questions, candidates))).outputs.argmax(1)
        for candidates in (found, listed)
    )
    scores = model.retriever(questions, model.documents[listed])
    rows, single = each_alone(questions, model.read_contents(listed))
    losses = row_cross_entropy(model.reader(rows, single), intents.repeat_interleave(CANDIDATES))
    agreement = reader_agreement(scores, losses.view(scores.shape))
    return {
        "accuracy": (answers == intents).double().mean().item(),
        "accuracy_in_list": (in_list == intents).double().mean().item(),
        "agreement": agreement.nanmean().item(),
        "same_intent": (bank.intents[found[:, :READ]] == intents[:, None]).double().mean().item(),
    }


def question_task(budget: Budget) -> Task:
    """Train a retriever and a reader on questions of Banking77.

    Args:
        budget: of each arm.

    Examples:
        >>> question_task(Budget(steps=1)).metric
        'accuracy'
    """
    return Task(
        name="banking77-lookup",
        kind="classification",
        title="name the intent of a question to a bank with five labelled questions out of 8,503, found by a retriever",
        load=lru_cache(maxsize=2)(banking_questions),
        model=small_question_reader,
        objective=F.cross_entropy,
        objective_name="reader alone",
        validate=lambda model, bank: {},
        test=judge_reader,
        metric="accuracy",
        budget=budget,
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        learning_rate_schedule=cosine(),
        evaluate_every=10**9,
    )


class FrozenRetriever(Method):
    """Leaves the retriever of a `RetrievalReader` as it is: the reader alone learns.

    Examples:
        >>> model = small_question_reader(banking_questions(0))
        >>> FrozenRetriever().setup(State(model))
        >>> any(parameter.requires_grad for parameter in model.retriever.parameters())
        False
    """

    def setup(self, state: State) -> None:
        assert isinstance(state.model, RetrievalReader)
        state.model.retriever.requires_grad_(False)


@lru_cache(maxsize=1)
def _vectors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors of training and test questions (TF-IDF in 128 directions fitted to the training part), and their intents."""
    # scikit-learn takes a second to import.
    from sklearn.decomposition import TruncatedSVD

    table = load_raw("banking77")["table"]
    parts = [table[table["split"] == split] for split in ("train", "test")]
    encode = fit_text_encoder(list(parts[0]["text"]))
    counts = [csr_matrix(encode(list(part["text"]))) for part in parts]
    reduce = TruncatedSVD(FEATURES, n_iter=2, random_state=0).fit(counts[0])
    names = np.unique(table["intent"])
    found = []
    for part, count in zip(parts, counts, strict=True):
        vectors = torch.from_numpy(reduce.transform(count).astype(np.float32))
        found += [F.normalize(vectors, dim=1), torch.from_numpy(np.searchsorted(names, part["intent"]))]
    return tuple(found)  # type: ignore[return-value]
