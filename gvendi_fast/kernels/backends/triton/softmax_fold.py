"""x [T, V] raw logits -> their gradient in place, loss float32 [T], folded float32 [T, K] = S e.

l = scale x, or cap tanh(scale x / cap); p = softmax(l); loss = logsumexp(l) - l[label]; e = (p - onehot(label)) dl/dx.

Both passes take exponentials in base 2: l log2(e) = c level(x), where level(x) = x and c = scale log2(e), or with a cap
level(x) = tanh(ratio x), ratio = scale / cap and c = cap log2(e). So a power 2^(c level - base) costs one fused
multiply-add and one instruction for the exponential.

Pass 1, one program per row and part of V: base, the largest c level of the part, and the sum of the powers without the
label's. A thread finds the largest of its logits of a tile first and rescales its sum once a tile. The program whose
part has the label keeps that logit and writes -inf over it, whose power is 0, so pass 2 meets no label in its loop.

Pass 2, one program per row: merges the parts, then takes tile after tile of the row in order, writes its e, and adds to
the bins what a second, permuted read of the same logits gives: of a bin's coordinates one is in each block of K. That
read finds them in L1, where the first one has brought them; so memory sees runs alone, in order. 4096 rows of 151,936
bf16 logits took 0.83 ms so on an H200, 70 % of copy bandwidth; 1.21 where a thread took eight bins in a row, and 1.94
where a program took 64 bins with permuted reads and writes of their own: an exponential costs less than the way. Blocks
are added in order, so a plain sum is S e; at last the label's e goes to its place and its bin.
Together three trips over the logits, the least for two passes. Only the last tile of a row is masked. No atomics,
nothing depends on the grid: the same bits each run.

The label's p - 1 is -(sum of the others) / total, which does not cancel where the model is sure.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton import tables
from gvendi_fast.kernels.backends.triton.runtime import on_device_of
from gvendi_fast.kernels.sketch_matrix import MIN_DIM, Table

# Pass 1: a program's part of V and its threads; a thread takes two loads of 16 bytes a tile.
PART_V, SUM_THREADS, LOAD_BYTES = 32768, 128, 16
# Parts that pass 2 merges at once, whatever the vocabulary up to 524,288: one build for all.
LEAST_PARTS = 16
# Pass 2: coordinates of a tile, at least; whole blocks of K. A thread takes 8 of them, or 16 of a wide block.
TILE, TILE_THREAD, MOST_WARPS = 1024, 8, 16
# Rows begin at multiples of this many elements where loads take 16 bytes at a time.
ALIGNED = 16
WARP = 32
assert PART_V % (2 * SUM_THREADS * LOAD_BYTES) == 0
assert TILE % MIN_DIM == 0

# Finite, so that a part without logits can be merged: lowest - lowest is 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)
LN_2 = tl.constexpr(math.log(2))
# The least scale and ratio, for 0 would make NaN of a label's -inf.
TINY = 2.0**-126


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
def term_of(x, at, live, base, ratio, c, CAP: tl.constexpr, MASK: tl.constexpr):
    """e of the logits at x + at, less the row's factor; 0 outside and at the label."""
    if MASK:
        level = tl.load(x + at, mask=live, other=float("-inf")).to(tl.float32)
    else:
        level = tl.load(x + at).to(tl.float32)
    if CAP:
        level, slope = tanh_and_slope(level * ratio)
        # At the label's -inf the slope is 0, as the power is without a cap.
        term = power_of(level, c, base) * slope
        if MASK:
            term = tl.where(live, term, 0.0)
    else:
        term = power_of(level, c, base)
    return term


@triton.jit
def load_entries(table, tile, lane, blocks, K: tl.constexpr, TILE: tl.constexpr):
    """Entries of a tile's bins, block by block; 0, which adds nothing, past the last block."""
    at = tile * TILE + lane
    if K == TILE:
        return tl.load(table + at)
    return tl.load(table + at, mask=at < blocks * K, other=0)


