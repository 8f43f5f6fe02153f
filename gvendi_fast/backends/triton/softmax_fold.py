"""x [T, V] raw logits -> their gradient in place, loss float32 [T], folded float32 [T, K] = S e.

l = scale x, or cap tanh(scale x / cap); p = softmax(l); loss = logsumexp(l) - l[label]; e = (p - onehot(label)) dl/dx.

Pass 1, one program per row and part of V: peak and sum of exp(l - peak) over the part, the label left out. Pass 2, one
program per few rows and tile of bins: merges the parts, then takes block after block of K coordinates in the order of
its bins, so that a plain sum over blocks is S e. A block is a permutation, so every logit is read and written by one
thread alone; a wide block moves in runs of 16, so the permuted reads and writes still fill whole sectors. Together
three trips over the logits, the least for two passes. No atomics, nothing depends on the grid: the same bits each run.

The label's p - 1 is -(sum of the others) / total, which does not cancel where the model is sure.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gvendi_fast.backends.triton import tables
from gvendi_fast.backends.triton.runtime import Build, on_device_of
from gvendi_fast.plan import MAX_DIM, MIN_DIM, Table

# Pass 1: a program's part of V, its tile, its warps.
PART_V, BLOCK_V, SUM_WARPS = 16384, 1024, 4
# Pass 2: rows, blocks of K coordinates and bins of a tile. Rows share the table's entries, blocks are loads in flight.
BLOCK_T, BLOCK_B, MAX_BINS, FOLD_WARPS = 2, 4, 256, 8
# A cap's tanh and slope take the registers of two blocks.
CAPPED_BLOCK_B = 2
# Without a table a block is this many coordinates in their own order.
PLAIN_BLOCK = 4096
assert PART_V % BLOCK_V == 0
assert MIN_DIM <= MAX_BINS
assert MAX_DIM % MAX_BINS == PLAIN_BLOCK % MAX_BINS == 0

# Finite, so that a part without logits takes part in differences: lowest - lowest is 0, not NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def tanh(u):
    """tanh(u) to about one unit in the last place, small u included."""
    s = u * u
    # u + u s P(s) up to 0.625; P fitted there for the least relative error of the whole, 4.4e-9.
    p = -5.7049827e-3 * s + 2.0639077e-2
    p = (p * s - 5.3739712e-2) * s + 1.3331442e-1
    near = u + u * s * (p * s - 3.3333281e-1)
    power = tl.exp(-2.0 * tl.abs(u))
    far = 1.0 - 2.0 * power / (1.0 + power)
    return tl.where(tl.abs(u) <= 0.625, near, tl.where(u < 0, -far, far))


@triton.jit
def tanh_slope(u):
    """1 - tanh(u)^2, which would cancel for large u."""
    power = tl.exp(-2.0 * tl.abs(u))
    return 4.0 * power / ((1.0 + power) * (1.0 + power))


@triton.jit
def cap_logit(x, scale, cap, CAP: tl.constexpr):
    """l of raw logits x as float32."""
    scaled = x.to(tl.float32) * scale
    if CAP:
        scaled = cap * tanh(scaled / cap)
    return scaled


@triton.jit(do_not_specialize=["parts", "scale", "cap"])
def sum_kernel(
    x, stride, labels, peaks, sums, label_logits, V, parts, scale, cap,
    CAP: tl.constexpr, PART_V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    label = tl.load(labels + row)
    x += row * stride
    peak = tl.full([BLOCK_V], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    first = part * PART_V
    for begin in range(first, tl.minimum(first + PART_V, V), BLOCK_V):
        column = begin + tl.arange(0, BLOCK_V)
        inside = column < V
        logit = cap_logit(tl.load(x + column, mask=inside, other=0.0), scale, cap, CAP)
        logit = tl.where(inside & (column != label), logit, float("-inf"))
        # One of exp(peak - new peak) and exp(logit - new peak) is 1, so one exponential serves both.
        ahead = logit - peak
        power = tl.exp(-tl.abs(ahead))
        total = tl.where(ahead > 0, total * power + 1.0, total + power)
        peak = tl.maximum(peak, logit)
    highest = tl.max(peak, axis=0)
    tl.store(peaks + row * parts + part, highest)
    tl.store(sums + row * parts + part, tl.sum(total * tl.exp(peak - highest), axis=0))
    if part == 0:
        # A label out of range makes its row NaN instead of reading past it.
        known = (label >= 0) & (label < V)
        own = tl.load(x + label, mask=known, other=float("nan"))
        tl.store(label_logits + row, cap_logit(own, scale, cap, CAP))


@triton.jit(do_not_specialize=["T", "V", "parts", "blocks", "scale", "cap"])
def fold_kernel(
    x, stride, labels, table, peaks, sums, label_logits, loss, folded, T, V, parts, blocks, scale, cap,
    CAP: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < T
    part = tl.arange(0, PARTS)[None, :]
    at, held = (rows * parts)[:, None] + part, live[:, None] & (part < parts)
    part_peak = tl.load(peaks + at, mask=held, other=LOWEST)
    own = tl.load(label_logits + rows, mask=live, other=0.0)
    peak = tl.maximum(tl.max(part_peak, axis=1), own)
    others = tl.sum(tl.load(sums + at, mask=held, other=0.0) * tl.exp(part_peak - peak[:, None]), axis=1)
    total = others.to(tl.float64) + tl.exp(own - peak).to(tl.float64)
    if tl.program_id(1) == 0:
        row_loss = tl.log(total) + (peak.to(tl.float64) - own.to(tl.float64))
        tl.store(loss + rows, row_loss.to(tl.float32), mask=live)
    share = (scale / total).to(tl.float32)
    label = tl.load(labels + rows, mask=live, other=-1)[None, :, None]
    label_e = (-others * share)[None, :, None]
    row_peak, share = peak[None, :, None], share[None, :, None]

    # Bins on the first axis: of axes without contiguous addresses Triton lays neighbouring threads along the first.
    bins = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = x + (rows * stride)[None, :, None]
    fold = tl.zeros([BLOCK_K, BLOCK_T, BLOCK_B], tl.float32)
    for first in range(0, blocks, BLOCK_B):
        block = (first + tl.arange(0, BLOCK_B))[None, :]
        if table is None:
            source = block * K + bins[:, None]
            filled = source < V
        else:
            entry = table + block * K + bins[:, None]
            packed = tl.load(entry, mask=block < blocks, other=-1).to(tl.int32)
            source = block * K + (packed >> 1)
            filled = packed >= 0
        mask = filled[:, None, :] & live[None, :, None]
        to = row + source[:, None, :]
        raw = tl.load(to, mask=mask, other=0.0)
        e = tl.exp(cap_logit(raw, scale, cap, CAP) - row_peak) * share
        e = tl.where(source[:, None, :] == label, label_e, e)
        if CAP:
            e *= tanh_slope(raw.to(tl.float32) * scale / cap)
        tl.store(to, e.to(x.dtype.element_ty), mask=mask)
        if table is not None:
            e = tl.where(mask, e, 0.0)
            fold += tl.where(((packed & 1) == 1)[:, None, :], -e, e)
    if table is not None:
        tl.store(folded + rows[None, :] * K + bins[:, None], tl.sum(fold, axis=2), mask=live[None, :])


def softmax_fold(
    logits: torch.Tensor,
    labels: torch.Tensor,
    table: Table | None,
    loss: torch.Tensor,
    folded: torch.Tensor | None,
    softcap: float | None,
    scale: float,
) -> None:
    """Fill loss and folded and turn logits into their gradient; without a table there is no fold."""
    T, V = logits.shape
    if T == 0:
        return
    parts, capped = triton.cdiv(V, PART_V), softcap is not None
    K, at_once, bins = tile(table, capped)
    packed = None if table is None else tables.gathered(table, logits.device)
    peaks, sums, label_logits = logits.new_empty(2 * parts + 1, T, dtype=torch.float32).split(
        [parts, parts, 1]
    )
    with on_device_of(logits):
        sum_kernel[(T, parts)](
            logits, logits.stride(0), labels, peaks, sums, label_logits, V, parts, scale, softcap or 1.0,
            CAP=capped, PART_V=PART_V, BLOCK_V=BLOCK_V, num_warps=SUM_WARPS,
        )  # fmt: skip
        fold_kernel[(triton.cdiv(T, BLOCK_T), K // bins)](
            logits, logits.stride(0), labels, packed, peaks, sums, label_logits, loss, folded,
            T, V, parts, triton.cdiv(V, K), scale, softcap or 1.0,
            CAP=capped, K=K, PARTS=triton.next_power_of_2(parts),
            BLOCK_T=BLOCK_T, BLOCK_B=at_once, BLOCK_K=bins, num_warps=FOLD_WARPS,
        )  # fmt: skip


def tile(table: Table | None, capped: bool) -> tuple[int, int, int]:
    """K, and the blocks and bins of a tile."""
    K = PLAIN_BLOCK if table is None else table.dim
    return K, CAPPED_BLOCK_B if capped else BLOCK_B, min(K, MAX_BINS)


def builds(dtype: str, table: Table | None, capped: bool) -> list[Build]:
    """What `softmax_fold` compiles for logits of a dtype ("fp32", "bf16", "fp16") and a vocabulary."""
    K, at_once, bins = tile(table, capped)
    V = PLAIN_BLOCK if table is None else table.width
    name = f"{dtype}-{'plain' if table is None else f'{V}-{K}'}{'-capped' if capped else ''}"
    types = {"x": f"*{dtype}", "stride": "i32", "labels": "*i64", "V": "i32", "parts": "i32"}
    types |= {"peaks": "*fp32", "sums": "*fp32", "label_logits": "*fp32", "scale": "fp32", "cap": "fp32"}
    sums = {"CAP": capped, "PART_V": PART_V, "BLOCK_V": BLOCK_V}
    fold_types = {**types, "loss": "*fp32", "T": "i32", "blocks": "i32"}
    fold = {"CAP": capped, "K": K, "PARTS": triton.next_power_of_2(triton.cdiv(V, PART_V))}
    fold |= {"BLOCK_T": BLOCK_T, "BLOCK_B": at_once, "BLOCK_K": bins}
    if table is None:
        fold |= {"table": None, "folded": None}
    else:
        fold_types |= {"table": "*i16", "folded": "*fp32"}
    return [
        Build(f"softmax_sum-{name}", sum_kernel, SUM_WARPS, types, sums),
        Build(f"softmax_fold-{name}", fold_kernel, FOLD_WARPS, fold_types, fold),
    ]
