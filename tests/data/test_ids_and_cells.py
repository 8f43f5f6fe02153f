"""Ids of every kind that pandas and Arrow write, and cells that cannot be read: they spoil their field, not the row."""

import decimal
import json
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.rows import parse_row

OWN = uuid.UUID("12345678-1234-4678-9234-567812345678")


def reasons(path, **fields):
    manifest = index_corpus(path, Fields(**fields))
    with UnitReader(manifest) as reader:
        rows = [row for unit in manifest.units for row in reader.read(unit)]
    assert len(rows) == manifest.rows
    return [row.reason if isinstance(row, Rejected) else None for row in rows]


@pytest.mark.parametrize(
    ("value", "own"),
    [
        (12.0, "12"),
        (-0.0, "0"),
        (2.0**53, "field 'id' is a float from 2^53 on, which may have lost its last digits"),
        (1.5, "field 'id' is not a string or an integer (float)"),
        (float("inf"), "field 'id' is not a string or an integer (float)"),
        (float("nan"), "f:1"),
        (None, "f:1"),
        (np.int64(7), "7"),
        (np.float64(7), "7"),
        (decimal.Decimal("7.00"), "7"),
        (decimal.Decimal("7.5"), "field 'id' is not a string or an integer (Decimal)"),
        (decimal.Decimal("1e99999"), "field 'id' is not a string or an integer (Decimal)"),
        (decimal.Decimal("NaN"), "field 'id' is not a string or an integer (Decimal)"),
        (OWN, str(OWN)),
        (OWN.bytes, str(OWN)),
        (b"sixteen letters!", "sixteen letters!"),
        ("é".encode(), "é"),
        (b"\xff", "invalid UTF-8: byte 0xff at position 1"),
        (True, "field 'id' is not a string or an integer (bool)"),
        ([1], "field 'id' is not a string or an integer (list)"),
    ],
    ids=repr,
)
def test_ids(value, own):
    row = parse_row({"text": "t", "id": value}, Fields(), 0, "f", 1)
    assert (row.reason if isinstance(row, Rejected) else row.id) == own


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (pa.array([1.0, 2.0, 1.0]), ["1", "2", "1"]),
        (pa.array([OWN.bytes, bytes(range(200, 216)), OWN.bytes], pa.uuid()), 3),
        (pa.array([OWN.bytes, bytes(range(200, 216)), OWN.bytes], pa.binary(16)), 3),
        (
            pa.array([decimal.Decimal(1), decimal.Decimal(2), decimal.Decimal(1)], pa.decimal128(20, 0)),
            ["1", "2", "1"],
        ),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["a", "b", "a"], pa.string_view()), ["a", "b", "a"]),
        (pa.array([b"a", b"b", b"a"], pa.large_binary()), ["a", "b", "a"]),
    ],
)
def test_ids_of_columns_are_known_when_they_come_again(tmp_path, column, ids):
    ids = [str(OWN), "c8c9cacb-cccd-cecf-d0d1-d2d3d4d5d6d7", str(OWN)] if ids == 3 else ids
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["s", "t", "u"], "id": column}), path)
    manifest = index_corpus(path)
    with UnitReader(manifest) as reader:
        rows = list(reader.read(manifest.units[0]))
    assert [row.id for row in rows] == ids
    assert manifest.duplicates == 1
    assert rows[2].reason == f"duplicate id '{ids[0]}' (first at {path}:1)"


DEEP = "[" * 500 + "]" * 500
# {what cannot be read: (as JSON, the reason)}.
BAD = {
    "digits": (b"1" * 5000, "broken JSON: an integer has too many digits"),
    "depth": (DEEP.encode(), "broken JSON: nested too deeply, more than 64 levels"),
    "bytes": (b'"a\xff"', "invalid UTF-8: byte 0xff at position "),
    "half a character": (b'"\\ud800"', "invalid Unicode: lone surrogate in field"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("form", [b"%s", b'{"x": [1, %s]}'], ids=["alone", "inside"])
def test_what_cannot_be_read_refuses_a_row_that_needs_it_and_no_other(tmp_path, kind, form):
    value, reason = form % BAD[kind][0], BAD[kind][1]
    lines = [
        b'{"text": "t", "other": %s, "by": "g"}' % value,
        b'{"text": "t", "by": {"more": %s}}' % value,
        b'{"messages": [{"role": "assistant", "content": "a", "x": %s}]}' % value,
        b'{"prompt": "p", "completion": "c", "text": %s, "messages": %s}' % (value, value),
    ]
    if form == b"%s":
        lines += [b'{"text": %s}' % value, b'{"text": "t", "id": %s}' % value]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = reasons(path, by="by")
    assert [found[0], found[3]] == [None, None]
    for why in [found[1], found[2], *found[4:]]:
        if kind == "depth" and why is not None and why.startswith("field '"):
            # A text or an id is no list, however deep.
            assert "is not a string" in why
        else:
            assert why.startswith(reason)


def test_broken_lines_are_broken_however_deep(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "t", "x": %s' % DEEP.encode(),
        b'{"text": "t", "x": "' + DEEP.encode() + b'"}',
        b'{"text": "t", "x": %s, "y": \xff}' % DEEP.encode(),
        b'{"text": "a \\" [ b", "x": %s, "y": "[[[\\\\"}' % DEEP.encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    found = reasons(path)
    assert [found[1], found[3]] == [None, None]
    assert found[0] == "broken JSON: nested too deeply, more than 64 levels"
    assert found[2].startswith("invalid UTF-8: byte 0xff at position ")


def test_a_cell_of_parquet_refuses_a_row_that_needs_it_and_no_other(tmp_path):
    text = pa.array([b"one", b"\xff", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, text.buffers())
    path = tmp_path / "a.parquet"
    columns = {
        "prompt": ["p", "p", None],
        "completion": ["c", "c", None],
        "text": text,
        "far": pa.array([0, 9_000_000_000_000, 0], pa.timestamp("s")),
        "unread": text,
    }
    pq.write_table(pa.table(columns), path)
    assert reasons(path) == [None] * 3
    assert reasons(path, by="far")[1].startswith("field 'far' (timestamp[ms]) has a value beyond Python's")
    assert reasons(path, prompt="none", completion="none") == [
        None,
        "invalid UTF-8: byte 0xff at position 1",
        None,
    ]


def test_a_line_of_many_brackets_is_read_in_seconds(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "t", "x": ' + b"[" * 400_000 + b"]" * 400_000 + b"}\n" + json.dumps({"text": "u"}).encode()
    )
    assert reasons(path) == [None, None]
