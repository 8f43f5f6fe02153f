"""What threads and the way they wait cost `gvendi score` on a CPU, alone on the machine and beside a busy process.

    python -m benchmarks.threads --loaded [--rounds 5] [--rows 400]
    python -m benchmarks.threads          # on a quiet machine: both halves

Each figure is a process of its own, as OpenMP reads how to wait when it is loaded: the tokens sketched a second under
`tiny`, float32, without loading. In a round every setting is run once, in an order that moves on by one, so that what
else the machine does meets all alike. "loaded": a process beside it spins, one for every core but one. Ratios are of
the settings of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.corpora import made_up
from benchmarks.environment import ROOT, describe_machine

# {name: environment}: libgomp's own default spins 300,000 times where there are as many cores as threads.
WAITS = {
    "as OpenMP does": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
}
RESULT = ROOT / "benchmarks" / "results" / "threads.json"
ONE = "1 thread"


def settings(cores: int) -> dict[str, dict[str, str]]:
    """{name: environment} of every setting: one thread, and one for each core with every way to wait."""
    found = {ONE: {"OMP_NUM_THREADS": "1"}}
    return found | {
        f"{cores} threads, {name}": {"OMP_NUM_THREADS": str(cores), **more} for name, more in WAITS.items()
    }


def measure(corpus: Path, environment: dict[str, str]) -> float:
    """Tokens a second of one run in a process of its own."""
    dropped = ("OMP_", "GOMP_", "KMP_", "MKL_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    command = [sys.executable, "-m", "benchmarks.threads", "--child", str(corpus)]
    done = subprocess.run(
        command, cwd=ROOT, env=env | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(corpus: Path) -> None:
    """Print the tokens a second of a second run: a short first one has made tables and warmed caches."""
    from gvendi_fast import score
    from gvendi_fast.sketching.corpus import Settings
    from gvendi_fast.sketching.proxy.load import load_proxy

    proxy = load_proxy("tiny", dtype="float32")
    score(str(corpus), proxy=proxy, settings=Settings(limit=64))
    print(json.dumps(score(str(corpus), proxy=proxy).tokens_per_second))


def rounds(corpus: Path, count: int, cores: int, spinning: int) -> dict[str, list[float]]:
    """{setting: tokens a second by round}, with so many processes spinning beside."""
    names, found = list(settings(cores)), {name: [] for name in settings(cores)}
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(spinning)]
    try:
        for number in range(count):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(measure(corpus, settings(cores)[name]))
                print(
                    f"round {number + 1}, {spinning} spinning: {name}: {found[name][-1]:,.0f} tokens/s",
                    flush=True,
                )
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    return found


def summary(found: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    """{setting: tokens a second by round, their median, and the median ratio to one thread of the same round}."""
    return {
        name: {
            "tokens_per_second": [round(value, 1) for value in values],
            "median": round(statistics.median(values), 1),
            "ratio_to_one_thread": round(
                statistics.median(a / b for a, b in zip(values, found[ONE], strict=True)), 3
            ),
        }
        for name, values in found.items()
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loaded", action="store_true", help="the loaded half alone; the other one is kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child)
        return
    cores = max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "varied.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in made_up.varied(args.rows)))
        for half, spinning in (("quiet", 0), ("loaded", cores - 1)):
            if half == "quiet" and args.loaded:
                continue
            before = os.getloadavg()
            found = summary(rounds(corpus, args.rounds, cores, spinning))
            result[half] = {
                "settings": found,
                "spinning": spinning,
                "load_average_before": [round(value, 2) for value in before],
                "machine": describe_machine(),
            }
            for name, one in found.items():
                print(
                    f"{half}: {name}: {one['median']:,.0f} tokens/s, {one['ratio_to_one_thread']:.2f} of one thread"
                )
    result |= {"rows": args.rows, "rounds": args.rounds, "cores": cores}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
