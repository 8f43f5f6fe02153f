"""The verbs: check the arguments, allocate the results, resolve a backend, return.

Letters: B samples, T rows (tokens of all samples), O output width, I input width, V vocabulary, K sketch
dimension. Inputs are float32 or bfloat16 (any float on the reference backend), row-major with a unit last
stride; sketches are float32. `segments` int64 [B, 2] on the CPU holds each sample's (begin, end) rows, which may be
empty and need not cover all rows. Verbs with `out` add to it, so that one buffer collects all parameters.
The verbs on finished sketches, rows [N, K], follow them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import no_direction
from gvendi_fast.kernels.backends import resolve
from gvendi_fast.kernels.checks import (
    check_basis,
    check_centroids,
    check_dim,
    check_groups,
    check_ids,
    check_out,
    check_rows,
    check_segments,
    check_sketch,
    check_tensor,
)
from gvendi_fast.kernels.signs import MAX_IDS
from gvendi_fast.kernels.sketch_matrix import ExpertTables, Table
from gvendi_fast.kernels.spectrum import quadrature

# Rows whose coordinates stay in the cache between the product and the sums over them; a GPU needs more to be busy.
GAIN_ROWS = {"cpu": 512, "cuda": 16384}
# How far float32 rotation may move the squared length of a unit row; TF32 and bfloat16 products exceed it.
GAIN_LENGTH = 2e-6


def fold_hadamard(x: torch.Tensor, table: Table) -> torch.Tensor:
    """H S x for every row: x [T, d] -> float32 [T, K]. Source: docs/sketch.md."""
    check_rows("x", x, table.width)
    out = torch.empty(x.shape[0], table.dim, dtype=torch.float32, device=x.device)
    resolve("fold_hadamard", x).fold_hadamard(x, table, out)
    return out


def linear_sketch(
    a: torch.Tensor,
    a_table: Table | None,
    parts: Sequence[tuple[torch.Tensor, Table | None]],
    segments: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Add K^(-1/2) sum_t (H sum_p S_p e_p,t) * (H S_i a_t) over each sample's rows to out [B, K]; return out.

    a: [T, I] with its table; or, with a_table None, H S_i a as `fold_hadamard` returns it (float32 [T, K]).
    a_table: the table of the input axis, or None.
    parts: one (e [T, O], table) per layer that reads this input (q, k and v share one); with table None, e is
        already folded, as `softmax_fold` returns it (float32 [T, K]).
    segments: int64 [B, 2], each sample's (begin, end) rows.
    """
    check_out(out, segments)
    dim = out.shape[1]
    check_rows("a", a, dim if a_table is None else a_table.width)
    if a_table is None and a.dtype != torch.float32:
        raise GvendiError(f"a must be float32 when a_table is None (it is H S a then), got {a.dtype}")
    if not parts:
        raise GvendiError("parts must hold at least one (e, table) pair")
    for position, (e, table) in enumerate(parts):
        check_rows(f"parts[{position}]", e, dim if table is None else table.width)
        if e.shape[0] != a.shape[0]:
            raise GvendiError(
                f"parts[{position}] has {e.shape[0]} rows, a has {a.shape[0]}; they must be equal"
            )
        if table is None and e.dtype != torch.float32:
            raise GvendiError(
                f"parts[{position}] must be float32 when its table is None (it is S e then), got {e.dtype}"
            )
    for table in [a_table, *(table for _, table in parts)]:
        check_dim(table, dim)
    check_segments(segments, a.shape[0])
    resolve("linear_sketch", a, *(e for e, _ in parts), out).linear_sketch(a, a_table, parts, segments, out)
    return out


def expert_sketch(
    a: torch.Tensor | None,
    e: torch.Tensor,
    experts: torch.Tensor,
    samples: torch.Tensor,
    a_tables: ExpertTables | None,
    e_tables: ExpertTables,
    out: torch.Tensor,
) -> torch.Tensor:
    """Add K^(-1/2) sum_r (H S_o^x e_r) * (H S_i^x a_r), x = experts[r], over a sample's rows to out [B, K]; return it.

    The sketch of E matrices, each of which sees rows of its own: a row is a token at one expert.
    a: [R, I], what the expert got; None with a_tables None for stacked biases, whose factor is 1.
    e: [R, O], gradients of what the expert gave.
    experts, samples: int64 [R], in 0..E-1 and 0..B-1, on the device of e, in any order and with any number of rows
        each. Rows sorted by expert, and of one expert by sample, are the fast case. On a GPU they are not looked at, so
        that nothing waits: a number of no expert makes its sample NaN, a number of no sample the first one.
    a_tables, e_tables: from `expert_column_tables` and `expert_row_tables`, of as many experts each.
    """
    check_sketch(out)
    check_rows("e", e, e_tables.width)
    if (a is None) != (a_tables is None):
        raise GvendiError(
            "only one of a and a_tables is given; give both for stacked weights and neither for stacked biases"
        )
    if a is not None:
        check_rows("a", a, a_tables.width)
        if a.shape[0] != e.shape[0]:
            raise GvendiError(f"a has {a.shape[0]} rows, e has {e.shape[0]}; they must be equal")
        if a_tables.experts != e_tables.experts:
            raise GvendiError(
                f"a_tables has {a_tables.experts} experts, e_tables has {e_tables.experts}; they must be equal"
            )
        check_dim(a_tables, out.shape[1])
    check_dim(e_tables, out.shape[1])
    check_ids("experts", experts, e.shape[0], e_tables.experts)
    check_ids("samples", samples, e.shape[0], out.shape[0])
    tensors = (e, experts, samples, out) if a is None else (a, e, experts, samples, out)
    resolve("expert_sketch", *tensors).expert_sketch(a, e, experts, samples, a_tables, e_tables, out)
    return out


