"""Messages as one chat template wants them: which are supervised, and what of a message is given in which shape.

Templates differ in what they read of a message: its content as a text or as a list of parts, the arguments of a tool
call as an object or as JSON, its reasoning under one name or another. A template that is given the other shape may
refuse it, print Python's own form of it, encode it twice, or leave it out without a word. So a template is asked, once
for each shape, by rendering a small conversation with known words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from gvendi_fast.base.bounded_jinja import TooMuchError
from gvendi_fast.base.printable import printable
from gvendi_fast.data.rows import MAX_DEPTH, Reason, nests_deeper

Message = dict[str, Any]
# Each says whether a message is supervised, in one framework or another.
FLAGS = ("weight", "train", "trainable")
# Names under which reasoning is kept; the first one that a template reads is used.
REASONING = ("reasoning_content", "reasoning", "thinking")
_YES, _NO = (1, "1", "true", "True"), (0, "0", "false", "False")
# Characters of a flag's value that are shown.
_SHOWN = 40
# Words that no template writes by itself.
_ASKED, _ANSWER, ASIDE, _CALLED = "asked-5c90e2", "answer-5c90e2", "aside-5c90e2", "called_5c90e2"
_KEY, _VALUE = "key_5c90e2", "value-5c90e2"
_ARGUMENTS = {_KEY: _VALUE}
_USER, _ASSISTANT = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER}
# Nine letters and digits, as Mistral's templates demand.
_ID = "abcdef012"
_TOOL = {"role": "tool", "content": ASIDE, "name": _CALLED, "tool_call_id": _ID}


def _calls(arguments: Any) -> list[Message]:
    return [{"id": _ID, "type": "function", "function": {"name": _CALLED, "arguments": arguments}}]


# A tool as its schema has it.
TOOL = {
    "type": "function",
    "function": {
        "name": _CALLED,
        "description": "",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": ""}}},
    },
}
# A tool is called and answers ASIDE.
TOOL_TALK = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": _calls(_ARGUMENTS)},
    _TOOL,
    {**_ASSISTANT},
]


def supervision(messages: list[Message]) -> tuple[list[Message], list[bool]] | Reason:
    """(the messages without flags and empty lists of calls, whether each is supervised), or why a flag is none.

    Every assistant's message is supervised unless one of its flags says no; no other message is.
    """
    plain, supervised = [], []
    for number, message in enumerate(messages, 1):
        is_on = message["role"] == "assistant"
        if message.keys() & set(FLAGS):
            for flag in FLAGS:
                value = message.get(flag)
                if value is None or not is_on:
                    continue
                if not any(value == one for one in (*_YES, *_NO)):
                    shown = printable(json.dumps(value, ensure_ascii=False, default=str)[:_SHOWN])
                    return Reason(
                        f"message {number}: '{flag}' is {shown}; wanted 0 or 1, as a turn is supervised whole or not"
                    )
                is_on = value in _YES
            message = {key: value for key, value in message.items() if key not in FLAGS}
        # Templates ask only whether they are there.
        if message.get("tool_calls") == []:
            message = {key: value for key, value in message.items() if key != "tool_calls"}
        plain.append(message)
        supervised.append(is_on)
    return plain, supervised


def reasoning_of(message: Message) -> str:
    """A message's reasoning under whatever name, "" where it has none."""
    return next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")


def replaced(message: Message, words: str, call: str) -> Message:
    """An assistant's message with `words` in place of each of its texts, and `call` for the tools that it calls.

    It has a content where it has no reasoning, be it tool calls alone.
    """
    made = dict(message)
    for name in REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            made[name] = words
    if message["content"] or not reasoning_of(message).strip():
        is_text = not isinstance(message["content"], list)
        made["content"] = words if is_text else [{"type": "text", "text": words}]
    if isinstance(message.get("tool_calls"), list):
        made["tool_calls"] = [_renamed(one, call) for one in message["tool_calls"]]
    return made


def _renamed(call: Any, name: str) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


