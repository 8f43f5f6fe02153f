"""What --skip-unreadable passed over is said at the end, in --json, and in the run directory."""

import json

import pytest
from typer.testing import CliRunner

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.app import app

ROWS = "".join(json.dumps({"prompt": f"{n}?", "completion": f"{n} is it"}) + "\n" for n in range(4))


@pytest.mark.parametrize("command", ["score", "sketch"])
def test_what_was_passed_over_is_said(tmp_path, command):
    data, out = tmp_path / "data", tmp_path / "data" / "run"
    data.mkdir()
    (data / "a.jsonl").write_text(ROWS)
    (data / "b.parquet").write_bytes(b"PAR1")
    given = [command, str(data), "--proxy", "tiny", "--dim", "64", "--out", str(out)]
    failed = CliRunner().invoke(app, given)
    assert isinstance(failed.exception, GvendiError)
    assert "b.parquet' is not a readable Parquet file" in str(failed.exception)
    # Twice: the second run finds the first one's output inside its input.
    for _ in range(2):
        more = ["--json"] if command == "score" else []
        done = CliRunner().invoke(app, [*given, "--skip-unreadable", *more])
        assert done.exit_code == 0, done.output
        (said,) = (line for line in done.stderr.splitlines() if "b.parquet" in line)
        assert said.startswith(f"passed over '{data / 'b.parquet'}': is not a readable Parquet file")
        assert "--skip-unreadable" not in said
        if more:
            assert list(json.loads(done.stdout)["unreadable"]) == [str(data / "b.parquet")]
        recorded = json.loads((out / "units.json").read_text())
        assert [item["path"] for item in recorded["unreadable"]] == [str(data / "b.parquet")]
        assert [source["path"] for source in recorded["files"]] == [str(data / "a.jsonl")]
