"""Relaxed selection: its projection, its certificate, its whole rows, and that ids alone decide."""

import math

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.pool import MatrixPool
from gvendi_fast.selection import relaxed, select
from gvendi_fast.selection.capped_simplex import Limits, best_vertex, project
from gvendi_fast.selection.relaxed import relaxed_weights
from gvendi_fast.selection.rounding import relaxed_select
from gvendi_fast.vendi import gvendi
from gvendi_fast.vendi.state import VendiState


def rows(n, dim, seed=0, clusters=12):
    rng = np.random.default_rng(seed)
    decay = np.arange(1, dim + 1) ** -0.5
    centres = rng.standard_normal((clusters, dim)) * decay
    picked = rng.choice(clusters, n, p=rng.dirichlet(np.full(clusters, 0.3)))
    return (centres[picked] + 0.7 * rng.standard_normal((n, dim)) * decay).astype(np.float32)


def greedy(pool, size):
    """Plain greedy by the exact gain, from the first row."""
    unit, chosen = pool.take(range(len(pool))), [0]
    state = VendiState(pool.dim).update(unit[:1])
    while len(chosen) < size:
        gain = state.gain(unit)
        gain[chosen] = -math.inf
        chosen.append(int(gain.argmax()))
        state.update(unit[chosen[-1:]])
    return chosen


def entropy(pool, chosen):
    return math.log(gvendi(pool.take(chosen)))


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("scale", [0.1, 3, 50])
def test_the_projection_is_feasible_and_meets_its_optimality_conditions(limited, scale):
    rng = np.random.default_rng(0)
    n, size = 200, 60
    logits = scale * rng.standard_normal(n)
    limits = Limits(rng.integers(0, 4, n), np.array([5, 100, 20, 60])) if limited else None
    log_u = project(logits, size, limits)
    u = np.exp(log_u)
    assert log_u.max() <= 0
    assert u.sum() == pytest.approx(size)
    if limits is not None:
        assert (np.bincount(limits.codes, u) <= limits.most + 1e-6).all()
    # <grad KL(u || exp l), v - u> >= 0 for every feasible v, and the vertices are enough.
    gradient = log_u - logits
    vertex = best_vertex(-gradient, np.arange(n), size, limits)
    assert gradient[vertex].sum() >= gradient @ u - 1e-6 * scale * size


def test_the_best_vertex_keeps_limits_and_ties_go_by_order():
    limits = Limits(np.array([0, 0, 0, 1, 1]), np.array([1, 2]))
    scores = np.array([5.0, 4.0, 3.0, 1.0, 1.0])
    assert best_vertex(scores, np.arange(5), 3, limits).tolist() == [0, 3, 4]
    assert best_vertex(np.zeros(5), np.array([4, 3, 2, 1, 0]), 2).tolist() == [4, 3]


@pytest.mark.parametrize(
    ("n", "dim", "size"),
    [
        (600, 16, 60),
        pytest.param(600, 64, 30, marks=pytest.mark.soak),
        pytest.param(300, 256, 20, marks=pytest.mark.soak),
        (150, 128, 20),
        (90, 8, 90),
        (50, 16, 1),
    ],
)
def test_the_certificate_holds_for_better_weights_and_for_whole_rows(n, dim, size):
    pool = MatrixPool(rows(n, dim))
    loose = relaxed_weights(pool, size, tolerance=0.05)
    tight = relaxed_weights(pool, size, tolerance=1e-4, max_passes=40)
    for found in (loose, tight):
        assert found.weights.sum() == pytest.approx(1)
        assert found.weights.min() >= 0
        assert found.weights.max() <= 1 / size + 1e-9
        sigma = (pool.take(range(n)).double() * torch.from_numpy(found.weights).sqrt()[:, None]).numpy()
        eigenvalues = np.linalg.svd(sigma, compute_uv=False) ** 2
        eigenvalues = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
        assert found.entropy == pytest.approx(-(eigenvalues * np.log(eigenvalues)).sum(), abs=1e-5)
    assert tight.objective <= loose.bound + 1e-5
    assert tight.gap <= 1e-3
    chosen, _ = relaxed_select(pool, size)
    assert len(set(chosen.tolist())) == size
    assert entropy(pool, chosen) <= tight.bound + 1e-5


def test_fewer_passes_leave_a_larger_gap(monkeypatch):
    monkeypatch.setattr(relaxed, "_ACTIVE_LEAST", 256)
    pool = MatrixPool(rows(4000, 32))
    found = {most: select(pool, 40, method="relaxed", max_passes=most) for most in (1, 3, None)}
    passes, gaps, bounds = zip(
        *([one.details[name] for name in ("passes", "gap_nats", "gvendi_bound")] for one in found.values()),
        strict=True,
    )
    assert passes[:2] == (1, 3)
    assert passes[2] > 3
    assert gaps[0] > gaps[1] > gaps[2]
    assert bounds[0] >= bounds[1] >= bounds[2] >= max(one.gvendi for one in found.values())
    with pytest.raises(GvendiError, match="max_passes is 0; wanted"):
        select(pool, 40, method="relaxed", max_passes=0)
    with pytest.raises(GvendiError, match="max_passes goes with method='relaxed'"):
        select(pool, 40, max_passes=3)


