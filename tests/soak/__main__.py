"""Attack real runs for a while, and say what broke.

    python -m tests.soak [--minutes 30] [--seed 0] [--only kill,damage] [--workers 2] [--folder DIR]
    python -m tests.soak --attempt 17            # that attempt of the same seed alone

Commands run in forked children on a small corpus with the proxy `tiny`, and `gvendi synthesize` against an endpoint on
loopback. After each attack: no traceback, a documented exit code, no hang; and in the end the result of a run that
nobody disturbed, to the bit, or a refusal that names what was damaged. Anything else is a fault: its folder is kept,
with what the attempt did in attempt.json. Exit code 1 where there are faults; 130 after Ctrl-C, which waits for the
attempts under way and prints the table too.

Choices depend on the seed and the attempt's number; the moment of a signal depends on the machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import IO, Any

# Before torch is loaded: one thread, so that a child may be forked, and the same sums everywhere.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "agg",
    "NO_COLOR": "1",
}
PROGRESS_S = 30
EXIT_INTERRUPTED = 130


def main() -> int:
    """Parse, attack, report."""
    options = _options()
    os.environ.setdefault("MPLCONFIGDIR", str(options.folder / "matplotlib"))
    (options.folder / "matplotlib").mkdir(parents=True, exist_ok=True)
    options.folder.chmod(0o755)
    (options.folder / "matplotlib").chmod(0o777)

    from tests.soak import endpoint
    from tests.soak.attacks import ATTACKS
    from tests.soak.attempt import make_reference
    from tests.soak.commands import preload

    unknown = sorted(set(options.only) - set(ATTACKS))
    if unknown:
        sys.exit(f"--only: there is no attack {unknown[0]!r}; wanted some of {', '.join(ATTACKS)}")
    preload()
    pid, url, _ = endpoint.begin()
    try:
        reference = make_reference(options.folder / "reference", url)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    # A child of another user may not read the interpreter's own folder.
    preload(sorted(reference.modules - {"__main__"}))
    taken = sum(reference.seconds.values())
    print(
        f"undisturbed, {len(reference.seconds)} commands took {taken:.1f} s; folder {options.folder}",
        flush=True,
    )
    kinds = [name for name, (_, often) in ATTACKS.items() if name in options.only for _ in range(often)]
    numbers = [options.attempt] if options.attempt is not None else None
    workers = []
    # Open while attempts go on; its end reaches the workers however this process ends.
    over, going_on = os.pipe()
    for index in range(1 if numbers else options.workers):
        reading, writing = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.close(going_on)
            # Ctrl-C reaches the whole group; the attempt under way is finished.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            code = 1
            try:
                _work(index, options, kinds, reference, numbers, os.fdopen(writing, "w", buffering=1), over)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        workers.append((child, os.fdopen(reading)))
    results, is_interrupted = _gather(workers, going_on)
    return _report(results, options) or (EXIT_INTERRUPTED if is_interrupted else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="how long to attack (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument(
        "--only", default="", metavar="KINDS", help="kinds of attack, with commas between them"
    )
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="attempts at once (2)"
    )
    parser.add_argument(
        "--attempt", type=int, help="run the attempt of this number alone, and keep its folder"
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: a new temporary folder)")
    options = parser.parse_args()
    options.folder = (options.folder or Path(tempfile.mkdtemp(prefix="gvendi-soak-"))).absolute()
    shutil.rmtree(options.folder / "reference", ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    from tests.soak.attacks import ATTACKS

    options.only = [name for name in options.only.split(",") if name] or list(ATTACKS)
    return options


def _work(
    index: int,
    options: argparse.Namespace,
    kinds: list[str],
    reference: Any,
    numbers: list[int] | None,
    results: IO[str],
    over: int,
) -> None:
    """Attempt after attempt until the time or the pipe `over` has ended; a line of JSON for each."""
    from tests.soak import endpoint
    from tests.soak.attacks import ATTACKS
    from tests.soak.attempt import Attempt

    pid, url, steer = endpoint.begin()
    until, number = time.monotonic() + 60 * options.minutes, index
    try:
        while (
            (numbers or time.monotonic() < until)
            and numbers != []
            and not select.select([over], [], [], 0)[0]
        ):
            if numbers:
                number = numbers.pop()
            kind = random.Random(f"{options.seed}|{number}").choice(kinds)
            folder = options.folder / f"attempt-{number:05d}"
            shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            attempt = Attempt(kind, number, options.seed, folder, reference, url, steer)
            try:
                ATTACKS[kind][0](attempt)
            except Exception:
                attempt.fault(f"the soak itself: {traceback.format_exc()}")
            found = {
                "number": number,
                "kind": kind,
                "commands": len(attempt.ended),
                "seconds": round(time.monotonic() - began, 2),
                "faults": attempt.faults,
                "notes": attempt.notes,
            }
            if attempt.faults or options.attempt is not None:
                ended = [
                    {**vars(one), "out": one.out[-4000:], "err": one.err[-6000:]} for one in attempt.ended
                ]
                (folder / "attempt.json").write_text(json.dumps({**found, "ended": ended}, indent=1))
            else:
                shutil.rmtree(folder)
            results.write(json.dumps(found) + "\n")
            number += options.workers
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _gather(workers: list[tuple[int, IO[str]]], going_on: int) -> tuple[list[dict[str, Any]], bool]:
    """What the workers find, and whether Ctrl-C, which closes `going_on`, ended it; faults are said as they come."""
    results: list[dict[str, Any]] = []
    is_interrupted = False
    began = said = time.monotonic()
    streams = {stream: pid for pid, stream in workers}
    while streams:
        try:
            readable, _, _ = select.select(list(streams), [], [], 1.0)
        except KeyboardInterrupt:
            print("interrupted: the attempts under way are finished (Ctrl-C again does not wait)", flush=True)
            is_interrupted = True
            os.close(going_on)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            continue
        for stream in readable:
            line = stream.readline()
            if not line:
                _, status = os.waitpid(streams.pop(stream), 0)
                if status:
                    results.append({"number": -1, "kind": "soak", "commands": 0, "faults": ["a worker died"]})
                continue
            results.append(json.loads(line))
            for fault in results[-1]["faults"]:
                print(f"FAULT {results[-1]['number']} {results[-1]['kind']}: {fault[:400]}", flush=True)
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            faulty = sum(bool(one["faults"]) for one in results)
            print(f"{(said - began) / 60:.1f} min: {len(results)} attempts, {faulty} with faults", flush=True)
    return results, is_interrupted


def _report(results: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """The table of attempts and faults by kind, and the faults that differ."""
    print(f"\n{'kind':<14}{'attempts':>10}{'commands':>10}{'with faults':>13}")
    for kind in sorted({one["kind"] for one in results}):
        of = [one for one in results if one["kind"] == kind]
        faulty = sum(bool(one["faults"]) for one in of)
        print(f"{kind:<14}{len(of):>10}{sum(one['commands'] for one in of):>10}{faulty:>13}")
    faulty = [one for one in results if one["faults"]]
    print(f"{'all':<14}{len(results):>10}{sum(one['commands'] for one in results):>10}{len(faulty):>13}")
    counted: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], int] = {}
    for one in faulty:
        for fault in dict.fromkeys(one["faults"]):
            # What is the same but for numbers and names is one fault.
            key = one["kind"], re.sub(r"[0-9a-f]*\d[0-9a-f]*", "N", fault.partition("\n")[0])[:130]
            counted[key] += 1
            first.setdefault(key, one["number"])
    for (kind, fault), count in sorted(counted.items()):
        print(f"{count:>5} x {kind}: {fault}  [attempt {first[kind, fault]}]")
    print(f"seed {options.seed}; {len(results)} attempts, {len(faulty)} with faults")
    if faulty:
        print(f"kept in {options.folder}: attempt-NUMBER/attempt.json says what was done")
        return 1
    shutil.rmtree(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
