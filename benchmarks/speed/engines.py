"""Rows a second of one and of two workers of Ray, one thread each, on the tiny proxy, in turns.

    python -m benchmarks.speed.engines [--rounds 5] [--rows 4000] [--out FILE]

A round sketches the corpus with one worker, then with two, each into a new run directory and with workers of its own.
Rates are from the moment at which every worker has its first work unit done to the last one, so that the start (Ray's
actors, imports, the proxy) is named beside them and not in them. Parts of both are compared first: to the byte. The
driver waits meanwhile. Nothing else should run on the machine, which needs two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gvendi_fast
from benchmarks.environment import ROOT, describe_machine
from gvendi_fast.base.engine import Worker
from gvendi_fast.engines import RayEngine
from gvendi_fast.sketching.corpus import Settings

# Small work units, as the last one is done by one worker alone.
UNIT_ROWS, WORDS = 8, 400
GOAL = 1.8


class TimedRay(RayEngine):
    """Notes when each receipt comes."""

    def work(self, open_worker: Callable[[], Worker], items: Sequence[int]) -> Iterator[Any]:
        """See `Engine.work`."""
        self.began, self.receipts = time.perf_counter(), []
        for receipt in super().work(open_worker, items):
            self.receipts.append((time.perf_counter(), receipt.worker, receipt.rows))
            yield receipt

    @property
    def start_s(self) -> float:
        """Seconds until every worker had its first work unit done."""
        first = {worker: when for when, worker, _ in reversed(self.receipts)}
        return max(first.values()) - self.began

    @property
    def rows_per_s(self) -> float:
        """Of all workers together, from then on."""
        since = self.began + self.start_s
        after = [(when, rows) for when, _, rows in self.receipts if when > since]
        return sum(rows for _, rows in after) / (after[-1][0] - since)


def write_corpus(path: Path, rows: int) -> None:
    """Rows of 20 to 120 words each."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(2, 9))) for _ in range(WORDS)]
    with path.open("w") as stream:
        for _ in range(rows):
            prompt, completion = (" ".join(draw.choices(words, k=draw.randint(10, 60))) for _ in range(2))
            stream.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def digest(out: Path) -> str:
    """Of all parts of a run directory."""
    found = hashlib.sha256()
    for part in sorted((out / "parts").iterdir()):
        found.update(part.name.encode() + part.read_bytes())
    return found.hexdigest()


def measure(corpus: Path, out: Path, workers: int) -> tuple[TimedRay, str]:
    """Sketch the corpus with so many workers; returns the engine, which has the times, and the digest of the parts."""
    engine = TimedRay(workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = Settings(unit_rows=UNIT_ROWS)
        gvendi_fast.sketch(corpus, out=out, proxy="tiny", settings=settings, engine=engine)
    seen = {worker for _, worker, _ in engine.receipts}
    if len(seen) != workers:
        raise SystemExit(f"error: {len(seen)} of {workers} workers did work; give more --rows")
    return engine, digest(out)


def main() -> None:
    """Measure, print, and write a JSON file where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    starts: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder, TimedRay(2, init={"num_cpus": 2}) as keeper:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, asked.rows)
        # One Ray for all rounds.
        keeper.dtype()
        digests = set()
        for turn in range(asked.rounds):
            for workers in (1, 2):
                engine, found = measure(corpus, Path(folder) / f"{turn}-{workers}", workers)
                digests.add(found)
                if len(digests) > 1:
                    raise SystemExit("error: two workers write other parts than one; nothing is timed")
                rates[workers].append(engine.rows_per_s)
                starts[workers].append(engine.start_s)
                print(f"round {turn + 1}, {workers} worker(s): {rates[workers][-1]:.1f} rows/s", flush=True)
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    found = {
        "machine": describe_machine(),
        "rows": asked.rows,
        "unit_rows": UNIT_ROWS,
        "rows_per_s": {str(workers): sorted(values) for workers, values in rates.items()},
        "start_s": {str(workers): sorted(values) for workers, values in starts.items()},
        "ratio": sorted(ratios),
    }
    for workers in (1, 2):
        rate, start = statistics.median(rates[workers]), statistics.median(starts[workers])
        spread = f"{min(rates[workers]):.1f} to {max(rates[workers]):.1f}"
        print(f"{workers} worker(s): {rate:.1f} rows/s ({spread}), start {start:.1f} s")
    print(f"two / one: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), goal {GOAL}")
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {asked.out.relative_to(ROOT) if asked.out.is_relative_to(ROOT) else asked.out}")


if __name__ == "__main__":
    main()
