"""Nearest centroid and runner-up: the C++ and the Triton kernel against the fp64 definition.

On a CPU the labels are the definition's, exactly; a Triton label may differ only where two cosines of the definition
are within float32 rounding, K 2^-24.
"""

import math

import pytest
import torch
from plain import cosines32
from tolerance import check

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import backend, cpu, use_backend

GPU = torch.cuda.is_available()
DEVICE = {"cpu": "cpu", "triton": "cuda" if GPU else "cpu"}
BACKENDS = [
    name
    for name, device in DEVICE.items()
    if backend(name).why_not("assign", torch.empty(0, device=device)) is None
]
# The compiled kernels know no fp16, and Triton's interpreter rounds bf16 wrongly.
KINDS = [(name, torch.float32) for name in BACKENDS]
KINDS += [("cpu", torch.bfloat16)] if "cpu" in BACKENDS else []
KINDS += [("triton", torch.bfloat16 if GPU else torch.float16)] if "triton" in BACKENDS else []
SHAPES = [
    (0, 64, 5),
    (1, 64, 1),
    (7, 33, 2),
    (70, 100, 4),
    (5, 1, 3),
    (130, 64, 5),
    (33, 1024, 65),
    (200, 256, 130),
]

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason=f"compiled kernels: {cpu.status()}")


def draw(rows: int, width: int, seed: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Normal numbers with NaN beside the rows, so that a read past a row shows."""
    x = torch.full((rows, width + 9), math.nan)
    x[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)[:, :width]


def centroids_of(count: int, width: int, name: str = "cpu", seed: int = 1) -> torch.Tensor:
    x = draw(count, width, seed, device=DEVICE[name])
    return torch.nn.functional.normalize(x, dim=1).contiguous()


def close_enough(label: torch.Tensor, want: torch.Tensor, cosines: torch.Tensor, width: int) -> bool:
    """Labels are the wanted ones, or as good within float32 rounding of a product."""
    here, there = (cosines.gather(1, x[:, None])[:, 0] for x in (label, want))
    return bool(((label == want) | ((here - there).abs() <= width * 2.0**-24)).all())


def test_the_definition_by_hand():
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1.0, 1.0]])
    label, cosine, second, second_cosine = reference.assign(rows, torch.eye(2))
    assert label.tolist() == [1, 0, 0]
    assert second.tolist() == [0, 1, 1]
    assert cosine.tolist() == pytest.approx([0.8, 0.0, 0.5**0.5])
    assert second_cosine.tolist() == pytest.approx([0.6, -1.0, 0.5**0.5])


@pytest.mark.parametrize(("name", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize(("rows", "width", "clusters"), SHAPES)
def test_assign_is_its_definition(name, rows, width, clusters, dtype):
    x, centroids = draw(rows, width, 2, dtype, DEVICE[name]) * 1e-2, centroids_of(clusters, width, name)
    want = reference.assign(x, centroids)
    with use_backend(name):
        got = ops.assign(x, centroids)
    assert [part.dtype for part in got] == [torch.int64, torch.float32] * 2
    cosines = reference.normalise(x) @ centroids.double().T
    if name == "cpu":
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[2], want[2])
    elif clusters > 1:
        assert close_enough(got[0], want[0], cosines, width)
        assert close_enough(got[2], want[2], cosines, width)
    ranks = [(want[0], got[1], want[1])] + [(want[2], got[3], want[3])] * (clusters > 1)
    for at, value, exact in ranks:
        check(value, cosines32(x, centroids).gather(1, at[:, None])[:, 0], exact)
    if clusters == 1:
        assert (got[2] == -1).all()
        assert got[3].isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("clusters", [3, 70])
def test_ties_go_to_the_lower_label(name, clusters):
    """All centroids equal, then the row's own direction at three places, one of them in another tile."""
    centroids = centroids_of(1, 48, name).expand(clusters, 48).contiguous()
    x = draw(9, 48, 3, device=DEVICE[name])
    with use_backend(name):
        label, cosine, second, second_cosine = ops.assign(x, centroids)
        assert (label == 0).all()
        assert (second == 1).all()
        assert torch.equal(cosine, second_cosine)
        mixed = centroids_of(clusters, 48, name, 4)
        places = sorted({1, 2, clusters - 1})
        mixed[places] = centroids[0]
        label, _, second, _ = ops.assign(centroids[:1], mixed)
        assert (int(label), int(second)) == tuple(places[:2])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_alone_or_in_any_batch_is_the_same_bits(name):
    x, centroids = draw(150, 96, 5, device=DEVICE[name]), centroids_of(70, 96, name)
    with use_backend(name):
        together = ops.assign(x, centroids)
        for part in (slice(0, 1), slice(77, 78), slice(3, 140), slice(149, 150)):
            alone = ops.assign(x[part], centroids)
            assert all(torch.equal(whole[part], piece) for whole, piece in zip(together, alone, strict=True))


@needs_cpu
def test_close_centroids_are_told_apart_below_float32():
    """Centroids that float32 products cannot rank: the answer is that of exact products, in every batch."""
    base = centroids_of(1, 1024)
    noise = draw(40, 1024, 6) * 3e-8
    centroids, x = (base + noise).contiguous(), base + draw(300, 1024, 7) * 1e-4
    want = reference.assign(x, centroids)
    got = ops.assign(x, centroids)
    rough = (x @ centroids.T).argmax(dim=1)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[2], want[2])
    assert not torch.equal(rough, want[0])