class Shapes:
    """What one template reads of messages.

    render: the template's text of messages; raises TemplateError.
    """

    def __init__(self, render: Callable[[list[Message]], str]) -> None:
        self._render = render
        self._others: dict[str, bool] = {}

    def shaped(self, messages: list[Message]) -> list[Message] | Reason:
        """The messages as the template wants them; those that it takes as they are stay the same objects."""
        shaped = []
        for number, message in enumerate(messages, 1):
            changes: Message = {}
            if "tool_calls" in message:
                calls = self._calls(message["tool_calls"], number)
                if isinstance(calls, Reason):
                    return calls
                changes["tool_calls"] = calls
                if message["content"] == "" and self._without_content is None:
                    changes["content"] = None
            if reasoning := reasoning_of(message):
                read = self.reasoning
                if read and not any(name in message for name in read):
                    changes[read[0]] = reasoning
            if isinstance(message["content"], str) and self._wants_parts(message["role"]):
                changes["content"] = [{"type": "text", "text": message["content"]}]
            shaped.append(message | changes if changes else message)
        return shaped

    def _text(self, messages: list[Message]) -> str:
        """What the template writes, "" where it refuses."""
        try:
            return self._render(messages)
        except TooMuchError:
            # An endless one refuses its rows; asked again, it would take as long each time.
            raise
        except TemplateError:
            return ""

    def _wants_parts(self, role: str) -> bool:
        user, assistant = self._main
        if role in ("user", "assistant"):
            return user if role == "user" else assistant
        # Threads that find it at the same time find the same.
        if role not in self._others:
            main = [_in_parts(_USER, user), _in_parts(_ASSISTANT, assistant)]
            if role == "tool":
                call = {**_ASSISTANT, "tool_calls": _calls(_ARGUMENTS)}
                before, asked, after = [main[0], _in_parts(call, assistant)], _TOOL, main[1:]
            else:
                before, asked, after = [], {"role": role, "content": ASIDE}, main
            found = [ASIDE in self._text([*before, _in_parts(asked, how), *after]) for how in (False, True)]
            self._others[role] = found == [False, True]
        return self._others[role]

    @cached_property
    def _main(self) -> tuple[bool, bool]:
        """Whether the contents of users and of assistants are wanted as parts."""
        for user, assistant in ((False, False), (True, False), (False, True), (True, True)):
            text = self._text([_in_parts(_USER, user), _in_parts(_ASSISTANT, assistant)])
            if _ASKED in text and _ANSWER in text:
                return user, assistant
        return False, False

    @cached_property
    def reasoning(self) -> tuple[str, ...]:
        """Names under which the template reads reasoning, with an answer or with a tool call."""
        user, assistant = _in_parts(_USER, self._main[0]), _in_parts(_ASSISTANT, self._main[1])
        ends = assistant, {**assistant, "tool_calls": _calls(_ARGUMENTS)}
        return tuple(
            name
            for name in REASONING
            if any(ASIDE in self._text([user, {**end, name: ASIDE}]) for end in ends)
        )

    def _called(self, calls: Any, content: str | None = "") -> str:
        """What the template writes of tool calls, alone or with the tool's answer behind."""
        user, assistant = self._main
        asked = _in_parts(_USER, user)
        call = {"role": "assistant", "content": content, "tool_calls": calls}
        text = self._text([asked, call])
        return text or self._text([asked, call, _TOOL, _in_parts(_ASSISTANT, assistant)])

    @cached_property
    def _without_content(self) -> str | None:
        """The content of a message that has tool calls only: some templates write the calls only if it is null."""
        texts = [[self._called(_calls(form), empty) for form in self._forms] for empty in ("", None)]
        found = [any(_CALLED in text for text in each) for each in texts]
        return None if found == [False, True] else ""

    _forms = (_ARGUMENTS, json.dumps(_ARGUMENTS))

    @cached_property
    def _takes(self) -> tuple[bool, bool]:
        """Whether arguments are written properly when given as an object, and when given as JSON."""
        empty = self._without_content
        by_object, by_text = (self._called(_calls(form), empty) for form in self._forms)
        is_proper = all(word in by_object for word in (_CALLED, _KEY, _VALUE))
        # Joined to a text, an object comes out as Python prints it.
        return is_proper and str(_ARGUMENTS) not in by_object, self._forms[1] in by_text

    @cached_property
    def _wants_function(self) -> bool:
        """Whether a call that has its name beside its arguments is only read from inside a "function"."""
        flat = [{"name": _CALLED, "arguments": _ARGUMENTS, "id": _ID}]
        empty = self._without_content
        return _CALLED not in self._called(flat, empty) and _CALLED in self._called(_calls(_ARGUMENTS), empty)

    def _calls(self, calls: Any, number: int) -> Any:
        if not isinstance(calls, list):
            return calls
        made = []
        for call in calls:
            if isinstance(call, dict) and "function" not in call and "name" in call and self._wants_function:
                inner = {key: call[key] for key in ("name", "arguments") if key in call}
                outer = {key: value for key, value in call.items() if key not in inner}
                call = {"type": "function", **outer, "function": inner}
            holder = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(holder, dict) and "arguments" in holder:
                arguments = self._arguments(holder["arguments"])
                if isinstance(arguments, Reason):
                    return Reason(f"message {number}: {arguments}")
                if arguments is not holder["arguments"]:
                    holder = {**holder, "arguments": arguments}
                    call = {**call, "function": holder} if "function" in call else holder
            made.append(call)
        return made

    def _arguments(self, arguments: Any) -> Any:
        """As they are where the template takes them so, else as the other of an object and its JSON."""
        takes_object, takes_text = self._takes
        if isinstance(arguments, Mapping) and not takes_object and takes_text:
            return json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str) and takes_object and not takes_text:
            try:
                read = None if nests_deeper(arguments.encode(), MAX_DEPTH) else json.loads(arguments)
            except ValueError:
                read = None
            if not isinstance(read, dict):
                return Reason(
                    "the arguments of a tool call are not a JSON object, which the chat template needs"
                )
            return read
        return arguments


def _in_parts(message: Message, is_wanted: bool) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]} if is_wanted else message
