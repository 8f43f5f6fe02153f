"""A conversation as the text its chat template makes of it, and which characters of that text are supervised."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError, TemplateRuntimeError

from gvendi_fast.base.bounded_jinja import Budget, TooMuchError, budget_for, words_of
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason
from gvendi_fast.sketching.proxy.control_tokens import ControlTokens, hide, is_hidden
from gvendi_fast.sketching.proxy.messages import (
    ASIDE,
    REASONING,
    TOOL_TALK,
    Message,
    Shapes,
    reasoning_of,
    supervision,
)
from gvendi_fast.sketching.proxy.tracked_jinja import Track, TrackedEnvironment, render

# A template that asks for today's date would give other tokens tomorrow; this is the date Llama 3 falls back to.
_DATE = "{{ {'%Y-%m-%d': '2024-07-26'}.get(format, '26 Jul 2024') }}"
# The empty expression at its end keeps a newline that the template may begin with.
_FIXED_DATE = "{% macro strftime_now(format) %}" + _DATE + "{% endmacro %}{{ '' }}"
# What a version of transformers makes of messages before a template sees them.
_PREPARED = "{{ messages | tojson }}"
# Fields that every version leaves as they are.
_PLAIN = {"role", "content"}
# Characters of a template; those in use have up to 20,000.
_LONGEST = 1 << 20
# Characters of what one raises that are shown.
_SHOWN = 120
# Replaces an assistant's words to find out what a template writes before them; no template writes this by itself.
_SENTINEL = "content-3f1b77"
_CALL = "call_3f1b77"
_KNOWN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SENTINEL}]
_LOST = Reason("chat template rewrites an assistant's turn, so its supervised part cannot be found")


@dataclass(slots=True)
class Rendered:
    """A conversation as text.

    text, spans: the text, and the character ranges of it that are supervised.
    hidden: the text as in control_tokens.py, None where no content spells out a control token.
    notes: kinds of what the conversation holds and the text lacks.
    """

    text: str
    spans: list[tuple[int, int]]
    hidden: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Around:
    """What a template writes around an assistant's plain content in a turn: in one before the last, and in the last."""

    before: tuple[str, str]
    last: tuple[str, str]


