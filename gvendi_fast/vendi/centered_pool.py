"""A pool without the mean direction of a reference, as a pool: whatever reads a pool reads it centred."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gvendi_fast.data.pool import POOL_BLOCK, Pool, PoolLike, as_pool
from gvendi_fast.vendi.centered import RowMean, centre_rows, centred_spec, check_mean


def pool_mean(source: PoolLike) -> RowMean:
    """The mean of a pool's unit rows, in one pass: of a matrix [N, K], a run directory or its path, or a pool."""
    pool = as_pool(source)
    mean = RowMean(pool.dim, pool.spec)
    for _, block in pool.blocks():
        mean.update(block)
    return mean


class KeptPool(Pool):
    """Some rows of a pool, numbered from 0 in its order; `kept` int64 [N] are their numbers there, ascending."""

    def __init__(self, pool: Pool, kept: np.ndarray) -> None:
        self.pool, self.kept, self.dim, self.spec = pool, kept, pool.dim, pool.spec
        self.ids = [pool.ids[i] for i in kept]
        self.groups = None if pool.groups is None else [pool.groups[i] for i in kept]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        for first, block in self.pool.blocks():
            begin, end = np.searchsorted(self.kept, [first, first + len(block)])
            if end - begin == len(block):
                yield int(begin), block
            elif end > begin:
                yield int(begin), block[torch.from_numpy(self.kept[begin:end] - first)]

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        return self.pool.take(self.kept[np.asarray(numbers, np.int64)])

    def numbers(self, name: str) -> np.ndarray:
        return self.pool.numbers(name)[self.kept]


class CenteredPool(Pool):
    """The rows of a pool less a mean, scaled to length 1 again.

    pool: a matrix [N, K], a run directory or its path, or a pool.
    mean: of the reference; None takes the pool's own, in a pass of its own.
    kept: int64 [n], the numbers in the pool of the rows that have a direction left; the others are not in this pool,
        whose rows are numbered anew, from 0. One pass finds them.
    plain: the same rows under the same numbers, not centred.
    left_out: how many rows equal the mean.
    Raises GvendiError where the mean has another width or spec.
    """

    def __init__(self, pool: PoolLike, mean: RowMean | None = None) -> None:
        pool = as_pool(pool)
        self.mean = pool_mean(pool) if mean is None else mean
        check_mean(self.mean)
        spec = centred_spec(pool.spec, self.mean, pool.dim)
        self._vector = self.mean.vector()
        kept = [
            np.flatnonzero(centre_rows(part.double(), self._vector)[1].numpy()) + first + start
            for first, block in pool.blocks()
            for start, part in _strips(block)
        ]
        self.plain = KeptPool(pool, np.concatenate([np.empty(0, np.int64), *kept]))
        self.kept, self.left_out = self.plain.kept, len(pool) - len(self.plain)
        self.dim, self.ids, self.groups = pool.dim, self.plain.ids, self.plain.groups
        # How a matrix was made is not known.
        self.spec = None if pool.spec is None else spec

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        for first, block in self.plain.blocks():
            for start, part in _strips(block):
                yield first + start, self._centred(part)

    def take(self, numbers: Sequence[int] | np.ndarray) -> torch.Tensor:
        rows = self.plain.take(numbers)
        # In place and in strips, because float64 takes twice the memory.
        for _, part in _strips(rows):
            part.copy_(self._centred(part))
        return rows

    def numbers(self, name: str) -> np.ndarray:
        return self.plain.numbers(name)

    def _centred(self, rows: torch.Tensor) -> torch.Tensor:
        # Of a row at the limit of `centre_rows` the pass over all rows has decided.
        left = rows.double() - self._vector
        return (left / torch.linalg.vector_norm(left, dim=1, keepdim=True)).float()


def _strips(rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(rows), POOL_BLOCK):
        yield start, rows[start : start + POOL_BLOCK]
