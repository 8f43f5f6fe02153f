"""Source rows of a run: exact bytes, by ordinal, from every kind of file, and what is refused."""

import datetime
import gzip
import hashlib
import json
import os

import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import index_corpus
from gvendi_fast.data.originals import Original, number_of, original_rows
from gvendi_fast.data.run_directory import RunDirectory

LINES = [f'{{"id":"r{i}",  "text": "row {i} \u00fc", "meta": {{"score": {i}}}}}'.encode() for i in range(9)]


def run_of(tmp_path, inputs, limit=None) -> RunDirectory:
    manifest = index_corpus(inputs, rows_per_unit=4, limit=limit)
    return RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 64}}, manifest.to_dict())


@pytest.fixture
def files(tmp_path):
    """Empty lines and other line ends in between, an archive, and a Parquet file with what JSON does not have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "corpus"
    folder.mkdir()
    plain = b"\xef\xbb\xbf" + LINES[0] + b"\r\n\n" + LINES[1] + b" \n" + LINES[2]
    (folder / "a.jsonl").write_bytes(plain)
    with gzip.open(folder / "b.jsonl.gz", "wb") as stream:
        stream.write(b"\n".join(LINES[3:6]) + b"\n\n")
    table = pa.table(
        {
            "text": [f"cell {i}" for i in range(5)],
            "day": [datetime.date(2024, 1, i + 1) for i in range(5)],
            "raw": [bytes([i, 255]) for i in range(5)],
            "more": [{"x": [i, None]} for i in range(5)],
        }
    )
    pq.write_table(table, folder / "c.parquet", row_group_size=2)
    return folder


def test_rows_are_the_bytes_of_the_corpus(files, tmp_path):
    found = list(original_rows(run_of(tmp_path, files), [10, 1, 0, 4, 7, 4]))
    assert [row.ordinal for row in found] == [0, 1, 4, 7, 10]
    assert [row.raw for row in found[:3]] == [LINES[0], LINES[1] + b" ", LINES[4]]
    assert [(os.path.basename(row.file), row.line) for row in found] == [
        ("a.jsonl", 1),
        ("a.jsonl", 3),
        ("b.jsonl.gz", 2),
        ("c.parquet", 2),
        ("c.parquet", 5),
    ]
    assert found[3].record() == {
        "text": "cell 1",
        "day": "2024-01-02",
        "raw": "Af8=",
        "more": {"x": [1, None]},
    }


def test_a_column_that_is_not_read_does_not_end_a_selection(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "text": pa.array(["a"]),
        "nanoseconds": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
        "list": pa.array([[1]], pa.list_(pa.timestamp("ns", "Europe/Berlin"))),
        "far": pa.array([9_000_000_000_000], pa.timestamp("s")),
        "long": pa.array([2**62], pa.duration("s")),
        "time": pa.array([1], pa.time64("ns")),
        "uuid": pa.array([bytes(15) + b"\x05"], pa.uuid()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (row,) = original_rows(run_of(tmp_path, tmp_path / "a.parquet"), [0])
    found = row.record()
    assert found["text"] == "a"
    assert found["nanoseconds"] == "2023-11-14 22:13:20.123456789"
    assert found["uuid"] == "00000000-0000-0000-0000-000000000005"
    assert found["time"] == "00:00:00.000000001"


def test_a_text_that_is_no_utf8_in_a_column_that_is_not_read_does_not_end_a_selection(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"], pa.binary()).buffers())
    pair = pa.StructArray.from_arrays([other, pa.array(["\u00fc"])], ["bad", "good"])
    columns = {
        "text": ["a"],
        "other": other,
        "nested": pair,
        "list": pa.ListArray.from_arrays([0, 1], pair),
        "far": pa.array([9_000_000_000_000], pa.timestamp("s")),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (row,) = original_rows(run_of(tmp_path, tmp_path / "a.parquet"), [0])
    # Written as other bytes are.
    found = {"bad": "Yf8=", "good": "\u00fc"}
    wanted = {"text": "a", "other": "Yf8=", "nested": found, "list": [found]}
    assert row.record() == {**wanted, "far": row.record()["far"]}


def test_numbers_that_json_has_not_are_null_in_a_row_of_a_table(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    nan = float("nan")
    columns = {
        "text": ["a"],
        "score": [nan],
        "half": pa.array([nan], pa.float16()),
        "more": [{"x": [nan, 1.5]}],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (row,) = original_rows(run_of(tmp_path, tmp_path / "a.parquet"), [0])
    assert row.raw == b'{"text": "a", "score": null, "half": null, "more": {"x": [null, 1.5]}}'
    with pytest.raises(GvendiError, match="field 'score' is missing; wanted a finite number"):
        number_of(row, "score")


def test_a_corpus_cut_by_a_limit_may_grow_no_byte_but_is_read(files, tmp_path):
    run = run_of(tmp_path, files / "a.jsonl", limit=2)
    assert [row.raw for row in original_rows(run, [0, 1])] == [LINES[0], LINES[1] + b" "]
    with pytest.raises(GvendiError, match="corpus has rows 0 to 1"):
        list(original_rows(run, [2]))


def test_a_corpus_that_moved_is_found_and_one_that_is_gone_is_named(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_of(tmp_path, "corpus")
    files.rename(tmp_path / "elsewhere")
    with pytest.raises(GvendiError, match=r"'corpus/a.jsonl' was not found .* --corpus DIR"):
        list(original_rows(run, [0]))
    assert [row.raw for row in original_rows(run, [0], corpus="elsewhere")] == [LINES[0]]
    with pytest.raises(GvendiError, match=r"looked for '\S*/run/corpus/a.jsonl', '\S*/run/a.jsonl'"):
        list(original_rows(run, [0], corpus="run"))


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.parquet"])
@pytest.mark.parametrize("same_size", [False, True])
def test_a_file_that_changed_is_refused(files, tmp_path, name, same_size):
    run, path = run_of(tmp_path, files), files / name
    if not same_size:
        path.write_bytes(path.read_bytes() + b"\n")
    elif name == "b.jsonl.gz":
        content = gzip.compress(b"\n".join([*LINES[3:5], LINES[6]]) + b"\n\n")
        path.write_bytes(content + b"\0" * (path.stat().st_size - len(content)))
    else:
        content = bytearray(path.read_bytes())
        content[content.index(b"row 1" if name == "a.jsonl" else b"cell 3") + 4] ^= 1
        path.write_bytes(content)
    with pytest.raises(GvendiError, match=f"{name}' has changed since it was sketched"):
        list(original_rows(run, range(11)))


def test_a_damaged_archive_of_an_earlier_version_gives_its_rows_back(files, tmp_path):
    path = files / "b.jsonl.gz"
    content = b"\n".join(LINES) + b"\n"
    packed = gzip.compress(content, 0)
    path.write_bytes(packed[: len(packed) - 8 - len(LINES[-1]) // 2])
    manifest = index_corpus(path, rows_per_unit=4).to_dict()
    assert (manifest["rows"], len(manifest.pop("damaged"))) == (9, 1)
    whole = content[: content.rindex(LINES[-1])]
    for digest in (hashlib.blake2b(whole, digest_size=16).hexdigest(), "0" * 32):
        manifest["files"][0]["digest"] = digest
        run = RunDirectory.open(tmp_path / digest, {"sketch": {"dim": 64}}, manifest)
        if digest.strip("0"):
            assert [row.raw for row in original_rows(run, [0, 7])] == [LINES[0], LINES[7]]
            continue
        with pytest.raises(GvendiError, match="of an earlier version, which read such a one otherwise"):
            list(original_rows(run, [0]))


def test_numbers_of_rows_and_what_is_none():
    def row(record):
        return Original(0, "data.jsonl", 7, json.dumps(record).encode())

    assert number_of(row({"meta": {"score": 3}}), "meta.score") == 3.0
    assert number_of(row({"meta.score": 0.5, "meta": {"score": 3}}), "meta.score") == 0.5
    for record, shown in (
        ({}, "is missing"),
        ({"q": "9"}, 'is "9"'),
        ({"q": 0}, "is 0"),
        ({"q": True}, "is true"),
    ):
        with pytest.raises(GvendiError, match=f"data.jsonl:7: field 'q' {shown}"):
            number_of(row(record), "q")


def test_a_run_without_a_corpus(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 64}})
    with pytest.raises(GvendiError, match="no units"):
        list(original_rows(run, [0]))
