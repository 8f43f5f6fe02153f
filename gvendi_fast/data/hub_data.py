"""Rows of a data set on the Hugging Face hub, streamed once into a file of JSON lines that is kept with the run.

As many rows as are asked for are fetched, in their order, from one commit. The file is appended to: a fetch that breaks
off, or a higher limit later, goes on behind the whole lines that are there, from the commit that they are of.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from gvendi_fast.base.errors import GvendiError, keeping
from gvendi_fast.base.files import atomic_write, exists, make_folder
from gvendi_fast.base.hub_errors import first_line, gated, refused, unknown, without_revision
from gvendi_fast.base.os_errors import named
from gvendi_fast.base.places import is_url, place
from gvendi_fast.base.progress import LINE_EVERY, Progress, Silent
from gvendi_fast.base.temporary import is_of_this_process, new_folder
from gvendi_fast.data.hub_names import HubName, check_installed, hub_name, is_kept_file
from gvendi_fast.data.json_rows import row_line
from gvendi_fast.data.run_directory import check_free
from gvendi_fast.data.run_files import is_count

_FILES = "download its files and name them"
# Names that an error lists.
_LISTED = 20
# Bytes at a time, and seconds after which what is written can be found by another process.
_PIECE, _FLUSH_EVERY = 1 << 20, 1.0
# A file system without locks reports one of these; two fetches at once are not noticed there.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@dataclass
class _Kept:
    """What a folder holds of a data set.

    name: with its commit. given: the spellings that led to it. of: rows of the data set, None while that is not known.
    rows: whole lines of the file, once they are counted.
    """

    name: HubName
    given: list[str]
    of: int | None = None
    rows: int = 0

    def has(self, rows: int | None) -> bool:
        """Whether so many rows are there, or all; None: all."""
        return self.rows == self.of or (rows is not None and self.rows >= rows)


class HubRows:
    """The data sets of a corpus and the files that hold their rows.

    folder: where the files are kept, the run directory; None: a temporary folder that ends with the process.
    progress: where notes go.
    most: of a data set no more rows than this are fetched.
    waits: for another process that fetches the same rows into the same folder, in place of an error.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        progress: Progress | None = None,
        most: int | None = None,
        waits: bool = False,
    ) -> None:
        self._folder = None if folder is None else place(folder)
        # Path("") would be the current folder.
        self._is_nowhere = folder is not None and not os.fspath(folder)
        self._progress, self._most, self._waits = progress or Silent(), most, waits
        self._kept: dict[str, _Kept] = {}
        self._names: dict[str, str] = {}

    def recorded(self, given: str) -> str:
        """The name with configuration, split and commit: of what the folder holds already, else as the hub has it.

        Raises GvendiError where it is not one data set that can be had, and where the folder holds another commit.
        """
        if given in self._names:
            return self._names[given]
        if is_url(self._folder):
            raise GvendiError(
                f"corpus: rows of '{given}' are kept in the run directory as they are fetched, and '{self._folder}' is "
                "a URL, where no file can be added to; name its files by hf://datasets/..., or a folder of this machine"
            )
        name = hub_name(given)
        if name is None:
            raise GvendiError(
                f"corpus: '{given}' is no name of a data set; wanted owner/name:configuration:split"
            )
        kept = self._known(given, name)
        if kept is not None:
            self._progress.note(f"'{given}' is {kept.name}, as '{self._folder}' was begun with it")
        else:
            check_installed(given)
            found, notes = _resolved(given, name)
            for note in notes:
                self._progress.note(note)
            kept = self._at(found) or _Kept(found, [])
            if kept.name.revision != found.revision and (name.revision or self._folder is None):
                raise GvendiError(
                    f"corpus: '{given}' is commit {found.revision} of {name.repo}, and this run has rows of commit "
                    f"{kept.name.revision}; give another --out, or '{kept.name}' to go on with those"
                )
        if given not in kept.given:
            kept.given.append(given)
        recorded = self._names[given] = str(kept.name)
        # Two spellings of one data set share what is known of its file.
        self._kept.setdefault(recorded, kept)
        return recorded

    def file(self, recorded: str, rows: int | None = None) -> str:
        """The file that holds the first `rows` rows of what `recorded` named, or more; None: all. Fetches what lacks.

        Raises GvendiError where rows cannot be had; those that came before are kept.
        """
        kept = self._kept[recorded]
        if self._most is not None:
            rows = self._most if rows is None else min(rows, self._most)
        folder = self._made_folder()
        path = kept.name.place_in(folder)
        if exists(path):
            with open(path, "rb", buffering=0) as stream:
                kept.rows = _whole_lines(stream)[0]
            _check_state(path, kept)
        # Nothing is written where nothing lacks, as the folder may not be writable.
        if not kept.has(rows):
            with named(path), _alone(path, kept.name, folder, self._waits) as stream:
                kept.rows, end = _whole_lines(stream)
                stream.truncate(end)
                _check_state(path, kept)
                if self._waits and exists(_state_of(path)):
                    # Whoever was waited for may have fetched all there is.
                    kept.of = _read_state(_state_of(path)).of
                if not kept.has(rows):
                    self._fetch(kept, stream, path, rows)
        return os.fspath(path)

    def _made_folder(self) -> Path:
        if self._folder is None:
            self._folder = new_folder()
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        else:
            if self._is_nowhere:
                raise GvendiError(
                    "the path of the run directory is empty; give a folder ('.' for the current one)"
                )
            check_free(self._folder)
            make_folder(self._folder)
        return self._folder

    def _fetch(self, kept: _Kept, stream: IO[bytes], path: Path, rows: int | None) -> None:
        name, before, began = kept.name.unpinned, kept.rows, time.monotonic()
        _write_state(path, kept)
        check_installed(name)
        behind = f" from row {before + 1:,} on" if before else ""
        what = f"the first {rows:,} rows of " if rows is not None else "all rows of "
        self._progress.note(f"fetching {what}{kept.name}{behind}")
        lines, said = _Lines(stream), began
        with keeping(lambda _: _what_is_kept(kept, path)):
            try:
                for row in _rows(kept.name, before, None if rows is None else rows - before):
                    lines.add(row_line(row))
                    now = time.monotonic()
                    if now - said >= LINE_EVERY:
                        said = now
                        so_far = _so_far(before + lines.written, before, now - began, path)
                        self._progress.note(f"fetching {name}: {so_far}")
            finally:
                try:
                    lines.flush()
                finally:
                    kept.rows = before + lines.written
            os.fsync(stream.fileno())
        if rows is None or kept.rows < rows:
            kept.of = kept.rows
        if not kept.rows:
            raise GvendiError(f"corpus: {kept.name} holds no rows; name another split")
        _write_state(path, kept)
        self._progress.note(f"fetched {name}: {_so_far(kept.rows, before, time.monotonic() - began, path)}")

    def _known(self, given: str, name: HubName) -> _Kept | None:
        """What the folder holds under this spelling, or of all that it names."""
        for kept in self._states():
            is_same = (name.repo, name.config, name.split) == (
                kept.name.repo,
                kept.name.config,
                kept.name.split,
            )
            if given in kept.given or (is_same and name.revision in ("", kept.name.revision)):
                return kept
        return None

    def _at(self, name: HubName) -> _Kept | None:
        # What this corpus has named already has no file yet, perhaps.
        every = chain(self._kept.values(), self._states())
        return next((kept for kept in every if kept.name.unpinned == name.unpinned), None)

    def _states(self) -> Iterator[_Kept]:
        if self._folder is None or not exists(self._folder):
            return
        for entry in sorted(os.listdir(self._folder)):
            if is_kept_file(entry) and entry.endswith(".json"):
                yield _read_state(self._folder / entry)


