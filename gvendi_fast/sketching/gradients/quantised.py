"""Linear layers whose weight is stored in a code instead of as a matrix of floats: quantised ones.

A sketch needs the input a of a layer and the gradient e of its output, and never the weight. So a quantised layer is
sketched as the layer that it computes: its gradient is that with respect to the weight as used [O, I], whatever form
that is stored in, under the name that the weight of the plain layer has.

What it takes is that the library passes the gradient on to the layer's input, W^T e. Some do not, and say nothing: the
kernels are made for inference, the output does not depend on the input as far as autograd knows, and a gradient lacks
all that goes through the layer. So every layer is tried once, on random rows: it has to be linear, and the gradient of
its input has to be that of what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.names import named_modules, named_parameters

# Largest relative error of the trial. bfloat16 within a layer gives 0.003, activations rounded to 8 bits 0.01 and to
# 4 bits 0.1; a layer that is not linear, or a gradient of something else, about 1.
TOLERANCE = 0.05
# Kernels for matrices want 16 rows.
ROWS = 16
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class QuantisedLayer:
    """A linear layer with a coded weight.

    path: canonical. module: the layer. stored: the tensor that holds the code; the first, if there are several.
    """

    path: str
    module: nn.Module
    stored: Tensor

    @property
    def weight(self) -> str:
        """The name that the weight of the plain layer has."""
        return f"{self.path}.weight" if self.path else "weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight as used."""
        return self.module.out_features, self.module.in_features

    @property
    def library(self) -> str:
        """The package that the code is of, as far as its classes say."""
        return _package(self.stored) or type(self.module).__module__.partition(".")[0]


def quantised_layers(model: nn.Module) -> list[QuantisedLayer]:
    """The layers of a model whose weight is stored in a code, in order."""
    found = []
    for path, module in named_modules(model):
        codes = [t for t in stored_tensors(module).values() if is_code(t)] if is_quantised(module) else []
        if codes:
            found.append(QuantisedLayer(path, module, codes[0]))
    return found


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is stored in a code."""
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(width, int) for width in widths):
        return False
    stored = stored_tensors(module).values()
    size = widths[0] * widths[1]
    is_plain = any(not is_code(t) and t.is_floating_point() and t.numel() == size for t in stored)
    return not is_plain and any(map(is_code, stored))


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers that are not its bias."""
    own = {**module._parameters, **module._buffers}
    return {name: t for name, t in own.items() if t is not None and name != "bias"}


def is_code(tensor: Tensor) -> bool:
    """Whether a tensor holds a code: numbers of a narrow format, or a library's own kind of tensor."""
    return tensor.dtype not in _PLAIN or _package(tensor) != ""


def _package(tensor: Tensor) -> str:
    """The package of a tensor's class, empty if that is torch's own."""
    # A parameter that holds another kind of tensor shows it in its data alone.
    for kind in (type(tensor), type(tensor.data)):
        package = kind.__module__.partition(".")[0]
        if package not in ("torch", "builtins"):
            return package
    return ""


def check_quantised(layers: Iterable[QuantisedLayer], dtype: torch.dtype) -> None:
    """Try every layer on random rows of this dtype.

    Raises GvendiError naming the library, the layer, what is wrong and the remedy where a layer gives no gradient of
    its input or another one than that of its output, and where it is not linear.
    """
    for layer in layers:
        wrong = why_not(layer, dtype)
        if wrong:
            raise GvendiError(
                f"layer {layer.path!r} ({type(layer.module).__name__} of {layer.library}, quantised) cannot be "
                f"sketched on {layer.stored.device.type}: {wrong}; take weights that are dequantised (transformers: "
                "model.dequantize(), or dequantize=True in the quantization config), or a library whose layers hand "
                "gradients on (bitsandbytes; torchao with weights alone quantised)"
            )


def why_not(layer: QuantisedLayer, dtype: torch.dtype) -> str:
    """Why a layer's gradient cannot be sketched, empty if it can; rows of its input are of this dtype."""
    module, device = layer.module, layer.stored.device
    if getattr(getattr(layer.stored, "quant_state", None), "packing_format_for_cpu", False):
        return (
            "it has run without a gradient before, for which bitsandbytes packs weights anew on this CPU, rounding "
            "their scales; load the model again for sketches"
        )
    generator = torch.Generator().manual_seed(0)

    def normal(width: int) -> Tensor:
        return torch.randn(ROWS, width, generator=generator).to(device, dtype)

    x, other, e = normal(module.in_features), normal(module.in_features), normal(module.out_features)
    x.requires_grad_()
    with torch.enable_grad():
        try:
            y = module(x)
            (gradient,) = torch.autograd.grad(y, x, e, allow_unused=True) if y.requires_grad else (None,)
            # Rows that require a gradient: some libraries choose another kernel for those that do not.
            ahead, beside, zero = (
                module(rows.requires_grad_()).detach()
                for rows in (other, (x.detach() + other), 0 * other.detach())
            )
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError) as error:
            return f"a trial ends with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if gradient is None:
        return (
            "its output hands no gradient on to its input (activations that are rounded too, or a kernel that has "
            "no backward pass)"
        )
    x, y, other = x.detach().double(), y.detach().double() - zero.double(), other.detach().double()
    bent = _relative(ahead.double() - zero.double() + y, beside.double() - zero.double())
    if not bent <= TOLERANCE:
        return (
            f"it is not linear in its input (relative error {bent:.2g} on random rows, {TOLERANCE} allowed)"
        )
    # <e_r, y_s> = <W^T e_r, x_s> for all rows r and s.
    differs = _relative(gradient.double() @ x.T, e.double() @ y.T)
    if not differs <= TOLERANCE:
        return (
            f"the gradient of its input is not that of what it computes (relative error {differs:.2g} on random rows, "
            f"{TOLERANCE} allowed)"
        )
    return ""


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted))


def keep_gradients(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Keep layers that would repack their weight on a CPU, into a form without gradients, from doing so.

    Returns what lets them again.
    """
    # bitsandbytes does in eval mode, for an input that requires no gradient, such as that of a trial run.
    packing = [m for m in modules if m.__dict__.get("support_avx512bf16_for_cpu")]
    for module in packing:
        module.support_avx512bf16_for_cpu = False

    def restore() -> None:
        for module in packing:
            module.support_avx512bf16_for_cpu = True

    return restore


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by canonical name, in order: for a coded weight the tensor that holds its code."""
    stored = {
        id(layer.module): (layer.stored, stored_tensors(layer.module)) for layer in quantised_layers(model)
    }
    return named_parameters(model, stored)


def parameter_count(model: nn.Module) -> int:
    """The numbers that a model's parameters stand for; a tied one counts once."""
    sizes = {id(p): p.numel() for p in parameters_by_name(model).values()}
    sizes |= {id(layer.stored): math.prod(layer.shape) for layer in quantised_layers(model)}
    return sum(sizes.values())
