"""Parquet shards of which one is damaged: found before the work, by name, and passed over where that is asked for."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.listing import UnreadableFileError

ROWS = 4000


@pytest.fixture
def shards(tmp_path):
    draws = random.Random(1)
    for shard in range(3):
        columns = {
            "text": [f"{i} {draws.random()}" for i in range(ROWS)],
            "other": [draws.random() for _ in range(ROWS)],
        }
        pq.write_table(
            pa.table(columns),
            tmp_path / f"{shard}.parquet",
            row_group_size=ROWS // 2,
            use_dictionary=False,
            compression=None,
            data_page_size=4096,
        )
    return tmp_path


def damage(path, column: str) -> None:
    """Overwrite what lies in the middle of the second row group's column: lengths and pages, not the first page."""
    file = pq.ParquetFile(path)
    group = file.metadata.row_group(1)
    place = next(
        group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column
    )
    content = bytearray(path.read_bytes())
    middle = place.data_page_offset + place.total_compressed_size // 2
    content[middle : middle + 3000] = b"\xff" * 3000
    path.write_bytes(content)


def count(manifest):
    with UnitReader(manifest) as reader:
        rows = [row for unit in manifest.units for row in reader.read(unit)]
    assert not any(isinstance(row, Rejected) for row in rows)
    assert len(rows) == manifest.rows
    return len(rows)


def test_a_page_that_is_damaged_is_found_before_the_work(shards):
    path = shards / "1.parquet"
    damage(path, "text")
    with pytest.raises(UnreadableFileError, match=f"^corpus: '{path}' is damaged after row ") as caught:
        index_corpus(shards)
    assert str(caught.value).endswith("replace the file, or --skip-unreadable goes on without it")
    manifest = index_corpus(shards, skip_unreadable=True)
    assert [item.path for item in manifest.unreadable] == [str(path)]
    assert count(manifest) == 2 * ROWS
    # Up to a limit before it the file is whole, and so it is in its other columns.
    assert count(index_corpus(path, limit=ROWS // 2)) == ROWS // 2
    (shards / "1.parquet").write_bytes((shards / "0.parquet").read_bytes())
    damage(path, "other")
    assert count(index_corpus(shards)) == 3 * ROWS
    with pytest.raises(UnreadableFileError, match="is damaged after row "):
        index_corpus(shards, Fields(by="other"))


@pytest.mark.parametrize(
    "change",
    [lambda content: b"", lambda content: content[:-1000], lambda content: content[:3000]],
    ids=["empty", "without its footer", "cut"],
)
def test_a_shard_that_is_cut_is_passed_over_where_asked(shards, change):
    path = shards / "1.parquet"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UnreadableFileError, match=f"^corpus: '{path}' is not a readable Parquet file"):
        index_corpus(shards)
    manifest = index_corpus(shards, skip_unreadable=True)
    assert count(manifest) == 2 * ROWS
    assert [item.path for item in manifest.unreadable] == [str(path)]


def test_files_without_rows_are_said(shards):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), shards / "3.parquet")
    for name in ("4.jsonl", "5.jsonl.gz", "6.json", "7.csv", "8.jsonl.zst"):
        (shards / name).write_bytes(b"")
    (shards / "9.json").write_text("[]")
    manifest = index_corpus(shards)
    assert count(manifest) == 3 * ROWS
    assert [note.removeprefix(f"corpus: '{shards}/") for note in manifest.notes] == [
        f"{name}' holds no rows"
        for name in ("3.parquet", "4.jsonl", "5.jsonl.gz", "6.json", "7.csv", "8.jsonl.zst", "9.json")
    ]
