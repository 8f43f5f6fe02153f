"""Odd Parquet columns, archives, encodings and numbers: each refuses its row, or names its file in one sentence."""

import bz2
import datetime
import decimal
import gzip
import lzma
import re
import resource
import subprocess
import sys
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import ROOT

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.arrow_values import plain
from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.listing import UnreadableFileError

ROW = b'{"text": "a"}\n'


def outcomes(path, **fields) -> list[str]:
    manifest = index_corpus(path, Fields(**fields))
    with UnitReader(manifest) as reader:
        return [
            row.reason if isinstance(row, Rejected) else row.group
            for unit in manifest.units
            for row in reader.read(unit)
        ]


FAR = {
    "timestamp": pa.array([0, 9_000_000_000_000], pa.timestamp("s")),
    "nanoseconds": pa.array([0, 1], pa.timestamp("ns")),
    "date": pa.array([0, 2**31 - 1], pa.int32()).view(pa.date32()),
    "duration": pa.array([0, 1], pa.duration("ns")),
    "long duration": pa.array([0, 2**62], pa.duration("s")),
    "time": pa.array([0, 1], pa.time64("ns")),
}


@pytest.mark.parametrize("name", FAR)
def test_a_value_beyond_pythons_refuses_its_row(tmp_path, name, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "g": FAR[name]}), path)
    first, second = outcomes(path, by="g")
    assert not first.startswith("field")
    assert second.startswith("field 'g' (")
    assert "has a value beyond Python's: " in second
    assert len(second.splitlines()) == 1
    # Where the column is not read, the row is.
    assert outcomes(path) == ["", ""]


@pytest.mark.parametrize(
    ("column", "group"),
    [
        (pa.array([decimal.Decimal(5)], pa.decimal256(60, 2)), '"5.00"'),
        (pa.array(["x"]).dictionary_encode(), "x"),
        (pa.array(["x"], pa.large_string()), "x"),
        (pa.array(["x"], pa.string_view()), "x"),
        (pa.nulls(1), ""),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), '[["k", 1]]'),
        (pa.array([datetime.date(2024, 1, 2)]), '"2024-01-02"'),
        (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), "[1, 2]"),
    ],
)
def test_odd_columns_that_make_groups(tmp_path, column, group):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "g": column}), path)
    assert outcomes(path, by="g") == [group]


WHOLE, ODD = 1_700_000_000_123_456_000, 1_700_000_000_123_456_789
TIME = "2023-11-14 22:13:20.123456"
NS = pa.timestamp("ns")
TIMES = {
    "plain": ([WHOLE, ODD], NS, f'"{TIME}"'),
    "utc": ([WHOLE, ODD], pa.timestamp("ns", "UTC"), f'"{TIME}+00:00"'),
    "zone": ([WHOLE, ODD], pa.timestamp("ns", "Europe/Berlin"), f'"{TIME}+00:00"'),
    "no such zone": ([WHOLE, ODD], pa.timestamp("ns", "No/Where"), f'"{TIME}+00:00"'),
    "list": ([[WHOLE], [ODD]], pa.list_(NS), f'["{TIME}"]'),
    "large list": ([[WHOLE], [ODD]], pa.large_list(NS), f'["{TIME}"]'),
    "fixed list": ([[WHOLE], [ODD]], pa.list_(NS, 1), f'["{TIME}"]'),
    "struct": ([{"t": WHOLE}, {"t": ODD}], pa.struct([("t", NS)]), f'{{"t": "{TIME}"}}'),
    "map": ([[("a", WHOLE)], [("a", ODD)]], pa.map_(pa.string(), NS), f'[["a", "{TIME}"]]'),
    "keys": ([[(WHOLE, 1)], [(ODD, 1)]], pa.map_(NS, pa.int8()), f'[["{TIME}", 1]]'),
    "deep": ([[{"t": [WHOLE]}], [{"t": [ODD]}]], pa.list_(pa.struct([("t", pa.list_(NS))])), f'[{{"t": ["{TIME}"]}}]'),
    "dictionary": ([WHOLE, ODD], pa.dictionary(pa.int8(), NS), f'"{TIME}"'),
    "time": ([1000, 1], pa.time64("ns"), '"00:00:00.000001"'),
    "duration": ([2 * 86400 * 10**9, 1], pa.duration("ns"), '"2 days, 0:00:00"'),
    "durations": ([[2000], [1]], pa.list_(pa.duration("ns")), '["0:00:00.000002"]'),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
def test_times_are_the_same_on_every_machine(tmp_path, name):
    values, kind, group = TIMES[name]
    column = pa.array(values, kind.value_type if pa.types.is_dictionary(kind) else kind)
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "g": column}), path)
    first, second = outcomes(path, by="g")
    assert first == group
    assert second.startswith("field 'g' (")
    assert "would lose data: " in second
    # What pyarrow would ask pandas or a database of zones for does not reach it.
    (read,) = pq.ParquetFile(path).iter_batches()
    assert not re.search(r"\[ns|tz=(?!\+00:00)", str(plain(read.slice(0, 1)).schema.field("g").type))


