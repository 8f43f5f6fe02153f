"""A row that is too long is refused before it is held; the rows around it, and its line number, stay true."""

import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import Rejected, UnitReader, index_corpus, read_unit
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.rows import MAX_NAME, MAX_ROW_BYTES
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.sources import read_lines

LIMIT = 1000
ROW = b'{"prompt": "a", "completion": "b"}'


def line_of(size: int) -> bytes:
    """A row of exactly `size` bytes."""
    return b'{"text": "' + b"x" * (size - 12) + b'"}'


def write(path, content: bytes):
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):
        content = pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


def read_all(manifest) -> list:
    with UnitReader(manifest) as reader:
        return [row for unit in manifest.units for row in reader.read(unit)]


def shown(rows) -> list:
    return [(row.line, row.reason if isinstance(row, Rejected) else "ok") for row in rows]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_line_is_refused_from_one_byte_too_many(tmp_path, suffix, end, bom):
    lines = [
        line_of(LIMIT),
        line_of(LIMIT + 1),
        b" " * 9 * LIMIT,
        line_of(LIMIT + 3),
        ROW,
        line_of(9 * LIMIT),
    ]
    path = write(tmp_path / f"a.{suffix}", bom + end.join(lines))
    manifest = index_corpus(path, rows_per_unit=2, max_row_bytes=LIMIT)
    rows = read_all(manifest)
    long = "too long: {:,} bytes, --max-row-bytes is 1,000"
    found = shown(rows)
    # Blanks are no row however many they are.
    assert [line for line, _ in found] == [1, 2, 4, 5, 6]
    assert [reason for _, reason in found][::3] == ["ok", "ok"]
    assert found[1] == (2, long.format(LIMIT + 1))
    assert found[2] == (4, long.format(LIMIT + 3))
    assert found[4] == (6, long.format(9 * LIMIT))
    # Each unit is found again on its own, behind the long lines too.
    alone = [shown(read_unit(manifest, unit)) for unit in reversed(manifest.units)]
    assert [row for unit in reversed(alone) for row in unit] == found
    # The fingerprint is that of all bytes, as it is without a limit.
    assert manifest.files[0].digest == index_corpus(path).files[0].digest


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_without_an_end_is_not_held(tmp_path, suffix):
    size = 40 << 20
    content = ROW + b"\n" + line_of(size) + b"\n" + ROW
    path = write(tmp_path / f"a.{suffix}", content)
    del content
    tracemalloc.start()
    found = [(line, str(raw)[:27]) for line, _, raw in read_lines(str(path), suffix, max_bytes=1 << 20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line for line, _ in found] == [1, 2, 3]
    assert found[1][1] == f"too long: {size:,} bytes,"
    assert peak < 6 << 20


def parquet(path, **options):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
    long = [{"role": "user", "content": "q" * 5000}, talk[1]]
    pq.write_table(pa.table({"messages": [talk, long, talk], "unused": ["u" * 9000] * 3}), path, **options)
    return path


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_long_row_of_parquet(tmp_path, rows):
    path = parquet(tmp_path / "a.parquet", row_group_size=rows)
    before, long, after = read_all(index_corpus(path, max_row_bytes=LIMIT))
    assert long.reason.startswith("too long: 5,")
    assert (before.line, long.line, after.line) == (1, 2, 3)
    assert all(not isinstance(row, Rejected) for row in read_all(index_corpus(path)))


@pytest.mark.parametrize(
    "kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.large_string()]
)
def test_a_row_is_measured_by_its_own_values(tmp_path, kind):
    # One dictionary, or the bytes of all views, stand behind every row of a file.
    texts = [f"{n}" * 300 for n in range(9)] + ["y" * 3000]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), path)
    rows = read_all(index_corpus(path, max_row_bytes=LIMIT))
    assert [isinstance(row, Rejected) for row in rows] == [False] * 9 + [True]


def test_a_value_repeated_by_a_dictionary_is_not_multiplied(tmp_path):
    text = "z" * (3 << 20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([text] * 40).dictionary_encode()}), path)
    del text
    manifest = index_corpus(path)
    tracemalloc.start()
    count = sum(len(row.text) for row in read_unit(manifest, manifest.units[0]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40 * (3 << 20)
    assert peak < 30 << 20


@pytest.mark.parametrize("field", ["id", "by"])
def test_names_of_rows_and_groups_are_bounded(tmp_path, field):
    from gvendi_fast.data.rows import Fields

    path = tmp_path / "a.jsonl"
    rows = [{"text": "t", field: "n" * (MAX_NAME + more)} for more in (0, 1)] + [
        {"text": "t", field: list(range(99_999)) if field == "by" else "n"}
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, bad, last = read_all(index_corpus(path, Fields(by="by")))
    assert not isinstance(good, Rejected)
    assert bad.reason == f"field '{field}' has 65,537 characters; wanted at most 65,536"
    assert isinstance(last, Rejected) == (field == "by")


def test_the_bound_is_recorded_only_where_it_was_chosen(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW + b"\n" + line_of(2 * LIMIT))
    assert "max_row_bytes" not in index_corpus(path).to_dict()
    assert "max_row_bytes" not in index_corpus(path, max_row_bytes=MAX_ROW_BYTES).to_dict()
    chosen = index_corpus(path, max_row_bytes=LIMIT)
    assert chosen.to_dict()["max_row_bytes"] == LIMIT
    with pytest.raises(GvendiError, match="max_row_bytes is 0; wanted at least 1"):
        index_corpus(path, max_row_bytes=0)
    # Whoever reads the originals counts the refused row too.
    run = RunDirectory(tmp_path, {}, chosen.to_dict())
    assert [row.raw for row in original_rows(run, [0])] == [ROW]
    with pytest.raises(GvendiError, match="too long: 2,000 bytes"):
        list(original_rows(run, [1]))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_an_archive_that_unpacks_to_a_huge_line(tmp_path, suffix):
    size = 80 << 20
    packed = io.BytesIO()
    if suffix == "jsonl.gz":
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as stream:
            for _ in range(size >> 20):
                stream.write(b"0" * (1 << 20))
            stream.write(b"\n" + ROW)
    else:
        packed.write(pa.compress(b"0" * size + b"\n" + ROW, "zstd", asbytes=True))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(packed.getvalue())
    assert path.stat().st_size < size // 100
    tracemalloc.start()
    found = [(line, str(raw)[:40]) for line, _, raw in read_lines(str(path), suffix)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line for line, _ in found] == [1, 2]
    assert found[0][1].startswith(f"too long: {size:,} bytes")
    assert peak < 40 << 20
