"""A Python process of our own at the other end of two pipes, which ends with whoever started it.

multiprocessing.Process was considered: a fresh one (spawn) imports the caller's main module with all that it needs,
such as PyTorch, and stays in the caller's process group, so that a Ctrl-C reaches it and what it starts outlives it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from gvendi_fast.synthesis.checks.channel import Channel
from gvendi_fast.synthesis.checks.environment import without_secrets
from gvendi_fast.synthesis.checks.family import end_family

# How long a process may take to end by itself before it is killed.
_END_S = 0.3
# The variable by which what it starts is found again.
_MARK = "GVENDI_CHILD"


class Child:
    """Runs `main()` of `module` with the file descriptors to read from and to write to as its last two arguments.

    environment: variables on top of this process's, which go without secrets (environment.py) but for those whose names
    begin with one of `keep`. path: its `sys.path`. quiet: its stderr is thrown away. It is a session of its own: no
    Ctrl-C of a terminal reaches it, and what it has started is killed with it (family.py). When the parent ends,
    however that comes, reading from the pipe gives EOFError.
    """

    def __init__(
        self,
        module: str,
        environment: Mapping[str, str],
        path: Sequence[str],
        quiet: bool = False,
        keep: Sequence[str] = (),
    ) -> None:
        read_requests, write_requests = os.pipe()
        read_replies, write_replies = os.pipe()
        self._channel = Channel.of_parent(read_replies, write_requests)
        self._mark = os.urandom(16).hex()
        code = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main()"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(list(path)), str(read_requests), str(write_replies)],
                env={**without_secrets(keep), **environment, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if quiet else None,
                pass_fds=(read_requests, write_replies),
                start_new_session=True,
            )
        finally:
            os.close(read_requests)
            os.close(write_replies)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, body: bytes, until: float | None = None) -> bool:
        """False where it was not taken by then (time.monotonic). Raises ConnectionError where it has ended."""
        return self._channel.ask(body, until)

    def receive(self, until: float | None = None, any_number: bool = False) -> bytes | None:
        """Its answer to what was sent last, None where none came by then. any_number: to whatever was sent.

        Raises EOFError where it has ended, GarbledError where it wrote something else.
        """
        return self._channel.receive(until, any_number)

    def ending(self) -> str:
        """Wait for its end, and say how it ended."""
        self._end()
        code = self._process.returncode
        return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """Close the pipes and end it."""
        self._channel.close()
        self._end()

    def kill(self) -> None:
        """End it now, and what it has started."""
        end_family(self._process.pid, f"{_MARK}={self._mark}", self._process.returncode is not None)
        self._process.wait()

    def _end(self) -> None:
        # An idle process ends by itself when the pipes are closed; what it has started may not.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self.kill()
