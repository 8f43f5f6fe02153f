"""out [B, K] += K^-1/2 sum over j = o I + i of Pi[j] g_b[j], g_b[o][i] = sum_t e_t[o] a_t[i] over a sample's rows;
a [T, I], e [T, O], Pi in {+-1}^(O I x K) as in signs.py. For an embedding g_b = sum_t onehot(id_t) e_t^T, ids [T].

A program goes through a slab of tiles of BLOCK_O x WORD coordinates. It forms the tile's gradient of BLOCK_B samples
in registers, makes the signs of its BLOCK_K columns once, and multiplies [samples, coordinates] by [coordinates,
columns], STEP_I columns of the tile at a time. An embedding needs no sum over rows: row t is row id_t of a weight.
Each program writes its own row of a partial sum, and slabs depend on O and I alone: the same bits on every run, and a
sample's result does not depend on its batch.

One word of Philox holds the signs of WORD neighbours, so tiles begin at multiples of WORD coordinates: the rows of a
tile are `row_step` rows of the weight apart, with row_step I a multiple of WORD. I is mostly one itself: row_step = 1.

Precision: with a power of two that brings a sample's largest number of the tile to 2^14 .. 2^15, the gradient tile is a
sum of two float16 parts. Rounding to nearest leaves at most 2^-11 of a number to the second part and an error of 2^-22
of it, or of 2^-39 of the largest where that is more. Signs are exact. Summed over random signs the error is half of
2^-24 of the largest sum. Two bfloat16 parts would leave 2^-16, which is 30 to 60 times 2^-24 at any number of
coordinates, where float32 sums of up to 1,000 numbers are off by 4 to 15 times 2^-24 and may be off by twice that
(tested). Float32 inputs are multiplied as pairs of TF32 parts, which drops about 2^-22 of a product; 16-bit ones
exactly. Tensor cores may truncate where they add, so a chain in them is 16 rows or one step of 64 coordinates long, and
chains add up in ordinary arithmetic.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import triton
import triton.language as tl

from gvendi_fast.base.transfer import to_device
from gvendi_fast.kernels.backends.triton.philox import sign, sign_words
from gvendi_fast.kernels.backends.triton.reduce_chunks import reduce_chunks
from gvendi_fast.kernels.backends.triton.runtime import (
    CHUNK_LISTS,
    CHUNK_ROWS,
    Chunks,
    chunks_of,
    on_device_of,
    stream_of,
    workspace,
)

WORD = 32
# Rows begin at multiples of this many elements where loads take 16 bytes at a time.
ALIGNED = 16
BLOCK_B, BLOCK_T, BLOCK_O = 16, 16, 16
WARPS = 8
# Columns of a program: the wider, the fewer programs form the same gradient; 128 and 1024 would spill registers.
BLOCKS = (64, 256, 512)
# An embedding's programs share nothing that a wide one would save.
TOKEN_BLOCKS = (64, 256)
# Besides its columns, a tile costs a program about as much as this many columns would.
TILE_COLUMNS = 128
# Partial sums of a launch; few enough for the memory of [B, slabs, K], enough for the largest GPUs.
MAX_SLABS = 512
STEP_I = tl.constexpr(4)
_WORD = tl.constexpr(WORD)
# A chunk of an embedding's rows is a tile.
assert CHUNK_ROWS == BLOCK_T


# A power of two that brings `largest` to 2^14 .. 2^15, and one over it.
@triton.jit
def scales(largest):
    # Below 2^-112 there is no such power of two.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    up, down = (268 - exponent) << 23, (exponent - 14) << 23
    return up.to(tl.float32, bitcast=True), down.to(tl.float32, bitcast=True)


# z [B, K] += down times up g [B, T, WORD] times the signs whose words are [K, T], T rows of a tile. Whoever has g in
# registers scales it there; where most of it is 0, step by step is less.
@triton.jit
def project(z, g, up, down, words, B: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    STEPS: tl.constexpr = _WORD // STEP_I
    g = tl.reshape(g, [B, T, STEPS, STEP_I])
    for step in range(STEPS):
        bits = words >> (step * STEP_I)
        # Joined, neighbours lie in one thread as in a tensor core's operand: Triton 3.6 makes signs in their places.
        pi = tl.join(tl.join(sign(bits, 0), sign(bits, 2)), tl.join(sign(bits, 1), sign(bits, 3)))
        pi = tl.trans(tl.reshape(pi, [K, T * STEP_I]))
        mine = tl.sum(tl.where((tl.arange(0, STEPS) == step)[None, None, :, None], g, 0.0), axis=2)
        mine = tl.reshape(mine, [B, T * STEP_I]) * up
        high = mine.to(tl.float16)
        low = (mine - high.to(tl.float32)).to(tl.float16)
        # The smaller first.
        chain = tl.dot(high, pi, tl.dot(low, pi))
        # The compiler would make a plain sum part of the tensor core's chain.
        z = tl.fma(chain, down, z)
    return z


_LINEAR_SIZES = ["stride_a", "stride_e", "samples", "height", "width", "K", "row_step", "strips"]
_TOKEN_SIZES = ["stride_e", "d", "K", "strips"]
_KEY = ["key_low", "key_high"]


@triton.jit(do_not_specialize=_LINEAR_SIZES + _KEY)
def dense_linear_kernel(
    a, stride_a, e, stride_e, spans, partial, samples, height, width, K, row_step, strips, key_low, key_high,
    UNIT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    low, high = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    slab, slabs = tl.program_id(1), tl.num_programs(1)
    sample = tl.arange(0, BLOCK_B)
    tiles = tl.cdiv(tl.cdiv(height, row_step), BLOCK_O).to(tl.int64) * row_step * strips
    tile, last = (tiles * slab // slabs).to(tl.int32), (tiles * (slab + 1) // slabs).to(tl.int32)
    z = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    while tile < last:
        strip, group = tile % strips, tile // strips
        if UNIT > 1:
            # Tiles are whole and begin where rows are aligned, and row_step is 1.
            skip = 0
            o = (group * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
        else:
            first = group % row_step
            # The tile begins `skip` coordinates before column 0 of its rows.
            skip = (first.to(tl.int64) * width % _WORD).to(tl.int32)
            o = (first + row_step * (group // row_step * BLOCK_O + tl.arange(0, BLOCK_O))).to(tl.int64)
        i = strip * _WORD - skip + tl.arange(0, _WORD)
        # Loaded again for every tile: registers limit how many columns a program can have.
        begin = tl.load(spans + 2 * sample)
        end = tl.load(spans + 2 * sample + 1)
        count = (end - begin).to(tl.int32)
        longest = tl.max(count, axis=0)
        g = tl.zeros([BLOCK_B, BLOCK_O, _WORD], tl.float32)
        t = tl.zeros_like(longest)
        while t < longest:
            step = t + tl.arange(0, BLOCK_T)
            row = begin[:, None] + step[None, :]
            live = step[None, :] < count[:, None]
            left_mask, right_mask = live[:, None, :], live[:, :, None]
            if UNIT == 1:
                left_mask = left_mask & (o < height)[None, :, None]
                right_mask = right_mask & ((i >= 0) & (i < width))[None, None, :]
            at = e + (row * (stride_e.to(tl.int64) * UNIT))[:, None, :] + o[None, :, None]
            left = tl.load(at, mask=left_mask, other=0.0)
            at = a + (row * (stride_a.to(tl.int64) * UNIT))[:, :, None] + i[None, None, :]
            right = tl.load(at, mask=right_mask, other=0.0)
            if left.dtype == tl.float32:
                chain = tl.dot(left, right, input_precision="tf32x3")
            else:
                chain = tl.dot(left, right)
            g = tl.fma(chain, 1.0, g)
            t += BLOCK_T
        # Plus 0, which keeps the columns' part of Philox from being held in registers from tile to tile.
        column = tl.program_id(0) * BLOCK_K + tl.minimum(longest, 0) + tl.arange(0, BLOCK_K)
        words = sign_words(o * width - skip + strip * _WORD, column, low, high)
        up, down = scales(tl.max(tl.max(tl.abs(g), axis=2), axis=1))
        z = project(z, g * up[:, None, None], 1.0, down[:, None], words, BLOCK_B, BLOCK_O, BLOCK_K)
        tile += 1
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = partial + (sample.to(tl.int64) * slabs + slab)[:, None] * K + column[None, :]
    tl.store(at, z, mask=(sample < samples)[:, None] & (column < K)[None, :])


@triton.jit(do_not_specialize=_TOKEN_SIZES + _KEY)
def dense_token_kernel(
    ids, e, stride_e, spans, partial, d, K, strips, key_low, key_high,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    low, high = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(spans + 2 * chunk) + tl.arange(0, BLOCK_T)
    live = row < tl.load(spans + 2 * chunk + 1)
    start = tl.load(ids + row, mask=live, other=0) * d
    skip = start % _WORD
    # A chunk's tokens are the rows of a tile, and its sample is the only one of BLOCK_B.
    mine = (tl.arange(0, BLOCK_B) == 0)[:, None, None]
    z = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    strip = tl.zeros_like(chunk)
    while strip < strips:
        i = strip * _WORD - skip[:, None] + tl.arange(0, _WORD)[None, :]
        mask = live[:, None] & (i >= 0) & (i < d)
        value = tl.load(e + (row * stride_e)[:, None] + i, mask=mask, other=0.0).to(tl.float32)
        up, down = scales(tl.max(tl.abs(value)))
        g = tl.where(mine, value[None, :, :], 0.0)
        words = sign_words(start - skip + strip * _WORD, column, low, high)
        z = project(z, g, up, down, words, BLOCK_B, BLOCK_T, BLOCK_K)
        strip += 1
    total = tl.sum(z, axis=0)
    tl.store(partial + chunk * K + column, total, mask=column < K)


# The interpreter cannot multiply bfloat16.
_INTERPRETED = not isinstance(dense_linear_kernel, triton.JITFunction)


def dense_sketch(
    a: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, key: tuple[int, int], out: torch.Tensor
) -> None:
    words = tuple(word - (word >> 31 << 32) for word in key)
    if not a.is_floating_point():
        _token(a, e, segments, words, out)
        return
    if a.dtype != e.dtype or (_INTERPRETED and a.dtype == torch.bfloat16):
        # Exact. The head's e is float32 while its a has the model's dtype.
        a, e = a.float(), e.float()
    if a.shape[1] == 1:
        # A vector may also be the only row of its matrix, which fills tiles where a column would not.
        a, e = e, a
    for first in range(0, len(out), BLOCK_B):
        _linear(a, e, segments[first : first + BLOCK_B], words, out[first : first + BLOCK_B])


def _linear(a, e, segments, key, out) -> None:
    (samples, K), height, width = out.shape, e.shape[1], a.shape[1]
    row_step, strips = _row_step(height, width), _strips(width)
    slabs = min(MAX_SLABS, triton.cdiv(triton.cdiv(height, row_step), BLOCK_O) * row_step * strips)
    if slabs == 0 or a.shape[0] == 0:
        return
    chunks = _slabs(segments.numpy().tobytes(), slabs, out.device, stream_of(out.device))
    partial = workspace(samples * slabs, K, out)
    block, unit = columns(K, BLOCKS), _unit(a, e)
    with on_device_of(out):
        dense_linear_kernel[(triton.cdiv(K, block), slabs)](
            a, a.stride(0) // unit, e, e.stride(0) // unit, chunks.spans, partial,
            samples, height, width, K, row_step, strips, *key,
            UNIT=unit, **_tile(block), BLOCK_O=BLOCK_O, num_warps=WARPS,
        )  # fmt: skip
    reduce_chunks(partial, chunks, out, 1 / math.sqrt(K))


def _token(ids, e, segments, key, out) -> None:
    chunks, K, d = chunks_of(segments, out.device), out.shape[1], e.shape[1]
    if len(chunks) == 0:
        return
    partial = workspace(len(chunks), K, out)
    block = columns(K, TOKEN_BLOCKS)
    with on_device_of(out):
        dense_token_kernel[(len(chunks), triton.cdiv(K, block))](
            ids, e, e.stride(0), chunks.spans, partial, d, K, _strips(d), *key,
            **_tile(block), num_warps=WARPS,
        )  # fmt: skip
    reduce_chunks(partial, chunks, out, 1 / math.sqrt(K))


def columns(K: int, blocks: tuple[int, ...]) -> int:
    """Which of the blocks a program takes for K columns in all."""
    return min(blocks, key=lambda block: triton.cdiv(K, block) * (block + TILE_COLUMNS))


def _row_step(height: int, width: int) -> int:
    """Every so many rows of the weight begin at the same place in a word."""
    return max(1, min(height, WORD // math.gcd(width, WORD)))


def _strips(width: int) -> int:
    """Words that a row of `width` coordinates can touch."""
    return triton.cdiv(width + WORD - math.gcd(width, WORD), WORD)


def _unit(a: torch.Tensor, e: torch.Tensor) -> int:
    """A divisor of all sizes and strides: ALIGNED, with which loads take 16 bytes, or 1."""
    whole = e.shape[1] % BLOCK_O == 0 and a.shape[1] % WORD == 0
    return ALIGNED if whole and e.stride(0) % ALIGNED == a.stride(0) % ALIGNED == 0 else 1


def _tile(block: int) -> dict[str, object]:
    return {"BLOCK_B": BLOCK_B, "BLOCK_T": BLOCK_T, "BLOCK_K": block}


@functools.lru_cache(maxsize=CHUNK_LISTS)
def _slabs(spans: bytes, slabs: int, device: torch.device, stream: int) -> Chunks:
    """The samples' rows, then empty samples up to BLOCK_B, and where in the partial sums each one's slabs begin."""
    given = np.frombuffer(spans, dtype=np.int64).reshape(-1, 2)
    rows = np.zeros((BLOCK_B, 2), dtype=np.int64)
    rows[: len(given)] = given
    first = np.arange(len(given) + 1) * slabs
    return Chunks(*(to_device(torch.from_numpy(x), device) for x in (rows, first)))
