"""Few rows have few coordinates: a selection among them need not diagonalise matrices of the sketches' width.

    Q [K, r] orthonormal, its range holds every row z_i of the pool and that of A_0, the rows chosen already
    z_i -> Q^T z_i,   A_0 -> Q^T A_0 Q
Lengths, angles and all eigenvalues but zeros stay, so every objective has the same value for the same rows. A pool of
27 rows at K = 8192 would ask for 5 GB and minutes otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from gvendi_fast.base.draws import random_words
from gvendi_fast.data.distinct import digests
from gvendi_fast.data.pool import MatrixPool
from gvendi_fast.selection.problem import Problem
from gvendi_fast.vendi.state import VendiState

# Directions drawn beyond the rank of A_0, so that its range is found whatever the draw.
_MORE = 8
# Share of the trace of A_0 that may lie outside: float32 products leave that much in directions without rows.
_OUTSIDE = 1e-6


def small_side(problem: Problem) -> Problem:
    """The same problem in coordinates of its rows' own; as it is where that would not halve their number."""
    pool, given = problem.pool, problem.given
    more = given.n + _MORE if given.n else 0
    if 2 * (len(pool) + more) > pool.dim:
        return problem
    rows = torch.cat([block for _, block in pool.blocks()])
    # In the order of ids, so that results do not depend on that of the rows; copies once, so that they stay copies.
    by_rank = np.argsort(problem.rank)
    first: dict[bytes, int] = {}
    copy_of = np.empty(len(rows), np.int64)
    for number, digest in zip(by_rank, digests(rows[torch.from_numpy(by_rank)].numpy()), strict=True):
        copy_of[number] = first.setdefault(digest, len(first))
    distinct = rows[torch.from_numpy(by_rank[np.unique(copy_of[by_rank], return_index=True)[1]])].double()
    columns = [distinct.T]
    matrix = given.matrix.cpu()
    if more:
        words = random_words(problem.seed, 3, pool.dim * more).reshape(pool.dim, more)
        columns.append(matrix @ torch.from_numpy(words.astype(np.float64) / 2.0**64 - 0.5))
    basis = torch.linalg.qr(torch.cat(columns, dim=1))[0]
    moved = VendiState(basis.shape[1], given.spec)
    if more:
        moved.matrix += basis.T @ matrix @ basis
        moved.n = given.n
        if float(matrix.trace() - moved.matrix.trace()) > _OUTSIDE * float(matrix.trace()):
            return problem
    coordinates = (distinct @ basis)[torch.from_numpy(copy_of)]
    targets = problem.targets
    return replace(
        problem,
        pool=MatrixPool(coordinates, pool.ids, pool.groups),
        given=moved,
        targets=None if targets is None else (targets.double() @ basis).float(),
    )
