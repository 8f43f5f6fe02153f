"""Reasons to reject a row are counted by kind: what is one row's own does not make a kind."""

import pytest

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
