"""group_gains: what a row adds to its small group, against the definition by eigenvalues of every leave-one-out set."""

import itertools
import math

import numpy as np
import pytest
import torch

from gvendi_fast import group_gains, group_gvendi
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import reference
from gvendi_fast.vendi import VendiState, leave_one_out
from gvendi_fast.vendi import group_gains as room

# Of Delta S of one row, as in test_gains.py; a gain divides it by m - 1.
QUADRATURE = 6e-7


def rows_of(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def spread(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log1p(-p)


def test_a_case_by_hand():
    # Without a: (a, b), so ln 2. Without b: (a, a), so 0. With all: shares of 2/3 and 1/3.
    rows = torch.tensor([[2.0, 0.0], [0.1, 0.0], [0.0, -3.0]])
    whole = spread(1 / 3)
    wanted = [whole - math.log(2), whole - math.log(2), whole]
    got = group_gains(rows, boundaries=[0, 3])
    assert got.gain == pytest.approx(wanted, abs=QUADRATURE / 2)
    assert got.novelty[2] == pytest.approx(1, abs=1e-6)
    assert got.entropy == pytest.approx([whole])
    assert got.gvendi == pytest.approx([math.exp(whole)])


def test_groups_of_all_sizes_against_the_definition():
    rows, sizes = rows_of(1 + 2 + 3 + 4 + 16 + 64 + 40), [1, 2, 3, 4, 16, 64, 40]
    # Near duplicates, and one direction with twins of the other sign.
    rows[10:18] = rows[10] * np.linspace(-2, 3, 8)[:, None]
    rows[30:40] = rows[30] + 1e-3 * rows[30:40]
    bounds = [0, *itertools.accumulate(sizes)]
    got = group_gains(rows, boundaries=bounds)
    wanted = reference.group_gains(rows, torch.tensor(bounds)).numpy()
    assert got.n.tolist() == sizes
    assert got.group.tolist() == np.repeat(np.arange(7), sizes).tolist()
    assert got.gvendi == pytest.approx(group_gvendi(rows, boundaries=bounds).gvendi, rel=1e-6)
    for begin, end in itertools.pairwise(bounds):
        m = end - begin
        assert got.gain[begin:end] == pytest.approx(wanted[begin:end], abs=QUADRATURE / max(1, m - 1))
        if m > 1:
            whole = got.entropy[got.group[begin]]
            novelty = (whole - (1 - 1 / m) * (whole - wanted[begin:end])) / spread(1 / m)
            assert got.novelty[begin:end] == pytest.approx(novelty, abs=1e-6)
    assert got.gain[0] == got.novelty[0] == 0
    assert (got.novelty >= 0).all()
    assert (got.novelty <= 1).all()
    assert got.left_out == 0


def test_they_are_the_removals_of_a_state():
    rows = rows_of(20, 16)
    state = VendiState(16).update(rows)
    got = group_gains(rows, np.zeros(20, int))
    assert got.gain == pytest.approx(state.entropy() - leave_one_out(state, rows).numpy(), abs=1e-6)


def test_identical_orthogonal_and_repeated_rows():
    eye = np.eye(8, dtype=np.float32)
    same = np.repeat(eye[:1], 8, axis=0)
    pairs = np.repeat(eye[:4], 2, axis=0)
    outlier = np.concatenate([same[:7], eye[1:2]])
    got = group_gains(
        np.concatenate([same, eye, pairs, outlier]), np.repeat(["same", "eye", "pairs", "one"], 8)
    )
    gain, novelty = got.gain.reshape(4, 8), got.novelty.reshape(4, 8)
    assert gain[0] == pytest.approx(np.zeros(8), abs=1e-7)
    assert novelty[0] == pytest.approx(np.zeros(8), abs=1e-6)
    assert gain[1] == pytest.approx(np.full(8, math.log(8 / 7)), abs=1e-7)
    assert novelty[1] == pytest.approx(np.ones(8), abs=1e-6)
    # A row whose twin stays is missed less.
    assert (gain[2] < gain[1] / 3).all()
    assert np.ptp(novelty[2]) < 1e-6
    assert 0.2 < novelty[2][0] < 0.9
    assert novelty[3][:7].max() < 0.2
    assert novelty[3][7] == pytest.approx(1, abs=1e-6)
    assert gain[3][7] == pytest.approx(spread(1 / 8), abs=1e-7)


def test_rows_without_a_direction_take_no_part():
    rows = rows_of(12)
    rows[1], rows[5, 3], rows[6, 0] = 0, math.nan, math.inf
    rows[9:12] = 0
    labels = [0, 0, 1, 0, 0, 0, 1, 1, 2, 3, 3, 3]
    got = group_gains(rows, labels)
    assert got.n.tolist() == [3, 2, 1, 0]
    assert got.left_out == 6
    assert np.flatnonzero(np.isnan(got.gain)).tolist() == [1, 5, 6, 9, 10, 11]
    assert np.isnan(got.novelty).tolist() == np.isnan(got.gain).tolist()
    alone = group_gains(rows[[0, 3, 4]], [0, 0, 0])
    assert got.gain[[0, 3, 4]].tolist() == alone.gain.tolist()
    assert got.entropy[3] == 0
    assert got.gvendi[2] == 1


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda x: torch.from_numpy(x).double().requires_grad_(),
        lambda x: x.astype(np.float64) * 1e-100,
        lambda x: x.astype(">f4"),
        lambda x: np.asfortranarray(x)[::-1],
    ],
    ids=["torch", "double", "tiny doubles", "big-endian", "strided"],
)
def test_every_float_dtype(convert):
    rows = convert(rows_of(20))
    plain = rows.detach().numpy() if isinstance(rows, torch.Tensor) else rows
    got = group_gains(rows, np.arange(20) % 3)
    again = group_gains(np.ascontiguousarray(plain, dtype=np.float64), torch.arange(20) % 3)
    assert got.gain == pytest.approx(again.gain, abs=1e-12)


def test_what_is_computed_together_changes_nothing(monkeypatch):
    rows, labels = rows_of(200), np.random.default_rng(1).integers(0, 31, 200)
    whole = group_gains(rows, labels)
    monkeypatch.setattr(room, "AT_ONCE_BYTES", 1)
    alone = group_gains(rows, labels)
    assert whole.gain == pytest.approx(alone.gain, abs=1e-13)
    assert whole.names == alone.names == list(dict.fromkeys(labels.tolist()))


def test_rows_in_no_group_and_no_rows():
    got = group_gains(rows_of(6), boundaries=[1, 3, 5])
    assert got.group.tolist() == [-1, 0, 0, 1, 1, -1]
    assert np.isnan(got.gain[[0, 5]]).all()
    assert got.left_out == 0
    assert group_gains(rows_of(0), []).gain.shape == (0,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give labels or boundaries"),
        ({"labels": [0], "boundaries": [0, 1]}, "give labels or boundaries"),
        ({"labels": [0, 1]}, "labels has 2 entries for 4 rows"),
        ({"boundaries": [0, 2, 2]}, "leave out empty groups"),
    ],
    ids=["neither", "both", "few labels", "empty group"],
)
def test_wrong_groups_are_refused(given, message):
    with pytest.raises(GvendiError, match=message):
        group_gains(rows_of(4), **given)
