"""What a synthesis run has decided, on disk, so that a kill at any moment loses and doubles nothing.

    accepted.jsonl    rows that joined the pool, in order          sketches.f32   their unit sketches, float32 [n, K]
    rejected.jsonl    every other candidate, with its reason       events.jsonl   rounds, blocks and stops
    fingerprint.json  the settings that the result follows from    clusters.safetensors   of the first round
    config.yaml       all settings, as used last     pool/          run directory of the seeds, where data is a corpus
A block is written to the first three, flushed, and then named in events.jsonl with the files' sizes and digests: what
stands behind the sizes of the last block that is named there is cut off when the run is opened again, and what stands
before them must have the digests.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gvendi_fast.base.differences import differences, flat
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, flush_folder, remove_stale
from gvendi_fast.synthesis.disk.digests import (
    ACCEPTED,
    CLUSTERS,
    EVENTS,
    FILES,
    FINGERPRINT,
    REJECTED,
    SKETCHES,
    check_named,
    digest_of_json,
    read_events,
    read_fingerprint,
    read_through,
    summed_line,
    whole_events,
)

__all__ = ["ACCEPTED", "CLUSTERS", "EVENTS", "FINGERPRINT", "REJECTED", "SKETCHES", "Journal"]


class Journal:
    """The files of a run in the folder `path`; one process at a time, which the request store sees to.

    fingerprint: nested dict of JSON values. Raises GvendiError where the folder holds a run of another one, and names
    what differs, and where a file is not what the run wrote. target: a last block that was cut short by a lower target
    is taken back.
    blocks: the events of the blocks that are decided, in order. rounds: clusters of the rounds that are noted, by their
    numbers.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], target: int) -> None:
        self.path = path
        remove_stale(path)
        fingerprint = json.loads(json.dumps(fingerprint))
        raw, events, digest = read_events(path)
        _keep_fingerprint(path / FINGERPRINT, fingerprint, events)
        self._named = digest_of_json(fingerprint)
        size = raw.rfind(b"\n") + 1
        self.blocks = [event for event in events if event["event"] == "block"]
        if self.blocks and self.blocks[-1]["cut_short"] and self.blocks[-1]["pool"] < target:
            last = self.blocks.pop()
            events = [
                event for event in events if event is not last and event.get("block", 0) <= last["block"]
            ]
            size, digest = self._rewrite(events)
        self.rounds = {
            event["round"]: event.get("clusters", 0) for event in events if event["event"] == "round"
        }
        sizes = self.blocks[-1]["bytes"] if self.blocks else [0] * len(FILES)
        through = [read_through(path / name, place, self.blocks) for place, name in enumerate(FILES)]
        for _, wrong in through:
            if wrong:
                raise GvendiError(wrong[0])
        self._files = [
            _Appended(path / name, end, found)
            for name, end, (found, _) in zip(FILES, sizes, through, strict=True)
        ]
        self._events = _Appended(path / EVENTS, size, digest)
        flush_folder(path)

    def close(self) -> None:
        """Close the files."""
        for file in (*self._files, self._events):
            file.close()

    def accepted(self) -> list[dict[str, Any]]:
        """The rows that have joined the pool, in order."""
        rows = _rows(self.path / ACCEPTED)
        wanted = self.blocks[-1]["accepted"] if self.blocks else 0
        if len(rows) != wanted:
            raise GvendiError(
                f"'{self.path / ACCEPTED}' has {len(rows)} rows and the run had accepted {wanted}; restore it"
            )
        return rows

    def sketches(self, dim: int) -> np.ndarray:
        """Their unit sketches: float32 [n, dim]."""
        return np.fromfile(self.path / SKETCHES, "<f4").reshape(-1, dim)

    def rejections(self) -> dict[str, int]:
        """How many candidates were rejected at each stage."""
        counts: dict[str, int] = {}
        for block in self.blocks:
            for stage, number in block["rejected"].items():
                counts[stage] = counts.get(stage, 0) + number
        return counts

    def block(
        self,
        accepted: Sequence[Mapping[str, Any]],
        rejected: Sequence[Mapping[str, Any]],
        sketches: np.ndarray,
        event: Mapping[str, Any],
    ) -> None:
        """Write what was decided about a block; on disk when this returns. sketches: those of `accepted`."""
        contents = (_lines(accepted), _lines(rejected), sketches.astype("<f4").tobytes())
        for file, content in zip(self._files, contents, strict=True):
            file.digest.update(content)
            file.write(content)
        whole = {
            "event": "block",
            **event,
            "bytes": [file.size for file in self._files],
            "digests": [file.digest.hexdigest() for file in self._files],
        }
        self.note(whole)
        self.blocks.append(whole)

    def round(self, number: int, event: Mapping[str, Any]) -> None:
        """Note the start of a round."""
        self.rounds[number] = event.get("clusters", 0)
        self.note({"event": "round", "round": number, **event})

    def note(self, event: Mapping[str, Any]) -> None:
        """Add a line to events.jsonl."""
        self._events.write(summed_line(event, self._events.digest))

    def start(self, event: Mapping[str, Any]) -> None:
        """Note that a run goes on here, and under which fingerprint."""
        self.note({"event": "start", **event, "fingerprint": self._named})

    def _rewrite(self, events: Sequence[Mapping[str, Any]]) -> tuple[int, Any]:
        """Size and digest of the new file."""
        _, digest = whole_events(self.path / EVENTS, b"")
        raw = b"".join(summed_line(event, digest) for event in events)
        with atomic_write(self.path / EVENTS) as stream:
            stream.write(raw)
        return len(raw), digest