@pytest.mark.parametrize(
    ("column", "group"),
    [
        (pa.array([uuid.UUID(int=5).bytes], pa.uuid()), '"00000000-0000-0000-0000-000000000005"'),
        (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1], pa.int8())), "true"),
        (pa.ExtensionArray.from_storage(pa.opaque(NS, "t", "v"), pa.array([WHOLE], NS)), f'"{TIME}"'),
        (pa.array([1_000_000], pa.timestamp("us", "No/Where")), '"1970-01-01 00:00:01+00:00"'),
        (pa.array([b"\xff"], pa.binary(1)), "\"b'\\\\xff'\""),
        (pa.array([decimal.Decimal("1.50")], pa.decimal128(5, 2)), '"1.50"'),
    ],
)
def test_extensions_and_zones_make_groups(tmp_path, column, group):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "g": column}), path)
    assert outcomes(path, by="g") == [group]
    # None of them is an id or a text, and none ends the run.
    assert "is not a string" in outcomes(path, id="g")[0]
    assert "is not a string" in outcomes(path, text="g")[0]


def test_binary_is_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([b"a"])}), path)
    assert outcomes(path) == ["field 'text' is not a string (bytes)"]


def test_two_columns_of_one_name_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(UnreadableFileError, match="has 2 columns 'text'; keep one"):
        index_corpus(path)


def test_a_column_with_a_dot_goes_before_a_path(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "meta.task": ["x"], "meta": [{"task": "z"}]}), path)
    assert outcomes(path, by="meta.task") == ["x"]


def parquet_bytes(tmp_path) -> bytes:
    path = tmp_path / "good.parquet"
    pq.write_table(pa.table({"text": ["abc"] * 50}), path)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: b"PAR1",
        lambda good: b"PAR1" + bytes(4) + b"PAR1",
        lambda good: b"PAR1" + bytes(50) + b"\xff\xff\xff\x7fPAR1",
        lambda good: good[:-100],
        lambda good: good[: len(good) // 2],
        lambda good: b"PARE" + good[4:-4] + b"PARE",
        lambda good: ROW * 10,
    ],
)
def test_what_is_not_parquet_is_named_and_can_be_skipped(tmp_path, damage):
    path = tmp_path / "z.parquet"
    path.write_bytes(damage(parquet_bytes(tmp_path)))
    (tmp_path / "a.jsonl").write_bytes(ROW)
    with pytest.raises(UnreadableFileError, match="is not a readable Parquet file") as caught:
        index_corpus(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    manifest = index_corpus(tmp_path, skip_unreadable=True)
    assert (manifest.rows, manifest.unreadable[0].path) == (1, str(path))


ZST = pa.compress(ROW, "zstd", asbytes=True)


def zstd_frame(window: int | None = None, content: int | None = None) -> bytes:
    """One frame of the row, uncompressed, with the window that is declared (a power of 2) or as much content."""
    begin = (
        b"\0" + bytes([(window.bit_length() - 11) << 3])
        if window
        else b"\xe0" + content.to_bytes(8, "little")
    )
    return b"\x28\xb5\x2f\xfd" + begin + (len(ROW) << 3 | 1).to_bytes(3, "little") + ROW


@pytest.mark.parametrize("before", [b"", ZST], ids=["first", "later"])
@pytest.mark.parametrize(
    "frame",
    [*(zstd_frame(window=1 << bits) for bits in (28, 31, 41)), zstd_frame(content=1 << 31)],
    ids=["256 MB", "2 GB", "2 TB", "content"],
)
def test_an_archive_that_asks_for_memory_is_named(tmp_path, before, frame):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(before + zstd_frame(window=1 << 27))
    assert outcomes(path) == [""] * (2 if before else 1)
    path.write_bytes(before + frame)
    (tmp_path / "b.jsonl").write_bytes(ROW)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableFileError, match="with a window of more than 128 MB") as caught:
        index_corpus(tmp_path)
    assert str(path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 64 << 10
    assert index_corpus(tmp_path, skip_unreadable=True).to_dict()["rows"] == 1


@pytest.mark.parametrize(("suffix", "pack"), [("xz", lzma.compress), ("bz2", bz2.compress)])
def test_other_archives_are_never_opened(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(pack(ROW))
    path.chmod(0)
    with pytest.raises(GvendiError, match=r"\.jsonl, .*\.parquet"):
        index_corpus(path)
    (tmp_path / "b.jsonl").write_bytes(ROW)
    assert outcomes(tmp_path) == [""]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
STAND_INS = {
    "LFS": (LFS, "'git lfs pull'"),
    "annex": (b"/annex/objects/SHA256E-s5--aa.jsonl\n", "'git annex get'"),
    "annex link": (b"../.git/annex/objects/x/y/SHA256E-s5--aa.jsonl", "'git annex get'"),
    "page": (b"\n <!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page, .*download it again"),
    "bare page": (b"<HTML><head>", "a web page"),
    "error of a store": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "a web page"),
}


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "packed.jsonl.gz"])
def test_what_lies_in_place_of_a_file_is_said(tmp_path, name, kind):
    content, said = STAND_INS[kind]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.lstrip()) if name.startswith("packed") else content)
    with pytest.raises(
        UnreadableFileError, match=f"^corpus: '{path}' is .*{said}.*, or --skip-unreadable goes on"
    ):
        index_corpus(path)
    (tmp_path / "good.jsonl").write_bytes(ROW)
    found = index_corpus(tmp_path, skip_unreadable=True)
    assert [file.path for file in found.unreadable] == [str(path)]
    assert found.rows == 1


