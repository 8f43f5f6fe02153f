"""A conversation as the text its chat template makes of it, and which characters of that text are supervised."""

from __future__ import annotations

from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason

# A template that asks for today's date would give other tokens tomorrow; this is the date Llama 3 falls back to.
_DATE = "{{ {'%Y-%m-%d': '2024-07-26'}.get(format, '26 Jul 2024') }}"
# The empty expression at its end keeps a newline that the template may begin with.
_FIXED_DATE = "{% macro strftime_now(format) %}" + _DATE + "{% endmacro %}{{ '' }}"
# Replaces a content to find out what a template writes before it; no template writes this by itself.
_SENTINEL = "content-3f1b77"


class ChatTemplate:
    """The chat template of one tokenizer; `mask` as in encode.py, `name` for messages to the user."""

    def __init__(self, tokenizer: Any, name: str, mask: str) -> None:
        self.name, self.mask = name, mask
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template()
        if "strftime_now" in self._template:
            self._template = _FIXED_DATE + self._template
        self._markers = sorted(
            {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True
        )

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]] | Reason:
        """(text, supervised character ranges), or why these messages cannot be rendered.

        Raises GvendiError for a template whose turns cannot be separated, whatever their contents.
        """
        from jinja2.exceptions import TemplateError

        try:
            text, turns = self._turns(messages)
        except TemplateError as error:
            return Reason(f"chat template refused the messages: {str(error)[:120]}")
        if turns is None:
            return self._blame(messages)
        return text, [span for turn in turns for span in self._spans(text, *turn)]

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The text that the assistant's next turn would follow. Raises jinja2's TemplateError where it is refused."""
        return self._apply(messages, prompt=True)

    def _apply(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
        )

    def _turns(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]] | None]:
        """The rendered conversation and the (start, end) of each assistant's turn without its header.

        A turn begins where the conversation before it with the header that prompts for an answer ends, and it ends
        where the conversation up to it ends. Both must be beginnings of the whole, else there are no turns (None).
        """
        full, turns = self._apply(messages), []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._turn_start(full, messages, index)
            upto = full if index + 1 == len(messages) else self._apply(messages[: index + 1])
            if start is None or not full.startswith(upto) or len(upto) <= start:
                return full, None
            turns.append((start, len(upto)))
        return full, turns

    def _turn_start(self, full: str, messages: list[dict[str, Any]], index: int) -> int | None:
        if index:
            prompted = self._apply(messages[:index], prompt=True)
            # A template that cannot prompt gives the same without the header.
            if full.startswith(prompted) and prompted != self._apply(messages[:index]):
                return len(prompted)
        # Templates of reasoning models prompt with a <think> that a finished turn lacks; then, too, the header is what
        # stands before a content that is known.
        probe = self._apply([*messages[:index], {"role": "assistant", "content": _SENTINEL}])
        start = probe.find(_SENTINEL)
        return start if start >= 0 and full.startswith(probe[:start]) else None

    def _blame(self, messages: list[dict[str, Any]]) -> Reason:
        """The row's fault if the template keeps turns of the same roles with plain contents, else the template's."""
        from jinja2.exceptions import TemplateError

        plain = [
            {"role": message["role"], "content": f"turn {number}"} for number, message in enumerate(messages)
        ]
        try:
            turns = self._turns(plain)[1]
        except TemplateError as error:
            return Reason(f"chat template refused the messages: {str(error)[:120]}")
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
