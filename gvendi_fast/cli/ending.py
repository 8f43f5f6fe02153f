"""How a command ends: the one place that words whatever leaves it, and gives the exit code.

Errors for the user, of the operating system, of the parser, interruptions, and faults of this program: each is one
message on stderr. A traceback is shown behind --traceback or GVENDI_TRACEBACK=1 alone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import sentence
from gvendi_fast.base.printable import message
from gvendi_fast.base.printing import STDOUT, guarded, note, put_error, put_text, warn

DONE, ERROR, USAGE, INTERNAL, BROKEN_PIPE = 0, 1, 2, 70, 141
# A signal's number is added, as shells do.
SIGNALLED = 128
# Seconds until an interrupt that met a finalizer is given again.
_AGAIN_S = 0.01
EXIT_CODES = (
    "Exit codes: 0 done; 1 an error, in one message; 2 wrong usage; 3 done but for work units that failed too often, "
    "which are listed; 70 a fault of gvendi-fast itself (see --traceback); 75 a work unit made no progress "
    "(--hang-after), so that the process ended, and the same command goes on; "
    "129, 130, 141, 143 ended by a closed terminal, by Ctrl-C, by a reader that closed its pipe, by "
    "SIGTERM. Files are written whole or not at all, whatever the code."
)
# typer imports click or brings its own copy, by version: its public BadParameter is a UsageError, a ClickException.
_CLICK_ERROR = typer.BadParameter.__mro__[2]
_SIGNALS = {"SIGTERM": "asked to end (SIGTERM)", "SIGHUP": "its terminal was closed (SIGHUP)"}


def run(command: Callable[[Sequence[str]], int | None], words: Sequence[str]) -> NoReturn:
    """Call the command with its words and leave the process by SystemExit."""
    is_traced = wants_traceback(words)
    streams, _ = (sys.stdout, sys.stderr), _open_closed()
    stopped = _Stopped()
    with stopped.listening(), _no_stray_tracebacks(is_traced):
        # Help and libraries print by themselves.
        sys.stderr = sys.stderr and guarded(sys.stderr)
        sys.stdout = guarded(sys.stdout)
        try:
            code = _code(command, words, is_traced, stopped)
        finally:
            sys.stdout, sys.stderr = streams
    if code != DONE:
        _drop_unwritten()
    sys.exit(code)


def _code(
    command: Callable[[Sequence[str]], int | None], words: Sequence[str], is_traced: bool, stopped: _Stopped
) -> int:
    try:
        # PyTorch's libraries end the process where the current folder has been removed.
        os.getcwd()
        code = command(words) or DONE
        # What is still in the buffer fails here, where it can be said.
        sys.stdout.flush()
    # The last place: nothing that leaves a command goes further.
    except BaseException as error:
        if isinstance(error, SystemExit | typer.Exit):
            # rich ends the process by itself where it prints the help, and has nothing to say of it either.
            return BROKEN_PIPE if any(map(_is_closed_pipe, _chain(error))) else _exit_code(error)
        if is_traced:
            put_text("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
        stopped.let_go()
        return _say(error, stopped)
    return code


def _say(error: BaseException, stopped: _Stopped) -> int:
    """Print what ended a command; returns the exit code."""
    kept = getattr(error, "kept", None)
    if stopped.name or isinstance(error, typer.Abort) or _is_interrupt(error):
        why = _SIGNALS.get(stopped.name or "", "interrupted")
        note("")
        note(f"{why}: {kept or 'files are written whole or not at all, so none is damaged'}")
        return SIGNALLED + (getattr(signal, stopped.name) if stopped.name else signal.SIGINT)
    if isinstance(error, _CLICK_ERROR):
        return _usage(error)
    code = ERROR
    if isinstance(error, GvendiError):
        code, text = getattr(error, "exit_code", ERROR), f"{error}"
    elif isinstance(error, OSError):
        code = BROKEN_PIPE if _is_closed_pipe(error) else ERROR
        text = sentence(error)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = "memory ran out; try smaller --batch-tokens or --memory, fewer rows, or a larger machine"
    else:
        code, text = INTERNAL, _fault(error)
    prefix = "internal error" if code == INTERNAL else "error"
    put_error(f"{prefix}: {text}")
    if kept:
        put_error(kept)
    return code


def _fault(error: BaseException) -> str:
    """A fault of this program, with the line of it that was the last to run."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parents[1]
    around = (__file__, str(Path(__file__).with_name("app.py")))
    inner = [frame for frame in frames if frame.filename not in around]
    own = [frame for frame in inner if package in Path(frame.filename).parents] or inner
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    said = " ".join(str(error).split())
    what = type(error).__name__ + (f": {said[:300]}" if said else "")
    if isinstance(error, RecursionError):
        what = "something is nested too deeply"
    return (
        f"{what}{place}; this is a fault of gvendi-fast and not of yours: please run 'gvendi --traceback ...' and "
        "report what it prints"
    )


