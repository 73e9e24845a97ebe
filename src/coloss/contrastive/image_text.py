"""Images and texts in one space, small: a pair of encoders, how well they match, and the task that claims of this family share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coloss.contrastive.clip import LogitScale, clip_loss
from coloss.data import ImageTextSplits, IndexedDataset, load_image_text
from coloss.metrics import predict, retrieval_metrics_from_embeddings
from coloss.nn import ConvNet, DualEncoder, TokenEncoder, Words
from coloss.ops import full_precision
from coloss.train import Budget, Task

TEMPLATES = ("{}", "a {}", "picture of {}", "the {} symbol")

OPENMOJI_PROMPTS: Mapping[str, tuple[str, ...]] = {
    "activities": ("game", "sport", "ball", "celebration", "trophy"),
    "animals-nature": ("animal", "bird", "fish", "insect", "plant", "flower", "tree"),
    "extras-openmoji": ("brand", "logo", "technology", "climate", "emergency"),
    "flags": ("flag",),
    "food-drink": ("food", "drink", "fruit", "vegetable", "dessert"),
    "objects": ("object", "clothing", "tool", "music", "computer", "office"),
    "people-body": ("person", "man", "woman", "hand", "body", "family"),
    "smileys-emotion": ("smiling face", "sad face", "emotion", "heart"),
    "symbols": ("symbol", "sign", "arrow", "button"),
    "travel-places": ("travel", "place", "building", "vehicle", "weather", "clock"),
}
"""What OpenMoji's groups hold, in words of captions: the groups' own names mostly do not occur in any."""


class ProjectedEncoder(nn.Module):
    """A backbone and a linear layer without bias into the joint space: `projection(backbone(x))`.

    Args:
        backbone: with an integer attribute `out_features`.
        dim: of the joint space.

    Attributes:
        backbone: as given; its output is what further heads in training act on.
        projection: the linear layer, drawn with standard deviation `out_features ** -0.5`.
        out_features: `dim`.

    Raises:
        ValueError: for a backbone without `out_features`, or dim < 1.

    Examples:
        >>> ProjectedEncoder(ConvNet(3, (8, 16)), 4)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, backbone: nn.Module, dim: int) -> None:
        super().__init__()
        width = getattr(backbone, "out_features", None)
        if not isinstance(width, int):
            raise ValueError(f"backbone must have an integer out_features, got {type(backbone).__name__}")
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        self.backbone = backbone
        self.projection = nn.Linear(width, dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        self.out_features = dim

    def forward(self, inputs: Any) -> Float[Tensor, "batch dim"]:
        return self.projection(self.backbone(inputs))


class ClipObjective(nn.Module):
    """CLIP's loss of a pair of encoders as an objective of `fit`, with a scale that is learnt along.

    Args:
        temperature: at the start.
        label_smoothing: in [0, 1].

    Attributes:
        scale: the `LogitScale`.

    Examples:
        >>> objective = ClipObjective()
        >>> round(objective((torch.eye(4), torch.eye(4))).item(), 6)
        2e-06
    """

    batch_statistic = True
    __name__ = "clip"

    def __init__(self, temperature: float = 0.07, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.scale = LogitScale(temperature)
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Sequence[Tensor], targets: Any = None) -> Float[Tensor, ""]:
        images, texts = outputs
        return clip_loss(images, texts, self.scale(), label_smoothing=self.label_smoothing)


def image_text_model(
    splits: ImageTextSplits,
    dim: int = 64,
    *,
    channels: Sequence[int] = (16, 32, 64),
    width: int = 64,
    depth: int = 1,
    heads: int = 4,
    dropout: float = 0.0,
) -> DualEncoder:
    """A small convolutional network for the images and a transformer for the captions, projected into one space.

    `model((images, word_ids))` gives unit vectors of both; `query_encoder` takes images, `document_encoder` texts, each a
    `ProjectedEncoder` with its `backbone` (`ConvNet`, and a `TokenEncoder` over `Words`, mean of words).

    Args:
        splits: tell the images' channels, the vocabulary's size and the captions' length.
        dim: of the joint space.
        channels: of the image network's stages, each but the first at half the size of the one before.
        width: of a word's token.
        depth: transformer blocks.
        heads: of attention; divides `width`.
        dropout: in the transformer.

    Examples:
        >>> splits = load_image_text("openmoji", size=16, limit=20)
        >>> images, texts = image_text_model(splits, dim=8)(splits.test.inputs)
        >>> images.shape, texts.shape
        (torch.Size([20, 8]), torch.Size([20, 8]))
    """
    vocabulary = splits.vocabulary
    words = Words(len(vocabulary), width, max_length=vocabulary.max_words, padding_id=vocabulary.padding_id)
    return DualEncoder(
        ProjectedEncoder(ConvNet(splits.input_shape[0], channels), dim),
        ProjectedEncoder(TokenEncoder(words, width, depth, heads, dropout=dropout), dim),
    )


def class_embeddings(
    model: nn.Module,
    splits: ImageTextSplits,
    prompts: Mapping[str, Sequence[str]] | None = None,
    templates: Sequence[str] = TEMPLATES,
) -> Float[Tensor, "classes dim"]:
    """One unit vector for each class: the mean of the embeddings of its prompts.

    Args:
        model: with `encode_document` for word ids, such as `image_text_model` gives.
        splits: name the classes and hold the vocabulary.
        prompts: words for each class, by its name; None: the name itself, and for OpenMoji `OPENMOJI_PROMPTS`.
        templates: each with one `{}` for the words.

    Raises:
        ValueError: if there are no classes, a class has no prompt, or a template has no place for one.

    Examples:
        >>> splits = load_image_text("openmoji", size=16, limit=20)
        >>> class_embeddings(image_text_model(splits, dim=8), splits).shape
        torch.Size([10, 8])
    """
    if splits.class_names is None:
        raise ValueError(f"splits must name classes to be told apart by prompts, {splits.name} has none")
    if prompts is None:
        prompts = OPENMOJI_PROMPTS if splits.name == "openmoji" else {}
        prompts = {name: prompts.get(name, (name.replace("-", " "),)) for name in splits.class_names}
    missing = [name for name in splits.class_names if not prompts.get(name)]
    if missing:
        raise ValueError(f"prompts must hold some words for every class, got none for {missing[0]!r}")
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"templates must each hold {{}}, at least one, got {list(templates)}")
    encoder: Any = model
    rows = []
    for name in splits.class_names:
        texts = [template.format(words) for words in prompts[name] for template in templates]
        found, _ = predict(model, splits.vocabulary.encode(texts), call=encoder.encode_document)
        rows.append(F.normalize(full_precision(found), dim=1).mean(0))
    return F.normalize(torch.stack(rows), dim=1)


