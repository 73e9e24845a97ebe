"""Four ideas for generative models, each beside what it would replace; the fifth, the staircase cache, has a claim (`coloss verify genai-optimization`).

Nothing here is a time, so one run tells all; a row's middle half is over seeds where there are several.

Measured once, about four minutes of one core:

    best of 60 settings on digits, median of 10 seeds    cross-entropy method 0.171 nats, random search 0.173
    bits a character, 500 / 1,000 / 2,000 pieces         likelihood 3.79 / 3.58 / 3.31, BPE 3.80 / 3.57 / 3.39, WordPiece 4.74 / 4.68 / 4.60
    trained on 128 tokens, loss at 384 to 512            rotary 2.41, with harmonic slopes 2.04, on harmonic numbers 2.11 (all 2.08 at 64 to 128)
    distances drawn with share 1 / 0.9 / 0.7 / 0.5 / 0.3  2.06 / 2.06 / 2.08 / 2.10 / 2.11 nats; trained with share 0.7 too: 2.07
"""

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coloss.data import LikelihoodSubwords, character_windows, count_words, load, load_characters
from coloss.data.characters import spaced_windows
from coloss.data.likelihood_subwords import Score
from coloss.lab.benchmarks.measure import Report, silent
from coloss.lab.benchmarks.row import Row
from coloss.nn import CausalLanguageModel, SampledBlockAttention, next_token_loss
from coloss.nn.causal_language_model import Positions
from coloss.train import Budget, Number, cosine, cross_entropy_search, fit

LENGTH = 128


def measure(
    report: Report = silent,
    *,
    seeds: int = 10,
    evaluations: int = 60,
    vocabularies: tuple[int, ...] = (500, 1000, 2000),
    steps: int = 300,
    windows: int = 48,
) -> list[Row]:
    """Hyper-parameter search, sub-words, positions beyond the trained length and sampled attention, each beside what it would replace.

    Args:
        report: told the share done.
        seeds: of the searches.
        evaluations: settings that each search tries, in six rounds.
        vocabularies: sizes of the sub-word vocabularies.
        steps: of training the character models.
        windows: of test text.
    """
    rows = search_rows(seeds, evaluations)
    report(0.3)
    rows += subword_rows(vocabularies)
    report(0.5)
    rows += position_rows(steps, windows)
    report(0.8)
    rows += attention_rows(steps, windows)
    report(1.0)
    return rows


def search_rows(seeds: int, evaluations: int) -> list[Row]:
    """Best validation loss on digits that each search finds: learning rate, weight decay and momentum of a linear classifier."""
    splits: Any = load("digits", seed=0)
    train, validation = splits.train, splits.validation
    inputs, targets = train.inputs.flatten(1), train.targets
    held, labels = validation.inputs.flatten(1), validation.targets

    def loss(setting: dict[str, float]) -> float:
        weights = torch.zeros(inputs.shape[1], splits.num_classes, requires_grad=True)
        optimizer = torch.optim.SGD(
            [weights], lr=setting["rate"], momentum=setting["momentum"], weight_decay=setting["decay"]
        )
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(inputs @ weights, targets).backward()
            optimizer.step()
        return F.cross_entropy(held @ weights.detach(), labels).item()

    space = {
        "rate": Number(1e-3, 10.0, log=True),
        "decay": Number(1e-6, 1.0, log=True),
        "momentum": Number(0.0, 0.99),
    }
    samples = evaluations // 6
    ways = {
        "cross-entropy method": partial(cross_entropy_search, samples=samples, rounds=6, elite=0.3),
        # One round has no law to move: all of it is drawn from the first one.
        "random search": partial(cross_entropy_search, samples=6 * samples, rounds=1),
    }
    found = {name: [way(space, loss, seed=seed).score for seed in range(seeds)] for name, way in ways.items()}
    name, other = ways
    return [
        Row.of(f"best of {6 * samples} settings, {name}", found[name], "nats", over=found[other]),
        Row.of(f"best of {6 * samples} settings, {other}", found[other], "nats"),
    ]


