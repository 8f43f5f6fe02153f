"""Uses of watched parameters in a training step: when they are looked at, and what is done about one out of sight.

Operations are seen while the model's forward pass runs, and while an activation checkpoint runs a part of it again in
the backward pass, which may be in autograd's own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.forward import Forward
from gvendi_fast.sketching.gradients.parameter_uses import Watched


class RunAgain(Forward):
    """A module that a checkpoint may run again; `context()` is what it then runs in."""

    def __init__(self, module: nn.Module, context: Callable[[], AbstractContextManager]) -> None:
        super().__init__(module)
        self.context = context

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        if torch._C._current_graph_task_id() == -1:
            return self.inner(*args, **kwargs)
        with self.context():
            return self.inner(*args, **kwargs)


# Where layers of transformers keep the function that runs them under a checkpoint, without a call of the module.
_CHECKPOINT = "_gradient_checkpointing_func"


def checkpoint_seen(module: nn.Module, context: Callable[[], AbstractContextManager]) -> Callable[[], object]:
    """Have what a layer's checkpoint runs again run in `context()`. Returns what undoes it."""
    own = module.__dict__.get(_CHECKPOINT)
    if own is None:
        return lambda: None

    def checkpointed(function: Callable, *args: Any, **kwargs: Any) -> Any:
        def again(*given: Any, **named: Any) -> Any:
            if torch._C._current_graph_task_id() == -1:
                return function(*given, **named)
            with context():
                return function(*given, **named)

        return own(again, *args, **kwargs)

    setattr(module, _CHECKPOINT, checkpointed)
    return lambda: setattr(module, _CHECKPOINT, own)


def around(
    model: nn.Module, followed: Sequence[nn.Module], tapped: Sequence[nn.Module]
) -> Iterator[nn.Module]:
    """The modules under a model that hold, or are, one whose uses or rows are followed, save those with a tap."""
    wanted, has_tap = {id(module) for module in followed}, {id(module) for module in tapped}
    for module in model.modules():
        if module is model or id(module) in has_tap or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        if any(id(part) in wanted for part in module.modules()):
            yield module


def hidden_use(watched: Sequence[Watched], names: Sequence[str]) -> GvendiError:
    """The error for parameters that a training step uses by an operation that nothing sees."""
    experts = [w for w in watched if w.name in names and hasattr(type(w.module), "_apply_gate")]
    remedy = (
        "choose a way that is known, model.set_experts_implementation('grouped_mm') (or 'batched_mm', 'eager'), before "
        "the tap is attached"
        if experts
        else "switch the fused kernel off"
    )
    return GvendiError(
        f"the parameters {', '.join(map(repr, names))} are used in this training step by an operation that hides what "
        f"it does (a fused kernel, an autograd function of its own), so their sketch would not be whole; {remedy}, or "
        f"leave them out with exclude={list(names)}"
    )
