"""One trial: one arm, one seed, from a plan in plain JSON to a `TrialRecord`. The same function runs here, in a process, or on Ray.

Every trial runs on one thread and draws all randomness from its seed, so its numbers do not depend on how many run at once.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from coloss.errors import InputError, suggest_names
from coloss.lab.arms import build_arm
from coloss.lab.catalog import find_entry, import_name
from coloss.lab.isolation import reproducible
from coloss.lab.loggers import opened_logger
from coloss.lab.records import ComparisonRecord, ConflictPoint, Cost, HistoryPoint, TrialRecord
from coloss.lab.tasks import find_task
from coloss.train.budget import Budget
from coloss.train.conflict import ConflictMonitor
from coloss.train.loop import Fit, NonFiniteLossError, Target
from coloss.train.method import Method
from coloss.train.step import Objective
from coloss.train.system import Arm, Claim
from coloss.train.task import Setting, Task

Progress = Callable[[float], None]

Logs = tuple[str, str]
"""A logger's name, and the folder it writes to."""

EVALUATIONS = 20
"""Evaluations in a run, about: enough for a learning curve."""

FEWEST_STEPS = 10
"""Steps between evaluations at least."""


class Outcome(BaseModel):
    """What running a trial gave: its record (of all arms, for a claim that measures them at once), and why it diverged if it did."""

    trials: list[TrialRecord]
    failure: str | None = None


def run_trials(
    plan: str, arm_name: str | None, seed: int, logs: Logs | None = None, progress: Progress | None = None
) -> str:
    """Run one trial of a stored plan; or, for a claim that measures all arms at once, one seed of all arms.

    Args:
        plan: a `ComparisonRecord` as JSON.
        arm_name: which arm; None for all arms at once.
        seed: which seed.
        logs: a logger and its folder, for the trials of a comparison.
        progress: called with the share of the training that is done.

    Returns:
        The `Outcome` as JSON.
    """
    record = ComparisonRecord.model_validate_json(plan)
    if record.kind == "claim":
        claim = load_claim(record.options["slug"])
        if arm_name is None:
            return Outcome(trials=measure_seed(record, claim, seed)).model_dump_json()
        arm = next(arm for arm in claim.arms if arm.name == arm_name)
        trial = train_arm(record, claim_task(claim), arm, seed, claim=claim, progress=progress)
        return Outcome(trials=[trial]).model_dump_json()
    arm = build_arm(next(arm for arm in record.arms if arm.name == arm_name))
    task = _warmed_up(plan, arm.name)
    return attempt_arm(record, task, arm, seed, logs=logs, progress=progress).model_dump_json()


@lru_cache(maxsize=64)
def _warmed_up(plan: str, arm_name: str) -> Task:
    """The task of a plan, after a step of the arm in this process: imports and caches are nobody's training time."""
    record = ComparisonRecord.model_validate_json(plan)
    task = plan_task(record)
    rehearse(record, task, build_arm(next(arm for arm in record.arms if arm.name == arm_name)))
    return task


def plan_task(record: ComparisonRecord) -> Task:
    """The task that a stored plan names."""
    return find_task(record.task, **record.options.get("task", {}))


def plan_budget(record: ComparisonRecord) -> Budget:
    """The budget of a stored plan, in which every number is a float."""
    steps = record.budget.get("steps")
    seconds, epochs = record.budget.get("seconds"), record.budget.get("epochs")
    return Budget(epochs=epochs, steps=int(steps) if steps is not None else None, seconds=seconds)


def load_claim(slug: str) -> Claim:
    """The claim of a system's room.

    Raises:
        InputError: if there is no such system, or it has no claim.

    Examples:
        >>> load_claim("trp").metric
        'accuracy_at_rank_8'
    """
    entry = find_entry(slug)
    if not entry.has_claim:
        raise InputError(f"{slug} has no claim to verify yet")
    return import_name(f"{entry.module}.CLAIM")


def claim_task(claim: Claim) -> Task:
    """The task of a claim; for one that measures all its arms itself and names none, a task without data."""
    if claim.task is not None:
        return find_task(claim.task) if isinstance(claim.task, str) else claim.task
    if claim.trial is None:
        raise InputError("a claim needs a task, or a trial function")
    return Task(
        name="",
        kind="",
        title=claim.statement,
        load=lambda seed: None,
        model=lambda splits: nn.Identity(),
        objective=None,
        objective_name="",
        validate=lambda model, splits: {},
        test=lambda model, splits: {},
        metric=claim.metric,
        direction=claim.direction,
    )


