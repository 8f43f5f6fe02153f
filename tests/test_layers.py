"""The house keeps its floors: imports go down, files and rooms form no circle, and the package itself stays light."""

import itertools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from imports import (
    AT_ONCE,
    FOR_TYPES,
    LAZY,
    Import,
    circle,
    file_graph,
    imports_of,
    longest_chain,
    modules_of,
    room_graph,
    room_of,
    upward,
)
from places import PACKAGE

# {room: floor}; "" is the public face, the package's own __init__.py.
FLOORS = {
    "base": 1,
    "kernels": 2,
    "data": 2,
    "vendi": 3,
    "clusters": 3,
    "sketching": 3,
    "analysis": 4,
    "selection": 4,
    "engines": 4,
    "report": 5,
    "": 6,
    "__main__": 7,
    "synthesis": 6,
    "integrations": 6,
    "cli": 7,
}
MOST_FLOORS, MOST_FILES = 7, 12


@pytest.fixture(scope="module")
def imports():
    return imports_of(PACKAGE)


def test_every_file_is_in_a_room_and_every_room_on_a_floor():
    assert {module: room_of(module) for module in modules_of(PACKAGE) if room_of(module) not in FLOORS} == {}
    assert len(set(FLOORS.values())) <= MOST_FLOORS


def test_no_import_climbs(imports):
    assert list(map(str, upward(imports, FLOORS))) == []


def test_neither_files_nor_rooms_form_a_circle(imports):
    assert circle(file_graph(imports, AT_ONCE, LAZY)) is None
    assert circle(room_graph(imports, AT_ONCE, LAZY)) is None


def test_the_longest_chain_of_files_is_short(imports, capsys):
    chain = longest_chain(file_graph(imports, AT_ONCE))
    with capsys.disabled():
        print(f"\nlongest chain of imports, {len(chain)} files: {' -> '.join(chain)}")
    assert len(chain) <= MOST_FILES


def test_importing_the_package_needs_torch_and_numpy_only():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import gvendi_fast; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['gvendi_fast']"


# A house in small, with imports of every form that go down or stay in their room.
HOUSE = {
    "__init__.py": "from house.base.files import write\n",
    "base/__init__.py": "",
    "base/files.py": "import os\n",
    "data/__init__.py": "from . import rows\n",
    "data/rows.py": "import house.base.files\nfrom house.base import files\n",
    "data/pool.py": "from .rows import row\nfrom ..base.files import write\n",
    "cli/__init__.py": "def main():\n    from house import data, write\n",
}
HOUSE_FLOORS = {"base": 1, "data": 2, "vendi": 2, "": 3, "cli": 4}


def house(folder: Path, added: Mapping[str, str] = MappingProxyType({})) -> list[Import]:
    """Imports of the small house in a folder, with {file: lines} added to it."""
    for name in {**HOUSE, **added}:
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HOUSE.get(name, "") + added.get(name, ""))
    return imports_of(folder / "house")


def test_every_form_of_import_is_read(tmp_path):
    assert [(i.importer, i.imported, i.line, i.kind) for i in house(tmp_path)] == [
        ("house", "house.base.files", 1, AT_ONCE),
        ("house.cli", "house.data", 2, LAZY),
        ("house.cli", "house", 2, LAZY),
        ("house.data", "house.data.rows", 1, AT_ONCE),
        ("house.data.pool", "house.data.rows", 1, AT_ONCE),
        ("house.data.pool", "house.base.files", 2, AT_ONCE),
        ("house.data.rows", "house.base.files", 1, AT_ONCE),
    ]


def test_a_house_in_order_passes(tmp_path):
    imports = house(tmp_path)
    assert upward(imports, HOUSE_FLOORS) == []
    assert circle(file_graph(imports, AT_ONCE, LAZY)) is circle(room_graph(imports, AT_ONCE, LAZY)) is None
    at_once = ["house.data", "house.data.rows", "house.base.files"]
    assert longest_chain(file_graph(imports, AT_ONCE)) == at_once
    assert longest_chain(file_graph(imports, AT_ONCE, LAZY)) == ["house.cli", *at_once]


@pytest.mark.parametrize(
    ("planted", "imported"),
    [
        ("from house.cli import main\n", "house.cli"),
        ("def write():\n    from house.data.pool import pool\n", "house.data.pool"),
        (
            "class File:\n    def write(self):\n        if self:\n            import house.data.rows\n",
            "house.data.rows",
        ),
        ("from house import write\n", "house"),
        ("import importlib\nfound = importlib.import_module('house.data.rows')\n", "house.data.rows"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.data import rows\n",
            "house.data.rows",
        ),
    ],
    ids=["at the top", "lazy", "in a method", "of the public face", "by name", "for types"],
)
def test_a_planted_upward_import_is_found(planted, imported, tmp_path):
    found = upward(house(tmp_path, {"base/files.py": planted}), HOUSE_FLOORS)
    assert [(i.importer, i.imported) for i in found] == [("house.base.files", imported)]


@pytest.mark.parametrize("lazy", [False, True], ids=["at the top", "lazy"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_planted_circle_of_files_is_found(count, lazy, tmp_path):
    names = ["one", "two", "three"][:count]
    planted = {}
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        line = f"from house.data.{following} import x\n"
        # One lazy import is enough to hide the circle from Python.
        planted[f"data/{name}.py"] = f"def f():\n    {line}" if lazy and name == "one" else line
    imports = house(tmp_path, planted)
    assert upward(imports, HOUSE_FLOORS) == []
    found = circle(file_graph(imports, AT_ONCE, LAZY))
    assert found[0] == found[-1]
    assert set(found) == {f"house.data.{name}" for name in names}
    # In the order of the imports.
    assert all(b in file_graph(imports, AT_ONCE, LAZY)[a] for a, b in itertools.pairwise(found))


def test_a_planted_circle_of_rooms_whose_files_form_none_is_found(tmp_path):
    imports = house(
        tmp_path,
        {
            "vendi/state.py": "from house.data.rows import row\n",
            "vendi/gains.py": "",
            "data/other.py": "from house.vendi.gains import gains\n",
        },
    )
    assert upward(imports, HOUSE_FLOORS) == []
    assert circle(file_graph(imports, AT_ONCE, LAZY)) is None
    assert set(circle(room_graph(imports, AT_ONCE, LAZY))) == {"data", "vendi"}


def test_imports_for_types_close_no_circle(tmp_path):
    planted = "if typing.TYPE_CHECKING:\n    from house.data.pool import pool\nelse:\n    import house.base\n"
    imports = house(tmp_path, {"data/rows.py": planted})
    assert circle(file_graph(imports, AT_ONCE, LAZY)) is None
    assert {(i.imported, i.kind) for i in imports if i.importer == "house.data.rows"} == {
        ("house.base.files", AT_ONCE),
        ("house.data.pool", FOR_TYPES),
        ("house.base", AT_ONCE),
    }


def test_a_room_without_a_floor_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="attic"):
        upward(house(tmp_path, {"attic/old.py": "from house.base import files\n"}), HOUSE_FLOORS)
