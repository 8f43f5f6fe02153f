"""What a file of a corpus holds, told by its name: how its rows are written, and how it was packed."""

from __future__ import annotations

from gvendi_fast.base.places import name_of

# A file that is packed has one of these behind the name of its format; the first is how its kind spells it.
_PACKINGS = {".gz": ".gz", ".zst": ".zst", ".zstd": ".zst"}
_TEXTS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}

# {suffix of a name: kind}.
SUFFIXES = {
    **_TEXTS,
    **{
        f"{suffix}{end}": f"{kind}{packing}"
        for suffix, kind in _TEXTS.items()
        for end, packing in _PACKINGS.items()
    },
    **_TABLES,
}
# For messages: as short as it can be said.
WANTED = ".jsonl, .ndjson, .json, .csv or .tsv (each also .gz, .zst or .zstd), .parquet, .arrow or .feather"
# What the system is asked for in place of a file.
STANDARD_INPUT = "-"


def kind_of(path: str) -> str | None:
    """By the file's suffix: "jsonl", "json", "csv" or "tsv", packed with ".gz" or ".zst" behind it, "parquet" or
    "arrow"; None for any other suffix.
    """
    name = name_of(path).lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def is_table(kind: str) -> bool:
    """Whether rows are read by column, as those of Parquet and Arrow, and not as text."""
    return kind in _TABLES.values()


def format_of(kind: str) -> str:
    """The kind without how it was packed."""
    return kind.split(".")[0]


def packing_of(kind: str) -> str | None:
    """ "gz", "zst", or None for a file that is not packed."""
    return kind.partition(".")[2] or None
