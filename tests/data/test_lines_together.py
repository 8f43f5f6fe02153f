"""Lines that are read together are what the same lines are one by one: records, checksums, work units, rows."""

import hashlib
import json
import random
import sys

import pytest

from gvendi_fast.data import json_lines, seen_ids
from gvendi_fast.data import lines as lines_of_text
from gvendi_fast.data.index import Fields, UnitReader, index_corpus
from gvendi_fast.data.lines import Lines
from gvendi_fast.data.records import decode_line
from gvendi_fast.data.sources import read_lines
from gvendi_fast.data.unit_digests import line_digest

USUAL = [
    b'{"prompt": "a", "completion": "b"}',
    b'{"id": "x", "text": "\xe2\x88\x92 \xc3\xa4"}',
    b'{"\\u0069d": "x", "text": "t"}',
    b'{"text": "t", "meta": {"id": 3}}',
    b'{"id": 7, "text": "u"}',
]
ODD = [
    b"{}",
    b"",
    b" ",
    b"[1]",
    b'{"text": "t"}\r',
    b' {"text": "t"}',
    b'\xef\xbb\xbf{"text": "t"}',
    b'{"text": \xff}',
    b'{"text": "\xff"}',
    b'{"text": "t"}{"text": "t"}',
    b'{"text":',
    b'"t"}',
    b'{"text": NaN, "id": NaN}',
    b'{"text": "\\ud800"}',
    b'{"text": "t", "id": ' + b"7" * 5000 + b"}",
    b'{"text": "t", "deep": ' + b"[" * 70 + b"]" * 70 + b"}",
    b'{"text": "' + b"long" * 500 + b'"}',
]


@pytest.fixture(autouse=True)
def few_lines_come_together(monkeypatch):
    monkeypatch.setattr(lines_of_text, "_FEWEST", 8)


def content_of(seed: int) -> bytes:
    """Some lines, mostly usual ones, of which some have a byte changed."""
    draws = random.Random(seed)
    lines = []
    for number in range(draws.choice([3, 30, 300])):
        line = draws.choice(ODD if draws.random() < 0.03 else USUAL)
        if draws.random() < 0.3 and line in USUAL:
            line = line.replace(b'"x"', b'"%d"' % number)
        if draws.random() < 0.02 and line:
            line = line[: (at := draws.randrange(len(line)))] + bytes([draws.randrange(256)]) + line[at + 1 :]
        lines.append(line)
    return b"\n".join(lines) + draws.choice([b"", b"\n"])


def read(path, **settings):
    manifest = index_corpus(path, **settings)
    with UnitReader(manifest) as reader:
        return manifest, [row for unit in manifest.units for row in reader.read(unit)]


@pytest.mark.parametrize("seed", range(60))
def test_a_corpus_is_the_same_together_and_one_by_one(tmp_path, monkeypatch, seed):
    draws = random.Random(seed)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content_of(seed))
    settings = {
        "rows_per_unit": draws.choice([1, 7, 64, 4096]),
        "limit": draws.choice([None, None, 1, 20, 100]),
        "max_row_bytes": draws.choice([1000, 1 << 23]),
        "fields": Fields(id=draws.choice(["id", "text", "no such"]), format="fields"),
    }
    together = read(path, **settings)
    monkeypatch.setattr(json_lines, "lines_ahead", lambda *_: (None, sys.maxsize))
    assert read(path, **settings) == together


def test_most_lines_do_come_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(USUAL * 5000) + b"\n")
    found = list(read_lines(str(path), "jsonl", together=sys.maxsize))
    alone = [line for line, _, raw in found if type(raw) is not Lines]
    assert len(alone) < 20
    assert sum(len(raw) if type(raw) is Lines else 1 for _, _, raw in found) == 25_000
    # Never more than were asked for.
    for most in (1, 9, 10_000):
        lines = [raw for _, _, raw in read_lines(str(path), "jsonl", together=most) if type(raw) is Lines]
        assert sum(map(len, lines)) <= most


def test_checksum_and_records_are_those_of_the_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\n".join([*USUAL, *(row for row in ODD if row[:1] == b"{" and row[3:] and row[-1:] == b"}")])
        + b"\n"
    )
    ((_, _, lines),) = read_lines(str(path), "jsonl", together=sys.maxsize)
    content = lines.split()
    assert b"\n".join(content) + b"\n" == path.read_bytes()
    assert [repr(record) for record in lines.records()] == [repr(decode_line(raw)) for raw in content]
    # Also behind line 2^32, of which the checksum has the last 32 bits.
    for first in (1, (1 << 32) - 3):
        moved = Lines(lines.raw, first, 0, lines.ends)
        for start, stop in ((0, len(lines)), (0, 1), (2, 5), (4, len(lines))):
            one = several = 0xDEADBEEF
            for number in range(start, stop):
                one = line_digest(one, first + number, content[number])
            part = moved.part(start, stop)
            assert part.digest(several) == one
            assert part.split() == content[start:stop]
            assert part.line == first + start
            assert path.read_bytes()[part.offset :].startswith(part.raw)


def test_the_fingerprint_is_of_all_bytes_up_to_the_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(9000)]
    path.write_bytes(b"".join(lines))
    for limit in (None, 9000, 8999, 4000, 1):
        found = index_corpus(path, limit=limit)
        expected = hashlib.blake2b(b"".join(lines[:limit]), digest_size=16).hexdigest()
        assert (found.rows, found.files[0].digest) == (limit or 9000, expected)


def test_ids_on_disk_tell_the_same_repeats(tmp_path, monkeypatch):
    draws = random.Random(1)
    for name in ("a", "b"):
        rows = [
            {"id": draws.choice([str(number), number % 700, f"é{number % 40}"]), "text": "t"}
            for number in range(900)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    in_memory = read(tmp_path, rows_per_unit=50)
    assert in_memory[0].duplicates > 500
    for limit in (0, 50_000):
        monkeypatch.setattr(seen_ids, "_IDS_BYTES", limit)
        assert read(tmp_path, rows_per_unit=50) == in_memory
