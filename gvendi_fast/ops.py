"""The verbs: check the arguments, allocate the results, resolve a backend, return.

Letters: B samples, T rows (tokens of all samples), O output width, I input width, V vocabulary, K sketch
dimension. Inputs are float32 or bfloat16 (any float on the reference backend), row-major with a unit last
stride; sketches are float32. `segments` int64 [B, 2] on the CPU holds each sample's (begin, end) rows, which may be
empty and need not cover all rows. Verbs with `out` add to it, so that one buffer collects all parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gvendi_fast.backends import resolve
from gvendi_fast.errors import GvendiError
from gvendi_fast.plan import Table

# Logits that live at once: about this many bytes, but enough rows for the product to run at full speed (measured for
# V = 151,936 in float32 on 2 cores: 64 rows take 1.25 times the time of 220).
HEAD_CHUNK_BYTES = 64 << 20
HEAD_CHUNK_MIN_ROWS = 256


def fold_hadamard(x: torch.Tensor, table: Table) -> torch.Tensor:
    """H S x for every row: x [T, d] -> float32 [T, K]. Source: README, "The sketch"."""
    _check_rows("x", x, table.width)
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
    """Add K^(-1/2) sum_t (H sum_p S_p e_p,t) * (H S_i a_t) over each sample's rows to out [B, K].

    a [T, I] with its table, or, with a_table None, H S_i a as `fold_hadamard` returns it (float32 [T, K]).
    parts: one (e [T, O], table) per layer that reads this input (q, k and v share one); a part with table
    None is already folded, as `softmax_fold` returns it (float32 [T, K]). Returns out.
    """
    dim = out.shape[1]
    _check_out(out, segments)
    _check_rows("a", a, dim if a_table is None else a_table.width)
    if a_table is None and a.dtype != torch.float32:
        raise GvendiError(f"a without a table is H S a and must be float32, got {a.dtype}")
    if not parts:
        raise GvendiError("parts must hold at least one (e, table) pair")
    for position, (e, table) in enumerate(parts):
        _check_rows(f"parts[{position}]", e, dim if table is None else table.width)
        if e.shape[0] != a.shape[0]:
            raise GvendiError(
                f"parts[{position}] has {e.shape[0]} rows, a has {a.shape[0]}; they must be equal"
            )
        if table is None and e.dtype != torch.float32:
            raise GvendiError(f"parts[{position}] without a table is S e and must be float32, got {e.dtype}")
    for table in [a_table, *(table for _, table in parts)]:
        _check_dim(table, dim)
    _check_segments(segments, a.shape[0])
    resolve("linear_sketch", a, *(e for e, _ in parts)).linear_sketch(a, a_table, parts, segments, out)
    return out


def token_sketch(
    ids: torch.Tensor,
    e: torch.Tensor,
    segments: torch.Tensor,
    id_table: Table,
    e_table: Table,
    out: torch.Tensor,
) -> torch.Tensor:
    """Add the sketch of an embedding's gradient sum_t onehot(id_t) e_t^T to out [B, K].

    ids int64 [T] in 0..V-1, e [T, d], id_table of width V, e_table of width d. Returns out.
    """
    _check_out(out, segments)
    _check_rows("e", e, e_table.width)
    _check_ids("ids", ids, e.shape[0], id_table.width)
    _check_dim(id_table, out.shape[1])
    _check_dim(e_table, out.shape[1])
    _check_segments(segments, e.shape[0])
    resolve("token_sketch", ids, e).token_sketch(ids, e, segments, id_table, e_table, out)
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
    """Add K^(-1/2) H S v_b to out [B, K], v_b the gradient of a bias or of a norm's weight.

    Bias (norm None, x None): v = sum_t e_t. Norm weight: v = sum_t e_t * x_hat_t with x_hat the normalised
    input, "rms": x / sqrt(mean(x^2) + eps), "layer": (x - mean) / sqrt(var + eps). x and e: [T, d]. Returns out.
    """
    _check_out(out, segments)
    _check_rows("e", e, table.width)
    if norm not in (None, "rms", "layer"):
        raise GvendiError(f'norm must be None, "rms" or "layer", got {norm!r}')
    if (x is None) != (norm is None):
        raise GvendiError("x goes with norm: give both for a norm's weight and neither for a bias")
    if x is not None:
        _check_rows("x", x, table.width)
        if x.shape != e.shape:
            raise GvendiError(f"x has shape {tuple(x.shape)}, e has {tuple(e.shape)}; they must be equal")
    _check_dim(table, out.shape[1])
    _check_segments(segments, e.shape[0])
    tensors = (e,) if x is None else (x, e)
    resolve("vector_sketch", *tensors).vector_sketch(x, e, segments, table, out, norm, float(eps))
    return out


def softmax_fold(
    logits: torch.Tensor, labels: torch.Tensor, table: Table, softcap: float | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn raw logits [T, V] into their gradient in place; return loss float32 [T] and S_V e float32 [T, K].

    The model's logits are l = scale * x, then softcap * tanh(l / softcap) if softcap is given; the gradient
    is that of logsumexp(l) - l[label] with respect to x. labels int64 [T] in 0..V-1.
    """
    _check_rows("logits", logits, table.width)
    _check_ids("labels", labels, logits.shape[0], table.width)
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    folded = torch.empty(logits.shape[0], table.dim, dtype=torch.float32, device=logits.device)
    cap = None if softcap is None else float(softcap)
    resolve("softmax_fold", logits).softmax_fold(logits, labels, table, loss, folded, cap, float(scale))
    return loss, folded


