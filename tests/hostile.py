"""Names that strangers give to groups, rows, fields and files, and what no output may hold of them."""

import re

from gvendi_fast.base.printable import OBEYED

MARKUP = ("[/INST]", "[code]", "[bold]x[/bold]", "[link=http://x]y[/link]", ":smile:", "[/]", "\\[")
OBEYED_NAMES = (
    "\x1b[5;31mESC",
    "\x1b]8;;http://x.example\x07OSC 8\x1b]8;;\x07",
    "\x1b]0;title\x1b\\",
    "\x9b5;31mC1",
    "\u202eright to left\u202c",
    "\u2066isolate\u2069",
    "two\nlines\rback\ttab",
    "bell\x07 delete\x7f null\x00",
    "error: \x1b[2K\rforged",
    "\u2028separator",
)
TEMPLATES = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}",
    "$\\frac{1}{2$",
    "%s %d %",
    "{0} {x!r}",
    "北京 🎲",
)
ODD = ("", "   ", " x", "x", "x" * 10_000, "x" * 5_000 + "y" + "x" * 5_000)
NAMES = (*MARKUP, *OBEYED_NAMES, *TEMPLATES, *ODD)
# What a file system takes: no slash, no null, at most 255 bytes. The last is no UTF-8.
FILE_NAMES = (
    *(name for name in (*MARKUP, *OBEYED_NAMES, *TEMPLATES) if not re.search(r"[/\x00]", name)),
    "caf\udce9",
)
# What rich itself writes to a terminal: colours, and moves of the cursor of live tables and bars.
_OWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def obeyed(text: str, is_terminal: bool = False) -> list[str]:
    """What a terminal would obey in an output that shows NAMES, rich's own sequences left out."""
    found = [name for name in OBEYED_NAMES if name in text]
    plain = _OWN.sub("", text).replace("\r", "") if is_terminal else text
    return found + [match[0] for match in OBEYED.finditer(plain) if match[0] != "\n"]
