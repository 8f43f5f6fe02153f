"""The CUDA kernels without a GPU: their source compiled as host C++, every block run thread by thread.

emulated_cuda.py says how. One file, as it takes a dozen seconds to compile: linear sketches, then the dense mode.
"""

import math

import pytest
import torch
from emulated_cuda import draw, far_apart, guarded, spans, stand_in
from kernel_cases import cases
from plain import dense32, fold32, fold_hadamard32, linear32
from tolerance import check

from gvendi_fast.kernels import reference
from gvendi_fast.kernels.backends import cuda
from gvendi_fast.kernels.signs import MAX_IDS, sign_key
from gvendi_fast.kernels.sketch_matrix import Table, make_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


@cases(SHAPES, DTYPES, lambda shape: shape[0] == 1000)
def test_linear_sketch(shape, dtype):
    rows, width_in, width_out, dim = shape
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


KEY = sign_key(0, "weight")
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

# Rows, width, ids that occur, K.
TOKEN_SHAPES = [
    (0, 16, 3, 64),
    (1, 17, 1, 64),
    (7, 1, 1000, 64),
    (7, 128, 50, 192),
    (63, 201, 9, 64),
    (64, 128, 5, 1024),
    (65, 200, 25, 192),
    (300, 200, 11, 64),
    (300, 31, 1, 64),
    (20, 129, 4, 1088),
]


def check_dense(a: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, dim: int) -> None:
    """a, or ids in its place."""
    out, memory = guarded(len(segments), dim)
    cuda.dense_sketch(a, e, segments, KEY, out)
    want = reference.dense_sketch(a, e, segments, KEY, dim)
    check(out, dense32(a, e, segments, KEY, dim) + 1, want + 1)
    assert (memory[[0, -1]] == 7).all()


@cases(DENSE_SHAPES, DTYPES, lambda shape: False)
def test_dense_sketch(shape, dtype):
    rows, width_in, width_out, dim, margin = shape
    check_dense(draw(rows, width_in, dtype, 1, margin), draw(rows, width_out, dtype, 2), spans(rows), dim)


def test_dense_sketch_of_more_samples_than_one_launch_takes():
    segments = torch.tensor([[i, i + i % 4] for i in range(0, 54, 3)])
    check_dense(draw(60, 20, torch.bfloat16, 1), draw(60, 10, torch.bfloat16, 2), segments, 64)


# Every day three tiles of one group of tokens, below, run in both orders.
@pytest.mark.soak
@pytest.mark.parametrize("order", [1, 2])
def test_dense_sketch_of_slabs_with_several_tiles(order, emulated):
    # 517 tiles of 128 coordinates in 512 slabs; seven of eight warps have no columns and run ahead.
    emulated.set_thread_order(order)
    a, e = draw(3, 517 * 128 - 5, torch.bfloat16, 1), draw(3, 1, torch.bfloat16, 2)
    check_dense(a, e, torch.tensor([[0, 2], [2, 3]]), 64)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e18])
def test_samples_of_very_different_size_in_one_launch(size):
    a, e = draw(50, 130, torch.float32, 1), draw(50, 9, torch.float32, 2)
    a[20:] *= size
    segments = torch.tensor([[0, 20], [20, 50]])
    for left in (a, draw_ids(50, 7)):
        scaled = e * torch.where(torch.arange(50) < 20, 1.0, size)[:, None] if left is not a else e
        out = torch.zeros(2, 64)
        cuda.dense_sketch(left, scaled, segments, KEY, out)
        want = reference.dense_sketch(left, scaled, segments, KEY, 64)
        twin = dense32(left, scaled, segments, KEY, 64)
        for row in range(2):
            check(out[row], twin[row], want[row])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_number_that_is_not_finite_spoils_its_sample_alone(value):
    a, e = draw(40, 130, torch.float32, 1), draw(40, 9, torch.float32, 2)
    a[25, 3] = e[25, 3] = value
    for left in (a, draw_ids(40, 7)):
        out = torch.zeros(2, 64)
        cuda.dense_sketch(left, e, torch.tensor([[0, 20], [20, 40]]), KEY, out)
        assert torch.isfinite(out[0]).all()
        assert not torch.isfinite(out[1]).any()


def test_dense_sketch_of_factors_of_two_dtypes():
    check_dense(draw(9, 20, torch.bfloat16, 1), draw(9, 10, torch.float32, 2), torch.tensor([[0, 9]]), 64)


