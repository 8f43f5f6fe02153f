"""Kernels compiled ahead of their first launch, for a GPU that need not be there."""

from __future__ import annotations

from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from gvendi_fast.backends.triton.runtime import Build

WARP = 32


def compile_build(build: Build, capability: int) -> CompiledKernel:
    """The build for a compute capability such as 90, from Triton's cache on disk if it is there."""
    types = {name: build.types.get(name, "constexpr") for name in build.kernel.arg_names}
    # Tensors are aligned to 16 bytes, as a launch would find them, or for kernels that do not ask, taken as they come.
    pointers = [
        param.num
        for param in build.kernel.params
        if types[param.name].startswith("*") and not param.do_not_specialize_on_alignment
    ]
    aligned = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(build.kernel, types, build.constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, WARP), options={"num_warps": build.warps}
    )


def tool(name: str) -> Path:
    """A program that Triton brings, such as cuobjdump."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
