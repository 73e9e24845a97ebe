"""The code example of a room, with the imports it needs, taken from the source text (no torch)."""

import ast
import inspect
import re
from collections.abc import Iterable
from pathlib import Path


def room_example(path: Path, module: str, names: Iterable[str]) -> str:
    """The example in the docstring of the first of these names that has one, as a session that runs when pasted.

    Args:
        path: of the room's source.
        module: its import path.
        names: classes and functions of the room, the preferred first.

    Returns:
        Lines as in a Python session, imports first; empty if no name has an example.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "room.py"
        >>> _ = path.write_text(
        ...     "def one():\\n    'Gives 1.\\\\n\\\\nExample:\\\\n    >>> one()'\\n    return 1\\n"
        ... )
        >>> room_example(path, "my.room", ["one"]).splitlines()
        ['>>> from my.room import one', '>>> one()']
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    rooms = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for name in names:
        code = _example_section(ast.get_docstring(rooms[name]) or "") if name in rooms else ""
        if code:
            return "\n".join([*_imports(tree, module, code), code])
    return ""


def _example_section(docstring: str) -> str:
    """What stands under `Examples:`, or `Example:`.

    Examples:
        >>> _example_section("Adds. \\n\\nExample:\\n    1 + 1\\n")
        '1 + 1'
    """
    found = re.search(r"^Examples?:\n", docstring, re.MULTILINE)
    lines = []
    for line in docstring[found.end() :].splitlines() if found else ():
        if line and not line.startswith(" "):
            break
        lines.append(line)
    return inspect.cleandoc("\n".join(lines))


def _imports(tree: ast.Module, module: str, code: str) -> list[str]:
    """Import statements for the names of a room that its example uses and does not import itself."""
    source = "\n".join(re.findall(r"^(?:>>>|\.\.\.) ?(.*)", code, re.MULTILINE))
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    lines = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            wanted = [alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) in used]
            if wanted:
                kept = (
                    ast.Import(wanted)
                    if isinstance(node, ast.Import)
                    else ast.ImportFrom(node.module, wanted, node.level)
                )
                lines.append(f">>> {ast.unparse(kept)}")
    own = [name for name in _defined(tree) if name in used]
    return [*lines, f">>> from {module} import {', '.join(own)}"] if own else lines


def _defined(tree: ast.Module) -> list[str]:
    names = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names
