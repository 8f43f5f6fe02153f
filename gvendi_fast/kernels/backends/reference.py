"""The reference definitions behind the operations' calling convention: any device, any float dtype, slow."""

from __future__ import annotations

import math

import torch

from gvendi_fast.kernels import reference
from gvendi_fast.kernels.checks import check_ids
from gvendi_fast.kernels.sketch_matrix import Table
from gvendi_fast.kernels.spectrum import Quadrature, marginal_change


def status() -> str:
    """One line for `gvendi info`."""
    return "ready (fp64 definitions in PyTorch; slow)"


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """The reference runs every operation."""
    return None


def fold_hadamard(x: torch.Tensor, table: Table, out: torch.Tensor) -> None:
    out.copy_(reference.fold_hadamard(x, table))


def linear_sketch(a, a_table, parts, segments, out) -> None:
    transformed = a.double() if a_table is None else reference.fold_hadamard(a, a_table)
    folded = sum(e.double() if table is None else reference.fold(e, table) for e, table in parts)
    product = transformed * reference.hadamard(folded)
    out += (reference.sum_segments(product, segments) / math.sqrt(out.shape[1])).to(out.dtype)


def expert_sketch(a, e, experts, samples, a_tables, e_tables, out) -> None:
    # The verb leaves numbers on a GPU unread.
    check_ids("experts", experts.cpu(), len(e), e_tables.experts)
    check_ids("samples", samples.cpu(), len(e), len(out))
    out += reference.expert_sketch(a, e, experts, samples, len(out), a_tables, e_tables).to(out.dtype)


def token_sketch(ids, e, segments, id_table, e_table, out) -> None:
    transformed = reference.fold_hadamard(e, e_table)
    bucket, sign = (x[ids.long()] for x in reference.table_tensors(id_table, e.device))
    # H[:, bucket] = H onehot(bucket), so no [T, V] one-hot matrix is needed.
    pattern = torch.zeros_like(transformed).scatter_(1, bucket[:, None], sign[:, None])
    product = transformed * reference.hadamard(pattern)
    out += (reference.sum_segments(product, segments) / math.sqrt(out.shape[1])).to(out.dtype)


def vector_sketch(x, e, segments, table, out, norm, eps) -> None:
    v = reference.vector_gradient(x, e, segments, norm, eps)
    out += (reference.fold_hadamard(v, table) / math.sqrt(out.shape[1])).to(out.dtype)


def softmax_fold(logits, labels, table, loss, folded, softcap, scale) -> None:
    row_loss, e, row_fold = reference.softmax_fold(logits, labels, table, softcap, scale)
    loss.copy_(row_loss)
    logits.copy_(e)
    if table is not None:
        folded.copy_(row_fold)


def dense_sketch(a, e, segments, key, out) -> None:
    out += reference.dense_sketch(a, e, segments, key, out.shape[1]).to(out.dtype)


def covariance(rows, out) -> None:
    out += reference.covariance(rows)[0]


def assign(rows, centroids, label, cosine, second, second_cosine) -> None:
    nearest = reference.assign(rows, centroids)
    for out, value in zip((label, cosine, second, second_cosine), nearest, strict=True):
        out.copy_(value)


def entropy(rows, boundaries, q, out) -> None:
    out.copy_(reference.group_entropies(rows, boundaries, q))


def gain(coordinates: torch.Tensor, at: Quadrature, out: torch.Tensor) -> None:
    # The definition, eigenvalues for every row, takes minutes where the integral takes milliseconds.
    out.copy_(torch.stack(marginal_change(coordinates.double().square(), at)))
