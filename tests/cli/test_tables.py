"""Tables of any width keep every number whole, every row told apart, and names as they are."""

import io
import re

import pytest
from rich.console import Console

from gvendi_fast.cli.tables import NAME, print_table, short_names

HEADINGS = ("source", "rows", "G-Vendi (all rows)", "share now", "95 % interval")
LONG = "gsm8k/" + "a very long name of a source " * 5


def printed(width, rows, **options):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(console, HEADINGS, rows, **options)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [10, 40, 60, 80, 200])
def test_numbers_are_neither_cut_nor_broken(width):
    rows = [
        (short_names([LONG])[0], "1,234,567", "1,024.00", "100.0 %", "1,000.12 to 1,024.99"),
        ("[bold]x[/bold]", "1", "1.00", "0.0 %", "0.99 to 1.01"),
    ]
    text = printed(width, rows)
    for row in rows:
        for number in row[1:]:
            assert re.search(rf"│ +{re.escape(number)} +│", text), text
    # Each row of the table has its numbers on one line.
    assert [line for line in text.splitlines() if "1,234,567" in line and "1,000.12 to 1,024.99" in line]
    assert "[bold]x" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_wide_tables_fit_a_terminal_that_has_the_room():
    assert max(map(len, printed(80, [("a", "1", "1.00", "1 %", "1 to 2")]).splitlines())) <= 80


def test_rows_apart_stand_below_a_line():
    lines = printed(80, [("a", "1", "2", "3", "4"), ("(all rows)", "1", "2", "3", "4")], apart=1).splitlines()
    assert lines[-3].startswith("├")


def test_long_names_keep_both_ends_and_stay_different():
    names = [LONG + "one", LONG + "two", "", "short"]
    shown = short_names(names)
    assert [len(name) <= NAME for name in shown] == [True] * 4
    assert shown[0].startswith("gsm8k/")
    assert shown[0].endswith("one")
    assert shown[2:] == ["(none)", "short"]
    # Names that differ in the middle alone are shown whole.
    middle = ["x" * 40 + letter + "y" * 40 for letter in "ab"]
    assert short_names(middle) == middle
