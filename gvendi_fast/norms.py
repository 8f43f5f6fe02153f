"""Norm layers: which formula gives their normalised input, from which the gradient of their weight follows."""

from __future__ import annotations

import torch
from torch import nn

from gvendi_fast.errors import GvendiError
from gvendi_fast.sketches import normalised


def norm_formula(module: nn.Module) -> tuple[str, float]:
    """("rms" | "layer" | "affine", eps) for a norm module, found by trying it on a fixed input.

    Every norm y = x_hat(x) * (w + c) + b has the weight gradient sum_t e_t * x_hat_t with
    x_hat = y(w = 1) - y(w = 0), whatever its constant c. Where that x_hat is the RMSNorm or LayerNorm
    formula, the compiled kernel computes it from x; otherwise ("affine") it is taken from the module.
    """
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[0], generator=generator)
    # Two scales, so that a wrong eps shows.
    x = torch.cat([x, 1e-2 * x]).to(device=weight.device, dtype=weight.dtype)
    probe = torch.rand(weight.shape[0], generator=generator).to(weight)
    with torch.no_grad():
        x_hat = affine_input(module, x)
        got = call_with_weight(module, x, probe) - call_with_weight(module, x, torch.zeros_like(probe))
        tolerance = 64 * torch.finfo(weight.dtype).eps
        if not torch.allclose(got, x_hat * probe, rtol=tolerance, atol=tolerance):
            raise GvendiError(
                f"{type(module).__name__} does not scale its normalised input by its weight; leave its "
                "parameters out with exclude=[patterns]"
            )
        eps = next(
            (float(getattr(module, n)) for n in ("eps", "variance_epsilon") if hasattr(module, n)), None
        )
        for norm in ("rms", "layer") if eps is not None else ():
            if torch.allclose(x_hat.float(), normalised(x, norm, eps), rtol=tolerance, atol=tolerance):
                return norm, eps
    return "affine", 0.0


def call_with_weight(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The module's output with another weight in place of its own."""
    return torch.func.functional_call(module, {"weight": weight}, (x,))


def affine_input(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x_hat of a norm module: the difference of its outputs for weights 1 and 0."""
    one = torch.ones_like(module.weight)
    return call_with_weight(module, x, one) - call_with_weight(module, x, torch.zeros_like(one))
