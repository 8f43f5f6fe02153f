"""What a run reports as it proceeds, and who shows it: a live bar on a terminal, plain lines elsewhere, or nobody."""

from __future__ import annotations

import sys
import threading
import time
from typing import Protocol, TextIO

from gvendi_fast.base.printable import printable
from gvendi_fast.base.printing import console, put

# Seconds between two plain lines.
LINE_EVERY = 10.0


class Progress(Protocol):
    """What a run reports as it proceeds. A run calls it from its own thread; those of this module take any thread's."""

    def start(self, rows: int, done: int) -> None:
        """The run begins, or goes on with more rows. rows: of the corpus; done: how many of them are finished."""

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        """One more batch: rows read, tokens run through the proxy, rows rejected."""

    def note(self, text: str) -> None:
        """One line of text, for steps that counts of rows do not describe."""

    def close(self) -> None:
        """The run has ended, with or without an error."""


class Silent:
    """A Progress that says nothing."""

    def start(self, rows: int, done: int) -> None:
        """Does nothing."""

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def progress_for(stream: TextIO | None = None, verb: str = "sketching") -> Bar | Lines:
    """A bar for a terminal, lines for any other stream (default: stderr); `verb` says what is done with the rows."""
    stream = sys.stderr if stream is None else stream
    return Bar(stream, verb) if stream.isatty() else Lines(stream, verb)


class _Counts:
    """Rows and tokens so far, and the rates that follow from them."""

    def __init__(self) -> None:
        self.rows = self.total = self.fresh = self.tokens = self.rejected = 0
        self.began = time.monotonic()
        # One that a signal's handler may enter again.
        self._door = threading.RLock()

    def start(self, rows: int, done: int) -> None:
        self.total, self.rows, self.began = rows, done, time.monotonic()

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        with self._door:
            self.rows, self.fresh = self.rows + rows, self.fresh + rows
            self.tokens, self.rejected = self.tokens + tokens, self.rejected + rejected

    def rates(self) -> str:
        if not self.fresh and self.rows == self.total:
            return "nothing is left to do"
        seconds = max(time.monotonic() - self.began, 1e-9)
        text = f"{self.fresh / seconds:,.1f} rows/s"
        if self.tokens:
            text += f", {self.tokens / seconds:,.0f} tokens/s"
        if self.fresh and self.rows < self.total:
            text += f", {clock((self.total - self.rows) * seconds / self.fresh)} left"
        now = " in this run" if self.fresh < self.rows else ""
        return text + (f", {self.rejected:,} rejected{now}" if self.rejected else "")


class Lines:
    """Progress as plain lines, one every ten seconds, for logs and pipes."""

    def __init__(self, stream: TextIO, verb: str = "sketching") -> None:
        self.stream, self.verb, self.counts, self.last = stream, verb, _Counts(), 0.0

    def start(self, rows: int, done: int) -> None:
        """See `Progress`."""
        self.counts.start(rows, done)
        self.last = time.monotonic()
        self._say(
            f"{self.verb} {rows:,} row{'s' * (rows != 1)}"
            + (f", {done:,} of them are done already" if done else "")
        )

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        """See `Progress`."""
        self.counts.advance(rows, tokens, rejected)
        if time.monotonic() - self.last >= LINE_EVERY:
            self.last = time.monotonic()
            self._say(f"{self.counts.rows:,}/{self.counts.total:,} rows, {self.counts.rates()}")

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._say(text)

    def close(self) -> None:
        """See `Progress`."""
        self._say(f"{self.counts.rows:,}/{self.counts.total:,} rows, {self.counts.rates()}")

    def _say(self, text: str) -> None:
        put(text, self.stream)


class Bar:
    """Progress as a live bar on a terminal."""

    def __init__(self, stream: TextIO, verb: str = "sketching") -> None:
        from rich import progress as rich

        self.counts = _Counts()
        columns = (
            rich.TextColumn(verb, markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[rates]}", markup=False),
        )
        self.bar = rich.Progress(*columns, console=console(stream))
        self.task = None

    def start(self, rows: int, done: int) -> None:
        """See `Progress`."""
        self.counts.start(rows, done)
        self.bar.start()
        if self.task is None:
            self.task = self.bar.add_task("", total=rows, completed=done, rates="")
        else:
            self.bar.update(self.task, total=rows, completed=done)

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        """See `Progress`."""
        self.counts.advance(rows, tokens, rejected)
        self.bar.update(self.task, completed=self.counts.rows, rates=self.counts.rates())

    def note(self, text: str) -> None:
        """See `Progress`."""
        self.bar.console.print(printable(text), soft_wrap=True)

    def close(self) -> None:
        """See `Progress`."""
        self.bar.stop()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
