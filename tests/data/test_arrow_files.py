"""Arrow and Feather: files and streams, packed or not, with damage of every byte."""

import random

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.listing import UnreadableFileError
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.sources import open_table

TABLE = pa.table(
    {
        "text": [f"row {i}" for i in range(700)],
        "id": [*range(699), 5],
        "meta": [{"task": f"t{i % 3}"} for i in range(700)],
        "unread": [list(range(i % 5)) for i in range(700)],
    }
)


def write(path, table=TABLE, is_file=True, compression=None, rows=256):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)


def rows_of(path, rows_per_unit=100, **settings):
    manifest = index_corpus(path, rows_per_unit=rows_per_unit, **settings)
    with UnitReader(manifest) as reader:
        rows = [row for unit in manifest.units for row in reader.read(unit)]
        assert list(reader.read(manifest.units[0])) == rows[: manifest.units[0].rows]
    assert len(rows) == manifest.rows
    return manifest, rows


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "stream"])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_files_and_streams_are_read(tmp_path, is_file, compression, name):
    path = tmp_path / name
    write(path, is_file=is_file, compression=compression)
    manifest, rows = rows_of(path, fields=Fields(by="meta.task"))
    assert [row.text for row in rows[:699]] == [f"row {i}" for i in range(699)]
    assert [row.group for row in rows[:4]] == ["t0", "t1", "t2", "t0"]
    assert rows[699].reason == f"duplicate id '5' (first at {path}:6)"
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 4}}, manifest.to_dict())
    kept = list(original_rows(run, [0, 300, 698]))
    assert [row.record() for row in kept] == [TABLE.slice(i, 1).to_pylist()[0] for i in (0, 300, 698)]


def test_feather_of_pyarrow_and_a_limit(tmp_path):
    path = tmp_path / "a.feather"
    pyarrow.feather.write_feather(TABLE, path)
    manifest, rows = rows_of(path, limit=150)
    assert (manifest.rows, len(manifest.units), rows[-1].text) == (150, 2, "row 149")


def test_a_change_under_a_run_is_noticed(tmp_path):
    path = tmp_path / "a.arrow"
    write(path)
    manifest, _ = rows_of(path)
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 4}}, manifest.to_dict())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"row 1row 2", b"ROW 1row 2"))
    with UnitReader(manifest) as reader, pytest.raises(GvendiError, match="has changed since it was indexed"):
        list(reader.read(manifest.units[3]))
    with pytest.raises(GvendiError, match="has changed since it was sketched"):
        list(original_rows(run, [1]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a readable Arrow file"),
        (b"ARROW1\0\0", "is not a readable Arrow file"),
        (b"FEA1" + bytes(20), "is of the first version of Feather"),
        (b'{"text": "a"}\n', "is not a readable Arrow file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ],
    ids=range(5),
)
def test_what_is_not_arrow_is_named_and_can_be_skipped(tmp_path, content, said):
    path = tmp_path / "a.arrow"
    path.write_bytes(content)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UnreadableFileError, match=said) as caught:
        index_corpus(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert index_corpus(tmp_path, skip_unreadable=True).rows == 1


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "stream"])
def test_a_file_that_is_cut_is_named_before_the_work(tmp_path, is_file):
    path = tmp_path / "a.arrow"
    write(path, is_file=is_file)
    content = path.read_bytes()
    for share in (0.2, 0.6, 0.95):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UnreadableFileError, match="is not a readable Arrow file"):
            index_corpus(path)


def test_a_stream_without_its_end_is_said(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, is_file=False)
    assert index_corpus(path).notes == ()
    content = path.read_bytes()
    assert content.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    path.write_bytes(content[:-8])
    manifest, _ = rows_of(path)
    assert manifest.rows == 700
    assert manifest.notes == (f"corpus: '{path}' has no mark of its end: rows may be missing",)


def test_a_cell_that_is_no_utf_8_refuses_its_row(tmp_path):
    text = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    path = tmp_path / "a.arrow"
    write(path, pa.table({"text": text}))
    found = [row.reason if isinstance(row, Rejected) else row.text for row in rows_of(path)[1]]
    assert found[0::2] == ["a", "c"]
    assert found[1].startswith("invalid UTF-8: byte 0xff at position 1")


def test_no_byte_of_a_file_ends_the_process(tmp_path):
    """Offsets that point anywhere are validated before they are followed."""
    table, draws = TABLE.slice(0, 9), random.Random(3)
    for is_file, compression in ((True, None), (False, None), (True, "lz4")):
        path = tmp_path / "a.arrow"
        write(path, table, is_file, compression, rows=4)
        content = path.read_bytes()
        for _ in range(80):
            changed = bytearray(content)
            changed[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
            path.write_bytes(changed)
            try:
                manifest = index_corpus(path, Fields(by="meta.task"))
                with UnitReader(manifest) as reader:
                    assert sum(len(list(reader.read(unit))) for unit in manifest.units) == manifest.rows
            except GvendiError:
                continue


def test_other_columns_can_be_asked_for(tmp_path):
    path = tmp_path / "a.arrow"
    write(path)
    pa.parquet.write_table(TABLE, tmp_path / "a.parquet")
    for name, kind in (("a.arrow", "arrow"), ("a.parquet", "parquet")):
        with open_table(str(tmp_path / name), kind, Fields()) as table:
            assert table.present == ["text", "id", "meta", "unread"]
            assert table.columns == ["id", "text"] or table.columns == ["text", "id"]
            assert table.usable(["meta", "nothing", "unread", "meta"]) == ["meta", "unread"]
            (number, record) = next(table.rows(3, ["meta", "nothing"]))
            assert (number, record) == (4, {"meta": {"task": "t0"}})
