"""The figures of a report as SVG: numbers only, in the page's own colours and font, one for wide and one for narrow.

A text that comes from the data never gets here: what a user wrote is the page's to show, escaped and wrapped.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.in_use import InUse
from gvendi_fast.base.shown import shown

_drawing = InUse("settings of matplotlib", "draws with")
# Width and height in CSS pixels, at which a font unit is a pixel.
WIDE, NARROW = (840, 320), (340, 280)
# Variables of the page's style sheet, by the colours that matplotlib draws in their place.
INK, FAINT, ACCENT, SECOND, WARM = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", FAINT: "--faint", ACCENT: "--accent", SECOND: "--second", WARM: "--warm"}
GROUPS = [f"#0600{i:02x}" for i in range(9)]
_VARIABLES |= {colour: f"--group-{i}" for i, colour in enumerate(GROUPS)}
# One shape a colour, and the character that looks like it in a legend; the last is everything else.
MARKERS = "osD^vPX*."
SIGNS = "●■◆▲▼✚✖★•"

_STYLE = {
    "svg.fonttype": "none",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.formatter.use_mathtext": False,
    "lines.linewidth": 2,
}


def spectrum_figure(data: dict[str, Any]) -> dict[str, str]:
    """Eigenvalues by rank, both logarithmic, and the ranks that hold 50, 90 and 99 %."""

    from matplotlib.ticker import NullLocator

    def draw(ax, narrow: bool) -> None:
        values = data["eigenvalues"]
        dot = {"marker": "o", "markersize": 3} if len(values) < 40 else {}
        ax.plot(range(1, len(values) + 1), values, color=ACCENT, **dot)
        ax.set(xscale="log", yscale="log", xlabel="eigenvalue number", ylabel="share of the whole")
        # The tail drops steeply where the rank ends; what matters is above it.
        ax.set_ylim(max(values[-1], values[0] * 1e-6) / 2, 2 * values[0])
        ax.set_xlim(0.9, 1.15 * max(len(values), 2))
        plain_ticks(ax.xaxis)
        ax.yaxis.set_minor_locator(NullLocator())
        for level, entry in enumerate(data["effective"]):
            left = entry["count"] ** 2 > len(values)
            name = f"{100 * entry['share']:g} %: {entry['count']:,}"
            _marked(ax, entry["count"], 0.96 - 0.1 * level, name, left)

    return both("spectrum", draw)


def growth_figure(data: dict[str, Any]) -> dict[str, str]:
    """G-Vendi of subsets by their size, its band over draws, the interval of another draw, and the forecast."""

    def draw(ax, narrow: bool) -> None:
        points, ahead = data["points"], data["forecast"]
        n = [point["n"] for point in points]
        low, high = data["another_draw"]
        top = 1.15 * max(high, ahead["high"] if ahead else 0, *(point["high"] for point in points))
        ax.vlines(n[-1], low, high, color=WARM, linewidth=3)
        ax.fill_between(
            n, [p["low"] for p in points], [p["high"] for p in points], color=ACCENT, alpha=0.3, linewidth=0
        )
        ax.plot(n, [point["mean"] for point in points], color=ACCENT, marker="o", markersize=4)
        if ahead:
            line = {"color": SECOND, "linestyle": (0, (3, 3)), "linewidth": 1.5}
            ax.plot([n[-1], ahead["n"]], [points[-1]["mean"], ahead["value"]], **line)
            ax.vlines(ahead["n"], ahead["low"], ahead["high"], color=SECOND, linewidth=3)
            ax.plot([ahead["n"]], [ahead["value"]], color=SECOND, marker="D", markersize=6)
            words = {"textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 11}
            ax.annotate("forecast", (ahead["n"], ahead["high"]), (4, 4), **words)
        ax.set(xscale="log", xlabel="rows", ylabel="G-Vendi", ylim=(0, top))
        ax.set_xlim(n[0] / 1.15, (ahead["n"] if ahead else n[-1]) * 1.15)
        plain_ticks(ax.xaxis, n if len(n) < 3 else None)

    return both("growth", draw)


def surprisal_figure(data: dict[str, Any]) -> dict[str, str]:
    """Histogram of the surprisal, its mean marked."""

    def draw(ax, narrow: bool) -> None:
        bars(ax, data["counts"], data["edges"])
        ax.set(xlabel="surprisal in nats", ylabel="rows", ylim=(0, 1.2 * max(data["counts"])))
        left = data["mean"] > (data["edges"][0] + data["edges"][-1]) / 2
        _marked(ax, data["mean"], 0.96, f"mean {shown(data['mean'], '.2f')}", left)
        plain_ticks(ax.yaxis)

    return both("surprisal", draw)


def nearest_figure(data: dict[str, Any]) -> dict[str, str]:
    """Histogram of the cosine to the nearest other row, the limit of near-duplicates marked."""

    def draw(ax, narrow: bool) -> None:
        bars(ax, data["counts"], data["edges"])
        ax.set(xlabel="cosine to the nearest other row", ylabel="rows", ylim=(0, 1.2 * max(data["counts"])))
        _marked(ax, data["cosine"], 0.96, f"{data['cosine']:g}", True)
        plain_ticks(ax.yaxis)

    return both("nearest", draw)


def clusters_figure(data: dict[str, Any]) -> dict[str, str]:
    """Sizes of the clusters, largest first; the sparse half in another colour."""

    def draw(ax, narrow: bool) -> None:
        sizes = sorted(data["sizes"], reverse=True)
        large = len(sizes) - data["sparse"]
        edges = [i + 0.5 for i in range(len(sizes) + 1)]
        for part, colour in ((slice(0, large), ACCENT), (slice(large, None), WARM)):
            bars(ax, sizes[part], edges[part.start :][: len(sizes[part]) + 1], colour)
        ax.set(xlabel="cluster, largest first", ylabel="rows", xlim=(0.4, len(sizes) + 0.6))
        ax.set_ylim(0, 1.1 * max(sizes))
        if sizes[0] > 100 * max(sizes[len(sizes) // 2], 1):
            ax.set(yscale="log", ylim=(0.7, 1.5 * sizes[0]))
        whole_ticks(ax.xaxis)
        plain_ticks(ax.yaxis)
        if large:
            at = (large + 0.5, sizes[large])
            ax.annotate(
                "sparse half", at, (2, 5), textcoords="offset points", color=WARM, annotation_clip=False
            )

    return both("clusters", draw)


def map_figure(data: dict[str, Any]) -> dict[str, str]:
    """Points on the first two principal axes, a colour and a shape for each of the largest groups."""

    def draw(ax, narrow: bool) -> None:
        places = range(len(data["colours"]) + 1)
        # All other points are drawn under the groups, and large groups under small ones.
        for place in (places[-1], *places[:-1]):
            here = [i for i, colour in enumerate(data["colour"]) if colour == place]
            if here:
                rest = place == len(data["colours"])
                index = len(MARKERS) - 1 if rest else place
                ax.scatter(
                    [data["x"][i] for i in here],
                    [data["y"][i] for i in here],
                    # A dot is drawn at a quarter of the size of the other shapes.
                    s=(9 if narrow else 16) * (2.5 if rest else 1),
                    marker=MARKERS[index],
                    color=GROUPS[index],
                    alpha=0.6,
                    linewidths=0,
                )
        first, second = (f"{100 * share:.1f} %" for share in data["shares"])
        ax.set(xlabel=f"axis 1 ({first} of the variance)", ylabel=f"axis 2 ({second})")
        ax.margins(0.04)
        # Equal rows differ by rounding only, which must not look like a cloud.
        for limits, setter in ((ax.get_xlim(), ax.set_xlim), (ax.get_ylim(), ax.set_ylim)):
            if limits[1] - limits[0] < 1e-3:
                setter(-0.1, 0.1)

    return both("map", draw, wide=(840, 460), narrow=(340, 340))


_HALO: dict[str, Any] = {"bbox": {"facecolor": "#070707", "edgecolor": "none", "pad": 1.5}}
_VARIABLES["#070707"] = "--card"


def bars(ax, counts: list[int], edges: list[float], colour: str = ACCENT) -> None:
    """Filled bars without gaps: counts [n] between edges [n + 1]."""
    if len(counts):
        ax.stairs(counts, edges, fill=True, color=colour)


def _marked(ax, x: float, height: float, name: str, left: bool) -> None:
    """A dashed line across the picture with its name beside it, at a part of the height."""
    ax.axvline(x, color=WARM, linestyle=(0, (4, 3)), linewidth=1.2)
    ax.annotate(
        name,
        (x, height),
        (-5 if left else 5, 0),
        xycoords=ax.get_xaxis_transform(),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=11,
    )


def plain_ticks(axis, at: list[float] | None = None) -> None:
    """Ticks as whole numbers with separators (10,000), where a logarithmic axis would write 10^4."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 or value == 0 else "")
    )
    axis.set_minor_locator(NullLocator())
    if at:
        axis.set_major_locator(FixedLocator(at))


