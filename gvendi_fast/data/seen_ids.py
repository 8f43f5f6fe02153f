"""Which ids of a corpus repeat an earlier one, and where that is."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from gvendi_fast.base.errors import GvendiError

# Of a table, and of a file's packed ids, that are held in memory.
_IDS_BYTES = 1 << 26
# A place is a file's number and, in these bits, a line's.
_LINE_BITS = 40
_DIGEST = 16
# A slot is a digest as two numbers, and a place with 1 added, so that an untouched one is empty.
_SLOT = 3
_EMPTY, _GONE = np.uint64(0), np.uint64(2**64 - 1)
# Slots of a new table, the share of them in use above which it grows, and by how much: 34 to 48 bytes an entry, and 82
# while both are there. Probes are few up to here.
_SLOTS, _FULL, _GROWTH = 1 << 12, 0.7, 1.4
# Slots that are looked at together.
_PROBES = 8
_SLOTS_AT_ONCE = 1 << 14
# Of packed ids.
_ROWS_AT_ONCE = 1 << 15

# (row within its work unit, file and line of the first row with its id)
Repeat = tuple[int, int, int]


class SeenIds:
    """Where each id occurred first: a hash table of digests, in memory up to `_IDS_BYTES`, then in a temporary file.

    The system removes the file with the process.
    """

    def __init__(self) -> None:
        self._table = _Table(_SLOTS)

    def __enter__(self) -> SeenIds:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()

    def repeats(
        self, file: int, rows: Sequence[int], ids: Sequence[str], lines: Sequence[int]
    ) -> list[Repeat]:
        """Those of a file's rows, which have these ids and lines, whose id is not the first of its kind."""
        again, firsts = self._repeats(file, digests(ids), np.asarray(lines))
        return _told(np.asarray(rows)[again], firsts)

    def repeats_of(self, file: int, ids: PackedIds) -> Iterator[tuple[int, list[Repeat]]]:
        """(work unit, those of its rows whose id is not the first of its kind) of a file's units that have some."""
        for units in ids.together(_ROWS_AT_ONCE):
            rows, keys, lines = zip(*map(ids.unpack, units), strict=True)
            again, firsts = self._repeats(file, b"".join(keys), np.concatenate(lines))
            begins = np.cumsum([0, *map(len, rows)])
            cuts = np.searchsorted(again, begins)
            for place in np.flatnonzero(np.diff(cuts)):
                part = slice(cuts[place], cuts[place + 1])
                yield units[place], _told(rows[place][again[part] - begins[place]], firsts[part])

    def _repeats(self, file: int, keys: bytes, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of rows of a file: the numbers of those whose digest is not the first of its kind, and the firsts' places."""
        entries = np.empty((len(lines), _SLOT), np.uint64)
        entries[:, :2] = np.frombuffer(keys, np.uint64).reshape(-1, 2)
        entries[:, 2] = lines + ((file << _LINE_BITS) + 1)
        if self._table.used + len(entries) > _FULL * self._table.slots:
            self._grow(len(entries))
        firsts = self._table.firsts(entries)
        again = np.flatnonzero(firsts != entries[:, 2])
        return again, firsts[again] - np.uint64(1)

    def forget(self, file: int) -> None:
        """Drop the ids of a file that turned out to be unreadable, so that none of its rows counts as the first."""
        self._table.forget(file)

    def _grow(self, more: int) -> None:
        old = self._table
        self._table = _Table(max(int(_GROWTH * old.slots), int((old.used + more) / _FULL) + 1))
        self._table.take_over(old)
        old.close()


def _told(rows: np.ndarray, places: np.ndarray) -> list[Repeat]:
    lines = places & np.uint64((1 << _LINE_BITS) - 1)
    return list(zip(rows.tolist(), (places >> np.uint64(_LINE_BITS)).tolist(), lines.tolist(), strict=True))


class _Table:
    """A hash table with linear probing, whose slots are in the order of their digests but for collisions.

    So that a larger one is written from a smaller one front to back.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.used = slots, 0
        self._file: IO[bytes] | None = None
        size = slots * _SLOT * 8
        if size <= _IDS_BYTES:
            self._at = np.zeros((slots, _SLOT), np.uint64)
            return
        try:
            self._file = tempfile.TemporaryFile(prefix="gvendi-ids-")  # noqa: SIM115 - lives as long as this table
            _reserve(self._file, size)
        except OSError as error:
            raise GvendiError(
                f"corpus: the table of ids seen cannot be written to the temporary folder '{tempfile.gettempdir()}' "
                f"({error.strerror or error}): so far it takes {size / 1e9:.2g} GB there, later up to 50 bytes "
                "a row and 80 while it grows; set TMPDIR to a folder with enough space"
            ) from error
        self._at = np.asarray(np.memmap(self._file, np.uint64, "r+", shape=(slots, _SLOT)))

    def firsts(self, entries: np.ndarray) -> np.ndarray:
        """The last number of the entry that has each digest, after those that are new are added: uint64 [n]."""
        found = np.empty(len(entries), np.uint64)
        slots = self._homes(entries)
        left = np.arange(len(entries))
        while len(left):
            own = entries[left]
            here = self._at.take(slots[:, None] + np.arange(_PROBES), axis=0, mode="wrap")
            free, same = here[..., 2] == _EMPTY, here[..., 0] == own[:, :1]
            same &= here[..., 1] == own[:, 1:2]
            probe = (free | same).argmax(axis=1)
            row = np.arange(len(left))
            is_found, is_free = same[row, probe], free[row, probe]
            found[left[is_found]] = here[row, probe, 2][is_found]
            slots += np.where(is_found | is_free, probe, _PROBES)
            slots %= self.slots
            # The first of those that want a slot has it, as the first of equal ids counts; all look at it again.
            new, firsts = np.unique(slots[is_free], return_index=True)
            self._at[new] = own[is_free][firsts]
            left, slots = left[~is_found], slots[~is_found]
        self.used += int((found == entries[:, 2]).sum())
        return found

    def take_over(self, old: _Table) -> None:
        """Fill this table, which is new and larger, with the entries of another."""
        end, rest = 0, []
        for entries, is_wrapped in old._in_order():
            rest.append(entries[is_wrapped])
            entries = entries[~is_wrapped]
            # Each goes to its home, or right behind the one before it if that is there or farther: what probes one
            # after the other would find, without them.
            count = np.arange(len(entries))
            slots = np.maximum.accumulate(np.maximum(self._homes(entries), end) - count) + count
            is_over = slots >= self.slots
            rest.append(entries[is_over])
            self._at[slots[~is_over]] = entries[~is_over]
            self.used += int((~is_over).sum())
            end = int(slots[-1]) + 1 if len(slots) else end
        for entries in rest:
            self.firsts(entries)

    def _homes(self, entries: np.ndarray) -> np.ndarray:
        """The slot of each entry if no other is there: ascending with its digest."""
        return np.minimum((entries[:, 0] * (self.slots * 2.0**-64)).astype(np.int64), self.slots - 1)

    def _in_order(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All entries, some at a time in the order of their homes, and which found no slot before the table's end."""
        start = 0
        while start < self.slots:
            # Up to an empty slot, as no entry lies behind one that is behind its home.
            stop = start + _SLOTS_AT_ONCE
            while stop < self.slots and self._at[stop, 2] != _EMPTY:
                stop += 1
            some = self._at[start:stop]
            some = some[(some[:, 2] != _EMPTY) & (some[:, 2] != _GONE)]
            some = some[some[:, 0].argsort(kind="stable")]
            yield some, self._homes(some) >= stop
            start = stop

    def forget(self, file: int) -> None:
        """Drop the entries of a file."""
        for start in range(0, self.slots, _SLOTS_AT_ONCE):
            some = self._at[start : start + _SLOTS_AT_ONCE]
            own = (some[:, 2] - np.uint64(1)) >> np.uint64(_LINE_BITS) == file
            # Not empty, as probes for others go on behind it.
            some[own] = 0, 0, _GONE

    def close(self) -> None:
        """Give back the memory, or the file."""
        del self._at
        if self._file is not None:
            self._file.close()


def _reserve(file: IO[bytes], size: int) -> None:
    # Before it is mapped: where a mapped page finds no space the system ends the process without a word.
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        zeros = bytes(1 << 20)
        for start in range(0, size, len(zeros)):
            file.write(zeros[: size - start])
        file.flush()


def digests(ids: Sequence[str]) -> bytes:
    """What stands for ids where many are kept: the BLAKE2b of each, 16 bytes, one after the other."""
    return b"".join([hashlib.blake2b(own.encode(), digest_size=_DIGEST).digest() for own in ids])


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
        self.units[unit] = zlib.compress(places.tobytes(), 1), digests(ids)
        self.size += _DIGEST * len(ids)
        if self.size > _IDS_BYTES:
            raise TooManyIdsError
        return []

    def together(self, most: int) -> Iterator[list[int]]:
        """The work units that have ids, several at a time that have so many in all, or one."""
        units: list[int] = []
        count = 0
        for unit, (_, packed) in self.units.items():
            size = len(packed) // _DIGEST
            if units and count + size > most:
                yield units
                units, count = [], 0
            units.append(unit)
            count += size
        if units:
            yield units

    def unpack(self, unit: int) -> tuple[np.ndarray, bytes, np.ndarray]:
        """Rows, digests and lines of a work unit's ids."""
        places, packed = self.units[unit]
        rows, lines = np.cumsum(np.frombuffer(zlib.decompress(places), np.int64).reshape(2, -1), axis=1)
        return rows, packed, lines
