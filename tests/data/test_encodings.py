"""Texts in other encodings and with other line ends are read, and said; what is in none refuses its row."""

import gzip

import pytest

from gvendi_fast.data.index import Rejected, UnitReader, index_corpus

ROWS = '{"text": "ä 你好 😀"}\n{"text": "b"}\n\n{"text": "c"}\n'
TEXTS = ["ä 你好 😀", "b", "c"]


def outcomes(path, **settings):
    manifest = index_corpus(path, rows_per_unit=2, **settings)
    with UnitReader(manifest) as reader:
        rows = [row for unit in manifest.units for row in reader.read(unit)]
        # A work unit that is read alone is found, too.
        assert [row for unit in manifest.units[1:2] for row in reader.read(unit)] == rows[2:4]
    return [row.reason if isinstance(row, Rejected) else row.text for row in rows], manifest.notes


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_utf_16_and_32_are_read_with_and_without_a_mark(tmp_path, encoding, name):
    path = tmp_path / name
    text = ROWS if "json" in name else "text\n" + "\n".join(TEXTS)
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found, notes = outcomes(path)
    assert found == TEXTS
    assert [note.removeprefix(f"corpus: '{path}' is UTF-")[:2] for note in notes] == [encoding[4:6]]


def test_what_is_not_utf_16_refuses_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        '{"text": "a"}\n{"text": "'.encode("utf-16") + b"\x00\xd8" + '"}\n{}'.encode("utf-16-le") + b"!"
    )
    found, _ = outcomes(path)
    assert found[0] == "a"
    assert [reason.split(":")[0] for reason in found[1:]] == ["invalid UTF-8"] * 2


def test_latin_1_refuses_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xe4"}\n{"text": "b"}\n')
    assert outcomes(path) == (["invalid UTF-8: byte 0xe4 at position 11", "b"], ())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_marks_of_joined_files_are_skipped(tmp_path, name):
    part = b"\xef\xbb\xbf" + (b'{"text": "b"}\n' if "json" in name else b"b\n")
    path = tmp_path / name
    path.write_bytes((b"\xef\xbb\xbftext\n" if name == "a.csv" else b"") + part + part + part)
    found, notes = outcomes(path)
    assert found == ["b", "b", "b"]
    assert all(
        "byte order mark in its midst (line 2), as joined files do, which is skipped" in note
        for note in notes
    )
    assert len(notes) == (name != "a.csv")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_carriage_returns_alone_end_lines(tmp_path, name):
    path = tmp_path / name
    content = (b"text\rb\rc\r" if name == "a.csv" else b'{"text": "b"}\r{"text": "c"}\r') * 1
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found, notes = outcomes(path)
    assert found == ["b", "c"]
    assert notes == (
        f"corpus: '{path}' ends its lines with carriage returns alone, which are read as newlines",
    )