def subword_rows(vocabularies: tuple[int, ...]) -> list[Row]:
    """Bits that a unigram model of pieces takes for a character of held-out Shakespeare, all cut by the likeliest cut."""
    text = load_characters()
    words, test = count_words(text.decode(text.train)), text.decode(text.test)
    scores: dict[str, Score] = {"likelihood": "likelihood", "BPE": "count", "WordPiece": "association"}
    rows = []
    for size in vocabularies:
        found = {
            name: [LikelihoodSubwords.of(words, size, score=score).bits_per_character(test)]
            for name, score in scores.items()
        }
        for name in scores:
            over = None if name == "BPE" else found["BPE"]
            rows.append(Row.of(f"{size:,} pieces, {name}", found[name], "bits", over=over))
    return rows


def position_rows(steps: int, windows: int) -> list[Row]:
    """Loss at the trained length and at the end of texts four times as long."""
    kinds: tuple[Positions, ...] = ("rotary", "rotary-harmonic", "rotary-harmonic-log")
    text = load_characters()
    ids = spaced_windows(text.test, 4 * LENGTH + 1, windows)
    rows, far = [], {}
    for kind in kinds:
        model = _trained(text.train, steps, len(text.characters), positions=kind)
        near = _loss(model, ids[:, : LENGTH + 1], LENGTH // 2)
        far[kind] = [_loss(model, ids, 3 * LENGTH)]
        rows.append(Row.of(f"{kind}, tokens {LENGTH // 2} to {LENGTH}", [near], "nats"))
        over = None if kind == "rotary" else far["rotary"]
        rows.append(Row.of(f"{kind}, tokens {3 * LENGTH} to {4 * LENGTH}", far[kind], "nats", over=over))
    return rows


def attention_rows(steps: int, windows: int) -> list[Row]:
    """Loss with distances between blocks of 16 tokens drawn with P(D) = share^D, in evaluation alone and in training too."""
    text = load_characters()
    ids = spaced_windows(text.test, LENGTH + 1, windows)
    plain = _trained(text.train, steps, len(text.characters))
    exact = _loss(plain, ids, 0)
    rows = [Row.of("plain attention", [exact], "nats")]
    for correction in (False, True):
        for share in (1.0, 0.95, 0.9, 0.7, 0.5, 0.3):
            plain.causal_attention = _sampled(share, correction)
            found = np.array([_loss(plain, ids, 0) for _ in range(1 if share == 1 else 4)])
            note = ", corrected" if correction else ""
            rows.append(
                Row.of(f"evaluated with share {share:g}{note}", found - exact, "nats", note="above plain")
            )
    share = 0.7
    model = _trained(text.train, steps, len(text.characters), causal_attention=_sampled(share, False))
    found = np.array([_loss(model, ids, 0) for _ in range(4)])
    rows.append(
        Row.of(f"trained and evaluated with share {share:g}", found - exact, "nats", note="above plain")
    )
    return rows


def _sampled(share: float, correction: bool) -> SampledBlockAttention:
    return SampledBlockAttention(
        16, share, correction=correction, evaluation="same", generator=torch.Generator().manual_seed(0)
    )


def _trained(text: Tensor, steps: int, characters: int, **options: object) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fit(
            CausalLanguageModel(characters, 64, 2, 2, context=LENGTH, **options),  # type: ignore[arg-type]
            character_windows(text, LENGTH, stride=LENGTH // 2),
            next_token_loss,
            budget=Budget(steps=steps),
            batch_size=8,
            optimizer=partial(torch.optim.AdamW, lr=8e-3, betas=(0.9, 0.95), weight_decay=0.1),
            learning_rate_schedule=cosine(warmup=0.1),
            clip_norm=1.0,
            seed=0,
        ).model.eval()


@torch.no_grad()
def _loss(model: Any, ids: Tensor, skip: int) -> float:
    logits = model(ids[:, :-1].to(next(model.parameters()).device))
    return next_token_loss(logits[:, skip:].cpu(), ids[:, 1 + skip :]).item()
