"""Tasks on images and captions for two towers that keep their tokens: captions find images, by details too if a method reads them."""

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coloss.data import ImageTextSplits, IndexedDataset, load_image_text
from coloss.errors import InputError
from coloss.lab.known_tasks import TOKEN_TOWERS, is_file
from coloss.metrics import mean_similarity_distribution, predict, retrieval_metrics
from coloss.nn import ImagePatches, TokenEncoder, Words
from coloss.ops import info_nce_loss
from coloss.train.budget import Budget
from coloss.train.task import Task

SIZE, PATCH, WIDTH = 32, 8, 32
"""Pixels a side of an image and of a patch, and the width of a token."""

MAX_WORDS = 16


@dataclass(frozen=True)
class CaptionSplits:
    """Captions and their images; an image may have several captions, which all lie in one part.

    Each part's inputs are (word ids (captions, words), images (captions, channels, height, width)); its targets, and `identity` and
    `document` in its extras, are the number of the image: equal for captions of one image.

    Attributes:
        train, validation, test: the parts.
        num_identities: images in the training part.
        vocabulary_size: number of word ids.
        input_shape: of an image.

    Examples:
        >>> splits = token_tower_task("openmoji-tokens", limit=20).load(0)
        >>> splits.num_identities, splits.train.extras["identity"].bincount().max().item()
        (20, 2)
    """

    train: IndexedDataset
    validation: IndexedDataset
    test: IndexedDataset
    num_identities: int
    vocabulary_size: int
    input_shape: tuple[int, ...]


def token_tower_task(name: str, stamp: str = "", limit: int | None = None) -> Task:
    """Find an image by its caption, with a transformer over words and one over patches.

    OpenMoji's drawings have their names as fine and their tags as coarse captions. A model of your own takes pairs (word ids, images), gives a
    pair of embeddings, and has `encode_query` and `encode_document`; for methods that read tokens it is a
    `coloss.retrieval.TokenDualEncoder`.

    Args:
        name: `openmoji-tokens`, or the path of images with captions, see `coloss.data.load_image_text`.
        stamp: identifies the content of a file.
        limit: images in each part at most.

    Raises:
        InputError: if there are no images with captions.

    Examples:
        >>> task = token_tower_task("openmoji-tokens", limit=20)
        >>> task.kind, task.metric, task.objective_name
        ('token-retrieval', 'mrr', 'info-nce')
    """
    if name != TOKEN_TOWERS and not is_file(name):
        raise InputError(f"token-retrieval is for images with captions in a folder or npz, {name} holds none")
    load = partial(_load, "openmoji" if name == TOKEN_TOWERS else Path(name).expanduser(), stamp, limit)
    steps = 10 * len(load(0).train) // 64
    return Task(
        name=name,
        kind="token-retrieval",
        title=f"images of {'openmoji' if name == TOKEN_TOWERS else Path(name).name} found by their captions",
        load=load,
        model=_towers,
        objective=caption_loss,
        objective_name="info-nce",
        validate=lambda model, splits: caption_metrics(model, splits.validation),
        test=lambda model, splits: caption_metrics(model, splits.test),
        metric="mrr",
        budget=Budget(steps=min(max(steps, 300), 2000)),
    )


def caption_loss(
    outputs: tuple[Float[Tensor, "captions dim"], Float[Tensor, "captions dim"]],
    targets: Int[Tensor, " captions"],
) -> Float[Tensor, ""]:
    """InfoNCE both ways; pairs of the same image are no negatives of each other.

    Args:
        outputs: embeddings of captions and of their images.
        targets: the number of each pair's image.

    Examples:
        >>> caption_loss((torch.eye(2), torch.eye(2)), torch.tensor([4, 4])).item()
        0.0
    """
    return info_nce_loss(*outputs, 0.05, symmetric=True, ids=targets)


caption_loss.batch_statistic = True  # type: ignore[attr-defined]


def caption_metrics(model: nn.Module, captions: IndexedDataset) -> dict[str, float]:
    """How well captions find their images among all images of a part.

    Args:
        model: with `encode_query` for word ids and `encode_document` for images.
        captions: a part of `CaptionSplits`.

    Returns:
        `mrr`, `recall@1`, `recall@10`, and `msd`, see `coloss.metrics.mean_similarity_distribution`.
    """
    inputs: Any = captions.inputs
    towers: Any = model
    owners = captions.extras["identity"]
    numbers, first = _first_rows(owners)
    images = predict(model, inputs[1][first], call=towers.encode_document).outputs
    scores = predict(model, inputs[0], call=towers.encode_query).outputs @ images.T
    found = retrieval_metrics(scores, owners[:, None] == numbers, (1, 10))
    return {
        **{name: found[name] for name in ("mrr", "recall@1", "recall@10")},
        "msd": mean_similarity_distribution(scores, owners, numbers).msd,
    }


def _first_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different ids, and the row where each stands first."""
    numbers, place = ids.unique(return_inverse=True)
    rows = torch.arange(len(ids) - 1, -1, -1)
    return numbers, torch.empty_like(numbers).scatter_(0, place[rows], rows)


def _towers(splits: Any) -> nn.Module:
    from coloss.retrieval.token_dual_encoder import TokenDualEncoder, TokenTower

    words = Words(splits.vocabulary_size, WIDTH, max_length=MAX_WORDS)
    patches = ImagePatches(splits.input_shape[1:], PATCH, splits.input_shape[0], WIDTH)
    texts, images = (
        TokenTower(TokenEncoder(tokens, WIDTH, 1, 4, pool="none"), WIDTH) for tokens in (words, patches)
    )
    return TokenDualEncoder(texts, images)


@lru_cache(maxsize=3)
def _load(source: str | Path, stamp: str, limit: int | None, seed: int) -> CaptionSplits:
    """`stamp` makes a file that changed another entry of the cache."""
    load = partial(load_image_text, source, seed=seed, max_words=MAX_WORDS, limit=limit)
    both = load(size=SIZE)
    texts = (
        [load(size=1, caption=caption).captions for caption in ("name", "tags")]
        if source == "openmoji"
        else [both.captions]
    )
    parts: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
    train, validation, test = (_captions(both, getattr(both, part), texts) for part in parts)
    return CaptionSplits(
        train,
        validation,
        test,
        num_identities=int(train.extras["identity"].max()) + 1,
        vocabulary_size=len(both.vocabulary),
        input_shape=both.input_shape,
    )


def _captions(splits: ImageTextSplits, part: IndexedDataset, texts: list[tuple[str, ...]]) -> IndexedDataset:
    """One sample for each caption of an image; images without a text of some sort have none of that sort."""
    inputs: Any = part.inputs
    # OpenMoji draws on white: the ground, which says nothing, is to be 0.
    pictures = 1 - inputs[0] if splits.name == "openmoji" else inputs[0]
    identity = _same_images(pictures)
    written = [(row, text[number]) for text in texts for row, number in enumerate(part.ids.tolist())]
    written = [(row, text) for row, text in written if text.strip()]
    rows = torch.tensor([row for row, _ in written], dtype=torch.int64)
    words = splits.vocabulary.encode([text for _, text in written])
    images = pictures[rows]
    owners = identity[rows]
    return IndexedDataset((words, images), owners, extras={"identity": owners, "document": owners})


def _same_images(images: Tensor) -> Tensor:
    """The number of each image, equal for equal ones."""
    known: dict[bytes, int] = {}
    return torch.tensor([known.setdefault(image.numpy().tobytes(), len(known)) for image in images])
