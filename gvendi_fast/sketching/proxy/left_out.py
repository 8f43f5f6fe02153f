"""What a conversation holds and its rendered text lacks: templates leave things out without a word."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from gvendi_fast.sketching.proxy.messages import Message, reasoning_of


def left_out(text: str, messages: Sequence[Message], turns: Sequence[tuple[int, int] | None]) -> list[str]:
    """Kinds of it, in the order of their messages.

    turns: where each message stands in the text, None where that is not known. What others say is looked for in the
        whole text, as a template may move it; an assistant's words are in its turn.
    """
    found: dict[str, None] = {}
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for index, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        is_own = message["role"] == "assistant"
        where = text[slice(*turn)] if turn and is_own else text
        content, reasoning = _content(message), reasoning_of(message)
        if is_own and "</think>" in content:
            inside, content = content.split("</think>", 1)
            reasoning = reasoning or inside.rpartition("<think>")[2]
        if not _is_in(reasoning, where):
            kind = "reasoning of earlier turns dropped" if index < last_user else "reasoning dropped"
            found[kind] = None
        if not _is_in(content, where):
            found[f"{message['role']} content dropped"] = None
        # A template may write the first of several calls alone.
        if any(
            where.count(name) < count for name, count in Counter(_names(message.get("tool_calls"))).items()
        ):
            found["tool calls dropped"] = None
    return list(found)


def _content(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def _is_in(words: str, text: str) -> bool:
    """Whether a text holds the words, as they are or as a JSON string has them."""
    words = words.strip()
    return words in text or any(json.dumps(words, ensure_ascii=how)[1:-1] in text for how in (False, True))


def _names(calls: Any) -> Iterator[str]:
    for call in calls if isinstance(calls, list) else ():
        inner = call.get("function", call) if isinstance(call, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str):
            yield name
