"""What proves that the files of a run are those it wrote: digests of their bytes up to each block, in its event.

A deleted line would give every later row the sketch of another; a digest of all bytes before a block's end notices
that, and any other change. Runs of earlier versions have none, up to the block where a newer version went on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import exists

ACCEPTED, REJECTED, SKETCHES, EVENTS = "accepted.jsonl", "rejected.jsonl", "sketches.f32", "events.jsonl"
FINGERPRINT, CLUSTERS = "fingerprint.json", "clusters.safetensors"
FILES = (ACCEPTED, REJECTED, SKETCHES)
_PIECE = 1 << 20
REMEDY = (
    f"restore it from a copy; or remove {', '.join((*FILES, EVENTS))} and {CLUSTERS}, and the same run decides "
    "again from the answers in requests.sqlite, none of which is asked for again"
)


def new_digest() -> Any:
    """BLAKE2b of 16 bytes, to be updated with what is written."""
    return hashlib.blake2b(digest_size=16)


def digest_of_json(content: Any) -> str:
    """16 hexadecimal digits that name JSON values, whatever their order and white space in a file."""
    raw = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def digest_of_file(path: Path) -> str:
    """The digest of a small file's bytes."""
    digest = new_digest()
    digest.update(path.read_bytes())
    return digest.hexdigest()


def read_through(path: Path, place: int, blocks: Sequence[Mapping[str, Any]]) -> tuple[Any, list[str]]:
    """The digest of the file's bytes up to the last block, and what is wrong with the file; nothing, as a rule.

    place: of the file among FILES.
    """
    digest, size = new_digest(), 0
    wanted = blocks[-1]["bytes"][place] if blocks else 0
    # A folder has a size too.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    there = path.stat().st_size if exists(path) else 0
    if there < wanted:
        return digest, [f"'{path}' has {there} bytes and the run had written {wanted}; {REMEDY}"]
    if not wanted:
        return digest, []
    with path.open("rb") as stream:
        for event in blocks:
            size = _take(stream, digest, size, event["bytes"][place])
            recorded = event.get("digests")
            if recorded is not None and recorded[place] != digest.hexdigest():
                return digest, [
                    f"'{path}' is damaged: up to block {event['block']} it is not what the run wrote; {REMEDY}"
                ]
    return digest, []


def read_events(folder: Path) -> tuple[bytes, list[dict[str, Any]], Any]:
    """The bytes of a run's events.jsonl, with the events and the digest that `whole_events` finds in them.

    Raises GvendiError also where there is no event, though rows were written: the first one comes before any row, so
    the file was lost, and a run would cut off every row.
    """
    path = folder / EVENTS
    # First, as a run that is under way may write both.
    written = [name for name in FILES if exists(folder / name) and (folder / name).stat().st_size]
    raw = path.read_bytes() if exists(path) else b""
    events, digest = whole_events(path, raw)
    if written and not events:
        raise GvendiError(
            f"'{path}' {'holds no event' if exists(path) else 'is missing'}, and '{folder / written[0]}' is not empty; "
            f"{REMEDY}"
        )
    return raw, events, digest


def whole_events(path: Path, raw: bytes) -> tuple[list[dict[str, Any]], Any]:
    """The events of these bytes of events.jsonl and their digest, to go on from; GvendiError where it is damaged.

    What stands behind the last line end was being written when a process was killed, and is left out. Each line ends
    in the digest of all bytes before it; of earlier versions, whose lines do not, what they say must agree.
    """
    digest, events, summed = hashlib.blake2b(digest_size=8), [], False
    before = _Before()
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        body, mark, rest = line.rpartition(_MARK)
        digest.update(body if mark else line)
        if mark and rest != digest.hexdigest().encode() + b'"}':
            raise _damaged(path, number, "the file is not what the run wrote up to there")
        if summed and not mark:
            raise _damaged(path, number, "it lacks its digest")
        summed = summed or bool(mark)
        digest.update((mark + rest if mark else b"") + b"\n")
        events.append(_event(path, number, line, known=bool(mark)))
        if not mark and (why := before.wrong(events[-1])) is not None:
            raise _damaged(path, number, f"{why}; a line was lost or edited")
    blocks = [event for event in events if event["event"] == "block"]
    if [event["block"] for event in blocks] != list(range(len(blocks))):
        raise _damaged(path, len(events), "the blocks before it do not follow one another")
    return events, digest


def summed_line(event: Mapping[str, Any], digest: Any) -> bytes:
    """A line of events.jsonl; the digest goes on."""
    plain = {key: value for key, value in event.items() if key != "sum"}
    # Half a surrogate pair, in the reason of a user's check, becomes its JSON escape.
    body = json.dumps(plain, ensure_ascii=False).encode("utf-8", "backslashreplace")[:-1]
    digest.update(body)
    end = _MARK + digest.hexdigest().encode() + b'"}\n'
    digest.update(end)
    return body + end


