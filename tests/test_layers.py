"""The house keeps its floors: a module imports lower floors only, and the package itself stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gvendi_fast"
FLOORS = {
    "base": 0,
    "errors": 0,
    "_version": 0,
    "plan": 1,
    "signs": 1,
    "spectrum": 1,
    "transfer": 1,
    "reference": 1,
    "rows": 1,
    "unit_rows": 1,
    "sources": 1,
    "chat": 1,
    "text": 1,
    "units": 1,
    "corpus": 1,
    "hub": 1,
    "attention": 1,
    "short_attention": 1,
    "proxy": 1,
    "atomic": 1,
    "parts": 1,
    "store": 1,
    "originals": 1,
    "figures": 1,
    "report": 1,
    "backends": 2,
    "checks": 3,
    "row_ops": 3,
    "ops": 3,
    "batch": 4,
    "sketches": 4,
    "norms": 4,
    "taps": 4,
    "layer_ops": 4,
    "probe": 4,
    "compiled": 4,
    "head": 4,
    "gradients": 4,
    "similarity": 4,
    "second_moment": 4,
    "state": 4,
    "gains": 4,
    "jackknife": 4,
    "decompose": 4,
    "mixture": 4,
    "vendi": 4,
    "groups": 4,
    "pool": 4,
    "seeding": 4,
    "tally": 4,
    "clusters": 4,
    "neighbours": 5,
    "compare": 5,
    "row_texts": 5,
    "measures": 5,
    "memory": 5,
    "sketching": 5,
    "scoring": 5,
    "group_scoring": 5,
    "selection": 5,
    "report_rows": 5,
    "report_data": 5,
    "synthesis": 5,
    "about": 6,
    "options": 7,
    "commands": 7,
    "cli": 7,
}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def floor_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Names of the package's own modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "gvendi_fast":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gvendi_fast."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gvendi_fast.")}
    return found


def test_every_module_has_a_floor():
    assert {floor_name(path) for path in modules()} == set(FLOORS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_do_not_climb(path):
    own = FLOORS[floor_name(path)]
    for name in imports_of(path) - {floor_name(path)}:
        if name in FLOORS:
            assert FLOORS[name] <= own, f"{path.name} (floor {own}) imports {name} (floor {FLOORS[name]})"


def test_same_floor_imports_have_no_cycle():
    graph = {floor_name(path): set() for path in modules()}
    for path in modules():
        graph[floor_name(path)] |= (imports_of(path) & set(FLOORS)) - {floor_name(path)}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        for following in graph[name]:
            visit(following, (*trail, name))

    for name in graph:
        visit(name, ())


def test_importing_the_package_needs_torch_and_numpy_only():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import gvendi_fast; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['gvendi_fast']"
