"""Norm layers: which formula gives their normalised input, from which the gradient of their weight follows.

A formula is found by trying the module. The trial runs in float32 whatever the model's dtype: bfloat16 rounds
by 1/256, and what a tolerance that wide lets pass is another formula.
"""

from __future__ import annotations

import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError

# Of 1 and of the value together. Two fp32 evaluations of one formula differ by under a tenth of this on the trial
# input; LayerNorm and RMSNorm, or an eps that is ten times another, differ by more than a thousand times as much.
TOLERANCE = 256 * torch.finfo(torch.float32).eps
# The mean is three deviations, so that centring shows; an eps of 1e-6 or more shows in rows of 1e-3.
SCALES, OFFSET = (1e3, 1.0, 1e-2, 1e-3), 3.0


def normalised(x: torch.Tensor, norm: str, eps: float) -> torch.Tensor:
    """x_hat in float32 for rows x [..., d]: "rms" x / sqrt(mean(x^2) + eps), "layer" (x - mean) / sqrt(var + eps)."""
    x = x.float()
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class Unhooked(nn.Module):
    """A module's forward without its hooks, which come before what the forward reads and after what it gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.of = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the module's forward gives."""
        return self.of.forward(x)


def norm_formula(module: nn.Module) -> tuple[str, float]:
    """("rms" | "layer" | "affine", eps) for a norm module, found by trying it in float32 on a fixed input.

    Every norm y = x_hat(x) * (w + c) + b has the weight gradient sum_t e_t * x_hat_t with
    x_hat = y(w = 1) - y(w = 0), whatever its constant c. Where that x_hat is the RMSNorm or LayerNorm
    formula, the compiled kernel computes it from x; otherwise ("affine") it is taken from the module.
    Raises GvendiError naming the class of a module whose output is not of that form.
    """
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    width = weight.shape[0]
    x = torch.cat([scale * (OFFSET + torch.randn(3, width, generator=generator)) for scale in SCALES])
    x = x.to(weight.device, torch.promote_types(weight.dtype, torch.float32))[None]
    # Of both signs and beyond 1, where a magnitude or a clamp of the weight is not the weight.
    probe, other = (3 * torch.randn(width, generator=generator).to(x) for _ in range(2))
    norm = Unhooked(module)
    with torch.no_grad():
        try:
            x_hat = affine_input(norm, x)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise GvendiError(
                f"{type(module).__name__} cannot be evaluated in float32, by which its formula is found ({error}); "
                "leave its parameters out with exclude=[patterns]"
            ) from error
        scaled = _output(norm, x, probe) - _output(norm, x, torch.zeros_like(probe))
        shift = torch.zeros_like(probe) if getattr(module, "bias", None) is None else other
        shifted = _output(norm, x, probe, shift) - _output(norm, x, probe)
        # Not <=, so that an output that is not finite is refused.
        if not (_error(scaled, x_hat * probe) <= TOLERANCE and _error(shifted, shift) <= TOLERANCE):
            raise GvendiError(
                f"{type(module).__name__} does not scale its normalised input by its weight and add its bias, tried in "
                "float32; leave its parameters out with exclude=[patterns]"
            )
        fits = [
            (_error(x_hat, normalised(x, name, eps)), name, eps)
            for name in ("rms", "layer")
            for eps in _epsilons(module, x.dtype)
        ]
        error, name, eps = min(fits, default=(float("inf"), "affine", 0.0))
        if error > TOLERANCE:
            return "affine", 0.0
        return name, _default_eps(module, name) if _takes_default_eps(module) else eps


def affine_input(norm: Unhooked, x: torch.Tensor) -> torch.Tensor:
    """x_hat of a norm for x [..., d], float32 (or float64): its outputs' difference for weights 1 and 0."""
    one = torch.ones_like(norm.of.weight)
    return _output(norm, x, one) - _output(norm, x, torch.zeros_like(one))


def _output(
    norm: Unhooked, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The norm's output with this weight and bias (None: zero) in place of its own, everything in float32 or wider.

    The module itself is left as it is: its own buffers and parameters are replaced for the call alone.
    """
    wide = torch.promote_types(norm.of.weight.dtype, torch.float32)
    own = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    own |= {"of.weight": weight}
    if own.get("of.bias") is not None:
        own["of.bias"] = torch.zeros_like(own["of.bias"]) if bias is None else bias
    own = {name: t.to(wide) if t.is_floating_point() else t for name, t in own.items()}
    return torch.func.functional_call(norm, own, (x.to(wide),))


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, each measured by 1 + |wanted|."""
    return float(((got - wanted).abs() / (1 + wanted.abs())).max())


def _epsilons(module: nn.Module, dtype: torch.dtype) -> list[float]:
    """What the module may add to the variance: its numbers called eps, epsilon, variance_epsilon and the like."""
    if _takes_default_eps(module):
        return [torch.finfo(dtype).eps]
    named = {**vars(module), **module._buffers}
    values = [value for name, value in named.items() if "eps" in name.lower()]
    return [
        float(v) for v in values if isinstance(v, (int, float)) or (torch.is_tensor(v) and v.numel() == 1)
    ]


def _takes_default_eps(module: nn.Module) -> bool:
    return getattr(module, "eps", 0.0) is None


def _default_eps(module: nn.Module, name: str) -> float:
    """The eps of a norm that leaves it to PyTorch: that of its input's dtype or of float32, as the version has it.

    Tried in the module's own dtype. Where the two differ, in a narrow dtype or in float64, their ratio is in
    the thousands, so the better fit is clear in any rounding.
    """
    own = module.weight
    x = 1e-3 * torch.randn(3, own.shape[0], generator=torch.Generator().manual_seed(0))
    x = x.to(own)
    values = {"of.weight": torch.ones_like(own)}
    if getattr(module, "bias", None) is not None:
        values["of.bias"] = torch.zeros_like(module.bias)
    got = torch.func.functional_call(Unhooked(module), values, (x,)).float()
    choices = [torch.finfo(dtype).eps for dtype in (own.dtype, torch.float32)]
    return min(choices, key=lambda eps: _error(got, normalised(x, name, eps)))
