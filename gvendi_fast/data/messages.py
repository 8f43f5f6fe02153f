"""The messages of a row as every chat template takes them, whoever wrote them: roles, texts, calls and tools."""

from __future__ import annotations

from typing import Any

from gvendi_fast.base.printable import printable
from gvendi_fast.data.records import (
    Reason,
    Unread,
    decode_value,
    kind_of_value,
    lone_surrogate,
    problem_in,
    text_of,
    without_nulls,
)

# {what a role is called, in small letters: the role}.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "llm"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"
    ),
    # Its content is the call.
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
CANONICAL = frozenset({"system", "user", "assistant", "tool", "developer"})
# What ShareGPT calls them.
_OTHERS = {"role": "from", "content": "value"}
# Kinds of parts of a content that are text.
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_SHOWN = 40


def read_messages(value: Any, field: str) -> list[dict[str, Any]] | Reason:
    """The messages that a field holds: a list of objects, also as JSON in a string, or of lists of equal length.

    Each has a canonical role and a string as its content; what else it has stays, without nulls.
    """
    if isinstance(value, str | bytes):
        text = text_of(value, field)
        value = text if isinstance(text, Reason) else decode_value(text, field)
        if isinstance(value, Reason):
            return value
    if isinstance(value, dict):
        value = _listed(value)
    if not isinstance(value, list):
        if isinstance(value, Unread):
            return value.reason
        return Reason(f"field '{field}' is not a list ({kind_of_value(value)})")
    messages = []
    for number, message in enumerate(value, 1):
        # Nearly every message: nothing is to be changed.
        if type(message) is dict and len(message) == 2:
            role, content = message.get("role"), message.get("content")
            is_plain = type(role) is str and role in CANONICAL and type(content) is str
            if is_plain and (content.isascii() or not lone_surrogate(content)):
                messages.append(message)
                continue
        read = _message(message, number, field)
        if isinstance(read, Reason):
            return read
        messages.append(read)
    return messages


def _listed(columns: dict[str, Any]) -> Any:
    """The list of objects that the library datasets writes as an object of lists; the value itself where it is none."""
    sizes = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(sizes) != 1 or -1 in sizes:
        return columns
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _message(message: Any, number: int, field: str) -> dict[str, Any] | Reason:
    if isinstance(message, Unread):
        return message.reason
    if not isinstance(message, dict):
        return Reason(f"message {number} is not an object ({kind_of_value(message)})")
    problem = problem_in(message, field)
    if problem is not None:
        return problem
    message = without_nulls(message)
    names = {name: name if name in message else other for name, other in _OTHERS.items()}
    said = _text(message, "role", names["role"], number)
    if isinstance(said, Reason):
        return said
    role = ROLES.get(said.strip().lower())
    if role is None:
        shown = printable(said if len(said) <= _SHOWN else said[:_SHOWN] + "…")
        return Reason(f"message {number}: unknown role '{shown}'; wanted {', '.join(sorted(CANONICAL))}")
    calls = _calls(message, number)
    if isinstance(calls, Reason):
        return calls
    is_silent = names["content"] not in message and calls
    content = "" if is_silent else _text(message, "content", names["content"], number)
    if isinstance(content, Reason):
        return content
    taken = (*names.values(), "tool_calls", "function_call")
    rest = {key: item for key, item in message.items() if key not in taken}
    if role == "call":
        call = decode_value(content, "content")
        problem = problem_in(call, "content")
        if problem is not None:
            return problem
        called = _as_calls(call)
        if not called:
            return Reason(f"message {number}: a call that is no JSON object with a name")
        role, content, calls = "assistant", "", [*calls, *called]
    return {"role": role, "content": content, **rest, **({"tool_calls": calls} if calls else {})}


def _text(message: dict[str, Any], name: str, key: str, number: int) -> str | Reason:
    """The text of a role or content, which is called `key` here; of a content also as a list of parts."""
    if key not in message:
        return Reason(f"message {number} has no '{name}'")
    value = message[key]
    if isinstance(value, list) and name == "content":
        texts = [_part(part, number) for part in value]
        problem = next((text for text in texts if isinstance(text, Reason)), None)
        return "".join(texts) if problem is None else problem
    if isinstance(value, bytes):
        return text_of(value, key)
    if not isinstance(value, str):
        return Reason(f"message {number}: '{key}' is not a string ({kind_of_value(value)})")
    return value


def _part(part: Any, number: int) -> str | Reason:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return Reason(f"message {number}: a part of its content is no text ({kind_of_value(part)})")
    kind = part.get("type", "text")
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    shown = printable(str(kind)[:_SHOWN])
    return Reason(f"message {number}: a part of its content is no text (type '{shown}')")


def _calls(message: dict[str, Any], number: int) -> list[Any] | Reason:
    """The calls of a message, also as one string of JSON or the single `function_call` of older files."""
    calls = message.get("tool_calls", [])
    if isinstance(calls, str):
        calls = decode_value(calls, "tool_calls") if calls.strip() else []
        if isinstance(calls, Reason):
            return Reason(f"message {number}: 'tool_calls' is a string that is no JSON")
        calls = [calls] if isinstance(calls, dict) else calls
        problem = problem_in(calls, "tool_calls")
        if problem is not None:
            return problem
    if not isinstance(calls, list):
        return Reason(f"message {number}: 'tool_calls' is not a list ({kind_of_value(calls)})")
    if "function_call" in message:
        called = _as_calls(message["function_call"])
        if not called:
            return Reason(f"message {number}: 'function_call' is no object with a name")
        calls = [*calls, *called]
    return calls


def _as_calls(value: Any) -> list[dict[str, Any]]:
    """Calls such as {"name": "f", "arguments": {}}, one or a list, in the form of `tool_calls`; [] for others."""
    values = value if isinstance(value, list) else [value]
    calls = []
    for call in values:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return calls


def read_tools(record: dict[str, Any]) -> list[dict[str, Any]] | Reason | None:
    """The tools of a row's fields `tools` or `functions`, a list or JSON in a string; None where it has none."""
    name = "tools" if record.get("tools") is not None else "functions"
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, str | bytes):
        text = text_of(value, name)
        if isinstance(text, Reason):
            return text
        value = decode_value(text, name) if text.strip() else []
        if isinstance(value, Reason):
            return value
    problem = problem_in(value, name)
    if problem is not None:
        return problem
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        return Reason(f"field '{name}' is not a list of objects ({kind_of_value(value)})")
    tools = [without_nulls(tool) for tool in value]
    # A bare function is what `functions` lists, and what many write into `tools`.
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in tools
    ] or None


def supervised_problem(messages: list[dict[str, Any]]) -> Reason | None:
    """Why there is nothing to learn from these messages, None where there is."""
    empty = Reason("nothing supervised")
    for message in messages:
        if message["role"] == "assistant":
            if message["content"].strip() or "tool_calls" in message:
                return None
            empty = Reason("empty completion")
    return empty
