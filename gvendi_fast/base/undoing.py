"""What a block changes for its own time is undone at its end, even if an interrupt comes while it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Of a step that raises; an interrupt comes once, and a step that cannot be done must not hold up the others.
_TRIES = 3


@contextmanager
def undoing() -> Iterator[list[Callable[[], object]]]:
    """A list of steps that are done last to first at the end of the block.

    Append a step before the change that it undoes: an interrupt may come between the two. A step may therefore be done
    without its change, and more than once. The first error of a step is raised after the last one.
    """
    steps: list[Callable[[], object]] = []
    try:
        yield steps
    finally:
        error, tries = None, 0
        while steps:
            try:
                while steps:
                    steps[-1]()
                    steps.pop()
            except BaseException as caught:
                error, tries = error or caught, tries + 1
                if tries >= _TRIES:
                    tries = 0
                    steps.pop()
        if error is not None:
            raise error
