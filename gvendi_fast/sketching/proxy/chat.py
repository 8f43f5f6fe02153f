"""A conversation as the text its chat template makes of it, and which characters of that text are supervised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateError, TemplateRuntimeError

from gvendi_fast.base.bounded_jinja import (
    BoundedEnvironment,
    Budget,
    TooMuchError,
    budget_for,
    counting,
    words_of,
)
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason

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
# Replaces a content to find out what a template writes before it; no template writes this by itself.
_SENTINEL = "content-3f1b77"


class ChatTemplate:
    """The chat template of one tokenizer; `mask` as in encode.py, `name` for messages to the user.

    It writes what the tokenizer's own `apply_chat_template` writes, in a `BoundedEnvironment`. Threads may share it.
    """

    def __init__(self, tokenizer: Any, name: str, mask: str) -> None:
        self.name, self.mask = name, mask
        from transformers.utils import chat_template_utils

        self._tokenizer = tokenizer
        source = _template_of(tokenizer, name)
        if "strftime_now" in source:
            source = _FIXED_DATE + source
        # transformers' own, with its filters and tags; nothing of the template is compiled in it.
        own = chat_template_utils._compile_jinja_template("").environment
        self._template: Any = None
        self._broken: str | None = None
        try:
            self._template = BoundedEnvironment.like(own).from_string(source)
        except Exception as error:
            # Rows that need no template can be read.
            self._broken = f"it cannot be compiled ({words_of(error)[:_SHOWN]})"
        self._special = dict(tokenizer.special_tokens_map)
        self._markers = sorted(
            {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True
        )

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]] | Reason:
        """(text, supervised character ranges), or why these messages cannot be rendered.

        Raises GvendiError for a template whose turns cannot be separated, whatever their contents.
        """
        try:
            messages = self._prepared(messages)
            text, turns = self._turns(messages, tools, budget_for([messages, tools]))
        except TemplateError as error:
            return _refusal(error)
        if turns is None:
            return self._blame(messages, tools)
        return text, [span for turn in turns for span in self._spans(text, *turn)]

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The text that the assistant's next turn would follow. Raises jinja2's TemplateError where it is refused."""
        return self.text(messages, prompt=True)

    def text(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        prompt: bool = False,
    ) -> str:
        """The whole text of a conversation. Raises jinja2's TemplateError where it is refused."""
        budget = budget_for([messages, tools, documents])
        return self._apply(self._prepared(messages), budget, prompt, tools, documents)

    def _prepared(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as transformers gives them to a template: without fields that are null, say."""
        if all(message.keys() == _PLAIN for message in messages):
            return messages
        with _template_errors():
            return json.loads(
                self._tokenizer.apply_chat_template(messages, chat_template=_PREPARED, tokenize=False)
            )

    def _apply(
        self,
        messages: list[dict[str, Any]],
        budget: Budget,
        prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
    ) -> str:
        values = {"messages": messages, "tools": tools, "documents": documents}
        with _template_errors(), counting(budget.fresh()):
            if self._broken is not None:
                raise TemplateRuntimeError(self._broken)
            return self._template.render(**self._special | values, add_generation_prompt=prompt)

    def _turns(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, budget: Budget
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The rendered conversation and the (start, end) of each assistant's turn without its header.

        A turn begins where the conversation before it with the header that prompts for an answer ends, and it ends
        where the conversation up to it ends. Both must be beginnings of the whole, else there are no turns (None).
        """
        full, turns = self._apply(messages, budget, tools=tools), []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._turn_start(full, messages, tools, index, budget)
            is_last = index + 1 == len(messages)
            upto = full if is_last else self._apply(messages[: index + 1], budget, tools=tools)
            if start is None or not full.startswith(upto) or len(upto) <= start:
                return full, None
            turns.append((start, len(upto)))
        return full, turns

    def _turn_start(
        self,
        full: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        index: int,
        budget: Budget,
    ) -> int | None:
        if index:
            prompted = self._apply(messages[:index], budget, prompt=True, tools=tools)
            # A template that cannot prompt gives the same without the header.
            if full.startswith(prompted) and prompted != self._apply(messages[:index], budget, tools=tools):
                return len(prompted)
        # Templates of reasoning models prompt with a <think> that a finished turn lacks; then, too, the header is what
        # stands before a content that is known.
        known = [*messages[:index], {"role": "assistant", "content": _SENTINEL}]
        probe = self._apply(known, budget, tools=tools)
        start = probe.find(_SENTINEL)
        return start if start >= 0 and full.startswith(probe[:start]) else None

    def _blame(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Reason:
        """The row's fault if the template keeps turns of the same roles with plain contents, else the template's."""
        plain = [
            {"role": message["role"], "content": f"turn {number}"} for number, message in enumerate(messages)
        ]
        try:
            turns = self._turns(plain, tools, budget_for([plain, tools]))[1]
        except TemplateError as error:
            return _refusal(error)
        if turns is None:
            roles = ", ".join(message["role"] for message in messages[:6])
            raise GvendiError(
                f"chat template of tokenizer '{self.name}': a conversation ({roles}) does not begin with what its "
                "first turns render to, so the assistant's turns cannot be found; set tokenizer.chat_template to one "
                "that only appends, such as ChatML"
            )
        return Reason("chat template rewrites an assistant's content, so its supervised part cannot be found")

    def _spans(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        """Supervised ranges of one turn, which is content, end-of-turn marker and white space."""
        body = start + len(text[start:end].rstrip())
        if self.mask == "completion":
            return [(start, body)]
        marker = next((len(token) for token in self._markers if text.endswith(token, start, body)), 0)
        return [(start, body - marker), (body, end)]


def _template_of(tokenizer: Any, name: str) -> str:
    try:
        source = tokenizer.get_chat_template()
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
