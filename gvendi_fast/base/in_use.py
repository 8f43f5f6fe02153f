"""Objects that one thread at a time may work on, claimed together: others wait; what would wait for ever is refused.

Locks in the objects themselves would not do: a layer may belong to several models, a thread may come back to an object
that it holds, and a lock that a fork copies is never opened again.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing


class _Claim:
    """Objects by `id`, the thread that has them (None: it is lost in a fork), and a lock that is open when it ends."""

    __slots__ = ("busy", "ended", "parts", "thread")

    def __init__(self, objects: Iterable[object]) -> None:
        self.parts = frozenset(map(id, objects))
        self.thread: int | None = threading.get_ident()
        self.busy, self.ended = threading.Lock(), False
        self.busy.acquire()


class InUse:
    """Which objects are claimed, by which thread.

    what: the objects, as an error names them. doing: what a thread does that has claimed them, in an error.
    """

    def __init__(self, what: str, doing: str) -> None:
        self.what, self.doing = what, doing
        self._door, self._claims = threading.Lock(), set[_Claim]()
        _all.add(self)

    @contextmanager
    def claimed(
        self, objects: Iterable[object], is_inside: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """The objects, which must live as long, are this thread's inside the block; it waits for other threads first.

        is_inside: whether this thread works for another one, which waits for it.
        Raises GvendiError where this thread has one of them already, where it would wait while it has others, and where
        a fork has copied an object in use.
        """
        claim = _Claim(objects)
        with undoing() as undo:
            undo.append(lambda: self._end(claim))
            while (other := self._conflict(claim)) is not None:
                self._check(other, is_inside)
                # Opened when the other claim ends; whoever came before may have the objects then.
                with other.busy:
                    pass
            yield

    def is_claimed(self, objects: Iterable[object]) -> bool:
        """Whether any thread has one of these objects."""
        parts = frozenset(map(id, objects))
        with self._door:
            return any(not claim.parts.isdisjoint(parts) for claim in self._claims)

    def _conflict(self, claim: _Claim) -> _Claim | None:
        """Another claim on one of the objects; None, and the claim stands, where there is none."""
        with self._door:
            for other in self._claims:
                if not other.parts.isdisjoint(claim.parts):
                    return other
            self._claims.add(claim)
            return None

    def _check(self, other: _Claim, is_inside: Callable[[], bool]) -> None:
        own = threading.get_ident()
        if other.thread is None:
            raise GvendiError(
                f"this process was forked while another thread {self.doing} {self.what}, and its copy is half changed; "
                "fork before, or start the process by 'spawn'"
            )
        if other.thread == own:
            raise GvendiError(
                f"this call comes from inside a pass over the same {self.what} (a hook or callback of it, in thread "
                f"{threading.current_thread().name!r}), which holds its state; call after the pass has returned"
            )
        with self._door:
            holds = any(claim.thread == own for claim in self._claims)
        if holds or is_inside():
            raise GvendiError(
                f"the {self.what} is in use: another thread {self.doing} it, and this call, which comes from inside "
                "another pass, would have both wait for ever; call outside of it"
            )

    def _end(self, claim: _Claim) -> None:
        with self._door:
            self._claims.discard(claim)
        if not claim.ended:
            # Once, whatever interrupts: who has waited may hold it next.
            claim.ended = True
            claim.busy.release()

    def _forked(self) -> None:
        self._door = threading.Lock()
        for claim in self._claims:
            if claim.thread != threading.get_ident():
                claim.thread = None


_all: weakref.WeakSet[InUse] = weakref.WeakSet()


def _after_fork() -> None:
    for one in list(_all):
        one._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
