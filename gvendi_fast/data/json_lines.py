"""JSON lines: one row a line. A line is never held whole if it is too long, and none is decoded here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from gvendi_fast.data.lines import Lines, lines_ahead
from gvendi_fast.data.rows import Reason, decode_line
from gvendi_fast.data.unpacking import BOM, Text

_PIECE = 1 << 20


def json_lines(
    text: Text, offset: int, line: int, digest: Any, max_bytes: int, together: int = 0
) -> Iterator[tuple[int, int, bytes | Reason | Lines]]:
    """(line number, byte offset, line) of every line that is not empty, as `sources.read_lines` gives them."""
    if offset:
        text.skip(offset)
    stream = text.stream
    readline, update = stream.readline, None if digest is None else digest.update
    # Space for a line's end and a mark, so that a line which fills what is read is too long.
    most = max_bytes + 2 + len(BOM)
    # Lines before the one come together, and bytes before the other one by one.
    first_alone, alone_until = line + together, offset
    while True:
        if line < first_alone and offset >= alone_until:
            lines, size = lines_ahead(stream, line, offset, first_alone - line, max_bytes)
            if lines is not None:
                if update is not None:
                    update(lines.raw)
                yield line, offset, lines
                offset += size
                line += len(lines)
                continue
            alone_until = offset + size
        raw = readline(most)
        size = len(raw)
        if update is not None:
            update(raw)
        if size <= max_bytes and raw[:1] == b"{" and raw[-2:] == b"}\n":
            # Nearly every line.
            yield line, offset, raw[:-1]
            offset += size
            line += 1
            continue
        content = raw.rstrip(b"\r\n")
        if size > max_bytes or len(content) == size or content.startswith(BOM):
            # Few lines: one that may be too long, the last one, and one with a mark.
            if not size:
                break
            if content.startswith(BOM):
                _remark(text, line)
                content = content.removeprefix(BOM)
            if size == most and raw[-1:] != b"\n":
                mark, end, is_blank = size - len(raw.removeprefix(BOM)), raw[-2:], not content.strip()
                del raw, content
                rest, end, is_blank = _skip_line(stream, digest, end, is_blank)
                size += rest
                content = (
                    b""
                    if is_blank
                    else too_long(size - mark - len(end) + len(end.rstrip(b"\r\n")), max_bytes)
                )
            elif len(content) > max_bytes:
                content = too_long(len(content), max_bytes) if content.strip() else b""
            elif text.damage is not None and raw[-1:] != b"\n" and isinstance(decode_line(content), Reason):
                # The line in which the archive ends is a part of the damage, unless it is whole.
                break
        if content and not (content.isspace() if type(content) is bytes else False):
            yield line, offset, content
        offset += size
        line += 1
    if text.damage is not None:
        yield line, offset, text.damage


def too_long(size: int, max_bytes: int) -> Reason:
    """Why a row of so many bytes is refused."""
    return Reason(f"too long: {size:,} bytes, --max-row-bytes is {max_bytes:,}")


def _remark(text: Text, line: int) -> None:
    if line > 1 and not any("byte order mark" in remark for remark in text.remarks):
        text.remarks.append(
            f"has a byte order mark in its midst (line {line:,}), as joined files do, which is skipped"
        )


def _skip_line(stream: IO[bytes], digest: Any, end: bytes, is_blank: bool) -> tuple[int, bytes, bool]:
    """Read to the end of a line without keeping it: its bytes, the last two, and whether all are white space."""
    size = 0
    while piece := stream.readline(_PIECE):
        size += len(piece)
        end = (end + piece[-2:])[-2:]
        is_blank = is_blank and not piece.strip()
        if digest is not None:
            digest.update(piece)
        if end.endswith(b"\n"):
            break
    return size, end, is_blank
