"""x [T, V] raw logits -> their gradient in place, loss float32 [T], folded float32 [T, K] = S e.

l = scale x, or cap tanh(scale x / cap); p = softmax(l); loss = logsumexp(l) - l[label]; e = (p - onehot(label)) dl/dx.

Both passes take exponentials in base 2: l log2(e) = c level(x), where level(x) = x and c = scale log2(e), or with a cap
level(x) = tanh(ratio x), ratio = scale / cap and c = cap log2(e). So a power 2^(c level - base) costs one fused
multiply-add and one instruction for the exponential.

Pass 1, one program per row and part of V: base, the largest c level of the part, and the sum of the powers without the
label's. A thread finds the largest of its logits of a tile first and rescales its sum once a tile. The program whose
part has the label keeps that logit and writes -inf over it, whose power is 0, so pass 2 meets no label in its loop.

Pass 2, one program per few rows and tile of bins: merges the parts, then takes block after block of K coordinates in
the order of its bins, so that a plain sum over blocks is S e, and at last puts the label's e in its place and its bin.
A block is a permutation, so every logit is read and written by one thread alone; a wide block moves in runs of 16, so
the permuted reads and writes still fill whole sectors. Together three trips over the logits, the least for two passes.
Only the last tile of a row is masked. No atomics, nothing depends on the grid: the same bits each run.

The label's p - 1 is -(sum of the others) / total, which does not cancel where the model is sure.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton.runtime import on_device_of
from gvendi_fast.kernels.backends.triton.tables import check_permutes
from gvendi_fast.kernels.sketch_matrix import MAX_DIM, MIN_DIM, Table

# Pass 1: a program's part of V and its threads; a thread takes two loads of 16 bytes a tile.
PART_V, SUM_THREADS, LOAD_BYTES = 32768, 128, 16
# Parts that pass 2 merges at once, whatever the vocabulary up to 524,288: one build for all.
LEAST_PARTS = 16
# Pass 2: rows, blocks of K coordinates and bins of a tile. Rows share the table's entries, which blocks bring at once.
BLOCK_T, BLOCK_B, MAX_BINS = 4, 4, 64
# A cap's tanh and slope take the registers of two blocks.
CAPPED_BLOCK_B = 2
# Without a table a block is this many coordinates in their own order.
PLAIN_BLOCK = 4096
# Rows begin at multiples of this many elements where loads take 16 bytes at a time.
ALIGNED = 16
WARP = 32
assert PART_V % (2 * SUM_THREADS * LOAD_BYTES) == 0
assert MIN_DIM <= MAX_BINS
assert MAX_DIM % MAX_BINS == PLAIN_BLOCK % MAX_BINS == 0

# An entry of the table in pass 2's order: the coordinate's place in its block, and its sign in the top bit.
EMPTY = tl.constexpr(0x7FFF)
assert EMPTY.value >= MAX_DIM
# Finite, so that a part without logits can be merged: lowest - lowest is 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)
LN_2 = tl.constexpr(math.log(2))
# The least scale and ratio, for 0 would make NaN of a label's -inf.
TINY = 2.0**-126

_tables: weakref.WeakKeyDictionary[Table, dict[tuple[torch.device, int], torch.Tensor]] = (
    weakref.WeakKeyDictionary()
)


@triton.jit
def tanh_and_slope(u):
    """tanh(u) to about one unit in the last place, small u included, and 1 - tanh(u)^2, which would cancel."""
    # 2 / (1 + exp(2 |u|)), which 1 - |tanh(u)| is.
    power = tl.exp2(-2.8853900817779268 * tl.abs(u))
    inverse = 1.0 / (1.0 + power)
    rest = 2.0 * power * inverse
    s = u * u
    # u + u s P(s) up to 0.625; P fitted there for the least relative error of the whole, 4.4e-9.
    p = -5.7049827e-3 * s + 2.0639077e-2
    p = (p * s - 5.3739712e-2) * s + 1.3331442e-1
    near = u + u * s * (p * s - 3.3333281e-1)
    far = 1.0 - rest
    far = tl.where(u < 0, -far, far)
    return tl.where(tl.abs(u) <= 0.625, near, far), 2.0 * rest * inverse


# The interpreter rounds the product of a fused multiply-add, and logits cancel in the sum.
_INTERPRETED = tl.constexpr(not isinstance(tanh_and_slope, triton.JITFunction))


@triton.jit
def power_of(level, c, base):
    """2^(c level - base), rounded once before the exponential."""
    if _INTERPRETED:
        return tl.exp2((level.to(tl.float64) * c - base).to(tl.float32))
    return tl.exp2(tl.fma(level, c, -base))


@triton.jit
def load_levels(at, column, stop, label, ratio, CAP: tl.constexpr, MASK: tl.constexpr):
    if MASK:
        level = tl.load(at + column, mask=column < stop, other=float("-inf")).to(tl.float32)
    else:
        level = tl.load(at + column).to(tl.float32)
    if CAP:
        level, _ = tanh_and_slope(level * ratio)
        left_out = column == label
        if MASK:
            left_out |= column >= stop
        level = tl.where(left_out, float("-inf"), level)
    return level


@triton.jit
def sum_tile(
    x, column, stop, label, base, total, ratio, c, CAP: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    left = load_levels(x, column, stop, label, ratio, CAP, MASK)
    right = load_levels(x, column + HALF, stop, label, ratio, CAP, MASK)
    # The maximum comes between the product and the difference below, which the compiler would otherwise fuse.
    highest = tl.maximum(base, tl.maximum(tl.max(left, axis=1), tl.max(right, axis=1)) * c)
    total *= tl.exp2(base - highest)
    total += tl.sum(power_of(left, c, highest[:, None]), axis=1)
    total += tl.sum(power_of(right, c, highest[:, None]), axis=1)
    return highest, total


@triton.jit(do_not_specialize=["stride", "V", "parts", "ratio", "c"])
def sum_kernel(
    x, stride, labels, bases, sums, label_logits, V, parts, ratio, c,
    CAP: tl.constexpr, UNIT: tl.constexpr, PART_V: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    label = tl.load(labels + row)
    # A label out of range makes its row NaN instead of reading past it.
    known = (label >= 0) & (label < V)
    x += row * (stride.to(tl.int64) * UNIT)
    begin = part * PART_V
    stop = tl.minimum(begin + PART_V, V)
    if part == tl.where(known, label // PART_V, 0):
        own = tl.load(x + label, mask=known, other=float("nan")).to(tl.float32)
        tl.store(label_logits + row, own)
        # Between all threads' reads of the label's logit, the one write and their reads of the tile around it.
        tl.debug_barrier()
        tl.store(x + label, float("-inf"), mask=known)
        tl.debug_barrier()
    label = tl.where(known, label, -1).to(tl.int32)
    HALF: tl.constexpr = THREADS * VECTOR
    thread, element = tl.arange(0, THREADS)[:, None], tl.arange(0, VECTOR)[None, :]
    # Where rows are not aligned, neighbouring threads read neighbouring logits.
    column = thread + element * THREADS if UNIT == 1 else thread * VECTOR + element
    base = tl.full([THREADS], LOWEST, tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    while begin + 2 * HALF <= stop:
        base, total = sum_tile(x, begin + column, stop, label, base, total, ratio, c, CAP, False, HALF)
        begin += 2 * HALF
    if begin < stop:
        base, total = sum_tile(x, begin + column, stop, label, base, total, ratio, c, CAP, True, HALF)
    highest = tl.max(base, axis=0)
    tl.store(bases + row * parts + part, highest)
    tl.store(sums + row * parts + part, tl.sum(total * tl.exp2(base - highest), axis=0))


@triton.jit
def sign_of(entry):
    """+-1 from the top bit of a table's entry, widened with its sign."""
    return ((entry & -0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def load_entries(table, bins, tile, K: tl.constexpr, BLOCK_B: tl.constexpr):
    """Entries [bins, blocks] of a tile; without a table the bins themselves, a place in every block."""
    entry = bins[:, None]
    if table is not None:
        block = tl.arange(0, BLOCK_B)[None, :]
        entry = tl.load(table + (tile * K + entry) * BLOCK_B + block).to(tl.int32)
    return entry


@triton.jit
def fold_tile(
    fold, x, row, live, table, entry, tile, V, base, share, ratio, c,
    CAP: tl.constexpr, MASK: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, BLOCK_B)[None, :]
    place, sign = entry, 1.0
    if table is not None:
        place, sign = entry & EMPTY, sign_of(entry)
    source = (tile * BLOCK_B + block) * K + place
    mask = live[None, :, None]
    to = row[None, :, None] + source[:, None, :]
    if MASK:
        filled = source < V if table is None else place != EMPTY
        mask &= filled[:, None, :]
        level = tl.load(to, mask=mask, other=0.0).to(tl.float32)
    else:
        level = tl.load(to).to(tl.float32)
    if CAP:
        level, slope = tanh_and_slope(level * ratio)
    e = power_of(level, c, base[None, :, None]) * share[None, :, None]
    if CAP:
        # At the label's -inf the slope is 0, as the power is without a cap.
        e *= slope
    tl.store(to, e.to(x.dtype.element_ty), mask=mask)
    if table is not None:
        if MASK:
            e = tl.where(mask, e, 0.0)
        fold = tl.fma(e, sign[:, None, :], fold)
    return fold


@triton.jit(do_not_specialize=["stride", "T", "V", "parts", "full", "tiles", "scale", "ratio", "c"])
def fold_kernel(
    x, stride, labels, table, bases, sums, label_logits, loss, folded, T, V, parts, full, tiles, scale, ratio, c,
    CAP: tl.constexpr, UNIT: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows: what memory brings beside a run of 16 logits is another one's run.
    group, tile_k = tl.program_id(0) // (K // BLOCK_K), tl.program_id(0) % (K // BLOCK_K)
    rows = group.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < T
    # Rows beyond the last one read the last one and store nothing.
    rows = tl.minimum(rows, T - 1)
    part = tl.arange(0, PARTS)[None, :]
    at, held = (rows * parts)[:, None] + part, part < parts
    part_base = tl.load(bases + at, mask=held, other=LOWEST)
    own, slope = tl.load(label_logits + rows), 1.0
    if CAP:
        own, slope = tanh_and_slope(own * ratio)
    base = tl.maximum(tl.max(part_base, axis=1), own * c)
    others = tl.sum(tl.load(sums + at, mask=held, other=0.0) * tl.exp2(part_base - base[:, None]), axis=1)
    share = scale / (others + power_of(own, c, base))
    label_e = -others * share * slope
    if tile_k == 0:
        ahead = base.to(tl.float64) - own.to(tl.float64) * c
        others64, own_power = others.to(tl.float64), tl.exp2(-ahead)
        # 1 + others / own is exact where others are 0; only a label without a power of its own has no such ratio.
        alone = own_power < 1e-300
        inside = tl.where(alone, others64, 1.0 + others64 / own_power)
        row_loss = tl.log(inside) + tl.where(alone, LN_2 * ahead, 0.0)
        tl.store(loss + rows, row_loss.to(tl.float32), mask=live)

    # Bins on the first axis: of axes without contiguous addresses Triton lays neighbouring threads along the first.
    bins = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row = x + rows * (stride.to(tl.int64) * UNIT)
    fold = tl.zeros([BLOCK_K, BLOCK_T, BLOCK_B], tl.float32)
    tile = 0
    # A tile's entries are on their way while the one before is worked on.
    entry = load_entries(table, bins, tile, K, BLOCK_B)
    while tile < full:
        following = load_entries(table, bins, tl.minimum(tile + 1, tiles - 1), K, BLOCK_B)
        fold = fold_tile(
            fold, x, row, live, table, entry, tile, V, base, share, ratio, c, CAP, False, K, BLOCK_B
        )
        entry = following
        tile += 1
    if tile < tiles:
        fold = fold_tile(
            fold, x, row, live, table, entry, tile, V, base, share, ratio, c, CAP, True, K, BLOCK_B
        )

    label = tl.load(labels + rows)
    known = live & (label >= 0) & (label < V)
    label = tl.where(known, label, 0)
    block, place = label // K, (label % K)[None, :]
    if table is None:
        mine = known[None, :] & (bins[:, None] == place)
    else:
        slot = table + (block // BLOCK_B * K * BLOCK_B + block % BLOCK_B)[None, :]
        entry = tl.load(slot + bins[:, None] * BLOCK_B).to(tl.int32)
        mine = known[None, :] & ((entry & EMPTY) == place)
        total = tl.sum(fold, axis=2)
        total += tl.where(mine, label_e[None, :] * sign_of(entry), 0.0)
        tl.store(folded + rows[None, :] * K + bins[:, None], total, mask=live[None, :])
    # After the tile's write to this place, which may be another thread's.
    tl.debug_barrier()
    at_label = (row + label)[None, :] + bins[:, None] * 0
    tl.store(at_label, (label_e[None, :] + bins[:, None] * 0.0).to(x.dtype.element_ty), mask=mine)


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
    if scale < 0:
        # The kernels assume that the largest logit is the most likely one.
        softmax_fold(logits.neg_(), labels, table, loss, folded, softcap, -scale)
        for gradient in (logits, folded):
            if gradient is not None:
                gradient.neg_()
        return
    capped = softcap is not None
    ratio, c = (scale / softcap, softcap) if capped else (1.0, scale)
    ratio, c = max(ratio, TINY), max(c / math.log(2), TINY)
    K, at_once, bins = tile_of(table, capped)
    parts = triton.cdiv(V, PART_V)
    packed = None if table is None else packed_table(table, at_once, logits.device)
    # Each begins at a multiple of 16 bytes, as compiled ahead.
    bases, sums, label_logits = logits.new_empty(
        2 * parts + 1, triton.cdiv(T, 4) * 4, dtype=torch.float32
    ).split([parts, parts, 1])
    unit = ALIGNED if logits.stride(0) % ALIGNED == 0 else 1
    # Permuted logits are read one by one.
    fold_unit = unit if table is None else 1
    with on_device_of(logits):
        sum_kernel[(T, parts)](
            logits, logits.stride(0) // unit, labels, bases, sums, label_logits, V, parts, ratio, c,
            CAP=capped, UNIT=unit, **_sums(logits.element_size()), num_warps=SUM_THREADS // WARP,
        )  # fmt: skip
        fold_kernel[(triton.cdiv(T, BLOCK_T) * (K // bins),)](
            logits, logits.stride(0) // fold_unit, labels, packed, bases, sums, label_logits, loss, folded,
            T, V, parts, V // (K * at_once), triton.cdiv(V, K * at_once), scale, ratio, c,
            CAP=capped, UNIT=fold_unit, K=K, PARTS=_power_of_parts(V),
            BLOCK_T=BLOCK_T, BLOCK_B=at_once, BLOCK_K=bins, num_warps=bins // WARP,
        )  # fmt: skip


def tile_of(table: Table | None, capped: bool) -> tuple[int, int, int]:
    """K, and the blocks and bins of a tile."""
    K = PLAIN_BLOCK if table is None else table.dim
    return K, CAPPED_BLOCK_B if capped else BLOCK_B, min(K, MAX_BINS)


def _power_of_parts(V: int) -> int:
    return max(LEAST_PARTS, triton.next_power_of_2(triton.cdiv(V, PART_V)))


def _sums(element_size: int) -> dict[str, int]:
    return {"PART_V": PART_V, "THREADS": SUM_THREADS, "VECTOR": LOAD_BYTES // element_size}


def packed_table(table: Table, at_once: int, device: torch.device) -> torch.Tensor:
    """int16 [tiles, K, at_once]: for every bin the coordinates that `at_once` blocks send there, side by side."""
    copies = _tables.setdefault(table, {})
    if (device, at_once) not in copies:
        copies[device, at_once] = torch.from_numpy(_pack(table, at_once)).to(device)
    return copies[device, at_once]


def _pack(table: Table, at_once: int) -> np.ndarray:
    block, place = np.divmod(np.arange(table.width), table.dim)
    packed = np.full(
        (-(-table.width // (table.dim * at_once)), table.dim, at_once), EMPTY.value, dtype=np.uint16
    )
    packed[block // at_once, table.bucket, block % at_once] = place + (table.sign < 0) * 0x8000
    check_permutes(table, packed != EMPTY.value)
    return packed.view(np.int16)
