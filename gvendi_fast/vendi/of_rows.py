"""G-Vendi of a matrix of sketches in memory."""

from __future__ import annotations

import math

import torch

from gvendi_fast.base.unit_length import Rows, check_matrix, unit_rows
from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.vendi.state import VendiState


def own_coordinates(rows: torch.Tensor) -> torch.Tensor:
    """Rows float64 [m, K] in m coordinates, along the eigenvectors of their Gram matrix: lengths and angles stay."""
    eigenvalues, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors * eigenvalues.clamp_min(0).sqrt()


def gvendi(rows: Rows, q: float = 1.0) -> float:
    """G-Vendi of order q of sketches [n, K], from the smaller of Gram [n, n] and covariance [K, K] matrix."""
    check_matrix(rows)
    n, dim = rows.shape
    if n == 0 or n >= dim:
        return VendiState(dim).update(rows).gvendi(q)
    unit = unit_rows(rows)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T).clamp_min_(0)
    return math.exp(renyi_entropy(eigenvalues / eigenvalues.sum(), q))
