"""The numbers of one set of rows: what score, compare, report and a synthesis run say of it, the same everywhere.

Beside G-Vendi and the interval of another draw stand what unlimited K would make of it, its value without the mean of a
reference (centred), and how much of the rows lies in one direction. Each is defined in `gvendi_fast.vendi`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gvendi_fast.base.unit_length import Rows
from gvendi_fast.vendi.centered import Centered, RowMean, centered
from gvendi_fast.vendi.diagnosis import Diagnosis, diagnose
from gvendi_fast.vendi.jackknife import jackknife
from gvendi_fast.vendi.state import VendiState
from gvendi_fast.vendi.unlimited_k import UnlimitedK, unlimited_k

# Reads all rows of a set, block by block; it is called once for each pass over them.
Blocks = Callable[[], Iterable[Rows]]


@dataclass(frozen=True, eq=False)
class SetNumbers:
    """What n rows score, and what limits it.

    gvendi: exp of the entropy of the unit rows' second moment; it grows with n.
    low, high: the interval, at `level`, of the G-Vendi of another n rows of the same source.
    entropy: in nats.
    n: rows.
    dim: K.
    level: of `low` and `high`.
    unlimited_k: what the exact gradients of these rows would score.
    centered: the value without the reference's mean.
    diagnosis: what one direction does to the score.
    state, mean: of these rows.
    """

    gvendi: float
    low: float
    high: float
    entropy: float
    n: int
    dim: int
    level: float
    unlimited_k: UnlimitedK
    centered: Centered
    diagnosis: Diagnosis
    state: VendiState
    mean: RowMean

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without state and mean."""
        plain = {name: getattr(self, name) for name in ("gvendi", "low", "high", "entropy", "n", "dim", "level")}
        return {
            **plain,
            "unlimited_k": self.unlimited_k.to_dict(),
            "centered": self.centered.to_dict(),
            "diagnosis": self.diagnosis.to_dict(),
        }


def set_numbers(
    blocks: Blocks,
    dim: int,
    *,
    spec: dict | None = None,
    reference: RowMean | None = None,
    level: float = 0.95,
) -> SetNumbers:
    """The numbers of rows that `blocks()` reads: three passes over them, and memory of a few matrices K x K.

    spec: of the rows.
    reference: whose mean the centred value leaves out (None: the rows' own).
    level: of the interval.
    Raises GvendiError where there is no row, and for a reference of another spec.
    """
    state, mean = VendiState(dim, spec), RowMean(dim, spec)
    for rows in blocks():
        state.update(rows)
        mean.update(rows)
    return numbers_of(state, mean, blocks, reference=reference, level=level)


def numbers_of(
    state: VendiState, mean: RowMean, blocks: Blocks, *, reference: RowMean | None = None, level: float = 0.95
) -> SetNumbers:
    """As `set_numbers`, of rows whose state and mean are there already: two passes."""
    interval = jackknife(state, blocks(), level)
    return SetNumbers(
        gvendi=interval.value,
        low=interval.low,
        high=interval.high,
        entropy=max(state.entropy(), 0.0),
        n=state.n,
        dim=state.dim,
        level=level,
        unlimited_k=unlimited_k(state, level=level),
        centered=centered(blocks(), mean if reference is None else reference, state.spec),
        diagnosis=diagnose(state, mean),
        state=state,
        mean=mean,
    )
