"""A pool far beyond memory: score, clusters and relaxed selection of synthetic sketches, alone and through Ray.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.large_pool FOLDER [--rows 10000000] [--engines local,ray] [--out FILE]

Makes a run directory in FOLDER part by part: rows near one of 2,000 directions, drawn by Zipf's law, some near a second
one, and noise. Then, each in a process of its own: score; 1,000 clusters with so many iterations, and each row's label;
relaxed selection with its gap and random subsets beside. Of each: seconds (and of this process' processor), passes over
the pool, and the peak resident memory of this process and of the largest worker. What is in FILE already is not done
again, so that it can run in pieces; parts that exist are kept. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import ROOT, describe_machine
from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.engine import Engine, LocalEngine
from gvendi_fast.clusters.kmeans import SphericalKMeans
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.selection import select

DIM, DIRECTIONS, UNIT_ROWS, SOURCES = 1024, 2000, 2048, 8
# Lengths of a second direction and of the noise, beside 1 for the first.
SECOND, NOISE = 0.5, 0.9
SECTIONS = ("score", "clusters", "relaxed")


def make(folder: Path, rows: int, store: str) -> float:
    """The run directory with so many rows; returns the seconds that the missing parts took."""
    units = -(-rows // UNIT_ROWS)
    spec: dict[str, Any] = {"sketch": {"dim": DIM}, "coverage": {"sketched": 1, "total": 1}}
    spec |= {} if store == "float32" else {"store": store}
    files = [{"path": "synthetic.jsonl", "kind": "jsonl", "size": rows, "rows": rows, "digest": "none"}]
    manifest = {"files": files, "units_total": units, "rows": rows, "rows_per_unit": UNIT_ROWS}
    run = RunDirectory.open(folder, spec, manifest)
    start, done = time.perf_counter(), set(run.done())
    directions = torch.randn(DIRECTIONS, DIM, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(directions, dim=1)
    shares = 1 / np.arange(1, DIRECTIONS + 1)
    for unit in range(units):
        if unit not in done:
            first = unit * UNIT_ROWS
            run.write_part(_part(unit, first, min(UNIT_ROWS, rows - first), directions, shares))
    return time.perf_counter() - start


def _part(unit: int, first: int, n: int, directions: torch.Tensor, shares: np.ndarray) -> Part:
    generator, words = torch.Generator().manual_seed(unit), np.random.default_rng(unit)
    kind, other = words.choice(len(shares), (2, n), p=shares / shares.sum())
    noise = torch.randn(n, DIM, generator=generator) * (NOISE / DIM**0.5)
    sketches = directions[kind] + SECOND * torch.rand(n, 1, generator=generator) * directions[other] + noise
    return Part(
        unit,
        ids=[f"synthetic.jsonl:{number}" for number in range(first, first + n)],
        groups=[f"source-{one % SOURCES}" for one in kind],
        rows=np.arange(first, first + n),
        sketches=sketches.numpy(),
        tokens=np.full(n, 300),
        length=np.full(n, 500),
        loss=np.ones(n),
        gradient_norm=np.ones(n),
    )


class Counting(Engine):
    """Another engine, whose passes are counted."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name, self.run_id, self.passes = engine, engine.name, engine.run_id, 0

    def map(self, make: Callable[[], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `Engine.map`."""
        self.passes += 1
        return self.engine.map(make, items)

    def work(self, open_worker: Callable[[], Any], items: Sequence[int]) -> Iterator[Any]:
        """See `Engine.work`."""
        return self.engine.work(open_worker, items)

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.close()


def peak(*_: Any) -> tuple[int, int]:
    """(process, the most bytes that it had resident)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return os.getpid(), next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _peaks() -> Callable[..., tuple[int, int]]:
    return peak


def one(section: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One section through one engine, in this process."""
    if name == "ray":
        from gvendi_fast.engines import RayEngine

        inner: Engine = RayEngine(workers=options.workers)
    else:
        inner = LocalEngine()
    with Counting(inner) as engine:
        loaded = peak()[1]
        start, busy = time.perf_counter(), time.process_time()
        found = {"score": _score, "clusters": _clusters, "relaxed": _relaxed}[section](options, engine)
        seconds, passes = time.perf_counter() - start, engine.passes
        busy = time.process_time() - busy
        others = dict(inner.map(_peaks, range(8 * options.workers))) if name == "ray" else {}
        return {
            **found,
            "seconds": seconds,
            "processor_seconds_of_this_process": busy,
            "passes": passes,
            "peak_bytes": peak()[1],
            "peak_bytes_before": loaded,
            "peak_bytes_of_the_largest_worker": max((most for _, most in others.values()), default=None),
            "threads": torch.get_num_threads(),
        }


def _score(options: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    found = score_run(RunDirectory.load(options.folder), engine=engine)
    return {"gvendi": found.gvendi, "low": found.low, "high": found.high, "centered": found.centered.value}


def _clusters(options: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    began, at = time.perf_counter(), []
    model = SphericalKMeans(options.clusters, max_iterations=options.iterations)
    pool = as_pool(options.folder)
    model.fit(pool, lambda *_: at.append(time.perf_counter() - began), engine=engine)
    labels = model.assign(pool, engine=engine)
    return {
        "objective": model.objective,
        "labels": int(labels.label.unique().numel()),
        "seconds_of_a_pass": float(np.median(np.diff(at))) if len(at) > 1 else None,
    }


def _relaxed(options: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    found = select(
        options.folder,
        options.size,
        method="relaxed",
        memory=options.memory << 20,
        draws=options.draws,
        engine=engine,
        max_passes=options.max_passes,
    )
    assert found.random is not None
    return {"gvendi": found.gvendi, "random": found.random.gvendi, **found.details}


def main() -> None:
    """Make what is missing, and measure what FILE does not have yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--store", default="int8")
    parser.add_argument("--engines", default="local,ray")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--max-passes", type=int, default=3, help="of the relaxed selection")
    parser.add_argument("--memory", type=int, default=3072, help="MiB, of the selection")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "large_pool.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one.split(","), options)))
        return
    given = {
        key: getattr(options, key)
        for key in (
            "rows",
            "store",
            "workers",
            "clusters",
            "iterations",
            "size",
            "draws",
            "memory",
            "max_passes",
        )
    }
    told = json.loads(options.out.read_text()) if options.out.exists() else {}
    if told.get("options", given) != given:
        raise SystemExit(f"{options.out} is of other options: {told['options']}; give another --out")
    told = {**told, "options": given, "dim": DIM, "machine": describe_machine()}
    seconds = make(options.folder, options.rows, options.store)
    told.setdefault("seconds_to_make", seconds)
    results = told.setdefault("results", {})
    for section in options.sections.split(","):
        for engine in options.engines.split(","):
            if f"{section}, {engine}" in results:
                continue
            command = [sys.executable, "-m", "benchmarks.speed.large_pool", *sys.argv[1:]]
            command += ["--one", f"{section},{engine}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{section}, {engine}: {done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            results[f"{section}, {engine}"] = {**found, "machine": describe_machine()}
            options.out.write_text(json.dumps(told, indent=1) + "\n")
            print(section, engine, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
