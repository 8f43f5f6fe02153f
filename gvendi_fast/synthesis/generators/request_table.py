"""The table of requests: what a row holds, and the SQL that reads and writes it inside the caller's transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators.requests import FINAL, OK, SENT

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


def open_table(path: Path) -> sqlite3.Connection:
    """The file, open for this process alone; made if it is not there. Raises GvendiError for another's file."""
    connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
    try:
        # Exclusive before WAL: one process at a time, and no shared memory, which network file systems lack.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        found = tuple(
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found != (_APPLICATION, _VERSION) and not (empty and found == (0, 0)):
            raise GvendiError(
                f"{path} is not a request store of this version (application {found[0]:#x}, version {found[1]}; "
                f"wanted {_APPLICATION:#x} and {_VERSION}); give another path"
            )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA application_id={_APPLICATION}")
        connection.execute(f"PRAGMA user_version={_VERSION}")
        connection.execute("COMMIT")
    except (sqlite3.Error, GvendiError):
        connection.close()
        raise
    return connection


def get(connection: sqlite3.Connection, key: str) -> Record | None:
    return _first(connection, "key = ?", key)


def following(connection: sqlite3.Connection, key: str) -> Record | None:
    return _first(connection, "key > ? ORDER BY key LIMIT 1", key)


def _first(connection: sqlite3.Connection, which: str, key: str) -> Record | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM requests WHERE {which}", (key,)).fetchone()
    return None if row is None else Record(*row)


def begin(connection: sqlite3.Connection, key: str, request: str) -> int:
    new = Record(key, request, None, SENT, None, 1, None, None, datetime.now(timezone.utc).isoformat())
    connection.execute(
        f"INSERT INTO requests ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (key) DO UPDATE SET attempts = attempts + 1",
        astuple(new),
    )
    return connection.execute("SELECT attempts FROM requests WHERE key = ?", (key,)).fetchone()[0]


def put(connection: sqlite3.Connection, key: str, outcome: tuple) -> Record | None:
    connection.execute(
        "UPDATE requests SET status = ?, answer = ?, reason = ?, prompt_tokens = ?, completion_tokens = ? "
        f"WHERE key = ? AND status NOT IN ({_FINAL})",
        (*outcome, key),
    )
    return get(connection, key)


def counts(connection: sqlite3.Connection) -> dict[str, int]:
    return dict(connection.execute("SELECT status, count(*) FROM requests GROUP BY status"))


def tokens(connection: sqlite3.Connection) -> Tokens:
    row = connection.execute(
        "SELECT coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
        "coalesce(sum(status = ? AND (prompt_tokens IS NULL OR completion_tokens IS NULL)), 0) "
        f"FROM requests WHERE status IN ({_FINAL})",
        (OK,),
    ).fetchone()
    return Tokens(*row)
