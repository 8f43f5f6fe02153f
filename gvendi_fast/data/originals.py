"""The rows of the corpus that a run directory was made from, as the corpus' files hold them.

units.json names these files with their size and content fingerprint; row number `ordinal` of the corpus is found by
counting through them in order. A file that has changed since is refused.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import json
import math
import os
import stat
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.places import is_url, place, status_of
from gvendi_fast.data.arrow_values import plain, spelled, undecoded
from gvendi_fast.data.hub_names import hub_name
from gvendi_fast.data.kinds import format_of, is_table, kind_of
from gvendi_fast.data.pieces import is_cut, pieces_of, placed
from gvendi_fast.data.records import text_of
from gvendi_fast.data.rows import MAX_ROW_BYTES, Fields, Reason, decode_line, field_of
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import SPOOLED
from gvendi_fast.data.shapes import columns_of
from gvendi_fast.data.sources import open_table, read_lines
from gvendi_fast.data.standard_input import place_in
from gvendi_fast.data.unpacking import Damage

if TYPE_CHECKING:
    from gvendi_fast.base.urls import Url

# Places that an error lists.
MOST_TRIED = 4


@dataclass(frozen=True, slots=True)
class Original:
    """One row of a corpus, as it is in its file.

    ordinal: its number in the corpus, from 0.
    file: the path of its file.
    line: its line, or row where rows are no lines, from 1.
    raw: the exact bytes of a JSON line without the line's end; JSON over several lines with these joined; any other row
        as JSON on one line, in which a float that is no finite number is null.
    """

    ordinal: int
    file: str
    line: int
    raw: bytes

    def record(self) -> dict[str, Any]:
        """The row as a dict. Raises GvendiError that names file and line if it is not a JSON object."""
        record = decode_line(self.raw)
        if isinstance(record, Reason):
            raise GvendiError(f"{self.file}:{self.line}: {record}")
        return record


def original_rows(
    run: RunDirectory, ordinals: Iterable[int], corpus: str | os.PathLike | None = None
) -> Iterator[Original]:
    """The rows with these ordinals in the corpus, each once, in the corpus' order.

    ordinals: as in column "row" of the run's parts.
    corpus: the folder that holds the files now, if they have moved.
    One file is read at a time and none beyond its recorded rows. Raises GvendiError for a run without a recorded
    corpus, a file that does not exist, one that has changed, and an ordinal that the corpus does not have. A changed
    size is noticed at once, changed content only at the end of the file: use no row before the iterator is exhausted.
    """
    paths = locate_corpus(run, corpus)
    wanted, place = sorted(set(ordinals)), 0
    total = run.manifest["rows"]
    if wanted and not 0 <= wanted[0] <= wanted[-1] < total:
        raise GvendiError(f"ordinals holds {wanted[0]} to {wanted[-1]}; the corpus has rows 0 to {total - 1}")
    for piece, first in placed(pieces_of(run.manifest)):
        here: dict[int, int] = {}
        while place < len(wanted) and wanted[place] < first + piece.rows:
            here[piece.first + wanted[place] - first] = wanted[place]
            place += 1
        if here:
            yield from _originals(paths[piece.file], run, piece.file, here)


def locate_corpus(run: RunDirectory, corpus: str | os.PathLike | None = None) -> list[str]:
    """Where each file of the run's corpus is now, its size checked. Raises GvendiError as `original_rows` does."""
    return [_locate(source, run, corpus) for source in _recorded_files(run)]


def _recorded_files(run: RunDirectory) -> list[dict[str, Any]]:
    if "training" in run.spec:
        raise GvendiError(
            f"'{run.path}' has the sketches of a training run, which keeps no texts, and this needs them; what "
            "needs sketches alone takes the directory: gvendi score, cluster and report, and gvendi_fast.select, whose "
            "ids of rows name their steps"
        )
    if run.manifest is None or "files" not in run.manifest:
        raise GvendiError(f"'{run.path}' has no units.json, which names its corpus; sketch the corpus again")
    for number, entry in enumerate(run.manifest["files"]):
        for name in ("path", "kind", "size", "rows", "digest"):
            if name not in entry:
                raise GvendiError(
                    f"'{run.path / 'units.json'}' is damaged (files[{number}] has no {name}); restore it, or sketch "
                    "the corpus again into another --out"
                )
    return run.manifest["files"]


def _originals(path: str, run: RunDirectory, index: int, here: dict[int, int]) -> Iterator[Original]:
    """The rows {number in the file: in the corpus} of file `index`, which lies at `path`."""
    files = run.manifest["files"]
    # Behind a program's rows are those of a later call, where that has failed.
    cut = is_cut(run.manifest, index) or files[index]["path"] == SPOOLED
    if is_table(files[index]["kind"]):
        return _table_rows(path, files[index], here, Fields(**run.manifest.get("fields", {})))
    max_bytes = run.manifest.get("max_row_bytes", MAX_ROW_BYTES)
    return _lines(path, files[index], here, cut, max_bytes, "damaged" in run.manifest)


