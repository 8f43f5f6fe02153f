"""Tables of what a corpus costs before its proxy works: reading its rows, and the threads that wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

MISSING = "not measured"
Table = Callable[[list[str], list[list[str]]], str]


def reading_lines(found: dict, table: Table) -> Iterator[str]:
    """Rows of JSON read beside a bare loop over the same file."""
    if not found:
        yield f"Reading rows beside a bare loop of `json.loads`: {MISSING}."
        return
    peaks = "; ".join(f"{name} {megabytes:,.0f} MB" for name, megabytes in found["peak MB"].items())
    machine = found["machine"]
    yield (
        "Reading rows, both passes of it (fingerprints and ids; then rows), beside a bare loop of `json.loads` over "
        f"the same lines in the same process; the goal is 60 % of its rate. Decoder: {found['decoder']}. "
        f"Peak memory: {peaks}. Processor time on {machine['cpu']}, commit {machine['commit']}, {machine['date']}."
    )
    rows = []
    for name, entry in found["corpora"].items():
        share, micro = entry["share of the json loop's rate"], entry["microseconds a row"]
        rows.append(
            [
                f"{name}, {entry['bytes a row']:,.0f} bytes a row",
                f"{100 * share['p50']:.0f} % ({100 * share['p20']:.0f} to {100 * share['p80']:.0f})",
                f"{micro['read']['p50']:.1f}",
                f"{micro['json']['p50']:.1f}",
                f"{micro['tokenize']['p50']:,.0f}",
            ]
        )
    yield table(
        ["corpus", "share of the loop's rate", "microseconds a row", "the loop's", "tokenizing (tiny)"], rows
    )


def thread_lines(found: dict, table: Table) -> Iterator[str]:
    """Ways in which OpenMP's threads wait, on a quiet machine and beside a busy process."""
    halves = [half for half in ("quiet", "loaded") if half in found]
    if not halves:
        yield f"Threads that wait for each other: {MISSING}."
        return
    said = [
        f"{half}: load average {found[half]['load_average_before'][0]} before, commit "
        f"{found[half]['machine']['commit']}"
        for half in halves
    ]
    yield (
        f"Scoring with `tiny` in float32, {found['rounds']} rounds in turns: tokens a second, and their ratio to one "
        f"thread in the same round, alone on {found['cores']} cores and beside a process that spins on each but one "
        f"({'; '.join(said)}). The command line takes 1,000 spins, and as many threads as cores are free."
    )
    names = list(dict.fromkeys(name for half in halves for name in found[half]["settings"]))
    rows = []
    for name in names:
        cells = [found[half]["settings"].get(name) for half in halves]
        rows.append(
            [
                name,
                *(
                    MISSING if one is None else f"{one['median']:,.0f} ({one['ratio_to_one_thread']:.2f})"
                    for one in cells
                ),
            ]
        )
    yield table(["threads", *halves], rows)
