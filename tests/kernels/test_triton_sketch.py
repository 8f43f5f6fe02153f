"""The Triton kernels against the fp64 definitions: on a GPU where there is one, else in Triton's interpreter."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernel_cases import cases
from plain import fold32, fold_hadamard32, linear32, token32, vector32
from tolerance import check

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import ORDER, backend, use_backend
from gvendi_fast.kernels.sketch_matrix import Table, make_table

triton = backend("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if triton.why_not("fold_hadamard", torch.empty(0, device=DEVICE)):
    pytest.skip(f"Triton kernels: {triton.status()}", allow_module_level=True)

from gvendi_fast.kernels.backends.triton import tables  # noqa: E402
from gvendi_fast.kernels.backends.triton.hadamard import TILES  # noqa: E402
from gvendi_fast.kernels.backends.triton.runtime import CHUNK_ROWS, chunks_of  # noqa: E402

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
# Rows, input width, output width, K: widths below, at and above K, with blocks of both kinds.
SHAPES = [
    (0, 16, 16, 64),
    (1, 1, 64, 64),
    (7, 50, 200, 64),
    (63, 64, 1, 64),
    (64, 200, 63, 64),
    (65, 255, 513, 256),
    (400, 40, 64, 64),
    (7, 896, 1100, 1024),
    (65, 1024, 50, 1024),
    (3, 2049, 300, 2048),
    (2, 50, 8193, 8192),
]


def is_slow(shape: tuple[int, ...]) -> bool:
    """By the rows and by K: in the interpreter these take most of the time."""
    return shape[0] >= 63 or shape[-1] > 1024


EVERY = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def draw(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers with NaN beside the rows, so that a read past a row shows."""
    x = torch.full((rows, width + 9), math.nan)
    x[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)[:, :width]


