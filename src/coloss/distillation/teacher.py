"""The teacher's side of distillation: a frozen network, or its logits stored once for the whole data set."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.data.dataset import IndexedDataset
from coloss.errors import InputError
from coloss.metrics import predict
from coloss.nn import Frozen
from coloss.train.checkpoint import load_model
from coloss.train.task import Setting


class TeacherLogits(nn.Module):
    """Logits to learn from, for any batch: computed by a network that stays as it is, or looked up in a table.

    The table stays on the device where it is; only the rows of a batch move. It is no part of the state dict.

    Args:
        teacher: network that gives logits for `batch.inputs`. It is frozen in place: evaluation mode, no gradients.
        table: float (samples, classes) in place of the network; row i belongs to the sample with id i.
        center: take off each sample's mean logit, for a teacher whose logits share a large common offset.

    Returns:
        From `forward(batch)`: logits (batch, classes), without a graph.

    Raises:
        InputError: if not exactly one of `teacher` and `table` is given, or the table is no float matrix; from `forward`, if the
            network gives no tensor, or the batch has no ids, or ids without a row.

    Examples:
        >>> table = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> batch = Batch(inputs=torch.zeros(3, 8), ids=torch.tensor([1, 0, 0]))
        >>> TeacherLogits(table=table, center=True)(batch)
        tensor([[ 0.,  0.],
                [-1.,  1.],
                [-1.,  1.]])
    """

    def __init__(
        self, teacher: nn.Module | None = None, table: Tensor | None = None, *, center: bool = False
    ) -> None:
        super().__init__()
        if (teacher is None) == (table is None):
            given = "neither" if teacher is None else "both"
            raise InputError(f"exactly one of teacher and teacher_logits must be given, got {given}")
        if table is not None and (table.ndim != 2 or not table.is_floating_point()):
            raise InputError(
                f"teacher_logits must be a float (samples, classes) table, got {table.dtype} {tuple(table.shape)}"
            )
        self.network = None if teacher is None else Frozen(teacher)
        # Not a buffer: data-parallel training would send every buffer to every process at every step.
        self.table = None if table is None else table.detach()
        self.center = center

    def forward(self, batch: Batch) -> Float[Tensor, "*batch classes"]:
        logits = self._look_up(batch.ids) if self.network is None else self.network(batch.inputs)
        if not isinstance(logits, Tensor):
            raise InputError(f"teacher must give a tensor of logits, got {type(logits).__name__}")
        return logits - logits.mean(-1, keepdim=True) if self.center else logits

    def _look_up(self, ids: Tensor | None) -> Tensor:
        assert self.table is not None
        if ids is None:
            raise InputError(
                "teacher_logits are looked up by sample id and the batch has none: "
                "train on a coloss.data.IndexedDataset, or call step(inputs, targets, ids)"
            )
        try:
            return self.table[ids.to(self.table.device)].to(ids.device)
        except IndexError as error:
            raise InputError(
                f"teacher_logits must have a row for every sample id, got {len(self.table)} rows and id {int(ids.max())}"
            ) from error


def tabulate_teacher_logits(
    teacher: nn.Module, dataset: IndexedDataset, batch_size: int = 512
) -> Float[Tensor, "ids classes"]:
    """Run the teacher over a data set once, so that it need not run at every training step.

    Worth it when inputs are not augmented and there are many epochs: the stored logits are those of the inputs as they are now.

    Args:
        teacher: gives logits (batch, classes); runs in evaluation mode and is left as it was.
        dataset: its ids are the rows of the result.
        batch_size: samples in one forward pass.

    Returns:
        One row for each id from 0 to the largest, on the CPU; NaN where the data set has no such id, so that a missing sample
        cannot pass unnoticed.

    Examples:
        >>> dataset = IndexedDataset(torch.tensor([[1.0], [2.0]]), ids=[2, 0])
        >>> tabulate_teacher_logits(nn.Identity(), dataset).flatten().tolist()
        [2.0, nan, 1.0]
    """
    logits = predict(teacher, dataset, batch_size).outputs
    table = logits.new_full((int(dataset.ids.max()) + 1, logits.shape[-1]), torch.nan)
    table[dataset.ids.cpu()] = logits
    return table


def teacher_for_setting(setting: Setting, path: str | None = None) -> nn.Module:
    """The teacher of one trial of the lab: trained on the trial's own training data, or read from a file.

    Args:
        setting: of the trial; its task says what the teacher looks like.
        path: weights of such a network, as `coloss.save_model` stored them; None trains one.

    Raises:
        InputError: if the task has no teacher, or the file does not fit it.
    """
    if path is None or setting.task.teacher is None:
        return setting.new_teacher()
    return load_model(setting.task.teacher(setting.splits), path)
