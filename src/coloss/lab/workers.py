"""Trials spread over processes of this machine, or over a Ray cluster; each gives the numbers it would give here."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any

from coloss.errors import InputError
from coloss.lab.records import ComparisonRecord
from coloss.lab.trials import Logs, Outcome, run_trials

Report = Callable[[str, int, float], None]
"""Called as (arm, seed, share done); 1.0 once the trial is stored."""

Todo = Sequence[tuple[str | None, int]]
"""Arms and seeds; None for all arms of a seed at once."""


class WorkerLostError(RuntimeError):
    """A process that ran trials ended by itself."""


def in_processes(
    record: ComparisonRecord, todo: Todo, workers: int, logs: Logs | None, report: Report | None = None
) -> Iterator[Outcome]:
    """Run trials in `workers` processes; gives each outcome as it is there. Nothing of them is left running afterwards.

    Raises:
        WorkerLostError: if a process ends by itself.
    """
    if not todo:
        return
    plan = record.model_dump_json()
    context = multiprocessing.get_context("spawn")
    shares = context.SimpleQueue()
    strangers = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=context, initializer=_start_worker, initargs=(shares,)
    )
    try:
        pending: set[Future[str]] = {pool.submit(_run_in_worker, plan, arm, seed, logs) for arm, seed in todo}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not shares.empty():
                arm, seed, share = shares.get()
                if report is not None:
                    report(arm, seed, min(share, 0.999))
            for future in done:
                yield Outcome.model_validate_json(future.result())
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a process that ran trials ended by itself: was it killed, perhaps for memory? Try fewer workers "
            "(in a script of your own, the comparison must stand under: if __name__ == '__main__')"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - strangers:
            process.terminate()


_shares: Any = None


def _start_worker(shares: Any) -> None:
    """Ctrl-C is the parent's to handle, and a worker must not outlive a parent that was killed."""
    global _shares
    _shares = shares
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_end([parent.sentinel])
        os._exit(1)


def _run_in_worker(plan: str, arm: str | None, seed: int, logs: Logs | None) -> str:
    def progress(share: float) -> None:
        _shares.put((arm, seed, share))

    return run_trials(plan, arm, seed, logs, progress if arm is not None else None)


def in_ray(record: ComparisonRecord, todo: Todo, address: str, logs: Logs | None) -> Iterator[Outcome]:
    """Run trials as tasks of one core each on a Ray cluster; gives each outcome as it is there.

    Args:
        record: the plan.
        todo: what to run.
        address: "local" for a cluster of this machine that ends with the run, "auto" for the one that runs here, or an address.
        logs: a logger and its folder, on the machine of each trial.

    Raises:
        InputError: if Ray is not installed or the cluster cannot be reached.
        WorkerLostError: if Ray gives up on a trial.
    """
    if not todo:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("a Ray cluster needs the package ray: pip install 'coloss[ray]'") from error
    started_here = not ray.is_initialized()
    if started_here:
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        if address != "local" and "COLOSS_DATA" in os.environ:
            options["runtime_env"] = {"env_vars": {"COLOSS_DATA": os.environ["COLOSS_DATA"]}}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"cannot reach a Ray cluster at {address!r}: {reason}") from error
    try:
        start: Any = ray.remote(num_cpus=1, max_retries=1)(run_trials)
        plan = record.model_dump_json()
        pending = [start.remote(plan, arm, seed, logs) for arm, seed in todo]
        while pending:
            done, pending = ray.wait(pending)
            for reference in done:
                yield Outcome.model_validate_json(_fetch(reference))
    finally:
        if started_here:
            ray.shutdown()


def _fetch(reference: Any) -> str:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Ray's own message is the whole traceback; what the trial raised is the one line that a person needs.
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise WorkerLostError(f"Ray gave up on a trial: {str(error).splitlines()[0]}") from error


def check_workers(workers: int) -> None:
    """Refuse a number of processes that is none.

    Raises:
        InputError: if it is below 1.

    Examples:
        >>> check_workers(0)
        Traceback (most recent call last):
        ...
        coloss.errors.InputError: workers must be >= 1, got 0
    """
    if workers < 1:
        raise InputError(f"workers must be >= 1, got {workers}")
