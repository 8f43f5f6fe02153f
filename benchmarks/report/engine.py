"""The table of the engine on finished sketches: gains, groups of rows, selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

MISSING = "not measured"
HEAD = ["what, K = 1024", "measured", "beside it", "memory taken"]
GAINS = (("gain-torch.float32", "joins", "float32"), ("removal-torch.float32", "leaves", "float32"))
GROUPS = (16, 64, 256)
SELECTIONS = (
    "rows 100000, dim 1024, size 1000, memory 1GB, objective vendi, method lazy, draws 20",
    "rows 1000000, dim 1024, size 10000, memory 4GB, objective vendi, method relaxed, draws 5",
)


def engine_entries(cpu: dict, selection: dict) -> list[dict]:
    """The entries that the table shows and that were measured."""
    names = [f"test_gain[{name}]" for name, _, _ in GAINS] + [f"test_groups[{m}]" for m in GROUPS]
    found = [cpu.get(name) for name in names] + [selection.get(name) for name in SELECTIONS]
    return [entry for entry in found if entry]


def engine_rows(cpu: dict, selection: dict) -> Iterator[list[str]]:
    """The lines of the table; a figure that is not there says so."""
    for name, verb, dtype in GAINS:
        entry = cpu.get(f"test_gain[{name}]")
        yield [
            f"entropy after one row {verb}, {dtype}",
            f"{1e6 * entry['seconds']['median'] / entry['rows']:.0f} us a row" if entry else MISSING,
            f"{entry['ratio']:,.0f} times as fast as new eigenvalues" if entry else MISSING,
            "",
        ]
    for m in GROUPS:
        entry = cpu.get(f"test_groups[{m}]")
        yield [
            f"entropies of groups of {m} rows",
            f"{entry['groups a second']['p50']:,.0f} groups/s" if entry else MISSING,
            f"{1 / entry['ratio to batched eigvalsh']['p50']:.1f} times as fast as batched `torch.linalg.eigvalsh`"
            if entry
            else MISSING,
            "",
        ]
    for name in SELECTIONS:
        yield selection_row(name, selection.get(name))


def selection_row(name: str, entry: dict | None) -> list[str]:
    """A choice: its time, its score, that of random rows, and, of relaxed, what no choice can exceed."""
    options = dict(part.rsplit(" ", 1) for part in name.split(", "))
    what = f"`{options['method']}`: {int(options['size']):,} of {int(options['rows']):,} rows"
    if entry is None:
        return [what, MISSING, MISSING, MISSING]
    random = entry["random"]
    beside = f"random rows {random['gvendi']:.1f}"
    if bound := entry["details"].get("gvendi_bound"):
        beside += f"; no choice exceeds {math.ceil(10 * bound) / 10:.1f}"
    return [
        what,
        f"{entry['seconds']:,.0f} s, G-Vendi {entry['gvendi']:.1f}",
        beside,
        f"{entry['memory_taken_mib']:,.0f} MiB of {options['memory']}",
    ]


def engine_table(cpu: dict, selection: dict, table: Callable[[list[str], list[list[str]]], str]) -> str:
    """The table, as Markdown by `table`."""
    return table(HEAD, list(engine_rows(cpu, selection)))
