"""Choosing the most diverse rows of a pool: `select(pool, size)`.

    vendi     maximise -tr(A ln A), A = sum of z z^T over the chosen rows: the entropy H_1 at a fixed number of rows
    logdet    ln det(I + A / eps), the determinantal objective
    facility  mean over represented rows of the cosine to the nearest chosen row, at least 0 (facility location)
    quality   mean quality of the chosen rows x G-Vendi
Source: docs/selection.md. A known caution: pushed to the extreme, G-Vendi is a poor guide to what training
gains, facility location is a better one, and random subsets are hard to beat. So every selection also scores random
subsets of the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.draws import random_words
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Progress, Silent
from gvendi_fast.data.pool import Pool, PoolLike, as_pool
from gvendi_fast.selection.greedy import Picks, lazy, stochastic, two_round
from gvendi_fast.selection.objectives import OBJECTIVES
from gvendi_fast.selection.problem import (
    Problem,
    checked_quality,
    coded_quotas,
    equal_quotas,
    most,
    raise_covered,
    rank_of,
)
from gvendi_fast.selection.rounding import relaxed
from gvendi_fast.selection.set_score import RandomBaseline, score_chosen, score_random
from gvendi_fast.vendi.state import VendiState

__all__ = ["METHODS", "Selection", "equal_quotas", "select"]

# A method takes the problem, starts its progress and returns its picks, with further results in their details.
METHODS: dict[str, Callable[[Problem], Picks]] = {
    "lazy": lazy,
    "stochastic": stochastic,
    "two-round": two_round,
    "relaxed": relaxed,
}
DEFAULT_MEMORY = 4 << 30


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen rows in the order of picking, which is their rank: the first m of a greedy selection are its best m.

    ids: of the chosen rows.
    rows: int64 [size], their numbers in the pool.
    gain: float64 [size], how much the objective rose with each pick, in nats (vendi: of -tr(A ln A); quality: of the
        logarithm; facility: a mean cosine); with method relaxed, what the entropy would lose without the row.
    surprisal: float64 [size], -z^T ln(Sigma) z in nats, Sigma the covariance of the chosen and the given rows: how
        unlike the others a row is.
    cluster: int64 [size], None unless clusters were given.
    value: of the objective (vendi: G-Vendi), for the chosen rows with the given ones.
    gvendi: G-Vendi of the chosen rows with the given ones.
    n: how many the chosen rows and the given ones are together.
    random: scores of random subsets of the same size, None without.
    objective, method: their names.
    details: further results of the method, such as its passes over the pool.
    """

    ids: list[str]
    rows: np.ndarray
    gain: np.ndarray
    surprisal: np.ndarray
    cluster: np.ndarray | None
    value: float
    gvendi: float
    n: int
    random: RandomBaseline | None
    objective: str
    method: str
    details: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON values, without the rows."""
        random = self.random and {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self.random).items()
        }
        return {
            "size": len(self),
            "objective": self.objective,
            "method": self.method,
            "value": self.value,
            "gvendi": self.gvendi,
            "n": self.n,
            "random": random,
            "details": self.details,
        }


def select(
    pool: PoolLike,
    size: int,
    objective: str = "vendi",
    *,
    method: str = "lazy",
    must_include: VendiState | PoolLike | None = None,
    groups: Sequence[str] | None = None,
    quotas: Mapping[str, int] | None = None,
    quality: Sequence[float] | np.ndarray | str | None = None,
    clusters: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
    draws: int = 20,
    eps: float = 0.1,
    represent: int = 8192,
    progress: Progress | None = None,
) -> Selection:
    """Choose `size` rows of a pool.

    pool: a matrix [N, K] of any float dtype, a `Pool`, a run directory or its path.
    size: how many rows to choose.
    objective: one of those above.
    method: "lazy" picks what plain greedy picks; "stochastic" takes each pick from a random sample; "two-round" picks
        in subsets of the pool and then among those picks, for pools far beyond memory; "relaxed" (vendi and quality)
        weighs all rows at once and then takes whole ones, for pools of millions, and bounds what any choice can reach.
    must_include: rows that count as chosen, are not counted in `size` and are not returned (they stay candidates if
        they are in the pool): a state, or rows in any form that `pool` takes (facility needs rows).
    groups: a label for each row (None: the pool's).
    quotas: {label: most rows}; a label without a quota has no limit; `equal_quotas` makes them.
    quality: a number above 0 for each row, or the name of a number in a run directory such as "loss"; the mean is of
        the chosen rows alone.
    clusters: a number for each row, passed on to the result.
    seed: of all draws.
    memory: bytes for the rows and the work; a larger pool is read in passes, with the same result, except that gains
        agree to 1e-5.
    draws: random subsets that are scored.
    eps: of logdet.
    represent: facility represents all rows of the pool or, of a larger pool, this many drawn by seed.
    progress: where it reports.

    Guarantees: logdet and facility are monotone and submodular, so greedy reaches 1 - 1/e of the optimum (Nemhauser,
    Wolsey, Fisher 1978), 1/2 under quotas (Fisher, Nemhauser, Wolsey 1978). -tr(A ln A) is submodular but falls with a
    repeated row; adding 1 + ln(n) for each row makes it monotone without changing which set of `size` rows is best,
    and the guarantee holds for that sum. For quality greedy has none. For the other methods see `greedy`.

    Results depend on the set of (id, row), not on their order: ids decide ties and all draws. Raises GvendiError, with
    the argument's name, for arguments that cannot be used or do not fit together.
    """
    pool = as_pool(pool)
    if objective not in OBJECTIVES:
        raise GvendiError(f"objective is {objective!r}; wanted one of {', '.join(OBJECTIVES)}")
    if method not in METHODS:
        raise GvendiError(f"method is {method!r}; wanted one of {', '.join(METHODS)}")
    if method == "relaxed" and objective not in ("vendi", "quality"):
        raise GvendiError(
            f"method is 'relaxed', which knows the objectives vendi and quality, not {objective}; use 'lazy'"
        )
    if len(pool) == 0:
        raise GvendiError("the pool is empty; give at least one row")
    if not isinstance(size, int | np.integer):
        raise GvendiError(f"size is {size!r}; wanted an integer")
    if not 1 <= size <= len(pool):
        raise GvendiError(f"size is {size}; wanted 1 to {len(pool)}, the number of rows in the pool")
    if not 1e-6 <= eps < np.inf:
        raise GvendiError(f"eps is {eps}; wanted a finite number of at least 1e-6")
    if (objective == "quality") != (quality is not None):
        raise GvendiError(
            "quality goes with objective='quality', and that objective needs it: give both or neither"
        )
    if clusters is not None and len(clusters) != len(pool):
        raise GvendiError(f"clusters has {len(clusters)} entries for {len(pool)} rows; give one for each row")
    problem = _problem(
        pool, size, objective, must_include, groups, quotas, quality, seed, memory, eps, represent, progress
    )
    try:
        picks = METHODS[method](problem)
    finally:
        problem.progress.close()
    value, gvendi, surprisal = score_chosen(problem, picks.numbers)
    return Selection(
        ids=[pool.ids[number] for number in picks.numbers],
        rows=picks.numbers,
        gain=picks.gains,
        surprisal=surprisal,
        cluster=None if clusters is None else np.asarray(clusters, np.int64)[picks.numbers],
        value=value,
        gvendi=gvendi,
        n=size + problem.given.n,
        random=score_random(problem, draws),
        objective=objective,
        method=method,
        details=picks.details,
    )


def _problem(
    pool: Pool,
    size: int,
    objective: str,
    must_include: VendiState | PoolLike | None,
    groups: Sequence[str] | None,
    quotas: Mapping[str, int] | None,
    quality: Sequence[float] | np.ndarray | str | None,
    seed: int,
    memory: int,
    eps: float,
    represent: int,
    progress: Progress | None,
) -> Problem:
    labels, limits = (None, None) if quotas is None else coded_quotas(pool, groups, quotas)
    numbers = np.arange(len(pool))
    allowed = most(labels, limits, numbers)
    if allowed < size:
        raise GvendiError(
            f"quotas allow {allowed} rows of this pool, but size is {size}; raise the quotas or lower size"
        )
    if quality is not None:
        quality = checked_quality(pool.numbers(quality) if isinstance(quality, str) else quality, pool)
    rank, targets, covered = rank_of(pool.ids), None, None
    if objective == "facility":
        targets = pool.take(_represented(len(pool), represent, seed, rank))
        covered = torch.zeros(len(targets))
    return Problem(
        pool=pool,
        objective=objective,
        numbers=numbers,
        size=size,
        rank=rank,
        labels=labels,
        limits=limits,
        quality=quality,
        given=_given(must_include, pool, targets, covered),
        targets=targets,
        covered=covered,
        eps=eps,
        seed=seed,
        memory=memory,
        progress=progress or Silent(),
    )


def _represented(rows: int, count: int, seed: int, rank: np.ndarray) -> np.ndarray:
    """Numbers of the rows that facility location represents, in the order of their ids."""
    if count < 1:
        raise GvendiError(f"represent is {count}; wanted a number of rows of at least 1")
    by_rank = np.argsort(rank)
    if rows <= count:
        return by_rank
    return by_rank[np.sort(np.argsort(random_words(seed, 1, rows), kind="stable")[:count])]


def _given(
    must_include: VendiState | PoolLike | None,
    pool: Pool,
    targets: torch.Tensor | None,
    covered: torch.Tensor | None,
) -> VendiState:
    """The state of the rows that count as chosen; `covered` rises to the cosines that they reach."""
    state = VendiState(pool.dim, pool.spec)
    if must_include is None:
        return state
    if isinstance(must_include, VendiState):
        if targets is not None:
            raise GvendiError(
                "must_include is a VendiState, which keeps no rows, but facility needs rows; give a matrix or a run "
                "directory"
            )
        return state.merge(must_include)
    rows = as_pool(must_include)
    # How a matrix was made is not known, so only its width can be checked.
    made = VendiState(rows.dim, pool.spec if rows.spec is None else rows.spec)
    for _, block in rows.blocks():
        made.update(block)
        if targets is not None and rows.dim == pool.dim:
            raise_covered(covered, targets, block)
    return state.merge(made)
