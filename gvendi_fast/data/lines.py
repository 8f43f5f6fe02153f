"""Lines of JSON that are taken together: whatever can be told of all of them at once is, without a step for each.

Nearly every line of a text of JSON lines begins with "{" and ends with "}" and a newline. Those of one piece of the
text make a `Lines`; any other line goes its own way (json_lines.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO
from zlib import crc32

import numpy as np

from gvendi_fast.data.records import MAX_DEPTH, MAX_SCANNED, Reason, decode_lines

_NEWLINE, _OPENS, _CLOSES = b"\n{}"
# "[" and "{" differ by this bit only.
_CASE = 0x20
# Fewer in a piece of 128 KB, which are long, are quicker one by one: each is in the processor's cache for all steps.
_FEWEST = 128
# Bytes of a line into which its number is folded.
_FOLDED = 4


@dataclass(slots=True, eq=False)
class Lines:
    """Consecutive lines, each of which may be an object.

    raw: they, with their newlines.
    line: number of the first, from 1.
    offset: byte of the text where it begins.
    ends: of each the place of its newline in `raw`, int64 [n].
    """

    raw: bytes
    line: int
    offset: int
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def part(self, start: int, stop: int) -> Lines:
        """Those from `start` to before `stop`."""
        if start == 0 and stop >= len(self.ends):
            return self
        ends = self.ends[start:stop]
        begin = int(self.ends[start - 1]) + 1 if start else 0
        return Lines(
            self.raw[begin : int(ends[-1]) + 1], self.line + start, self.offset + begin, ends - begin
        )

    def digest(self, so_far: int) -> int:
        """`unit_digests.line_digest` with each of them in turn.

        A checksum so far that is changed by a number is the same as one of content whose first bytes are changed by it.
        """
        content = np.frombuffer(bytearray(self.raw.replace(b"\n", b"")), np.uint8)
        count = len(self.ends)
        # Where each begins once the newlines are gone.
        begins = np.concatenate(([0], self.ends[:-1] - np.arange(count - 1)))
        numbers = np.arange(self.line, self.line + count).astype("<u4").view(np.uint8).reshape(count, _FOLDED)
        content[begins[:, None] + np.arange(_FOLDED)] ^= numbers
        return crc32(content, so_far)

    def split(self) -> list[bytes]:
        """Each without its newline."""
        return self.raw[:-1].split(b"\n")

    def records(self) -> Iterator[dict | Reason]:
        """Each as `records.decode_line` gives it, decoded when its turn comes."""
        opens = np.flatnonzero((np.frombuffer(self.raw, np.uint8) | _CASE) == _OPENS)
        few = np.diff(np.searchsorted(opens, self.ends), prepend=0) <= MAX_DEPTH
        short = np.diff(self.ends, prepend=-1) <= MAX_SCANNED
        return decode_lines(self.split(), (few & short).tolist())


def lines_ahead(
    stream: IO[bytes], line: int, offset: int, most: int, max_bytes: int
) -> tuple[Lines | None, int]:
    """At most `most` lines that the stream has at hand, which are then read, if all of them are of the usual kind.

    If not, or if one has more than `max_bytes`, none is read, and there is how many bytes are to be read line by line
    before it is worth another look.
    """
    ahead = stream.peek()  # type: ignore[attr-defined]
    content = np.frombuffer(ahead, np.uint8)
    ends = np.flatnonzero(content == _NEWLINE)[:most]
    if len(ends) < _FEWEST:
        return None, int(ends[-1]) + 1 if len(ends) else 1
    size = int(ends[-1]) + 1
    begins = np.concatenate(([0], ends[:-1] + 1))
    sizes = ends - begins
    is_plain = (content[begins] == _OPENS).all() and (content[ends - 1] == _CLOSES).all()
    if not is_plain or sizes.min() < _FOLDED or sizes.max() > max_bytes:
        return None, size
    return Lines(stream.read(size), line, offset, ends), size
