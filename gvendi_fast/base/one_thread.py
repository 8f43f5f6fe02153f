"""Objects that collect belong to one thread at a time: a call that meets another one is refused and changes nothing.

Any number of threads may read such an object at once. A change wants it alone: two at once would lose rows, and a
reading in the midst of one would see half of it. Waiting would let the order of the threads decide the last bits of
sums, so it is an error; whoever wants turns holds a lock around the calls.

What is in use is kept here by `id`, outside of the objects: they can be pickled and copied, and a fork copies no closed
lock.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from gvendi_fast.base.errors import GvendiError

Method = TypeVar("Method", bound=Callable[..., Any])


class _Use:
    """A call that is under way. thread: which one's, None where a fork has left it behind."""

    __slots__ = ("changes", "doing", "name", "thread")

    def __init__(self, doing: str, changes: bool) -> None:
        self.doing, self.changes = doing, changes
        self.thread: int | None = threading.get_ident()
        self.name = threading.current_thread().name


_door = threading.Lock()
_uses: dict[int, list[_Use]] = {}


class OneThread:
    """Base of classes whose methods are marked by `changes` and `reads`.

    A copy, by `copy` or pickle, has everything of its own, and is refused while a method changes the original.
    """

    def __getstate__(self) -> dict[str, Any]:
        with reading(self, doing="copy"):
            return copy.deepcopy(self.__dict__)


def changes(method: Method) -> Method:
    """A method that changes its object: refused while any other call on it is under way, of this thread too."""
    return _guarded(method, changes=True)


def reads(method: Method) -> Method:
    """A method, or a function whose first argument it reads: refused while another thread changes the object."""
    return _guarded(method, changes=False)


@contextmanager
def reading(*objects: object, doing: str) -> Iterator[None]:
    """As a method that `reads` all of the objects. doing: what a thread does in the block, in another one's error."""
    use = _Use(doing, changes=False)
    entered: list[object] = []
    try:
        for one in objects:
            entered.append(one)
            _enter(one, use)
        yield
    finally:
        for one in entered:
            _leave(one, use)


def _guarded(method: Method, changes: bool) -> Method:
    first = next(iter(inspect.signature(method).parameters))

    @functools.wraps(method)
    def call(*args: Any, **more: Any) -> Any:
        one, use = args[0] if args else more.get(first), _Use(method.__name__, changes)
        try:
            _enter(one, use)
            return method(*args, **more)
        finally:
            _leave(one, use)

    return call  # type: ignore[return-value]


def _enter(one: object, use: _Use) -> None:
    with _door:
        uses = _uses.setdefault(id(one), [])
        for other in uses:
            if use.changes or (other.changes and other.thread != use.thread):
                raise _refused(one, use, other)
        uses.append(use)


def _leave(one: object, use: _Use) -> None:
    with _door:
        uses = _uses.get(id(one), [])
        # Not there if it was refused.
        if use in uses:
            uses.remove(use)
        if not uses:
            _uses.pop(id(one), None)


def _refused(one: object, use: _Use, other: _Use) -> GvendiError:
    what = type(one).__name__
    if other.thread is None:
        return GvendiError(
            f"this process was forked while another thread was in {other.doing} of this {what}, and its copy is half "
            "changed; fork before, or start the process by 'spawn'"
        )
    if other.thread == use.thread:
        return GvendiError(
            f"{use.doing} of this {what} is called from inside its own {other.doing} (by a callback or an iterator of "
            "rows), which has not finished with it; call it afterwards"
        )
    return GvendiError(
        f"{use.doing} of this {what} is called in thread '{use.name}' while thread '{other.name}' is in "
        f"{other.doing} of it; nothing was changed. Give each thread one of its own and merge them, or hold a lock "
        "around the calls"
    )


def _forked() -> None:
    global _door
    _door = threading.Lock()
    own = threading.get_ident()
    for key, uses in list(_uses.items()):
        # Another thread's reading leaves nothing behind.
        uses[:] = [use for use in uses if use.changes or use.thread == own]
        for use in uses:
            use.thread = use.thread if use.thread == own else None
        if not uses:
            del _uses[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
