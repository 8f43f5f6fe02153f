"""The index of a large corpus: MB/s in this process and by worker processes, and how soon a first unit can be sketched.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.index [--gb 5] [--files 16] [--workers 2] [--rounds 3] [--ray]
        [--folder DIR] [--out FILE]

The corpus is JSON lines, made up in a temporary folder (of DIR, which needs the space) and removed at the end: with
and without an id in each row, as ids have every row decoded and looked up. It has just been written, so that it comes
from the page cache where the machine has the memory. Ways take turns, and each must have the manifest of the first.
Until the first unit is from the call to its rows being read. Workers are processes of this machine that have loaded
the package already; with --ray they are Ray's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.corpora.made_up import varied
from benchmarks.environment import describe_machine
from benchmarks.speed.experts import quantiles
from gvendi_fast.base.engine import Engine
from gvendi_fast.data.index import Manifest, UnitReader, index_corpus, index_files

UNIT_ROWS, UNIT_BYTES = 512, 1 << 20


class Processes(Engine):
    """Processes of this machine, as many as there are workers."""

    name, is_remote = "processes", True

    def __init__(self, workers: int) -> None:
        self.run_id = "benchmark"
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"))
        # Each of them loads the package.
        list(self._pool.map(_loaded, range(4 * workers)))

    def map(
        self, make: Callable[[], Callable[[Any], Any]], items: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """See `Engine.map`."""
        places = {self._pool.submit(_called, make, item): place for place, item in enumerate(items)}
        for future in as_completed(list(places)):
            place = places.pop(future)
            yield place, future.result()

    def work(self, open_worker: Callable[[], Any], items: Sequence[int]) -> Iterator[Any]:
        """See `Engine.work`; no index asks for it."""
        raise NotImplementedError

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()


def _loaded(_: int) -> None:
    time.sleep(0.1)


def _called(make: Callable[[], Callable[[Any], Any]], item: Any) -> Any:
    return make()(item)


def write_corpus(folder: Path, size: int, files: int, has_ids: bool) -> int:
    """JSON lines of about `size` bytes in so many files; how many bytes they are."""
    made = [json.dumps({name: row[name] for name in row if name != "id"})[1:] for row in varied(2_000)]
    number = written = 0
    for file in range(files):
        with (folder / f"part-{file:03d}.jsonl").open("w", buffering=1 << 20) as stream:
            left = size // files
            while left > 0:
                begin = f'{{"id": "row-{number}", ' if has_ids else "{"
                left -= stream.write(f"{begin}{made[number % len(made)]}\n")
                number += 1
            stream.flush()
            written += stream.tell()
    return written


def first_unit(folder: Path, **settings: Any) -> float:
    """Seconds until the rows of the first work unit are read, as more files are indexed."""
    began = time.perf_counter()
    manifests = index_files(folder, **settings)
    manifest = next(manifests)
    with UnitReader(manifest) as reader:
        for _ in reader.read(manifest.units[0]):
            pass
    seconds = time.perf_counter() - began
    manifests.close()
    return seconds


def measure(folder: Path, ways: dict[str, Engine | None], rounds: int, size: int) -> dict[str, Any]:
    """{way: MB/s and seconds until the first unit, as p20, p50 and p80}; ways take turns."""
    wanted: Manifest | None = None
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    firsts: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, engine in ways.items():
            settings: dict[str, Any] = {
                "rows_per_unit": UNIT_ROWS,
                "unit_bytes": UNIT_BYTES,
                "engine": engine,
            }
            began = time.perf_counter()
            found = index_corpus(folder, **settings)
            took = time.perf_counter() - began
            wanted = wanted or found
            if found != wanted:
                raise SystemExit(f"the manifest of {name} is another one than that of {next(iter(ways))}")
            seconds[name].append(took)
            firsts[name].append(first_unit(folder, **settings))
    assert wanted is not None
    return {
        "bytes": size,
        "rows": wanted.rows,
        "units": len(wanted.units),
        **{
            name: {
                "seconds": quantiles(seconds[name]),
                "MB/s": round(size / 1e6 / quantiles(seconds[name])["p50"], 1),
                "seconds until the first unit": quantiles(firsts[name]),
            }
            for name in ways
        },
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gb", type=float, default=5.0)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    engine: Engine
    if args.ray:
        from gvendi_fast.engines.ray import RayEngine

        engine = RayEngine(workers=(args.workers, args.workers))
    else:
        engine = Processes(args.workers)
    found: dict[str, Any] = {"machine": describe_machine(), "files": args.files, "workers": args.workers}
    with engine:
        for name, has_ids in (("without ids", False), ("with ids", True)):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                size = write_corpus(Path(folder), int(args.gb * 1e9), args.files, has_ids)
                ways = {"this process": None, f"{args.workers} workers": engine}
                found[name] = measure(Path(folder), ways, args.rounds, size)
            print(json.dumps({name: found[name]}, indent=1), flush=True)
            # With ids it takes many times as long.
            if args.out is not None:
                args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
