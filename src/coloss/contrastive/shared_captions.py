"""What is measured of softened targets: digits with captions that several images share, or each with a caption of its own."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn

from coloss.data import ImageTextSplits, IndexedDataset, Splits, WordVocabulary, load
from coloss.metrics import expected_calibration_error, predict
from coloss.nn import ConvNet, DualEncoder, TokenEncoder, Words
from coloss.train import Budget, Method, Setting, fit

from .image_text import ProjectedEncoder, class_embeddings, evaluate_image_text

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin", "regular", "bold")
SLANTS = ("left", "upright", "right")
PAIRS = 1000
TAGS = 40


@lru_cache(maxsize=4)
def captioned_digits(seed: int, unique: bool) -> ImageTextSplits:
    """Real digits with made captions: the digit, the thickness of its stroke and its slant, in thirds of all digits.

    Args:
        seed: draws 1,000 pairs to train on and the order of the rest, the test.
        unique: add two of 80 meaningless words to each caption, so that hardly two are the same.

    Examples:
        >>> shared, unique = (captioned_digits(0, unique) for unique in (False, True))
        >>> shared.captions[0], len(set(shared.captions)), len(set(unique.captions)) > 1700
        ('zero thin right', 83, True)
    """
    digits = cast(Splits, load("digits", seed=seed))
    parts = [part.all() for part in (digits.train, digits.validation, digits.test)]
    images, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
    order = torch.cat([part.ids for part in parts if part.ids is not None]).argsort()
    images, targets = images[order], targets[order]
    draw = torch.Generator().manual_seed(seed)
    tags = torch.randint(TAGS, (len(images), 2), generator=draw).tolist()
    captions = [
        f"{DIGITS[digit]} {STROKES[stroke]} {SLANTS[slant]}" + (f" first{a} second{b}" if unique else "")
        for digit, stroke, slant, (a, b) in zip(
            targets.tolist(), _thirds(images.flatten(1).mean(1)), _thirds(_slant(images)), tags
        )
    ]
    rows = torch.randperm(len(images), generator=draw)
    vocabulary = WordVocabulary.of_texts((captions[i] for i in rows[:PAIRS]), max_words=5)
    words = vocabulary.encode(captions)
    train, test = (
        IndexedDataset((images[part], words[part]), targets[part], part)
        for part in (rows[:PAIRS], rows[PAIRS:])
    )
    return ImageTextSplits(
        name="digits with captions",
        kind="retrieval",
        train=train,
        validation=train.subset(torch.arange(0)),
        test=test,
        input_shape=tuple(images.shape[1:]),
        num_classes=len(DIGITS),
        class_names=DIGITS,
        vocabulary=vocabulary,
        captions=tuple(captions),
    )


def caption_model(splits: ImageTextSplits) -> DualEncoder:
    """Small encoders of digits and of their captions."""
    vocabulary = splits.vocabulary
    words = Words(len(vocabulary), 32, max_length=vocabulary.max_words)
    return DualEncoder(
        ProjectedEncoder(ConvNet(1, (16, 32)), 32),
        ProjectedEncoder(TokenEncoder(words, 32, depth=1, heads=4), 32),
    )


def train_and_score(splits: ImageTextSplits, method: Method, setting: Setting) -> Mapping[str, float]:
    """Retrieval by class, zero-shot accuracy and calibration on the test pairs, after 15 epochs of the method.

    Args:
        splits: of `captioned_digits`.
        method: with a `scale`, in place of an objective.
        setting: of the trial.
    """
    torch.manual_seed(setting.seed)
    if setting.smoke:
        splits = replace(splits, test=splits.test.subset(torch.arange(60)))
    run = fit(
        caption_model(splits),
        splits.train,
        methods=[method],
        budget=Budget(steps=3) if setting.smoke else Budget(epochs=15),
        batch_size=128,
        seed=setting.seed,
        optimizer=partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1),
    )
    found = evaluate_image_text(run.model, splits)
    (images, _), classes = predict(run.model, splits.test)
    assert classes is not None
    scale: nn.Module = method.scale  # type: ignore[assignment]
    factor = scale().detach()
    logits = factor * images @ class_embeddings(run.model, splits).T
    calibration = expected_calibration_error(logits, classes, from_logits=True)
    names = ("class_map", "zero_shot", "mrr")
    return {name: found[name] for name in names} | {"ece": float(calibration), "scale": float(factor)}


def _thirds(values: Tensor) -> list[int]:
    limits = values.quantile(torch.tensor([1 / 3, 2 / 3]))
    return [int(third) for third in (values[:, None] > limits).sum(1)]


def _slant(images: Tensor) -> Tensor:
    """Covariance of ink over the two directions; positive where strokes lean to the right."""
    ink = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    down, right = torch.meshgrid(*(torch.arange(float(size)) for size in ink.shape[1:]), indexing="ij")
    middle = [(ink * place).sum((1, 2))[:, None, None] for place in (down, right)]
    return -(ink * (down - middle[0]) * (right - middle[1])).sum((1, 2))
