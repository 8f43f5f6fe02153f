"""The Triton kernels softmax_fold, covariance and entropy against the fp64 definitions, on a GPU or interpreted.

Entropies of order 1 and more are within 1e-4 absolutely.
"""

import math

import pytest
import torch
from kernel_cases import cases
from plain import covariance32, softmax32
from tolerance import check

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import backend, use_backend
from gvendi_fast.kernels.sketch_matrix import make_table
from gvendi_fast.sketching.gradients import head_chunks

triton = backend("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if triton.why_not("fold_hadamard", torch.empty(0, device=DEVICE)):
    pytest.skip(f"Triton kernels: {triton.status()}", allow_module_level=True)

from gvendi_fast.kernels.backends.triton.covariance import covariance, unit_rows  # noqa: E402
from gvendi_fast.kernels.backends.triton.entropy import entropies, entropy, group_spectra  # noqa: E402
from gvendi_fast.kernels.backends.triton.softmax_fold import PART_V, softmax_fold  # noqa: E402

ORDERS = (1.0, 2.0, math.inf, 1.001, 1.3, 7.0)


def draw(rows: int, width: int, dtype: torch.dtype, seed: int, beside: int = 9) -> torch.Tensor:
    """Normal numbers with NaN beside the rows, so that a read past a row shows."""
    x = torch.full((rows, width + beside), math.nan)
    x[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)[:, :width]


def run_softmax(logits, labels, table, softcap=None, scale=1.0):
    """loss, gradient and fold of a copy with as much NaN beside its rows; outputs start as NaN."""
    memory = torch.full((len(logits), max(logits.stride(0), 1)), math.nan, dtype=logits.dtype, device=DEVICE)
    x = memory[:, : logits.shape[1]].copy_(logits)
    loss = torch.full((len(x),), math.nan, device=DEVICE)
    folded = None if table is None else torch.full((len(x), table.dim), math.nan, device=DEVICE)
    softmax_fold(x, labels, table, loss, folded, softcap, scale)
    assert memory[:, logits.shape[1] :].isnan().all()
    return loss, x, folded


def check_softmax(logits, labels, table, softcap=None, scale=1.0):
    want = reference.softmax_fold(logits, labels, table, softcap, scale)
    plain = softmax32(logits, labels, table, softcap, scale)
    for got, torch32, right in zip(
        run_softmax(logits, labels, table, softcap, scale), plain, want, strict=True
    ):
        check(got, torch32, right)


@cases(
    [
        (0, 16, 64, None, 1.0),
        (1, 1, 64, None, 1.0),
        (7, 50, 64, 5.0, 0.7),
        (7, 64, 64, None, -0.3),
        (63, 63, 64, None, 1.0),
        (7, 200, 64, 30.0, 1.0),
        (65, 65, 64, None, 1.0),
        (3, 1025, 1024, 30.0, 1.0),
        (2, 1500, 1024, None, 0.5),
        (2, PART_V + 5000, 1024, None, 1.0),
        (1, 9000, 8192, None, 1.0),
    ],
    (torch.float32, torch.float16),
    lambda shape: shape[0] >= 63 or shape[1] > PART_V,
)
def test_softmax_fold(shape, dtype):
    rows, vocabulary, dim, softcap, scale = shape
    logits = draw(rows, vocabulary, dtype, 1).mul_(4)
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    labels[:2] = torch.tensor([vocabulary - 1, 0])[: len(labels[:2])]
    check_softmax(logits, labels.to(DEVICE), make_table(0, "v", vocabulary, dim), softcap, scale)


# Rows that begin 16 elements from one another are read 16 bytes at a time; whole tiles, whole parts, and one more.
@cases(
    [(vocabulary, softcap) for vocabulary in (2048, 4096, 16 * 257, 4096 + 31) for softcap in (None, 20.0)],
    (torch.float32, torch.float16),
    lambda shape: shape[0] > 2048 and shape[1] is not None,
)
def test_softmax_fold_of_aligned_rows(shape, dtype):
    vocabulary, softcap = shape
    logits = draw(5, vocabulary, dtype, 1, -vocabulary % 16 or 16).mul_(4)
    assert logits.stride(0) % 16 == 0
    labels = torch.tensor([0, vocabulary - 1, 2047, vocabulary // 2, 17], device=DEVICE)
    check_softmax(logits, labels, make_table(0, "v", vocabulary, 512), softcap)


def test_a_label_in_every_part_and_tile():
    vocabulary = PART_V + 2100
    labels = torch.tensor([0, PART_V - 1, PART_V, PART_V + 2047, PART_V + 2048], device=DEVICE)
    logits = draw(len(labels), vocabulary, torch.float32, 1, 12)
    check_softmax(logits, labels, make_table(0, "v", vocabulary, 1024))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-3, -2.0])
def test_softmax_fold_of_any_scale(scale, softcap):
    logits = draw(6, 300, torch.float32, 1) * 4
    check_softmax(logits, torch.arange(6, device=DEVICE) * 59, make_table(0, "v", 300, 64), softcap, scale)


def test_a_row_without_logits_above_minus_infinity_beside_its_label():
    logits = torch.full((2, 100), -math.inf, device=DEVICE)
    logits[0, 3], logits[1, 4] = 2.0, 2.0
    loss, e, folded = run_softmax(logits, torch.tensor([3, 5], device=DEVICE), make_table(0, "v", 100, 64))
    assert loss.tolist() == [0.0, math.inf]
    assert not e[0].any()
    assert not folded[0].any()
    assert e[1, [4, 5]].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_softmax_fold_of_extreme_logits(softcap):
    logits = torch.zeros(6, 200, device=DEVICE)
    logits[1, ::2], logits[2, ::2] = 80, -80
    logits[3, 5], logits[4, 5] = 1e4, -1e4
    logits[5] = torch.linspace(-1e-3, 1e-3, 200)
    labels = torch.tensor([0, 0, 1, 5, 5, 199], device=DEVICE)
    check_softmax(logits, labels, make_table(0, "v", 200, 64), softcap)


# Far from 0 the largest logit in base 2 is rounded, and the loss must not see it.
@pytest.mark.parametrize(("top", "gap"), [(20.0, 20.0), (1000.0, 20.0), (-333.3, 20.0), (77.7, 60.0)])
def test_the_label_of_a_sure_model_keeps_its_digits(top, gap):
    logits = torch.tensor([[top, top - gap, top - gap]], device=DEVICE)
    gap = float(logits[0, 0].double() - logits[0, 1].double())
    table = make_table(0, "v", 3, 64)
    loss, e, folded = run_softmax(logits, torch.tensor([0], device=DEVICE), table)
    want = 2 * math.exp(-gap) / (1 + 2 * math.exp(-gap))
    assert float(loss) == pytest.approx(math.log1p(2 * math.exp(-gap)), rel=1e-5)
    assert float(e[0, 0]) == pytest.approx(-want, rel=1e-5)
    assert float(folded[0, table.bucket[0]]) == pytest.approx(-want * table.sign[0], rel=1e-5)


@pytest.mark.parametrize("u", [1e-4, 0.3, 0.62499, 0.62501, 1.7, 9.0])
def test_softcap_keeps_the_digits_of_tanh(u):
    # Two logits +-u under a cap of 1e-3 and a scale of 1e-3: loss = ln(1 + exp(2e-3 tanh(u))).
    logits = torch.tensor([[-u, u]], device=DEVICE)
    labels = torch.tensor([0], device=DEVICE)
    loss, e, _ = run_softmax(logits, labels, make_table(0, "v", 2, 64), 1e-3, 1e-3)
    gap = 2e-3 * math.tanh(u)
    want = 1e-3 / (1 + math.exp(-gap)) / math.cosh(u) ** 2
    assert float(e[0, 1]) == pytest.approx(want, rel=2e-6)
    assert float(loss) == pytest.approx(math.log1p(math.exp(gap)), rel=3e-7)


def test_softmax_fold_of_masked_and_non_finite_logits():
    table, labels = make_table(0, "v", 50, 64), torch.tensor([0, 0, 0, 50], device=DEVICE)
    logits = draw(4, 50, torch.float32, 3)
    logits[0, 7], logits[1, 7], logits[2, 7] = -math.inf, math.inf, math.nan
    loss, e, folded = run_softmax(logits, labels, table)
    assert e[0, 7] == 0
    # The last row's label is out of range.
    assert loss.isfinite().tolist() == [True, False, False, False]
    assert folded.isfinite().all(1).tolist() == [True, False, False, False]


def test_softmax_without_a_table_has_the_same_gradient():
    logits, labels = draw(3, 200, torch.float32, 4) * 4, torch.tensor([0, 7, 199], device=DEVICE)
    loss, e, _ = run_softmax(logits, labels, make_table(0, "v", 200, 64))
    plain_loss, plain_e, none = run_softmax(logits, labels, None)
    assert none is None
    assert torch.equal(loss, plain_loss)
    assert torch.equal(e, plain_e)


@cases(
    [(0, 64), (1, 64), (7, 128), (65, 64), (257, 64), (1000, 64), (7, 512)],
    (torch.float32, torch.float16),
    lambda shape: shape[0] == 1000,
)
def test_covariance(shape, dtype):
    rows, dim = shape
    x = draw(rows, dim, dtype, 5)
    before = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    before = before + before.T
    out = before.clone()
    covariance(x, out)
    check(out - before, covariance32(x), reference.covariance(x)[0])
    assert torch.equal(out, out.T)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_unit_rows_of_any_size(size):
    x = draw(3, 100, torch.float32, 7) * size
    torch.testing.assert_close(unit_rows(x).double(), reference.normalise(x), rtol=0, atol=2.0**-24)


def test_covariance_survives_a_zero_row():
    out = torch.zeros(64, 64, dtype=torch.float64, device=DEVICE)
    covariance(torch.zeros(3, 64, device=DEVICE), out)
    assert out.isnan().all()


def test_bits_depend_on_nothing_but_the_row():
    logits, labels = draw(5, 200, torch.float32, 8), torch.arange(5, device=DEVICE)
    table = make_table(0, "v", 200, 64)
    together, again = run_softmax(logits, labels, table), run_softmax(logits, labels, table)
    alone = run_softmax(logits[3:4], labels[3:4], table)
    for x, y, z in zip(together, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[3:4], z)


def group_of(kind: str, m: int, dim: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(m)
    x = torch.randn(m, dim, generator=g)
    if kind == "duplicates":
        x = x[torch.arange(m) // 3]
    elif kind == "rank one":
        x = x[:1] * torch.linspace(-2, 3, m)[:, None]
    elif kind == "orthogonal":
        x = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q[:m].contiguous()
    elif kind == "near":
        x = x[:1] + 1e-3 * x
    return x.to(DEVICE)


def spectra_of(x: torch.Tensor, M: int) -> torch.Tensor:
    return group_spectra(unit_rows(x), torch.tensor([[0, len(x)]], device=DEVICE), M, exact=False)


@pytest.mark.parametrize(
    ("kind", "m", "padded"),
    [
        *(
            (kind, m, 16)
            for kind in ("normal", "duplicates", "rank one", "orthogonal", "near")
            for m in (2, 7, 16)
        ),
        ("near", 32, 32),
        ("normal", 63, 64),
        ("rank one", 64, 64),
        *(pytest.param("duplicates", m, p, marks=pytest.mark.soak) for m, p in ((31, 32), (64, 64))),
    ],
)
def test_jacobi_entropy_of_every_order(kind, m, padded):
    x = group_of(kind, m)
    spectra = spectra_of(x, padded)
    gram = reference.normalise(x) @ reference.normalise(x).T
    assert spectra.sum() == pytest.approx(m, rel=1e-5)
    largest = float((spectra[0].sort().values[-m:] - torch.linalg.eigvalsh(gram)).abs().max())
    assert largest <= 1e-5 * m
    boundaries = torch.tensor([0, m])
    for q in ORDERS:
        want = reference.group_entropies(x, boundaries, q)
        torch.testing.assert_close(entropies(spectra, q), want.to(DEVICE), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "q"),
    [
        (torch.float16, 0.5),
        pytest.param(torch.float32, 1.0, marks=pytest.mark.soak),
        pytest.param(torch.float32, 0.5, marks=pytest.mark.soak),
        pytest.param(torch.float16, 1.0, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_entropy_of_ragged_groups(dtype, q):
    counts = torch.tensor([3, 65, 1, 2, 7, 17, 64, 130])
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) + 2
    x = draw(int(boundaries[-1]) + 3, 50, dtype, 9)
    # A group of one direction, and rows of no group that hold NaN.
    x[2:5], x[:2] = x[2].clone(), math.nan
    out = torch.full((len(counts),), math.nan, dtype=torch.float64, device=DEVICE)
    entropy(x, boundaries, q, out)
    want = reference.group_entropies(x, boundaries, q).to(DEVICE)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-4)


def test_a_group_that_has_not_converged_is_solved_in_float64(monkeypatch):
    x = group_of("normal", 16)
    solved = spectra_of(x, 16)
    monkeypatch.setitem(group_spectra.__globals__, "SWEEPS", 1)
    torch.testing.assert_close(spectra_of(x, 16)[0], solved[0].sort().values, rtol=0, atol=1e-5)


def test_strips_and_size_classes_do_not_change_a_group(monkeypatch):
    boundaries = torch.tensor([0, 5, 12, 14, 30])
    x = draw(30, 50, torch.float32, 10)
    whole, strips = (torch.empty(4, dtype=torch.float64, device=DEVICE) for _ in range(2))
    entropy(x, boundaries, 1.0, whole)
    monkeypatch.setitem(entropy.__globals__, "STRIP_ROWS", 16)
    monkeypatch.setitem(entropy.__globals__, "GRAM_BYTES", 4 * 256 * 256)
    entropy(x, boundaries, 1.0, strips)
    assert torch.equal(whole, strips)


def test_entropy_verb_agrees_with_its_definition():
    # Two orthogonal rows, two equal ones, and lengths that do not matter.
    x = torch.tensor([[3.0, 0.0], [0.0, 0.1], [1.0, 1.0], [-2.0, -2.0]], device=DEVICE)
    boundaries = torch.tensor([0, 2, 4])
    for q in (0.5, 1.0, 2.0, math.inf):
        got = ops.entropy(x, boundaries, q)
        torch.testing.assert_close(got.cpu(), torch.tensor([math.log(2), 0.0]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "boundaries", "q", "message"),
    [
        (torch.ones(4, 8), [0, 2, 2, 4], 1.0, "group 1 0 rows, wanted 1 to 256"),
        (torch.ones(300, 8), [0, 300], 1.0, "group 0 300 rows"),
        (torch.ones(4, 8), [0, 5], 1.0, r"must lie in 0..4"),
        (torch.ones(4, 8), [0, 4], 0.0, "q must be an order above 0"),
        (torch.ones(4, 8), [0, 4], math.nan, "q must be an order above 0"),
        (torch.eye(4, 3), [1, 4], 1.0, "row 3 of rows has norm 0.0"),
        (torch.ones(8), [0, 4], 1.0, "rows must have shape"),
        (torch.ones(4, 8), [0.0, 4.0], 1.0, "boundaries must be contiguous int64"),
    ],
)
def test_entropy_refuses_by_name(rows, boundaries, q, message):
    with pytest.raises(GvendiError, match=message):
        ops.entropy(rows, torch.tensor(boundaries), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_head_sketch_holds_one_chunk_of_logits(monkeypatch, dtype):
    vocabulary, held = 151936, []

    def softmax_of_nothing(logits, labels, table, softcap, scale):
        held.append(logits.numel() * logits.element_size())
        return torch.zeros(len(logits)), torch.zeros(len(logits), table.dim)

    monkeypatch.setattr(ops, "softmax_fold", softmax_of_nothing)
    hidden, weight = torch.zeros(300, 2, dtype=dtype), torch.zeros(vocabulary, 2, dtype=dtype)
    tables = make_table(0, "d", 2, 64), make_table(0, "v", vocabulary, 64)
    labels, segments = torch.zeros(300, dtype=torch.int64), torch.tensor([[0, 300]])
    with use_backend("reference"):
        head_chunks.head_sketch(hidden, weight, labels, segments, *tables, torch.zeros(1, 64))
    row = vocabulary * dtype.itemsize
    assert sum(held) == 300 * row
    assert max(held) == min(300, head_chunks.head_chunk_rows(vocabulary, dtype.itemsize, "cpu")) * row
    assert max(held) <= max(head_chunks.HEAD_CHUNK_BYTES, head_chunks.HEAD_CHUNK_MIN_ROWS * row)
