"""Messages over a pair of pipes between a process and its child, in which other people's code may run.

    message = secret [16 bytes] · number [8] · length [8] · content
The secret is drawn for each pair and comes first on the way to the child; an answer has the number of the message that
it answers. So whatever else is written to the pipe, or comes late, counts as no answer. A check can still find the
secret in its own process: this is no border against code that wants to cheat.
"""

from __future__ import annotations

import os
import select
import struct
import time

_SECRET = 16
_NUMBERS = struct.Struct("<QQ")
_HEAD = _SECRET + _NUMBERS.size
_PIECE = 1 << 20
# Longer ones are not made; a length is believed up to here.
_LONGEST = 1 << 40


class GarbledError(Exception):
    """The other end's pipe held something that is no answer."""


class Channel:
    """One end: the file descriptors to read from and to write to. `until` is a time.monotonic() or None for no end."""

    def __init__(self, reading: int, writing: int, secret: bytes) -> None:
        self._reading, self._writing, self._secret = reading, writing, secret
        # Of the message sent last by the parent, or received last by the child.
        self.number = 0
        self._read = bytearray()
        for end in (reading, writing):
            os.set_inheritable(end, False)
            os.set_blocking(end, False)

    @classmethod
    def of_parent(cls, reading: int, writing: int) -> Channel:
        """Tells the child the secret."""
        secret = os.urandom(_SECRET)
        os.write(writing, secret)
        return cls(reading, writing, secret)

    @classmethod
    def of_child(cls, reading: int, writing: int) -> Channel:
        return cls(reading, writing, os.read(reading, _SECRET))

    def close(self) -> None:
        for end in (self._reading, self._writing):
            os.close(end)

    def ask(self, content: bytes, until: float | None = None) -> bool:
        """Send a message of the parent; False where it was not taken in time. ConnectionError: nobody reads."""
        self.number += 1
        return self.send(content, until)

    def send(self, content: bytes, until: float | None = None) -> bool:
        """Send with the number as it is: an answer of the child."""
        head = self._secret + _NUMBERS.pack(self.number, len(content))
        left = memoryview(head + content)
        while left:
            if not _ready(self._writing, select.POLLOUT, until):
                return False
            try:
                left = left[os.write(self._writing, left[:_PIECE]) :]
            # A pipe with less room than a piece, filled by another process since.
            except BlockingIOError:
                continue
        return True

    def receive(self, until: float | None = None, any_number: bool = False) -> bytes | None:
        """The next message, None where none came in time.

        Raises EOFError where the other end is closed, and GarbledError where what came is no message or, unless
        `any_number`, has another number than this end's; for a child, whose number it becomes, any will do.
        """
        while (found := self._take(any_number)) is None:
            if not _ready(self._reading, select.POLLIN, until):
                return None
            try:
                piece = os.read(self._reading, _PIECE)
            except BlockingIOError:
                continue
            if not piece:
                raise EOFError("the pipe was closed")
            self._read += piece
        return found

    def _take(self, any_number: bool) -> bytes | None:
        head = bytes(self._read[:_HEAD])
        if head[:_SECRET] != self._secret[: len(head)]:
            raise GarbledError("what came is no message")
        if len(head) < _HEAD:
            return None
        number, length = _NUMBERS.unpack(head[_SECRET:])
        if length > _LONGEST or not (any_number or number == self.number):
            raise GarbledError("what came answers no message")
        if len(self._read) < _HEAD + length:
            return None
        content = bytes(self._read[_HEAD : _HEAD + length])
        del self._read[: _HEAD + length]
        self.number = number
        return content


def _ready(end: int, event: int, until: float | None) -> bool:
    """Wait for a pipe; False at the end of the time."""
    waiting = select.poll()
    waiting.register(end, event)
    left = None if until is None else max(0.0, until - time.monotonic())
    # Rounded up, so that a wait of less than a millisecond is one.
    return bool(waiting.poll(None if left is None else int(left * 1000) + (left > 0)))
