"""Finished sketches: their covariance, its changes, entropies of groups, and nearest centroids."""

from __future__ import annotations

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.backends.cpu.extension import _cpu, as_matrix, thread_count, whole_runs
from gvendi_fast.kernels.spectrum import Quadrature

# Scores [rows, C] that `assign` holds at once: 16 MiB, but enough rows for a product to run at full speed.
ASSIGN_SCORES, ASSIGN_MIN_ROWS, ASSIGN_ROWS = 1 << 22, 64, 4096
# Up to this many centroids every product is computed in float64 at once.
ASSIGN_DIRECT = 4


def covariance(rows: torch.Tensor, out: torch.Tensor) -> None:
    dim = out.shape[1]
    missing = -dim % _cpu.PANEL
    if missing:
        # Columns of zeros fill the last panel and add nothing.
        wide = torch.zeros(dim + missing, dim + missing, dtype=torch.float64)
        covariance(torch.nn.functional.pad(rows, (0, missing)), wide)
        out += wide[:dim, :dim]
        return
    panels = torch.empty(min(len(rows), _cpu.COVARIANCE_ROWS) * dim, dtype=torch.float32)
    _cpu.covariance(as_matrix(rows), len(rows), dim, panels.data_ptr(), out.data_ptr(), thread_count())


def gain(coordinates: torch.Tensor, at: Quadrature, out: torch.Tensor) -> None:
    rows, dim = coordinates.shape
    _cpu.gain(
        coordinates.data_ptr(),
        coordinates.dtype == torch.float64,
        rows,
        dim,
        at.sign,
        len(at.t),
        at.table.shape[1],
        at.t.data_ptr(),
        at.weight.data_ptr(),
        at.table.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        thread_count(),
    )


def entropy(rows: torch.Tensor, boundaries: torch.Tensor, q: float, out: torch.Tensor) -> None:
    if len(out) == 0:
        return
    threads, dim = min(thread_count(), len(out)), rows.shape[1]
    buffer = _cpu.entropy_buffer(int(boundaries.diff().max()), dim)
    buffers = torch.empty(threads * buffer, dtype=torch.float64)
    _cpu.entropy(
        as_matrix(rows),
        boundaries.data_ptr(),
        len(out),
        dim,
        q,
        buffers.data_ptr(),
        buffer,
        out.data_ptr(),
        threads,
    )
    lost = torch.nonzero(out.isnan())
    if len(lost):
        raise GvendiError(
            f"the eigenvalues of group {int(lost[0, 0])} did not converge; run it inside use_backend('reference'), "
            "which computes them with LAPACK"
        )


def assign(rows, centroids, label, cosine, second, second_cosine) -> None:
    (N, K), C, threads = rows.shape, len(centroids), thread_count()
    # In whatever order a library adds, the error is at most K times 2^-24; the factor covers the centroids' length.
    margin = 2.02 * ((K + 2) * 2.0**-24 + product_error())
    buffers = torch.empty(threads * whole_runs(K), dtype=torch.float32)
    block = min(ASSIGN_ROWS, max(ASSIGN_MIN_ROWS, ASSIGN_SCORES // C))
    for first in range(0, N, block):
        part = slice(first, first + block)
        scores = torch.mm(rows[part].float(), centroids.T) if C > ASSIGN_DIRECT else None
        _cpu.assign(
            as_matrix(rows[part]),
            len(rows[part]),
            K,
            centroids.data_ptr(),
            C,
            0 if scores is None else scores.data_ptr(),
            margin,
            buffers.data_ptr(),
            label[part].data_ptr(),
            cosine[part].data_ptr(),
            second[part].data_ptr(),
            second_cosine[part].data_ptr(),
            threads,
        )


def product_error() -> float:
    """Relative error of a float32 product of torch from rounding its factors: 0, or that of bfloat16 or TF32."""
    if hasattr(torch.backends.mkldnn, "matmul"):
        precise = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    else:
        precise = torch.get_float32_matmul_precision() == "highest"
    return 0.0 if precise else 2.0**-7
