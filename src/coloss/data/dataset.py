"""Data sets in memory whose samples keep one number for life, and their division into train, validation and test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from coloss.data.batch import Batch
from coloss.data.judgements import Judgements

Tensors = Tensor | tuple[Tensor, ...]


class IndexedDataset(Dataset):
    """Samples held as whole tensors, each with an id that survives subsets and shuffling.

    Ids let a method keep a table with one row for each sample (past predictions, momentum features, sample weights): the row of a
    sample is the same in every epoch and every subset. Works as a map-style torch `Dataset`, where `dataset[i]` is
    `(input, target, id)`; `take` gets many samples at once and is far quicker.

    Args:
        inputs: tensor (samples, ...) or a tuple of such; arrays are taken as tensors without a copy.
        targets: likewise, or None.
        ids: int64 (samples), distinct; 0, 1, 2 ... by default.
        extras: further tensors by name, samples in the first dimension; they arrive as `Batch.extras`.

    Raises:
        ValueError: if the first dimensions differ, or ids repeat.

    Examples:
        >>> dataset = IndexedDataset(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]))
        >>> dataset[1]
        (tensor([2., 3.]), tensor(1), tensor(1))
        >>> dataset.subset(torch.tensor([2, 0])).ids
        tensor([2, 0])
    """

    inputs: Tensors
    targets: Tensors | None
    ids: Int[Tensor, " samples"]
    extras: dict[str, Tensor]

    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        ids: Any = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self.inputs = _as_tensors(inputs, "inputs")
        self.targets = None if targets is None else _as_tensors(targets, "targets")
        self._length = _first(self.inputs).shape[0]
        if ids is None:
            self.ids = torch.arange(self._length, device=_first(self.inputs).device)
        else:
            self.ids = torch.as_tensor(ids)
            if self.ids.ndim != 1 or self.ids.dtype.is_floating_point or self.ids.dtype.is_complex:
                raise ValueError(f"ids must be whole numbers in one dimension, got {_described(self.ids)}")
            self.ids = self.ids.to(torch.int64)
            if torch.unique(self.ids).numel() != self.ids.numel():
                raise ValueError(
                    f"ids must be distinct, got {self.ids.numel() - torch.unique(self.ids).numel()} repeats"
                )
        self.extras = {name: torch.as_tensor(value) for name, value in (extras or {}).items()}
        for name, part in [
            ("targets", self.targets),
            ("ids", self.ids),
            ("inputs", self.inputs),
            *self.extras.items(),
        ]:
            for tensor in part if isinstance(part, tuple) else () if part is None else (part,):
                if tensor.ndim == 0 or tensor.shape[0] != self._length:
                    raise ValueError(
                        f"{name} must have {self._length} samples as the inputs have, got {_described(tensor)}"
                    )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        """Sample at a position: its input, its target (None if the set has no targets) and its id."""
        if not -self._length <= index < self._length:
            raise IndexError(f"index must be in [{-self._length}, {self._length}), got {index}")
        target = None if self.targets is None else _at(self.targets, index)
        return _at(self.inputs, index), target, self.ids[index]

    def take(self, indices: Int[Tensor, " batch"]) -> Batch:
        """Samples at many positions, by one indexing operation for each tensor.

        Args:
            indices: int64 (batch), positions (not ids); may repeat.

        Examples:
            >>> IndexedDataset(torch.arange(3.0), ids=[7, 8, 9]).take(torch.tensor([2, 0])).ids
            tensor([9, 7])
        """
        # Written out because this runs once for each training step; index_select is twice as quick as inputs[indices] on a CPU.
        inputs, targets, extras = self.inputs, self.targets, self.extras
        return Batch(
            inputs.index_select(0, indices)
            if isinstance(inputs, Tensor)
            else tuple(part.index_select(0, indices) for part in inputs),
            None
            if targets is None
            else targets.index_select(0, indices)
            if isinstance(targets, Tensor)
            else tuple(part.index_select(0, indices) for part in targets),
            self.ids.index_select(0, indices),
            {name: part.index_select(0, indices) for name, part in extras.items()} if extras else {},
        )

    def all(self) -> Batch:
        """Every sample in order as one batch that shares the memory of the set.

        Examples:
            >>> len(IndexedDataset(torch.zeros(3, 2)).all())
            3
        """
        return Batch(self.inputs, self.targets, self.ids, dict(self.extras))

    def subset(self, indices: Int[Tensor, " samples"]) -> "IndexedDataset":
        """Data set of the samples at some positions, which keep their ids.

        Args:
            indices: int64 positions without repeats.

        Examples:
            >>> IndexedDataset(torch.arange(4.0)).subset(torch.tensor([3, 1])).inputs
            tensor([3., 1.])
        """
        batch = self.take(indices)
        return IndexedDataset(batch.inputs, batch.targets, batch.ids, batch.extras)

    def to(self, device: torch.device | str | int) -> "IndexedDataset":
        """Same data set on a device, so that batches are cut there and nothing is copied at each step.

        Examples:
            >>> IndexedDataset(torch.zeros(2, 3)).to("cpu").inputs.device
            device(type='cpu')
        """
        batch = self.all().to(device)
        return IndexedDataset(batch.inputs, batch.targets, batch.ids, batch.extras)


@dataclass(frozen=True)
class Standardization:
    """Shift and scale that were taken off, measured on the training part alone: x = (raw - mean) / scale.

    Args:
        mean: of the inputs, broadcasts against them; None if the inputs were left as they are.
        scale: likewise; 1 where a feature is constant.
        target_mean: of a regression target; 0 if the target was left as it is.
        target_scale: likewise 1.

    Examples:
        >>> Standardization(None, None, target_mean=50.0, target_scale=10.0).restore_targets(
        ...     torch.tensor([0.0, 1.5])
        ... )
        tensor([50., 65.])
    """

    mean: Tensor | None
    scale: Tensor | None
    target_mean: float = 0.0
    target_scale: float = 1.0

    def apply(self, raw: Tensor) -> Tensor:
        """Raw inputs, brought to the scale that a model trained on these splits expects."""
        return raw if self.mean is None or self.scale is None else (raw - self.mean) / self.scale

    def restore_targets(self, targets: Tensor) -> Tensor:
        """Targets or predictions of a regression in their own unit."""
        return targets * self.target_scale + self.target_mean


@dataclass
class Splits:
    """Data ready for a model: train, validation and test, and what a model must know to fit them.

    Ids number the samples of the whole data set, so they are distinct over the three parts.

    Args:
        name: of the data set, or the path it was read from.
        kind: `classification` (targets int64 (samples)), `regression` (float32 (samples)) or `multilabel` (float32 0 / 1
            (samples, labels)).
        train: what a model learns from.
        validation: for early stopping and tuning.
        test: for the number that is reported.
        input_shape: of one sample: (channels, height, width) of an image in [0, 1], (features,) of a table or text,
            (channels, steps) of a series.
        num_classes: of a classification; number of labels if multilabel; None for a regression.
        class_names: by class number, or None.
        feature_names: of the columns of a table or text, or None.
        standardize: what was shifted and scaled, or None if nothing was.
        description: one line on what was done to the data.

    Examples:
        >>> from coloss.data import load
        >>> splits = load("iris")
        >>> splits.kind, splits.input_shape, splits.num_classes, len(splits.train)
        ('classification', (4,), 3, 90)
    """

    name: str
    kind: str
    train: IndexedDataset
    validation: IndexedDataset
    test: IndexedDataset
    input_shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    standardize: Standardization | None = None
    description: str = ""


@dataclass
class RetrievalSplits:
    """Queries, the documents they should find, and pairs to learn from.

    Queries are divided into train, validation and test; the documents are one collection that all of them search.

    Args:
        name: of the data set.
        train: one sample for each relevant (query, document) pair of the training queries: `inputs` is the tuple
            (query features, document features); the row of each in `train_queries` and `documents` is in `targets`, and in `extras`
            as "query" and "document", which tells false negatives within a batch.
        documents: features of every document.
        train_queries: features of the training queries.
        train_judgements: which documents answer them, and how well.
        validation_queries: features of the validation queries.
        validation_judgements: which documents answer them.
        test_queries: features of the test queries.
        test_judgements: which documents answer them.
        input_shape: of one query or document: (features,).
        feature_names: or None.
        description: one line on what was done to the data.
        kind: always `retrieval`.

    Examples:
        >>> pairs = IndexedDataset((torch.eye(2), torch.eye(2)), extras={"query": [0, 1], "document": [0, 1]})
        >>> same = Judgements(2, 2, torch.tensor([[0, 0], [1, 1]]), torch.ones(2))
        >>> parts = [torch.eye(2), same] * 3
        >>> splits = RetrievalSplits("toy", pairs, torch.eye(2), *parts, input_shape=(2,))
        >>> splits.kind, splits.test_relevance
        ('retrieval', tensor([[1., 0.],
                [0., 1.]]))
    """

    name: str
    train: IndexedDataset
    documents: Float[Tensor, "documents features"]
    train_queries: Float[Tensor, "train_queries features"]
    train_judgements: Judgements
    validation_queries: Float[Tensor, "validation_queries features"]
    validation_judgements: Judgements
    test_queries: Float[Tensor, "test_queries features"]
    test_judgements: Judgements
    input_shape: tuple[int, ...]
    feature_names: tuple[str, ...] | None = None
    description: str = ""
    kind: str = "retrieval"

    @property
    def train_relevance(self) -> Float[Tensor, "train_queries documents"]:
        """Grade of every document for every training query, 0 where irrelevant."""
        return self.train_judgements.dense()

    @property
    def validation_relevance(self) -> Float[Tensor, "validation_queries documents"]:
        """Grade of every document for every validation query, 0 where irrelevant."""
        return self.validation_judgements.dense()

    @property
    def test_relevance(self) -> Float[Tensor, "test_queries documents"]:
        """Grade of every document for every test query, 0 where irrelevant."""
        return self.test_judgements.dense()


def _as_tensors(value: Any, name: str) -> Tensors:
    if isinstance(value, Tensor | np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, Sequence) and value and all(isinstance(part, Tensor | np.ndarray) for part in value):
        return tuple(torch.as_tensor(part) for part in value)
    raise ValueError(f"{name} must be a tensor or a tuple of tensors, got {type(value).__name__}")


def _first(value: Tensors) -> Tensor:
    first = value if isinstance(value, Tensor) else value[0]
    if first.ndim == 0:
        raise ValueError("inputs must have a first dimension of samples, got a scalar")
    return first


def _at(value: Tensors, index: int) -> Any:
    return value[index] if isinstance(value, Tensor) else tuple(part[index] for part in value)


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
