"""The degrees of freedom of the exact Gram matrix, from the spectrum that a sketch shows, and the entropy that K costs.

A sketch Z = G R, read sideways, is K samples of a population whose covariance is the exact Gram matrix of the n unit
gradients: eigenvalues tau, trace 1. The equation of Marchenko and Pastur (1967), in Silverstein's form (1995), gives
the degrees of freedom D of that matrix from those of the sketch, d, at real arguments, with l the sketch's eigenvalues:
    d(s) = sum l / (l + s),   D(t) = sum tau / (tau + t),   D(t) = d(s) at t = s / (1 - d(s) / K)
x ln x = int_0^inf [x / (1 + t) - x / (x + t)] dt makes an entropy the integral of D(t) - 1 / (1 + t), so that, with t
as a function of D that falls to 0 at D = rank,
    H_inf - H_K = (1 / K) int_0^K t D dD + int_K^rank t dD
Rows are to the population that they are drawn from what coordinates are to the gradients: a block of m of the rows
divides by 1 - d / m too, and all n multiply by 1 - d / n.

What a sketch shows ends at D = r, r the smallest of these numbers, where t is t_0. If the rank is higher, the rest is
rank numbers w = tau / (tau + t_0) from 0 to 1 with two moments known from D and its slope at t_0:
    sum w = r,   sum w^2 = r + t_0 D'(t_0),   int_r^rank t dD = t_0 sum [psi(w) - w],   psi(w) = -w ln w / (1 - w)
psi''' > 0, so (Chebyshev, Markov) this sum is least where w is one number or 0, and largest where it is one number or
1. The estimate between the two takes w from the Beta distribution of these moments.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError

# Steps in ln s, in ln t and in the log odds of w. The integrands are analytic within pi / 2 of the real axis, and at
# their cuts linear interpolation errs by 1e-4 of the integral.
_STEP = 0.05
_S = np.exp(np.arange(16.0, -32.0, -_STEP))
_LOG_ODDS = np.arange(-60.0, 40.0, _STEP)
# t / t_0 of the nodes that are not seen.
_BELOW = np.exp(-np.arange(0.0, 40.0, _STEP))
# An eigenvalue below this is rounding: then all directions are seen.
_ROUNDING = 1e-14
# From this concentration of the Beta distribution on its log odds are narrower than two steps.
_NARROW = 1000.0
# Nodes that are summed at once.
_BLOCK = 64


class DegreesOfFreedom:
    """D(t) of the exact Gram matrix of n rows, as a table of its nodes.

    spectrum: the eigenvalues of the sketches' covariance, sum 1.
    dim: K.
    rank: D(0), how many of the n rows differ.
    block: how many rows the sketches are of, below `dim`, where they are a part of `rank` rows; None where they are of
        all rows.
    """

    def __init__(self, spectrum: torch.Tensor, dim: int, rank: int, block: int | None = None) -> None:
        if block is not None and not 1 <= block < dim:
            raise GvendiError(f"block is {block}; wanted a number of rows from 1 to below dim = {dim}")
        self.rank = rank
        ends = min(dim, rank, block or rank)
        eigenvalues = np.sort(spectrum.double().cpu().numpy())[::-1][:ends]
        eigenvalues = eigenvalues[eigenvalues > 0]
        limits = [dim] if block is None else [dim, block]
        d, slope, left = _sums(eigenvalues)
        self._d, self._t, self._slope = d, _S.copy(), slope
        for limit in limits:
            self._t *= limit / (limit - len(eigenvalues) + left)
        if block is not None:
            self._t *= (rank - len(eigenvalues) + left) / rank
        is_short = rank > ends == len(eigenvalues) and ends in limits and eigenvalues[-1] > _ROUNDING
        unseen = self._unseen(eigenvalues, limits, block) if is_short else [None]
        self._tables = [self._integrals(below) for below in unseen]

    def lost(self, dim: int) -> float:
        """H_inf - H_dim in nats, of all n rows and any number `dim` of coordinates: the estimate."""
        least, most = self.lost_bounds(dim)
        # Where nearly all w are 0 or 1, the Beta distribution's nodes miss some of its mass.
        return min(max(self._lost(self._tables[0], dim), least), most)

    def lost_bounds(self, dim: int) -> tuple[float, float]:
        """H_inf - H_dim at the least and the largest of what is not seen; nearly bounds for a dim beyond that."""
        found = [self._lost(table, dim) for table in self._tables[-2:]]
        return min(found), max(found)

    def _lost(self, table: tuple[np.ndarray, np.ndarray, np.ndarray], dim: int) -> float:
        d, times_d, plain = table
        lost = np.interp(dim, d, times_d) / dim + plain[-1] - np.interp(dim, d, plain)
        # Both entropies lie between 0 and ln rank; one row loses nothing, as it has length 1 in every sketch.
        return min(float(lost), math.log(self.rank))

    def _unseen(self, eigenvalues: np.ndarray, limits: list[int], block: int | None) -> list[Atoms]:
        """What w may be below t_0: as estimated, the least and the most."""
        r, rank = len(eigenvalues), self.rank
        first, second = (1 / eigenvalues).sum(), (1 / eigenvalues**2).sum()
        t0, bend = r / first, second / first
        for limit in limits:
            if limit > r:
                t0, bend = t0 / (1 - r / limit), bend - first / (limit - r)
        if block is not None:
            t0, bend = t0 * (1 - r / rank), bend + first / (rank - r)
        # d ln t / ds = bend and dd / ds = -first at s = 0. Noise may take the second moment below the mean's square.
        square = max(r - first / bend, r * r / rank) if bend > 0 else r * r / rank
        return [Atoms(t0, w, mass) for w, mass in (beta(r, square, rank), *extremes(r, square, rank))]

    def _integrals(self, below: Atoms | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """D of all nodes, ascending, int t D dD and int t dD from the first node up to each."""
        plain = _cumulative(self._t * self._slope)
        times_d = _cumulative(self._t * self._d * self._slope)
        if below is None:
            return self._d, times_d, plain
        d, slope = below.at_nodes()
        t = below.t0 * _BELOW
        return (
            np.concatenate([self._d, d]),
            np.concatenate([times_d, times_d[-1] + _cumulative(t * d * slope)]),
            np.concatenate([plain, plain[-1] + _cumulative(t * slope)]),
        )


class Atoms:
    """tau = t_0 w / (1 - w) of the eigenvalues that are not seen: numbers w, each `mass` times."""

    def __init__(self, t0: float, w: np.ndarray, mass: np.ndarray) -> None:
        self.t0, self.w, self.mass = t0, w, mass

    def at_nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """D and -dD / d ln t at t_0 * _BELOW."""
        held = self.w / (self.w + (1 - self.w) * _BELOW[:, None])
        return held @ self.mass, (held * (1 - held)) @ self.mass


def _sums(eigenvalues: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d(s), -dd / d ln s and len(eigenvalues) - d(s), without cancellation, at the nodes."""
    parts = []
    for s in np.split(_S, range(_BLOCK, len(_S), _BLOCK)):
        free = s[:, None] / (eigenvalues + s[:, None])
        parts.append(((1 - free).sum(axis=1), (free * (1 - free)).sum(axis=1), free.sum(axis=1)))
    d, slope, left = (np.concatenate(part) for part in zip(*parts, strict=True))
    return d, slope, left


