"""Processes, a Ray cluster, a kill: the numbers stay the same, and nothing finished is repeated."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coloss import Budget, Comparison
from coloss.errors import InputError
from coloss.lab.records import read_comparison
from coloss.lab.workers import WorkerLostError, in_processes, in_ray

ARMS = ["cross-entropy", "trp:energy=0.8"]


def plan() -> Comparison:
    return Comparison("wine", ARMS, seeds=3, budget=Budget(steps=10), limit=60)


def numbers(folder: Path) -> list:
    """All that trials computed, without what it cost."""
    return [
        (t.arm, t.seed, t.metrics, [(p.step, p.terms, p.metrics) for p in t.history], t.cost.parameters)
        for t in read_comparison(folder)[1]
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list:
    """What one process computes."""
    folder = tmp_path_factory.mktemp("alone")
    plan().run(folder)
    return numbers(folder)


def children(parent: int) -> list[int]:
    """Process ids below a process (Linux)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_killed_in_the_middle_of_two_workers(alone, tmp_path):
    folder = tmp_path / "result"
    script = (
        "from coloss import Budget, Comparison\n"
        "if __name__ == '__main__':\n"
        "    comparison = Comparison('wine', ['cross-entropy', 'trp:energy=0.8'], seeds=3, budget=Budget(steps=10), limit=60)\n"
        f"    comparison.run({str(folder)!r}, workers=2)\n"
    )
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py")])
    deadline = time.monotonic() + 200
    while len(list((folder / "trials").glob("*.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    kept = {path: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}
    assert len(kept) >= 2
    result = plan().run(folder)
    assert len(result.trials) == 6
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert numbers(folder) == alone


def test_ray_gives_the_numbers_of_one_process(alone, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra coloss[ray]")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        plan().run(tmp_path, ray="auto")
        refused = plan().record.model_copy(update={"task": "no-such-task"})
        with pytest.raises(InputError, match="^no task named 'no-such-task' .coloss data lists them"):
            list(in_ray(refused, [(ARMS[0], 0)], "auto", None))
        assert ray.is_initialized(), "a cluster that others started is theirs to end"
    finally:
        ray.shutdown()
    assert numbers(tmp_path) == alone


def test_a_ray_cluster_that_is_not_there(tmp_path):
    pytest.importorskip("ray", reason="needs the extra coloss[ray]")
    with pytest.raises(InputError, match="cannot reach a Ray cluster at 'auto'"):
        plan().run(tmp_path, ray="auto")


def test_no_process_is_started_for_nothing(tmp_path):
    record = plan().record
    assert list(in_processes(record, [], 4, None)) == []


def test_a_worker_that_is_lost():
    with pytest.raises(WorkerLostError, match="ended by itself.*fewer workers"):
        for _ in in_processes(plan().record, [(ARMS[0], seed) for seed in range(3)], 1, None, _kill_worker):
            pass


def _kill_worker(arm: str, seed: int, share: float) -> None:
    for child in children(os.getpid()):
        # A helper process of the system may have ended since it was listed.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(child, signal.SIGKILL)
