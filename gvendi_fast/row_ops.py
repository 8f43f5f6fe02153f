"""The verbs on finished sketches, rows [N, K]: check the arguments, allocate the results, resolve a backend, return."""

from __future__ import annotations

import torch

from gvendi_fast.backends import resolve
from gvendi_fast.checks import check_basis, check_centroids, check_groups, check_rows
from gvendi_fast.errors import GvendiError
from gvendi_fast.spectrum import quadrature
from gvendi_fast.unit_rows import no_direction

# Rows whose coordinates stay in the cache between the product and the sums over them; a GPU needs more to be busy.
GAIN_ROWS = {"cpu": 512, "cuda": 16384}
# Squared length that a unit row may gain or lose when it is rotated in float32; TF32 and bfloat16 products exceed it.
GAIN_LENGTH = 2e-6


def covariance(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Add sum_i z_i z_i^T of the rows [N, K], scaled to unit length, to out float64 [K, K]; return out.

    Products are float32, summed per block of rows into the float64 master (README, "The score").
    """
    check_rows("rows", rows, out.shape[1])
    if (
        out.dtype != torch.float64
        or out.dim() != 2
        or out.shape[0] != out.shape[1]
        or not out.is_contiguous()
    ):
        raise GvendiError(
            f"out must be a contiguous square float64 matrix, got {out.dtype} {tuple(out.shape)}"
        )
    resolve("covariance", rows, out).covariance(rows, out)
    return out


def entropy(rows: torch.Tensor, boundaries: torch.Tensor, q: float = 1.0) -> torch.Tensor:
    """Renyi entropy of order q (nats) of each of many small groups of rows [N, K] -> float64 [G].

    Group g is rows boundaries[g] .. boundaries[g + 1], 1 to 256 of them; boundaries int64 [G + 1] on the CPU,
    increasing. Rows are scaled to unit length; the eigenvalues of a group's Gram matrix, over their sum, have
    the entropy ln(sum l^q) / (1 - q), q = 1 von Neumann's and q = inf -ln max l (README, "The score"). exp of
    it is the group's G-Vendi. At q < 1 eigenvalues below 2^-22 do not count: they may be rounding.
    Raises GvendiError for a group without rows or with too many, and for a row without a direction.
    """
    check_rows("rows", rows, rows.shape[-1] if rows.dim() else 0)
    check_groups(rows, boundaries)
    if not q > 0:
        raise GvendiError(f"q must be an order above 0, or inf, got {q}; 1 is von Neumann's entropy")
    out = torch.empty(len(boundaries) - 1, dtype=torch.float64, device=rows.device)
    resolve("entropy", rows).entropy(rows, boundaries, float(q), out)
    return out


def gain(
    rows: torch.Tensor, eigenvalues: torch.Tensor, vectors: torch.Tensor, sign: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Delta S = S(A + sign x x^T) - S(A), S(A) = tr(A ln A), of each unit row x of rows [N, K] alone.

    A = Q diag(l) Q^T: eigenvalues float64 [K], not negative; vectors Q float64 [K, K]. sign: +1 joins, -1 leaves.
    Returns float64 [N] each: Delta S, mu = x^T A x, and by what part x^T (A + t)^-1 x exceeds 1 / (1 + t), above which
    x x^T is not in A. The product with Q is in the rows' own precision, float64 or else float32, which adds less than
    1e-5 of the rows' spread; the rest is float64. Source: README, "The score".
    Raises GvendiError for a row whose length is not 1.
    """
    check_rows("rows", rows, rows.shape[-1] if rows.dim() else 0)
    check_basis(rows, eigenvalues, vectors)
    if sign not in (1, -1):
        raise GvendiError(f"sign must be 1 (rows join) or -1 (rows leave), got {sign!r}")
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    basis, at = vectors.to(dtype), quadrature(eigenvalues, sign)
    out = torch.empty(4, len(rows), dtype=torch.float64, device=rows.device)
    step = GAIN_ROWS.get(rows.device.type, GAIN_ROWS["cpu"])
    for begin in range(0, len(rows), step):
        coordinates = rows[begin : begin + step].to(dtype) @ basis
        resolve("gain", coordinates).gain(coordinates, at, out[:, begin : begin + step])
    wrong = ~((out[3] - 1).abs() <= GAIN_LENGTH)
    if bool(wrong.any()):
        if dtype == torch.float32:
            return gain(rows.double(), eigenvalues, vectors, sign)
        row = int(wrong.nonzero()[0, 0])
        raise GvendiError(
            f"row {row} of rows has length {float(out[3, row]) ** 0.5}; wanted 1, as unit_rows gives it"
        )
    return out[0], out[1], out[2]


def assign(
    rows: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The most similar centroid of every row and the runner-up, without a matrix of N x C cosines.

    rows [N, K] of any length, centroids float32 [C, K] of length 1. Returns label int64 [N], its cosine float32 [N],
    second int64 [N] and its cosine float32 [N]; of equal cosines the lower label comes first. With one centroid
    second is -1 and its cosine NaN. A row's result does not depend on the other rows (README, "Clusters").
    Raises GvendiError for centroids that are no unit rows and for a row without a direction.
    """
    check_centroids(centroids)
    check_rows("rows", rows, centroids.shape[1])
    label, second = (torch.empty(len(rows), dtype=torch.int64, device=rows.device) for _ in range(2))
    cosine, second_cosine = (
        torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(2)
    )
    resolve("assign", rows, centroids).assign(rows, centroids, label, cosine, second, second_cosine)
    # Zero, infinite and NaN rows have no finite cosine, so that no pass of its own must look for them.
    wrong = torch.nonzero(~cosine.isfinite())
    if len(wrong):
        row = int(wrong[0, 0])
        raise no_direction(row, float(rows[row].double().norm()))
    return label, cosine, second, second_cosine
