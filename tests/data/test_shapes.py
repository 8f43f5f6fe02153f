"""Shapes of rows: each is recognised, read as its trainer reads it, recorded and settable; others are refused."""

import csv
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import ROOT
from row_shapes import CASES, answer, user

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.parquet import ParquetSource
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.shapes import FORMATS, SHAPES, recognise
from gvendi_fast.data.texts import row_texts


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, **fields):
    manifest = index_corpus(path, Fields(**fields))
    with UnitReader(manifest) as reader:
        return manifest, [row for unit in manifest.units for row in reader.read(unit)]


def content(row):
    """What a row holds: a reason, messages, (prompt, completion) or a text."""
    if isinstance(row, Rejected):
        return row.reason
    if row.messages is not None:
        return row.messages
    return row.text if row.text is not None else (row.prompt, row.completion)


SPELLED = ("prompt", "completion", "chosen", "rejected")


def _is_talk(value):
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def write_csv(path, row):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([row.keys(), row.values()])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("case", CASES)
def test_a_row_of_each_shape(tmp_path, case, suffix):
    shape, row, wanted = CASES[case]
    path = write(tmp_path / f"a{suffix}", [row] * 3)
    # KTO's rows are pairs unless it is asked for.
    for asked in ("auto", shape) if shape != "kto" else (shape,):
        manifest, rows = read(path, format=asked)
        assert [content(item) for item in rows] == [wanted] * 3
        assert manifest.fields.format == shape
        said = [note for note in manifest.notes if note.startswith("rows are read as")]
        assert len(said) == (shape != "auto")
        assert all(("--format says otherwise" in note) == (asked == "auto") for note in said)
        assert manifest.advice == ""


@pytest.mark.parametrize(
    # Behind a prompt that is a text, a completion may be JSON that is to be learnt.
    "case",
    [
        name
        for name, (_, row, _) in CASES.items()
        if any(_is_talk(row.get(field)) for field in SPELLED) and name != "TRL, text prompt"
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_lists_of_messages_spelled_out_as_json_are_read_as_lists(tmp_path, case, suffix):
    shape, row, wanted = CASES[case]
    spelled = {name: json.dumps(value) if _is_talk(value) else value for name, value in row.items()}
    if suffix == ".csv" and not all(isinstance(value, str) for value in spelled.values()):
        pytest.skip("CSV has texts alone")
    path = tmp_path / f"a{suffix}"
    write_csv(path, spelled) if suffix == ".csv" else write(path, [spelled])
    _, (found,) = read(path, format=shape)
    assert content(found) == wanted


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "As JSON:", "completion": '[{"role": "user"}]'}, ("As JSON:", '[{"role": "user"}]')),
        ({"prompt": '[{"role": "user", ', "completion": "b"}, ('[{"role": "user", ', "b")),
        ({"prompt": '[{"value": 3}]', "completion": "b"}, ('[{"value": 3}]', "b")),
        ({"prompt": "a", "chosen": '[{"role": 1}]', "rejected": "c"}, ("a", '[{"role": 1}]')),
    ],
)
def test_texts_that_look_like_messages_stay_texts(tmp_path, row, wanted):
    _, (found,) = read(write(tmp_path / "a.jsonl", [row]))
    assert content(found) == wanted


