"""An import goes down a floor, never up, and no family imports another."""

import ast
from pathlib import Path

import pytest

import coloss
from coloss.lab.catalog import FAMILIES

PACKAGE = Path(coloss.__file__).parent
FLOORS = {
    "errors": -1,
    "ops": 0,
    "nn": 1,
    "data": 2,
    "metrics": 2,
    "train": 3,
    "lab": 5,
    "report": 6,
    "cli": 6,
}
FLOORS |= dict.fromkeys(FAMILIES, 4)
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Parts of coloss that a file imports anywhere, lazily or not (annotations under TYPE_CHECKING excepted)."""
    tree = ast.parse(path.read_text())
    package = ("coloss", *path.relative_to(PACKAGE).parts[:-1])
    skipped = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for node in ast.walk(guard)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "coloss" else {module}
    return {name.split(".")[1] for name in found if name.startswith("coloss.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for there in imported(path):
        assert there in FLOORS, f"{path} imports coloss.{there}, which is on no floor"
        allowed = FLOORS[there] < FLOORS[here] or there == here
        if FLOORS[there] == FLOORS[here] and here in ("report", "cli", "data", "metrics"):
            allowed = (here, there) in {("cli", "report"), ("metrics", "data")} or there == here
        assert allowed, (
            f"{path.relative_to(PACKAGE)} (floor {FLOORS[here]}) imports coloss.{there} (floor {FLOORS[there]})"
        )


def test_every_folder_is_on_a_floor():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(FLOORS)


def test_there_are_no_nameless_files():
    assert not [path for path in FILES if path.stem in {"utils", "helpers", "common", "misc"}]
