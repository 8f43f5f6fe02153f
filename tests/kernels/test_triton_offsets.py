"""The Triton kernels on rows so far apart that an offset in 32 bits would wrap, against the fp64 definitions."""

from pathlib import Path

import pytest
import torch

from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import backend, use_backend
from gvendi_fast.kernels.sketch_matrix import SketchSpec, expert_row_tables, make_table

triton = backend("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if triton.why_not("fold_hadamard", torch.empty(0, device=DEVICE)):
    pytest.skip(f"Triton kernels: {triton.status()}", allow_module_level=True)

ROWS, WIDTH, K, STRIDE = 4, 70, 64, 1 << 30
# bfloat16 rows go into float32 sums of at most 280 terms; only softmax_fold rounds its result to bfloat16.
CLOSE = 1e-5


@pytest.fixture
def x(tmp_path: Path):
    """bfloat16 [ROWS, WIDTH], the last row 3 * 2^30 elements from the first; a sparse file where there is no GPU."""
    size = (ROWS - 1) * STRIDE + WIDTH
    if DEVICE.type == "cuda":
        memory = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    else:
        memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=torch.bfloat16)
    rows = memory.as_strided((ROWS, WIDTH), (STRIDE, 1))
    rows.copy_(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)))
    with use_backend("triton"):
        yield rows


def close(got: torch.Tensor, want: torch.Tensor, limit: float = CLOSE) -> bool:
    return float((got.double() - want).abs().max() / want.abs().max()) <= limit


def test_sketches(x):
    table, segments = make_table(0, "x", WIDTH, K), torch.tensor([[0, 3], [3, ROWS]])
    zeros = lambda: torch.zeros(2, K, device=DEVICE)  # noqa: E731
    assert close(ops.fold_hadamard(x, table), reference.fold_hadamard(x, table))
    want = reference.linear_sketch(x, x, segments, table, table)
    assert close(ops.linear_sketch(x, table, [(x, table)], segments, zeros()), want)
    experts, where = (
        expert_row_tables(SketchSpec(K), "e", 3, WIDTH),
        torch.tensor([2, 0, 0, 1], device=DEVICE),
    )
    want = reference.expert_sketch(x, x, where, where // 2, 2, experts, experts)
    assert close(ops.expert_sketch(x, x, where, where // 2, experts, experts, zeros()), want)
    ids = torch.tensor([0, 5, 9, 5], device=DEVICE)
    want = reference.token_sketch(ids, x, segments, make_table(0, "ids", 10, K), table)
    assert close(ops.token_sketch(ids, x, segments, make_table(0, "ids", 10, K), table, zeros()), want)
    want = reference.fold_hadamard(reference.vector_gradient(x, x, segments, "rms", 1e-6), table) / K**0.5
    assert close(ops.vector_sketch(x, x, segments, table, zeros(), "rms", 1e-6), want)


def test_covariance(x):
    out = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, device=DEVICE)
    assert close(ops.covariance(x, out), reference.covariance(x)[0])


def test_softmax_fold(x):
    table, labels = make_table(0, "x", WIDTH, K), torch.tensor([3, 69, 0, 8], device=DEVICE)
    loss, gradient, folded = reference.softmax_fold(x, labels, table)
    got_loss, got_folded = ops.softmax_fold(x, labels, table)
    assert close(got_loss, loss)
    assert close(got_folded, folded)
    assert close(x, gradient, 2.0**-8)
