"""What is wrong with the directory of a synthesis run, or with a run directory."""

from __future__ import annotations

import os
from pathlib import Path

from gvendi_fast.base.files import exists, stale
from gvendi_fast.data.checking import LEFT, Checked, check_run
from gvendi_fast.synthesis.disk.folder import POOL
from gvendi_fast.synthesis.disk.record import holds_run


def check_directory(
    path: str | os.PathLike, with_corpus: bool = False, corpus: str | os.PathLike | None = None
) -> Checked:
    """`check_run` of a run directory, and of the seeds' in the directory of a synthesis.

    A run that grows from another run directory has no seeds of its own; check that directory by its name.
    """
    root = Path(path)
    if not holds_run(root):
        return check_run(root, with_corpus, corpus)
    pool = root / POOL
    checked = check_run(pool, with_corpus, corpus) if exists(pool) else Checked()
    for left in stale(root):
        checked.add(
            left, LEFT, "a process that was killed left it; the next run into the directory removes it"
        )
    return checked
