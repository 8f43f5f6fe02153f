"""`--threads` of every command that computes: how many threads, and a line where cores are short."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from inspect import Parameter
from typing import Annotated

import typer

from gvendi_fast.base.printing import note
from gvendi_fast.base.threads import Load, choose, crowded, using

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="Threads of the CPU that compute. (Default: OMP_NUM_THREADS, else SLURM_CPUS_PER_TASK of a task of Slurm, "
        "else one for each core that this process may use and that other processes leave free when it starts.)",
    ),
]
# A shorter run is not worth a word about its threads.
WORTH_SAYING_S = 10.0
# Since the command was started.
LOAD = Load()


def with_threads(command: Callable) -> Callable:
    """The command with --threads, which takes effect before PyTorch is loaded."""

    @functools.wraps(command)
    def run(threads: int | None = None, **given) -> None:
        # A program that calls the command has PyTorch, and its own number of threads.
        if "torch" in sys.modules and threads is None:
            command(**given)
            return
        chosen = choose(threads, os.environ, LOAD.cores())
        # A list of settings computes nothing.
        if chosen.said and not given.get("keys"):
            note(chosen.said)
        load = Load()
        with using(chosen.count, os.environ):
            command(**given)
            _say_crowded(chosen.said, load)

    signature = inspect.signature(command, eval_str=True)
    option = Parameter("threads", Parameter.KEYWORD_ONLY, default=None, annotation=Threads)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    return run


def _say_crowded(said: str | None, load: Load) -> None:
    """What came after the start: other processes beside a run with a thread for each core."""
    if said or load.seconds < WORTH_SAYING_S or "torch" not in sys.modules:
        return
    import torch

    if late := crowded(torch.get_num_threads(), load.cores()):
        note(late)