class ChatTemplate:
    """The chat template of one tokenizer; `mask` as in encode.py, `name` for messages to the user, `control` to tell
    control tokens that contents spell out, `with_tools` for the template that a tokenizer of several has for tools.

    It writes what the tokenizer's own `apply_chat_template` writes, in a `TrackedEnvironment`. Threads may share it.

    method: how the supervised part of a conversation is found.
        "markers": what the template's `{% generation %}` blocks enclose, to the character.
        "loop": what the turn of the template's own loop with an assistant's message writes, without its header.
        "prefix": from where the conversation before it ends to where the conversation up to it ends; both must be
            beginnings of the whole. Also used for a single row in which a loop does not tell a turn.
    The header is what the template writes before the first of the message's own words, whatever they are: the role, and
    what it puts into every turn by itself, such as an empty <think></think> or the name of a channel.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        mask: str,
        control: ControlTokens | None = None,
        with_tools: bool = False,
    ) -> None:
        self.name, self.mask, self._control = name, mask, control
        from transformers.utils import chat_template_utils

        self._tokenizer = tokenizer
        source = _template_of(tokenizer, name, with_tools)
        if "strftime_now" in source:
            source = _FIXED_DATE + source
        # transformers' own, with its filters and tags; nothing of the template is compiled in it.
        own = chat_template_utils._compile_jinja_template("").environment
        environment = TrackedEnvironment.like(own)
        self._template: Any = None
        self._broken: str | None = None
        try:
            self._template = environment.from_string(source)
        except Exception as error:
            # Rows that need no template can be read.
            self._broken = f"it cannot be compiled ({words_of(error)[:_SHOWN]})"
        self._marks = environment.marks
        self._special = dict(tokenizer.special_tokens_map)
        self._markers = sorted(
            {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True
        )
        self._shapes = Shapes(
            lambda messages, tools: self._apply(messages, budget_for(messages), tools=tools)[0]
        )

    @property
    def method(self) -> str:
        """See the class."""
        return "markers" if self._marks else "loop" if self._around is not None else "prefix"

    def render(
        self, messages: list[Message], tools: list[Message] | None = None, with_notes: bool = False
    ) -> Rendered | Reason:
        """The text of a conversation and what is supervised of it, or why it cannot be rendered or told.

        with_notes: also say what the row holds and the text lacks, which takes a while.
        """
        flagged = supervision(messages)
        if isinstance(flagged, Reason):
            return flagged
        messages, supervised = flagged
        # Each is told by its identity while it is rendered.
        messages = [dict(message) for message in messages]
        if not any(supervised):
            return Reason("nothing supervised")
        try:
            messages = self._shaped(messages)
            if isinstance(messages, Reason):
                return messages
            budget = budget_for([messages, tools])
            text, track = self._apply(messages, budget, tools=tools)
            if self._marks:
                spans = self._marked(text, track, messages, supervised)
            else:
                spans = self._turns(text, track, messages, tools, supervised, budget)
            if isinstance(spans, Reason):
                return spans
            hidden = self._hidden(text, messages, tools, budget)
            if isinstance(hidden, Reason):
                return hidden
            notes = self._notes(text, track, messages, tools, budget) if with_notes else ()
        except TemplateError as error:
            return _refusal(error)
        if with_notes and hidden is not None:
            notes += ("control tokens in a content read as text",)
        return Rendered(text, spans, hidden, notes)

    def _hidden(
        self, text: str, messages: list[Message], tools: list[Message] | None, budget: Budget
    ) -> str | Reason | None:
        """The text with the control tokens hidden that contents spell out, None where none does."""
        found = None if self._control is None else hide(self._control, messages, tools)
        if found is None:
            return None
        changed, changed_tools, mark = found
        hidden = self._apply(changed, budget, tools=changed_tools)[0]
        if not is_hidden(text, hidden, mark):
            return Reason("chat template changes a content that spells out a control token")
        return hidden if mark in hidden else None

    def prompt(self, messages: list[Message]) -> str:
        """The text that the assistant's next turn would follow. Raises jinja2's TemplateError where it is refused."""
        return self.text(messages, prompt=True)

    def text(
        self,
        messages: list[Message],
        tools: list[Message] | None = None,
        documents: list[Message] | None = None,
        prompt: bool = False,
    ) -> str:
        """The whole text of a conversation. Raises jinja2's TemplateError where it is refused."""
        budget = budget_for([messages, tools, documents])
        return self._apply(self._prepared(messages), budget, prompt, tools, documents)[0]

    def _shaped(self, messages: list[Message]) -> list[Message] | Reason:
        return self._shapes.shaped(self._prepared(messages))

    def _prepared(self, messages: list[Message]) -> list[Message]:
        """The messages as transformers gives them to a template: without fields that are null, say."""
        if all(message.keys() == _PLAIN for message in messages):
            return messages
        with _template_errors():
            return json.loads(
                self._tokenizer.apply_chat_template(messages, chat_template=_PREPARED, tokenize=False)
            )

    def _apply(
        self,
        messages: list[Message],
        budget: Budget,
        prompt: bool = False,
        tools: list[Message] | None = None,
        documents: list[Message] | None = None,
    ) -> tuple[str, Track]:
        values = {"tools": tools, "documents": documents, "add_generation_prompt": prompt}
        with _template_errors():
            if self._broken is not None:
                raise TemplateRuntimeError(self._broken)
            return render(self._template, messages, budget.fresh(), **self._special | values)

    def _marked(
        self, text: str, track: Track, messages: list[Message], supervised: list[bool]
    ) -> list[tuple[int, int]] | Reason:
        """What the template's own marks enclose, without the messages that are not to be learnt."""
        left_out = {
            i for i, message in enumerate(messages) if message["role"] == "assistant" and not supervised[i]
        }
        spans = []
        for index, start, end in track.generated:
            if index is None and left_out:
                return _LOST
            if index not in left_out:
                spans += self._spans(text, start, end) if self.mask == "released" else [(start, end)]
        return spans

    @cached_property
    def _around(self) -> _Around | None:
        """What stands around plain contents; None where the loop's turns do not hold them."""
        talk = [*_KNOWN, *_KNOWN]
        user, assistant = self._shapes.shaped(_KNOWN)
        talk = [dict(user), dict(assistant), dict(user), dict(assistant)]
        try:
            text, track = self._apply(talk, budget_for(talk))
        except TemplateError:
            return None
        found = []
        for index in (1, 3):
            turn = self._turn(text, track, index, len(talk))
            parts = text[slice(*turn)].split(_SENTINEL) if turn else []
            if len(parts) != 2:
                return None
            found.append((parts[0], parts[1]))
        return _Around(*found)

    def _turn(self, text: str, track: Track, index: int, count: int) -> tuple[int, int] | None:
        """(start, end) of what the loop wrote with a message; the last one has what follows the loop, too."""
        turn = track.only_turn(index)
        return (turn[0], len(text)) if turn and index + 1 == count else turn

    def _turns(
        self,
        text: str,
        track: Track,
        messages: list[Message],
        tools: list[Message] | None,
        supervised: list[bool],
        budget: Budget,
    ) -> list[tuple[int, int]] | Reason:
        """The supervised ranges of each supervised turn."""
        turns: dict[int, tuple[int, int]] = {}
        others = []
        for index in (index for index, is_on in enumerate(supervised) if is_on):
            turn = self._turn(text, track, index, len(messages))
            header = self._plain_header(text, turn, messages, index) if turn else None
            if header is None:
                others.append(index)
            else:
                turns[index] = turn[0] + header, turn[1]
        if others:
            probe = [_replaced(message) if supervised[i] else message for i, message in enumerate(messages)]
            known, of_probe = self._apply(probe, budget, tools=tools)
            for index in others:
                turn = self._turn(text, track, index, len(messages))
                asked = self._turn(known, of_probe, index, len(messages))
                found = (
                    self._asked_header(text[slice(*turn)], known[slice(*asked)]) if turn and asked else None
                )
                if found is not None:
                    turns[index] = turn[0] + found, turn[1]
                    continue
                by_prefix = self._by_prefix(text, messages, tools, index, budget)
                if by_prefix is None:
                    return _LOST
                turns[index] = by_prefix
        if self._ends_later:
            turns = {index: (start, self._later_end(text, end)) for index, (start, end) in turns.items()}
        spans = [span for index in sorted(turns) for span in self._spans(text, *turns[index])]
        if any(message["role"] == "tool" for message in messages) and self._hears:
            return _without_answers(text, spans)
        return spans

    @cached_property
    def _ends_later(self) -> bool:
        """Whether the marker that ends a turn is written with the next message, as it may be the next header."""
        return self._around is not None and not self._around.before[1].strip()

    def _later_end(self, text: str, end: int) -> int:
        bos = self._special.get("bos_token")
        marker = next((x for x in self._markers if x != bos and text.startswith(x, end)), "")
        return end + len(marker)

    @cached_property
    def _hears(self) -> bool:
        """Whether the template writes a tool's answer inside the turn of the assistant that called it."""
        talk = self._shapes.shaped(TOOL_TALK)
        try:
            text, track = self._apply(talk, budget_for(talk))
        except TemplateError:
            return False
        heard, (start, end) = text.find(ASIDE), track.only_turn(1) or (0, 0)
        return start <= heard < end

    def _plain_header(
        self, text: str, turn: tuple[int, int], messages: list[Message], index: int
    ) -> int | None:
        """The length of a turn's header where the turn is what every plain content is written as, None elsewhere."""
        message, around = messages[index], self._around
        if around is None or message.keys() != _PLAIN or not isinstance(message["content"], str):
            return None
        # Reasoning inside a content may be written anew.
        if "</think>" in message["content"]:
            return None
        before, after = around.last if index + 1 == len(messages) else around.before
        start, end = turn
        content, length = message["content"], end - start - len(before) - len(after)
        if not text.startswith(before, start) or not text.endswith(after, start, end):
            return None
        for own in (content, content.strip()):
            if len(own) == length and text.startswith(own, start + len(before)):
                return len(before)
        return None

    def _asked_header(self, turn: str, known: str) -> int | None:
        """The length of a turn's header, told by the same turn with other words in it.

        Where a tool call comes first, or the content beside it is left out, the header is what the turn has in common
        with that of a plain content: that a tool is called is the assistant's own.
        """
        place, call = known.find(_SENTINEL), known.find(_CALL)
        if place >= 0 and (call < 0 or place < call):
            return _in_common(turn, known[:place])
        if self._around is None or call < 0:
            return None
        return max(_in_common(turn, header) for header, _ in (self._around.before, self._around.last))

    def _by_prefix(
        self,
        text: str,
        messages: list[Message],
        tools: list[Message] | None,
        index: int,
        budget: Budget,
    ) -> tuple[int, int] | None:
        """(start, end) of a turn without its header; None where no beginning of the whole tells them."""
        upto = text
        if index + 1 < len(messages):
            upto = self._apply(messages[: index + 1], budget, tools=tools)[0]
            if not text.startswith(upto):
                return None
        start = self._start_by_prefix(text, messages, tools, index, budget)
        return None if start is None or len(upto) <= start else (start, len(upto))

    def _start_by_prefix(
        self,
        text: str,
        messages: list[Message],
        tools: list[Message] | None,
        index: int,
        budget: Budget,
    ) -> int | None:
        known = [*messages[:index], _replaced(messages[index])]
        probe = self._apply(known, budget, tools=tools)[0]
        start = probe.find(_SENTINEL)
        if start >= 0 and text.startswith(probe[:start]):
            return start
        if not index:
            return None
        prompted = self._apply(messages[:index], budget, prompt=True, tools=tools)[0]
        # A template that cannot prompt gives the same without the header.
        if text.startswith(prompted) and prompted != self._apply(messages[:index], budget, tools=tools)[0]:
            return len(prompted)
        return None

    def _notes(
        self,
        text: str,
        track: Track,
        messages: list[Message],
        tools: list[Message] | None,
        budget: Budget,
    ) -> tuple[str, ...]:
        """Kinds of what a conversation holds and its text lacks, in a fixed order."""
        lost: dict[str, None] = {}
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for index, message in enumerate(messages):
            turn = track.only_turn(index)
            # A template may move what others say; an assistant's words stand in its turn.
            where = text[slice(*turn)] if turn and message["role"] == "assistant" else text
            content, reasoning = _words(message), reasoning_of(message)
            if message["role"] == "assistant" and "</think>" in content:
                inside, content = content.split("</think>", 1)
                reasoning = reasoning or inside.rpartition("<think>")[2]
            if not _is_in(reasoning, where):
                lost["reasoning of earlier turns dropped" if index < last_user else "reasoning dropped"] = (
                    None
                )
            if not _is_in(content, where):
                lost[f"{message['role']} content dropped"] = None
            if not all(_is_in(name, where) for name in _names(message.get("tool_calls"))):
                lost["tool calls dropped"] = None
        if tools and self._apply(messages, budget)[0] == text:
            lost["tools dropped"] = None
        if self._ends_later and messages[-1]["role"] == "assistant":
            lost["no end of the last turn"] = None
        return tuple(lost)

    def _spans(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        """Supervised ranges of one turn, which is content, end-of-turn marker and white space."""
        body = start + len(text[start:end].rstrip())
        if self.mask == "completion":
            return [(start, body)]
        marker = next((len(token) for token in self._markers if text.endswith(token, start, body)), 0)
        return [(start, body - marker), (body, end)]


def _in_common(one: str, other: str) -> int:
    """The length of the longest beginning that two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _replaced(message: Message) -> Message:
    """An assistant's message with known words in place of its own; it has a content in any case."""
    made = dict(message)
    for name in REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            made[name] = _SENTINEL
    if message["content"] or not reasoning_of(message).strip():
        is_text = not isinstance(message["content"], list)
        made["content"] = _SENTINEL if is_text else [{"type": "text", "text": _SENTINEL}]
    if isinstance(message.get("tool_calls"), list):
        made["tool_calls"] = [_renamed(call) for call in message["tool_calls"]]
    return made


def _renamed(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": _CALL}}
    return {**call, "name": _CALL}


# Between these, Gemma 4 writes a tool's answer.
_ANSWER = re.compile(r"<\|tool_response>.*?<tool_response\|>", re.DOTALL)


def _without_answers(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]] | Reason:
    """The ranges without what tools answered in them."""
    kept = []
    for start, end in spans:
        for answer in _ANSWER.finditer(text, start, end):
            kept.append((start, answer.start()))
            start = answer.end()
        kept.append((start, end))
    if len(kept) == len(spans):
        return _LOST
    return [(start, end) for start, end in kept if start < end]


def _words(message: Message) -> str:
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


def _template_of(tokenizer: Any, name: str, with_tools: bool) -> str:
    try:
        source = tokenizer.get_chat_template(tools=[] if with_tools else None)
    except ValueError as error:
        raise GvendiError(f"tokenizer '{name}' has chat templates but no default one ({error})") from error
    if not isinstance(source, str) or len(source) > _LONGEST:
        what = f"of {len(source):,} characters" if isinstance(source, str) else type(source).__name__
        raise GvendiError(
            f"chat template of tokenizer '{name}' is {what}; wanted text of at most {_LONGEST:,}"
        )
    return source


@contextmanager
def _template_errors() -> Iterator[None]:
    """Whatever a template, or what is given to it, raises inside comes out as jinja2's TemplateError."""
    try:
        yield
    except TemplateError:
        raise
    except Exception as error:
        # A template is a program of a stranger's: there is no end of what it may raise.
        raise TemplateRuntimeError(words_of(error)[:_SHOWN]) from error


def _refusal(error: TemplateError) -> Reason:
    if isinstance(error, TooMuchError):
        return Reason(f"chat template: {error}")
    return Reason(f"chat template refused the messages: {str(error)[:_SHOWN]}")
