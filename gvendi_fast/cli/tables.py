"""Text and tables on a terminal: sentences wrap between words; numbers are never cut, long names lose their middle."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Characters of a name before its middle is left out, and the least width of the column of names.
NAME, LEAST = 48, 12


def short_names(names: Sequence[str], most: int = NAME) -> list[str]:
    """Names of at most so many characters, both ends kept; whole where two would look alike, "(none)" for ""."""
    half = (most - 1) // 2
    cut = [name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}" for name in names]
    shown = [short if cut.count(short) == 1 else name for name, short in zip(names, cut, strict=True)]
    return [name or "(none)" for name in shown]


def say(console: Console, text: str, hanging: int = 0) -> None:
    """Print a sentence; nothing in it is markup. On a terminal it wraps between words, further lines indented.

    hanging: the indent of these. In a file or a pipe a sentence stays one line, which tools can search.
    """
    if console.is_terminal:
        text = "\n".join(
            textwrap.fill(
                line,
                max(console.width, 2 * hanging + LEAST),
                subsequent_indent=" " * hanging,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for line in text.split("\n")
        )
    console.print(text, markup=False, soft_wrap=True)


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    *,
    names: int = 1,
    apart: int = 0,
) -> None:
    """Print rows of cells under headings; nothing in them is markup.

    names: how many columns, from the first, hold names: these wrap, all others hold numbers and do not.
    apart: how many rows at the end stand below a line.
    Where the numbers need more than the terminal has, the lines are longer than the terminal is wide.
    """
    from rich.table import Table
    from rich.text import Text

    columns = [[row[i] for row in rows] for i in range(len(headings))]
    table = Table()
    widths = _widths(headings, columns, names, console.width)
    for place, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        table.add_column(
            Text(heading), justify="left" if place < names else "right", overflow="fold", width=width
        )
    for place, row in enumerate(rows):
        if place == len(rows) - apart:
            table.add_section()
        table.add_row(*map(Text, row))
    before = console.width
    # A width that is given to print itself would not exceed the terminal's.
    console.width = max(before, sum(widths) + 3 * len(widths) + 1)
    console.print(table)
    console.width = before


def _widths(
    headings: Sequence[str], columns: Sequence[Sequence[str]], names: int, terminal: int
) -> list[int]:
    """Width of each column: whole numbers, headings on one line where all of them fit, and names in what is left."""
    longest = [max(map(len, column), default=0) for column in columns]
    broken = [max(map(len, heading.split())) for heading in headings]
    whole = [max(pair) for pair in zip(longest, map(len, headings), strict=True)]
    least = [max(pair) for pair in zip(longest, broken, strict=True)]
    lines = 3 * len(headings) + 1
    for number in range(names):
        least[number] = min(least[number], max(LEAST, broken[number]))
    numbers = whole[names:] if sum(least[:names]) + sum(whole[names:]) + lines <= terminal else least[names:]
    left = max(terminal - lines - sum(numbers), 0) // max(names, 1)
    return [*(min(whole[i], max(least[i], left)) for i in range(names)), *numbers]
