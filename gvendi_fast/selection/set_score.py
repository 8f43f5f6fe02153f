"""What a set of rows scores, and what random sets of the same size score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from gvendi_fast.base.unit_length import unit_rows
from gvendi_fast.data.pool import POOL_BLOCK
from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.selection.problem import Problem, raise_covered
from gvendi_fast.vendi.of_rows import own_coordinates
from gvendi_fast.vendi.state import VendiState

# Streams of random numbers from this one on belong to the random subsets.
FIRST_STREAM = 10


@dataclass(frozen=True)
class RandomBaseline:
    """Scores of `draws` random subsets of the same size, under the same quotas and given rows.

    value: mean of the objective.
    value_band: its lowest and highest value.
    gvendi: mean of G-Vendi.
    gvendi_band: its lowest and highest value.
    draws: how many subsets.
    centered: mean of centred G-Vendi; None where the selection was not centred.
    centered_band: its lowest and highest value.
    """

    value: float
    value_band: tuple[float, float]
    gvendi: float
    gvendi_band: tuple[float, float]
    draws: int
    centered: float | None = None
    centered_band: tuple[float, float] | None = None


class SubsetScore:
    """The objective's value and the G-Vendi of rows that come block by block, together with the given rows."""

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem = problem
        self._quality: list[np.ndarray] = []
        self._covered = None if problem.covered is None else problem.covered.clone()
        # The Gram matrix is the smaller one here.
        few = problem.given.n == 0 and count < problem.pool.dim
        self.rows: list[torch.Tensor] | None = [] if few else None
        self.state = None if few else problem.begun()

    def add(self, numbers: np.ndarray, rows: torch.Tensor) -> None:
        """Rows float32 [m, K] with these numbers in the pool."""
        if self.rows is not None:
            self.rows.append(rows)
        else:
            self.state.update(rows)
        if self._problem.quality is not None:
            self._quality.append(self._problem.quality[numbers])
        if self._covered is not None:
            raise_covered(self._covered, self._problem.targets, rows)

    def scores(self) -> tuple[float, float]:
        """(value of the objective, G-Vendi)."""
        if self.rows is not None:
            rows = torch.cat(self.rows).double()
            eigenvalues = torch.linalg.eigvalsh(rows @ rows.T).clamp_min_(0)
        else:
            eigenvalues = self.state.spectrum() * self.state.n
        gvendi = math.exp(renyi_entropy(eigenvalues / eigenvalues.sum(), 1))
        name = self._problem.objective
        if name == "logdet":
            return float(torch.log1p(eigenvalues / self._problem.eps).sum()), gvendi
        if name == "facility":
            return float(self._covered.mean()), gvendi
        if name == "quality":
            return float(np.concatenate(self._quality).mean()) * gvendi, gvendi
        return gvendi, gvendi


def score_chosen(problem: Problem, numbers: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Value, G-Vendi and each row's surprisal -z^T ln(Sigma) z in nats, float64, under the set's covariance.

    Sigma includes the given rows; without any, the mean of the surprisals is the set's entropy.
    """
    order = np.argsort(numbers)
    score, surprisal = SubsetScore(problem, len(numbers)), np.empty(len(numbers))
    chunks = [order[start : start + POOL_BLOCK] for start in range(0, len(order), POOL_BLOCK)]
    for chunk in chunks:
        score.add(numbers[chunk], problem.pool.take(numbers[chunk]))
    if score.rows is not None:
        own = own_coordinates(unit_rows(torch.cat(score.rows)))
        surprisal[order] = VendiState(len(own)).update(own).contributions(own).numpy()
    else:
        for chunk in chunks:
            surprisal[chunk] = score.state.contributions(problem.pool.take(numbers[chunk])).numpy()
    return *score.scores(), surprisal


def score_random(problem: Problem, draws: int) -> RandomBaseline | None:
    """Scores of random subsets; None without draws. Reads the pool once for as many draws as memory holds."""
    if draws < 1:
        return None
    each = 24 * problem.pool.dim**2 + 8 * problem.size
    at_once = max(1, min(draws, problem.memory // each))
    scores = []
    for start in range(0, draws, at_once):
        scores += _draw(problem, range(start, min(start + at_once, draws)))
    value, gvendi = np.array(scores).T
    bands = [(float(x.min()), float(x.max())) for x in (value, gvendi)]
    return RandomBaseline(float(value.mean()), bands[0], float(gvendi.mean()), bands[1], draws)


def _draw(problem: Problem, streams: range) -> list[tuple[float, float]]:
    sets = [problem.random(FIRST_STREAM + stream) for stream in streams]
    scores = [SubsetScore(problem, problem.size) for _ in sets]
    for first, block in problem.pool.blocks():
        for numbers, score in zip(sets, scores, strict=True):
            begin, end = np.searchsorted(numbers, [first, first + len(block)])
            if end > begin:
                here = numbers[begin:end]
                score.add(here, block[torch.from_numpy(here - first)])
    return [score.scores() for score in scores]
