"""The teacher's side of distillation: a frozen network, or its logits stored once for the whole data set."""

from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from coloss.data.batch import Batch
from coloss.data.dataset import IndexedDataset
from coloss.errors import InputError
from coloss.nn import Frozen, SharedTeacher
from coloss.train.checkpoint import load_model
from coloss.train.task import Setting
from coloss.train.teacher_cache import cache_teacher
from coloss.train.teacher_table import OUTPUT, TeacherTable

FrozenType = TypeVar("FrozenType", bound=Frozen)


class TeacherLogits(nn.Module):
    """Logits to learn from, for any batch: computed by a network that stays as it is, or looked up in a table.

    The table stays on the device where it is; only the rows of a batch move. The state dict holds its provenance alone, so that a run cannot be
    resumed with a table of something else.

    Args:
        teacher: network that gives logits for `batch.inputs`. It is frozen in place: evaluation mode, no gradients. A
            `coloss.nn.SharedTeacher` runs once for all methods that were given it.
        table: in place of the network: what `coloss.train.cache_teacher` made, or a float (samples, classes) tensor whose row i belongs to
            the sample with id i. The former is refused for a batch that was augmented otherwise than the teacher saw it.
        center: take off each sample's mean logit, for a teacher whose logits share a large common offset.
        path: module path whose output is the logits, for a teacher that returns something else; of a table, the name they are stored under.

    Returns:
        From `forward(batch)`: logits (batch, classes), without a graph.

    Raises:
        InputError: if not exactly one of `teacher` and `table` is given, the table is no float matrix, or the network has no such
            path; from `forward`, if the network gives no tensor, or the batch has no ids, or ids without a row; on loading the state of
            one with another table.

    Examples:
        >>> import torch
        >>> table = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> batch = Batch(inputs=torch.zeros(3, 8), ids=torch.tensor([1, 0, 0]))
        >>> TeacherLogits(table=table, center=True)(batch)
        tensor([[ 0.,  0.],
                [-1.,  1.],
                [-1.,  1.]])
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        table: Tensor | TeacherTable | None = None,
        *,
        center: bool = False,
        path: str = OUTPUT,
    ) -> None:
        super().__init__()
        if (teacher is None) == (table is None):
            given = "neither" if teacher is None else "both"
            raise InputError(f"exactly one of teacher and teacher_logits must be given, got {given}")
        if isinstance(table, Tensor):
            if table.ndim != 2 or not table.is_floating_point():
                raise InputError(
                    f"teacher_logits must be a float (samples, classes) table, got {table.dtype} {tuple(table.shape)}"
                )
            table = TeacherTable.of(table)
        self.network: Frozen | None = None
        if teacher is not None:
            self.network = freeze_teacher(teacher, SharedTeacher) if path else freeze_teacher(teacher, Frozen)
        # Not a buffer: data-parallel training would send every buffer to every process at every step.
        self.table = table
        self.center, self.path = center, path
        if isinstance(self.network, SharedTeacher) and path:
            try:
                self.network.watch([path])
            except ValueError as error:
                raise InputError(f"teacher has no {path!r}: {error}") from error

    def forward(self, batch: Batch) -> Float[Tensor, "*batch classes"]:
        if self.table is not None:
            logits = self.table.rows(batch, self.path, called="teacher_logits")
        elif self.path and isinstance(self.network, SharedTeacher):
            self.network.watch([self.path])
            logits = self.network.features(batch.inputs)[self.path]
        else:
            assert self.network is not None
            logits = self.network(batch.inputs)
        if not isinstance(logits, Tensor):
            raise InputError(
                f"teacher must give a tensor of logits, got {type(logits).__name__}: LogitDistillation takes teacher_logits_path, a module that does"
            )
        return logits - logits.mean(-1, keepdim=True) if self.center else logits

    def unwatch(self) -> None:
        """Take the hook of `path` out of the network."""
        if self.path and isinstance(self.network, SharedTeacher):
            self.network.unwatch()

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.table is None else self.table.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.table is not None:
            self.table.require_state(state)


def freeze_teacher(teacher: nn.Module, kind: type[FrozenType]) -> FrozenType:
    """Freeze a network in place, so that `refuse_shared_parameters` can undo it; what is of that kind already is given back.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> freeze_teacher(layer, Frozen).module is layer, layer.training
        (True, False)
    """
    if isinstance(teacher, kind):
        return teacher
    before = [(part, part.requires_grad) for part in teacher.parameters()]
    modes = [(part, part.training) for part in teacher.modules()]
    frozen = kind(teacher)
    # In plain lists, so that nothing of it is registered as a part.
    frozen.__dict__["_before"] = before, modes
    return frozen


def refuse_shared_parameters(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher that is, or is a part of, the student, and undo `freeze_teacher`: frozen, it would freeze the student too.

    Raises:
        InputError: saying what to pass instead.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> refuse_shared_parameters(TeacherLogits(layer), nn.Linear(2, 2))
        >>> refuse_shared_parameters(TeacherLogits(layer), nn.Sequential(layer))
        Traceback (most recent call last):
        coloss.errors.InputError: teacher must not share parameters with the student: pass a copy.deepcopy of it
    """
    own = set(student.parameters())
    if not any(parameter in own for parameter in teacher.parameters()):
        return
    for part in teacher.modules():
        parameters, modes = part.__dict__.get("_before", ((), ()))
        for parameter, required in parameters:
            parameter.requires_grad_(required)
        for module, training in modes:
            module.training = training
    raise InputError("teacher must not share parameters with the student: pass a copy.deepcopy of it")


def tabulate_teacher_logits(
    teacher: nn.Module, dataset: IndexedDataset, batch_size: int = 512
) -> Float[Tensor, "ids classes"]:
    """Run the teacher over a data set once, and get its logits as one tensor.

    `coloss.train.cache_teacher` gives a table that also knows what it was made of, refuses other inputs, and lives in a file.

    Args:
        teacher: gives logits (batch, classes); runs in evaluation mode and is left as it was.
        dataset: its ids, >= 0, are the rows of the result.
        batch_size: samples in one forward pass.

    Returns:
        One row for each id from 0 to the largest, on the CPU; NaN where the data set has no such id, so that a missing sample
        cannot pass unnoticed.

    Raises:
        InputError: if the teacher gives no tensor with one row for each sample, or a NaN.

    Examples:
        >>> import torch
        >>> dataset = IndexedDataset(torch.tensor([[1.0], [2.0]]), ids=[2, 0])
        >>> tabulate_teacher_logits(nn.Identity(), dataset).flatten().tolist()
        [2.0, nan, 1.0]
    """
    return cache_teacher(teacher, dataset, batch_size=batch_size).dense()


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
