"""The figures of a synthesis report; numbers only, drawn as `gvendi_fast.report.figures` draws all others."""

from __future__ import annotations

from typing import Any

import numpy as np

from gvendi_fast.report.figures import ACCENT, FAINT, GROUPS, INK, WARM, bars, both, plain_ticks, whole_ticks

# Points of a line and clusters that are drawn at most: more of them are no wider than a pixel.
POINTS, CLUSTERS = 400, 400
# Stages with a colour of their own; the others share the last.
STAGES = len(GROUPS) - 2


def growth_figure(data: dict[str, Any]) -> dict[str, str]:
    """G-Vendi by the candidates decided; the rounds' starts as lines, with the pool's rows on top."""

    def draw(ax, narrow: bool) -> None:
        points = _thinned(data["points"])
        x, y = ([point[name] for point in points] for name in ("decided", "gvendi"))
        marks = _thinned(data["rounds"], 40)
        for mark in marks:
            ax.axvline(mark["decided"], color=FAINT, linewidth=0.7, alpha=0.6)
        ax.plot(x, y, color=ACCENT, marker="o", markersize=4 if len(x) < 40 else 0)
        ax.set(xlabel="candidates decided", ylabel="G-Vendi of the pool")
        # A change by a hundredth must not fill the picture.
        low, high = min(y), max(y)
        room = max(0.08 * (high - low), 0.025 * high)
        ax.set(ylim=(low - room, high + room), xlim=(-0.02 * max(x[-1], 1), 1.02 * max(x[-1], 1)))
        plain_ticks(ax.xaxis)
        _rows_on_top(ax, points, 4 if narrow else 8)

    return both("synthesis-growth", draw)


def acceptance_figure(data: dict[str, Any]) -> dict[str, str]:
    """Shares of what became of the candidates in each window, stacked: accepted below, then the stages."""

    def draw(ax, narrow: bool) -> None:
        windows = data["windows"]
        decided = np.array([window["decided"] for window in windows])
        edges = np.concatenate([[0], decided.cumsum()])
        floor = np.zeros(len(windows))
        for colour, counts in _layers(data):
            top = floor + 100 * np.array(counts) / decided
            ax.stairs(top, edges, baseline=floor, fill=True, color=colour, linewidth=0)
            floor = top
        ax.set(xlabel="candidates decided", ylabel="% of the candidates", ylim=(0, 100), xlim=(0, edges[-1]))
        plain_ticks(ax.xaxis)

    return both("synthesis-acceptance", draw)


def clusters_figure(data: dict[str, Any]) -> dict[str, str]:
    """Rows of the clusters at the start, largest first, and what each has gained on top of them."""

    def draw(ax, narrow: bool) -> None:
        # Of equal clusters the first counts as the smallest, as in `sparse_clusters`.
        order = np.argsort(data["before"], kind="stable")[::-1]
        before, after = (_averaged(np.array(data[name])[order]) for name in ("before", "after"))
        edges = np.linspace(0.5, len(order) + 0.5, len(before) + 1)
        bars(ax, before, edges)
        ax.stairs(after, edges, baseline=before, fill=True, color=WARM)
        ax.set(xlabel="cluster, largest at the start first", ylabel="rows", ylim=(0, 1.08 * after.max()))
        ax.set_xlim(0.4, len(order) + 0.6)
        ax.axvline(len(order) - data["sparse"] + 0.5, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
        whole_ticks(ax.xaxis)
        plain_ticks(ax.yaxis)

    return both("synthesis-clusters", draw)


def colour_of(place: int) -> int:
    """Number of the page's colour for stage number `place`, the most frequent first; accepted rows have 0."""
    return min(place, STAGES) + 1


def _layers(data: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Colour and count in each window of the accepted candidates and of every stage, from below."""
    windows = data["windows"]
    layers = [(GROUPS[0], [window["accepted"] for window in windows])]
    for place, entry in enumerate(data["stages"]):
        counts = [window["rejected"].get(entry["stage"], 0) for window in windows]
        layers.append((GROUPS[colour_of(place)], counts))
    return layers


def _rows_on_top(ax, points: list[dict[str, Any]], most: int) -> None:
    """An axis on top that says how many rows the pool has, at the points nearest to so many even places."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    decided = np.array([point["decided"] for point in points])
    chosen = {int(abs(decided - place).argmin()) for place in np.linspace(0, decided[-1], most)}
    top = ax.secondary_xaxis("top")
    labels = {points[i]["decided"]: f"{points[i]['rows']:,}" for i in sorted(chosen)}
    top.xaxis.set_major_locator(FixedLocator(list(labels)))
    top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.get(value, "")))
    top.set_xlabel("rows of the pool")


def _thinned(points: list[Any], most: int = POINTS) -> list[Any]:
    """At most so many of the points, evenly, with the first and the last."""
    if len(points) <= most:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, most).round().astype(int)]


def _averaged(values: np.ndarray) -> np.ndarray:
    """Means of at most CLUSTERS parts of nearly equal length."""
    return np.array([part.mean() for part in np.array_split(values, min(len(values), CLUSTERS))])
