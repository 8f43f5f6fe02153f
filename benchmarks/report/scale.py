"""The plans of docs/scale.md, and what grows with rows and work units, from the rates that `gvendi plan` uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.report.gpu import MISSING
from benchmarks.report.rates import parameters_of
from benchmarks.shapes import QWEN_05B
from gvendi_fast.analysis.planning import GIVEN, Figure, Plan, Work, plan, worker_of
from gvendi_fast.cli.plan import in_words

TOKENS, ROW_BYTES = 600, 2500
# Rows, device, workers, store.
CASES = ((1e6, "h200", 1, "float32"), (5e7, "h100", 16, "float32"), (1e9, "h200", 64, "int8"))
NAMES = (
    "tokens",
    "GPU hours",
    "wall time",
    "indexing",
    "a work unit",
    "work units",
    "objects",
    "changes of a store",
    "a part",
    "sketches",
    "units in the driver",
    "pool of a selection",
)


def scale_sections(rates: Mapping[str, Any], table: Callable[[list[str], list[list[str]]], str]) -> str:
    """A table of plans, one of their passes, and one of bytes a row and a work unit take."""
    if "bytes" not in rates:
        return f"{MISSING.capitalize()}."
    plans = [_planned(*case, rates) for case in CASES]
    head = ["", *(_title(*case) for case in CASES)]
    rows = [["rate of a worker", *(_with_basis(made.inputs["rate of a worker"]) for made in plans)]]
    rows += [[name, *(in_words(made.results[name]) for made in plans)] for name in NAMES]
    passes = [
        [name, *(_pass(made, number) for made in plans)]
        for number, name in enumerate(one.name for one in plans[0].passes)
    ]
    sizes = [
        [name, f"{item['value']:,.0f}", item["what"], f"{item['machine']}, commit {item['commit']}"]
        for name, item in rates["bytes"].items()
    ]
    sources = sorted({f"{entry['source']} (commit {entry['commit']})" for entry in _used(rates)})
    return "\n\n".join(
        [
            f"Rows of {TOKENS} tokens and {ROW_BYTES:,} bytes, Qwen2.5-0.5B, K = 1,024.",
            table(head, rows),
            "One reading of all sketches by as many workers, with one core each, and how many there are at most.",
            table(["over the sketches", *head[1:]], passes),
            f"From {', '.join(sources)}.",
            table(["what", "bytes", "of", "measured on"], sizes),
        ]
    )


def _used(rates: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    gpus = [entry for entry in rates["sketching"] if entry["device"] != "cpu"]
    passes = rates.get("passes", {}).values()
    return [
        *gpus,
        *passes,
        rates["indexing"],
        *(() if passes else (rates["reading parts"], rates["products"])),
    ]


def _planned(rows: float, device: str, workers: int, store: str, rates: Mapping[str, Any]) -> Plan:
    parameters = parameters_of(QWEN_05B)
    return plan(
        Work(
            rows=Figure(rows, "rows", GIVEN),
            tokens_per_row=Figure(TOKENS, "tokens", GIVEN),
            bytes_per_row=Figure(ROW_BYTES, "bytes", GIVEN),
            parameters=Figure(parameters, "parameters", GIVEN),
            worker=worker_of(device, parameters, rates=rates),
            workers=workers,
            store=store,
        ),
        rates,
    )


def _title(rows: float, device: str, workers: int, store: str) -> str:
    return f"{in_words(Figure(rows, 'rows', GIVEN))}, {workers} x {device.upper()}, {store}"


def _with_basis(figure: Figure) -> str:
    return f"{in_words(figure)} ({figure.basis})"


def _pass(made: Plan, number: int) -> str:
    one = made.passes[number]
    return f"{in_words(one.seconds)}, {one.passes} x"
