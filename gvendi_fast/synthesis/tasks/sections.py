"""Reading what a model wrote: clean text, <tagged> sections, the \\boxed{} answer. Every refusal has a reason.

Models wrap, number and apologise, so whatever stands around the sections is ignored; the sections themselves are
taken as they are or refused, never repaired.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gvendi_fast.data.rows import Reason, lone_surrogate

# Longest answer that is read, in characters; chains of thought of reasoning models stay far below it.
LONGEST = 200_000
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_THINK_END = "</think>"
# Boxes directly in a box that are opened; each costs a pass over the answer.
_NESTED = 8
_COUNTS = {2: "two", 3: "three"}


def clean(text: object, longest: int = LONGEST) -> str | Reason:
    """`text` with \\n line ends and without outer white space, or why it cannot become training data."""
    if not isinstance(text, str):
        return Reason("no answer" if text is None else f"the answer is a {type(text).__name__}, not text")
    if len(text) > longest:
        return Reason(f"answer of {len(text)} characters; at most {longest} are read")
    if lone_surrogate(text):
        return Reason("invalid Unicode: lone surrogate")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    control = _CONTROL.search(text)
    if control:
        return Reason(f"control character U+{ord(control.group()):04X}")
    return text.strip() or Reason("empty answer")


def without_thinking(text: str) -> str | Reason:
    """`text` behind a reasoning block (<think> ... </think>, its opening tag often missing), or all of it."""
    _, found, rest = text.rpartition(_THINK_END)
    if found:
        return rest.strip() or Reason(f"nothing after {_THINK_END}")
    return Reason("<think> is not closed") if text.startswith("<think>") else text


def answered_sections(
    answer: object, longest: int, names: Sequence[str], times: int = 1
) -> list[dict[str, str]] | Reason:
    """`sections` of a model's answer of at most `longest` characters, its thinking left out, or why it has none."""
    text = clean(answer, longest)
    text = text if isinstance(text, Reason) else without_thinking(text)
    return text if isinstance(text, Reason) else sections(text, names, times)


def sections(text: str, names: Sequence[str], times: int = 1) -> list[dict[str, str]] | Reason:
    """The sections <name>...</name> of `text`, each name once (`times` > 1: one to `times` groups, in this order).

    Tags are matched in any case; text outside of them is ignored. A section that is missing, repeated, empty, not
    closed or inside another one is a Reason.
    """
    tags = re.compile(f"<(/?)({'|'.join(map(re.escape, names))})>", re.IGNORECASE)
    found: list[tuple[str, str]] = []
    name, start = None, 0
    for tag in tags.finditer(text):
        closing, this = bool(tag.group(1)), tag.group(2).lower()
        if closing and name != this:
            return Reason(f"</{this}> without <{this}>")
        if not closing and name is not None:
            return Reason(f"<{name}> is not closed before <{this}>")
        if closing:
            content = text[start : tag.start()].strip()
            if not content:
                return Reason(f"empty <{this}>")
            found.append((this, content))
            name = None
        else:
            name, start = this, tag.end()
    if name is not None:
        return Reason(f"<{name}> is not closed")
    return _groups(found, names, times)


def _groups(found: list[tuple[str, str]], names: Sequence[str], times: int) -> list[dict[str, str]] | Reason:
    for name in names:
        count = sum(this == name for this, _ in found)
        if not count:
            return Reason(f"no <{name}>")
        if count > times:
            return Reason(f"{_COUNTS.get(count, count)} <{name}>")
    width = len(names)
    groups = [dict(found[i : i + width]) for i in range(0, len(found), width)]
    if any(set(group) != set(names) for group in groups):
        return Reason(f"sections are not in groups of {', '.join(f'<{name}>' for name in names)}")
    return groups


def boxed_answer(solution: str) -> str | Reason:
    """The content of the last \\boxed{} of a solution; a box that holds nothing but a box is opened again."""
    answer: str | Reason = Reason("no \\boxed answer")
    place = 0
    while opening := _BOXED.search(solution, place):
        end = _closing_brace(solution, opening.end())
        if end is None:
            return Reason("\\boxed is not closed")
        answer, place = solution[opening.end() : end].strip(), end + 1
    if isinstance(answer, Reason):
        return answer
    for _ in range(_NESTED):
        inner = _BOXED.match(answer)
        if inner is None or _closing_brace(answer, inner.end()) != len(answer) - 1:
            break
        answer = answer[inner.end() : -1].strip()
    if _BOXED.search(answer):
        return Reason("a \\boxed inside another expression in \\boxed")
    return answer or Reason("empty \\boxed")


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None
