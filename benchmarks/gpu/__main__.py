"""Check every kernel on a GPU against the reference, measure what sketching costs there, and lose nothing of it.

    python -m benchmarks.gpu [--sections NAME ...] [--seconds 540] [--out benchmarks/results/<gpu>.json]
                             [--corpus FILE [--tokenizer FOLDER]]

Each section runs in a process of its own with its share of the time, in order of worth. A section that hangs, crashes
or runs out of memory costs the figure that was under way, which then says why; a new process goes on behind it. The
results file is written again after every figure, whole, so whatever ends this script leaves what was measured.

A second call goes on: what was measured of this very source with these versions on such a GPU stays, what is missing
is measured, and last what failed is tried once more. A failed check marks the figures that rest on it and keeps none
from being measured. The last 30 lines are the summary. Exits with 1 if a check failed, with 3 if a figure did.

No network and no git are needed; GVENDI_COMMIT names the commit of a tree without its history. --corpus measures
sketching on real text: token ids as `benchmarks.corpora.token_ids` writes them, or rows as `gvendi sketch` takes them
together with --tokenizer. `python -m benchmarks.report` writes the tables. --dry-run goes through everything with tiny
sizes on whatever device there is, and writes only where --out says; the report takes no such file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.environment import ROOT, commit, tree_digest
from benchmarks.gpu.results import Results, read, write_whole
from benchmarks.report.gpu import OUT_OF_TIME, failed_checks, summary

# This process imports no torch and touches no device, so that nothing which breaks there breaks it.
# {section: seconds of the whole run}; a section that ends early leaves its time to those behind it.
SECTIONS = {
    "versions": 20,
    "build": 75,
    "smoke": 30,
    "end to end": 190,
    "experts": 40,
    "yardsticks": 110,
    "checks": 35,
    "kernel times": 30,
    "cpu and gpu": 15,
    "spectral": 10,
    "waiting": 10,
    "other checks": 15,
}
# Both make what the others need on a machine that has just been started, and are quick where it is there.
ALWAYS = ("versions", "build")
# Seconds behind a section's end after which its processes are ended from here.
GRACE = 5
STDERR_LINES = 12


class Stopped(BaseException):
    """The signal that ended the run."""


class Run:
    """One call of this script: the sections it starts, and what it has tried."""

    def __init__(self, args: argparse.Namespace, results: Results, folder: Path) -> None:
        self.args, self.results, self.folder = args, results, folder
        self.tried: set[tuple[str, str]] = set()

    def section(self, name: str, ends: float, retry: bool = False) -> None:
        """Run a section until it is done, its time is up, or nothing more can be had of it.

        retry: what failed in an earlier call is tried again.
        """
        began, entry = time.monotonic(), self.results.section(name)
        if began >= ends:
            entry["ended"] = OUT_OF_TIME
            self.results.save()
            return
        entry["ended"] = "cut short"
        print(f"{name}: {max(0.0, ends - began):.0f} s", flush=True)
        while True:
            known = self.results.figures(name)
            skip = [
                figure
                for figure, found in known.items()
                if (name, figure) in self.tried or not (name in ALWAYS or (retry and "not measured" in found))
            ]
            ended, answer, said = self._process(name, skip, ends)
            self._take(name, answer)
            if ended is None:
                late = not answer["complete"]
                entry["ended"] = OUT_OF_TIME if late else "complete"
                break
            entry["ended"] = ended
            figure = answer and answer["under way"]
            print(f"  {name}{f', {figure}' if figure else ''}: {ended}", flush=True)
            print("".join(f"    {line}\n" for line in said[-4:]), end="", flush=True)
            if figure:
                marked = {"not measured": ended, "stderr": said}
                self._take(name, {**answer, "figures": {**answer["figures"], figure: marked}})
            # A process that ended between two figures ends there again, unless it gave up on its device.
            going_on = figure or (answer and set(answer["figures"]) - set(skip))
            if not going_on or time.monotonic() >= ends:
                entry["stderr"] = said
                break
        if entry["ended"] == "complete":
            # What is planned no longer is no part of a whole section.
            entry["figures"] = {f: found for f, found in entry["figures"].items() if f in entry["planned"]}
            entry.pop("stderr", None)
        entry["seconds"] = round(time.monotonic() - began, 1)
        self.results.save()
        print(f"{name}: {entry['ended']}, {entry['seconds']:.1f} s", flush=True)

    def _take(self, name: str, answer: dict | None) -> None:
        if answer:
            self.tried |= {(name, figure) for figure in answer["figures"]}
            self.results.take(name, answer)

    def _process(self, name: str, skip: list[str], ends: float) -> tuple[str | None, dict | None, list[str]]:
        """(why the process of a section ended early or None, its answer or None, its last words)."""
        answer, request = self.folder / "answer.json", self.folder / "request.json"
        answer.unlink(missing_ok=True)
        write_whole(
            request,
            {
                "section": name,
                "skip": skip,
                "ends": ends,
                "dry run": self.args.dry_run,
                "answer": str(answer),
                "results": str(self.results.path or ""),
                "machine": self.results.key,
                "corpus": self.args.corpus and str(self.args.corpus.resolve()),
                "tokenizer": self.args.tokenizer and str(self.args.tokenizer.resolve()),
                "plant": self.args.plant.get(name),
            },
        )
        command = [sys.executable, "-m", "benchmarks.gpu.section", str(request)]
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "GVENDI_COMMIT": commit(), "PYTHONPATH": search}
        with (self.folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=stderr, env=environment, start_new_session=True
            )
            try:
                late = self._watch(process, name, answer, ends + GRACE)
            finally:
                # Its whole group, and nothing else: compilers that it started would go on.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                # After a signal to this process as well: what was measured since the last look.
                self._take(name, read(answer))
        said = without_places((self.folder / "stderr").read_text(errors="replace")).strip().splitlines()
        found = read(answer)
        if found is not None and process.returncode == 0:
            return None, found, said
        # A figure is given the section's time as well as its own.
        ran_out = time.monotonic() >= ends
        return how_it_ended(process.returncode, late, said, ran_out), found, said[-STDERR_LINES:]

    def _watch(self, process: subprocess.Popen, name: str, answer: Path, last: float) -> bool:
        """Keep what the process writes until it is gone; True if it is still there at `last`."""
        seen = None
        while process.poll() is None:
            if time.monotonic() > last:
                return True
            time.sleep(0.05)
            now = answer.stat().st_mtime_ns if answer.exists() else None
            if now != seen:
                seen = now
                self._take(name, read(answer))
        return False


def without_places(text: str) -> str:
    """Text without where the tree and the packages lie, which says nothing of what happened."""
    return re.sub(r"[^\s\"]*/site-packages/", "", text.replace(f"{ROOT}/", ""))


def how_it_ended(code: int, late: bool, said: list[str], ran_out: bool) -> str:
    """Why a process of a section is gone; `ran_out`: the section's time was over."""
    if late:
        return "did not end by itself after its time"
    if any(line.startswith("Timeout (") for line in said):
        return OUT_OF_TIME if ran_out else "took too long, or hung"
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    last = said[-1].strip() if said else "nothing on stderr"
    return f"process ended with code {code}: {last}"[:300]


