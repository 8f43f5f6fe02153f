"""Text of data, models, endpoints and file systems as it may be shown: what a terminal obeys is spelled out."""

from __future__ import annotations

import re

# C0, DEL and C1 controls; the controls and marks of writing direction, which reorder what stands beside them; line and
# paragraph separators; the byte order mark; halves of surrogate pairs, which no stream takes. Joiners stay: scripts and
# emoji need them.
OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str, keep: str = "") -> str:
    r"""The text with each character that is obeyed rather than shown as its escape, such as \x1b or \u202e.

    keep: characters that stay, "\n\t" for a text of several lines. A backslash stays as it is, so this is for reading
    and not for reading back.
    """
    return OBEYED.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def message(text: str) -> str:
    """A printable message: its lines after the first are indented, so that no name in it passes for another message."""
    first, *others = printable(text, "\n\t").split("\n")
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in others)])


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
