"""Without a compiler the package installs, says that it is slow, and gives the same sketches."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import PACKAGE, ROOT

# An editable install would lend its compiled module to the copy. Three commands share what a process takes to start.
CODE = """
import contextlib, io, json, os, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
from gvendi_fast import cli

found = {}
for name, backend, arguments in json.loads(sys.argv[1]):
    os.environ.pop("GVENDI_BACKEND", None)
    os.environ.update(backend)
    out, err = io.StringIO(), io.StringIO()
    sys.argv, code = ["gvendi", *arguments], 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    found[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(found))
"""
SCORE = [
    "score",
    "data.jsonl",
    "--proxy",
    "tiny",
    "--dtype",
    "float32",
    "--dim",
    "64",
    "--out",
    "out",
    "--json",
]


def write_rows(folder: Path) -> None:
    rows = [{"prompt": f"{i} + 1?", "completion": f"{i + 1}"} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The package as files, without its compiled module: the folder, and (exit code, output, errors) by command."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(
        ROOT / "gvendi_fast", folder / "gvendi_fast", ignore=shutil.ignore_patterns("_cpu*", "__pycache__")
    )
    write_rows(folder)
    commands = [("info", {}, ["info"]), ("by name", {"GVENDI_BACKEND": "cpu"}, SCORE), ("score", {}, SCORE)]
    done = run(folder, "-c", CODE, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def run(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
    )


def sketches(folder: Path) -> np.ndarray:
    from gvendi_fast.data.run_directory import RunDirectory

    return np.concatenate([part.sketches for part in RunDirectory.load(folder).iterate(["sketch"])])


def test_package_without_extension_scores_and_says_that_it_is_slow(bare, gvendi, tmp_path, monkeypatch):
    folder, found = bare
    code, _, told = found["score"]
    assert code == 0, told
    assert "slow reference backend" in told
    assert "compiled kernels cannot be loaded" in told
    slow = sketches(folder / "out")
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, told = gvendi(*SCORE)
    assert code == 0, told
    # Both add the same float32 activations; only the order of rounding differs.
    np.testing.assert_allclose(sketches(tmp_path / "out"), slow, atol=1e-5 * np.abs(slow).max())


def test_info_gives_the_reason(bare):
    code, shown, told = bare[1]["info"]
    assert code == 0, told
    line = next(line for line in shown.splitlines() if line.startswith("backend cpu"))
    assert "cannot be loaded" in line
    assert "GVENDI_REQUIRE_EXT=1" in line


def test_backend_asked_for_by_name_raises_with_the_reason(bare):
    code, _, told = bare[1]["by name"]
    assert code == 1
    assert "backend 'cpu' was requested but cannot run" in told


@pytest.mark.parametrize("required", ["0", "1"])
def test_failed_build_is_fatal_only_if_asked(tmp_path, required):
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "gvendi_fast" / "base").mkdir(parents=True)
    shutil.copy(PACKAGE / "base" / "_version.py", tmp_path / "gvendi_fast" / "base")
    for package in ("", "base"):
        (tmp_path / "gvendi_fast" / package / "__init__.py").touch()
    done = run(tmp_path, "setup.py", "build_ext", CXX="/bin/false", GVENDI_REQUIRE_EXT=required)
    assert (done.returncode != 0) == (required == "1"), done.stderr
    if required == "0":
        assert "the compiled kernels were NOT built" in done.stderr
