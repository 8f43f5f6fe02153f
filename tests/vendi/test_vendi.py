"""G-Vendi, its state and the jackknife, against cases worked by hand and eigenvalues of what stays."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import ops, reference
from gvendi_fast.vendi import VendiState, gvendi, jackknife, leave_one_out
from gvendi_fast.vendi.jackknife import interactions

ORDERS = [0.3, 1.0, 1.7, 2.0, 5.0, math.inf]
# A is summed in float32 products (relative rounding 6e-8); entropies of hand-made cases follow to this.
CLOSE = 1e-5


def rows_of(n: int, dim: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Gaussian rows float64 [n, dim] whose standard deviation falls as k^-decay along the coordinates."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -decay
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) * scale


def exact_state(rows: torch.Tensor) -> VendiState:
    """A state whose matrix is summed in float64, to measure the integral's error alone."""
    state = VendiState(rows.shape[1]).update(rows)
    state.matrix.copy_(reference.covariance(rows)[0])
    return state


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("n", [5, 16])
def test_orthonormal_rows_count_their_number_and_repeats_change_nothing(q, n):
    rows = torch.linalg.qr(rows_of(16, 16, 0.0))[0][:n] * torch.arange(1, n + 1)[:, None]
    assert VendiState(16).update(rows).gvendi(q) == pytest.approx(n, rel=CLOSE)
    assert gvendi(rows, q) == pytest.approx(n, rel=CLOSE)
    assert gvendi(rows.repeat(4, 1), q) == pytest.approx(n, rel=CLOSE)


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_copies_of_one_row_score_one(q, n):
    rows = rows_of(1, 32, 0.5).repeat(n, 1)
    assert VendiState(32).update(rows).gvendi(q) == pytest.approx(1.0, abs=CLOSE)
    assert gvendi(rows, q) == pytest.approx(1.0, abs=CLOSE)


@pytest.mark.parametrize("q", [0.3, 0.999999, 1.0, 1.000001, 1.7, 2.0, 40.0, 5000.0, math.inf])
def test_two_eigenvalues_follow_the_formula(q):
    rows = np.zeros((10, 4), dtype=np.float32)
    rows[:7, 1], rows[7:, 2] = 2.0, -5.0
    if q == 1:
        wanted = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    elif math.isinf(q):
        wanted = -math.log(0.7)
    else:
        wanted = (q * math.log(0.7) + math.log1p((3 / 7) ** q)) / (1 - q)
    state = VendiState(4).update(rows)
    # The formula itself loses digits as 1 / |q - 1|.
    tolerance = 1e-12 if math.isinf(q) or abs(q - 1) > 1e-3 or q == 1 else 1e-9
    assert state.entropy(q) == pytest.approx(wanted, rel=tolerance)
    assert state.spectrum().tolist() == pytest.approx([0.7, 0.3, 0, 0], abs=1e-15)


