"""Entropy of many small groups on the compiled CPU kernels against the fp64 definition.

Both work in float64, so the tolerance is absolute and small: an eigenvalue errs by a few units of 2^-53 of the trace,
256 of them by TOLERANCE in the entropy. Below order 1 the entropy is steep at the smallest eigenvalue that counts,
2^-22 of the trace: l^q changes by q l^(q-1) dl, some 2^11 as much.
"""

import math

import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import cpu, use_backend

if cpu.why_not("entropy"):
    pytest.skip(f"compiled kernels: {cpu.status()}", allow_module_level=True)

ORDERS = (0.5, 1.0, 2.0, 3.0, math.inf)
SIZES, WIDTHS = (1, 2, 7, 63, 64, 65, 256), (3, 64, 257, 1024)
TOLERANCE = {0.5: 1e-7, 0.7: 1e-7}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _compiled():
    with use_backend("cpu"):
        yield


def draw(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers with NaN beside the rows, so that a read past a row shows."""
    x = torch.full((rows, width + 5), math.nan)
    x[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[:, :width]


def check(x: torch.Tensor, boundaries: torch.Tensor, orders=ORDERS) -> None:
    for q in orders:
        got, want = ops.entropy(x, boundaries, q), reference.group_entropies(x, boundaries, q)
        off = float((got - want).abs().max())
        assert off <= TOLERANCE.get(q, 1e-11), (q, off)
        assert (got >= 0).all()


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
def test_ragged_groups_of_every_order(width, dtype):
    boundaries = torch.tensor([0, *SIZES]).cumsum(0)
    check(draw(int(boundaries[-1]), width, dtype), boundaries)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("m", SIZES)
def test_duplicates_count_once(m, width):
    x = draw(m, width)[torch.arange(m) // 3]
    # Their lengths do not count, and their zero eigenvalues add nothing at any order.
    x = x * torch.linspace(0.5, 3, m)[:, None]
    check(x, torch.tensor([0, m]))


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
def test_one_row_and_identical_rows_have_exactly_no_entropy(width, dtype):
    for m in SIZES:
        same = draw(1, width, dtype, seed=m).expand(m, width).contiguous()
        for x in (same, same * torch.tensor([1.0, -2.0]).to(dtype)[torch.arange(m) % 2, None]):
            assert [float(ops.entropy(x, torch.tensor([0, m]), q)) for q in ORDERS] == [0.0] * len(ORDERS)


@pytest.mark.parametrize(("m", "width"), [(2, 3), (7, 64), (64, 64), (65, 257), (256, 1024)])
def test_orthogonal_rows_have_the_entropy_of_their_number(m, width):
    x = torch.eye(width)[:m] * torch.linspace(0.1, 9, m)[:, None]
    got = torch.stack([ops.entropy(x, torch.tensor([0, m]), q) for q in ORDERS])
    torch.testing.assert_close(got, torch.full_like(got, math.log(m)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "spectrum",
    [
        torch.arange(1, 65) ** -2.0,
        10.0 ** -torch.linspace(0, 6, 64),
        torch.ones(64) + 1e-6 * torch.arange(64),
    ],
    ids=["power", "graded", "cluster"],
)
def test_spectra_of_every_kind(spectrum):
    mixed = torch.linalg.qr(draw(64, 64, seed=1).double()).Q * spectrum.sqrt()
    check(mixed.float().contiguous(), torch.tensor([0, 64]), (0.7, *ORDERS[1:], 0.999, 1.001, 1.3, 50.0))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_rows_of_any_length(size):
    x = draw(40, 100)
    torch.testing.assert_close(
        ops.entropy(x * size, torch.tensor([0, 40])),
        ops.entropy(x, torch.tensor([0, 40])),
        rtol=0,
        atol=1e-6,
    )


def test_a_group_does_not_depend_on_its_neighbours_and_no_group_is_no_work():
    x, boundaries = draw(100, 64), torch.tensor([3, 40, 41, 99])
    together = ops.entropy(x, boundaries)
    for g in range(3):
        assert torch.equal(ops.entropy(x, boundaries[g : g + 2]), together[g : g + 1])
    assert ops.entropy(x, torch.tensor([5])).shape == (0,)


@DTYPES
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    boundaries = torch.tensor([0, *SIZES, *SIZES]).cumsum(0)
    x, threads = draw(int(boundaries[-1]), 257, dtype), torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append([ops.entropy(x, boundaries, q) for q in ORDERS])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_the_kernel_itself_gives_up_on_rows_without_a_direction():
    out = torch.zeros(1, dtype=torch.float64)
    for bad in (0.0, math.nan, math.inf):
        x = torch.ones(3, 20)
        x[1] *= bad
        with pytest.raises(GvendiError, match="eigenvalues of group 0 did not converge"):
            cpu.entropy(x, torch.tensor([0, 3]), 1.0, out)
        with pytest.raises(GvendiError, match="row 1 of rows has norm"):
            ops.entropy(x, torch.tensor([0, 3]))
