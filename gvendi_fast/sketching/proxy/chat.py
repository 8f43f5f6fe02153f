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
from gvendi_fast.sketching.proxy.left_out import left_out
from gvendi_fast.sketching.proxy.messages import (
    ASIDE,
    TOOL,
    TOOL_TALK,
    Message,
    Shapes,
    replaced,
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
_WORDS = "content-3f1b77"
_CALL = "call_3f1b77"
_KNOWN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _WORDS}]
_LOST = Reason(
    "chat template leaves out or rewrites an assistant's turn, so its supervised part cannot be found"
)
# Between these, Gemma 4 writes a tool's answer into the turn of the assistant that called it.
_ANSWER_BEGINS, _ANSWER_ENDS = "<|tool_response>", "<tool_response|>"
_ANSWER = re.compile(f"{re.escape(_ANSWER_BEGINS)}.*?{re.escape(_ANSWER_ENDS)}", re.DOTALL)


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
class _Talk:
    """One conversation as a template is given it, its rendering, and what that told."""

    messages: list[Message]
    tools: list[Message] | None
    budget: Budget
    text: str
    track: Track

    def turn(self, index: int) -> tuple[int, int] | None:
        """(start, end) of what the loop wrote with a message; the last one has what follows the loop, too."""
        turn = self.track.only_turn(index)
        return (turn[0], len(self.text)) if turn and index + 1 == len(self.messages) else turn

    def words(self, index: int) -> str:
        """What the loop wrote with a message."""
        return self.text[slice(*(self.turn(index) or (0, 0)))]


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
        "markers": what the template's `{% generation %}` blocks enclose, to the character; as follows in a single row
            that has one in a text which is collected first, where it is not known what it encloses.
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
        self._knows_answers = _ANSWER_BEGINS in source and _ANSWER_ENDS in source
        self._special = dict(tokenizer.special_tokens_map)
        self._markers = sorted(
            {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True
        )
        self._example = [TOOL] if with_tools else None
        self._shapes = Shapes(lambda messages: self._asked(messages)[0])

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
            talk = _Talk(messages, tools, budget, *self._apply(messages, budget, tools=tools))
            is_marked = self._marks and talk.track.is_placed(talk.text)
            spans = self._marked(talk, supervised) if is_marked else self._turns(talk, supervised)
            if isinstance(spans, Reason):
                return spans
            hidden = self._hidden(talk)
            if isinstance(hidden, Reason):
                return hidden
            notes = self._notes(talk, supervised[-1]) if with_notes else ()
        except TemplateError as error:
            return _refusal(error)
        if with_notes and hidden is not None:
            notes += ("control tokens in a content read as text",)
        return Rendered(talk.text, spans, hidden, notes)

    def _hidden(self, talk: _Talk) -> str | Reason | None:
        """The text with the control tokens hidden that contents spell out, None where none does."""
        found = None if self._control is None else hide(self._control, talk.messages, talk.tools)
        if found is None:
            return None
        messages, tools, mark = found
        hidden = self._apply(messages, talk.budget, tools=tools)[0]
        if not is_hidden(talk.text, hidden, mark):
            return Reason("chat template changes a content that spells out a control token")
        return hidden if mark in hidden else None

    def prompt(self, messages: list[Message]) -> str:
        """The text that the assistant's next turn would follow. Raises jinja2's TemplateError where it is refused."""
        shaped = self._shaped(messages)
        if isinstance(shaped, Reason):
            raise TemplateRuntimeError(shaped)
        return self._apply(shaped, budget_for(shaped), prompt=True)[0]

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

    def _asked(self, messages: list[Message]) -> tuple[str, Track]:
        """What the template makes of messages that find out about it."""
        return self._apply(messages, budget_for(messages), tools=self._example)

    def _marked(self, talk: _Talk, supervised: list[bool]) -> list[tuple[int, int]] | Reason:
        """What the template's own marks enclose, without the messages that are not to be learnt."""
        is_own = (message["role"] == "assistant" for message in talk.messages)
        left_out = {
            i for i, (own, is_on) in enumerate(zip(is_own, supervised, strict=True)) if own and not is_on
        }
        spans = []
        for index, start, end in talk.track.generated:
            if index is None and left_out:
                return _LOST
            if index not in left_out:
                spans += self._spans(talk.text, start, end) if self.mask == "released" else [(start, end)]
        return spans

    @cached_property
    def _around(self) -> _Around | None:
        """What stands around plain contents; None where the loop's turns do not hold them."""
        try:
            user, assistant = self._shapes.shaped(_KNOWN)
            # Each is told by its identity.
            messages = [dict(user), dict(assistant), dict(user), dict(assistant)]
            talk = _Talk(messages, None, budget_for(messages), *self._asked(messages))
        except TemplateError:
            return None
        found = [tuple(talk.words(index).split(_WORDS)) for index in (1, 3)]
        return _Around(*found) if all(len(parts) == 2 for parts in found) else None

    def _turns(self, talk: _Talk, supervised: list[bool]) -> list[tuple[int, int]] | Reason:
        """The supervised ranges of each supervised turn."""
        turns: dict[int, tuple[int, int] | None] = {}
        for index in (index for index, is_on in enumerate(supervised) if is_on):
            turn = talk.turn(index)
            header = self._plain_header(talk, index) if turn else None
            turns[index] = None if header is None else (turn[0] + header, turn[1])
        if unknown := [index for index, turn in turns.items() if turn is None]:
            # Words that the conversation lacks.
            words, call = (_absent(one, talk.text) for one in (_WORDS, _CALL))
            turns |= self._by_other_words(talk, unknown, words, call)
        if None in turns.values():
            return _LOST
        if self._ends_later:
            turns = {index: (start, self._later_end(talk.text, end)) for index, (start, end) in turns.items()}
        spans = [span for index in sorted(turns) for span in self._spans(talk.text, *turns[index])]
        if any(message["role"] == "tool" for message in talk.messages) and self._hears:
            return _without_answers(talk.text, spans) if self._knows_answers else _LOST
        return spans

    def _by_other_words(
        self, talk: _Talk, unknown: list[int], words: str, call: str
    ) -> dict[int, tuple[int, int] | None]:
        """(start, end) of turns without their headers, told by the same conversation with other words in them."""
        others = list(talk.messages)
        for index in unknown:
            others[index] = replaced(others[index], words, call)
        probe = _Talk(others, talk.tools, talk.budget, *self._probed(others, talk))
        found: dict[int, tuple[int, int] | None] = {}
        for index in unknown:
            turn, header = talk.turn(index), None
            if turn and probe.turn(index):
                header = self._header(talk.words(index), probe.words(index), words, call)
            found[index] = (
                (turn[0] + header, turn[1]) if header is not None else self._by_prefix(talk, index, words)
            )
        return found

    def _probed(self, messages: list[Message], talk: _Talk) -> tuple[str, Track]:
        """What the template writes of other messages, nothing where it refuses them."""
        try:
            return self._apply(messages, talk.budget, tools=talk.tools)
        except TemplateError:
            return "", Track(messages)

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
        try:
            text, track = self._asked(self._shapes.shaped(TOOL_TALK))
        except TemplateError:
            return False
        heard, (start, end) = text.find(ASIDE), track.only_turn(1) or (0, 0)
        return start <= heard < end

    def _plain_header(self, talk: _Talk, index: int) -> int | None:
        """The length of a turn's header where the turn is what every plain content is written as, None elsewhere."""
        message, around = talk.messages[index], self._around
        if around is None or message.keys() != _PLAIN or not isinstance(message["content"], str):
            return None
        # Reasoning inside a content may be written anew.
        if "</think>" in message["content"]:
            return None
        before, after = around.last if index + 1 == len(talk.messages) else around.before
        turn, content = talk.words(index), message["content"]
        if not turn.startswith(before) or not turn.endswith(after):
            return None
        own = turn[len(before) : len(turn) - len(after)]
        return len(before) if own in (content, content.strip()) else None

    def _header(self, turn: str, known: str, words: str, call: str) -> int | None:
        """The length of a turn's header, told by the same turn with other words in it.

        Where a tool call comes first, or the words are left out, the header is what the turn has in common with that of
        a plain content: that a tool is called is the assistant's own.
        """
        place, first_call = known.find(words), known.find(call)
        if place >= 0 and (first_call < 0 or place < first_call):
            shared = _in_common(turn, known[:place])
            return shared if shared == place else self._before_marker(turn, shared)
        headers = [] if self._around is None else [self._around.before[0], self._around.last[0]]
        if first_call < 0:
            headers = [header for header in headers if turn.startswith(header)]
        return max((_in_common(turn, header) for header in headers), default=None)

    def _before_marker(self, turn: str, end: int) -> int:
        """`end`, or where the marker begins that it cuts: <think> and </think> share their first letter."""
        inside = (
            turn.find(marker, max(0, end - len(marker) + 1), end + len(marker) - 1)
            for marker in self._markers
        )
        return min((start for start in inside if start >= 0), default=end)

    def _by_prefix(self, talk: _Talk, index: int, words: str) -> tuple[int, int] | None:
        """(start, end) of a turn without its header; None where no beginning of the whole tells them."""
        upto = talk.text
        if index + 1 < len(talk.messages):
            upto = self._probed(talk.messages[: index + 1], talk)[0]
            if not upto or not talk.text.startswith(upto):
                return None
        start = self._start_by_prefix(talk, index, words)
        return None if start is None or len(upto) <= start else (start, len(upto))

    def _start_by_prefix(self, talk: _Talk, index: int, words: str) -> int | None:
        before = talk.messages[:index]
        probe = self._probed([*before, replaced(talk.messages[index], words, _CALL)], talk)[0]
        start = probe.find(words)
        if start >= 0 and talk.text.startswith(probe[:start]):
            return start
        if not index:
            return None
        try:
            prompted = self._apply(before, talk.budget, prompt=True, tools=talk.tools)[0]
        except TemplateError:
            return None
        # A template that cannot prompt gives the same without the header.
        is_prompt = talk.text.startswith(prompted) and prompted != self._probed(before, talk)[0]
        return len(prompted) if is_prompt else None

    def _notes(self, talk: _Talk, is_last_supervised: bool) -> tuple[str, ...]:
        """Kinds of what a conversation holds and its text lacks, in a fixed order."""
        turns = [talk.track.only_turn(index) for index in range(len(talk.messages))]
        found = left_out(talk.text, talk.messages, turns)
        if talk.tools and self._probed_without_tools(talk) == talk.text:
            found.append("tools dropped")
        if self._ends_later and is_last_supervised:
            found.append("no end of the last turn")
        return tuple(found)

    def _probed_without_tools(self, talk: _Talk) -> str:
        """What the template writes without tools, nothing where it needs them."""
        try:
            return self._apply(talk.messages, talk.budget)[0]
        except TemplateError:
            return ""

    def _spans(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        """Supervised ranges of one turn, which is content, end-of-turn marker and white space."""
        body = start + len(text[start:end].rstrip())
        if self.mask == "completion":
            return [(start, body)]
        marker = next((len(token) for token in self._markers if text.endswith(token, start, body)), 0)
        return [(start, body - marker), (body, end)]


def _absent(word: str, text: str) -> str:
    """A word that a text lacks, beginning with the one given."""
    while word in text:
        word += "x"
    return word


def _in_common(one: str, other: str) -> int:
    """The length of the longest beginning that two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _without_answers(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges without what tools answered in them."""
    kept = []
    for start, end in spans:
        for answer in _ANSWER.finditer(text, start, end):
            kept.append((start, answer.start()))
            start = answer.end()
        kept.append((start, end))
    return [(start, end) for start, end in kept if start < end]


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