@pytest.mark.parametrize("name", ["prompt", "chosen"])
def test_a_list_of_messages_as_python_shows_it_is_refused_by_name(tmp_path, name):
    shown = str([user("a")])
    row = {"prompt": shown, "completion": "b"}
    if name == "chosen":
        row = {"prompt": "a", "chosen": shown, "rejected": shown}
    _, (found,) = read(write(tmp_path / "a.jsonl", [row]))
    assert (
        content(found) == f"field '{name}' is a list as Python shows it, not JSON; write it with json.dumps"
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_row_of_another_shape_is_refused_by_name(tmp_path, suffix):
    rows = [{"question": f"{i}?", "answer": "A"} for i in range(4)]
    rows += [{"instruction": "Do", "output": "A"}, {"question": "alone"}, {"nothing": "at all"}]
    _, found = read(write(tmp_path / f"a{suffix}", rows))
    assert [content(row) for row in found[:4]] == [(f"{i}?", "A") for i in range(4)]
    # Of Parquet only the columns of the shape are read.
    other = "; the row is of format alpaca" if suffix == ".jsonl" else ""
    assert [content(row) for row in found[4:]] == [
        f"missing fields 'question', 'answer'{other}",
        "missing field 'answer'",
        "missing fields 'question', 'answer'",
    ]


def test_the_three_forms_mix_as_ever_and_need_no_record(tmp_path):
    rows = [
        {"prompt": "Q", "completion": "A", "question": "no", "answer": "no"},
        {"messages": [user("Q"), answer("A")], "conversations": [user("no"), answer("no")]},
        {"text": "T", "instruction": "no", "output": "no"},
    ]
    manifest, found = read(write(tmp_path / "a.jsonl", rows))
    assert [content(row) for row in found] == [("Q", "A"), [user("Q"), answer("A")], "T"]
    assert manifest.fields == Fields()
    assert "format" not in manifest.to_dict()["fields"]
    assert index_corpus(tmp_path / "a.jsonl", Fields(format="fields")).to_dict() == manifest.to_dict()
    assert manifest.notes == ()


def test_names_of_fields_count_more_than_shapes(tmp_path):
    rows = [{"question": "Q", "answer": "A", "short": "B"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert content(read(path, prompt="question", completion="short")[1][0]) == ("Q", "B")
    _, (row,) = read(path, completion="answer")
    assert content(row) == "missing field 'prompt'"
    with pytest.raises(
        GvendiError, match="--format alpaca names the fields of a row, and so does --prompt-field q"
    ):
        index_corpus(path, Fields(format="alpaca", prompt="q"))
    with pytest.raises(GvendiError, match="format is 'nosuch'; wanted one of auto, fields, sharegpt"):
        index_corpus(path, Fields(format="nosuch"))


def test_the_most_frequent_shape_of_the_first_rows_counts():
    alpaca, asked = {"instruction": "Do", "output": "A"}, {"question": "Q", "answer": "A"}
    assert recognise([alpaca, asked, asked], Fields()).fields.format == "question-answer"
    # Of two that as many have, the first of the list.
    assert recognise([asked, alpaca], Fields()).fields.format == "alpaca"
    assert recognise([asked, {"text": "T"}], Fields()).fields.format == "auto"
    # Fields whose values are of another type do not make a shape.
    assert recognise([{"question": "Q", "answer": 3}], Fields()).fields.format == "auto"
    assert recognise([], Fields()).advice == ""


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "Q", "context": "C", "answer": "A"}, "'context'"),
        ({"question": "Q", "answer": "A", "reasoning": "R", "system": "S"}, "'system' and 'reasoning'"),
        ({"system": "S", "prompt": "Q", "completion": "A"}, "'system'"),
        ({"system": "S", "messages": [user("Q"), answer("A")]}, "'system'"),
        ({"system": "S", "prompt": "Q", "chosen": "A", "rejected": "B"}, "'system'"),
        # Read, empty, of a text, or of no meaning for it.
        ({"system": "S", "instruction": "Q", "input": "I", "output": "A"}, None),
        ({"instruction": "Q", "context": "C", "response": "A"}, None),
        ({"question": "Q", "context": "", "answer": "A", "system": None}, None),
        ({"context": "C", "text": "T"}, None),
        ({"content": "T", "system": "S"}, None),
        ({"prompt": "Q", "completion": "A", "source": "S", "url": "U"}, None),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_fields_that_are_meant_and_not_read_are_said(tmp_path, row, names, name):
    path, values = tmp_path / name, [v if isinstance(v, str | None) else json.dumps(v) for v in row.values()]
    if name == "a.csv":
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([list(row), *[values] * 8])
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([row] * 8), path)
    elif name == "a.json":
        path.write_text(json.dumps([row] * 8))
    else:
        write(path, [row] * 8)
    notes = [note for note in index_corpus(path).notes if "not read" in note]
    assert [note.startswith(f"rows have {names}, too, which ") for note in notes] == ([True] if names else [])


