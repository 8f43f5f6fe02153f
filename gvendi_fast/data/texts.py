"""The texts of a run's rows, read from the corpus it was made from, for people to read and for measures of words."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.originals import Original, locate_corpus, original_rows
from gvendi_fast.data.rows import Fields, Rejected, parse_row
from gvendi_fast.data.run_directory import RunDirectory

__all__ = ["TEXT", "locate_corpus", "original_text", "row_texts", "snippet", "text_parts"]

# Characters of one text that are shown.
TEXT = 4000


def row_texts(
    run: RunDirectory, ordinals: Iterable[int], corpus: str | os.PathLike | None = None
) -> dict[int, str]:
    """Text of each of these rows by ordinal (column "row" of the parts): what the proxy read, without its template.

    The text of a pair is its prompt, a newline and its completion; that of messages is their contents, joined by
    newlines. corpus: the folder that holds the files now, if they have moved. Raises GvendiError as
    `originals.original_rows` does.
    """
    locate_corpus(run, corpus)
    fields = Fields(**run.manifest["fields"])
    why = "; the run has a sketch of this row, so the file is not the one it was made from: restore it"
    return {
        original.ordinal: "\n".join(text for _, text in _texts(original, fields, why))
        for original in original_rows(run, ordinals, corpus)
    }


def original_text(original: Original, run: RunDirectory) -> list[dict[str, Any]]:
    """A row of a run's corpus as its messages (see `text_parts`)."""
    return text_parts(_texts(original, Fields(**run.manifest["fields"]), ", though the row was sketched"))


def text_parts(parts: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """(role, text) pairs as a page shows them: role, text of at most TEXT characters, and its whole length."""
    return [{"role": role, "text": text[:TEXT], "length": len(text)} for role, text in parts]


def _texts(original: Original, fields: Fields, why: str) -> list[tuple[str, str]]:
    """(role, text) pairs of a row. The error for one that cannot be read ends with `why`."""
    row = parse_row(original.record(), fields, original.ordinal, original.file, original.line)
    if isinstance(row, Rejected):
        raise GvendiError(f"{original.file}:{original.line}: {row.reason}{why}")
    return row.texts()


def snippet(text: str, width: int) -> str:
    """The text's beginning on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"
