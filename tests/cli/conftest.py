"""What tests of the command line share."""

import numpy as np
import pytest

from gvendi_fast.data.index import Fields
from gvendi_fast.data.run_directory import Part, RunDirectory


@pytest.fixture
def run(tmp_path):
    """A run directory of made up sketches."""
    n, dim = 10, 64
    spec = {
        "sketch": {"dim": dim, "kind": "hadamard"},
        "coverage": {"sketched": 1, "total": 1},
        "proxy": {"name": "none"},
        "dtype": "float32",
    }
    source = {"path": "nowhere.jsonl", "kind": "jsonl", "size": 1, "rows": n, "digest": ""}
    manifest = {"units_total": 1, "rows": n, "limit": None, "fields": vars(Fields()), "files": [source]}
    made = RunDirectory.open(tmp_path / "run", spec, manifest)
    ones = {name: np.ones(n) for name in ("tokens", "length", "loss", "gradient_norm")}
    sketches = np.random.default_rng(0).standard_normal((n, dim)).astype(np.float32)
    made.write_part(
        Part(0, ids=[f"{i}" for i in range(n)], groups=[""] * n, rows=np.arange(n), sketches=sketches, **ones)
    )
    return made
