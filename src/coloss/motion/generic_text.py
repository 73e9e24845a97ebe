"""A text encoder that has never seen a motion: the rival of text features that have, and the language model behind captions.

LaMP compares its text features with those of CLIP's frozen text encoder. No such model is at hand here, so one is trained: a small causal
language model on sentences alone. It stands for "a frozen generic text encoder", not for CLIP, which knows far more sentences, and images.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coloss.data import IndexedDataset, data_directory
from coloss.errors import DataNotFoundError, InputError
from coloss.metrics.inference import evaluation_mode
from coloss.motion.language_motion_losses import prefix_lm_loss
from coloss.nn import CausalLanguageModel
from coloss.train.budget import Budget
from coloss.train.loop import fit
from coloss.train.schedules import cosine

Pool = Literal["words", "context"]


class GenericTextEncoder(nn.Module):
    """Vectors of texts from a causal language model: the mean over a text's words, of their vectors or of what the last layer makes of them.

    A layer that predicts the next word keeps little of the last one: told the mean of last-layer vectors, a generator of motions followed
    sentences much worse than told the mean of word vectors (see the claim of `lamp`).

    Args:
        vocabulary_size: number of word ids; the model has two more tokens, for begin and end.
        dim, depth, heads: of the `CausalLanguageModel`.
        max_words: longest text.
        padding_id: of the word ids that fill up a shorter text.
        pool: what is averaged: `"words"`, the learned word vectors, or `"context"`, normalised last-layer vectors.

    Attributes:
        language_model: the `CausalLanguageModel`.
        begin_id, end_id: behind the word ids.
        out_features: `dim`.

    Returns:
        From `forward(words)`: one vector for each text (batch, dim).

    Raises:
        ValueError: for sizes that do not fit one another.

    Examples:
        >>> encoder = GenericTextEncoder(30, dim=16, depth=1, heads=2)
        >>> words = torch.tensor([[4, 9, 2, 0], [7, 0, 0, 0]])
        >>> vectors, valid = encoder.token_vectors(words)
        >>> encoder(words).shape, vectors.shape, valid[1].tolist()
        (torch.Size([2, 16]), torch.Size([2, 5, 16]), [True, True, False, False, False])
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        dim: int = 96,
        depth: int = 2,
        heads: int = 4,
        max_words: int = 32,
        padding_id: int = 0,
        pool: Pool = "words",
    ) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise ValueError(f'pool must be "words" or "context", got {pool!r}')
        if not 0 <= padding_id < vocabulary_size:
            raise ValueError(f"padding_id must be in 0 .. {vocabulary_size - 1}, got {padding_id}")
        self.language_model = CausalLanguageModel(
            vocabulary_size + 2, dim, depth, heads, context=max_words + 2
        )
        self.padding_id, self.max_words, self.out_features, self.pool = padding_id, max_words, dim, pool
        self.begin_id, self.end_id = vocabulary_size, vocabulary_size + 1

    def next_word_logits(self, words: Int[Tensor, "batch words"]) -> Float[Tensor, "batch text vocabulary"]:
        """What follows the begin token and each word; see `prefix_lm_loss`."""
        ids, valid = self._framed(words)
        return self.language_model(ids, valid)

    def token_vectors(
        self, words: Int[Tensor, "batch words"]
    ) -> tuple[Float[Tensor, "batch text dim"], Bool[Tensor, "batch text"]]:
        """Normalised last-layer vectors of the begin token and the words, and which of them are no padding."""
        ids, valid = self._framed(words)
        tokens = self.language_model.features(ids, valid)
        return self.language_model.transformer.norm(tokens), valid

    def forward(self, words: Int[Tensor, "batch words"]) -> Float[Tensor, "batch dim"]:
        if self.pool == "words":
            # The table is drawn with a deviation of dim^-1/2: this brings it to 1.
            vectors, valid = (
                self.language_model.embedding(words) * self.out_features**0.5,
                words != self.padding_id,
            )
        else:
            vectors, valid = self.token_vectors(words)
        return (vectors * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)

    def _framed(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return F.pad(words, (1, 0), value=self.begin_id), F.pad(words != self.padding_id, (1, 0), value=True)


def train_generic_text(
    words: Int[Tensor, "sentences words"],
    vocabulary_size: int,
    *,
    dim: int = 96,
    depth: int = 2,
    heads: int = 4,
    padding_id: int = 0,
    budget: Budget | None = None,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    checkpoint_dir: str | Path | None = None,
    progress: Callable[[float, dict[str, float]], None] | None = None,
    seed: int = 0,
) -> GenericTextEncoder:
    """Train a text encoder to predict next words, on sentences alone.

    Args:
        words: ids of the sentences.
        vocabulary_size: number of word ids.
        dim, depth, heads, padding_id: as for `GenericTextEncoder`.
        budget: default: 300 steps.
        batch_size: sentences in a step.
        learning_rate: of AdamW, at its height.
        checkpoint_dir: folder for checkpoints, from which a stopped run goes on; none are written without it.
        progress: as for `fit`.
        seed: of everything random.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        InputError: without sentences, or for a learning rate out of range.

    Examples:
        >>> words = torch.tensor([[3, 4, 5, 0], [3, 6, 0, 0]]).repeat(8, 1)
        >>> encoder = train_generic_text(words, 7, dim=8, depth=1, heads=2, budget=Budget(steps=2))
        >>> encoder.training, encoder(words).shape
        (False, torch.Size([16, 8]))
    """
    if not len(words):
        raise InputError("words must hold at least one sentence, got none")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate must be > 0 and finite, got {learning_rate}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = GenericTextEncoder(
            vocabulary_size,
            dim=dim,
            depth=depth,
            heads=heads,
            max_words=words.shape[1],
            padding_id=padding_id,
        )
    trained = fit(
        _NextWords(encoder),
        IndexedDataset(words, words),
        partial(_sentence_loss, end_id=encoder.end_id, padding_id=padding_id),
        budget=budget or Budget(steps=300),
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.05),
        learning_rate_schedule=cosine(warmup=0.05),
        clip_norm=1.0,
        checkpoint_dir=checkpoint_dir,
        resume=checkpoint_dir is not None,
        progress=progress,
        seed=seed,
    )
    return trained.model.encoder.eval()  # type: ignore[union-attr, operator, return-value]


