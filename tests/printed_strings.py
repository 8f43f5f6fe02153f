"""What the package can print about diversity: its string constants and its pages' texts with a word of that subject."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOMS = ("cli", "analysis", "vendi", "selection", "report", "synthesis")
WORDS = re.compile(
    r"divers|g-vendi|more than noise|spars|near.duplicate|corrected|unlimited|grows with|no choice of|alike|"
    r"spread|entropy|mean cosine|direction|twin|eigenvalue|surpris|dominat|centred|in common|neighbour in|"
    r"random subset|unlike|at most|too few|saturat|ceiling",
    re.IGNORECASE,
)


def _template(node: ast.JoinedStr) -> str:
    """An f-string with {} where a value stands."""
    return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that may be printed: no docstrings, annotations, help of options, raised errors."""
    if isinstance(node, ast.Raise):
        return
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name.endswith("Error") or name.startswith("typer.") or name in ("re.compile", "Annotated"):
            return
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield node.value
        return
    if isinstance(node, ast.arguments):
        # Options of a command are in the annotations.
        yield from (default for default in (*node.defaults, *node.kw_defaults) if default is not None)
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            continue
        if child is getattr(node, "returns", None):
            continue
        yield child


def _strings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield _template(node)
        # Words inside a value, such as the two cases of a condition.
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from _strings(part.value)
        return
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
        return
    for child in _children(node):
        yield from _strings(child)


def _texts_of_page(text: str) -> Iterator[str]:
    """The texts between tags of a template, each with {} where a value stands; comments are left out."""
    text = re.sub(r"\{#.*?#\}", "", text, flags=re.S)
    text = re.sub(r"\{\{-?.*?-?\}\}", "{}", text, flags=re.S)
    text = re.sub(r"\{%.*?%\}", "", text, flags=re.S)
    for piece in re.split(r"<[^>]*>", text):
        yield from re.split(r"(?<=[.?!:])\s", piece)


def printed_strings(package: Path) -> list[tuple[str, str]]:
    """(file below the package, string with single spaces) for every printed string with one of WORDS."""
    found = []
    for room in ROOMS:
        for path in sorted((package / room).rglob("*")):
            if path.suffix == ".py":
                strings = _strings(ast.parse(path.read_text()))
            elif path.suffix == ".jinja":
                strings = _texts_of_page(path.read_text())
            else:
                continue
            name = path.relative_to(package).as_posix()
            for text in strings:
                text = " ".join(text.split())
                # A name of a field or a file is no sentence.
                if (
                    WORDS.search(text)
                    and not re.fullmatch(r"[\w.\-/*+]+", text)
                    and (name, text) not in found
                ):
                    found.append((name, text))
    return found
