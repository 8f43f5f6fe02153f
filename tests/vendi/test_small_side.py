"""27 rows of 8192 numbers cost matrices of 27 rows, not of 8192: no eigensolver is handed a larger one."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from gvendi_fast.analysis.compare import compare
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.selection import select, selection
from gvendi_fast.vendi import VendiState
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


def test_few_rows_wider_than_any_matrix_of_their_width():
    rows = torch.eye(3, 1 << 22)
    assert gvendi_of(rows) == pytest.approx(3)


@pytest.mark.parametrize("absent", ["coverage", "sketch"])
def test_a_spec_that_lacks_a_setting_is_an_error_with_its_name(absent, gvendi, tmp_path):
    spec = {key: value for key, value in {**SPEC, "sketch": {"dim": 8}}.items() if key != absent}
    run = RunDirectory.open(tmp_path / "run", spec, {"units_total": 1})
    numbers = {name: np.ones(5) for name in ("tokens", "length", "loss", "gradient_norm")}
    rows = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)
    run.write_part(Part(0, ids=[*"abcde"], groups=[""] * 5, rows=np.arange(5), sketches=rows, **numbers))
    code, _, err = gvendi("score", run.path)
    assert (code, f"spec.json' has no int '{absent}" in err) == (1, True), err


# What goes together: a state has no rows to be represented, and none from which a mean could be taken.
SELECTIONS = [
    (objective, method, center, given)
    for objective in ("vendi", "logdet", "facility", "quality")
    for method in ("lazy", "stochastic", "two-round", "relaxed")
    for center in (False, True)
    for given in (None, "rows", "state")
    if not (method == "relaxed" and objective in ("logdet", "facility"))
    and not (given == "state" and (center or objective == "facility"))
]


@pytest.mark.parametrize(("objective", "method", "center", "given"), SELECTIONS)
def test_a_selection_among_few_rows_uses_the_small_side(
    objective, method, center, given, handed, monkeypatch
):
    rows, dim = np.random.default_rng(1).standard_normal((N + 5, 128), dtype=np.float32), 128
    # A copy must stay one, and rows lean so that they are chosen for more than their noise.
    rows[3] = rows[8]
    rows += np.linspace(0, 3, N + 5, dtype=np.float32)[:, None] * rows[:1]
    include = {None: None, "rows": rows[N:], "state": VendiState(dim).update(rows[N:])}[given]
    more = {"quality": 1 + np.arange(N) / 9} if objective == "quality" else {}
    choose = partial(
        select, rows[:N], 9, objective, method=method, must_include=include, center=center, **more
    )
    handed.clear()
    found = choose(draws=2)
    assert max(handed) <= N + 5 + 8
    # At full width, as of more rows.
    monkeypatch.setattr(selection, "small_side", lambda problem: problem)
    wide = choose(draws=2)
    assert max(handed) == dim or given is None
    assert sorted(found.ids) == sorted(wide.ids)
    assert (found.ids == wide.ids) or method == "relaxed"
    for name in ("value", "gvendi", *(["centered"] if center else [])):
        assert getattr(found, name) == pytest.approx(getattr(wide, name), rel=1e-6), name
    for name in ("gain", "surprisal"):
        by_id = [dict(zip(of.ids, getattr(of, name), strict=True)) for of in (found, wide)]
        assert by_id[0] == pytest.approx(by_id[1], abs=2e-5), name
    assert found.random.gvendi == pytest.approx(wide.random.gvendi, rel=1e-6)


def test_a_pool_of_27_wide_rows_fits_the_default_memory(handed):
    rows = np.random.default_rng(0).standard_normal((N, K), dtype=np.float32)
    assert select(rows, 9, draws=0).gvendi <= 9
    assert max(handed) <= N


def test_a_block_of_few_rows_alone_uses_the_small_side(handed):
    unit = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(2).standard_normal((N, 512))))
    (gain,) = VendiState(512).block_gain(unit, torch.tensor([0, N])).tolist()
    assert handed == [N]
    assert gain == pytest.approx(np.log(gvendi_of(unit)), rel=1e-9)


def test_a_comparison_of_few_rows_uses_the_small_side(handed):
    sets = {
        name: np.random.default_rng(i).standard_normal((N, 512), np.float32) for i, name in enumerate("ab")
    }
    found = compare(sets)
    assert max(handed) <= 2 * N
    both = np.concatenate(list(sets.values()))
    assert found.union == pytest.approx(gvendi_of(both), rel=1e-9)
    # Of 40 numbers it takes the covariance, as of any more rows.
    few = VendiState(40)
    for rows in sets.values():
        few.merge(VendiState(40).update(rows[:, :40]))
    assert compare({name: rows[:, :40] for name, rows in sets.items()}).union == few.gvendi()
