"""Work units cut by bytes: every row is in one, none is too large, and how a file is read makes no difference."""

import gzip
import json
import sys
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import MANIFEST, SPEC

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data import json_lines
from gvendi_fast.data import lines as lines_of_text
from gvendi_fast.data.growth import index_for, recorded_cut
from gvendi_fast.data.index import Fields, UnitReader, index_corpus
from gvendi_fast.data.row_sizes import row_sizes
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import check_manifest, unit_ranges
from gvendi_fast.data.unit_cuts import Cut, Cutter, UnitRanges, bytes_of_a_unit, even_runs, runs_of, written

MANY = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=60)
CUTS = st.builds(Cut, st.integers(1, 9), st.integers(1, 90))


def check(units, sizes, cut):
    """Units cover the rows, none is above a limit but a single row, and none could have had the row behind it."""
    assert sum(units) == len(sizes)
    ends = np.cumsum(units)
    for count, end in zip(units, ends, strict=True):
        size = sum(sizes[end - count : end])
        assert 1 <= count <= cut.rows
        assert size <= cut.bytes or count == 1
        assert end == len(sizes) or count == cut.rows or size + sizes[end] > cut.bytes


@MANY
@given(SIZES, CUTS, st.data())
def test_units_of_sizes_are_the_same_for_every_chunking(sizes, cut, data):
    units = None
    for _ in range(3):
        cutter, start = Cutter(cut), 0
        while start < len(sizes):
            stop = data.draw(st.integers(start + 1, len(sizes)))
            cutter.take(np.array(sizes[start:stop], np.int64))
            start = stop
        assert units in (None, cutter.units())
        units = cutter.units()
    check(units, sizes, cut)
    assert [run for rows, times in runs_of(written(units)) for run in [rows] * times] == units


@FEW
@given(SIZES, CUTS)
def test_units_of_a_text_are_the_same_however_it_is_read(tmp_path, sizes, cut):
    rows = [json.dumps({"text": "x" * size}).encode() for size in sizes]
    lines = b"\r\n".join(rows) + b"\n"
    found = set()
    for few, ahead in ((2, None), (8, lambda *_: (None, sys.maxsize))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lines_of_text, "_FEWEST", few)
            if ahead is not None:
                patch.setattr(json_lines, "lines_ahead", ahead)
            for name, content in (
                ("a.jsonl", lines),
                ("b.jsonl", lines.replace(b"\r", b"")),
                ("c.jsonl.gz", gzip.compress(lines)),
                ("d.jsonl", lines.replace(b"\n", b"\n\n")),
                ("e.json", b"[" + b",\n".join(rows) + b"]"),
            ):
                (tmp_path / name).write_bytes(content)
                manifest = index_corpus(tmp_path / name, rows_per_unit=cut.rows, unit_bytes=cut.bytes)
                found.add(tuple(unit.rows for unit in manifest.units))
                with UnitReader(manifest) as reader:
                    for unit in reversed(manifest.units):
                        own = sizes[unit.first_row : unit.first_row + unit.rows]
                        assert [
                            len(row.text) if own[i] else 0 for i, row in enumerate(reader.read(unit))
                        ] == own
    (units,) = found
    check(units, list(map(len, rows)), cut)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_units_of_a_table_are_those_of_its_texts(tmp_path, form):
    draws = np.random.default_rng(0)
    sizes = draws.integers(1, 60, 200).tolist()
    path, cut, found = tmp_path / f"a.{form}", Cut(12, 200), set()
    table = pa.table({"text": ["x" * size for size in sizes], "other": [["y" * 99]] * 200})
    for group in (7, 64, 1000):
        if form == "parquet":
            pq.write_table(table, path, row_group_size=group)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=group)
        manifest = index_corpus(path, rows_per_unit=cut.rows, unit_bytes=cut.bytes)
        found.add(tuple(unit.rows for unit in manifest.units))
        # What is behind a limit has no say.
        short = index_corpus(path, rows_per_unit=cut.rows, unit_bytes=cut.bytes, limit=77)
        assert short.units[:-1] == manifest.units[: len(short.units) - 1] or form == "arrow"
        assert [unit.rows for unit in short.units[:-1]] == [u.rows for u in manifest.units][
            : len(short.units) - 1
        ]
    (units,) = found
    check(units, sizes, cut)


def test_bytes_of_rows_of_arrow():
    texts = ["", "abc", None, "é"]
    structs = [
        {"role": "user", "content": "hi"},
        None,
        {"role": None, "content": "x"},
        {"role": "a", "content": ""},
    ]
    columns = {
        "text": (pa.array(texts), [0, 3, 0, 2]),
        "view": (pa.array(texts, pa.string_view()), [0, 3, 0, 2]),
        "large": (pa.array(texts, pa.large_string()), [0, 3, 0, 2]),
        "same": (pa.array(texts).dictionary_encode(), [0, 3, 0, 2]),
        "number": (pa.array([1, None, 3, 4], pa.int32()), [4, 0, 4, 4]),
        "flag": (pa.array([True, False, None, True]), [1, 1, 0, 1]),
        "none": (pa.nulls(4), [0, 0, 0, 0]),
        "struct": (pa.array(structs), [6, 0, 1, 1]),
        "list": (pa.array([["ab", "c"], [], None, ["d"]]), [3, 0, 0, 1]),
        "talk": (pa.array([structs[:1] * 2, [], None, structs]), [12, 0, 0, 8]),
        "pair": (
            pa.array([["a", "b"], None, ["cc", ""], [None, "d"]], pa.list_(pa.string(), 2)),
            [2, 0, 2, 1],
        ),
        "map": (
            pa.array([[("k", "vv")], None, [], [("k", None)]], pa.map_(pa.string(), pa.string())),
            [3, 0, 0, 1],
        ),
        "decimal": (pa.array([1, None, 2, 3], pa.decimal128(5)), [8, 0, 8, 8]),
    }
    for name, (column, sizes) in columns.items():
        batch = pa.record_batch({name: column})
        assert row_sizes(batch).tolist() == sizes, name
        # A slice of a batch knows of no more than itself.
        assert row_sizes(batch.slice(1, 2)).tolist() == sizes[1:3], name
    batch = pa.record_batch({name: column for name, (column, _) in columns.items()})
    assert row_sizes(batch).tolist() == np.sum([sizes for _, sizes in columns.values()], axis=0).tolist()
    assert row_sizes(pa.record_batch({})).tolist() == []
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.int32([0, 9, 4])), pa.py_buffer(b"abcd")]
    )
    assert row_sizes(pa.record_batch({"text": broken})).tolist() == [0, 0]