class _Lines:
    """Lines that are written behind those of a file in pieces; `written` of them are there."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.written = stream, 0
        self._waiting: list[bytes] = []
        self._size, self._flushed = 0, time.monotonic()

    def add(self, line: bytes) -> None:
        self._waiting.append(line)
        self._size += len(line)
        if self._size >= _PIECE or time.monotonic() - self._flushed >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting, self._size = self._waiting, [], 0
        piece = memoryview(b"".join(waiting))
        while piece:
            piece = piece[self._stream.write(piece) :]
        self.written += len(waiting)
        self._flushed = time.monotonic()


def check_names(names: Sequence[str], folder: str | os.PathLike | None = None) -> None:
    """Raises what `HubRows.recorded` does, before anything that takes long."""
    rows = HubRows(folder)
    for name in names:
        rows.recorded(name)


def _resolved(given: str, name: HubName) -> tuple[HubName, list[str]]:
    """The name with what the hub has for all that it leaves out, and sentences on what was chosen."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    what = f"corpus: '{given}' does not exist here, and a data set of this name"
    if constants.HF_HUB_OFFLINE:
        # A cached copy would not say which commit it is.
        raise GvendiError(refused(what, OfflineModeIsEnabled(), _FILES))
    try:
        # One request, timed, not retried.
        found = HfApi().dataset_info(
            name.repo, revision=name.revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except HFValidationError as error:
        raise GvendiError(f"{what} cannot be on the Hugging Face hub; check the spelling") from error
    except (OSError, HTTPError) as error:
        raise GvendiError(refused(what, error, "name a file that does", name.revision)) from error
    name, notes = replace(name, revision=found.sha), list[str]()
    with _refusals(name):
        configs = datasets.get_dataset_config_names(name.repo, revision=name.revision)
    if name.config and name.config not in configs:
        raise GvendiError(
            f"corpus: {name.repo} has no configuration '{name.config}'; it has {_list(configs)}: name one, as in "
            f"'{name.repo}:{configs[0]}'"
        )
    if not name.config and len(configs) > 1:
        raise GvendiError(
            f"corpus: {name.repo} has {len(configs)} configurations, {_list(configs)}; name one, as in "
            f"'{name.repo}:{configs[0]}'"
        )
    name = replace(name, config=name.config or configs[0])
    with _refusals(name):
        splits = [
            str(s) for s in datasets.get_dataset_split_names(name.repo, name.config, revision=name.revision)
        ]
    example = f"'{replace(name, split=splits[0], revision='').unpinned}'"
    if name.split and name.split not in splits:
        more = (
            "; parts of a split cannot be fetched, but its first N rows can: --limit N"
            if "[" in name.split
            else ""
        )
        raise GvendiError(
            f"corpus: {name.repo}:{name.config} has no split '{name.split}'; it has {_list(splits)}: name one, as in "
            f"{example}{more}"
        )
    if not name.split and len(splits) > 1:
        if "train" not in splits:
            raise GvendiError(
                f"corpus: {name.repo}:{name.config} has {len(splits)} splits, {_list(splits)}; name one, as in "
                f"{example}"
            )
        others = _list([split for split in splits if split != "train"])
        notes.append(f"of '{given}' the split train is read, not {others}")
    return replace(name, split=name.split or ("train" if "train" in splits else splits[0])), notes


def _rows(name: HubName, first: int, count: int | None) -> Iterator[Any]:
    """Up to `count` rows from row `first` (from 0) on."""
    import datasets

    with _refusals(name):
        rows = datasets.load_dataset(
            name.repo, name.config, split=name.split, streaming=True, revision=name.revision
        )
        # Images, sounds and films stay the bytes that they are, as nobody looks at them.
        if rows.features is not None:
            rows = rows.decode(False)
        rows = rows.skip(first) if first else rows
        yield from rows if count is None else _first(rows, count)


def _first(rows: Iterable[Any], count: int) -> Iterator[Any]:
    """Without asking for one more, which may be a download."""
    for number, row in enumerate(rows, 1):
        yield row
        if number == count:
            return


@contextmanager
def _refusals(name: HubName) -> Iterator[None]:
    """Whatever the package `datasets` raises becomes one sentence; only the local disk's own errors stay."""
    try:
        yield
    except GvendiError:
        raise
    # The package runs its readers of every format, and each raises what it likes.
    except Exception as error:
        is_remote = isinstance(error, ConnectionError | TimeoutError)
        if isinstance(error, OSError) and error.errno is not None and error.filename and not is_remote:
            raise
        what = f"corpus: {name}"
        if type(error).__name__ == "DatasetNotFoundError":
            raise GvendiError(_not_found(what, str(error), name.revision)) from error
        if isinstance(error, RuntimeError) and "scripts are no longer supported" in str(error):
            raise GvendiError(
                f"{what} is made by a script, which is not run; its rows may be in '{name.repo}@refs/convert/parquet'"
            ) from error
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _REMOTE:
            raise GvendiError(refused(what, error, _FILES, name.revision)) from error
        raise GvendiError(
            f"{what} cannot be read by the package datasets ({first_line(error)}); {_FILES}"
        ) from error


def _not_found(what: str, words: str, revision: str) -> str:
    """What a DatasetNotFoundError means, which has dropped the hub's own error and has its words alone."""
    if "gated" in words:
        return gated(what, _FILES)
    return without_revision(what, revision) if words.startswith("Revision") else unknown(what, _FILES)


# Packages of which an error is one of the connection.
_REMOTE = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "aiohttp", "huggingface_hub", "fsspec"}


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _so_far(rows: int, before: int, seconds: float, path: Path) -> str:
    rate = (rows - before) / max(seconds, 1e-9)
    return f"{rows:,} row{'s' * (rows != 1)}, {rate:,.0f} rows/s, {_size(os.path.getsize(path))} on disk"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _what_is_kept(kept: _Kept, path: Path) -> str | None:
    if not kept.rows:
        return None
    if is_of_this_process(path.parent):
        return "the rows fetched so far are not kept; with --out DIR they are, and the same command goes on"
    return (
        f"{kept.rows:,} row{'s' * (kept.rows != 1)} of {kept.name} are kept in '{path.parent}'; the same command goes "
        "on behind them"
    )


