"""What mends rows that are refused, by the kind of reason (`rows.kind_of_reason`)."""

from __future__ import annotations

import re
from collections.abc import Iterable

AS_UTF_8 = "save it as UTF-8: what Windows programs write is turned by 'iconv -f cp1252 -t utf-8 OLD > NEW'"
# {what a kind of reason holds: the remedy}, the first that is found.
_REMEDIES = {
    r"^invalid UTF-8": f"for the whole file, {AS_UTF_8}",
    r"^invalid Unicode": "take halves of characters (\\ud800 to \\udfff) out of the rows",
    r"of its content is no text": "take out what is no text, or these rows: a proxy reads texts alone",
    r"unknown role": "name the roles system, user, assistant and tool",
    r"'(?:weight|train|trainable)' is": "write 0 or 1, as a turn is supervised whole or not",
    r"^a message|^broken Arrow": "mend these rows: each message is an object with a role and a content",
    r"^nothing supervised": "give each of these a turn of the assistant to learn from, without weight 0 or train false",
    r"^empty ": "take these rows out, or name the field that holds their text (--completion-field and others)",
    r"the row is of format (?P<format>\S+)": (
        "'--format {format}' reads these and no others: make each shape of rows a corpus of its own"
    ),
    r"^missing field": "name the fields that hold them (--prompt-field and others), or their shape (--format)",
    r"^an undesired completion": "know that they are left out; '--format fields' scores them, too",
    r"^duplicate id": "give each row an id of its own, name another field with --id-field, or take the ids out",
    r"^the row is no dict": "give each row as a dict of fields or as a text",
    r"^field '.*' is not a string": "write it as text (pandas: astype(str)), or name the field that holds the text",
    r"^field ": "mend this field, or name another one",
    r"^broken CSV": "mend their quotes and their number of cells",
    r"^broken JSON": "write one JSON object a line; an array needs a file named .json, and a table one named .csv",
    r"^too long \(--max-row-bytes": "raise --max-row-bytes, or split these rows",
    r"^too long": "raise --max-tokens as far as the proxy reads, or split these rows",
    r"^the tokenizer has no chat template": "take an instruct model, or give prompt and completion",
    r"^chat template": "take a proxy whose chat template takes such messages",
    r"beyond the model's embedding": "take the tokenizer that belongs to the model",
}
_COMPILED = {re.compile(pattern): remedy for pattern, remedy in _REMEDIES.items()}
_OTHER = "mend these rows"


def remedy_of(kind: str) -> str:
    """The remedy for one kind of reason."""
    for pattern, remedy in _COMPILED.items():
        if found := pattern.search(kind):
            return remedy.format(**found.groupdict()) if found.groupdict() else remedy
    return _OTHER


def remedies_of(kinds: Iterable[str]) -> str:
    """The remedies for these kinds, each said once."""
    return "; ".join(dict.fromkeys(map(remedy_of, kinds)))
