"""Rows of a program: every kind that gives them, what JSON has not, and a second call with the same rows, or more."""

import datetime
import decimal
import enum
import json
import sys
import tracemalloc
import types
import uuid
from collections import namedtuple
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import gvendi_fast
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.in_memory import is_paths, rows_of, spool
from gvendi_fast.data.json_rows import row_line
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.rows import Fields, decode_line, parse_row
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings
from gvendi_fast.sketching.proxy.load import load_proxy

SETTINGS = Settings(spec=SketchSpec(dim=64), unit_rows=4)
ROWS = [{"prompt": f"{i} and", "completion": f"is {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


def sketches(run: RunDirectory) -> np.ndarray:
    return np.concatenate([part.sketches for part in run.iterate(["sketch"])])


def of_package(name: str, base: type) -> type:
    """A class that says it is of a package which need not be installed."""
    return type(base.__name__, (base,), {"__module__": f"{name}.core"})


class DataFrame:
    """What is used of pandas' own."""

    def __init__(self, records: list[dict]) -> None:
        self.records, self.columns = records, list(records[0])

    def __len__(self) -> int:
        return len(self.records)

    @property
    def iloc(self):
        return types.SimpleNamespace(__getitem__=None) and _Blocks(self.records)


class _Blocks:
    def __init__(self, records: list[dict]) -> None:
        self.records = records

    def __getitem__(self, place: slice):
        return DataFrame(self.records[place])


def to_dict(self, orient: str) -> list[dict]:
    assert orient == "records"
    return self.records


DataFrame.to_dict = to_dict


class Dataset:
    """What is used of datasets' own."""

    def __init__(self, records: list[dict]) -> None:
        self.records, self.column_names = records, list(records[0])

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self):
        return iter(self.records)


class DatasetDict(dict):
    pass


class Sequence:
    """The old way of iterating."""

    def __init__(self, records: list[dict]) -> None:
        self.records = records

    def __getitem__(self, place: int) -> dict:
        return self.records[place]


TABLE = pa.Table.from_pylist(ROWS)
KINDS = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "columns": lambda: {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "columns of arrays": lambda: {name: np.array([row[name] for row in ROWS]) for name in ROWS[0]},
    "table": lambda: TABLE,
    "record batch": lambda: TABLE.to_batches()[0],
    "reader": lambda: pa.RecordBatchReader.from_batches(TABLE.schema, TABLE.to_batches(2)),
    "frame": lambda: of_package("pandas", DataFrame)(ROWS),
    "dataset": lambda: Dataset(ROWS),
    "sequence": lambda: Sequence(ROWS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_the_same_lines(kind, tmp_path):
    path = spool(map(row_line, rows_of(KINDS[kind]())), tmp_path / "run")
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS


def test_rows_are_sketched_as_those_of_a_file(proxy, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = gvendi_fast.sketch(iter(ROWS), out=tmp_path / "run", proxy=proxy, settings=SETTINGS)
    whole = gvendi_fast.sketch(data, out=tmp_path / "whole", proxy=proxy, settings=SETTINGS)
    assert np.array_equal(sketches(run), sketches(whole))
    assert [i for part in run.iterate(["id"]) for i in part.ids] == [f"rows:{n}" for n in range(1, 7)]
    assert [row.record() for row in original_rows(run, range(6))] == ROWS
    assert check_run(run.path, with_corpus=True).findings == []
    moved = run.path.rename(tmp_path / "moved")
    assert [row.line for row in original_rows(RunDirectory.load(moved), [4])] == [5]


def test_score_takes_rows_and_leaves_nothing_behind(proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    texts = [f"a text of number {i}" for i in range(5)]
    found = gvendi_fast.score([*texts, None, 3], proxy=proxy, settings=SETTINGS)
    assert (found.n, found.rejected) == (5, 2)
    assert found.rejected_by_reason == {
        "the row is no dict and no text (NoneType)": 1,
        "the row is no dict and no text (int)": 1,
    }
    assert list(tmp_path.iterdir()) == []
    by = gvendi_fast.score(
        ({**row, "kind": i % 2} for i, row in enumerate(ROWS)), proxy=proxy, settings=SETTINGS, by="kind"
    )
    assert set(by.by) == {"0", "1"}


def test_the_same_rows_resume_and_more_rows_extend(proxy, tmp_path):
    run, more = tmp_path / "run", [{"text": "and one more"}, {"text": "and another"}]
    gvendi_fast.sketch(ROWS, out=run, proxy=proxy, settings=SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()}
    gvendi_fast.sketch(iter(ROWS), out=run, proxy=proxy, settings=SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()} == before
    grown = gvendi_fast.sketch(ROWS + more, out=run, proxy=proxy, settings=SETTINGS)
    kept = run / "parts" / "part-000000.parquet"
    assert kept.stat().st_mtime_ns == before[kept]
    whole = gvendi_fast.sketch(ROWS + more, out=tmp_path / "whole", proxy=proxy, settings=SETTINGS)
    assert np.array_equal(sketches(grown), sketches(whole))
    assert check_run(run, with_corpus=True).findings == []


def test_other_rows_are_refused_and_those_of_before_stay(proxy, tmp_path):
    run = tmp_path / "run"
    gvendi_fast.sketch(ROWS, out=run, proxy=proxy, settings=SETTINGS)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(GvendiError, match="was made from other rows: row 3 is another one now"):
        gvendi_fast.sketch([*ROWS[:2], *ROWS[3:]], out=run, proxy=proxy, settings=SETTINGS)
    with pytest.raises(GvendiError, match="was made from more than these 5 rows"):
        gvendi_fast.sketch(ROWS[:5], out=run, proxy=proxy, settings=SETTINGS)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n')
    with pytest.raises(GvendiError, match="made from another corpus"):
        gvendi_fast.sketch(data, out=run, proxy=proxy, settings=SETTINGS)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    gvendi_fast.sketch(data, out=tmp_path / "files", proxy=proxy, settings=SETTINGS)
    with pytest.raises(GvendiError, match=r"was made from files, such as '.*data.jsonl', not from rows"):
        gvendi_fast.sketch(ROWS, out=tmp_path / "files", proxy=proxy, settings=SETTINGS)
    assert not (tmp_path / "files" / "rows.jsonl").exists()


def test_rows_of_a_call_that_failed_count_for_nothing(proxy, tmp_path):
    run, more = tmp_path / "run", [*ROWS, {"text": "and one more"}, {"text": "and another"}]
    with pytest.raises(GvendiError, match="by"):
        gvendi_fast.sketch(ROWS, out=run, proxy=proxy, by="kind", settings=SETTINGS)
    mended = [{**row, "kind": "a"} for row in ROWS]
    gvendi_fast.sketch(mended, out=run, proxy=proxy, by="kind", settings=SETTINGS)
    other = replace(SETTINGS, spec=SketchSpec(dim=128))
    with pytest.raises(GvendiError, match="with other settings"):
        gvendi_fast.sketch([*mended, *more], out=run, proxy=proxy, by="kind", settings=other)
    # What is recorded is there, and may be gone on with as it is, or with yet other rows behind.
    assert check_run(run, with_corpus=True).findings == []
    kept = [row.record() for row in original_rows(RunDirectory.load(run), range(6))]
    assert kept == mended
    gvendi_fast.sketch(mended, out=run, proxy=proxy, by="kind", settings=SETTINGS)
    grown = gvendi_fast.sketch([*mended, *more[::-1]], out=run, proxy=proxy, by="kind", settings=SETTINGS)
    assert [row.record() for row in original_rows(grown, range(6, 14))] == more[::-1]
    assert check_run(run, with_corpus=True).findings == []


def test_a_file_that_goes_on_behind_the_rows_of_a_program_is_kept(proxy, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data.jsonl"
    gvendi_fast.sketch(ROWS, out=run, proxy=proxy, settings=SETTINGS)
    data.write_bytes(b"".join(map(row_line, [*ROWS, {"text": "and one more"}])))
    gvendi_fast.sketch(data, out=run, proxy=proxy, settings=SETTINGS)
    data.unlink()
    assert check_run(run, with_corpus=True).findings == []
    (last,) = original_rows(RunDirectory.load(run), [6])
    assert last.record() == {"text": "and one more"}


def test_a_limit_ends_a_generator_without_end_and_may_be_raised(proxy, tmp_path):
    def endless():
        return ({"text": f"a text of number {i}"} for i in count())

    run = tmp_path / "run"
    for limit, rows in ((3, 3), (7, 7)):
        settings = replace(SETTINGS, limit=limit)
        found = gvendi_fast.sketch(endless(), out=run, proxy=proxy, settings=settings)
        assert len(sketches(found)) == rows
    with pytest.raises(GvendiError, match="limit: 7 in the directory, 3 now"):
        gvendi_fast.sketch(endless(), out=run, proxy=proxy, settings=replace(SETTINGS, limit=3))
    assert check_run(run, with_corpus=True).findings == []


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int


Pair = namedtuple("Pair", "a b")
CONVERTED = {
    "bytes": ("größe".encode(), "größe"),
    "time": (datetime.datetime(2024, 2, 3, 4, 5), "2024-02-03T04:05:00"),
    "day": (datetime.date(2024, 2, 3), "2024-02-03"),
    "while": (datetime.timedelta(seconds=61), "0:01:01"),
    "decimal": (decimal.Decimal("1.50"), "1.50"),
    "uuid": (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "path": (Path("a/b"), "a/b"),
    "scalar": (np.float32(0.5), 0.5),
    "integer": (np.int64(7), 7),
    "truth": (np.bool_(True), True),
    "text": (np.str_("word"), "word"),
    "array": (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
    "instant": (np.datetime64("2024-02-03T04:05"), "2024-02-03T04:05"),
    "tensor": (torch.tensor([1.5, 2.5]), [1.5, 2.5]),
    "nan": (float("nan"), None),
    "nans": ([1.0, float("inf")], [1.0, None]),
    "numpy's nan": (np.array([np.nan]), [None]),
    "tuple": ((1, (2,)), [1, [2]]),
    "set": ({"b", "a"}, ["a", "b"]),
    "frozen set": (frozenset({3, 1}), [1, 3]),
    "enum": (Colour.RED, "red"),
    "dataclass": (Point(3), {"x": 3}),
    "named tuple": (Pair(1, "x"), [1, "x"]),
    "number as key": ({1: "one"}, {"1": "one"}),
    "missing": (type("NAType", (), {})(), None),
    "arrow": (pa.scalar([1, None]), [1, None]),
    "image": (of_package("PIL", Sequence)([]), {"not JSON": "PIL.core.Sequence"}),
    "function": (len, {"not JSON": "builtin_function_or_method"}),
    "no text": (b"\xff", {"not JSON": "bytes"}),
    "complex": (1j, {"not JSON": "complex"}),
    "long": (10**5000, {"not JSON": "int of too many digits"}),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_values_that_json_has_not(name):
    value, wanted = CONVERTED[name]
    found = json.loads(row_line({"prompt": "a", "x": value}))
    assert found == {"prompt": "a", "x": wanted}
    assert type(found["x"]) is type(wanted)


def circle() -> dict:
    row: dict = {"text": "a"}
    row["self"] = row
    return row


REFUSED = {
    "none": (None, "the row is no dict and no text (NoneType)"),
    "number": (3.5, "the row is no dict and no text (float)"),
    "array": (np.ones(2), "the row is no dict and no text (numpy.ndarray)"),
    "bytes that are read": ({"text": b"\xff"}, "field 'text' is not a string (bytes)"),
    "image that is read": (
        {"prompt": len, "completion": "a"},
        "field 'prompt' is not a string (builtin_function_or_method)",
    ),
    "circle": (circle(), "the row is nested too deeply, more than 64 levels"),
    "half a character": ({"text": "a\ud800", "x": {1}}, "invalid Unicode: lone surrogate in field 'text'"),
    "two keys": ({"text": "a", "x": {1: Point(1), "1": 2}}, "the row has two keys that are one as text"),
    "missing text": ({"text": float("nan")}, "missing fields"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_none_is_refused_by_name(name):
    row, reason = REFUSED[name]
    line = row_line(row)
    assert line.count(b"\n") == 1
    found = parse_row(decode_line(line.rstrip(b"\n")), Fields(), 0, "rows", 1)
    assert found.reason.startswith(reason)


def test_what_nobody_reads_does_no_harm():
    line = row_line({"text": "a", "image": len, "when": datetime.date(2024, 1, 1)})
    assert parse_row(decode_line(line), Fields(), 0, "rows", 1).text == "a"
    chat = row_line([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert len(parse_row(decode_line(chat), Fields(), 0, "rows", 1).messages) == 2


NO_ROWS = {
    "nothing": ([], "no input was given"),
    "an empty generator": (iter(()), "data holds no rows"),
    "no columns": ({}, "data is one dict with the keys ; wanted rows"),
    "one row": (
        {"prompt": "a", "completion": "b"},
        r"keys 'prompt', 'completion'; .* give \[data\] if it is a row",
    ),
    "columns": (
        {"prompt": ["a"], "completion": ["b", "c"]},
        r"different lengths \('prompt' 1, 'completion' 2\)",
    ),
    "splits": (
        DatasetDict(train=Dataset(ROWS), test=Dataset(ROWS)),
        r"data is a DatasetDict of 2 data sets \(train, test\); give one of them, such as data\['train'\]",
    ),
    "bytes": (b"text", "data is a bytes; wanted paths, or rows"),
    "a number": (3, "data is an int, which cannot be iterated over"),
    "none": (None, "data is a NoneType, which cannot be iterated over"),
    "words": (["dataa", "more"], "'dataa' does not exist"),
    "no file": ("no such text", "'no such text' does not exist"),
    "a path that is not there": (["here.jsonl", "a text of words"], "'here.jsonl' does not exist"),
    "columns twice": (pa.table([[1], [2]], names=["a", "a"]), "data has two columns 'a'"),
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_what_holds_no_rows_is_refused(name, proxy, tmp_path):
    data, message = NO_ROWS[name]
    with pytest.raises(GvendiError, match=message):
        gvendi_fast.sketch(data, out=tmp_path / "run", proxy=proxy)
    assert not (tmp_path / "run").exists()


def test_texts_are_told_from_paths(tmp_path, monkeypatch):
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_paths(["*"])
    assert is_paths(["-"])
    assert is_paths(["a*/"])
    assert is_paths(["a fold*/"])
    assert is_paths([str(tmp_path / "a folder")])
    assert is_paths(["x.jsonl", "y.parquet"])
    assert is_paths([Path("anything")])
    assert not is_paths(["How many? Read data.jsonl", "* is a star"])
    assert not is_paths(["漢字", "仮名"])
    assert not is_paths(["word " * 2000])
    assert not is_paths([{"text": "a"}])


def test_a_generator_that_fails_leaves_the_run_as_it_was(tmp_path):
    def fails():
        yield from ROWS
        raise RuntimeError("the source is gone")

    path = spool(map(row_line, ROWS), tmp_path / "run")
    before = path.read_bytes()
    # Of no record yet, they may be others.
    assert spool(map(row_line, ROWS[1:]), tmp_path / "run") == path
    assert spool(map(row_line, ROWS), tmp_path / "run").read_bytes() == before
    with pytest.raises(RuntimeError, match="the source is gone"):
        spool(map(row_line, fails()), tmp_path / "run")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["rows.jsonl"]
    assert path.read_bytes() == before


def test_a_value_that_python_has_not_is_one_row_spelled(tmp_path):
    far = pa.array([0, 2**62], pa.timestamp("s"))
    table = pa.table({"text": ["one", "two"], "when": far})
    lines = [json.loads(row_line(row)) for row in rows_of(table)]
    assert [line["text"] for line in lines] == ["one", "two"]
    assert lines[0]["when"] == "1970-01-01T00:00:00"
    assert isinstance(lines[1]["when"], str)


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def peak(rows: int) -> int:
        tracemalloc.start()
        spool(
            map(row_line, rows_of({"text": "word " * 100, "n": i} for i in range(rows))), tmp_path / str(rows)
        )
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)
    assert peak(4000) < peak(400) + (64 << 10)


def frame_of(name: str):
    """The rows in a table of a package that may not be installed, with what only such a table has."""
    package = pytest.importorskip(name)
    if name == "pandas":
        frame = package.DataFrame(ROWS)
        frame["when"] = package.Timestamp("2024-02-03")
        frame["gap"] = [1, None] * 3
        return frame, {"when": "2024-02-03T00:00:00", "gap": 1.0}
    if name == "polars":
        return package.DataFrame(ROWS), {}
    data = package.Dataset.from_list([row | {"messages": [{"role": "user", "content": "a"}]} for row in ROWS])
    return data, {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize("name", ["pandas", "polars", "datasets"])
def test_tables_of_packages(name, tmp_path):
    data, more = frame_of(name)
    lines = [json.loads(row_line(row)) for row in rows_of(data)]
    assert lines[0] == ROWS[0] | more
    assert [{key: line[key] for key in ROWS[0]} for line in lines] == ROWS
    if name == "pandas":
        assert lines[1]["gap"] is None
        assert [json.loads(row_line(text)) for text in rows_of(data["prompt"])] == [
            {"text": r["prompt"]} for r in ROWS
        ]
        with pytest.raises(GvendiError, match="data has two columns 'prompt'"):
            list(rows_of(data[["prompt", "prompt"]]))
    if name == "datasets":
        stream = data.to_iterable_dataset()
        assert [row["prompt"] for row in rows_of(stream)] == [row["prompt"] for row in ROWS]
        assert [json.loads(row_line(row))["prompt"] for row in rows_of(data.with_format("numpy"))] == [
            row["prompt"] for row in ROWS
        ]
        for kind in ("DatasetDict", "IterableDatasetDict"):
            splits = getattr(sys.modules["datasets"], kind)(train=data if kind[0] == "D" else stream)
            with pytest.raises(
                GvendiError, match=rf"data is an? {kind} of 1 data sets \(train\); give one of them"
            ):
                rows_of(splits)
