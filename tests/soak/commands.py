"""The `gvendi` command in a forked child: its imports are done, so an attack hits the work and costs no seconds.

The process that forks must have no second thread and must have run no model; `preload` imports what the commands need.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.children import SYNTHESIS

# What a child of any command would import first.
PRELOAD = (
    "gvendi_fast.cli.app",
    "gvendi_fast.sketching.corpus",
    "gvendi_fast.analysis.scoring",
    "gvendi_fast.analysis.compare",
    "gvendi_fast.selection",
    "gvendi_fast.clusters.kmeans",
    "gvendi_fast.report.page",
    "gvendi_fast.report.data",
    "gvendi_fast.report.figures",
    "gvendi_fast.data.originals",
    "gvendi_fast.data.pool",
    *SYNTHESIS,
    "gvendi_fast.synthesis.report.data",
    "transformers.models.llama.modeling_llama",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
)
# A run that stays alive so long hangs: undisturbed, none takes a tenth of it.
# By the clock, so long that only a hang reaches it.
LIMIT_S = 900.0
# Twelve times what an undisturbed run maps; a row that takes more fails with MemoryError in place of the machine.
MEMORY_BYTES = 12 << 30
_POLL_S = 0.004


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    code: exit code, or minus the signal's number. hung: it was killed at the time limit. seconds: that it ran.
    """

    argv: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float
    hung: bool

    @property
    def said(self) -> str:
        """Both outputs."""
        return f"{self.out}\n{self.err}"


class Command:
    """`gvendi ARGV` running in the folder `cwd`, in a session of its own.

    before: called in the child, before the command begins.
    """

    def __init__(
        self,
        argv: Sequence[str],
        cwd: Path,
        before: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.argv = tuple(map(str, argv))
        # Not files: a limit of their size would meet them too.
        self._streams = [_Stream(), _Stream()]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._began = time.monotonic()
        # So that no signal meets a child that is not the command yet.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        self.pid = os.fork()
        if self.pid == 0:
            _become(self.argv, cwd, [stream.writing for stream in self._streams], before, environment or {})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        for stream in self._streams:
            os.close(stream.writing)
        self._status: int | None = None

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        for stream in self._streams:
            stream.drain()
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is None

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether it has ended."""
        until = time.monotonic() + seconds
        while self.is_running() and time.monotonic() < until:
            time.sleep(_POLL_S)
        return not self.is_running()

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.is_running():
            os.kill(self.pid, number)

    def end(self, seconds: float = LIMIT_S) -> Ended:
        """Wait for its end; at the limit it is killed and counts as hung."""
        hung = not self.wait(seconds)
        if hung:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._status = signal.SIGKILL
        # What it started and left behind is of its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        took = time.monotonic() - self._began
        out, err = (stream.close() for stream in self._streams)
        return Ended(self.argv, os.waitstatus_to_exitcode(self._status), out, err, took, hung)


class _Stream:
    """What a child writes to one of its outputs, through a pipe that holds more than any of them writes."""

    def __init__(self) -> None:
        reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 1 << 20)
        os.set_blocking(reading, False)
        self._reading, self._found = reading, bytearray()

    def drain(self) -> None:
        """Take what is there."""
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._reading, 1 << 16):
                self._found += block

    def close(self) -> str:
        """All that was written."""
        self.drain()
        os.close(self._reading)
        return self._found.decode("utf-8", "backslashreplace")


def run(argv: Sequence[str], cwd: Path, **more) -> Ended:
    """The command, run to its end; arguments as of `Command`."""
    return Command(argv, cwd, **more).end()


def preload(names: Iterable[str] = PRELOAD) -> None:
    """Import what the commands need, and check that it left no second thread."""
    for name in names:
        # Some live only while another one is imported.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if threading.active_count() > 1:
        raise RuntimeError(f"threads that a fork would lose: {threading.enumerate()}")


def _become(
    argv: tuple[str, ...],
    cwd: Path,
    outputs: Sequence[int],
    before: Callable[[], None] | None,
    environment: dict[str, str],
) -> None:
    """Run the command and end the process as an interpreter of its own would."""
    code = 1
    try:
        os.setsid()
        os.environ.update(environment)
        os.chdir(cwd)
        _redirect(outputs)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if before is not None:
            before()
        code = _command(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _redirect(outputs: Sequence[int]) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, handle in enumerate((nothing, *outputs)):
        os.dup2(handle, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)
        for number, mode in enumerate("rww")
    )


def _command(argv: tuple[str, ...]) -> int:
    from gvendi_fast.cli import app

    sys.argv = ["gvendi", *argv]
    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    # It came before there was a command.
    except KeyboardInterrupt:
        return 130
    try:
        app.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # What comes from here on is not the command's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    # An interpreter says so too, and gives this code.
    except OSError:
        traceback.print_exc()
        code = 120
    sys.stderr.flush()
    return code
