"""About how many rows a corpus has, and bytes and tokens of a row, from a look at some of it; nothing is indexed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.places import open_file, size_of
from gvendi_fast.base.spread import evenly
from gvendi_fast.data.index import Fields, index_corpus
from gvendi_fast.data.kinds import kind_of
from gvendi_fast.data.listing import list_files
from gvendi_fast.data.work_units import UnitReader
from gvendi_fast.sketching.proxy.encode import Encoder, Sample

# Files, and the first rows of each, whose tokens are counted; bytes of a block, and how many of them, whose lines are.
FILES, ROWS_OF_FILE = 8, 64
BLOCK, BLOCKS = 1 << 20, 16
# Of Parquet, files whose footers are read.
FOOTERS = 64
_LINES = ("jsonl", "csv", "tsv")


@dataclass(frozen=True)
class CorpusSize:
    """About how large a corpus is.

    files, bytes: all of it.
    rows: None where its files do not tell without being read to the end.
    counted: how the rows were counted, in words.
    tokens_per_row: mean over the samples.
    samples: the tokenised rows.
    refused: how many others were looked at.
    """

    files: int
    bytes: int
    rows: float | None
    counted: str
    tokens_per_row: float
    samples: Sequence[Sample]
    refused: int


def look_at_size(paths: Sequence[str], encoder: Encoder, fields: Fields | None = None) -> CorpusSize:
    """Look at the first rows of some files, and at blocks of lines or footers of Parquet, spread over all of them.

    Raises GvendiError where none of the rows can be read, and what listing and reading the files raises.
    """
    files = list(list_files(paths).files)
    sizes = [size_of(file) for file in files]
    samples: list[Sample] = []
    refused = 0
    for file in evenly(files, FILES):
        manifest = index_corpus([file], fields, limit=ROWS_OF_FILE)
        with UnitReader(manifest) as reader:
            for unit in manifest.units:
                for item in encoder.stream(reader.read(unit)):
                    if isinstance(item, Sample):
                        samples.append(item)
                    else:
                        refused += 1
    if not samples:
        raise GvendiError(
            f"none of the {refused} rows that were looked at can be used; 'gvendi inspect' says why, or give --rows "
            "and --tokens in place of DATA"
        )
    rows, counted = _rows(files, sizes)
    tokens = sum(sample.length for sample in samples) / len(samples)
    return CorpusSize(len(files), sum(sizes), rows, counted, tokens, samples, refused)


def _rows(files: Sequence[str], sizes: Sequence[int]) -> tuple[float | None, str]:
    """About how many rows there are, and how that is known."""
    kinds = {kind_of(file) or "" for file in files}
    total = sum(sizes)
    if kinds <= set(_LINES):
        lines, read = _lines(files, sizes)
        if lines:
            return total * lines / read, f"{lines:,} lines in {read:,} of {total:,} bytes"
    if kinds == {"parquet"}:
        import pyarrow.parquet as pq

        looked = evenly(range(len(files)), FOOTERS)
        rows = 0
        for place in looked:
            with open_file(files[place]) as stream:
                rows += pq.read_metadata(stream).num_rows
        of = sum(sizes[i] for i in looked)
        return total * rows / of, f"{rows:,} rows in {len(looked):,} of {len(files):,} files"
    return None, ""


def _lines(files: Sequence[str], sizes: Sequence[int]) -> tuple[int, int]:
    """(line ends, bytes) of blocks that are evenly spread over all bytes; of all of them where these are few."""
    begins = [0, *accumulate(sizes)]
    count = min(BLOCKS, -(-begins[-1] // BLOCK))
    lines = read = 0
    for number in range(count):
        place = number * BLOCK if count < BLOCKS else number * begins[-1] // count
        left = BLOCK
        # A block goes on in the next file, so that a corpus of small files is read whole too.
        file = bisect_right(begins, place) - 1
        while left and file < len(files):
            with open_file(files[file]) as stream:
                stream.seek(place - begins[file])
                block = stream.read(left)
            lines, read = lines + block.count(b"\n"), read + len(block)
            left, place = left - len(block), place + len(block)
            if place < begins[file + 1]:
                break
            file += 1
    return lines, read
