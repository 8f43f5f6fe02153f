"""The table of reference values in docs/good-number.md, from benchmarks/results/reference_values.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.report.gpu import MISSING


def reference_values(found: dict[str, Any], table: Callable[[list[str], list[list[str]]], str]) -> str:
    """G-Vendi of public sets: a row for each set and K, a column for each n, highest at the largest common n first."""
    if not found:
        return f"Reference values: {MISSING}."
    sizes = sorted({score["n"] for entry in found["sets"].values() for score in entry["scores"]})
    dims = sorted({score["dim"] for entry in found["sets"].values() for score in entry["scores"]})
    rows = []
    for dim in dims:
        lines = []
        for name, entry in found["sets"].items():
            at = {score["n"]: score for score in entry["scores"] if score["dim"] == dim}
            cells = [
                f"{at[n]['mean']:.1f} ({at[n]['low']:.1f} to {at[n]['high']:.1f})"
                if n in at
                else "fewer rows"
                for n in sizes
            ]
            first = at[sizes[0]]["mean"] if sizes[0] in at else 0.0
            lines.append(
                (
                    -first,
                    [f"{name} ({entry['rows']:,} rows)", f"{dim:,}", *cells, f"{entry['mean cosine']:.3f}"],
                )
            )
        rows += [line for _, line in sorted(lines)]
    machine = found["machine"]
    about = (
        f"Under {found['proxy']} in {found['dtype']}: mean over {found['draws']} draws of n rows, 20th to 80th "
        f"percentile in brackets; seed {found['seed']}, commit {machine['commit']}, torch {machine['torch']}, "
        f"numpy {machine['numpy']}."
    )
    head = ["set", "K", *(f"n = {n:,}" for n in sizes), "mean cosine of two rows"]
    return f"{about}\n\n{table(head, rows)}"