def verify_corpus(
    run: RunDirectory, corpus: str | os.PathLike | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each file of the run's corpus, with a call that reads it and raises, as `original_rows` does, what is wrong."""
    files = _recorded_files(run)
    for index, source in enumerate(files):

        def verify(index: int = index, source: Mapping[str, Any] = source) -> None:
            for _ in _originals(_locate(source, run, corpus), run, index, {}):
                raise AssertionError("no row was asked for")

        yield source["path"], verify


def number_of(original: Original, name: str) -> float:
    """The finite number above 0 at the dotted path `name`; where there is none, GvendiError names file and line.

    A cell of CSV counts that is a number as text, as all of its cells are texts.
    """
    value = field_of(original.record(), name)
    if isinstance(value, str) and format_of(kind_of(original.file) or "") in ("csv", "tsv"):
        value = _as_number(value)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value <= 0:
        text = json.dumps(value, ensure_ascii=False, default=str)
        shown = "is missing" if value is None else f"is {text[:60]}"
        raise GvendiError(
            f"{original.file}:{original.line}: field '{name}' {shown}; wanted a finite number above 0 in every row"
        )
    return float(value)


def _as_number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _locate(source: Mapping[str, Any], run: RunDirectory, corpus: str | os.PathLike | None) -> str:
    recorded = place(source["path"])
    tried, hub = [recorded], hub_name(source["path"])
    if (kept := place_in(run.path, source["path"], source["kind"])) is not None:
        tried = [kept]
    elif hub is not None and hub.is_recorded:
        tried = [hub.place_in(run.path)]
    elif corpus is not None:
        # The recorded path may be relative to any folder, so the longest tail of it that exists here is taken.
        parts = recorded.parts
        begin = int(is_url(recorded) or recorded.is_absolute())
        tried = [place(corpus).joinpath(*parts[i:]) for i in range(begin, len(parts))]
    elif not (is_url(recorded) or is_url(run.path) or recorded.is_absolute()):
        # The run may have been started elsewhere: most are written into a folder that the paths are relative to.
        tried += [folder / recorded for folder in Path(os.path.abspath(run.path)).parents]
    found = [form for path in tried for form in _forms(path) if _is_file(form)]
    # Another file may have the same name elsewhere.
    path = next(
        (path for path in found if path.stat().st_size == source["size"]), found[0] if found else None
    )
    if path is None:
        # Several spellings of one place are one.
        places = list(dict.fromkeys(str(p) if is_url(p) else os.path.abspath(p) for p in tried))
        raise GvendiError(
            f"the corpus of '{run.path}' is not where it was: '{recorded}' was not found "
            f"(looked for {', '.join(map(repr, places[:MOST_TRIED]))}); "
            "name the folder that holds it now with --corpus DIR"
        )
    size = path.stat().st_size
    # A program's rows may have others behind, see `_originals`; and rows of the hub are fetched behind those of the run
    # before it is recorded that it has them.
    is_behind = source["path"] == SPOOLED or (hub is not None and path == hub.place_in(run.path))
    if size < source["size"] or (size > source["size"] and not is_behind):
        raise _changed(path, f"{source['size']} -> {size} bytes")
    return str(path)


def _forms(path: Path | Url) -> list[Path | Url]:
    """The path and its other spellings of accented letters, which differ between file systems."""
    text = str(path)
    return [
        place(form)
        for form in dict.fromkeys((text, *(unicodedata.normalize(n, text) for n in ("NFC", "NFD"))))
    ]


def _is_file(path: Path | Url) -> bool:
    # Not is_file(), which takes a folder that may not be read for one that does not hold it.
    try:
        return path.is_file() if is_url(path) else stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _changed(path: str | os.PathLike, how: str) -> GvendiError:
    return GvendiError(
        f"'{path}' has changed since it was sketched ({how}), so its rows are no longer those of the run; "
        "restore it, or sketch the corpus again into another --out"
    )


def _lines(
    path: str, source: Mapping[str, Any], here: dict[int, int], cut: bool, max_bytes: int, knows_damage: bool
) -> Iterator[Original]:
    """knows_damage: whether damage is recorded, as earlier versions did not."""
    digest, rows = hashlib.blake2b(digest_size=16), 0
    raw: bytes | Reason = b""
    for line, _, raw in read_lines(path, source["kind"], digest=digest, max_bytes=max_bytes):
        if rows in here:
            if isinstance(raw, Reason):
                raise GvendiError(f"{path}:{line}: {raw}")
            yield Original(
                here[rows], path, line, raw if b"\n" not in raw else _on_one_line(raw, f"{path}:{line}")
            )
        rows += 1
        if cut and rows == source["rows"]:
            break
    is_same = rows == source["rows"]
    if is_same and digest.hexdigest() == source["digest"]:
        return
    if not isinstance(raw, Damage) or knows_damage:
        raise _changed(path, "other content")
    if not is_same or _digest_of_whole_lines(path, source["kind"], max_bytes) != source["digest"]:
        raise GvendiError(
            f"'{path}' is a damaged archive, and its run directory of an earlier version, which read such a one "
            "otherwise, or it has changed since; sketch the corpus again into another --out"
        )


def _digest_of_whole_lines(path: str, kind: str, max_bytes: int) -> str:
    """Of a damaged archive, without the line in which it ends: the fingerprint of earlier versions."""
    digest = hashlib.blake2b(digest_size=16)
    before = digest.copy()
    for _, _, raw in read_lines(path, kind, digest=digest, max_bytes=max_bytes):
        if isinstance(raw, Damage):
            break
        before = digest.copy()
    return before.hexdigest()


def _table_rows(
    path: str, source: Mapping[str, Any], here: dict[int, int], fields: Fields
) -> Iterator[Original]:
    status = status_of(path)
    texts = {
        *columns_of(fields),
        fields.id,
        *([] if fields.by is None else (fields.by, fields.by.split(".")[0])),
    }
    _check_table(path, source)
    with open_table(path, source["kind"], Fields()) as table:
        for number, row in table.picked(sorted(here)):
            where = f"{path}:{number + 1}"
            record = _table_record(row, where)
            record |= {name: _as_read(record[name]) for name in texts & record.keys()}
            yield Original(here[number], path, number + 1, _as_json(record, where))
    # It was read twice: for its fingerprint, and for its rows.
    if status_of(path) != status:
        _check_table(path, source)


def _as_read(value: Any) -> Any:
    """A value with the texts and the UUIDs that its bytes were read as."""
    if isinstance(value, bytes):
        text = text_of(value, "")
        if not isinstance(text, Reason):
            return text
        return str(uuid.UUID(bytes=value)) if len(value) == 16 else value
    if isinstance(value, dict):
        return {name: _as_read(item) for name, item in value.items()}
    return [_as_read(item) for item in value] if isinstance(value, list) else value


def _table_record(row: Any, where: str) -> dict[str, Any]:
    import pyarrow

    try:
        return plain(row).to_pylist()[0]
    except (ValueError, OverflowError, pyarrow.ArrowException):
        # A time that Python has no value for is none that was read; it can be written as its text.
        try:
            row, spoiled = _as_bytes(row)
            record = spelled(row).to_pylist()[0]
            return record | {name: _decoded(record[name]) for name in spoiled}
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise GvendiError(
                f"{where}: a column has a value beyond Python's ({error}); clean that column"
            ) from error


def _as_bytes(row: Any) -> tuple[Any, list[str]]:
    """The row with bytes for the texts of columns where one is no UTF-8, which is none that was read either; which."""
    import pyarrow

    columns, spoiled = [], []
    for name, column, as_bytes in zip(row.schema.names, row.columns, undecoded(row).columns, strict=True):
        try:
            column.to_pylist()
        except UnicodeDecodeError:
            column = as_bytes
            spoiled.append(name)
        except (ValueError, OverflowError, pyarrow.ArrowException):
            # A time, which is spelled later.
            pass
        columns.append(column)
    return pyarrow.RecordBatch.from_arrays(columns, names=row.schema.names), spoiled


def _decoded(value: Any) -> Any:
    """A value with texts for its bytes that are texts."""
    if isinstance(value, bytes):
        text = text_of(value, "")
        return value if isinstance(text, Reason) else text
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list | tuple) else value


