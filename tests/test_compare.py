"""Comparing data sets: identities that hold, calibrated intervals, nearest pairs, and what is refused."""

import math

import numpy as np
import pytest
import torch

from gvendi_fast.compare import compare
from gvendi_fast.errors import GvendiError
from gvendi_fast.pool import MatrixPool
from gvendi_fast.vendi import gvendi


def population(dim, seed, decay=0.7):
    """Unit rows that are the whole population."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((4 * dim, dim)) * np.arange(1, dim + 1) ** -decay
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(rows, n, rng):
    return rows[rng.integers(0, len(rows), n)]


def test_a_set_beside_itself_adds_nothing():
    rows = population(16, 0)
    found = compare({"a": rows, "b": rows})
    (one,) = found.differences
    assert one.difference == 0
    assert not one.real
    assert one.p_value == 1
    assert found.between == pytest.approx(0, abs=1e-9)
    assert found.union == pytest.approx(gvendi(rows), rel=1e-6)
    (overlap,) = found.overlaps
    assert overlap.share_of_first == overlap.share_of_second == 1
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
        same = compare({"a": draw(base, n, rng), "b": draw(base, n, rng)}, pairs=0).differences[0]
        held += same.low <= 0 <= same.high
        assert same.real == (not same.ratio_low <= 1 <= same.ratio_high)
        assert same.real == (same.p_value < 0.05)
    for _ in range(20):
        apart = compare({"a": draw(base, n, rng), "b": draw(narrow, n, rng)}, pairs=0).differences[0]
        noticed += apart.real and apart.low > 0
    assert 0.90 <= held / 200 <= 0.99
    assert noticed == 20


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
    b[7], b[8] = 2 * a[31], 0.5 * a[3] + 1e-3
    (overlap,) = compare({"a": a, "b": b}, pairs=3, threshold=0.99).overlaps
    assert [(p.first_id, p.second_id) for p in overlap.pairs[:2]] == [("31", "7"), ("3", "8")]
    assert overlap.pairs[0].cosine == pytest.approx(1, abs=1e-6)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    cosine = unit[0] @ unit[1].T
    assert overlap.pairs[2].cosine == pytest.approx(np.sort(cosine.ravel())[-3], abs=1e-5)
    assert overlap.share_of_first == pytest.approx(2 / 60)
    assert overlap.share_of_second == pytest.approx(2 / 50)


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ({}, {}, "sets is empty"),
        ({"a": np.eye(9), "b": np.eye(10)}, {}, "sketch both alike"),
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
