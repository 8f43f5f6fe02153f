"""Which processes do a piece of work: what an engine offers, and the one that is this process.

Others are in `gvendi_fast.engines`: the ranks of torchrun, accelerate and Slurm, and Ray.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from uuid import uuid4

if TYPE_CHECKING:
    from typing_extensions import Self

Item = TypeVar("Item")
Result = TypeVar("Result")


class Worker(Protocol):
    """Does pieces of work whose results are on disk when it says so."""

    def run(self, items: Iterable[int]) -> Iterator[Any]:
        """Do these items, in order; yields a small receipt for each one that is on disk."""

    def close(self) -> None:
        """Let go of what it holds; called once, also after an error."""


class Engine(ABC):
    """Which processes do a piece of work.

    name: "local", "ranks" or "ray".
    run_id: of the command, the same in all of its processes.
    rank: this process' number among those of one command, None where they are not numbered.
    world: how many processes run the same command at once; 1 where a command is one process, whatever it has done
        elsewhere.
    is_first: whether this process is the one that reports: of the ranks of one command, all but one are silent.
    is_remote: whether workers are other processes, to which everything is pickled.
    device: where this process loads a proxy, as `load_proxy` takes it.
    hang_after_s: how long work without any progress is borne where nobody has said; None: for ever.

    folder: the run directory that the work is for, through which processes of one command may exchange results.

    Outside `with`, `close` is called when no more work will come.
    """

    name: str
    run_id: str
    rank: int | None = None
    world = 1
    is_first = True
    is_remote = False
    device = "auto"
    hang_after_s: float | None = None
    folder: str | os.PathLike | None = None

    def dtype(self, asked: Any = "auto") -> Any:
        """The precision that a proxy is loaded in, as `load_proxy` takes it: "auto" is by the hardware of workers."""
        return asked

    def close(self) -> None:  # noqa: B027
        """Let go of what it holds, if anything; more work may still follow, and takes hold anew."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """Those that this process looks through where the processes of one command share a look."""
        return items

    @abstractmethod
    def map(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """(place in `items`, result) of each item, as they are done, in any order.

        make: called in each worker, once or again after a loss, for the function that takes an item; it is pickled for
            workers elsewhere, as items and results are, so it is a function of a module, a `functools.partial` of one,
            or an object of a class of a module.
        A result does not depend on the engine: whoever adds results up does so in the order of places. An item whose
        worker is lost is done again. An error of the function ends the iteration with it.
        """

    @abstractmethod
    def work(self, open_worker: Callable[[], Worker], items: Sequence[int]) -> Iterator[Any]:
        """Receipts of items whose results go to disk, as they are done, in any order.

        open_worker: called once in each worker process; pickled for workers elsewhere.
        items: may be gone through again, and then lack what has been done meanwhile; `in` says whether one is left.
        Items that someone else has done meanwhile may have no receipt.
        """


class LocalEngine(Engine):
    """This process, one item after the other."""

    name = "local"

    def __init__(self) -> None:
        self.run_id = uuid4().hex[:16]

    def map(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """See `Engine.map`."""
        function = make()
        for place, item in enumerate(items):
            yield place, function(item)

    def work(self, open_worker: Callable[[], Worker], items: Sequence[int]) -> Iterator[Any]:
        """See `Engine.work`."""
        worker = open_worker()
        try:
            yield from worker.run(items)
        finally:
            worker.close()
