"""The pieces of a corpus, which are its rows in order: runs of rows of its files, cut into work units.

As a rule a file is one piece. A file that was appended to when other files came behind it already has its new rows in a
piece of their own, at the end, so that no row that is sketched changes its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of a file.

    file: index among the corpus' files.
    first: the number of its first row in the file, from 0.
    rows: how many it has.
    """

    file: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Step:
    """A piece that is to be read.

    path: where its file lies.
    file: index among the corpus' files; None: the next one.
    recorded_as: the name that rows have it from, if it is not `path`.
    first: number of its first row in the file.
    rows: how many to read; None: all there are.
    is_rest: what is behind the rows of an earlier step; there may be nothing.
    """

    path: str
    file: int | None = None
    recorded_as: str | None = None
    first: int = 0
    rows: int | None = None
    is_rest: bool = False


def pieces_of(manifest: Mapping[str, Any]) -> list[Piece]:
    """The pieces of a corpus by its units.json, whose files say how many rows they have."""
    if "pieces" in manifest:
        return [Piece(*numbers) for numbers in manifest["pieces"]]
    return [Piece(file, 0, entry["rows"]) for file, entry in enumerate(manifest["files"])]


def is_cut(manifest: Mapping[str, Any], file: int) -> bool:
    """Whether a file was read, and fingerprinted, up to its last row in use only, as --limit cut it."""
    if "earlier" in manifest:
        return bool(manifest["files"][file].get("cut", False))
    return file == len(manifest["files"]) - 1 and manifest.get("limit") == manifest.get("rows")


def placed(pieces: list[Piece]) -> Iterator[tuple[Piece, int]]:
    """Each piece with the number in the corpus of its first row."""
    first = 0
    for piece in pieces:
        yield piece, first
        first += piece.rows
