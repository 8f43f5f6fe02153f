"""The Triton kernels of the dense mode against the fp64 definition: on a GPU, else in Triton's interpreter.

On a GPU each of the 8 steps of a tensor core's chain may truncate.
"""

import math

import numpy as np
import pytest
import torch
from kernel_cases import cases
from plain import dense32
from tolerance import FLOOR, UNIT, check, relative_error

from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import backend, use_backend
from gvendi_fast.kernels.signs import sign_key, signs

triton = backend("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if triton.why_not("dense_sketch", torch.empty(0, device=DEVICE)):
    pytest.skip(f"Triton kernels: {triton.status()}", allow_module_level=True)

from gvendi_fast.kernels.backends.triton.dense_sketch import BLOCK_B, BLOCKS, columns  # noqa: E402

TRUNCATIONS = 0 if DEVICE.type == "cpu" else 8
KEY = sign_key(0, "w")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Rows, input width, output width, K: T of 1, 7, 63, 64, 65 and 1000; widths below, at and above 128, even and odd,
# whole tiles of aligned rows and others, rows of each place in a word, K of each block of columns and between.
SHAPES = [
    (0, 16, 16, 64),
    (1, 128, 16, 1024),
    (1, 1, 130, 192),
    (7, 127, 2, 64),
    (7, 32, 130, 64),
    (63, 33, 1, 192),
    (63, 128, 32, 64),
    (64, 300, 1, 128),
    (65, 129, 3, 64),
    (65, 8, 66, 192),
    (65, 32, 15, 576),
    (1000, 32, 32, 64),
    (1000, 12, 3, 192),
]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def draw(rows: int, width: int, dtype: torch.dtype, seed: int, beside: int = 9) -> torch.Tensor:
    """Normal numbers with NaN beside and below the rows, so that a read outside of them shows."""
    x = torch.full((rows + 1, width + beside), math.nan)
    x[:rows, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)[:rows, :width]


def spans(rows: int) -> torch.Tensor:
    """Four samples: two of uneven length, an empty one, and one over the same rows."""
    cut = [0, rows // 3, rows // 3, max(rows - 1, rows // 3)]
    return torch.tensor([[0, cut[1]], [cut[1], cut[2]], [cut[2], cut[3]], [cut[1] // 2, rows]])


def sketch(a: torch.Tensor, e: torch.Tensor, segments: torch.Tensor, dim: int, key=KEY) -> torch.Tensor:
    return ops.dense_sketch(a, e, segments, key, torch.zeros(len(segments), dim, device=DEVICE))


def check_dense(a: torch.Tensor, e: torch.Tensor, dim: int) -> None:
    """a, or ids in its place."""
    segments = spans(len(e))
    # What is in out stays: one buffer collects all parameters.
    got = ops.dense_sketch(a, e, segments, KEY, torch.ones(len(segments), dim, device=DEVICE))
    want = reference.dense_sketch(a, e, segments, KEY, dim)
    check(got, dense32(a, e, segments, KEY, dim) + 1, want + 1, TRUNCATIONS)


@cases(SHAPES, (FP32, FP16), lambda shape: shape[0] >= 63)
def test_dense_sketch(shape, dtype):
    rows, width_in, width_out, dim = shape
    # Rows of aligned shapes begin 16 elements from one another, so that the kernel of aligned rows runs.
    beside = 16 if width_in % 16 == width_out % 16 == 0 else 9
    check_dense(draw(rows, width_in, dtype, 1, beside), draw(rows, width_out, dtype, 2, beside), dim)


@pytest.mark.parametrize(("left", "right"), [(BF16, BF16), (BF16, FP32), (FP32, FP16)], ids=str)
def test_dense_sketch_of_other_and_mixed_dtypes(left, right):
    check_dense(draw(33, 40, left, 1), draw(33, 5, right, 2), 64)


def test_dense_sketch_of_a_wide_range_of_numbers():
    # Far below what float16 holds, and a sum that cancels to 2^-12 of its terms.
    a, e = draw(33, 40, FP32, 1) * 1e-12, draw(33, 5, FP32, 2) * 1e-9
    a[1:16:2], e[1:16:2] = -a[0:16:2] * (1 + 2.0**-12), e[0:16:2]
    segments = torch.tensor([[0, 33], [0, 16]])
    want = reference.dense_sketch(a, e, segments, KEY, 64)
    torch32, got = dense32(a, e, segments, KEY, 64), sketch(a, e, segments, 64)
    for row in range(2):
        check(got[row], torch32[row], want[row], TRUNCATIONS)


def two_parts(g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What two parts of a 16-bit format keep of float32 rows, in tiles of 512 that are scaled as in the kernel."""
    x = torch.nn.functional.pad(g, (0, -g.shape[1] % 512)).view(len(g), -1, 512)
    up = torch.exp2(15 - torch.frexp(x.abs().amax(2, keepdim=True)).exponent.float().clamp_min(-111))
    high = (x * up).to(dtype)
    low = (x * up - high.float()).to(dtype)
    return ((high.double() + low.double()) / up.double()).view(len(g), -1)[:, : g.shape[1]]


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 3e-44])
@pytest.mark.parametrize("count", [130, 300, 1000, 1 << 14])
def test_two_parts_of_float16_are_enough_and_of_bfloat16_are_not(count, size):
    g = size * torch.randn(4, count, generator=torch.Generator().manual_seed(count))
    pi = torch.from_numpy(signs(KEY, 0, count, 192))
    want, torch32 = g.double() @ pi.double(), g @ pi.float()
    of_torch = 2 * relative_error(torch32, want) / UNIT[FP32]
    errors = [relative_error(two_parts(g, dtype) @ pi.double(), want) / UNIT[FP32] for dtype in (FP16, BF16)]
    if size < 1e-40:
        # Numbers of 5 bits, which either format holds.
        assert errors == [0, 0]
        return
    assert errors[0] <= 1 < 25 < errors[1] < 100
    assert errors[0] <= of_torch
    if count <= 300:
        assert errors[1] > of_torch + FLOOR[FP32] / UNIT[FP32]


def test_two_parts_of_a_wide_range_within_a_tile():
    g = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -20, 512)
    lost = (two_parts(g, FP16) - g.double()).abs()
    largest = g.double().abs().amax(1, keepdim=True)
    assert (lost <= torch.maximum(2.0**-22 * g.double().abs(), 2.0**-39 * largest)).all()


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e18])
def test_samples_of_very_different_size_in_one_program(size):
    a, e = draw(40, 32, FP32, 1), draw(40, 16, FP32, 2)
    a[20:] *= size
    segments = torch.tensor([[0, 20], [20, 40]])
    got = sketch(a, e, segments, 64)
    want, twin = reference.dense_sketch(a, e, segments, KEY, 64), dense32(a, e, segments, KEY, 64)
    for row in range(2):
        check(got[row], twin[row], want[row], TRUNCATIONS)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_spoils_its_sample_alone(value):
    a, e = draw(40, 32, FP32, 1), draw(40, 16, FP32, 2)
    a[25, 3] = value
    got = sketch(a, e, torch.tensor([[0, 20], [20, 40]]), 64)
    assert torch.isfinite(got[0]).all()
    assert not torch.isfinite(got[1]).any()


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "dim", "dtype"),
    [
        (0, 5, 16, 64, FP32),
        (1, 3, 1, 64, FP16),
        (7, 3, 129, 64, FP32),
        (40, 9, 33, 192, BF16),
        pytest.param(63, 40, 50, 64, FP16, marks=pytest.mark.soak),
        pytest.param(65, 2, 16, 576, FP32, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_dense_sketch_of_an_embedding(rows, vocabulary, width, dim, dtype):
    ids = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    check_dense(ids, draw(rows, width, dtype, 3), dim)


@pytest.mark.soak
def test_signs_are_the_definition_bit_for_bit():
    # A sample per coordinate: neighbours in a word, words, blocks, rows and tiles; more samples than a launch takes.
    width, height, dim = 68, 40, 192
    places = torch.tensor([0, 1, 31, 32, 33, 63, 64, 67, 68, 96, 127, 128, 255, 256, 300, 1087, 1088, 2719])
    assert len(places) > BLOCK_B
    e, a = torch.zeros(len(places), height, device=DEVICE), torch.zeros(len(places), width, device=DEVICE)
    e[torch.arange(len(places)), places // width] = 1
    a[torch.arange(len(places)), places % width] = 1
    each = torch.stack([torch.arange(len(places)), torch.arange(1, len(places) + 1)], 1)
    want = np.concatenate([signs(KEY, int(j), int(j) + 1, dim) for j in places])
    got = sketch(a, e, each, dim).cpu().numpy()
    assert np.array_equal(np.sign(got), want)
    assert len(np.unique(np.abs(got))) == 1


@pytest.mark.parametrize("key", [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x80000000, 0x7FFFFFFF)], ids=str)
def test_signs_of_far_coordinates_and_of_every_key(key):
    # Blocks of coordinates on both sides of 2^32, with columns past the first block of them.
    ids, width, dim = torch.tensor([2**34 - 1, 2**34, 2**35]), 32, 320
    e, each = torch.eye(3, width, device=DEVICE), torch.tensor([[0, 1], [1, 2], [2, 3]])
    places = [int(row) * width + n for n, row in enumerate(ids)]
    want = [signs(key, place, place + 1, dim)[0] for place in places]
    got = sketch(ids.to(DEVICE), e, each, dim, key)
    assert np.array_equal(np.sign(got.cpu().numpy()), np.stack(want))


@pytest.mark.soak
def test_an_embedding_is_the_same_parameter_as_its_one_hot_matrix():
    ids = torch.arange(40, device=DEVICE) % 17
    e, onehot = draw(40, 20, FP32, 5), torch.nn.functional.one_hot(ids, 17).float()
    got, want = (sketch(*x, torch.tensor([[0, 40]]), 64) for x in ((ids, e), (e, onehot)))
    assert relative_error(got, want) <= FLOOR[FP32] + TRUNCATIONS * UNIT[FP32]


def results(order=slice(None)):
    """Both kernels on one batch of five samples; `order` picks samples."""
    segments = torch.tensor([[0, 9], [9, 10], [10, 10], [10, 43], [43, 46]])[order]
    a, e = draw(46, 12, FP16, 6), draw(46, 3, FP32, 7)
    yield sketch(a, e, segments, 192)
    yield sketch(torch.arange(46, device=DEVICE) % 29, e, segments, 64)


@pytest.mark.soak
def test_results_are_the_same_bits_again_and_in_another_batch():
    once = list(results())
    assert all(torch.equal(x, y) for x, y in zip(once, results(), strict=True))
    for picked in ([3], [4, 1, 3], [1] * BLOCK_B + [3]):
        for together, other in zip(once, results(picked), strict=True):
            assert torch.equal(together[picked], other)


def test_a_batch_without_rows_or_samples_adds_nothing():
    a, e = draw(5, 20, FP32, 8), draw(5, 30, FP32, 9)
    for left in (a, torch.arange(5, device=DEVICE)):
        assert sketch(left, e, torch.empty(0, 2, dtype=torch.int64), 64).shape == (0, 64)
        assert not sketch(left, e, torch.tensor([[2, 2], [0, 0]]), 64).any()


@pytest.mark.parametrize(
    ("dim", "block"), [(64, 64), (128, 64), (192, 256), (512, 512), (576, 256), (1024, 512)]
)
def test_programs_cover_the_columns_without_much_waste(dim, block):
    assert columns(dim, BLOCKS) == block
