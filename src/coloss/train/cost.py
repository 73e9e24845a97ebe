"""What training costs: a clock that can pause, and the peak memory of a stretch of work."""

import contextlib
import ctypes
import gc
import resource
import sys
import time
from pathlib import Path

import torch


class Clock:
    """Counts seconds while it runs; evaluation and checkpoints happen while it is paused.

    Examples:
        >>> clock = Clock(seconds=2.0)
        >>> clock.seconds()
        2.0
    """

    def __init__(self, seconds: float = 0.0):
        self._before = seconds
        self._since: float | None = None

    def start(self) -> None:
        """Run from now."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting until the next `start`."""
        self._before = self.seconds()
        self._since = None

    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)


class PeakMemory:
    """The highest memory in use above the start, in megabytes (10^6 bytes): of the GPU if there is one, else resident memory.

    Where the system lets the high-water mark be reset (Linux), the figure is of this stretch alone; elsewhere it is the growth of
    the process's overall peak. Garbage in reference cycles that earlier work left would hide what the stretch takes, if it went
    meanwhile; until `close` it therefore stays, frozen, which costs no walk over all objects of the process.

    Examples:
        >>> with PeakMemory(torch.device("cpu")) as memory:
        ...     tensor = torch.ones(5_000_000)
        ...     megabytes = memory.megabytes()
        >>> megabytes > 15
        True
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._froze = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = float(torch.cuda.memory_allocated(device))
            return
        if gc.get_freeze_count() == 0:
            gc.freeze()
            self._froze = True
        else:  # Someone outside keeps objects frozen, and thawing is all or nothing; collecting the others is quick then.
            gc.collect()
        # Memory that earlier work freed but the allocator kept would hide it just so.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start = _resident_peak()

    def megabytes(self) -> float:
        """Peak so far above the start."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self._start) / 1e6
        return max(_resident_peak() - self._start, 0.0) / 1e6

    def close(self) -> None:
        """Let garbage go again."""
        if self._froze:
            gc.unfreeze()
            self._froze = False

    def __enter__(self) -> "PeakMemory":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _resident_peak() -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
