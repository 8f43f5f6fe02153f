"""Every request and its answer in one SQLite file, so that no answer is paid for twice.

One thread owns the connection. It takes whatever jobs are waiting, does them in one transaction, commits, and only
then hands out results: an answer that anybody has seen is on disk. A process killed at any moment leaves the last
commit: what was under way then is asked again, and paid again if the endpoint had answered it already; `attempts`
tells. While the file is open no other process can open it, so two runs cannot pay for the same answers.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gvendi_fast.errors import GvendiError
from gvendi_fast.synthesis.requests import FINAL, OK, SENT

# "GVRQ" in ASCII: marks the file as ours. The version changes with the columns.
_APPLICATION, _VERSION = 0x47565251, 1
_TABLE = """
CREATE TABLE IF NOT EXISTS requests (
    key TEXT PRIMARY KEY NOT NULL,
    request TEXT NOT NULL,
    answer TEXT,
    status TEXT NOT NULL,
    reason TEXT,
    attempts INTEGER NOT NULL,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    created TEXT NOT NULL
)"""
_FINAL = ", ".join(f"'{status}'" for status in FINAL)


@dataclass(frozen=True)
class Record:
    """One row.

    request: canonical JSON (requests.py). answer: the body as it came, None before there is one. status: "sent"
    (no answer yet), "ok", "failed", "refused" or "unserved". attempts: times it was sent, counted before sending.
    created: when it was first sent, ISO 8601 in UTC.
    """

    key: str
    request: str
    answer: str | None
    status: str
    reason: str | None
    attempts: int
    prompt_tokens: int | None
    completion_tokens: int | None
    created: str


_COLUMNS = ", ".join(column.name for column in fields(Record))


@dataclass(frozen=True)
class Tokens:
    """Sums over the final answers; uncounted: how many usable ones came without a count."""

    prompt: int
    completion: int
    uncounted: int


class RequestStore:
    """The file of requests at `path`, made where there is none.

    Every method may be called from any thread; those ending in `_async` from any event loop. Raises GvendiError where
    the file is no request store, is open in another process, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = False
        # So that no job can slip in behind the mark of the end.
        self._door = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="request-store", daemon=True)
        opened: Future = Future()
        self._jobs.put((opened, None))
        self._thread.start()
        opened.result()

    def __enter__(self) -> RequestStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Do the jobs that wait, then close the file; a second call does nothing."""
        with self._door:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def get(self, key: str) -> Record | None:
        """The row of a key (`Request.key`), or None."""
        return self._submit(_get, key).result()

    async def get_async(self, key: str) -> Record | None:
        return await asyncio.wrap_future(self._submit(_get, key))

    def begin(self, key: str, request: str) -> int:
        """Note, before it happens, that the request is sent once more; returns the number of times so far."""
        return self._submit(_begin, key, request).result()

    async def begin_async(self, key: str, request: str) -> int:
        return await asyncio.wrap_future(self._submit(_begin, key, request))

    def put(
        self,
        key: str,
        status: str,
        answer: str | None = None,
        reason: str | None = None,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
    ) -> Record:
        """Keep the outcome of a request that has begun; returns its row once it is on disk.

        The first final answer stands: where there is one already, nothing changes and that row is returned.
        """
        job = self._submit(_put, key, (status, answer, reason, prompt_tokens, completion_tokens))
        return _begun(key, job.result())

    async def put_async(self, key: str, *outcome: Any) -> Record:
        """As `put`; outcome: its arguments after the key, by position, all five."""
        return _begun(key, await asyncio.wrap_future(self._submit(_put, key, outcome)))

    def counts(self) -> dict[str, int]:
        """Number of rows by status."""
        return self._submit(_counts).result()

    def tokens(self) -> Tokens:
        """Tokens of all final answers."""
        return self._submit(_tokens).result()

    def rows(self) -> Iterator[Record]:
        """All rows in order of their keys; one row at a time is in memory."""
        after = ""
        while (record := self._submit(_following, after).result()) is not None:
            yield record
            after = record.key

    def _submit(self, job: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        with self._door:
            if self._closed:
                raise GvendiError(
                    f"The request store {self.path} is closed; open it again with RequestStore(path)"
                )
            self._jobs.put((future, (job, arguments)))
        return future

    def _serve(self) -> None:
        opened, _ = self._jobs.get()
        try:
            connection = _open(self.path)
        except (sqlite3.Error, GvendiError) as error:
            opened.set_exception(self._error(error))
            return
        opened.set_result(None)
        try:
            while (batch := self._take())[-1] is not None:
                self._do(connection, batch)
            self._do(connection, batch[:-1])
        finally:
            connection.close()

    def _take(self) -> list:
        """Everything that waits, at least one job; None, the mark of the end, comes last."""
        batch = [self._jobs.get()]
        while batch[-1] is not None and not self._jobs.empty():
            batch.append(self._jobs.get())
        return batch

    def _do(self, connection: sqlite3.Connection, batch: list) -> None:
        try:
            connection.execute("BEGIN")
            results = [job(connection, *arguments) for _, (job, arguments) in batch]
            connection.execute("COMMIT")
        # ValueError and OverflowError: what SQLite cannot hold, such as half a surrogate pair.
        except (sqlite3.Error, ValueError, OverflowError) as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for future, _ in batch:
                _resolve(future, error=self._error(error))
            return
        for (future, _), result in zip(batch, results, strict=True):
            _resolve(future, result)

    def _error(self, error: Exception) -> GvendiError:
        if isinstance(error, GvendiError):
            return error
        told = str(error)
        if "locked" in told:
            return GvendiError(
                f"The request store {self.path} is open elsewhere, and two runs would pay for the same answers "
                "twice; wait for the other one to end, or give this one a file of its own"
            )
        if "not a database" in told:
            return GvendiError(f"{self.path} is not a request store (no SQLite file); give another path")
        return GvendiError(
            f"The request store {self.path} cannot be used ({told}); check that its folder exists, is writable and "
            "has space left. What it holds is kept"
        )


def _begun(key: str, record: Record | None) -> Record:
    if record is None:
        raise GvendiError(f"key={key!r} has no request in the store; call begin(key, request) before put")
    return record


def _resolve(future: Future, result: Any = None, error: Exception | None = None) -> None:
    # A caller that was cancelled has given its future up; the job is done all the same.
    if future.set_running_or_notify_cancel():
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
    try:
        # Exclusive before WAL: one process at a time, and no shared memory, which network file systems lack.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        found = tuple(
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found != (_APPLICATION, _VERSION) and not (empty and found == (0, 0)):
            raise GvendiError(
                f"{path} is not a request store of this version (application {found[0]:#x}, version {found[1]}; "
                f"wanted {_APPLICATION:#x} and {_VERSION}); give another path"
            )
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA application_id={_APPLICATION}")
        connection.execute(f"PRAGMA user_version={_VERSION}")
        connection.execute("COMMIT")
    except (sqlite3.Error, GvendiError):
        connection.close()
        raise
    return connection


def _get(connection: sqlite3.Connection, key: str) -> Record | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM requests WHERE key = ?", (key,)).fetchone()
    return None if row is None else Record(*row)


def _following(connection: sqlite3.Connection, key: str) -> Record | None:
    query = f"SELECT {_COLUMNS} FROM requests WHERE key > ? ORDER BY key LIMIT 1"
    row = connection.execute(query, (key,)).fetchone()
    return None if row is None else Record(*row)


def _begin(connection: sqlite3.Connection, key: str, request: str) -> int:
    new = Record(key, request, None, SENT, None, 1, None, None, datetime.now(timezone.utc).isoformat())
    marks = ", ".join("?" * len(fields(Record)))
    connection.execute(
        f"INSERT INTO requests ({_COLUMNS}) VALUES ({marks}) "
        "ON CONFLICT (key) DO UPDATE SET attempts = attempts + 1",
        astuple(new),
    )
    return connection.execute("SELECT attempts FROM requests WHERE key = ?", (key,)).fetchone()[0]


def _put(connection: sqlite3.Connection, key: str, outcome: tuple) -> Record | None:
    connection.execute(
        "UPDATE requests SET status = ?, answer = ?, reason = ?, prompt_tokens = ?, completion_tokens = ? "
        f"WHERE key = ? AND status NOT IN ({_FINAL})",
        (*outcome, key),
    )
    return _get(connection, key)


def _counts(connection: sqlite3.Connection) -> dict[str, int]:
    return dict(connection.execute("SELECT status, count(*) FROM requests GROUP BY status"))


def _tokens(connection: sqlite3.Connection) -> Tokens:
    row = connection.execute(
        "SELECT coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
        "coalesce(sum(status = ? AND (prompt_tokens IS NULL OR completion_tokens IS NULL)), 0) "
        f"FROM requests WHERE status IN ({_FINAL})",
        (OK,),
    ).fetchone()
    return Tokens(*row)
