"""The verbs: check the arguments, allocate the results, resolve a backend, return.

Letters: B samples, T rows (tokens of all samples), O output width, I input width, V vocabulary, K sketch
dimension. Inputs are float32 or bfloat16 (any float on the reference backend), row-major with a unit last
stride; sketches are float32. `segments` int64 [B, 2] on the CPU holds each sample's (begin, end) rows, which may be
empty and need not cover all rows. Verbs with `out` add to it, so that one buffer collects all parameters.
Those on finished sketches stand in `row_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gvendi_fast.backends import resolve
from gvendi_fast.checks import (
    check_dim,
    check_ids,
    check_out,
    check_rows,
    check_segments,
)
from gvendi_fast.errors import GvendiError
from gvendi_fast.plan import Table
from gvendi_fast.row_ops import assign, covariance, entropy, gain
from gvendi_fast.signs import MAX_IDS

__all__ = [
    "assign",
    "covariance",
    "dense_head_sketch",
    "dense_sketch",
    "entropy",
    "fold_hadamard",
    "gain",
    "head_chunk_rows",
    "head_sketch",
    "linear_sketch",
    "softmax_fold",
    "token_sketch",
    "vector_sketch",
]

# Logits that live at once on a CPU: about this many bytes, but enough rows for the product to run at full speed
# (measured for V = 151,936 in float32 on 2 cores: 64 rows take 1.25 times the time of 220).
HEAD_CHUNK_BYTES = 64 << 20
HEAD_CHUNK_MIN_ROWS = 256
# On a GPU the products' tiles of 128 rows by 128 columns keep every multiprocessor busy: with d = 896 the gradient of
# 883 rows is 7 x 7 tiles for 132 multiprocessors, of 4,096 rows 32 x 7. A small GPU gives a share of its memory.
HEAD_CHUNK_GPU_ROWS = 4096
HEAD_MEMORY_SHARE = 1 / 16
HEAD_TILE_ROWS = 128
# A row of logits begins at a multiple of this many elements on a GPU, where loads then take 16 bytes at a time.
HEAD_ROW_ALIGNMENT = 16
# Every chunk costs the dense mode all signs of the head, so its chunks are longer.
DENSE_HEAD_CHUNK_BYTES = 256 << 20


def head_chunk_rows(
    vocabulary: int, element_size: int, device: torch.device | str, memory: int | None = None
) -> int:
    """Rows of logits [rows, vocabulary] of `element_size` bytes each that `head_sketch` holds at once.

    On a GPU 4,096, or as many as 1/16 of its memory holds, rounded down to a multiple of 128, but at least 256: a
    figure of the device alone, neither of what is free nor of the batch. Elsewhere 64 MiB of logits, but at least 256
    rows. memory: bytes of the GPU, read from the device where not given.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return max(HEAD_CHUNK_MIN_ROWS, HEAD_CHUNK_BYTES // (vocabulary * element_size))
    if memory is None:
        memory = torch.cuda.get_device_properties(device).total_memory
    fitting = int(HEAD_MEMORY_SHARE * memory) // (_pitch(vocabulary, device) * element_size)
    rows = min(HEAD_CHUNK_GPU_ROWS, fitting) // HEAD_TILE_ROWS * HEAD_TILE_ROWS
    return max(HEAD_CHUNK_MIN_ROWS, rows)


def _pitch(vocabulary: int, device: torch.device) -> int:
    """Elements from one row of logits to the next."""
    step = HEAD_ROW_ALIGNMENT if device.type == "cuda" else 1
    return -(-vocabulary // step) * step


def fold_hadamard(x: torch.Tensor, table: Table) -> torch.Tensor:
    """H S x for every row: x [T, d] -> float32 [T, K]. Source: README, "The sketch"."""
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
    """Add K^(-1/2) sum_t (H sum_p S_p e_p,t) * (H S_i a_t) over each sample's rows to out [B, K].

    a [T, I] with its table, or, with a_table None, H S_i a as `fold_hadamard` returns it (float32 [T, K]).
    parts: one (e [T, O], table) per layer that reads this input (q, k and v share one); a part with table
    None is already folded, as `softmax_fold` returns it (float32 [T, K]). Returns out.
    """
    dim = out.shape[1]
    check_out(out, segments)
    check_rows("a", a, dim if a_table is None else a_table.width)
    if a_table is None and a.dtype != torch.float32:
        raise GvendiError(f"a without a table is H S a and must be float32, got {a.dtype}")
    if not parts:
        raise GvendiError("parts must hold at least one (e, table) pair")
    for position, (e, table) in enumerate(parts):
        check_rows(f"parts[{position}]", e, dim if table is None else table.width)
        if e.shape[0] != a.shape[0]:
            raise GvendiError(
                f"parts[{position}] has {e.shape[0]} rows, a has {a.shape[0]}; they must be equal"
            )
        if table is None and e.dtype != torch.float32:
            raise GvendiError(f"parts[{position}] without a table is S e and must be float32, got {e.dtype}")
    for table in [a_table, *(table for _, table in parts)]:
        check_dim(table, dim)
    check_segments(segments, a.shape[0])
    resolve("linear_sketch", a, *(e for e, _ in parts), out).linear_sketch(a, a_table, parts, segments, out)
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
    """Add K^(-1/2) H S v_b to out [B, K], v_b the gradient of a bias or of a norm's weight.

    Bias (norm None, x None): v = sum_t e_t. Norm weight: v = sum_t e_t * x_hat_t with x_hat the normalised
    input, "rms": x / sqrt(mean(x^2) + eps), "layer": (x - mean) / sqrt(var + eps). x and e: [T, d]. Returns out.
    """
    check_out(out, segments)
    check_rows("e", e, table.width)
    if norm not in (None, "rms", "layer"):
        raise GvendiError(f'norm must be None, "rms" or "layer", got {norm!r}')
    if (x is None) != (norm is None):
        raise GvendiError("x goes with norm: give both for a norm's weight and neither for a bias")
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

    a [T, I], e [T, O], key as `signs.sign_key` gives it: Pi in {+1, -1}^(O I x K) is defined in `signs.py`. With
    ids int64 [T] in place of a it is the gradient of an embedding, sum_t onehot(id_t) e_t^T. K is a multiple of 64.
    """
    check_out(out, segments)
    check_rows("e", e, e.shape[-1])
    if a.is_floating_point():
        check_rows("a", a, a.shape[-1])
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

    The model's logits are l = scale * x, then softcap * tanh(l / softcap) if softcap is given; the gradient
    is that of logsumexp(l) - l[label] with respect to x. labels int64 [T] in 0..V-1. Without a table nothing is
    folded and None comes in place of S_V e.
    """
    width = logits.shape[-1] if table is None else table.width
    check_rows("logits", logits, width)
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
    float32 [T] and the gradient of hidden [T, d]. Peak extra memory: one chunk of logits, min(C, T) V numbers of the
    weight's dtype with C = `head_chunk_rows` (on a GPU V rounded up to a multiple of 16), and (T + C) K float32. For
    V = 151,936 and K = 1024 that is C = 256 and 78 MB + 4 KB a row (bfloat16) or 156 MB + 4 KB a row (float32) on a
    CPU. On a GPU it is C = 4096 and 1.24 GB + 4 KB a row in bfloat16 from 19.92 GB of memory on, and below that at
    most 1/16 of the memory: C = 3456 and 1.05 GB with 16 GiB.
    """
    check_rows("hidden", hidden, hidden_table.width)
    check_rows("weight", weight, hidden_table.width)
    if weight.shape[0] != vocab_table.width:
        raise GvendiError(f"weight has {weight.shape[0]} rows, vocab_table is for {vocab_table.width}")
    rows = hidden.shape[0]
    loss = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    folded = torch.empty(rows, vocab_table.dim, dtype=torch.float32, device=hidden.device)
    vocabulary = weight.shape[0]
    chunk = head_chunk_rows(vocabulary, weight.element_size(), weight.device)
    # One buffer for all chunks: a new one would be made before the last one is gone.
    buffer = hidden.new_empty(min(chunk, rows), _pitch(vocabulary, weight.device))[:, :vocabulary]
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        logits = torch.mm(hidden[part], weight.T, out=buffer[: min(chunk, rows - begin)])
        loss[part], folded[part] = softmax_fold(logits, labels[part], vocab_table, softcap, scale)
        torch.mm(logits, weight, out=grad_hidden[part])
    linear_sketch(hidden, hidden_table, [(folded, None)], segments, out)
    return loss, grad_hidden


def dense_head_sketch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    segments: torch.Tensor,
    key: tuple[int, int],
    out: torch.Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`head_sketch` of the dense mode: hidden [T, d], weight [V, d], labels int64 [T], key as in `dense_sketch`.

    Adds to out [B, K]; returns loss float32 [T] and the gradient of hidden [T, d]. Peak extra memory: one chunk
    of float32 logits, and half as much again where the weight is bfloat16. A chunk is about 256 MB where V is large,
    or on a GPU as many rows as `head_chunk_rows` says for both formats together.
    """
    check_rows("hidden", hidden, weight.shape[1])
    check_rows("weight", weight, weight.shape[1])
    check_segments(segments, hidden.shape[0])
    loss = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    chunk = _dense_chunk_rows(weight)
    for begin in range(0, hidden.shape[0], chunk):
        part = slice(begin, begin + chunk)
        # In float32, for the sketch takes the gradient from here.
        logits = torch.mm(hidden[part], weight.T).float()
        loss[part], _ = softmax_fold(logits, labels[part], None, softcap, scale)
        torch.mm(logits.to(weight.dtype), weight, out=grad_hidden[part])
        dense_sketch(hidden[part], logits, (segments - begin).clamp(0, len(logits)), key, out)
        # Gone before the next chunk is made.
        del logits
    return loss, grad_hidden


def _dense_chunk_rows(weight: torch.Tensor) -> int:
    """Rows of logits that `dense_head_sketch` holds at once."""
    vocabulary, size = weight.shape[0], weight.element_size()
    if weight.device.type == "cuda":
        # In float32 and in the weight's own dtype.
        return head_chunk_rows(vocabulary, size if size == 4 else 4 + size, weight.device)
    return max(HEAD_CHUNK_MIN_ROWS, DENSE_HEAD_CHUNK_BYTES // (4 * vocabulary))
