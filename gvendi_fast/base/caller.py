"""Where a user's code called this package, for warnings that are about it."""

from __future__ import annotations

import sys


def caller() -> tuple[str, int]:
    """File and line of the code that called this package."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "gvendi_fast":
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
