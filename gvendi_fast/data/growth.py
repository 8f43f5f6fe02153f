"""A corpus that has grown since it was sketched: the work units that are done stay, and what is new is put behind them.

Its rows keep their numbers, so what is new comes last, whatever the order of the listing: first the rest of the file
that was read last, then what was appended to other files, then new files. A last work unit that was not full is cut
anew with the rows behind it, and computed again; so the work units are those of one run over the whole corpus, if that
reads the files in this order and only the last one was appended to.

A last line that was half written when it was sketched belongs to what is computed again.

Rows that are sketched must not have changed. A file that was read whole and has the recorded fingerprint has not; of
any other one each finished work unit's part says what it was made from, and that must be what the index has read now.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from gvendi_fast.base.files import exists
from gvendi_fast.base.places import open_file, place
from gvendi_fast.data.kinds import STANDARD_INPUT
from gvendi_fast.data.listing import UNREADABLE, short_names
from gvendi_fast.data.manifest import Manifest
from gvendi_fast.data.parts import DamagedPartError, read_stamp
from gvendi_fast.data.pieces import Step, pieces_of
from gvendi_fast.data.recorded import same_corpus
from gvendi_fast.data.rows import Fields
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import (
    SPOOLED,
    begins,
    check_manifest,
    digest_of,
    piece_digests,
    read_json,
    unit_ranges,
)
from gvendi_fast.data.unit_cuts import Cut

_PIECE = 1 << 20
# What units.json says of a file beside what it is called.
_CONTENT = ("kind", "size", "rows", "digest")


def index_for(
    out: str | os.PathLike,
    index: Callable[..., Manifest],
    fields: Fields,
    rows_per_unit: int,
    limit: int | None,
    unit_bytes: int | None = None,
) -> Manifest:
    """The corpus that `index` reads, cut as the run directory `out` has it recorded, if it has.

    index: `index_corpus` with all arguments but `fields`, `rows_per_unit`, `unit_bytes`, `limit` and `plan`.
    fields: as the user gave them; where the shape of rows is to be recognised, rows behind do not change it.
    Where the corpus is the recorded one with rows behind (a higher `limit`, lines appended to its files, more files),
    the result has the recorded files in their recorded order and under their recorded names, then the new ones, and
    `RunDirectory.open` takes it. Any other corpus is indexed as it is, which `open` refuses. Raises as `index_corpus`.
    """
    run = _recorded(out)
    if run is None:
        found = index(fields=fields, rows_per_unit=rows_per_unit, unit_bytes=unit_bytes, limit=limit)
        return replace(found, by_file=True)
    known, asked_cut = run.manifest, Cut(rows_per_unit, unit_bytes)
    cut = _cut_of(known)

    def read(plan: _Plan | None = None) -> Manifest:
        asked = fields if plan is None else _as_recorded(fields, known)
        found = index(fields=asked, rows_per_unit=cut.rows, unit_bytes=cut.bytes, limit=limit, plan=plan)
        return replace(found, by_file="format" in known)

    found = None
    if "earlier" not in known:
        found = read()
        now = found.to_dict()
        if same_corpus(known, now) or ("indexed" in known and begins(known, now)):
            return _noted(found, out, cut, asked_cut)
    return _noted(_grown(run, read, limit) or found or read(), out, cut, asked_cut)


def growing_index_for(
    out: str | os.PathLike,
    index_files: Callable[..., Iterator[Manifest]],
    fields: Fields,
    rows_per_unit: int,
    limit: int | None,
    unit_bytes: int | None = None,
) -> Generator[Manifest, None, None]:
    """As `index_for`, with what is known of the corpus before all of its files are read.

    index_files: as `index.index_files`, with all arguments but those that `index_for` has, too.
    Each manifest but the last has the first files of the corpus. `RunDirectory.open` takes the first one that comes and
    `RunDirectory.extend` each one behind it: until then the directory says that its corpus is being indexed, and the
    same command goes on with it. What the last one is may only be known once all files are read (where a directory has
    files that have grown since, or its recorded corpus is another one), then it comes alone.
    """
    run = _recorded(out)
    known = None if run is None else run.manifest
    cut = Cut(rows_per_unit, unit_bytes) if known is None else _cut_of(known)
    last: list[Manifest] = []
    if known is None or ("format" in known and "earlier" not in known):
        for found in index_files(fields=fields, rows_per_unit=cut.rows, unit_bytes=cut.bytes, limit=limit):
            found = replace(found, by_file=True)
            if found.is_whole:
                last.append(found)
                break
            now = found.to_dict()
            # One of them goes on where the other ends.
            if known is None or begins(now, known) or ("indexed" in known and begins(known, now)):
                yield found

    def index(**settings: Any) -> Manifest:
        # Read just now, as nothing else than its settings was asked for.
        if last and settings.get("plan") is None:
            return last.pop()
        *_, found = index_files(**settings, growth=None)
        return found

    yield index_for(out, index, fields, rows_per_unit, limit, unit_bytes)


def growth_note(manifest: Manifest, done: set[int]) -> str | None:
    """A sentence on what a run keeps of the corpus before it has grown; None where it did not grow just now."""
    if manifest.grown is None:
        return None
    before, again = manifest.grown
    kept = sum(unit.rows for unit in manifest.units if unit.ordinal in done)
    more = f", {again:,} of them again, as the last work unit was not whole" if again else ""
    rows = f"from {before:,} to {manifest.rows:,} rows" if before < manifest.rows else "behind its last row"
    return (
        f"the corpus has grown {rows}: {kept:,} of an earlier run kept, "
        f"{manifest.rows - kept:,} to sketch{more}"
    )


def _as_recorded(fields: Fields, known: Mapping[str, Any]) -> Fields:
    """The fields with the shape that the recorded rows were recognised to have, where none is asked for."""
    if fields.format != "auto":
        return fields
    recorded = known.get("fields", {}).get("format", "auto")
    return replace(fields, format="fields" if recorded == "auto" else recorded)


def _recorded(out: str | os.PathLike) -> RunDirectory | None:
    """The run directory, if it is one and names a corpus as `Manifest.to_dict` does."""
    root = place(out)
    units = root / "units.json"
    if not exists(root / "spec.json") or not exists(units):
        return None
    known = check_manifest(units, read_json(units))
    names = {"path", *_CONTENT}
    is_whole = known.get("files") and {"rows", "rows_per_unit"} <= set(known)
    if not is_whole or not all(names <= set(entry) for entry in known["files"]):
        return None
    return RunDirectory(root, read_json(root / "spec.json"), known)


def recorded_cut(out: str | os.PathLike) -> Cut | None:
    """How the run directory `out` has cut its corpus, and goes on to; None where it is to be begun."""
    run = _recorded(out)
    return None if run is None else _cut_of(run.manifest)


def _cut_of(known: Mapping[str, Any]) -> Cut:
    return Cut(known["rows_per_unit"], known.get("unit_bytes"))


def _noted(manifest: Manifest, out: str | os.PathLike, recorded: Cut, asked: Cut) -> Manifest:
    notes, begun = [], f"as '{os.fspath(out)}' was begun with"
    if recorded.rows != asked.rows:
        notes.append(f"work units have {recorded.rows:,} rows, {begun} (unit_rows is {asked.rows:,})")
    # What is chosen anew with every command is none that someone asked for.
    if asked.bytes is not None and recorded.bytes != asked.bytes:
        size = "any size" if recorded.bytes is None else f"{recorded.bytes:,} bytes"
        notes.append(f"work units have {size}, {begun} (unit_bytes is {asked.bytes:,})")
    return replace(manifest, notes=(*manifest.notes, *notes)) if notes else manifest


def _grown(run: RunDirectory, read: Callable[[_Plan], Manifest], limit: int | None) -> Manifest | None:
    """The corpus as the recorded one with rows behind, or as it is; None where it is neither."""
    known = run.manifest
    if limit is not None and limit < known["rows"]:
        return None
    plan = _Plan(known)
    try:
        found = read(plan)
    except UNREADABLE:
        # Indexed as it is, it says so or passes the file over.
        return None
    earlier = known.get("earlier", [])
    found = replace(found, earlier=tuple(earlier))
    if earlier and same_corpus(known, found.to_dict()):
        return found
    # Rows that are cut by bytes and have become shorter make fewer work units.
    if not plan.is_matched or not _is_longer(known, found) or len(found.units) < known["units_total"]:
        return None
    kept = _same_units(known, found)
    if not _is_proven(run, found, kept):
        # The last line may have been half written, whatever its work unit had room for.
        kept -= 1
        if (
            kept + 1 < known["units_total"]
            or not _is_appended(known, found)
            or not _is_proven(run, found, kept)
        ):
            return None
    before: dict[str, Any] = {"corpus": digest_of(known), "units": kept}
    if found.by_file:
        # As all parts of the pieces before the first one that has changed still have theirs.
        now = set(piece_digests(found.to_dict()))
        before["pieces"] = [digest for digest in piece_digests(known) if digest not in now]
    ranges = unit_ranges(known)
    again = sum(ranges.of(unit)[1] for unit in run.done() if unit >= kept)
    return replace(found, earlier=(*earlier, before), grown=(known["rows"], again))


class _Plan:
    """What is read of the files found: the recorded pieces, what is behind them, and new files.

    is_matched: whether all recorded files are there, in their recorded order.
    """

    def __init__(self, known: Mapping[str, Any]) -> None:
        self._known, self.is_matched = known, False

    def __call__(self, found: Sequence[str]) -> list[Step]:
        recorded = [entry["path"] for entry in self._known["files"]]
        places = _matched(recorded, found)
        # New files between the old ones have put an order into units.json that no listing has.
        self.is_matched = None not in places and ("earlier" in self._known or places == sorted(places))
        # Standard input is kept under its own name alone: in a file's place its rows would be lost with it.
        self.is_matched = self.is_matched and not any(
            found[place] == STANDARD_INPUT and path not in (STANDARD_INPUT, SPOOLED)
            for path, place in zip(recorded, places, strict=True)
        )
        if not self.is_matched:
            return [Step(path) for path in found]
        here = [found[place] for place in places]

        def step(file: int, **numbers: Any) -> Step:
            return Step(here[file], file, recorded[file], **numbers)

        pieces = pieces_of(self._known)
        last, ends = pieces[-1], [0] * len(recorded)
        for piece in pieces:
            ends[piece.file] = piece.first + piece.rows
        return [
            *(step(piece.file, first=piece.first, rows=piece.rows) for piece in pieces[:-1]),
            step(last.file, first=last.first),
            *(step(file, first=end, is_rest=True) for file, end in enumerate(ends) if file != last.file),
            *(Step(path) for place, path in enumerate(found) if place not in places),
        ]


def _matched(recorded: Sequence[str], found: Sequence[str]) -> list[int | None]:
    """For each recorded path the place of its file among those found, None where it is not there.

    By its path, else by where it lies below the folder of all files, as the corpus may have been moved; where no path
    is known any more, by its place.
    """
    places: list[int | None] = [None] * len(recorded)
    namings: list[Callable[[Sequence[str]], list[str]]] = [
        list,
        lambda paths: [os.path.realpath(path) for path in paths],
        short_names,
    ]
    for naming in namings:
        lost = [number for number, place in enumerate(places) if place is None]
        free = [place for place in range(len(found)) if place not in places]
        there = dict(zip(naming([found[place] for place in free]), free, strict=True))
        for number, name in zip(lost, naming([recorded[number] for number in lost]), strict=True):
            places[number] = there.get(name)
    if all(place is None for place in places) and len(recorded) <= len(found):
        return [*range(len(recorded))]
    return places


def _is_longer(known: Mapping[str, Any], found: Manifest) -> bool:
    """Whether the recorded pieces are there, the last one perhaps with more rows, and settings are the same."""
    pieces, last = pieces_of(known), len(known["files"])
    now = found.pieces[: len(pieces)]
    is_more = found.rows > known["rows"] or len(found.files) > last or found.limit != known.get("limit")
    # Lines behind the limit change the size of a file alone.
    is_more = is_more or [source.digest for source in found.files] == [e["digest"] for e in known["files"]]
    return (
        (is_more or _is_appended(known, found))
        and len(now) == len(pieces)
        and list(now[:-1]) == pieces[:-1]
        and (now[-1].file, now[-1].first) == (pieces[-1].file, pieces[-1].first)
        and now[-1].rows >= pieces[-1].rows
        and found.to_dict()["fields"] == known.get("fields")
        and found.to_dict().get("max_row_bytes") == known.get("max_row_bytes")
        and all(
            source.kind == entry["kind"] for source, entry in zip(found.files, known["files"], strict=False)
        )
    )


def _is_appended(known: Mapping[str, Any], found: Manifest) -> bool:
    """Whether the file that was read last is JSON lines with the recorded bytes and others behind."""
    file = pieces_of(known)[-1].file
    entry, source = known["files"][file], found.files[file]
    if not entry["kind"] == source.kind == "jsonl" or source.size <= entry["size"]:
        return False
    digest, left = hashlib.blake2b(digest_size=16), entry["size"]
    with open_file(source.here or source.path) as stream:
        while left and (piece := stream.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest() == entry["digest"]


def _same_units(known: Mapping[str, Any], found: Manifest) -> int:
    """How many of the recorded work units, from the first on, have the same rows: all, or all but the last."""
    count = known["units_total"]
    return count - (found.units[count - 1].rows != unit_ranges(known).of(count - 1)[1])


def _is_proven(run: RunDirectory, found: Manifest, kept: int) -> bool:
    """Whether no row of the finished work units before `kept` has changed."""
    changed = {
        number
        for number, entry in enumerate(run.manifest["files"])
        if any(getattr(found.files[number], name) != entry[name] for name in _CONTENT)
    }
    own = others = 0
    for unit in run.done():
        # A part that is damaged is computed again in any case.
        with suppress(DamagedPartError):
            stamp = read_stamp(run.part_path(unit))
            if stamp is not None and not run.is_own(unit, stamp):
                others += 1
                continue
            own += 1
            now = found.units[unit]
            if unit < kept and now.file in changed and (stamp is None or stamp.input != now.digest):
                return False
    # If all parts are of another corpus than the recorded one, units.json is not theirs.
    return own > 0 or others == 0
