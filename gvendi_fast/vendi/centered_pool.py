"""A pool without the mean direction of a reference, as a pool: whatever reads a pool reads it centred."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from gvendi_fast.base.engine import Engine
from gvendi_fast.base.unit_length import strips
from gvendi_fast.data.chunks import Chunk, Reader
from gvendi_fast.data.passes import over_pool
from gvendi_fast.data.pool import POOL_BLOCK, Pool, PoolLike, as_pool
from gvendi_fast.data.strings import taken
from gvendi_fast.vendi.centered import RowMean, centre_rows, centred_spec, check_mean


def pool_mean(source: PoolLike, engine: Engine | None = None) -> RowMean:
    """The mean of a pool's unit rows, in one pass: of a matrix [N, K], a run directory or its path, or a pool."""
    pool = as_pool(source)
    mean = RowMean(pool.dim, pool.spec)
    for part in over_pool(engine, pool, partial(MeanSums, pool.dim, pool.spec)):
        mean.merge(part)
    return mean


class MeanSums:
    """The sum of a chunk's rows, as a `RowMean`."""

    def __init__(self, dim: int, spec: dict | None) -> None:
        self._mean = RowMean(dim, spec)

    def add(self, first: int, rows: torch.Tensor) -> None:
        """See `Sums`."""
        self._mean.update(rows)

    def result(self) -> RowMean:
        """See `Sums`."""
        return self._mean


class _Kept:
    """Which rows of a chunk have a direction without the mean: their numbers int64."""

    def __init__(self, vector: torch.Tensor) -> None:
        self._vector = vector
        self._found = [np.empty(0, np.int64)]

    def add(self, first: int, rows: torch.Tensor) -> None:
        """See `Sums`."""
        for strip in strips(rows):
            some = centre_rows(rows[strip].double(), self._vector)[1]
            self._found.append(np.flatnonzero(some.numpy()) + first + strip.start)

    def result(self) -> np.ndarray:
        """See `Sums`."""
        return np.concatenate(self._found)


@dataclass(frozen=True)
class _KeptChunk(Chunk):
    """Those rows of a chunk that have the numbers `kept`."""

    of: Chunk = field(default=Chunk(0, 0))
    kept: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @staticmethod
    def joined(chunks: Sequence[Chunk]) -> Chunk:
        """See `Chunk`."""
        parts = [chunk for chunk in chunks if isinstance(chunk, _KeptChunk)]
        of = parts[0].of.joined([part.of for part in parts])
        kept = np.concatenate([part.kept for part in parts])
        return _KeptChunk(chunks[0].first, len(kept), of=of, kept=kept)


class _KeptReader:
    """Reads `_KeptChunk`s."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self.is_here = reader, reader.is_here

    def blocks(self, chunk: Chunk) -> Iterator[tuple[int, torch.Tensor]]:
        """See `Reader`."""
        assert isinstance(chunk, _KeptChunk)
        for first, block in self._reader.blocks(chunk.of):
            begin, end = np.searchsorted(chunk.kept, [first, first + len(block)])
            if end - begin == len(block):
                yield chunk.first + int(begin), block
            elif end > begin:
                yield chunk.first + int(begin), block[torch.from_numpy(chunk.kept[begin:end] - first)]

    def take(self, chunk: Chunk, numbers: np.ndarray) -> torch.Tensor:
        """See `Reader`."""
        assert isinstance(chunk, _KeptChunk)
        return self._reader.take(chunk.of, chunk.kept[numbers - chunk.first])


class KeptPool(Pool):
    """Some rows of a pool, numbered from 0 in its order; `kept` int64 [N] are their numbers there, ascending."""

    def __init__(self, pool: Pool, kept: np.ndarray) -> None:
        self.pool, self.kept, self.dim, self.spec = pool, kept, pool.dim, pool.spec
        self.ids = taken(pool.ids, kept)
        self.groups = None if pool.groups is None else taken(pool.groups, kept)

    def chunks(self) -> list[Chunk]:
        found: list[Chunk] = []
        for chunk in self.pool.chunks():
            begin, end = np.searchsorted(self.kept, [chunk.first, chunk.first + chunk.rows])
            if end > begin:
                found.append(_KeptChunk(int(begin), int(end - begin), of=chunk, kept=self.kept[begin:end]))
        return found

    def reader(self) -> Reader:
        return _KeptReader(self.pool.reader())

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        return self.pool.take(self.kept[np.asarray(numbers, np.int64)])

    def numbers(self, name: str) -> np.ndarray:
        return self.pool.numbers(name)[self.kept]


class _CenteredReader:
    """Reads rows less a mean, scaled to length 1 again."""

    def __init__(self, reader: Reader, vector: torch.Tensor) -> None:
        self._reader, self._vector, self.is_here = reader, vector, reader.is_here

    def blocks(self, chunk: Chunk) -> Iterator[tuple[int, torch.Tensor]]:
        """See `Reader`."""
        for first, block in self._reader.blocks(chunk):
            for start in range(0, len(block), POOL_BLOCK):
                yield first + start, self.centred(block[start : start + POOL_BLOCK])

    def take(self, chunk: Chunk, numbers: np.ndarray) -> torch.Tensor:
        """See `Reader`."""
        return self.centred(self._reader.take(chunk, numbers))

    def centred(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows centred, in place: of one at the limit of `centre_rows` the pass over all rows has decided."""
        for strip in strips(rows):
            left = rows[strip].double() - self._vector
            rows[strip] = left / torch.linalg.vector_norm(left, dim=1, keepdim=True)
        return rows


class CenteredPool(Pool):
    """The rows of a pool less a mean, scaled to length 1 again.

    pool: a matrix [N, K], a run directory or its path, or a pool.
    mean: of the reference; None takes the pool's own, in a pass of its own.
    engine: which processes read in these passes; None is this one.
    kept: int64 [n], the numbers in the pool of the rows that have a direction left; the others are not in this pool,
        whose rows are numbered anew, from 0. One pass finds them.
    plain: the same rows under the same numbers, not centred.
    left_out: how many rows equal the mean.
    Raises GvendiError where the mean has another width or spec.
    """

    def __init__(self, pool: PoolLike, mean: RowMean | None = None, engine: Engine | None = None) -> None:
        pool = as_pool(pool)
        self.mean = pool_mean(pool, engine) if mean is None else mean
        check_mean(self.mean)
        spec = centred_spec(pool.spec, self.mean, pool.dim)
        self._vector = self.mean.vector()
        kept = list(over_pool(engine, pool, partial(_Kept, self._vector)))
        self.plain = KeptPool(pool, np.concatenate([np.empty(0, np.int64), *kept]))
        self.kept, self.left_out = self.plain.kept, len(pool) - len(self.plain)
        self.dim, self.ids, self.groups = pool.dim, self.plain.ids, self.plain.groups
        # How a matrix was made is not known.
        self.spec = None if pool.spec is None else spec

    def chunks(self) -> list[Chunk]:
        return self.plain.chunks()

    def reader(self) -> Reader:
        return _CenteredReader(self.plain.reader(), self._vector)

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        return _CenteredReader(self.plain.reader(), self._vector).centred(self.plain.take(numbers))

    def numbers(self, name: str) -> np.ndarray:
        return self.plain.numbers(name)