def test_a_unit_takes_about_a_minute():
    for rate in (300.0, 5_000.0, 80_000.0, 1e6):
        assert 40 < bytes_of_a_unit(rate) / rate < 86
    assert bytes_of_a_unit(0.0) == bytes_of_a_unit(1e-9) == 1 << 14
    assert bytes_of_a_unit(1e12) == 1 << 26


def test_ranges_of_units():
    assert even_runs(10, 4) == [(4, 2), (2, 1)]
    assert even_runs(8, 4) == [(4, 2)]
    assert even_runs(0, 4) == []
    ranges = UnitRanges([*even_runs(10, 4), *runs_of(""), *runs_of("3 1*2")])
    assert (ranges.units, ranges.rows) == (6, 15)
    assert [ranges.of(unit) for unit in range(6)] == [(0, 4), (4, 4), (8, 2), (10, 3), (13, 1), (14, 1)]
    for text in ("0", "3*0", "03", "3  4", " 3", "3*", "*2", "-1", "3*1 3", "3,4", "3.0", "٣"):
        with pytest.raises(ValueError, match=r"count"):
            runs_of(text)


ROWS = [{"text": "word " * (number % 7 + 1), "id": f"r{number}"} for number in range(40)]


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_run_goes_on_with_its_cut_and_grows_by_it(tmp_path):
    path, run = tmp_path / "a.jsonl", tmp_path / "run"
    path.write_text(lines_of(ROWS[:25]))
    index = partial(index_corpus, path)
    assert recorded_cut(run) is None
    first = index_for(run, index, Fields(), 8, None, 120)
    RunDirectory.open(run, SPEC, first.to_dict())
    assert recorded_cut(run) == Cut(8, 120)
    # Whatever the rate is now, and where none is chosen.
    for asked in (None, 120, 5000):
        again = index_for(run, index, Fields(), 8, None, asked)
        assert again == first
        assert [note for note in again.notes if "unit_bytes" in note] == (
            [f"work units have 120 bytes, as '{run}' was begun with (unit_bytes is 5,000)"]
            if asked == 5000
            else []
        )
    path.write_text(lines_of(ROWS))
    grown = index_for(run, index, Fields(), 8, None, 5000)
    assert grown.units == index_corpus(path, rows_per_unit=8, unit_bytes=120).units
    recorded = RunDirectory.open(run, SPEC, grown.to_dict()).manifest
    ranges = unit_ranges(recorded)
    assert [ranges.of(unit.ordinal) for unit in grown.units] == [(u.first_row, u.rows) for u in grown.units]


def test_a_run_that_was_cut_by_rows_alone_stays_as_it_is(tmp_path):
    path, run = tmp_path / "a.jsonl", tmp_path / "run"
    path.write_text(lines_of(ROWS))
    index = partial(index_corpus, path)
    RunDirectory.open(run, SPEC, index_for(run, index, Fields(), 8, None).to_dict())
    before = (run / "units.json").read_bytes()
    assert b"unit" in before
    assert b"bytes" not in before
    manifest = index_for(run, index, Fields(), 8, None, 100)
    RunDirectory.open(run, SPEC, manifest.to_dict())
    assert (run / "units.json").read_bytes() == before
    assert manifest.notes[-1] == f"work units have any size, as '{run}' was begun with (unit_bytes is 100)"


CUT = {**MANIFEST, "unit_bytes": 100, "units_total": 4, "rows_of_units": ["1*2 3*2"]}


@pytest.mark.parametrize(
    "edit",
    [
        *({"unit_bytes": value} for value in (0, -1, "9", None, 1.5, True)),
        *({"rows_of_units": value} for value in (None, "1*2 3*2", [], [1], ["1*2 3*2", ""])),
        *(
            {"rows_of_units": [value]}
            for value in ("", "1*2 3", "1*2 3*3", "5 3", "1*2 3*2 ", "1 1 3*2", "8*0", "1.5")
        ),
        {"rows_of_units": ["1*" + "9" * 30]},
        {"rows_of_units": ["4*2"]},
        {"units_total": 2},
    ],
    ids=str,
)
def test_an_edited_cut_is_noticed(tmp_path, edit):
    check_manifest(tmp_path / "units.json", json.loads(json.dumps(CUT)))
    with pytest.raises(GvendiError, match=r"units\.json' is damaged"):
        check_manifest(tmp_path / "units.json", {**CUT, **edit})
    for name in ("unit_bytes", "rows_of_units"):
        with pytest.raises(GvendiError, match=r"units\.json' is damaged"):
            check_manifest(tmp_path / "units.json", {key: CUT[key] for key in CUT if key != name})
