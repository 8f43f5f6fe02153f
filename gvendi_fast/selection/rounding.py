"""From weights to whole rows: the heaviest rows, then swaps for as long as the exact objective rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from gvendi_fast.base.engine import Engine
from gvendi_fast.base.shown import shown
from gvendi_fast.data.passes import taken
from gvendi_fast.data.pool import Pool
from gvendi_fast.data.strings import rank_of
from gvendi_fast.selection.capped_simplex import Limits, best_vertex
from gvendi_fast.selection.greedy import Picks
from gvendi_fast.selection.limits import entropy_limit, quality_limit
from gvendi_fast.selection.problem import MAX_PASSES, Problem
from gvendi_fast.selection.relaxed import Relaxation, relaxed_weights
from gvendi_fast.vendi.state import VendiState

# A round of swaps is too coarse if it gains less than this, in nats for a swap of all rows.
_ROUNDS, _WORTH, _LEAST = 100, 1e-3, 1e-6
# Nor less than this share of what is not known of the best weights: more rounds would polish what a pass would change.
_OF_GAP = 1e-3
# Rows that are copied at once; a multiple of those that a state multiplies at once.
_BLOCK = 4096


def relaxed(problem: Problem) -> Picks:
    """The method "relaxed" of `select`: weights, then whole rows; for pools of millions.

    The gain of a row is what the entropy (in nats, with the given rows) would lose without it. details: the gap of
    the weights, and `gvendi_bound` (quality: `value_bound`), which no choice of as many rows exceeds. It is the
    certificate of the weights, which may be on more rows than a choice has, or less, if `limits` finds less.
    """
    problem.progress.start(problem.size, 0)
    given = problem.given if problem.given.n else None
    limits = None if problem.labels is None else Limits(problem.labels, problem.limits)
    # Half is for the active rows; the rest for their float64 copy, a block of the pool and K x K matrices.
    numbers, relaxation = relaxed_select(
        problem.pool,
        problem.size,
        quality=problem.quality,
        include=given,
        limits=limits,
        max_passes=problem.max_passes,
        memory=problem.memory // 2,
        seed=problem.seed,
        progress=problem.progress.note,
        order=problem.rank,
        engine=problem.engine,
    )
    rows = taken(problem.engine, problem.pool, numbers)
    state = problem.begun()
    for block in rows.split(_BLOCK):
        state.update(block)
    gains = np.zeros(len(numbers))
    if state.n > 1:
        gains = -np.concatenate([state.gain(block, remove=True).numpy() for block in rows.split(_BLOCK)])
    del rows
    problem.progress.advance(problem.size, 0, 0)
    bound = "gvendi_bound" if problem.quality is None else "value_bound"
    limit = entropy_limit(problem.pool, problem.size, given, limits)
    if problem.quality is not None:
        limit += quality_limit(problem.quality, problem.rank, problem.size, limits)
    details = {
        "passes": relaxation.passes,
        "steps": relaxation.steps,
        "gap_nats": relaxation.gap,
        bound: math.exp(min(relaxation.bound, limit)),
    }
    return Picks(numbers, gains, details)


def relaxed_select(
    pool: Pool,
    size: int,
    *,
    quality: np.ndarray | None = None,
    include: VendiState | None = None,
    limits: Limits | None = None,
    tolerance: float = 5e-3,
    max_passes: int = MAX_PASSES,
    memory: int = 2 << 30,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    order: np.ndarray | None = None,
    engine: Engine | None = None,
) -> tuple[np.ndarray, Relaxation]:
    """`size` rows of the pool, by number, and the relaxation whose bound holds for every choice.

    The arguments are those of `relaxed_weights`, whose heaviest rows are taken first. Then the rows that add least
    are swapped, many at once, for rows outside that would add most, as long as the entropy (with the logarithm of the
    mean quality) of the whole rises.
    The numbers come in descending order of surprisal under the chosen rows.
    """
    order = rank_of(pool.ids) if order is None else order
    relaxation = relaxed_weights(
        pool,
        size,
        quality=quality,
        include=include,
        limits=limits,
        tolerance=tolerance,
        max_passes=max_passes,
        memory=memory,
        seed=seed,
        progress=progress,
        order=order,
        engine=engine,
    )
    quality = None if quality is None else np.asarray(quality, np.float64)
    chosen = best_vertex(relaxation.weights, order, size, limits)
    # Rows outside that carry weight were almost chosen.
    beside = best_vertex(relaxation.weights, order, min(3 * size, len(pool)))
    candidates = np.setdiff1d(beside, chosen)
    numbers = np.concatenate([chosen, candidates])
    rows = taken(engine, pool, numbers)
    swaps = _Swaps(rows, numbers, size, quality, include, limits, order)
    inside = swaps.improve(np.arange(size), _OF_GAP * relaxation.gap, progress)
    numbers = swaps.numbers[inside]
    surprisal = swaps.surprisal(inside)
    return numbers[np.lexsort((order[numbers], -surprisal))], relaxation


class _Swaps:
    """Rows in memory, some of them chosen, and the exact objective of a choice."""

    def __init__(
        self,
        rows: torch.Tensor,
        numbers: np.ndarray,
        size: int,
        quality: np.ndarray | None,
        include: VendiState | None,
        limits: Limits | None,
        order: np.ndarray,
    ) -> None:
        self.numbers, self.size, self.include = numbers, size, include
        self.rows, self.order = rows, order[numbers]
        self.quality = None if quality is None else quality[numbers]
        self.limits = limits and limits.at(numbers)

    def state(self, inside: np.ndarray) -> VendiState:
        """The exact objective of these rows together with the given ones."""
        made = VendiState(self.rows.shape[1])
        if self.include is not None:
            made.matrix += self.include.matrix.cpu()
            made.n = self.include.n
        for block in self._blocks(np.sort(inside)):
            made.update(block)
        return made

    def value(self, state: VendiState, inside: np.ndarray) -> float:
        bonus = 0.0 if self.quality is None else math.log(self.quality[inside].mean())
        return state.entropy() + bonus

    def surprisal(self, inside: np.ndarray) -> np.ndarray:
        state = self.state(inside)
        return np.concatenate([state.contributions(block).numpy() for block in self._blocks(inside)])

    def improve(self, inside: np.ndarray, least: float, progress: Callable[[str], None] | None) -> np.ndarray:
        """Swap as long as it helps; after a round that hardly did, half as many rows at once.

        least: what a round has to gain, in nats.
        """
        state = self.state(inside)
        if state.n < 2:
            # One row has entropy 0, whichever it is.
            return inside
        first = value = self.value(state, inside)
        many, rounds = max(self.size // 4, 1), 0
        while rounds < _ROUNDS:
            outside = np.setdiff1d(np.arange(len(self.numbers)), inside)
            many = min(many, len(outside))
            if many == 0:
                break
            rounds += 1
            tried = self._swap(state, inside, outside, many)
            after = self.state(tried)
            risen = self.value(after, tried)
            gained = risen - value
            if gained > 0:
                inside, state, value = tried, after, risen
            if gained < max(_WORTH * many / self.size, _LEAST, least):
                many //= 2
        if progress:
            progress(
                f"whole rows: {shown(first, '.4f')} nats, {shown(value, '.4f')} after {rounds} rounds of swaps"
            )
        return inside

    def _swap(self, state: VendiState, inside: np.ndarray, outside: np.ndarray, many: int) -> np.ndarray:
        """The choice with its `many` least useful rows replaced by the most useful ones outside."""
        quality = np.zeros(len(self.numbers))
        if self.quality is not None:
            quality = self.quality / self.quality[inside].sum()
        leaving = quality[inside] - self._gain(state, inside, remove=True)
        kept = np.setdiff1d(inside, inside[np.lexsort((self.order[inside], leaving))[:many]])
        coming = quality[outside] + self._gain(state, outside)
        added = outside[best_vertex(coming, self.order[outside], many, self._room(kept, outside))]
        if len(added) < many:
            # Too few rows outside fit the limits: the most useful of those that left come back.
            left = np.setdiff1d(inside, kept)
            useful, taken = leaving[np.searchsorted(inside, left)], np.concatenate([kept, added])
            back = best_vertex(useful, self.order[left], many - len(added), self._room(taken, left))
            added = np.concatenate([added, left[back]])
        return np.sort(np.concatenate([kept, added]))

    def _room(self, taken: np.ndarray, which: np.ndarray) -> Limits | None:
        """The limits on `which` that remain once `taken` is chosen."""
        if self.limits is None:
            return None
        used = np.bincount(self.limits.codes[taken], minlength=len(self.limits.most))
        return Limits(self.limits.codes[which], self.limits.most - used)

    def _gain(self, state: VendiState, which: np.ndarray, remove: bool = False) -> np.ndarray:
        """What the entropy gains when each of these rows alone joins or leaves."""
        gains = [state.gain(block, remove=remove).numpy() for block in self._blocks(which)]
        return np.concatenate([np.empty(0), *gains])

    def _blocks(self, which: np.ndarray) -> Iterator[torch.Tensor]:
        """These rows, a few at a time: a copy of all would double the memory."""
        for first in range(0, len(which), _BLOCK):
            yield self.rows[torch.from_numpy(which[first : first + _BLOCK])]