OTHER_FORMATS = {
    "zip": (b"PK\x03\x04\x14\0\0\0", "a zip archive: unpack it"),
    "tar": (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000" + ROW, "a tar archive: unpack it"),
    "gz": (gzip.compress(ROW), "packed: name it .gz"),
    "zst": (ZST, "packed: name it .zst"),
    "bz2": (bz2.compress(ROW), "packed: unpack it"),
    "xz": (lzma.compress(ROW), "packed: unpack it"),
    "parquet": (b"PAR1\x15\x04", "packed: name it .parquet"),
    "arrow": (b"ARROW1\0\0", "packed: name it .arrow"),
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
@pytest.mark.parametrize("name", ["a.jsonl", "packed.jsonl.gz"])
def test_other_formats_under_the_name_of_json_lines_are_said(tmp_path, name, kind):
    content, said = OTHER_FORMATS[kind]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.startswith("packed") else content)
    with pytest.raises(
        UnreadableFileError, match=f"^corpus: '{path}' is {said}.*, or --skip-unreadable goes on"
    ):
        index_corpus(path)
    (tmp_path / "good.jsonl").write_bytes(ROW)
    assert index_corpus(tmp_path, skip_unreadable=True).rows == 1


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (ROW + b"\0\0\n" + ROW, ["", "broken JSON: Expecting value at column 1", ""]),
        (
            ROW + ROW.replace(b"\n", b"\r") * 3,
            ["", "broken JSON: several rows on one line; end lines with newlines"],
        ),
        (b'{"text": "a", "by": NaN}', ["NaN"]),
        (b'{"text": "a", "by": [-Infinity]}', ["[-Infinity]"]),
        (b'{"text": 1, "text": "a", "by": "x", "by": "y"}', ["y"]),
        (b'{"text": "a", "n": ' + b"1" * 4301 + b"}", ["broken JSON: an integer has too many digits"]),
        (b'{"text": "a", "n": ' + b"1" * 4300 + b"}", [""]),
        (b'{"text": "a", "by": ' + b"1" * 5000 + b".5}", ["Infinity"]),
        (b'{"text": "\\ud83d\\ude00"}', [""]),
        (b'{"text": "\\ude00\\ud83d"}', ["invalid Unicode: lone surrogate"]),
        (b'{"text": "a", "by": {"\\udc00": 1}}', ["invalid Unicode: lone surrogate in field 'by'"]),
    ],
)
def test_odd_lines(tmp_path, content, wanted):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    found = outcomes(path, by="by")
    assert len(found) == len(wanted)
    assert all(reason.startswith(begin) for reason, begin in zip(found, wanted, strict=True))


def test_no_byte_of_a_footer_ends_the_process(tmp_path):
    """What contradicts itself there ends the process inside of pyarrow, if it is asked for before it is read."""
    path = tmp_path / "a.parquet"
    rows = [{"prompt": f"{i}?", "completion": f"{i}.", "messages": [{"role": "user"}]} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    content = path.read_bytes()
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    code = """
import sys
from pathlib import Path
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import UnitReader, index_corpus
path, begin = Path(sys.argv[1]), int(sys.argv[2])
content = path.read_bytes()
refused = 0
for place in range(begin, len(content)):
    changed = bytearray(content)
    changed[place] ^= 1 << place % 3
    path.write_bytes(changed)
    try:
        manifest = index_corpus([path])
        with UnitReader(manifest) as reader:
            [list(reader.read(unit)) for unit in manifest.units]
    except GvendiError:
        refused += 1
print(refused)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path, str(begin)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 100 < int(done.stdout) < len(content) - begin