@contextlib.contextmanager
def signals_end_the_run() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped inside the block."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def deadlines(names: list[str], began: float, seconds: float) -> dict[str, float]:
    """{section: the time at which it ends}: shares of the whole; what one leaves goes to the next."""
    total, ends, found = sum(SECTIONS[name] for name in names), began, {}
    for name in names:
        ends += seconds * SECTIONS[name] / total
        found[name] = ends
    # Without it nothing else can be kept.
    found["versions"] = max(found["versions"], began + SECTIONS["versions"])
    return found


def run(args: argparse.Namespace, results: Results, folder: Path) -> None:
    """All sections that are asked for, then what failed in an earlier call."""
    runner, asked = Run(args, results, folder), [name for name in SECTIONS if name in args.sections]
    ends = deadlines([n for n in SECTIONS if n in asked or n in ALWAYS], time.monotonic(), args.seconds)
    runner.section("versions", ends["versions"])
    machine = results.figures("versions").get("machine", {"not measured": "the section did not get to it"})
    if "not measured" in machine:
        sys.exit(f"this machine cannot be described: {machine['not measured']}")
    known = results.content["sections"].pop("versions")
    machine = {name: value for name, value in machine.items() if name not in ("machine", "seconds")}
    machine |= {"tree": tree_digest()}
    if machine["gpu"] == "none" and not args.dry_run:
        sys.exit("torch sees no GPU; --dry-run goes through the script without one")
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    results.open(
        args.out or (None if args.dry_run else ROOT / "benchmarks" / "results" / f"{name}.json"), machine
    )
    results.take("versions", known)
    results.section("versions").update(ended=known["ended"], seconds=known["seconds"])

    def unfinished(section: str) -> bool:
        entry = results.content["sections"].get(section)
        if entry is None or entry.get("plan of") != results.key or section in args.plant:
            return True
        return not set(entry["planned"]) <= set(results.figures(section))

    def failed_before(section: str) -> bool:
        found = results.figures(section).items()
        return any("not measured" in entry and (section, f) not in runner.tried for f, entry in found)

    todo = [n for n in asked if n not in ALWAYS and unfinished(n)]
    again = [n for n in asked if n not in ALWAYS and failed_before(n)]
    if todo or again or "build" in args.sections:
        runner.section("build", ends["build"])
    for name in todo:
        runner.section(name, ends[name])
    for name in again:
        if failed_before(name) and time.monotonic() < ends[asked[-1]]:
            runner.section(name, ends[asked[-1]], retry=True)


