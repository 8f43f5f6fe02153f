"""The table of training steps under a tap, over the same steps without."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.shapes import SHAPES

COLUMNS = ("tap", "tap on the last 4 layers", "tap every 10 steps", "pass of its own")


def tap_sections(found: dict, ratio: Callable, table: Callable, machine_line: Callable) -> list[str]:
    """Title, machine and ratios of every shape and number format; nothing where it was not measured."""
    if not found:
        return []
    rows = []
    for key, shape in SHAPES.items():
        for dtype in ("fp32", "bf16"):
            entry = found.get(f"{key} {dtype}")
            if entry:
                ratios = entry["ratio to a plain step"]
                rows.append(
                    [
                        f"{shape.name}, {shape.batch} x {shape.length} tokens",
                        dtype,
                        *(ratio(ratios, name) if name in ratios else "—" for name in COLUMNS),
                        _more(entry["bytes kept for the backward pass"]),
                        _more(entry.get("largest resident bytes")),
                    ]
                )
    head = [
        "model and batch",
        "weights",
        "tap on all layers",
        "tap on the last 4 layers",
        "tap on one step of 10",
        "step and a pass of its own",
        "kept for the backward pass, without and with",
        "largest resident size, without and with",
    ]
    return [
        "## A training step under a tap",
        "Time over that of the same step (forward and backward, no optimiser) without a tap, in turns in one process.",
        machine_line([found]),
        table(head, rows),
    ]


def _more(entry: dict[str, int] | None) -> str:
    if not entry:
        return "not measured"
    plain, tapped = (entry[name] / 2**20 for name in ("plain", "tap"))
    return f"{plain:,.0f} MiB; {tapped:,.0f} MiB"
