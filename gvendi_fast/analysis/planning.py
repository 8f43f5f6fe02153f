"""What a run will cost, on paper: hours, bytes, objects and passes, from inputs that say where they come from.

    tokens  = rows x tokens a row                          seconds of work = tokens / (tokens a second of a worker)
    FLOPs   = 4 x parameters x tokens: the forward pass and the input gradients, of the 6 of a training step
    a pass  = rows x seconds a row of one core, measured and scaled by its products, over the workers' cores; else
              bytes of sketches / rate of reading + FLOPs of its products / rate of these

A rate is the user's own, measured now, or one of rates.json: what benchmarks/results holds, with machine and commit
(written by `python -m benchmarks.report`). A rate of another proxy is scaled by the parameters, and one of a device
without a measured rate comes from its peak and the measured utilisation of another. Every figure says which it is.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvendi_fast.base.errors import GvendiError

RATES = Path(__file__).with_name("rates.json")
GIVEN, MEASURED, SCALED, ASSUMED, COMPUTED = "given", "measured", "scaled", "assumed", "computed"
FLOPS_PER_PARAMETER = 4
# A work unit is to take about so long, and has so many rows at most unless asked otherwise (sketching/unit_size.py).
UNIT_SECONDS, MOST_ROWS = 60.0, 4096
# Bytes of a part at most: a worker holds its rows until it is written.
MOST_PART = 1 << 28
# Requests of a work unit that change an object store: lease, its end, rejected rows, part, the worker's record; and
# keys of one answer when it lists.
REQUESTS, KEYS = 5, 1000
# Dense bfloat16 products a second, by their makers' data sheets.
PEAKS = {
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
    "l4": 121e12,
    "l40s": 362e12,
}
CPU = "cpu"
DEVICES = (CPU, *PEAKS)
# Iterations of k-means at most, and readings of the sketches by a score.
ITERATIONS, OF_A_SCORE = 50, 3
# Bytes of a number, and of the scale beside a row, by how sketches are stored.
STORES = {"float32": (4, 0), "float16": (2, 4), "int8": (1, 4)}
WEIGHT_BYTES = {"bfloat16": 2, "float32": 4}
# Parameters that differ by no more are the same proxy.
_SAME = 0.02
# Arrays of N numbers that selection holds beside the pool: ranks, weights, scores, bounds, places.
SELECTION_BYTES = 64
# Objects of one folder, and bytes that one machine may hold for a selection, from which a note says what to do.
MANY_OBJECTS, MUCH_MEMORY, MUCH_STORED = 1_000_000, 64 << 30, 10 << 40


@dataclass(frozen=True)
class Figure:
    """A number with its unit, how it is known (`GIVEN`, `MEASURED`, ...), and where from."""

    value: float
    unit: str
    basis: str
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"value": self.value, "unit": self.unit, "basis": self.basis, "source": self.source}


@dataclass(frozen=True)
class Worker:
    """What does work units: one GPU, or cores of a CPU. rate: tokens a second; cores: busy with it, and with passes."""

    device: str
    rate: Figure
    cores: int = 1

    @property
    def is_gpu(self) -> bool:
        """Whether its hours are a GPU's."""
        return self.device != CPU


@dataclass(frozen=True)
class Work:
    """What is to be sketched, how it is kept, and by how many workers.

    bytes_per_row: of the corpus' files; None where nobody says.
    parameters: of the proxy, as far as a token is multiplied with them.
    dim: K. store: one of `STORES`. clusters: of k-means.
    dtype: of the proxy's weights; None: float32 on a CPU and bfloat16 on a GPU, as `worker_of` has it.
    unit_seconds: how long a work unit is to take; None: a minute, or the most rows that a run takes by itself.
    """

    rows: Figure
    tokens_per_row: Figure
    bytes_per_row: Figure | None
    parameters: Figure
    worker: Worker
    workers: int = 1
    dtype: str | None = None
    dim: int = 1024
    store: str = "float32"
    clusters: int = 1000
    unit_seconds: float | None = None


