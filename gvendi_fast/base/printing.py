"""The one place that writes for people and pipes: lines, JSON, and the console that draws tables and bars.

Text of data, models, endpoints and file systems is spelled out where a terminal would obey it (`printable`). Characters
that a stream's encoding lacks are written as escapes. A failed write to stdout is an OSError that names it; one to
stderr is passed over, for what is said on the way is not worth a run.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

from gvendi_fast.base.os_errors import name
from gvendi_fast.base.printable import OBEYED, message, printable

if TYPE_CHECKING:
    from rich.console import Console

STDOUT = "standard output"
_DELETE_AND_OTHERS = re.compile(f"(?![\t\n])(?:{OBEYED.pattern})")


def put(text: str = "", stream: TextIO | None = None) -> None:
    """Write one line, to stdout if no stream is given; a newline in the text is an escape like others."""
    _put(printable(text), stream)


def put_text(text: str, stream: TextIO | None = None) -> None:
    """Write a text whose newlines and tabs are its own."""
    _put(printable(text, "\n\t"), stream)


def warn(text: str) -> None:
    """A warning on stderr."""
    put_error(f"warning: {text}")


def put_error(text: str) -> None:
    """A message on stderr, of one or several lines."""
    _put(message(text), sys.stderr, is_note=True)


def note(text: str) -> None:
    """One line on stderr, about what goes on."""
    _put(printable(text), sys.stderr, is_note=True)


def put_json(value: Any) -> None:
    """One line of JSON on stdout, of any encoding."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    _put(json_text(value, is_ascii=not encoding.startswith("utf")), None)


def json_text(value: Any, indent: int | None = None, is_ascii: bool = False) -> str:
    r"""JSON that a terminal shows as it is: whatever it would obey is a \u escape, which reads back as the same value.

    Raises ValueError for numbers that JSON has no form for.
    """
    text = json.dumps(value, ensure_ascii=is_ascii, allow_nan=False, indent=indent)
    return _DELETE_AND_OTHERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def console(stream: TextIO | None = None) -> Console:
    """A console of a stream (default: stdout) for which no text is markup; give it `Text`, made printable."""
    from rich.console import Console

    class Plain(Console):
        """rich would end the process without a word."""

        def on_broken_pipe(self) -> None:
            raise

    return Plain(file=guarded(stream), markup=False, emoji=False, highlight=False)


def guarded(stream: TextIO | None = None) -> TextIO:
    """The stream (default: stdout) as this module writes to it: for libraries that print by themselves."""
    if stream is None:
        stream = sys.stdout
    if isinstance(stream, _Guarded):
        return stream
    is_stdout = stream is None or stream is sys.stdout
    return _Guarded(
        stream, STDOUT if is_stdout else "the output", is_note=stream is sys.stderr and not is_stdout
    )


def _put(text: str, stream: TextIO | None, is_note: bool = False) -> None:
    out = _Guarded(stream, "standard error", True) if is_note else guarded(stream)
    out.write(text + "\n")
    out.flush()


class _Guarded:
    """A text stream; all else than write and flush is the stream's own. None stands for one that is closed."""

    def __init__(self, stream: TextIO | None, called: str, is_note: bool) -> None:
        self._stream, self._called, self._is_note = stream, called, is_note

    def write(self, text: str) -> int:
        """Write characters that the stream lacks as escapes."""
        if self._stream is None:
            self._failed(OSError(errno.EBADF, os.strerror(errno.EBADF)))
            return len(text)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what is written."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self._is_note:
            raise name(error, self._called)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)
