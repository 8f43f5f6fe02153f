"""What a terminal obeys is shown escaped; what people write stays."""

import unicodedata

import pytest

from gvendi_fast.base.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]8;;http://a\x07link\x1b]8;;\x07", r"\x1b]8;;http://a\x07link\x1b]8;;\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\x08c\x7f", r"a\rb\x08c\x7f"),
        ("user\u202etxt.exe", r"user\u202etxt.exe"),
        ("\u2066x\u2069\u200f", r"\u2066x\u2069\u200f"),
        ("one\ntwo\tthree", r"one\ntwo\tthree"),
        ("\ud800", r"\ud800"),
        ("[/INST] [bold]x[/bold] <b>&amp;", "[/INST] [bold]x[/bold] <b>&amp;"),
        ("naïve 北京 عربي 👩\u200d💻", "naïve 北京 عربي 👩\u200d💻"),
    ],
)
def test_escaped(text, shown):
    assert printable(text) == shown


def test_lines_of_a_text_may_stay():
    assert printable("a\n\tb\x1b\r\n", keep="\n\t") == "a\n\tb\\x1b\\r\n"


def test_every_control_and_direction_of_unicode():
    """All of category Cc, and every character whose bidirectional class embeds, overrides, isolates or marks."""
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    obeyed = [
        c
        for c in map(chr, range(0x110000))
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in directions
    ]
    assert len(obeyed) > 2000
    assert all(printable(c) != c for c in obeyed)
    assert printable("".join(obeyed)).isascii()
