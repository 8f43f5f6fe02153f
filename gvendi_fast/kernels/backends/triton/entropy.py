"""Entropy of many small groups of rows: group g is rows boundaries[g] .. boundaries[g + 1] of [N, K], m <= 256 of them.

G = Z Z^T [m, m] of a group's rows scaled to length 1, padded with zeros to M; its eigenvalues over m; their entropy of
order q.
Up to M = 64 a Jacobi iteration finds the eigenvalues of one group per program. It runs in float32: for q >= 1 the
entropy is then within 1e-4 of the definition. A wider group, an order below 1 (infinitely steep at 0), or a group that
has not converged goes to torch's batched eigvalsh in float64.

Jacobi: a rotation of two rows and two columns makes one off-diagonal entry zero; M/2 disjoint pairs turn at once, and a
sweep of M - 1 rounds meets every pair. Pairs are neighbours (2i, 2i+1), and between rounds all positions move by one
fixed permutation, which needs no index tensor: position p, as a polynomial over GF(2), is divided by x modulo a
primitive trinomial x^k + x^t + 1, M = 2^k. Division has order M - 1 and takes p ^ q through all non-zero values, so
p and q are neighbours (p ^ q = 1) exactly once in M - 1 rounds, after which everything is back in place.
Most groups take 4 to 10 sweeps. No cyclic order of simultaneous rotations is known to converge always, and for a few
groups this one does not, so the kernel measures what is off the diagonal: it stops once the off-diagonal part is below
TOLERANCE of the trace, where |eigenvalues - diagonal| <= |off-diagonal part|_F (Hoffman and Wielandt), or after SWEEPS
sweeps, and returns its size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gvendi_fast.kernels.backends.triton.covariance import STRIP_ROWS, unit_rows
from gvendi_fast.kernels.backends.triton.runtime import on_device_of
from gvendi_fast.kernels.checks import MAX_GROUP
from gvendi_fast.kernels.reference import SPECTRUM_NOISE

# Padded size M -> exponent t of the primitive trinomial x^log2(M) + x^t + 1, and warps of the Jacobi kernel.
JACOBI = {16: (1, 1), 32: (2, 2), 64: (1, 8)}
SIZES = (16, 32, 64, 128, 256)
SWEEPS, TOLERANCE = 12, 1e-5
# Gram tiles: columns of Z at a time, warps; no tile is wider than 64 rows.
GRAM_COLUMNS, GRAM_ROWS, GRAM_WARPS = 32, 64, 8
# Gram matrices of one size class that live at once.
GRAM_BYTES = 64 << 20
assert set(JACOBI) < set(SIZES)
assert SIZES[-1] == MAX_GROUP <= STRIP_ROWS


@triton.jit(do_not_specialize=["K"])
def gram_kernel(z, spans, gram, K, M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(spans + 2 * group), tl.load(spans + 2 * group + 1)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    left_row, right_row = begin + i, begin + j
    total = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left_mask = (left_row < end)[:, None] & (k < K)[None, :]
        right_mask = (right_row < end)[None, :] & (k < K)[:, None]
        left = tl.load(z + left_row[:, None] * K + k[None, :], mask=left_mask, other=0.0)
        right = tl.load(z + right_row[None, :] * K + k[:, None], mask=right_mask, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(gram + group * M * M + i[:, None] * M + j[None, :], total)


@triton.jit
def flip_bit(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIT: tl.constexpr):
    """Column c of x [ROWS, COLUMNS] goes to c ^ (1 << BIT)."""
    high: tl.constexpr = COLUMNS // (2 << BIT)
    low: tl.constexpr = 1 << BIT
    pairs = tl.permute(tl.reshape(x, [ROWS, high, 2, low]), [0, 1, 3, 2])
    zero, one = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(one, zero), [0, 1, 3, 2]), [ROWS, COLUMNS])


@triton.jit
def turn(a, c, s, M: tl.constexpr, T: tl.constexpr):
    """Columns (2i, 2i+1) of a [M, M] turned by (c, s) [M/2], then moved: p to p / x in GF(2)[x] / (x^k + x^T + 1)."""
    even, odd = tl.split(tl.reshape(a, [M, M // 2, 2]))
    c, s = c[None, :], s[None, :]
    # p / x drops bit 0 and, where that was set, sets the highest bit and flips bit T - 1.
    low = c * even - s * odd
    high = flip_bit(s * even + c * odd, M, M // 2, T - 1)
    return tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [M, M])


@triton.jit
def jacobi_kernel(gram, spectra, residuals, SWEEPS, tolerance, M: tl.constexpr, T: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, M)
    row, column = i[:, None], i[None, :]
    a = tl.load(gram + group * M * M + row * M + column)
    trace = tl.sum(tl.where(row == column, a, 0.0))
    bound = (tolerance * trace) * (tolerance * trace)
    residual = tl.sum(tl.where(row == column, 0.0, a * a))
    sweep = 0
    while (sweep < SWEEPS) & (residual > bound):
        for _ in range(M - 1):
            diagonal = tl.sum(tl.where(row == column, a, 0.0), axis=0)
            beside = tl.sum(tl.where(row == (column ^ 1), a, 0.0), axis=0)
            p, q = tl.split(tl.reshape(diagonal, [M // 2, 2]))
            off, _again = tl.split(tl.reshape(beside, [M // 2, 2]))
            # tan of the smaller angle that makes `off` zero: sign(d) 2 off / (|d| + sqrt(d^2 + 4 off^2)), d = q - p.
            twice = 2.0 * tl.where(q < p, -off, off)
            # Smaller entries change no digit, and their squares may underflow to 0 / 0.
            large = tl.abs(off) > 1e-15
            d = tl.where(large, q - p, 1.0)
            tangent = tl.div_rn(twice, tl.abs(d) + tl.sqrt_rn(d * d + twice * twice))
            tangent = tl.where(large, tangent, 0.0)
            c = tl.div_rn(tl.full([M // 2], 1.0, tl.float32), tl.sqrt_rn(1.0 + tangent * tangent))
            s = tangent * c
            a = tl.trans(turn(a, c, s, M, T))
            a = tl.trans(turn(a, c, s, M, T))
        residual = tl.sum(tl.where(row == column, 0.0, a * a))
        sweep += 1
    tl.store(spectra + group * M + i, tl.sum(tl.where(row == column, a, 0.0), axis=0))
    tl.store(residuals + group, tl.sqrt(residual) / trace)


def entropy(rows: torch.Tensor, boundaries: torch.Tensor, q: float, out: torch.Tensor) -> None:
    """Fill out float64 [G] with the entropies of order q; boundaries int64 [G + 1] on the CPU, no group empty."""
    first = 0
    while first < len(out):
        # Unit rows of whole groups, a strip at a time.
        reach = torch.searchsorted(boundaries, boundaries[first] + STRIP_ROWS, right=True)
        last = int(reach) - 1
        fill_strip(rows, boundaries[first : last + 1], q, out[first:last])
        first = last


def fill_strip(rows: torch.Tensor, boundaries: torch.Tensor, q: float, out: torch.Tensor) -> None:
    """`entropy` of groups whose unit rows fit in memory together."""
    z = unit_rows(rows[boundaries[0] : boundaries[-1]])
    spans = torch.stack([boundaries[:-1], boundaries[1:]], dim=1)
    counts, below = spans[:, 1] - spans[:, 0], 0
    spans = spans - boundaries[0]
    for M in SIZES:
        groups = torch.nonzero((counts > below) & (counts <= M))[:, 0]
        below = M
        for part in groups.split(GRAM_BYTES // (4 * M * M)):
            if len(part):
                spectra = group_spectra(z, spans[part].to(rows.device), M, exact=q < 1)
                out[part.to(rows.device)] = entropies(spectra, q)


def group_spectra(z: torch.Tensor, spans: torch.Tensor, M: int, exact: bool) -> torch.Tensor:
    """Eigenvalues float64 [g, M] of the Gram matrices of groups of unit rows z; spans int64 [g, 2] on z's device."""
    count, block = len(spans), min(M, GRAM_ROWS)
    gram = torch.empty(count, M, M, dtype=torch.float32, device=z.device)
    with on_device_of(z):
        gram_kernel[(count, M // block, M // block)](
            z, spans, gram, z.shape[1], M=M, BLOCK_M=block, BLOCK_K=GRAM_COLUMNS, num_warps=GRAM_WARPS
        )
    if exact or M not in JACOBI:
        return torch.linalg.eigvalsh(gram.double())
    power, warps = JACOBI[M]
    spectra = torch.empty(count, M, dtype=torch.float32, device=z.device)
    residuals = torch.empty(count, dtype=torch.float32, device=z.device)
    with on_device_of(z):
        jacobi_kernel[(count,)](gram, spectra, residuals, SWEEPS, TOLERANCE, M=M, T=power, num_warps=warps)
    spectra, late = spectra.double(), torch.nonzero(residuals > TOLERANCE)[:, 0]
    if len(late):
        spectra[late] = torch.linalg.eigvalsh(gram[late].double())
    return spectra


def entropies(spectra: torch.Tensor, q: float) -> torch.Tensor:
    """Renyi entropies of order q > 0 (nats) of eigenvalues float64 [g, M], scaled to sum to 1: float64 [g]."""
    p = spectra.clamp_min(0)
    p = p / p.sum(dim=1, keepdim=True)
    if q == 1:
        return -torch.special.xlogy(p, p).sum(dim=1)
    if math.isinf(q):
        return -p.amax(dim=1).log()
    if q < 1:
        p = p.masked_fill(p < SPECTRUM_NOISE, 0)
        p = p / p.sum(dim=1, keepdim=True)
    if abs(q - 1) < 0.5:
        # sum p^q = 1 + sum p (p^(q-1) - 1) does not cancel near q = 1; where p is 0 the logarithm is not used.
        logs = p.masked_fill(p == 0, 1).log()
        return torch.log1p((p * torch.expm1((q - 1) * logs)).sum(dim=1)) / (1 - q)
    return torch.logsumexp(q * p.log(), dim=1) / (1 - q)
