"""Text and tables on a terminal: sentences wrap between words; numbers are never cut, long names lose their middle."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gvendi_fast.base.printable import printable
from gvendi_fast.base.printing import put

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Characters of a name before its middle is left out, and the least width of the column of names; names that differ in
# their middle alone are whole up to so many.
NAME, LEAST, WHOLE = 48, 12, 160


def short_names(names: Sequence[str], most: int = NAME) -> list[str]:
    """Different names as different printable words, of at most so many characters, both ends kept.

    "" is "(none)"; a name with blanks at an end is in quotes; names that look alike when they are cut are whole, and
    numbered where they are very long too.
    """
    plain = [_word(name) for name in names]
    cut = [_cut(word, most) for word in plain]
    alike = Counter(cut)
    shown = [
        short if alike[short] == 1 else _cut(word, WHOLE) for word, short in zip(plain, cut, strict=True)
    ]
    alike, seen = Counter(shown), Counter()
    for place, word in enumerate(shown):
        if alike[word] > 1:
            seen[word] += 1
            shown[place] = f"{word} #{seen[word]}"
    return shown


def _word(name: str) -> str:
    word = printable(name)
    return "(none)" if not word else word if word == word.strip() else f"'{word}'"


def _cut(word: str, most: int) -> str:
    half = (most - 1) // 2
    return word if len(word) <= most else f"{word[: most - 1 - half]}…{word[-half:]}"


def print_text(console: Console, text: Text) -> None:
    """A line of coloured text, broken where the terminal breaks it."""
    console.print(text, soft_wrap=True)


def say(console: Console, text: str, hanging: int = 0) -> None:
    """Print a sentence; nothing in it is markup. On a terminal it wraps between words, further lines indented.

    hanging: the indent of these. In a file or a pipe a sentence stays one line, which tools can search.
    """
    lines = [printable(text)]
    if console.is_terminal:
        lines = textwrap.wrap(
            lines[0],
            max(console.width, 2 * hanging + LEAST),
            subsequent_indent=" " * hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )
    for line in lines or [""]:
        put(line, console.file)


def headline(console: Console, text: str) -> None:
    """Print the line that a command is run for: its number in bold, two blanks, and what belongs to it."""
    from rich.text import Text

    line = Text(printable(text))
    line.stylize("bold", 0, line.plain.find("  "))
    console.print(line, soft_wrap=True)


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    *,
    names: int = 1,
    apart: int = 0,
) -> None:
    """Print rows of cells under headings; nothing in them is markup, and all is made printable.

    names: how many columns, from the first, hold names: these wrap, all others hold numbers and do not.
    apart: how many rows at the end stand below a line.
    Where the numbers need more than the terminal has, the lines are longer than the terminal is wide.
    """
    from rich.table import Table

    headings = [short_names([heading])[0] for heading in headings]
    # An encoding without a character has its escape, which is longer.
    encoding = console.encoding
    rows = [[_fit(printable(cell), encoding) for cell in row] for row in rows]
    headings = [_fit(heading, encoding) for heading in headings]
    columns = [[row[i] for row in rows] for i in range(len(headings))]
    table = Table()
    widths = _widths(headings, columns, names, console.width)
    for place, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        table.add_column(
            _text(heading), justify="left" if place < names else "right", overflow="fold", width=width
        )
    for place, row in enumerate(rows):
        if place == len(rows) - apart:
            table.add_section()
        table.add_row(*map(_text, row))
    before = console.width
    # A width that is given to print itself would not exceed the terminal's.
    console.width = max(before, sum(widths) + 3 * len(widths) + 1)
    console.print(table)
    console.width = before


def _text(cell: str) -> Text:
    from rich.text import Text

    return Text(cell)


def _fit(cell: str, encoding: str) -> str:
    return cell.encode(encoding, "backslashreplace").decode(encoding)


def _widths(
    headings: Sequence[str], columns: Sequence[Sequence[str]], names: int, terminal: int
) -> list[int]:
    """Width of each column: whole numbers, headings on one line where all of them fit, and names in what is left."""
    from rich.cells import cell_len

    longest = [max(map(cell_len, column), default=0) for column in columns]
    broken = [max(map(cell_len, heading.split()), default=0) for heading in headings]
    whole = [max(pair) for pair in zip(longest, map(cell_len, headings), strict=True)]
    least = [max(pair) for pair in zip(longest, broken, strict=True)]
    lines = 3 * len(headings) + 1
    for number in range(names):
        least[number] = min(least[number], max(LEAST, broken[number]))
    numbers = whole[names:] if sum(least[:names]) + sum(whole[names:]) + lines <= terminal else least[names:]
    left = max(terminal - lines - sum(numbers), 0) // max(names, 1)
    return [*(min(whole[i], max(least[i], left)) for i in range(names)), *numbers]
