"""A look at a few rows before all are sketched: how they are read, what of them is supervised, what is lost in silence.

The rows are spread over the corpus, always the same, and the look is bounded: so many bytes are read and so many
characters tokenised, whatever the size of rows and files.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printable import printable
from gvendi_fast.base.spread import evenly
from gvendi_fast.data.kinds import is_table
from gvendi_fast.data.manifest import Manifest, Unit
from gvendi_fast.data.remedies import remedies_of
from gvendi_fast.data.rows import Rejected, Row, kind_of_reason
from gvendi_fast.data.sources import can_start_at, open_table
from gvendi_fast.data.work_units import UnitReader
from gvendi_fast.sketching.proxy.encode import IGNORED, Encoder, Preview
from gvendi_fast.sketching.silent_faults import NOTABLE, SPELT, Fault, Looked, Looks, faults

ROWS, SHOWN = 64, 5
# Work units that are opened; bytes of each that are read for its rows; rows of a row group, and bytes of the archives,
# that are read up to a row.
_UNITS, _UNIT_BYTES, _GROUP_ROWS, _ARCHIVE_BYTES = 16, 1 << 20, 8192, 1 << 24
# Bytes that one of a packed file makes, about.
_UNPACKED = 4
# Characters that are tokenised in all, for a run and for who has come to look: about 0.2 and 2 seconds at most.
QUICK, THOROUGH = 1 << 19, 1 << 22
# Characters of a part that is shown, at each of its ends, and how many parts of a row.
_END, _PARTS = 240, 9
# Kinds of reasons that a warning lists, and characters of a reason.
_KINDS, _REASON = 3, 160
FORMS = {"pair": "prompt and completion", "messages": "messages", "text": "text"}


class InspectionWarning(UserWarning):
    """What a run warns of before it starts; `warnings.simplefilter("error", InspectionWarning)` makes it an error."""


@dataclass(frozen=True, slots=True)
class Range:
    """Least, median and most of some numbers."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range | None:
        """Of these; None where there is none."""
        if not len(values):
            return None
        return cls(float(min(values)), float(np.median(values)), float(max(values)))


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive characters of a shown row, all supervised or none; `skipped` of them are left out before `tail`."""

    text: str
    is_supervised: bool
    skipped: int = 0
    tail: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A row as it is shown, whole.

    skipped: parts left out before part number `after`.
    note: what a run does with a row that is too long, or why it refuses it.
    """

    file: str
    line: int
    id: str
    tokens: int
    supervised: int
    last: str
    parts: tuple[Part, ...]
    skipped: int = 0
    after: int = 0
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """What the look showed.

    rows: of the corpus.
    looked_at: rows that were read for the look, those that were refused among them.
    passed_over: of these, rows whose texts were too long to be tokenised for it.
    forms: {form of a row: how many have it}.
    has_template: whether a chat template renders pairs and messages.
    max_tokens: the longest sequence of the run.
    tokens, supervised, share: of a row, before its prompt is cut; the share is of its tokens.
    share_of_all: supervised tokens of all tokens of these rows.
    cut, too_long: rows whose prompt is cut, and that do not fit.
    refused: {kind of reason: rows}.
    examples: some of the rows.
    faults: what is wrong, with its remedy.
    notes: of the manifest, on how the rows are read.
    spelt: rows with control tokens that a content spells out, and that are read as text.
    """

    rows: int
    looked_at: int
    passed_over: int
    forms: dict[str, int]
    has_template: bool
    max_tokens: int | None
    tokens: Range | None
    supervised: Range | None
    share: Range | None
    share_of_all: float | None
    cut: int
    too_long: int
    refused: dict[str, int]
    examples: tuple[Example, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    spelt: int = 0

    def summary(self) -> str:
        """One line."""
        said = f"looked at {self.looked_at:,} of {self.rows:,} row{'s' * (self.rows != 1)}"
        if self.forms:
            said += f" ({' and '.join(FORMS[form] for form in self.forms)})"
        if self.share_of_all is not None:
            said += f": {100 * self.share_of_all:.0f} % of their tokens are supervised"
        if self.passed_over:
            said += f", {self.passed_over:,} too long for a look"
        count = len(self.faults)
        return f"{said}; " + (f"{count} warning{'s' * (count != 1)}" if count else "nothing to warn of")

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi inspect --json` prints."""
        return {**asdict(self), "faults": [fault.to_dict() for fault in self.faults]}


def look(
    manifest: Manifest,
    encoder: Encoder,
    rows: int = ROWS,
    shown: int = SHOWN,
    characters: int = QUICK,
) -> Inspection:
    """Look at up to `rows` rows of a corpus as `encoder` tokenises them, at most about `characters` characters in all.

    shown: how many of them are in `examples`. Raises what reading the corpus raises.
    """
    for name, value, least in (("rows", rows, 1), ("shown", shown, 0), ("characters", characters, 1)):
        if value < least:
            raise GvendiError(f"{name} is {value}; wanted at least {least}")
    read: list[Row] = []
    refused: list[Rejected] = []
    count = long = 0
    for item in _sample(manifest, rows):
        count += 1
        if isinstance(item, Rejected):
            refused.append(item)
        elif _size(item) > characters:
            # Dropped at once, as it may be megabytes.
            long += 1
        else:
            read.append(item)
    looked, passed = _looked(read, encoder, characters, refused)
    kept = [row for row in looked if row.refused is None]
    reasons = Counter(kind_of_reason(item.reason) for item in refused)
    reasons.update(kind_of_reason(row.refused) for row in looked if row.refused is not None)
    looks = Looks(looked, encoder)
    tokens = [len(row.preview.ids) for row in looked]
    supervised = [len(row.supervised) for row in looked]
    return Inspection(
        rows=manifest.rows,
        looked_at=count,
        passed_over=long + passed,
        forms=dict(Counter(_form(row.row) for row in looked).most_common()),
        has_template=bool(encoder.tokenizer.chat_template),
        max_tokens=encoder.max_tokens,
        tokens=Range.of(tokens),
        supervised=Range.of(supervised),
        share=Range.of([s / t for s, t in zip(supervised, tokens, strict=True)]),
        share_of_all=sum(supervised) / sum(tokens) if tokens else None,
        cut=sum(row.is_cut for row in kept),
        too_long=sum((row.refused or "").startswith("too long") for row in looked),
        refused=dict(reasons.most_common()),
        examples=tuple(_example(row, looks) for row in evenly(looked, shown)),
        faults=(*_damaged(manifest), *faults(looks), *_refused(refused, count)),
        notes=manifest.notes,
        spelt=sum(SPELT in row.preview.notes for row in looked),
    )


def some_rows(manifest: Manifest, count: int) -> list[Row]:
    """Up to `count` rows of a corpus that can be read, spread over it as those of a look are."""
    return [item for item in _sample(manifest, count) if isinstance(item, Row)]


def _damaged(manifest: Manifest) -> Iterator[Fault]:
    """Files of which only the rows before a damage are there."""
    if manifest.damaged:
        first = manifest.damaged[0]
        yield Fault(
            "damaged files",
            len(manifest.damaged),
            len(manifest.files),
            f"are not whole: '{printable(first.path)}' is a {printable(first.reason)}",
            "fetch them again, or know that what follows the damage is not in the number",
            "files",
        )


def _refused(refused: Sequence[Rejected], count: int) -> Iterator[Fault]:
    """Rows that are refused as they are read; others, and the ends of damaged files, are told elsewhere."""
    refused = [item for item in refused if not item.reason.startswith("damaged ")]
    if refused and len(refused) >= NOTABLE * count:
        first: dict[str, Rejected] = {}
        for item in refused:
            first.setdefault(kind_of_reason(item.reason), item)
        kinds = Counter(kind_of_reason(item.reason) for item in refused).most_common()
        said = "; ".join(f"{kind} ({number}; {_where(first[kind], kind)})" for kind, number in kinds[:_KINDS])
        more = f"; and {len(kinds) - _KINDS} more reasons" if len(kinds) > _KINDS else ""
        yield Fault(
            "refused rows",
            len(refused),
            count,
            f"are refused: {said}{more}",
            remedies_of(kind for kind, _ in kinds[:_KINDS]),
        )


def _where(item: Rejected, kind: str) -> str:
    """Where the first row of a kind is, and what the kind leaves out of its reason."""
    place = printable(f"{os.path.basename(item.file)}:{item.line}")
    if item.reason == kind:
        return f"{place} is the first"
    reason = item.reason if len(item.reason) <= _REASON else f"{item.reason[:_REASON]}…"
    return f"{place}: {printable(reason)}"


def _sample(manifest: Manifest, count: int) -> Iterator[Row | Rejected]:
    """Up to `count` rows, evenly spread over up to _UNITS work units, which are evenly spread over the corpus."""
    units = _near(manifest, evenly(manifest.units, _UNITS))
    total = sum(unit.rows for unit in units)
    ends = list(accumulate(unit.rows for unit in units))
    wanted: dict[int, list[int]] = {}
    for ordinal in evenly(range(total), count):
        number = bisect_right(ends, ordinal)
        wanted.setdefault(number, []).append(ordinal - ends[number] + units[number].rows)
    with UnitReader(manifest) as reader:
        for number, unit in enumerate(units):
            rows = wanted.get(number, [])
            span = min(unit.rows, max(len(rows), int(_UNIT_BYTES / _row_bytes(manifest, unit))))
            # As many places as rows, no two of them the same.
            near = [i * span // len(rows) for i in range(len(rows))]
            asked = iter(rows if span == unit.rows else near)
            following = next(asked, None)
            for place, item in enumerate(reader.read(unit)):
                if following is None:
                    break
                if place == following:
                    yield item
                    following = next(asked, None)


def _row_bytes(manifest: Manifest, unit: Unit) -> float:
    """Bytes of a row of a work unit's file, about."""
    file = manifest.files[unit.file]
    packed = 1 if file.kind == "jsonl" else _UNPACKED
    return max(1.0, packed * file.size / max(1, file.rows))


def _near(manifest: Manifest, units: Sequence[Unit]) -> list[Unit]:
    """The work units, those that take long to reach replaced by ones of the same file that do not."""
    kinds = [file.kind for file in manifest.files]
    streamed = {
        unit.file for unit in units if not (can_start_at(kinds[unit.file]) or is_table(kinds[unit.file]))
    }
    of_file: dict[int, list[Unit]] = {}
    for unit in manifest.units:
        of_file.setdefault(unit.file, []).append(unit)
    found: dict[int, Unit] = {}
    for place, unit in enumerate(units):
        near = unit
        if unit.file in streamed:
            reach = _ARCHIVE_BYTES // len(streamed)
            size = _row_bytes(manifest, unit)
            some = [other for other in of_file[unit.file] if max(other.offset, other.line * size) <= reach]
            # The first one is always near.
            some = some or of_file[unit.file][:1]
            near = unit if unit in some else some[place % len(some)]
        elif is_table(kinds[unit.file]):
            near = _near_in_group(manifest, unit, of_file[unit.file])
        found[near.ordinal] = near
    return [found[ordinal] for ordinal in sorted(found)]


def _near_in_group(manifest: Manifest, unit: Unit, others: Sequence[Unit]) -> Unit:
    """A work unit among the first rows of the row group that holds `unit`: a row group is read from its beginning."""
    file = manifest.files[unit.file]
    with open_table(file.here or file.path, file.kind, manifest.fields, manifest.max_row_bytes) as table:
        sizes = table.group_rows
    first = 0
    for size in sizes:
        if unit.line - 1 < first + size:
            break
        first += size
    line = 1 + first + (unit.line - 1 - first) % _GROUP_ROWS
    return others[max(0, sum(other.line <= line for other in others) - 1)]


def _looked(
    rows: Sequence[Row], encoder: Encoder, characters: int, refused: list[Rejected]
) -> tuple[list[Looked], int]:
    """The rows as they are tokenised, as many as `characters` allow; refused ones are added to `refused`.

    Also how many were passed over. Those that come first are spread over all, so that what is left over at the end of
    the allowance is not one end of the corpus.
    """
    bits = max(1, len(rows).bit_length())
    spread = sorted(range(len(rows)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    found: dict[int, Looked | Rejected] = {}
    for place in spread:
        size = _size(rows[place])
        if size > characters:
            continue
        characters -= size
        preview = encoder.preview(rows[place])
        found[place] = preview if isinstance(preview, Rejected) else _outcome(rows[place], preview, encoder)
    ordered = [found[place] for place in sorted(found)]
    refused += [item for item in ordered if isinstance(item, Rejected)]
    return [item for item in ordered if isinstance(item, Looked)], len(rows) - len(found)


def _outcome(row: Row, preview: Preview, encoder: Encoder) -> Looked:
    """A row with what becomes of it in a run, where its tokens do not tell that it is taken as it is."""
    used = int(np.flatnonzero(preview.labels != IGNORED)[-1]) + 1
    is_long = encoder.max_tokens is not None and used > encoder.max_tokens
    vocabulary = encoder.vocabulary
    if not is_long and (vocabulary is None or preview.ids.max() < vocabulary):
        return Looked(row, preview)
    (result,) = encoder.encode([row])
    return Looked(row, preview, is_long, result.reason if isinstance(result, Rejected) else None)


def _size(row: Row) -> int:
    """Characters of all its texts."""
    size, waiting = 0, [row.prompt, row.completion, row.text, row.messages, row.tools]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return size


def _form(row: Row) -> str:
    return "text" if row.text is not None else "pair" if row.messages is None else "messages"


def _example(row: Looked, looks: Looks) -> Example:
    text, parts, place = row.preview.text, [], 0
    for start, end in row.preview.spans:
        parts += [(text[place:start], False), (text[start:end], True)]
        place = end
    parts.append((text[place:], False))
    parts = [part for part in parts if part[0]]
    # Of many turns those at both ends.
    skipped, after = max(0, len(parts) - _PARTS), _PARTS // 2
    if skipped:
        parts = parts[:after] + parts[after + skipped :]
    return Example(
        file=row.row.file,
        line=row.row.line,
        id=row.row.id,
        tokens=len(row.preview.ids),
        supervised=len(row.supervised),
        last=looks.decoded([int(row.supervised[-1])]),
        parts=tuple(_shortened(*part) for part in parts),
        skipped=skipped,
        after=after if skipped else 0,
        note=_note(row, looks.encoder),
    )


def _note(row: Looked, encoder: Encoder) -> str:
    if row.refused is not None:
        return f"refused: {row.refused}"
    if not row.is_cut or encoder.max_tokens is None:
        return ""
    over = int(np.flatnonzero(row.preview.labels != IGNORED)[-1]) + 1 - encoder.max_tokens
    return f"{over:,} more than --max-tokens, which the prompt loses at its beginning"


def _shortened(text: str, is_supervised: bool) -> Part:
    """A part with both ends, so that the place where what is supervised begins or ends is always seen."""
    skipped = len(text) - 2 * _END
    if skipped <= _END // 4:
        return Part(text, is_supervised)
    return Part(text[:_END], is_supervised, skipped, text[-_END:])