def test_a_field_that_few_rows_have_is_not_said():
    rows = [{"prompt": "Q", "completion": "A"}] * 39
    assert recognise([*rows, {**rows[0], "context": "C"}], Fields()).notes == ()
    assert recognise(rows, Fields(), ["context"]).notes != ()
    assert recognise([{**row, "context": "C"} for row in rows], Fields(by="context")).notes == ()


def test_what_is_read_otherwise_than_one_may_think_is_said():
    (note,) = recognise([{"instruction": "Do", "output": "A", "text": "Do A"}] * 3, Fields()).notes
    assert note.startswith("rows are read as texts, all of it supervised, from the field text;")
    assert note.endswith("--format alpaca reads those")
    (note,) = recognise(
        [{"prompt": "Q", "completion": "A", "label": i > 1} for i in range(3)], Fields()
    ).notes
    assert "--format kto leaves out the false" in note
    for rows in ([{"prompt": "Q", "completion": "A", "label": 1}], [{"text": "T", "question": "Q"}]):
        assert recognise(rows, Fields()).notes == ()


def test_fields_that_are_read_and_have_no_value_are_no_advice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + "a,\n,b\nc,d\n" * 3)
    manifest, rows = read(path)
    assert sum(isinstance(row, Rejected) for row in rows) == 6
    assert manifest.advice == (
        "rows have the fields 'prompt', 'completion'; a row is read where both prompt and completion have a value"
    )


