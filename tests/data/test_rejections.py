"""Rejected rows are grouped by kind, all kinds are listed, and a kind that names sizes says their range."""

import pytest

from gvendi_fast.data.rejections import MOST_KINDS, kinds_of, listed
from gvendi_fast.data.rows import Rejected


def said(*reasons):
    return listed(kinds_of(Rejected("f", i, reason) for i, reason in enumerate(reasons)))


@pytest.mark.parametrize(
    ("reasons", "sentence"),
    [
        (
            [f"too long: completion needs {n} tokens, --max-tokens is 500" for n in (804, 552, 600)],
            "too long (--max-tokens is 500): 3, from 552 to 804 tokens",
        ),
        (
            ["too long: the supervised turns need at least 900 tokens, --max-tokens is 5"],
            "too long (--max-tokens is 5): 1, 900 tokens",
        ),
        (
            [f"too long: {size} bytes, --max-row-bytes is 8,388,608" for size in ("9,000,000", "8,388,609")],
            "too long (--max-row-bytes is 8,388,608): 2, from 8,388,609 to 9,000,000 bytes",
        ),
        (
            ["field 'id' has 70,000 characters; wanted at most 65,536"] * 2,
            "field 'id' is too long: 2, 70,000 characters",
        ),
        (["empty text", "broken JSON: a", "broken JSON: b"], "broken JSON: 2; empty text: 1"),
        ([], ""),
    ],
)
def test_kinds_with_counts_and_ranges(reasons, sentence):
    assert said(*reasons) == sentence
    assert said(*reversed(reasons)) == sentence


def test_no_kind_is_left_out_unless_data_make_them_without_end():
    assert said(*(f"kind {i:02}" for i in range(MOST_KINDS))).count(";") == MOST_KINDS - 1
    assert said(*(f"kind {i:02}" for i in range(MOST_KINDS + 5))).endswith("; and 5 more kinds")