def _check_table(path: str, source: Mapping[str, Any]) -> None:
    """Raises GvendiError unless a file is as it was when it was sketched."""
    digest = hashlib.blake2b(digest_size=16)
    with open_table(path, source["kind"], Fields()) as table:
        table.fingerprint(source["rows"], digest)
    if digest.hexdigest() != source["digest"]:
        raise _changed(path, "other content")


def _on_one_line(raw: bytes, where: str) -> bytes:
    """JSON over several lines on one: every value stays as it is written, also one that could not be read."""
    record = decode_line(raw)
    if isinstance(record, Reason):
        raise GvendiError(f"{where}: {record}")
    # A line ends between two values, never in a string.
    lines = [line.strip() for line in raw.split(b"\n")]
    return b"".join(line + b" " if line.endswith((b",", b":")) else line for line in lines)


def _as_json(record: dict[str, Any], where: str) -> bytes:
    def other(value: Any) -> Any:
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID):
            return str(value)
        if isinstance(value, bytes):
            return base64.b64encode(value).decode("ascii")
        raise GvendiError(f"{where}: a {type(value).__name__} cannot be written as JSON; convert that column")

    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=other).encode()


def _finite(value: Any) -> Any:
    """The value with null for floats that JSON has not, as in rows of a program (json_rows.py)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