@dataclass(frozen=True)
class _Trial:
    """An arm made ready for one seed: its model and methods, and the time that took."""

    setting: Setting
    model: nn.Module
    methods: Sequence[Method]
    objective: Objective | None
    prepare_seconds: float

    @classmethod
    def prepare(cls, task: Task, arm: Arm, seed: int, budget: Budget, smoke: bool) -> "_Trial":
        setting = Setting.of(task, seed, budget, smoke)
        started = time.perf_counter()
        methods = list(arm.methods(setting))
        seconds = time.perf_counter() - started
        return cls(setting, setting.new_model(), methods, arm.objective, seconds)

    @property
    def is_trained(self) -> bool:
        """False for the plain arm of a task without an objective: the network as initialised."""
        return bool(self.methods) or self.objective is not None or self.setting.task.objective is not None

    def train(self, **options: Any) -> Fit:
        if self.is_trained:
            return self.setting.fit(self.model, self.objective, self.methods, **options)
        return Fit(self.model, (), {}, [], [], 0, 0, 0.0, 0.0, 0.0, 0.0, None)

    def judge(self, run: Fit, claim: Claim | None = None) -> dict[str, float]:
        """Metrics of the shipped model on test data."""
        run.model.eval()
        with torch.no_grad():
            metrics = dict(self.setting.task.test(run.model, self.setting.splits))
        for method in run.methods:
            metrics = method.report(run.model, getattr(self.setting.splits, "train", None)) | metrics
        if claim is not None and claim.measure is not None:
            metrics |= claim.measure(run, self.setting)
        return {name: float(value) for name, value in metrics.items()}


def rehearse(record: ComparisonRecord, task: Task, arm: Arm, *, judge: bool = False) -> None:
    """Take one step of an arm and throw it away, so that what cannot work is refused before anything is trained.

    Args:
        record: the plan.
        task: its task.
        arm: one of its arms.
        judge: also evaluate, and refuse a metric that the task does not give.

    Raises:
        InputError: if a method cannot be built or set up, the user's model does not work, or the metric is unknown.
    """
    seed = record.seeds[0]
    model = record.options.get("task", {}).get("model")
    with reproducible(seed):
        try:
            trial = _Trial.prepare(task, arm, seed, Budget(steps=1), smoke=True)
            run = trial.train()
            if judge:
                _check_metric(record, task, trial.judge(run))
        except NonFiniteLossError:
            return  # the trial itself will tell
        except InputError as error:
            raise InputError(f"{arm.name}: {error}") from error
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if model is None:
                raise
            raise InputError(f"model {model!r} does not work on {task.title}: {error}") from error


def _check_metric(record: ComparisonRecord, task: Task, metrics: Mapping[str, float]) -> None:
    if record.metric not in metrics:
        raise InputError(
            f"no metric named {record.metric!r} in {task.title}{suggest_names(record.metric, metrics)} "
            f"(it gives {', '.join(sorted(metrics))})"
        )


