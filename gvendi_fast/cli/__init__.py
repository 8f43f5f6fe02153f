"""The command line: `gvendi`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

__all__ = ["main"]


def main() -> None:
    """Entry point of the command; Ctrl-C while it is being imported ends it in one line too."""
    try:
        from gvendi_fast.base.threads import wait_briefly

        wait_briefly(os.environ)
        from gvendi_fast.cli.app import main as run

        run()
    except KeyboardInterrupt:
        with suppress(OSError):
            os.write(2, b"\ninterrupted: nothing was begun\n")
        sys.exit(130)
    finally:
        # The interpreter is left to end; a Ctrl-C would make it print a traceback of its own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