def _cumulative(values: np.ndarray) -> np.ndarray:
    """The trapezoid rule from the first node up to each."""
    return np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) * (_STEP / 2))])


def extremes(r: float, square: float, rank: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """w and mass of the least and of the largest sum psi(w) - w of `rank` numbers with these moments."""
    inner = (r - square) / (rank - r)
    whole = (rank - r) / (1 - inner)
    least = np.array([square / r]), np.array([r * r / square])
    return [least, (np.array([inner, 1.0]), np.array([whole, rank - whole]))]


def beta(r: float, square: float, rank: float) -> tuple[np.ndarray, np.ndarray]:
    """w and mass of the Beta distribution with sum w = r and sum w^2 = square of `rank` numbers."""
    mean = r / rank
    variance = square / rank - mean**2
    if variance <= mean * (1 - mean) / (1 + _NARROW):
        return np.array([mean]), np.array([float(rank)])
    concentration = mean * (1 - mean) / variance - 1
    log_w, log_rest = -np.log1p(np.exp(-_LOG_ODDS)), -np.log1p(np.exp(_LOG_ODDS))
    density = concentration * (mean * log_w + (1 - mean) * log_rest)
    mass = np.exp(density - density.max())
    w = np.exp(log_w)
    return w, mass * (r / (mass @ w))
