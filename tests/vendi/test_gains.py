"""Gains and removals against the eigenvalue definition: the verb, its kernels, and what a state makes of them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.kernels.backends import backend, cpu, use_backend
from gvendi_fast.kernels.spectrum import marginal_change, quadrature
from gvendi_fast.vendi import VendiState, between_source, jackknife, leave_one_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Bound of the quadrature for one row: 7e-8 for the sum, 1e-7 below the first node, 4e-7 beyond the last.
QUADRATURE = 6e-7
BACKENDS = [
    name for name in ("cpu", "triton", "reference") if not backend(name).why_not("gain", torch.empty(0))
]


def rows_of(n: int, dim: int, condition: float, seed: int = 0) -> torch.Tensor:
    """Unit rows float64 [n, dim], Gaussian, of a covariance with this condition number."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -math.log10(condition) / 2, dim, dtype=torch.float64)
    return reference.normalise(torch.randn(n, dim, generator=generator, dtype=torch.float64) * scale)


def entropy(a: torch.Tensor) -> float:
    return reference.entropy(torch.linalg.eigvalsh(a / a.trace()))


def test_the_definition_on_cases_by_hand():
    # S counts x ln x of the eigenvalues: (1, 1) becomes (2, 1), (0, 1), and (2, 2) with both rows.
    a = torch.eye(2, dtype=torch.float64)
    rows = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
    assert reference.gain(a, rows, 1).tolist() == pytest.approx([2 * math.log(2)] * 2)
    assert reference.gain(a, rows, -1).tolist() == pytest.approx([0.0] * 2)
    blocks = reference.block_gain(a, rows, torch.tensor([0, 2, 2]))
    assert blocks.tolist() == pytest.approx([4 * math.log(2), 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("n", "dim"), [(20, 64), (64, 64), (500, 65), (900, 24)])
def test_every_backend_computes_the_formula(n, dim, name, dtype):
    rows, more = rows_of(n, dim, 1e4), rows_of(37, dim, 10.0, seed=1)
    eigenvalues, vectors = torch.linalg.eigh(rows.T @ rows)
    eigenvalues = eigenvalues.clamp_min(0)
    for sign, picked in ((1, more), (-1, rows[:19])):
        at = quadrature(eigenvalues, sign)
        coordinates = (picked @ vectors).to(DEVICE, dtype).contiguous()
        want = torch.stack(marginal_change(coordinates.cpu().double().square(), at))
        at = quadrature(eigenvalues.to(DEVICE), sign)
        # A row's place in the result is not the next row's: the stride is wider than the block.
        out = torch.full((4, len(picked) + 5), math.nan, dtype=torch.float64, device=DEVICE)
        backend(name).gain(coordinates, at, out[:, : len(picked)])
        assert out[:, len(picked) :].isnan().all()
        torch.testing.assert_close(out[:, : len(picked)].cpu(), want, rtol=1e-12, atol=1e-11)
        alone = torch.empty(4, 1, dtype=torch.float64, device=DEVICE)
        backend(name).gain(coordinates[5:6].clone(), at, alone)
        if name != "reference":
            assert torch.equal(alone, out[:, 5:6])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_bits_do_not_depend_on_threads_or_instruction_set(dtype):
    coordinates = rows_of(101, 200, 100.0).to(dtype)
    eigenvalues = torch.linspace(1, 50, 200, dtype=torch.float64)
    before, found = (torch.get_num_threads(), cpu.current_isa()), []
    try:
        for isa in cpu.available_isas():
            for threads in (1, 2, 5):
                cpu.set_isa(isa)
                torch.set_num_threads(threads)
                for sign in (1, -1):
                    found.append(torch.full((4, 101), math.nan, dtype=torch.float64))
                    cpu.gain(coordinates, quadrature(eigenvalues, sign), found[-1])
    finally:
        torch.set_num_threads(before[0])
        cpu.set_isa(before[1])
    assert all(torch.equal(out, found[i % 2]) for i, out in enumerate(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e7])
@pytest.mark.parametrize(("n", "repeat"), [(24, 1), (48, 3), (60, 1), (400, 1), (400, 5), (20000, 1)])
def test_gains_and_removals_meet_the_eigenvalues(n, repeat, condition, dtype):
    dim = 48
    rows = rows_of(n, dim, condition, seed=n)
    rows = rows[torch.arange(n) // repeat].to(dtype)
    state = VendiState(dim).update(rows)
    # New rows, rows that are there already, and the state's own directions; those without rows tie.
    axes = state.eigenbasis()[1].T[-min(n // repeat, dim) // 2 :]
    candidates = torch.cat([rows_of(60, dim, condition, 1), rows[::repeat][:40], axes]).to(dtype)
    a, level = state.matrix, entropy(state.matrix)
    for sign, picked in ((1, candidates), (-1, rows[::repeat][:60])):
        changed = [entropy(a + sign * torch.outer(x, x)) for x in reference.normalise(picked)]
        want = np.array(changed) - level
        got = state.gain(picked, remove=sign < 0).numpy()
        assert got.dtype == np.float64
        error = np.abs(got - want).max()
        assert error <= 1e-3 * want.std()
        assert spearmanr(got, want)[0] >= 0.9999
        if dtype == torch.float64:
            assert error * (n + sign) <= QUADRATURE


def test_gains_by_hand():
    n = 7
    state = VendiState(4).update(torch.tensor([[2.0, 0.0, 0.0, 0.0]]).repeat(n, 1))
    copies, other = state.gain(torch.tensor([[-1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])).tolist()
    assert copies == pytest.approx(0, abs=1e-9)
    p = 1 / (n + 1)
    assert other == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=QUADRATURE)
    # Every direction adds the same to a flat state, and every row takes the same away.
    flat, eye = VendiState(16).update(torch.eye(16, dtype=torch.float64)), torch.eye(16, dtype=torch.float64)
    after = math.log(17) - 2 * math.log(2) / 17
    assert flat.gain(eye).tolist() == pytest.approx([after - math.log(16)] * 16, abs=QUADRATURE)
    assert flat.gain(eye, remove=True).tolist() == pytest.approx([math.log(15 / 16)] * 16, abs=QUADRATURE)


def test_an_empty_state_takes_every_row_alike():
    assert VendiState(8).gain(torch.ones(3, 8)).tolist() == [0.0] * 3
    blocks = VendiState(4).block_gain(torch.eye(4), torch.tensor([0, 1, 1, 4]))
    assert blocks.tolist() == pytest.approx([0.0, 0.0, math.log(3)])
    assert VendiState(4).update(torch.eye(4)).gain(torch.empty(0, 4)).shape == (0,)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_of_few_bits_are_made_again(precision):
    state = VendiState(64).update(rows_of(300, 64, 1e3).float())
    rows = rows_of(100, 64, 1e3, 1).float()
    want = state.gain(rows.double())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        got = state.gain(rows)
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((got - want).abs().max()) <= 1e-4 * float(want.std())


@pytest.mark.parametrize("condition", [1.0, 1e7])
@pytest.mark.parametrize("n", [20, 300])
def test_block_gains_meet_the_eigenvalues(n, condition):
    dim = 64
    state = VendiState(dim).update(rows_of(n, dim, condition))
    rows = rows_of(120, dim, condition, 1)
    rows[8] = rows[7]
    boundaries = torch.tensor([2, 3, 6, 6, 11, 20, 120])
    got = state.block_gain(rows, boundaries)
    counts = boundaries.diff()
    changed = [entropy(state.matrix + part.T @ part) for part in rows[2:].split([*counts.tolist()])]
    error = (got - torch.tensor(changed, dtype=torch.float64) + entropy(state.matrix)).abs() * (n + counts)
    assert (error <= QUADRATURE * counts + 1e-9).all()
    assert float(got[0]) == pytest.approx(float(state.gain(rows[2:3])[0]), abs=1e-9)
    # Rows that repeat each other add less than apart.
    assert float(got[2]) == 0.0
    want = reference.block_gain(state.matrix, rows, boundaries)
    before = reference.trace_log(state.matrix)
    level = torch.log(n + counts) - (before + want) / (n + counts) - entropy(state.matrix)
    torch.testing.assert_close(got, level, rtol=0, atol=QUADRATURE)


@pytest.mark.parametrize(
    ("n", "repeat", "condition"), [(300, 1, 1.0), (300, 1, 1e7), (20, 1, 1e7), (60, 6, 1e3)]
)
def test_surprisals_average_to_the_entropy(n, repeat, condition):
    rows = rows_of(n, 32, condition)[torch.arange(n) // repeat]
    state = VendiState(32).update(rows)
    surprisal = state.contributions(rows)
    assert surprisal.dtype == torch.float64
    assert float(surprisal.min()) >= 0
    assert float(surprisal.mean()) == pytest.approx(state.entropy(), abs=1e-9)
    # The definition, where Sigma has full rank.
    if n == 300:
        p, q = torch.linalg.eigh(state.matrix / n)
        want = -((rows @ (q * p.log()) @ q.T) * rows).sum(dim=1)
        torch.testing.assert_close(surprisal, want, rtol=0, atol=1e-9)
    # Sums of A in float32 move it by as much as they move A.
    rounded = VendiState(32).update(rows.float())
    mean = float(rounded.contributions(rows.float()).mean())
    assert mean == pytest.approx(rounded.entropy(), abs=1e-6)


def test_surprisal_of_a_direction_without_rows_is_finite():
    state = VendiState(8).update(torch.eye(8)[:3])
    assert state.contributions(torch.eye(8)[[0, 5]]).tolist() == pytest.approx(
        [math.log(3), 52 * math.log(2)]
    )


def test_leave_one_out_contributions():
    rows = rows_of(40, 16, 100.0)
    state = VendiState(16).update(rows)
    want = [state.entropy() - reference.entropy_after_removal(state.matrix, 40, x) for x in rows]
    got = state.contributions(rows, kind="loo")
    assert got.tolist() == pytest.approx(want, abs=QUADRATURE / 39)
    torch.testing.assert_close(state.entropy() - leave_one_out(state, rows), got, rtol=0, atol=1e-12)


def test_entropy_between_sources():
    rows = rows_of(300, 16, 50.0).split([120, 100, 80])
    states = {name: VendiState(16, {"k": 1}).update(part) for name, part in zip("abc", rows, strict=True)}
    parts = between_source(states)
    whole = VendiState(16).update(torch.cat(rows))
    assert parts.entropy == pytest.approx(whole.entropy(), abs=1e-12)
    assert parts.within + parts.between == pytest.approx(parts.entropy, abs=1e-12)
    assert parts.between > 0
    for (name, source), part in zip(parts.sources.items(), rows, strict=True):
        assert (source.n, source.weight) == (len(part), len(part) / 300)
        assert source.entropy == states[name].entropy()
        # D is the surprisal of the source's rows in the whole less their own.
        surprisal = float(whole.contributions(part).mean())
        assert source.divergence == pytest.approx(surprisal - source.entropy, abs=1e-9)
    assert [states[name].n for name in "abc"] == [120, 100, 80]


def test_sources_of_separate_directions_and_equal_sources():
    a, b = VendiState(4).update(torch.eye(4)[:2].repeat(3, 1)), VendiState(4).update(torch.eye(4)[2:])
    parts = between_source({"a": a, "b": b})
    weights = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert parts.between == pytest.approx(weights, abs=1e-12)
    assert parts.sources["a"].divergence == pytest.approx(-math.log(0.75), abs=1e-12)
    same = between_source({"a": a, "again": a})
    assert same.between == pytest.approx(0, abs=1e-12)
    assert between_source({"a": a}).between == pytest.approx(0, abs=1e-12)


def test_gvendi_with_its_interval():
    rows = rows_of(200, 16, 10.0)
    state = VendiState(16).update(rows)
    assert state.gvendi(ci="jackknife", rows=rows) == jackknife(state, rows)
    assert state.gvendi(1.0, ci="jackknife", rows=iter(rows.split(64)), level=0.5).level == 0.5


def test_refusals():
    rows = rows_of(9, 4, 1.0)
    state = VendiState(4, {"seed": 0}).update(rows)
    basis, bad = state.eigenbasis(), rows.clone()
    bad[3] = math.nan
    cases = [
        (r"shape \(9, 3\)", lambda: state.gain(rows[:, :3])),
        (r"shape \(9, 3\)", lambda: VendiState(4).gain(rows[:, :3])),
        (r"row 3 of rows has norm nan", lambda: state.gain(bad)),
        (r"row 3 of rows has norm nan", lambda: VendiState(4).gain(bad)),
        (r"row 3 of rows has norm nan", lambda: state.contributions(bad)),
        (r"row 3 of rows has norm nan", lambda: state.block_gain(bad, torch.tensor([0, 2, 5]))),
        (r"n = 1; wanted at least 2", lambda: VendiState(4).update(rows[:1]).gain(rows[:1], remove=True)),
        (
            r"row 1 of rows is not in",
            lambda: VendiState(4).update(torch.eye(4)[:2]).gain(torch.eye(4)[1:], True),
        ),
        (r"n = 0", lambda: VendiState(4).contributions(rows)),
        (r"kind is 'rank'; wanted \"surprisal\"", lambda: state.contributions(rows, "rank")),
        (r"ci is 'boot'", lambda: state.gvendi(ci="boot")),
        (r"ci needs the rows", lambda: state.gvendi(ci="jackknife")),
        (r"q is 2", lambda: state.gvendi(2, ci="jackknife", rows=rows)),
        (r"boundaries is torch.float32", lambda: state.block_gain(rows, torch.tensor([0.0, 2.0]))),
        (r"runs from 0 to 10; .* 0\.\.9", lambda: state.block_gain(rows, torch.tensor([0, 10]))),
        (r"do not decrease", lambda: state.block_gain(rows, torch.tensor([4, 2, 5]))),
        (r"sign must be 1", lambda: ops.gain(rows, *basis, 0)),
        (
            r"row 2 of rows has length 2",
            lambda: ops.gain(rows * torch.tensor([[1], [1], [2]] * 3), *basis, 1),
        ),
        (r"row 0 of rows has length 0", lambda: ops.gain(rows.float() * 0, *basis, 1)),
        (r"eigenvalues must be float64 \[4\]", lambda: ops.gain(rows, basis[0].float(), basis[1], 1)),
        (r"vectors must be float64 \[4, 4\]", lambda: ops.gain(rows, basis[0], basis[1][:3], 1)),
        (r"none negative", lambda: ops.gain(rows, basis[0] - 9, basis[1], 1)),
        (r"states is empty", lambda: between_source({})),
        (r"'b' holds no rows", lambda: between_source({"a": state, "b": VendiState(4)})),
        (r"(?s)'seed': 0.*None", lambda: between_source({"a": state, "b": VendiState(4).update(rows)})),
    ]
    for message, call in cases:
        with pytest.raises(GvendiError, match=message):
            call()


def test_a_backend_that_cannot_says_why():
    with (
        use_backend("cpu"),
        pytest.raises(GvendiError, match=r"cannot run gain|compiled kernels|on the device 'meta'"),
    ):
        ops.gain(torch.eye(4, device="meta"), torch.ones(4).double(), torch.eye(4).double(), 1)
    assert "float16" in (cpu.why_not("gain", torch.empty(2, dtype=torch.float16)) or "float16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can see")
def test_a_state_on_the_gpu_agrees():
    rows = rows_of(300, 64, 1e3).float()
    here, there = VendiState(64).update(rows), VendiState(64, device="cuda").update(rows.cuda())
    for got, want in (
        (there.gain(rows), here.gain(rows)),
        (there.gain(rows, remove=True), here.gain(rows, remove=True)),
        (there.contributions(rows), here.contributions(rows)),
    ):
        assert float((got - want).abs().max()) <= 1e-3 * float(want.std())