@contextmanager
def _alone(path: Path, name: HubName, folder: Path, waits: bool) -> Iterator[IO[bytes]]:
    """The file of rows, to append to, while no other process does; waits: until one that does has ended."""
    # Without a buffer, which would try to write again when the file is closed after a disk was full.
    with open(path, "ab+", buffering=0) as stream:
        # The system opens it again when the process ends, whatever ends it.
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise GvendiError(
                    f"another process is fetching {name.unpinned} into '{folder}'; wait for it, or give another --out"
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield stream


def _whole_lines(stream: IO[bytes]) -> tuple[int, int]:
    """How many lines a file has that are written to their end, and the bytes of them."""
    stream.seek(0)
    rows = size = end = 0
    while piece := stream.read(_PIECE):
        rows += piece.count(b"\n")
        last = piece.rfind(b"\n")
        end = end if last < 0 else size + last + 1
        size += len(piece)
    return rows, end


def _state_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_state(path: Path, kept: _Kept) -> None:
    content = {"name": str(kept.name), "given": kept.given, "rows": kept.of}
    with atomic_write(_state_of(path)) as stream:
        stream.write(json.dumps(content, indent=1).encode() + b"\n")


def _check_state(path: Path, kept: _Kept) -> None:
    """GvendiError where the rows of a file are of another commit than `kept`, or it is not known of which."""
    state = _state_of(path)
    if exists(state):
        other = _read_state(state).name
        if other != kept.name:
            raise GvendiError(
                f"'{path}' holds rows of commit {other.revision} by now, and not of {kept.name}; give another --out"
            )
    elif kept.rows:
        raise GvendiError(
            f"'{path}' holds rows of a commit that is not known, as '{state.name}' beside it is missing; remove it, "
            "and the rows are fetched again"
        )


def _read_state(path: Path) -> _Kept:
    try:
        content = json.loads(path.read_bytes())
        name, given, of = hub_name(content["name"]), content["given"], content["rows"]
        good = (
            name is not None
            and name.is_recorded
            and isinstance(given, list)
            and (of is None or (is_count(of) and of > 0))
        )
    except (ValueError, TypeError, KeyError):
        good = False
    rows = path.with_suffix(".jsonl")
    if not good or name.place_in(path.parent) != rows:
        raise GvendiError(
            f"'{path}' does not say what '{rows.name}' beside it holds; remove both, and the rows are fetched again"
        )
    return _Kept(name, given, of)
