"""How far a kernel's result may be from its definition: the one rule of all tests and of the benchmarks' checks.

    err(kernel) <= 2 err(twin) + FLOOR[dtype of the result]

err is the largest difference from the float64 definition, over the largest entry of the definition. The twin is the
same formula in PyTorch (plain.py), its result rounded to the same dtype. Its error stands for that of the sums, which
a kernel adds in an order of its own: hence the factor of 2. FLOOR is what rounds beside the sums, so that a twin that
happens to be exact (one row, small integers) does not ask the same of the kernel.

Rounding to nearest a number of p significand bits, the hidden one among them, errs by at most u = 2^-p of it, the unit
roundoff: p is 24, 11 and 8 for float32, float16 and bfloat16. Every rounding below is of a number that is at most the
largest entry, so it costs at most u of that.

float32: 4 u. Beside its sums a sketch, out += K^(-1/2) sum (H S a) (H S e), rounds four times: the product of two
transforms, the constant K^(-1/2), the product with it, and the addition to out. A gradient of softmax,
(exp(x) / sum - onehot) slope, does too: quotient, difference, slope, and the product with it.
float16 and bfloat16: u + 4 u(float32). All arithmetic is float32, and the result is rounded to 16 bits once. This is
below the 4 u that one gets with the result's own u in the formula above, which would let a kernel lose two of its bits.
float64: results of float32 arithmetic that is added up in float64, so their twin is float32, and so is their floor.

A tensor core may truncate where it adds, which costs up to 2 u in place of u: one u more for each addition of a chain
in it (`truncations`). On a CPU, and emulated, there are none.
"""

from __future__ import annotations

import torch

# {dtype: unit roundoff}
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROUNDINGS = 4
FLOOR = {
    dtype: ROUNDINGS * UNIT[torch.float32] + (unit if dtype != torch.float32 else 0.0)
    for dtype, unit in UNIT.items()
}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest entry wanted; NaN where either has one, and 0 without any entry."""
    if got.shape != wanted.shape:
        raise ValueError(f"the result has shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    wanted = wanted.double()
    difference = (got.to(wanted.device, torch.float64) - wanted).abs().max()
    return float(difference / wanted.abs().max().clamp_min(1e-300))


def allowed(twin: torch.Tensor, wanted: torch.Tensor, truncations: int = 0) -> float:
    """The relative error that a kernel may have whose twin has this result, in the dtype of the kernel's own."""
    return 2 * relative_error(twin, wanted) + FLOOR[twin.dtype] + truncations * UNIT[twin.dtype]


def check(got: torch.Tensor, twin: torch.Tensor, wanted: torch.Tensor, truncations: int = 0) -> None:
    """Fail unless a kernel's result is finite and as near to its definition as `allowed` says."""
    assert torch.isfinite(got).all()
    error, most = relative_error(got, wanted), allowed(twin, wanted, truncations)
    assert error <= most, f"the error is {error:.3g} of the largest entry, {most:.3g} is allowed"
