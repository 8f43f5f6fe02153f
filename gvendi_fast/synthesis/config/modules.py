"""Where a user's module lies: asked before a run begins, and for the digest of its source."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder


def find_module(name: str, folder: str | os.PathLike | None = None) -> ModuleSpec | None:
    """Where a module's file lies, without importing anything; None where it is not found.

    It is looked for in `folder` first, then on Python's path.
    """
    # Files that are younger than the last look into their folder count too.
    importlib.invalidate_caches()
    places = [*([] if folder is None else [os.fspath(folder)]), *sys.path]
    whole, spec = "", None
    for step in name.split("."):
        whole = f"{whole}.{step}" if whole else step
        spec = PathFinder.find_spec(whole, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ())
    return spec
