"""Lightning's loggers by name."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coloss.errors import InputError, suggest_names

LOGGERS = ("csv", "tensorboard", "mlflow")


def check_logger(name: str) -> str:
    """Pass a logger's name through, or refuse it.

    Raises:
        InputError: if there is none of that name, or its package is missing.

    Examples:
        >>> check_logger("csv")
        'csv'
    """
    if name not in LOGGERS:
        raise InputError(
            f"no logger named {name!r}{suggest_names(name, LOGGERS)} (there are {', '.join(LOGGERS)})"
        )
    missing = f"the {name} logger needs a package that is missing: pip install 'coloss[lightning,loggers]'"
    try:
        if name == "tensorboard":
            import tensorboard  # noqa: F401
        if name == "mlflow":
            _keep_mlflow_local()
            import lightning.pytorch.loggers  # noqa: F401
            import mlflow  # noqa: F401
    except ImportError as error:
        raise InputError(missing) from error
    return name


@contextmanager
def opened_logger(name: str | None, folder: Path, run: str) -> Iterator[list[Any]]:
    """One of Lightning's loggers for one run, as a list of one; an empty list for None. It is closed at the end.

    CSV and TensorBoard write `folder/run`; MLflow writes `folder/mlruns`, or where `MLFLOW_TRACKING_URI` points.

    Raises:
        InputError: if the logger is unknown, its package is missing, or it cannot write.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with opened_logger("csv", folder, "plain") as (logger,):
        ...     logger.log_metrics({"loss": 0.5}, step=1)
        >>> (folder / "plain" / "metrics.csv").read_text().split()
        ['loss,step', '0.5,1']
    """
    if name is None:
        yield []
        return
    check_logger(name)
    run = re.sub(r"[^A-Za-z0-9.+=_-]", "_", run)
    try:
        logger = _Steady(_make(name, folder, run))
    except OSError as error:
        raise InputError(f"cannot write logs in {folder}: {error.strerror or error}") from error
    try:
        yield [logger]
    except BaseException:
        logger.close("failed")
        raise
    logger.close("success")


def _make(name: str, folder: Path, run: str) -> Any:
    if name == "csv":
        from lightning_fabric.loggers import CSVLogger

        # Lightning would warn of the log of a run that was stopped, and then replace it.
        (folder / run / "metrics.csv").unlink(missing_ok=True)
        return CSVLogger(folder, name=run, version="")
    if name == "tensorboard":
        from lightning_fabric.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name=run, version="")
    from lightning.pytorch.loggers import MLFlowLogger

    address = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
    return MLFlowLogger(experiment_name="coloss", run_name=run, tracking_uri=address)


def _keep_mlflow_local() -> None:
    """Let MLflow write plain files, which its newer versions do on request only, and keep it from reporting its use."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


class _Steady:
    """Writes every point to disk at once, so that a killed run keeps its log, under names that all loggers take."""

    def __init__(self, logger: Any):
        self._logger = logger

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._logger.log_metrics({name.replace("@", "_at_"): v for name, v in metrics.items()}, step=step)
        self._logger.save()

    def close(self, status: str) -> None:
        self._logger.finalize(status)
