"""What a worker says of a work unit."""

from __future__ import annotations

from dataclasses import dataclass

DONE, ELSEWHERE, QUARANTINED = "done", "elsewhere", "quarantined"


@dataclass(frozen=True)
class Receipt:
    """What became of a work unit.

    outcome: "done": its part is written; "elsewhere": another worker has or had it; "quarantined": it is given up.
    rows, rejected: of the work unit; tokens: run through the proxy; seconds: that it took, with those it shared batches
        with.
    counted: the rows that the run's progress knows of already.
    error: of one that is given up, the last attempt's, in one line.
    """

    unit: int
    outcome: str
    worker: str = ""
    rows: int = 0
    rejected: int = 0
    tokens: int = 0
    seconds: float = 0.0
    counted: bool = False
    error: str = ""
