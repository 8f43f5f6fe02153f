"""The table of benchmarks/results/quantised.json: what fewer bits do to a proxy's sketches, ranks and memory."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.report.gpu import MISSING

Table = Callable[[list[str], list[list[str]]], str]


def quantised_line(found: dict) -> str:
    """What the table is of."""
    if not found:
        return f"{MISSING.capitalize()}."
    return (
        f"SmolLM2-135M-Instruct ({found['proxy']['parameters']:,} parameters), {found['rows']} rows of BBH, GSM8K, "
        f"e-SNLI and AQuA, K = {found['dim']}, each against the stored weights computed in float32: the cosine of a "
        "row's two sketches, the Spearman correlation of the cosines between pairs of rows, that of G-Vendi over "
        f"{found['mixtures']} mixtures of a third of the rows, G-Vendi of all, and the bytes of the weights with their "
        "scales. The head is the embedding's, in the number format of the rest."
    )


def quantised_table(found: dict, table: Table) -> str:
    """One row a way of holding the weights."""
    if not found:
        return ""
    head = ["weights", "mean cosine", "least", "pairs", "mixtures", "G-Vendi", "linear layers", "all weights"]
    rows = []
    for name, way in found["ways"].items():
        rows.append(
            [
                name,
                f"{way['mean cosine']:.4f}",
                f"{way['least cosine']:.3f}",
                f"{way['pairs']:.4f}",
                f"{way['mixtures']:.4f}",
                f"{way['gvendi']:.2f}",
                f"{way['linear'] / 1e6:.0f} MB",
                f"{way['whole'] / 1e6:.0f} MB",
            ]
        )
    return table(head, rows)
