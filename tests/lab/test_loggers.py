"""Lightning's loggers get every point of a run and its test metrics."""

import csv

import pytest

from coloss import Budget, Comparison
from coloss.errors import InputError
from coloss.lab.loggers import check_logger, opened_logger

RUN = "trp_energy=0.8--seed0"


def run(folder, logger):
    comparison = Comparison("iris", ["trp:energy=0.8"], seeds=1, budget=Budget(steps=20), logger=logger)
    return comparison.run(folder).trials[0]


def test_csv(tmp_path):
    trial = run(tmp_path, "csv")
    with (tmp_path / "logs" / RUN / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["cross_entropy"]) for row in rows if row["cross_entropy"]}
    assert losses == {point.step: point.terms["cross_entropy"] for point in trial.history if point.terms}
    assert [row["step"] for row in rows if row["accuracy"]] == ["10", "20"]
    assert float(rows[-1]["test/accuracy"]) == trial.metrics["accuracy"] and rows[-1]["step"] == "20"


def test_a_run_that_is_repeated_replaces_its_log(tmp_path, recwarn):
    run(tmp_path, "csv")
    before = (tmp_path / "logs" / RUN / "metrics.csv").read_text()
    (tmp_path / "trials" / f"{RUN}.json").unlink()
    run(tmp_path, "csv")
    assert (tmp_path / "logs" / RUN / "metrics.csv").read_text() == before
    assert not [warning for warning in recwarn if "not empty" in str(warning.message)]


def test_the_logger_is_no_part_of_the_experiment(tmp_path):
    run(tmp_path, "csv")
    trial = (tmp_path / "trials" / f"{RUN}.json").stat().st_mtime_ns
    run(tmp_path, None)
    assert (tmp_path / "trials" / f"{RUN}.json").stat().st_mtime_ns == trial


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra coloss[loggers]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trial = run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / RUN))
    events.Reload()
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(trial.metrics["accuracy"])
    assert [point.step for point in events.Scalars("cross_entropy")][-1] == 20


def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs the extra coloss[loggers]")
    pytest.importorskip("lightning", reason="needs the extra coloss[lightning]")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with opened_logger("mlflow", tmp_path, "arm--seed0") as (logger,):
        logger.log_metrics({"accuracy": 0.5, "recall@5": 0.25}, step=3)
    (found,) = (tmp_path / "mlruns").rglob("metrics/recall_at_5")
    assert found.read_text().split()[1:] == ["0.25", "3"]
    meta = (found.parent.parent / "meta.yaml").read_text()
    assert "run_name: arm--seed0" in meta and "status: 3" in meta  # finished


def test_a_failed_run_is_closed(tmp_path):
    with pytest.raises(ArithmeticError), opened_logger("csv", tmp_path, "run") as (logger,):
        logger.log_metrics({"loss": 1.0}, step=1)
        raise ArithmeticError
    assert (tmp_path / "run" / "metrics.csv").exists()


def test_no_logger(tmp_path):
    with opened_logger(None, tmp_path, "run") as opened:
        assert opened == []


def test_bad_loggers(tmp_path):
    with pytest.raises(
        InputError,
        match=r"no logger named 'cvs'; did you mean 'csv'\? \(there are csv, tensorboard, mlflow\)",
    ):
        check_logger("cvs")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot write logs in .*file"),
        opened_logger("csv", tmp_path / "file", "run"),
    ):
        pass