def evaluate_image_text(
    model: nn.Module,
    splits: ImageTextSplits,
    split: str = "test",
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    templates: Sequence[str] = TEMPLATES,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 1024,
) -> dict[str, float]:
    """How well a pair of encoders matches images and texts it has not seen.

    Args:
        model: takes (images, word ids), gives their embeddings, and has `encode_document`.
        splits: of images with captions.
        split: the part that is scored.
        prompts: see `class_embeddings`.
        templates: likewise.
        ks: cut-offs of recall.
        batch_size: samples in one forward pass.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k` (own partner among the k nearest), `recall@k` (mean of the two) and `mrr`
        (mean reciprocal rank of the partner, mean of the two ways); and where the data have classes `zero_shot` (accuracy of the nearest
        class embedding) and `class_map` (mean average precision with all texts of an image's class relevant, mean of the two ways). NaN
        where an embedding is.

    Raises:
        ValueError: if the part is empty.

    Examples:
        >>> splits = load_image_text("openmoji", size=16, limit=20)
        >>> found = evaluate_image_text(image_text_model(splits, dim=8), splits)
        >>> sorted(found)[:5]
        ['class_map', 'image_to_text_recall@1', 'image_to_text_recall@10', 'image_to_text_recall@5', 'mrr']
    """
    (images, texts), classes = predict(model, getattr(splits, split), batch_size)
    images, texts = (F.normalize(full_precision(part), dim=1) for part in (images, texts))
    diverged = not bool(images.isfinite().all() and texts.isfinite().all())
    images, texts = images.nan_to_num(0.0), texts.nan_to_num(0.0)

    def ranked(queries: Tensor, documents: Tensor, ids: Tensor) -> dict[str, float]:
        return retrieval_metrics_from_embeddings(queries, documents, (ids, ids), ks, pooled_auc=False)

    pairs = torch.arange(len(images))
    there, back = ranked(images, texts, pairs), ranked(texts, images, pairs)
    found = {f"image_to_text_recall@{k}": there[f"recall@{k}"] for k in ks}
    found |= {f"text_to_image_recall@{k}": back[f"recall@{k}"] for k in ks}
    found |= {name: (there[name] + back[name]) / 2 for name in [*(f"recall@{k}" for k in ks), "mrr"]}
    if classes is not None and splits.class_names is not None:
        found["class_map"] = (
            ranked(images, texts, classes)["map"] + ranked(texts, images, classes)["map"]
        ) / 2
        nearest = images @ class_embeddings(model, splits, prompts, templates).T
        found["zero_shot"] = float((nearest.argmax(1) == classes).float().mean())
    return {name: float("nan") if diverged else value for name, value in found.items()}


