"""How long a person waits before anything happens: imports, and commands that only look something up."""

import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial

from coloss.lab.benchmarks.measure import Report, interleaved, silent
from coloss.lab.benchmarks.row import Row
from coloss.lab.catalog import catalog

TORCH = "import torch"
IMPORTS = {
    TORCH: None,
    "import torch; import coloss": 0.3,
    "import torch; from coloss import fit": 0.3,
    "import torch; import lightning_fabric": None,
}
_COMMAND = """
import sys
from coloss.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules, file=sys.stderr)
"""


def measure(
    report: Report = silent,
    *,
    rounds: int = 7,
    imports: Mapping[str, float | None] = IMPORTS,
    commands: Sequence[str] | None = None,
) -> list[Row]:
    """Seconds in a fresh process: imports beside `import torch`, and commands that need no torch.

    Args:
        report: told the share done.
        rounds: processes of each kind.
        imports: statements with the most seconds that each may take over the first of them.
        commands: arguments of the command; default: list, show, data and --help.

    Raises:
        subprocess.CalledProcessError: if a statement or a command fails.
    """
    if commands is None:
        commands = ["list", f"show {catalog()[0].slug}", "data", "--help"]
    with_torch: set[str] = set()
    cases = {statement: partial(_seconds, ["-c", statement]) for statement in imports}
    cases |= {f"coloss {command}": partial(_command_seconds, command, with_torch) for command in commands}
    found = interleaved(cases, rounds, report)
    first = next(iter(imports))
    rows = [Row.of(statement, found[statement], "s", over=found[first]) for statement in imports]
    rows += [
        Row.of(f"{statement} - {first}", found[statement] - found[first], "s", limit=limit)
        for statement, limit in imports.items()
        if statement != first
    ]
    rows += [Row.of(f"coloss {command}", found[f"coloss {command}"], "s", limit=1.5) for command in commands]
    names = ", ".join(sorted(with_torch))
    rows.append(Row.of("of these, commands that import torch", [len(with_torch)], "", limit=0.0, note=names))
    return rows


def _seconds(arguments: Sequence[str]) -> tuple[float, float]:
    return _run(arguments)[:2]


def _command_seconds(command: str, with_torch: set[str]) -> tuple[float, float]:
    wall, cpu, words = _run(["-c", _COMMAND, *command.split()])
    if words.splitlines()[-1] == "True":
        with_torch.add(command)
    return wall, cpu


def _run(arguments: Sequence[str]) -> tuple[float, float, str]:
    """Wall and processor seconds of a Python process from start to end, and what it wrote to stderr."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall, cpu, done.stderr
