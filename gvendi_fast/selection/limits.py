"""What no choice of rows can exceed, whatever their directions: the trivial limits of a selection's scores.

    Sigma = (1 - s) Sigma_0 + s Sigma_S,   s = size / (n_0 + size),   Sigma_0, n_0: rows that are chosen already
    H(Sigma_S) <= ln min(distinct rows among the chosen, K)
    H(Sigma)   <= min(ln K, h(s) + (1 - s) H(Sigma_0) + s H(Sigma_S)),   h(s) = -s ln s - (1 - s) ln(1 - s)
The last line is the bound on the entropy of a mixture; with all rows different it is at most ln(n_0 + size).
"""

from __future__ import annotations

import math

import numpy as np

from gvendi_fast.data.distinct import digests
from gvendi_fast.data.pool import Pool
from gvendi_fast.selection.capped_simplex import Limits, best_vertex
from gvendi_fast.vendi.state import VendiState


def most_distinct(pool: Pool, size: int, limits: Limits | None = None) -> int:
    """How many different rows a choice of `size` rows can hold at most; a copy is a row with the same numbers.

    Rows are read until `size` different ones are found, so that only a pool of copies is read whole. Rows that differ
    by rounding count as different: the result is then larger, and remains a limit.
    """
    seen: set[bytes] = set()
    # Of each group, as a row may be in several.
    of_group: list[set[bytes]] = [set() for _ in range(0 if limits is None else len(limits.most))]
    found = 0
    for first, block in pool.blocks():
        for number, digest in enumerate(digests(block.numpy()), first):
            seen.add(digest)
            if limits is None:
                found = len(seen)
            else:
                code = int(limits.codes[number])
                group = of_group[code]
                if digest not in group and len(group) < limits.most[code]:
                    group.add(digest)
                    found += 1
            if min(found, len(seen)) >= size:
                return size
    return min(found, len(seen))


def entropy_limit(pool: Pool, size: int, include: VendiState | None, limits: Limits | None) -> float:
    """H_1 in nats that no choice of `size` rows, together with the rows of `include`, exceeds."""
    of_chosen = math.log(min(most_distinct(pool, size, limits), pool.dim))
    if include is None or include.n == 0:
        return of_chosen
    share = size / (size + include.n)
    mixed = share * of_chosen + (1 - share) * max(include.entropy(), 0.0)
    return min(math.log(pool.dim), mixed - share * math.log(share) - (1 - share) * math.log(1 - share))


def quality_limit(quality: np.ndarray, order: np.ndarray, size: int, limits: Limits | None) -> float:
    """ln of the largest mean quality that `size` rows can have; quality float [N] above 0, `order` as in relaxed."""
    return math.log(float(quality[best_vertex(quality, order, size, limits)].mean()))
