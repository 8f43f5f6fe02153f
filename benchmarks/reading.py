"""Reading rows beside a bare loop of `json.loads` over the same file, in turns in one process.

    python -m benchmarks.reading [--data FILE.jsonl ...] [--rounds 15] [--out benchmarks/results/reading.json]

Reading is what `gvendi sketch` does before it tokenizes: `index_corpus`, which reads every row, finds ids that were
there and takes checksums, then `UnitReader`, which reads every row again, verifies it and tells prompt, completion and
group. Times are of the processor, so that other work on the machine counts less; a share is of one round. Tokenizing
and the peak memory of a process that reads n and 8 n rows stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpora.made_up import varied
from benchmarks.environment import ROOT, describe_machine
from gvendi_fast.data.index import UnitReader, index_corpus
from gvendi_fast.data.rows import Row

RESULTS = ROOT / "benchmarks" / "results" / "reading.json"
UNIT_ROWS, ROUNDS, TOKENIZED_ROWS, GROWTH = 512, 15, 2_000, 8
# {corpus: (rows, texts of a row that are joined, whether rows have ids)}.
CORPORA = {
    "short rows": (20_000, 1, False),
    "short rows with ids": (20_000, 1, True),
    "long rows": (6_000, 12, False),
    "long rows with ids": (6_000, 12, True),
}


def make(folder: Path, name: str, times: int = 1) -> Path:
    """A made-up corpus of this name, `times` as many rows as usual."""
    rows, joined, has_ids = CORPORA[name]
    made = varied(1_000)
    path = folder / f"{name.replace(' ', '-')}-{times}.jsonl"
    with path.open("w") as stream:
        for number in range(rows * times):
            texts = [made[(number * joined + i) % len(made)] for i in range(joined)]
            row: dict[str, Any] = {
                key: "\n".join(text[key] for text in texts) for key in ("prompt", "completion")
            }
            if has_ids:
                row["id"] = f"row-{number}"
            stream.write(json.dumps(row) + "\n")
    return path


def read(path: Path) -> int:
    """Rows as `gvendi sketch` reads them; how many."""
    manifest = index_corpus(path, rows_per_unit=UNIT_ROWS)
    with UnitReader(manifest) as reader:
        return sum(isinstance(row, Row) for unit in manifest.units for row in reader.read(unit))


def index(path: Path) -> int:
    """The first of the two passes."""
    return index_corpus(path, rows_per_unit=UNIT_ROWS).rows


def read_plainly(path: Path) -> int:
    """The least that a program does."""
    rows = 0
    with path.open("rb") as stream:
        for line in stream:
            json.loads(line)
            rows += 1
    return rows


def tokenizer_of(path: Path) -> Callable[[Path], int]:
    """A pass over the first rows of a corpus with the tokenizer of the tiny proxy."""
    from gvendi_fast.sketching.proxy.encode import Encoder
    from gvendi_fast.sketching.proxy.load import load_proxy

    manifest = index_corpus(path, limit=TOKENIZED_ROWS)
    with UnitReader(manifest) as reader:
        rows = [row for unit in manifest.units for row in reader.read(unit)]
    encoder = Encoder(load_proxy("tiny", dtype="float32").tokenizer, 4096)
    return lambda _: len(encoder.encode(rows))


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each pass, and the shares of the bare loop's rate, as quantiles of rounds in turns."""
    passes = {"read": read, "index": index, "json": read_plainly, "tokenize": tokenizer_of(path)}
    rows = {name: call(path) for name, call in passes.items()}
    if rows["read"] != rows["json"]:
        raise SystemExit(
            f"'{path}': {rows['json'] - rows['read']} of its rows cannot be read; measure a corpus of rows that can"
        )
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, call in passes.items():
            began = time.process_time()
            call(path)
            taken[name].append(time.process_time() - began)
    seconds = {name: np.asarray(values) / rows[name] for name, values in taken.items()}
    return {
        "rows": rows["read"],
        "bytes a row": path.stat().st_size / rows["read"],
        "microseconds a row": {name: quantiles(values * 1e6) for name, values in seconds.items()},
        "share of the json loop's rate": quantiles(seconds["json"] / seconds["read"]),
        "tokenizing over reading": quantiles(seconds["tokenize"] / seconds["read"]),
    }


def quantiles(values: np.ndarray) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)}


def peak_megabytes(path: Path) -> float:
    """Peak memory of a process of its own that reads the corpus."""
    command = [sys.executable, "-m", "benchmarks.reading", "--peak", str(path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return float(done.stdout)


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="JSON lines to measure, too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", type=Path, help="read this file, and print the peak memory in MB")
    options = parser.parse_args()
    if options.peak is not None:
        read(options.peak)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    decoder = "msgspec" if find_spec("msgspec") else "json"
    found: dict[str, Any] = {"machine": describe_machine(), "decoder": decoder, "corpora": {}, "peak MB": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for corpus in CORPORA:
            found["corpora"][corpus] = measure(make(folder, corpus), options.rounds)
            show(corpus, found["corpora"][corpus])
        for path in options.data:
            found["corpora"][path.name] = measure(path, options.rounds)
            show(path.name, found["corpora"][path.name])
        for times in (1, GROWTH):
            path = make(folder, "short rows with ids", times)
            megabytes = peak_megabytes(path)
            found["peak MB"][f"{CORPORA['short rows with ids'][0] * times} rows"] = megabytes
            print(f"peak memory of {path.stat().st_size / 1e6:.1f} MB of rows: {megabytes:.1f} MB")
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def show(name: str, entry: dict[str, Any]) -> None:
    """A line on one corpus."""
    share, micro = entry["share of the json loop's rate"], entry["microseconds a row"]
    print(
        f"{name}: {entry['bytes a row']:.0f} bytes a row, read in {micro['read']['p50']:.2f} us "
        f"(index {micro['index']['p50']:.2f}, json {micro['json']['p50']:.2f}), {100 * share['p50']:.0f} % of the rate "
        f"of json ({100 * share['p20']:.0f} to {100 * share['p80']:.0f}); tokenizing {micro['tokenize']['p50']:.0f} us"
    )


if __name__ == "__main__":
    main()
