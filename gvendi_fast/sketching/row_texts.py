"""The texts of a row, in every spelling that a template may give them, and which of them a rendered text lacks.

The notes of the encoder (proxy/left_out.py) say the same by turns, while it renders, and of conversations alone; this
looks at the row as it was given, with its pairs, the strings inside of tool calls and the names of its tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gvendi_fast.data.rows import Row
from gvendi_fast.sketching.proxy import messages

CONTENT, REASONING, CALLS, TOOLS = "content", "reasoning", "tool calls", "tools"
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Held:
    """One text of a row.

    kind: CONTENT, REASONING, CALLS or TOOLS.
    whose: the role or field that it is of.
    spellings: ways in which a template writes it, one of which is enough.
    is_answer: whether it is the assistant's, and may be supervised.
    """

    kind: str
    whose: str
    spellings: tuple[str, ...]
    is_answer: bool = False


def squeezed(text: str) -> str:
    """A text without its white space, in which a template's trimming and indenting cannot be seen."""
    return "".join(text.split())


def held_by(row: Row) -> Iterator[Held]:
    """Every text of a row, squeezed; numbers and empty texts are left out, as any text may hold them by chance."""
    if row.text is not None:
        yield Held(CONTENT, "text", (squeezed(row.text),), True)
    elif row.messages is None:
        yield from _content("prompt", row.prompt)
        yield from _content("completion", row.completion)
    for message in row.messages or ():
        role = message["role"]
        yield from _content(role, message.get("content"))
        for name in messages.REASONING:
            if isinstance(message.get(name), str):
                yield from _spelled(REASONING, name, message[name], role == "assistant")
        for call in _list(message.get("tool_calls")):
            for text in _strings(call.get("function", call) if isinstance(call, dict) else call):
                yield from _spelled(CALLS, role, text, role == "assistant")
    for tool in _list(row.tools):
        of = tool.get("function", tool) if isinstance(tool, dict) else {}
        if isinstance(of, dict) and isinstance(of.get("name"), str):
            yield from _spelled(TOOLS, "tools", of["name"], False)


def left_out(row: Row, text: str) -> list[Held]:
    """The texts of a row that its rendered text lacks."""
    if row.text is not None:
        return []
    rendered, place, missing = squeezed(text), 0, []
    for held in held_by(row):
        # Most stand in the text in the order of the messages, where the search ends at once.
        found = [rendered.find(spelling, place) for spelling in held.spellings]
        if (first := min((at for at in found if at >= 0), default=-1)) >= 0:
            place = first
        elif not any(spelling in rendered for spelling in held.spellings):
            missing.append(held)
    return missing


def _content(role: str, content: Any) -> Iterator[Held]:
    if not isinstance(content, str):
        return
    is_answer = role in ("assistant", "completion")
    # Templates of reasoning models take what is thought out of the content of earlier turns.
    if is_answer and (found := _THOUGHT.fullmatch(content)):
        yield from _spelled(REASONING, "<think>", found[1], True)
        content = found[2]
    yield from _spelled(CONTENT, role, content, is_answer)


def _spelled(kind: str, whose: str, text: str, is_answer: bool) -> Iterator[Held]:
    if text.strip():
        ways = [text]
        if kind in (CALLS, TOOLS):
            # An object may be written as JSON or as Python has it, and JSON that is a string already as one more.
            ways += [_json(text, is_ascii) for is_ascii in (False, True)]
            ways += [
                repr(text)[1:-1],
                *(_json(way, is_ascii) for way in ways[1:] for is_ascii in (False, True)),
            ]
        yield Held(kind, whose, tuple(dict.fromkeys(map(squeezed, ways))), is_answer)


def _json(text: str, is_ascii: bool) -> str:
    return json.dumps(text, ensure_ascii=is_ascii)[1:-1]


def _strings(value: Any) -> Iterator[str]:
    """The name and the strings among the arguments of a call."""
    if not isinstance(value, dict):
        return
    if isinstance(value.get("name"), str):
        yield value["name"]
    waiting = [value.get("arguments")]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            inner = _parsed(item) if item.lstrip()[:1] in ("{", "[") else None
            if inner is None:
                yield item
            else:
                waiting.append(inner)
        elif isinstance(item, dict):
            waiting.extend(reversed(item.values()))
        elif isinstance(item, list):
            waiting.extend(reversed(item))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # A string that only looks like JSON is compared as it is.
        return None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
