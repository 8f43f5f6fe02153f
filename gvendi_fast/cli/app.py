"""The `gvendi` command."""

from __future__ import annotations

import platform
import sys
import warnings
from typing import Annotated

import typer

from gvendi_fast.base._version import __version__
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.check import check
from gvendi_fast.cli.cluster import cluster
from gvendi_fast.cli.compare import compare
from gvendi_fast.cli.info import info
from gvendi_fast.cli.measures import measures
from gvendi_fast.cli.report import report
from gvendi_fast.cli.score import score, sketch
from gvendi_fast.cli.select import select
from gvendi_fast.cli.synthesize import synthesize
from gvendi_fast.cli.weights import weights

app = typer.Typer(
    name="gvendi",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure how diverse language-model training data is: G-Vendi, from sketches of per-sample gradients.",
)
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130

for _command in (score, sketch, info, select, cluster, compare, measures, weights, report, check, synthesize):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gvendi-fast {__version__} (Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def _plain_warning(message, category, *_) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Entry point: errors that are meant for the user go to stderr as one message, without a traceback."""
    warnings.showwarning = _plain_warning
    try:
        app()
    except GvendiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt as stop:
        if not getattr(stop, "explained", False):
            print("\ninterrupted: files are written whole or not at all, so none is damaged", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
