"""The experiment behind CoDiEmb's claim: one encoder of TF-IDF vectors for SICK's graded pairs and Banking77's questions."""

from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset, Loader, SingleTaskSampler, fit_text_encoder, load_raw
from coloss.metrics import predict, retrieval_metrics
from coloss.nn import MLP, DualEncoder
from coloss.train import Budget, Task

PAIRS, QUESTIONS, FEATURES = 2000, 2000, 1000


def unified_task(budget: Budget) -> Task:
    """A shared perceptron 1000-256-64 on TF-IDF: 2,000 SICK pairs and 2,000 questions with another one of the same intent, in turn.

    Judged by Spearman's correlation of cosines and grades on 1,500 other SICK pairs, and by how often the nearest of 1,000 training
    questions has the intent of a test question; `both` is the mean of the two.

    Args:
        budget: of each arm.

    Examples:
        >>> unified_task(Budget(steps=1)).metric
        'both'
    """
    return Task(
        name="sick-banking77",
        kind="retrieval",
        title="one encoder for graded similarity (SICK) and search by intent (Banking77)",
        load=_load,
        model=_model,
        objective=None,
        objective_name="untrained",
        validate=lambda model, splits: {},
        test=_judge,
        metric="both",
        budget=budget,
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        evaluate_every=10**9,
    )


@lru_cache(maxsize=1)
def _texts() -> tuple[Any, Any]:
    return load_raw("sick")["table"], load_raw("banking77")["table"]


def _load(seed: int) -> SimpleNamespace:
    sick, banking = _texts()
    generator = torch.Generator().manual_seed(seed)

    def drawn(table: Any, split: str, count: int) -> Any:
        rows = table[table["split"] == split].reset_index(drop=True)
        return rows.iloc[torch.randperm(len(rows), generator=generator)[:count].tolist()].reset_index(
            drop=True
        )

    pairs, judged = drawn(sick, "train", PAIRS), drawn(sick, "test", 1500)
    questions, asked = drawn(banking, "train", QUESTIONS), drawn(banking, "test", 600)
    texts = [*pairs["sentence_A"], *pairs["sentence_B"], *questions["text"]]
    encoder = fit_text_encoder(texts, max_features=FEATURES)

    def features(column: Any) -> Tensor:
        return torch.from_numpy(encoder(list(column)))

    names = {name: number for number, name in enumerate(sorted(set(banking["intent"])))}
    intents, wanted = (
        torch.tensor([names[name] for name in table["intent"]]) for table in (questions, asked)
    )
    own = features(questions["text"])
    partner = _partners(intents, generator)
    grades = torch.tensor(pairs["score"].to_numpy(), dtype=torch.float32)
    train = IndexedDataset(
        (
            torch.cat([features(pairs["sentence_A"]), own]),
            torch.cat([features(pairs["sentence_B"]), own[partner]]),
        ),
        torch.cat([grades, torch.zeros(len(own))]),
        extras={
            "graded": torch.arange(len(pairs) + len(own)) < len(pairs),
            "document": torch.cat([1000 + torch.arange(len(pairs)), intents]),
        },
    )
    sampler = SingleTaskSampler([len(pairs), len(own)], 64)
    return SimpleNamespace(
        train=Loader(train, None, sampler=sampler, seed=seed),
        kind="retrieval",
        test=SimpleNamespace(
            pairs=(features(judged["sentence_A"]), features(judged["sentence_B"])),
            grades=torch.tensor(judged["score"].to_numpy(), dtype=torch.float32),
            queries=features(asked["text"]),
            gallery=own[:1000],
            relevance=wanted[:, None] == intents[:1000],
        ),
    )


def _partners(intents: Tensor, generator: torch.Generator) -> Tensor:
    """For each question another one of its intent (itself, where there is no other): the next of a random order of the intent."""
    order = torch.randperm(len(intents), generator=generator)
    order = order[intents[order].argsort(stable=True)]
    _, counts = intents[order].unique_consecutive(return_counts=True)
    partner = torch.empty_like(order)
    for group in order.split(counts.tolist()):
        partner[group] = group.roll(1)
    return partner


def _model(splits: Any) -> nn.Module:
    tower = MLP(FEATURES, (256,), 64, norm=None)
    return DualEncoder(tower, tower)


def _judge(model: nn.Module, splits: Any) -> dict[str, float]:
    from scipy.stats import spearmanr

    test = splits.test
    encode: Any = model
    first, second = (predict(model, side, call=encode.encode_query).outputs for side in test.pairs)
    queries, gallery = (
        predict(model, side, call=encode.encode_query).outputs for side in (test.queries, test.gallery)
    )
    order = float(spearmanr((first * second).sum(1).numpy(), test.grades.numpy()).statistic)
    search = retrieval_metrics(queries @ gallery.T, test.relevance, (1,))
    return {
        "spearman": order,
        "precision@1": search["precision@1"],
        "map": search["map"],
        "both": (order + search["precision@1"]) / 2,
    }
