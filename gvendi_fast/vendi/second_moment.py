"""What G-Vendi depends on: the second moment of unit rows as a matrix and a count, with its spectrum and entropies.

    A = sum_i z_i z_i^T of unit rows z_i [K],  Sigma = A / n,  lambda its eigenvalues (trace 1, not centred)
    H_1 = -sum lambda ln lambda,   H_q = ln(sum lambda^q) / (1 - q),   G-Vendi = exp(H)
Gains and the jackknife read it; `VendiState` is a second moment that rows can be added to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import OneThread, reads
from gvendi_fast.kernels.spectrum import renyi_entropy


class SecondMoment(OneThread):
    """The sum A of outer products of n unit rows of width dim, float64 [K, K]. Threads may read it together."""

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        self.dim, self.n = int(dim), 0
        self.matrix = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=device)
        self._spectrum: torch.Tensor | None = None
        self._basis: tuple[torch.Tensor, torch.Tensor] | None = None

    @reads
    def spectrum(self) -> torch.Tensor:
        """Eigenvalues of A / n in descending order: float64 [K] on the CPU, none negative, sum 1."""
        if self._spectrum is None:
            eigenvalues = torch.linalg.eigvalsh(self._trace_one()).cpu().flip(0).clamp_min_(0)
            # The rank is at most n: later eigenvalues are rounding.
            eigenvalues[self.n :] = 0
            self._spectrum = eigenvalues / eigenvalues.sum()
        return self._spectrum.clone()

    @reads
    def entropy(self, q: float = 1.0) -> float:
        """Renyi entropy H_q in nats, any order q > 0 or inf; q = 1 is von Neumann's. Raises GvendiError if n = 0.

        H_2 needs no eigenvalues. At q < 1, eigenvalues below 2^-22 do not count: they may be rounding.
        """
        if q == 2:
            return -math.log(float(self._trace_one().square().sum()))
        return renyi_entropy(self.spectrum(), q)

    @reads
    def gvendi(self, q: float = 1.0) -> float:
        """G-Vendi of order q, exp(H_q): between 1 and min(n, K), the number of equally used directions."""
        return math.exp(self.entropy(q))

    @reads
    def effective_spectrum(self, shares: Iterable[float] = (0.5, 0.9, 0.99)) -> dict[float, int]:
        """For each share in (0, 1], how many of the largest eigenvalues hold it (to 1e-6 of the trace)."""
        held, counts = self.spectrum().cumsum(0), {}
        for share in shares:
            if not 0 < share <= 1:
                raise GvendiError(f"shares holds {share}; wanted shares of the trace in (0, 1], such as 0.9")
            counts[share] = int(torch.searchsorted(held, share - 1e-6)) + 1
        return counts

    @reads
    def eigenbasis(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A = Q diag(l) Q^T, not divided by n: l float64 [K] ascending, none negative; Q float64 [K, K]."""
        if self._basis is None:
            eigenvalues, vectors = torch.linalg.eigh(self._trace_one())
            self._basis = eigenvalues.clamp_min_(0) * self.n, vectors
        return self._basis

    def _trace_one(self) -> torch.Tensor:
        if self.n == 0:
            raise GvendiError(
                "the state holds no rows (n = 0), so it has no spectrum; call update(rows) first"
            )
        return self.matrix / self.matrix.trace()

    def _grown(self, rows: int) -> None:
        """Note that so many more rows are in the matrix."""
        self.n += rows
        self._spectrum = self._basis = None
