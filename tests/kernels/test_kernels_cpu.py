"""The compiled CPU kernels against the fp64 definitions, by the rule of tolerance.py."""

import math

import pytest
import torch
from plain import (
    covariance32,
    fold32,
    fold_hadamard32,
    linear32,
    softmax32,
    token32,
    vector32,
)
from tolerance import FLOOR, check, relative_error

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import cpu, use_backend
from gvendi_fast.kernels.sketch_matrix import Table, make_table

if cpu.why_not("fold_hadamard"):
    pytest.skip(f"compiled kernels: {cpu.status()}", allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Rows, input width, output width, K: below, at and above K; narrow, wide, and with a narrow rest.
SHAPES = [
    (0, 16, 16, 64),
    (1, 1, 16, 64),
    (7, 50, 63, 64),
    (63, 63, 1, 64),
    (64, 64, 200, 64),
    (65, 200, 63, 256),
    (130, 255, 256, 256),
    (65, 288, 50, 1024),
    (63, 896, 1000, 1024),
    (1000, 64, 288, 1024),
    (7, 4864, 896, 1024),
    (64, 1024, 1025, 1024),
    (7, 1000, 4864, 2048),
    (65, 200, 1025, 2048),
    (7, 1025, 4864, 8192),
    (7, 8192, 50, 8192),
]


@pytest.fixture(autouse=True)
def _compiled():
    with use_backend("cpu"):
        yield


def draw(rows: int, width: int, dtype: torch.dtype, seed: int, strided: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A strided tensor has NaN beside its rows, so that a read past a row shows.
    x = torch.full((rows, width + 9 * strided), math.nan)
    x[:, :width] = torch.randn(rows, width, generator=generator)
    return x.to(dtype)[:, :width]


def spans(rows: int) -> torch.Tensor:
    """Four samples: two of uneven length, an empty one, and one that leaves the last row out."""
    cut = [0, rows // 3, rows // 3, max(rows - 1, rows // 3)]
    return torch.tensor([[0, cut[1]], [cut[1], cut[2]], [cut[2], cut[3]], [0, rows]])


def nan_filled(*shape: int) -> torch.Tensor:
    return torch.full(shape, math.nan)


@DTYPES
@pytest.mark.parametrize(("rows", "width_in", "width_out", "dim"), SHAPES)
def test_linear_sketch(rows, width_in, width_out, dim, dtype):
    a, e = draw(rows, width_in, dtype, 1, strided=True), draw(rows, width_out, dtype, 2, strided=True)
    second = draw(rows, width_in, torch.float32, 3)
    a_table, e_table = make_table(0, "a", width_in, dim), make_table(0, "e", width_out, dim)
    second_table, segments = make_table(0, "second", width_in, dim), spans(rows)
    want = reference.linear_sketch(a, e, segments, a_table, e_table)
    want += reference.linear_sketch(a, second, segments, a_table, second_table)
    before = torch.ones(len(segments), dim)
    parts = [(e, e_table), (second, second_table)]
    torch32 = linear32(a, a_table, parts, segments)
    got = ops.linear_sketch(a, a_table, parts, segments, before.clone())
    check(got, torch32 + before, want + 1)

    transformed = nan_filled(rows, dim)
    cpu.fold_hadamard(a, a_table, transformed)
    check(transformed, fold_hadamard32(a, a_table), reference.fold_hadamard(a, a_table))
    folded = fold32(second, second_table)
    parts = [(e, e_table), (folded, None)]
    check(ops.linear_sketch(transformed, None, parts, segments, before.clone()), torch32 + before, want + 1)
    check(ops.linear_sketch(a, a_table, parts[::-1], segments, before.clone()), torch32 + before, want + 1)


@DTYPES
@pytest.mark.parametrize(("rows", "vocabulary", "width", "dim"), SHAPES)
def test_token_sketch(rows, vocabulary, width, dim, dtype):
    e = draw(rows, width, dtype, 4, strided=True)
    ids = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(5))
    id_table, e_table, segments = (
        make_table(0, "v", vocabulary, dim),
        make_table(0, "d", width, dim),
        spans(rows),
    )
    got = ops.token_sketch(ids, e, segments, id_table, e_table, torch.zeros(len(segments), dim))
    want = reference.token_sketch(ids, e, segments, id_table, e_table)
    check(got, token32(ids, e, segments, id_table, e_table), want)


@DTYPES
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize(("rows", "width", "dim"), sorted({(r, i, k) for r, i, _, k in SHAPES if i > 1}))
def test_vector_sketch(rows, width, dim, norm, dtype):
    # An offset of 3 makes the variance about the mean a harder sum than the plain squares.
    x, e = draw(rows, width, dtype, 6, strided=True) + 3, draw(rows, width, dtype, 7, strided=True)
    table, segments, eps = make_table(0, "w", width, dim), spans(rows), 1e-6
    got = ops.vector_sketch(
        None if norm is None else x, e, segments, table, torch.zeros(len(segments), dim), norm, eps
    )
    want = reference.fold_hadamard(reference.vector_gradient(x, e, segments, norm, eps), table) / math.sqrt(
        dim
    )
    check(got, vector32(x, e, segments, table, norm, eps), want)


def check_softmax(logits, labels, table, softcap=None, scale=1.0):
    want = reference.softmax_fold(logits, labels, table, softcap, scale)
    torch32 = softmax32(logits, labels, table, softcap, scale)
    loss, folded = nan_filled(len(logits)), nan_filled(len(logits), table.dim)
    cpu.softmax_fold(logits, labels, table, loss, folded, softcap, scale)
    for got, plain, right in zip((loss, logits, folded), torch32, want, strict=True):
        check(got, plain, right)


@DTYPES
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, -0.3), (5.0, 0.7), (30.0, 1.0)])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "dim"),
    [(0, 16, 64), (1, 1, 64), (7, 50, 64), (65, 63, 256), (7, 200, 1024), (7, 1025, 1024), (7, 4864, 2048)],
)
def test_softmax_fold(rows, vocabulary, dim, softcap, scale, dtype):
    logits = draw(rows, vocabulary, dtype, 8, strided=True) * 4
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(9))
    labels[:2] = torch.tensor([0, vocabulary - 1])[: len(labels[:2])]
    check_softmax(logits, labels, make_table(0, "v", vocabulary, dim), softcap, scale)


