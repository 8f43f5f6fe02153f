"""Counting different rows."""

from __future__ import annotations

import numpy as np

from gvendi_fast.data.distinct import Distinct, digests


def test_copies_count_once_in_whatever_blocks_they_come():
    rows = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    copies = np.concatenate([rows, rows[::2], rows[:3]])
    counted = Distinct()
    for block in np.array_split(copies, 6):
        counted.update(block)
    assert counted.count() == len(np.unique(copies, axis=0)) == 50


def test_nothing_is_nothing_and_rounding_makes_another_row():
    assert Distinct().count() == 0
    row = np.ones((1, 4), np.float32)
    assert Distinct().update(row).update(np.nextafter(row, 2)).count() == 2


def test_a_digest_is_of_the_numbers_not_of_their_layout():
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert list(digests(rows)) == list(digests(np.asfortranarray(rows)))
