"""News articles and a few words of one of them, as prompts for a ranker that reads them all: the data and the task behind BlockRank's claim."""

import random
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from coloss.data import IndexedDataset, WordVocabulary, load_raw
from coloss.data.image_text import words_of
from coloss.metrics.inference import _device, _moved
from coloss.retrieval.block_language_model import BlockBatch, BlockRanker
from coloss.train import Budget, Objective, Task

DOCUMENTS, WORDS, QUERY_WORDS = 8, 5, 3
VOCABULARY, SHORTEST_WORD = 300, 4
BATCH_SIZE, STEPS, TEST_PROMPTS = 16, 300, 500


@dataclass(frozen=True)
class KeywordPrompts:
    """Prompts that ask which of some articles a few words come from.

    Attributes:
        train: prompts with answers as inputs, relevance (prompts, documents) as targets; articles of the training part.
        test: prompts that end with the answer's opening sign; articles of the test part.
        test_relevant: which document each test prompt asks for.
        first_number: id of the answer "document 0"; the others follow.
        vocabulary_size: number of ids, signs and document numbers included.
    """

    train: IndexedDataset
    test: BlockBatch
    test_relevant: Int[Tensor, " prompts"]
    first_number: int
    vocabulary_size: int


@lru_cache(maxsize=1)
def keyword_prompts(
    seed: int = 0, train: int = BATCH_SIZE * STEPS, test: int = TEST_PROMPTS
) -> KeywordPrompts:
    """AG news, each article as its first frequent words of four letters or more; the query is a sample of those of one article.

    A document reads "number words number", the instruction and the query "ask words", the answer "[ number ]".

    Args:
        seed: of the draw of articles and of words.
        train, test: numbers of prompts.

    Examples:
        >>> prompts = keyword_prompts(train=4, test=2)
        >>> prompts.train.inputs[0].shape, prompts.test.ids.shape
        (torch.Size([4, 10, 8]), torch.Size([2, 10, 8]))
    """
    articles, opening = _news()
    rng = random.Random(seed)
    prompts, targets = _draw(articles["train"], train, opening, rng, answered=True)
    asked, relevant = _draw(articles["test"], test, opening, rng, answered=False)
    relevance = nn.functional.one_hot(targets, DOCUMENTS)
    return KeywordPrompts(
        IndexedDataset(tuple(prompts), relevance), asked, relevant, opening + 3, opening + 3 + DOCUMENTS
    )


@lru_cache(maxsize=1)
def _news() -> tuple[dict[str, list[list[int]]], int]:
    """Word ids of the articles of each part, and the first id that is no word."""
    table = load_raw("ag-news")["table"]
    texts = [
        " ".join(word for word in words_of(f"{title} {text}") if len(word) >= SHORTEST_WORD)
        for title, text in zip(table["title"], table["text"])
    ]
    parts = {
        part: [text for text, found in zip(texts, table["split"]) if found == part]
        for part in ("train", "test")
    }
    vocabulary = WordVocabulary.of_texts(parts["train"], VOCABULARY + 3, max_words=64)
    return {part: _articles(vocabulary, found) for part, found in parts.items()}, len(vocabulary)


def _articles(vocabulary: WordVocabulary, texts: list[str]) -> list[list[int]]:
    """The first different known words of each article, of those that have more than a query needs."""
    special = len(vocabulary.words) - VOCABULARY
    found = [
        list(dict.fromkeys(number for number in row if number >= special))[:WORDS]
        for row in vocabulary.encode(texts).tolist()
    ]
    return [words for words in found if len(words) > QUERY_WORDS]


def _draw(
    articles: list[list[int]], count: int, opening: int, rng: random.Random, *, answered: bool
) -> tuple[BlockBatch, Tensor]:
    closing, ask, first = opening + 1, opening + 2, opening + 3
    queries, documents, answers, targets = [], [], [], []
    for _ in range(count):
        drawn, target = rng.sample(articles, DOCUMENTS), rng.randrange(DOCUMENTS)
        queries.append([ask, *rng.sample(drawn[target], QUERY_WORDS)])
        documents.append([[first + place, *words, first + place] for place, words in enumerate(drawn)])
        answers.append([opening, first + target, closing] if answered else [opening])
        targets.append(target)
    prompts = BlockBatch.pack(queries, documents, queries, answers, max_block_length=8, pad_multiple=8)
    return prompts, torch.tensor(targets, dtype=torch.int64)


def prompt_accuracies(model: nn.Module, prompts: KeywordPrompts) -> dict[str, float]:
    """How often a ranker finds the right article of the test prompts, by attention and by writing its number.

    Examples:
        >>> prompts = keyword_prompts(train=4, test=20)
        >>> found = prompt_accuracies(BlockRanker(prompts.vocabulary_size, 8, 1, 2), prompts)
        >>> sorted(found)
        ['attention_accuracy', 'decode_accuracy', 'top_share']
    """
    ranker = cast(BlockRanker, model)
    asked = _moved(prompts.test, _device(model))
    with torch.no_grad():
        scores = ranker.rank(asked).cpu()
    answers = ranker.decode(asked, max_tokens=1)[:, 0].cpu() - prompts.first_number
    return {
        "attention_accuracy": (scores.argmax(1) == prompts.test_relevant).float().mean().item(),
        "decode_accuracy": (answers == prompts.test_relevant).float().mean().item(),
        "top_share": scores.amax(1).mean().item(),
    }


def keyword_task(objective: Objective) -> Task:
    """Find the article that a few words come from, among eight; two layers of width 32 over blocks.

    Args:
        objective: of the language model.

    Examples:
        >>> keyword_task(lambda outputs, targets: 0).metric
        'attention_accuracy'
    """

    def validate(model: nn.Module, prompts: Any) -> dict[str, float]:
        return {}

    return Task(
        name="ag-news-keywords",
        kind="retrieval",
        title="which of eight unseen articles do three words come from; a causal transformer of two layers, width 32, over blocks",
        load=keyword_prompts,
        model=lambda prompts: BlockRanker(prompts.vocabulary_size, 32, 2, 2),
        objective=objective,
        objective_name="block attention",
        validate=validate,
        test=prompt_accuracies,
        metric="attention_accuracy",
        budget=Budget(steps=STEPS),
        batch_size=BATCH_SIZE,
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        evaluate_every=10**9,
    )
