"""Tasks by name: every model-ready data set, and any table, image folder or npz of the user's own."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from coloss.data import (
    DATASETS,
    Corruption,
    ImageTextSplits,
    IndexedDataset,
    RetrievalSplits,
    Splits,
    halves,
    holds_captions,
    holds_collection,
    import_callable,
    load,
    load_image_text,
)
from coloss.data.image_folder import IMAGE_SUFFIXES
from coloss.errors import InputError
from coloss.lab.directions import Direction
from coloss.lab.known_tasks import (
    HALVES,
    IMAGE_TEXT,
    SELF_SUPERVISED,
    TOKEN_TOWERS,
    TaskKind,
    check_task,
    is_file,
    task_names,
)
from coloss.lab.language_tasks import holds_text, language_task
from coloss.lab.motion_tasks import holds_clips, motion_task
from coloss.lab.recommender_tasks import holds_choices, recommender_task
from coloss.lab.retrieval_tasks import collection_loader, retrieval_task, searches
from coloss.lab.token_tower_tasks import token_tower_task
from coloss.metrics import (
    evaluate_classifier,
    evaluate_encoder,
    evaluate_multilabel,
    evaluate_regressor,
)
from coloss.nn import MLP, Classifier, ConvNet
from coloss.train.budget import Budget
from coloss.train.task import Task


def find_task(
    name: str,
    *,
    target: str | None = None,
    kind: TaskKind | None = None,
    model: str | None = None,
    text_features: str = "tfidf",
    limit: int | None = None,
    label_noise: float | None = None,
    noise_kind: Literal["symmetric", "pairwise"] | None = None,
    imbalance: float | None = None,
    imbalance_kind: Literal["long-tailed", "step"] | None = None,
) -> Task:
    """The task of a name, or of a file or folder.

    Args:
        name: a name of `task_names()`, a path to CSV, parquet or npz, a folder of images by class or of queries, documents and judgements
            (`coloss.data.read_collection`), a text file (`.txt`, `.txt.gz`), or `hf:...`.
        target: the column to predict, for tables.
        kind: where the guess by the target's values is wrong, for your own data; "self-supervised" trains an encoder without the labels of a
            classification and judges it by probes, as the tasks `NAME-ssl` do. A table of users, items and times is "ranking" or
            "next-item", images with captions may be "token-retrieval"; see `coloss.lab.recommender_tasks` and
            `coloss.lab.token_tower_tasks`.
        model: import path `package.module:name` of a callable `splits -> nn.Module`, in place of the default model.
        text_features: "tfidf", "hashing" or the import path of an encoder.
        limit: use so many samples of each part at most; of interactions, so many users.
        label_noise: share of wrong labels in training and validation data, in [0, 1], drawn by each seed; for classification. Test data
            stay clean, see `coloss.data.with_label_noise`.
        noise_kind: "symmetric" (default) or "pairwise".
        imbalance: rarest class's share of the most frequent one in training and validation data, in (0, 1]; for classification. Test data
            stay as they are, see `coloss.data.with_imbalance`.
        imbalance_kind: "long-tailed" (default) or "step".

    Raises:
        InputError: if there is no such task, file, column or model; close names are suggested.

    Examples:
        >>> find_task("digits").objective_name
        'cross-entropy'
        >>> find_task("digits", label_noise=0.4).title
        'classification on digits, 40% of the training labels wrong'
    """
    check_task(name)
    self_supervised = kind == "self-supervised" or (name in task_names() and name.endswith(SELF_SUPERVISED))
    corruption = _corruption(label_noise, noise_kind, imbalance, imbalance_kind)
    if corruption is not None and (self_supervised or name == HALVES):
        what = "a self-supervised" if self_supervised else "a retrieval"
        raise InputError(f"label noise and imbalance are for classification tasks, {name} is {what} one")
    if name == IMAGE_TEXT and kind == "token-retrieval":
        raise InputError(
            f"{IMAGE_TEXT} has embeddings without tokens: ask for {TOKEN_TOWERS}, and leave kind out"
        )
    stamp = content_hash(Path(name).expanduser()) if is_file(name) else ""
    if holds_choices(name, kind, target):
        if corruption is not None or target is not None:
            raise InputError(f"{name} holds who chose what: leave target, label noise and imbalance out")
        task = recommender_task(name, kind, stamp, limit)
    elif name == TOKEN_TOWERS or kind == "token-retrieval":
        if corruption is not None or target is not None or kind not in (None, "token-retrieval"):
            raise InputError(
                f"{name} pairs captions with images: leave target, label noise, imbalance and other kinds out"
            )
        task = token_tower_task(name, stamp, limit)
    elif name == IMAGE_TEXT or (is_file(name) and holds_captions(name)):
        if corruption is not None or target is not None or kind is not None:
            raise InputError(
                f"{name} pairs images with captions: leave target, kind, label noise and imbalance out"
            )
        task = _image_text(name, stamp, limit)
    elif searches(name) or (is_file(name) and holds_collection(name)):
        if corruption is not None or target is not None or kind is not None:
            raise InputError(
                f"{name} holds queries and documents: leave target, kind, label noise and imbalance out"
            )
        task = task_from_splits(name, collection_loader(name, stamp, text_features, limit))
    elif holds_text(name):
        if corruption is not None or target is not None or kind is not None:
            raise InputError(f"{name} is a running text: leave target, kind, label noise and imbalance out")
        task = language_task(name if name in DATASETS else str(Path(name).expanduser()), stamp, limit)
    elif holds_clips(name):
        if corruption is not None or kind not in (None, "classification", "self-supervised"):
            raise InputError(
                f"{name} holds clips of motion: leave label noise, imbalance and other kinds out"
            )
        path = name if name in task_names() else str(Path(name).expanduser())
        task = motion_task(path, stamp, target, limit, self_supervised=self_supervised)
    elif name == HALVES:
        if target is not None or kind is not None:
            raise InputError(f"{HALVES} pairs halves of images and has no target: leave target and kind out")
        task = task_from_splits(name, partial(_digits_halves, limit))
    else:
        source: str | Path = name.removesuffix(SELF_SUPERVISED) if self_supervised else name
        if is_file(name):
            source = Path(name).expanduser()
        read = partial(
            _load, source, stamp, target, None if self_supervised else kind, text_features, limit, corruption
        )
        task = task_from_splits(name, read, self_supervised=self_supervised)
    if is_file(name):
        task = replace(task, title=f"{task.kind} on {Path(name).name}")
    if corruption is not None and corruption.description:
        task = replace(task, title=f"{task.title}, {corruption.description}")
    return (
        replace(task, model=partial(_build_model, model, _import_model(model))) if model is not None else task
    )


def _corruption(
    label_noise: float | None, noise_kind: Any, imbalance: float | None, imbalance_kind: Any
) -> Corruption | None:
    for kind, kind_name, value, name in (
        (noise_kind, "noise_kind", label_noise, "label_noise"),
        (imbalance_kind, "imbalance_kind", imbalance, "imbalance"),
    ):
        if kind is not None and value is None:
            raise InputError(f"{kind_name} goes with {name}, which is not given")
    if label_noise is None and imbalance is None:
        return None
    return Corruption(
        label_noise if label_noise is not None else 0.0,
        noise_kind or "symmetric",
        imbalance if imbalance is not None else 1.0,
        imbalance_kind or "long-tailed",
    )


def content_hash(path: Path) -> str:
    """Identify the content of a file or folder, of which images count by their names and sizes alone.

    Raises:
        InputError: if it cannot be read.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
        >>> _ = path.write_text("a,target")
        >>> content_hash(path)
        'ec3cf8bf3032c1d8'
    """
    digest = hashlib.sha256()
    try:
        if path.is_dir():
            for file in sorted(found for found in path.rglob("*") if found.is_file()):
                digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
                if file.suffix.lower() not in IMAGE_SUFFIXES:
                    _add_bytes(digest, file)
        else:
            _add_bytes(digest, path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()[:16]


def _add_bytes(digest: Any, path: Path) -> None:
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)


def _image_text(name: str, stamp: str, limit: int | None) -> Task:
    """Two small encoders that find images and captions from one another, trained by CLIP's loss."""
    from coloss.contrastive.image_text import evaluate_image_text, image_text_task

    source: str | Path = "openmoji" if name == IMAGE_TEXT else Path(name).expanduser()
    return replace(
        image_text_task(
            Budget(steps=300), title=f"images and captions of {Path(name).name} found from one another"
        ),
        name=name,
        load=partial(_load_image_text, source, stamp, limit),
        validate=partial(evaluate_image_text, split="validation"),
        evaluate_every=None,
    )


