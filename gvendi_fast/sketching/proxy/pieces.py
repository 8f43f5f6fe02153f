"""Where a long text may be cut so that its pieces have the tokens of the whole, and what a token holds at most.

A tokenizer takes 130 to 280 bytes of memory for a byte of text, so a long text is tokenised in pieces. Two kinds of
tokenizer allow it, and are told by their settings; a text for any other one is tokenised whole.

Byte-level BPE behind a regular expression (GPT-2, Llama 3, Qwen, SmolLM): tokens lie inside the expression's matches.
If no alternative matches a letter with white space behind it, then no match holds a place between a letter and a space
or newline; if none looks behind, then the matches after that place do not depend on what stands before it. NFC does not
compose a space or a newline with what stands before.

BPE on the whole text with ▁ for spaces and bytes for unknown characters (Gemma): a token is a merge of two tokens, so
if no token of the vocabulary holds a letter with ▁ behind it, then no merge crosses such a place, and merges on its two
sides do not depend on one another.

Added tokens are found before all this. One that strips white space, looks at its neighbours, or holds such a place
itself, could see the cut.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Characters of one piece, about; a piece ends at the next place that allows it.
PIECE = 1 << 18
# Letters since Unicode 3 or earlier, so that every version of every library knows them as letters.
_LETTER = "A-Za-z\u0410-\u044f\u4e00-\u9fa5\uac00-\ud7a3"
_PLACE = re.compile(f"[{_LETTER}][ \n]")
_MARKED = re.compile(f"[{_LETTER}]\u2581")
_BOUNDARY_OF_WORDS = "\u2581"
# NFC composes at most four characters to one: no canonical decomposition is longer.
_MOST_COMPOSED = 4

_O200K_UPPER, _O200K_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Alternatives of these expressions; none matches a letter with white space behind it, none looks behind.
_LETTERS = {
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}*{_O200K_LOWER}+{_SHORT_FORMS}?",
}
_OTHERS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _SHORT_FORMS),
    *(r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}", r"\p{N}+"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}+{_O200K_LOWER}*{_SHORT_FORMS}?",
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
}


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a tokenizer's settings allow.

    can_cut: whether the places of `places` may be cut.
    longest: characters of a text without composed characters that one token covers at most, None where not known.
    composes: whether the tokenizer composes characters first.
    """

    can_cut: bool
    longest: int | None
    composes: bool = False

    def fewest_tokens(self, text: str, start: int, end: int) -> int:
        """At least so many tokens hold the characters from `start` to `end`; 0 where that is not known."""
        if self.longest is None:
            return 0
        most = self.longest * (_MOST_COMPOSED if self.composes and not text.isascii() else 1)
        return -(-(end - start) // most)

    def cuts(self, text: str, edges: Sequence[int] = ()) -> list[int]:
        """Places that cut `text` into pieces of about PIECE characters, fewer where it has no such place.

        edges: ascending; no cut stands right before one, since a tokenizer's post-processor may trim the space of a
        text's first token from its offsets, or not.
        """
        return list(self._cuts(text, edges)) if self.can_cut else []

    def _cuts(self, text: str, edges: Sequence[int]) -> Iterator[int]:
        start = 0
        while len(text) - start > PIECE and (found := _PLACE.search(text, start + PIECE)):
            place = start = found.start() + 1
            edge = bisect_left(edges, place + 1)
            if edge == len(edges) or edges[edge] != place + 1:
                yield place


_WHOLE = Pieces(False, None)


def pieces_of(tokenizer: Any) -> Pieces:
    """What the settings of a fast tokenizer, or the one behind it, allow; one of no known kind is left whole."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    # Parts written in Python have no settings, and to_str would raise.
    if any("Custom" in repr(part) for part in (backend.normalizer, backend.pre_tokenizer)):
        return _WHOLE
    settings = json.loads(backend.to_str())
    model, added = settings["model"], settings["added_tokens"]
    if (
        model["type"] != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
        or any(_PLACE.search(token["content"]) for token in added)
    ):
        return _WHOLE
    vocabulary = model["vocab"]
    steps = _steps(settings["pre_tokenizer"], "pretokenizers")
    normal = _steps(settings["normalizer"], "normalizers")
    if _is_byte_level(steps) and all(step["type"] == "NFC" for step in normal):
        # Its tokens spell each byte with one character; a byte that is no token is left out of every one.
        longest = max(max(map(len, vocabulary)), *(len(t["content"].encode()) for t in added), 1)
        is_complete = all(character in vocabulary for character in _byte_characters())
        return Pieces(True, longest if is_complete else None, composes=bool(normal))
    if _is_marked(normal, steps) and model.get("byte_fallback"):
        if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
            return _WHOLE
        longest = max(max(map(len, vocabulary)), *(len(t["content"]) for t in added), 1)
        return Pieces(not any(map(_MARKED.search, vocabulary)), longest)
    return _WHOLE


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return (
        [step for each in part[inner] for step in _steps(each, inner)]
        if part["type"] == "Sequence"
        else [part]
    )


def _is_byte_level(steps: list[dict[str, Any]]) -> bool:
    """Whether the steps are splits that are known, one of which ends between a letter and a space, then bytes."""
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    ends = steps[-1]["use_regex"]
    for step in steps[:-1]:
        if step["type"] == "Digits":
            continue
        pattern = step.get("pattern", {}).get("Regex")
        if step["type"] != "Split" or pattern is None or step["behavior"] != "Isolated" or step["invert"]:
            return False
        alternatives = set(_alternatives(pattern))
        if not alternatives <= _LETTERS | _OTHERS:
            return False
        ends = ends or bool(alternatives & _LETTERS and r"\s+" in alternatives)
    return ends


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a regular expression: its parts between bars that are in no bracket."""
    found, level, in_class, place = [""], 0, False, 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            character = pattern[place : place + 2]
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            level += 1 if character == "(" else -1
        elif character == "|" and level == 0:
            found.append("")
            place += 1
            continue
        found[-1] += character
        place += len(character)
    return found


def _is_marked(normal: list[dict[str, Any]], steps: list[dict[str, Any]]) -> bool:
    """Whether spaces become ▁ and nothing splits the text (a split at spaces finds none then)."""
    replaces = [{"type": "Replace", "pattern": {"String": " "}, "content": _BOUNDARY_OF_WORDS}]
    return normal == replaces and all(
        step["type"] == "Split" and step["pattern"] == {"String": " "} for step in steps
    )


def _byte_characters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()