def test_entropy_is_continuous_at_one_and_falls_with_the_order():
    state = VendiState(32).update(rows_of(100, 32, 0.7))
    for step in (1e-6, 1e-10, 1e-14):
        assert state.entropy(1 - step) == pytest.approx(state.entropy(1), abs=10 * step + 1e-13)
        assert state.entropy(1 + step) == pytest.approx(state.entropy(1), abs=10 * step + 1e-13)
    values = [state.gvendi(q) for q in (0.1, 0.5, 0.9, 1.0, 1.1, 1.49, 1.51, 2.0, 3.0, 10.0, 300.0, math.inf)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert 1 < values[-1] < values[0] < 32


@pytest.mark.parametrize("q", ORDERS)
def test_entropy_agrees_with_the_definition(q):
    rows = rows_of(300, 24, 0.6, seed=3)
    a, n = reference.covariance(rows)
    wanted = reference.entropy(torch.linalg.eigvalsh(a / n), q)
    assert VendiState(24).update(rows).entropy(q) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("n", [23, 24, 25])
def test_gram_and_covariance_give_one_value(n):
    rows = rows_of(n, 24, 0.6)
    for q in ORDERS:
        assert gvendi(rows, q) == pytest.approx(VendiState(24).update(rows).gvendi(q), rel=CLOSE)


def test_kinds_of_rows():
    rows = rows_of(20, 8, 0.3)
    wanted = VendiState(8).update(rows).gvendi()
    frozen = rows.numpy().astype(">f8")[:, ::-1]
    frozen.flags.writeable = False
    for same in (
        rows.float(),
        rows * 1e150,
        rows * 1e-150,
        rows.float().numpy(),
        frozen,
        rows.T.contiguous().T,
    ):
        assert VendiState(8).update(same).gvendi() == pytest.approx(wanted, rel=1e-6)
    for coarse in (rows.half(), rows.bfloat16(), rows.numpy().astype(np.float16)):
        assert VendiState(8).update(coarse).gvendi() == pytest.approx(wanted, rel=1e-2)
    assert VendiState(8).update(rows).update(rows[:0]).n == 20


def test_blocks_and_merging_equal_one_update():
    rows = rows_of(5000, 16, 0.5).float()
    whole = VendiState(16, {"k": 1}).update(rows)
    blocks = VendiState(16, {"k": 1})
    shards = VendiState(16)
    for part in rows.split(617):
        blocks.update(part)
        shards.merge(VendiState(16, {"k": 1}).update(part))
    assert whole.n == blocks.n == shards.n == 5000
    assert shards.spec == {"k": 1}
    torch.testing.assert_close(blocks.matrix, shards.matrix, rtol=0, atol=5000 * 2.0**-52)
    # Blocks cut elsewhere round their float32 products elsewhere.
    torch.testing.assert_close(blocks.matrix, whole.matrix, rtol=0, atol=5000 * 2.0**-24)
    assert blocks.entropy() == pytest.approx(whole.entropy(), abs=1e-7)
    assert torch.equal(VendiState(16).update(rows).spectrum(), whole.spectrum())


def test_an_update_or_merge_renews_what_was_cached():
    rows = rows_of(60, 8, 0.5)
    state = VendiState(8).update(rows[:20])
    first = state.gvendi(), leave_one_out(state, rows[:1])
    state.update(rows[20:40]).merge(VendiState(8).update(rows[40:]))
    fresh = VendiState(8).update(rows)
    assert state.gvendi() == pytest.approx(fresh.gvendi(), rel=1e-6)
    assert state.gvendi() != pytest.approx(first[0], rel=1e-3)
    torch.testing.assert_close(leave_one_out(state, rows), leave_one_out(fresh, rows), rtol=0, atol=1e-6)
    held = state.spectrum()
    held.zero_()
    assert float(state.spectrum().sum()) == pytest.approx(1.0)


def test_effective_spectrum_counts_eigenvalues():
    rows = torch.eye(8).repeat_interleave(torch.tensor([8, 4, 2, 2, 0, 0, 0, 0]), dim=0)
    state = VendiState(8).update(rows)
    assert state.effective_spectrum() == {0.5: 1, 0.9: 4, 0.99: 4}
    assert state.effective_spectrum([0.51, 0.75, 1.0]) == {0.51: 2, 0.75: 2, 1.0: 4}
    with pytest.raises(GvendiError, match=r"shares holds 90"):
        state.effective_spectrum([90])


def test_save_and_load(tmp_path):
    spec = {"sketch": {"dim": 16, "seed": 7}, "widths": (1, 2)}
    state = VendiState(16, spec).update(rows_of(50, 16, 0.5))
    path = tmp_path / "state.safetensors"
    state.save(path)
    back = VendiState.load(path)
    assert (back.n, back.dim, back.spec) == (50, 16, {"sketch": {"dim": 16, "seed": 7}, "widths": [1, 2]})
    assert torch.equal(back.matrix, state.matrix)
    assert back.gvendi() == state.gvendi()
    assert back.merge(state).n == 100
    back.save(path)
    assert VendiState.load(path).n == 100
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_load_refuses_other_files(tmp_path):
    from safetensors.torch import save_file

    text, other = tmp_path / "text", tmp_path / "other"
    text.write_bytes(b"not a state at all")
    save_file({"matrix": torch.eye(2)}, other)
    for path in (text, other):
        with pytest.raises(GvendiError, match=rf"{path.name}.*VendiState\.save"):
            VendiState.load(path)
    with pytest.raises(GvendiError, match="does not exist; wanted a file written by"):
        VendiState.load(tmp_path / "absent")


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("index", [0, 3, 4500])
def test_a_bad_row_is_named_and_leaves_the_state_alone(index, value):
    rows = rows_of(4600, 4, 0.0)
    state = VendiState(4).update(rows[:10])
    before = state.matrix.clone()
    rows[index] = value
    with pytest.raises(GvendiError, match=rf"row {index} of rows has norm"):
        state.update(rows)
    assert state.n == 10
    assert torch.equal(state.matrix, before)


def test_refusals():
    state = VendiState(4, {"seed": 0}).update(rows_of(9, 4, 0.0))
    cases = [
        (r"shape \(3, 5\); wanted \[N, 4\]", lambda: state.update(torch.ones(3, 5))),
        (r"shape \(4,\)", lambda: state.update(torch.ones(4))),
        (r"dtype torch.int64", lambda: state.update(torch.ones(3, 4, dtype=torch.int64))),
        (r"rows is a list", lambda: state.update([[1.0, 2.0, 3.0, 4.0]])),
        (r"n = 0", lambda: VendiState(4).gvendi()),
        (r"n = 0", lambda: gvendi(torch.ones(0, 4), 2)),
        (r"shape \(4,\)", lambda: gvendi(torch.ones(4))),
        (r"q is 0", lambda: state.entropy(0)),
        (r"q is nan", lambda: state.entropy(math.nan)),
        (r"dim is 0", lambda: VendiState(0)),
        (r"spec cannot", lambda: VendiState(4, {"seed": torch.ones(1)})),
        (r"dim 4 and 5", lambda: state.merge(VendiState(5))),
        (r"(?s)'seed': 0.*'seed': 1", lambda: state.merge(VendiState(4, {"seed": 1}))),
        (r"(?s)'seed': 0.*None", lambda: state.merge(VendiState(4))),
        (r"q is 2", lambda: jackknife(state, rows_of(9, 4, 0.0), q=2)),
        (r"level is 95", lambda: jackknife(state, rows_of(9, 4, 0.0), level=95)),
        (r"rows \(8\) are not those of the state \(9\)", lambda: jackknife(state, rows_of(9, 4, 0.0)[:8])),
        (r"rows \(9\) are not those", lambda: jackknife(state, rows_of(9, 4, 1.0)[:, [1, 0, 2, 3]])),
        (
            r"row 1 of rows is not in",
            lambda: leave_one_out(VendiState(4).update(torch.eye(4)[:2]), torch.eye(4)[1:]),
        ),
        (r"at least 2", lambda: leave_one_out(VendiState(4).update(torch.eye(4)[:1]), torch.eye(4)[:1])),
    ]
    for message, call in cases:
        with pytest.raises(GvendiError, match=message):
            call()
    assert state.n == 9


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("n", "dim"), [(8, 16), (8, 64), (40, 64), (64, 64), (200, 64), (2000, 32)])
def test_removal_and_gain_meet_the_eigenvalues(n, dim, decay, repeat):
    rows = rows_of(n, dim, decay, seed=n)
    if repeat:
        rows[n // 2 :] = rows[: n - n // 2].clone()
    unit = reference.normalise(rows)
    state = exact_state(rows)
    picked = unit[:: max(1, n // 25)]
    oracle = [reference.entropy_after_removal(state.matrix, n, x) for x in picked]
    wanted = torch.tensor(oracle, dtype=torch.float64)
    # Bound of the quadrature: 7e-8 for the sum, 1e-7 below the first node, 4e-7 beyond the last.
    bound = 6e-7
    error = float((leave_one_out(state, picked) - wanted).abs().max()) * (n - 1)
    assert error <= bound
    assert error <= 1e-3 * float(wanted.std()) * (n - 1)

    change = ops.gain(picked, *state.eigenbasis(), 1)[0]
    torch.testing.assert_close(change, reference.gain(state.matrix, picked, 1), rtol=0, atol=bound)


@pytest.mark.parametrize("n", [8, 40, 200, 2000])
def test_jackknife_is_the_brute_force_one(n):
    dim = 24
    rows = rows_of(n, dim, 0.7, seed=n)
    state = VendiState(dim).update(rows)
    exact, _ = reference.covariance(rows)
    left = exact - torch.einsum("ni,nj->nij", *[reference.normalise(rows)] * 2)
    p = torch.linalg.eigvalsh(left).clamp_min(0) / (n - 1)
    leave = -torch.special.xlogy(p, p).sum(dim=1)
    entropy = reference.entropy(torch.linalg.eigvalsh(exact / n))
    first = (n - 1) / n * float((leave - leave.mean()).square().sum())

    whole = jackknife(state, rows.numpy())
    assert (whole.n, whole.level) == (n, 0.95)
    assert whole.value == pytest.approx(math.exp(entropy), rel=1e-6)
    # What pairs of rows do together is taken off, at most 0.3 of it; 8 rows of 24 directions are little but pairs.
    assert 0.7 * first * (1 - 1e-4) <= whole.se**2 <= first * (1.2 if n == 8 else 1 + 1e-4)
    moved = ((leave - leave.mean()) / leave.std(correction=0)).pow(4).mean()
    freedom = min(n - 1, 2 * n / (float(moved) - 1))
    assert whole.freedom == pytest.approx(freedom, rel=1e-3)
    reach = float(student.ppf(0.975, freedom)) * math.sqrt(2) * whole.se
    assert math.log(whole.low) == pytest.approx(max(entropy - reach, 0), abs=1e-4)
    assert math.log(whole.high) == pytest.approx(min(entropy + reach, math.log(min(n, dim))), abs=1e-4)

    streamed = jackknife(state, (part for part in rows.float().split(37)))
    assert (streamed.se, streamed.freedom) == pytest.approx((whole.se, whole.freedom), rel=1e-4)
    narrow = jackknife(state, rows, level=0.5)
    assert whole.low < narrow.low < narrow.value <= narrow.high <= whole.high


@pytest.mark.parametrize(("n", "dim"), [(12, 40), (12, 8), (90, 8)])
def test_the_second_order_is_that_of_all_pairs_left_out(n, dim):
    rows = reference.normalise(rows_of(n, dim, 0.3, seed=n))
    state = exact_state(rows)

    def left_out(*places):
        p = torch.linalg.eigvalsh(state.matrix - rows[list(places)].T @ rows[list(places)]).clamp_min(0)
        return float(torch.special.xlogy(p, p).sum())

    found = interactions(state, rows[:6])
    for i in range(6):
        for j in range(i):
            wanted = left_out(i, j) - left_out(i) - left_out(j) + left_out()
            assert float(found[i, j]) == pytest.approx(wanted, abs=1e-5)
    torch.testing.assert_close(found, found.T)


def test_jackknife_of_one_row_and_of_orthogonal_rows():
    one = jackknife(VendiState(8).update(torch.ones(1, 8)), torch.ones(1, 8))
    # Every row alone scores 1.
    assert (one.value, one.low, one.high, one.se, one.n) == (1.0, 1.0, 1.0, 0.0, 1)
    n = 6
    rows = torch.eye(32)[:n]
    interval = jackknife(VendiState(32).update(rows), rows)
    assert interval.se == pytest.approx(0.0, abs=1e-7)
    assert interval.high <= n
    # No score lies above the number of rows, or K.
    assert jackknife(VendiState(4).update(rows_of(6, 4, 0.0)), rows_of(6, 4, 0.0)).high <= 4
    assert jackknife(VendiState(64).update(rows_of(6, 64, 0.0)), rows_of(6, 64, 0.0)).high <= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can see")
def test_a_state_on_the_gpu_agrees():
    rows = rows_of(300, 64, 0.7)
    here = VendiState(64).update(rows)
    there = VendiState(64, device="cuda").update(rows.cuda()).merge(VendiState(64))
    a, b = jackknife(here, rows), jackknife(there, rows)
    assert (b.value, b.low, b.high, b.se) == pytest.approx((a.value, a.low, a.high, a.se), rel=CLOSE)


def test_order_just_below_1_is_continuous_where_small_eigenvalues_are_cut_off():
    # Rows whose spectrum falls steeply, so that many eigenvalues lie below what may be rounding.
    scales = torch.logspace(0, -5, 32)
    state = VendiState(32).update(rows_of(400, 32, 0.0) * scales)
    assert float(state.spectrum().min()) < 2.0**-22
    assert state.entropy(1 - 1e-6) == pytest.approx(state.entropy(1), abs=1e-4)
