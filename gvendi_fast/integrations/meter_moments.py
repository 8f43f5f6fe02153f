"""The second moment of a set of unit rows, from the rows themselves where they are few and from their sum elsewhere.

Products are float64: directions without rows have eigenvalues of float64's rounding, as surprisal wants them.
"""

from __future__ import annotations

import math

import torch

from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.vendi.state import VendiState


def given_state(matrix: torch.Tensor, n: int, spec: dict | None = None) -> VendiState:
    """The state whose sum of outer products is `matrix`, float64 [K, K], of n rows; it takes the matrix over."""
    state = VendiState(len(matrix), spec, matrix.device)
    state.matrix = matrix
    state._grown(n)
    return state


class Moment:
    """The second moment of n unit rows of width K; what it computes is kept.

    rows: float32 [n, K], or None where only their sum is known.
    """

    def __init__(
        self,
        rows: torch.Tensor | None = None,
        *,
        matrix: torch.Tensor | None = None,
        n: int | None = None,
        base: Moment | None = None,
    ) -> None:
        """Of rows, or of a `matrix` [K, K] of n rows. base: the moment of the first rows, which is not summed again."""
        self.rows, self._base = rows, base
        self.n = n if rows is None else len(rows)
        self._state = None if matrix is None else given_state(matrix, self.n)
        self._gram: torch.Tensor | None = None
        self._spectrum: torch.Tensor | None = None

    def joined(self, rows: torch.Tensor) -> Moment:
        """The moment of these rows and more of them."""
        return Moment(torch.cat([self.rows, rows]), base=self)

    @property
    def state(self) -> VendiState:
        """As a `VendiState`, which is not to be changed."""
        if self._state is None:
            base = self._base
            # The same sum in another order where most rows are new.
            if base is not None and base.n > self.n - base.n:
                self._state = given_state(base.state.matrix.clone(), base.n)
                self._state.update(self.rows[base.n :].double())
            else:
                dim, device = self.rows.shape[1], self.rows.device
                self._state = VendiState(dim, device=device).update(self.rows.double())
        return self._state

    def entropy(self, q: float = 1.0) -> float:
        """H_q in nats of at least one row, from the smaller of Gram and second moment."""
        if not self._is_small:
            return self.state.entropy(q)
        if q == 2:
            gram = self._own_gram()
            return -math.log(float(gram.square().sum() / gram.trace() ** 2))
        if self._spectrum is None:
            eigenvalues = torch.linalg.eigvalsh(self._own_gram()).cpu().clamp_min_(0)
            self._spectrum = eigenvalues / eigenvalues.sum()
        return renyi_entropy(self._spectrum, q)

    def similarity(self) -> float | None:
        """The mean squared cosine of two different rows, (|A|_F^2 - n) / (n (n - 1)); None for fewer than two rows."""
        if self.n < 2:
            return None
        products = self._own_gram() if self._is_small else self.state.matrix
        squares = float(products.square().sum()) - self.n
        return max(0.0, squares) / (self.n * (self.n - 1))

    @property
    def _is_small(self) -> bool:
        return self.rows is not None and self.n < self.rows.shape[1]

    def _own_gram(self) -> torch.Tensor:
        if self._gram is None:
            rows = self.rows.double()
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            self._gram = rows @ rows.T
        return self._gram
