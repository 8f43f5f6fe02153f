"""Entropy of a spectrum, and how S(A) = tr(A ln A) changes when a row joins or leaves (README, "The score")."""

from __future__ import annotations

import math

import torch

from gvendi_fast.errors import GvendiError

# Orders below 1 blow up tiny eigenvalues; below this part of the trace they may be rounding of fp32 products.
NOISE = 2.0**-22


def marginal_change(
    energy: torch.Tensor, eigenvalues: torch.Tensor, sign: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Delta S = S(A + sign x x^T) - S(A) of many x: energy [N, K] of c_k^2, c = Q^T x; eigenvalues [K] of A.

        Delta S = phi(mu + sign r) - phi(mu) + int_0^inf [ln1p(sign r / (mu + t)) - ln1p(sign g(t))] dt
    with phi(x) = x ln x, r = |x|^2, mu = x^T A x / r, g(t) = sum_k c_k^2 / (lambda_k + t): the integral form
    of S and the determinant lemma, against a matrix with the one eigenvalue mu. Trapezoid in u = ln t, step 1.
    All singularities lie at Im u = +-pi; there either logarithm has an imaginary part of +-pi, on t-sets of
    measure r, so a sum without ends errs by less than 8 pi r exp(-2 pi^2) = 7e-8 r, whatever the spectrum.
    Returns Delta S [N], mu [N], and the relative excess [N] of g over r / (r + t), its bound if A >= x x^T.
    """
    # Far below its nearest singularity, minus an eigenvalue of A or of A - x x^T, the integrand is constant.
    low = max(1e-7, 1e-3 * (float(eigenvalues.min()) + min(sign, 0)))
    nodes = math.ceil(math.log(100 * float(eigenvalues.max()) / low)) + 1
    t = low * torch.exp(torch.arange(nodes, dtype=torch.float64, device=energy.device))
    # Both ends are closed by geometric sums: as t towards 0 and, far above every eigenvalue, as t^-2.
    weight = t.clone()
    weight[0] /= -math.expm1(-1)
    weight[-1] /= -math.expm1(-2)

    lam = eigenvalues[:, None]
    sums = energy @ torch.cat([torch.ones_like(lam), lam, 1 / (lam + t)], dim=1)
    r, mu, g = sums[:, :1], sums[:, 1:2] / sums[:, :1], sums[:, 2:]
    bound = r / (r + t)
    excess = ((g / bound - 1) * (t > 1e-2)).amax(dim=1)
    if sign < 0:
        # A >= x x^T; beyond these bounds is rounding only, and the logarithms stay finite.
        mu, g = torch.maximum(mu, r), torch.minimum(g, bound)
    integral = (torch.log1p(sign * r / (mu + t)) - torch.log1p(sign * g)) @ weight
    after = mu + sign * r
    closed = torch.special.xlogy(after, after) - torch.special.xlogy(mu, mu)
    return closed[:, 0] + integral, mu[:, 0], excess


def renyi_entropy(spectrum: torch.Tensor, q: float, noise: float = NOISE) -> float:
    """H_q of eigenvalues that sum to 1, without cancellation near q = 1 or underflow at large q.

    At q < 1 eigenvalues up to `noise` do not count.
    """
    if not q > 0:
        raise GvendiError(f"q is {q}; wanted an order above 0, or inf")
    p = spectrum[spectrum > (noise if q < 1 else 0)]
    if q == 1:
        return float(-torch.special.xlogy(p, p).sum())
    if math.isinf(q):
        return -math.log(float(p.max()))
    if abs(q - 1) < 0.5:
        # sum p^q = 1 + sum p (p^(q-1) - 1)
        return float(torch.log1p((p * torch.expm1((q - 1) * p.log())).sum())) / (1 - q)
    return float(torch.logsumexp(q * p.log(), dim=0)) / (1 - q)