def draw_ids(rows: int, count: int, step: int = (MAX_IDS - 1) // 1000) -> torch.Tensor:
    """Ids among 0, step .. (count - 1) step: by default far apart, so that coordinates need 64 bits."""
    return step * torch.randint(0, count, (rows,), generator=torch.Generator().manual_seed(4))


@cases(TOKEN_SHAPES, DTYPES, lambda shape: shape in ((65, 200, 25, 192), (20, 129, 4, 1088)))
def test_tokens(shape, dtype):
    rows, width, count, dim = shape
    check_dense(draw_ids(rows, count), draw(rows, width, dtype, 2), spans(rows), dim)


@pytest.mark.parametrize("first", [0, 16])
def test_tokens_of_more_samples_than_one_launch_takes(first):
    # With first = 16, a launch whose samples are all empty.
    segments = torch.tensor([[0, 0]] * first + [[i, i + i % 4] for i in range(0, 54, 3)])
    check_dense(draw_ids(60, 7), draw(60, 20, torch.bfloat16, 2), segments, 64)


@pytest.mark.parametrize("order", [1, 2])
def test_tokens_of_one_group_with_several_tiles(order, emulated):
    # 20 ids of one group are three tiles; each warp has two samples, and seven of eight have no columns and run ahead.
    emulated.set_thread_order(order)
    ids = draw_ids(90, 20, step=emulated.dense_token_groups(130))
    assert len(ids.unique()) == 20
    segments = torch.tensor([[5 * i, 5 * i + 15] for i in range(16)])
    check_dense(ids, draw(90, 130, torch.bfloat16, 2), segments, 64)


@pytest.mark.parametrize(
    ("width", "strips"), [(1, 1), (64, 1), (128, 1), (96, 2), (200, 3), (896, 7), (1 << 17, 1024)]
)
def test_partial_sums_of_tokens(width, strips, emulated):
    # Strips are the most blocks of 128 that coordinates id * width .. can touch.
    assert strips == max((i * width % 128 + width - 1) // 128 + 1 for i in range(128))
    groups = emulated.dense_token_groups(width)
    assert groups == max(1, 512 // strips)
    assert emulated.dense_token_slabs(width) == groups * strips


def test_dense_rows_that_are_far_apart(tmp_path):
    x, segments = far_apart(4, 70, tmp_path / "rows"), torch.tensor([[0, 4]])
    check_dense(x, x[:, :3], segments, 64)
    check_dense(torch.tensor([1, 2, 3, 1]), x, segments, 64)


def test_ordering_tokens_reads_no_value_from_the_device():
    # A tensor on the meta device has no values: whatever waits for one raises.
    ids = torch.zeros(50, dtype=torch.int64, device="meta")
    spans = torch.zeros(4, 2, dtype=torch.int64, device="meta")
    shapes = [tuple(x.shape) for x in cuda._touches(ids, spans, rows=40, groups=64)]
    assert shapes == [(40,), (40,), (40,), (41,), (65,)]


def dense_results(order: int, emulated, pick=slice(None)):
    """Both kernels on one batch of four samples; `pick` chooses samples."""
    emulated.set_thread_order(order)
    segments = torch.tensor([[0, 3], [3, 3], [3, 21], [21, 50]])[pick].contiguous()
    a, e = draw(50, 100, torch.bfloat16, 1), draw(50, 10, torch.bfloat16, 2)
    dense, tokens = torch.zeros(len(segments), 64), torch.zeros(len(segments), 192)
    cuda.dense_sketch(a, e, segments, KEY, dense)
    cuda.dense_sketch(draw_ids(50, 9), a, segments, KEY, tokens)
    return dense, tokens


def test_bits_of_the_dense_mode_do_not_depend_on_the_order_of_the_threads(emulated):
    plain = dense_results(0, emulated)
    for order in (1, 2):
        assert all(torch.equal(x, y) for x, y in zip(plain, dense_results(order, emulated), strict=True))


@pytest.mark.parametrize("sample", [0, 2, 3])
def test_a_dense_sample_does_not_depend_on_its_batch(sample, emulated):
    together, alone = dense_results(0, emulated), dense_results(0, emulated, slice(sample, sample + 1))
    assert all(torch.equal(x[[sample]], y) for x, y in zip(together, alone, strict=True))
