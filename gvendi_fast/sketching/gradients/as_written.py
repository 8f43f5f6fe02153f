"""A compiled model runs as it is written while it is tapped, and compiled again afterwards.

A graph of torch.compile is of the model without its taps, and one with taps would have to be compiled beside it, for
tens of seconds and for every N-th step alone. So what is compiled in a tapped model is put aside while the tap is
attached. What cannot be found from the model (a compiled function around it, a compiler that somebody else holds the
wrapper of) comes upon a call that no graph can hold: compilers break there, and run the model as it is written.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gvendi_fast.sketching.gradients.forward import Forward
from gvendi_fast.sketching.gradients.names import is_a

_REASON = (
    "a gvendi tap is attached to the model, and its sketches are taken outside of graphs; compile without "
    "fullgraph=True, tap the compiled module itself, or run tapped steps under "
    "torch.compiler.set_stance('force_eager')"
)


@functools.cache
def breaking() -> Callable[[Callable[..., Any], Sequence[Any], dict[str, Any]], Any]:
    """A function (run, args, kwargs) that gives run(*args, **kwargs), and that no compiler traces."""
    # The reason came with torch 2.7.
    takes = inspect.signature(torch.compiler.disable).parameters
    return torch.compiler.disable(_call, **({"reason": _REASON} if "reason" in takes else {}))


def _call(run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return run(*args, **kwargs)


class AsWritten(Forward):
    """A module that runs outside of the graph of whatever calls it. failed: called where it ends by an exception."""

    def __init__(self, module: nn.Module, failed: Callable[[], None]) -> None:
        super().__init__(module)
        self._breaking, self._failed = breaking(), failed

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward gives."""
        if torch.compiler.is_dynamo_compiling():
            return self._breaking(self.inner, args, kwargs)
        try:
            return self.inner(*args, **kwargs)
        except BaseException:
            self._failed()
            raise


def put_aside(model: nn.Module, undo: list[Callable[[], object]]) -> bool:
    """Modules of a tree that are compiled run as they are written until it is undone; whether there are any."""
    found = False
    for module in list(model.modules()):
        own = module.__dict__
        if own.get("_compiled_call_impl") is not None:
            # By module.compile().
            undo.append(partial(own.__setitem__, "_compiled_call_impl", own["_compiled_call_impl"]))
            own["_compiled_call_impl"] = None
            found = True
        forward = own.get("forward")
        if is_a(module, "torch._dynamo.eval_frame", "OptimizedModule"):
            undo.append(partial(own.__setitem__, "forward", forward))
            own["forward"] = own["_modules"]["_orig_mod"]
            found = True
        elif (before := getattr(forward, "_torchdynamo_orig_callable", None)) is not None:
            undo.append(partial(own.__setitem__, "forward", forward))
            own["forward"] = before
            found = True
    return found
