"""A report as one HTML file without scripts or network, and its numbers as JSON beside it.

What a user wrote (texts, ids, groups, file names) is escaped where it is printed; a long one is cut, and a click opens
the rest. A content security policy forbids scripts and every request, so that not even a missed escape could run.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvendi_fast.base.differences import flat
from gvendi_fast.base.files import atomic_write, make_folder, two_outputs
from gvendi_fast.base.places import place
from gvendi_fast.base.printable import printable
from gvendi_fast.base.printing import json_text
from gvendi_fast.base.shown import number, shown
from gvendi_fast.report import figures
from gvendi_fast.vendi.centered import CenteredScore
from gvendi_fast.vendi.growth import LEAST_ROWS
from gvendi_fast.vendi.unlimited_k import NOTABLE

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

ASSETS = Path(__file__).parent / "templates"
# Groups shown from each end where there are more than twice as many.
SHOWN_GROUPS = 20
# Characters of a text before the reader opens it, and of a name before it is cut.
PREVIEW, NAME = 240, 80


def write_report(
    data: dict[str, Any],
    out: str | os.PathLike,
    *,
    title: str | None = None,
    date: datetime.date | None = None,
    force: bool = False,
) -> tuple[Path, Path]:
    """Write OUT.html and OUT.json from `report_data.report_data`; returns both paths.

    title: the heading (None: the run's name). date: printed in the HTML (None: today). The same data give the same
    bytes. Raises GvendiError for a name that does not end in .html, for files that exist, unless force, and where
    matplotlib cannot be imported.
    """
    paths = output_paths(out, force)
    write_files(data, render(data, title=title, date=date), *paths)
    return paths


def write_files(data: dict[str, Any], text: str, page: Path, numbers: Path) -> None:
    """Write a page's text and its data as JSON; each is there whole or as it was."""
    make_folder(page.parent)
    with atomic_write(numbers) as stream:
        stream.write(json_text(data, indent=1).encode() + b"\n")
    with atomic_write(page) as stream:
        stream.write(text.encode())


def output_paths(out: str | os.PathLike, force: bool = False) -> tuple[Path, Path]:
    """The page and its JSON; raises GvendiError as `write_report` does, before there is anything to write."""
    figures.plotting()
    return two_outputs(place(out), ".html", ".json", force)


def render(data: dict[str, Any], *, title: str | None = None, date: datetime.date | None = None) -> str:
    """The page of a report's data, as `write_report` writes it."""
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            data=data,
            title=title or f"Diversity of {Path(data['run']).name or data['run']}",
            date=printed(date),
            figures={
                name: figure(draw(data[name])) for name, draw in _FIGURES.items() if data[name] is not None
            },
            groups=_shown_groups(data["groups"]),
            signs=figures.SIGNS,
            least_rows=LEAST_ROWS,
            notable=NOTABLE,
            preview=PREVIEW,
        )
    )


def environment() -> jinja2.Environment:
    """Templates of pages: every value is escaped, control characters are shown, a missing name is an error."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    templates.filters |= {
        "count": lambda value: f"{value:,}",
        "rows": lambda n: f"{n:,} row{'s' * (n != 1)}",
        "number": number,
        "fixed": shown,
        "percent": lambda value: (
            f"{100 * value:.0f}\u00a0%" if value >= 0.0995 else f"{100 * value:.1f}\u00a0%"
        ),
        "width": lambda value: f"{100 * min(max(value, 0.0), 1.0):.2f}%",
        "flat": _settings,
        "short": lambda text, most=NAME: text if len(text) <= most else text[:most] + "…",
        "exp": math.exp,
        "missing": lambda of: CenteredScore(**of).note,
        # Not where it begins with a name such as n or K.
        "sentence": lambda text: f"{text if text[1] == ':' else text[0].upper() + text[1:]}.",
    }
    return templates


def printed(date: datetime.date | None) -> str:
    """The date to print on a page; today, in UTC, if none is given."""
    return (date or datetime.datetime.now(datetime.timezone.utc).date()).isoformat()


_FIGURES = {
    "growth": figures.growth_figure,
    "map": figures.map_figure,
    "clusters": figures.clusters_figure,
    "surprisal": figures.surprisal_figure,
    "duplicates": figures.nearest_figure,
    "spectrum": figures.spectrum_figure,
}


def figure(drawn: dict[str, str]) -> dict[str, Markup]:
    """A figure as `gvendi_fast.report.figures` makes it, for a template."""
    from markupsafe import Markup

    # Made of numbers alone, so it needs no escape.
    return {kind: Markup(svg) for kind, svg in drawn.items()}


def _shown_groups(groups: dict[str, Any] | None) -> dict[str, Any] | None:
    """Groups in the order of the picture: all, or those at the top and at the bottom; `top` scales the bars."""
    if groups is None:
        return None
    compared = [group for group in groups["groups"] if group["gvendi"] is not None]
    between = max(0, len(compared) - 2 * SHOWN_GROUPS)
    first = compared[:SHOWN_GROUPS] if between else compared
    tops = [group["high"] for group in compared]
    if groups["mixed"]:
        tops.append(groups["mixed"]["mean"])
    return {
        "field": groups["field"],
        "mixed": groups["mixed"],
        "first": first,
        "between": between,
        "last": compared[len(compared) - SHOWN_GROUPS :] if between else [],
        "compared": len(compared),
        "notes": groups["notes"],
        "top": max(tops, default=1.0),
    }


def _visible(value: Any) -> Any:
    """Strings made printable: HTML forbids controls, and others reorder a text; what is safe already stays safe."""
    return type(value)(printable(value, "\n\t")) if isinstance(value, str) else value


def _settings(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value), each level by its names."""
    names = sorted(flat(content).items(), key=lambda item: item[0].split("."))
    shown = ((name, value) for name, value in names if value != {})
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in shown]
