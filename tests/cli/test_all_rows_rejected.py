"""Where rows were rejected, what is kept is said, and nothing that could be scored is promised where none is left."""

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


ROWS = ['{"prompt": "a", "completion": "b"}', "{", "{", '{"prompt": "c", "completion": "d"}']
SMALL = ("--proxy", "tiny", "--dim", "64", "--unit-rows", "2")


def test_too_many_rejected_rows_end_a_run_that_a_higher_limit_takes_up(gvendi, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(ROWS))
    out = tmp_path / "run"
    words = (tmp_path / "a.jsonl", *SMALL, "--out", out, "--max-rejected")
    for command in ("sketch", "score"):
        code, said, err = gvendi(command, *words, 1)
        assert (code, said) == (1, "")
        assert "error: 2 rows are rejected and --max-rejected allows 1" in err
        kept = (
            f"finished work units are kept in '{out}'; the same command with a higher --max-rejected goes on"
        )
        assert err.splitlines()[-1] == kept
        assert list((out / "parts").glob("*.parquet"))
    code, _, err = gvendi("sketch", *words, 2)
    assert code == 0, err
    assert gvendi("check", out)[0] == 0
    # Once more, and there is nothing to do.
    assert "4/4 rows, nothing is left to do\n" in gvendi("sketch", *words, 2)[2]


def test_too_many_rejected_rows_of_a_temporary_run_leave_it_where_it_is_said(gvendi, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "a.jsonl").write_text("\n".join(ROWS))
    code, said, err = gvendi("score", tmp_path / "a.jsonl", *SMALL, "--max-rejected", 1)
    assert (code, said) == (1, "")
    (path, again) = re.findall(
        r"kept in '(\S+)': 'gvendi score \1' scores them, the same command with (.*) goes on", err
    )[0]
    assert again == f"--out {path} and a higher --max-rejected"
    code, said, err = gvendi("score", tmp_path / "a.jsonl", *SMALL, *again.split()[:2], "--max-rejected", 2)
    assert (code, "n = 2 " in said) == (0, True), err
