"""Comparing data sets: identities that hold, calibrated intervals, nearest pairs, and what is refused."""

import math

import numpy as np
import pytest
import torch

from gvendi_fast.analysis.compare import compare, difference
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.pool import MatrixPool
from gvendi_fast.vendi import VendiState, gvendi, jackknife


def population(dim, seed, decay=0.7):
    """Unit rows that are the whole population."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((4 * dim, dim)) * np.arange(1, dim + 1) ** -decay
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(rows, n, rng):
    return rows[rng.integers(0, len(rows), n)]


def scored(rows):
    return jackknife(VendiState(rows.shape[1]).update(rows), rows)


def test_a_set_beside_itself_adds_nothing():
    rows = population(16, 0)
    found = compare({"a": rows, "b": rows})
    (one,) = found.differences
    assert one.difference == 0
    assert not one.real
    assert one.p_value == 1
    assert found.between_share < 0
    assert found.between == pytest.approx(0, abs=1e-9)
    assert found.union == pytest.approx(gvendi(rows), rel=1e-6)
    (overlap,) = found.overlaps
    assert overlap.share_of_first == overlap.share_of_second == 1
    assert overlap.same_sketches == len(rows)
    assert all(pair.first == pair.second for pair in overlap.pairs)


def test_sets_without_a_common_direction_add_ln_m():
    eye = np.eye(24)
    sets = {name: np.repeat(eye[8 * i : 8 * i + 8], 50, axis=0) for i, name in enumerate("abc")}
    found = compare(sets)
    assert found.between == pytest.approx(math.log(3))
    assert found.between_share == pytest.approx(1)
    assert found.union == pytest.approx(24)
    # Rows of all three hold 24 directions, as many rows of two only 16.
    assert [s.adds for s in found.sets.values()] == pytest.approx([8, 8, 8], abs=0.5)
    assert found.overlaps[0].share_of_first == 0


def test_the_interval_of_a_difference_is_calibrated():
    dim, n, rng = 48, 96, np.random.default_rng(0)
    base, narrow = population(dim, 1), population(dim, 1, decay=1.1)
    held = noticed = 0
    for _ in range(200):
        same = difference("a", scored(draw(base, n, rng)), "b", scored(draw(base, n, rng)))
        held += same.low <= 0 <= same.high
        assert same.real == (not same.ratio_low <= 1 <= same.ratio_high)
        assert same.real == (same.p_value < 0.05)
    for _ in range(20):
        apart = difference("a", scored(draw(base, n, rng)), "b", scored(draw(narrow, n, rng)))
        noticed += apart.real and apart.low > 0
    assert 0.90 <= held / 200 <= 0.99
    assert noticed == 20


@pytest.mark.soak
def test_the_interval_holds_where_n_is_not_much_more_than_gvendi():
    rng, n = np.random.default_rng(5), 60
    base = population(256, 6, decay=0.2)
    held = 0
    for _ in range(60):
        rows = base[rng.permutation(len(base))[: 2 * n]]
        a, b = scored(rows[:n]), scored(rows[n:])
        assert a.value > n / 2
        held += not difference("a", a, "b", b).real
    # Of 60, 57 are 95 %.
    assert held >= 54


def test_between_sets_is_held_against_chance():
    rng, base = np.random.default_rng(7), population(128, 8, decay=0.25)
    alike = [compare({name: draw(base, 80, rng) for name in "abc"}, pairs=0) for _ in range(10)]
    assert min(found.between for found in alike) > 0.2
    assert np.mean([found.between_share for found in alike]) == pytest.approx(0, abs=0.02)
    other = {"a": draw(base, 80, rng), "b": draw(base, 80, rng)[:, ::-1].copy()}
    assert compare(other, pairs=0).between_share > 0.05


def test_equal_n_is_drawn_by_id_and_not_by_place():
    rows = population(16, 2)
    ids, mixed = [f"r{i}" for i in range(len(rows))], np.random.default_rng(0).permutation(len(rows))
    other = MatrixPool(population(16, 3)[:20])
    one = compare({"a": MatrixPool(rows, ids), "b": other}, seed=3)
    two = compare({"a": MatrixPool(rows[mixed], [ids[i] for i in mixed]), "b": other}, seed=3)
    assert one.n == 20
    assert one.sets["a"].rows == 64
    assert one.sets["a"].gvendi == pytest.approx(two.sets["a"].gvendi, rel=1e-6)


def test_nearest_pairs_are_those_of_the_whole_matrix():
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((60, 12)), rng.standard_normal((50, 12))
    b[7], b[8] = 2 * a[31], 0.5 * a[3] + 1e-2
    (overlap,) = compare({"a": a, "b": b}, pairs=3, threshold=0.99).overlaps
    assert [(p.first_id, p.second_id) for p in overlap.pairs[:2]] == [("31", "7"), ("3", "8")]
    assert overlap.pairs[0].cosine == pytest.approx(1, abs=1e-6)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    cosine = unit[0] @ unit[1].T
    assert overlap.pairs[2].cosine == pytest.approx(np.sort(cosine.ravel())[-3], abs=1e-5)
    assert overlap.share_of_first == pytest.approx(2 / 60)
    assert overlap.same_sketches == 1
    assert overlap.share_of_second == pytest.approx(2 / 50)


def test_pairs_are_a_greedy_matching_of_the_whole_matrix():
    rng, count = np.random.default_rng(11), 12
    # One row of b is the nearest of most rows of a; 3,000 rows are two blocks.
    a, b = rng.standard_normal((40, 6)) + 2, rng.standard_normal((3000, 6))
    b[2500] = 2
    (overlap,) = compare({"a": a, "b": b}, pairs=count).overlaps
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    cosine = unit[0] @ unit[1].T
    wanted = []
    for _ in range(count):
        i, j = np.unravel_index(np.argmax(cosine), cosine.shape)
        wanted.append((i, j))
        cosine[i], cosine[:, j] = -2, -2
    assert [(p.first, p.second) for p in overlap.pairs] == wanted
    few = compare({"a": a, "b": b[:8]}, pairs=count).overlaps[0].pairs
    assert sorted(p.second for p in few) == list(range(8))


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ({}, {}, "sets is empty"),
        ({"a": np.eye(9), "b": np.eye(10)}, {}, "use one --dim"),
        ({"a": np.eye(9), "b": np.eye(9)}, {"n": 10}, "n is 10; wanted 8 to 9"),
        ({"a": np.eye(9), "b": np.eye(9)}, {"level": 1}, "level is 1"),
        ({"a": np.eye(9), "b": np.eye(9)}, {"pairs": -1}, "pairs is -1"),
    ],
)
def test_what_is_refused(sets, options, message):
    with pytest.raises(GvendiError, match=message):
        compare(sets, **options)


def test_sketches_of_different_settings_do_not_compare():
    a, b = MatrixPool(torch.eye(9)), MatrixPool(torch.eye(9))
    a.spec, b.spec = {"dtype": "float32", "seed": 0}, {"dtype": "bfloat16", "seed": 0}
    with pytest.raises(GvendiError, match="dtype: float32 and bfloat16"):
        compare({"a": a, "b": b})


def test_sets_of_different_settings_are_refused_setting_by_setting():
    pools = {name: MatrixPool(np.random.default_rng(0).standard_normal((9, 4))) for name in ("old", "new")}
    pools["old"].spec = {"mask": "completion", "dtype": "fp32", "sketch": {"dim": 4}, "exclude": None}
    pools["new"].spec = {"sketch": {"dim": 4, "seed": 1}, "dtype": "fp32", "template": None, "exclude": None}
    with pytest.raises(GvendiError) as error:
        compare(pools)
    assert str(error.value) == (
        "'old' and 'new' were sketched with different settings:\n"
        "  mask: completion and (absent)\n"
        "  sketch: {'dim': 4} and {'dim': 4, 'seed': 1}\n"
        "  template: (absent) and None\n"
        "such sketches cannot be compared; sketch both with the same settings"
    )