@DTYPES
@pytest.mark.parametrize("vocabulary", [32000, 151936])
def test_softmax_fold_of_a_real_vocabulary(vocabulary, dtype):
    check_softmax(
        draw(3, vocabulary, dtype, 10) * 3,
        torch.tensor([0, 777, vocabulary - 1]),
        make_table(0, "v", vocabulary, 1024),
    )


@DTYPES
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_softmax_fold_of_extreme_logits(softcap, dtype):
    logits = torch.zeros(6, 1000)
    logits[1, ::2] = 80
    logits[2, ::2] = -80
    logits[3, 5] = 1e4
    logits[4, 5] = -1e4
    logits[5] = torch.linspace(-1e-3, 1e-3, 1000)
    check_softmax(
        logits.to(dtype), torch.tensor([0, 0, 1, 5, 5, 999]), make_table(0, "v", 1000, 1024), softcap
    )


def test_softmax_fold_of_masked_and_non_finite_logits():
    table = make_table(0, "v", 50, 64)
    logits = draw(3, 50, torch.float32, 11)
    logits[0, 7], logits[1, 7], logits[2, 7] = -math.inf, math.inf, math.nan
    loss, folded = ops.softmax_fold(logits, torch.zeros(3, dtype=torch.int64), table)
    assert logits[0, 7] == 0
    assert loss.isfinite().tolist() == [True, False, False]
    assert folded.isfinite().all(1).tolist() == [True, False, False]


def test_exponential_is_accurate_to_two_units_in_the_last_place():
    # Logits 0 and -x: the second's share is p / (1 + p) with p = exp(-x).
    x = torch.linspace(0, 80, 4001)
    logits = torch.stack([torch.zeros_like(x), -x], 1)
    table = make_table(0, "v", 2, 64)
    ops.softmax_fold(logits, torch.zeros(len(x), dtype=torch.int64), table)
    want = torch.sigmoid(-x.double())
    # Two of the exponential, half of the division by the sum.
    assert float(((logits[:, 1] - want) / want).abs().max()) <= 2.5 * 2.0**-23


