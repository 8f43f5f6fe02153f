"""Finding a corpus' files: folders and globs are listed so that nothing is passed over without a word.

`os.walk` and `glob` take a folder that cannot be listed for an empty one, follow links in circles and hand out FIFOs,
which block whoever opens them; so both are spelled out here.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import SPECIAL
from gvendi_fast.base.places import is_url, local_name, place
from gvendi_fast.data.hub_names import check_installed, hub_name
from gvendi_fast.data.kinds import STANDARD_INPUT, WANTED, kind_of
from gvendi_fast.data.records import lone_surrogate
from gvendi_fast.data.run_files import lost_spec

_SPECIAL = {**SPECIAL, stat.S_IFDIR: "a folder"}
# What a folder of this package's own holds, and how it is called. Their files are results, not data.
_RESULTS = {
    frozenset({"spec.json", "parts"}): "a run directory",
    frozenset({"events.jsonl", "rejected.jsonl"}): "the directory of a synthesis run",
}
_INSTEAD = {
    "a run directory": "name the data that it was made from",
    "the directory of a synthesis run": "name its accepted.jsonl and the files of its seeds",
}
_LOST = "a run directory that has lost its spec.json"
SKIP = "--skip-unreadable goes on without it"


class UnreadableFileError(GvendiError):
    """A file of a corpus that cannot be read as what its name says; `skip_unreadable` goes on without it."""


# What `skip_unreadable` goes on after.
UNREADABLE = (UnreadableFileError, OSError)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file or folder that was passed over because it could not be read, and why."""

    path: str
    reason: str

    @classmethod
    def of(cls, error: Exception, path: str) -> Unreadable:
        """What `error` says of `path`; an operating system's error names its own path."""
        if isinstance(error, OSError):
            return cls(os.fspath(error.filename or path), error.strerror or str(error))
        # Of a line that begins with the path, and goes on without it already.
        why = str(error).removeprefix(f"corpus: '{path}' ")
        return cls(path, why.removesuffix(f", or {SKIP}").removesuffix(f"; {SKIP}"))


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a corpus, in order, what could not be read, and a sentence for what else was passed over.

    hub: those of `files` that are names of data sets on the hub.
    """

    files: tuple[str, ...]
    unreadable: tuple[Unreadable, ...]
    notes: tuple[str, ...]
    hub: tuple[str, ...] = ()


def find_files(inputs: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """The files of a corpus, in the order of `inputs`, as `list_files` finds them; GvendiError for standard input."""
    files = list(list_files(inputs).files)
    if STANDARD_INPUT in files:
        raise GvendiError("corpus: '-' (standard input) is not read here; name files, folders or globs")
    return files


def list_files(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    skip_unreadable: bool = False,
    with_hub: bool = False,
) -> Listing:
    """The files of a corpus, in the order of `inputs`.

    An input is "-" for standard input (a file of that name is "./-"), a file, a folder (every file below it with a
    known suffix, hidden ones left out, sorted by path; links to folders are followed, each folder is read once) or a
    glob (`**` goes into folders; its matches sorted; a folder it matches is taken as a folder). A file that is named
    twice, reached through two links, or, where the system ignores case, spelled twice, is read once, where it comes
    first. Run directories and those of synthesis runs inside a folder or a glob are passed over. Each of them may be
    the URL of an object store, of the Hugging Face hub (hf://) or of a web server, as fsspec reads it.

    skip_unreadable: pass over what cannot be read, and list it.
    with_hub: what does not exist and is spelled as a data set of the Hugging Face hub (`hub_names`) is taken for one;
        nothing is looked up. GvendiError where the package that reads the hub is missing.
    Raises GvendiError for a path that does not exist, a glob or folder without a file, an unknown suffix, and,
    unless `skip_unreadable`, UnreadableFileError for a FIFO, socket, device or link to nothing with a known suffix, and
    OSError for what cannot be listed.
    """
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not given:
        raise GvendiError("corpus: no input was given; name a file, a folder or a glob")
    finder = _Finder(skip_unreadable, with_hub)
    paths: dict[str, str] = {}
    spelled: dict[str, list[str]] = {}
    for item in map(os.fspath, given):
        for path in finder.expand(item):
            known = (
                path
                if path == STANDARD_INPUT or path in finder.hub or is_url(path)
                else _known(os.path.realpath(path), spelled)
            )
            first = paths.setdefault(known, path)
            if first != path and os.path.abspath(first) != os.path.abspath(path):
                finder.note("is read once, though links lead to it", first)
    for path in paths.values():
        if lone_surrogate(path):
            raise GvendiError(f"corpus: the file name {path!r} is not UTF-8; rename the file")
    return Listing(
        tuple(paths.values()), tuple(finder.unreadable), tuple(finder.sentences()), tuple(finder.hub)
    )


def _known(path: str, spelled: dict[str, list[str]]) -> str:
    """The path under which this file is known: another one that differs in case alone, where the system ignores it."""
    alike = spelled.setdefault(path.casefold(), [])
    for other in alike:
        # Two files, as a rule; one where the system ignores case.
        if other == path or (
            os.path.exists(other) and os.path.exists(path) and os.path.samefile(other, path)
        ):
            return other
    alike.append(path)
    return path


def short_names(paths: Sequence[str]) -> list[str]:
    """Each path relative to the lowest folder that holds all of them, so that the folder's own place is not shown."""
    if not paths:
        return []
    if any(map(is_url, paths)):
        parts = [path.split("/") for path in paths]
        same = [len(set(names)) == 1 for names in zip(*(names[:-1] for names in parts), strict=False)]
        shared = [*same, False].index(False)
        return ["/".join(names[shared:]) for names in parts]
    whole = [os.path.abspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [Path(path).relative_to(folder).as_posix() for path in whole]


def check_file(path: str) -> None:
    """UnreadableFileError unless `path` is a file or a link to one; told without opening, as a FIFO would block."""
    try:
        mode = place(path).stat().st_mode if is_url(path) else os.stat(path).st_mode
    except FileNotFoundError as error:
        if is_url(path) or not os.path.islink(path):
            raise
        raise UnreadableFileError(
            f"corpus: '{path}' is a link to '{os.readlink(path)}', which does not exist; remove it, or {SKIP}"
        ) from error
    if not stat.S_ISREG(mode):
        what = _SPECIAL.get(stat.S_IFMT(mode), "of an unknown kind")
        raise UnreadableFileError(f"corpus: '{path}' is {what}, not a file; remove it, or {SKIP}")


class _Finder:
    """Expands inputs to files, and keeps what was passed over."""

    def __init__(self, skip_unreadable: bool, with_hub: bool = False) -> None:
        self._skip, self._with_hub = skip_unreadable, with_hub
        self.hub: list[str] = []
        self.unreadable: list[Unreadable] = []
        self._notes: dict[str, list[str]] = {}

    def note(self, why: str, path: str) -> None:
        known = self._notes.setdefault(why, [])
        if path not in known:
            known.append(path)

    def sentences(self) -> Iterator[str]:
        for why, paths in self._notes.items():
            more = f" (and {len(paths) - 1:,} more)" if len(paths) > 1 else ""
            yield f"corpus: '{paths[0]}' {why}{more}"

    def expand(self, item: str) -> list[str]:
        if item == STANDARD_INPUT:
            return [item]
        if is_url(item):
            from gvendi_fast.data.url_listing import files_at

            try:
                return files_at(item, _RESULTS, _INSTEAD, self._pass_over)
            except OSError as error:
                self._refuse(error, item)
                return []
        item = local_name(item)
        if self._with_hub and hub_name(item) is not None:
            if not os.path.lexists(item):
                check_installed(item)
                self.hub.append(item)
                return [item]
            self.note("is read from here, not from the Hugging Face hub", item)
        if os.path.isdir(item):
            paths = sorted(self._walk(item, is_named=True))
            if not paths and not self.unreadable:
                raise GvendiError(f"corpus: the folder '{item}' holds no file with a suffix of {WANTED}")
            return paths
        try:
            os.lstat(item)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except ValueError as error:
            raise GvendiError(
                f"corpus: {item!r} is no path ({error}); name a file, a folder or a glob"
            ) from error
        except OSError as error:
            self._refuse(error, item)
            return []
        else:
            # A link to nothing is said as such.
            if kind_of(item) is None and os.path.exists(item):
                raise GvendiError(f"corpus: '{item}' has an unknown suffix; wanted {WANTED}")
            return [item] if self._is_file(item) else []
        if not glob.has_magic(item):
            raise GvendiError(f"corpus: '{item}' does not exist")
        return self._glob(item)

    def _glob(self, pattern: str) -> list[str]:
        matches = list(dict.fromkeys(self._matches(pattern)))
        if not matches and not self.unreadable:
            raise GvendiError(f"corpus: the glob '{pattern}' matches nothing")
        # A pattern such as data/* also matches read-me files, which are passed over, but one file must remain.
        paths = []
        for path in matches:
            if os.path.isdir(path):
                paths.extend(self._walk(path))
            elif kind_of(path) is not None and self._is_file(path):
                paths.append(path)
        if not paths and not self.unreadable:
            raise GvendiError(f"corpus: the glob '{pattern}' matches no file with a suffix of {WANTED}")
        return sorted(dict.fromkeys(paths))

    def _matches(self, pattern: str) -> Iterator[str]:
        """Paths that match, component by component; folders are reached through links, each once below a `**`."""
        drive, rest = os.path.splitdrive(pattern)
        root = drive + (os.sep if rest.startswith(os.sep) else "")
        found = [root]
        parts = [part for part in rest.split(os.sep) if part]
        for number, part in enumerate(parts):
            if part == "**":
                found = [folder for start in found for folder in self._below(start, set())]
                if number + 1 == len(parts):
                    found += [os.path.join(f, name) for f in found for name in self._names(f)]
            elif glob.has_magic(part):
                found = [
                    path
                    for folder in found
                    for name in fnmatch.filter(self._names(folder, hidden=part.startswith(".")), part)
                    if not self._is_result(path := os.path.join(folder, name))
                ]
            else:
                found = [path for f in found if os.path.lexists(path := os.path.join(f, part))]
        yield from found

    def _below(self, folder: str, seen: set[str]) -> Iterator[str]:
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            whole = os.path.realpath(here or os.curdir)
            if whole in seen or (here != folder and self._is_result(here)):
                continue
            seen.add(whole)
            yield here
            inside = (os.path.join(here, name) for name in self._names(here))
            waiting.extend(reversed([path for path in inside if os.path.isdir(path)]))

    def _names(self, folder: str, hidden: bool = False) -> list[str]:
        if not os.path.isdir(folder or os.curdir):
            return []
        return [entry.name for entry in self._entries(folder or os.curdir) if hidden or entry.name[0] != "."]

    def _walk(self, folder: str, is_named: bool = False) -> Iterator[str]:
        # Links are followed last, so that a folder is known by its own path where it has one here.
        waiting, links, seen = [folder], list[str](), set[str]()
        while waiting or links:
            here = waiting.pop() if waiting else links.pop(0)
            whole = os.path.realpath(here)
            if whole in seen:
                continue
            if here != folder and os.path.commonpath([whole, os.path.realpath(folder)]) == whole:
                self.note("is a link to a folder that holds this one, and is not followed", here)
                continue
            seen.add(whole)
            entries = self._entries(here)
            if any(entry.name == "parts" for entry in entries) and (lost := lost_spec(here)) is not None:
                if is_named and here == folder:
                    raise lost
                self._pass_over(here, _LOST)
                continue
            if (what := _result(entry.name for entry in entries)) is not None:
                if is_named and here == folder:
                    raise GvendiError(f"corpus: '{here}' is {what}; {_INSTEAD[what]}")
                self._pass_over(here, what)
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif os.path.isdir(entry.path):
                    links.append(entry.path)
                elif kind_of(entry.name) is not None:
                    if self._is_file(entry.path):
                        yield entry.path
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    self.note("is a link to what does not exist", entry.path)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._refuse(error, folder)
            return []

    def _is_file(self, path: str) -> bool:
        try:
            check_file(path)
        except UNREADABLE as error:
            self._refuse(error, path)
            return False
        return True

    def _refuse(self, error: Exception, path: str) -> None:
        if not self._skip:
            raise error
        self.unreadable.append(Unreadable.of(error, path))

    def _is_result(self, path: str) -> bool:
        what = next((what for names, what in _RESULTS.items() if _holds(path, names)), None)
        if what is None and lost_spec(path) is not None:
            what = _LOST
        if what is not None:
            self._pass_over(path, what)
        return what is not None

    def _pass_over(self, path: str, what: str) -> None:
        self.note(f"is {what}, whose files are not read as data", path)


def _result(names: Iterator[str] | Sequence[str]) -> str | None:
    """What a folder with these names in it is, if it holds this package's results."""
    there = set(names)
    return next((what for names, what in _RESULTS.items() if names <= there), None)


def _holds(folder: str, names: frozenset[str]) -> bool:
    return all(os.path.exists(os.path.join(folder, name)) for name in names)
