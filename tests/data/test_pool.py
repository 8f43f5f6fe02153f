"""Pools: the same rows from a matrix and from a run directory, in blocks and by number."""

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import Part, RunDirectory


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)


@pytest.fixture
def run(rows, tmp_path):
    made = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 64}}, {"files": [], "units_total": 3})
    # The middle unit has no accepted row.
    for unit, (first, last) in enumerate(((0, 20), (20, 20), (20, 50))):
        n = last - first
        made.write_part(
            Part(
                unit,
                ids=[f"r{i}" for i in range(first, last)],
                groups=["even" if i % 2 == 0 else "odd" for i in range(first, last)],
                rows=np.arange(first, last),
                sketches=rows[first:last],
                tokens=np.full(n, 3),
                length=np.full(n, 5),
                loss=np.arange(first, last, dtype=np.float32),
                gradient_norm=np.ones(n),
            )
        )
    return made


def test_a_run_directory_is_the_matrix_it_was_made_from(rows, run):
    matrix, stored = as_pool(rows), as_pool(run.path)
    assert len(stored) == len(matrix) == 50
    assert stored.ids[21] == "r21"
    assert stored.groups[21] == "odd"
    assert stored.numbers("loss")[21] == 21
    unit = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    for pool in (matrix, stored):
        for _ in range(2):
            seen = list(pool.blocks())
            torch.testing.assert_close(torch.cat([block for _, block in seen]), unit)
            assert [first for first, _ in seen] == list(
                np.cumsum([0, *(len(block) for _, block in seen[:-1])])
            )
        wanted = [49, 0, 19, 20, 20]
        torch.testing.assert_close(pool.take(wanted), unit[wanted])


def test_what_a_pool_refuses(rows, run):
    with pytest.raises(GvendiError, match="give a run directory"):
        as_pool(rows).numbers("loss")
    with pytest.raises(GvendiError, match="'color' is not a number"):
        as_pool(run).numbers("color")
    rows[7] = 0
    with pytest.raises(GvendiError, match="row 7 of rows has norm"):
        list(as_pool(rows).blocks())
