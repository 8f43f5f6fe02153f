"""Kernels compiled ahead of their first launch, and the launches of a run recorded, both without a GPU.

A launch compiles what its arguments' types say, and besides which pointers are aligned to 16 bytes, which integers are
multiples of 16 and which are 1, unless the kernel does not specialise on them. Triton's cache on disk is keyed by its
version and settings, the kernel's source, all of these, the options and the target. So a build goes through Triton's
own launcher, with stand-ins for its arguments and for the driver: a later launch finds what it made.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton_builds import Build, builds

WARP, MULTIPLE, NO_MULTIPLE = 32, 16, 3
DTYPES = {
    "*fp32": torch.float32,
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp64": torch.float64,
    "*i16": torch.int16,
    "*i32": torch.int32,
    "*i64": torch.int64,
}


class Launch(NamedTuple):
    """A kernel, and the launcher's key of what it compiled of it: types, attributes, constants, options."""

    kernel: str
    key: str


class _Driver:
    """Names a target and has no device. Triton keeps what it compiled by device, so each of these is another one."""

    devices = itertools.count(-1, -1)

    def __init__(self, capability: int) -> None:
        self.capability, self.device = capability, next(self.devices)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)


@contextmanager
def without_gpu(capability: int) -> Iterator[None]:
    """Triton's launcher compiles for a compute capability such as 90, on any machine."""
    drivers = triton.runtime.driver
    # Asking for the active one would make one, which fails where there is no GPU.
    held = drivers._active
    drivers.set_active(_Driver(capability))
    try:
        yield
    finally:
        drivers._active = held


def compile_build(build: Build, capability: int) -> CompiledKernel:
    """The build for a compute capability such as 90, from Triton's cache on disk if it is there."""
    with without_gpu(capability):
        return build.kernel.warmup(*arguments(build), grid=(1,), num_warps=build.warps)


def compile_builds(names: Iterable[str], capability: int, processes: int) -> None:
    """The builds of these names, `processes` at once, into Triton's cache on disk, where launches find them.

    Raises what the first build that fails raises.
    """
    # A process that has CUDA must not be forked.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(functools.partial(_compile_named, capability), names):
            pass


def _compile_named(capability: int, name: str) -> None:
    compile_build(builds()[name], capability)


def arguments(build: Build) -> list[object]:
    """Stand-ins for what a launch passes: a dtype for an aligned tensor, numbers that are multiples of 16 or not."""
    found = []
    for name in build.kernel.arg_names:
        kind = build.types.get(name)
        if kind is None:
            found.append(build.constants[name])
        elif kind.startswith("*"):
            found.append(DTYPES[kind])
        elif kind == "fp32":
            found.append(0.5)
        else:
            multiple = build.multiples is None or name in build.multiples
            found.append(MULTIPLE if multiple else NO_MULTIPLE)
    return found


def launch_of(build: Build, capability: int = 90) -> Launch:
    """The launch that the build is made for."""
    run = functools.partial(build.kernel.warmup, *arguments(build), grid=(1,), num_warps=build.warps)
    (launch,) = recorded(run, capability)
    return launch


def recorded(run: Callable[[], object], capability: int = 90) -> set[Launch]:
    """Every distinct launch in run(), by Triton's own launcher up to where it would compile.

    Kernels do not run, so what they would write is not written. Kernels must not be interpreted in this process.
    """
    found = set()

    def note(fn: Any, key: str, **_: object) -> bool:
        found.add(Launch(fn.name, key))
        # Takes the place of the compilation, and with it of the launch.
        return True

    knobs = triton.knobs.runtime
    hook, knobs.jit_cache_hook = knobs.jit_cache_hook, note
    try:
        with without_gpu(capability):
            run()
    finally:
        knobs.jit_cache_hook = hook
    return found


def tool(name: str) -> Path:
    """A program that Triton brings, such as cuobjdump."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