@triton.jit
def fold_tile(
    fold, x, entry, tile, lane, V, base, share, ratio, c,
    CAP: tl.constexpr, MASK: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    # With an axis of length 1 in front Triton lays the two reads out differently: runs for the one, bins for the other.
    at = (tile * TILE + lane)[None, :]
    e = (term_of(x, at, at < V, base, ratio, c, CAP, MASK) * share).to(x.dtype.element_ty)
    if FOLD:
        again = (tile * TILE + (lane & -K) + (entry & 0xFFFF))[None, :]
        sign = (entry & -65536).to(tl.float32, bitcast=True)[None, :]
        fold = tl.fma(term_of(x, again, again < V, base, ratio, c, CAP, MASK), sign, fold)
        # Between all threads' reads of these logits and the writes over them.
        tl.debug_barrier()
    if MASK:
        tl.store(x + at, e, mask=at < V)
    else:
        tl.store(x + at, e)
    return fold


@triton.jit(
    do_not_specialize=["stride", "V", "parts", "full", "tiles", "blocks", "scale", "ratio", "c"],
    # So that neighbouring threads take neighbouring bins, and read one run of 16 together.
    do_not_specialize_on_alignment=["table"],
)
def fold_kernel(
    x, stride, labels, table, bases, sums, label_logits, loss, folded, V, parts, full, tiles, blocks, scale, ratio, c,
    CAP: tl.constexpr, UNIT: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * (stride.to(tl.int64) * UNIT)
    part = tl.arange(0, PARTS)
    held = part < parts
    part_base = tl.load(bases + row * parts + part, mask=held, other=LOWEST)
    own, slope = tl.load(label_logits + row), 1.0
    if CAP:
        own, slope = tanh_and_slope(own * ratio)
    base = tl.maximum(tl.max(part_base, axis=0), own * c)
    others = tl.load(sums + row * parts + part, mask=held, other=0.0)
    others = tl.sum(others * tl.exp2(part_base - base), axis=0)
    share = scale / (others + power_of(own, c, base))
    label_e = -others * share * slope
    ahead = base.to(tl.float64) - own.to(tl.float64) * c
    others64, own_power = others.to(tl.float64), tl.exp2(-ahead)
    # 1 + others / own is exact where others are 0; only a label without a power of its own has no such ratio.
    alone = own_power < 1e-300
    inside = tl.where(alone, others64, 1.0 + others64 / own_power)
    row_loss = tl.log(inside) + tl.where(alone, LN_2 * ahead, 0.0)
    tl.store(loss + row, row_loss.to(tl.float32))

    FOLD: tl.constexpr = table is not None
    lane = tl.arange(0, TILE)
    fold = tl.zeros([1, TILE], tl.float32)
    # A tile's entries are on their way while the one before is worked on.
    entry = load_entries(table, 0, lane, blocks, K, TILE) if FOLD else lane
    tile = 0
    while tile < full:
        following = entry
        if FOLD:
            following = load_entries(table, tl.minimum(tile + 1, tiles - 1), lane, blocks, K, TILE)
        fold = fold_tile(fold, x, entry, tile, lane, V, base, share, ratio, c, CAP, False, K, TILE, FOLD)
        entry = following
        tile += 1
    if tile < tiles:
        fold = fold_tile(fold, x, entry, tile, lane, V, base, share, ratio, c, CAP, True, K, TILE, FOLD)

    label = tl.load(labels + row)
    known = (label >= 0) & (label < V)
    label = tl.where(known, label, 0)
    if FOLD:
        bins = tl.arange(0, K)
        entry = tl.load(table + (label // K) * K + bins)
        sign = (entry & -65536).to(tl.float32, bitcast=True)
        # A bin without a coordinate has the place 0 and the sign 0.
        own_term = tl.where(known & ((entry & 0xFFFF) == label % K), label_e * sign, 0.0)
        if K < TILE:
            fold = tl.sum(tl.reshape(fold, [1, TILE // K, K]), axis=1)
        tl.store(folded + row * K + bins[None, :], fold * share + own_term[None, :])
    # After the tile's write to this place, which may be another thread's.
    tl.debug_barrier()
    tl.store(x + label, label_e.to(x.dtype.element_ty), mask=known)


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
    K, width, warps = tile_of(table)
    parts = triton.cdiv(V, PART_V)
    packed = None if table is None else tables.folding(table, logits.device)
    # Each begins at a multiple of 16 bytes, as compiled ahead.
    bases, sums, label_logits = logits.new_empty(
        2 * parts + 1, triton.cdiv(T, 4) * 4, dtype=torch.float32
    ).split([parts, parts, 1])
    unit = ALIGNED if logits.stride(0) % ALIGNED == 0 else 1
    with on_device_of(logits):
        sum_kernel[(T, parts)](
            logits, logits.stride(0) // unit, labels, bases, sums, label_logits, V, parts, ratio, c,
            CAP=capped, UNIT=unit, **_sums(logits.element_size()), num_warps=SUM_THREADS // WARP,
        )  # fmt: skip
        fold_kernel[(T,)](
            logits, logits.stride(0) // unit, labels, packed, bases, sums, label_logits, loss, folded,
            V, parts, V // width, triton.cdiv(V, width), triton.cdiv(V, K), scale, ratio, c,
            CAP=capped, UNIT=unit, K=K, PARTS=_power_of_parts(V), TILE=width, num_warps=warps,
        )  # fmt: skip


def tile_of(table: Table | None) -> tuple[int, int, int]:
    """K, the coordinates of a tile, and the warps that take it."""
    K = TILE if table is None else table.dim
    width = max(TILE, K)
    return K, width, min(MOST_WARPS, width // (WARP * TILE_THREAD))


def _power_of_parts(V: int) -> int:
    return max(LEAST_PARTS, triton.next_power_of_2(triton.cdiv(V, PART_V)))


def _sums(element_size: int) -> dict[str, int]:
    return {"PART_V": PART_V, "THREADS": SUM_THREADS, "VECTOR": LOAD_BYTES // element_size}
