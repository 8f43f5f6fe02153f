"""The one error type that is meant for the user, and what an error says of what outlives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class GvendiError(ValueError):
    """An input or a setting that cannot be used; the message names it, what was wanted and the remedy."""


@contextmanager
def keeping(said: Callable[[BaseException], str | None]) -> Iterator[None]:
    """Tell with whatever ends the block early, Ctrl-C included, what outlives it.

    said: of the error, one sentence on what is kept and how to go on; None where there is nothing to say. It becomes
    `error.kept`, which the command line prints, and a note of the traceback. The innermost block's counts.
    """
    try:
        yield
    except BaseException as error:
        text = None if hasattr(error, "kept") else said(error)
        if text:
            error.kept = text  # type: ignore[attr-defined]
            # From Python 3.11 on.
            if hasattr(error, "add_note"):
                error.add_note(text)
        raise
