"""How much of a score one common direction decides, by proxy and source: what the diagnosis and `centred` say of each.

    python -m benchmarks.studies.common_direction PROXY/SOURCE=RUN_DIRECTORY ... [--dim 1024] [--out FILE.json]

A run directory is made by `gvendi sketch SAMPLE.jsonl --proxy MODEL --out DIR`; the sources of a proxy are scored one
by one, each less its own mean, and all together, by one mean in which each source weighs the same. A smaller K than
that of the run is its first coordinates, scaled to length 1 again, which is a sketch of that K. Nothing is drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import ROOT, describe_machine
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.vendi.centered import RowMean, centered, equal_mean
from gvendi_fast.vendi.diagnosis import diagnose
from gvendi_fast.vendi.state import VendiState

TOGETHER = "all together"


def row_of(blocks: list[torch.Tensor], mean: RowMean | None = None) -> dict[str, Any]:
    """The figures of rows in blocks; mean: the reference of the centred value, None for their own."""
    dim = blocks[0].shape[1]
    state, own = VendiState(dim), RowMean(dim)
    for block in blocks:
        state.update(block)
        own.update(block)
    found, less = diagnose(state, own), centered(blocks, mean or own)
    return {**found.to_dict(), "centred": less.value, "left_out": less.left_out}


def of_proxy(runs: dict[str, str], dim: int) -> dict[str, Any]:
    """{source: its figures} of a proxy's run directories, and those of all rows together."""
    rows = {}
    for source, path in runs.items():
        pool = as_pool(RunDirectory.load(path))
        rows[source] = pool.take(np.arange(len(pool)))[:, :dim].contiguous()
        if rows[source].shape[1] != dim:
            raise SystemExit(f"{path} has K = {rows[source].shape[1]}, less than --dim {dim}")
    out = {source: row_of([block]) for source, block in rows.items()}
    if len(rows) > 1:
        reference = equal_mean(RowMean(dim).update(block) for block in rows.values())
        out[TOGETHER] = row_of(list(rows.values()), reference)
    return out


def named(runs: Iterable[str]) -> dict[str, dict[str, str]]:
    """{proxy: {source: run directory}} of the command line."""
    out: dict[str, dict[str, str]] = {}
    for text in runs:
        name, _, path = text.partition("=")
        proxy, _, source = name.partition("/")
        if not (proxy and source and path):
            raise SystemExit(f"{text!r}: wanted PROXY/SOURCE=RUN_DIRECTORY")
        out.setdefault(proxy, {})[source] = path
    return out


def main() -> None:
    """Score the run directories of the command line and write one JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.common_direction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="PROXY/SOURCE=DIR")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "common_direction.json")
    args = parser.parse_args()
    proxies = {proxy: of_proxy(runs, args.dim) for proxy, runs in named(args.runs).items()}
    result = {"dim": args.dim, "proxies": proxies, "machine": describe_machine()}
    args.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for proxy, sources in proxies.items():
        for source, row in sources.items():
            print(
                f"{proxy:14}{source:14}n {row['n']:>5}  mean cosine {row['mean_cosine']:.3f}  G-Vendi "
                f"{row['gvendi']:7.1f}  centred {row['centred']:7.1f}  in one pass {row['without_mean']:7.1f}"
            )


if __name__ == "__main__":
    main()
