"""Draws of rows that depend on the rows themselves and a seed, never on their order.

A row's key is a hash of its numbers: multiply-and-add modulo 2^64 over its float32 words, then SplitMix64's finaliser
(Steele, Lea, Flood, OOPSLA 2014). Draw t gives a row the time -ln(u) / w, u in (0, 1) from its key and t: the row
with the least time is a draw with probability in proportion to w (exponential races). Equal rows have equal keys and
count as one in a draw.
"""

from __future__ import annotations

import numpy as np
import torch

# In float32 the cosine of two rows of one direction is above 1 minus this.
SAME_DIRECTION = 1e-6
# Seeds are chosen by rows rounded to multiples of 2^-11. Products of such integers and their sums stay below 2^24,
# where float32 is exact: the same bits for any order of the sums. Cosines are off by some 2e-4, which is small enough
# for draws.
GRID = 2.0**11
_GOLDEN = 0x9E3779B97F4A7C15


def row_keys(rows: torch.Tensor, seed: int) -> np.ndarray:
    """One key for each row of float32 [N, K] on the CPU: uint64 [N]."""
    # Adding 0 makes -0 and 0 one number.
    words = (rows + 0.0).numpy().view(np.uint32).astype(np.uint64)
    start = np.uint64(seed % (1 << 64))
    multipliers = _mix(
        (np.arange(rows.shape[1], dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) ^ start
    )
    return _mix(words @ (multipliers | np.uint64(1)))


def times(keys: np.ndarray, draw: int) -> np.ndarray:
    """Exponential times float64 [N] of rate 1, one a key, for draw number `draw`."""
    words = _mix(keys + np.uint64(draw * _GOLDEN % (1 << 64)))
    return -np.log(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def plus_plus(rows: torch.Tensor, keys: np.ndarray, n_clusters: int) -> torch.Tensor:
    """k-means++ seeds on the sphere: positions int64 [C] of C of the unit rows float32 [N, K], N >= C, keys [N].

    The first row is drawn uniformly. For each next one 2 + ln C rows are drawn with probability in proportion to their
    gap, 1 - (largest cosine to a seed), half the squared distance; of these, the row is taken with which the sum of
    gaps is least (greedy k-means++; Arthur, Vassilvitskii, SODA 2007). Where all rows lie on seeds, any row is drawn.
    """
    grid = (rows * GRID).round()
    # Norms of integer rows; float64 holds their squares exactly.
    norm = grid.double().square().sum(dim=1).sqrt()
    trials = 2 + int(np.log(n_clusters))
    free, gap, chosen = np.ones(len(rows), dtype=bool), np.full(len(rows), 2.0), []
    for draw in range(n_clusters):
        weight = np.where(gap > SAME_DIRECTION, gap, 0.0)
        if not weight.any():
            weight = free.astype(np.float64)
        # Rows of weight 0 are never drawn.
        arrival = np.full(len(rows), np.inf)
        np.divide(times(keys, draw), weight, out=arrival, where=weight > 0)
        drawn = arrival.argsort(kind="stable")[: trials if draw else 1]
        drawn = drawn[arrival[drawn] < np.inf]
        picks = torch.from_numpy(drawn).to(rows.device)
        cosine = (grid @ grid[picks].T).double() / (norm[:, None] * norm[picks])
        left = np.minimum(gap, 1.0 - cosine.T.cpu().numpy())
        best = int(left.sum(axis=1).argmin())
        chosen.append(int(drawn[best]))
        free[chosen[-1]], gap = False, left[best]
    return torch.tensor(chosen)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
