"""Files that lie in the place of others: pointers that were never fetched, pages sent instead of a file, archives."""

from __future__ import annotations

import os
import re

from gvendi_fast.base.places import open_file

# What a file begins with -> what it is, and the remedy.
_KINDS = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "a pointer of Git LFS, not the file: fetch it with 'git lfs pull'",
    ),
    (
        rb"(?:/|(?:\.\./)*\.git/)annex/objects/",
        "a pointer of git-annex, not the file: fetch it with 'git annex get'",
    ),
    (
        rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|\?xml)",
        "a web page, as servers send in place of a file that asks for a login or is gone: download it again",
    ),
    (rb"PK\x03\x04", "a zip archive: unpack it"),
    (rb"(?s:.{257})ustar", "a tar archive: unpack it"),
)
_HEAD = 512


def stand_in(head: bytes) -> str | None:
    """What a file that begins so is in the place of, with the remedy; None for any other."""
    return next((what for start, what in _KINDS if re.match(start, head, re.IGNORECASE)), None)


def stand_in_at(path: str | os.PathLike) -> str | None:
    """`stand_in` of a file."""
    with open_file(path) as stream:
        return stand_in(stream.read(_HEAD))
