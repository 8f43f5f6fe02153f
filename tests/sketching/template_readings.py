"""What the package supervises of a conversation under a stock template, and where that breaks the rule.

The rule: of each message of the assistant its reasoning, content and calls as the template writes them, and the marker
that ends the turn; nothing of the other messages, no header, and no text that the template adds to every turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from gvendi_fast.data.rows import Rejected
from gvendi_fast.sketching.proxy.encode import Encoder
from tests.sketching.template_families import CASES, MORE, WEATHER, Case, Family, families, tokenizer_of

# Markers around reasoning; where a message has none, nothing of them is the assistant's.
THINKING = re.compile(
    r"</?(?:seed:)?think>|\[/?THINK\]|<\|channel>|<channel\|>|<\|inner_(?:prefix|suffix)\|>"
)

FUNCTION, DESCRIPTION = WEATHER["function"]["name"], WEATHER["function"]["description"]

# Cases without anything but contents.
PLAIN = ("one turn", "two turns")


@dataclass(frozen=True)
class Reading:
    """One conversation under one template.

    text: as it is tokenised, "" where the row is refused.
    spans: the supervised character ranges of it.
    tokens: the runs of supervised tokens, decoded.
    notes: what the package says it left out.
    refused: why the row is refused, or None.
    """

    family: Family
    case: Case
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def parts(self) -> list[str]:
        """The supervised texts."""
        return [self.text[start:end] for start, end in self.spans]


def present() -> list[Family]:
    """The families whose template is here."""
    return [family for family in families() if family.template() is not None]


@cache
def encoder_of(family: Family) -> Encoder:
    """With the family's template."""
    return Encoder(tokenizer_of(family, family.template()))


@cache
def readings(family: Family) -> dict[str, Reading]:
    """The family's reading of every case, by the case's name. Whatever a row raises comes out: it would end a run."""
    return {case.name: _reading(family, case, encoder_of(family)) for case in (*CASES, *MORE)}


def _reading(family: Family, case: Case, encoder: Encoder) -> Reading:
    found = encoder.preview(case.row())
    if isinstance(found, Rejected):
        return Reading(family, case, refused=found.reason)
    on = np.concatenate([[0], found.labels != -100, [0]]).astype(int)
    edges = np.flatnonzero(np.diff(on)).reshape(-1, 2)
    tokens = tuple(encoder.tokenizer.decode(found.ids[start:end]) for start, end in edges)
    return Reading(family, case, found.text, tuple(found.spans), tokens, tuple(found.notes))


@cache
def masked(family: Family) -> dict[str, list[str] | None]:
    """The texts that TRL's training template marks, by case; None where it refuses the messages."""
    tokenizer = tokenizer_of(family, family.training_template())
    return {case.name: _masked(tokenizer, case) for case in CASES}


def _masked(tokenizer, case: Case) -> list[str] | None:
    row, found = case.row(), []
    for messages in forms(row.messages):
        try:
            found.append(
                tokenizer.apply_chat_template(
                    messages, tools=row.tools, return_assistant_tokens_mask=True, return_dict=True
                )
            )
        # A template is a program: it may raise anything.
        except Exception:
            continue
    if not found:
        return None
    # The form of which the template writes most.
    texts = [tokenizer.decode(one["input_ids"]) for one in found]
    said = [sum(piece.text in text for piece in case.pieces()) for text in texts]
    best = found[said.index(max(said))]
    on = np.concatenate([[0], best["assistant_masks"], [0]]).astype(int)
    edges = np.flatnonzero(np.diff(on)).reshape(-1, 2)
    return [tokenizer.decode(best["input_ids"][start:end]) for start, end in edges]


def faults(reading: Reading) -> Iterator[str]:
    """Where a reading breaks the rule, in words that are the same for the same kind of fault; refused ones do not."""
    if reading.refused is not None:
        return
    case, supervised = reading.case, "\n".join(reading.parts)
    lost, noted = set(_lost(reading)), {_plain(note) for note in reading.notes}
    yield from (f"{kind} lost without a note" for kind in lost - noted)
    yield from (f"a note of {kind}, which is there" for kind in noted - lost)
    for piece in case.pieces():
        # The function's name stands in the tools as well; its arguments tell whether the call is there.
        there = piece.text in reading.text and piece.text != FUNCTION
        if piece.own and there and piece.text not in supervised:
            yield f"{piece.kind} is not supervised"
        if not piece.own and piece.text in supervised:
            yield "a prompt is supervised"
    for number, part in enumerate(reading.parts, 1):
        before, after = _around(reading, part)
        end = _end(reading.family, after)
        if end is None and number < len(reading.parts):
            yield "a turn before the last has no end"
        elif end is not None and case.name not in PLAIN and end not in ends(reading.family):
            yield f"a turn ends in {end}"
        if not any(piece.kind == "reasoning" for piece in case.pieces()) and THINKING.search(part):
            yield "markers of reasoning are supervised without reasoning"
        called = any(piece.kind == "call" and piece.text in part for piece in case.pieces())
        if not called and (left := _without_markers(reading.family, before).strip()):
            yield f"{left!r} before the content is supervised"


@cache
def ends(family: Family) -> frozenset[str | None]:
    """The markers that turns of plain contents end in."""
    plain = [readings(family)[name] for name in PLAIN]
    return frozenset(_end(family, _around(one, part)[1]) for one in plain for part in one.parts)


def _end(family: Family, after: str) -> str | None:
    """The last of the markers behind a turn's words."""
    return max(family.tokens, key=after.rfind) if any(token in after for token in family.tokens) else None


