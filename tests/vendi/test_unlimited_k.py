"""G-Vendi for unlimited K against exact Gram matrices: dense sketches of known gradients, and a model's own."""

import math

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.vendi import VendiState, gvendi, unlimited_k
from gvendi_fast.vendi.degrees_of_freedom import DegreesOfFreedom, beta, extremes

N = 240
# Gradients have so many coordinates here.
P = 900
SCALES = torch.arange(1, P + 1, dtype=torch.float64)
SPECTRA = {
    "k^-0.5": SCALES**-0.5,
    "k^-1": SCALES**-1.0,
    "k^-1.3": SCALES**-1.3,
    "exponential": torch.exp(-SCALES / 60),
    "flat": torch.ones(300, dtype=torch.float64),
    "two directions in three": torch.cat([torch.full((40,), 5.0), torch.ones(400)]).double(),
    "common direction": torch.ones(P, dtype=torch.float64),
}
COMMON = 0.1


def gradients(name: str, n: int = N) -> torch.Tensor:
    """Unit rows float64 [n, P] with this spectrum; those of a common direction have a mean cosine of COMMON."""
    generator = torch.Generator().manual_seed(len(name))
    scale = SPECTRA[name]
    rows = torch.randn(n, len(scale), generator=generator, dtype=torch.float64) * scale.sqrt()
    rows /= rows.norm(dim=1, keepdim=True)
    if name == "common direction":
        rows = torch.cat([rows * (1 - COMMON) ** 0.5, torch.full((n, 1), COMMON**0.5)], dim=1)
    return rows


