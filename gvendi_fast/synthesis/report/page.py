"""The report of a synthesis run: one HTML page without scripts or network, and its numbers as JSON beside it.

Everything in it is read from the run's directory, so it can be written at any time, and again; all texts come from a
language model and are escaped where they are printed.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from gvendi_fast.report.page import PREVIEW, environment, figure, output_paths, printed, write_files
from gvendi_fast.synthesis.report import figures

REPORT = "report.html"
# What happened at a stage, by its name in rejected.jsonl.
ABOUT = {
    "request": "the endpoint gave no usable answer",
    "parse": "the answer holds no candidate that can be used",
    "tests": "a question of the test files",
    "paraphrase": "a question of the test files in other words",
    "answers": "the answers to the follow-up requests did not agree",
    "verifier": "your check refused it",
    "verifier error": "your check hung, crashed or gave no verdict",
    "sketch": "the proxy could not score it",
    "copy": "its prompt is in the pool",
    "near copy": "its sketch is that of a row of the pool, or nearly",
    "dense": "its nearest cluster is not among the smaller half",
    "low gain": "it raises the entropy by too little",
}


def write_synthesis_report(
    data: dict[str, Any],
    out: str | os.PathLike | None = None,
    *,
    title: str | None = None,
    date: datetime.date | None = None,
    force: bool = False,
) -> tuple[Path, Path]:
    """Write the page and its JSON from `report_data.synthesis_report_data`; returns both paths.

    out: the page's name; None is report.html in the run's directory, which is the run's own and is written anew.
    title, date, force: as in `report.write_report`, which says what is raised too.
    """
    paths = report_paths(data["run"], out, force)
    write_files(data, render(data, title=title, date=date), *paths)
    return paths


def report_paths(
    run: str | os.PathLike, out: str | os.PathLike | None, force: bool = False
) -> tuple[Path, Path]:
    """The page and its JSON; raises GvendiError as `write_synthesis_report` does."""
    return output_paths(Path(run) / REPORT, True) if out is None else output_paths(out, force)


def render(data: dict[str, Any], *, title: str | None = None, date: datetime.date | None = None) -> str:
    """The page of a report's data."""
    drawn = {
        "growth": figures.growth_figure(data["growth"]),
        "clusters": figures.clusters_figure(data["clusters"]),
    }
    if data["acceptance"]["windows"]:
        drawn["acceptance"] = figures.acceptance_figure(data["acceptance"])
    template = environment().get_template("synthesis.html.jinja")
    return template.render(
        data=data,
        title=title or f"Growth of {Path(data['run']).name or data['run']}",
        date=printed(date),
        figures={name: figure(found) for name, found in drawn.items()},
        about=ABOUT,
        colour_of=figures.colour_of,
        preview=PREVIEW,
    )
