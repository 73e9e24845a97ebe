"""Measuring a paper's claim: a comparison with a prediction, and the evidence file it leaves."""

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coloss.errors import InputError, suggest_names
from coloss.lab.catalog import PACKAGE, find_entry
from coloss.lab.evidence import ArmSummary, Evidence, Side, Spread, evidence_folder, write_evidence
from coloss.lab.records import (
    ArmRecord,
    ComparisonRecord,
    TrialRecord,
    machine,
    read_record,
    trial_path,
    versions,
    write_atomically,
    write_record,
)
from coloss.lab.trials import claim_task, load_claim, measure_seed, train_arm
from coloss.lab.workers import Report, check_workers, in_processes, in_ray
from coloss.metrics.statistics import paired_comparison
from coloss.train.budget import Budget
from coloss.train.loop import NonFiniteLossError
from coloss.train.system import Claim

SMOKE_BUDGET = Budget(steps=3)
FEWEST_SEEDS = 5


def verify(
    slug: str,
    *,
    smoke: bool = False,
    seeds: int | None = None,
    workers: int = 1,
    ray: str | None = None,
    folder: str | Path = "runs/verify",
    evidence: str | Path | None = None,
    command: str = "",
    report: Report | None = None,
) -> dict[str, Any]:
    """Measure the claim of one system.

    Every finished trial is kept in `folder` until the claim is complete, so a measurement that was stopped goes on; trials of older code
    are not reused. The evidence is written once all seeds are in, whatever the verdict.

    Args:
        slug: the system.
        smoke: run the same code for three steps, and write nothing.
        seeds: number of paired runs, at least 5; default: the claim's. In a smoke run at least 1, which gives no interval (NaN); default: 2.
        workers: processes to spread trials over.
        ray: address of a Ray cluster, in place of processes.
        folder: where unfinished measurements wait.
        evidence: folder of the evidence files; default: the project's.
        command: what to record as the command that made it.
        report: called with (arm, seed, share done).

    Returns:
        The evidence, as it stands in `<evidence>/<slug>.json`.

    Raises:
        InputError: if the system is unknown or has no claim, `seeds` < 5, or a folder cannot be written.
        NonFiniteLossError: if a run diverges: there is no verdict without all of them.

    Examples:
        >>> verify("trp", smoke=True)["method"]["name"]
        'trp'
    """
    check_workers(workers)
    claim = load_claim(slug)
    count = seeds if seeds is not None else (2 if smoke else claim.seeds)
    fewest = 1 if smoke else FEWEST_SEEDS
    if count < fewest:
        hint = "" if smoke else " (use --smoke for a quick look)"
        raise InputError(
            f"seeds must be >= {fewest} for {'a smoke run' if smoke else 'evidence'}, got {count}{hint}"
        )
    record = _plan(slug, claim, count, smoke, command)
    started = time.perf_counter()
    if smoke:
        trials = []
        for trial in _run_here(record, claim, _todo(record, claim, set()), report, smoke=True):
            _check(slug, claim, trial)
            trials.append(trial)
        return _evidence(slug, claim, record, trials, time.perf_counter() - started).model_dump(mode="json")
    place, target = Path(folder) / slug, Path(evidence) if evidence is not None else evidence_folder()
    _check_writable(target)
    _discard_other_experiment(place, record)
    write_record(place / "comparison.json", record)
    before = _read_seconds(place)
    finished = {(t.arm, t.seed): t for t in _read_trials(place) if t.seed in record.seeds}
    if report is not None:
        for arm, seed in finished:
            report(arm, seed, 1.0)
    todo = _todo(record, claim, set(finished))
    for trial in _run(record, claim, todo, workers, ray, report):
        _check(slug, claim, trial)
        write_record(trial_path(place, trial.arm, trial.seed), trial)
        _write_seconds(place, before + time.perf_counter() - started)
        finished[trial.arm, trial.seed] = trial
        if report is not None:
            report(trial.arm, trial.seed, 1.0)
    seconds = before + time.perf_counter() - started
    found = _evidence(slug, claim, record, list(finished.values()), seconds)
    write_evidence(target, found)
    shutil.rmtree(place, ignore_errors=True)
    return found.model_dump(mode="json")


