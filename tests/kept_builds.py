"""Compiled code that stays from one run of the tests to the next, for as long as it would be made of the same again."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from places import ROOT

KEPT = ROOT / ".pytest_cache" / "d"


def kept(name: str, *compilers: str, extra: str = "") -> Path:
    """The folder of the build `name` of csrc/, empty where any of its ingredients is new; those before are removed.

    Ingredients: the sources, CMakeLists.txt, versions of the package, Python and pybind11, what the compilers call
    themselves, and `extra`.
    """
    found = hashlib.sha256(f"{sys.version} {sys.executable} {version('pybind11')} {extra}".encode())
    others = [ROOT / "CMakeLists.txt", ROOT / "gvendi_fast" / "base" / "_version.py"]
    for path in sorted([*others, *(ROOT / "csrc").rglob("*.*")]):
        found.update(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for command in filter(shutil.which, compilers):
        found.update(subprocess.run([command, "--version"], capture_output=True, check=True).stdout)
    folder = KEPT / name / found.hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        # A checkout that cannot be written to.
        return Path(tempfile.mkdtemp())
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder
