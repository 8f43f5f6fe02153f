"""Attention over short sequences on a CPU, in float32 where the model computes in bfloat16 or float16.

    out = softmax(q k^T / sqrt(d) + mask) v,  q, k, v [B, H, T, d]
PyTorch's fused CPU attention in bfloat16 spends most of a short sequence's backward pass on converting blocks. The same
kernel in float32 took 0.35 to 0.58 times as long for up to 128 tokens a sequence, 0.71 to 1.05 for 256 and 1.04 for 512
(benchmarks/speed/bench_attention.py, 2 threads, CPU with AVX-512 BF16), and rounds less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# Longest sequence for which float32 was faster at one width and within 5 % at the other.
LONGEST = 256


class ShortAttention(TorchFunctionMode):
    """Inside this block, attention of at most `LONGEST` CPU tokens in bfloat16 or float16 is computed in float32."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention or not _is_short(args):
            return function(*args, **kwargs)
        query, key, value, *rest = args
        # A mask that is added has the type of the queries.
        rest = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rest]
        added = kwargs.get("attn_mask")
        if added is not None and added.is_floating_point():
            kwargs = {**kwargs, "attn_mask": added.float()}
        return function(query.float(), key.float(), value.float(), *rest, **kwargs).to(query.dtype)


def short_attention(model: torch.nn.Module) -> AbstractContextManager:
    """`ShortAttention` for a model that it is made for, otherwise a block that changes nothing."""
    weight = next(model.parameters())
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return ShortAttention() if weight.device.type == "cpu" and half else nullcontext()


def _is_short(args: Sequence[Any]) -> bool:
    # Transformers gives queries, keys and values by position.
    return len(args) > 2 and args[0].dtype in (torch.bfloat16, torch.float16) and args[0].shape[-2] <= LONGEST
