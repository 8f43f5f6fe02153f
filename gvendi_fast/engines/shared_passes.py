"""Results that the ranks of one command leave each other in files, so that each of them has all and made its share.

    passes/<digest>/result-000003.pickle   what the function gave for item 3, behind its checksum
    passes/<digest>/leases, workers        who is at which item, as of work units (data.leases)
    passes/<digest>/read-2                 rank 2 has read all results

The digest is of the command, the function and the items, so nothing of another call is ever read. The rank that reads
last removes the folder; where one is lost, the one after the next pass does. A rank that comes later than that makes
all results by itself: they are the same. Results are pickled: whoever may write into the run directory of a command
that runs may run code in it.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gvendi_fast.base.files import exists, make_folder, names_in, put_quickly
from gvendi_fast.base.places import is_url, place
from gvendi_fast.data.leases import Leases, Terms
from gvendi_fast.data.run_files import PASSES
from gvendi_fast.data.worker_records import LEASES, WORKERS

if TYPE_CHECKING:
    from gvendi_fast.base.urls import Url

_RESULT, _READ = "result-", "read-"
# Bytes of a result's checksum, with which its file begins.
_CHECKED = 16
# Seconds of the first and of later waits for the results of others.
_FIRST_WAIT_S, _MOST_WAIT_S = 0.02, 1.0
# An item whose worker is lost is done again, however often.
_NO_LIMIT = 1 << 30
# What a killed command left is removed after so long.
_OLD_S = 24 * 3600


class SharedPasses:
    """The passes of one rank of a command, in the run directory `root`."""

    def __init__(self, root: str | os.PathLike, run_id: str, rank: int, world: int, lease_s: float) -> None:
        self._folder = place(root) / PASSES
        self._run_id, self._rank, self._world = run_id, rank, world
        self._terms = Terms(lease_s, max_losses=_NO_LIMIT)
        self._calls: dict[bytes, int] = {}
        self._left: list[Path | Url] = []
        _remove_old(self._folder)

    def map(
        self, make: Callable[[], Callable[[Any], Any]], items: Sequence[Any], order: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """As `Engine.map`; order: places of items, those first that this rank is to do first."""
        root = self._of(make, items)
        make_folder(root)
        function: Callable[[Any], Any] | None = None
        known: set[int] = set()
        wait_s = _FIRST_WAIT_S
        leases = Leases(root, self._terms, self._run_id, "ranks", self._rank)
        try:
            while True:
                for at, path in _results(root):
                    if at in known or (content := _read(path)) is None:
                        continue
                    known.add(at)
                    wait_s = _FIRST_WAIT_S
                    yield at, pickle.loads(content)
                if len(known) == len(items):
                    break
                _stand(root)
                mine = next((at for at in order if at not in known and leases.take(at)), None)
                if mine is None:
                    time.sleep(wait_s)
                    wait_s = min(2 * wait_s, _MOST_WAIT_S, self._terms.lease_s / 4)
                    continue
                path = root / f"{_RESULT}{mine:06d}.pickle"
                # Whoever had the lease may have done it just now.
                if not exists(path):
                    function = function or make()
                    content = pickle.dumps(function(items[mine]), protocol=5)
                    _stand(root)
                    put_quickly(path, _checksum(content) + content)
                leases.release([mine])
        finally:
            leases.close()
        self._leave(root)

    def forget(self) -> None:
        """Remove what lost ranks have not read: the work that followed is done."""
        for folder in self._left:
            _remove(folder)
        self._left.clear()

    def _of(self, make: Any, items: Any) -> Path | Url:
        """The folder of a call; the same call again has another."""
        file = io.BytesIO()
        _Plain(file).dump((self._run_id, self._world, make, list(items)))
        call = hashlib.blake2b(file.getbuffer(), digest_size=16)
        count = self._calls[call.digest()] = self._calls.get(call.digest(), 0) + 1
        return self._folder / f"{call.hexdigest()}-{count}"

    def _leave(self, root: Path | Url) -> None:
        put_quickly(root / f"{_READ}{self._rank}", b"")
        if sum(name.startswith(_READ) for name in names_in(root)) == self._world:
            _remove(root)
        else:
            self._left.append(root)
        # A pass that all have read is gone by now.
        for old in self._left[:-2]:
            _remove(old)
        del self._left[:-2]


class _Plain(pickle.Pickler):
    """Writes the same for what is equal, whichever of its objects are one and wherever a tensor lies in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        # Without notes of what was written before.
        self.fast = True

    def reducer_override(self, thing: Any) -> Any:
        """See `pickle.Pickler`."""
        if not isinstance(thing, torch.Tensor):
            return NotImplemented
        numbers = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return bytes, (numbers, f"{thing.dtype} {tuple(thing.shape)}")


def _stand(root: Path | Url) -> None:
    """Make the folders, which are gone where the others are two passes further."""
    for folder in (root / LEASES, root / WORKERS):
        make_folder(folder)


def _results(root: Path | Url) -> Iterator[tuple[int, Path | Url]]:
    for name in names_in(root):
        if name.startswith(_RESULT) and name.endswith(".pickle"):
            yield int(name.removeprefix(_RESULT).removesuffix(".pickle")), root / name


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKED).digest()


def _read(path: Path | Url) -> bytes | None:
    """A result; None where it was removed meanwhile, as this rank is late, or is damaged, and so to be made again."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return None
    content = found[_CHECKED:]
    if found[:_CHECKED] == _checksum(content):
        return content
    path.unlink(missing_ok=True)
    return None


def _remove(folder: Path | Url) -> None:
    if is_url(folder):
        for path in folder.find():
            path.unlink(missing_ok=True)
        return
    # Another rank may be removing it too.
    shutil.rmtree(folder, ignore_errors=True)


def _remove_old(folder: Path | Url) -> None:
    """Remove what commands of before left; an object store does not say when."""
    if is_url(folder):
        return
    for name in names_in(folder):
        path = folder / name
        if path.is_dir() and time.time() - path.stat().st_mtime > _OLD_S:
            _remove(path)