@needs_cpu
def test_bits_do_not_depend_on_threads_or_blocks(monkeypatch):
    x, centroids = draw(500, 100, 8), centroids_of(50, 100)
    threads, results = torch.get_num_threads(), []
    try:
        for number, rows in ((1, 4096), (2, 4096), (5, 64), (3, 77)):
            torch.set_num_threads(number)
            monkeypatch.setattr(cpu.spectral, "ASSIGN_ROWS", rows)
            results.append(ops.assign(x, centroids))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_cpu
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 3e37])
def test_rows_of_extreme_length_keep_their_labels(scale):
    """float32 products of these rows overflow or vanish."""
    x, centroids = draw(20, 64, 9), centroids_of(30, 64)
    scaled = x * scale
    want = reference.assign(scaled, centroids)
    got = ops.assign(scaled, centroids)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[2], want[2])


@needs_cpu
def test_coarse_float32_products_only_widen_the_search(monkeypatch):
    """Where torch may multiply in bfloat16 the labels are the same ones."""
    x, centroids = draw(60, 256, 10), centroids_of(80, 256)
    want = ops.assign(x, centroids)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert cpu.product_error() > 0
        got = ops.assign(x, centroids)
    finally:
        torch.set_float32_matmul_precision(before)
    assert cpu.product_error() == 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # Products that are wrong by as much as bfloat16 allows.
    rough = torch.mm
    monkeypatch.setattr(cpu.spectral, "product_error", lambda: 2.0**-7)
    monkeypatch.setattr(torch, "mm", lambda a, b: rough(a.bfloat16().float(), b.bfloat16().float()))
    assert all(torch.equal(a, b) for a, b in zip(ops.assign(x, centroids), want, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_row_without_direction_is_refused_by_number(name, bad):
    x = draw(90, 64, 11, device=DEVICE[name])
    x[41] = bad
    for clusters in (1, 20):
        with use_backend(name), pytest.raises(GvendiError, match="row 41 of rows has norm"):
            ops.assign(x, centroids_of(clusters, 64, name))


def test_wrong_centroids_are_refused_by_name():
    x = draw(3, 8, 12)
    for centroids, message in (
        (torch.eye(8) * 1.5, "centroid 0 has norm 1.5"),
        (torch.eye(8).double(), "centroids must be contiguous float32"),
        (torch.empty(0, 8), "at least one row"),
        (torch.eye(9), r"rows must have shape \[rows, 9\]"),
    ):
        with pytest.raises(GvendiError, match=message):
            ops.assign(x, centroids)


def test_the_reference_backend_runs_it():
    x, centroids = draw(12, 16, 13), centroids_of(3, 16)
    with use_backend("reference"):
        got = ops.assign(x, centroids)
    want = reference.assign(x, centroids)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))