@lru_cache(maxsize=3)
def _load_image_text(source: str | Path, stamp: str, limit: int | None, seed: int) -> ImageTextSplits:
    return load_image_text(source, seed=seed, size=32, limit=limit)


# A loaded set is used by every arm of a seed in turn; more than a few seeds at a time would only fill memory.
@lru_cache(maxsize=3)
def _load(
    source: str | Path,
    stamp: str,
    target: str | None,
    kind: Any,
    text_features: str,
    limit: int | None,
    corruption: Corruption | None,
    seed: int,
) -> Splits | RetrievalSplits:
    """`stamp` makes a file that changed another entry of the cache."""
    splits = load(source, target=target, kind=kind, seed=seed, text_features=text_features, limit=limit)
    return splits if corruption is None else corruption.apply(cast(Splits, splits), seed)


@lru_cache(maxsize=3)
def _digits_halves(limit: int | None, seed: int) -> Splits:
    # Retrieval needs no classes: pair i of the top halves belongs to pair i of the bottom halves.
    return replace(halves(cast(Splits, load("digits", seed=seed, limit=limit))), kind="retrieval")


def task_from_splits(
    name: str,
    load_splits: Callable[[int], Splits | RetrievalSplits],
    *,
    self_supervised: bool = False,
) -> Task:
    """A task around your own data: `load_splits(seed)` gives `Splits` or `RetrievalSplits`.

    The kind of the splits decides model, loss and metrics: a small network for the input's shape, cross-entropy, squared error, binary
    cross-entropy or InfoNCE, and the usual metrics. `dataclasses.replace` changes any of it.

    Args:
        name: what tables call it.
        load_splits: seed -> splits.
        self_supervised: train an encoder without labels, judged by probes.

    Raises:
        InputError: if the splits are of no kind that the lab has a recipe for.

    Examples:
        >>> from coloss.data import load
        >>> task = task_from_splits("small digits", lambda seed: load("digits", seed=seed, limit=100))
        >>> task.kind, task.metric, task.budget
        ('classification', 'accuracy', Budget(epochs=None, steps=300, seconds=None))
    """
    splits = load_splits(0)
    if self_supervised:
        if splits.kind != "classification":
            raise InputError(
                f"splits must hold class labels, to judge an encoder by, got a {splits.kind} set"
            )
        return _self_supervised(name, load_splits, splits.train)
    if splits.kind == "retrieval":
        return retrieval_task(name, load_splits, _default_budget(splits.train))
    if splits.kind not in _SUPERVISED:
        known = ", ".join([*_SUPERVISED, "retrieval"])
        raise InputError(f"splits must be of kind {known}, got {splits.kind!r}")
    objective, objective_name, evaluate, metric, direction = _SUPERVISED[splits.kind]
    return Task(
        name=name,
        kind=splits.kind,
        title=f"{splits.kind} on {name}",
        load=load_splits,
        model=default_model,
        objective=objective,
        objective_name=objective_name,
        validate=lambda model, splits: evaluate(model, splits.validation),
        test=lambda model, splits: evaluate(model, splits.test),
        metric=metric,
        direction=direction,
        budget=_default_budget(splits.train),
        teacher=default_teacher,
    )