def read_fingerprint(path: Path) -> dict[str, Any]:
    """The fingerprint of a run; GvendiError where the file holds none."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise GvendiError(f"'{path}' is damaged: it is not JSON ({error}); restore it from a copy") from error
    if not isinstance(found, dict) or not found:
        raise GvendiError(f"'{path}' is damaged: it holds no settings; restore it from a copy")
    return found


def lost_fingerprint(folder: Path) -> str | None:
    """A sentence where a run that has begun lacks its fingerprint; None otherwise, as it is the first file of a run."""
    begun = [name for name in (EVENTS, *FILES) if exists(folder / name) and (folder / name).stat().st_size]
    if exists(folder / FINGERPRINT) or not begun:
        return None
    how = "restore it from a copy"
    if begun[0] == EVENTS:
        how += f", or go on with 'gvendi synthesize --resume {folder}', which writes it anew if no setting has changed"
    return f"'{folder / FINGERPRINT}' is missing; {how}"


def check_named(path: Path, fingerprint: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
    """GvendiError where the events of a run name another fingerprint than this one of the file `path`."""
    named = digest_of_json(fingerprint)
    if any(event["event"] == "start" and event.get("fingerprint", named) != named for event in events):
        raise GvendiError(
            f"'{path}' is missing or not the one that the run began with; restore it from a copy, or give another "
            "directory as out"
        )


class _Before:
    """What the events without digests say so far, which the next one must agree with.

    A last line that is lost is what a kill leaves, and cannot be told from it.
    """

    def __init__(self) -> None:
        self._blocks, self._rounds, self._started, self._stopped = 0, 0, False, False
        # Of the last start: a later one corrects it, where a last block was taken back.
        self._claimed: int | None = None
        self._pool: int | None = None
        self._accepted, self._sizes = 0, [0] * len(FILES)

    def wrong(self, event: Mapping[str, Any]) -> str | None:
        """Why this event cannot come next; None, and it is taken up, where it can."""
        kind = event["event"]
        if kind == "start":
            self._started, self._stopped, self._claimed = True, False, event.get("pool")
        elif kind == "stop":
            # The first version noted no start.
            self._stopped = self._started
        elif kind in ("round", "block"):
            if self._stopped:
                return f"it is a {kind} behind a stop, without a start between them"
            why = self._pools(event) or (self._round(event) if kind == "round" else self._block(event))
            if why is not None:
                return why
            self._claimed = None
        return None

    def _pools(self, event: Mapping[str, Any]) -> str | None:
        at_first = event["pool"] - (event["joined"] if event["event"] == "block" else 0)
        for wanted in (self._pool, self._claimed):
            if wanted is not None and wanted != at_first:
                return f"it begins with a pool of {at_first} rows, and those before it end with {wanted}"
        if event["event"] == "block":
            self._pool = event["pool"]
        return None

    def _round(self, event: Mapping[str, Any]) -> str | None:
        if event["round"] != self._rounds:
            return f"it is round {event['round']} and not {self._rounds}"
        if event.get("block", self._blocks) != self._blocks:
            return f"its round begins with block {event['block']}, and {self._blocks} come before it"
        self._rounds += 1
        return None

    def _block(self, event: Mapping[str, Any]) -> str | None:
        if event["block"] != self._blocks:
            return f"it is block {event['block']} and not {self._blocks}"
        if event.get("round", self._rounds - 1) != self._rounds - 1:
            return f"it is of round {event['round']}, and the last one noted is {self._rounds - 1}"
        if event["accepted"] != self._accepted + event["joined"]:
            return f"{event['accepted']} rows are accepted, of {self._accepted} and {event['joined']} more"
        if event["decided"] != event["joined"] + sum(event["rejected"].values()):
            return (
                f"of {event['decided']} candidates {event['joined']} joined and {event['rejected']} did not"
            )
        if any(now < then for now, then in zip(event["bytes"], self._sizes, strict=True)):
            return f"its files have {event['bytes']} bytes, after {self._sizes}"
        self._blocks, self._accepted, self._sizes = self._blocks + 1, event["accepted"], event["bytes"]
        return None


_MARK = b', "sum": "'
_INTEGERS = ("block", "pool", "accepted", "joined", "decided")


def _take(stream: Any, digest: Any, size: int, until: int) -> int:
    while size < until:
        piece = stream.read(min(_PIECE, until - size))
        if not piece:
            break
        digest.update(piece)
        size += len(piece)
    return size


def _event(path: Path, number: int, line: bytes, known: bool) -> dict[str, Any]:
    """known: its digest says that this package wrote it."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, number, f"it is not JSON ({error})") from error
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise _damaged(path, number, "it is no event")
    if known:
        return event
    if event["event"] == "block" and not _is_block(event):
        raise _damaged(path, number, "it is no whole event of a block")
    if event["event"] == "round" and not all(_count(event.get(name)) for name in ("round", "pool")):
        raise _damaged(path, number, "it is no whole event of a round")
    return event


def _is_block(event: Mapping[str, Any]) -> bool:
    sizes, gains, digests = event.get("bytes"), event.get("gains"), event.get("digests")
    rejected = event.get("rejected")
    return (
        all(_count(event.get(name)) for name in _INTEGERS)
        and isinstance(sizes, list)
        and len(sizes) == len(FILES)
        and all(map(_count, sizes))
        and isinstance(gains, list)
        and isinstance(rejected, dict)
        and all(map(_count, rejected.values()))
        and isinstance(event.get("gvendi"), int | float)
        and isinstance(event.get("cut_short"), bool)
        and (digests is None or (isinstance(digests, list) and len(digests) == len(FILES)))
    )


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _damaged(path: Path, number: int, why: str) -> GvendiError:
    return GvendiError(f"'{path}' is damaged in line {number}: {why}; {REMEDY}")