def spans(rows: int) -> torch.Tensor:
    """Four samples: two of uneven length, an empty one, and one over the same rows."""
    cut = [0, rows // 3, rows // 3, max(rows - 1, rows // 3)]
    return torch.tensor([[0, cut[1]], [cut[1], cut[2]], [cut[2], cut[3]], [cut[1] // 2, rows]])


def zeros(segments: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.zeros(len(segments), dim, device=DEVICE)


@cases(sorted({(r, i, k) for r, i, _, k in SHAPES if r < 400}), EVERY, is_slow)
def test_fold_hadamard(shape, dtype):
    rows, width, dim = shape
    x, table = draw(rows, width, dtype, 1), make_table(0, "x", width, dim)
    check(ops.fold_hadamard(x, table), fold_hadamard32(x, table), reference.fold_hadamard(x, table))


@cases(SHAPES, EVERY, is_slow)
def test_linear_sketch(shape, dtype):
    rows, width_in, width_out, dim = shape
    a, e = draw(rows, width_in, dtype, 1), draw(rows, width_out, dtype, 2)
    a_table, e_table = make_table(0, "a", width_in, dim), make_table(0, "e", width_out, dim)
    segments = spans(rows)
    torch32 = linear32(a, a_table, [(e, e_table)], segments)
    want = reference.linear_sketch(a, e, segments, a_table, e_table)
    # What is in out stays: one buffer collects all parameters.
    got = ops.linear_sketch(a, a_table, [(e, e_table)], segments, zeros(segments, dim) + 1)
    check(got, torch32 + 1, want + 1)


@pytest.mark.parametrize(
    ("rows", "width", "dim", "count"),
    [
        *((3, 300, 1024, count) for count in (2, 9)),
        (65, 100, 64, 2),
        *(pytest.param(3, 300, 1024, count, marks=pytest.mark.soak) for count in (3, 4, 5)),
        *(pytest.param(65, 100, 64, count, marks=pytest.mark.soak) for count in (3, 4, 5, 9)),
    ],
)
def test_linear_sketch_of_several_parts(rows, width, dim, count):
    dtypes = [torch.float32, torch.float16]
    a, a_table, segments = (
        draw(rows, width, torch.float16, 1),
        make_table(0, "a", width, dim),
        spans(rows),
    )
    parts = [
        (draw(rows, 30 + 40 * p, dtypes[p % 2], p), make_table(0, f"e{p}", 30 + 40 * p, dim))
        for p in range(count)
    ]
    want = sum(reference.linear_sketch(a, e, segments, a_table, table) for e, table in parts)
    torch32 = linear32(a, a_table, parts, segments)
    check(ops.linear_sketch(a, a_table, parts, segments, zeros(segments, dim)), torch32, want)
    # The same with what earlier calls left: H S a, and a part that is S e.
    done = ops.fold_hadamard(a, a_table)
    parts[-1] = (fold32(*parts[-1]), None)
    check(ops.linear_sketch(done, None, parts, segments, zeros(segments, dim)), torch32, want)
    check(ops.linear_sketch(a, a_table, parts[::-1], segments, zeros(segments, dim)), torch32, want)


@cases(SHAPES, EVERY, is_slow)
def test_token_sketch(shape, dtype):
    rows, vocabulary, width, dim = shape
    e, segments = draw(rows, width, dtype, 4), spans(rows)
    ids = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    id_table, e_table = make_table(0, "v", vocabulary, dim), make_table(0, "d", width, dim)
    got = ops.token_sketch(ids, e, segments, id_table, e_table, zeros(segments, dim) + 1)
    want = reference.token_sketch(ids, e, segments, id_table, e_table)
    check(got, token32(ids, e, segments, id_table, e_table) + 1, want + 1)


def test_token_sketch_of_an_id_outside_the_vocabulary_is_nan():
    table, segments = make_table(0, "v", 50, 64), torch.tensor([[0, 3], [3, 4]])
    out, ids = zeros(segments, 64), torch.tensor([0, 50, 1, 2], device=DEVICE)
    e = draw(4, 50, torch.float32, 1)
    triton.token_sketch(ids, e, segments, table, table, out)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@cases(
    [(0, 16, 64), (1, 64, 64), (7, 50, 64), (63, 200, 64), (64, 255, 256), (1000, 40, 64), (7, 1100, 1024)],
    EVERY,
    is_slow,
)
def test_vector_sketch(shape, norm, dtype):
    rows, width, dim = shape
    # An offset of 3 makes the variance about the mean a harder sum than the plain squares.
    x, e = draw(rows, width, dtype, 6) + 3, draw(rows, width, dtype, 7)
    table, segments, eps = make_table(0, "w", width, dim), spans(rows), 1e-6
    got = ops.vector_sketch(
        None if norm is None else x, e, segments, table, zeros(segments, dim) + 1, norm, eps
    )
    exact = reference.fold_hadamard(reference.vector_gradient(x, e, segments, norm, eps), table)
    check(got, vector32(x, e, segments, table, norm, eps) + 1, exact / math.sqrt(dim) + 1)


def test_vector_sketch_without_eps_and_with_a_short_chunk():
    x = draw(CHUNK_ROWS // 2, 50, torch.float32, 1)
    table, segments = make_table(0, "w", 50, 64), torch.tensor([[0, len(x)]])
    got = ops.vector_sketch(x, x, segments, table, zeros(segments, 64), "layer", 0.0)
    want = reference.fold_hadamard(reference.vector_gradient(x, x, segments, "layer"), table) / 8
    check(got, want.float(), want)


@DTYPES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 3, 63, 64, 99])
def test_what_is_not_finite_reaches_its_own_sample_alone(column, value, dtype):
    # Full and partial blocks; the second sample ends in a tile that the bad row, its last one, fills up.
    a, e = draw(9, 100, dtype, 1), draw(9, 40, dtype, 2)
    a[6, column] = value
    a_table, e_table = make_table(0, "a", 100, 64), make_table(0, "e", 40, 64)
    segments = torch.tensor([[0, 4], [4, 7], [7, 9]])
    out = ops.linear_sketch(a, a_table, [(e, e_table)], segments, zeros(segments, 64))
    assert out.isfinite().all(dim=1).tolist() == [True, False, True]
    folded = ops.fold_hadamard(a, a_table)
    assert folded.isfinite().all(dim=1).tolist() == [row != 6 for row in range(9)]
    assert not folded[6].isfinite().any()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("dim", TILES)
def test_every_tile_with_rows_missing_and_widths_about_k(dim, rows):
    for width in (dim // 4 - 1, dim, dim + 1):
        x, table = draw(rows, width, torch.float16, 1), make_table(0, "x", width, dim)
        check(ops.fold_hadamard(x, table), fold_hadamard32(x, table), reference.fold_hadamard(x, table))


@pytest.mark.parametrize("dim", TILES)
def test_every_tile_size_transforms_exactly(dim):
    # Row f of H from a unit vector; small integers are exact in any order.
    x = torch.zeros(3, dim, device=DEVICE)
    x[0, 1], x[1, dim - 1], x[2] = 1, 1, torch.arange(dim, device=DEVICE) % 7
    table = Table(dim, np.arange(dim, dtype=np.int16), np.ones(dim, dtype=np.int8))
    assert torch.equal(ops.fold_hadamard(x, table).double(), reference.hadamard(x))


@pytest.mark.parametrize("width", [1, 50, 64, 65, 1000])
@pytest.mark.parametrize("dim", [64, 1024])
def test_tables_on_the_device_are_the_host_tables(width, dim):
    table = make_table(0, "t", width, dim)
    packed = tables.scattered(table, DEVICE).cpu().numpy()
    assert np.array_equal(packed >> 1, table.bucket)
    assert np.array_equal(1 - 2 * (packed & 1), table.sign)
    packed = tables.folding(table, DEVICE).cpu().numpy()
    block, bin_ = np.nonzero(packed)
    coordinate = block * dim + (packed[block, bin_] & 0xFFFF)
    assert np.array_equal(np.sort(coordinate), np.arange(width))
    assert np.array_equal(table.bucket[coordinate], bin_)
    signs = (packed & ~0xFFFF).view(np.float32)
    assert np.array_equal(table.sign[coordinate], signs[block, bin_])
    assert tables.folding(table, DEVICE) is tables.folding(table, DEVICE)


def test_a_table_with_colliding_coordinates_is_refused():
    table = Table(64, np.zeros(2, dtype=np.int16), np.ones(2, dtype=np.int8))
    with pytest.raises(GvendiError, match="two coordinates of one block of 64 to one bucket"):
        ops.fold_hadamard(torch.zeros(1, 2, device=DEVICE), table)


def test_chunks_cover_every_sample_from_its_first_row():
    segments = torch.tensor([[5, 5], [0, CHUNK_ROWS], [3, 3 + 2 * CHUNK_ROWS + 1], [9, 9]])
    chunks = chunks_of(segments, DEVICE)
    assert chunks.first.tolist() == [0, 0, 1, 4, 4]
    assert chunks.spans.tolist() == [
        [0, CHUNK_ROWS],
        [3, 3 + CHUNK_ROWS],
        [3 + CHUNK_ROWS, 3 + 2 * CHUNK_ROWS],
        [3 + 2 * CHUNK_ROWS, 4 + 2 * CHUNK_ROWS],
    ]
    assert len(chunks_of(segments[:0], DEVICE)) == 0


def test_rows_that_share_memory():
    row, table, segments = draw(1, 100, torch.float32, 8), make_table(0, "a", 100, 64), torch.tensor([[0, 9]])
    rows = row.expand(9, 100)
    repeated = ops.linear_sketch(rows, table, [(rows, table)], segments, zeros(segments, 64))
    want = reference.linear_sketch(rows, rows, segments, table, table)
    check(repeated, want.float(), want)


def results(order=slice(None)):
    """Every kernel on one batch of five samples; `order` picks samples.

    One sample has a chunk's rows exactly, and one more chunks than are added up in a group.
    """
    segments = torch.tensor([[0, 20], [20, 21], [21, 21], [21, 37], [37, 170]])[order]
    a, e = draw(170, 100, torch.float16, 20), draw(170, 300, torch.float32, 21)
    a_table, e_table = make_table(0, "a", 100, 128), make_table(0, "e", 300, 128)
    ids = torch.arange(170, device=DEVICE) % 100
    yield ops.linear_sketch(a, a_table, [(e, e_table)], segments, zeros(segments, 128))
    yield ops.token_sketch(ids, e, segments, a_table, e_table, zeros(segments, 128))
    yield ops.vector_sketch(e * 2 + 1, e, segments, e_table, zeros(segments, 128), "layer", 1e-6)
    yield ops.fold_hadamard(e, e_table)


def test_results_are_the_same_bits_again_and_in_another_batch():
    once = list(results())
    assert all(torch.equal(x, y) for x, y in zip(once, results(), strict=True))
    for together, alone in zip(once[:3], list(results(slice(3, 4)))[:3], strict=True):
        assert torch.equal(together[3:4], alone)
    for together, other in zip(once[:3], list(results([4, 1, 3]))[:3], strict=True):
        assert torch.equal(together[[4, 1, 3]], other)


def test_refuses_other_dtypes_by_name():
    with pytest.raises(GvendiError, match="float64 is not supported by the Triton kernels"):
        ops.fold_hadamard(torch.zeros(2, 16, dtype=torch.float64, device=DEVICE), make_table(0, "a", 16, 64))


def test_is_an_automatic_choice_on_a_gpu_and_never_on_a_cpu():
    assert ORDER["cuda"].index("triton") < ORDER["cuda"].index("reference")
    assert "triton" not in ORDER["cpu"]


def test_without_triton_the_backend_says_so():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; "
        "from gvendi_fast.kernels.backends import backend, resolve; "
        "print(backend('triton').why_not('fold_hadamard', torch.zeros(1, 1)) == backend('triton').status()); "
        "print(backend('triton').status()); print(resolve('fold_hadamard', torch.zeros(1, 1)).__name__)"
    )
    env = {name: value for name, value in os.environ.items() if name != "GVENDI_BACKEND"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    same, status, chosen = done.stdout.splitlines()
    assert same == "True"
    assert status.startswith("Triton cannot be imported (")
    assert "pip install triton" in status
    assert chosen in ("gvendi_fast.kernels.backends.cpu", "gvendi_fast.kernels.backends.reference")
