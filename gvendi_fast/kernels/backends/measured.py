"""The order of a GPU's backends, the fastest measured one first; measured.json is the record.

The record holds {compute capability: {GPU: {operation: {"milliseconds": {backend: {case: median}}, "measured":
{backend: commit, date and versions}}}}}. Only benchmarks/report/__main__.py writes it, from benchmarks/results.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Ranking:
    """Backends of one operation on one device, first choice first; `ratio` describes the measurement, None without."""

    names: tuple[str, ...]
    ratio: str | None = None


@functools.cache
def load(path: Path = RECORD) -> Mapping:
    """The record."""
    return json.loads(path.read_text())


def order(op: str, built_in: Sequence[str], gpu: str, capability: str, record: Mapping) -> Ranking:
    """The order of the backends `built_in` for `op` on a GPU of this name and capability (such as "9.0").

    Backends that were measured on the same cases are ordered by the geometric mean of their times over these cases;
    all others follow in the built-in order. Figures of this GPU are preferred to those of another one with the same
    capability. Where fewer than two backends were measured, the order is the built-in one.
    """
    gpus = record.get(capability, {})
    for name in sorted(gpus, key=lambda name: (name != gpu, name)):
        times = gpus[name].get(op, {}).get("milliseconds", {})
        timed = [backend for backend in built_in if backend in times]
        if len(timed) < 2:
            continue
        cases = set.intersection(*(set(times[backend]) for backend in timed))
        if not cases:
            continue
        mean = {b: math.exp(sum(math.log(times[b][c]) for c in cases) / len(cases)) for b in timed}
        first, second = sorted(timed, key=mean.__getitem__)[:2]
        ranked = sorted(timed, key=mean.__getitem__) + [b for b in built_in if b not in timed]
        ratio = f"{first} measured {mean[second] / mean[first]:.2f} times as fast as {second} on {name}"
        return Ranking(tuple(ranked), ratio)
    return Ranking(tuple(built_in))