def image_text_task(
    budget: Budget,
    size: int = 32,
    *,
    metric: str = "mrr",
    dim: int = 64,
    batch_size: int = 128,
    caption: str = "name+tags",
    limit: int | None = None,
    title: str = "",
) -> Task:
    """A task that trains a small pair of encoders on OpenMoji's drawings and captions and judges it on pairs it has not seen.

    The plain arm's objective is CLIP's loss with a learnt scale. Nothing is validated during a run. There are 297 test pairs.

    Args:
        budget: of each arm.
        size: images are brought to so many pixels a side.
        metric: which of `evaluate_image_text`'s decides.
        dim: of the joint space.
        batch_size: pairs in a step.
        caption: "name", "tags" or "name+tags".
        limit: train on so many of the 1,354 pairs only, drawn by the seed; the others join the test pairs.
        title: one line for people; by default made of the above.

    Examples:
        >>> task = image_text_task(Budget(epochs=1), size=16, limit=100)
        >>> task.kind, task.metric, len(task.load(0).train)
        ('retrieval', 'mrr', 100)
    """
    return Task(
        name="openmoji",
        kind="retrieval",
        title=title or f"drawings ({size} x {size}) and their captions found from one another",
        load=partial(_openmoji, size, caption, limit),
        model=partial(image_text_model, dim=dim),
        objective=ClipObjective(),
        objective_name="clip",
        validate=_nothing,
        test=evaluate_image_text,
        metric=metric,
        budget=budget,
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1),
        evaluate_every=10**9,
    )


@lru_cache(maxsize=3)
def _openmoji(size: int, caption: Any, limit: int | None, seed: int) -> ImageTextSplits:
    splits = load_image_text("openmoji", seed=seed, size=size, caption=caption)
    if limit is None:
        return splits
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))
    train, others, test = (
        splits.train.subset(order[:limit]),
        splits.train.subset(order[limit:]).all(),
        splits.test.all(),
    )
    inputs, targets, ids = (
        tuple(torch.cat(pair) for pair in zip(others.inputs, test.inputs)),
        *(torch.cat([getattr(part, name) for part in (others, test)]) for name in ("targets", "ids")),
    )
    return replace(splits, train=train, test=IndexedDataset(inputs, targets, ids))


def _nothing(model: nn.Module, splits: Any) -> Mapping[str, float]:
    return {}
