"""Which parameters the sketches of a run are of: a digest in its spec, and their names and shapes beside it.

    parameters.json    {"parameters": [[name, shape], ...]}, in the model's order; with sketches by group, the number of
                       its group as a third item

A library that renames a parameter, or fuses several into one, gives another sketch matrix under the same proxy and the
same settings. The digest in spec.json tells the two apart, and the pairs say what was renamed. Run directories of
earlier versions have neither: they are read all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvendi_fast.base.differences import PARAMETERS
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, exists
from gvendi_fast.data.run_files import PAIRS, REMEDIES, digest_of, is_count, read_json

# Differing parameters that an error lists.
SHOWN = 10
_LIST = "parameters"


@dataclass(frozen=True)
class SketchedParameters:
    """The parameters of a sketch.

    shapes: {canonical name: shape}, in the model's order. groups: {name: number of its sketch group}, or nothing.
    """

    shapes: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, int] | None = None

    @property
    def digest(self) -> str:
        """Of names and shapes, whatever their order."""
        return digest_of({name: list(shape) for name, shape in self.shapes.items()})

    def of_groups(self, chosen: Sequence[int]) -> SketchedParameters:
        """Those of some of the groups."""
        of = self.groups or {}
        return SketchedParameters({name: s for name, s in self.shapes.items() if of.get(name) in chosen})


def keep_parameters(root: Path, spec: Mapping[str, Any], parameters: SketchedParameters) -> None:
    """Write parameters.json into a run directory whose spec has this digest, unless it is there."""
    path = root / PAIRS
    if spec.get(PARAMETERS) != parameters.digest or exists(path):
        return
    of = parameters.groups
    rows = [
        [name, list(shape), *([] if of is None else [of[name]])] for name, shape in parameters.shapes.items()
    ]
    lines = ",\n".join(f" {_json(row)}" for row in rows)
    with atomic_write(path) as stream:
        stream.write(f'{{"{_LIST}": [\n{lines}\n]}}\n'.encode())


def read_parameters(root: Path, spec: Mapping[str, Any]) -> SketchedParameters | None:
    """The parameters of a run directory; None for one of an earlier version, whose spec has no digest of them.

    Raises GvendiError for a parameters.json that is missing, or is not that of the digest.
    """
    if PARAMETERS not in spec:
        return None
    path = root / PAIRS
    if not exists(path):
        raise GvendiError(f"'{path}' is missing; {REMEDIES[PAIRS]}")
    rows = read_json(path).get(_LIST)
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise _damaged(path, "it is no list of names and shapes")
    groups = {row[0]: row[2] for row in rows if len(row) == 3}
    found = SketchedParameters({row[0]: tuple(row[1]) for row in rows}, groups or None)
    if found.digest != spec[PARAMETERS]:
        raise _damaged(path, "its digest is not the one in spec.json")
    return found


def differing_parameters(
    old: SketchedParameters, new: SketchedParameters, here: str = "in the directory", there: str = "now"
) -> str:
    """A line on how many parameters differ, and one for each of the first ten: pairs of one shape as renamed."""
    gone = [name for name in old.shapes if name not in new.shapes]
    fresh: dict[tuple[int, ...], list[str]] = {}
    for name, shape in new.shapes.items():
        if name not in old.shapes:
            fresh.setdefault(shape, []).append(name)
    lines = [
        f"{name}: {list(shape)} {here}, {list(new.shapes[name])} {there}"
        for name, shape in old.shapes.items()
        if name in new.shapes and new.shapes[name] != shape
    ]
    alone = []
    for name in gone:
        shape = old.shapes[name]
        if fresh.get(shape):
            lines.append(f"{name} {here} is {fresh[shape].pop(0)} {there}, {list(shape)}")
        else:
            alone.append(f"{name} {list(shape)} is {here} alone")
    lines += alone
    lines += [f"{name} {list(shape)} is {there} alone" for shape, names in fresh.items() for name in names]
    if not lines:
        return f"  {_LIST}: the same {len(old.shapes)}"
    more = [f"    and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    counts = f"{len(old.shapes)} {here}, {len(new.shapes)} {there}; {len(lines)} differ"
    return "\n".join([f"  {_LIST}: {counts}", *(f"    {line}" for line in lines[:SHOWN]), *more])


def differing_runs(
    old: tuple[Path, Mapping[str, Any]], new: tuple[Path, Mapping[str, Any]], here: str, there: str
) -> str | None:
    """The same of two run directories, (path, spec) each; None where their digests do not differ."""
    if not _differ(old[1], new[1]):
        return None
    return differing_parameters(_required(*old), _required(*new), here, there)


def differing_from(root: Path, spec: Mapping[str, Any], new: SketchedParameters) -> str | None:
    """The same of a run directory and a model of now; None where their digests do not differ."""
    if not _differ(spec, {PARAMETERS: new.digest}):
        return None
    return differing_parameters(_required(root, spec), new)


def _required(root: Path, spec: Mapping[str, Any]) -> SketchedParameters:
    found = read_parameters(root, spec)
    assert found is not None
    return found


def _differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return PARAMETERS in old and PARAMETERS in new and old[PARAMETERS] != new[PARAMETERS]


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) in (2, 3)
        and isinstance(row[0], str)
        and isinstance(row[1], list)
        and all(map(is_count, [*row[1], *row[2:]]))
    )


def _json(row: list[Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def _damaged(path: Path, why: str) -> GvendiError:
    return GvendiError(f"'{path}' is damaged ({why}); {REMEDIES[path.name]}")
