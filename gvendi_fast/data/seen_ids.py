"""Which ids of a corpus repeat an earlier one, and where that is."""

from __future__ import annotations

import hashlib
import sqlite3
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gvendi_fast.base.errors import GvendiError

_SQLITE_CACHE_KIB = 65536
# Of ids that are held in memory: bytes of all, and of one beside its text.
_IDS_BYTES, _ENTRY_BYTES = 1 << 26, 150
# A place is a file's number and, in these bits, a line's.
_LINE_BITS = 40
_DIGEST = 16

# (row within its work unit, file and line of the first row with its id)
Repeat = tuple[int, int, int]


class SeenIds:
    """Where each id occurred first: in memory up to `_IDS_BYTES`, then in a private temporary database that the system
    removes with the process.

    An id is a text, or its `digest`; those of one corpus are all the one or all the other.
    """

    def __init__(self) -> None:
        # {id: its file and line, as one number}, and at most how many bytes that takes.
        self._first: dict[str | bytes, int] = {}
        self._bytes = 0
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> SeenIds:
        return self

    def __exit__(self, *_: object) -> None:
        if self._db is not None:
            self._db.close()

    def repeats(
        self, file: int, rows: Sequence[int], ids: Sequence[str] | Sequence[bytes], lines: Sequence[int]
    ) -> list[Repeat]:
        """Those of a file's rows, which have these ids and lines, whose id is not the first of its kind."""
        places = [(file << _LINE_BITS) + line for line in lines]
        if self._db is None:
            firsts = list(map(self._first.setdefault, ids, places))
            self._bytes += sum(map(sys.getsizeof, ids)) + _ENTRY_BYTES * len(ids)
            if self._bytes > _IDS_BYTES:
                self._db = _open_database()
                self._firsts_on_disk(list(self._first), list(self._first.values()))
                self._first = {}
        else:
            firsts = self._firsts_on_disk(ids, places)
        if firsts == places:
            return []
        return [
            (row, first >> _LINE_BITS, first & (1 << _LINE_BITS) - 1)
            for row, place, first in zip(rows, places, firsts, strict=True)
            if place != first
        ]

    def _firsts_on_disk(self, ids: Sequence[str | bytes], places: list[int]) -> list[int]:
        """Where each of these ids occurred first, if they occur at these places."""
        assert self._db is not None
        keys = [own if type(own) is bytes else digest(own) for own in ids]  # type: ignore[arg-type]
        before = self._db.total_changes
        try:
            # At once, as a statement for each row takes three times as long.
            self._db.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", zip(keys, places, strict=True))
        except sqlite3.OperationalError as error:
            raise GvendiError(
                f"corpus: the table of ids seen cannot be written to the temporary folder ({error}); it needs about 40 "
                "bytes per row: set SQLITE_TMPDIR to a folder with enough space"
            ) from error
        if self._db.total_changes - before == len(keys):
            return places
        return [self._db.execute("SELECT place FROM seen WHERE id = ?", (key,)).fetchone()[0] for key in keys]

    def forget(self, file: int) -> None:
        """Drop the ids of a file that turned out to be unreadable, so that none of its rows counts as the first."""
        self._first = {name: place for name, place in self._first.items() if place >> _LINE_BITS != file}
        if self._db is not None:
            self._db.execute("DELETE FROM seen WHERE place >> ? = ?", (_LINE_BITS, file))


def digest(own: str) -> bytes:
    """What stands for an id where many are kept: BLAKE2b, 16 bytes."""
    return hashlib.blake2b(own.encode(), digest_size=_DIGEST).digest()


class TooManyIdsError(Exception):
    """A file has more ids than are held in memory."""


@dataclass(slots=True)
class PackedIds:
    """The ids of a file's work units, to be sent to whoever knows those of the files before it.

    size: bytes of their digests, at most `_IDS_BYTES`.
    """

    size: int = 0
    # Of each work unit that has some: rows and lines as their differences, packed, and digests.
    units: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    def pack(self, unit: int, rows: Sequence[int], ids: Sequence[str], lines: Sequence[int]) -> list[Repeat]:
        """Keep those of a work unit; none of them is known to repeat another. Raises TooManyIdsError."""
        places = np.diff(np.array([rows, lines], np.int64), axis=1, prepend=0)
        self.units[unit] = zlib.compress(places.tobytes(), 1), b"".join(map(digest, ids))
        self.size += _DIGEST * len(ids)
        if self.size > _IDS_BYTES:
            raise TooManyIdsError
        return []

    def unpack(self, unit: int) -> tuple[list[int], list[bytes], list[int]]:
        """Rows, digests and lines of a work unit's ids."""
        if unit not in self.units:
            return [], [], []
        places, digests = self.units[unit]
        rows, lines = np.cumsum(np.frombuffer(zlib.decompress(places), np.int64).reshape(2, -1), axis=1)
        cuts = range(0, len(digests), _DIGEST)
        return rows.tolist(), [digests[cut : cut + _DIGEST] for cut in cuts], lines.tolist()


def _open_database() -> sqlite3.Connection:
    # An empty name makes SQLite use a temporary file that is unlinked at once.
    found = sqlite3.connect("", isolation_level=None)
    found.execute("PRAGMA journal_mode=OFF")
    found.execute("PRAGMA synchronous=OFF")
    found.execute(f"PRAGMA cache_size=-{_SQLITE_CACHE_KIB}")
    found.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, place INT) WITHOUT ROWID")
    found.execute("BEGIN")
    return found
