"""Are the files of a synthesis run those that it wrote? Looked at without writing, whether it has ended or not."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import exists, is_passing, names_in, stale
from gvendi_fast.base.places import place
from gvendi_fast.data.checking import DAMAGED, LEFT, Checked, check_run
from gvendi_fast.synthesis.disk.digests import (
    ACCEPTED,
    CLUSTERS,
    EVENTS,
    FILES,
    FINGERPRINT,
    REJECTED,
    REMEDY,
    SKETCHES,
    check_named,
    digest_of_file,
    lost_fingerprint,
    read_events,
    read_fingerprint,
    read_through,
)
from gvendi_fast.synthesis.disk.folder import CONFIG, POOL, REQUESTS
from gvendi_fast.synthesis.disk.record import holds_run
from gvendi_fast.synthesis.generators.request_store import refused
from gvendi_fast.synthesis.generators.requests import OK, read_completion


def check_directory(
    path: str | os.PathLike, with_corpus: bool = False, corpus: str | os.PathLike | None = None
) -> Checked:
    """`check_run` of a run directory; of a synthesis run `check_record` and `check_run` of its seeds' sketches.

    A synthesis that grows from another run directory has no sketches of seeds in its own; check that one by its name.
    """
    root = place(path)
    names_in(root)
    if not holds_run(root):
        return check_run(root, with_corpus, corpus)
    pool = root / POOL
    checked = Checked()
    # A run that was killed early leaves it empty.
    if exists(pool) and any(not is_passing(name) for name in names_in(pool)):
        with checked.noting(pool):
            checked = check_run(pool, with_corpus, corpus)
    with checked.noting(root):
        for sentence in check_record(root):
            checked.add(root, DAMAGED, sentence)
    for left in stale(root):
        checked.add(
            left, LEFT, "a process that was killed left it; the next run into the directory removes it"
        )
    return checked


def check_record(path: str | os.PathLike) -> list[str]:
    """What is wrong with the run in a directory, a sentence each; none, where nothing is.

    Looked at: the fingerprint, the configuration, the events, every byte of accepted and rejected rows and sketches
    against the digests of their blocks, the clusters, and the request store (SQLite's own check, and of each request
    its key) unless a run is using it. The seed pool is a run directory of its own and not looked at. An OSError of the
    file system is raised and is no finding.
    """
    folder = Path(path)
    found: list[str] = []
    fingerprint: dict[str, Any] | None = None
    lost = lost_fingerprint(folder)
    if lost is None and not exists(folder / FINGERPRINT):
        # It was killed before it began.
        return list(_store(folder / REQUESTS))
    try:
        fingerprint = read_fingerprint(folder / FINGERPRINT) if lost is None else None
    except GvendiError as error:
        found.append(str(error))
    found += [lost] if lost else []
    found += _config(folder / CONFIG)
    try:
        _, events, _ = read_events(folder)
    except GvendiError as error:
        return [*found, str(error), *_store(folder / REQUESTS)]
    if fingerprint is not None:
        try:
            check_named(folder / FINGERPRINT, fingerprint, events)
        except GvendiError as error:
            found.append(str(error))
    blocks = [event for event in events if event["event"] == "block"]
    for index, name in enumerate(FILES):
        _, wrong = read_through(folder / name, index, blocks)
        found += wrong or _lengths(folder / name, blocks)
    found += _twice(folder, blocks)
    sizes = [(folder / name).stat().st_size if exists(folder / name) else 0 for name in FILES]
    found += _lost_block(folder / EVENTS, events, sizes)
    first = next((event for event in events if event["event"] == "round"), {})
    wanted = first.get("digest")
    if wanted is not None and not (
        (folder / CLUSTERS).exists() and digest_of_file(folder / CLUSTERS) == wanted
    ):
        found.append(f"'{folder / CLUSTERS}' is missing or not what the run wrote; restore it from a copy")
    return [*found, *_store(folder / REQUESTS)]


def _config(path: Path) -> Iterator[str]:
    from gvendi_fast.synthesis.config.config import load_config

    if not exists(path):
        yield f"'{path}' is missing; the next run with its configuration writes the file anew"
        return
    # What keeps it from being read is the system's, and no damage.
    with path.open("rb") as stream:
        stream.read(1)
    try:
        load_config(path)
    except GvendiError as error:
        yield f"'{path}': {error}; the next run with its configuration writes the file anew"


def _lost_block(path: Path, events: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> Iterator[str]:
    """Whether what comes behind the last block tells of a larger pool, whose rows the files hold.

    A block that was taken back is cut off the files; one whose line in events.jsonl was lost is not.
    """
    place = max((i for i, event in enumerate(events) if event["event"] == "block"), default=-1)
    if place < 0 or any("sum" in event for event in events):
        return
    last = events[place]
    beyond = [
        name for name, size in zip(FILES, last["bytes"], strict=True) if sizes[FILES.index(name)] > size
    ]
    for event in events[place + 1 :]:
        exact = event["event"] == "start" or event.get("reason") == "target"
        if exact and beyond and event.get("pool", 0) > last["pool"]:
            yield (
                f"'{path}' lacks the events of the last blocks: its last {event['event']} tells of a pool of "
                f"{event['pool']} rows, its last block of {last['pool']}, and '{beyond[0]}' goes on behind that one; "
                "the next run cuts those rows off and decides them again from the answers"
            )
            return


def _lengths(path: Path, blocks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Whether the file has as many whole rows up to each block as the events say, and a sketch for each."""
    place, accepted = FILES.index(path.name), blocks[-1]["accepted"] if blocks else 0
    if path.name == SKETCHES:
        size = blocks[-1]["bytes"][place] if blocks else 0
        if (size % (4 * accepted) if accepted else size) != 0:
            yield f"'{path}' has {size} bytes, which is no multiple of its {accepted} rows"
            return
        for event in blocks:
            if event["bytes"][place] * accepted != size * event["accepted"]:
                yield (
                    f"'{path}' has {event['bytes'][place]} bytes up to block {event['block']}, where the run had "
                    f"accepted {event['accepted']} rows of {size // (4 * accepted)} numbers"
                )
                return
        return
    rows = wanted = 0
    if not blocks:
        return
    with path.open("rb") as stream:
        for event in blocks:
            wanted = event["accepted"] if path.name == ACCEPTED else wanted + sum(event["rejected"].values())
            while stream.tell() < event["bytes"][place]:
                rows += 1
                try:
                    json.loads(stream.readline())
                except (ValueError, RecursionError) as error:
                    yield f"'{path}' is damaged in line {rows}: it is not JSON ({error})"
                    return
            if stream.tell() != event["bytes"][place] or rows != wanted:
                yield (
                    f"'{path}' has {rows} rows and {stream.tell()} bytes up to block {event['block']}, and the run had "
                    f"written {wanted} and {event['bytes'][place]}"
                )
                return


