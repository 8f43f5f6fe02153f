"""The proxy's blocks as graphs of torch.compile: where they are possible, where they pay, and what their errors mean.

One graph serves all blocks of a kind, so that compiling takes as long for 24 of them as for one; what is outside the
blocks (embedding, last norm, head) is one operator each and runs uncompiled.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.forward import Forward
from gvendi_fast.sketching.gradients.taps import blocks_of

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.probe import ProbedModel, Tapped
    from gvendi_fast.sketching.gradients.taps import Tap

COMPILES = ("auto", "on", "off")
# "auto" compiles from this many tokens on. On an H200 (benchmarks/results/nvidia-h200.json, a model of 0.5B parameters)
# the first compiled batch took 17 s and every 65,536 tokens 0.13 to 0.15 s less: paid back after 7 to 9 M tokens.
LEAST_TOKENS = 1 << 23


class CompileError(GvendiError):
    """The pass cannot be compiled; without compiling it can still be run."""


def choose_compile(asked: str, device: torch.device, tokens: int) -> tuple[bool, str]:
    """Whether the pass of a run over about `tokens` tokens is compiled, and one clause that says why.

    asked: "auto", "on" or "off". "auto" compiles on a GPU if the run is long enough to gain by it, and never on a CPU,
    where the eager pass is exact and about as fast. Raises GvendiError for another word, and for "on" if there is no
    compiler.
    """
    if asked not in COMPILES:
        raise GvendiError(f"compile={asked!r} is unknown; give one of {', '.join(map(repr, COMPILES))}")
    if asked == "off":
        return False, "requested"
    missing = why_no_compiler(device)
    if asked == "on":
        if missing:
            raise GvendiError(f"the pass cannot be compiled: {missing}; leave it out (--compile auto or off)")
        return True, "requested"
    if device.type != "cuda":
        return False, "the eager pass is the default on a CPU"
    if missing:
        return False, missing
    if tokens < LEAST_TOKENS:
        return False, f"about {tokens:,} tokens; compiling pays from {LEAST_TOKENS:,} on"
    return True, f"about {tokens:,} tokens"


def why_no_compiler(device: torch.device) -> str | None:
    """The reason why torch.compile has no compiler for a device, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return (
            None
            if has_triton()
            else "torch.compile needs Triton, which is not installed or does not support this GPU"
        )
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return "torch.compile needs a C++ compiler, and none is on PATH"
    return None


def find_blocks(model: nn.Module, taps: Sequence[Tap]) -> list[nn.Module]:
    """The blocks of a model, as `taps.blocks_of` finds them. Raises CompileError for a model that has none."""
    blocks = blocks_of(model, taps)
    if not blocks:
        raise CompileError(
            f"{type(model).__name__} has no list of blocks (torch.nn.ModuleList) that could be compiled; leave it "
            "uncompiled (compile=False, --compile off)"
        )
    return blocks


def compiled_blocks(blocks: Sequence[nn.Module], probed: ProbedModel) -> list[CompiledBlock]:
    """Forwards of blocks that share the graphs of one compiler, which works when a kind of block is first called."""
    # Sketchers of one model may differ in the hooks of others; by default hooks are not among what a graph is
    # checked for, and one sketcher would run another's graph.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    # Graphs are kept with a function's code, and no more than eight of them: this sketcher's are its own, and blocks
    # may all differ, with a mask and without. Torch before 2.7 may know the limit by its older name alone.
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), 2 * len(blocks)))
    own = FunctionType(_run.__code__.replace(), _run.__globals__, _run.__name__)
    compiled = torch.compile(own, fullgraph=True)
    return [CompiledBlock(block, compiled, probed) for block in blocks]


def _run(
    forward: Callable[..., Any],
    probed: ProbedModel,
    tapped: list[Tapped],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    # What is first met inside one of torch's own modules passes for a constant of the model: sizes of a batch, and
    # what differs between layers, are met here.
    _ = probed.probe.shape, probed.segments.shape, probed.ids.shape
    _ = [(part.module, None if part.group_probe is None else part.group_probe.shape) for part in tapped]
    return forward(*args, **kwargs)


class CompiledBlock(Forward):
    """A block whose forward is one graph, sketches inside, and the same graph as that of the other blocks of its kind.

    The graph serves batches of any shape: samples and lengths vary, and nothing else. (dynamic=True would make unknowns
    of every number of the model as well, and the compiler take more than twice the time.)
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any], probed: ProbedModel) -> None:
        super().__init__(module)
        self._compiled, self._probed = compiled, probed
        parts = {id(part) for part in module.modules()}
        self._tapped = [forward for forward in probed.tapped if id(forward.module) in parts]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's forward gives."""
        if not self._probed.runs_here():
            return self.inner(*args, **kwargs)
        # Where others have compiled the block, their compiler reads this, and chooses sizes itself.
        if not torch.compiler.is_dynamo_compiling():
            self._mark(args, kwargs)
        return self._compiled(self.inner, self._probed, self._tapped, args, kwargs)

    def _mark(self, args: tuple, kwargs: dict[str, Any]) -> None:
        sizes = set(self._probed.ids.shape)
        mark(self._probed.probe, [0])
        mark(self._probed.segments, [0])
        mark(self._probed.ids, [0, 1])
        for part in self._tapped:
            if part.group_probe is not None:
                mark(part.group_probe, [0])
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                # Hidden states [B, T, d], positions [B or 1, T, ...], masks [B or 1, 1, T, T].
                axes = range(x.dim() if x.dim() == 4 else min(x.dim(), 2))
                mark(x, [axis for axis in axes if x.shape[axis] in sizes])


def mark(x: torch.Tensor, axes: Sequence[int]) -> None:
    """Sizes along these axes vary from batch to batch; a compiler takes a size of 1 for a constant."""
    torch._dynamo.maybe_mark_dynamic(x, [axis for axis in axes if x.shape[axis] != 1])


@contextmanager
def foreign_compiler_errors() -> Iterator[None]:
    """What a compiler raises of a function that the model's own code has compiled comes out as GvendiError.

    A pass follows every operation, and a compiler cannot trace what follows. Modules that others compiled are put aside
    (`names.as_plain`), a function is nowhere to be found.
    """
    try:
        yield
    except Exception as error:
        # Where nobody has imported the compiler there is nothing of its own, and its import takes a second.
        kind = getattr(sys.modules.get("torch._dynamo.exc"), "TorchDynamoException", None)
        if kind is None or not isinstance(error, kind):
            raise
        first = str(error).strip().split("\n")[0]
        raise GvendiError(
            "the model's own code runs a function that is compiled (torch.compile), which no pass can follow "
            f"({type(error).__name__}: {first}); call this inside torch.compiler.set_stance('force_eager'), which runs "
            "it as it is written"
        ) from error


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
