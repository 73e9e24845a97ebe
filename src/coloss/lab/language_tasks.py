"""Tasks on running text: a small transformer learns to predict each next character."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coloss.data import DATASETS, IndexedDataset, character_windows, load_characters
from coloss.errors import InputError
from coloss.lab.known_tasks import is_file
from coloss.metrics import evaluation_mode
from coloss.nn import CausalLanguageModel, next_token_loss
from coloss.train.budget import Budget
from coloss.train.task import Task

CONTEXT = 64
"""Characters that the model sees at once."""

WIDTH, DEPTH, HEADS = 64, 3, 4

VALIDATED = 200
"""Windows of validation text that learning curves are made of."""


@dataclass(frozen=True)
class TextSplits:
    """A text as windows of characters, each with the window that begins one character later as its target.

    Attributes:
        characters: the vocabulary.
        train, validation, test: windows of consecutive stretches of the text.
        description: in words.
    """

    characters: str
    train: IndexedDataset
    validation: IndexedDataset
    test: IndexedDataset
    description: str
    kind: str = "next-token"


def holds_text(name: str) -> bool:
    """Whether a name is that of a running text, or of a text file.

    Examples:
        >>> holds_text("tiny-shakespeare"), holds_text("digits")
        (True, False)
    """
    if name in DATASETS:
        return DATASETS[name].kind == "language"
    return name.endswith((".txt", ".txt.gz")) and is_file(name)


def language_task(name: str, stamp: str = "", limit: int | None = None) -> Task:
    """Next-character prediction on a text; 90 % of it for training, then 5 % for validation and 5 % for testing.

    The metrics are `accuracy` (share of characters that were the most likely one) and `nll` (nats for each character). The text is cut at the
    same places for every seed.

    Args:
        name: "tiny-shakespeare", or path of a text file.
        stamp: identifies the content of a file.
        limit: windows of each part at most.

    Raises:
        InputError: when it loads a text too short for a window in each part, or with a limit below 1.

    Examples:
        >>> task = language_task("tiny-shakespeare")
        >>> task.kind, task.metric, task.direction
        ('next-token', 'nll', 'lower')
    """
    title = name if name in DATASETS else Path(name).name
    return Task(
        name=name,
        kind="next-token",
        title=f"next-token on {title}",
        load=lambda seed: _load(name, stamp, limit),
        model=character_model,
        objective=next_token_loss,
        objective_name="next-token",
        validate=lambda model, splits: evaluate_next_token(model, _first(splits.validation, VALIDATED)),
        test=lambda model, splits: evaluate_next_token(model, splits.test),
        metric="nll",
        direction="lower",
        budget=Budget(steps=500),
        batch_size=32,
        optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
        teacher=partial(character_model, width=2 * WIDTH),
    )


def character_model(splits: TextSplits, width: int = WIDTH) -> CausalLanguageModel:
    """Three transformer blocks with rotary positions over an embedding that is also the output layer."""
    return CausalLanguageModel(len(splits.characters), width, DEPTH, HEADS, context=CONTEXT)


def evaluate_next_token(model: nn.Module, windows: Any, batch_size: int = 128) -> Mapping[str, float]:
    """Accuracy and mean negative log-likelihood in nats of the next tokens of all windows.

    Args:
        model: gives logits (batch, tokens, vocabulary) for ids (batch, tokens).
        windows: anything with `inputs` and `targets`, both (windows, tokens), or that pair.
        batch_size: windows in one forward pass.

    Examples:
        >>> class Certain(nn.Module):
        ...     def forward(self, ids):
        ...         return nn.functional.one_hot(ids + 1, 4) * 30.0
        >>> metrics = evaluate_next_token(Certain(), (torch.tensor([[0, 1]]), torch.tensor([[1, 3]])))
        >>> metrics["accuracy"], metrics["nll"]
        (0.5, 15.0)
    """
    inputs, targets = (windows.inputs, windows.targets) if hasattr(windows, "inputs") else windows
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right = loss = 0.0
    with evaluation_mode(model):
        for ids, wanted in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            logits, wanted = model(ids.to(device)), wanted.to(device)
            right += float((logits.argmax(-1) == wanted).sum())
            loss += float(next_token_loss(logits, wanted)) * wanted.numel()
    return {"accuracy": right / targets.numel(), "nll": loss / targets.numel()}


def _first(windows: IndexedDataset, count: int) -> IndexedDataset:
    return windows.subset(torch.arange(min(count, len(windows))))


@lru_cache(maxsize=2)
def _load(name: str, stamp: str, limit: int | None) -> TextSplits:
    """`stamp` makes a file that changed another entry of the cache."""
    if limit is not None and limit < 1:
        raise InputError(f"limit must be >= 1, got {limit}")
    text = load_characters(name)
    whole = (text.train, text.validation, text.test)
    if min(map(len, whole)) <= CONTEXT:
        raise InputError(
            f"{name} must have more than {CONTEXT} characters in each part, 90 % for training and 5 % each for validation and testing, "
            f"got {', '.join(str(len(part)) for part in whole)}"
        )
    parts = []
    for part in whole:
        windows = character_windows(part, CONTEXT)
        parts.append(windows if limit is None else _first(windows, limit))
    train, validation, test = parts
    description = f"{len(train)} + {len(validation)} + {len(test)} windows of {CONTEXT} characters of {len(text.characters)} kinds"
    return TextSplits(text.characters, train, validation, test, description)
