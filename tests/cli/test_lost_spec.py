"""A run directory without its spec.json is no corpus: every command that reads or writes it says what is lost."""

import pytest

from gvendi_fast.data.listing import list_files


@pytest.fixture
def lost(gvendi, tmp_path):
    data, run = tmp_path / "a.jsonl", tmp_path / "run"
    data.write_text('{"text": "one row"}\n{"text": "and another"}\n')
    assert gvendi("sketch", data, "--out", run, "--proxy", "tiny", "--dim", "64")[0] == 0
    (run / "spec.json").unlink()
    return run


@pytest.mark.parametrize(
    "command",
    [
        ("score", "RUN"),
        ("sketch", "RUN", "--out", "elsewhere"),
        ("sketch", "a.jsonl", "--out", "RUN"),
        ("score", "a.jsonl", "--out", "RUN"),
        ("cluster", "RUN", "--out", "c.parquet"),
        ("report", "RUN"),
        ("select", "RUN", "--size", "1", "--out", "s.jsonl"),
        ("compare", "RUN", "other"),
    ],
    ids=" ".join,
)
def test_it_is_named(gvendi, monkeypatch, lost, command):
    monkeypatch.chdir(lost.parent)
    code, out, err = gvendi(
        *(str(lost) if word == "RUN" else word for word in command),
        *(("--proxy", "tiny") if command[0] in ("score", "sketch") else ()),
    )
    assert (code != 0, out) == (True, "")
    assert f"'{lost}' is a run directory that has lost its spec.json" in err
    assert "restore spec.json from a copy, or sketch the corpus again into another --out" in err
    assert not (lost / "spec.json").exists()


@pytest.mark.parametrize("pattern", ["", "/*", "/**"])
def test_inside_a_corpus_it_is_passed_over(lost, pattern):
    found = list_files(str(lost.parent) + pattern)
    assert [path.rpartition("/")[2] for path in found.files] == ["a.jsonl"]
    assert (
        "is a run directory that has lost its spec.json, whose files are not read as data" in found.notes[0]
    )
