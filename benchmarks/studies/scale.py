"""What grows with the rows and the work units of a large run, in bytes of one: of memory and on disk.

    python -m benchmarks.studies.scale

Each is the difference between a large and a small case, in a process of its own: work units of an indexed corpus in
memory and in units.json; a row of a run directory's pool, with the ids that rows without one have; a stored row beside
its sketch. Bytes do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import ROOT, describe_machine

OUT = ROOT / "benchmarks" / "results" / "scale.json"
ROWS, UNITS, PARTS, DIM = 400_000, 100_000, 20, 64
# Ids of rows that have none, as those of Common Crawl's texts might be called.
FILE = "data/part-00012.jsonl"


def resident() -> int:
    """Bytes that this process holds of the machine's memory (Linux)."""
    import pyarrow as pa

    gc.collect()
    # What Arrow's allocator keeps for later is nobody's.
    pa.default_memory_pool().release_unused()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def units_in_memory(folder: Path) -> float:
    """Bytes of a work unit of an index: the same rows as units of one row, less those as one unit."""
    few, many = (_elsewhere(_indexed, folder, rows)[0] for rows in (UNITS, 1))
    return (many - few) / (UNITS - 1)


def units_on_disk(folder: Path) -> float:
    """Bytes of a work unit in units.json."""
    few, many = (_indexed(folder, rows)[1] for rows in (UNITS, 1))
    return (many - few) / (UNITS - 1)


def _indexed(folder: Path, rows: int) -> tuple[int, int]:
    """(bytes held, bytes of units.json) of a corpus cut into work units of so many rows."""
    from gvendi_fast.data.index import index_corpus

    path = folder / "rows.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(UNITS)))
    before = resident()
    manifest = index_corpus(path, rows_per_unit=rows)
    return resident() - before, len(json.dumps(manifest.to_dict(), indent=1))


def _made_run(folder: Path, rows: int, parts: int, dim: int) -> Path:
    from gvendi_fast.data.run_directory import Part, RunDirectory

    per = rows // parts
    source = {"path": FILE, "kind": "jsonl", "size": 1, "rows": rows, "digest": ""}
    manifest = {
        "units_total": parts,
        "rows": rows,
        "rows_per_unit": per,
        "limit": None,
        "fields": {},
        "files": [source],
    }
    run = RunDirectory.open(
        folder / f"run-{rows}-{dim}", {"sketch": {"dim": dim, "kind": "hadamard"}}, manifest
    )
    kinds = ("embedding and head", "attention", "mlp", "norm")
    for unit in range(parts):
        numbers = np.arange(unit * per, (unit + 1) * per)
        sketches = np.random.default_rng(unit).standard_normal((per, dim)).astype(np.float32)
        ones = {name: np.ones(per) for name in ("tokens", "length", "loss", "gradient_norm")}
        shares = {kind: np.full(per, 0.25, np.float32) for kind in kinds}
        ids = [f"{FILE}:{number + 1}" for number in numbers]
        run.write_part(Part(unit, ids, [""] * per, numbers, sketches, **ones, norm_shares=shares))
    return run.path


def _elsewhere(function: Callable[..., Any], *given: Any) -> Any:
    """What a function returns in a process of its own, whose freed memory nothing of this one can take."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def row_of_a_pool(folder: Path) -> float:
    """Bytes of a row that a pool holds of a run directory, with one column of numbers in use."""
    from gvendi_fast.data.pool import as_pool

    path = _elsewhere(_made_run, folder, ROWS, PARTS, DIM)
    # What is imported at the first use is no row's.
    as_pool(_made_run(folder, 100, 1, DIM)).numbers("row")
    before = resident()
    pool = as_pool(path)
    pool.numbers("row")
    return (resident() - before) / len(pool)


def beside_the_sketch(folder: Path) -> float:
    """Bytes of a row of a part less those of its sketch."""
    rows, dim = 4096, 256
    path = _made_run(folder, rows, 1, dim)
    size = sum(file.stat().st_size for file in (path / "parts").iterdir())
    return size / rows - 4 * dim


MEASURES: dict[str, tuple[Callable[[Path], float], str]] = {
    "a unit in memory": (units_in_memory, "of an index of work units of one row"),
    "a unit on disk": (units_on_disk, "in units.json"),
    "a row of a pool": (row_of_a_pool, f"ids such as {FILE}:12345, one column of numbers in use"),
    "beside the sketch": (beside_the_sketch, f"ids such as {FILE}:1234, shares of four kinds of layers"),
}


def main() -> None:
    """Measure each in a process of its own, and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--one", choices=MEASURES, help="measure this one and print it")
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            print(MEASURES[args.one][0](Path(folder)))
        return
    found = {}
    for name, (_, what) in MEASURES.items():
        command = [sys.executable, "-m", "benchmarks.studies.scale", "--one", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        found[name] = {"value": round(float(out), 1), "unit": "bytes", "what": what}
        print(name, found[name]["value"])
    content = {"machine": describe_machine(), "bytes": found}
    OUT.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
