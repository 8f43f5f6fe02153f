"""G-Vendi of public data sets under one proxy, for several n and K: the scale of docs/good-number.md.

    python -m benchmarks.studies.reference_values "GSM8K train=runs/gsm8k" "e-SNLI dev=runs/esnli" [--out FILE.json]

A run directory is made by `gvendi sketch SAMPLE.jsonl --proxy MODEL --dim K --out DIR`. A value is the mean over draws
of n of its rows. A smaller K than that of the run is a random choice of as many coordinates, drawn anew with the rows
and scaled to length 1 again, which is a sketch of that K; so the spread over draws has the sketch's own noise in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import ROOT, describe_machine
from gvendi_fast.analysis.equal_n import band
from gvendi_fast.analysis.measures import mean_pairwise_cosine
from gvendi_fast.base.draws import stream, subset
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.vendi.of_rows import gvendi

SIZES, DIMS, DRAWS, SEED = (100, 250, 500), (1024, 8192), 20, 0


def values(rows: torch.Tensor, n: int, dim: int, draws: int, key: str) -> list[float]:
    """G-Vendi of n of the rows [N, K] in `dim` of their coordinates, for each draw."""
    found = []
    for draw in range(draws):
        words = stream(key, n, dim, draw)
        chosen = rows[torch.from_numpy(subset(words, len(rows), n))]
        if dim < rows.shape[1]:
            chosen = chosen[:, torch.from_numpy(subset(words, rows.shape[1], dim))]
        found.append(gvendi(chosen))
    return found


def of_set(path: str, sizes: tuple[int, ...], dims: tuple[int, ...], draws: int, seed: int) -> dict[str, Any]:
    """All values of a run directory, where it has as many rows and coordinates."""
    pool = as_pool(RunDirectory.load(path))
    rows = pool.take(np.arange(len(pool)))
    scores = []
    for n in (n for n in sizes if n <= len(rows)):
        for dim in (dim for dim in dims if dim <= rows.shape[1]):
            found = values(rows, n, dim, draws, f"reference|{seed}")
            low, high = band(found)
            scores.append({"n": n, "dim": dim, "mean": float(np.mean(found)), "low": low, "high": high})
    return {"rows": len(rows), "mean cosine": mean_pairwise_cosine(rows), "scores": scores}


def main() -> None:
    """Score the run directories of the command line and write one JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.reference_values", description=__doc__
    )
    parser.add_argument("sets", nargs="+", metavar="NAME=DIR", help="a name to print, and its run directory")
    parser.add_argument("--proxy", help="the proxy's public name, where the runs have that of a folder")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reference_values.json")
    args = parser.parse_args()
    named = dict(text.rsplit("=", 1) for text in args.sets)
    specs = [RunDirectory.load(path).spec for path in named.values()]
    if any(spec != specs[0] for spec in specs):
        parser.error("the run directories were made with different settings; sketch all with the same ones")
    result = {
        "machine": describe_machine(),
        "proxy": args.proxy or Path(specs[0]["proxy"]["name"]).name,
        "dtype": specs[0]["dtype"],
        "sketch": specs[0]["sketch"],
        "seed": args.seed,
        "draws": args.draws,
        "sets": {name: of_set(path, SIZES, DIMS, args.draws, args.seed) for name, path in named.items()},
    }
    text = json.dumps(result, indent=1)
    print(text)
    args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