class _Appended:
    """A file that is only added to, cut to `size` bytes at first; digest: of its bytes, or of those to come."""

    def __init__(self, path: Path, size: int, digest: Any) -> None:
        self.path, self.size, self.digest = path, size, digest
        self._whole = True
        self._stream = path.open("ab", buffering=0)
        self._stream.truncate(size)

    def write(self, content: bytes) -> None:
        """On disk when this returns; an OSError leaves the file as it was, or closed to further writing."""
        if not self._whole:
            raise OSError(errno.EIO, "an earlier write to it has failed", str(self.path))
        self._whole = False
        try:
            left = memoryview(content)
            while left:
                left = left[self._stream.write(left) :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            # Half a line must not stand before the next one; what opens the run again cuts it off too.
            with suppress(OSError):
                self._stream.truncate(self.size)
            error.filename = error.filename or str(self.path)
            raise
        self.size += len(content)
        self._whole = True

    def close(self) -> None:
        self._stream.close()


def _keep_fingerprint(
    path: Path, fingerprint: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> None:
    """Write the fingerprint where there is none; GvendiError where there is another one, or not the run's own."""
    is_there = path.exists()
    found = read_fingerprint(path) if is_there else fingerprint
    # First, for an edited file is no run with other settings.
    check_named(path, found, events)
    differing = differences(flat(found), flat(fingerprint))
    if differing:
        shown = "\n".join(f"  {key}: {there!r} there, {now!r} now" for key, there, now in differing[:8])
        raise GvendiError(
            f"'{path.parent}' holds a run with other settings; give them again, or another directory as out\n{shown}"
        )
    if not is_there:
        with atomic_write(path) as stream:
            stream.write(json.dumps(fingerprint, indent=1).encode() + b"\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (ValueError, RecursionError) as error:
        raise GvendiError(f"'{path}' is damaged: a line is not JSON ({error}); restore it") from error


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    # Half a surrogate pair, in the reason of a user's check, becomes its JSON escape.
    texts = (json.dumps(row, ensure_ascii=False) for row in rows)
    return b"".join(text.encode("utf-8", "backslashreplace") + b"\n" for text in texts)
