"""Emoji and what people call them, as fine text (names) and as coarse text (tags): the data and the task behind CFAM's claim."""

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from coloss.data import IndexedDataset, load_image_text
from coloss.metrics import mean_similarity_distribution, predict, retrieval_metrics
from coloss.nn import ImagePatches, TokenEncoder, Words
from coloss.ops import info_nce_loss
from coloss.retrieval.token_dual_encoder import TokenDualEncoder, TokenTower
from coloss.train import Budget, Method, Setting, Task

SIZE, PATCH, WIDTH, MAX_WORDS = 16, 4, 32, 8
WARM_UP = Budget(steps=250)
TEMPERATURE = 0.1


@dataclass(frozen=True)
class CaptionedImages:
    """Images, each with a fine and mostly a coarse caption, ready for two towers.

    Attributes:
        train: one sample for each caption: inputs (word ids, image), and the number of the image as `identity` in the extras.
        test_images: images to search.
        test_fine, test_coarse: word ids of captions.
        coarse_images: which test image each coarse caption belongs to; fine caption i belongs to image i.
        num_identities: training images.
        vocabulary_size: of word ids.
    """

    train: IndexedDataset
    test_images: Tensor
    test_fine: Tensor
    test_coarse: Tensor
    coarse_images: Tensor
    num_identities: int
    vocabulary_size: int


@lru_cache(maxsize=1)
def captioned_emoji(seed: int = 0, size: int = SIZE, limit: int | None = None) -> CaptionedImages:
    """OpenMoji with names as fine and tags as coarse text; the vocabulary is that of both in the training part.

    Args:
        seed: of the split into train and validation; the test part is the data set's own.
        size: images are brought to so many pixels a side.
        limit: at most so many images in each part.

    Examples:
        >>> emoji = captioned_emoji(limit=20)
        >>> emoji.test_images.shape, emoji.train.extras["identity"].bincount().max().item()
        (torch.Size([20, 3, 16, 16]), 2)
    """
    options: dict[str, Any] = {"seed": seed, "max_words": MAX_WORDS, "limit": limit}
    both = load_image_text("openmoji", size=size, caption="name+tags", **options)
    names, tags = (
        load_image_text("openmoji", size=1, caption=caption, **options).captions
        for caption in ("name", "tags")
    )

    def captions(part: IndexedDataset, texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Word ids, and which row of the part each belongs to; images without such a text are left out."""
        rows = [row for row, number in enumerate(part.ids.tolist()) if texts[number].strip()]
        chosen = [texts[number] for number in part.ids[torch.tensor(rows, dtype=torch.int64)].tolist()]
        return both.vocabulary.encode(chosen), torch.tensor(rows, dtype=torch.int64)

    images = _ink(both.train)
    parts = [captions(both.train, texts) for texts in (names, tags)]
    words, rows = (torch.cat(found) for found in zip(*parts, strict=True))
    fine, fine_rows = captions(both.test, names)
    coarse, coarse_rows = captions(both.test, tags)
    assert len(fine_rows) == len(both.test)
    return CaptionedImages(
        IndexedDataset((words, images[rows]), extras={"identity": rows}),
        _ink(both.test),
        fine,
        coarse,
        coarse_rows,
        len(images),
        len(both.vocabulary),
    )


def token_towers(emoji: CaptionedImages) -> TokenDualEncoder:
    """One transformer block over words, one over patches, in a joint space; no decoder.

    Examples:
        >>> emoji = captioned_emoji(limit=20)
        >>> texts, images = token_towers(emoji)(emoji.train.inputs)
        >>> texts.shape == images.shape
        True
    """
    words = Words(emoji.vocabulary_size, WIDTH, max_length=MAX_WORDS)
    patches = ImagePatches(emoji.test_images.shape[-1], PATCH, 3, WIDTH)
    texts, images = (
        TokenTower(TokenEncoder(tokens, WIDTH, 1, 4, pool="none"), WIDTH) for tokens in (words, patches)
    )
    return TokenDualEncoder(texts, images)


def judge_towers(model: nn.Module, emoji: CaptionedImages) -> dict[str, float]:
    """How well fine and coarse captions find their images among all test images.

    Returns:
        `mrr`, `recall@10` and `msd` of all captions together, and `mrr_fine`, `mrr_coarse`.
    """
    towers: Any = model
    images = predict(model, emoji.test_images, call=towers.encode_document).outputs
    numbers = torch.arange(len(images))
    fine, coarse = (
        predict(model, words, call=towers.encode_query).outputs @ images.T
        for words in (emoji.test_fine, emoji.test_coarse)
    )
    owners = torch.cat([numbers, emoji.coarse_images])
    scores = torch.cat([fine, coarse])
    found = retrieval_metrics(scores, owners[:, None] == numbers, (10,))
    return {
        "mrr": found["mrr"],
        "recall@10": found["recall@10"],
        "msd": mean_similarity_distribution(scores, owners, numbers).msd,
        "mrr_fine": retrieval_metrics(fine, numbers[:, None] == numbers, (1,))["mrr"],
        "mrr_coarse": retrieval_metrics(coarse, emoji.coarse_images[:, None] == numbers, (1,))["mrr"],
    }


def warm_up_loss(outputs: tuple[Tensor, Tensor], targets: Any = None) -> Tensor:
    """InfoNCE of pairs both ways, which starts from random towers where SDM stays at equal similarities.

    Examples:
        >>> warm_up_loss((torch.eye(3), torch.eye(3))).item() < 1e-6
        True
    """
    queries, documents = outputs
    return info_nce_loss(queries, documents, 0.05, symmetric=True)


warm_up_loss.batch_statistic = True  # type: ignore[attr-defined]


def emoji_task() -> Task:
    """Train two towers on names and tags of emoji; judged on 297 emoji not seen in training.

    Examples:
        >>> emoji_task().metric
        'mrr'
    """
    return Task(
        name="openmoji-fine-and-coarse",
        kind="retrieval",
        title="find an emoji by its name or by its tags among 297 unseen ones; transformers over words and patches",
        load=captioned_emoji,
        model=token_towers,
        objective=warm_up_loss,
        objective_name="info-nce",
        validate=lambda model, emoji: {},
        test=judge_towers,
        metric="mrr",
        budget=Budget(steps=120),
        batch_size=64,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        evaluate_every=10**9,
    )


def measure_details(setting: Setting) -> dict[str, dict[str, float]]:
    """Towers warmed up once, then trained on by each arm for as many steps."""
    # The room that declares the claim imports this module.
    from coloss.retrieval.cross_modal_granularity import CrossModalGranularity

    towers = setting.fit(
        setting.new_model(),
        budget=setting.budget if setting.smoke else WARM_UP,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
    ).model
    sizes: dict[str, Any] = {"num_queries": 8, "depth": 1}
    plain: dict[str, Any] = {"granularity": False, "match": False}
    arms: dict[str, list[Method]] = {
        "info-nce": [],
        "sdm": [CrossModalGranularity(temperature=TEMPERATURE, **plain)],
        "cfam": [CrossModalGranularity(temperature=TEMPERATURE, **sizes)],
        "sdm, temperature 0.02": [CrossModalGranularity(temperature=0.02, **plain)],
    }
    return {
        name: judge_towers(setting.fit(deepcopy(towers), methods=methods).model, setting.splits)
        for name, methods in arms.items()
    }


def _ink(part: IndexedDataset) -> Tensor:
    """Drawings on black: the white ground, which says nothing, is 0."""
    assert isinstance(part.inputs, tuple)
    return 1 - part.inputs[0]
