"""What the tests of the CUDA kernels without a GPU share: the emulated module, and inputs with NaN around them.

csrc/tests/cuda_emulate.h stands in for the device: barriers, shuffles and tensor-core fragments as documented, shared
memory full of NaN before each block, threads in an order of choice. The wrapper is the real one
(kernels/backends/cuda.py), on CPU tensors. Results are judged by the rule of tolerance.py; the emulated tensor cores
round to nearest.
"""

import contextlib
import functools
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from kept_builds import kept
from places import ROOT

from gvendi_fast.kernels.backends import cuda

SOURCES = ROOT / "csrc" / "cuda"
COMPILER = os.environ.get("CXX", "c++")
if shutil.which(COMPILER) is None:
    pytest.skip(f"needs a C++ compiler, {COMPILER} is not there", allow_module_level=True)


@functools.cache
def build():
    """The kernels and their bindings as a Python module of host code.

    It stays in pytest's cache for as long as it would be made of the same again.
    """
    includes = subprocess.run(
        [sys.executable, "-m", "pybind11", "--includes"], capture_output=True, text=True, check=True
    ).stdout.split()
    definitions = {"EMULATE": "1", "MODULE": "_cuda_emulated", "VERSION": '"0"', "ARCHITECTURES": '"none"'}
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", *includes]
    command += [f"-DGVENDI_{name}={value}" for name, value in definitions.items()]
    command += ["-x", "c++", *map(str, sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.cu")]))]
    target = kept("cuda-emulated", COMPILER, extra=" ".join(command)) / "_cuda_emulated.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            done = subprocess.run([*command, "-o", f"{folder}/made.so"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(f"{folder}/made.so", target)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(monkeypatch):
    """Put the emulated module in place of the real one, for tensors on the CPU; return it."""
    module = build()
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(cuda, "_place", lambda x: contextlib.nullcontext((0, 0)))
    module.set_thread_order(0)
    return module


def far_apart(rows: int, width: int, path: Path) -> torch.Tensor:
    """bfloat16 rows 2^30 elements apart in a sparse file, so that offsets pass 2^31."""
    stride = 1 << 30
    memory = torch.from_file(str(path), shared=True, size=(rows - 1) * stride + width, dtype=torch.bfloat16)
    x = memory.as_strided((rows, width), (stride, 1))
    x.copy_(draw(rows, width, torch.bfloat16, 1))
    return x


def draw(rows: int, width: int, dtype: torch.dtype, seed: int, margin: int = 9) -> torch.Tensor:
    """Rows with NaN before, between and behind them, so that a read outside shows."""
    x = torch.full((rows + 2, width + margin), math.nan)
    x[1:-1, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[1:-1, :width]


def guarded(samples: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A result of ones [samples, dim] and the wider memory it lies in, whose other entries must stay 7."""
    memory = torch.full((samples + 2, dim), 7.0)
    memory[1:-1] = 1
    return memory[1:-1], memory


def spans(rows: int) -> torch.Tensor:
    """Two samples of uneven length, an empty one, one that leaves the last row out, and one of all rows."""
    cut = [0, rows // 3, rows // 3, max(rows - 1, rows // 3)]
    return torch.tensor([[0, cut[1]], [cut[1], cut[2]], [cut[2], cut[3]], [0, rows]])
