"""Where a synthesis run stands, for whoever watches it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from gvendi_fast.synthesis.generators.requests import FINAL
from gvendi_fast.synthesis.generators.stored import StoredGenerator

if TYPE_CHECKING:
    from gvendi_fast.synthesis.loop.pool_numbers import PoolNumbers

# Stages in `Status.seconds` that run beside the others: the task's checks, and sketching, waited for or not.
BESIDE = ("checks", "sketching")


@dataclass
class Status:
    """Where a run stands.

    pool, seeds: rows now and at the start. accepted, rejected: candidates over all runs of the directory, the latter by
    stage. gvendi, start_gvendi: of the first gvendi_rows rows, which is the pool as gains know it (at most
    `accept.refresh` behind; all of it at the end), and of the seeds. requests: final answers; tokens: (prompt,
    completion) of them; cost: in the currency of the prices, None without. queued: candidates that are answered and not
    yet decided. seconds: where this run's time went, "answers" and "sketches" being waits for them; BESIDE: time of
    what runs beside that. stopped, why: the limit that ended the run, and in words. at_start, at_end: the scores of the
    seeds and of the pool, which a run computes once, when it ends; None before.
    """

    pool: int
    seeds: int
    target: int
    round: int
    clusters: int
    accepted: int
    rejected: dict[str, int]
    gvendi: float
    gvendi_rows: int
    start_gvendi: float
    requests: int
    tokens: tuple[int, int]
    cost: float | None
    queued: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    why: str = ""
    at_start: PoolNumbers | None = None
    at_end: PoolNumbers | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi synthesize --json` prints."""
        both = ((name, getattr(self, name)) for name in ("at_start", "at_end"))
        return {**asdict(self), **{name: numbers and numbers.to_dict() for name, numbers in both}}


@dataclass(frozen=True)
class Spent:
    """What all runs with a request store have asked for; fields as in Status."""

    requests: int
    tokens: tuple[int, int]
    cost: float | None

    @classmethod
    def of(cls, generator: StoredGenerator) -> Spent:
        """Summed up over the whole store, which takes seconds where it is large."""
        counts, tokens = generator.store.counts(), generator.store.tokens()
        requests = sum(counts.get(status, 0) for status in FINAL)
        return cls(requests, (tokens.prompt, tokens.completion), generator.cost())


class Watcher(Protocol):
    """Is told how a run goes, from the run's own thread."""

    def update(self, status: Status) -> None:
        """Another block is decided."""
