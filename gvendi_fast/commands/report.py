"""`gvendi report`: what a run directory says about its corpus, as one page to look at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A run directory that 'gvendi sketch' or 'score --out' made."),
    ],
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="FIELD",
            help="The field that the run was sketched with. (Default: that field, if there is one.)",
        ),
    ] = None,
    clusters: Annotated[
        str | None,
        typer.Option(
            "--clusters",
            metavar="C|FILE",
            help="How many clusters, or the .parquet that 'gvendi cluster' wrote. (Default: 1 % of the rows, at most "
            "256.)",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE.html", help="The page; its numbers go beside it with .json."),
    ] = Path("report.html"),
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Seed of all draws of rows.")] = 0,
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Heading. (Default: the run's name.)")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", metavar="DIR", help="Folder that holds the corpus now, if it has moved."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Show a run as one HTML page: its score, groups, clusters, odd and repeated rows.

    The page needs no network and no script. It holds texts of the corpus:
    those of the rows that it names, the first 4,000 characters of each. The
    same run and seed give the same numbers.

    Example: gvendi report runs/mine --out mine.html
    """
    from gvendi_fast.options import warn_unfinished
    from gvendi_fast.report import output_paths, write_report
    from gvendi_fast.report_data import report_data
    from gvendi_fast.store import RunDirectory

    output_paths(out, force)
    warn_unfinished(RunDirectory.load(directory))
    wanted = int(clusters) if clusters is not None and clusters.isdecimal() else clusters
    data = report_data(directory, by=by, clusters=wanted, seed=seed, corpus=corpus, say=_say)
    if data["texts_missing"]:
        print(f"warning: the report has no texts: {data['texts_missing']}", file=sys.stderr)
    page, numbers = write_report(data, out, title=title, force=force)
    print(f"{page}, numbers in {numbers}")


def _say(step: str) -> None:
    print(f"report: {step}", file=sys.stderr, flush=True)
