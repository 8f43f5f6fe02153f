"""Where every row was rejected, nothing that could be scored is promised."""

import re
from pathlib import Path


def test_the_list_of_the_rows_is_named_and_there(gvendi, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "a.jsonl").write_text('{"nothing": 1}\n' * 3)
    code, out, err = gvendi("score", tmp_path / "a.jsonl", "--proxy", "tiny", "--dim", "64")
    assert (code, out) == (1, "")
    assert "could be scored, 3 were rejected" in err
    assert "scores them" not in err
    (path,) = re.findall(r"'([^']*rejected\.jsonl)' lists them", err)
    assert len(Path(path).read_text().splitlines()) == 3
