"""`gvendi check`: whether a run directory is whole, down to the last byte."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gvendi_fast.base.printing import put, put_json
from gvendi_fast.cli.options import Json, path_or_url

EXIT_FINDINGS = 1


def check(
    directory: Annotated[
        Path,
        typer.Argument(
            parser=path_or_url,
            metavar="DIR",
            help="A run directory that 'gvendi sketch' or 'score --out' made, or the directory of 'gvendi synthesize'.",
        ),
    ],
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            parser=path_or_url,
            metavar="DIR",
            help="Read the files of the corpus too, and compare them with what was sketched: the folder that holds "
            "them now, or '.' if they are where they were.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a run directory: read all of it, and say what is damaged or does not belong there.

    One line for every finding, then a summary; nothing is changed. The exit
    code is 1 with findings. The command that made the directory computes
    damaged parts again. Of a synthesis the sketches of the seeds, the rows, the
    events and the answers are verified.

    Example: gvendi check runs/mine --corpus data
    """
    from gvendi_fast.synthesis.disk.check import check_directory

    # Where a file is recorded is as good a place to look as any folder, and '.' has no tail to try.
    here = corpus is not None and corpus == Path()
    checked = check_directory(directory, with_corpus=corpus is not None, corpus=None if here else corpus)
    if as_json:
        put_json({"directory": str(directory), **checked.to_dict()})
    else:
        for finding in checked.findings:
            # Many errors begin with the file, or one in this folder, which is named once.
            is_named = finding.what.startswith((f"'{finding.path}'", f"'{finding.path}/"))
            put(f"{finding.kind}: " + (finding.what if is_named else f"'{finding.path}': {finding.what}"))
        put(_summary(directory, checked))
    if checked.findings:
        raise typer.Exit(EXIT_FINDINGS)


def _summary(directory: Path, checked) -> str:
    count = len(checked.findings)
    found = "nothing is wrong" if not count else f"{count} finding{'s' * (count != 1)}"
    if not checked.parts and checked.units_total is None:
        # A synthesis that grows from another run directory.
        return f"{found} in '{directory}'"
    parts = f"{checked.whole:,} of {checked.parts:,} part{'s' * (checked.parts != 1)} whole, {checked.rows:,} rows"
    total = checked.units_total
    if total is None:
        parts += "; how many work units the corpus has is not known"
    if total is not None and checked.parts < total:
        parts += f"; {total - checked.parts:,} of {total:,} work units are not done yet"
    return f"{found} in '{directory}': {parts}"
