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
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.draws import random_words
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Progress, Silent
from gvendi_fast.data.passes import over_pool, taken
from gvendi_fast.data.pool import Pool, PoolLike, as_pool
from gvendi_fast.data.strings import rank_of
from gvendi_fast.selection.greedy import Picks, lazy, stochastic, two_round
from gvendi_fast.selection.objectives import OBJECTIVES
from gvendi_fast.selection.problem import (
    MAX_PASSES,
    Problem,
    checked_quality,
    coded_quotas,
    equal_quotas,
    most,
)
from gvendi_fast.selection.result import Selection
from gvendi_fast.selection.rounding import relaxed
from gvendi_fast.selection.set_score import MOST_TASKS, GivenSums, score_chosen, score_random
from gvendi_fast.selection.small_side import small_side
from gvendi_fast.vendi.centered import RowMean
from gvendi_fast.vendi.centered_pool import CenteredPool
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
    center: bool | RowMean = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
    max_passes: int | None = None,
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
    center: choose by rows without the mean direction of the pool (True) or of another reference (its RowMean): rows,
        given ones and random subsets are centred, and G-Vendi of the chosen rows as they are is reported beside. Rows
        that equal the mean are not candidates. A diagnosis, not a better choice: docs/score.md.
    progress: where it reports.
    engine: which processes read the pool where it is a run directory (None: this one), in the passes of "relaxed", the
        subsets of "two-round" and the random subsets; the result is the same to the bit.
    max_passes: of relaxed: how often it weighs the whole pool at most (None: 12), as far as its bound is more than
        0.5 % away; each takes as long as the first, and fewer leave a larger `gap_nats` in the result's details.

    Guarantees: logdet and facility are monotone and submodular, so greedy reaches 1 - 1/e of the optimum (Nemhauser,
    Wolsey, Fisher 1978), 1/2 under quotas (Fisher, Nemhauser, Wolsey 1978). -tr(A ln A) is submodular but falls with a
    repeated row; adding 1 + ln(n) for each row makes it monotone without changing which set of `size` rows is best,
    and the guarantee holds for that sum. For quality greedy has none. For the other methods see `greedy`.

    Results depend on the set of (id, row), not on their order: ids decide ties and all draws. Threads may select from
    one pool at once, each with a `progress` of its own. Raises GvendiError, with the argument's name, for arguments
    that cannot be used or do not fit together.
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
    if max_passes is not None:
        if method != "relaxed":
            raise GvendiError(
                f"max_passes goes with method='relaxed', and method is {method!r}; leave it out"
            )
        whole(max_passes, "max_passes", "how often the pool is weighed, an integer of at least 1", 1)
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
    if not isinstance(center, bool | RowMean):
        raise GvendiError(f"center is a {type(center).__name__}; wanted True, False or a RowMean")
    centred = None
    if center is not False:
        if isinstance(must_include, VendiState):
            raise GvendiError(
                "must_include is a VendiState, whose rows cannot be centred and scaled again, as it keeps none; with "
                "center give them as a matrix or a run directory"
            )
        centred = CenteredPool(pool, None if center is True else center, engine)
        if size > len(centred):
            raise GvendiError(
                f"size is {size}; wanted at most {len(centred)}: with center, {centred.left_out} of the pool's "
                f"{len(pool)} rows equal the mean and have no direction left"
            )
    problem = _problem(
        pool,
        centred,
        size,
        objective,
        must_include,
        groups,
        quotas,
        quality,
        seed,
        memory,
        eps,
        represent,
        progress,
        engine,
        MAX_PASSES if max_passes is None else max_passes,
    )
    small = small_side(problem)
    try:
        # Facility compares cosines alone: they need no spectrum, and in other coordinates equal ones would be rounded.
        picks = METHODS[method](problem if objective == "facility" else small)
    finally:
        problem.progress.close()
    scored = _scored(problem, small)
    value, gvendi, surprisal = score_chosen(scored, picks.numbers)
    rows = picks.numbers if centred is None else centred.kept[picks.numbers]
    found = Selection(
        ids=[pool.ids[number] for number in rows],
        rows=rows,
        gain=picks.gains,
        surprisal=surprisal,
        cluster=None if clusters is None else np.asarray(clusters, np.int64)[rows],
        value=value,
        gvendi=gvendi,
        n=size + problem.given.n,
        random=score_random(scored, draws),
        objective=objective,
        method=method,
        details=picks.details,
    )
    return found if centred is None else _beside_plain(found, picks, problem, centred, must_include, draws)


