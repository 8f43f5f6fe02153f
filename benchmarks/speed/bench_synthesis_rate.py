"""Whether sketching and accepting keep up with an endpoint: the whole loop against a server that gives so many answers
a second and no more.

    python -m benchmarks.speed.bench_synthesis_rate --rate 200 --task generic

The server is a process of its own (tests/chat_server.py), answers every request in its turn, one each 1/rate seconds,
and counts. First a bare client asks it for the same prompts, then the whole loop runs with the embedded proxy at
K = 1024 and the defaults of the configuration. Printed: requests a second of both, the share of the loop's time by
stage, and the queue, candidates that are answered and not yet decided, over the thirds of the run: where the loop is
the slower one the queue fills up to its bound. The figures go to benchmarks/results/synthesis_rate.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean

from benchmarks.environment import ROOT, describe_machine

sys.path.insert(0, str(ROOT / "tests"))
from chat_server import ChatServer, Fault
from problem_families import NUMERIC, family_of, math_writer, seed_rows, writer

WRITERS = {"generic": writer, "math": math_writer}
RESULTS = ROOT / "benchmarks" / "results" / "synthesis_rate.json"


def serve(pipe, rate: float, favour: float, task: str) -> None:
    """Answer until the pipe says so; sends the address, then the number of answers."""
    lock, following = threading.Lock(), [0.0]

    def turn(arrival: int, body: dict) -> Fault:
        with lock:
            now = time.monotonic()
            following[0] = max(now, following[0]) + 1 / rate
            return Fault(stall=following[0] - now)

    with ChatServer(WRITERS[task](favour), turn) as server:
        pipe.send(server.url)
        pipe.recv()
        pipe.send(server.served.total())


class Server:
    """A server in its own process, as a context manager. url; after the end: served."""

    def __init__(self, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=serve, args=(other, options.rate, options.favour, options.task)
        )

    def __enter__(self) -> Server:
        self._process.start()
        self.url = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send("end")
        self.served = self._pipe.recv()
        self._process.join()


class Clock:
    """Watches a run: when each block was decided, and the status then."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, int, int]] = []

    def update(self, status) -> None:
        """See `status.Watcher`."""
        decided = status.accepted + sum(status.rejected.values())
        self.seen.append((time.perf_counter(), status.requests, decided, status.queued))


def seed_rows_of(task: str, each: int) -> list[dict]:
    """Seed rows of the families that the task's writer has."""
    rows = seed_rows(each)
    return rows if task == "generic" else [row for row in rows if family_of(row["prompt"]) in NUMERIC]


def settings(folder: Path, url: str, options: argparse.Namespace) -> dict:
    """The run's configuration: defaults wherever the benchmark does not need another value."""
    path, rows = folder / "seeds.jsonl", seed_rows_of(options.task, options.each)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "out": str(folder / "run"),
        "pool": {"data": str(path)},
        "task": {"name": options.task},
        "generator": {
            "model": "m",
            "base_url": url,
            "key_variable": None,
            "send_seed": True,
            "concurrency": 64,
        },
        "proxy": {"name": "tiny", "dim": options.dim},
        "accept": {"rule": options.rule},
        "stop": {"target": len(rows) + options.grow},
    }


def bare_rate(url: str, folder: Path, count: int, name: str) -> float:
    """Requests a second of the generator alone, which keeps every answer as in a run."""
    from gvendi_fast.synthesis.generators.openai import OpenAIGenerator, Pace
    from gvendi_fast.synthesis.generators.request_store import RequestStore
    from gvendi_fast.synthesis.generators.requests import Request
    from gvendi_fast.synthesis.tasks import make_task

    task, rows = make_task(name), seed_rows_of(name, 20)
    asks = [task.ask(rows[number % 40 :][:5], sample=number) for number in range(count)]
    pace = Pace(concurrency=64, max_concurrency=64)

    async def ask_all(store: RequestStore) -> float:
        async with OpenAIGenerator(
            url, "m", store, key_variable=None, send_seed=True, pace=pace
        ) as generator:
            began = time.perf_counter()
            requests = [
                Request(ask.messages, temperature=ask.temperature, top_p=ask.top_p, sample=ask.sample)
                for ask in asks
            ]
            await asyncio.gather(*map(generator.generate, requests))
            return count / (time.perf_counter() - began)

    with RequestStore(folder / "bare.sqlite") as store:
        return asyncio.run(ask_all(store))


def thirds(clock: Clock) -> list[dict[str, float]]:
    """Requests and decisions a second and the mean queue, in each third of the blocks."""
    size = len(clock.seen) // 3
    if size < 2:
        raise SystemExit(
            f"{len(clock.seen)} blocks are too few to look at thirds of them; give a larger --grow"
        )
    found = []
    for third in range(3):
        part = clock.seen[third * size : (third + 1) * size + 1]
        (first, asked, decided, _), (last, asked_then, decided_then, _) = part[0], part[-1]
        found.append(
            {
                "requests per second": (asked_then - asked) / (last - first),
                "decisions per second": (decided_then - decided) / (last - first),
                "queue": mean(queued for *_, queued in part),
            }
        )
    return found


def main() -> None:
    """Run both, print and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=200.0, help="answers a second of the server")
    parser.add_argument(
        "--task",
        choices=WRITERS,
        default="generic",
        help="generic: one request a candidate; math: one for the problem and three for its answer",
    )
    parser.add_argument("--each", type=int, default=150, help="seed rows of each family")
    parser.add_argument("--grow", type=int, default=300, help="rows to add")
    parser.add_argument("--favour", type=float, default=0.8, help="share of the favourite family")
    parser.add_argument("--rule", default="cluster", help="rule of acceptance")
    parser.add_argument("--dim", type=int, default=1024, help="K")
    options = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    from gvendi_fast.synthesis.config.config import config_from
    from gvendi_fast.synthesis.loop.status import BESIDE
    from gvendi_fast.synthesis.run import synthesize

    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Server(options) as server:
            bare = bare_rate(server.url, folder, int(5 * options.rate), options.task)
        print(f"bare client: {bare:.0f} requests a second", flush=True)
        with Server(options) as server:
            config = config_from(settings(folder, server.url, options))
            began = time.perf_counter()
            status = synthesize(config, clock)
            whole = time.perf_counter() - began
        ahead = config.ahead * config.block
    parts = thirds(clock)
    for number, part in enumerate(parts, 1):
        print(f"third {number}: " + ", ".join(f"{key} {value:.0f}" for key, value in part.items()))
    beside = (*BESIDE, "seed pool")
    spent = {key: value for key, value in status.seconds.items() if key not in beside}
    running = sum(spent.values())
    print(
        f"pool {status.seeds} -> {status.pool}, {server.served} answers served, {status.requests} kept; "
        f"at most {ahead} prompts ahead"
    )
    print(f"time {whole:.1f} s, of it seeds {status.seconds['seed pool']:.1f}; the loop's shares:")
    for stage, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {stage:<12}{100 * seconds / running:5.1f} %")
    for stage in BESIDE:
        print(f"beside it, {stage} {100 * status.seconds[stage] / running:.1f} % of the time")
    result = {
        "options": vars(options),
        "bare requests per second": bare,
        "thirds": parts,
        "seconds": status.seconds,
        "pool": [status.seeds, status.pool],
        "requests": [server.served, status.requests],
        "machine": describe_machine(),
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, options.task: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
