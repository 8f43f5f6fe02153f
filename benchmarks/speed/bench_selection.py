"""Seconds, memory and score of choosing rows from a pool on disk.

    python -m benchmarks.speed.bench_selection --rows 100000 --size 1000 --memory 1GB
    python -m benchmarks.speed.bench_selection --rows 1000000 --size 10000 --method relaxed --memory 4GB

The figures go to benchmarks/results/selection.json, one entry for each set of options. The pool is a run directory in
a temporary folder: clusters of very different sizes, standard deviations falling as k^-1/2. The floor of plain greedy,
one product of all rows with the J + 1 columns of a pick for each pick, is timed on a part of the rows beside it. Lazy's
picks are first checked against gains computed anew in float64, the score of relaxed against its own bound.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import ROOT, describe_machine
from gvendi_fast.base.progress import progress_for
from gvendi_fast.base.unit_length import unit_rows
from gvendi_fast.cli.select import parse_bytes
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.kernels import ops
from gvendi_fast.selection import select
from gvendi_fast.vendi import VendiState

PART = 4096
MIB = 1 << 20


def make_pool(folder: Path, rows: int, dim: int) -> RunDirectory:
    """A run directory with clustered rows, written part by part."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, dim + 1) ** -0.5
    centres = torch.randn(max(2, rows // 500), dim, generator=generator) * scale
    starts = range(0, rows, PART)
    run = RunDirectory.open(folder, {"sketch": {"dim": dim}}, {"files": [], "units_total": len(starts)})
    for unit, first in enumerate(starts):
        n = min(PART, rows - first)
        # Cubed uniform numbers: the first clusters hold most of the rows.
        cluster = (torch.rand(n, generator=generator) ** 3 * len(centres)).long()
        sketches = centres[cluster] + 0.7 * torch.randn(n, dim, generator=generator) * scale
        run.write_part(
            Part(
                unit,
                ids=[f"r{first + i:08d}" for i in range(n)],
                groups=[f"c{c % 10}" for c in cluster.tolist()],
                rows=np.arange(first, first + n),
                sketches=sketches.numpy(),
                tokens=np.full(n, 1),
                length=np.full(n, 1),
                loss=np.ones(n),
                gradient_norm=np.ones(n),
            )
        )
    return run


class Watch:
    """The largest anonymous memory of this process while it is watched, above what it had before."""

    def __enter__(self) -> Watch:
        self.before, self.most, self._stop = _anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            self.most = max(self.most, _anonymous() - self.before)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def worst_pick(pool, chosen, checks: int = 5) -> float:
    """How far the gains of some picks lie below the best gain over the pool, computed anew in float64."""
    worst = 0.0
    for i in np.linspace(1, len(chosen) - 1, min(checks, len(chosen) - 1)).astype(int):
        before = chosen.rows[:i]
        state = VendiState(pool.dim).update(pool.take(before))
        lam, vectors = state.eigenbasis()
        best = -np.inf
        for first, block in pool.blocks():
            gains = -ops.gain(unit_rows(block), lam, vectors, 1)[0].numpy()
            inside = before[(before >= first) & (before < first + len(block))] - first
            gains[inside] = -np.inf
            best = max(best, gains.max())
            if first <= chosen.rows[i] < first + len(block):
                mine = gains[chosen.rows[i] - first]
        worst = max(worst, best - mine)
    return worst


def sweep_seconds(pool, columns: int) -> float:
    """One product of all rows of the pool with `columns` columns, scaled up from one part in memory."""
    block, u = next(pool.blocks())[1], torch.randn(columns, pool.dim)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        block @ u.T
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * len(pool) / len(block)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--objective", default="vendi")
    parser.add_argument("--method", default="lazy")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "selection.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gvendi-") as folder:
        pool = as_pool(make_pool(Path(folder) / "run", args.rows, args.dim))
        options = {"objective": args.objective, "method": args.method, "memory": parse_bytes(args.memory)}
        with Watch() as watch:
            began = time.perf_counter()
            chosen = select(
                pool, args.size, draws=args.draws, progress=progress_for(verb="choosing"), **options
            )
            seconds = time.perf_counter() - began
        error = None
        if (args.objective, args.method) == ("vendi", "lazy"):
            error = worst_pick(pool, chosen)
            # Two integrals' error, and that of the float32 products in the state made anew.
            assert error < 5e-6, f"a pick is {error} below the best one"
        elif args.method == "relaxed":
            bound = chosen.details.get("gvendi_bound") or chosen.details["value_bound"]
            assert chosen.value <= bound * (1 + 1e-6), f"{chosen.value} is above the bound {bound}"
        floor = args.size * sweep_seconds(pool, 32)
    options = {k: v for k, v in vars(args).items() if k != "out"}
    found = {
        **options,
        "seconds": seconds,
        "plain_greedy_products_seconds": floor,
        "share_of_plain_greedy_products": seconds / floor,
        "memory_taken_mib": watch.most / MIB,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "largest_shortfall_of_a_pick": error,
        **chosen.to_dict(),
        "machine": describe_machine(),
    }
    print(json.dumps(found, indent=1))
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    known[", ".join(f"{k} {v}" for k, v in options.items())] = found
    args.out.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
