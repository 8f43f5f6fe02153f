"""The operations in plain float32 PyTorch, on any device: the twins whose error a kernel's is compared with.

tolerance.py says how. Letters as in `gvendi_fast.kernels.ops`; segments int64 [B, 2] on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gvendi_fast.kernels import reference
from gvendi_fast.kernels.signs import signs
from gvendi_fast.kernels.sketch_matrix import ExpertTables, Table


def fold32(x: torch.Tensor, table: Table) -> torch.Tensor:
    """S x: x [T, d] -> [T, K]."""
    bucket, sign = reference.table_tensors(table, x.device)
    return torch.zeros(x.shape[0], table.dim, device=x.device).index_add_(1, bucket, x.float() * sign.float())


def hadamard32(x: torch.Tensor) -> torch.Tensor:
    """H x: x [T, K] -> [T, K]."""
    step = 1
    while step < x.shape[-1]:
        low, high = x.reshape(*x.shape[:-1], x.shape[-1] // (2 * step), 2, step).unbind(-2)
        x = torch.stack([low + high, low - high], -2).reshape(x.shape)
        step *= 2
    return x


def fold_hadamard32(x: torch.Tensor, table: Table) -> torch.Tensor:
    """H S x: x [T, d] -> [T, K]."""
    return hadamard32(fold32(x, table))


def linear32(
    a: torch.Tensor,
    a_table: Table | None,
    parts: Sequence[tuple[torch.Tensor, Table | None]],
    segments: torch.Tensor,
) -> torch.Tensor:
    """K^(-1/2) sum_t (H sum_p S_p e_p,t) * (H S_i a_t), with a and parts as in `ops.linear_sketch` -> [B, K]."""
    left = a if a_table is None else fold_hadamard32(a, a_table)
    right = hadamard32(sum(e if table is None else fold32(e, table) for e, table in parts))
    return reference.sum_segments(left * right, segments) / math.sqrt(left.shape[1])


def expert32(
    a: torch.Tensor | None,
    e: torch.Tensor,
    experts: torch.Tensor,
    samples: torch.Tensor,
    count: int,
    a_tables: ExpertTables | None,
    e_tables: ExpertTables,
) -> torch.Tensor:
    """K^(-1/2) sum_r (H S_o^x e_r) * (H S_i^x a_r), x the expert of row r; a None: a factor of 1 -> [B, K]."""
    product = torch.empty(len(e), e_tables.dim, device=e.device)
    for expert in experts.unique().tolist():
        rows = experts == expert
        product[rows] = fold_hadamard32(e[rows], e_tables.table(expert))
        if a is not None:
            product[rows] *= fold_hadamard32(a[rows], a_tables.table(expert))
    out = torch.zeros(count, e_tables.dim, device=e.device)
    return out.index_add_(0, samples, product) / math.sqrt(e_tables.dim)


def token32(
    ids: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, id_table: Table, e_table: Table
) -> torch.Tensor:
    """The sketch of sum_t onehot(id_t) e_t^T -> [B, K]."""
    onehot = torch.nn.functional.one_hot(ids, id_table.width)
    return linear32(onehot, id_table, [(e, e_table)], segments)


def vector32(
    x: torch.Tensor | None,
    e: torch.Tensor,
    segments: torch.Tensor,
    table: Table,
    norm: str | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """K^(-1/2) H S v of a bias (norm None) or of a norm's weight ("rms", "layer") -> [B, K]."""
    gradient = e.float()
    if norm is not None:
        x = x.float()
        x = x - x.mean(1, keepdim=True) if norm == "layer" else x
        gradient = gradient * (x / torch.sqrt(x.square().mean(1, keepdim=True) + eps))
    return fold_hadamard32(reference.sum_segments(gradient, segments), table) / math.sqrt(table.dim)


def softmax32(
    logits: torch.Tensor, labels: torch.Tensor, table: Table, softcap: float | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [T], gradient [T, V] rounded to the dtype of the logits, and the fold [T, K] of what it was before."""
    x, slope = logits.float() * scale, scale
    if softcap is not None:
        capped = torch.tanh(x / softcap)
        x, slope = softcap * capped, scale * (1 - capped.square())
    log_p = torch.log_softmax(x, -1)
    e = (log_p.exp() - torch.nn.functional.one_hot(labels, x.shape[1])) * slope
    return -log_p.gather(1, labels[:, None])[:, 0], e.to(logits.dtype), fold32(e, table)


def dense32(
    a: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, key: tuple[int, int], dim: int
) -> torch.Tensor:
    """K^(-1/2) Pi^T vec(sum_t e_t a_t^T) -> [B, K]; with ids [T] in place of a, that of an embedding."""
    spans, out = segments.tolist(), torch.zeros(len(segments), dim, device=e.device)
    if a.is_floating_point():
        gradient = torch.stack([(e[b:s].float().T @ a[b:s].float()).flatten() for b, s in spans])
        blocks = [
            (first, gradient[:, first : first + reference.DENSE_BLOCK])
            for first in range(0, gradient.shape[1], reference.DENSE_BLOCK)
        ]
    else:
        # Only the rows of tokens that occur: ids may be far apart.
        known, place = a.unique(return_inverse=True)
        gradient = torch.zeros(len(spans), len(known), e.shape[1], device=e.device)
        for own, (b, s) in zip(gradient, spans, strict=True):
            own.index_add_(0, place[b:s], e[b:s].float())
        blocks = [(token * e.shape[1], gradient[:, row]) for row, token in enumerate(known.tolist())]
    for first, part in blocks:
        pi = torch.from_numpy(signs(key, first, first + part.shape[1], dim))
        out += part @ pi.to(e.device, torch.float32)
    return out / math.sqrt(dim)


def covariance32(rows: torch.Tensor) -> torch.Tensor:
    """sum_i z_i z_i^T of the rows [N, K], scaled to unit length -> [K, K]."""
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    return unit.T @ unit


def cosines32(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Cosines of rows [N, K] with unit rows [C, K] -> [N, C]."""
    return torch.nn.functional.normalize(rows.float(), dim=1) @ centroids.T
