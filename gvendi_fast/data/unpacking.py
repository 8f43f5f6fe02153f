"""The text of a file, unpacked and in UTF-8, as one stream that ends where the file is damaged.

A stream raises for damage only what the system refuses: an archive that is cut short or changed gives every byte that
can still be unpacked, ends there, and says afterwards why (`Text.damage`). To find the last of them, the archive is
unpacked a second time up to the damage, there byte by byte: libraries keep what they had unpacked when they noticed.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from typing import IO, Any

from gvendi_fast.base.places import open_file
from gvendi_fast.base.stand_ins import stand_in, stand_in_at
from gvendi_fast.data.kinds import packing_of
from gvendi_fast.data.listing import SKIP, UnreadableFileError, check_file
from gvendi_fast.data.rows import Reason

BOM = b"\xef\xbb\xbf"
_BUFFER = 1 << 17
# Bytes of a damaged archive that are unpacked at a time, close to the damage and closer.
_FINER = (1 << 11, 1)
_HEADER = 8
# How zstd refuses a frame whose window is larger than 2^27 bytes, before it takes memory.
_WINDOW = "requires too much memory"
# What packed files begin with, whatever their names say -> the suffix that names them.
_PACKED = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": None,
    b"\xfd7zXZ\0": None,
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}
# Longest first: UTF-16's mark begins UTF-32's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Where the zeros lie among the first bytes of a text that begins with ASCII, as JSON and a header do.
_ZEROS = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}
_RETURN = re.compile(rb"\r[^\n]")


def _as_no_utf8(error: UnicodeError) -> tuple[str, int]:
    """Half a character in place of what cannot be decoded: no UTF-8 either, so that the row is refused as such."""
    return "\udfff", error.end  # type: ignore[attr-defined]


codecs.register_error("gvendi-no-utf-8", _as_no_utf8)


class Text:
    """A file's text, for one reader.

    stream: its bytes, unpacked, as UTF-8.
    head: what it begins with, up to 128 KB.
    remarks: sentences on what was odd about the file so far, which go on "corpus: 'path' ...".
    can_seek: whether `stream` can be moved to an offset without reading up to it.
    """

    def __init__(self, path: str, kind: str, remarks: list[str] | None = None) -> None:
        """Raises UnreadableFileError for what is no file, a file that lies in the place of another, one that is packed
        behind another name, and an archive that asks for too much memory, and OSError where the system cannot read.
        """
        check_file(path)
        check_itself(path, stand_in_at(path))
        packing = packing_of(kind)
        self.path, self.remarks = path, [] if remarks is None else remarks
        self._unpacked = _Unpacked(path, packing) if packing else None
        raw: IO[bytes] = open_file(path, _BUFFER)
        if self._unpacked is not None:
            raw.close()
            raw = io.BufferedReader(self._unpacked, _BUFFER)
        self.stream, self.can_seek = raw, packing is None
        try:
            self._decode()
            check_itself(path, stand_in(self.head) or _packed(self.head))
        except BaseException:
            self.close()
            raise

    def _decode(self) -> None:
        head = self.stream.peek(_BUFFER)  # type: ignore[attr-defined]
        mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
        encoding = _MARKS.get(mark) or _ZEROS.get(tuple(byte == 0 for byte in head[:4]))
        if encoding is not None:
            self.remarks.append(f"is {encoding.upper()}, and read as such")
            self.stream.read(len(mark))
            self._through(_Decoded(self.stream, encoding))
            head = self.stream.peek(_BUFFER)  # type: ignore[attr-defined]
        if b"\n" not in head and _RETURN.search(head):
            self.remarks.append("ends its lines with carriage returns alone, which are read as newlines")
            self._through(_Returned(self.stream))
            head = self.stream.peek(_BUFFER)  # type: ignore[attr-defined]
        self.head = head

    def _through(self, raw: io.RawIOBase) -> None:
        self.stream, self.can_seek = io.BufferedReader(raw, _BUFFER), False

    @property
    def damage(self) -> Damage | None:
        """Why the text ended before the archive did; None where it has not, or not yet."""
        return None if self._unpacked is None else self._unpacked.damage

    def skip(self, offset: int) -> None:
        """Go to this byte of the text, from its beginning."""
        if self.can_seek:
            self.stream.seek(offset)
        while not self.can_seek and offset and (piece := self.stream.read(min(offset, _BUFFER))):
            offset -= len(piece)

    def close(self) -> None:
        """Close the file."""
        self.stream.close()

    def __enter__(self) -> Text:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_itself(path: str, what: str | None) -> None:
    """UnreadableFileError where `what` says what a file is in place of a corpus."""
    if what is not None:
        raise UnreadableFileError(f"corpus: '{path}' is {what}, or {SKIP}")


class Damage(Reason):
    """The entry in place of the rows behind a damage, of which nobody knows how many they are."""

    __slots__ = ()


def lost(what: str, where: str) -> Damage:
    """what: "archive" or "file"; where: what is wrong with it, and at which byte."""
    return Damage(f"damaged {what}: {where}; how many rows are lost is not known")


def _packed(head: bytes) -> str | None:
    for start, suffix in _PACKED.items():
        if head.startswith(start):
            return f"packed: {f'name it {suffix}' if suffix else 'unpack it'}"
    return None


class _Counted:
    """A file of which is known how many bytes were read; behind `close_from` they come in pieces of `piece`."""

    def __init__(self, path: str, piece: int = _BUFFER, close_from: int = 0) -> None:
        self._file = open_file(path, 0)
        self._piece, self._close_from = piece, close_from
        self.given = 0

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()

    def readable(self) -> bool:
        return True

    def read(self, size: int) -> bytes:
        # A few bytes are of a header, which gzip wants whole.
        if size > _HEADER:
            size = min(size, max(self._piece, self._close_from - self.given))
        content = self._file.read(size)
        self.given += len(content)
        return content


class _Unpacked(io.RawIOBase):
    """What an archive holds, up to its end or to its damage."""

    def __init__(self, path: str, packing: str) -> None:
        self._path, self._packing = path, packing
        self._open(_Counted(path))
        self._given = 0
        # After a damage: what can still be given.
        self._rest: bytearray | None = None
        self.damage: Damage | None = None

    def _open(self, file: _Counted) -> None:
        self._file = file
        if self._packing == "gz":
            self._stream: Any = gzip.GzipFile(fileobj=file)  # type: ignore[call-overload]
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        if self._rest is None:
            try:
                content = self._stream.read(len(buffer))
            except (EOFError, zlib.error, OSError) as error:
                self._check(error)
                self._salvage()
        if self._rest is not None:
            content = bytes(self._rest[: len(buffer)])
            del self._rest[: len(buffer)]
        buffer[: len(content)] = content
        self._given += len(content)
        return len(content)

    def _check(self, error: Exception) -> None:
        # An error number means that the disk failed; without one the archive is damaged.
        if getattr(error, "errno", None) is not None:
            raise error
        if _WINDOW in str(error):
            raise UnreadableFileError(
                f"corpus: '{self._path}' was packed with a window of more than 128 MB, which unpacking would hold in "
                f"memory; pack it again with one that is smaller: zstd -d --long=31 -c FILE | zstd; {SKIP}"
            ) from error

    def _salvage(self) -> None:
        """Unpack again up to the damage, and keep what comes between the last byte given and it."""
        noticed, piece = self._file.given, _BUFFER
        for finer in _FINER:
            self._file.close()
            # More than any library reads at once comes in finer pieces.
            self._open(_Counted(self._path, finer, max(0, noticed - 3 * piece)))
            error = self._unpack_again()
            noticed, piece = self._file.given, finer
        if error is not None:
            self.damage = lost("archive", self._where(error))

    def _unpack_again(self) -> Exception | None:
        skipped, self._rest = 0, bytearray()
        try:
            while skipped < self._given:
                skipped += len(self._stream.read(min(_BUFFER, self._given - skipped)))
            while byte := self._stream.read(1):
                self._rest += byte
        except (EOFError, zlib.error, OSError) as error:
            self._check(error)
            return error
        return None

    def _where(self, error: Exception) -> str:
        place = f"at byte {self._file.given:,}"
        if isinstance(error, EOFError) or "runcated" in str(error):
            return f"it ends too early, {place}"
        if isinstance(error, gzip.BadGzipFile):
            if "Not a gzipped" not in str(error):
                return f"its checksum does not agree {place}, so that rows before it may be others than were packed"
            what = "what follows" if self._given or self._rest else "what it holds"
            return f"{what} {place} is no gzip"
        return f"it cannot be unpacked {place}"


class _Over(io.RawIOBase):
    """A text made of another one, which it closes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Decoded(_Over):
    """A text of another encoding as UTF-8; what cannot be decoded is no UTF-8 there either."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        super().__init__(stream)
        self._rest = b""
        self._decoder = codecs.getincrementaldecoder(encoding)("gvendi-no-utf-8")

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = self._stream.read(_BUFFER)
            self._rest = self._decoder.decode(piece, final=not piece).encode("utf-8", "surrogatepass")
            if not piece and not self._rest:
                return 0
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


class _Returned(_Over):
    """A text with newlines for its carriage returns."""

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece.replace(b"\r", b"\n")
        return len(piece)
