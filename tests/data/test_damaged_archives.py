"""Archives that are cut short or changed: each row before that, then one entry, and the corpus says so."""

import gzip
import json
import random

import pyarrow as pa
import pytest

from gvendi_fast.data.index import Rejected, UnitReader, index_corpus
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.rows import kind_of_reason
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.sources import read_lines
from gvendi_fast.data.unpacking import Damage

NOT_KNOWN = "; how many rows are lost is not known"


def lines(count: int, seed: int = 0) -> list[bytes]:
    draws = random.Random(seed)
    return [b'{"text": "%d %x"}\n' % (i, draws.getrandbits(400)) for i in range(count)]


def zst(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def rows_of(path, **settings):
    manifest = index_corpus(path, **settings)
    with UnitReader(manifest) as reader:
        return manifest, [row for unit in manifest.units for row in reader.read(unit)]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.77, 0.999])
@pytest.mark.parametrize("pack", [lambda content: gzip.compress(content, mtime=0), zst], ids=["gz", "zst"])
def test_every_row_before_the_end_of_a_cut_archive_is_given(tmp_path, pack, share):
    wanted = lines(4000)
    packed = pack(b"".join(wanted))
    path = tmp_path / f"a.jsonl.{'gz' if packed[:2] == gzip.compress(b'')[:2] else 'zst'}"
    path.write_bytes(packed[: int(len(packed) * share)])
    manifest, rows = rows_of(path)
    *good, last = rows
    assert [row.text for row in good] == [json.loads(line)["text"] for line in wanted[: len(good)]]
    # No whole block is lost: zstd's hold up to 128 KB, gzip gives what each byte holds.
    assert len(good) / 4000 > share - (0.003 if path.suffix == ".gz" else 0.33)
    assert last.reason == f"damaged archive: it ends too early, at byte {path.stat().st_size:,}{NOT_KNOWN}"
    assert last.line == len(good) + 1
    assert [(item.path, item.reason) for item in manifest.damaged] == [(str(path), last.reason)]
    assert manifest.rows == len(rows)
    assert manifest.to_dict()["damaged"] == [{"path": str(path), "reason": last.reason}]


def test_rows_before_a_damaged_byte_are_given(tmp_path):
    wanted = lines(4000)
    packed = bytearray(gzip.compress(b"".join(wanted), mtime=0))
    place = len(packed) // 2
    packed[place : place + 40] = b"\xff" * 40
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)
    _, rows = rows_of(path)
    good = [row for row in rows if not isinstance(row, Rejected)]
    assert [row.text for row in good[:1990]] == [json.loads(line)["text"] for line in wanted[:1990]]
    assert rows[-1].reason.startswith("damaged archive: it")
    assert rows[-1].reason.endswith(NOT_KNOWN)
    # What is unpacked between the damage and its notice is no JSON; it is refused row by row.
    kinds = {kind_of_reason(row.reason) for row in rows if isinstance(row, Rejected)}
    assert kinds <= {"damaged archive", "broken JSON", "invalid UTF-8"}


ROW = b'{"text": "a"}\n'
PACKED, ZST = gzip.compress(ROW, mtime=0), zst(ROW)


@pytest.mark.parametrize(
    ("suffix", "content", "rows", "reason"),
    [
        ("gz", PACKED + b"garbage", 1, "what follows at byte 36 is no gzip"),
        ("gz", PACKED + bytes(99), 1, None),
        ("gz", PACKED + PACKED, 2, None),
        ("gz", PACKED + PACKED[:-9], 2, "it ends too early, at byte 59"),
        ("gz", gzip.compress(ROW * 9, mtime=0)[:-9], 9, "it ends too early, at byte "),
        ("gz", PACKED[:-8] + bytes(8), 1, "its checksum does not agree at byte 34"),
        ("gz", ROW, 0, "what it holds at byte 2 is no gzip"),
        ("gz", b"", 0, None),
        ("zst", ZST + ZST, 2, None),
        ("zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + ZST, 1, None),
        ("zst", ZST + ZST[:-3], 1, "it ends too early, at byte "),
        ("zst", ZST + b"garbage", 1, "it cannot be unpacked at byte "),
        ("zst", b"", 0, None),
        # The last line has no end, and is whole.
        ("gz", gzip.compress(ROW + ROW[:-1], mtime=0)[:-1], 2, "it ends too early"),
        ("gz", gzip.compress(ROW + ROW[:-3], mtime=0)[:-1], 1, "it ends too early"),
    ],
    ids=range(15),
)
def test_ends_of_archives(tmp_path, suffix, content, rows, reason):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(content)
    found = [raw for _, _, raw in read_lines(str(path), f"jsonl.{suffix}")]
    assert [raw + b"\n" for raw in found[:rows]] == [ROW] * rows
    rest = found[rows:]
    assert len(rest) == (reason is not None)
    assert all(type(item) is Damage and reason in item and item.endswith(NOT_KNOWN) for item in rest)


def test_a_damaged_archive_is_read_again_as_it_was(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(lines(300)), mtime=0)[:-2000])
    manifest, rows = rows_of(path, rows_per_unit=64)
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 4}}, manifest.to_dict())
    kept = [row.raw for row in original_rows(run, [0, 5, len(rows) - 2])]
    assert kept == [line.rstrip(b"\n") for line in (lines(300)[i] for i in (0, 5, len(rows) - 2))]
    with UnitReader(manifest) as reader:
        # Any order: what an archive gives does not depend on where it was read before.
        again = [row for unit in reversed(manifest.units) for row in reader.read(unit)]
    assert sorted(str(row) for row in again) == sorted(str(row) for row in rows)


def test_memory_and_pieces_do_not_change_what_is_given(tmp_path, monkeypatch):
    from gvendi_fast.data import unpacking

    path = tmp_path / "a.jsonl.zst"
    # Two frames, the second of which is cut: its first blocks are whole.
    path.write_bytes(zst(b"".join(lines(1000))) + zst(b"".join(lines(6000, 1)))[:-100])
    whole = list(read_lines(str(path), "jsonl.zst"))
    monkeypatch.setattr(unpacking, "_BUFFER", 1000)
    assert list(read_lines(str(path), "jsonl.zst")) == whole
    assert 4000 < len(whole) < 7000
