"""The compiled CPU kernels (csrc/cpu) behind the operations' calling convention: float32 and bfloat16.

Results are the same bits for any number of threads and on every instruction set. torch.get_num_threads() says
how many threads run; GVENDI_ISA forces an instruction set.
"""

from __future__ import annotations

import torch

from gvendi_fast.kernels.backends.cpu.extension import (
    _cpu,
    available_isas,
    current_isa,
    missing,
    set_isa,
    thread_count,
)
from gvendi_fast.kernels.backends.cpu.sketches import (
    dense_sketch,
    expert_sketch,
    fold_hadamard,
    linear_sketch,
    softmax_fold,
    token_sketch,
    vector_sketch,
)
from gvendi_fast.kernels.backends.cpu.spectral import assign, covariance, entropy, gain, product_error

__all__ = [
    "assign",
    "available_isas",
    "covariance",
    "current_isa",
    "dense_sketch",
    "entropy",
    "expert_sketch",
    "fold_hadamard",
    "gain",
    "linear_sketch",
    "product_error",
    "set_isa",
    "softmax_fold",
    "status",
    "token_sketch",
    "vector_sketch",
    "why_not",
]

_DTYPES = (torch.float32, torch.bfloat16)
_GAIN_DTYPES = (torch.float32, torch.float64)


def status() -> str:
    """One line for `gvendi info`."""
    if missing:
        return missing
    threads = f"{thread_count()} thread{'s' if thread_count() > 1 else ''}"
    openmp = "" if _cpu.OPENMP else ", built without OpenMP"
    return f"ready ({_cpu.current_isa()} of {', '.join(_cpu.available_isas())}; {threads}{openmp})"


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """The reason why the kernels cannot run `op` on these tensors, or None."""
    if missing:
        return missing
    if not hasattr(_cpu, op):
        return f"the compiled kernels were built before there was {op}; run pip install again"
    dtypes = _GAIN_DTYPES if op == "gain" else _DTYPES
    # The second tensor of a covariance is its float64 sum.
    for tensor in tensors[:1] if op == "covariance" else tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, but the compiled CPU kernels need it on the CPU"
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            name, first, second = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
            return f"{name} on a CPU is not supported by the compiled kernels; use {first} or {second}"
    return None