@pytest.mark.parametrize(("n", "dim", "size"), [(800, 32, 100), (800, 64, 60), (400, 128, 40)])
def test_whole_rows_reach_what_greedy_reaches(n, dim, size):
    pool = MatrixPool(rows(n, dim, seed=1))
    chosen, _ = relaxed_select(pool, size)
    random = np.mean(
        [entropy(pool, np.random.default_rng(s).choice(n, size, replace=False)) for s in range(10)]
    )
    wanted = entropy(pool, greedy(pool, size))
    assert math.exp(entropy(pool, chosen)) >= 0.98 * math.exp(wanted)
    assert entropy(pool, chosen) - random >= 0.9 * (wanted - random) > 0.1


def test_ids_decide_and_not_the_order_of_rows():
    x = rows(400, 32, seed=2)
    ids = [f"row-{i}" for i in range(400)]
    there, _ = relaxed_select(MatrixPool(x, ids), 40, seed=5)
    mixed = np.random.default_rng(0).permutation(400)
    here, _ = relaxed_select(MatrixPool(x[mixed], [ids[i] for i in mixed]), 40, seed=5)
    assert {ids[i] for i in there} == {ids[mixed[i]] for i in here}


def test_a_small_memory_gives_the_same_weights_by_reading_the_pool_again():
    pool = MatrixPool(rows(600, 32, seed=3))
    much, little = (relaxed_weights(pool, 60, memory=memory) for memory in (1 << 30, 1))
    np.testing.assert_allclose(little.weights, much.weights, atol=2e-5)


class Reads(MatrixPool):
    """A pool that counts how often it is read from end to end, and the most rows that were taken at once."""

    passes = most = 0

    def chunks(self):
        self.passes += 1
        return super().chunks()

    def take(self, numbers):
        self.most = max(self.most, len(numbers))
        return super().take(numbers)


# The last pool is not much larger than what is wanted of it.
@pytest.mark.parametrize(("n", "limited"), [(4000, False), (4000, True), (750, False)])
def test_the_active_rows_stay_within_memory(n, limited, monkeypatch):
    # Two rows for each one to choose and a few more: those that come and those with weight would not fit.
    monkeypatch.setattr(relaxed, "_ACTIVE_LEAST", 1)
    dim, size = 16, 300
    limits = Limits(np.arange(n) % 40, np.full(40, 8)) if limited else None
    room, pool = 2 * size + 50, Reads(rows(n, dim, seed=3))
    found = relaxed_weights(pool, size, limits=limits, memory=4 * dim * room, max_passes=12)
    assert pool.most == room
    # Each of them is a pass, but for those of a pool whose rows cannot all be weighed: the pool is read twice then.
    assert found.steps > found.passes
    assert pool.passes <= 2 * found.passes
    much = relaxed_weights(MatrixPool(rows(n, dim, seed=3)), size, limits=limits)
    assert found.gap <= 0.02
    assert found.objective == pytest.approx(much.objective, abs=0.02)
    assert np.count_nonzero(found.weights) <= room


def test_quality_limits_and_rows_chosen_before_count():
    x = rows(500, 32, seed=4)
    pool, codes = MatrixPool(x), np.arange(500) % 5
    limits = Limits(codes, np.array([0, 3, 50, 50, 50]))
    chosen, found = relaxed_select(pool, 60, limits=limits)
    assert (np.bincount(codes[chosen], minlength=5) <= limits.most).all()
    assert len(set(chosen.tolist())) == 60
    assert found.weights[codes == 0].sum() < 1e-9

    quality = np.where(np.arange(500) < 250, 1.0, 1e-9)
    good, _ = relaxed_select(pool, 60, quality=quality)
    assert (good < 250).all()

    # Half the quality for more diversity: the product is what counts.
    some = np.where(np.arange(500) < 30, 1.0, 0.9)
    mixed, found = relaxed_select(pool, 60, quality=some)
    assert some[mixed].mean() * math.exp(entropy(pool, mixed)) <= math.exp(found.bound)
    assert (mixed >= 30).any()
    assert some[mixed].mean() * math.exp(entropy(pool, mixed)) >= 0.97 * math.exp(found.bound)

    before = VendiState(32).update(x[:100])
    with_it, _ = relaxed_select(pool, 60, include=before)
    without, _ = relaxed_select(pool, 60)

    def together(numbers):
        return VendiState(32).update(x[:100]).update(x[numbers]).entropy()

    assert together(with_it) >= together(without) - 1e-9


def test_what_is_refused():
    pool = MatrixPool(rows(20, 8))
    with pytest.raises(GvendiError, match="size is 21; wanted 1 to 20"):
        relaxed_weights(pool, 21)
    with pytest.raises(GvendiError, match="leave room for only 5 rows"):
        relaxed_weights(pool, 6, limits=Limits(np.zeros(20, int), np.array([5])))
    with pytest.raises(GvendiError, match="one number a row"):
        relaxed_weights(pool, 6, quality=np.ones(3))
