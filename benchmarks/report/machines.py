"""Tables of what several workers gain: benchmarks/results/engines.json, index.json and large_pool.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.report.gpu import MISSING
from benchmarks.speed.experts import quantiles

Table = Callable[[list[str], list[list[str]]], str]
KINDS = ("without ids", "with ids")
SECTIONS = (("score", "score, interval and growth"), ("clusters", "clusters"), ("relaxed", "`relaxed`"))


def machine_sections(
    engines: dict, index: dict, pool: dict, table: Table, machine_line: Callable[[list[dict]], str]
) -> list[str]:
    """What was measured of workers of Ray, the index and a pool beyond memory; nothing where nothing was."""
    parts: list[str] = []
    if engines:
        parts += [_workers(engines), machine_line([engines]), _workers_table(engines, table)]
    if index:
        parts += [_index(index), machine_line([index]), _index_table(index, table)]
    if pool:
        results = pool["results"]
        machines = [{"machine": one.get("machine", pool["machine"])} for one in results.values()]
        parts += [_pool(pool), machine_line(machines), _pool_table(pool, table)]
    return ["## Several workers", *parts] if parts else []


def _workers(found: dict) -> str:
    return (
        f"Workers of Ray with one thread each on two cores, `tiny`, {found['rows']:,} rows in work units of "
        f"{found['unit_rows']}, in turns: rows a second once every worker has begun, median, least and most of the "
        "rounds. Parts are the same to the byte."
    )


def _workers_table(found: dict, table: Table) -> str:
    rows = []
    for count, rates in found["rows_per_s"].items():
        starts = found["start_s"][count]
        rows.append(
            [
                f"{count} worker{'s' * (count != '1')}",
                _middle(rates, ".1f"),
                _middle(starts, ".1f") + " s",
                "",
            ]
        )
    rows[-1][-1] = _middle(found["ratio"], ".2f")
    return table(["", "rows/s", "until all have begun", "over one worker"], rows)


def _middle(values: list[float], form: str) -> str:
    return f"{quantiles(values)['p50']:{form}} ({min(values):{form}} to {max(values):{form}})"


def _index(found: dict) -> str:
    sizes = {found[name]["bytes"] for name in KINDS if name in found}
    return (
        f"The index of {max(sizes) / 1e9:.1f} GB of JSON lines in {found['files']} files, by this process and by "
        f"{found['workers']} others side by side, and seconds until the rows of the first work unit are read while the "
        "index goes on."
    )


def _index_table(found: dict, table: Table) -> str:
    rows = []
    for name in KINDS:
        for way, one in found.get(name, {}).items():
            if isinstance(one, dict):
                first = one["seconds until the first unit"]["p50"]
                rows.append([f"rows {name}, {way}", f"{one['MB/s']:,.0f} MB/s", f"{first:.1f} s"])
    return table(["", "index", "first work unit"], rows)


def _pool(found: dict) -> str:
    options = found["options"]
    return (
        f"A run directory of {options['rows']:,} made-up rows ({options['store']}, K = {found['dim']:,}), by this "
        f"process on one thread and through Ray with {options['workers']} workers: {options['clusters']:,} clusters "
        f"with {options['iterations']} iterations and each row's label, and {options['size']:,} rows chosen by "
        f"`relaxed` ({options['max_passes']} times over the pool at most), with what no "
        "choice exceeds. Minutes of this process' processor stand beside where it does the work; the memory is the "
        "most that this process, or one worker, had resident."
    )


def _pool_table(found: dict, table: Table) -> str:
    rows = []
    for key, title in SECTIONS:
        for engine in ("local", "ray"):
            one = found["results"].get(f"{key}, {engine}")
            rows.append([title, engine, *(_figures(one) if one else [MISSING] * 5)])
    head = ["", "engine", "minutes", "of them busy", "passes", "memory", "result"]
    return table(head, rows)


def _figures(one: dict[str, Any]) -> list[str]:
    is_alone = one["peak_bytes_of_the_largest_worker"] is None
    busy = one.get("processor_seconds_of_this_process")
    memory = f"{one['peak_bytes'] / 1e9:.2f} GB"
    if not is_alone:
        memory += f", a worker {one['peak_bytes_of_the_largest_worker'] / 1e9:.2f} GB"
    return [
        f"{one['seconds'] / 60:.1f}",
        f"{busy / 60:.1f}" if is_alone and busy is not None else "",
        f"{one['passes']}",
        memory,
        _result(one),
    ]


def _result(one: dict[str, Any]) -> str:
    if "objective" in one:
        return f"mean cosine {one['objective']:.4f}, {one['labels']:,} labels"
    if "random" in one:
        most = f"at most {one['gvendi_bound']:.1f} ({one['gap_nats']:.1e} nats)"
        return f"G-Vendi {one['gvendi']:.1f} of {most}, random {one['random']:.1f}"
    return f"G-Vendi {one['gvendi']:.1f} ({one['low']:.1f} to {one['high']:.1f})"
