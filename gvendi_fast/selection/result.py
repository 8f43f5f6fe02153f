"""What a selection returns: the chosen rows, what each adds, and what they score beside random rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gvendi_fast.selection.set_score import RandomBaseline

_GAINS = {
    "vendi": "rise of -tr(A ln A) by this pick, in nats, A the sum of z z' over the chosen unit sketches z",
    "logdet": "rise of ln det(I + A / eps) by this pick, in nats, A the sum of z z' over the chosen unit sketches z",
    "facility": "rise by this pick of the mean cosine of the pool's rows to the nearest chosen one",
    "quality": "rise of ln(mean quality) + entropy by this pick, in nats; the first is its value",
}
_LOST = "what the entropy of the choice would lose without this row, in nats"


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
    value: of the objective (vendi: G-Vendi), for the chosen rows with the given ones; of centred rows if those were
        chosen by.
    gvendi: G-Vendi of the chosen rows with the given ones, never centred.
    n: how many the chosen rows and the given ones are together.
    random: scores of random subsets of the same size, None without.
    objective, method: their names.
    details: further results of the method, such as its passes over the pool.
    centered: centred G-Vendi of the chosen rows with the given ones; None where rows were not chosen by it.
    With `center`, gains, surprisals and bounds are of centred rows.
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
    centered: float | None = None

    @property
    def gain_is(self) -> str:
        """What `gain` is, and its unit, in one clause."""
        what = _LOST if self.method == "relaxed" else _GAINS[self.objective]
        return what + (", of centred rows" if self.centered is not None else "")

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
            "gain_is": self.gain_is,
            "value": self.value,
            "gvendi": self.gvendi,
            "centered": self.centered,
            "n": self.n,
            "random": random,
            "details": self.details,
        }
