"""Run directory -> score: G-Vendi with its interval, and groups compared at equal n."""

from __future__ import annotations

import hashlib
import heapq
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvendi_fast.errors import GvendiError
from gvendi_fast.proxy import Proxy, load_proxy
from gvendi_fast.sketching import Progress, Settings, sketch_corpus
from gvendi_fast.store import RunDirectory
from gvendi_fast.vendi import VendiState, gvendi, jackknife

MAX_GROUPS = 10_000
# Groups below this many rows would drag the equal n of all others down to theirs.
MIN_GROUP_ROWS = 32
# Rows of the groups held in memory at once.
GROUP_BYTES = 1 << 30


@dataclass(frozen=True)
class GroupScore:
    """G-Vendi of n rows drawn from a group's `rows`; None for a group too small to compare."""

    gvendi: float | None
    n: int
    rows: int


@dataclass(frozen=True)
class Score:
    """The diversity of a corpus.

    gvendi: exp of the entropy (nats) of the normalised sketches' covariance; grows with n. gvendi_corrected and
    ci95: the estimate for unlimited data of the same kind and its 95 % interval (jackknife). tokens: all tokens
    of the accepted rows. seconds and tokens_per_second: of this run; None when everything was there already.
    rejected: rows that could not be scored. by: groups at equal n. coverage: share of the proxy's parameters
    sketched. spec: what the sketches depend on. units: (done, total) work units.
    """

    gvendi: float
    gvendi_corrected: float
    ci95: tuple[float, float]
    entropy: float
    n: int
    dim: int
    tokens: int
    seconds: float | None
    tokens_per_second: float | None
    rejected: int
    by: dict[str, GroupScore]
    coverage: float
    spec: dict[str, Any]
    units: tuple[int, int | None]

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi score --json` prints."""
        result = {name: value for name, value in vars(self).items() if name != "units"}
        return {**result, "ci95": list(self.ci95), "by": {k: vars(v) for k, v in self.by.items()}}


def score(
    data: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    proxy: str | Proxy = "Qwen/Qwen2.5-0.5B-Instruct",
    out: str | os.PathLike | None = None,
    settings: Settings | None = None,
    by: str | None = None,
    progress: Progress | None = None,
) -> Score:
    """Sketch a corpus and score it.

    data: files, folders or globs of JSON lines or Parquet. proxy: "tiny", a local folder, a hub name, or a
    loaded Proxy. out: a run directory that is kept and can be resumed (without it a temporary one is used).
    by: a field whose values make groups. Raises GvendiError for what cannot be used.
    """
    proxy = load_proxy(proxy) if isinstance(proxy, str) else proxy
    settings = settings or Settings()
    if by is not None and settings.fields.by != by:
        fields = type(settings.fields)(**{**vars(settings.fields), "by": by})
        settings = type(settings)(**{**vars(settings), "fields": fields})
    if out is not None:
        return _sketch_and_score(data, out, proxy, settings, progress)
    with tempfile.TemporaryDirectory(prefix="gvendi-") as folder:
        return _sketch_and_score(data, os.path.join(folder, "run"), proxy, settings, progress)


def _sketch_and_score(data, out, proxy: Proxy, settings: Settings, progress: Progress | None) -> Score:
    clock = _Clock(progress)
    run = sketch_corpus(data, out, proxy, settings, clock)
    return score_run(run, by=settings.fields.by, seconds=clock.seconds, fresh_tokens=clock.tokens)


def score_run(
    run: RunDirectory,
    *,
    by: str | None = None,
    seconds: float | None = None,
    fresh_tokens: int = 0,
    seed: int = 0,
) -> Score:
    """Score what a run directory holds, complete or not; memory is bounded by one part and K x K numbers.

    by: must be the field that the directory was sketched with. seed: of the draws of rows from groups.
    """
    check_by(run, by)
    dim = run.spec["sketch"]["dim"]
    state, tokens = VendiState(dim, spec=run.spec), 0
    for part in run.iterate(["sketch", "length"]):
        state.update(part.sketches)
        tokens += int(part.length.sum())
    rejected = sum(1 for _ in run.rejected())
    if state.n == 0:
        raise GvendiError(
            f"no row of '{run.path}' could be scored, {rejected} were rejected; see parts/rejected-*.jsonl there"
        )
    interval = jackknife(state, (part.sketches for part in run.iterate(["sketch"])))
    coverage = run.spec["coverage"]
    return Score(
        gvendi=interval.value,
        gvendi_corrected=interval.corrected,
        ci95=(interval.low, interval.high),
        entropy=state.entropy(),
        n=state.n,
        dim=dim,
        tokens=tokens,
        seconds=seconds if fresh_tokens else None,
        tokens_per_second=fresh_tokens / seconds if fresh_tokens and seconds else None,
        rejected=rejected,
        by={} if by is None else group_scores(run, seed),
        coverage=coverage["sketched"] / coverage["total"],
        spec=run.spec,
        units=(run.units_done, run.units_total),
    )


def group_scores(run: RunDirectory, seed: int = 0) -> dict[str, GroupScore]:
    """G-Vendi of every group of a run at equal n: that of the smallest group with at least 32 rows.

    Rows are drawn without replacement in an order that depends on seed, group and row alone. Where most groups
    have fewer than 32 rows, the median size takes the place of 32.
    """
    sizes: dict[str, int] = {}
    for part in run.iterate(["group"]):
        for group in part.groups:
            sizes[group] = sizes.get(group, 0) + 1
        if len(sizes) > MAX_GROUPS:
            raise GvendiError(
                f"--by has more than {MAX_GROUPS} different values; choose a field with fewer, such as a source"
            )
    least = min(MIN_GROUP_ROWS, statistics.median_low(sizes.values()))
    n = min(size for size in sizes.values() if size >= least)
    compared = sorted(group for group, size in sizes.items() if size >= least)
    dim = run.spec["sketch"]["dim"]
    at_once = max(1, GROUP_BYTES // (4 * n * dim))
    found: dict[str, float] = {}
    for start in range(0, len(compared), at_once):
        found |= _score_groups(run, set(compared[start : start + at_once]), n, seed)
    return {
        group: GroupScore(found.get(group), n if group in found else 0, sizes[group])
        for group in sorted(sizes)
    }


def _score_groups(run: RunDirectory, groups: set[str], n: int, seed: int) -> dict[str, float]:
    # A heap of the n smallest keys a group: what stays is the same whatever the order of the rows.
    heaps: dict[str, list[tuple[int, int]]] = {group: [] for group in groups}
    for part in run.iterate(["group", "row"]):
        for group, row in zip(part.groups, part.rows.tolist(), strict=True):
            if group in groups:
                item = (-_draw_key(seed, group, row), row)
                push = heapq.heappush if len(heaps[group]) < n else heapq.heappushpop
                push(heaps[group], item)
    place = {row: (group, i) for group, heap in heaps.items() for i, (_, row) in enumerate(sorted(heap))}
    dim = run.spec["sketch"]["dim"]
    drawn = {group: np.empty((n, dim), np.float32) for group in groups}
    for part in run.iterate(["row", "sketch"]):
        for i, row in enumerate(part.rows.tolist()):
            if row in place:
                group, position = place[row]
                drawn[group][position] = part.sketches[i]
    return {group: gvendi(rows) for group, rows in drawn.items()}


def _draw_key(seed: int, group: str, row: int) -> int:
    digest = hashlib.blake2b(f"{seed}|{group}|{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def check_by(run: RunDirectory, by: str | None) -> None:
    """GvendiError unless the run directory was sketched with this --by (None always passes)."""
    recorded = (run.manifest or {}).get("fields", {}).get("by")
    if by is not None and by != recorded:
        raise GvendiError(
            f"'{run.path}' was sketched with --by {recorded}, not --by {by}; the groups are stored with the "
            "sketches: sketch the corpus again with this --by into another --out"
            if recorded
            else f"'{run.path}' was sketched without --by, so it holds no groups; sketch the corpus with --by {by} "
            "into another --out"
        )


class _Clock:
    """Passes progress on and measures the time and the tokens of this run."""

    def __init__(self, inner: Progress | None) -> None:
        self.inner, self.tokens, self.seconds, self._start = inner, 0, 0.0, 0.0

    def start(self, rows: int, done: int) -> None:
        self._start = time.perf_counter()
        if self.inner is not None:
            self.inner.start(rows, done)

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        self.tokens += tokens
        if self.inner is not None:
            self.inner.advance(rows, tokens, rejected)

    def close(self) -> None:
        self.seconds = time.perf_counter() - self._start
        if self.inner is not None:
            self.inner.close()
