"""Sketches -> G-Vendi: the score of a matrix of rows, the mergeable state and the jackknife in one place.

`score`, `score_K`, `score_X` and `score_dual` take the arguments that users of `vendi-score` know, so that
`from gvendi_fast import vendi` stands in for `from vendi_score import vendi`.
"""

from __future__ import annotations

import math

import torch

from gvendi_fast.base.unit_length import Rows, check_matrix, unit_rows
from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.vendi.between_sources import Decomposition, Source, between_source
from gvendi_fast.vendi.jackknife import Interval, jackknife, leave_one_out
from gvendi_fast.vendi.similarity import score, score_dual, score_K, score_X
from gvendi_fast.vendi.state import VendiState

__all__ = [
    "Decomposition",
    "Interval",
    "Source",
    "VendiState",
    "between_source",
    "gvendi",
    "jackknife",
    "leave_one_out",
    "score",
    "score_K",
    "score_X",
    "score_dual",
]


def gvendi(rows: Rows, q: float = 1.0) -> float:
    """G-Vendi of order q of rows [n, K], from the smaller of Gram [n, n] and covariance [K, K] matrix."""
    check_matrix(rows)
    n, dim = rows.shape
    state = VendiState(dim)
    if n == 0 or n >= dim:
        return state.update(rows).gvendi(q)
    unit = unit_rows(rows)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T).clamp_min_(0)
    return math.exp(renyi_entropy(eigenvalues / eigenvalues.sum(), q))
