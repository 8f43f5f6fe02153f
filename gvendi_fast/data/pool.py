"""A pool of sketches, read in blocks or by row number, from memory or a run directory.

A pool is cut into chunks, always the same ones: whoever reads it in other processes (passes.py) gives each a chunk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix, unit_floats
from gvendi_fast.data import chunks as of_chunks
from gvendi_fast.data.chunks import Chunk, Reader, portable, unit_chunks
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.strings import Strings

POOL_BLOCK = 4096
NUMBERS = ("row", "tokens", "length", "loss", "gradient_norm")


class Pool:
    """The sketches of N rows, scaled to length 1: [N, K] with ids; `len(pool)` is N. Made by `as_pool`.

    dim: K.
    ids: one string a row, unique.
    groups: one string a row, or None.
    spec: how the sketches were made, or None.
    Any number of threads may read a pool at once.
    """

    dim: int
    ids: Sequence[str]
    groups: Sequence[str] | None
    spec: dict | None

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first row, float32 [n, K] of length 1) over the whole pool in order; each call begins anew."""
        reader = self.reader()
        for chunk in self.chunks():
            yield from reader.blocks(chunk)

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        """The sketches of the rows with these numbers, in this order: float32 [m, K] of length 1."""
        wanted = np.asarray(numbers, np.int64)
        out, reader = torch.empty(len(wanted), self.dim), self.reader()
        for chunk, places in self.places(wanted):
            out[torch.from_numpy(places)] = reader.take(chunk, wanted[places])
        return out

    def places(self, numbers: np.ndarray) -> Iterator[tuple[Chunk, np.ndarray]]:
        """(chunk, places of its rows among these numbers, by number) for each chunk that has some."""
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        if len(ordered) and not 0 <= ordered[0] <= ordered[-1] < len(self):
            raise GvendiError(
                f"numbers are from {ordered[0]} to {ordered[-1]}; wanted those of rows, from 0 to {len(self) - 1}"
            )
        for chunk in self.chunks():
            begin, end = np.searchsorted(ordered, [chunk.first, chunk.first + chunk.rows])
            if end > begin:
                yield chunk, order[begin:end]

    def chunks(self) -> list[Chunk]:
        """The rows in order, cut always in the same way."""
        raise NotImplementedError

    def reader(self) -> Reader:
        """What reads the chunks, here or elsewhere."""
        raise NotImplementedError

    def numbers(self, name: str) -> np.ndarray:
        """One number a row [N]: "row" (ordinal in the corpus), "tokens", "length", "loss" or "gradient_norm"."""
        raise GvendiError(f"the pool is a matrix and has no {name!r}; give a run directory, which stores it")


