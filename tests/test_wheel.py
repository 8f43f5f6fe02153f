"""What the wheel holds: every file of the package and nothing else, and no module that tests alone use."""

import subprocess
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest
from imports import imports_of, modules_of

from gvendi_fast.kernels.backends import NAMES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gvendi_fast"
# Without one of these a command, or a type checker, fails on the user's machine.
DATA = (
    "py.typed",
    "assets/tiny/config.json",
    "assets/tiny/model.safetensors",
    "assets/tiny/tokenizer.json",
    "kernels/backends/measured.json",
    "report/templates/report.css",
    "report/templates/report.html.jinja",
    "synthesis/tasks/templates/math_problem.j2",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Files of the package as setuptools collects them for a wheel; compiled modules and metadata join them later."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: the file list of the wheel cannot be made")
    folder = tmp_path_factory.mktemp("wheel")
    # What `pip wheel` runs first, without the compiler: 1 s instead of minutes.
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def of_package(*skipped: str) -> set[str]:
    """Files of the package in the tree, relative to the root."""
    found = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file()}
    return {name for name in found if not any(fnmatch(name, pattern) for pattern in skipped)}


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel):
    assert wheel == of_package("*/__pycache__/*", "*.so", "*.pyd")


def test_data_files_are_in_it(wheel):
    assert {f"gvendi_fast/{name}" for name in DATA} <= wheel
    templates = {path.name for path in PACKAGE.rglob("*") if path.suffix in (".jinja", ".j2", ".css")}
    assert templates <= {Path(name).name for name in wheel}


def test_every_room_is_a_package_in_it(wheel):
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert len(folders) >= 10
    assert {str((folder / "__init__.py").relative_to(ROOT)) for folder in folders} <= wheel


def test_nothing_of_tests_or_benchmarks_is_in_it(wheel):
    assert {name.split("/")[0] for name in wheel} == {"gvendi_fast"}
    tests = {path.name for path in ROOT.rglob("test_*.py")} | {"conftest.py"}
    assert len(tests) > 50
    assert tests & {Path(name).name for name in wheel} == set()


def unused(root: Path) -> set[str]:
    """Modules that no file of the package imports, packages aside."""
    used = {found.imported for found in imports_of(root)}
    return {m for m, path in modules_of(root).items() if m not in used and path.name != "__init__.py"}


def test_no_module_in_it_is_for_tests_alone():
    # Backends' names are put together at run time, and python -m runs a __main__.
    backends = {f"gvendi_fast.kernels.backends.{name}" for name in NAMES}
    assert unused(PACKAGE) <= backends | {"gvendi_fast.__main__", "gvendi_fast.cli.__main__"}


def test_a_module_for_tests_alone_is_found(tmp_path):
    package = tmp_path / "house"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("from house.room.used import x\n")
    for name in ("__init__", "used", "planted"):
        (package / "room" / f"{name}.py").write_text("")
    assert unused(package) == {"house.room.planted"}