def _lost(reading: Reading) -> Iterator[str]:
    """What the row holds and the text lacks, named as notes name it."""
    for piece in reading.case.pieces():
        if piece.text not in reading.text and piece.text != FUNCTION:
            role = reading.case.messages[piece.number]["role"]
            yield {"content": f"{role} content", "call": "tool calls"}.get(piece.kind, piece.kind)
    if reading.case.tools and DESCRIPTION not in reading.text:
        yield "tools"
    if _end(reading.family, _around(reading, reading.parts[-1])[1]) is None:
        yield "end of the last turn"


def _plain(note: str) -> str:
    return note.removesuffix(" dropped").removesuffix(" of earlier turns").removeprefix("no ")


def _around(reading: Reading, part: str) -> tuple[str, str]:
    """What stands in a supervised text before the first and after the last of its pieces."""
    where = [
        (part.find(piece.text), part.find(piece.text) + len(piece.text))
        for piece in reading.case.pieces()
        if piece.own and piece.text in part
    ]
    if not where:
        return "", part
    return part[: min(start for start, _ in where)], part[max(end for _, end in where) :]


def _without_markers(family: Family, text: str) -> str:
    for token in sorted(family.tokens, key=len, reverse=True):
        text = text.replace(token, "")
    return THINKING.sub("", text)


def pattern(reading: Reading) -> str:
    """What is supervised, with words for what the messages say and the template's own text as it is."""
    turns = [_pattern(reading, part) for part in reading.parts]
    return turns[0] if len(set(turns)) == 1 else ", then ".join(turns)


def _pattern(reading: Reading, part: str) -> str:
    markers = "|".join(map(re.escape, sorted(reading.family.tokens, key=len, reverse=True)))
    found = sorted(
        (part.find(piece.text), piece) for piece in reading.case.pieces() if piece.own and piece.text in part
    )
    words: list[str] = []
    place = 0
    calls = [place for place, piece in found if piece.kind == "call"]
    for start, piece in found:
        if piece.kind != "call":
            words += _own_text(part[place:start], markers)
            words.append(piece.kind)
            place = start + len(piece.text)
    if calls:
        words.append("call")
        ends = [match.group() for match in re.finditer(markers, part[max(calls) :])]
        return " ".join([*words, *(f"`{token}`" for token in ends[-1:])])
    return " ".join([*words, *_own_text(part[place:], markers)])


def _own_text(text: str, markers: str) -> list[str]:
    """The template's own text, marker by marker, without white space."""
    pieces = re.split(f"({markers})", text) if markers else [text]
    return [f"`{piece.strip()}`" for piece in pieces if piece.strip()]


def agreement(reading: Reading, marked: list[str]) -> Iterator[str]:
    """Where what is supervised differs from TRL's mask of the same conversation, white space at the ends aside.

    TRL may mark more before a turn's first word (its header, an empty pair of reasoning markers): that is the
    template's own text.
    """
    if len(marked) != len(reading.parts):
        yield f"{len(marked)} turns in TRL's mask, {len(reading.parts)} here"
        return
    for own, theirs in zip(reading.parts, marked, strict=True):
        said = [_said(reading.case, part) for part in (own, theirs)]
        if said[0] != said[1]:
            yield f"{_listed(said[0])} here, {_listed(said[1])} in TRL's mask"
            continue
        (before, after), (before_theirs, after_theirs) = _around(reading, own), _around(reading, theirs)
        if not before_theirs.strip().endswith(before.strip()):
            yield f"{before.strip()!r} before the turn's words, {before_theirs.strip()!r} in TRL's mask"
        if after.strip() != after_theirs.strip():
            yield f"ends in {after.strip()!r}, in TRL's mask in {after_theirs.strip()!r}"
        elif own.removeprefix(before).strip() != theirs.removeprefix(before_theirs).strip():
            yield f"{own.strip()!r}, in TRL's mask {theirs.strip()!r}"


def _said(case: Case, part: str) -> list[str]:
    kinds = [piece.kind for piece in case.pieces() if piece.own and piece.text in part]
    return [kind for place, kind in enumerate(kinds) if kind not in kinds[:place]]


def _listed(kinds: list[str]) -> str:
    return " and ".join(kinds) or "nothing"


def template_takes(family: Family, case: Case) -> bool:
    """Whether transformers renders the conversation, in one of the forms in which templates want messages."""
    for form in forms(case.row().messages):
        try:
            encoder_of(family).tokenizer.apply_chat_template(form, tools=case.row().tools, tokenize=False)
        # A template is a program: it may raise anything.
        except Exception:
            continue
        return True
    return False


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same messages in other shapes.

    Content as text or parts, arguments as an object or a string, no content as "" or null, reasoning as it is named or
    as `thinking`.
    """
    given = []
    for parts, arguments, empty, thinking in product(
        (False, True), (json.loads, str), ("", None), (False, True)
    ):
        form = [_formed(message, parts, arguments, empty, thinking) for message in messages]
        if form not in given:
            given.append(form)
            yield form


def _formed(
    message: dict[str, Any], parts: bool, arguments: Callable, empty: str | None, thinking: bool
) -> dict[str, Any]:
    content = message["content"] or empty
    message = {**message, "content": [{"type": "text", "text": content or ""}] if parts else content}
    if thinking and "reasoning_content" in message:
        message["thinking"] = message.pop("reasoning_content")
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": arguments(_text(call))}}
            for call in message["tool_calls"]
        ]
    return message


def _text(call: dict[str, Any]) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments)
