"""The directory of a run: taken up by one process, and not made by a run that is refused.

config.yaml      the configuration        requests.sqlite    every request with its answer
pool/            sketches of the seeds    the rest           what is decided (journal.py)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import exists, make_folder, names_in
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.synthesis.disk.digests import CLUSTERS, EVENTS, FILES, FINGERPRINT
from gvendi_fast.synthesis.generators.request_store import RequestStore

CONFIG, REQUESTS, POOL = "config.yaml", "requests.sqlite", "pool"


@contextmanager
def open_run(folder: Path) -> Iterator[RequestStore]:
    """The request store of the run in `folder`, made where there is none; it keeps a second process out.

    If the block raises GvendiError or OSError before the run's fingerprint is there, what was made is removed: a store
    without requests, folders that are empty, a seed pool of which nothing is sketched. Raises GvendiError where another
    process has it, OSError where the folder cannot be made.
    """
    names_in(folder)
    if not exists(folder / FINGERPRINT) and not exists(folder / EVENTS):
        # A run that is killed early leaves none of these without its fingerprint: they are someone's, or another run's.
        for name in (*FILES, CLUSTERS, "spec.json"):
            if exists(folder / name):
                raise GvendiError(
                    f"'{folder}' holds no synthesis run ({FINGERPRINT} is not there), and its '{name}' would be "
                    "overwritten; give another directory as out, or move the file away"
                )
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        with RequestStore(folder / REQUESTS) as store:
            try:
                yield store
            except (GvendiError, OSError):
                if not (folder / FINGERPRINT).exists():
                    _remove_unused(folder, store)
                raise
    except (GvendiError, OSError):
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def _remove_unused(folder: Path, store: RequestStore) -> None:
    unused = not store.counts()
    store.close()
    if unused:
        store.path.unlink()
    pool = folder / POOL
    if (pool / "spec.json").is_file() and not RunDirectory.load(pool).units_done:
        shutil.rmtree(pool)
