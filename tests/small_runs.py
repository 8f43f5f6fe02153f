"""Run directories of a few work units: of two, of this version and of an earlier one, and of six with three sources."""

from pathlib import Path

import numpy as np
from damage import strip

from gvendi_fast.data.run_directory import Part, RunDirectory

SPEC = {
    "format": 2,
    "proxy": {"name": "tiny", "revision": "sha256:0"},
    "sketch": {"kind": "hadamard", "dim": 8, "seed": 0},
    "dtype": "float32",
    "mask": "completion",
    "template": None,
    "max_tokens": 256,
    "exclude": [],
    "coverage": {"sketched": 10, "total": 10},
}
MANIFEST = {
    "units_total": 2,
    "rows": 8,
    "duplicates": 0,
    "rows_per_unit": 4,
    "limit": None,
    "fields": {
        "prompt": "prompt",
        "completion": "completion",
        "messages": "messages",
        "text": "text",
        "id": "id",
        "by": None,
    },
    "files": [{"path": "a.jsonl", "kind": "jsonl", "size": 90, "rows": 8, "digest": "00"}],
}


def make_run(path: Path, is_old: bool) -> Path:
    """Write it; one of an earlier version has parts without stamps."""
    run = RunDirectory.open(path, SPEC, MANIFEST)
    for unit in range(2):
        draw = np.random.default_rng(unit)
        ones = {name: np.ones(4) for name in ("tokens", "length", "loss", "gradient_norm")}
        rows = np.arange(4) + 4 * unit
        ids, sketches = list(map(str, rows)), draw.standard_normal((4, 8)).astype(np.float32)
        run.write_part(Part(unit, ids, [""] * 4, rows, sketches, **ones))
        if is_old:
            strip(run.parts / f"part-{unit:06d}.parquet")
    run.finish()
    return run.path


def make_sources(path: Path) -> Path:
    """One of six work units of ten rows, of the sources "source 0" to "source 2" in turn."""
    manifest = {
        "units_total": 6,
        "rows": 60,
        "rows_per_unit": 10,
        "fields": {"by": "source"},
        "files": [{"path": "d.jsonl", "rows": 60}],
    }
    run = RunDirectory.open(path, {"sketch": {"dim": 16}}, manifest)
    draw, ones = np.random.default_rng(0), np.ones(10)
    for unit in range(6):
        rows = np.arange(10) + unit * 10
        sketches = draw.standard_normal((10, 16)).astype(np.float32)
        groups = [f"source {row % 3}" for row in rows]
        run.write_part(Part(unit, [*map(str, rows)], groups, rows, sketches, ones, ones, ones, ones))
    return run.path
