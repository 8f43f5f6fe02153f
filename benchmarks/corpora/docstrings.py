"""Documentation strings of installed packages as rows of a prompt and a completion: English and code for `tiny`.

They are read from the source files of the packages installed (licences: PSF for Python, BSD for NumPy, SciPy and
PyTorch, Apache-2.0 for Transformers), so the same versions give the same text.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("numpy", "scipy", "torch", "transformers")
# Shorter ones say little more than the name does.
FEWEST_CHARACTERS = 200


def roots() -> Iterator[tuple[str, Path]]:
    """(name, folder) of the standard library and of every package."""
    yield "python", Path(sysconfig.get_paths()["stdlib"])
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{name} is not installed; its documentation is part of the text")
        yield name, Path(spec.origin).parent


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the documented modules, classes and functions of a folder, its tests left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part.startswith("test") or part == "site-packages" for part in parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= FEWEST_CHARACTERS:
                    yield getattr(node, "name", path.stem), text


def documentation() -> list[dict[str, str]]:
    """Rows: the first paragraph is what is asked about, the rest is the answer. Equal texts come once."""
    rows, seen = [], set()
    for package, root in roots():
        for name, text in docstrings(root):
            first, _, rest = text.partition("\n\n")
            if rest.strip() and text not in seen:
                seen.add(text)
                prompt = f"{name} ({package}): {first.strip()}"
                rows.append({"prompt": prompt, "completion": rest.strip(), "family": package})
    return rows
