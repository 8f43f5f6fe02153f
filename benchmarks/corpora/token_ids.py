"""Turn a corpus into token ids that travel to a machine without its tokenizer, for `python -m benchmarks.gpu --corpus`.

    python -m benchmarks.corpora.token_ids data.jsonl TOKENIZER_FOLDER OUT.npz [--rows 4096]

Rows are read, encoded and refused as `gvendi sketch` does it. OUT holds `ids` int32, all samples one behind the other,
`supervised` bool beside it, and `lengths` int64.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks.gpu.timing import NotMeasuredError
from gvendi_fast.data.index import Fields, Rejected, UnitReader, index_corpus
from gvendi_fast.sketching.proxy.encode import IGNORED, Encoder, Sample

MAX_TOKENS, ROWS = 4096, 4096


def encode(data: Path, tokenizer: Path, rows: int) -> list[Sample]:
    """The samples of a corpus's first rows."""
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), MAX_TOKENS)
    manifest = index_corpus(str(data), Fields(), 512, rows)
    found: list[Sample] = []
    with UnitReader(manifest) as reader:
        for unit in manifest.units:
            good = [row for row in reader.read(unit) if not isinstance(row, Rejected)]
            found += [sample for sample in encoder.encode(good) if isinstance(sample, Sample)]
    return found


def save_samples(samples: list[Sample], out: Path) -> None:
    """Write the file that `load_samples` reads."""
    np.savez_compressed(
        out,
        ids=np.concatenate([s.input_ids for s in samples]),
        supervised=np.concatenate([s.labels != IGNORED for s in samples]),
        lengths=np.array([s.length for s in samples], np.int64),
    )


def load_samples(path: str | None, tokenizer: str | None, vocabulary: int) -> list[Sample]:
    """The samples of a file of token ids, or of rows that the tokenizer in a folder encodes.

    Raises NotMeasuredError where there is no file, no tokenizer for one of rows, or an id of another vocabulary.
    """
    if path is None:
        raise NotMeasuredError("no --corpus given")
    if not path.endswith(".npz"):
        if tokenizer is None:
            raise NotMeasuredError(f"--corpus {Path(path).name} is text and no --tokenizer is given")
        samples = encode(Path(path), Path(tokenizer), ROWS)
    else:
        with np.load(path) as found:
            ids, supervised, lengths = (found[name] for name in ("ids", "supervised", "lengths"))
        labels = np.where(supervised, ids, np.int32(IGNORED)).astype(np.int32)
        ends = lengths.cumsum()
        samples = [
            Sample(i, str(i), "", Path(path).name, i + 1, ids[end - n : end], labels[end - n : end])
            for i, (end, n) in enumerate(zip(ends, lengths, strict=True))
        ]
    largest = max(int(sample.input_ids.max()) for sample in samples)
    if largest >= vocabulary:
        raise NotMeasuredError(
            f"--corpus has token {largest}, the model's vocabulary ends at {vocabulary - 1}"
        )
    return samples


def main() -> None:
    """Encode and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="rows, as gvendi sketch takes them")
    parser.add_argument("tokenizer", type=Path, help="folder of a fast tokenizer")
    parser.add_argument("out", type=Path, help="file to write, .npz")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows to take [default: {ROWS}]")
    args = parser.parse_args()
    if args.out.suffix != ".npz":
        parser.error(f"OUT must end in .npz, got {args.out}")
    samples = encode(args.data, args.tokenizer, args.rows)
    if not samples:
        sys.exit(f"no row of {args.data} could be encoded")
    save_samples(samples, args.out)
    total = sum(sample.length for sample in samples)
    print(f"{len(samples)} samples, {total} tokens, {args.out.stat().st_size} bytes: {args.out}")


if __name__ == "__main__":
    main()