def head_sketch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    segments: torch.Tensor,
    hidden_table: Table,
    vocab_table: Table,
    out: torch.Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, input gradient and sketch of the LM head in row chunks, so that no [T, V] matrix lives.

    hidden [T, d], weight [V, d] of the same dtype, labels int64 [T]. Adds to out [B, K]; returns loss
    float32 [T] and the gradient of hidden [T, d]. Peak extra memory: one chunk of logits, 64 MB or 256 rows.
    """
    _check_rows("hidden", hidden, hidden_table.width)
    _check_rows("weight", weight, hidden_table.width)
    if weight.shape[0] != vocab_table.width:
        raise GvendiError(f"weight has {weight.shape[0]} rows, vocab_table is for {vocab_table.width}")
    rows = hidden.shape[0]
    loss = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    folded = torch.empty(rows, vocab_table.dim, dtype=torch.float32, device=hidden.device)
    chunk = max(HEAD_CHUNK_MIN_ROWS, HEAD_CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        logits = torch.mm(hidden[part], weight.T)
        loss[part], folded[part] = softmax_fold(logits, labels[part], vocab_table, softcap, scale)
        torch.mm(logits, weight, out=grad_hidden[part])
    linear_sketch(hidden, hidden_table, [(folded, None)], segments, out)
    return loss, grad_hidden


def covariance(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Add sum_i z_i z_i^T of the rows [N, K], scaled to unit length, to out float64 [K, K]; return out.

    Products are float32, summed per block of rows into the float64 master (README, "The score").
    """
    _check_rows("rows", rows, out.shape[1])
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


def _check_rows(name: str, x: torch.Tensor, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width:
        raise GvendiError(f"{name} must have shape [rows, {width}], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise GvendiError(f"{name} must be floating point, got {x.dtype}")
    if x.shape[0] > 0 and x.stride(1) != 1 and width > 1:
        raise GvendiError(f"{name} must have unit stride in its last dimension; call .contiguous()")


def _check_ids(name: str, ids: torch.Tensor, rows: int, width: int) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.shape[0] != rows or not ids.is_contiguous():
        raise GvendiError(f"{name} must be contiguous int64 [{rows}], got {ids.dtype} {tuple(ids.shape)}")
    if rows and ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < width:
        raise GvendiError(f"{name} must lie in 0..{width - 1}, got {int(ids.min())}..{int(ids.max())}")


def _check_out(out: torch.Tensor, segments: torch.Tensor) -> None:
    if out.dim() != 2 or out.dtype != torch.float32 or not out.is_contiguous():
        raise GvendiError(f"out must be contiguous float32 [B, K], got {out.dtype} {tuple(out.shape)}")
    if out.shape[0] != segments.shape[0]:
        raise GvendiError(f"out has {out.shape[0]} rows but segments names {segments.shape[0]} samples")


def _check_dim(table: Table | None, dim: int) -> None:
    if table is not None and table.dim != dim:
        raise GvendiError(f"a table of dim {table.dim} does not go with out of dim {dim}; use one SketchSpec")


def _check_segments(segments: torch.Tensor, rows: int) -> None:
    ok = segments.dtype == torch.int64 and segments.dim() == 2 and segments.shape[1] == 2
    if not ok or segments.device.type != "cpu" or not segments.is_contiguous():
        raise GvendiError(f"segments must be contiguous int64 [B, 2] on the CPU, got {tuple(segments.shape)}")
    # NumPy takes a tenth of torch's time for arrays this small, and every layer checks.
    spans = segments.numpy()
    if len(spans) and (
        spans[:, 0].min() < 0 or spans[:, 1].max() > rows or bool((spans[:, 1] < spans[:, 0]).any())
    ):
        raise GvendiError(f"segments must satisfy 0 <= begin <= end <= {rows} in every row")
