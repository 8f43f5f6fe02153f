"""The index of a corpus goes on in a thread of its own while its first files are worked on."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import closing

from gvendi_fast.data.manifest import Manifest

# Seconds in which most corpora are read whole, so that a run knows all of its rows when it begins.
PATIENCE_S = 5.0


class IndexAhead:
    """Manifests of one corpus as they come, each with more files, up to the whole one; for use with `with`.

    manifests: as `growth.growing_index_for` gives them. They are made in a thread, which runs on beside whoever works.
    """

    def __init__(self, manifests: Generator[Manifest, None, None]) -> None:
        self._manifests = manifests
        self._changed = threading.Condition()
        self._newest: Manifest | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        # A file that is being read does not keep a program from its end.
        self._thread = threading.Thread(target=self._read, name="index", daemon=True)

    def __enter__(self) -> IndexAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The thread ends with the file that it is at."""
        self._is_closed = True

    def newest(self, more_than: Manifest | None = None, is_whole: bool = False) -> Manifest:
        """The whole corpus, if it is read within a few seconds, else as much as there is by then.

        more_than: an earlier one, which is waited to be surpassed. is_whole: nothing but the whole corpus will do.
        Raises what the index raises.
        """
        until = time.monotonic() + PATIENCE_S
        with self._changed:
            while True:
                self.check()
                found = self._newest
                if found is not None and found.is_whole:
                    return found
                left = until - time.monotonic()
                if found is not None and found is not more_than and left <= 0 and not is_whole:
                    return found
                self._changed.wait(left if left > 0 else None)

    def check(self) -> None:
        """Raise what the index has met with, if anything."""
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        try:
            # What it holds open belongs to this thread.
            with closing(self._manifests):
                for found in self._manifests:
                    with self._changed:
                        self._newest = found
                        self._changed.notify_all()
                    if self._is_closed:
                        return
        # Whatever it is, it is raised where the work goes on.
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
