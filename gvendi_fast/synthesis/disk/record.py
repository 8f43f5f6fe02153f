"""A synthesis run as it lies on disk, for reading: finished or not, killed or under way. Nothing is written.

What a kill left behind the last block that events.jsonl names is not looked at: it was never decided.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import names_in
from gvendi_fast.base.places import place
from gvendi_fast.clusters.kmeans import SphericalKMeans
from gvendi_fast.data.pool import Pool, as_pool
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import lost_spec
from gvendi_fast.synthesis.disk.digests import (
    ACCEPTED,
    CLUSTERS,
    EVENTS,
    FILES,
    FINGERPRINT,
    REJECTED,
    SKETCHES,
    check_named,
    digest_of_file,
    lost_fingerprint,
    read_events,
    read_fingerprint,
    read_through,
)
from gvendi_fast.synthesis.disk.folder import CONFIG, POOL, REQUESTS

# What only a synthesis has; rejected.jsonl is in a run directory too.
_OWN = (REQUESTS, EVENTS, ACCEPTED, SKETCHES, CLUSTERS)


class RunRecord:
    """The directory `path` of a synthesis run.

    config: as the run used it last. events: all of events.jsonl; blocks, rounds, stops: those of each kind, in order.
    Raises GvendiError where `path` holds no run, where a file is not what the run wrote, and where the seeds' sketches
    are not there or not the run's. All accepted and rejected rows and sketches are read once for that. Threads may
    share one.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        names_in(self.path)
        if (lost := lost_fingerprint(self.path)) is not None:
            raise GvendiError(lost)
        for name in (FINGERPRINT, CONFIG):
            if not (self.path / name).is_file():
                raise GvendiError(
                    f"'{path}' holds no synthesis run ({name} is not there); give the directory (out) of a run that "
                    "'gvendi synthesize' has begun"
                )
        # Here, so that a folder is asked whether it holds a run without what a configuration needs.
        from gvendi_fast.synthesis.config.config import load_config

        self.config = load_config(self.path / CONFIG)
        _, self.events, _ = read_events(self.path)
        self.blocks, self.rounds, self.stops = (
            [event for event in self.events if event["event"] == kind] for kind in ("block", "round", "stop")
        )
        sizes = self.blocks[-1]["bytes"] if self.blocks else (0, 0, 0)
        self._sizes = dict(zip(FILES, sizes, strict=True))
        for index, name in enumerate(FILES):
            _, wrong = read_through(self.path / name, index, self.blocks)
            if wrong:
                raise GvendiError(wrong[0])
        self._check()

    @property
    def stop(self) -> dict[str, Any] | None:
        """The event that ended the last run in this directory; None where it was killed or is under way."""
        return self.events[-1] if self.events and self.events[-1]["event"] == "stop" else None

    @cached_property
    def seed_run(self) -> RunDirectory:
        """The run directory of the seed pool: the one that pool.data names, or what was sketched into this one."""
        data = self.config.pool.data
        own = self.path / POOL
        if not (own / "spec.json").is_file() and len(data) == 1:
            own = Path(data[0])
        if not (own / "spec.json").is_file():
            if (lost := lost_spec(self.path / POOL) or lost_spec(own)) is not None:
                raise lost
            raise GvendiError(
                f"the sketches of the seed pool of '{self.path}' are not there: neither in '{self.path / POOL}' nor in "
                f"pool.data, {', '.join(repr(name) for name in data)}, looked for from '{os.getcwd()}'; go to the "
                "folder that the run was started in, or move them back"
            )
        return RunDirectory.load(own)

    @cached_property
    def seed_pool(self) -> Pool:
        """Ids and sketches of the seeds; rows behind the first `seeds` are no part of the run."""
        return as_pool(self.seed_run)

    @cached_property
    def seeds(self) -> int:
        """Number of rows that the pool began with."""
        limit = self.config.pool.limit
        return len(self.seed_pool) if limit is None else min(len(self.seed_pool), limit)

    @property
    def dim(self) -> int:
        """Width K of the sketches."""
        return self.seed_pool.dim

    @cached_property
    def clusters(self) -> SphericalKMeans | None:
        """Those of the first round; None where no block has been decided."""
        path = self.path / CLUSTERS
        if not path.is_file():
            return None
        wanted = self.rounds[0].get("digest") if self.rounds else None
        if wanted is not None and digest_of_file(path) != wanted:
            raise GvendiError(f"'{path}' is damaged: it is not what the run wrote; restore it from a copy")
        return SphericalKMeans.load(path)

    def seed_sketches(self) -> torch.Tensor:
        """Unit sketches of the seeds: float32 [seeds, K], as the run clustered them."""
        return self.seed_pool.take(range(self.seeds))

    def sketches(self) -> np.ndarray:
        """Unit sketches of the accepted rows: float32 [n, K], mapped and not read."""
        size = self._sizes[SKETCHES]
        if not size:
            return np.zeros((0, self.dim), np.float32)
        return np.memmap(self.path / SKETCHES, "<f4", mode="r", shape=(size // (4 * self.dim), self.dim))

    def accepted(self) -> Iterator[dict[str, Any]]:
        """The accepted rows in order, one in memory at a time."""
        return self._lines(ACCEPTED)

    def rejected(self) -> Iterator[dict[str, Any]]:
        """The rejected candidates in order, one in memory at a time."""
        return self._lines(REJECTED)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        left = self._sizes[name]
        if not left:
            return
        with (self.path / name).open("rb") as stream:
            while left > 0:
                line = stream.readline()
                left -= len(line)
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise GvendiError(
                        f"'{self.path / name}' is damaged: a line is not JSON ({error}); restore it"
                    ) from error

    def _check(self) -> None:
        """The seeds must be those that the run grew from."""
        fingerprint = read_fingerprint(self.path / FINGERPRINT)
        check_named(self.path / FINGERPRINT, fingerprint, self.events)
        if self.seed_run.sketch_spec != fingerprint.get("sketches"):
            raise GvendiError(
                f"'{self.seed_run.path}' was sketched with other settings than the run '{self.path}' grew from; "
                "restore the run directory that it grew from"
            )
        if self.rounds and self.rounds[0]["pool"] != self.seeds:
            raise GvendiError(
                f"'{self.seed_run.path}' has {self.seeds} rows and the run '{self.path}' grew from "
                f"{self.rounds[0]['pool']}; restore the run directory that it grew from"
            )


def holds_run(path: str | os.PathLike) -> bool:
    """Whether a folder is the directory of a synthesis run: one that has begun, or has lost its fingerprint.json."""
    root = place(path)
    if (root / FINGERPRINT).is_file():
        return True
    # Someone else's folder may well have one of these names.
    names = {name for name in (CONFIG, POOL, *_OWN) if (root / name).exists()}
    return len(names) > 1 and not names.isdisjoint(_OWN) and not (root / "spec.json").exists()
