"""The same work by two checkouts, in turns: how much slower or faster the second one is.

    python -m benchmarks.before_after BEFORE AFTER [--out benchmarks/results/before_after.json] [--only reading,writing]

BEFORE and AFTER are checkouts with a built package. Two processes, one in each, do a piece of fixed work when they are
told to, in the order A B B A, so that a machine that warms up or is disturbed meets both alike; that is done with
`--processes` pairs, for a process may be lucky with its memory. Of each kind of work the ratio of the medians of all
turns is kept, with the interval that holds 95 % of such ratios when the turns are drawn again with replacement.
One thread each; both must give the same numbers, or there is nothing to compare. Nothing else should run meanwhile.

Parts are written to memory where the system has a folder for that (/dev/shm): a disk's share is the same for both and
would hide what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
# Rows of each kind of work, for about a third of a second a turn.
READ_ROWS, TOKENIZED_ROWS, SKETCHED_ROWS, RUN_ROWS = 12_000, 1_000, 48, 96
UNIT_ROWS, UNITS, DIM = 512, 8, 1024
DRAWS = 2_000
WORK = {
    "reading": f"index and read {READ_ROWS:,} rows",
    "tokenizing": f"encode {TOKENIZED_ROWS:,} rows",
    "sketching": f"sketch a batch of {SKETCHED_ROWS} rows",
    "whole run": f"read, sketch and store {RUN_ROWS} rows",
    "writing parts": f"write {UNITS} parts of {UNIT_ROWS} rows, K = {DIM}",
    "reading parts": f"read {UNITS} parts of {UNIT_ROWS} rows, K = {DIM}",
}


def main() -> None:
    """Compare two checkouts, or be the process that works in one of them."""
    if sys.argv[1:2] == ["--work"]:
        _work(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before_after",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "before_after.json")
    parser.add_argument(
        "--turns", type=int, default=12, help="of each checkout, in each pair of processes (12)"
    )
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes (3)")
    parser.add_argument("--size", type=float, default=1.0, help="share of the work, to try things out (1)")
    parser.add_argument("--only", default="", help=f"kinds of work, with commas: {', '.join(WORK)}")
    args = parser.parse_args()
    only = [name for name in args.only.split(",") if name] or list(WORK)
    if unknown := [name for name in only if name not in WORK]:
        parser.error(f"--only: there is no work {unknown[0]!r}; wanted some of {', '.join(WORK)}")
    found = compare((args.before, args.after), only, args.turns, args.processes, args.size)
    args.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for name, one in found["work"].items():
        print(f"{name:<16}{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})")
    print(f"written to {args.out}")


def compare(
    checkouts: tuple[Path, Path], only: Sequence[str], turns: int, processes: int, size: float
) -> dict[str, Any]:
    """{machine, before, after, work: {name: seconds, ratio after / before with its interval}}."""
    from benchmarks.environment import describe_machine

    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in only}
    with tempfile.TemporaryDirectory(prefix="gvendi-before-after-") as folder:
        _write_corpus(Path(folder), size)
        for _ in range(processes):
            both = [_Worker(checkout, Path(folder), size) for checkout in checkouts]
            for name in only:
                _take_turns(name, both, seconds[name], turns)
            for worker in both:
                worker.close()
    return {
        "machine": describe_machine(),
        "before": _commit(checkouts[0]),
        "after": _commit(checkouts[1]),
        "turns": turns,
        "processes": processes,
        "work": {name: {"what": WORK[name], **_ratio(*seconds[name])} for name in only},
    }


def _take_turns(
    name: str, both: Sequence[_Worker], seconds: tuple[list[float], list[float]], turns: int
) -> None:
    # The first turn of each fills caches.
    given = [worker.do(name)["result"] for worker in both]
    if given[0] != given[1]:
        sys.exit(f"{name}: the two checkouts give other results, {given[0]} and {given[1]}")
    for turn in range(turns):
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[index].append(both[index].do(name)["seconds"])


def _ratio(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    import numpy as np

    was, now = np.asarray(before), np.asarray(after)
    draws = np.random.default_rng(0)
    chosen = [draws.integers(0, len(was), (DRAWS, len(was))) for _ in range(2)]
    ratios = np.median(now[chosen[0]], axis=1) / np.median(was[chosen[1]], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    quantiles = {
        side: {f"p{p}": float(np.percentile(x, p)) for p in (20, 50, 80)}
        for side, x in (("before", was), ("after", now))
    }
    return {
        "seconds": quantiles,
        "ratio": float(np.median(now) / np.median(was)),
        "low": float(low),
        "high": float(high),
    }


def _commit(checkout: Path) -> str:
    if not (checkout / ".git").exists():
        return f"unknown (no git history in {checkout.name})"
    said = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
        capture_output=True,
        text=True,
        check=True,
    )
    return said.stdout.strip()


def _write_corpus(folder: Path, size: float) -> None:
    from benchmarks.corpora.made_up import varied

    made = varied(TOKENIZED_ROWS)
    counts = {
        "corpus": max(int(READ_ROWS * size), TOKENIZED_ROWS),
        "few": max(2, int(RUN_ROWS * size)),
        "stored": UNITS * max(1, int(UNIT_ROWS * size)),
    }
    for name, count in counts.items():
        rows = ({**made[i % len(made)], "id": f"row-{i}"} for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class _Worker:
    """A process in a checkout that does a piece of work when it is told to."""

    def __init__(self, checkout: Path, folder: Path, size: float) -> None:
        self.checkout = checkout
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(checkout.absolute())}
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).resolve()),
                "--work",
                str(checkout.absolute()),
                str(folder),
                str(size),
            ],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, name: str) -> dict[str, Any]:
        """Do it once: {"seconds", "result"}."""
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the process in {self.checkout} ended with code {self._process.wait()} at: {name}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def _work(checkout: Path, folder: Path, size: float) -> None:
    # The script's own folder is on the path, and its names are no modules of the checkout.
    sys.path[:] = [str(checkout), *(p for p in sys.path if p != str(Path(__file__).parent))]
    answers = os.fdopen(os.dup(1), "w")
    # What the package prints is no answer.
    os.dup2(2, 1)
    work = _prepare(checkout, folder, size)
    for line in sys.stdin:
        name = line.strip()
        prepare, call = work[name]
        argument = prepare()
        began = time.perf_counter()
        result = call(argument)
        took = time.perf_counter() - began
        answers.write(json.dumps({"seconds": took, "result": result}) + "\n")
        answers.flush()


def _prepare(
    checkout: Path, folder: Path, size: float
) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """{kind of work: (what is made ready before the clock starts, the work)}; the work returns what it gave."""
    import hashlib
    from itertools import count

    import numpy as np
    import torch

    import gvendi_fast
    from gvendi_fast.data.index import Rejected, UnitReader, index_corpus
    from gvendi_fast.data.run_directory import Part, RunDirectory
    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.sketching.corpus import Settings, sketch_corpus
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
    from gvendi_fast.sketching.proxy.encode import Encoder, collate
    from gvendi_fast.sketching.proxy.load import load_proxy

    if not Path(gvendi_fast.__file__).is_relative_to(checkout):
        sys.exit(f"{gvendi_fast.__file__} is not the package of {checkout}")
    torch.set_num_threads(1)
    corpus, few, stored = (folder / name for name in ("corpus.jsonl", "few.jsonl", "stored.jsonl"))
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    space = tempfile.TemporaryDirectory(prefix="gvendi-before-after-", dir=memory)
    numbers = count()

    def fresh() -> Path:
        return Path(space.name) / str(next(numbers))

    def read(path: Path) -> list[Any]:
        manifest = index_corpus(path, rows_per_unit=UNIT_ROWS)
        with UnitReader(manifest) as reader:
            return [row for unit in manifest.units for row in reader.read(unit)]

    proxy = load_proxy("tiny", dtype="float32")
    encoder = Encoder(proxy.tokenizer, 512)
    rows = [row for row in read(corpus) if not isinstance(row, Rejected)]
    tokenized = rows[: int(TOKENIZED_ROWS * size)]
    sketcher = GradientSketcher(proxy.model, SketchSpec())
    ids, labels, mask = collate(encoder.encode(rows[: max(2, int(SKETCHED_ROWS * size))]), 0)
    manifest = index_corpus(stored, rows_per_unit=max(1, int(UNIT_ROWS * size))).to_dict()
    spec = {"format": 2, "sketch": SketchSpec(dim=DIM).as_dict()}
    draws = np.random.default_rng(0)
    parts = []
    for unit in range(UNITS):
        n = max(1, int(UNIT_ROWS * size))
        sketches = draws.standard_normal((n, DIM)).astype(np.float32)
        column = np.arange(n, dtype=np.int32)
        where = np.arange(unit * n, unit * n + n, dtype=np.int64)
        names = [f"row-{i}" for i in where]
        norms = column.astype(np.float32) + 1
        parts.append(Part(unit, names, [""] * n, where, sketches, column, column, norms, norms))

    def new_run() -> RunDirectory:
        return RunDirectory.open(fresh(), spec, manifest)

    def write(run: RunDirectory) -> int:
        for part in parts:
            run.write_part(part)
        return run.units_done

    written = new_run()
    write(written)

    def digest(*arrays: np.ndarray) -> str:
        return hashlib.blake2b(b"".join(x.tobytes() for x in arrays), digest_size=8).hexdigest()

    def run_all(out: Path) -> str:
        settings = Settings(unit_rows=32)
        return digest(*(part.sketches for part in sketch_corpus(few, out, proxy, settings).iterate()))

    def nothing() -> None:
        return None

    return {
        "reading": (nothing, lambda _: len(read(corpus))),
        "tokenizing": (
            nothing,
            lambda _: digest(*(sample.input_ids for sample in encoder.encode(tokenized))),
        ),
        "sketching": (nothing, lambda _: digest(sketcher(ids, labels, mask).numpy())),
        "whole run": (fresh, run_all),
        "writing parts": (new_run, write),
        "reading parts": (nothing, lambda _: digest(*(part.sketches for part in written.iterate()))),
    }


if __name__ == "__main__":
    main()
