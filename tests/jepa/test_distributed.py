"""Two gloo processes do what one does with the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coloss.jepa.univariate import UNIVARIATE

SCRIPT = Path(__file__).with_name("two_process_lejepa.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process saw, and what each of two saw."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(processes), folder / str(processes)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for processes in (1, 2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    return [load_file(folder / name) for name in ("1.0", "2.0", "2.1")]


@pytest.mark.parametrize("test", list(UNIVARIATE))
def test_sigreg_has_the_value_and_gradient_of_the_joined_batch(runs, test):
    alone, *both = runs
    names = [name for name in alone if name.startswith(f"sigreg/{test}/")]
    assert len(names) == 3
    for name in names:
        for found in both:
            assert torch.allclose(found[name], alone[name], rtol=1e-9, atol=1e-9), name
    assert alone[f"sigreg/{test}/weight"].abs().max() > 1e-3


@pytest.mark.parametrize("objective", [False, True])
def test_training_takes_the_steps_of_one_process(runs, objective):
    alone, *both = runs
    prefix = f"train/{objective}/"
    names = [name for name in alone if name.startswith(prefix) and "monitor" not in name]
    assert any("projector" in name for name in names)
    for name in names:
        for found in both:
            assert torch.allclose(found[name].double(), alone[name].double(), rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("objective", [False, True])
def test_the_monitor_sees_the_rows_of_all_processes(runs, objective):
    alone, *both = runs
    for name in (name for name in alone if name.startswith(f"train/{objective}/monitor")):
        for found in both:
            # The buffer holds two whole batches, in another order; rows are kept in single precision.
            assert torch.allclose(found[name], alone[name], rtol=1e-5), name
        assert torch.equal(both[0][name], both[1][name]), name
