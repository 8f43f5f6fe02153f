"""Reasons to reject a row are counted by kind: what is one row's own does not make a kind."""

import pytest

from gvendi_fast.data.remedies import remedies_of, remedy_of
from gvendi_fast.data.rows import kind_of_reason


@pytest.mark.parametrize(
    ("reasons", "kind"),
    [
        (["broken JSON: Expecting value at column 1", "broken JSON: nested too deeply"], "broken JSON"),
        (
            ["invalid UTF-8: byte 0xff at position 3", "invalid UTF-8: byte 0xfe at position 9"],
            "invalid UTF-8",
        ),
        (["duplicate id '1' (first at a:1)", "duplicate id 'a\nb: c' (first at a:2)"], "duplicate id"),
        (
            [f"too long: {size} bytes, --max-row-bytes is 8,388,608" for size in ("9,000,000", "8,388,609")],
            "too long (--max-row-bytes is 8,388,608)",
        ),
        (
            [f"too long: completion needs {n} tokens, --max-tokens is 100" for n in (101, 900)],
            "too long (--max-tokens is 100)",
        ),
        (["message 1 has no 'role'", "message 12 has no 'role'"], "a message has no 'role'"),
        (["field 'id' has 70,000 characters; wanted at most 65,536"], "field 'id' is too long"),
        (["field 'a: b' is not a string (int)"], "field 'a: b' is not a string (int)"),
        (["missing field 'completion'"], "missing field 'completion'"),
        (
            ["chat template refused the messages: no", "chat template refused the messages: x"],
            "chat template refused the messages",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_of_one_kind(reasons, kind):
    assert {kind_of_reason(reason) for reason in reasons} == {kind}


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("invalid UTF-8: byte 0xe9 at position 4", "iconv -f cp1252 -t utf-8"),
        ("message 1: a part of its content is no text (type 'image')", "take out what is no text"),
        (
            "message 1: unknown role 'narrator'; wanted assistant, system, tool, user",
            "name the roles system, user",
        ),
        ("message 3: 'content' is not a string (int)", "an object with a role and a content"),
        ("nothing supervised", "a turn of the assistant"),
        ("empty completion", "take these rows out"),
        ("missing fields 'prompt'; the row is of format alpaca", "'--format alpaca' reads these"),
        ("missing field 'completion'", "--prompt-field and others"),
        ("duplicate id '7' (first at a:1)", "--id-field"),
        ("field 'completion' is not a string (int)", "write it as text"),
        ("broken CSV: 3 cells under a header of 2", "their quotes and their number of cells"),
        ("broken JSON: Expecting value at column 1", "one JSON object a line"),
        ("too long: 9,000,000 bytes, --max-row-bytes is 8,388,608", "raise --max-row-bytes"),
        ("too long: text needs 9 tokens, --max-tokens is 8", "raise --max-tokens"),
        (
            "chat template refused the messages: roles must alternate",
            "whose chat template takes such messages",
        ),
        ("something else", "mend these rows"),
    ],
)
def test_each_kind_has_its_remedy(reason, remedy):
    assert remedy in remedy_of(kind_of_reason(reason))


def test_a_remedy_is_said_once():
    assert remedies_of(["empty completion", "empty text", "a thing"]).count("take these rows out") == 1
    # What a name of the data holds is no place for a value.
    assert remedies_of(["field '{x}' is not a string (int)"]).startswith("write it as text")
