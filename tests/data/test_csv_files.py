"""CSV and TSV: quoted newlines, empty cells, other delimiters, and broken records that cost themselves only."""

import csv
import gzip
import io
import json
import random

import pytest

from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.listing import UnreadableFileError
from gvendi_fast.data.originals import number_of, original_rows
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.sources import read_lines


def rows_of(path, **settings):
    manifest = index_corpus(path, rows_per_unit=2, **settings)
    with UnitReader(manifest) as reader:
        rows = [row for unit in manifest.units for row in reader.read(unit)]
        assert list(reader.read(manifest.units[0])) == rows[: manifest.units[0].rows]
    assert len(rows) == manifest.rows
    return manifest, rows


def said(path, **settings):
    return [row.reason if isinstance(row, Rejected) else row.text for row in rows_of(path, **settings)[1]]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "A.CSV"])
def test_records_are_rows_by_the_header(tmp_path, name):
    records = [
        {"prompt": "a\nb, c", "completion": 'say "x"\tnow', "id": "7", "score": "0.5"},
        {"prompt": "ä 😀", "completion": "2", "id": "", "score": "2"},
        {"prompt": "1\r\n2", "completion": "3", "id": "7", "score": ""},
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), delimiter="\t" if "tsv" in name else ",")
    writer.writeheader()
    writer.writerows(records)
    path = tmp_path / name
    content = ("\ufeff" + text.getvalue()).encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    manifest, rows = rows_of(path)
    assert [(row.prompt, row.completion, row.id) for row in rows[:2]] == [
        ("a\nb, c", 'say "x"\tnow', "7"),
        # An empty cell is no id. The number is that of the line, of which a record may have several.
        ("ä 😀", "2", f"{path}:4"),
    ]
    assert rows[2].reason == f"duplicate id '7' (first at {path}:2)"
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 4}}, manifest.to_dict())
    kept = list(original_rows(run, [0, 1]))
    assert kept[0].record() == records[0]
    assert json.loads(kept[1].raw) == {"prompt": "ä 😀", "completion": "2", "score": "2"}
    assert [number_of(row, "score") for row in kept] == [0.5, 2.0]


BROKEN = {
    "too many": ("text,n\na,1\nb,2,3\nc,4\n", ["a", "broken CSV: 3 cells under a header of 2", "c"]),
    "too few": ("text,n\na,1\nb\nc,4\n", ["a", "broken CSV: 1 cells under a header of 2", "c"]),
    "no quote at the end": ('text,n\n"a,1\nb,2\nc,4\n', ["broken CSV: unexpected end of data", "b", "c"]),
    "a quote too early": ('text,n\n"a"b,1\nb,2\n', ["broken CSV: ',' expected after '\"'", "b"]),
    "no quote, another row": ('text,n\n"a,1\n"b",2\nc,3\n', ["broken CSV: ',' expected after '\"'", "b", "c"]),
    "not UTF-8": ("text\na\n\udcff\nc\n", ["a", "invalid UTF-8: byte 0xff at position 1", "c"]),
    "not UTF-8, lines after it": (
        'text,n\na,1\n"b\udcff\nb, b\nb\udcfe",2\nc,3\n',
        ["a", "invalid UTF-8: byte 0xff at position 3", "c"],
    ),
    "not UTF-8, lines before it": (
        'text,n\na,1\n"b\nb\udcff",2\nc,3\n', ["a", "invalid UTF-8: byte 0xff at position 5", "c"]
    ),
    "not UTF-8 and no quote at the end": (
        'text,n\n"a\udcff,1\nb,2\nc,3\n', ["broken CSV: unexpected end of data", "b", "c"]
    ),
    "long": ("text\na\n" + "b" * 300 + "\nc\n", ["a", "too long: 301 bytes, --max-row-bytes is 200", "c"]),
    "blank lines": ("text\n\na\n\n\nb", ["a", "b"]),
    "a quote inside": ('text\n5" pipe\nb\n', ['5" pipe', "b"]),
    "header alone": ("text,n\n", []),
    "semicolons": ("text;n\na;1\n\"b;,\";2\n", ["a", "b;,"]),
    "nothing in it": ("text,n\na,1\n,2\nc,3", ["a", "missing fields", "c"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_record_costs_itself_only(tmp_path, kind):
    content, wanted = BROKEN[kind]
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    path = tmp_path / "b.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    found = said(tmp_path, max_row_bytes=200)
    assert found[0] == "first"
    assert len(found) - 1 == len(wanted), found
    assert all(reason.startswith(begin) for reason, begin in zip(found[1:], wanted, strict=True)), found


def test_a_long_record_of_several_lines_is_given_up(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\n"' + "b\n" * 300 + '"\nc\n')
    found = said(path, max_row_bytes=200)
    assert found[0].startswith("too long: ")
    assert found[-1] == "c"


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,n,text\na,1,b\n")
    with pytest.raises(UnreadableFileError, match="has 2 columns 'text'; keep one, or --skip-unreadable"):
        index_corpus(path)
    path.write_bytes(b"t\xff\na\n")
    said = r"has no header that can be read \(invalid UTF-8.*iconv -f cp1252 -t utf-8"
    with pytest.raises(UnreadableFileError, match=said):
        index_corpus(path)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    assert index_corpus(tmp_path, skip_unreadable=True).rows == 1


def test_a_packed_table_that_is_cut_gives_whole_records_and_one_entry(tmp_path):
    path = tmp_path / "a.csv.gz"
    lines = [f'"{i}\n{random.Random(i).random()}"' for i in range(400)]
    path.write_bytes(gzip.compress(("text\n" + "\n".join(lines)).encode(), mtime=0)[:-900])
    *good, last = said(path)
    assert [f'"{text}"' for text in good] == lines[: len(good)]
    assert len(good) > 250
    assert last.startswith("damaged archive: it ends too early, at byte ")


def test_any_bytes_give_rows_or_reasons(tmp_path):
    draws, path = random.Random(5), tmp_path / "a.csv"
    good = b'text,n\n"a ""b"" c",1\n"two\nlines",2\nplain,3\n,4\n' * 3
    for _ in range(300):
        content = bytearray(good)
        for _ in range(draws.randrange(1, 5)):
            place = draws.randrange(8, len(content))
            content[place : place + draws.randrange(3)] = draws.choice(
                [b"", b'"', b",", b"\n", b"\0", b"\r", b"\xff"]
            )
        path.write_bytes(content)
        numbers = [number for number, _, _ in read_lines(str(path), "csv")]
        assert numbers == sorted(set(numbers))


def test_groups_and_other_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q,a,source\n1,2,x\n3,4,\n")
    rows = rows_of(path, fields=Fields(prompt="q", completion="a", by="source"))[1]
    assert [(row.prompt, row.group) for row in rows] == [("1", "x"), ("3", "")]
