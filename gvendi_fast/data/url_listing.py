"""The files of a corpus at a URL: an object, all objects below a folder, or those that match a glob.

As for files of this machine (listing.py), without what a store has not: links, devices, spellings that are one file.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.places import place
from gvendi_fast.data.kinds import WANTED, kind_of

if TYPE_CHECKING:
    from gvendi_fast.base.urls import Url

Results = Mapping[frozenset[str], str]


def files_at(
    item: str, results: Results, instead: Mapping[str, str], pass_over: Callable[[str, str], None]
) -> list[str]:
    """The files of the input `item`, a URL, sorted.

    results: {names in a folder of this package's own: what it is called}; its files are results and not data.
    instead: {what a folder is called: what to name in place of it}.
    pass_over: called with the URL and the name of each such folder.
    Raises GvendiError as `listing.list_files` does, and OSError for what cannot be listed.
    """
    url = place(item)
    has_magic = glob.has_magic(url.path if url.protocol not in ("http", "https") else item.replace("?", ""))
    if not has_magic or url.is_file():
        return _named(item, url, results, instead, pass_over)
    matches = url.matches()
    if not matches:
        raise GvendiError(f"corpus: the glob '{item}' matches nothing")
    found = list[str]()
    above: dict[str, bool] = {}
    for match in matches:
        if _is_hidden(match, url) or _is_in_result(match, url, results, pass_over, above):
            continue
        if kind_of(str(match)) is not None:
            found.append(str(match))
        elif match.is_dir():
            found += _below(match, results, pass_over)
    if not found:
        raise GvendiError(f"corpus: the glob '{item}' matches no file with a suffix of {WANTED}")
    return sorted(dict.fromkeys(found))


def _named(
    item: str,
    url: Url,
    results: Results,
    instead: Mapping[str, str],
    pass_over: Callable[[str, str], None],
) -> list[str]:
    if url.is_file():
        if kind_of(item) is None:
            raise GvendiError(f"corpus: '{item}' has an unknown suffix; wanted {WANTED}")
        return [item]
    if not url.exists():
        raise GvendiError(f"corpus: '{item}' does not exist")
    if (what := _result({name for name, _ in url.entries()}, results)) is not None:
        raise GvendiError(f"corpus: '{item}' is {what}; {instead[what]}")
    found = _below(url, results, pass_over)
    if not found:
        raise GvendiError(f"corpus: the folder '{item}' holds no file with a suffix of {WANTED}")
    return found


def _below(folder: Url, results: Results, pass_over: Callable[[str, str], None]) -> list[str]:
    """The files below a folder, without hidden ones and those of results."""
    inside = {str(url): _parts(url, folder) for url in folder.find()}
    names: dict[tuple[str, ...], set[str]] = {}
    for parts in inside.values():
        for depth in range(len(parts)):
            names.setdefault(parts[:depth], set()).add(parts[depth])
    own = {parts: what for parts in sorted(names) if (what := _result(names[parts], results)) is not None}
    for parts, what in own.items():
        if own.keys().isdisjoint(_above(parts)):
            pass_over(str(folder.joinpath(*parts)), what)
    return [
        name
        for name, parts in inside.items()
        if kind_of(name) is not None
        and not any(part.startswith(".") for part in parts)
        and own.keys().isdisjoint(_above(parts))
    ]


def _is_in_result(
    match: Url,
    pattern: Url,
    results: Results,
    pass_over: Callable[[str, str], None],
    known: dict[str, bool],
) -> bool:
    """Whether a match, or a folder above it that the pattern's wildcards reach, is one of results."""
    fixed = next(number for number, part in enumerate(pattern.parts) if glob.has_magic(part))
    for folder in [match, *match.parents]:
        if len(folder.parts) <= fixed:
            return False
        # An object that is data has nothing below it.
        if folder is match and kind_of(str(match)) is not None:
            continue
        name = str(folder)
        if name not in known:
            what = _result({entry for entry, _ in folder.entries()}, results)
            known[name] = what is not None
            if what is not None:
                pass_over(name, what)
        if known[name]:
            return True
    return False


def _is_hidden(match: Url, pattern: Url) -> bool:
    """Whether a wildcard, which leaves hidden names out, has met one."""
    spelled = set(pattern.parts)
    return any(part.startswith(".") and part not in spelled for part in match.parts)


def _parts(url: Url, folder: Url) -> tuple[str, ...]:
    return tuple(url.path[len(folder.path.rstrip("/")) :].strip("/").split("/"))


def _above(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All folders above a path, the one that everything is relative to first."""
    return (parts[:depth] for depth in range(len(parts)))


def _result(names: Iterable[str], results: Results) -> str | None:
    there = set(names)
    return next((what for wanted, what in results.items() if wanted <= there), None)
