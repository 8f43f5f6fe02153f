"""The figures of a meter: what they are called, and their values from what the meter holds.

surprisal   -z^T (ln Sigma) z against the window; its mean over all rows of the window is H_1 (docs/score.md)
gain        H_1 with a row less H_1 without it; of a source: H_1 of the window less H_1 of the window without it
similarity  mean of cos^2 over pairs of different samples: the same in expectation for any number of samples
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.integrations.meter_moments import Moment
from gvendi_fast.integrations.meter_snapshot import Snapshot

# In the order of the result.
FIGURES = ("batch", "novelty", "norms", "window", "average", "sources", "source_gain")
# Without one spectrum [K, K] a source.
USUAL = FIGURES[:-1]
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class SourceFigures:
    """One source in the window.

    n: its samples.
    share: of the window's samples.
    gvendi: its own G-Vendi of order 1, at most n: compare it at equal n only.
    similarity: mean squared cosine of two different samples of it, which does not depend on n; None for one sample.
    surprisal: mean over its samples against the whole window, in nats; the shares' mean is the window's H_1.
    gain: H_1 of the window less H_1 of the window without the source, in nats.
    """

    n: int
    share: float
    gvendi: float
    similarity: float | None
    surprisal: float
    gain: float


def check_figures(figures: Iterable[str] | None, name: str) -> tuple[str, ...]:
    """The names of figures to compute, in the order of the result."""
    if figures is None:
        return USUAL
    asked = (figures,) if isinstance(figures, str) else tuple(figures)
    unknown = [figure for figure in asked if figure not in FIGURES]
    if unknown:
        raise GvendiError(f"{name} holds {unknown[0]!r}; wanted some of {', '.join(FIGURES)}")
    return tuple(figure for figure in FIGURES if figure in asked)


def check_orders(orders: Sequence[float], name: str) -> tuple[float, ...]:
    """Orders of G-Vendi."""
    asked = tuple(orders) if isinstance(orders, Iterable) else (orders,)
    for q in asked:
        if isinstance(q, bool) or not isinstance(q, int | float) or not q > 0:
            raise GvendiError(
                f"{name} holds {q!r}; wanted orders above 0, such as (1, 2); 1 is von Neumann's entropy"
            )
    return tuple(map(float, asked))


def values(snapshot: Snapshot, figures: tuple[str, ...], orders: tuple[float, ...]) -> dict[str, float]:
    """{name: value}; what cannot be said yet, such as of a window before the first batch, is not there."""
    counts = snapshot.counts
    found: dict[str, float] = {}
    if "batch" in figures:
        found |= _scores("batch", snapshot.batch, orders)
    if "novelty" in figures and snapshot.novelty is not None:
        found["surprisal"], found["gain"] = snapshot.novelty
    if "norms" in figures and len(snapshot.norms):
        for name, share in QUANTILES.items():
            found[f"gradient_norm/{name}"] = float(np.quantile(snapshot.norms, share))
    if "window" in figures:
        found |= _scores("window", snapshot.window, orders)
        found |= _similarity("window", snapshot.window)
    if "average" in figures and (average := snapshot.average_moment) is not None:
        scores = _scores("average", average, orders)
        found |= scores | {"samples/average": snapshot.average.effective}
    for name, source in snapshot.sources.items() if {"sources", "source_gain"} & {*figures} else ():
        if "sources" in figures:
            found |= _scores(f"source/{name}", source, orders)
            found[f"share/source/{name}"] = source.n / snapshot.window.n
            found[f"surprisal/source/{name}"] = snapshot.surprisal_of(name)
            found |= _similarity(f"source/{name}", source)
        if "source_gain" in figures:
            found[f"gain/source/{name}"] = source_gain(snapshot, name)
    return found | {
        "samples/seen": float(counts.seen),
        "samples/zero": float(counts.zero),
        "samples/non_finite": float(counts.non_finite),
    }


def _scores(of: str, moment: Moment, orders: tuple[float, ...]) -> dict[str, float]:
    found = {}
    if moment.n:
        for q in orders:
            found[f"gvendi/{of}" if q == 1 else f"gvendi_q{q:g}/{of}"] = math.exp(moment.entropy(q))
    return found | {f"samples/{of}": float(moment.n)}


def _similarity(of: str, moment: Moment) -> dict[str, float]:
    similarity = moment.similarity()
    return {} if similarity is None else {f"similarity/{of}": similarity}


def source_gain(snapshot: Snapshot, name: str) -> float:
    """H_1 of the window less H_1 without the source; H_1 of no rows counts as 0."""
    rest = snapshot.without(name)
    return snapshot.window.entropy() - (rest.entropy() if rest.n else 0.0)


def source_figures(snapshot: Snapshot) -> dict[str, SourceFigures]:
    """All figures of every source, by name."""
    return {
        name: SourceFigures(
            n=source.n,
            share=source.n / snapshot.window.n,
            gvendi=math.exp(source.entropy()),
            similarity=source.similarity(),
            surprisal=snapshot.surprisal_of(name),
            gain=source_gain(snapshot, name),
        )
        for name, source in snapshot.sources.items()
    }