def _scored(problem: Problem, small: Problem) -> Problem:
    """Which of the two scores sets of rows: the first where both take a Gram matrix, as it is not rounded."""
    return small if problem.given.n else problem


def _beside_plain(
    found: Selection,
    picks: Picks,
    problem: Problem,
    centred: CenteredPool,
    must_include: VendiState | PoolLike | None,
    draws: int,
) -> Selection:
    """A selection among centred rows, with G-Vendi of the same rows, and of the same random subsets, as they are."""
    given = _given(must_include, centred.plain, None, None, engine=problem.engine)
    plain = replace(
        problem,
        pool=centred.plain,
        objective="vendi",
        quality=None,
        given=given,
        targets=None,
        covered=None,
    )
    plain = _scored(plain, small_side(plain))
    random, of_plain = found.random, score_random(plain, draws)
    if random is not None and of_plain is not None:
        random = replace(
            random,
            gvendi=of_plain.gvendi,
            gvendi_band=of_plain.gvendi_band,
            centered=random.gvendi,
            centered_band=random.gvendi_band,
        )
    names = {"gvendi_bound": "centered_bound"}
    details = {names.get(name, name): value for name, value in found.details.items()}
    details["center"] = {
        "mean_rows": centred.mean.n,
        "left_out": centred.left_out,
        "left_out_given": given.n - problem.given.n,
    }
    return replace(
        found,
        gvendi=score_chosen(plain, picks.numbers)[1],
        centered=found.gvendi,
        n=problem.size + given.n,
        random=random,
        details=details,
    )


def _problem(
    pool: Pool,
    centred: CenteredPool | None,
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
    engine: Engine | None,
    max_passes: int,
) -> Problem:
    labels, limits = (None, None) if quotas is None else coded_quotas(pool, groups, quotas)
    scores = None
    if quality is not None:
        scores = checked_quality(pool.numbers(quality) if isinstance(quality, str) else quality, pool)
    if centred is not None:
        labels = None if labels is None else labels[centred.kept]
        scores = None if scores is None else scores[centred.kept]
        pool = centred
    numbers = np.arange(len(pool))
    allowed = most(labels, limits, numbers)
    if allowed < size:
        raise GvendiError(
            f"quotas allow {allowed} rows of this pool, but size is {size}; raise the quotas or lower size"
        )
    rank, targets, covered = rank_of(pool.ids), None, None
    if objective == "facility":
        targets = taken(engine, pool, _represented(len(pool), represent, seed, rank))
        covered = torch.zeros(len(targets))
    return Problem(
        pool=pool,
        objective=objective,
        numbers=numbers,
        size=size,
        rank=rank,
        labels=labels,
        limits=limits,
        quality=scores,
        given=_given(must_include, pool, targets, covered, None if centred is None else centred.mean, engine),
        targets=targets,
        covered=covered,
        eps=eps,
        seed=seed,
        memory=memory,
        progress=progress or Silent(),
        engine=engine,
        max_passes=max_passes,
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
    mean: RowMean | None = None,
    engine: Engine | None = None,
) -> VendiState:
    """The state of the rows that count as chosen, less a mean; `covered` rises to the cosines that they reach."""
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
    rows = as_pool(must_include) if mean is None else CenteredPool(must_include, mean, engine)
    # How a matrix was made is not known, so only its width can be checked.
    made = VendiState(rows.dim, pool.spec if rows.spec is None else rows.spec)
    if rows.dim != pool.dim:
        # Which is an error.
        return state.merge(made)
    for more in over_pool(engine, rows, partial(GivenSums, rows.dim, made.spec, targets), (), MOST_TASKS):
        made.merge(more.state)
        if covered is not None:
            torch.maximum(covered, more.covered, out=covered)
    return state.merge(made)
