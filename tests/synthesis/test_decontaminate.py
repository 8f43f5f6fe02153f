"""n-grams shared with test files, and duplicates."""

import gzip
import json

import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.filters.decontaminate import (
    Decontaminator,
    Match,
    Seen,
)
from gvendi_fast.synthesis.tasks.words import normal_form, words

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tests(tmp_path):
    rows = [
        {"prompt": "What is 2 + 2?", "completion": "4"},
        {"prompt": QUESTION, "completion": "one two three four five six seven eight nine ten eleven"},
        {"prompt": "broken"},
        {
            "messages": [
                {"role": "user", "content": "How far is it?"},
                {"role": "assistant", "content": "entailment"},
            ]
        },
        {"text": "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda"},
    ]
    return write(tmp_path / "test.jsonl", rows)


def test_tests_of_other_shapes_are_read_as_such(tmp_path):
    rows = [{"question": QUESTION, "answer": "72"}, {"question": "What is 2 + 2?", "answer": "4"}]
    guard = Decontaminator(write(tmp_path / "test.jsonl", rows))
    assert (guard.rows, guard.rejected) == (2, [])
    assert guard.match(QUESTION).line == 1


def test_words_are_letters_and_digits_of_the_normal_form():
    assert words("The “Ｆｕｌｌ” width, naïve_x: $x^2+3$\n") == [
        "the",
        "full",
        "width",
        "naïve",
        "x",
        "x",
        "2",
        "3",
    ]
    assert words("Straße STRASSE") == ["strasse", "strasse"]
    assert words("東京に 行く") == ["東", "京", "に", "行", "く"]
    assert words("!?… \x00") == []


def test_a_shared_run_of_ten_words_names_file_and_line(tests):
    guard = Decontaminator(tests)
    text = "Once upon a time NATALIA sold clips — to 48 of her friends in ‘April’. The end."
    assert guard.match(text) == Match(tests.name, 2, "natalia sold clips to 48 of her friends in april")
    assert str(guard.match(text)).endswith("test.jsonl:2")


def test_nine_shared_words_are_not_enough(tests):
    guard = Decontaminator(tests)
    assert guard.match("Natalia sold clips to 48 of her friends in May, and so on and on.") is None
    assert (
        Decontaminator(tests, n=9).match("Natalia sold clips to 48 of her friends in May and so on.").line
        == 2
    )


def test_the_order_of_words_matters(tests):
    assert Decontaminator(tests).match(" ".join(reversed(words(QUESTION)))) is None


def test_a_short_question_is_compared_whole(tests):
    guard = Decontaminator(tests)
    assert guard.match("what is 2+2").line == 1
    assert guard.match("How far is it").line == 4
    assert guard.match("What is 2 + 3?") is None
    assert guard.match("And so I asked them all at once: what is 2 + 2?") is None


def test_short_completions_are_no_questions(tests):
    guard = Decontaminator(tests)
    assert guard.match("4") is None
    assert guard.match("entailment") is None
    assert guard.check("Something new that nobody has ever asked", "What is 2 + 2?") is None


def test_completions_count_by_their_n_grams_unless_left_out(tests):
    answer = "zero one two three four five six seven eight nine ten"
    assert Decontaminator(tests).check("a new question", answer).line == 2
    assert Decontaminator(tests, completions=False).check("a new question", answer) is None


def test_rows_are_counted_and_unreadable_ones_named(tests):
    guard = Decontaminator(tests)
    assert guard.rows == 4
    assert [(bad.line, bad.reason) for bad in guard.rejected] == [(3, "missing field 'completion'")]
    grams = sum(max(len(words(text)) - 9, 0) for text in (QUESTION, "w " * 11, "w " * 11))
    assert guard.size == grams


def test_all_forms_and_files_are_read_and_the_first_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa"
    first = write(tmp_path / "a.jsonl", [{"text": "short"}, {"text": text}])
    pq.write_table(pa.table({"text": ["x", text, "y z"]}), tmp_path / "b.parquet")
    assert Decontaminator(tmp_path).match(text).file == first.name
    assert Decontaminator(tmp_path / "b.parquet").match(text).line == 2
    assert Decontaminator(tmp_path).match("Y, z!").line == 3


def test_hostile_texts_are_only_texts(tests):
    guard = Decontaminator(tests)
    for text in [
        "",
        "\x00",
        "\ud800 " * 20,
        "{{ 7*7 }}",
        "9" * 1_000_000,
        "a " * 200_000,
        "\u0301" * 1000,
        "ﷺ" * 1000,
    ]:
        assert guard.match(text) is None
        assert Seen([text]).add(text) is False


def test_bad_settings_are_refused_by_name(tests, tmp_path):
    with pytest.raises(GvendiError, match="n is 0"):
        Decontaminator(tests, n=0)
    with pytest.raises(GvendiError, match="does not exist"):
        Decontaminator(tmp_path / "absent.jsonl")
    with pytest.raises(GvendiError, match="no readable row"):
        Decontaminator(write(tmp_path / "empty.jsonl", []))


def test_a_test_file_that_is_cut_is_refused(tmp_path):
    rows = "".join(json.dumps({"text": f"question {i} of the test"}) + "\n" for i in range(200)).encode()
    path = tmp_path / "test.jsonl.gz"
    path.write_bytes(gzip.compress(rows)[:-50])
    with pytest.raises(
        GvendiError, match=f"^tests: '{path}' is a damaged archive: it ends too early, at byte "
    ):
        Decontaminator(path)
    path.write_bytes(gzip.compress(rows))
    assert Decontaminator(path).rows == 200


def test_matches_are_those_of_a_set_of_word_tuples(shared):
    """The hashed n-grams against the plain definition, on real problems."""
    path = shared / "gsm8k" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    guard = Decontaminator(path, n=4, completions=False)
    held = {
        tuple(found[i : i + 4])
        for row in rows
        for found in [words(row["prompt"])]
        for i in range(len(found) - 3)
    }
    assert guard.size == len(held)
    asked = [
        json.loads(line)["prompt"]
        for line in (shared / "gsm8k" / "train.jsonl").read_text().splitlines()[:500]
    ]
    for text in asked:
        found = words(text)
        first = next(
            (found[i : i + 4] for i in range(len(found) - 3) if tuple(found[i : i + 4]) in held), None
        )
        match = guard.match(text)
        assert (match and match.words) == (first and " ".join(first))
        if match:
            assert match.words in " ".join(words(rows[match.line - 1]["prompt"]))


def test_duplicates_are_found_but_for_case_space_and_unicode_form():
    seen = Seen(["What is 3 - 5?"])
    assert "what  is 3 - 5?\n" in seen
    assert "What is ３ - 5?" in seen
    assert "What is 3 + 5?" not in seen
    assert [seen.add("new"), seen.add("NEW"), len(seen)] == [True, False, 2]
    assert normal_form(" A\n\tb ") == "a b"