@DTYPES
@pytest.mark.parametrize(
    ("rows", "dim"),
    [
        (0, 64),
        (1, 64),
        (7, 128),
        (255, 64),
        (257, 256),
        (1000, 256),
        (63, 1024),
        (7, 2048),
        (40, 1),
        (40, 33),
        (300, 100),
    ],
)
def test_covariance(rows, dim, dtype):
    x = draw(rows, dim, dtype, 12, strided=True) * 1e-3
    before = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(13))
    before = before + before.T
    got = ops.covariance(x, before.clone()) - before
    assert torch.equal(got + before, (got + before).T)
    check(got, covariance32(x), reference.covariance(x)[0])


def test_covariance_survives_a_zero_row():
    out = ops.covariance(torch.zeros(3, 64), torch.zeros(64, 64, dtype=torch.float64))
    assert out.isnan().all()


def test_rows_that_share_memory():
    row = draw(1, 200, torch.float32, 14)
    table, segments = make_table(0, "a", 200, 256), torch.tensor([[0, 9]])
    repeated = ops.linear_sketch(
        row.expand(9, 200), table, [(row.expand(9, 200), table)], segments, torch.zeros(1, 256)
    )
    once = ops.linear_sketch(row, table, [(row, table)], torch.tensor([[0, 1]]), torch.zeros(1, 256))
    assert relative_error(repeated, 9 * once.double()) <= FLOOR[torch.float32]


def results(dtype=torch.bfloat16, order=slice(None)):
    """Every kernel on one batch of five samples; `order` picks samples."""
    segments = torch.tensor([[0, 130], [130, 131], [131, 131], [131, 250], [250, 600]])[order]
    a, e = draw(600, 288, dtype, 20), draw(600, 1100, dtype, 21)
    a_table, e_table = make_table(0, "a", 288, 1024), make_table(0, "e", 1100, 1024)
    ids, out = torch.arange(600) % 288, (len(segments), 1024)
    yield ops.linear_sketch(a, a_table, [(e, e_table)], segments, torch.zeros(out))
    yield ops.token_sketch(ids, e, segments, a_table, e_table, torch.zeros(out))
    yield ops.vector_sketch(e * 2 + 1, e, segments, e_table, torch.zeros(out), "layer", 1e-6)
    if order == slice(None):
        logits = draw(100, 1100, dtype, 22)
        yield from (*ops.softmax_fold(logits, ids[:100], e_table), logits)
        yield ops.fold_hadamard(e, e_table)
        yield ops.covariance(draw(600, 256, dtype, 23), torch.zeros(256, 256, dtype=torch.float64))


@DTYPES
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = list(results(dtype))
        torch.set_num_threads(2)
        assert all(torch.equal(x, y) for x, y in zip(alone, results(dtype), strict=True))
        torch.set_num_threads(5)
        assert all(torch.equal(x, y) for x, y in zip(alone, results(dtype), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_sample_does_not_depend_on_its_batch():
    for together, alone in zip(list(results())[:3], results(order=slice(3, 4)), strict=True):
        assert torch.equal(together[3:4], alone)


def test_refuses_other_dtypes_by_name():
    table = make_table(0, "a", 16, 64)
    with pytest.raises(GvendiError, match="float16 on a CPU is not supported by the compiled kernels"):
        ops.fold_hadamard(torch.zeros(2, 16, dtype=torch.float16), table)


def test_packing_refuses_a_table_that_is_not_two_level():
    table = make_table(0, "a", 64, 64)
    broken = Table(64, table.bucket[::-1].copy(), table.sign)
    mixed = broken.bucket.copy()
    mixed[[0, 63]] = mixed[[63, 0]]
    with pytest.raises(ValueError, match="aligned runs of 16"):
        cpu.fold_hadamard(torch.zeros(1, 64), Table(64, mixed, table.sign), torch.zeros(1, 64))


def test_refuses_a_result_on_another_device():
    x, segments = torch.zeros(3, 64), torch.tensor([[0, 3]])
    table, out, ids = make_table(0, "x", 64, 64), torch.zeros(1, 64, device="meta"), torch.zeros(3).long()
    calls = [
        lambda: ops.linear_sketch(x, table, [(x, table)], segments, out),
        lambda: ops.token_sketch(ids, x, segments, table, table, out),
        lambda: ops.vector_sketch(None, x, segments, table, out),
        lambda: ops.dense_sketch(ids, x, segments, (0, 0), out),
        lambda: ops.softmax_fold(x, ids.to("meta"), None),
    ]
    for call in calls:
        with pytest.raises(GvendiError, match=r"(out|labels) is on the device 'meta'"):
            call()
