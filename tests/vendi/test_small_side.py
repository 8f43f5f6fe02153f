"""27 rows of 8192 numbers cost matrices of 27 rows, not of 8192: no eigensolver is handed a larger one."""

import json

import numpy as np
import pytest
import torch

from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.vendi import gvendi as gvendi_of

N, K = 27, 8192
SPEC = {"sketch": {"dim": K}, "coverage": {"sketched": 1, "total": 1}, "proxy": {"name": "none"}}


@pytest.fixture
def handed(monkeypatch):
    """The sides of all matrices that an eigensolver or a decomposition is handed."""
    sides = []
    places = [(where, name) for where in (torch.linalg, np.linalg) for name in ("eigh", "eigvalsh", "svd")]
    for where, name in [*places, (torch.linalg, "svdvals")]:
        monkeypatch.setattr(where, name, _counted(getattr(where, name), sides))
    return sides


def _counted(own, sides):
    def spy(matrix, *args, **more):
        sides.append(matrix.shape[-1])
        assert sides[-1] < K, "before it takes minutes"
        return own(matrix, *args, **more)

    return spy


def test_a_score_of_few_rows_uses_the_small_side(gvendi, handed, tmp_path):
    rows = np.random.default_rng(0).standard_normal((N, K), dtype=np.float32)
    run = RunDirectory.open(tmp_path / "run", SPEC, {"units_total": 1})
    numbers = {name: np.ones(N) for name in ("tokens", "length", "loss", "gradient_norm")}
    ids = [str(i) for i in range(N)]
    run.write_part(Part(0, ids=ids, groups=[""] * N, rows=np.arange(N), sketches=rows, **numbers))
    code, out, err = gvendi("score", run.path, "--json")
    assert code == 0, err
    assert handed
    assert max(handed) <= N + 1
    assert json.loads(out)["gvendi"] == pytest.approx(gvendi_of(rows), rel=1e-6)


@pytest.mark.parametrize("absent", ["coverage", "sketch"])
def test_a_spec_that_lacks_a_setting_is_an_error_with_its_name(absent, gvendi, tmp_path):
    spec = {key: value for key, value in {**SPEC, "sketch": {"dim": 8}}.items() if key != absent}
    run = RunDirectory.open(tmp_path / "run", spec, {"units_total": 1})
    numbers = {name: np.ones(5) for name in ("tokens", "length", "loss", "gradient_norm")}
    rows = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)
    run.write_part(Part(0, ids=[*"abcde"], groups=[""] * 5, rows=np.arange(5), sketches=rows, **numbers))
    code, _, err = gvendi("score", run.path)
    assert (code, f"spec.json' has no int '{absent}" in err) == (1, True), err
