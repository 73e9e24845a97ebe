"""What a training step receives: inputs, targets, sample ids, and whatever else a method adds.

Names in use in `Batch.extras`; a name means the same thing to everyone:

| name | holds | written by | read by |
|---|---|---|---|
| `views` | number of views of each sample that the rows now are, view by view | `coloss.train.ViewMethod` | `coloss.train.ViewMethod`, pretext methods |
| `embeddings` | float (rows, dimensions): what a method's loss acts on, cut from the graph | `coloss.train.ViewMethod` | monitors: `coloss.jepa.EffectiveRankMonitor`, `coloss.contrastive.EmbeddingMonitor` |
| `embedding_views` | number of views whose embeddings those are, view by view | `coloss.train.ViewMethod` | `coloss.contrastive.EmbeddingMonitor` |
| `query` | integer (queries): which query each row is, equal for equal ones | retrieval data sets of `coloss.data` | `coloss.retrieval.joined_scores` |
| `document` | integer (documents): which document each row is, equal for equal ones | retrieval data sets of `coloss.data` | `coloss.retrieval.joined_scores` |
| `relevance` | (queries, documents): > 0 where a document answers a query; stands in for `query` and `document` | the user's loader | `coloss.retrieval.joined_scores` |
| `ignore` | (queries, documents): > 0 for pairs to leave out | the user's loader | `coloss.retrieval.joined_scores` |
| `identity` | integer (samples): who or what each pair shows | the user's loader | `coloss.retrieval.CrossModalGranularity` |
| `graded` | bool (samples): whether targets are grades of similarity; one task in a batch | the user's loader | `coloss.retrieval.UnifiedEmbedding` |
| `content` | integer (samples): equal for copies of one text or row, which must not be shown beside each other | the user's loader (`coloss.retrieval.content_keys`) | `coloss.retrieval.DemonstrationTraining` |
| `own_document` | integer (samples): the number of the document that is the sample itself, to be left out of searches | the user's loader | `coloss.retrieval.JointRetrieval` |
| `user` | integer (samples): whose history each row is | `coloss.data.load_interactions` | `coloss.retrieval.GateContrast` |
| `ranked_items` | integer (samples, k): items that a recommender answered, best first | `coloss.retrieval.ExtractionAudit` | `coloss.retrieval.ListDistillation` |
| `actions`, `next_view` | float (samples, views, numbers): what leads from each view of a sequence to the next one; the view to be predicted | `coloss.jepa.SeqJEPA`, or the user's loader (`actions`) | `coloss.jepa.SeqJEPA` |
| `augmentation_seed`, `augmentation_version` | what a seeded augmentation drew from, and which version of each sample: its epoch | `coloss.train.SeededAugmentation` | `coloss.train.TeacherTable` |
| `bag`, `bag_size` | integer (samples): the bag of each sample, and its size | `coloss.classification.bag_dataset` | `coloss.classification.AggregateSupervision` |
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Samples of one step, with room for what methods add on the way.

    Args:
        inputs: what the model takes: a tensor, or a tuple or dict of tensors, samples in the first dimension.
        targets: what the objective compares with, likewise; None if there are none.
        ids: int64 (batch), the stable number of each sample in its data set; None if unknown.
        extras: anything else by name: views, masks, mixing weights, second labels.

    Examples:
        >>> batch = Batch(torch.zeros(4, 3), torch.arange(4))
        >>> len(batch), batch.ids, batch.extras
        (4, None, {})
    """

    inputs: Any
    targets: Any = None
    ids: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> "Batch":
        """Batch from whatever a loader yields.

        Args:
            value: a `Batch` (returned as it is), a tensor of inputs, a tuple or list `(inputs[, targets[, ids]])`, or a dict with
                the keys `inputs`, `targets`, `ids` (its other keys become extras).

        Raises:
            ValueError: if it is none of these.

        Examples:
            >>> Batch.of((torch.zeros(2, 3), torch.tensor([0, 1]))).targets
            tensor([0, 1])
            >>> sorted(Batch.of({"inputs": torch.zeros(2, 3), "mask": torch.ones(2)}).extras)
            ['mask']
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Tensor):
            return cls(value)
        if isinstance(value, tuple | list):
            if not 1 <= len(value) <= 3:
                raise ValueError(f"a batch must be (inputs[, targets[, ids]]), got {len(value)} parts")
            return cls(*value)
        if isinstance(value, Mapping):
            if "inputs" not in value:
                raise ValueError(f"a batch dict must have the key 'inputs', got {sorted(map(str, value))}")
            extras = {
                str(key): part for key, part in value.items() if key not in ("inputs", "targets", "ids")
            }
            return cls(value["inputs"], value.get("targets"), value.get("ids"), extras)
        raise ValueError(f"a batch must be a Batch, tensor, tuple, list or dict, got {type(value).__name__}")

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Batch":
        """Same batch with every tensor in it, however deeply nested, on a device.

        Args:
            device: where to.
            non_blocking: do not wait for the copy (from pinned memory to a GPU).

        Returns:
            a new `Batch`; tensors that are there already are shared, what is no tensor is kept.

        Examples:
            >>> Batch((torch.zeros(2), torch.ones(2))).to("cpu").inputs[1]
            tensor([1., 1.])
        """
        return Batch(
            *(
                _moved(part, device, non_blocking)
                for part in (self.inputs, self.targets, self.ids, self.extras)
            )
        )

    def __len__(self) -> int:
        """Number of samples: the first dimension of the first tensor of the inputs."""
        first = _first_tensor(self.inputs)
        if first is None or first.ndim == 0:
            raise TypeError("a batch has a length only if its inputs hold a tensor with a batch dimension")
        return first.shape[0]


def _moved(value: Any, device: torch.device | str | int, non_blocking: bool) -> Any:
    if hasattr(value, "to"):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, dict):
        return {key: _moved(part, device, non_blocking) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(part, device, non_blocking) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device, non_blocking) for part in value)
    return value


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
