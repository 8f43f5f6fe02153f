"""What a run directory records of its settings and its corpus, and whether a command agrees with it."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

from gvendi_fast.base.differences import PARAMETERS, comparable, differences, flat
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, exists, flush_folder
from gvendi_fast.data.run_files import (
    PARTS,
    SCORE,
    begins,
    check_manifest,
    digest_of,
    paths_of_unit,
    read_json,
    sealed,
)

_ABSENT = object()
# Files that the differences of two corpora name.
_SHOWN = 20
# Of units.json: what is otherwise where the files are, or how it came about.
_FOLLOWS = ("earlier", "pieces", "rows_of_units", "indexed")


def agree(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write `content` unless the file exists; return what the file holds now."""
    if not exists(path):
        with atomic_write(path, exclusive=True) as stream:
            stream.write(_json(content))
    return read_json(path)


def agree_on_corpus(root: Path, manifest: dict[str, Any], goes_on: bool = False) -> dict[str, Any]:
    """Record a corpus, unless it is; what is recorded then. Raises GvendiError where that is another one.

    goes_on: whether a beginning of it was recorded by this process.
    """
    units = root / "units.json"
    if not exists(units):
        with atomic_write(units, exclusive=True) as stream:
            stream.write(_json(sealed(manifest)))
    known = check_manifest(units, read_json(units))
    if "indexed" in manifest and begins(manifest, known):
        return known
    if "indexed" in known and begins(known, manifest):
        # Rows have their ids by what their files were called first.
        files = [
            {**new, "path": old["path"]} for old, new in zip(known["files"], manifest["files"], strict=False)
        ]
        manifest = {**manifest, "files": [*files, *manifest["files"][len(files) :]]}
        with atomic_write(units) as stream:
            stream.write(_json(sealed(manifest)))
        known = check_manifest(units, read_json(units))
        # Another process may have recorded more, or less, meanwhile.
        return known if begins(manifest, known) else manifest
    if _follows(known, manifest):
        _grow(root, known, manifest)
        known = check_manifest(units, read_json(units))
    if goes_on and "indexed" not in known and begins(known, manifest) and not same_corpus(known, manifest):
        raise GvendiError(
            f"another command has ended '{root}' with the first {len(known['files']):,} of these files meanwhile; run "
            "the same command again, which adds the others and goes on"
        )
    if not same_corpus(known, manifest):
        raise GvendiError(
            f"run directory '{root}' was made from another corpus:\n{_corpus_differences(known, manifest)}\n"
            "give another --out, or restore the recorded corpus, to which rows and files may be added"
            f"{_other_format(known, manifest)}"
        )
    return known


def _follows(known: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether this corpus is what the recorded one has grown to."""
    earlier = manifest.get("earlier")
    return bool(earlier) and earlier[-1]["corpus"] == digest_of(known)


def _grow(root: Path, known: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Replace units.json; what counts for the smaller corpus alone goes first, so that a kill leaves parts to make."""
    for name in (SCORE, "rejected.jsonl"):
        (root / name).unlink(missing_ok=True)
    for unit in range(manifest["earlier"][-1]["units"], known["units_total"]):
        for path in paths_of_unit(root, unit):
            path.unlink(missing_ok=True)
    for folder in (root, root / PARTS):
        flush_folder(folder)
    with atomic_write(root / "units.json") as stream:
        stream.write(_json(sealed(manifest)))


def same_corpus(known: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether two records are of one corpus, whatever its files are called."""
    return _without_paths(known) == _without_paths(manifest)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _without_paths(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides which rows a corpus has: not what its files are called, nor how an error is worded."""
    lists = {
        name: [{key: item[key] for key in item if key not in ("path", "reason")} for item in manifest[name]]
        for name in ("files", "unreadable", "damaged")
        if name in manifest
    }
    return {**manifest, **lists}


def plain(content: dict[str, Any], name: str) -> dict[str, Any]:
    """As it is when it has been written and read."""
    try:
        return json.loads(json.dumps(content, allow_nan=False, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise GvendiError(
            f"{name} cannot be written as JSON ({error}); wanted dicts, lists, strings and numbers"
        ) from error


def differences_of(old: dict[str, Any], new: dict[str, Any], parameters: str | None = None) -> str:
    """A line for each setting that differs; parameters: those on the ones that stand behind a digest."""
    old, new = comparable(old, new)
    changed = sorted(differences(flat(old), flat(new), _ABSENT), key=itemgetter(0))
    return "\n".join(
        parameters
        if key == PARAMETERS and parameters is not None
        else f"  {key}: {_shown(was)} in the directory, {_shown(now)} now"
        for key, was, now in changed
    )


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def _other_format(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What goes on where the rows that the shape was recognised from are others, as behind a --limit; else nothing."""
    was, now = (side.get("fields", {}).get("format", "fields") for side in (old, new))
    return "" if was == now else f"; --format {was} reads rows as the directory has them"


def _corpus_differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A line for each changed, new or missing file, up to `_SHOWN`, then one for each setting that differs."""
    # How it has grown, or is about to, is no difference in itself.
    old, new = ({name: side[name] for name in side if name not in _FOLLOWS} for side in (old, new))
    was, now = (
        {item["path"]: {key: item[key] for key in item if key != "cut"} for item in side.get("files", [])}
        for side in (old, new)
    )
    lines = []
    for path in was:
        if path in now and was[path] != now[path]:
            changed = sorted(differences(was[path], now[path]), key=itemgetter(0))
            what = ", ".join(f"{key} {before} -> {after}" for key, before, after in changed)
            lines.append(f"  file '{path}' changed: {what}")
    lines += [f"  file '{path}' is missing now" for path in was if path not in now]
    lines += [f"  file '{path}' is new" for path in now if path not in was]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN:,} files more"]
    if not lines and list(was) != list(now):
        lines.append("  the same files in another order")
    rest = differences_of(*({key: side[key] for key in side if key != "files"} for side in (old, new)))
    return "\n".join([*lines, *([rest] if rest else [])])
