"""A corpus whose rows are refused: the error names the user's file, the fields that were seen and what reads them."""

import json

SMALL = ("--proxy", "tiny", "--dim", "64")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_error_says_which_fields_there_are_and_what_reads_them(gvendi, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instrucion": f"Add {i}.", "out": str(i)} for i in range(3)])
    code, out, err = gvendi("score", path, *SMALL)
    named = "--prompt-field instrucion --completion-field out"
    advice = f"rows have the fields 'instrucion', 'out'; {named} would read them"
    assert (code, out) == (1, "")
    assert f"most of the first rows cannot be read: {advice}" in err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert error.startswith(
        f"error: no row of '{path}' could be scored, 3 were rejected: missing fields: none of "
    )
    assert error.endswith(f": 3; {advice}")
    # What it says works.
    code, out, err = gvendi(
        "score", path, *SMALL, "--prompt-field", "instrucion", "--completion-field", "out"
    )
    assert (code, "n = 3 " in out) == (0, True), err


def test_a_sketch_of_refused_rows_and_a_limit_on_them_say_so_too(gvendi, tmp_path):
    rows = [{"question": f"{i}?", "answer": i} for i in range(3)] + [{"text": "two words"}]
    path = write(tmp_path / "a.jsonl", rows)
    code, out, err = gvendi("sketch", path, *SMALL, "--out", tmp_path / "run")
    assert code == 0, err
    assert (
        "3 rows rejected (missing fields: none of 'prompt' with 'completion', 'messages', 'text': 3; each is in '"
        in out
    )
    assert "rows have the fields 'question', 'answer'; --text-field question would read them as texts" in err
    code, out, err = gvendi("score", path, *SMALL, "--max-rejected", "1")
    assert code == 1
    assert (
        "error: 3 rows are rejected and --max-rejected allows 1; mend the rows, or allow more. By kind: missing"
        in err
    )
    assert "  rows have the fields 'question', 'answer';" in err


def test_rejections_are_grouped_with_the_range_of_their_sizes(gvendi, tmp_path):
    rows = [{"prompt": "a", "completion": "word " * 50 * (i + 1)} for i in range(3)]
    path = write(
        tmp_path / "a.jsonl",
        [*rows, {"text": "two words"}, {"text": "and three more"}, {"text": ""}, {"text": 1}],
    )
    words = ("score", path, *SMALL, "--max-tokens", "40")
    code, out, err = gvendi(*words)
    assert code == 0, err
    line = " ".join(out[out.index("rejected rows") :].split())
    assert line.startswith("rejected rows 5 (too long (--max-tokens is 40): 3, from ")
    assert "tokens; empty text: 1; field 'text' is not a string (int): 1)" in line
    result = json.loads(gvendi(*words, "--json")[1])
    assert result["rejected_by_reason"]["too long (--max-tokens is 40)"] == 3
    (size,) = result["rejected_sizes"].values()
    assert 40 < size["from"] < size["to"]
    assert size["unit"] == "tokens"


def test_a_recognised_shape_is_said_and_another_can_be_asked_for(gvendi, tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": "A", "response": "B"} for i in range(2)]
    )
    said = (
        "rows are read as questions and answers (question-answer): question -> prompt, answer -> completion; --format "
        "says otherwise"
    )
    code, _, err = gvendi("score", path, *SMALL)
    assert (code, said in err) == (0, True), err
    code, _, err = gvendi("score", path, *SMALL, "--format", "question-response")
    assert code == 0
    assert (
        "rows are read as questions and responses (question-response): question -> prompt, response -> completion\n"
        in err
    )
    code, _, err = gvendi("score", path, *SMALL, "--format", "nosuch")
    assert code != 0
    assert "error: Invalid value for '--format': 'nosuch' is not one of" in err
    assert gvendi("inspect", path, "--proxy", "tiny", "--format", "Question-Response")[0] == 0


def test_a_run_goes_on_as_its_rows_were_read(gvendi, tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": "A", "response": "B"} for i in range(2)]
    )
    words = ("sketch", path, *SMALL, "--out", tmp_path / "run")
    assert gvendi(*words)[0] == 0
    assert json.loads((tmp_path / "run" / "units.json").read_text())["fields"]["format"] == "question-answer"
    code, _, err = gvendi(*words)
    assert (code, "nothing is left to do" in err) == (0, True)
    code, _, err = gvendi(*words, "--format", "question-response")
    assert code == 1
    assert "question-answer" in err
    assert "question-response" in err
