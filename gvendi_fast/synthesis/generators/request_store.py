"""Every request and its answer in one SQLite file, so that no answer is paid for twice.

One thread owns the connection. It takes whatever jobs are waiting, does them in one transaction, commits, and only
then hands out results: an answer that anybody has seen is on disk. A process killed at any moment leaves the last
commit: what was under way then is asked again, and paid again if the endpoint had answered it already; `attempts`
tells. While the file is open no other process can open it, so two runs cannot pay for the same answers.

diskcache was considered: it is made for many processes at once, which is what must not happen here. aiosqlite was
tried: tasks cannot share a transaction (500 requests that begin at once are 500 commits there and 2 here), and nobody
without an event loop could use it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators import request_table
from gvendi_fast.synthesis.generators.request_table import Record, Tokens

__all__ = ["Record", "RequestStore", "Tokens"]


class RequestStore:
    """The file of requests at `path`, made where there is none.

    Every method may be called from any thread; those ending in `_async` from any event loop. Raises GvendiError where
    the file is no request store, is damaged or open in another process, and OSError, with the path, where the system
    refuses it (a full disk, no permission, no such folder).
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
        return self._submit(request_table.get, key).result()

    async def get_async(self, key: str) -> Record | None:
        return await asyncio.wrap_future(self._submit(request_table.get, key))

    def begin(self, key: str, request: str) -> int:
        """Note, before it happens, that the request is sent once more; returns the number of times so far."""
        return self._submit(request_table.begin, key, request).result()

    async def begin_async(self, key: str, request: str) -> int:
        return await asyncio.wrap_future(self._submit(request_table.begin, key, request))

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
        job = self._submit(request_table.put, key, (status, answer, reason, prompt_tokens, completion_tokens))
        return _begun(key, job.result())

    async def put_async(self, key: str, *outcome: Any) -> Record:
        """As `put`; outcome: its arguments after the key, by position, all five."""
        return _begun(key, await asyncio.wrap_future(self._submit(request_table.put, key, outcome)))

    def counts(self) -> dict[str, int]:
        """Number of rows by status."""
        return self._submit(request_table.counts).result()

    def tokens(self) -> Tokens:
        """Tokens of all final answers."""
        return self._submit(request_table.tokens).result()

    def rows(self) -> Iterator[Record]:
        """All rows in order of their keys; one row at a time is in memory."""
        after = ""
        while (record := self._submit(request_table.following, after).result()) is not None:
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
            connection = request_table.open_table(self.path)
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

    def _error(self, error: Exception) -> GvendiError | OSError:
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
        if "malformed" in told or "corrupt" in told:
            return GvendiError(
                f"The request store {self.path} is damaged (SQLite: {told}); restore it from a copy. Without one, "
                "sqlite3's .recover saves what can be read; every answer that is lost is asked, and paid, for again"
            )
        if (number := refused(told, self.path)) is not None:
            return OSError(number, f"{os.strerror(number)} (SQLite: {told})", str(self.path))
        return GvendiError(
            f"The request store {self.path} cannot be used for this ({told}). What it holds is kept"
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


def refused(told: str, path: Path) -> int | None:
    """The number of the system's error behind what SQLite says in words; None where it is another fault."""
    if "is full" in told:
        return errno.ENOSPC
    if "disk I/O error" in told:
        return errno.EIO
    if "readonly" in told:
        return errno.EROFS if _read_only(path) else errno.EACCES
    if "unable to open" in told:
        if not path.parent.exists():
            return errno.ENOENT
        if path.is_dir():
            return errno.EISDIR
        if path.is_symlink() and not path.exists():
            return errno.ELOOP if os.path.realpath(path) == os.path.abspath(path) else errno.ENOENT
        return errno.EROFS if _read_only(path) else errno.EACCES
    return None


def _read_only(path: Path) -> bool:
    """Whether the file system takes no writes at all; Windows does not say."""
    found = os.statvfs(path.parent) if hasattr(os, "statvfs") else None
    return found is not None and bool(found.f_flag & os.ST_RDONLY)