def whole_ticks(axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def both(
    name: str,
    draw: Callable[[Any, bool], None],
    wide: tuple[int, int] = WIDE,
    narrow: tuple[int, int] = NARROW,
) -> dict[str, str]:
    """A figure as two <svg> elements, "wide" and "narrow", of these sizes in CSS pixels.

    name: different from all others on the page.
    draw: called with the axes and whether they are the narrow ones.
    wide, narrow: the sizes.
    """
    return {
        kind: _svg(f"{name}-{kind}", draw, size, kind == "narrow")
        for kind, size in (("wide", wide), ("narrow", narrow))
    }


def plotting() -> Any:
    """matplotlib; raises GvendiError where it cannot be imported, as under an MPLBACKEND that it does not know."""
    try:
        import matplotlib
    except (ImportError, ValueError) as error:
        named = f" (MPLBACKEND is {os.environ['MPLBACKEND']!r})" if "MPLBACKEND" in os.environ else ""
        raise GvendiError(
            f"matplotlib, which draws the report's figures, cannot be imported{named}: {error}"
        ) from error
    return matplotlib


def _svg(name: str, draw: Callable[[Any, bool], None], size: tuple[int, int], narrow: bool) -> str:
    """One figure as an <svg> element; the same numbers give the same bytes, whatever a user's matplotlibrc says.

    Threads take turns. matplotlib's settings are the process's, so that what another thread draws with it by itself
    meanwhile may get ours.
    """
    matplotlib = plotting()
    from matplotlib.figure import Figure

    with _drawing.claimed([_drawing]), matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Names inside one page must differ from figure to figure.
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        ax = figure.add_subplot()
        if narrow:
            ax.locator_params(nbins=5)
        draw(ax, narrow)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline(stream.getvalue())


def _inline(text: str) -> str:
    """The <svg> element of a whole file, for a page: without head, metadata, sizes, fonts and unused names."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: (?:\S+ )*?([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    text = text.replace("xlink:href", "href")
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    return re.sub(r">\s+<", "><", text)
