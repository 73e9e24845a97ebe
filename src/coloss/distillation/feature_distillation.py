"""Lets a student learn from what a teacher computes inside, at any pair of modules, without touching the code of either.

Each pair names a module of the student and one of the teacher; their outputs are read by forward hooks and compared by a loss:

    hint         every number, after a regressor (Romero et al. 2015)                                   adapter
    information  every number, channels that the student cannot predict count less (Ahn et al. 2019)    adapter
    attention    where maps are large (Zagoruyko and Komodakis 2017)
    similarity   cosines between the samples of a batch (Tung and Mori 2019)                            whole batch
    rkd          distances and angles among the samples of a batch (Park et al. 2019)                   whole batch

An adapter (`coloss.nn.ShapeAdapter`) brings the student's features to the teacher's shape; it learns with the student and belongs to the
method, so the student ships as it was built. A loss marked "whole batch" relates samples: over several processes their features are
gathered, and the step is that of one process with the joined batch.

When it may help: student and teacher solve the same task in like ways, the student has room left to learn, and a weight is searched on
validation data. When not: small data that the student learns well without a teacher. Measured on digits (600 training images, a
convolutional student of widths 4, 6, 8, a teacher of widths 16, 32, 64 trained on the same images, 97.9%; 15 epochs of AdamW, batches of 32;
five learning rates for cross-entropy, two rates and three weights for each loss, on validation data of two other seeds), test accuracy of 5
seeds, mean and standard deviation:

    cross-entropy 95.6 (0.4)    logits, kl 96.2 (1.0)    hint        95.6 (0.4)    information 95.4 (0.7)
    attention     96.3 (0.6)    rkd        95.7 (0.6)    similarity  95.8 (0.3)

No difference is larger than the noise (attention +0.6, 95% interval 0.0 to +1.3; kl +0.6, -0.9 to +2.0). Weights matter more than the choice
of the loss: a weight of 100 cost 2 points with hint, 3 with rkd and 27 with attention on validation data, against the best. The best learning
rate of cross-entropy was the largest tried (0.16).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coloss.distillation.teacher import freeze_teacher, refuse_shared_parameters, teacher_for_setting
from coloss.errors import InputError
from coloss.metrics.inference import evaluation_mode
from coloss.nn import ShapeAdapter, SharedTeacher, channels_first, find_classifier
from coloss.nn.shape_adapters import Layout
from coloss.ops import (
    attention_transfer_loss,
    gather_with_gradient,
    hint_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
    variational_information_loss,
)
from coloss.train.method import Method
from coloss.train.schedules import Schedule, value_at
from coloss.train.state import State
from coloss.train.task import Setting
from coloss.train.teacher_table import TeacherTable

FeatureLoss = Literal["hint", "information", "attention", "similarity", "rkd"]
# A variance of 5 at first, as its authors chose.
_RAW_VARIANCE = math.log(math.expm1(5.0))


def _rkd(student: Tensor, teacher: Tensor) -> Tensor:
    return rkd_distance_loss(student, teacher) + 2 * rkd_angle_loss(student, teacher)


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "hint": hint_loss,
    "information": variational_information_loss,
    "attention": attention_transfer_loss,
    "similarity": similarity_preserving_loss,
    "rkd": _rkd,
}
_ADAPTED, _RELATIONS = ("hint", "information"), ("similarity", "rkd")


class FeatureDistillation(Method):
    """Pull features of a student towards those of a teacher while it trains on its own objective.

    Adds one term, the sum of the loss over the pairs, named after the loss: `hint_distillation`, `rkd_distillation` ...

    Args:
        teacher: network that is run on the same inputs, frozen in place; or a table that `coloss.train.cache_teacher(..., taps=...)` made of
            it. A `coloss.nn.SharedTeacher` that other methods were given too runs once for all.
        pairs: module path in the student -> module path in the teacher, each with ":input" for what goes in, "" for the output of the whole
            network. None: what goes into the classifier (the last linear layer) of each.
        loss: a name of the table above; or a function of `(student_features, teacher_features)`, which relates the samples of a batch if it
            has an attribute `batch_statistic` that is true.
        weight: of the term: number or schedule of progress. While a schedule is 0 the teacher does not run.
        adapt: put a `ShapeAdapter` before the loss; None: where the loss needs one, and for a function where shapes differ.
        example: inputs of a few samples, from which the adapters' shapes are learned in `setup`; needed where there may be adapters.
        student_layout, teacher_layout: of features with three dimensions: "tokens" (batch, positions, channels) as by default, or
            "maps" (batch, channels, steps).
        name: of the term, where two such methods of one run would clash.

    Attributes:
        adapters: one for each pair that has one, in the order of the pairs, from `setup` on.

    Raises:
        InputError: for an unknown loss or no pair; in `setup`, for a path that a model does not have (close ones are named), a missing
            example, shapes that cannot be adapted, or a teacher that shares parameters with the student; in a run, where features are no
            single tensor or do not suit the loss; on resuming with another table.

    Cost: one forward pass of the teacher per step, and that of the loss (`coloss.ops.feature_losses`).

    Source: see the table.

    Examples:
        >>> import coloss
        >>> from coloss.nn import Classifier, ConvNet
        >>> student, teacher = Classifier(ConvNet(1, (4, 8)), 3), Classifier(ConvNet(1, (16, 32)), 3)
        >>> images, classes = torch.rand(32, 1, 8, 8), torch.randint(3, (32,))
        >>> method = FeatureDistillation(
        ...     teacher, {"backbone.stages.1": "backbone.stages.1"}, weight=0.5, example=images[:2]
        ... )
        >>> run = coloss.fit(
        ...     student,
        ...     (images, classes),
        ...     nn.functional.cross_entropy,
        ...     [method],
        ...     budget=coloss.Budget(epochs=1),
        ... )
        >>> sorted(run.history[-1].terms), method.adapters[0].regressor
        (['cross_entropy', 'hint_distillation'], Linear(in_features=8, out_features=32, bias=True))
    """

    def __init__(
        self,
        teacher: nn.Module | TeacherTable,
        pairs: Mapping[str, str] | None = None,
        *,
        loss: FeatureLoss | Callable[[Tensor, Tensor], Tensor] = "hint",
        weight: Schedule = 1.0,
        adapt: bool | None = None,
        example: Any = None,
        student_layout: Layout | None = None,
        teacher_layout: Layout | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(loss, str) and loss not in _LOSSES:
            raise InputError(f"loss must be a function or one of {', '.join(_LOSSES)}, got {loss!r}")
        if pairs is not None and not pairs:
            raise InputError("pairs must name at least one place of the student, got none")
        if adapt is False and loss == "information":
            raise InputError(
                "adapt must be True or None for loss='information', which learns with an adapter"
            )
        self.loss: Callable[..., Tensor] = _LOSSES[loss] if isinstance(loss, str) else loss
        self.kind = loss if isinstance(loss, str) else None
        self.adapt, self.example, self.weight = adapt, example, weight
        self.layouts = (student_layout, teacher_layout)
        self.pairs = None if pairs is None else dict(pairs)
        self.table = teacher if isinstance(teacher, TeacherTable) else None
        self.teacher: SharedTeacher | None = None
        if not isinstance(teacher, TeacherTable):
            self.teacher = freeze_teacher(teacher, SharedTeacher)
        self.batch_statistic = self.kind in _RELATIONS or bool(getattr(loss, "batch_statistic", False))
        self.term = name or f"{self.kind or 'feature'}_distillation"
        self.term_weights = {self.term: weight}
        self.adapters = nn.ModuleList()
        self.raw_variances = nn.ParameterList()

    def setup(self, state: State) -> None:
        pairs = self._watch(state)
        self.adapters, self.raw_variances = nn.ModuleList(), nn.ParameterList()
        if self.adapt is False or (self.adapt is None and self.kind not in (*_ADAPTED, None)):
            return
        if self.example is None:
            if self.kind is None and self.adapt is None:
                return
            raise InputError(
                f"loss={self.kind or 'function'!r} needs an adapter to the teacher's shape: give example=, inputs of a few samples"
            )
        students, teachers = self._example_features(state, pairs)
        for (mine, theirs), student, teacher in zip(pairs.items(), students, teachers, strict=True):
            if self.kind is None and self.adapt is None and student == teacher:
                self.adapters.append(nn.Identity())
                continue
            try:
                adapter = ShapeAdapter(
                    student, teacher, student_layout=self.layouts[0], teacher_layout=self.layouts[1]
                )
            except ValueError as error:
                raise InputError(f"{mine!r} cannot be brought to the shape of {theirs!r}: {error}") from error
            self.adapters.append(state.like_model(adapter))
            if self.kind == "information":
                raw = torch.full_like(adapter.regressor.bias, _RAW_VARIANCE)
                self.raw_variances.append(nn.Parameter(raw))

    def terms(self, state: State) -> dict[str, Tensor]:
        if value_at(self.weight, state.progress) == 0:
            # Zero, but with a graph to every parameter of the adapters, which data-parallel training waits for.
            empty = [parameter.flatten()[:0] for parameter in self.parameters() if parameter.requires_grad]
            return {self.term: torch.cat(empty).sum() if empty else torch.zeros(())}
        assert self.pairs is not None
        costs = []
        for number, (mine, theirs) in enumerate(self.pairs.items()):
            student = _single(state.features[self._name(mine)], mine, "student")
            teacher = _single(self._teacher_features(state, theirs), theirs, "teacher").to(student.device)
            try:
                costs.append(self._cost(number, student, teacher))
            except ValueError as error:
                raise InputError(f"{mine!r} of the student and {theirs!r} of the teacher: {error}") from error
        return {self.term: torch.stack(costs).sum()}

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.table is None else self.table.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.table is not None:
            self.table.require_state(state)

    def finish(self, state: State) -> None:
        """Take the hooks out of the teacher; the student's are taken out by the run."""
        if self.teacher is not None:
            self.teacher.unwatch()

    @classmethod
    def for_setting(
        cls,
        setting: Setting,
        *,
        teacher: str | None = None,
        pairs: dict[str, str] | None = None,
        **parameters: Any,
    ) -> "FeatureDistillation":
        """Build it for a task of the lab; `teacher` is the path of stored weights, else one is trained."""
        example = setting.splits.train.take(torch.arange(min(2, len(setting.splits.train)))).inputs
        return cls(teacher_for_setting(setting, teacher), pairs, **{"example": example, **parameters})

    def _watch(self, state: State) -> dict[str, str]:
        """Tap both networks."""
        network = None if self.teacher is None else self.teacher.module
        if self.teacher is not None:
            refuse_shared_parameters(self.teacher, state.model)
        if self.pairs is None:
            if self.table is not None:
                raise InputError("pairs must be given where the teacher is a table, got None")
            try:
                mine, theirs = (
                    f"{find_classifier(model)}:input" for model in (state.model, network) if model
                )
            except ValueError as error:
                raise InputError(
                    f"pairs must be given for networks without a linear layer: {error}"
                ) from error
            self.pairs = {mine: theirs}
        for mine, theirs in self.pairs.items():
            try:
                state.tap(self._name(mine), mine)
            except ValueError as error:
                raise InputError(f"pairs: the student has no {mine!r}: {error}") from error
            try:
                if self.teacher is not None:
                    self.teacher.watch([theirs])
                elif self.table is not None:
                    self.table.shape(theirs)
            except ValueError as error:
                raise InputError(f"pairs: the teacher has no {theirs!r}: {error}") from error
        return self.pairs

    def _example_features(self, state: State, pairs: Mapping[str, str]) -> tuple[list[Any], list[Any]]:
        """Shapes of the features at each pair; both networks are left as they were."""
        with evaluation_mode(state.model), state.features.set_aside():
            state.model(_like(self.example, state.model))
            students = [
                tuple(_single(state.features[self._name(mine)], mine, "student").shape) for mine in pairs
            ]
        if self.table is not None:
            rows = students[0][:1]
            return students, [(*rows, *self.table.shape(theirs)) for theirs in pairs.values()]
        assert self.teacher is not None
        features = self.teacher.features(_like(self.example, self.teacher.module))
        teachers = [tuple(_single(features[theirs], theirs, "teacher").shape) for theirs in pairs.values()]
        self.teacher.forget()
        return students, teachers

    def _teacher_features(self, state: State, place: str) -> Any:
        if self.table is not None:
            return self.table.rows(state.batch, place)
        assert self.teacher is not None
        return self.teacher.features(state.batch.inputs)[place]

    def _cost(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) != len(teacher):
            raise ValueError(
                f"features must have one row for each sample, got {len(student)} and {len(teacher)}"
            )
        if self.batch_statistic:
            student, teacher = gather_with_gradient(student), gather_with_gradient(teacher)
        if len(self.adapters):
            student = self._adapted(self.adapters[number], student, teacher)
        if self.kind == "attention":
            # An adapter gives features of the teacher's layout.
            side = 1 if len(self.adapters) else 0
            student, teacher = self._maps(student, side), self._maps(teacher, 1)
        if self.kind == "information":
            student, teacher = self._maps(student, 1), self._maps(teacher, 1)
            return self.loss(student, teacher, self.raw_variances[number])
        return self.loss(student, teacher)

    def _adapted(self, adapter: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        if not isinstance(adapter, ShapeAdapter):
            return student
        # Inputs of another size than the example's have other positions.
        return adapter(student, self._maps(teacher, 1).shape[2:])

    def _maps(self, features: Tensor, side: int) -> Tensor:
        return channels_first(features, self.layouts[side])

    @staticmethod
    def _name(path: str) -> str:
        return f"distilled {path}"


def _single(value: Any, path: str, side: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{path!r} of the {side} must give one float tensor (batch, ...), got {found}: name another module"
        )
    return value


def _like(inputs: Any, model: nn.Module) -> Any:
    """Inputs on the device of a model."""
    from coloss.data.batch import Batch

    parameter = next(model.parameters(), None)
    return inputs if parameter is None else Batch(inputs).to(parameter.device).inputs
