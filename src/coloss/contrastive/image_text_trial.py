"""What is measured of CLIP's improved recipe: one rung after the other on 500 drawings with captions, at as many encoded pairs."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coloss.contrastive.image_text import evaluate_image_text, image_text_model, image_text_task
from coloss.contrastive.image_text_views import WordAugment, strong_image_views
from coloss.contrastive.multi_view_clip import MultiViewClip
from coloss.data import ImageTextSplits, random_views
from coloss.train import Budget, Setting, Task

PAIRS, SIZE, EPOCHS, VIEWS = 500, 16, 15, 2


def drawings_task() -> Task:
    """500 drawings of 16 x 16 pixels with captions as bags of words; all pairs left out and the test pairs judge.

    Examples:
        >>> drawings_task().metric
        'class_map'
    """
    task = image_text_task(Budget(epochs=EPOCHS), SIZE, metric="class_map", limit=PAIRS)
    return replace(task, model=partial(image_text_model, channels=(12, 24, 48), depth=0))


def train_rungs(setting: Setting) -> dict[str, Mapping[str, float]]:
    """Every rung of the ladder for one seed; where strong views have heads, it is the embeddings of those that are judged.

    CLIP trains 1 + A times as many epochs as the arms with A strong views, so that all encode as many images and texts.

    Args:
        setting: of the seed.
    """
    task = drawings_task()
    splits = task.load(setting.seed)
    if setting.smoke:
        splits = replace(splits, test=splits.test.subset(torch.arange(100)))
    setting = replace(setting, task=task, splits=splits)
    found: dict[str, Mapping[str, float]] = {}
    for name, options in rungs(splits).items():
        epochs = EPOCHS if options.get("views", VIEWS) else EPOCHS * (1 + VIEWS)
        budget = Budget(steps=2) if setting.smoke else Budget(epochs=epochs)
        method = MultiViewClip(**({"weak_view": whole_crops} | options))
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            model = setting.fit(setting.new_model(), None, [method], budget=budget).model
        judged = method.strong_model(model) if options.get("views", VIEWS) else model
        found[name] = evaluate_image_text(judged, splits)
        if name == "recipe":
            found["recipe, own heads"] = evaluate_image_text(model, splits)
    return found


def rungs(splits: ImageTextSplits) -> dict[str, dict[str, Any]]:
    """The ladder, by the options of `MultiViewClip`.

    CLIP has the recipe's image views on its one pair, and the temperature that was best for it by validation data. Drawings are told apart by their colours, and a bag of words has no order: so there is little jitter and no grey, and words are dropped
    and never swapped.

    Args:
        splits: hold the vocabulary.
    """
    images = partial(strong_image_views, views=VIEWS, crop=(0.5, 1.0), jitter=0.2, grey=0.0, blur=0.0)
    words = WordAugment.of_vocabulary(splits.vocabulary, VIEWS, synonym=0.0, swap=0.0, delete=1.0, share=0.3)
    return {
        "clip": {"views": 0, "weak_view": partial(images, views=1), "temperature": 0.2},
        "clip, whole crops": {"views": 0},
        "heads alone": {"image_view": copies, "text_view": copies},
        "heads and image views": {"image_view": images, "text_view": copies},
        "recipe": {"image_view": images, "text_view": words},
    }


def whole_crops(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The weak view of most arms: half of the image at least, nothing else."""
    plain: dict[str, Any] = {"rotation": 0.0, "translation": 0.0, "jitter": 0.0, "grey": 0.0, "erasing": 0.0}
    return random_views(images, 1, generator, crop=(0.5, 1.0), flip=False, **plain)


def copies(inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Strong views that are no stronger than the sample itself."""
    return inputs.repeat(VIEWS, *[1] * inputs.ndim)
