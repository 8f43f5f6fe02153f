"""`-` reads rows from standard input, which is kept with the run, so that the run resumes and gives its rows back."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.app import app
from gvendi_fast.data.index import index_corpus
from gvendi_fast.data.standard_input import kind_of_input

ROWS = b"".join(b'{"prompt": "%d?", "completion": "%d is it"}\n' % (n, n * n) for n in range(12))
TINY = ["--proxy", "tiny", "--dim", "64", "--unit-rows", "5"]


def run(*given, rows=ROWS):
    done = CliRunner().invoke(app, [*map(str, given)], input=rows)
    if isinstance(done.exception, GvendiError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def test_rows_from_standard_input_are_scored_as_those_of_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS)
    wanted = json.loads(run("score", path, *TINY, "--json").stdout)
    for rows in (ROWS, gzip.compress(ROWS), b"[" + ROWS.strip().replace(b"\n", b",") + b"]"):
        found = json.loads(run("score", "-", *TINY, "--json", rows=rows).stdout)
        assert (found["gvendi"], found["n"], found["rejected"]) == (wanted["gvendi"], 12, 0)


def test_a_run_from_standard_input_resumes_and_gives_its_rows_back(tmp_path, monkeypatch):
    out = tmp_path / "run"
    run("sketch", "-", "--out", out, *TINY)
    assert (out / "standard-input.jsonl").read_bytes() == ROWS
    recorded = json.loads((out / "units.json").read_text())
    assert [source["path"] for source in recorded["files"]] == ["-"]
    (out / "parts" / "part-000001.parquet").unlink()
    assert "12/12 rows" in run("sketch", "-", "--out", out, *TINY).stderr
    # The same rows in a file go on, too.
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS)
    assert "nothing is left to do" in run("sketch", path, "--out", out, *TINY).stderr
    chosen = tmp_path / "chosen.jsonl"
    run("select", out, "--size", "3", "--out", chosen)
    assert set(chosen.read_bytes().splitlines()) < set(ROWS.splitlines())
    with pytest.raises(GvendiError, match="was made from another corpus:\n  file '-' changed: digest"):
        run("sketch", "-", "--out", out, *TINY, rows=ROWS.replace(b"121 is", b"122 is"))
    (out / "standard-input.jsonl").unlink()
    with pytest.raises(GvendiError, match=r"'-' was not found .looked for '.*standard-input.jsonl'"):
        run("select", out, "--size", "3", "--out", tmp_path / "more.jsonl")


def test_more_rows_on_standard_input_extend_its_run(tmp_path):
    out, more = tmp_path / "run", ROWS + b'{"prompt": "and?", "completion": "so"}\n'
    run("sketch", "-", "--out", out, *TINY)
    said = run("sketch", "-", "--out", out, *TINY, rows=more).stderr
    assert "the corpus has grown from 12 to 13 rows: 10 of an earlier run kept, 3 to sketch" in said
    assert (out / "standard-input.jsonl").read_bytes() == more
    assert "nothing is wrong" in run("check", out, "--corpus", tmp_path).stdout


def first(rows: int) -> bytes:
    return b"".join(ROWS.splitlines(keepends=True)[:rows])


def test_standard_input_that_has_grown_is_kept_whole(tmp_path):
    out, kept, chosen = tmp_path / "run", tmp_path / "run" / "standard-input.jsonl", tmp_path / "chosen.jsonl"
    run("sketch", "-", "--out", out, *TINY, rows=first(6))
    assert "from 6 to 9 rows" in run("sketch", "-", "--out", out, *TINY, rows=first(9)).stderr
    assert kept.read_bytes() == first(9)
    assert "nothing is wrong" in run("check", out, "--corpus", ".").stdout
    # As a kill before it was kept leaves it, or a hand; the same rows mend it.
    kept.write_bytes(first(6))
    run("sketch", "-", "--out", out, *TINY, rows=first(9))
    assert kept.read_bytes() == first(9)
    # A file with more rows is kept as well, as the record says where standard input's rows are.
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS)
    run("sketch", path, "--out", out, *TINY)
    path.unlink()
    run("select", out, "--size", "12", "--out", chosen)
    assert set(chosen.read_bytes().splitlines()) == set(ROWS.splitlines())


def test_standard_input_does_not_grow_a_run_of_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(first(6))
    run("sketch", path, "--out", tmp_path / "run", *TINY)
    with pytest.raises(GvendiError, match="was made from another corpus"):
        run("sketch", "-", "--out", tmp_path / "run", *TINY)
    assert (
        "nothing is left to do" in run("sketch", "-", "--out", tmp_path / "run", *TINY, rows=first(6)).stderr
    )
    assert "nothing is wrong" in run("check", tmp_path / "run", "--corpus", ".").stdout


def test_what_cannot_be_read_is_named_as_standard_input(tmp_path, monkeypatch):
    with pytest.raises(GvendiError, match=r"^corpus: '-' \(standard input\) is a web page"):
        run("score", "-", *TINY, rows=b"<!doctype html>")
    with pytest.raises(GvendiError, match=r"hold no rows; the first one is '-'$"):
        run("score", "-", *TINY, rows=b"")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(GvendiError, match=r"'-' \(standard input\) is closed; pipe rows into the command"):
        index_corpus("-")


def test_rejected_rows_name_their_line_of_standard_input(tmp_path):
    run("sketch", "-", "--out", tmp_path / "run", *TINY, rows=ROWS + b"broken\n")
    (line,) = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert (json.loads(line)["file"], json.loads(line)["line"]) == ("-", 13)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("prompt,completion\na,b\n", "csv"),
        ("\ufeffid,prompt,completion\r\n1,a,b\r\n", "csv"),
        ('"prompt","completion"\n"a","b"\n', "csv"),
        ("id\tprompt, and more\n1\ta\n", "tsv"),
        ('ix", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n', "jsonl"),
        ('{"prompt": "a", "completion": "b"}\n', "jsonl"),
        ('[\n{"prompt": "a", "completion": "b"},\n', "jsonl"),
        ("a broken line, and no other", "jsonl"),
        ("", "jsonl"),
    ],
)
def test_csv_on_standard_input_is_told_by_its_header(tmp_path, text, kind):
    path = tmp_path / "kept"
    path.write_bytes(text.encode())
    assert kind_of_input(path) == kind


def test_csv_from_standard_input_is_kept_as_such(tmp_path):
    rows = b"prompt,completion\n" + b"".join(b"%d?,%d is it\n" % (n, n) for n in range(3))
    run("sketch", "-", "--out", tmp_path / "run", *TINY, rows=rows)
    assert (tmp_path / "run" / "standard-input.csv").read_bytes() == rows
    assert "nothing is wrong" in run("check", tmp_path / "run", "--corpus", ".").stdout
