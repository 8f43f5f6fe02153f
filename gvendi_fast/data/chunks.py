"""Pools and run directories in chunks: what one task of a pass reads."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gvendi_fast.data.run_files import unit_ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gvendi_fast.data.run_directory import RunDirectory

# Rows of a chunk, at most, unless a part has more.
CHUNK_ROWS = 1 << 15
# What a part is taken to hold where nothing says how many rows it has.
_PART_ROWS = 512


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a pool: `rows` of them from number `first` on.

    units, counts: of a run directory, their work units, and how many of the rows each has.
    """

    first: int
    rows: int
    units: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @staticmethod
    def joined(chunks: Sequence[Chunk]) -> Chunk:
        """Chunks that follow each other as one."""
        units = tuple(itertools.chain.from_iterable(chunk.units for chunk in chunks))
        counts = tuple(itertools.chain.from_iterable(chunk.counts for chunk in chunks))
        return Chunk(chunks[0].first, sum(chunk.rows for chunk in chunks), units, counts)


class Reader(Protocol):
    """Reads the chunks of a pool.

    is_here: whether only this process can; else it can be pickled, and is small.
    """

    is_here: bool

    def blocks(self, chunk: Chunk) -> Iterator[tuple[int, torch.Tensor]]:
        """As `Pool.blocks`, of a chunk; blocks end where chunks do."""

    def take(self, chunk: Chunk, numbers: np.ndarray) -> torch.Tensor:
        """As `Pool.take`, of ascending numbers of a chunk's rows."""


def portable(run: RunDirectory) -> RunDirectory:
    """The same run directory for a process that works in another folder."""
    moved = copy.copy(run)
    moved.path, moved.parts = run.path.absolute(), run.parts.absolute()
    return moved


def unit_chunks(units: Sequence[int], rows: Sequence[int]) -> list[Chunk]:
    """Work units of so many rows each as chunks: consecutive ones, as many as have CHUNK_ROWS rows together."""
    found: list[Chunk] = []
    begin = first = count = 0
    for place, more in enumerate(rows):
        if count and count + more > CHUNK_ROWS:
            found.append(Chunk(first, count, tuple(units[begin:place]), tuple(rows[begin:place])))
            begin, first, count = place, first + count, 0
        count += more
    if begin < len(units):
        found.append(Chunk(first, count, tuple(units[begin:]), tuple(rows[begin:])))
    return found


def run_chunks(run: RunDirectory) -> list[Chunk]:
    """The work units of a run directory that are done, as chunks by the rows that they have in the corpus.

    Their numbers of rows are estimates: some may have been rejected.
    """
    units = run.done()
    ranges = None if run.manifest is None else unit_ranges(run.manifest)
    return unit_chunks(units, [_PART_ROWS if ranges is None else ranges.of(unit)[1] for unit in units])
