"""The JSON files of a run directory, such as spec.json: read strictly, as someone may have edited them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, exists, names_in
from gvendi_fast.base.places import place
from gvendi_fast.data.pieces import pieces_of
from gvendi_fast.data.records import Fields, lone_surrogate
from gvendi_fast.data.unit_cuts import UnitRanges, even_runs, runs_of

# The format of units.json whose parts name the corpus up to their own file.
BY_FILE = 2
SCORE, WARNINGS, PAIRS = "score.json", "warnings.json", "parameters.json"
# The folder through which the ranks of a command exchange results; nothing in it outlasts the command.
PASSES = "passes"
# Of the work units.
PARTS = "parts"
# The file that holds the rows of a program, and the name under which its rows are recorded.
SPOOL, SPOOLED = "rows.jsonl", "rows"
# How large the work units are to be, before units.json says it.
CUT = "cut.json"
# {file of a run directory: what mends it}.
REMEDIES = {
    "spec.json": "restore it, or sketch the corpus again into another --out",
    CUT: "remove it",
    "units.json": "restore it, or move it away and run the command that made it again",
    WARNINGS: "remove it, or run the command that made it again, which writes it anew",
    PAIRS: "restore it, or remove it and run the command that made it again, which writes it anew",
    SCORE: "run the 'gvendi score' command with this --out again, which writes it anew",
}
_SCORE_FORMAT = 1
# {key of units.json: type of its value}; those of a file's entry.
_COUNTS = ("units_total", "rows", "duplicates", "rows_per_unit")
_OF_FILE = {"path": str, "kind": str, "size": int, "rows": int, "digest": str}
# What decides what the rows of all files are.
_OF_ALL = ("fields", "max_row_bytes", "rows_per_unit", "unit_bytes")
# What a digest of a corpus up to the end of a piece begins with.
BY_PIECE = "+"
_PART = re.compile(r"^part-\d{6,}\.parquet$", re.ASCII)


def digest_of(content: Mapping[str, Any]) -> str:
    """BLAKE2b (8 bytes, hex) of JSON-able content; the order of its keys does not count."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of a run directory holds. Raises GvendiError where it holds anything else."""
    try:
        text = path.read_bytes().decode()
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except IsADirectoryError as error:
        raise _damaged(path, "it is a folder") from error
    except RecursionError:
        raise _damaged(path, "nested too deeply") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}, not an object")
    return content


def score_content(result: Mapping[str, Any]) -> dict[str, Any]:
    """What score.json holds: the result, and the digest of it all."""
    # A single digit that changes hits one of the two, so that the file does not pass for one of an earlier version.
    content = {**result, "format": _SCORE_FORMAT}
    return {**content, "digest": digest_of(json.loads(json.dumps(content)))}


def read_score(path: Path) -> dict[str, Any]:
    """The result in score.json, without its digest, which is verified; one of an earlier version has none.

    Raises GvendiError where it is not what was written.
    """
    content = read_json(path)
    if "format" not in content and "digest" not in content:
        return content
    return _verified(path, content)


def write_warnings(folder: Path, warnings: Sequence[Mapping[str, Any]]) -> None:
    """Record the warnings of the look at a corpus, JSON-able objects with a `text`, in its run directory."""
    with atomic_write(folder / WARNINGS) as stream:
        stream.write(json.dumps(score_content({"warnings": list(warnings)}), indent=1).encode() + b"\n")


def read_warnings(folder: Path) -> list[dict[str, Any]]:
    """The warnings that a run directory records; one of an earlier version records none.

    Raises GvendiError where they are not what was written.
    """
    path = folder / WARNINGS
    if not exists(path):
        return []
    found = _verified(path, read_json(path)).get("warnings")
    if not isinstance(found, list) or not all(isinstance(w, dict) and _is_text(w.get("text")) for w in found):
        raise _damaged(path, "its warnings are no list of objects with a text")
    return found


