"""Relaxed selection from a large pool on disk: time, passes, certified gap, value beside random subsets, memory.

    python benchmarks/bench_relaxed.py [--rows 1000000] [--dim 1024] [--size 10000] [--memory-gib 2] [--out FILE]

The pool is made here, in a temporary folder: clusters of very different sizes around directions with a decaying
spectrum. Prints one JSON object, with the time of one pass of products over the pool in the same process beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from environment import describe_machine

from gvendi_fast.pool import as_pool
from gvendi_fast.selection.rounding import relaxed_select
from gvendi_fast.vendi import gvendi


def make_pool(path: Path, rows: int, dim: int, seed: int) -> np.memmap:
    """float16 [rows, dim] on disk."""
    rng = np.random.default_rng(seed)
    clusters, decay = 200, np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    centres = (rng.standard_normal((clusters, dim)) * decay).astype(np.float32)
    shares = rng.dirichlet(np.full(clusters, 0.3))
    pool = np.memmap(path, np.float16, "w+", shape=(rows, dim))
    for first in range(0, rows, 16384):
        here = min(16384, rows - first)
        noise = rng.standard_normal((here, dim), dtype=np.float32) * decay
        pool[first : first + here] = centres[rng.choice(clusters, here, p=shares)] + 0.7 * noise
    return pool


def main() -> None:
    """Make the pool, select, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--size", type=int, default=10_000)
    parser.add_argument("--memory-gib", type=float, default=2.0, help="for the active rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gvendi-bench-") as folder:
        needed = 2 * args.rows * args.dim
        if shutil.disk_usage(folder).free < 1.2 * needed:
            sys.exit(f"{folder} has too little space for a pool of {needed:,} bytes; give fewer --rows")
        pool = as_pool(make_pool(Path(folder) / "pool.f16", args.rows, args.dim, args.seed))
        began = time.perf_counter()
        square = torch.randn(args.dim, args.dim)
        for _, block in pool.blocks():
            torch.mm(block, square)
        one_pass = time.perf_counter() - began
        began = time.perf_counter()
        chosen, found = relaxed_select(
            pool,
            args.size,
            memory=int(args.memory_gib * 2**30),
            seed=args.seed,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
        seconds = time.perf_counter() - began
        rng = np.random.default_rng(args.seed + 1)
        draws = [
            gvendi(pool.take(np.sort(rng.choice(args.rows, args.size, replace=False)))) for _ in range(5)
        ]
        value = gvendi(pool.take(chosen))
    result = {
        "rows": args.rows,
        "dim": args.dim,
        "size": args.size,
        "seconds": seconds,
        "seconds over one pass of reading and one product": seconds / one_pass,
        "passes": found.passes,
        "steps": found.steps,
        "gvendi": value,
        "gvendi no choice can exceed": float(np.exp(found.bound)),
        "gap of the weights, nats": found.gap,
        "random subsets, mean": float(np.mean(draws)),
        "random subsets, range": [min(draws), max(draws)],
        "peak resident GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "machine": describe_machine(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
