"""The `gvendi` command."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from gvendi_fast.base._version import __version__
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printing import put, warn
from gvendi_fast.cli import ending
from gvendi_fast.cli.check import check
from gvendi_fast.cli.cluster import cluster
from gvendi_fast.cli.compare import compare
from gvendi_fast.cli.info import info
from gvendi_fast.cli.inspect import inspect
from gvendi_fast.cli.measures import measures
from gvendi_fast.cli.option_names import as_typed
from gvendi_fast.cli.options import at_home
from gvendi_fast.cli.plan import plan
from gvendi_fast.cli.report import report
from gvendi_fast.cli.score import score, sketch
from gvendi_fast.cli.select import select
from gvendi_fast.cli.status import status
from gvendi_fast.cli.synthesize import synthesize
from gvendi_fast.cli.threads import with_threads
from gvendi_fast.cli.weights import weights
from gvendi_fast.cli.wording import Command, Group, complete

HELP = """Measure how diverse language-model training data is: G-Vendi, from sketches of per-sample gradients.

To begin: gvendi score data.jsonl --proxy tiny

proxy: the model under which the loss gradient of each row is taken.
sketch: a row's gradient, projected at random to K numbers (--dim).
run directory: the sketches of a corpus, which 'sketch' or 'score --out' makes
and all other commands read; the same command again goes on where it stopped.
G-Vendi: how many directions n rows use, from 1 to the smaller of n and K. It
grows with n: compare data at the same n, proxy and K.
"""

app = typer.Typer(
    name="gvendi",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=HELP,
    epilog=ending.EXIT_CODES,
)

for _command in (
    score,
    sketch,
    inspect,
    info,
    select,
    cluster,
    compare,
    measures,
    weights,
    report,
    plan,
    status,
    check,
    synthesize,
):
    _made = at_home(_command)
    app.command(cls=Command)(_made if _command in (inspect, info, status, check) else with_threads(_made))


def _show_version(wanted: bool) -> None:
    if wanted:
        put(f"gvendi-fast {__version__} (Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            help="Show where an error arose, for a report of a fault; GVENDI_TRACEBACK=1 does the same.",
        ),
    ] = False,
) -> None:
    pass


def _plain_warning(message, category, *_) -> None:
    warn(f"{message}")


def _refuse_empty(words: Sequence[str]) -> None:
    """An empty path is the current folder to Python; what was meant is a variable of the shell that is not set."""
    for place, word in enumerate(words):
        is_option = word.startswith("--") and word.endswith("=")
        if word and not is_option:
            continue
        before = word.rstrip("=") or next((w for w in reversed(words[:place]) if w), "gvendi")
        raise typer.BadParameter(
            f"what follows {before!r} is empty, as a variable of the shell is that is not set; give a value"
            + ", or leave the option out" * before.startswith("--")
        )


def _invoke(words: Sequence[str]) -> int | None:
    if sys.flags.optimize > 1:
        raise GvendiError(
            "Python runs without docstrings (-OO, or PYTHONOPTIMIZE=2), which transformers and --help are made of; "
            "use -O, or unset the variable"
        )
    if complete(app):
        return None
    _refuse_empty(words)
    # Not app(): its own ending prints what was typed as it is, and turns Ctrl-C into a code without a word.
    command = typer.main.get_command(app)
    with command.make_context("gvendi", list(words)) as context, as_typed(context):
        return command.invoke(context)


def main() -> None:
    """Run the command line; ends by SystemExit, as `ending` says."""
    warnings.showwarning = _plain_warning
    ending.run(_invoke, sys.argv[1:])


if __name__ == "__main__":
    main()