def main() -> None:
    """Measure, and say what was found."""
    args = arguments()
    results, stopped = Results(args.dry_run), None
    with tempfile.TemporaryDirectory(prefix="gvendi-gpu-") as folder, signals_end_the_run():
        try:
            run(args, results, Path(folder))
        except Stopped as signalled:
            stopped = signalled.args[0]
            print(f"stopped by {signal.Signals(stopped).name}", flush=True)
    told = summary(
        results.content, list(SECTIONS), results.key, str(results.path or ""), resume_command(args)
    )
    print("\n".join(told))
    if stopped:
        sys.exit(128 + stopped)
    sys.exit(exit_code(results, args.sections))


def exit_code(results: Results, asked: list[str]) -> int:
    """1 if a check failed, 3 if a figure did or a section that was asked for is not whole, else 0."""
    if failed_checks(results.content):
        return 1
    figures = [found for name in SECTIONS for found in results.figures(name).values()]
    missing = any("not measured" in found and not found.get("absent") for found in figures)
    return 3 if missing or any(results.section(name)["ended"] != "complete" for name in asked) else 0


def resume_command(args: argparse.Namespace) -> str:
    """The call that measures what is missing, in all sections."""
    given = [(f"--{name}", getattr(args, name)) for name in ("out", "seconds", "corpus", "tokenizer")]
    words = [word for name, value in given if value is not None for word in (name, str(value))]
    return shlex.join(["python", "-m", "benchmarks.gpu", *(["--dry-run"] if args.dry_run else []), *words])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="run these alone [default: all]")
    parser.add_argument("--seconds", type=float, default=540, help="time of the whole run [default: 540]")
    parser.add_argument("--out", type=Path, help="results file [default: benchmarks/results/<gpu>.json]")
    parser.add_argument(
        "--corpus", type=Path, help="token ids from benchmarks.corpora.token_ids, or rows with --tokenizer"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for the rows of --corpus")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on any device")
    # A failure planted into a section of a rehearsal, as SECTION=KIND.
    parser.add_argument("--plant", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.plant = dict(plant.split("=") for plant in args.plant)
    if args.plant and not args.dry_run:
        parser.error("--plant needs --dry-run")
    args.sections = args.sections or list(SECTIONS)
    if unknown := (set(args.sections) | set(args.plant)) - set(SECTIONS):
        parser.error(f"--sections must be of {', '.join(SECTIONS)}; got {', '.join(sorted(unknown))}")
    if args.corpus is not None and not args.corpus.exists():
        parser.error(f"--corpus must name a file, got {args.corpus}")
    return args


if __name__ == "__main__":
    main()
