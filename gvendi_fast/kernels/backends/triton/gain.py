"""out [4, N] = Delta S, mu, excess and r of every row of coordinates c [N, K], as `spectrum.marginal_change` has them.

e_k = c_k^2, r = sum_k e_k, and table [K, C] = [1, lambda_k, 1 / (lambda_k + t_j), 0..] of the quadrature:
    mu = sum_k e_k lambda_k / r,  g_j = sum_k e_k / (lambda_k + t_j) / r,  phi(x) = x ln x
    Delta S = phi(mu + sign) - phi(mu) + sum_j w_j ln1p(sign (1 / (mu + t_j) - g_j) / (1 + sign g_j))
c is float32 (or float64) as it is stored; everything from the squares on is float64. Float32 sums would err by 8e-7
whatever n is, while the differences between rows fall as n^-1/2: the error is 2e-4 of them at K = 64, n = 2 10^5, and
soon one in a thousand. The sums are K C products a row beside the K^2 of the projection, so their float64 costs little.
One program owns BLOCK_N rows and adds in the order of k: the same bits on every run and in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton.runtime import on_device_of
from gvendi_fast.kernels.spectrum import Quadrature

# Rows of a program, its warps, and how many k are loaded at once.
BLOCK_N, WARPS, UNROLL = 16, 4, 4


@triton.jit
def log1p(y):
    """ln(1 + y) for float64 y > -1: what 1 + y loses of y comes back as a first-order term."""
    u = 1.0 + y
    return tl.log(u) + (y - (u - 1.0)) / u


@triton.jit
def x_log_x(x):
    return tl.where(x > 0.0, x * tl.log(tl.where(x > 0.0, x, 1.0)), 0.0)


@triton.jit
def column(sums, columns, n):
    """Column n of sums [rows, columns]."""
    return tl.sum(tl.where((columns == n)[None, :], sums, 0.0), axis=1)


@triton.jit(do_not_specialize=["N", "K", "J", "stride"])
def gain_kernel(
    c, table, t, weight, out, stride, N, K, J,
    SIGN: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    columns = tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    first = 0
    while first < K:
        for step in tl.static_range(UNROLL):
            k = first + step
            x = tl.load(c + rows * K + k, mask=live & (k < K), other=0.0).to(tl.float64)
            w = tl.load(table + k * C + columns, mask=(columns < C) & (k < K), other=0.0)
            sums += (x * x)[:, None] * w[None, :]
        first += UNROLL
    r = tl.where(live, column(sums, columns, 0), 1.0)
    mu = column(sums, columns, 1) / r
    # The nodes are columns 2 .. J + 1.
    node = (columns >= 2) & (columns < J + 2)
    at = tl.load(t + columns - 2, mask=node, other=1.0)[None, :]
    w = tl.load(weight + columns - 2, mask=node, other=0.0)[None, :]
    g = sums / r[:, None]
    over = tl.where(node[None, :] & (at > 1e-2), g * (1.0 + at) - 1.0, 0.0)
    if SIGN < 0:
        # A >= x x^T; beyond these bounds is rounding only, and the logarithm stays finite.
        mu = tl.where(mu < 1.0, 1.0, mu)
        g = tl.where(g > 1.0 / (1.0 + at), 1.0 / (1.0 + at), g)
    g = tl.where(node[None, :], g, 0.0)
    y = SIGN * (1.0 / (mu[:, None] + at) - g) / (1.0 + SIGN * g)
    change = tl.sum(w * log1p(tl.where(node[None, :], y, 0.0)), axis=1) + x_log_x(mu + SIGN) - x_log_x(mu)
    tl.store(out + rows, change, mask=live)
    tl.store(out + stride + rows, mu, mask=live)
    tl.store(out + 2 * stride + rows, tl.max(over, axis=1), mask=live)
    tl.store(out + 3 * stride + rows, r, mask=live)


def gain(coordinates: torch.Tensor, at: Quadrature, out: torch.Tensor) -> None:
    N, K = coordinates.shape
    if N == 0:
        return
    C = at.table.shape[1]
    with on_device_of(coordinates):
        gain_kernel[(triton.cdiv(N, BLOCK_N),)](
            coordinates, at.table, at.t, at.weight, out, out.stride(0), N, K, len(at.t),
            SIGN=at.sign, C=C, BLOCK_C=triton.next_power_of_2(C), BLOCK_N=BLOCK_N, UNROLL=UNROLL, num_warps=WARPS,
        )  # fmt: skip
