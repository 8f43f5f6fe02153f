"""Tables of benchmarks/results/coverage.json: whether intervals and forecasts hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Table = Callable[[list[str], list[list[str]]], str]
MISSING = "not measured yet"


def coverage_sections(found: dict, table: Table) -> list[str]:
    """Headings, lines and tables, in order."""
    parts = {
        name: found.get(name, {}).get("found")
        for name in ("draws", "differences", "halves", "forecasts", "spectra")
    }
    sections = ["## Whether intervals hold"]
    if not any(parts.values()):
        return [*sections, f"{MISSING.capitalize()}."]
    if parts["draws"]:
        sections += [_draws_line(parts["draws"]), _draws_table(parts["draws"], table)]
    if parts["differences"]:
        sections += [
            "The interval of a ratio of two sources at equal n, against the ratio of their mean scores:",
            _differences_table(parts["differences"], table),
        ]
    if parts["halves"]:
        sections.append(_halves_line(parts["halves"]))
    if parts["forecasts"]:
        sections += [_forecasts_line(parts["forecasts"]), _forecasts_table(parts["forecasts"], table)]
    if parts["spectra"]:
        sections += [_spectra_line(parts["spectra"])]
    return sections


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _draws_line(found: list[dict]) -> str:
    after = [entry["after"] for entry in found]
    held = sum(0.9 <= share <= 0.99 for share in after)
    return (
        "Known sources of rows, at n of 0.5 to 20 times the G-Vendi that unlimited data has. After: share of other "
        f"draws of n rows in the 95 % interval of one, {found[0]['trials']} draws each; {held} of {len(after)} lie in "
        f"90 to 99 %, all in {_percent(min(after))} to {_percent(max(after))}. Before: share of the former intervals "
        "for unlimited data that hold its value."
    )


def _draws_table(found: list[dict], table: Table) -> str:
    times = sorted({entry["times"] for entry in found})
    rows = []
    for name in dict.fromkeys(entry["source"] for entry in found):
        of = {entry["times"]: entry for entry in found if entry["source"] == name}
        row = [name.replace("|", "/"), f"{of[times[0]]['unlimited']:.1f}"]
        row += [f"{100 * of[t]['before']:.0f} → {100 * of[t]['after']:.1f}" if t in of else "" for t in times]
        rows.append(row)
    return table(["source", "G-Vendi", *(f"n = {t:g} G, %" for t in times)], rows)


def _differences_table(found: list[dict], table: Table) -> str:
    rows = [
        [
            f"{entry['kind']} sources, n = {entry['n']}",
            str(entry["pairs"]),
            _percent(entry["mean"]),
            f"{_percent(entry['least'])} to {_percent(entry['most'])}",
        ]
        for entry in found
    ]
    return table(["", "pairs of sources", "inside", "from pair to pair"], rows)


def _halves_line(found: list[dict]) -> str:
    inside = [entry["inside"] for entry in found]
    half = np.median([entry["half width"] for entry in found])
    return (
        f"Real rows: disjoint draws of n rows of {len({entry['run'] for entry in found})} runs, {len(found)} pairs of "
        f"run and n, 40 intervals each: {_percent(float(np.mean(inside)))} hold the other draw's score (from run to "
        f"run {_percent(min(inside))} to {_percent(max(inside))}); half their width is {_percent(float(half))} in the "
        "median."
    )


def forecast_row(found: dict, missing: str) -> list[str]:
    """How many forecasts hold on real rows, for the README."""
    what = "G-Vendi of twice the rows, forecast on real splits: in its 95 % band; median error"
    if not found.get("forecasts"):
        return [what, missing]
    entries = found["forecasts"]["found"]
    error = np.median([abs(entry["forecast"] / entry["truth"] - 1) for entry in entries])
    return [what, f"{sum(entry['inside'] for entry in entries)} of {len(entries)}; {_percent(float(error))}"]


def _forecasts_line(found: list[dict]) -> str:
    inside = sum(entry["inside"] for entry in found)
    half = np.median([(entry["high"] - entry["low"]) / 2 / entry["forecast"] for entry in found])
    error = np.median([abs(entry["forecast"] / entry["truth"] - 1) for entry in found])
    grown = np.median([entry["truth"] / entry["score"] - 1 for entry in found])
    return (
        f"The forecast for 2n rows, from n of them: {inside} of {len(found)} real splits lie in its 95 % band "
        f"({_percent(inside / len(found))}). In the median, doubling the rows adds {_percent(float(grown))}, the "
        f"forecast errs by {_percent(float(error))}, and the band reaches {_percent(float(half))} to either side."
    )


def _forecasts_table(found: list[dict], table: Table) -> str:
    rows = []
    for name in dict.fromkeys(entry["run"] for entry in found):
        of = [entry for entry in found if entry["run"] == name]
        shown = [f"{entry['n']}: {100 * (entry['forecast'] / entry['truth'] - 1):+.1f}" for entry in of]
        rows.append(
            [
                f"`{name}`",
                f"{sum(entry['inside'] for entry in of)} of {len(of)}",
                f"{100 * np.median([(e['high'] - e['low']) / 2 / e['forecast'] for e in of]):.1f}",
                ", ".join(shown),
            ]
        )
    return table(["run", "inside", "half width, %", "n: error, %"], rows)


def _spectra_line(found: list[dict]) -> str:
    inside = [entry["inside"] for entry in found]
    given = [entry for entry in found if entry["unlimited inside"] is not None]
    weight = np.array([entry["unlimited given"] * entry["trials"] for entry in given])
    held = (
        float(weight @ [entry["unlimited inside"] for entry in given] / weight.sum()) if len(given) else 0.0
    )
    share = sum(entry["unlimited given"] for entry in found) / len(found)
    return (
        f"On known sources, n from 1 to 30 times G-Vendi: {_percent(float(np.mean(inside)))} of forecasts hold. "
        f"Unlimited data was offered in {_percent(share)} of draws, and its band held the source's value in "
        f"{_percent(held)} of those."
    )
