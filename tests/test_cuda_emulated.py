"""The CUDA kernels without a GPU: their source compiled as host C++, every block run thread by thread.

csrc/tests/cuda_emulate.h stands in for the device: barriers, shuffles and tensor-core fragments as documented, shared
memory full of NaN before each block, threads in an order of choice. The wrapper of gvendi_fast.backends.cuda is the
real one, on CPU tensors. Tolerance as in tests/test_kernels_cpu.py; the emulated tensor cores round to nearest.
"""

import contextlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gvendi_fast import reference
from gvendi_fast.backends import cuda
from gvendi_fast.plan import Table, make_table
from gvendi_fast.signs import sign_key, signs

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
COMPILER = os.environ.get("CXX", "c++")
if shutil.which(COMPILER) is None:
    pytest.skip(f"needs a C++ compiler, {COMPILER} is not there", allow_module_level=True)

FLOOR = 4 * 2.0**-24
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
# Rows, input width, output width, K: below, at and above K; narrow, wide, and with a narrow rest.
SHAPES = [
    (0, 16, 16, 64),
    (1, 1, 16, 64),
    (7, 50, 63, 64),
    (1000, 64, 200, 64),
    (64, 40, 300, 128),
    (65, 200, 63, 256),
    (7, 512, 1000, 512),
    (65, 288, 50, 1024),
    (63, 896, 1025, 1024),
    (17, 200, 2100, 2048),
    (5, 4097, 300, 4096),
    (3, 8192, 9000, 8192),
]
# Rows, input width, output width, K, NaN between rows (a multiple of 8: vector loads).
DENSE_SHAPES = [
    (0, 16, 16, 64, 0),
    (1, 1, 17, 64, 9),
    (7, 136, 9, 64, 8),
    (63, 130, 9, 64, 9),
    (64, 45, 3, 192, 3),
    (65, 256, 8, 128, 0),
    (1000, 24, 2, 64, 0),
    (20, 5, 2, 1088, 9),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    target = tmp_path_factory.mktemp("cuda") / "_cuda_emulated.so"
    includes = subprocess.run(
        [sys.executable, "-m", "pybind11", "--includes"], capture_output=True, text=True, check=True
    ).stdout.split()
    definitions = {"EMULATE": "1", "MODULE": "_cuda_emulated", "VERSION": '"0"', "ARCHITECTURES": '"none"'}
    files = ["bindings.cpp", "pack.cpp", "fold_hadamard.cu", "linear_sketch.cu", "dense_sketch.cu"]
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", *includes]
    command += [f"-DGVENDI_{name}={value}" for name, value in definitions.items()]
    command += ["-x", "c++", *(str(SOURCES / name) for name in files), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("_cuda_emulated", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _emulate(emulated, monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", emulated)
    monkeypatch.setattr(cuda, "_place", lambda x: contextlib.nullcontext((0, 0)))
    emulated.set_thread_order(0)


def fold32(x: torch.Tensor, table: Table) -> torch.Tensor:
    bucket, sign = torch.tensor(table.bucket, dtype=torch.int64), torch.tensor(table.sign)
    return torch.zeros(x.shape[0], table.dim).index_add_(1, bucket, x.float() * sign)


def hadamard32(x: torch.Tensor) -> torch.Tensor:
    step = 1
    while step < x.shape[-1]:
        low, high = x.reshape(*x.shape[:-1], x.shape[-1] // (2 * step), 2, step).unbind(-2)
        x = torch.stack([low + high, low - high], -2).reshape(x.shape)
        step *= 2
    return x


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    return (
        float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-300)) if want.numel() else 0.0
    )


def check(got: torch.Tensor, torch32: torch.Tensor, want: torch.Tensor) -> None:
    assert error(got, want) <= 2 * error(torch32, want) + FLOOR


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


@DTYPES
@pytest.mark.parametrize(("rows", "width_in", "width_out", "dim"), SHAPES)
def test_linear_sketch(rows, width_in, width_out, dim, dtype):
    a, e, second = (
        draw(rows, width_in, dtype, 1),
        draw(rows, width_out, dtype, 2),
        draw(rows, width_in, torch.float32, 3),
    )
    a_table, e_table = make_table(0, "a", width_in, dim), make_table(0, "e", width_out, dim)
    second_table, segments = make_table(0, "second", width_in, dim), spans(rows)
    want = reference.linear_sketch(a, e, segments, a_table, e_table)
    want += reference.linear_sketch(a, second, segments, a_table, second_table)
    folded = fold32(e, e_table) + fold32(second, second_table)
    product = hadamard32(fold32(a, a_table)) * hadamard32(folded)
    torch32 = reference.sum_segments(product, segments) / math.sqrt(dim)
    out, memory = guarded(len(segments), dim)
    cuda.linear_sketch(a, a_table, [(e, e_table), (second, second_table)], segments, out)
    check(out, torch32 + 1, want + 1)
    assert (memory[[0, -1]] == 7).all()

    transformed, memory = guarded(rows, dim)
    cuda.fold_hadamard(a, a_table, transformed)
    check(transformed, hadamard32(fold32(a, a_table)), reference.fold_hadamard(a, a_table))
    assert (memory[[0, -1]] == 7).all()
    out, memory = guarded(len(segments), dim)
    parts = [(e, e_table), (fold32(second, second_table), None)]
    cuda.linear_sketch(transformed, None, parts, segments, out)
    check(out, torch32 + 1, want + 1)


def test_more_parts_than_one_launch_takes():
    a, segments, a_table = draw(20, 30, torch.float32, 1), spans(20), make_table(0, "a", 30, 64)
    parts = [(draw(20, 40, torch.float32, 5 + i), make_table(0, f"e{i}", 40, 64)) for i in range(6)]
    out = torch.zeros(len(segments), 64)
    cuda.linear_sketch(a, a_table, parts, segments, out)
    want = sum(reference.linear_sketch(a, e, segments, a_table, table) for e, table in parts)
    assert error(out, want) <= 2.0**-20


def check_dense(a: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, dim: int) -> None:
    key = sign_key(0, "layer.weight")
    pi = torch.from_numpy(signs(key, 0, e.shape[1] * a.shape[1], dim))
    gradients = [
        (e[begin:end].float().T @ a[begin:end].float()).flatten() for begin, end in segments.tolist()
    ]
    torch32 = torch.stack(gradients) @ pi.float() / math.sqrt(dim)
    out, memory = guarded(len(segments), dim)
    cuda.dense_sketch(a, e, segments, key, out)
    check(out, torch32 + 1, reference.dense_sketch(a, e, segments, key, dim) + 1)
    assert (memory[[0, -1]] == 7).all()


@DTYPES
@pytest.mark.parametrize(("rows", "width_in", "width_out", "dim", "margin"), DENSE_SHAPES)
def test_dense_sketch(rows, width_in, width_out, dim, margin, dtype):
    check_dense(draw(rows, width_in, dtype, 1, margin), draw(rows, width_out, dtype, 2), spans(rows), dim)


def test_dense_sketch_of_more_samples_than_one_launch_takes():
    segments = torch.tensor([[i, i + i % 4] for i in range(0, 54, 3)])
    check_dense(draw(60, 20, torch.bfloat16, 1), draw(60, 10, torch.bfloat16, 2), segments, 64)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_dense_sketch_of_slabs_with_several_tiles(order, emulated):
    # 517 tiles of 128 coordinates in 512 slabs; seven of eight warps have no columns and run ahead.
    emulated.set_thread_order(order)
    a, e = draw(3, 517 * 128 - 5, torch.bfloat16, 1), draw(3, 1, torch.bfloat16, 2)
    check_dense(a, e, torch.tensor([[0, 2], [2, 3]]), 64)


def test_dense_sketch_of_factors_of_two_dtypes():
    check_dense(draw(9, 20, torch.bfloat16, 1), draw(9, 10, torch.float32, 2), torch.tensor([[0, 9]]), 64)


def results(dim: int, order: int, emulated, pick=slice(None)):
    """Every kernel on one batch of four samples; `pick` chooses samples."""
    emulated.set_thread_order(order)
    segments = torch.tensor([[0, 3], [3, 3], [3, 21], [21, 50]])[pick].contiguous()
    a, e = draw(50, 100, torch.bfloat16, 1), draw(50, dim + 70, torch.bfloat16, 2)
    a_table, e_table = make_table(0, "a", 100, dim), make_table(0, "e", dim + 70, dim)
    linear, dense = torch.zeros(len(segments), dim), torch.zeros(len(segments), 64)
    cuda.linear_sketch(a, a_table, [(e, e_table)], segments, linear)
    cuda.dense_sketch(a, e[:, :10], segments, sign_key(0, "w"), dense)
    folded = torch.zeros(3, dim)
    cuda.fold_hadamard(e[:3], e_table, folded)
    return linear, dense, folded


@pytest.mark.parametrize("dim", [64, 512, 1024, 4096])
def test_bits_do_not_depend_on_the_order_of_the_threads(dim, emulated):
    plain = results(dim, 0, emulated)
    for order in (1, 2):
        assert all(torch.equal(x, y) for x, y in zip(plain, results(dim, order, emulated), strict=True))


def test_a_sample_does_not_depend_on_its_batch(emulated):
    together, alone = results(1024, 0, emulated), results(1024, 0, emulated, slice(2, 3))
    for x, y in zip(together[:2], alone[:2], strict=True):
        assert torch.equal(x[2:3], y)


def test_packing_refuses_a_table_with_a_collision_or_an_unknown_bin():
    table = make_table(0, "a", 64, 64)
    for value, reason in ((table.bucket[0], "shares a bin"), (64, "outside")):
        bucket = table.bucket.copy()
        bucket[5] = value
        with pytest.raises(ValueError, match=reason):
            cuda.fold_hadamard(torch.zeros(1, 64), Table(64, bucket, table.sign), torch.zeros(1, 64))