@dataclass(frozen=True)
class Pass:
    """A reading of all sketches, on the CPU of the workers. passes: how often; seconds: of one, over all workers, with
    how that is known.
    """

    name: str
    passes: int
    flops: float
    bytes: float
    seconds: Figure

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "passes": self.passes,
            "flops_per_pass": self.flops,
            "bytes_per_pass": self.bytes,
            "seconds_per_pass": self.seconds.to_dict(),
            "seconds": self.passes * self.seconds.value,
        }


@dataclass(frozen=True)
class Plan:
    """What `plan` found. inputs, results: by name; passes over the sketches; notes: what to look out for."""

    inputs: Mapping[str, Figure]
    results: Mapping[str, Figure]
    passes: tuple[Pass, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi plan --json` prints."""
        return {
            "inputs": {name: figure.to_dict() for name, figure in self.inputs.items()},
            "results": {name: figure.to_dict() for name, figure in self.results.items()},
            "passes": [one.to_dict() for one in self.passes],
            "notes": list(self.notes),
        }


@functools.cache
def load_rates(path: Path = RATES) -> Mapping[str, Any]:
    """The measured rates."""
    return json.loads(path.read_text())


def worker_of(
    device: str,
    parameters: float,
    dtype: str | None = None,
    utilisation: float | None = None,
    rates: Mapping[str, Any] | None = None,
) -> Worker:
    """A worker of a kind of device, by the nearest measured rate, else by its peak.

    device: one of `DEVICES`; a CPU's worker is one core.
    dtype: of the weights; None: float32 on a CPU, few of which have products of bfloat16, and bfloat16 on a GPU.
    utilisation: share of the peak, in place of the measured one.
    Raises GvendiError for a device that is neither measured nor has a known peak.
    """
    rates = load_rates() if rates is None else rates
    if device not in DEVICES:
        raise GvendiError(
            f"--device is {device!r}, of which nothing is known; give one of {', '.join(DEVICES)}, or the rate that "
            "you measured with --tokens-per-second"
        )
    if utilisation is not None and device == CPU:
        raise GvendiError(
            "--utilisation is a share of a GPU's peak; for a CPU give --tokens-per-second or --measure"
        )
    dtype = dtype or _usual_dtype(device)
    found = [entry for entry in rates["sketching"] if entry["device"] == device]
    found = [entry for entry in found if entry["dtype"] == dtype] or found
    if found and utilisation is None:
        return Worker(device, _scaled(_nearest(found, parameters), parameters))
    peak, source = PEAKS[device], "given"
    if utilisation is None:
        entry = _nearest([one for one in rates["sketching"] if one["device"] in PEAKS], parameters)
        per_second = FLOPS_PER_PARAMETER * entry["parameters"] * entry["tokens_per_second"]
        utilisation = per_second / PEAKS[entry["device"]]
        source = f"as measured with {entry['model']} on {entry['machine']}, commit {entry['commit']}"
    rate = utilisation * peak / (FLOPS_PER_PARAMETER * parameters)
    said = f"{100 * utilisation:.0f} % of a peak of {peak / 1e12:,.0f} TFLOP/s ({source})"
    return Worker(device, Figure(rate, "tokens/s", ASSUMED, said))


def _usual_dtype(device: str) -> str:
    return "float32" if device == CPU else "bfloat16"


def _nearest(entries: list[Mapping[str, Any]], parameters: float) -> Mapping[str, Any]:
    return min(entries, key=lambda entry: abs(math.log(entry["parameters"] / parameters)))


def _scaled(entry: Mapping[str, Any], parameters: float) -> Figure:
    ratio = entry["parameters"] / parameters
    threads = entry.get("threads", 1)
    rate = entry["tokens_per_second"] / threads * ratio
    said = f"{entry['model']}, {entry['dtype']}, on {entry['machine']}, {entry['source']}, commit {entry['commit']}"
    if threads > 1:
        said += f", {threads} threads together, of which this is one's share"
    if abs(ratio - 1) <= _SAME:
        return Figure(rate, "tokens/s", MEASURED, said)
    return Figure(rate, "tokens/s", SCALED, f"by parameters, from {said}")


def plan(work: Work, rates: Mapping[str, Any] | None = None) -> Plan:
    """The cost of sketching a corpus and of the passes over its sketches. Raises GvendiError for a store unknown."""
    rates = load_rates() if rates is None else rates
    if work.store not in STORES:
        raise GvendiError(f"store is {work.store!r}; wanted one of {', '.join(STORES)}")
    rows, rate, workers = work.rows.value, work.worker.rate.value, work.workers
    tokens = rows * work.tokens_per_row.value
    seconds = tokens / rate
    hours = "GPU hours" if work.worker.is_gpu else "core hours"
    size, scale = STORES[work.store]
    beside = rates["bytes"]["beside the sketch"]
    row_bytes = size * work.dim + scale + beside["value"]
    unit_seconds = work.unit_seconds or UNIT_SECONDS
    dtype = work.dtype or _usual_dtype(work.worker.device)
    most = min(
        int(unit_seconds * rate / work.tokens_per_row.value), int(MOST_PART / row_bytes), math.ceil(rows)
    )
    most = most if work.unit_seconds else min(most, MOST_ROWS)
    # A work unit has one row at least.
    unit_rows = max(1, most)
    units = math.ceil(rows / unit_rows)
    of_unit, of_pool = rates["bytes"]["a unit in memory"], rates["bytes"]["a row of a pool"]
    inputs = {
        "rows": work.rows,
        "tokens a row": work.tokens_per_row,
        **({} if work.bytes_per_row is None else {"bytes a row": work.bytes_per_row}),
        "parameters": work.parameters,
        "rate of a worker": work.worker.rate,
        "reading parts": _rate_of(rates["reading parts"]),
        "products of a core": _rate_of(rates["products"]),
        **({} if work.bytes_per_row is None else {"indexing": _rate_of(rates["indexing"])}),
        "beside a sketch": Figure(beside["value"], "bytes", MEASURED, _said(beside)),
        "a work unit in memory": Figure(of_unit["value"], "bytes", MEASURED, _said(of_unit)),
        "a row of a pool": Figure(of_pool["value"], "bytes", MEASURED, _said(of_pool)),
    }

    def computed(value: float, unit: str, how: str) -> Figure:
        return Figure(value, unit, COMPUTED, how)

    results = {
        "tokens": computed(tokens, "tokens", "rows x tokens a row"),
        hours: computed(
            seconds * (1 if work.worker.is_gpu else work.worker.cores) / 3600, "hours", "tokens / rate"
        ),
        "wall time": computed(
            seconds / workers + (workers > 1) * unit_rows * work.tokens_per_row.value / rate,
            "seconds",
            f"tokens / rate / {workers:,} workers, and a work unit at the end"
            if workers > 1
            else "tokens / rate",
        ),
        "a work unit": computed(
            unit_rows,
            "rows",
            f"what a worker does in {unit_seconds:,.0f} s, up to "
            + (f"{MOST_PART >> 20} MiB, for --unit-rows" if work.unit_seconds else f"{MOST_ROWS:,} rows"),
        ),
        "work units": computed(units, "units", "rows / rows of a work unit"),
        "objects": computed(2 * units, "objects", "a part and a list of rejected rows for each work unit"),
        "changes of a store": computed(
            REQUESTS * units,
            "requests",
            "a lease and its end, rejected rows, a part and a record for each work unit",
        ),
        "a listing": computed(
            math.ceil(2 * units / KEYS), "requests", f"objects / {KEYS:,} keys of an answer"
        ),
        "a part": computed(
            unit_rows * row_bytes,
            "bytes",
            f"K = {work.dim:,} as {work.store}, and {beside['value']:.0f} more",
        ),
        "sketches": computed(rows * row_bytes, "bytes", "rows x bytes of a row"),
        "weights in a worker": computed(
            work.parameters.value * WEIGHT_BYTES[dtype], "bytes", f"parameters in {dtype}"
        ),
        "state of a pass": computed(8 * work.dim**2, "bytes", "K x K numbers in float64"),
        "units in the driver": computed(units * of_unit["value"], "bytes", "work units x bytes of one"),
        "pool of a selection": computed(
            rows * (of_pool["value"] + SELECTION_BYTES),
            "bytes",
            f"rows x (a row of a pool + {SELECTION_BYTES} for selection's arrays)",
        ),
    }
    if work.bytes_per_row is not None:
        index = rows * work.bytes_per_row.value / rates["indexing"]["value"]
        results["indexing"] = computed(
            index / workers,
            "seconds",
            "bytes / rate / workers, one file a task",
        )
    passes = _passes(
        work, rows * row_bytes, inputs["reading parts"].value, inputs["products of a core"].value, rates
    )
    return Plan(inputs, results, passes, tuple(_notes(work, results)))


def _rate_of(entry: Mapping[str, Any]) -> Figure:
    return Figure(entry["value"], entry["unit"], MEASURED, _said(entry))


def _said(entry: Mapping[str, Any]) -> str:
    return f"{entry['what']}, on {entry['machine']}, {entry['source']}, commit {entry['commit']}"


def _passes(
    work: Work, stored: float, reading: float, products: float, rates: Mapping[str, Any]
) -> tuple[Pass, ...]:
    """reading, products: of a core."""
    rows, dim = work.rows.value, work.dim
    cores = work.workers * work.worker.cores
    square = 2 * dim * dim
    kinds = (
        ("score", "score", OF_A_SCORE, square),
        (f"k-means, {work.clusters:,} clusters", "clusters", ITERATIONS, 2 * dim * work.clusters),
        ("relaxed selection", "relaxed", rates["relaxed"]["most passes"], square),
    )
    found = []
    for name, key, count, flops in kinds:
        entry = rates.get("passes", {}).get(key)
        if entry is None:
            seconds = stored / reading / cores + rows * flops / products / cores
            figure = Figure(seconds, "seconds", COMPUTED, "bytes / rate of reading + products / their rate")
        else:
            seconds = rows * entry["value"] * flops / entry["flops"] / cores
            basis, how = (MEASURED, "") if flops == entry["flops"] else (SCALED, "by products, from ")
            figure = Figure(seconds, "seconds", basis, how + _said(entry))
        found.append(Pass(name, count, rows * flops, stored, figure))
    return tuple(found)


def _notes(work: Work, results: Mapping[str, Figure]) -> list[str]:
    notes = []
    per_unit = results["a work unit"].value
    if per_unit == 1 and results["work units"].value > 1:
        notes.append(
            f"a row takes more than {work.unit_seconds or UNIT_SECONDS:,.0f} s, so a work unit is one row; a smaller "
            "proxy is faster"
        )
    if results["objects"].value > MANY_OBJECTS:
        notes.append(
            f"{results['objects'].value:,.0f} objects in one folder: longer work units (--unit-seconds) make fewer"
        )
    if results["pool of a selection"].value > MUCH_MEMORY:
        notes.append(
            "a selection or clusters of all rows hold ids and numbers of each on one machine, "
            f"{results['pool of a selection'].value / 1e9:,.0f} GB: select within shards first (docs/scale.md)"
        )
    if results["sketches"].value > MUCH_STORED and work.store != "int8":
        notes.append("int8 (--store) takes a quarter of float32's bytes")
    if work.worker.rate.basis in (SCALED, ASSUMED):
        small = ", and small proxies reach less of a GPU than larger ones" if work.worker.is_gpu else ""
        notes.append(
            f"the rate is not measured with this proxy on this device{small}: --measure there takes a minute"
        )
    return notes