def code_fingerprint(family: str) -> str:
    """Identify the code that makes a claim's numbers: the floors below the families, the lab, and the claim's own family.

    Examples:
        >>> code_fingerprint("jepa") != code_fingerprint("retrieval")
        True
    """
    digest = hashlib.sha256()
    for part in ("ops", "nn", "data", "metrics", "train", "lab", family):
        for path in sorted((PACKAGE / part).rglob("*.py")):
            digest.update(f"{path.relative_to(PACKAGE)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def claim_arms(claim: Claim) -> list[str]:
    """Names of the arms that a claim measures, as far as it says beforehand."""
    return [arm.name for arm in claim.arms] or [claim.baseline, claim.method]


def _plan(slug: str, claim: Claim, count: int, smoke: bool, command: str) -> ComparisonRecord:
    names = claim_arms(claim)
    for role in (claim.baseline, claim.method):
        if role not in names:
            raise InputError(
                f"the claim of {slug} names an arm {role!r} that it does not have ({', '.join(names)})"
            )
    task = claim_task(claim)
    # A claim that measures its arms itself decides on their training, too, unless it names a task or budget.
    own = task.budget if claim.task is not None else None
    budget = SMOKE_BUDGET if smoke else claim.budget or own
    return ComparisonRecord(
        kind="claim",
        title=claim.statement,
        task=task.name,
        arms=[ArmRecord(name=name) for name in names],
        baseline=claim.baseline,
        seeds=list(range(count)),
        budget=budget.as_dict() if budget is not None else {},
        metric=claim.metric,
        direction=claim.direction,
        options={"slug": slug, "code": code_fingerprint(find_entry(slug).family)},
        command=command or f"coloss verify {slug}",
        versions=versions(),
        machine=machine(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _discard_other_experiment(place: Path, record: ComparisonRecord) -> None:
    """A half-finished measurement of other code or another plan cannot be continued."""
    try:
        stored = read_record(place / "comparison.json", ComparisonRecord)
    except InputError:
        stored = None
    if stored is None or stored.fingerprint() != record.fingerprint():
        shutil.rmtree(place, ignore_errors=True)


def _read_trials(place: Path) -> list[TrialRecord]:
    """All finished trials; a claim that measures its arms itself may have more of them than the plan names."""
    return [read_record(path, TrialRecord) for path in sorted((place / "trials").glob("*.json"))]


def _read_seconds(place: Path) -> float:
    """Working time of earlier, stopped runs."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return float(json.loads((place / "seconds.json").read_text(encoding="utf-8")))
    return 0.0


def _write_seconds(place: Path, seconds: float) -> None:
    write_atomically(place / "seconds.json", json.dumps(round(seconds, 2)))


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before the work rather than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror or error}; choose a writable folder with --evidence"
        ) from error


def _todo(
    record: ComparisonRecord, claim: Claim, there: set[tuple[str, int]]
) -> list[tuple[str | None, int]]:
    names = [arm.name for arm in record.arms]
    if claim.trial is not None:
        return [(None, seed) for seed in record.seeds if any((name, seed) not in there for name in names)]
    return [(name, seed) for seed in record.seeds for name in names if (name, seed) not in there]


def _run(
    record: ComparisonRecord,
    claim: Claim,
    todo: Sequence[tuple[str | None, int]],
    workers: int,
    ray: str | None,
    report: Report | None,
) -> Iterator[TrialRecord]:
    if ray is None and workers == 1:
        yield from _run_here(record, claim, todo, report)
        return
    stream = (
        in_ray(record, todo, ray, None)
        if ray is not None
        else in_processes(record, todo, workers, None, report)
    )
    for outcome in stream:
        yield from outcome.trials


def _run_here(
    record: ComparisonRecord,
    claim: Claim,
    todo: Sequence[tuple[str | None, int]],
    report: Report | None,
    smoke: bool = False,
) -> Iterator[TrialRecord]:
    for name, seed in todo:
        if name is None:
            yield from measure_seed(record, claim, seed, smoke=smoke)
            continue
        arm = next(arm for arm in claim.arms if arm.name == name)

        def progress(share: float, name: str = name, seed: int = seed) -> None:
            if report is not None:
                report(name, seed, min(share, 0.999))

        progress(0.0)
        yield train_arm(record, claim_task(claim), arm, seed, claim=claim, smoke=smoke, progress=progress)


def _check(slug: str, claim: Claim, trial: TrialRecord) -> None:
    """Refuse a trial of the two arms that cannot be judged."""
    if trial.arm not in (claim.baseline, claim.method):
        return
    if claim.metric not in trial.metrics:
        raise InputError(
            f"the claim of {slug} names metric {claim.metric!r}, which arm {trial.arm!r} does not give"
            f"{suggest_names(claim.metric, trial.metrics)} (it gives {', '.join(sorted(trial.metrics))})"
        )
    value = trial.metrics[claim.metric]
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"{slug}: {claim.metric} of arm {trial.arm!r} is {value} with seed {trial.seed}, so there is no verdict"
        )


def _evidence(
    slug: str, claim: Claim, record: ComparisonRecord, trials: Sequence[TrialRecord], seconds: float
) -> Evidence:
    planned = [arm.name for arm in record.arms]
    names = [*planned, *dict.fromkeys(trial.arm for trial in trials if trial.arm not in planned)]
    arms = {
        name: sorted((trial for trial in trials if trial.arm == name), key=lambda trial: trial.seed)
        for name in names
    }
    baseline, method = (
        [trial.metrics[claim.metric] for trial in arms[name]] for name in (claim.baseline, claim.method)
    )
    result = paired_comparison(method, baseline, direction=claim.direction)
    return Evidence(
        slug=slug,
        statement=claim.statement,
        verdict=result.verdict,
        metric=claim.metric,
        direction=claim.direction,
        seeds=record.seeds,
        baseline=Side(name=claim.baseline, mean=_mean(baseline), values=baseline),
        method=Side(name=claim.method, mean=_mean(method), values=method),
        difference=result.difference,
        interval=result.interval if result.interval is not None else (math.nan, math.nan),
        p_value=result.p_value,
        effect_size=result.effect_size,
        arms={name: _arm_summary(found) for name, found in arms.items() if found},
        task=record.task,
        budget=record.budget,
        tried=claim.tried,
        seconds=round(seconds, 2),
        command=record.command,
        versions=record.versions,
        machine=record.machine,
        created=record.created,
    )


def _arm_summary(trials: Sequence[TrialRecord]) -> ArmSummary:
    names = dict.fromkeys(name for trial in trials for name in trial.metrics)
    return ArmSummary(
        metrics={name: _spread([trial.metrics.get(name, math.nan) for trial in trials]) for name in names},
        seconds=_mean([trial.cost.seconds for trial in trials]),
        prepare_seconds=_mean([trial.cost.prepare_seconds for trial in trials]),
        steps_per_second=_mean([trial.cost.steps_per_second for trial in trials]),
        parameters=trials[0].cost.parameters,
    )


def _spread(values: Sequence[float]) -> Spread:
    mean = _mean(values)
    return Spread(
        mean=mean if math.isfinite(mean) else None,
        values=[value if math.isfinite(value) else None for value in values],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
