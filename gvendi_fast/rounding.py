"""From weights to whole rows: the heaviest rows, then swaps for as long as the exact objective rises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from gvendi_fast.capped_simplex import Limits, best_vertex
from gvendi_fast.pool import Pool
from gvendi_fast.relaxed import Relaxation, relaxed_weights
from gvendi_fast.state import VendiState

# A round of swaps that gains less than this, in nats if all rows were swapped, was too coarse.
_ROUNDS, _WORTH, _LEAST = 100, 1e-3, 1e-6


def relaxed_select(
    pool: Pool,
    size: int,
    *,
    quality: np.ndarray | None = None,
    include: VendiState | None = None,
    limits: Limits | None = None,
    tolerance: float = 5e-3,
    memory: int = 2 << 30,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, Relaxation]:
    """`size` rows of the pool, by number, and the relaxation whose bound holds for every choice.

    Arguments as for `relaxed_weights`, by which the heaviest rows are taken. Then rows that add least give way to
    rows outside that would add most, many at once, while the entropy (plus mean quality) of the whole rises.
    The numbers come in descending order of surprisal under the chosen rows.
    """
    relaxation = relaxed_weights(
        pool,
        size,
        quality=quality,
        include=include,
        limits=limits,
        tolerance=tolerance,
        memory=memory,
        seed=seed,
        progress=progress,
    )
    quality = np.zeros(len(pool)) if quality is None else np.asarray(quality, np.float64)
    order = np.argsort(np.argsort(np.array(pool.ids)))
    chosen = best_vertex(relaxation.weights, order, size, limits)
    # Rows outside that carry weight are the ones that almost came in.
    beside = best_vertex(relaxation.weights, order, min(3 * size, len(pool)))
    candidates = np.setdiff1d(beside, chosen)
    swaps = _Swaps(pool, np.concatenate([chosen, candidates]), size, quality, include, limits, order)
    inside = swaps.improve(np.arange(size), progress)
    numbers = swaps.numbers[inside]
    surprisal = swaps.surprisal(inside)
    return numbers[np.lexsort((order[numbers], -surprisal))], relaxation


class _Swaps:
    """Rows in memory, some of them chosen, and the exact objective of a choice."""

    def __init__(
        self,
        pool: Pool,
        numbers: np.ndarray,
        size: int,
        quality: np.ndarray,
        include: VendiState | None,
        limits: Limits | None,
        order: np.ndarray,
    ) -> None:
        self.numbers, self.size, self.include = numbers, size, include
        self.rows, self.quality, self.order = pool.take(numbers), quality[numbers], order[numbers]
        self.limits = limits and limits.at(numbers)

    def state(self, inside: np.ndarray) -> VendiState:
        """What the chosen rows and those chosen before make together."""
        made = VendiState(self.rows.shape[1])
        if self.include is not None:
            made.matrix += self.include.matrix.cpu()
            made.n = self.include.n
        return made.update(self.rows[torch.from_numpy(np.sort(inside))])

    def value(self, state: VendiState, inside: np.ndarray) -> float:
        return state.entropy() + float(self.quality[inside].mean())

    def surprisal(self, inside: np.ndarray) -> np.ndarray:
        eigenvalues, vectors = self.state(inside).eigenbasis()
        log = -(eigenvalues / eigenvalues.sum()).clamp_min(1e-12).log()
        return ((self.rows[torch.from_numpy(inside)].double() @ vectors).square_() @ log).numpy()

    def improve(self, inside: np.ndarray, progress: Callable[[str], None] | None) -> np.ndarray:
        """Swap for as long as it helps: half as many rows at once after a round that hardly did."""
        state = self.state(inside)
        if state.n < 2:
            # One row has entropy 0, whichever it is.
            return inside
        value, many = self.value(state, inside), max(self.size // 4, 1)
        for number in range(_ROUNDS):
            outside = np.setdiff1d(np.arange(len(self.numbers)), inside)
            many = min(many, len(outside))
            if many == 0:
                break
            tried = self._swap(state, inside, outside, many)
            after = self.state(tried)
            risen = self.value(after, tried)
            gained = risen - value
            if gained > 0:
                inside, state, value = tried, after, risen
            if gained < max(_WORTH * many / self.size, _LEAST):
                many //= 2
            if progress:
                progress(f"swaps {number + 1}: {value:.4f}, {many} rows at once")
        return inside

    def _swap(self, state: VendiState, inside: np.ndarray, outside: np.ndarray, many: int) -> np.ndarray:
        """The choice with its `many` least useful rows replaced by the most useful ones outside."""
        quality = self.quality / self.size
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
        """What the limits leave for `which` once `taken` is chosen."""
        if self.limits is None:
            return None
        used = np.bincount(self.limits.codes[taken], minlength=len(self.limits.most))
        return Limits(self.limits.codes[which], self.limits.most - used)

    def _gain(self, state: VendiState, which: np.ndarray, remove: bool = False) -> np.ndarray:
        """What the entropy gains when each of these rows alone joins or leaves."""
        return state.gain(self.rows[torch.from_numpy(which)], remove=remove).numpy()