class MatrixPool(Pool):
    """Sketches in memory."""

    def __init__(
        self, rows: Rows, ids: Sequence[str] | None = None, groups: Sequence[str] | None = None
    ) -> None:
        check_matrix(rows)
        self.dim, self.spec = rows.shape[1], None
        self.ids = [str(i) for i in range(len(rows))] if ids is None else list(ids)
        self.groups = None if groups is None else list(groups)
        for name, given in (("ids", self.ids), ("groups", self.groups)):
            if given is not None and len(given) != len(rows):
                raise GvendiError(
                    f"{name} has {len(given)} entries for {len(rows)} rows; give one for each row"
                )
        if len(set(self.ids)) != len(self.ids):
            raise GvendiError("ids holds an id twice; give every row an id of its own")
        self._rows = rows

    def chunks(self) -> list[Chunk]:
        # Whole blocks, whatever the size of a chunk is.
        step = -(-of_chunks.CHUNK_ROWS // POOL_BLOCK) * POOL_BLOCK
        return [Chunk(first, min(step, len(self) - first)) for first in range(0, len(self), step)]

    def reader(self) -> Reader:
        return _MatrixReader(self._rows)

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        wanted = np.asarray(numbers, np.int64)
        out = torch.empty(len(wanted), self.dim)
        for first in range(0, len(wanted), POOL_BLOCK):
            here = wanted[first : first + POOL_BLOCK]
            out[first : first + len(here)] = unit_floats(self._rows[here])
        return out


class _MatrixReader:
    is_here = True

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def blocks(self, chunk: Chunk) -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(chunk.first, chunk.first + chunk.rows, POOL_BLOCK):
            last = min(first + POOL_BLOCK, chunk.first + chunk.rows)
            yield first, unit_floats(self._rows[first:last], first=first)

    def take(self, chunk: Chunk, numbers: np.ndarray) -> torch.Tensor:
        return unit_floats(self._rows[numbers])


class _RunReader:
    """Reads the parts of a run directory, one in memory at a time."""

    is_here = False

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def __getstate__(self) -> dict[str, Any]:
        return {"_run": portable(self._run)}

    def blocks(self, chunk: Chunk) -> Iterator[tuple[int, torch.Tensor]]:
        first = chunk.first
        for part in self._run.iterate(["sketch"], units=chunk.units):
            rows = len(part.sketches)
            if rows:
                yield first, unit_floats(part.sketches, first=first)
            first += rows

    def take(self, chunk: Chunk, numbers: np.ndarray) -> torch.Tensor:
        starts = chunk.first + np.cumsum([0, *chunk.counts])
        ends = np.searchsorted(numbers, starts)
        out = torch.empty(len(numbers), self._run.dim)
        for place in np.flatnonzero(np.diff(ends)):
            (part,) = self._run.iterate(["sketch"], units=[chunk.units[place]])
            here = slice(ends[place], ends[place + 1])
            out[here] = unit_floats(part.sketches[numbers[here] - starts[place]])
        return out


class _Parts(Pool):
    """The sketches of a run directory, read from its parts on each call, one part in memory at a time."""

    run: RunDirectory
    _chunks: list[Chunk]

    def chunks(self) -> list[Chunk]:
        return self._chunks

    def reader(self) -> Reader:
        return _RunReader(self.run)


class ChunkPool(Pool):
    """The sketches of another pool alone, which can be sent to other processes where its reader can."""

    def __init__(self, pool: Pool) -> None:
        self.dim, self.spec, self.ids, self.groups = pool.dim, pool.spec, (), None
        self._chunks, self._reader, self._rows = pool.chunks(), pool.reader(), len(pool)

    def __len__(self) -> int:
        return self._rows

    def chunks(self) -> list[Chunk]:
        return self._chunks

    def reader(self) -> Reader:
        return self._reader


class BlockPool(_Parts):
    """The sketches of a run directory in blocks alone: rows have no ids, and nothing of them is held in memory.

    chunks: those of the run's rows.
    """

    def __init__(self, run: RunDirectory, chunks: list[Chunk]) -> None:
        self.run, self.spec, self.dim = run, run.sketch_spec, run.dim
        self.ids, self.groups, self._chunks = (), None, chunks

    def __len__(self) -> int:
        return sum(chunk.rows for chunk in self._chunks)


class RunPool(_Parts):
    """The sketches of a run directory with what it stores of each row.

    Memory: ids and groups as Arrow holds them, and the numbers that were asked for.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.spec, self.dim = run, run.sketch_spec, run.dim
        ids, groups, units, rows = [], [], [], []
        for part in run.iterate(["id", "group"]):
            ids.append(Strings(part.ids))
            groups.append(Strings(part.groups))
            units.append(part.unit)
            rows.append(len(part.ids))
        self.ids: Strings = Strings.joined(ids)
        self.groups: Strings = Strings.joined(groups)
        self._units, self._numbers = units, {}
        self._chunks = unit_chunks(units, rows)
        if not len(self.ids):
            raise GvendiError(f"'{run.path}' holds no sketches; run 'gvendi sketch' to the end first")

    def numbers(self, name: str) -> np.ndarray:
        if name not in NUMBERS:
            raise GvendiError(
                f"{name!r} is not a number that a run directory stores; choose one of {', '.join(NUMBERS)}"
            )
        if name not in self._numbers:
            attribute = "rows" if name == "row" else name
            # The parts that were there when the pool was opened.
            columns = [getattr(part, attribute) for part in self.run.iterate([name], units=self._units)]
            self._numbers[name] = np.concatenate(columns)
        return self._numbers[name]


PoolLike = Pool | RunDirectory | str | os.PathLike | Rows


def as_pool(source: PoolLike) -> Pool:
    """A pool from a matrix [N, K], a run directory or its path; a pool comes back as it is."""
    if isinstance(source, Pool):
        return source
    if isinstance(source, str | os.PathLike):
        source = RunDirectory.load(source)
    return RunPool(source) if isinstance(source, RunDirectory) else MatrixPool(source)
