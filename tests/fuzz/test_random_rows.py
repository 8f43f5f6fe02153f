"""Rows of every shape with random changes: each is read or refused, none ends the run, and none is lost."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_shapes import CASES

from gvendi_fast.data.index import Fields, Rejected, Row, UnitReader, index_corpus
from gvendi_fast.data.messages import CANONICAL
from gvendi_fast.data.rejections import kinds_of
from gvendi_fast.data.shapes import FORMATS
from gvendi_fast.sketching.proxy.encode import Encoder, Sample
from gvendi_fast.sketching.proxy.load import load_proxy

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TEXT = st.text(st.characters(exclude_categories=()), max_size=6)
WORDS = st.sampled_from(
    ["user", "GPT", "tool", "wizard", "text", "[]", "[1]", '[{"from": "human"}]', " ", "", "{}"]
)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | WORDS
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | WORDS, inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({name for _, row, _ in CASES.values() for name in row} | {"id", "by", "tools", "functions"})
CHANGE = st.tuples(
    st.sampled_from(["replace", "delete", "rename", "wrap", "as JSON", "null", "twice", "add"]),
    st.integers(0, 50),
    VALUES,
    st.sampled_from(NAMES),
)
CHANGES = st.lists(CHANGE, max_size=3)
FORMAT = st.sampled_from(["auto"] * len(FORMATS) + list(FORMATS))


def places(value):
    """(holder, key) of everything inside of a value."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def changed(case, changes):
    row = copy.deepcopy(CASES[case][1])
    for kind, at, value, name in changes:
        there = list(places(row))
        if kind == "add" or not there:
            row[name] = value
            continue
        holder, key = there[at % len(there)]
        if kind == "delete":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[name] = holder.pop(key)
        elif kind == "twice" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[key] = {"wrap": [holder[key]], "as JSON": json.dumps(holder[key]), "null": None}.get(
                kind, value
            )
    return row


def has_null(value):
    if isinstance(value, dict):
        return any(item is None or has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(has_null, value))


def check_row(row):
    """What everyone who takes a row relies on."""
    forms = [row.prompt is not None, row.messages is not None, row.text is not None]
    assert sum(forms) == 1
    assert (row.prompt is None) == (row.completion is None)
    assert type(row.id) is str
    assert type(row.group) is str
    for role, text in row.texts():
        assert type(text) is str
        json.dumps([role, text], ensure_ascii=False).encode()
    for message in row.messages or ():
        assert message["role"] in CANONICAL
        assert type(message["content"]) is str
        assert not has_null(message)
    assert row.tools is None or (row.messages and all(isinstance(tool, dict) for tool in row.tools))
    assert not has_null(row.tools)
    json.dumps([row.messages, row.tools], ensure_ascii=False).encode()


def check_corpus(path, rows, shape, encoder):
    """Every row is read or refused, alike in any order; and encoded or refused, if an encoder is given."""
    manifest = index_corpus(path, Fields(by="by", format=shape), rows_per_unit=2)
    assert manifest.rows == rows
    with UnitReader(manifest) as reader:
        found = [row for unit in manifest.units for row in reader.read(unit)]
        again = [row for unit in reversed(manifest.units) for row in reversed(list(reader.read(unit)))]
    assert len(found) == rows
    # By what they show: a number that is none equals nothing.
    assert list(map(repr, again[::-1])) == list(map(repr, found))
    read = [row for row in found if isinstance(row, Row)]
    refused = [row for row in found if isinstance(row, Rejected)]
    assert len(read) + len(refused) == rows
    assert sum(kind.count for kind in kinds_of(refused)) == len(refused)
    for row in read:
        check_row(row)
    if encoder is not None:
        samples = encoder.encode(read)
        scored = sum(isinstance(sample, Sample) for sample in samples)
        assert scored + sum(isinstance(sample, Rejected) for sample in samples) + len(refused) == rows
    return len(read), len(refused)


def attack(count, suffix, tally, encoder=None, at_once=8):
    """`count` changed rows, in corpora of `at_once`; tally: read and refused."""

    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        @hypothesis.settings(
            max_examples=-(-count // at_once),
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(
            st.sampled_from(sorted(CASES)), st.lists(CHANGES, min_size=at_once, max_size=at_once), FORMAT
        )
        def one(case, changes, shape):
            rows = [changed(case, of_row) for of_row in changes]
            path = Path(folder, f"{next(numbers)}{suffix}")
            if suffix == ".parquet":
                # Columns have one type, so that each row is a file of its own.
                for row in rows:
                    try:
                        pq.write_table(pa.Table.from_pylist([row]), path)
                    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
                        # No Parquet file holds this.
                        tally["not written"] += 1
                        continue
                    if pq.read_metadata(path).num_rows:
                        add(check_corpus(path, 1, shape, encoder))
                    else:
                        tally["not written"] += 1
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                add(check_corpus(path, at_once, shape, encoder))
            path.unlink(missing_ok=True)

        def add(counts):
            tally["read"] += counts[0]
            tally["refused"] += counts[1]

        one()


def encoder():
    return Encoder(load_proxy("tiny", dtype="float32").tokenizer, 512)


@pytest.mark.parametrize(("suffix", "count", "at_once"), [(".jsonl", 300, 20), (".parquet", 40, 4)])
def test_changed_rows_are_read_or_refused(suffix, count, at_once):
    tally = {"read": 0, "refused": 0, "not written": 0}
    attack(count, suffix, tally, encoder(), at_once)
    assert sum(tally.values()) >= count
    assert min(tally["read"], tally["refused"]) > count / 20


@pytest.mark.soak
@pytest.mark.parametrize(("suffix", "count", "at_once"), [(".jsonl", 8500, 20), (".parquet", 2500, 4)])
def test_ten_thousand_changed_rows_are_read_or_refused(suffix, count, at_once, capsys):
    tally = {"read": 0, "refused": 0, "not written": 0}
    attack(count, suffix, tally, encoder(), at_once)
    with capsys.disabled():
        print(f"\n{suffix}: {tally}")
    assert sum(tally.values()) >= count
    assert tally["read"] + tally["refused"] >= (count if suffix == ".jsonl" else 1500)
