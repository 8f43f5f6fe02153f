"""Rows, work units, tokens and batches: what is read, what is refused and why, and what is supervised."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hangs import HANG_S

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data import seen_ids
from gvendi_fast.data.index import Fields, Rejected, Row, UnitReader, index_corpus, read_unit


def pair(number: int, **more) -> dict:
    return {"prompt": f"question {number}?", "completion": f"answer {number} é", **more}


def write_lines(path: Path, rows: list) -> Path:
    content = b"".join(
        (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()) + b"\n"
        for row in rows
    )
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(content, mtime=0))
    elif path.name.endswith(".zst"):
        path.write_bytes(pa.compress(content, "zstd", asbytes=True))
    else:
        path.write_bytes(content)
    return path


def read_all(manifest) -> list:
    with UnitReader(manifest) as reader:
        return [row for unit in manifest.units for row in reader.read(unit)]


def reasons(path: Path, **fields) -> list[str | None]:
    rows = read_all(index_corpus(path, Fields(**fields)))
    return [row.reason if isinstance(row, Rejected) else None for row in rows]


def test_three_forms_ids_and_groups(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "tool_calls": None}]
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            pair(0, id="x", meta={"task": "math"}),
            pair(1, id=7, meta={"task": 3}),
            {"messages": talk, "prompt": "alone", "meta": {}},
            {"text": "plain text", "id": None, "meta.task": "literal"},
        ],
    )
    rows = read_all(index_corpus(path, Fields(by="meta.task")))
    assert [row.id for row in rows] == ["x", "7", f"{path}:3", f"{path}:4"]
    assert [row.group for row in rows] == ["math", "3", "", "literal"]
    assert (rows[0].prompt, rows[0].completion, rows[0].messages, rows[0].text) == (
        "question 0?",
        "answer 0 é",
        None,
        None,
    )
    assert rows[2].messages == [talk[0], {"role": "assistant", "content": "hello"}]
    assert rows[2].prompt is None
    assert rows[3].text == "plain text"


def test_field_names_are_settable(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", [{"q": "a", "a": "b", "key": "k"}, {"prompt": "a", "completion": "b"}]
    )
    good, bad = read_all(index_corpus(path, Fields(prompt="q", completion="a", id="key")))
    assert (good.prompt, good.completion, good.id) == ("a", "b", "k")
    assert bad.reason == "missing fields: none of 'q' with 'a', 'messages', 'text'"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "completion": ', "broken JSON: Expecting value at column 31"),
        (b"[1]", "broken JSON: an object is wanted, not list"),
        (b'{"text": "\xff"}', "invalid UTF-8: byte 0xff at position 11"),
        (b'{"text": ' + b"1" * 5000 + b"}", "broken JSON: an integer has too many digits"),
        (b'{"text": ' + b"[" * 200_000, "broken JSON: nested too deeply"),
        ({"prompt": "a"}, "missing field 'completion'"),
        ({"completion": "a", "prompt": None}, "missing field 'prompt'"),
        ({"question": "a"}, "missing fields: none of 'prompt' with 'completion', 'messages', 'text'"),
        ({"prompt": 3, "completion": "a"}, "field 'prompt' is not a string (int)"),
        ({"prompt": "a", "completion": ["b"]}, "message 1 is not an object (str)"),
        ({"prompt": "a", "completion": {"b": 1}}, "field 'completion' is not a string (dict)"),
        ({"prompt": "a", "completion": " \n"}, "empty completion"),
        ({"text": ""}, "empty text"),
        (b'{"text": "a\\ud800"}', "invalid Unicode: lone surrogate in field 'text'"),
        (b'{"text": "a", "id": "\\udfff"}', "invalid Unicode: lone surrogate in field 'id'"),
        ({"text": "a", "id": 1.5}, "field 'id' is not a string or an integer (float)"),
        ({"text": "a", "id": True}, "field 'id' is not a string or an integer (bool)"),
        ({"messages": "hi"}, "field 'messages' is a string that is no JSON"),
        ({"messages": "3"}, "field 'messages' is not a list (int)"),
        ({"messages": ["hi"]}, "message 1 is not an object (str)"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        (
            {"messages": [{"role": "user", "content": [1]}]},
            "message 1: a part of its content is no text (int)",
        ),
        ({"messages": []}, "nothing supervised"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing supervised"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "empty completion"),
    ],
)
def test_rejected_rows(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", [pair(1), line, pair(3)])
    before, rejected, after = read_all(index_corpus(path))
    assert rejected.reason.startswith(reason)
    assert (rejected.file, rejected.line) == (str(path), 2)
    assert [before.line, after.line] == [1, 3]


def test_empty_lines_keep_line_numbers_true(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(pair(1)).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n   \r\n{\n" + good + b"\n\n" + good)
    rows = read_all(index_corpus(path, rows_per_unit=2))
    assert [row.line for row in rows] == [1, 4, 5, 7]
    assert [type(row) for row in rows] == [Row, Rejected, Row, Row]
    assert [row.row for row in rows if isinstance(row, Row)] == [0, 0, 1]


def test_duplicate_ids_over_files(tmp_path):
    write_lines(tmp_path / "a.jsonl", [pair(0, id="x"), pair(1, id=5), pair(2)])
    # "5" spelled with an escape and under an escaped key is the same id.
    escaped = b'{"\\u0069d": "\\u0035", "text": "t"}'
    write_lines(tmp_path / "b.jsonl", [pair(3, id="y"), escaped, {"id": "x"}, pair(4, id="x")])
    manifest = index_corpus(tmp_path, rows_per_unit=2)
    rows = read_all(manifest)
    first = tmp_path / "a.jsonl"
    assert [row.reason for row in rows if isinstance(row, Rejected)] == [
        f"duplicate id '5' (first at {first}:2)",
        f"duplicate id 'x' (first at {first}:1)",
        f"duplicate id 'x' (first at {first}:1)",
    ]
    assert [row.id for row in rows if isinstance(row, Rejected)] == ["5", "x", "x"]
    assert manifest.duplicates == 3


@pytest.mark.parametrize(("repeats", "bytes_a_row"), [(1, 2), (2, 7)])
def test_index_memory_does_not_grow_with_rows(tmp_path, monkeypatch, repeats, bytes_a_row):
    # So that the ids of all but the first rows are on disk.
    monkeypatch.setattr(seen_ids, "_IDS_BYTES", 1 << 16)
    monkeypatch.setattr(seen_ids, "_SLOTS_AT_ONCE", 1 << 10)

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        with open(path, "w") as stream:
            for number in range(rows):
                stream.write(f'{{"id": "row-{number % (rows // repeats)}", "text": "t"}}\n')
        tracemalloc.start()
        manifest = index_corpus(path, rows_per_unit=512)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert manifest.duplicates == rows - rows // repeats
        return size

    # The first one fills caches, and loads what reads such a file.
    peak(8_000)
    # What stays is one object a unit, and a few bytes for a duplicate.
    assert peak(40_000) - peak(16_000) < 24_000 * bytes_a_row


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_packed_files_equal_plain(tmp_path, suffix):
    rows = [pair(number, id=f"r{number % 40}", meta={"task": f"t{number % 3}"}) for number in range(50)]
    plain = write_lines(tmp_path / "plain.jsonl", rows)
    packed = tmp_path / f"packed{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), packed, row_group_size=12)
    else:
        write_lines(packed, rows)

    def content(path):
        manifest = index_corpus(path, Fields(by="meta.task"), rows_per_unit=8)
        assert [unit.rows for unit in manifest.units] == [8] * 6 + [2]
        assert [unit.first_row for unit in manifest.units] == list(range(0, 50, 8))
        sequential = [repr(row).replace(str(path), "F") for row in read_all(manifest)]
        alone = [
            repr(row).replace(str(path), "F")
            for unit in reversed(manifest.units)
            for row in reversed(list(read_unit(manifest, unit)))
        ]
        assert alone[::-1] == sequential
        return sequential

    assert content(packed) == content(plain)


def test_a_reader_passes_an_archive_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl.gz", [pair(number) for number in range(100)])
    manifest = index_corpus(path, rows_per_unit=10)
    opened = []
    monkeypatch.setattr(gzip, "GzipFile", lambda _open=gzip.GzipFile, **of: opened.append(of) or _open(**of))
    with UnitReader(manifest) as reader:
        for unit in manifest.units[::3]:
            # Not every iterator is read to its end.
            assert next(reader.read(unit)).prompt == f"question {unit.first_row}?"
        assert len(opened) == 1
        assert next(reader.read(manifest.units[1])).line == 11
        assert len(opened) == 2


def test_an_overtaken_iterator_says_so(tmp_path):
    manifest = index_corpus(write_lines(tmp_path / "a.jsonl", [pair(n) for n in range(4)]), rows_per_unit=2)
    reader = UnitReader(manifest)
    early = reader.read(manifest.units[0])
    assert next(early).line == 1
    assert next(reader.read(manifest.units[1])).line == 3
    with pytest.raises(RuntimeError, match="taken over"):
        next(early)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_archive_is_rejected_where_it_ends(tmp_path, suffix):
    rng = np.random.default_rng(0)
    rows = [{"text": rng.bytes(600).hex()} for _ in range(2000)]
    path = write_lines(tmp_path / f"a{suffix}", rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    write_lines(tmp_path / "b.jsonl", [pair(1)])
    manifest = index_corpus(tmp_path, rows_per_unit=100)
    rows = read_all(manifest)
    rejected = [row for row in rows if isinstance(row, Rejected)]
    assert len(rejected) == 1
    assert rejected[0].reason.startswith("damaged archive: ")
    assert (rejected[0].file, rejected[0].line) == (str(path), len(rows) - 1)
    assert len(rows) > 500
    assert rows[-1].file.endswith("b.jsonl")
    # The damaged line is found again by a reader that begins at its unit.
    assert list(read_unit(manifest, manifest.units[-2]))[-1] == rejected[0]


def test_parquet_cell_that_is_no_utf8(tmp_path):
    good = pa.array([b"one", b"two", b"\xff", b"four"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, good.buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": text}), path)
    rows = read_all(index_corpus(path))
    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert rows[2].reason == "invalid UTF-8: byte 0xff at position 1"
    assert [row.text for row in rows if isinstance(row, Row)] == ["one", "two", "four"]


def test_parquet_without_known_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"other": [1, 2]}), path)
    assert reasons(path) == ["missing fields: none of 'prompt' with 'completion', 'messages', 'text'"] * 2


def test_parquet_messages_lose_the_nulls_of_structs(tmp_path):
    talk = [
        {"role": "user", "content": "hi", "name": "joe"},
        {"role": "assistant", "content": "hello", "name": None},
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [talk]}), path)
    (row,) = read_all(index_corpus(path))
    assert row.messages == [talk[0], {"role": "assistant", "content": "hello"}]


def test_limit_counts_over_files_and_its_fingerprint_stops_there(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [pair(n) for n in range(5)])
    second = write_lines(tmp_path / "b.jsonl", [pair(n) for n in range(5)])
    write_lines(tmp_path / "c.jsonl", [pair(9)])
    manifest = index_corpus(tmp_path, rows_per_unit=4, limit=7)
    assert [(unit.file, unit.first_row, unit.rows, unit.line) for unit in manifest.units] == [
        (0, 0, 4, 1),
        (0, 4, 1, 5),
        (1, 5, 2, 1),
    ]
    assert [source.path for source in manifest.files] == [str(first), str(second)]
    assert len(read_all(manifest)) == manifest.rows == 7
    content = second.read_bytes()
    second.write_bytes(content[:-4] + b'X"}\n')
    assert index_corpus(tmp_path, rows_per_unit=4, limit=7) == manifest
    assert index_corpus(tmp_path, rows_per_unit=4).files[1].digest != manifest.files[1].digest
    second.write_bytes(content.replace(b"answer 1", b"answer!1"))
    assert index_corpus(tmp_path, rows_per_unit=4, limit=7) != manifest


def test_parquet_fingerprint_sees_every_value_in_use(tmp_path):
    def digest(values: list[str], limit: int | None = None) -> str:
        pq.write_table(
            pa.table({"text": values}), tmp_path / "a.parquet", row_group_size=2, write_statistics=False
        )
        return index_corpus(tmp_path / "a.parquet", limit=limit).files[0].digest

    base = digest(["aa", "bb", "cc", "dd"])
    assert digest(["aa", "bb", "cc", "dd"]) == base
    assert digest(["aa", "bb", "cx", "dd"]) != base
    assert digest(["aa", "bb", "cx", "dd"], limit=2) == digest(["aa", "bb", "cc", "dd"], limit=1)


def test_files_are_found_sorted_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d" / "sub").mkdir(parents=True)
    for name in ("d/b.jsonl", "d/a.jsonl", "d/sub/c.jsonl", "d/.hidden.jsonl"):
        write_lines(tmp_path / name, [pair(1)])
    (tmp_path / "d" / "README.md").write_text("not data")

    def found(*inputs):
        return [source.path for source in index_corpus(list(inputs)).files]

    assert found("d") == ["d/a.jsonl", "d/b.jsonl", "d/sub/c.jsonl"]
    assert found("d/*") == ["d/a.jsonl", "d/b.jsonl", "d/sub/c.jsonl"]
    assert found("d/b.jsonl", "d", "./d/a.jsonl") == ["d/b.jsonl", "d/a.jsonl", "d/sub/c.jsonl"]
    assert found("d/**/c.jsonl") == ["d/sub/c.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "does not exist"),
        ("*.jsonl", "matches nothing"),
        ("*.txt", "matches no file with a suffix"),
        ("a.txt", "unknown suffix; wanted .jsonl"),
        ("folder", "holds no file"),
        ("broken.parquet", "not a readable Parquet file"),
        ("empty.JSONL", "hold no rows"),
    ],
)
def test_inputs_that_cannot_be_used(tmp_path, name, message):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.JSONL").write_bytes(b"\n\n")
    with pytest.raises(GvendiError, match=message):
        index_corpus(tmp_path / name)


@pytest.mark.parametrize("setting", [{"limit": 0}, {"rows_per_unit": 0}])
def test_settings_below_one(tmp_path, setting):
    with pytest.raises(GvendiError, match="wanted at least 1"):
        index_corpus(write_lines(tmp_path / "a.jsonl", [pair(1)]), **setting)


def test_a_file_that_changed_after_indexing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [pair(1), pair(2)])
    manifest = index_corpus(path)
    write_lines(path, [pair(1)])
    with pytest.raises(GvendiError, match="has changed since it was indexed"):
        list(read_unit(manifest, manifest.units[0]))
    path.unlink()
    with pytest.raises(GvendiError, match="no longer exists"):
        list(read_unit(manifest, manifest.units[0]))


def test_manifest_travels(tmp_path):
    manifest = index_corpus(write_lines(tmp_path / "a.jsonl", [pair(n, id="x") for n in range(3)]))
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    plain = json.loads(json.dumps(manifest.to_dict()))
    assert plain["units_total"] == 1
    assert plain["files"][0]["size"] == os.path.getsize(tmp_path / "a.jsonl")


def test_real_corpora(shared):
    manifest = index_corpus(
        [shared / "gsm8k" / "test.jsonl", shared / "bbh_cot", shared / "med"], Fields(by="meta.task")
    )
    assert manifest.rows == 1319 + 4896 + 5382
    rows = read_all(manifest)
    assert sum(isinstance(row, Rejected) for row in rows) == 0
    assert len({row.group for row in rows if "bbh" in row.file}) == 20


def test_importing_the_corpus_needs_no_heavy_library():
    modules = "gvendi_fast.data.index, gvendi_fast.sketching.proxy.encode, gvendi_fast.data.run_directory"
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"transformers", "pyarrow", "tokenizers", "jinja2"} & set(loaded)


def test_a_reader_belongs_to_one_thread_until_it_is_closed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(6)))
    manifest = index_corpus([path], Fields(), rows_per_unit=3)
    first, second = manifest.units
    reader = UnitReader(manifest)
    rows = reader.read(first)
    texts = [next(rows).text]
    with ThreadPoolExecutor(1) as pool:
        for use in (lambda: list(reader.read(second)), reader.close):
            with pytest.raises(GvendiError, match="belongs to another one"):
                pool.submit(use).result(HANG_S)
        texts += [row.text for row in rows]
        assert texts == ["row 0", "row 1", "row 2"]
        reader.close()
        assert [row.text for row in pool.submit(lambda: list(reader.read(second))).result(HANG_S)] == [
            "row 3",
            "row 4",
            "row 5",
        ]
