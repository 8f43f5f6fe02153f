"""The tables of benchmarks/results/stored_sketches.json: sketches stored as float16 and int8 beside float32."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.report.gpu import MISSING

Table = Callable[[list[str], list[list[str]]], str]
# (title, key of both methods' figures)
METHODS = (("`lazy`", "lazy"), ("`relaxed`", "relaxed"))


def stored_sections(found: dict, table: Table, machine_line: Callable[[list[dict]], str]) -> list[str]:
    """What the tables are of, and the tables; nothing where nothing was measured."""
    if not found:
        return []
    parts = ["## Stored sketches"]
    if "stores" in found:
        parts += [_line(found), machine_line([found]), _table(found, table), _reaches(found)]
    if "rates" in found:
        parts += [
            "Reading the column `sketch` of parts of 512 rows, and writing such parts, checksums and all: sketches a "
            "second as the MB that they have as float32.",
            machine_line([found["rates"]]),
            _rates(found["rates"]["stores"], table),
        ]
    return parts


def _line(found: dict) -> str:
    low, high = found["interval"]
    value = found["gvendi"]["all"]
    return (
        f"SmolLM2-135M-Instruct ({found['proxy']['parameters']:,} parameters), {found['rows']:,} rows of BBH, GSM8K, "
        f"e-SNLI and AQuA, K = {found['dim']}: the same sketches stored in fewer bytes, each compared with float32. "
        "Errors of the cosines between all pairs of rows (the sketch's own is 0.027 rms); the change of G-Vendi "
        f"({value:.2f}, interval {low:.2f} to {high:.2f}) of all rows, and the largest of the four sources; how many "
        f"of the {found['chosen']} rows that `select` chooses are the same, and what the G-Vendi of the chosen ones, "
        "by their float32 sketches, changes; how many rows are nearest to the same of "
        f"{found['clusters']} centroids of the float32 run; and the adjusted Rand index of clusters of its own with "
        f"those of float32, where two seeds agree to {found['two seeds']:.2f} (the first centroids are drawn by the "
        "sketches' bits, so that each store draws others)."
    )


def _percent(change: float) -> str:
    # Below a millionth of a per cent there is only the rounding of the sums.
    return "0 %" if abs(change) < 1e-8 else f"{100 * change:+.1g} %"


def _table(found: dict, table: Table) -> str:
    head = ["stored as", "bytes a row", "cosine error, rms", "largest", "G-Vendi", "of a source"]
    for title, _ in METHODS:
        head += [f"{title}, same rows", "its G-Vendi"]
    head += ["same nearest centroid", "clusters"]
    rows = []
    for name, store in found["stores"].items():
        changes = dict(store["gvendi change"])
        whole = changes.pop("all")
        line = [
            name,
            f"{store['bytes']:,.0f}",
            f"{store['cosine']['rms']:.1e}",
            f"{store['cosine']['max']:.1e}",
            _percent(whole),
            _percent(max(changes.values(), key=abs)),
        ]
        for _, method in METHODS:
            line += [f"{100 * store[method]['same']:.1f} %", _percent(store[method]["gvendi change"])]
        line += [f"{100 * store['same nearest centroid']:.2f} %", f"{store['adjusted rand']:.2f}"]
        rows.append(line)
    return table(head, rows)


def _reaches(found: dict) -> str:
    rms = dict(found["reaches"])
    best = rms.pop("best of each row")
    whole = rms.pop("1.0")
    listed = ", ".join(f"{value:.2e} to {share}" for share, value in rms.items())
    return (
        f"The scale of int8 reaches to a row's largest element: rms error {whole:.2e}. Where it reaches less far, "
        f"steps are finer and what is above is cut off: {listed} of it, {best:.2e} to the best of these for each row."
    )


def _rates(stores: dict, table: Table) -> str:
    rows = [
        [name, *(f"{rate[what]:,.0f} MB/s" if what in rate else MISSING for what in ("read", "write"))]
        for name, rate in stores.items()
    ]
    return table(["stored as", "read", "written"], rows)
