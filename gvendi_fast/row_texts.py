"""The texts of a run's rows, read from the corpus it was made from: for people, and for measures on words."""

from __future__ import annotations

import os
from collections.abc import Iterable

from gvendi_fast.errors import GvendiError
from gvendi_fast.originals import locate_corpus, original_rows
from gvendi_fast.rows import Fields, Rejected, parse_row
from gvendi_fast.store import RunDirectory

__all__ = ["locate_corpus", "row_texts", "snippet"]


def row_texts(
    run: RunDirectory, ordinals: Iterable[int], corpus: str | os.PathLike | None = None
) -> dict[int, str]:
    """Text of each of these rows by ordinal (column "row" of the parts): what the proxy read, without its template.

    A pair is its prompt, a newline and its completion; messages are their contents, a newline between. corpus: the
    folder that holds the files now, if they have moved. Raises GvendiError as `originals.original_rows` does.
    """
    locate_corpus(run, corpus)
    fields = Fields(**run.manifest["fields"])
    texts = {}
    for original in original_rows(run, ordinals, corpus):
        row = parse_row(original.record(), fields, original.ordinal, original.file, original.line)
        if isinstance(row, Rejected):
            raise GvendiError(
                f"{original.file}:{original.line}: {row.reason}; the run has a sketch of this row, so the file is not "
                "the one it was made from: restore it"
            )
        if row.text is not None:
            texts[original.ordinal] = row.text
        elif row.messages is not None:
            texts[original.ordinal] = "\n".join(message["content"] for message in row.messages)
        else:
            texts[original.ordinal] = f"{row.prompt}\n{row.completion}"
    return texts


def snippet(text: str, width: int) -> str:
    """The text's beginning on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"
