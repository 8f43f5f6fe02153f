"""Which attention a proxy runs: flash-attn where it can be used, otherwise PyTorch's own, and why.

All of them compute the same function and differ in rounding, as devices and kernels do, so sketches made with one
mix with those of another, and the choice is no part of a run's spec. Where it would not be the same function (sdpa
leaves out the cap that Gemma 2 puts on attention scores) sdpa is refused.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from gvendi_fast.errors import GvendiError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLASH = "flash_attention_2"
ATTENTIONS = ("sdpa", "eager", FLASH)
_CAPABILITY = (8, 0)


def resolve_attention(
    attention: str | None,
    device: torch.device,
    dtype: torch.dtype,
    config: PretrainedConfig | None = None,
) -> tuple[str, str]:
    """The attention of a model and one clause that says why.

    attention: None for the choice of the package, or one of "sdpa", "eager", "flash_attention_2". config: the
    model's; without it, the choice for a model that supports all of them. Raises GvendiError for a name that is
    unknown and for a choice that cannot be used, with the remedy.
    """
    if attention not in (None, *ATTENTIONS):
        raise GvendiError(
            f"attention={attention!r} is unknown; give one of {', '.join(map(repr, ATTENTIONS))}, or leave it out"
        )
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if attention == "sdpa" and capped:
        raise GvendiError(
            "attention='sdpa' leaves out the cap that this model puts on attention scores; give 'eager', or leave it "
            "out"
        )
    missing = why_no_flash(device, dtype, config)
    if attention == FLASH and missing:
        raise GvendiError(
            f"attention={FLASH!r} cannot be used: {missing}; leave it out (--attention auto) or give "
            f"{'eager' if capped else 'sdpa'!r}"
        )
    if attention is not None:
        return attention, "asked for"
    if missing is None:
        return FLASH, f"flash-attn {metadata.version('flash-attn')} is installed"
    if capped:
        return "eager", f"the model caps attention scores, which sdpa cannot; {missing}"
    return "sdpa", missing


def why_no_flash(
    device: torch.device, dtype: torch.dtype, config: PretrainedConfig | None = None
) -> str | None:
    """The reason for which flash-attn cannot run, or None."""
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "flash-attn needs compute capability 8.0 or later"
    found = next(metadata.distributions(name="flash-attn"), None)
    if found is None:
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return f"transformers cannot use the flash-attn {found.version} that is installed"
    if config is not None and not (
        _supports(config, "_supports_flash_attn") or _supports(config, "_supports_flash_attn_2")
    ):
        return "the model does not support flash-attn in transformers"
    return None


def _supports(config: PretrainedConfig, flag: str) -> bool:
    """Whether transformers' model of a config has a flag; False for a model whose code it does not bring."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    return bool(getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], flag, False))


class _NeverPacked:
    """Stands in for transformers' function while threads run passes of ours; one object, so that compilers know it."""

    def __init__(self) -> None:
        self.lock, self.passes, self.plain = threading.Lock(), Counter(), None

    def __call__(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        ours = torch.compiler.is_compiling() or self.passes[threading.get_ident()] > 0
        return None if ours else self.plain(position_ids)


_never_packed = _NeverPacked()


@contextmanager
def never_packed() -> Iterator[None]:
    """transformers without its look for several sequences in one row of a batch, in this thread: ours hold one each.

    It would read position ids from the GPU once a forward pass, and wait for it. A compiler, which cannot read, would
    take every batch for a packed one and build masks [B, 1, T, T] for it.
    """
    from transformers import masking_utils

    name, state, thread = "find_packed_sequence_indices", _never_packed, threading.get_ident()
    if not hasattr(masking_utils, name):
        yield
        return
    with state.lock:
        if not state.passes.total():
            state.plain = getattr(masking_utils, name)
            setattr(masking_utils, name, state)
        state.passes[thread] += 1
    try:
        yield
    finally:
        with state.lock:
            state.passes[thread] -= 1
            if not state.passes.total():
                setattr(masking_utils, name, state.plain)
