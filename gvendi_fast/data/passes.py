"""Passes over pools and run directories as map and reduce, on any engine.

A pass reads every row once. A task reads one chunk, block by block, and returns sums of it, which are small whatever
the number of rows; who asked adds the sums up in the order of the chunks. Chunks and that order are the same for every
engine and number of workers, so results are the same to the bit.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from gvendi_fast.base.engine import Engine, LocalEngine
from gvendi_fast.data.chunks import Chunk, Reader, portable, run_chunks

if TYPE_CHECKING:
    from gvendi_fast.data.parts import Part
    from gvendi_fast.data.pool import Pool
    from gvendi_fast.data.run_directory import RunDirectory

# Results that wait in memory for those before them; more of them wait in a file.
_WAITING = 4

Result = TypeVar("Result")


class Sums(Protocol):
    """What a task collects of a chunk."""

    def add(self, first: int, rows: torch.Tensor, *along: Any) -> None:
        """Take up rows float32 [n, K] of length 1, numbered from `first`, with their parts of what goes along."""

    def result(self) -> Any:
        """What the task returns: of arrays and numbers, as it may be pickled."""


def over_pool(
    engine: Engine | None,
    pool: Pool,
    begin: Callable[[], Sums],
    along: Sequence[np.ndarray] = (),
    most_tasks: int | None = None,
) -> Iterator[Any]:
    """One pass over a pool: the results of its chunks, in order.

    engine: which processes read; None is this one. A pool in this process' memory is read here in any case.
    begin: makes the sums of a chunk; pickled for other processes, so a class or function of a module, or a partial of
        one.
    along: arrays [N, ...] of which each block's rows go with it.
    most_tasks: join chunks to at most so many, where results are large.
    """
    reader = pool.reader()
    chunks = at_most(pool.chunks(), most_tasks)
    items = [
        (chunk, tuple(column[chunk.first : chunk.first + chunk.rows] for column in along)) for chunk in chunks
    ]
    if engine is None or reader.is_here:
        engine = LocalEngine()
    yield from in_order(engine.map(partial(_PoolTask, reader, begin), items))


class Together:
    """Several sums in one pass: made by `begins`, results as a tuple in their order. `along` goes to each."""

    def __init__(self, *begins: Callable[[], Sums]) -> None:
        self._sums = [begin() for begin in begins]

    def add(self, first: int, rows: torch.Tensor, *along: Any) -> None:
        """See `Sums`."""
        for sums in self._sums:
            sums.add(first, rows, *along)

    def result(self) -> tuple[Any, ...]:
        """See `Sums`."""
        return tuple(sums.result() for sums in self._sums)


class _PoolTask:
    """What a worker does with the chunks of a pool."""

    def __init__(self, reader: Reader, begin: Callable[[], Sums]) -> None:
        self._reader, self._begin = reader, begin

    def __call__(self, item: tuple[Chunk, tuple[np.ndarray, ...]]) -> Any:
        chunk, along = item
        sums = self._begin()
        for first, rows in self._reader.blocks(chunk):
            here = slice(first - chunk.first, first - chunk.first + len(rows))
            sums.add(first, rows, *(column[here] for column in along))
        return sums.result()


def taken(engine: Engine | None, pool: Pool, numbers: np.ndarray) -> torch.Tensor:
    """`pool.take(numbers)`, read by an engine."""
    reader = pool.reader()
    if engine is None or reader.is_here:
        return pool.take(numbers)
    out, found = torch.empty(len(numbers), pool.dim), list(pool.places(numbers))
    items = [(chunk, numbers[places]) for chunk, places in found]
    # Rows are not added up, so they need not come in order.
    for place, rows in engine.map(partial(_TakeTask, reader), items):
        out[torch.from_numpy(found[place][1])] = torch.from_numpy(rows)
    return out


class _TakeTask:
    """What a worker does where rows are taken."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __call__(self, item: tuple[Chunk, np.ndarray]) -> np.ndarray:
        return self._reader.take(*item).numpy()


def over_run(
    engine: Engine | None,
    run: RunDirectory,
    columns: Sequence[str],
    task: Callable[[Iterator[Part]], Result],
    most_tasks: int | None = None,
) -> Iterator[Result]:
    """One pass over the parts of a run directory: what `task` makes of the parts of each chunk, in order.

    columns: as in `RunDirectory.iterate`.
    task: a function of a module or a partial of one; it reads one part at a time.
    """
    chunks = at_most(run_chunks(run), most_tasks)
    make = partial(_RunTask, _Portable(run), tuple(columns), task)
    # Of all parts at once their order can be checked too.
    items = [None] if len(chunks) == 1 else [chunk.units for chunk in chunks]
    yield from in_order((engine or LocalEngine()).map(make, items))


class _Portable:
    """A run directory that can be pickled for a process in another folder."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def __getstate__(self) -> dict[str, Any]:
        return {"run": portable(self.run)}


class _RunTask:
    """What a worker does with the parts of a run directory."""

    def __init__(
        self, of: _Portable, columns: tuple[str, ...], task: Callable[[Iterator[Part]], Any]
    ) -> None:
        self._run, self._columns, self._task = of.run, columns, task

    def __call__(self, units: tuple[int, ...] | None) -> Any:
        return self._task(self._run.iterate(self._columns, units))


def at_most(chunks: list[Chunk], tasks: int | None) -> list[Chunk]:
    """The same rows in at most so many chunks of about as many rows."""
    if tasks is None or len(chunks) <= tasks:
        return chunks
    together = -(-len(chunks) // tasks)
    return [chunks[0].joined(chunks[first : first + together]) for first in range(0, len(chunks), together)]


def in_order(results: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Results that come with their places in any order, by place; few of them are in memory at a time."""
    held: dict[int, Result] = {}
    with tempfile.SpooledTemporaryFile(max_size=1) as file:
        spilled: dict[int, int] = {}
        due = 0
        for place, result in results:
            if place != due:
                if len(held) < _WAITING:
                    held[place] = result
                else:
                    spilled[place] = _written(file, result)
                continue
            yield result
            due += 1
            while due in held or due in spilled:
                yield held.pop(due) if due in held else _read(file, spilled.pop(due))
                due += 1


def _written(file: IO[bytes], result: Any) -> int:
    start = file.seek(0, 2)
    pickle.dump(result, file, protocol=5)
    return start


def _read(file: IO[bytes], start: int) -> Any:
    file.seek(start)
    return pickle.load(file)
