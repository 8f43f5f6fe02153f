"""The Triton kernel of stacked experts against the fp64 definition: on a GPU, else in Triton's interpreter."""

import numpy as np
import pytest
import torch
from plain import expert32
from tolerance import check

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import backend, use_backend
from gvendi_fast.kernels.sketch_matrix import (
    ExpertTables,
    SketchSpec,
    expert_column_tables,
    expert_row_tables,
)

triton = backend("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if triton.why_not("expert_sketch", torch.empty(0, device=DEVICE)):
    pytest.skip(f"Triton kernels: {triton.status()}", allow_module_level=True)

from gvendi_fast.kernels.backends.triton import tables  # noqa: E402
from gvendi_fast.kernels.backends.triton.routing import most_chunks, routing_of  # noqa: E402
from gvendi_fast.kernels.backends.triton.runtime import CHUNK_ROWS  # noqa: E402

NAME = "m.mlp.experts.gate_up_proj"
# Rows, I, O, K, experts and how many of them get rows; tiles of every number of rows.
SHAPES = [
    (1, 1, 64, 64, 1, 1, torch.float32),
    (30, 50, 200, 64, 5, 3, torch.float32),
    (20, 50, 130, 64, 5, 3, torch.float16),
    (20, 50, 130, 64, 5, 3, torch.bfloat16),
    (20, 300, 63, 256, 3, 1, torch.bfloat16),
    (5, 1100, 50, 1024, 9, 9, torch.float16),
    (1, 30, 50, 8192, 2, 2, torch.bfloat16),
]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def draw(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers with NaN beside the rows, so that a read past a row shows."""
    x = torch.full((rows, width + 9), float("nan"))
    x[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)[:, :width]


def routed(rows: int, experts: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pick = lambda below: torch.randint(0, below, (rows,), generator=generator).to(DEVICE)  # noqa: E731
    return pick(experts), pick(samples)


def stacked(dim: int, experts: int, width_in: int, width_out: int):
    spec = SketchSpec(dim)
    return (
        expert_column_tables(spec, NAME, experts, width_in),
        expert_row_tables(spec, NAME, experts, width_out),
    )


@pytest.mark.parametrize(("rows", "width_in", "width_out", "dim", "experts", "busy", "dtype"), SHAPES)
def test_kernel(rows, width_in, width_out, dim, experts, busy, dtype):
    a, e = draw(rows, width_in, dtype, 1), draw(rows, width_out, torch.float32, 2)
    a_tables, e_tables = stacked(dim, experts, width_in, width_out)
    where = routed(rows, busy, 3)
    # The last sample has no rows; what is in out stays.
    for given, kept in [((a, e), (a_tables, e_tables)), ((None, e.to(dtype)), (None, e_tables))]:
        wanted = reference.expert_sketch(*given, *where, 4, *kept)
        got = ops.expert_sketch(*given, *where, *kept, torch.ones(4, dim, device=DEVICE))
        check(got, expert32(*given, *where, 4, *kept) + 1, wanted + 1)
        assert torch.equal(got[3], torch.ones(dim, device=DEVICE))


def test_no_rows_or_samples_add_nothing():
    a_tables, e_tables = stacked(64, 3, 20, 30)
    none, out = torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.ones(2, 64, device=DEVICE)
    a, e = draw(0, 20, torch.float32, 1), draw(0, 30, torch.float32, 2)
    assert torch.equal(ops.expert_sketch(a, e, none, none, a_tables, e_tables, out), torch.ones_like(out))
    assert ops.expert_sketch(a, e, none, none, a_tables, e_tables, out[:0]).shape == (0, 64)


def test_the_same_bits_again_in_another_order_and_alone():
    rows = 40
    a, e = draw(rows, 100, torch.float16, 1), draw(rows, 70, torch.float32, 2)
    kept, (experts, samples) = stacked(64, 4, 100, 70), routed(rows, 4, 3)
    run = lambda pick, where, count: ops.expert_sketch(  # noqa: E731
        a[pick], e[pick], experts[pick], where, *kept, torch.zeros(count, 64, device=DEVICE)
    )
    everything = torch.arange(rows, device=DEVICE)
    found = run(everything, samples, 3)
    assert torch.equal(run(everything, samples, 3), found)
    order = experts.argsort(stable=True)
    assert torch.equal(run(order, samples[order], 3), found)
    for sample in range(3):
        own = (samples == sample).nonzero()[:, 0]
        assert torch.equal(run(own, torch.zeros_like(own), 1)[0], found[sample])


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
def test_a_number_of_no_expert_or_sample_shows(bias):
    a, e = draw(6, 20, torch.float32, 1), draw(6, 30, torch.float32, 2)
    a_tables, e_tables = stacked(64, 3, 20, 30)
    given, kept = ((None, e), (None, e_tables)) if bias else ((a, e), (a_tables, e_tables))
    right = torch.tensor([0, 1, 1, 2, 2, 2], device=DEVICE)
    for wrong in (-1, 3, 1 << 40):
        experts, samples = right.clone(), right.clone()
        experts[4] = wrong
        out = torch.zeros(3, 64, device=DEVICE)
        # The verb refuses such numbers where they are on a CPU.
        triton.expert_sketch(*given, experts, right, *kept, out)
        assert out.isnan().all(dim=1).tolist() == [False, False, True]
        assert out[:2].isfinite().all()
        samples[4] = wrong
        out = torch.zeros(3, 64, device=DEVICE)
        triton.expert_sketch(*given, right, samples, *kept, out)
        assert out.isnan().all(dim=1).tolist() == [True, False, False]


def test_what_is_not_finite_reaches_its_own_sample_alone():
    a, e = draw(9, 100, torch.float32, 1), draw(9, 40, torch.float32, 2)
    a[6, 3] = float("inf")
    experts = torch.tensor([0, 1] * 4 + [0], device=DEVICE)
    samples = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2], device=DEVICE)
    out = ops.expert_sketch(
        a, e, experts, samples, *stacked(64, 2, 100, 40), torch.zeros(3, 64, device=DEVICE)
    )
    assert out.isfinite().all(dim=1).tolist() == [True, False, True]


def test_chunks_are_of_one_sample_and_one_expert():
    rows = 5 * CHUNK_ROWS
    for experts, samples in [
        routed(rows, 3, 4),
        (torch.full((rows,), 2, device=DEVICE), torch.full((rows,), 3, device=DEVICE)),
        (torch.zeros(1, dtype=torch.int64, device=DEVICE),) * 2,
        (torch.arange(rows, device=DEVICE) % 3, torch.arange(rows, device=DEVICE) // 3 % 4),
    ]:
        routing = routing_of(experts, samples, 3, 4)
        order, first = routing.order.tolist(), routing.chunks.first.tolist()
        rows = len(experts)
        assert sorted(order) == list(range(rows))
        spans = routing.chunks.spans.tolist()
        assert len(spans) == most_chunks(rows, 3, 4)
        assert first[0] == 0
        assert len(first) == 5
        assert all(begin == end for begin, end, _ in spans[first[-1] :])
        found = []
        for sample in range(4):
            for begin, end, expert in spans[first[sample] : first[sample + 1]]:
                assert 0 < end - begin <= CHUNK_ROWS
                own = order[begin:end]
                assert set(samples[own].tolist()) == {sample}
                assert set(experts[own].tolist()) == {expert}
                assert own == sorted(own)
                found += own
        assert sorted(found) == list(range(rows))


def test_rows_are_put_in_order_once_for_the_parameters_of_a_layer():
    experts, samples = routed(20, 3, 4)
    first = routing_of(experts, samples, 3, 4)
    assert routing_of(experts, samples, 3, 4) is first
    assert routing_of(experts.clone(), samples, 3, 4) is not first
    first = routing_of(experts, samples, 3, 4)
    assert routing_of(experts, samples, 3, 5) is not first
    first = routing_of(experts, samples, 3, 4)
    # Written to in between.
    samples[0] = (samples[0] + 1) % 4
    assert routing_of(experts, samples, 3, 4) is not first


def part_of(whole: ExpertTables, coordinates: slice) -> ExpertTables:
    return ExpertTables(whole.dim, whole.bucket[:, coordinates], whole.sign[:, coordinates])


def test_parts_of_tables():
    """Of a product with some rows or columns of each matrix, that begin inside a block or leave coordinates out."""
    a, e = draw(12, 90, torch.float32, 1), draw(12, 70, torch.float32, 2)
    a_tables, e_tables = stacked(64, 3, 200, 300)
    kept, where = (part_of(a_tables, slice(50, 140)), part_of(e_tables, slice(3, 143, 2))), routed(12, 3, 2)
    wanted = reference.expert_sketch(a, e, *where, 2, *kept)
    got = ops.expert_sketch(a, e, *where, *kept, torch.zeros(2, 64, device=DEVICE))
    check(got, expert32(a, e, *where, 2, *kept), wanted)


def test_tables_on_the_device_are_those_of_each_expert():
    _, whole = stacked(64, 3, 50, 200)
    for kept in (whole, part_of(whole, slice(30, 150)), part_of(whole, slice(0, 1))):
        listed = tables.listing(kept, DEVICE).cpu().numpy()
        for expert, entries in enumerate(listed):
            _, bin_ = entries.nonzero()
            found = entries[entries != 0]
            order = (found & 0xFFFF).argsort()
            assert (found[order] & 0xFFFF).tolist() == list(range(kept.width))
            assert (bin_[order] == kept.bucket[expert]).all()
            assert ((found[order] & ~0xFFFF).view("f4") == kept.sign[expert]).all()
    assert tables.listing(whole, DEVICE).shape == (3, 4, 64)


def test_an_axis_too_long_for_the_tables_is_refused():
    wide = ExpertTables(64, np.zeros((1, 65537), np.int16), np.ones((1, 65537), np.int8))
    with pytest.raises(
        GvendiError, match=r"have 65537 coordinates along an axis; the Triton kernel takes up to 65536"
    ):
        tables.listing(wide, DEVICE)
