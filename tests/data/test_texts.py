"""Texts of a run's rows: the three forms of a row, and a corpus that is not what it was."""

import json

import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import Fields, index_corpus
from gvendi_fast.data.rows import field_of, parse_row
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.texts import row_texts, snippet


def run_of(folder, rows, fields=None):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = index_corpus([str(path)], fields or Fields()).to_dict()
    return RunDirectory.open(folder / "run", {"format": 1}, manifest)


def test_a_row_has_one_text_whatever_its_form(tmp_path):
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    rows = [
        {"question": "1 + 1?", "completion": "2"},
        {"messages": turns},
        {"text": "  As it\nis. "},
        {"question": "never asked for", "completion": "x"},
    ]
    run = run_of(tmp_path, rows, Fields(prompt="question"))
    assert row_texts(run, [2, 0, 1]) == {0: "1 + 1?\n2", 1: "Hi.\nHello.", 2: "  As it\nis. "}


def test_a_row_that_has_no_text_or_a_corpus_that_changed_is_refused(tmp_path):
    run = run_of(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "alone"}])
    with pytest.raises(GvendiError, match=r"rows\.jsonl:2: missing field 'completion'"):
        row_texts(run, [1])
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(GvendiError, match="has changed"):
        row_texts(run, [0])


def test_snippets_are_one_line_of_a_given_width():
    assert snippet(" a\n b\t c ", 10) == "a b c"
    assert snippet("abcdefgh", 8) == "abcdefgh"
    assert snippet("abcdef ghi", 8) == "abcdef…"
    assert len(snippet("x" * 100, 60)) == 60


@pytest.mark.parametrize(
    ("record", "texts"),
    [
        ({"prompt": "p", "completion": "c"}, [("prompt", "p"), ("completion", "c")]),
        ({"text": "t"}, [("text", "t")]),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_a_row_of_each_form_says_its_texts_in_order(record, texts):
    assert parse_row(record, Fields(), 0, "f", 1).texts() == texts


def test_a_dotted_path_goes_down_unless_a_field_has_exactly_that_name():
    record = {"meta": {"score": 2, "deep": {"x": None}}, "meta.kind": "own"}
    found = [
        field_of(record, name) for name in ("meta.score", "meta.kind", "meta.deep.x", "meta.score.x", "no")
    ]
    assert found == [2, "own", None, None, None]
