"""`gvendi report`: what a run directory says about its corpus, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gvendi_fast.base.errors import GvendiError, keeping
from gvendi_fast.base.printing import note, put, warn
from gvendi_fast.cli.options import Corpus, home, path_or_url, warn_unfinished


def report(
    directory: Annotated[
        Path,
        typer.Argument(
            parser=path_or_url,
            metavar="DIR",
            help="A run directory that 'gvendi sketch' or 'score --out' made, or the directory of 'gvendi synthesize'.",
        ),
    ],
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="FIELD",
            help="The field that makes groups: the --by that the run was sketched with. (Default: that field, if any.)",
        ),
    ] = None,
    clusters: Annotated[
        str | None,
        typer.Option(
            "--clusters",
            metavar="C|FILE",
            help="How many clusters of rows with like gradients to show, or the .parquet that 'gvendi cluster' wrote. "
            "(Default: 1 % of the rows, at most 256.)",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=path_or_url,
            metavar="FILE.html",
            help="The page; its numbers are written beside it, with .json. (Default: report.html in the working "
            "directory; of a synthesis, DIR/report.html, written anew.)",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="S", help="Seed of all draws of rows; the same seed gives the same page."
        ),
    ] = 0,
    title: Annotated[
        str | None,
        typer.Option("--title", metavar="TEXT", help="Heading of the page. (Default: the run's name.)"),
    ] = None,
    corpus: Corpus = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite --out and the file beside it; without it they are an error."),
    ] = False,
) -> None:
    """Show a run as one HTML page: its score, groups, clusters, odd and repeated rows.

    The page of a synthesis shows G-Vendi and acceptance over time, clusters
    before and after, and examples; it takes no --by and no --clusters.

    The page needs no network and no script. It contains texts of the corpus:
    the first 4,000 characters of each row that it names. The same run and
    seed give the same numbers.

    Example: gvendi report runs/mine --out mine.html
    """
    from gvendi_fast.synthesis.disk.record import holds_run

    if holds_run(directory):
        for name, given in (("--by", by), ("--clusters", clusters)):
            if given is not None:
                raise GvendiError(
                    f"{name} does not go with the directory of a synthesis: '{directory}' has its own clusters "
                    f"and no groups; leave {name} out"
                )
        page, numbers = _of_synthesis(directory, out, seed, title, corpus, force)
    else:
        page, numbers = _of_run(
            directory, by, clusters, out or Path("report.html"), seed, title, corpus, force
        )
    with keeping(lambda _: f"the page is '{page}', its numbers are in '{numbers}'"):
        put(f"{page}, numbers in {numbers}")


def _of_run(
    directory: Path,
    by: str | None,
    clusters: str | None,
    out: Path,
    seed: int,
    title: str | None,
    corpus: Path | None,
    force: bool,
) -> tuple[Path, Path]:
    from gvendi_fast.data.run_directory import RunDirectory
    from gvendi_fast.report.data import report_data
    from gvendi_fast.report.page import output_paths, write_report

    output_paths(out, force)
    if clusters is not None and clusters.isdecimal() and int(clusters) < 1:
        raise GvendiError(
            f"--clusters is {clusters}; wanted a number of clusters from 1, or a file that 'gvendi cluster' wrote"
        )
    warn_unfinished(RunDirectory.load(directory))
    wanted = int(clusters) if clusters is not None and clusters.isdecimal() else clusters and home(clusters)
    data = report_data(directory, by=by, clusters=wanted, seed=seed, corpus=corpus, say=_say)
    if data["texts_missing"]:
        warn(f"the report has no texts: {data['texts_missing']}")
    return write_report(data, out, title=title, force=force)


def _of_synthesis(
    directory: Path, out: Path | None, seed: int, title: str | None, corpus: Path | None, force: bool
) -> tuple[Path, Path]:
    from gvendi_fast.synthesis.report.data import synthesis_report_data
    from gvendi_fast.synthesis.report.page import report_paths, write_synthesis_report

    report_paths(directory, out, force)
    data = synthesis_report_data(directory, seed=seed, corpus=corpus, say=_say)
    if data["texts_missing"]:
        warn(f"the report has no texts of the seeds: {data['texts_missing']}")
    return write_synthesis_report(data, out, title=title, force=force)


def _say(step: str) -> None:
    note(f"report: {step}")
