"""What a synthesis run has decided, on disk, so that a kill at any moment loses and doubles nothing.

    accepted.jsonl    rows that joined the pool, in order          sketches.f32   their unit sketches, float32 [n, K]
    rejected.jsonl    every other candidate, with its reason       events.jsonl   rounds, blocks and stops
    fingerprint.json  the settings that the result follows from    clusters.safetensors   of the first round
    config.yaml       all settings, as used last     pool/          run directory of the seeds, where data is a corpus
A block is written to the first three, flushed, and then named in events.jsonl with the files' sizes: what stands behind
the sizes of the last block that is named there is cut off when the run is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvendi_fast.base.differences import differences, flat
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, flush_folder, remove_stale

ACCEPTED, REJECTED, SKETCHES, EVENTS = "accepted.jsonl", "rejected.jsonl", "sketches.f32", "events.jsonl"
FINGERPRINT, CLUSTERS = "fingerprint.json", "clusters.safetensors"
_FILES = (ACCEPTED, REJECTED, SKETCHES)


class Journal:
    """The files of a run in the folder `path`; one process at a time, which the request store sees to.

    fingerprint: nested dict of JSON values. Raises GvendiError where the folder holds a run of another one, and names
    what differs. target: a last block that was cut short by a lower target is taken back.
    blocks: the events of the blocks that are decided, in order. rounds: clusters of the rounds that are noted, by their
    numbers.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], target: int) -> None:
        self.path = path
        remove_stale(path)
        _check_fingerprint(path / FINGERPRINT, json.loads(json.dumps(fingerprint)))
        events = _whole_lines(path / EVENTS)
        self.blocks = [event for event in events if event["event"] == "block"]
        if self.blocks and self.blocks[-1]["cut_short"] and self.blocks[-1]["pool"] < target:
            last = self.blocks.pop()
            events = [
                event for event in events if event is not last and event.get("block", 0) <= last["block"]
            ]
            self._rewrite(events)
        self.rounds = {
            event["round"]: event.get("clusters", 0) for event in events if event["event"] == "round"
        }
        sizes = self.blocks[-1]["bytes"] if self.blocks else [0] * len(_FILES)
        self._streams = [_open_at(path / name, size) for name, size in zip(_FILES, sizes, strict=True)]
        self._events = _open_at(path / EVENTS, None)
        flush_folder(path)

    def close(self) -> None:
        """Close the files."""
        for stream in (*self._streams, self._events):
            stream.close()

    def accepted(self) -> list[dict[str, Any]]:
        """The rows that have joined the pool, in order."""
        return _whole_lines(self.path / ACCEPTED)

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
        for stream, content in zip(self._streams, contents, strict=True):
            stream.write(content)
            _flush(stream)
        whole = {"event": "block", **event, "bytes": [stream.tell() for stream in self._streams]}
        self.note(whole)
        self.blocks.append(whole)

    def round(self, number: int, event: Mapping[str, Any]) -> None:
        """Note the start of a round."""
        self.rounds[number] = event.get("clusters", 0)
        self.note({"event": "round", "round": number, **event})

    def note(self, event: Mapping[str, Any]) -> None:
        """Add a line to events.jsonl."""
        self._events.write(_lines([event]))
        _flush(self._events)

    def _rewrite(self, events: Sequence[Mapping[str, Any]]) -> None:
        with atomic_write(self.path / EVENTS) as stream:
            stream.write(_lines(events))


def _check_fingerprint(path: Path, fingerprint: Mapping[str, Any]) -> None:
    if not path.exists():
        with atomic_write(path) as stream:
            stream.write(json.dumps(fingerprint, indent=1).encode() + b"\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differing = differences(flat(found), flat(fingerprint))
    if differing:
        shown = "\n".join(f"  {key}: {there!r} there, {now!r} now" for key, there, now in differing[:8])
        raise GvendiError(
            f"'{path.parent}' holds a run with other settings; give them again, or another directory as out\n{shown}"
        )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that end in a line end; what a kill left behind the last one is cut off."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _open_at(path: Path, size: int | None):
    """The file for appending, cut to `size` bytes (None: as it is)."""
    stream = path.open("ab")
    if size is not None:
        there = stream.seek(0, os.SEEK_END)
        if there < size:
            stream.close()
            raise GvendiError(
                f"'{path}' has {there} bytes and the run had written {size}; restore it, or begin anew elsewhere"
            )
        stream.truncate(size)
        stream.seek(size)
    return stream


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    # Half a surrogate pair, in the reason of a user's check, becomes its JSON escape.
    texts = (json.dumps(row, ensure_ascii=False) for row in rows)
    return b"".join(text.encode("utf-8", "backslashreplace") + b"\n" for text in texts)


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
