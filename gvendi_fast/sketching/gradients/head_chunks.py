"""The LM head in chunks of rows: logits, their gradient and its sketch, so that no matrix [T, V] lives.

Loops of matrix products around `ops.softmax_fold`, `ops.linear_sketch` and `ops.dense_sketch`. Letters as in `ops`:
B samples, T rows, d width of the hidden states, V vocabulary, K sketch dimension.
"""

from __future__ import annotations

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.checks import check_rows, check_segments
from gvendi_fast.kernels.sketch_matrix import Table

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
        loss[part], folded[part] = ops.softmax_fold(logits, labels[part], vocab_table, softcap, scale)
        torch.mm(logits, weight, out=grad_hidden[part])
    ops.linear_sketch(hidden, hidden_table, [(folded, None)], segments, out)
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
        loss[part], _ = ops.softmax_fold(logits, labels[part], None, softcap, scale)
        torch.mm(logits.to(weight.dtype), weight, out=grad_hidden[part])
        ops.dense_sketch(hidden[part], logits, (segments - begin).clamp(0, len(logits)), key, out)
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
