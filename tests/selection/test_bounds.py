"""Every bound and guarantee that is printed, returned or documented, against all choices of small pools.

A bound is never below the best choice and never above what is trivial: size, K, different rows, and, for quality, the
mean of the best qualities times that.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from gvendi_fast.data.pool import MatrixPool
from gvendi_fast.selection import select
from gvendi_fast.selection.capped_simplex import Limits
from gvendi_fast.selection.limits import entropy_limit, most_distinct, quality_limit
from gvendi_fast.vendi.state import VendiState

ROUNDING = 1e-6


def random_rows(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def with_copies(rows, distinct):
    return rows[torch.arange(len(rows)) % distinct]


POOLS = {
    "more columns than rows": random_rows(10, 32, 0),
    "fewer columns than rows": random_rows(11, 3, 1),
    "orthogonal": torch.eye(9, 12),
    "two directions": with_copies(random_rows(10, 16, 2), 2),
    "three rows four times": with_copies(random_rows(12, 16, 3), 3),
    "one row": with_copies(random_rows(8, 8, 4), 1),
    "a common direction": random_rows(10, 16, 5) + 3.0,
}
SIZES = (1, 3, 6)


def gvendi_of(rows, numbers, given=None):
    state = VendiState(rows.shape[1])
    state = state if given is None else state.merge(given)
    return state.update(rows[list(numbers)]).gvendi()


def all_choices(n, size, labels=None, most=None):
    """Every set of `size` rows of n that keeps the limits."""
    for numbers in itertools.combinations(range(n), size):
        if labels is None or (np.bincount(labels[list(numbers)], minlength=len(most)) <= most).all():
            yield numbers


def different(rows, numbers):
    return len({tuple(row.tolist()) for row in rows[list(numbers)]})


def given_rows(kind, dim):
    if kind == "none":
        return None
    rows = random_rows(4, dim, 9)
    return VendiState(dim).update(rows if kind == "four rows" else rows[:1].repeat(60, 1))


@pytest.mark.parametrize("kind", ["none", "four rows", "one row sixty times"])
@pytest.mark.parametrize("name", POOLS)
def test_the_bound_of_relaxed_lies_between_the_best_choice_and_the_trivial_limit(name, kind):
    rows = POOLS[name]
    n, dim = rows.shape
    given = given_rows(kind, dim)
    for size in SIZES:
        found = select(rows, size, method="relaxed", must_include=given, draws=0)
        bound = found.details["gvendi_bound"]
        choices = list(all_choices(n, size))
        best = max(gvendi_of(rows, numbers, given) for numbers in choices)
        assert found.gvendi <= best + ROUNDING
        assert best <= bound * (1 + ROUNDING)
        trivial = min(max(different(rows, numbers) for numbers in choices), dim)
        if given is not None:
            trivial = min(trivial + given.n, dim)
        assert bound <= trivial * (1 + ROUNDING)


def test_sixty_copies_that_are_given_leave_little_for_any_choice():
    """The limit of a mixture is far below the number of rows: 3 new ones among 63."""
    given = given_rows("one row sixty times", 32)
    bound = math.exp(entropy_limit(MatrixPool(POOLS["more columns than rows"]), 3, given, None))
    assert bound < 1.3 < 1 + 3


@pytest.mark.parametrize("name", POOLS)
def test_the_bound_keeps_quotas(name):
    rows = POOLS[name]
    n, dim = rows.shape
    labels, most = np.arange(n) % 2, np.array([2, n])
    for size in (1, 3, 5):
        found = select(
            rows,
            size,
            method="relaxed",
            groups=[str(label) for label in labels],
            quotas={"0": 2},
            draws=0,
        )
        choices = list(all_choices(n, size, labels, most))
        best = max(gvendi_of(rows, numbers) for numbers in choices)
        bound = found.details["gvendi_bound"]
        assert best <= bound * (1 + ROUNDING)
        counted = most_distinct(MatrixPool(rows), size, Limits(labels, most))
        assert max(different(rows, numbers) for numbers in choices) <= counted <= size
        assert bound <= min(counted, dim) * (1 + ROUNDING)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_the_bound_of_quality_keeps_the_best_qualities(name, limited):
    rows = POOLS[name]
    n, dim = rows.shape
    quality = np.random.default_rng(1).lognormal(0, 1, n)
    labels, most = np.arange(n) % 2, np.array([1, n]) if limited else np.array([n, n])
    groups = {"groups": [str(label) for label in labels], "quotas": {"0": 1}} if limited else {}
    for size in (1, 2, 4):
        found = select(rows, size, "quality", method="relaxed", quality=quality, draws=0, **groups)
        choices = list(all_choices(n, size, labels, most))
        values = [quality[list(numbers)].mean() * gvendi_of(rows, numbers) for numbers in choices]
        bound = found.details["value_bound"]
        assert found.value <= max(values) * (1 + ROUNDING)
        assert max(values) <= bound * (1 + ROUNDING)
        best_mean = max(quality[list(numbers)].mean() for numbers in choices)
        trivial = min(max(different(rows, numbers) for numbers in choices), dim)
        # With limits two copies may have to be in different groups, which the count of different rows allows for.
        if limited:
            trivial = min(most_distinct(MatrixPool(rows), size, Limits(labels, most)), dim)
        assert bound <= best_mean * trivial * (1 + ROUNDING)
        assert math.exp(quality_limit(quality, np.arange(n), size, Limits(labels, most))) == pytest.approx(
            best_mean
        )


def test_copies_are_counted_without_reading_on_when_enough_are_found():
    class Counted(MatrixPool):
        read = 0

        def blocks(self):
            for first, block in super().blocks():
                self.read += len(block)
                yield first, block

    pool = Counted(random_rows(9000, 4, 0))
    assert most_distinct(pool, 10) == 10
    assert pool.read < 9000
    copies = Counted(with_copies(random_rows(9000, 4, 0), 7))
    assert most_distinct(copies, 10) == 7
    assert copies.read == 9000


def objective_value(name, rows, numbers, eps=0.1):
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    chosen = unit[list(numbers)]
    if name == "facility":
        return float((unit @ chosen.T).amax(1).clamp_min(0).mean())
    lam = torch.linalg.eigvalsh(chosen @ chosen.T).clamp_min(0)
    if name == "logdet":
        return float(torch.log1p(lam / eps).sum())
    return float(-torch.special.xlogy(lam, lam).sum())


@pytest.mark.parametrize("objective", ["logdet", "facility", "vendi"])
@pytest.mark.parametrize("name", POOLS)
def test_lazy_greedy_keeps_its_guarantee(name, objective):
    """1 - 1/e of the optimum, for vendi of -tr(A ln A) + size (1 + ln size)."""
    rows = POOLS[name]
    for size in SIZES:
        chosen = select(rows, size, objective, draws=0).rows
        # The sum with this is monotone and 0 for no rows.
        lift = size * (1 + math.log(size)) if objective == "vendi" else 0.0
        best = max(objective_value(objective, rows, numbers) for numbers in all_choices(len(rows), size))
        reached = objective_value(objective, rows, chosen)
        assert reached <= best + 1e-5
        assert reached + lift >= (1 - 1 / math.e) * (best + lift) - 1e-5


@pytest.mark.parametrize("objective", ["logdet", "facility"])
@pytest.mark.parametrize("name", POOLS)
def test_lazy_greedy_under_quotas_reaches_half(name, objective):
    rows = POOLS[name]
    labels, most = np.arange(len(rows)) % 3, np.array([1, 2, len(rows)])
    groups = [str(label) for label in labels]
    for size in (2, 4):
        chosen = select(rows, size, objective, groups=groups, quotas={"0": 1, "1": 2}, draws=0).rows
        choices = all_choices(len(rows), size, labels, most)
        best = max(objective_value(objective, rows, numbers) for numbers in choices)
        assert objective_value(objective, rows, chosen) >= best / 2 - 1e-6


@pytest.mark.parametrize(
    ("method", "share"), [("stochastic", 1 - 1 / math.e - 0.1), ("two-round", (1 - 1 / math.e) / 2)]
)
@pytest.mark.parametrize("objective", ["logdet", "facility"])
def test_random_methods_keep_their_guarantee_in_the_mean(objective, method, share):
    rows = POOLS["fewer columns than rows"]
    best = max(objective_value(objective, rows, numbers) for numbers in all_choices(len(rows), 3))
    reached = [
        objective_value(objective, rows, select(rows, 3, objective, method=method, seed=s, draws=0).rows)
        for s in range(10)
    ]
    assert np.mean(reached) >= share * best
    assert max(reached) <= best + 1e-6
