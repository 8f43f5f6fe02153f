"""group_gvendi: the friendly form, against `gvendi` of each group alone."""

import math

import numpy as np
import pytest
import torch

from gvendi_fast import group_gvendi
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.vendi import groups as room
from gvendi_fast.vendi import gvendi

ROWS = np.random.default_rng(0).standard_normal((400, 48)).astype(np.float32)
# Interleaved groups of 1, 2, 300 and 97 rows; the third is too large for the kernel.
LABELS = [("one", 1)] + [7] * 2 + ["big", "big", "big", None] * 97 + ["big"] * 9


def alone(rows, member) -> float:
    return gvendi(np.asarray(rows, dtype=np.float64)[np.flatnonzero(member)], 1.0)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, math.inf])
def test_labels_of_any_kind_in_order_of_appearance(q):
    got = group_gvendi(ROWS, LABELS, q=q)
    assert got.names == [("one", 1), 7, "big", None]
    assert got.n.tolist() == [1, 2, 300, 97]
    assert got.n.sum() == len(LABELS) == len(ROWS)
    for name, value in got.to_dict().items():
        member = [label == name for label in LABELS]
        assert value == pytest.approx(gvendi(ROWS[member], q), rel=1e-6)
    assert got.gvendi[0] == 1.0
    assert len(got) == 4


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda x: torch.from_numpy(x).double().requires_grad_(),
        lambda x: torch.from_numpy(x).half(),
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: x.astype(np.float64) * 1e-100,
        lambda x: x.astype(">f4"),
        lambda x: x.astype(np.float16),
        lambda x: np.asfortranarray(x)[::-1],
    ],
    ids=["torch", "double", "half", "bfloat16", "tiny doubles", "big-endian", "numpy half", "strided"],
)
def test_every_float_dtype(convert):
    rows = convert(ROWS)
    got = group_gvendi(rows, np.arange(400) % 5)
    plain = rows.detach().double().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows, np.float64)
    assert got.names == list(range(5))
    assert got.gvendi == pytest.approx(
        [alone(plain * 1e3, np.arange(400) % 5 == g) for g in range(5)], rel=1e-6
    )


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_boundaries_need_not_cover_all_rows(kind):
    got = group_gvendi(ROWS, boundaries=kind([10, 20, 300, 301]))
    assert got.names == [0, 1, 2]
    assert got.n.tolist() == [10, 280, 1]
    assert got.gvendi == pytest.approx([gvendi(ROWS[10:20]), gvendi(ROWS[20:300]), 1.0], rel=1e-6)


def test_strips_change_nothing(monkeypatch):
    labels = np.arange(400) % 37
    whole = group_gvendi(ROWS, labels)
    monkeypatch.setattr(room, "GATHER_BYTES", 4 * 48 * 30)
    assert np.array_equal(group_gvendi(ROWS, labels).gvendi, whole.gvendi)


def test_no_rows_no_groups():
    assert group_gvendi(ROWS[:0], []).to_dict() == {}
    assert group_gvendi(ROWS, boundaries=[3]).gvendi.shape == (0,)


@pytest.mark.parametrize("group", [3, 300])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_without_a_direction_is_named(group, bad, dtype):
    rows = ROWS.astype(dtype)
    rows[77] = bad
    with pytest.raises(GvendiError, match="row 77 of rows has norm"):
        group_gvendi(rows, ["a" if i >= 400 - group or i == 77 else i for i in range(400)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give labels or boundaries"),
        ({"labels": [1] * 400, "boundaries": [0, 400]}, "give labels or boundaries"),
        ({"labels": [1, 2]}, "labels has 2 entries for 400 rows"),
        ({"boundaries": [0, 401]}, "within 0..400"),
        ({"boundaries": [-1, 3]}, "within 0..400"),
        ({"boundaries": [0, 5, 5]}, "boundaries gives group 1 0 rows"),
        ({"labels": [1] * 400, "q": 0}, "q must be an order above 0"),
    ],
)
def test_refuses_by_name(arguments, message):
    with pytest.raises(GvendiError, match=message):
        group_gvendi(ROWS, **arguments)
