"""The imports of a package, read from its files by `ast` without running them, and what may be wrong with them.

A module is named as Python names it, a package's `__init__.py` by the name of the package. A room is a folder directly
in the package; the package's own `__init__.py` is the room "". Every import statement counts, wherever it stands, and
so does a string that is the full name of a module, for that is what `importlib.import_module` and `python -m` take;
a name that is put together at run time is not seen.
Importing `a.b.c` runs `a` and `a.b` too; that is not counted, as it says nothing of what a file uses.

An import runs when its file is imported, or is lazy (in a function, or by name), or is for types alone and never runs
(under `if TYPE_CHECKING:`). All three must not climb: each is something that a file knows of. Only what runs can close
a circle, early or late. Only what runs at once makes a chain, in which each file waits for the next.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

AT_ONCE, LAZY, FOR_TYPES = "at once", "lazy", "for types"


@dataclass(frozen=True)
class Import:
    """One file's import of another."""

    importer: str
    imported: str
    line: int
    # AT_ONCE, LAZY or FOR_TYPES.
    kind: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules_of(root: Path) -> dict[str, Path]:
    """{module: file} of the package in a folder."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(root: Path) -> list[Import]:
    """What the package's files import of the package, in the order of files and lines."""
    modules = modules_of(root)
    return [found for module, path in modules.items() for found in _read(module, path, set(modules))]


def _read(module: str, path: Path, modules: set[str]) -> list[Import]:
    found: dict[tuple[str, str], int] = {}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def note(name: str, line: int, kind: str) -> None:
        if name in modules and name != module:
            found.setdefault((name, kind), line)

    def visit(node: ast.AST, kind: str) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                note(alias.name, node.lineno, kind)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package that the file is in.
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                note(inner if inner in modules else source, node.lineno, kind)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            note(node.value, node.lineno, kind if kind == FOR_TYPES else LAZY)
        inside = kind
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and kind == AT_ONCE:
            inside = LAZY
        elif isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            for child in node.body:
                visit(child, FOR_TYPES)
            for child in node.orelse:
                visit(child, kind)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), AT_ONCE)
    return [Import(module, name, line, kind) for (name, kind), line in found.items()]


def room_of(module: str) -> str:
    """The folder, directly in the package, that a module is in."""
    return [*module.split("."), ""][1]


def upward(imports: Iterable[Import], floors: Mapping[str, int]) -> list[Import]:
    """Imports of any kind from a lower floor to a higher one."""
    return [i for i in imports if floors[room_of(i.imported)] > floors[room_of(i.importer)]]


def file_graph(imports: Iterable[Import], *kinds: str) -> dict[str, set[str]]:
    """{file: files that it imports} by imports of these kinds."""
    graph: dict[str, set[str]] = {}
    for i in imports:
        if i.kind in kinds:
            graph.setdefault(i.importer, set()).add(i.imported)
    return graph


def room_graph(imports: Iterable[Import], *kinds: str) -> dict[str, set[str]]:
    """{room: other rooms that its files import} by imports of these kinds."""
    graph: dict[str, set[str]] = {}
    for importer, imported in file_graph(imports, *kinds).items():
        graph.setdefault(room_of(importer), set()).update(map(room_of, imported))
    return {room: others - {room} for room, others in graph.items()}


def circle(graph: Mapping[str, Iterable[str]]) -> list[str] | None:
    """Some circle of a graph, its first node again at its end, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # The sorter's edges go from what is needed to what needs it.
        return error.args[1][::-1]
    return None


def longest_chain(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The longest path of a graph without circles, from the importing end on; the first by name of equal ones."""
    chains: dict[str, list[str]] = {}
    for node in TopologicalSorter(graph).static_order():
        behind = [chains[other] for other in sorted(graph.get(node, ()))]
        chains[node] = [node, *max(behind, key=len, default=[])]
    return max((chains[node] for node in sorted(chains)), key=len, default=[])