def token_sketch(
    ids: torch.Tensor,
    e: torch.Tensor,
    segments: torch.Tensor,
    id_table: Table,
    e_table: Table,
    out: torch.Tensor,
) -> torch.Tensor:
    """Add the sketch of an embedding's gradient sum_t onehot(id_t) e_t^T to out [B, K]; return out.

    ids: int64 [T] in 0..V-1.
    e: [T, d], gradients of the embedding's output.
    segments: int64 [B, 2], each sample's (begin, end) rows.
    id_table, e_table: tables of width V and d.
    """
    check_out(out, segments)
    check_rows("e", e, e_table.width)
    check_ids("ids", ids, e.shape[0], id_table.width)
    check_dim(id_table, out.shape[1])
    check_dim(e_table, out.shape[1])
    check_segments(segments, e.shape[0])
    resolve("token_sketch", ids, e, out).token_sketch(ids, e, segments, id_table, e_table, out)
    return out


def vector_sketch(
    x: torch.Tensor | None,
    e: torch.Tensor,
    segments: torch.Tensor,
    table: Table,
    out: torch.Tensor,
    norm: str | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Add K^(-1/2) H S v_b to out [B, K], v_b the gradient of a bias or of a norm's weight; return out.

    x: [T, d], the norm's input; None for a bias, whose gradient is v = sum_t e_t.
    e: [T, d], gradients of the output.
    segments: int64 [B, 2], each sample's (begin, end) rows.
    table: of width d.
    norm: None for a bias; else v = sum_t e_t * x_hat_t with x_hat = x / sqrt(mean(x^2) + eps) for "rms" and
        (x - mean) / sqrt(var + eps) for "layer".
    eps: the norm's.
    """
    check_out(out, segments)
    check_rows("e", e, table.width)
    if norm not in (None, "rms", "layer"):
        raise GvendiError(f'norm must be None, "rms" or "layer", got {norm!r}')
    if (x is None) != (norm is None):
        raise GvendiError(
            "only one of x and norm is given; give both for a norm's weight and neither for a bias"
        )
    if x is not None:
        check_rows("x", x, table.width)
        if x.shape != e.shape:
            raise GvendiError(f"x has shape {tuple(x.shape)}, e has {tuple(e.shape)}; they must be equal")
    check_dim(table, out.shape[1])
    check_segments(segments, e.shape[0])
    tensors = (e, out) if x is None else (x, e, out)
    resolve("vector_sketch", *tensors).vector_sketch(x, e, segments, table, out, norm, float(eps))
    return out


def dense_sketch(
    a: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, key: tuple[int, int], out: torch.Tensor
) -> torch.Tensor:
    """Add K^(-1/2) Pi^T vec(g_b), g_b = sum_t e_t a_t^T over each sample's rows, to out [B, K]; return out.

    a: [T, I]; or ids int64 [T], for the gradient of an embedding, sum_t onehot(id_t) e_t^T.
    e: [T, O].
    segments: int64 [B, 2], each sample's (begin, end) rows.
    key: as `signs.sign_key` gives it; `signs.py` defines Pi in {+1, -1}^(O I x K) by it.
    out: float32 [B, K], K a multiple of 64.
    """
    check_out(out, segments)
    check_tensor("a", a)
    check_tensor("e", e)
    check_rows("e", e, e.shape[-1] if e.dim() else 0)
    if a.is_floating_point():
        check_rows("a", a, a.shape[-1] if a.dim() else 0)
        if a.shape[0] != e.shape[0]:
            raise GvendiError(f"a has {a.shape[0]} rows, e has {e.shape[0]}; they must be equal")
    else:
        check_ids("a", a, e.shape[0], MAX_IDS)
    if out.shape[1] % 64:
        raise GvendiError(
            f"out must have a multiple of 64 columns, got {out.shape[1]}; use a SketchSpec's dim"
        )
    if len(key) != 2 or not all(0 <= word < 1 << 32 for word in key):
        raise GvendiError(f"key must be two integers below 2^32, got {key!r}; use signs.sign_key")
    check_segments(segments, e.shape[0])
    resolve("dense_sketch", a, e, out).dense_sketch(a, e, segments, key, out)
    return out


def softmax_fold(
    logits: torch.Tensor,
    labels: torch.Tensor,
    table: Table | None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn raw logits [T, V] into their gradient in place; return loss float32 [T] and S_V e float32 [T, K].

    The gradient e is that of logsumexp(l) - l[label] with respect to x, the raw logits.
    labels: int64 [T] in 0..V-1.
    table: of width V; None: nothing is folded, and None is returned in place of S_V e.
    softcap, scale: the model's logits are l = scale * x, then softcap * tanh(l / softcap) if softcap is given.
    """
    check_tensor("logits", logits)
    width = table.width if table is not None else logits.shape[-1] if logits.dim() else 0
    check_rows("logits", logits, width)
    if len(logits) > 1 and logits.stride(0) < width:
        raise GvendiError("rows of logits share memory, and each is overwritten; call .contiguous()")
    check_ids("labels", labels, logits.shape[0], width)
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    folded = None
    if table is not None:
        folded = torch.empty(logits.shape[0], table.dim, dtype=torch.float32, device=logits.device)
    cap = None if softcap is None else float(softcap)
    resolve("softmax_fold", logits, labels).softmax_fold(
        logits, labels, table, loss, folded, cap, float(scale)
    )
    return loss, folded


def covariance(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Add sum_i z_i z_i^T of the rows [N, K], scaled to unit length, to out float64 [K, K]; return out.

    Products are float32, and the sum of each block of rows is added to out in float64 (docs/score.md).
    """
    check_tensor("out", out)
    if (
        out.dtype != torch.float64
        or out.dim() != 2
        or out.shape[0] != out.shape[1]
        or not out.is_contiguous()
    ):
        raise GvendiError(
            f"out must be a contiguous square float64 matrix, got {out.dtype} {tuple(out.shape)}"
        )
    check_rows("rows", rows, out.shape[1])
    resolve("covariance", rows, out).covariance(rows, out)
    return out


def entropy(rows: torch.Tensor, boundaries: torch.Tensor, q: float = 1.0) -> torch.Tensor:
    """Renyi entropy of order q (nats) of each of many small groups of rows [N, K] -> float64 [G].

    Group g is rows boundaries[g] .. boundaries[g + 1], 1 to 256 of them; boundaries int64 [G + 1] on the CPU,
    increasing. Rows are scaled to unit length; the eigenvalues of a group's Gram matrix, over their sum, have
    the entropy ln(sum l^q) / (1 - q), q = 1 von Neumann's and q = inf -ln max l (docs/score.md). exp of
    it is the group's G-Vendi. At q < 1 eigenvalues below 2^-22 do not count: they may be rounding.
    Raises GvendiError for a group without rows or with too many, and for a row without a direction.
    """
    check_tensor("rows", rows)
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

    rows: float32 or float64 [N, K], each of length 1.
    eigenvalues, vectors: l float64 [K], not negative, and Q float64 [K, K], with A = Q diag(l) Q^T.
    sign: +1 where a row joins, -1 where it leaves.
    Returns float64 [N] each: Delta S, mu = x^T A x, and the relative excess of x^T (A + t)^-1 x over 1 / (1 + t): where
    it is above 0, x x^T is not in A. The product with Q is float64 for float64 rows and float32 for all others, which
    adds less than 1e-5 of the rows' spread; the rest is float64. Source: docs/score.md.
    Raises GvendiError for a row whose length is not 1.
    """
    check_tensor("rows", rows)
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
            f"row {row} of rows has length {float(out[3, row]) ** 0.5}; wanted 1: scale rows with unit_rows first"
        )
    return out[0], out[1], out[2]


def assign(
    rows: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The most similar centroid of every row and the runner-up, without a matrix of N x C cosines.

    rows [N, K] of any length, centroids float32 [C, K] of length 1. Returns label int64 [N], its cosine float32 [N],
    second int64 [N] and its cosine float32 [N]; of equal cosines the lower label comes first. With one centroid
    second is -1 and its cosine NaN. A row's result does not depend on the other rows (docs/clusters.md).
    Raises GvendiError for centroids that do not have length 1 and for a row without a direction.
    """
    check_centroids(centroids)
    check_rows("rows", rows, centroids.shape[1])
    label, second = (torch.empty(len(rows), dtype=torch.int64, device=rows.device) for _ in range(2))
    cosine, second_cosine = (
        torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(2)
    )
    resolve("assign", rows, centroids).assign(rows, centroids, label, cosine, second, second_cosine)
    # Zero, infinite and NaN rows have no finite cosine, so they need no pass of their own.
    wrong = torch.nonzero(~cosine.isfinite())
    if len(wrong):
        row = int(wrong[0, 0])
        raise no_direction(row, float(rows[row].double().norm()))
    return label, cosine, second, second_cosine
