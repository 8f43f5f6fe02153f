"""Of a file that ends too early the rows before that are scored, and every summary says that some are missing."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from gvendi_fast.cli.app import app

ROWS = b"".join(b'{"prompt": "%d?", "completion": "%d is it"}\n' % (n, n * n) for n in range(40))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(ROWS, mtime=0)[:-30])
    (folder / "b.json").write_text('[{"prompt": "1?", "completion": "2"}, {"prompt"')
    (folder / "c.parquet").write_bytes(b"PAR1")
    return folder


def run(*given):
    done = CliRunner().invoke(app, [*map(str, given), "--proxy", "tiny", "--dim", "64"])
    assert done.exit_code == 0, done.output
    return done


def test_summaries_say_that_rows_are_missing(tmp_path, data):
    out = tmp_path / "run"
    said = run("score", data, "--out", out, "--skip-damaged").stdout
    head = said.splitlines()[1:4]
    assert [line.split("'")[0] for line in head] == ["  not whole: ", "  not whole: ", "  not read: "]
    assert "a.jsonl.gz' is a damaged archive: it ends too early, at byte " in head[0]
    assert (
        "b.json' is a damaged file: its JSON array has no end, the file ends at byte 47; how many" in head[1]
    )
    kept = json.loads((out / "score.json").read_text())
    assert {path.rsplit("/")[-1] for path in kept["damaged"]} == {"a.jsonl.gz", "b.json"}
    assert kept["rejected_by_reason"] == {"damaged archive": 1, "damaged file": 1}
    # Every entry is counted once.
    manifest = json.loads((out / "units.json").read_text())
    assert manifest["rows"] == kept["n"] + kept["rejected"]
    # The same again goes on, and says it again.
    again = run("sketch", data, "--out", out, "--skip-unreadable")
    assert again.stderr.count(" is not whole: ") == 2
    assert all(f"{name}' is not whole: damaged" in again.stderr for name in ("a.jsonl.gz", "b.json"))
    assert (
        json.loads(CliRunner().invoke(app, ["score", str(out), "--json"]).stdout)["damaged"]
        == kept["damaged"]
    )


def test_whole_files_are_not_said_to_be_damaged(tmp_path, data):
    (data / "a.jsonl.gz").write_bytes(gzip.compress(ROWS))
    done = run("score", data / "a.jsonl.gz", "--out", tmp_path / "run")
    assert "whole" not in done.output
    assert json.loads((tmp_path / "run" / "score.json").read_text())["damaged"] == {}
    assert "damaged" not in json.loads((tmp_path / "run" / "units.json").read_text())