def sketched(rows: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return rows @ torch.randn(rows.shape[1], dim, generator=generator, dtype=torch.float64)


def estimates(rows: torch.Tensor, dim: int, seeds: int, q: float = 1.0) -> list:
    return [unlimited_k(VendiState(dim).update(sketched(rows, dim, seed)), q=q) for seed in range(seeds)]


def integral_by_hand(tau: np.ndarray, dim: int) -> float:
    """H_inf - H_K of a known exact spectrum: H_K from s(t) = t (1 - D / K) by a fine rule in t, order by order."""
    t = np.exp(np.arange(-40.0, 25.0, 0.002))
    d = (tau / (tau + t[:, None])).sum(axis=1)
    seen = d < dim
    s = np.where(seen, t * (1 - d / dim), 0.0)
    # int [D - 1 / (1 + s)] ds - int [D - 1 / (1 + t)] dt, with the same D at s and t.
    step = np.diff(t - s) * (d[1:] + d[:-1]) / 2
    return float(step.sum()) - math.log1p(t[-1]) + math.log1p(s[-1])


@pytest.mark.parametrize("dim", [64, 200, 1000])
def test_the_entropy_lost_is_the_integral_over_a_known_spectrum(dim):
    # The sketch's own eigenvalues are not known here: K = 2^40 shows the exact ones.
    tau = torch.tensor([0.3, *[0.7 / 150] * 150], dtype=torch.float64)
    degrees = DegreesOfFreedom(tau, 2**40, len(tau))
    assert degrees.lost(dim) == pytest.approx(integral_by_hand(tau.numpy(), dim), rel=2e-3)
    assert degrees.lost(2**40) == pytest.approx(0, abs=1e-9)


def test_equal_eigenvalues_lose_half_of_n_over_k():
    # To first order the loss is sum_ab tau_a tau_b (ln tau_a - ln tau_b) / (tau_a - tau_b) / (2 K) = n / (2 K).
    flat = torch.full((100,), 0.01, dtype=torch.float64)
    assert DegreesOfFreedom(flat, 2**40, 100).lost(10**6) == pytest.approx(100 / 2e6, rel=1e-3)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dim", [256, 512])
def test_the_estimate_is_that_of_exact_gradients_where_the_plain_value_is_not(name, dim):
    rows = gradients(name)
    exact = gvendi(rows)
    found = estimates(rows, dim, 8)
    plain = np.mean([item.plain for item in found]) / exact - 1
    error = np.mean([item.value for item in found]) / exact - 1
    noise = np.std([item.value for item in found], ddof=1) / exact / math.sqrt(len(found))
    assert -0.45 < plain < -0.05
    assert abs(error) < 0.01 + 2 * noise
    assert abs(error) < 0.03


# At order 2 the interval is wider than it need be: scaling rows to length 1 takes away noise that it counts.
@pytest.mark.parametrize("seeds", [10, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize(("q", "most"), [(1, 0.99), (2, 1.0)])
def test_the_interval_covers_the_exact_value_over_seeds(q, most, seeds):
    covered = []
    for name in SPECTRA:
        rows = gradients(name)
        exact = gvendi(rows, q)
        for dim in (256, 400):
            covered += [item.low <= exact <= item.high for item in estimates(rows, dim, seeds, q)]
    assert len(covered) == 14 * seeds
    assert 0.90 <= np.mean(covered) <= most


@pytest.mark.parametrize("name", ["k^-0.5", "exponential", "flat"])
def test_what_a_small_k_does_not_show_is_within_bounds_that_close_as_k_grows(name):
    rows = gradients(name, 500)
    exact = gvendi(rows)
    open_by = []
    for dim in (64, 128, 256, 512):
        found = unlimited_k(VendiState(dim).update(sketched(rows, dim, 1)))
        assert found.low < exact < found.high
        assert found.low < found.value < found.high
        open_by.append(found.unseen)
    assert open_by == sorted(open_by, reverse=True)
    assert open_by[0] > 0.1
    assert open_by[-1] < 0.01


def unseen_sum(w: np.ndarray, mass: np.ndarray | float = 1.0) -> float:
    """sum psi(w) - w; psi(0) = 0 and psi(1) = 1."""
    inner = w[(w > 0) & (w < 1)]
    weight = np.broadcast_to(mass, w.shape)[(w > 0) & (w < 1)]
    return float((weight * (-inner * np.log(inner) / (1 - inner) - inner)).sum())


@pytest.mark.parametrize("shape", [(0.05, 1.0), (0.5, 0.5), (1.0, 3.0), (20.0, 20.0), (2.0, 0.1)])
def test_numbers_of_the_same_two_moments_lie_within_the_extremes(shape):
    generator = np.random.Generator(np.random.Philox(key=1))
    for _ in range(50):
        w = generator.beta(*shape, size=40)
        w[: generator.integers(0, 5)] = generator.integers(0, 2)
        r, square = w.sum(), np.square(w).sum()
        least, most = extremes(r, square, len(w))
        for values, mass in (least, most, beta(r, square, len(w))):
            assert (values * mass).sum() == pytest.approx(r, rel=1e-6)
        for values, mass in (least, most):
            assert (values**2 * mass).sum() == pytest.approx(square, rel=1e-6)
        assert unseen_sum(*least) <= unseen_sum(w) + 1e-9
        assert unseen_sum(w) <= unseen_sum(*most) + 1e-9


def test_rows_that_span_fewer_directions_than_k_leave_nothing_unseen():
    rows = torch.randn(600, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = unlimited_k(VendiState(128).update(sketched(rows, 128, 0)))
    assert found.unseen == 0
    assert found.value == pytest.approx(gvendi(rows), rel=0.03)


def test_rows_that_repeat_bound_what_is_not_seen():
    rows = gradients("flat", 150).repeat(4, 1)
    state = VendiState(128).update(sketched(rows, 128, 0))
    blind, told = unlimited_k(state), unlimited_k(state, distinct=150)
    exact = gvendi(rows)
    assert told.low < exact < told.high < blind.high
    assert told.unseen < blind.unseen / 10
    assert told.value == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("name", ["k^-1", "flat"])
def test_other_k_are_predicted_from_one(name):
    rows = gradients(name)
    whole = sketched(rows, 2048, 3)
    state = VendiState(512).update(whole[:, :512])
    degrees = DegreesOfFreedom(state.spectrum(), 512, N)
    value = unlimited_k(state).value
    for dim in (64, 128, 256, 1024, 2048):
        assert value * math.exp(-degrees.lost(dim)) == pytest.approx(gvendi(whole[:, :dim]), rel=0.04)


def test_the_k_that_halves_the_bias_does():
    rows = gradients("k^-0.5")
    found = unlimited_k(VendiState(128).update(sketched(rows, 128, 0)))
    assert found.is_notable
    assert found.dim_to_halve > 2 * 128
    at = gvendi(sketched(rows, found.dim_to_halve, 1)) / gvendi(rows) - 1
    below = gvendi(sketched(rows, found.dim_to_halve // 2, 1)) / gvendi(rows) - 1
    assert 2 * below < found.bias < 2 * at < 0


def test_order_two_needs_no_spectrum_and_has_no_bias():
    rows = gradients("common direction")
    exact = 1 / gvendi(rows, 2)
    found = np.array([[1 / item.value, 1 / item.plain] for item in estimates(rows, 64, 100, 2)])
    # The shares S = 1 / G-Vendi are unbiased, not G-Vendi.
    noise = found[:, 0].std(ddof=1) / math.sqrt(len(found))
    assert abs(found[:, 0].mean() - exact) < 2.5 * noise
    assert found[:, 1].mean() - exact > 10 * noise


def test_squared_cosines_of_unit_rows_grow_as_the_definition_says():
    c, dim = 0.6, 64
    pair = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c * c)]], dtype=torch.float64)
    z = torch.randn(60_000, 2, dim, generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.normalize(pair.float() @ z, dim=2)
    found = float((z[:, 0] * z[:, 1]).sum(dim=1).square().mean())
    wanted = c**2 + (1 - c**2) * (1 - 2 * c**2) / dim
    assert found == pytest.approx(wanted, abs=2 / dim**2)


def test_rows_that_fill_no_direction_more_lose_nothing():
    rows = torch.randn(1, 64).repeat(9, 1)
    found = unlimited_k(VendiState(64).update(rows), distinct=1)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert not found.is_notable
    assert found.bias == pytest.approx(0, abs=1e-5)


def test_one_row_and_few_rows_stay_within_their_number():
    for n in (1, 2, 3):
        found = unlimited_k(
            VendiState(64).update(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)))
        )
        assert 1 <= found.low <= found.value <= found.high <= n


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"q": 3}, r"q is 3; .* orders 1 and 2"),
        ({"level": 1.0}, r"level is 1.0"),
        ({"distinct": 0}, r"distinct is 0; .* from 1 to n = 5"),
        ({"distinct": 6}, r"distinct is 6; .* from 1 to n = 5"),
    ],
)
def test_wrong_arguments_are_named(given, said):
    state = VendiState(64).update(torch.randn(5, 64))
    with pytest.raises(GvendiError, match=said):
        unlimited_k(state, **given)


def test_a_state_without_rows_is_refused():
    with pytest.raises(GvendiError, match="n = 0"):
        unlimited_k(VendiState(64))
