"""How a synthesis run shows where it is: a live table on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from gvendi_fast.base.progress import LINE_EVERY

if TYPE_CHECKING:
    from gvendi_fast.synthesis.status import Status


def view_for(stream: TextIO | None = None) -> StatusTable | StatusLines:
    """The view that fits a stream (stderr unless said); a context manager and a `status.Watcher`."""
    stream = sys.stderr if stream is None else stream
    return StatusTable(stream) if stream.isatty() else StatusLines(stream)


def status_lines(status: Status) -> dict[str, str]:
    """What a status says, by name."""
    rejected = sum(status.rejected.values())
    decided = status.accepted + rejected
    reasons = sorted(status.rejected.items(), key=lambda item: -item[1])
    lines = {
        "pool": f"{status.pool:,} rows of {status.target:,} wanted; it began with {status.seeds:,}",
        "G-Vendi": f"{status.gvendi:.2f}, at the start {status.start_gvendi:.2f} (it grows with the rows)",
        "candidates": f"{decided:,}, of them accepted {status.accepted:,} ({_share(status.accepted, decided)})",
        "rejected": ", ".join(f"{stage} {n:,} ({_share(n, decided)})" for stage, n in reasons) or "none",
        "round": f"{status.round + 1}, with {status.clusters:,} cluster{'s' * (status.clusters != 1)}"
        if status.clusters
        else "none yet",
        "requests": f"{status.requests:,} answered",
        "tokens": f"{status.tokens[0]:,} in prompts, {status.tokens[1]:,} in answers",
    }
    if status.queued:
        lines["waiting"] = f"{status.queued:,} candidates that are answered, kept, and not decided yet"
    if status.cost is not None:
        lines["cost"] = f"{status.cost:,.4f}, in the currency of the prices"
    return lines


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


class StatusLines:
    """One plain line every ten seconds, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._last = stream, float("-inf")

    def __enter__(self) -> StatusLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def update(self, status: Status) -> None:
        """See `status.Watcher`."""
        if time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            self.say("; ".join(f"{k} {v}" for k, v in status_lines(status).items()))

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self.stream, flush=True)


class StatusTable:
    """A table that stays in place, on a terminal; it appears with the first block."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self.stream = stream
        self._live = Live(console=Console(file=stream), auto_refresh=False)
        self._shown = False

    def __enter__(self) -> StatusTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def say(self, text: str) -> None:
        """One line below the table, which stays as it is."""
        self._leave()
        print(text, file=self.stream, flush=True)

    def _leave(self) -> None:
        if self._shown:
            self._live.stop()
            self._shown = False

    def update(self, status: Status) -> None:
        """See `status.Watcher`."""
        from rich.table import Table
        from rich.text import Text

        if not self._shown:
            self._live.start()
            self._shown = True
        grid = Table.grid(padding=(0, 2))
        for name, value in status_lines(status).items():
            grid.add_row(Text(name, style="bold"), Text(value))
        self._live.update(grid, refresh=True)
