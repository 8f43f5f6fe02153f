"""The tables of the synthesis loop: what its rules accept, and the pace it keeps up with."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

MISSING = "not measured"
COLUMNS = {
    "accepted": ("G-Vendi of the accepted rows", 1),
    "gvendi": ("of the grown pool", 1),
    "entropy": ("entropy over families (nats)", 2),
    "families": ("families", 1),
    "requests": ("requests", 0),
}
Table = Callable[[list[str], list[list[str]]], str]


def synthesis_entries(study: dict, rate: dict) -> list[dict]:
    """The results that the tables show and that were measured."""
    return [entry for entry in (study, *rate.values()) if entry]


def study_line(study: dict) -> str:
    """What was grown, from what and how often."""
    if not study:
        return f"{MISSING.capitalize()}."
    options = study["options"]
    start = mean(run["start"] for run in study["runs"]["everything"])
    return (
        f"What the loop accepts from a writer that prefers one of twelve families of problems in "
        f"{100 * options['favour']:.0f} % of its answers: {12 * options['each']} seed rows (G-Vendi {start:.1f}) "
        f"grown by {options['grow']}, embedded proxy, mean and standard deviation of {options['seeds']} seeds."
    )


def study_table(study: dict, table: Table) -> str:
    """A line for each rule."""
    rows = []
    for rule, runs in study.get("runs", {}).items():
        row = [rule]
        for key, (_, digits) in COLUMNS.items():
            values = [run[key] for run in runs]
            spread = f" +- {stdev(values):,.{digits}f}" if len(values) > 1 else ""
            row.append(f"{mean(values):,.{digits}f}{spread}")
        rows.append(row)
    return table(["accepted", *(title for title, _ in COLUMNS.values())], rows)


def rate_table(rate: dict, table: Table) -> str:
    """A line for each task: pace of a bare client and of the loop by thirds of the run, queue, share of waiting."""
    rows = []
    for task, asked in (("generic", "1"), ("math", "4")):
        found = rate.get(task)
        if not found:
            rows.append([f"{task}, {asked} a candidate", *[MISSING] * 4])
            continue
        thirds, seconds = found["thirds"], found["seconds"]
        running = sum(seconds.values()) - sum(seconds[name] for name in ("checks", "sketching", "seed pool"))
        rows.append(
            [
                f"{task}, {asked} a candidate",
                f"{found['bare requests per second']:.0f}",
                ", ".join(f"{third['requests per second']:.0f}" for third in thirds),
                ", ".join(f"{third['queue']:.0f}" for third in thirds),
                f"{100 * seconds['sketching'] / running:.0f} %",
            ]
        )
    wanted = next((f"{entry['options']['rate']:.0f}" for entry in rate.values()), "N")
    head = [
        f"an endpoint that gives {wanted} answers a second; requests",
        "bare client, a second",
        "the loop, by thirds",
        "candidates waiting, by thirds",
        "time spent sketching",
    ]
    return table(head, rows)
