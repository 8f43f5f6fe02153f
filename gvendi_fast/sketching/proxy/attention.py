"""Which attention a proxy runs: flash-attn where it can be used, otherwise PyTorch's own, and why.

All of them compute the same function and differ in rounding, as devices and kernels do, so sketches made with one
mix with those of another, and the choice is no part of a run's spec. Where it would not be the same function (sdpa
leaves out the cap that Gemma 2 puts on attention scores) sdpa is refused.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.proxy.text_config import text_config

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
    capped = getattr(text_config(config), "attn_logit_softcapping", None) is not None
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
        return attention, "requested"
    if missing is None:
        return FLASH, f"flash-attn {metadata.version('flash-attn')} is installed"
    if capped:
        return "eager", f"the model caps attention scores, which sdpa cannot; {missing}"
    return "sdpa", missing


def why_no_flash(
    device: torch.device, dtype: torch.dtype, config: PretrainedConfig | None = None
) -> str | None:
    """The reason why flash-attn cannot run, or None."""
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device, but this one is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "flash-attn needs compute capability 8.0 or later"
    installed = next(metadata.distributions(name="flash-attn"), None)
    if installed is None:
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return f"transformers cannot use the flash-attn {installed.version} that is installed"
    if config is not None and not (
        _supports(config, "_supports_flash_attn") or _supports(config, "_supports_flash_attn_2")
    ):
        return "the model does not support flash-attn in transformers"
    return None


def _supports(config: PretrainedConfig, flag: str) -> bool:
    """Whether transformers' model of a config has a flag; False for a model whose code it does not bring."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    known = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    model = next((models[type(config)] for models in known if type(config) in models), None)
    return bool(getattr(model, flag, False))


class _Answered:
    """A function of transformers that has one answer while threads run passes of ours, and is itself for all others.

    One object for all passes, so that a compiler knows it again.
    """

    def __init__(self, module: str, name: str, answer: bool | None) -> None:
        self.module, self.name, self.answer = module, name, answer
        # The thread of each pass, by the pass.
        self.passes: dict[object, int] = {}
        self.plain: Callable[..., Any] | None = None

    def __call__(self, *args, **kwargs) -> Any:
        if torch.compiler.is_dynamo_compiling() or threading.get_ident() in tuple(self.passes.values()):
            return self.answer
        return self.plain(*args, **kwargs)

    def enter(self, one: object) -> None:
        """A pass begins in this thread."""
        module = importlib.import_module(self.module)
        with _lock:
            # Earlier versions of transformers lack one of them.
            found = getattr(module, self.name, None)
            if found is not None and found is not self:
                self.plain = found
                setattr(module, self.name, self)
            self.passes[one] = threading.get_ident()

    def leave(self, one: object) -> None:
        """A pass ends, if it has begun; the last one puts the function back."""
        module = importlib.import_module(self.module)
        with _lock:
            self.passes.pop(one, None)
            if not self.passes and getattr(module, self.name, None) is self:
                # Kept: whoever imported this object by name meanwhile goes on calling it.
                setattr(module, self.name, self.plain)

    def forked(self) -> None:
        """In the child of a fork, where no other thread lives."""
        self.passes = {one: thread for one, thread in self.passes.items() if thread == threading.get_ident()}


_lock = threading.Lock()
_LOOKS = (
    _Answered("transformers.masking_utils", "find_packed_sequence_indices", None),
    _Answered("transformers.modeling_flash_attention_utils", "_is_packed_sequence", False),
)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for look in _LOOKS:
        look.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def never_packed() -> Iterator[None]:
    """transformers without its looks for several sequences in one row of a batch, in this thread: ours hold one each.

    They read position ids from the GPU and wait for it: one once a pass, the other, with flash-attn and a batch of one,
    in every layer. A compiler, which cannot read, would take every batch for a packed one and build masks [B, 1, T, T].
    """
    one = object()
    with undoing() as undo:
        for look in _LOOKS:
            undo.append(partial(look.leave, one))
            look.enter(one)
        yield
