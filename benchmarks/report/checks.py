"""What reading, tokenizing and storing cost, and what a change of them cost: two tables of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
BESIDE = {
    "test_reading_against_json": ("index and read", "json.loads of every line"),
    "test_tokenizing_against_the_bare_tokenizer": ("tokenize", "the tokenizer alone"),
    "test_writing_parts_against_plain_bytes": ("write parts", "their sketches as plain bytes"),
    "test_reading_parts_against_plain_bytes": ("read the sketches of parts", "their sketches as plain bytes"),
}


def reading_entries(cpu: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of cpu.json that are of reading and storing."""
    return [cpu[name] for name in BESIDE if name in cpu]


def reading_table(cpu: dict[str, Any], ratio: Callable[..., str], table: Table) -> str:
    """Rows a second, and the time over the least that must be done; empty where it was not measured."""
    rows = [
        [what, f"{cpu[name]['rows a second']:,.0f}", f"{ratio(cpu[name], f'ratio to {beside}')}, {beside}"]
        for name, (what, beside) in BESIDE.items()
        if name in cpu
    ]
    return table(["what", "rows a second", "time over"], rows) if rows else ""


def before_after_sections(found: dict[str, Any], table: Table) -> list[str]:
    """A line and a table of two checkouts in turns; none where it was not measured."""
    if not found:
        return []
    rows = [
        [
            one["what"],
            f"{one['seconds']['after']['p50']:.3f} s",
            f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})",
        ]
        for one in found["work"].values()
    ]
    machine = found["machine"]
    return [
        f"Commit {found['after']} beside {found['before']}, in turns, {found['turns']} of each in {found['processes']} "
        "pairs of processes: ratio of the medians, with the interval of 95 % of such ratios.",
        f"Measured on {machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}, {machine['date']}.",
        table(["work", "after", "time after over before"], rows),
    ]
