"""Control tokens that a content spells out stay text: a user who types <|im_end|> does not end the turn.

In a rendered conversation the template's own markers must become their tokens, and the same letters inside a content
must not. So the contents are rendered once more with the first character of each such word replaced by a character that
nothing else uses. The two texts have the same length, and where the second one has a control token, it is the
template's. What stands between two of those is tokenised as a tokenizer that knows no control tokens would.

Control tokens are those that a tokenizer calls special, as `split_special_tokens` of transformers has it; others that
were added, such as <think> or <tool_call> of Qwen3, are read in any content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

# Characters of no meaning in Unicode, one of which stands for a first character.
_FREE = "".join(map(chr, range(0xF0000, 0xF0100)))
# A text that lacks all of these beginnings lacks the words; looking for a few is faster than for hundreds.
_BEGINNING = 2


class Encoded(NamedTuple):
    """Tokens of a text: ids int32 [T] and their character ranges [T, 2]."""

    ids: np.ndarray
    offsets: np.ndarray


class ControlTokens:
    """The control tokens of one tokenizer of the library `tokenizers`.

    backend: that tokenizer, which is left as it is. copy: makes one with the same steps.
    """

    def __init__(self, backend: Any, copy: Callable[[Any], Any]) -> None:
        added = backend.get_added_tokens_decoder()
        words = sorted({one.content for one in added.values() if one.special and one.content})
        self.ids = np.array(sorted(number for number, one in added.items() if one.special), np.int32)
        self._beginnings = sorted({word[:_BEGINNING] for word in words})
        self._word = re.compile(_any_of(words) if words else "(?!)")
        self._backend, self._copy = backend, copy

    def in_any(self, values: Iterable[Any]) -> bool:
        """Whether a text inside the values, at whatever depth, spells a control token."""
        return any(self._in(text) for value in values for text in _texts(value))

    def _in(self, text: str) -> bool:
        return (
            any(beginning in text for beginning in self._beginnings) and self._word.search(text) is not None
        )

    def hidden(self, value: Any, mark: str) -> Any:
        """The value with `mark` in place of the first character of each control token in its texts."""
        if isinstance(value, str):
            return self._word.sub(lambda found: mark + found.group()[1:], value)
        if isinstance(value, dict):
            return {self.hidden(key, mark): self.hidden(item, mark) for key, item in value.items()}
        return [self.hidden(item, mark) for item in value] if isinstance(value, list) else value

    def encode(self, text: str, hidden: str) -> Encoded:
        """The tokens of a text, whose control tokens are those of `hidden`."""
        encoding = self._backend.encode(hidden, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        differ = np.flatnonzero(_letters(text) != _letters(hidden))
        own = np.flatnonzero(np.isin(ids, self.ids))
        made, ranges = [], []
        for before, after in zip([-1, *own], [*own, len(ids)], strict=True):
            start = int(offsets[before, 1]) if before >= 0 else 0
            end = int(offsets[after, 0]) if after < len(ids) else len(text)
            if np.searchsorted(differ, start) < np.searchsorted(differ, end):
                without = self._inner if start else self._plain
                plain = without.encode(text[start:end], add_special_tokens=False)
                made.append(np.asarray(plain.ids, np.int32))
                ranges.append(np.asarray(plain.offsets, np.int64).reshape(-1, 2) + start)
            else:
                made.append(ids[before + 1 : after])
                ranges.append(offsets[before + 1 : after])
            made.append(ids[after : after + 1])
            ranges.append(offsets[after : after + 1])
        return Encoded(np.concatenate(made), np.concatenate(ranges))

    @cached_property
    def _plain(self) -> Any:
        """The tokenizer without control tokens; few corpora need it."""
        made = self._copy(self._backend)
        made.encode_special_tokens = True
        return made

    @cached_property
    def _inner(self) -> Any:
        """`plain` for what is no text's beginning: there, no space is added that would mark one."""
        if "prepend_scheme=first" not in repr(self._plain.pre_tokenizer):
            return self._plain
        from tokenizers import Tokenizer

        settings = json.loads(self._plain.to_str())
        _never_first(settings["pre_tokenizer"])
        made = Tokenizer.from_str(json.dumps(settings))
        made.encode_special_tokens = True
        return made


def hide(
    control: ControlTokens, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, str] | None:
    """(messages, tools, the mark) with control tokens hidden, None where none is spelt out.

    What the assistant says is left as it is: in a model's own turns they may be meant, as markers of a tool call are.
    """
    others = [message for message in messages if message["role"] != "assistant"]
    if not control.in_any([*others, tools]):
        return None
    texts = list(_texts([messages, tools]))
    # A row that used all of them would be refused, as the marks could not be told from its own.
    mark = next((one for one in _FREE if not any(one in text for text in texts)), _FREE[0])
    changed = [one if one["role"] == "assistant" else control.hidden(one, mark) for one in messages]
    return changed, control.hidden(tools, mark), mark


def is_hidden(text: str, hidden: str, mark: str) -> bool:
    """Whether `hidden` is the text with some of its characters replaced by the mark, which the text lacks."""
    if len(text) != len(hidden) or mark in text:
        return False
    letters, others = _letters(text), _letters(hidden)
    return bool(((letters == others) | (others == ord(mark))).all())


def _letters(text: str) -> np.ndarray:
    """The code points of a text, int32."""
    return np.frombuffer(text.encode("utf-32-le"), "<i4")


def _any_of(words: list[str]) -> str:
    """A regular expression of the longest of some words, in ascending order, that tries no beginning twice."""
    length = next(
        (i for i, (a, b) in enumerate(zip(words[0], words[-1], strict=False)) if a != b), len(words[0])
    )
    following: dict[str, list[str]] = {}
    for word in words:
        following.setdefault(word[length : length + 1], []).append(word[length:])
    ends = following.pop("", None) is not None
    inner = "|".join(map(_any_of, following.values()))
    return re.escape(words[0][:length]) + (f"(?:{inner})" + "?" * ends if inner else "")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _never_first(step: dict[str, Any] | None) -> None:
    """A step of settings that marks a text's beginning with a space does so no more."""
    if step is None:
        return
    if step.get("prepend_scheme") == "first":
        step["prepend_scheme"] = "never"
    for inner in step.get("pretokenizers", ()):
        _never_first(inner)
