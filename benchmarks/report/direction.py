"""The table of what one common direction does to a score, from benchmarks/results/common_direction.json."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.report.gpu import MISSING


def direction_line(found: dict) -> str:
    """What the table is of."""
    if not found:
        return f"{MISSING.capitalize()}."
    return (
        f"K = {found['dim']}. Each source less its own mean; all together less one mean in which every source weighs "
        "the same. The mean cosine is that of different rows; the share is that of the mean's direction in the squared "
        'gradients; "in one pass" is from matrix, mean and count alone.'
    )


def direction_table(found: dict, table: Callable[[list[str], list[list[str]]], str]) -> str:
    """Mean cosine, share of the mean's direction, plain and centred G-Vendi by proxy and source."""
    head = [
        "proxy",
        "source",
        "n",
        "mean cosine",
        "share",
        "G-Vendi",
        "centred",
        "in one pass",
        "centred / plain",
    ]
    rows = []
    for proxy, sources in found.get("proxies", {}).items():
        for source, row in sources.items():
            rows.append(
                [
                    proxy,
                    source,
                    f"{row['n']:,}",
                    f"{row['mean_cosine']:.3f}",
                    f"{100 * row['along_mean']:.0f} %",
                    *(f"{row[name]:.1f}" for name in ("gvendi", "centred", "without_mean")),
                    f"{row['centred'] / row['gvendi']:.2f}",
                ]
            )
    return table(head, rows) if rows else ""
