"""Which of several models ranks data most as real models do: how `tiny` was chosen among its candidates.

    python -m benchmarks.studies.choose_tiny --data ../shared/data --cache FOLDER \\
        --real smollm2=PATH --real gemma3=PATH --candidate NAME=PATH --candidate NAME=PATH

The rule: the largest mean, over both real models and over plain and centred rows, of the Spearman correlation of
G-Vendi over 200 mixtures. Its rows come from corpora that benchmarks/studies/proxies.py has nothing of, so what that
study says of the chosen one is no part of the choice: MED, and three kinds of rows of benchmarks/corpora/made_up.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.corpora.made_up import narrow, varied
from benchmarks.environment import describe_machine
from benchmarks.studies.proxies import (
    Sketched,
    agreement,
    choose_rows,
    draw_keys,
    rows_of,
    scores,
    sketch_pool,
)

KINDS = {
    "words": ("story", "recipe", "letter", "atlas", "table", "calendar"),
    "reasoning": ("syllogism", "truth_table", "inference", "sequences", "sorting", "strings"),
}
MADE_UP_ROWS = 1800
MADE_UP_SEED = 11


def write_made_up(folder: Path) -> dict[str, str]:
    """The made-up sources as files of a folder: {source: its path}."""
    folder.mkdir(parents=True, exist_ok=True)
    every = varied(MADE_UP_ROWS, MADE_UP_SEED)
    parts = {kind: [row for row in every if row["family"] in families] for kind, families in KINDS.items()}
    parts["one template"] = narrow(MADE_UP_ROWS // 6, MADE_UP_SEED)
    found = {}
    for kind, rows in parts.items():
        path = folder / f"{kind.replace(' ', '-')}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[f"made up: {kind}"] = str(path.resolve())
    return found


def values(pool: Sketched, each: int, count: int, size: int) -> dict[str, np.ndarray]:
    """G-Vendi of every mixture, plain and centred."""
    every, dims = np.arange(len(pool.by_group)), torch.arange(pool.by_group.shape[-1])
    keys = draw_keys(count, each, len(pool.by_group) // each)
    return {
        word: scores(rows_of(pool, "all", centred, dims, every), keys, size)
        for word, centred in (("plain", False), ("centred", True))
    }


def main() -> None:
    """Sketch, compare, choose."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with med")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps the sketches")
    parser.add_argument("--real", action="append", required=True, metavar="NAME=WHERE")
    parser.add_argument("--candidate", action="append", default=[], metavar="NAME=WHERE")
    parser.add_argument("--each", type=int, default=64, help="rows of every source")
    parser.add_argument("--subsets", type=int, default=200)
    parser.add_argument("--size", type=int, default=60, help="rows of a subset")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    sources = {"MED": "med/med.jsonl.gz", **write_made_up(args.cache / "rows")}
    rows = choose_rows(args.data, args.each, sources)

    def of(given: str) -> tuple[str, dict[str, np.ndarray], dict]:
        name, where = given.split("=", 1)
        pool = sketch_pool(name, where, rows, args.dim, 0, args.cache)
        return name, values(pool, args.each, args.subsets, args.size), pool.about

    real = [of(given) for given in args.real]
    found = {}
    for name, theirs, about in map(of, args.candidate):
        against = {
            f"{word}, {other}": agreement(theirs[word], wanted[word])
            for other, wanted, _ in real
            for word in ("plain", "centred")
        }
        mean = float(np.mean([figure["spearman"] for figure in against.values()]))
        found[name] = {"mean": mean, "against": against, "about": about}
        print(name, round(mean, 3), {k: round(v["spearman"], 3) for k, v in against.items()}, flush=True)
    if args.out is None:
        return
    result = {
        "machine": describe_machine(),
        "pool": {"sources": list(sources), "rows of each": args.each, "made up seed": MADE_UP_SEED},
        "mixtures": {"count": args.subsets, "rows": args.size, "seed": 0},
        "real": {name: about for name, _, about in real},
        "candidates": found,
        "chosen": max(found, key=lambda name: found[name]["mean"]),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