def _usage(error: BaseException) -> int:
    """A command line that the parser refused."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        # Some versions have printed it by now, others carry it as the message.
        if error.format_message():
            put_text(error.format_message(), sys.stderr)
        return USAGE
    if context is not None:
        put_error(context.get_usage())
        put_error(f"'{context.command_path} --help' shows what it takes")
    # typer's words for an exception of Python's, which say nothing.
    put_error(f"error: {error.format_message().replace(': Value error, ', ': ', 1)}")
    return error.exit_code


def _exit_code(error: BaseException) -> int:
    code = error.code if isinstance(error, SystemExit) else error.exit_code
    if isinstance(code, str):
        put_error(f"error: {code}")
        return ERROR
    return int(code or DONE)


def _is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: modules that are being imported turn it into errors of their own."""
    return any(isinstance(behind, KeyboardInterrupt) for behind in _chain(error))


def _is_closed_pipe(error: BaseException) -> bool:
    return isinstance(error, BrokenPipeError) and error.filename == STDOUT


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what is behind it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def wants_traceback(words: Sequence[str]) -> bool:
    """Whether --traceback stands before the command, or GVENDI_TRACEBACK is set."""
    for word in words:
        if word == "--traceback":
            return True
        if not word.startswith("-"):
            break
    return os.environ.get("GVENDI_TRACEBACK", "0") not in ("", "0")


class _Stopped:
    """Signals that end a command as Ctrl-C does, so that one way out serves all of them."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[str, object] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGHUP; what is ignored, such as SIGHUP under nohup, stays so."""
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[name] = signal.signal(number, self._stop)
        try:
            yield
        finally:
            for name, handler in self._before.items():
                signal.signal(getattr(signal, name), handler)

    def let_go(self) -> None:
        """From now on a second Ctrl-C ends the process at once and without a word."""
        if threading.current_thread() is threading.main_thread():
            self._before["SIGINT"] = signal.getsignal(signal.SIGINT)
            for name in self._before:
                signal.signal(getattr(signal, name), signal.SIG_DFL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        # asyncio's own handler lets its tasks end; a background process of a script may ignore Ctrl-C.
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)


@contextmanager
def _no_stray_tracebacks(is_traced: bool) -> Iterator[None]:
    """Errors that Python prints by itself, of threads and finalizers and in logs, as one line each."""
    if is_traced:
        yield
        return
    before = sys.unraisablehook, threading.excepthook, logging.getLogRecordFactory()

    def of_finalizer(found) -> None:
        if issubclass(found.exc_type, KeyboardInterrupt):
            # It was raised where nothing can be, and so it would be here: once more, when this has returned.
            again = threading.Timer(_AGAIN_S, _interrupt_main)
            again.daemon = True
            again.start()
        else:
            warn(f"{found.exc_type.__name__}: {found.exc_value} (while something was cleaned up)")

    def of_thread(found) -> None:
        if not issubclass(found.exc_type, SystemExit):
            warn(f"a thread ended by {found.exc_type.__name__}: {found.exc_value}")

    sys.unraisablehook, threading.excepthook = of_finalizer, of_thread
    logging.setLogRecordFactory(_Record)
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = before[:2]
        logging.setLogRecordFactory(before[2])


class _Record(logging.LogRecord):
    """What libraries log, such as names in a model's folder, without what a terminal obeys and without tracebacks."""

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self._error = self.exc_info[1] if isinstance(self.exc_info, tuple) else None
        self.exc_info = None

    def getMessage(self) -> str:  # noqa: N802
        """The message, made printable."""
        of = "" if self._error is None else f" ({type(self._error).__name__}: {self._error})"
        return message(super().getMessage() + of)


def _interrupt_main() -> None:
    """Ctrl-C for the main thread, which may be waiting for the system."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def _open_closed() -> None:
    """Where a command starts with closed streams, its first files would get their numbers, and foreign words."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _drop_unwritten() -> None:
    """Point a stdout that takes nothing more elsewhere: Python would try again at the end, and print a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
