"""The CUDA kernels without a GPU: their source compiled as host C++, every block run thread by thread.

emulated_cuda.py says how. The dense mode's kernels have test_cuda_emulated_dense.py.
"""

import pytest
import torch
from emulated_cuda import DTYPES, draw, far_apart, guarded, spans, stand_in
from plain import fold32, fold_hadamard32, linear32
from tolerance import check

from gvendi_fast.kernels import reference
from gvendi_fast.kernels.backends import cuda
from gvendi_fast.kernels.sketch_matrix import Table, make_table

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


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    return stand_in(monkeypatch)


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
    parts = [(e, e_table), (second, second_table)]
    torch32 = linear32(a, a_table, parts, segments)
    out, memory = guarded(len(segments), dim)
    cuda.linear_sketch(a, a_table, parts, segments, out)
    check(out, torch32 + 1, want + 1)
    assert (memory[[0, -1]] == 7).all()

    transformed, memory = guarded(rows, dim)
    cuda.fold_hadamard(a, a_table, transformed)
    check(transformed, fold_hadamard32(a, a_table), reference.fold_hadamard(a, a_table))
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
    check(out, linear32(a, a_table, parts, segments), want)


def test_rows_that_are_far_apart(tmp_path):
    x, segments = far_apart(4, 70, tmp_path / "rows"), torch.tensor([[0, 4]])
    table = make_table(0, "x", 70, 64)
    folded, out = torch.zeros(4, 64), torch.zeros(1, 64)
    cuda.fold_hadamard(x, table, folded)
    check(folded, fold_hadamard32(x, table), reference.fold_hadamard(x, table))
    cuda.linear_sketch(x, table, [(x, table)], segments, out)
    want = reference.linear_sketch(x, x, segments, table, table)
    check(out, linear32(x, table, [(x, table)], segments), want)


def test_refuses_more_blocks_than_a_grid_has(emulated):
    # 2^37 blocks; as an unsigned int they would be none.
    with pytest.raises(RuntimeError, match="fold_hadamard: invalid configuration"):
        emulated.fold_hadamard((0, 0, 0, 0, 0), 1 << 40, 64, 0, 0, 0)


def results(dim: int, order: int, emulated, pick=slice(None)):
    """Both kernels on one batch of four samples; `pick` chooses samples."""
    emulated.set_thread_order(order)
    segments = torch.tensor([[0, 3], [3, 3], [3, 21], [21, 50]])[pick].contiguous()
    a, e = draw(50, 100, torch.bfloat16, 1), draw(50, dim + 70, torch.bfloat16, 2)
    a_table, e_table = make_table(0, "a", 100, dim), make_table(0, "e", dim + 70, dim)
    linear, folded = torch.zeros(len(segments), dim), torch.zeros(3, dim)
    cuda.linear_sketch(a, a_table, [(e, e_table)], segments, linear)
    cuda.fold_hadamard(e[:3], e_table, folded)
    return linear, folded


@pytest.mark.parametrize("dim", [64, 512, 1024, 4096])
def test_bits_do_not_depend_on_the_order_of_the_threads(dim, emulated):
    plain = results(dim, 0, emulated)
    for order in (1, 2):
        assert all(torch.equal(x, y) for x, y in zip(plain, results(dim, order, emulated), strict=True))


def test_a_sample_does_not_depend_on_its_batch(emulated):
    together, alone = results(1024, 0, emulated)[0], results(1024, 0, emulated, slice(2, 3))[0]
    assert torch.equal(together[2:3], alone)


def test_packing_refuses_a_table_with_a_collision_or_an_unknown_bin():
    table = make_table(0, "a", 64, 64)
    for value, reason in ((table.bucket[0], "shares a bin"), (64, "outside")):
        bucket = table.bucket.copy()
        bucket[5] = value
        with pytest.raises(ValueError, match=reason):
            cuda.fold_hadamard(torch.zeros(1, 64), Table(64, bucket, table.sign), torch.zeros(1, 64))