def _verified(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What was given to `score_content`."""
    digest = content.pop("digest", None)
    if digest != digest_of(content):
        raise _damaged(path, "its digest does not agree")
    if content.pop("format") != _SCORE_FORMAT:
        raise GvendiError(f"'{path}' is of another version of gvendi-fast; {REMEDIES[path.name]}")
    return content


def check_manifest(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What units.json was given to hold, by its content.

    Raises GvendiError where a value is of another kind than `Manifest.to_dict` writes, and where it was edited.
    """
    if "format" in manifest:
        good = manifest["format"] == BY_FILE and type(manifest["format"]) is int
        _check(path, "format", manifest["format"], good, f"{BY_FILE}, or none")
        manifest = dict(manifest)
        digest = manifest.pop("digest", None)
    for name in _COUNTS:
        if name in manifest or name == "units_total":
            good = is_count(manifest.get(name)) and (name != "rows_per_unit" or manifest[name] > 0)
            _check(path, name, manifest.get(name), good, "a count")
    limit = manifest.get("limit")
    _check(path, "limit", limit, limit is None or is_count(limit), "a count or null")
    _check(
        path, "indexed", manifest.get("indexed"), manifest.get("indexed", False) is False, "false, or nothing"
    )
    names = {field.name for field in fields(Fields)}
    of_rows = manifest.get("fields", {})
    # The one that makes groups may be null.
    good = isinstance(of_rows, dict) and all(
        name in names and (isinstance(value, str) or (name == "by" and value is None))
        for name, value in of_rows.items()
    )
    _check(path, "fields", of_rows, good, f"names of {', '.join(sorted(names))}")
    files = manifest.get("files", [])
    _check(path, "files", files, isinstance(files, list), "a list")
    for number, entry in enumerate(files):
        _check(path, f"files[{number}]", entry, isinstance(entry, dict), "an object")
        for name, kind in _OF_FILE.items():
            value = entry.get(name)
            # An older version wrote fewer of them, but always where a file lies.
            absent = name not in entry and name != "path"
            good = absent or (is_count(value) if kind is int else _is_text(value))
            _check(path, f"files[{number}].{name}", value, good, "a count" if kind is int else "a string")
    _check_growth(path, manifest)
    _check_cut(path, manifest)
    try:
        ranges = unit_ranges(manifest)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    units, rows = manifest["units_total"], manifest.get("rows")
    if ranges is not None and (ranges.units, ranges.rows) != (units, rows):
        raise _damaged(path, f"its files do not add up to its {units} work units and {rows} rows")
    # Last, as whatever else is wrong says more.
    if "format" in manifest and digest != digest_of(manifest):
        raise _damaged(path, "its digest does not agree")
    return manifest


def _check_cut(path: Path, manifest: Mapping[str, Any]) -> None:
    """What only the units.json of a corpus that is cut by bytes has."""
    size, texts = manifest.get("unit_bytes"), manifest.get("rows_of_units")
    is_cut = "unit_bytes" in manifest or "rows_of_units" in manifest
    _check(path, "unit_bytes", size, not is_cut or (is_count(size) and size > 0), "a count of at least 1")
    pieces = len(manifest.get("pieces", manifest.get("files", [])))
    good = isinstance(texts, list) and len(texts) == pieces and all(isinstance(text, str) for text in texts)
    _check(path, "rows_of_units", texts, not is_cut or good, "a text for each piece")


def _check_growth(path: Path, manifest: Mapping[str, Any]) -> None:
    """What only the units.json of a corpus that has grown has."""
    files = manifest.get("files", [])
    for number, entry in enumerate(files):
        cut = entry.get("cut", False)
        _check(path, f"files[{number}].cut", cut, isinstance(cut, bool), "true or false")
    earlier = manifest.get("earlier", [])
    good = isinstance(earlier, list) and all(
        isinstance(item, dict)
        and set(item) - {"pieces"} == {"corpus", "units"}
        and isinstance(item.get("pieces", []), list)
        and all(isinstance(digest, str) for digest in item.get("pieces", []))
        and isinstance(item["corpus"], str)
        and is_count(item["units"])
        for item in earlier
    )
    _check(path, "earlier", earlier, good, "a list of objects with corpus and units")
    if "pieces" not in manifest:
        return
    pieces = manifest["pieces"]
    good = isinstance(pieces, list) and all(
        isinstance(piece, list) and len(piece) == 3 and all(map(is_count, piece)) and piece[0] < len(files)
        for piece in pieces
    )
    _check(path, "pieces", pieces, good, "a list of [file, first row, rows]")
    read = [0] * len(files)
    for file, first, rows in pieces:
        _check(path, "pieces", pieces, first == read[file], "the rows of a file one piece behind the other")
        read[file] += rows
    good = read == [entry.get("rows") for entry in files]
    _check(path, "pieces", pieces, good, "all rows of the files")


def lost_spec(folder: str | os.PathLike) -> GvendiError | None:
    """The error of a run directory with parts whose spec.json is gone; None for any other folder."""
    root = place(folder)
    if exists(root / "spec.json") or not any(map(_PART.match, names_in(root / PARTS))):
        return None
    return GvendiError(
        f"'{root}' is a run directory that has lost its spec.json, without which its parts cannot be read: restore "
        "spec.json from a copy, or sketch the corpus again into another --out"
    )


def is_count(value: Any) -> bool:
    """Whether this is an integer from 0 that a file can have as many bytes of."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_text(value: Any) -> bool:
    """Whether this is a string that a path can be."""
    return isinstance(value, str) and "\0" not in value and not lone_surrogate(value)


def paths_of_unit(root: Path, unit: int) -> tuple[Path, Path]:
    """Where the part of a work unit of the run directory `root` lies, or will, and its rejected rows."""
    parts = root / PARTS
    return parts / f"part-{unit:06d}.parquet", parts / f"rejected-{unit:06d}.jsonl"


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What units.json holds of a manifest: with a digest of it all, where parts name no digest of it all."""
    return {**manifest, "digest": digest_of(manifest)} if "format" in manifest else dict(manifest)


def piece_digests(manifest: Mapping[str, Any]) -> list[str]:
    """Of each piece the digest of the corpus up to its end: its rows, and all that decides what they are.

    They begin with BY_PIECE.
    """
    before = digest_of({name: manifest.get(name) for name in _OF_ALL})
    cuts, files, found = manifest.get("rows_of_units"), manifest["files"], []
    for number, piece in enumerate(pieces_of(manifest)):
        link = {
            "before": before,
            "file": {name: files[piece.file][name] for name in _OF_FILE},
            "piece": [piece.file, piece.first, piece.rows],
            "units": None if cuts is None else cuts[number],
        }
        before = digest_of(link)
        found.append(BY_PIECE + before)
    return found


def begins(part: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether an index of a corpus has found this after some of its files; what files are called does not count."""
    if any(part.get(name) != whole.get(name) for name in (*_OF_ALL, "format")):
        return False
    for name in ("files", "rows_of_units"):
        own, others = part.get(name, []), whole.get(name, [])
        if [_unnamed(item) for item in own] != [_unnamed(item) for item in others[: len(own)]]:
            return False
    pieces = pieces_of(part)
    return pieces == pieces_of(whole)[: len(pieces)]


def _unnamed(item: Any) -> Any:
    return {name: item[name] for name in item if name != "path"} if isinstance(item, dict) else item


def unit_ranges(manifest: Mapping[str, Any]) -> UnitRanges | None:
    """The rows of the work units of a corpus by its units.json; None where it does not say.

    Raises ValueError where it contradicts itself.
    """
    per_unit, files = manifest.get("rows_per_unit"), manifest.get("files", [])
    if not per_unit or not files or any("rows" not in entry for entry in files):
        return None
    return UnitRanges([run for own in _runs_of_pieces(manifest) for run in own])


def units_of_pieces(manifest: Mapping[str, Any]) -> list[int]:
    """How many work units each piece has."""
    return [sum(times for _, times in own) for own in _runs_of_pieces(manifest)]


def _runs_of_pieces(manifest: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
    """Of each piece the (rows, how many in turn) of its work units. Raises ValueError where it contradicts itself."""
    pieces, per_unit = pieces_of(manifest), manifest["rows_per_unit"]
    if "rows_of_units" not in manifest:
        return [even_runs(piece.rows, per_unit) for piece in pieces]
    runs = [runs_of(text) for text in manifest["rows_of_units"]]
    for piece, own in zip(pieces, runs, strict=True):
        if sum(rows * times for rows, times in own) != piece.rows or any(rows > per_unit for rows, _ in own):
            raise ValueError("its work units do not add up to the rows of its files")
    return runs


def _check(path: Path, name: str, value: Any, good: bool, wanted: str) -> None:
    if not good:
        raise _damaged(path, f"{name} is {json.dumps(value, ensure_ascii=False)[:60]}; wanted {wanted}")


def _damaged(path: Path, why: str) -> GvendiError:
    return GvendiError(f"'{path}' is damaged ({why}); {REMEDIES[path.name]}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
