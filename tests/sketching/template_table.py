"""Turn the readings of stock chat templates into the table of docs/templates.md.

    python -m tests.sketching.template_table [--check]

What comes from a package that is not installed stays as it is. --check changes nothing and fails if the page differs
from the readings.
"""

from __future__ import annotations

import argparse
import re
import sys

from tests.places import ROOT
from tests.sketching.template_families import CASES, Family, families
from tests.sketching.template_readings import Reading, agreement, masked, pattern, present, readings

PAGE = ROOT / "docs" / "templates.md"
BEGIN, END = "<!-- templates: begin -->", "<!-- templates: end -->"
# Arguments as an object and as a string read the same, which a test says; one column is enough.
COLUMNS = {case.name: case.name for case in CASES if not case.name.endswith("string")}
COLUMNS["call, arguments as an object"] = "call"
HEAD = ["family", *COLUMNS.values(), "TRL's mask"]


def line_of(family: Family, old: str) -> str:
    """The family's line of the table; of the old one what cannot be found without TRL."""
    found = readings(family)
    plain = found[CASES[0].name]
    cells = [_cell(found[name], plain) for name in COLUMNS]
    if family.training is None:
        mask = "none"
    elif family.training_template() is None:
        mask = old.rpartition(" | ")[2].removesuffix(" |")
    else:
        mask = _mask(family, [found[case.name] for case in CASES])
    return _line([family.family, *cells, mask])


def _cell(reading: Reading, plain: Reading) -> str:
    if reading.refused is not None:
        reason = reading.refused.removeprefix("chat template refused the messages: ")
        return f"refused: {reason}"
    whole = pattern(reading)
    said = "same" if reading is not plain and whole == pattern(plain) else whole
    dropped = [note.removesuffix(" dropped") for note in reading.notes if note.endswith(" dropped")]
    others = [note for note in reading.notes if not note.endswith(" dropped")]
    return "; ".join([said, *([f"dropped: {', '.join(dropped)}"] if dropped else []), *others])


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
    whole = {family.family for family in present() if not family.training or family.training_template()}
    missing = [family.family for family in families() if family.family not in whole | old.keys()]
    if missing:
        sys.exit(f"{', '.join(missing)}: needs a package of the dev extra, which ships a template")
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for family in families():
        before = old.get(family.family, "")
        lines.append(line_of(family, before) if family.family in here else before)
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(map(_shown, cells)) + " |"


def _shown(cell: str) -> str:
    """A cell as HTML: markers hold bars, which would end it."""
    escaped = cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
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
