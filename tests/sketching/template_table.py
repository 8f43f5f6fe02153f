"""Turn the readings of stock chat templates into the table of docs/templates.md.

    python -m tests.sketching.template_table [--check]

Rows of families whose template comes from a package that is not installed stay as they are. --check changes nothing
and fails if the page differs from the readings.
"""

from __future__ import annotations

import argparse
import html
import re
import sys

from tests.places import ROOT
from tests.sketching.template_families import CASES, Family, families
from tests.sketching.template_readings import Reading, agreement, masked, pattern, present, readings

PAGE = ROOT / "docs" / "templates.md"
BEGIN, END = "<!-- templates: begin -->", "<!-- templates: end -->"
HEAD = ["family", "read with", *(case.name for case in CASES), "TRL's mask"]


def line_of(family: Family) -> list[str]:
    """The family's line of the table."""
    found = list(readings(family).values())
    plain = found[0]
    return [
        family.family,
        family.model,
        *(_cell(reading, plain) for reading in found),
        _mask(family, found),
    ]


def _cell(reading: Reading, plain: Reading) -> str:
    if reading.refused is not None:
        reason = reading.refused.removeprefix("chat template refused the messages: ")
        return f"refused: {reason}"
    whole = pattern(reading)
    said = "as one turn" if reading is not plain and whole == pattern(plain) else whole
    return "; ".join([said, *reading.notes])


def _mask(family: Family, found: list[Reading]) -> str:
    """How many of the cases that both read agree with TRL's mask."""
    if family.training is None:
        return "none"
    marked = masked(family)
    both = [reading for reading in found if reading.refused is None and marked[reading.case.name] is not None]
    same = sum(not list(agreement(reading, marked[reading.case.name])) for reading in both)
    return f"{same} of {len(both)}"


def table(old: dict[str, str]) -> str:
    """The table; a family that is not here keeps its old line."""
    here = {family.family for family in present()}
    missing = [family.family for family in families() if family.family not in here | old.keys()]
    if missing:
        sys.exit(
            f"no template of {', '.join(missing)}: install the dev extra, which has the packages that ship them"
        )
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for family in families():
        lines.append(_line(line_of(family)) if family.family in here else old[family.family])
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(map(_shown, cells)) + " |"


def _shown(cell: str) -> str:
    """A cell as HTML: markers hold bars, which would end it."""
    escaped = html.escape(cell, quote=False).replace("|", "&#124;")
    return re.sub("`([^`]*)`", r"<code>\1</code>", escaped)


def page(text: str) -> str:
    """The page with the table in place of what stands between its markers."""
    before, rest = text.split(BEGIN, 1)
    inside, after = rest.split(END, 1)
    old = {line.split(" | ")[0].removeprefix("| "): line for line in inside.strip().splitlines()[2:]}
    return f"{before}{BEGIN}\n{table(old)}\n{END}{after}"


def main() -> None:
    """Write the table into its page."""
    parser = argparse.ArgumentParser(prog="python -m tests.sketching.template_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    text = PAGE.read_text()
    wanted = page(text)
    if check and wanted != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} differs; run 'python -m tests.sketching.template_table'")
    if not check:
        PAGE.write_text(wanted)


if __name__ == "__main__":
    main()