def attempt_arm(
    record: ComparisonRecord,
    task: Task,
    arm: Arm,
    seed: int,
    *,
    logs: Logs | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train and judge one arm of a comparison; a run that diverges is a finding too, stored with NaN for the metric.

    Leaving it out would flatter the arm, and stopping the comparison would lose what the other arms have to say.
    """
    reached = _Reached()
    started = time.perf_counter()
    try:
        trial = train_arm(record, task, arm, seed, logs=logs, progress=progress, loggers=[reached])
    except NonFiniteLossError as error:
        seconds = time.perf_counter() - started
        trial = TrialRecord(
            arm=arm.name,
            seed=seed,
            fingerprint=record.fingerprint(),
            metrics={record.metric: math.nan},
            cost=Cost(
                seconds=seconds, steps=reached.step, steps_per_second=reached.step / seconds, parameters=0
            ),
        )
        return Outcome(trials=[trial], failure=str(error))
    if not math.isfinite(trial.metrics.get(record.metric, math.nan)):
        return Outcome(
            trials=[trial], failure=f"{arm.name}, seed {seed}: {record.metric} is no finite number"
        )
    return Outcome(trials=[trial])


class _Reached:
    """Remembers the last step that was logged."""

    step = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.step = step


def train_arm(
    record: ComparisonRecord,
    task: Task,
    arm: Arm,
    seed: int,
    *,
    claim: Claim | None = None,
    smoke: bool = False,
    logs: Logs | None = None,
    progress: Progress | None = None,
    loggers: Sequence[Any] = (),
) -> TrialRecord:
    """Train and judge one arm with one seed.

    Args:
        record: the plan.
        task: what it is trained on.
        arm: the arm.
        seed: of everything random.
        claim: the claim that is measured, if it is one.
        smoke: exercise the code only.
        logs: a logger and its folder.
        progress: called with the share of the training that is done.
        loggers: further ones.

    Raises:
        NonFiniteLossError: if the training diverges; names arm, seed, loss term and step.
    """
    logger, folder = logs if logs is not None else (None, ".")
    with reproducible(seed), opened_logger(logger, Path(folder), f"{arm.name}--seed{seed}") as opened:
        try:
            trial = _Trial.prepare(task, arm, seed, plan_budget(record), smoke)
            setting = trial.setting
            run = trial.train(
                evaluate=lambda model: dict(task.validate(model, setting.splits)),
                evaluate_every=task.evaluate_every if claim is not None else _evaluation_interval(setting),
                target=Target(record.metric, record.target, record.direction)
                if record.target is not None
                else None,
                monitor=ConflictMonitor(every=25),
                loggers=[*opened, *loggers],
                progress=(lambda share, terms: progress(share)) if progress is not None else None,
            )
        except NonFiniteLossError as error:
            reason = str(error).partition(";")[0]
            raise NonFiniteLossError(f"{arm.name}, seed {seed}: {reason}") from error
        metrics = trial.judge(run, claim)
        for logger in opened:
            logger.log_metrics({f"test/{name}": value for name, value in metrics.items()}, step=run.steps)
    return TrialRecord(
        arm=arm.name,
        seed=seed,
        fingerprint=record.fingerprint(),
        metrics=metrics,
        history=[HistoryPoint(**asdict(point)) for point in run.history],
        conflicts=[ConflictPoint(**asdict(conflict)) for conflict in run.conflicts],
        cost=Cost(
            seconds=run.seconds,
            prepare_seconds=trial.prepare_seconds + run.prepare_seconds,
            steps=run.steps,
            steps_per_second=run.steps_per_second if math.isfinite(run.steps_per_second) else 0.0,
            peak_memory_mb=run.peak_memory_mb if trial.is_trained else None,
            parameters=sum(parameter.numel() for parameter in run.model.parameters()),
            stored_bytes=_stored_bytes(run) if claim is None else None,
        ),
        time_to_target=run.time_to_target,
    )


def _stored_bytes(run: Fit) -> int | None:
    """Size of the file that the shipped model takes, every weight in its smallest exact form; None for a model that no such file holds."""
    from coloss.compression import compress_model

    # A later method may have changed a weight, so that the form another one gives is refused: then it is stored as it is.
    for given in (_given_forms, lambda methods, model: None):
        try:
            with tempfile.TemporaryDirectory() as folder:
                stored = compress_model(run.model, given(run.methods, run.model))
                return stored.save(Path(folder) / "model.coloss").stat().st_size
        except InputError:
            continue
    return None


def _given_forms(methods: Sequence[Any], model: nn.Module) -> dict[str, Any]:
    """What methods say of weights whose form cannot be read off them."""
    saying = (method for method in methods if hasattr(method, "stored_weights"))
    return {name: stored for method in saying for name, stored in method.stored_weights(model).items()}


def _evaluation_interval(setting: Setting) -> int | None:
    """Steps between evaluations of a comparison, the same for every arm; None for once an epoch."""
    task, budget = setting.task, setting.budget
    if task.evaluate_every is not None:
        return task.evaluate_every
    if budget.steps is not None:
        return max(budget.steps // EVALUATIONS, FEWEST_STEPS)
    if budget.epochs is not None and budget.epochs <= EVALUATIONS:
        return None
    try:
        per_epoch = math.ceil(len(setting.splits.train) / task.batch_size)
    except (AttributeError, TypeError):
        return None
    if budget.epochs is not None:
        return max(int(budget.epochs * per_epoch) // EVALUATIONS, FEWEST_STEPS)
    return max(per_epoch, 10 * FEWEST_STEPS)


def measure_seed(
    record: ComparisonRecord, claim: Claim, seed: int, *, smoke: bool = False
) -> list[TrialRecord]:
    """One seed of a claim that measures all its arms in one go.

    Raises:
        InputError: if it leaves out one of the two arms that the claim is about.
    """
    assert claim.trial is not None
    task = claim_task(claim)
    with reproducible(seed):
        started = time.perf_counter()
        budget = plan_budget(record) if record.budget else None
        found = claim.trial(Setting.of(task, seed, budget, smoke))
        seconds = time.perf_counter() - started
    for role in (claim.baseline, claim.method):
        if role not in found:
            raise InputError(f"the claim's trial must measure the arm {role!r}, it gave {', '.join(found)}")
    return [
        TrialRecord(
            arm=arm,
            seed=seed,
            fingerprint=record.fingerprint(),
            metrics={name: float(value) for name, value in metrics.items()},
            cost=Cost(seconds=seconds, steps=0, steps_per_second=0.0, parameters=0),
        )
        for arm, metrics in found.items()
    ]