def default_backbone(splits: Any, width: float = 1.0) -> nn.Module:
    """A small network for the input's shape: convolutions for images and series, a perceptron for tables and text."""
    shape = tuple(splits.input_shape)
    channels = tuple(int(width * count) for count in (16, 32, 32))
    if len(shape) == 3:
        return ConvNet(shape[0], channels)
    if len(shape) == 2:
        return ConvNet(shape[0], channels, dims=1)
    return MLP(shape[0], (int(width * 64), int(width * 64)))


def default_model(splits: Any, width: float = 1.0) -> nn.Module:
    """The default backbone with a linear head for the task's outputs."""
    outputs = splits.num_classes if splits.kind in ("classification", "multilabel") else 1
    return Classifier(default_backbone(splits, width), outputs)


def default_teacher(splits: Any) -> nn.Module:
    """The default model, wider: twice for convolutions, whose cost grows with the square, four times for a perceptron."""
    return default_model(splits, width=4.0 if len(splits.input_shape) == 1 else 2.0)


def mean_squared_error_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of a single output against numeric targets."""
    return nn.functional.mse_loss(outputs.flatten(), targets.flatten().to(outputs.dtype))


def binary_cross_entropy_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits against indicator targets, averaged over samples and labels."""
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))


_SUPERVISED: Mapping[str, tuple[Any, str, Any, str, Direction]] = {
    "classification": (
        nn.functional.cross_entropy,
        "cross-entropy",
        evaluate_classifier,
        "accuracy",
        "higher",
    ),
    "regression": (mean_squared_error_loss, "mean-squared-error", evaluate_regressor, "mse", "lower"),
    "multilabel": (
        binary_cross_entropy_loss,
        "binary-cross-entropy",
        evaluate_multilabel,
        "average_precision",
        "higher",
    ),
}


def _default_budget(train: IndexedDataset, batch_size: int = 64) -> Budget:
    """Twenty epochs, but no fewer than 300 steps and no more than 2,000."""
    per_epoch = max(len(train) // batch_size, 1)
    return Budget(steps=min(max(20 * per_epoch, 300), 2000))


def _self_supervised(name: str, load_splits: Callable[[int], Any], train: IndexedDataset) -> Task:
    return Task(
        name=name,
        kind="self-supervised",
        title=f"an encoder for {name.removesuffix(SELF_SUPERVISED)} without labels, judged by probes with 100 labels",
        load=load_splits,
        model=default_backbone,
        objective=None,
        objective_name="untrained",
        validate=lambda model, splits: evaluate_encoder(model, splits, split="validation"),
        test=lambda model, splits: evaluate_encoder(model, splits, split="test"),
        metric="knn",
        budget=_default_budget(train),
        batch_size=128,
    )


def _import_model(path: str) -> Callable[[Any], nn.Module]:
    # The colon is asked for in messages; a dotted path is unambiguous too.
    module, _, name = path.rpartition(".")
    try:
        return import_callable(path if ":" in path or not module else f"{module}:{name}")
    except InputError as error:
        raise InputError(f"model: {error}") from error
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise InputError(f"model: importing {path!r} failed: {type(error).__name__}: {error}") from error


def _build_model(path: str, build: Callable[[Any], nn.Module], splits: Any) -> nn.Module:
    try:
        model = build(splits)
    except TypeError as error:
        raise InputError(f"model {path!r} must be callable with the splits of the data: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {path!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model
