"""The sketch of stacked experts: its definition, what the verb refuses, and the compiled CPU kernel against it."""

import numpy as np
import pytest
import torch
from plain import expert32
from tolerance import check

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import cpu, use_backend
from gvendi_fast.kernels.sketch_matrix import (
    ExpertTables,
    SketchSpec,
    expert_column_tables,
    expert_row_tables,
)

COMPILED = pytest.mark.skipif(bool(cpu.why_not("expert_sketch")), reason=f"compiled kernels: {cpu.status()}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAME = "model.layers.0.mlp.experts.gate_up_proj"


def routed(
    rows: int, experts: int, samples: int, seed: int = 0, busy: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and samples of rows in random order; only the first `busy` experts get any."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, busy or experts, (rows,), generator=generator),
        torch.randint(0, samples, (rows,), generator=generator),
    )


def stacked_gradient(
    a: torch.Tensor | None, e: torch.Tensor, experts: torch.Tensor, count: int
) -> torch.Tensor:
    """The materialised gradient [E, O, I], or [E, O] of a bias."""
    x = torch.ones(len(e), 1, dtype=e.dtype) if a is None else a
    g = torch.stack([e[experts == expert].T @ x[experts == expert] for expert in range(count)])
    return g[:, :, 0] if a is None else g


def test_worked_by_hand():
    # K = 2, H = [[1, 1], [1, -1]]. Row 0 at expert 1: S_o e = (0, 3), S_i a = (-2, 0); H of them (3, -3), (-2, -2).
    # Row 1 at expert 0: S_o e = (5, 0), S_i a = (0, 1); H of them (5, 5), (1, -1).
    one, two = np.array([[0], [1]], np.int16), np.array([[1], [0]], np.int16)
    e_tables = ExpertTables(2, one, np.array([[1], [1]], np.int8))
    a_tables = ExpertTables(2, two, np.array([[1], [-1]], np.int8))
    a, e = torch.tensor([[2.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    experts, samples = torch.tensor([1, 0]), torch.tensor([0, 0])
    z = reference.expert_sketch(a, e, experts, samples, 2, a_tables, e_tables)
    assert (z * 2**0.5).round(decimals=12).tolist() == [[-6 + 5, 6 - 5], [0, 0]]
    bias = reference.expert_sketch(None, e, experts, samples, 1, None, e_tables)
    assert (bias * 2**0.5).round(decimals=12).tolist() == [[3 + 5, -3 + 5]]


@pytest.mark.parametrize("turned", [False, True], ids=["E O I", "E I O"])
@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
def test_it_is_the_sketch_of_the_materialised_gradient(bias, turned):
    spec, count = SketchSpec(64, seed=1), 5
    # The last experts see no row, the last sample has none.
    experts, samples = routed(40, count, 3, busy=3)
    a, e = torch.randn(40, 70, dtype=torch.float64), torch.randn(40, 20, dtype=torch.float64)
    a = None if bias else a
    rows = expert_row_tables(spec, NAME, count, 20)
    columns = None if bias else expert_column_tables(spec, NAME, count, 70)
    z = reference.expert_sketch(a, e, experts, samples, 4, columns, rows)
    for sample in range(4):
        own = samples == sample
        g = stacked_gradient(None if bias else a[own], e[own], experts[own], count)
        stacked, transposed = frozenset([NAME]), frozenset([NAME] if turned and not bias else [])
        given = g.mT if transposed else g
        wanted = reference.sketch_of_gradient({NAME: given}, spec, transposed, stacked)
        torch.testing.assert_close(z[sample], wanted)
    assert z[3].abs().max() == 0


def test_each_expert_is_a_parameter_of_its_own_in_the_dense_mode_too():
    spec, name = SketchSpec(64, "rademacher"), frozenset(["w"])
    g = torch.randn(3, 5, 7, dtype=torch.float64)
    wanted = reference.sketch_of_gradient({f"w[{expert}]": g[expert] for expert in range(3)}, spec)
    for turned in (frozenset(), name):
        given = g.mT if turned else g
        torch.testing.assert_close(reference.sketch_of_gradient({"w": given}, spec, turned, name), wanted)
    one_matrix = reference.sketch_of_gradient({"w": g}, spec)
    assert float((one_matrix - wanted).norm()) > 0.1 * float(wanted.norm())


def test_experts_do_not_mix():
    """Gradients of two experts that are alike have sketches that are not: their products are 0 on average."""
    g, products = torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    g = g / g.norm()
    for seed in range(200):
        both = torch.zeros(2, 2, 30, 40, dtype=torch.float64)
        both[0, 0], both[1, 1] = g, g
        first, second = (
            reference.sketch_of_gradient({NAME: one}, SketchSpec(64, seed=seed), stacked=frozenset([NAME]))
            for one in both
        )
        products.append(float(first @ second))
    # Four standard errors of the mean.
    assert abs(np.mean(products)) < 4 * np.std(products) / len(products) ** 0.5


def call(**changed):
    """A right call of the verb on 6 rows, 3 experts and 2 samples, with arguments changed."""
    spec = SketchSpec(64)
    given = {
        "a": torch.randn(6, 10),
        "e": torch.randn(6, 8),
        "experts": torch.tensor([0, 0, 1, 2, 2, 2]),
        "samples": torch.tensor([0, 1, 0, 0, 1, 1]),
        "a_tables": expert_column_tables(spec, NAME, 3, 10),
        "e_tables": expert_row_tables(spec, NAME, 3, 8),
        "out": torch.zeros(2, 64),
    }
    return ops.expert_sketch(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": None}, "only one of a and a_tables is given; give both for stacked weights"),
        ({"a_tables": None}, "only one of a and a_tables is given"),
        ({"a": torch.zeros(6, 9)}, r"a must have shape \[rows, 10\], got \(6, 9\)"),
        ({"a": torch.zeros(5, 10)}, "a has 5 rows, e has 6"),
        ({"e": torch.zeros(6, 8, dtype=torch.int64)}, "e must be floating point"),
        ({"experts": torch.zeros(5, dtype=torch.int64)}, r"experts must be contiguous int64 \[6\]"),
        ({"experts": torch.zeros(6, dtype=torch.int32)}, r"experts must be contiguous int64 \[6\], got torch.int32"),
        ({"experts": torch.full((6,), 3)}, r"experts must lie in 0..2, got 3..3"),
        ({"experts": torch.full((6,), -1)}, r"experts must lie in 0..2, got -1..-1"),
        ({"samples": torch.tensor([0, 0, 0, 0, 0, 2])}, r"samples must lie in 0..1, got 0..2"),
        ({"samples": [0] * 6}, "samples must be a torch.Tensor, got list"),
        ({"out": torch.zeros(2, 128)}, "table has dim 64, out has dim 128"),
        ({"out": torch.zeros(2, 64, dtype=torch.float64)}, r"out must be contiguous float32 \[B, K\]"),
        (
            {"a_tables": expert_column_tables(SketchSpec(64), NAME, 4, 10)},
            "a_tables has 4 experts, e_tables has 3",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_by_name(changed, message):
    with pytest.raises(GvendiError, match=message):
        call(**changed)


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=COMPILED)])
def test_no_rows_and_no_samples_add_nothing(name):
    with use_backend(name):
        none = torch.zeros(0, dtype=torch.int64)
        out = torch.ones(2, 64)
        empty = {"a": torch.zeros(0, 10), "e": torch.zeros(0, 8), "experts": none, "samples": none}
        assert call(**empty, out=out) is out
        assert torch.equal(out, torch.ones(2, 64))
        assert call(**empty, out=torch.zeros(0, 64)).shape == (0, 64)


def drawn(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows with NaN beside them, so that a read past a row shows."""
    x = torch.full((rows, width + 5), float("nan"))
    x[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[:, :width]


# Rows, I, O, K, experts and how many of them get rows: below, at and above K; narrow, wide, and with a narrow rest.
SHAPES = [
    (1, 1, 16, 64, 1, 1),
    (7, 50, 63, 64, 3, 3),
    (150, 64, 200, 64, 4, 1),
    (300, 255, 256, 256, 5, 4),
    (90, 288, 1025, 1024, 40, 40),
    (30, 4864, 50, 2048, 3, 2),
]


@COMPILED
@DTYPES
@pytest.mark.parametrize(("rows", "width_in", "width_out", "dim", "experts", "busy"), SHAPES)
def test_compiled_kernel(rows, width_in, width_out, dim, experts, busy, dtype):
    spec = SketchSpec(dim)
    a, e = drawn(rows, width_in, dtype, 1), drawn(rows, width_out, torch.float32, 2)
    a_tables = expert_column_tables(spec, NAME, experts, width_in)
    e_tables = expert_row_tables(spec, NAME, experts, width_out)
    # The last sample has no rows.
    where = routed(rows, experts, 3, busy=busy)
    for given, tables in [((a, e), (a_tables, e_tables)), ((None, e.to(dtype)), (None, e_tables))]:
        wanted = reference.expert_sketch(*given, *where, 4, *tables)
        before = torch.ones(4, dim)
        with use_backend("cpu"):
            got = ops.expert_sketch(*given, *where, *tables, before.clone())
        check(got, expert32(*given, *where, 4, *tables) + before, wanted + 1)
        assert torch.equal(got[3], before[3])


def compiled(a, e, experts, samples, count, dim=256):
    spec, stacked = SketchSpec(dim), 6
    tables = (
        expert_column_tables(spec, NAME, stacked, a.shape[1]),
        expert_row_tables(spec, NAME, stacked, e.shape[1]),
    )
    with use_backend("cpu"):
        return ops.expert_sketch(a, e, experts, samples, *tables, torch.zeros(count, dim))


@COMPILED
def test_one_expert_is_a_linear_layer_to_the_bit():
    a, e = drawn(200, 300, torch.float32, 1), drawn(200, 70, torch.float32, 2)
    spec, segments = SketchSpec(256), torch.tensor([[0, 90], [90, 90], [90, 200]])
    samples = torch.tensor([0] * 90 + [2] * 110)
    columns, rows = expert_column_tables(spec, NAME, 1, 300), expert_row_tables(spec, NAME, 1, 70)
    with use_backend("cpu"):
        wanted = ops.linear_sketch(a, columns.table(0), [(e, rows.table(0))], segments, torch.zeros(3, 256))
        got = ops.expert_sketch(a, e, 0 * samples, samples, columns, rows, torch.zeros(3, 256))
    assert torch.equal(got, wanted)


@COMPILED
def test_the_same_bits_for_any_threads_batch_and_order():
    a, e = drawn(400, 100, torch.float32, 1), drawn(400, 70, torch.float32, 2)
    experts, samples = routed(400, 6, 5)
    threads = torch.get_num_threads()
    found = compiled(a, e, experts, samples, 5)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(compiled(a, e, experts, samples, 5), found), count
    finally:
        torch.set_num_threads(threads)
    # A sample's rows keep their order: as they came, sorted by expert, and alone.
    order = experts.argsort(stable=True)
    assert torch.equal(compiled(a[order], e[order], experts[order], samples[order], 5), found)
    for sample in range(5):
        own = samples == sample
        alone = compiled(a[own], e[own], experts[own], 0 * samples[own], 1)
        assert torch.equal(alone[0], found[sample])


@COMPILED
@DTYPES
def test_parts_of_tables(dtype):
    """Of a product with some rows or columns of each matrix, that begin inside a block or leave coordinates out."""
    spec, where = SketchSpec(64), routed(30, 3, 2)
    whole = expert_column_tables(spec, NAME, 3, 200), expert_row_tables(spec, NAME, 3, 300)
    for places in [
        (slice(50, 140), slice(3, 143, 2)),
        (slice(0, 140), slice(128, 300)),
        (slice(8, 20), slice(299, 300)),
    ]:
        kept = [
            ExpertTables(64, x.bucket[:, part], x.sign[:, part])
            for x, part in zip(whole, places, strict=True)
        ]
        a, e = drawn(30, kept[0].width, dtype, 1), drawn(30, kept[1].width, dtype, 2)
        wanted = reference.expert_sketch(a, e, *where, 2, *kept)
        with use_backend("cpu"):
            got = ops.expert_sketch(a, e, *where, *kept, torch.zeros(2, 64))
        check(got, expert32(a, e, *where, 2, *kept), wanted)


@COMPILED
def test_an_extension_from_before_the_kernel_is_named(monkeypatch):
    class Older:
        pass

    monkeypatch.setattr(cpu, "_cpu", Older)
    assert cpu.why_not("expert_sketch") == (
        "the compiled kernels were built before there was expert_sketch; run pip install again"
    )
