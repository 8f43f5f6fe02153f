"""Messages: roles under every name, contents in parts, calls and tools in each form, nulls, and what refuses a row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.data.messages import ROLES
from gvendi_fast.data.rows import kind_of_reason, parse_row

LONG = '{"name": "f", "arguments": ' + "9" * 5000 + "}"
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def messages_of(messages, **more):
    row = parse_row({"messages": messages, **more}, Fields(), 0, "f", 1)
    return row.reason if isinstance(row, Rejected) else row.messages


@pytest.mark.parametrize("name", ROLES)
def test_roles_have_one_name_each(name):
    role = ROLES[name]
    said = {"name": "f", "arguments": {"x": 1}}
    for written in (name, name.upper(), f" {name.title()} "):
        found = messages_of([USER, {"from": written, "value": json.dumps(said)}, ANSWER])[1]
        if role == "call":
            assert found == {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": said}],
            }
        else:
            assert found == {"role": role, "content": json.dumps(said)}


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b"),
        ([{"type": "input_text", "text": "a"}, "b"], "ab"),
        ([{"type": "text", "text": "a", "image_url": None}], "a"),
        ([{"text": "a"}], "a"),
        ([], ""),
        (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            "message 1: a part of its content is no text (type 'image_url')",
        ),
        ([{"type": "text", "text": 3}], "message 1: a part of its content is no text (type 'text')"),
        ([{"type": "\x1b[2J"}], "message 1: a part of its content is no text (type '\\x1b[2J')"),
        ([3], "message 1: a part of its content is no text (int)"),
        ({"a": 1}, "message 1: 'content' is not a string (dict)"),
    ],
)
def test_contents_in_parts(content, read):
    found = messages_of([{"role": "user", "content": content}, ANSWER])
    assert found == ([{"role": "user", "content": read}, ANSWER] if not read.startswith("message") else read)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
AS_TEXT = {"type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"tool_calls": [AS_TEXT]}, {"content": "", "tool_calls": [AS_TEXT]}),
        ({"content": "t", "tool_calls": json.dumps([CALL])}, {"content": "t", "tool_calls": [CALL]}),
        ({"content": "t", "tool_calls": []}, {"content": "t"}),
        ({"content": "t", "tool_calls": ""}, {"content": "t"}),
        ({"content": None, "function_call": CALL["function"]}, {"content": "", "tool_calls": [CALL]}),
        (
            {
                "tool_calls": [
                    {
                        "function": {"name": "f", "arguments": {"x": 1, "y": None, "z": {"w": None}}},
                        "id": None,
                    }
                ]
            },
            {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "z": {}}}}]},
        ),
        ({"content": "t", "weight": 0, "name": None}, {"content": "t", "weight": 0}),
        (
            {"content": "t", "train": False, "trainable": True},
            {"content": "t", "train": False, "trainable": True},
        ),
        ({"content": "t", "reasoning_content": "r"}, {"content": "t", "reasoning_content": "r"}),
        ({"content": "t", "value": "other", "from": "x"}, {"content": "t", "value": "other", "from": "x"}),
    ],
)
def test_calls_and_what_else_a_message_has(message, read):
    assert messages_of([USER, {"role": "assistant", **message}]) == [USER, {"role": "assistant", **read}]


@pytest.mark.parametrize(
    ("messages", "reason", "kind"),
    [
        (
            [{"role": "wizard", "content": "a"}],
            "message 1: unknown role 'wizard'; wanted assistant, developer, system, tool, user",
            "a message of unknown role",
        ),
        (
            [USER, {"from": "\x1b" + "x" * 99, "value": "a"}],
            "message 2: unknown role '\\x1b" + "x" * 39 + "…'; wanted",
            "a message of unknown role",
        ),
        (
            [{"role": ["user"], "content": "a"}],
            "message 1: 'role' is not a string (list)",
            "a message: 'role' is not a string (list)",
        ),
        ([{"content": "a"}], "message 1 has no 'role'", "a message has no 'role'"),
        ([{"from": "gpt"}], "message 1 has no 'content'", "a message has no 'content'"),
        (
            [{"from": "function_call", "value": "not JSON"}],
            "message 1: a call that is no JSON object with a name",
            None,
        ),
        (
            [{"role": "assistant", "tool_calls": "oops"}],
            "message 1: 'tool_calls' is a string that is no JSON",
            None,
        ),
        (
            [{"role": "assistant", "tool_calls": f'[{{"function": {LONG}}}]'}],
            "broken JSON: an integer has too many digits",
            None,
        ),
        (
            [{"role": "function_call", "content": LONG}],
            "broken JSON: an integer has too many digits",
            None,
        ),
        ([{"role": "assistant", "tool_calls": 3}], "message 1: 'tool_calls' is not a list (int)", None),
        (
            [{"role": "assistant", "content": "\ud800"}],
            "invalid Unicode: lone surrogate in field 'messages'",
            None,
        ),
        ([{"role": "assistant", "content": "", "tool_calls": []}], "empty completion", "empty completion"),
        ([{"role": "assistant", "tool_calls": []}], "message 1 has no 'content'", None),
        ([USER], "nothing supervised", "nothing supervised"),
        ({"role": ["user"], "content": ["a", "b"]}, "field 'messages' is not a list (dict)", None),
        ({}, "field 'messages' is not a list (dict)", None),
        ("{}", "field 'messages' is not a list (dict)", None),
    ],
)
def test_what_refuses_a_row(messages, reason, kind):
    found = messages_of(messages)
    assert found.startswith(reason)
    assert kind is None or kind_of_reason(found) == kind


BARE = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
}
WRAPPED = {"type": "function", "function": BARE}


@pytest.mark.parametrize(
    ("fields", "tools"),
    [
        ({"tools": [WRAPPED]}, [WRAPPED]),
        ({"tools": [BARE]}, [WRAPPED]),
        ({"functions": [BARE]}, [WRAPPED]),
        ({"tools": json.dumps([WRAPPED])}, [WRAPPED]),
        ({"tools": WRAPPED}, [WRAPPED]),
        ({"tools": None, "functions": [BARE]}, [WRAPPED]),
        ({"tools": []}, None),
        ({"tools": ""}, None),
        ({"tools": "[]"}, None),
        ({}, None),
        ({"tools": "hammer"}, "field 'tools' is a string that is no JSON"),
        ({"tools": ["hammer"]}, "field 'tools' is not a list of objects (list)"),
        ({"tools": 3}, "field 'tools' is not a list of objects (int)"),
    ],
)
def test_tools(fields, tools):
    row = parse_row({"messages": [USER, ANSWER], **fields}, Fields(), 0, "f", 1)
    assert (row.reason if isinstance(row, Rejected) else row.tools) == tools


def test_tools_of_a_pair_are_not_looked_at():
    row = parse_row({"prompt": "Q", "completion": "A", "tools": 3}, Fields(), 0, "f", 1)
    assert (row.prompt, row.tools) == ("Q", None)


def test_what_arrow_fills_with_nulls_is_what_json_lines_say(tmp_path):
    """Structs have all fields of all rows: two calls and two tools with other arguments fill one another."""
    names = {"f": "x", "g": "y"}
    rows = [
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": f, "arguments": {x: 1}}}],
                },
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": f, "parameters": {"properties": {x: {"type": "number"}}}},
                }
            ],
        }
        for f, x in names.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert "null" in json.dumps(pq.read_table(tmp_path / "a.parquet").to_pylist())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name in ("a.parquet", "a.jsonl"):
        manifest = index_corpus(tmp_path / name)
        with UnitReader(manifest) as reader:
            found.append([(row.messages, row.tools) for row in reader.read(manifest.units[0])])
    assert found[0] == found[1]
    assert found[0][0][0][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": 1}}}]
    assert found[0][1][1] == rows[1]["tools"]
