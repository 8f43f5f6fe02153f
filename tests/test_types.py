"""The public API as a user's type checker sees it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USER = """
from collections.abc import Sequence

import numpy as np
import torch
from typing_extensions import assert_type

import gvendi_fast
from gvendi_fast import GradientSketcher, GvendiError, SketchSpec, VendiState, load_proxy, select, use_backend
from gvendi_fast.analysis.scoring import Score
from gvendi_fast.clusters import SphericalKMeans
from gvendi_fast.selection import Selection
from gvendi_fast.vendi.jackknife import Interval


def measure(ids: torch.Tensor, labels: torch.Tensor, rows: np.ndarray) -> Sequence[str]:
    assert_type(gvendi_fast.__version__, str)
    proxy = load_proxy("tiny", device="cpu")
    sketcher = GradientSketcher(proxy.model, SketchSpec(dim=256, seed=1), exclude=["*bias"])
    with use_backend("reference"):
        z = assert_type(sketcher(ids, labels), torch.Tensor)
    state = assert_type(VendiState(256).update(z), VendiState)
    assert_type(state.gvendi(), float)
    assert_type(state.gvendi(ci="jackknife", rows=z), Interval)
    assert_type(gvendi_fast.gvendi(rows), float)
    assert_type(gvendi_fast.jackknife(state, z).high, float)
    assert_type(gvendi_fast.group_gvendi(rows, list("ab")).gvendi, np.ndarray)
    assert_type(gvendi_fast.DiversityMeter(256).update(z, group=["a", 1]).compute(), dict[str, float])
    kmeans = SphericalKMeans(8).fit(rows)
    chosen = assert_type(select(rows, 3, quality=[1.0, 2.0], quotas={"a": 2}, groups=list("ab")), Selection)
    try:
        assert_type(gvendi_fast.score(["a.jsonl"], proxy=proxy, orders=[2]), Score)
    except GvendiError as error:
        return [str(error), str(kmeans.centroids.shape)]
    return chosen.ids
"""
# A line, and what the checker must say of it.
WRONG = {
    "gvendi_fast.vendi_score": "has no attribute",
    "gvendi_fast.select(rows, '3')": 'Argument 2 to "select"',
    "gvendi_fast.SketchSpec(dims=256)": 'Unexpected keyword argument "dims"',
    "size: int = gvendi_fast.VendiState(8).gvendi()": "Incompatible types in assignment",
    "gvendi_fast.VendiState(8).gvendi(ci='bootstrap', rows=rows)": "No overload variant",
    "gvendi_fast.DiversityMeter(window='4096')": 'Argument "window"',
    "gvendi_fast.load_proxy('tiny').tokens": "has no attribute",
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict[str, list[tuple[int, str]]]:
    """{file: [(line, error)]} of a right file and of a wrong one, with the settings and the cache of `make lint`."""
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed: the types of the public API are not checked here")
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(USER)
    head = ["import numpy as np", "import gvendi_fast", "rows = np.zeros((9, 8))"]
    (folder / "wrong.py").write_text("\n".join([*head, *WRONG]) + "\n")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--hide-error-context", "--no-error-summary",
         str(folder / "right.py"), str(folder / "wrong.py")],
        cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found: dict[str, list[tuple[int, str]]] = {"right.py": [], "wrong.py": []}
    for line in run.stdout.splitlines():
        if match := re.match(r"(.+?):(\d+): error: (.*)", line):
            found.setdefault(Path(match[1]).name, []).append((int(match[2]), match[3]))
    return found


def test_a_users_file_type_checks(findings):
    assert findings["right.py"] == []


def test_what_a_user_gets_wrong_is_found(findings):
    wrong = dict(findings["wrong.py"])
    assert sorted(wrong) == list(range(4, 4 + len(WRONG))), wrong
    for line, words in enumerate(WRONG.values(), 4):
        assert words in wrong[line], wrong[line]
    assert set(findings) == {"right.py", "wrong.py"}, findings
