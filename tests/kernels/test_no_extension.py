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

# An editable install would lend its compiled module to the copy.
PRELUDE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
from gvendi_fast import cli
"""
OPTIONS = ["--proxy", "tiny", "--dtype", "float32", "--dim", "64", "--out", "out", "--json"]
SCORE = PRELUDE + f"sys.argv = ['gvendi', 'score', 'data.jsonl', *{OPTIONS}]; cli.main()"
INFO = PRELUDE + "sys.argv = ['gvendi', 'info']; cli.main()"


@pytest.fixture
def bare(tmp_path):
    """The package as files, without its compiled module."""
    shutil.copytree(
        ROOT / "gvendi_fast", tmp_path / "gvendi_fast", ignore=shutil.ignore_patterns("_cpu*", "__pycache__")
    )
    rows = [{"prompt": f"{i} + 1?", "completion": f"{i + 1}"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


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


def test_package_without_extension_scores_and_says_that_it_is_slow(bare):
    done = run(bare, "-c", SCORE)
    assert done.returncode == 0, done.stderr
    assert "slow reference backend" in done.stderr
    assert "compiled kernels cannot be loaded" in done.stderr
    slow = sketches(bare / "out")
    shutil.rmtree(bare / "out")
    shutil.rmtree(bare / "gvendi_fast")
    fast = run(bare, "-c", SCORE, PYTHONPATH=str(ROOT))
    assert fast.returncode == 0, fast.stderr
    # Both add the same float32 activations; only the order of rounding differs.
    np.testing.assert_allclose(sketches(bare / "out"), slow, atol=1e-5 * np.abs(slow).max())


def test_info_gives_the_reason(bare):
    done = run(bare, "-c", INFO)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("backend cpu"))
    assert "cannot be loaded" in line
    assert "GVENDI_REQUIRE_EXT=1" in line


def test_backend_asked_for_by_name_raises_with_the_reason(bare):
    done = run(bare, "-c", SCORE, GVENDI_BACKEND="cpu")
    assert done.returncode == 1
    assert "backend 'cpu' was requested but cannot run" in done.stderr


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