def movement_sentences() -> tuple[str, ...]:
    """Sentences that people wrote about motions which are not here: the captions of KIT's motion-language set, about 6,000 in English.

    Raises:
        DataNotFoundError: if the file is not there.

    Source: Plappert, Mandery, Asfour 2016, "The KIT Motion-Language Dataset", Big Data.

    Examples:
        >>> sentences = movement_sentences()  # doctest: +SKIP
        >>> len(sentences), sentences[0]  # doctest: +SKIP
        (6082, 'A person walks forward.')
    """
    path = data_directory() / "text_kit_motion_captions.parquet"
    if not path.is_file():
        raise DataNotFoundError(
            f"the sentences of KIT's motion-language set must be in {path}, which is not there"
        )
    return tuple(str(text) for text in pd.read_parquet(path, columns=["text"])["text"])


@torch.no_grad()
def sentence_perplexity(encoder: GenericTextEncoder, words: Int[Tensor, "sentences words"]) -> float:
    """Exponential of the mean cost in nats of a word, ends included: 1 for sentences known by heart, the vocabulary's size for none.

    Examples:
        >>> encoder = GenericTextEncoder(30, dim=16, depth=1, heads=2)
        >>> 1 < sentence_perplexity(encoder, torch.randint(1, 30, (4, 5)))
        True
    """
    with evaluation_mode(encoder):
        logits = encoder.next_word_logits(words)
    loss = prefix_lm_loss(logits, words, encoder.end_id, padding_id=encoder.padding_id, label_smoothing=0.0)
    return math.exp(loss.item())


class _NextWords(nn.Module):
    def __init__(self, encoder: GenericTextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, words: Tensor) -> Tensor:
        return self.encoder.next_word_logits(words)


def _sentence_loss(logits: Tensor, words: Tensor, end_id: int, padding_id: int) -> Tensor:
    return prefix_lm_loss(logits, words, end_id, padding_id=padding_id, label_smoothing=0.0)