@pytest.mark.parametrize(
    ("row", "fields", "seen", "remedy"),
    [
        (
            {"instrucion": "Do", "out": "A"},
            {},
            "'instrucion', 'out'",
            "--prompt-field instrucion --completion-field out",
        ),
        (
            {"Question": "Q", "Answer": "A"},
            {},
            "'Question', 'Answer'",
            "--prompt-field Question --completion-field Answer",
        ),
        (
            {"chat": [user("Q")], "n": 1},
            {},
            "'chat', 'n'",
            "--messages-field chat would read them as messages",
        ),
        ({"body": "T", "n": 1}, {}, "'body', 'n'", "--text-field body would read them as texts"),
        ({"a": "x", "b": "y"}, {}, "'a', 'b'", "name those to read with --prompt-field"),
        (
            {"question": "Q", "answer": "A"},
            {"prompt": "q"},
            "'question', 'answer'",
            "--format question-answer reads them, without --prompt-field",
        ),
        (
            {"question": "Q", "answer": "A"},
            {"format": "alpaca"},
            "'question', 'answer'",
            "--format question-answer reads them",
        ),
        ({"text": "T"}, {"format": "alpaca"}, "'text'", "--format fields reads them"),
        (
            user("Q"),
            {},
            "'role'",
            "each is one message: write a conversation a row, as {'messages': [...]}",
        ),
        (
            {"inputs": "Q", "targets": "A"},
            {},
            "'inputs'",
            "--prompt-field inputs --completion-field targets would",
        ),
        ({"src": "Q", "tgt": "A"}, {}, "'src'", "--prompt-field src --completion-field tgt would"),
        ({"a\x1b": "x", "n": 1}, {}, "'a\\x1b', 'n'", "--text-field 'a\\x1b' would"),
        ({}, {}, "rows have no fields", "name those to read"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_would_read_a_refused_corpus_is_said(tmp_path, row, fields, seen, remedy, suffix):
    if suffix == ".parquet" and not row:
        pytest.skip("a table without columns has no rows")
    manifest, rows = read(write(tmp_path / f"a{suffix}", [row] * 3), **fields)
    assert all(isinstance(item, Rejected) for item in rows)
    assert seen in manifest.advice
    if suffix == ".jsonl" or "--format" in remedy:
        assert remedy in manifest.advice
    assert manifest.notes[-1] == f"most of the first rows cannot be read: {manifest.advice}"


def test_the_limit_bounds_the_rows_that_are_asked(tmp_path):
    rows = [{"question": "Q", "answer": "A"}, *[{"text": "T"}] * 5]
    path = write(tmp_path / "a.jsonl", rows)
    assert index_corpus(path, limit=1).fields.format == "question-answer"
    assert index_corpus(path).fields.format == "auto"


def test_the_first_file_with_a_row_to_read_decides(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    write(tmp_path / "b.jsonl", [{"question": "Q", "answer": "A"}])
    write(tmp_path / "c.parquet", [{"question": "R", "answer": "A", "text": "no"}])
    manifest, rows = read(tmp_path)
    assert manifest.fields.format == "question-answer"
    assert [content(row) for row in rows[1:]] == [("Q", "A"), ("R", "A")]


def test_of_parquet_the_columns_of_the_shape_are_read_and_no_other(tmp_path):
    rows = [{"instruction": "Do", "output": "A", "text": "no", "tools": "no", "id": "x", "more": {"by": 1}}]
    path = write(tmp_path / "a.parquet", rows)
    for shape, columns in (
        ("alpaca", ["instruction", "output", "id", "more"]),
        ("fields", ["text", "tools", "id", "more"]),
    ):
        with ParquetSource(str(path), Fields(by="more.by", format=shape)) as source:
            assert source.columns == columns
    # So a column that is too long to be held is no matter where nobody reads it.
    write(path, [{**rows[0], "text": "t" * 5000}])
    with UnitReader(index_corpus(path, Fields(format="alpaca"), max_row_bytes=1000)) as reader:
        assert [content(row) for row in reader.read(reader.manifest.units[0])] == [("Do", "A")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_run_directory_reads_its_rows_back_alike(tmp_path, suffix):
    rows = [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "A"}]}
        for i in range(2)
    ]
    path = write(tmp_path / f"a{suffix}", rows)
    manifest = index_corpus(path)
    assert manifest.to_dict()["fields"]["format"] == "sharegpt"
    run = RunDirectory.open(tmp_path / "run", {"format": 1}, manifest.to_dict())
    assert row_texts(run, [0, 1]) == {0: "0?\nA", 1: "1?\nA"}
    # The same corpus with the format asked for is the same; read otherwise it is another.
    RunDirectory.open(
        tmp_path / "run", {"format": 1}, index_corpus(path, Fields(format="sharegpt")).to_dict()
    )
    with pytest.raises(GvendiError, match=r"another corpus(.|\n)*format"):
        RunDirectory.open(
            tmp_path / "run", {"format": 1}, index_corpus(path, Fields(format="alpaca")).to_dict()
        )


def test_binary_columns_are_read_back_as_the_texts_they_are(tmp_path):
    table = pa.table(
        {
            "question": pa.array(["é?".encode()]),
            "answer": ["A"],
            "id": pa.array([bytes(range(200, 216))], pa.binary(16)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    manifest, (row,) = read(tmp_path / "a.parquet")
    assert content(row) == ("é?", "A")
    assert row.id == "c8c9cacb-cccd-cecf-d0d1-d2d3d4d5d6d7"
    run = RunDirectory.open(tmp_path / "run", {"format": 1}, manifest.to_dict())
    assert row_texts(run, [0]) == {0: "é?\nA"}


def test_the_table_of_shapes_in_the_guide_is_whole():
    guide = (ROOT / "docs" / "guide.md").read_text()
    named = [line.split("|")[1].strip(" `") for line in guide.splitlines() if line.startswith("| `")]
    assert [name for name in named if name in FORMATS] == ["fields", *SHAPES]


def test_every_shape_has_a_case():
    assert {shape for shape, _, _ in CASES.values()} == {"auto", *SHAPES}
    assert replace(Fields(), format="auto") == Fields()


def test_rows_by_which_a_shape_is_recognised_are_not_held(tmp_path):
    import tracemalloc

    row = {
        "question": "Q",
        "answer": "A",
        "more": {"x": ["t" * 10_000] * 30},
        **{f"f{i}": i for i in range(3000)},
    }

    def peak(rows):
        path = write(tmp_path / f"{rows}.jsonl", [row] * rows)
        tracemalloc.start()
        manifest = index_corpus(path)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert manifest.fields.format == "question-answer"
        return size

    assert peak(12) < 1.3 * peak(2)