def _twice(folder: Path, blocks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Whether a candidate was decided twice, which no run does: a line that was copied over another of its length."""
    seen: set[str] = set()
    for name in (ACCEPTED, REJECTED):
        left = blocks[-1]["bytes"][FILES.index(name)] if blocks else 0
        # Of a file that is shorter, or holds other lines, has been told.
        for number, line in enumerate(_whole_lines(folder / name, left), 1):
            try:
                id_ = json.loads(line)["id"]
            except (ValueError, RecursionError, LookupError, TypeError):
                return
            if not isinstance(id_, str):
                return
            if id_ in seen:
                yield f"'{folder / name}' is damaged in line {number}: the candidate {id_!r} is there twice; {REMEDY}"
                return
            seen.add(id_)


def _whole_lines(path: Path, size: int) -> Iterator[bytes]:
    if not size or not exists(path):
        return
    with path.open("rb") as stream:
        while stream.tell() < size and (line := stream.readline()):
            yield line


def _store(path: Path) -> Iterator[str]:
    if not exists(path):
        yield f"'{path}' is missing; without it the answers that were paid for are asked for again"
        return
    # A run that holds the file, or was killed, has left a second one; without it nothing need be made beside the first.
    how = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    connection = None
    try:
        connection = sqlite3.connect(f"file:{quote(os.fspath(path))}?{how}", uri=True, timeout=0.1)
        for (told,) in connection.execute("PRAGMA quick_check(3)"):
            if told != "ok":
                yield f"'{path}' is damaged (SQLite: {' '.join(told.split())}); restore it from a copy"
        for key, request, answer, status in connection.execute(
            "SELECT key, request, answer, status FROM requests"
        ):
            if hashlib.sha256(request.encode()).hexdigest() != key:
                yield f"'{path}' is damaged: the request {key[:16]}... is not the one that its key names"
            elif status == OK and (answer is None or read_completion(answer).reason is not None):
                yield f"'{path}' is damaged: the answer to {key[:16]}... cannot be read any more"
    except sqlite3.DatabaseError as error:
        if (number := refused(str(error), path)) is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        # A run holds it, and will see for itself.
        if "locked" not in str(error):
            yield f"'{path}' cannot be read ({error}); restore it from a copy"
    finally:
        if connection is not None:
            connection.close()
