"""The Triton kernels behind the operations' calling convention: float32, bfloat16 and float16 on NVIDIA GPUs.

They compile on first use. With TRITON_INTERPRET=1 set before Python starts they run interpreted on CPU tensors, for
tests, when this backend is named by `use_backend` or GVENDI_BACKEND. Results are the same
bits on every run and for any batch.
"""

from __future__ import annotations

import functools

import torch

try:
    import triton

    _missing = None
except ImportError as error:
    triton = None
    _missing = f"Triton cannot be imported ({error}); pip install triton (Linux, with an NVIDIA GPU)"

if triton is not None:
    from gvendi_fast.kernels.backends.triton.assign import assign
    from gvendi_fast.kernels.backends.triton.covariance import covariance
    from gvendi_fast.kernels.backends.triton.dense_sketch import dense_sketch
    from gvendi_fast.kernels.backends.triton.entropy import entropy
    from gvendi_fast.kernels.backends.triton.expert_sketch import expert_sketch
    from gvendi_fast.kernels.backends.triton.fold_hadamard import fold_hadamard
    from gvendi_fast.kernels.backends.triton.gain import gain
    from gvendi_fast.kernels.backends.triton.hadamard import hadamard
    from gvendi_fast.kernels.backends.triton.linear_sketch import linear_sketch
    from gvendi_fast.kernels.backends.triton.softmax_fold import softmax_fold
    from gvendi_fast.kernels.backends.triton.token_sketch import token_sketch
    from gvendi_fast.kernels.backends.triton.vector_sketch import vector_sketch

    _kernels = (
        assign,
        covariance,
        dense_sketch,
        entropy,
        expert_sketch,
        fold_hadamard,
        gain,
        linear_sketch,
        softmax_fold,
        token_sketch,
        vector_sketch,
    )
    _ops = {kernel.__name__ for kernel in _kernels}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GAIN_DTYPES = (torch.float32, torch.float64)
_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter; decided when they were imported."""
    return triton is not None and not isinstance(hadamard, triton.JITFunction)


def status() -> str:
    """One line for `gvendi info`."""
    if _missing:
        return _missing
    if interpreted():
        return f"ready (Triton {triton.__version__}, interpreted; slow, for tests)"
    reason = _device_reason(torch.device("cuda")) if torch.cuda.is_available() else "torch sees no GPU"
    return f"not usable: {reason}" if reason else f"ready (Triton {triton.__version__})"


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """The reason why the kernels cannot run `op` on these tensors, or None."""
    if _missing:
        return _missing
    if op not in _ops:
        return f"{op} has no Triton kernel"
    dtypes = _GAIN_DTYPES if op == "gain" else _DTYPES
    # The second tensor of a covariance is its float64 sum.
    for tensor in tensors[:1] if op == "covariance" else tensors:
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            name, *usable = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
            return f"{name} is not supported by the Triton kernels; use {' or '.join(usable)}"
        if tensor.device.type != "cuda" and not interpreted():
            return f"a tensor is on {tensor.device}, but the Triton kernels need it on a GPU; move it with .cuda()"
    return None if interpreted() else _device_reason(tensors[0].device)


@functools.cache
def _device_reason(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        need, have = (".".join(map(str, version)) for version in (_CAPABILITY, capability))
        return f"the GPU has compute capability {have}, but the kernels need {need} or later"
    return None
