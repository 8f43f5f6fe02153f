"""label [N] = the c of the largest cosine <z_n, m_c>, z_n = x_n / ||x_n||, second [N] the c of the next largest;
x [N, K], centroids m [C, K] of length 1. Equal cosines go to the lower c; with C = 1 second is -1 and its cosine NaN.

`covariance.unit_rows` makes the z_n, strip by strip, with the norm in float64. A program owns BLOCK_N rows, walks over
all centroids BLOCK_C at a time and keeps the two best of each row, so that no [N, C] matrix is written. Products are
float32, not cut to TF32, and add up over K in one order: a row's result is the same bits in every batch. CHAIN_K of
them are added one after the other, and then those sums: on an H200 the error of one chain over K = 1024 was 1.2 times
the tolerance. A label can differ from the definition's where two cosines are within K 2^-24.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton.covariance import STRIP_ROWS, unit_rows
from gvendi_fast.kernels.backends.triton.runtime import on_device_of

BLOCK_N, BLOCK_C, BLOCK_K, WARPS = 128, 64, 16, 8
CHAIN_K = 128
assert CHAIN_K % BLOCK_K == 0


@triton.jit
def largest(value, column, NONE: tl.constexpr):
    """Largest entry of each row of value [n, c] and the lowest column that holds it, NONE where all are -inf."""
    top = tl.max(value, axis=1)
    hit = (value == top[:, None]) & (value > float("-inf"))
    return top, tl.min(tl.where(hit, column[None, :], NONE), axis=1)


@triton.jit(do_not_specialize=["N", "C"])
def assign_kernel(
    z,
    centroids,
    label,
    cosine,
    second,
    second_cosine,
    N,
    K,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN_K: tl.constexpr,
):
    NONE: tl.constexpr = 2147483647
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_value = tl.full([BLOCK_N], float("-inf"), tl.float32)
    next_value = tl.full([BLOCK_N], float("-inf"), tl.float32)
    first_label = tl.full([BLOCK_N], NONE, tl.int32)
    next_label = tl.full([BLOCK_N], NONE, tl.int32)
    begin = 0
    while begin < C:
        column = begin + tl.arange(0, BLOCK_C)
        value = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        k = 0
        while k < K:
            chain = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            stop = tl.minimum(k + CHAIN_K, K)
            while k < stop:
                inner = k + tl.arange(0, BLOCK_K)
                left = tl.load(
                    z + row[:, None] * K + inner[None, :],
                    mask=(row < N)[:, None] & (inner < K)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    centroids + column[None, :].to(tl.int64) * K + inner[:, None],
                    mask=(column < C)[None, :] & (inner < K)[:, None],
                    other=0.0,
                )
                chain = tl.dot(left, right, chain, input_precision="ieee")
                k += BLOCK_K
            value += chain
        value = tl.where((column < C)[None, :], value, float("-inf"))
        one, one_label = largest(value, column, NONE)
        two, two_label = largest(
            tl.where(column[None, :] == one_label[:, None], float("-inf"), value), column, NONE
        )
        # Earlier labels are lower, so they win a tie.
        ahead = one > first_value
        loser = tl.where(ahead, first_value, one)
        loser_label = tl.where(ahead, first_label, one_label)
        rival = tl.where(ahead, two, next_value)
        rival_label = tl.where(ahead, two_label, next_label)
        # In a tie for second the lower label wins: the former first if the tile took its place, else the former second.
        keep = tl.where(ahead, loser >= rival, rival < loser)
        next_value = tl.where(keep, loser, rival)
        next_label = tl.where(keep, loser_label, rival_label)
        first_value = tl.where(ahead, one, first_value)
        first_label = tl.where(ahead, one_label, first_label)
        begin += BLOCK_C
    live = row < N
    alone = next_label == NONE
    tl.store(label + row, tl.where(first_label == NONE, -1, first_label).to(tl.int64), mask=live)
    tl.store(cosine + row, tl.where(first_label == NONE, float("nan"), first_value), mask=live)
    tl.store(second + row, tl.where(alone, -1, next_label).to(tl.int64), mask=live)
    tl.store(second_cosine + row, tl.where(alone, float("nan"), next_value), mask=live)


def assign(
    rows: torch.Tensor,
    centroids: torch.Tensor,
    label: torch.Tensor,
    cosine: torch.Tensor,
    second: torch.Tensor,
    second_cosine: torch.Tensor,
) -> None:
    C, K = centroids.shape
    for first in range(0, len(rows), STRIP_ROWS):
        part = slice(first, first + STRIP_ROWS)
        z = unit_rows(rows[part])
        with on_device_of(rows):
            assign_kernel[(triton.cdiv(len(z), BLOCK_N),)](
                z,
                centroids,
                label[part],
                cosine[part],
                second[part],
                second_cosine[part],
                len(z),
                K,
                C,
                BLOCK_N=BLOCK_N,
                BLOCK_C=BLOCK_C,
                BLOCK_K=BLOCK_K,
                CHAIN_K=CHAIN_K,
                num_warps=WARPS,
            )
