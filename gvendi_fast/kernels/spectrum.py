"""Entropy of a spectrum, and how S(A) = tr(A ln A) changes when a row joins or leaves (docs/score.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gvendi_fast.base.errors import GvendiError

# Orders below 1 magnify tiny eigenvalues; below this share of the trace they may be rounding of fp32 products.
NOISE = 2.0**-22


@dataclass(frozen=True)
class Quadrature:
    """Where and with what weights the integral of `marginal_change` is summed for one spectrum; all float64.

    sign: +1 where rows join, -1 where one leaves.
    t: [J], the nodes.
    weight: [J], their weights.
    table: [K, C], columns of ones, lambda, 1 / (lambda + t) and zeros up to a multiple of 8 columns, so that
        energy @ table holds a row's squared length, its mu and its g.
    """

    sign: int
    t: torch.Tensor
    weight: torch.Tensor
    table: torch.Tensor


def nodes(eigenvalues: torch.Tensor, sign: int, joining: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """t and weights, float64 [J] each, of int_0^inf dt for a spectrum and up to `joining` unit rows that join."""
    # Far below its nearest singularity, minus an eigenvalue of A or of A - x x^T, the integrand is constant.
    low = max(1e-7, 1e-3 * (float(eigenvalues.min()) + min(sign, 0)))
    high = 100 * (float(eigenvalues.max()) + joining - 1)
    count = math.ceil(math.log(high / low)) + 1
    t = low * torch.exp(torch.arange(count, dtype=torch.float64, device=eigenvalues.device))
    # What lies beyond both ends is a geometric sum: of terms like t towards 0 and like t^-2 far above every eigenvalue.
    weight = t.clone()
    weight[0] /= -math.expm1(-1)
    weight[-1] /= -math.expm1(-2)
    return t, weight


def quadrature(eigenvalues: torch.Tensor, sign: int, joining: int = 1) -> Quadrature:
    """The nodes for a spectrum [K], not negative, and up to `joining` unit rows that join, or one that leaves."""
    t, weight = nodes(eigenvalues, sign, joining)
    lam = eigenvalues[:, None]
    table = [torch.ones_like(lam), lam, 1 / (lam + t), lam.new_zeros(len(lam), -(len(t) + 2) % 8)]
    return Quadrature(sign, t, weight, torch.cat(table, dim=1))


def marginal_change(
    energy: torch.Tensor, at: Quadrature
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Delta S = S(A + sign x x^T) - S(A) of many x: energy float64 [N, K] of c_k^2, c = Q^T x, over their sum.

        Delta S = phi(mu + sign) - phi(mu) + int_0^inf ln1p(sign (1 / (mu + t) - g(t)) / (1 + sign g(t))) dt
    with phi(x) = x ln x, |x| = 1, mu = x^T A x, g(t) = sum_k c_k^2 / (lambda_k + t): the integral form of S and the
    determinant lemma, against a matrix with the one eigenvalue mu. Trapezoid in u = ln t, step 1.
    All singularities lie at Im u = +-pi; there the logarithms of 1 + sign g and of 1 + sign / (mu + t) have imaginary
    parts of +-pi, on t-sets of measure 1, so an infinite sum errs by less than 8 pi exp(-2 pi^2) = 7e-8, whatever
    the spectrum.
    Returns [N] each: Delta S, mu, the relative excess of g over 1 / (1 + t), which bounds it if A >= x x^T, and the sum
    of the row's energies, 1 for a unit row, by which the rest is divided.
    """
    sums = energy @ at.table
    length = sums[:, :1]
    mu, g = sums[:, 1:2] / length, sums[:, 2 : 2 + len(at.t)] / length
    excess = ((g * (1 + at.t) - 1) * (at.t > 1e-2)).amax(dim=1)
    if at.sign < 0:
        # A >= x x^T, so only rounding exceeds these bounds; within them the logarithm stays finite.
        mu, g = mu.clamp_min(1), torch.minimum(g, 1 / (1 + at.t))
    return change_of_sum(mu, g, at.t, at.weight, at.sign), mu[:, 0], excess, length[:, 0]


def change_of_sum(
    mu: torch.Tensor, g: torch.Tensor, t: torch.Tensor, weight: torch.Tensor, sign: int
) -> torch.Tensor:
    """Delta S of `marginal_change` from mu [..., 1] and g [..., J] at the nodes t with their weights [J] -> [...]."""
    integral = torch.log1p(sign * (1 / (mu + t) - g) / (1 + sign * g)) @ weight
    after = mu + sign
    closed = torch.special.xlogy(after, after) - torch.special.xlogy(mu, mu)
    return closed[..., 0] + integral


def entropy_and_surprise(sigma: torch.Tensor, least: float) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Eigenvalues [K] of Sigma [K, K] of trace 1, its entropy H_1 in nats, and -ln Sigma [K, K].

    The last is the entropy's gradient without the identity; in it, eigenvalues below `least` count as `least`.
    """
    eigenvalues, vectors = torch.linalg.eigh(sigma)
    eigenvalues = eigenvalues.clamp_min(0)
    entropy = float(-torch.special.xlogy(eigenvalues, eigenvalues).sum())
    return eigenvalues, entropy, (vectors * -eigenvalues.clamp_min(least).log()) @ vectors.T


def renyi_entropy(spectrum: torch.Tensor, q: float, noise: float = NOISE) -> float:
    """H_q of eigenvalues that sum to 1, without cancellation near q = 1 or underflow at large q.

    At q < 1 eigenvalues up to `noise` do not count.
    """
    if not q > 0:
        raise GvendiError(f"q is {q}; wanted an order above 0, or inf (1 is von Neumann's entropy)")
    p = spectrum[spectrum > (noise if q < 1 else 0)]
    if q == 1:
        return float(-torch.special.xlogy(p, p).sum())
    if math.isinf(q):
        return -math.log(float(p.max()))
    if abs(q - 1) < 0.5:
        # sum p^q = 1 + sum p (p^(q-1) - 1)
        return float(torch.log1p((p * torch.expm1((q - 1) * p.log())).sum())) / (1 - q)
    return float(torch.logsumexp(q * p.log(), dim=0)) / (1 - q)
