"""The proxy's pass as one graph of torch.compile: where it can be had, where it pays, and what its errors mean."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gvendi_fast.errors import GvendiError

COMPILES = ("auto", "on", "off")
# "auto" compiles from this many tokens on. A compiler takes about two minutes for a model of 24 layers, in which a GPU
# sketches some 20 M tokens; a saving of a quarter of the time pays that back after four times as many. To be set anew
# from benchmarks/results once a GPU's are there.
LEAST_TOKENS = 1 << 26


class CompileError(GvendiError):
    """The pass cannot be compiled; without compiling it can still be run."""


def choose_compile(asked: str, device: torch.device, tokens: int) -> tuple[bool, str]:
    """Whether the pass of a run over about `tokens` tokens is compiled, and one clause that says why.

    asked: "auto", "on" or "off". "auto" compiles on a GPU where the run is long enough to pay for it, and never on a
    CPU, where the eager pass is exact and about as fast. Raises GvendiError for another word, and for "on" where there
    is no compiler.
    """
    if asked not in COMPILES:
        raise GvendiError(f"compile={asked!r} is unknown; give one of {', '.join(map(repr, COMPILES))}")
    if asked == "off":
        return False, "asked for"
    missing = why_no_compiler(device)
    if asked == "on":
        if missing:
            raise GvendiError(f"the pass cannot be compiled: {missing}; leave it out (--compile auto or off)")
        return True, "asked for"
    if device.type != "cuda":
        return False, "the eager pass is the default on a CPU"
    if missing:
        return False, missing
    if tokens < LEAST_TOKENS:
        return False, f"about {tokens:,} tokens; compiling pays from {LEAST_TOKENS:,} on"
    return True, f"about {tokens:,} tokens"


def why_no_compiler(device: torch.device) -> str | None:
    """The reason for which torch.compile has no compiler for a device, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch.compile needs Triton, which is not there or not for this GPU"
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return "torch.compile needs a C++ compiler, and none is on PATH"
    return None


def compile_pass(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(inputs, targets, probe, segments)` compiled as one graph; the compiler works at the first call.

    The graph serves batches of any shape: samples, lengths and targets vary, and nothing else. (dynamic=True would
    make unknowns of every number of the model as well, and the compiler take more than twice the time.)
    """
    # Sketchers of one model differ in the hooks that they attach; by default hooks are no part of what a graph is
    # checked for, and one sketcher would run another's graph.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    compiled = torch.compile(run, fullgraph=True)

    def call(inputs: dict[str, torch.Tensor], targets: Sequence[torch.Tensor], *batch: torch.Tensor) -> Any:
        for x in inputs.values():
            torch._dynamo.maybe_mark_dynamic(x, [0, 1])
        for x in (*targets, *batch):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        if len(targets) == 1:
            # Without a chunked head they are the targets [B, T] themselves.
            torch._dynamo.maybe_mark_dynamic(targets[0], 1)
        return compiled(inputs, targets, *batch)

    return call


@contextmanager
def compiler_errors() -> Iterator[None]:
    """What a compiler raises inside the block comes out as CompileError, with its first line and the remedy."""
    from torch._dynamo import exc

    try:
        yield
    except (
        exc.TorchDynamoException,
        getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException),
    ) as error:
        first = str(error).strip().split("\n")[0]
        raise CompileError(
            f"the proxy's pass cannot be compiled ({type(error).__name__}: {first}); leave it uncompiled "
            "(compile=False, --compile off)"
        ) from error
