"""Tables of choosing data while training: gain_sampler.json and training_series.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.report.gpu import MISSING

Table = Callable[[list[str], list[list[str]]], str]


def _mean(runs: list[dict], name: str) -> float:
    return float(np.mean([run[name] for run in runs]))


def sampler_line(found: dict[str, Any]) -> str:
    """What was compared."""
    if not found.get("compared"):
        return f"`GainSampler` against random sampling: {MISSING}."
    settings, pool = found["settings"], found["pool"]
    parts = ", ".join(f"{name} {count:,}" for name, count in pool.items())
    random, gain = found["runs"]["random"], found["runs"]["gain"]
    rows = sum(pool.values())
    return (
        f"`GainSampler` (m = {settings['m']}, window {settings['window']}, K = {settings['dim']}) against random "
        f"sampling: {settings['steps']} steps of {settings['batch']} rows of a pool of {rows:,} ({parts}; "
        f"{found['different texts of the pool']:,} different texts), student `{settings['student']}`, proxy "
        f"`{settings['proxy']}` as it was before, {len(gain)} seeds. Trained on, random and gain: "
        f"{_mean(random, 'different texts'):.0f} and {_mean(gain, 'different texts'):.0f} different texts, "
        f"{_mean(random, 'tokens'):,.0f} and {_mean(gain, 'tokens'):,.0f} tokens, G-Vendi "
        f"{_mean(random, 'gvendi of the rows'):.1f} and {_mean(gain, 'gvendi of the rows'):.1f}. Choosing took "
        f"{100 * _mean(gain, 'seconds of choosing') / _mean(gain, 'seconds'):.1f} % of training's processor time, "
        "beside the sketches made beforehand. Loss in nats per token of the completions; the interval of 95 % is "
        "Student's, of the paired differences over seeds."
    )


def sampler_table(found: dict[str, Any], table: Table) -> str:
    """Loss by held-out set: before, random, gain, and the difference with its interval."""
    rows = []
    for name, difference in found.get("compared", {}).items():
        random, gain = ([run["loss"][name] for run in found["runs"][arm]] for arm in ("random", "gain"))
        wins = sum(a < b for a, b in zip(gain, random, strict=True))
        rows.append(
            [
                f"{name} ({found['held out'][name]:,} rows)",
                f"{found['loss before'][name]:.3f}",
                f"{np.mean(random):.3f}",
                f"{np.mean(gain):.3f}",
                f"{difference['difference']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})",
                f"{wins} of {len(gain)}",
            ]
        )
    head = ["held out", "before", "random", "gain", "gain less random", "seeds in which gain is lower"]
    return table(head, rows) if rows else ""


def series_line(found: dict[str, Any]) -> str:
    """What the run was."""
    if not found:
        return f"Series by source of a training run: {MISSING}."
    settings, rarely = found["settings"], ""
    if set(found["watched"]) - {"tap", "tiny"}:
        every = settings["every"]
        rarely = (
            f" (others than `tiny`: one batch in {every}, in a window of {settings['window of others']:,})"
        )
    return (
        f"Series by source: `{settings['model']}` trained for {settings['steps']} steps of {settings['batch']} rows on "
        f"five sources of as many rows, of which one is {settings['repeated']} rows {settings['times']} times each. "
        f"At the end of the run, in a window of {settings['window']:,} rows, K = {settings['dim']}, of the model's own "
        f"gradients (tap) and of frozen proxies over the same batches{rarely}"
        "; the mean squared cosine does not depend on n."
    )


def series_table(found: dict[str, Any], table: Table) -> str:
    """The sources at the end of the run, by what looked at them."""
    rows = [
        [
            name,
            source,
            f"{figures['n']:,}",
            f"{figures['gvendi']:.1f}",
            f"{figures['similarity']:.3f}",
            f"{figures['surprisal']:.2f}",
            f"{figures['gain']:+.3f}",
        ]
        for name, watched in found.get("watched", {}).items()
        for source, figures in watched["last"].items()
    ]
    head = ["gradients of", "source", "n", "G-Vendi", "mean squared cosine", "surprisal, nats", "gain, nats"]
    return table(head, rows) if rows else ""
