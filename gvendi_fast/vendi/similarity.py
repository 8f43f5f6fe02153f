"""The Vendi score of any samples under a similarity, under the call names that users of `vendi-score` know.

With K a positive semi-definite matrix of similarities [n, n], K_ii = 1, and weights p of the samples (1/n each):
    lambda = eigenvalues of K_ij sqrt(p_i p_j),   Vendi score of order q = exp(H_q(lambda))
Source: Friedman and Dieng 2023 (arXiv 2210.02410); orders: Pasarkar and Dieng 2024 (arXiv 2310.12952). Everything
is float64, and every function takes every order q >= 0 and inf (also as "inf").
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.spectrum import renyi_entropy

Matrix = np.ndarray | torch.Tensor
# Eigenvalues of n x n products in float64 err by about this much times n.
_ROUNDING = 2.0**-50


def score(
    samples: Sequence[Any],
    k: Callable[[Any, Any], float],
    q: float | str = 1,
    p: Sequence[float] | None = None,
    normalize: bool = False,
) -> float:
    """Vendi score of samples under the similarity k(a, b), symmetric, with k(a, a) = 1.

    samples: n of them, of any kind.
    k: called for n (n + 1) / 2 pairs.
    q: the order.
    p: weights [n] of the samples, at least 0, sum 1.
    normalize: divide by sqrt(k(a, a) k(b, b)).
    Raises GvendiError for no samples and for wrong weights.
    """
    matrix = np.empty((len(samples), len(samples)))
    for i, a in enumerate(samples):
        for j in range(i, len(samples)):
            matrix[i, j] = matrix[j, i] = k(a, samples[j])
    return score_K(matrix, q, p, normalize)


def score_K(  # noqa: N802
    K: Matrix, q: float | str = 1, p: Sequence[float] | None = None, normalize: bool = False
) -> float:
    """Vendi score of a similarity matrix K [n, n] (numpy, torch or scipy.sparse; read as float64).

    Where the score is not well defined it warns and goes on as `vendi-score` does: for a diagonal that is not 1 (give
    normalize=True), and for eigenvalues below zero, which are left out. Raises GvendiError for a K that is not square,
    not symmetric or not finite.
    """
    matrix = _float64("K", K)
    if matrix.shape[0] != matrix.shape[1]:
        raise GvendiError(f"K has shape {tuple(matrix.shape)}; wanted a square matrix of similarities [n, n]")
    if not torch.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-8):
        raise GvendiError(
            "K is not symmetric; wanted k(a, b) = k(b, a) (for rows of features use score_X or score_dual)"
        )
    diagonal = matrix.diagonal()
    if normalize:
        if not bool((diagonal > 0).all()):
            worst = int(diagonal.argmin())
            raise GvendiError(
                f"K[{worst}, {worst}] is {float(diagonal[worst])}; to normalize, the diagonal must be above 0"
            )
        matrix = matrix / torch.outer(diagonal.sqrt(), diagonal.sqrt())
    elif not torch.allclose(diagonal, torch.ones_like(diagonal), atol=1e-4):
        warnings.warn(
            "the diagonal of K is not 1, so its eigenvalues do not sum to 1; normalize=True divides by it",
            stacklevel=2,
        )
    root = _weights(p, len(matrix)).sqrt()
    eigenvalues = torch.linalg.eigvalsh(matrix * torch.outer(root, root))
    lowest = float(eigenvalues[0])
    if lowest < -1e-6 * float(eigenvalues[-1]):
        warnings.warn(
            f"K is not positive semi-definite (an eigenvalue is {lowest:.3g}): the Vendi score is not defined; "
            "negative eigenvalues are left out",
            stacklevel=2,
        )
    return math.exp(_entropy(eigenvalues, q))


def score_X(  # noqa: N802
    X: Matrix, q: float | str = 1, p: Sequence[float] | None = None, normalize: bool = True
) -> float:
    """Vendi score of rows of features X [n, d] with similarity `<a, b>`; normalize: cosine instead.

    Uses the smaller of the n x n and the d x d matrix, which have the same non-zero eigenvalues.
    """
    rows = _features(X, normalize)
    if len(rows) > rows.shape[1]:
        return _score_features(rows, q, p)
    return score_K(rows @ rows.T, q, p)


def score_dual(
    X: Matrix, q: float | str = 1, normalize: bool = True, p: Sequence[float] | None = None
) -> float:
    """As `score_X`, always with the d x d matrix: for many rows [n, d] of few features, O(n d^2)."""
    return _score_features(_features(X, normalize), q, p)


def _score_features(rows: torch.Tensor, q: float | str, p: Sequence[float] | None) -> float:
    weighted = rows * _weights(p, len(rows)).sqrt()[:, None]
    return math.exp(_entropy(torch.linalg.eigvalsh(weighted.T @ weighted), q))


def _features(X: Matrix, normalize: bool) -> torch.Tensor:
    rows = _float64("X", X)
    if not normalize:
        return rows
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool((norm > 0).all()):
        raise GvendiError(f"X[{int(norm.argmin())}] is zero and has no direction; leave it out")
    return rows / norm


def _float64(name: str, x: Matrix) -> torch.Tensor:
    x = x.toarray() if hasattr(x, "toarray") else x
    # The copy also makes readable what torch refuses: lists, read-only and big-endian arrays.
    x = x.detach().cpu() if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x, dtype=np.float64))
    if x.dim() != 2 or 0 in x.shape:
        raise GvendiError(f"{name} has shape {tuple(x.shape)}; wanted a matrix with at least one row")
    if not bool(x.isfinite().all()):
        raise GvendiError(f"{name} holds a number that is not finite; leave that sample out")
    return x.double()


def _weights(p: Sequence[float] | None, n: int) -> torch.Tensor:
    if p is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    weights = torch.from_numpy(np.array(p, dtype=np.float64))
    if weights.shape != (n,) or not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1) > 1e-6:
        raise GvendiError(
            f"p has shape {tuple(weights.shape)} and sum {float(weights.sum()):.6g}; wanted {n} weights of at least "
            "0 with sum 1"
        )
    return weights


def _entropy(eigenvalues: torch.Tensor, q: float | str) -> float:
    order = float(q)
    rounding = _ROUNDING * len(eigenvalues) * float(eigenvalues[-1])
    if order == 0:
        return math.log(int((eigenvalues > rounding).sum()))
    p = eigenvalues[eigenvalues > (rounding if order < 1 else 0)]
    if abs(float(p.sum()) - 1) < 1e-6 or order == 1 or math.isinf(order):
        return renyi_entropy(p, order, rounding)
    # The eigenvalues do not sum to 1, of which a warning was given: the formula without division by the sum.
    return float(torch.logsumexp(order * p.log(), dim=0)) / (1 - order)
