"""One attempt: its folder and random choices, the commands that were run in it, and what was wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak import corpus
from tests.soak.commands import Command, Ended
from tests.soak.os_faults import Plan, install

SKETCHING = "--proxy tiny --dim 256 --dtype float32 --unit-rows 6 --batch-tokens 256 --by family".split()
SKETCH = ("sketch", "corpus", *SKETCHING, "--out", "run")
READERS = {
    "score": ("score", "run", "--by", "family", "--json"),
    "select": ("select", "run", "--size", "8", "--out", "chosen.jsonl", "--force", "--json"),
    "cluster": ("cluster", "run", "--clusters", "4", "--out", "k.parquet", "--force", "--json"),
    "compare": ("compare", "run", "other", "--json"),
    "measures": ("measures", "run", "--json"),
    "weights": ("weights", "run", "--by", "family", "--json"),
    "report": ("report", "run", "--out", "page.html", "--force"),
    "check": ("check", "run"),
}
# What a reader writes and is compared byte for byte.
WRITTEN = {"select": ("chosen.jsonl", "chosen.parquet"), "cluster": ("k.parquet",)}
GROW = ("synthesize", "grow.yaml")
GROWN = ("accepted.jsonl", "rejected.jsonl", "sketches.f32")
# Done; an error in one sentence; a wrong use of the command line; interrupted.
CODES = {0, 1, 2, 130}
# Of numbers that no run repeats.
TIMES = re.compile(r"seconds|per_second|date|time$|commit")
KEY = "sk-soak-0123456789/abc+DEF=="
ENVIRONMENT = {"NO_PROXY": "127.0.0.1", "SOAK_KEY": KEY, "COLUMNS": "200"}
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")


@dataclass
class Reference:
    """What undisturbed runs gave. folder: holds corpus, more, run, other, half and grown, to be copied.

    files: digest by name of the files of `run`. printed: JSON that each reader printed, without times. written: digest
    by name of what readers wrote. grown: bytes of the rows of a synthesis. calls: of the operating system, by command
    and kind. seconds: that each command took.
    """

    folder: Path
    files: dict[str, str] = field(default_factory=dict)
    printed: dict[str, Any] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    grown: dict[str, bytes] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    readers: tuple[str, ...] = tuple(READERS)
    modules: set[str] = field(default_factory=set)


class Attempt:
    """Attempt `number` of a kind. url: of the chat endpoint; `steer` sets what it does next."""

    def __init__(
        self, kind: str, number: int, seed: int, folder: Path, reference: Reference, url: str, steer: Callable
    ) -> None:
        self.kind, self.number, self.reference, self.url, self.steer = kind, number, reference, url, steer
        self.random = random.Random(f"{seed}|{number}|{kind}")
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir(parents=True)
        self.ended: list[Ended] = []
        self.faults: list[str] = []
        self.notes: list[str] = []

    @property
    def seeds(self) -> Path:
        """The rows that a synthesis begins with."""
        return self.reference.folder / "seeds.jsonl"

    def fault(self, what: str) -> None:
        """Something is wrong; `what` begins with words that are the same for the same fault."""
        self.faults.append(what)

    def note(self, what: str) -> None:
        """What this attempt did, for who looks at it later."""
        self.notes.append(what)

    def copy(self, *names: str) -> None:
        """Copy parts of the reference into the folder that commands run in."""
        # The corpus of the other run, which is shown beside it.
        for name in (*names, *(("more",) if "other" in names else ())):
            source = self.reference.folder / name
            if source.is_dir():
                shutil.copytree(source, self.work / name)
            else:
                shutil.copy2(source, self.work / name)

    def start(self, argv: Sequence[str], **more: Any) -> Command:
        """A command that runs beside what follows."""
        return Command(argv, self.work, environment=ENVIRONMENT, **more)

    def end(self, command: Command, sent: Iterable[int] = ()) -> Ended:
        """Wait for it and check how it ended. sent: signals that it was sent."""
        ended = command.end()
        self.ended.append(ended)
        self.judge(ended, sent)
        return ended

    def run(self, argv: Sequence[str], **more: Any) -> Ended:
        """A command, to its end, which is checked."""
        return self.end(self.start(argv, **more))

    def judge(self, ended: Ended, sent: Iterable[int] = ()) -> None:
        """What holds for every end: no traceback, no hang, a documented exit code, an error in words."""
        what = ended.argv[0]
        sent = set(sent)
        if ended.hung:
            self.fault(f"{what} hangs")
        elif "Traceback" in ended.said or "Exception ignored" in ended.said:
            self.fault(f"{what}: traceback: {last_line(ended.said)}")
        allowed = CODES | {-number for number in sent}
        # As a shell has it.
        allowed |= {128 + number for number in sent}
        if not ended.hung and ended.code not in allowed:
            self.fault(f"{what}: exit code {ended.code}")
        if ended.code == 130 and signal.SIGINT not in sent:
            self.fault(f"{what}: says that it was interrupted and was not")
        # What a check finds is what it was asked for.
        found = what == "check" and re.search(r"^\d+ findings? in ", ended.out, re.MULTILINE)
        if ended.code == 1 and not found and not re.search(r"^error: \S", ended.err, re.MULTILINE):
            self.fault(f"{what}: exit code 1 without an error in words")

    def refused(self, ended: Ended, names: Iterable[str]) -> None:
        """What holds for a refusal: it names what is damaged."""
        names = list(names)
        if ended.code in (0, None) or any(name in ended.said for name in names):
            return
        self.fault(f"{ended.argv[0]}: the refusal names none of what was damaged: {error_of(ended)[:200]}")

    def undamaged(self, ended: Ended) -> None:
        """What holds where nothing was damaged: it is not called so, and nobody is told to delete anything."""
        said = ended.out if ended.argv[0] == "check" else error_of(ended)
        if re.search(r"damaged|delete this file|restore it", said):
            self.fault(f"{ended.argv[0]}: calls damaged what is not: {said[:200]}")

    def finish(self, corpus_name: str = "corpus") -> bool:
        """The undisturbed run at the end must give the reference to the bit; whether it did."""
        before = len(self.faults)
        ended = self.run(SKETCH)
        if ended.code != 0:
            self.fault(f"sketch, undisturbed again: exit code {ended.code}: {error_of(ended)[:300]}")
            return False
        self.same_run()
        self.read("score")
        return len(self.faults) == before

    def same_run(self, may_leave: bool = False) -> None:
        """The run directory holds what the reference holds, and nothing that a killed process left.

        may_leave: where the system has just refused a call, which may have been the removal of a temporary file.
        """
        now = digests(self.work / "run")
        if not may_leave:
            self.no_temporary_files()
        for name, digest in self.reference.files.items():
            if now.get(name) == digest:
                continue
            if name in now and name.endswith(".json") and "/" not in name and self._same_json(name):
                continue
            kind = re.sub(r"\d+", "N", name)
            self.fault(f"wrong result: {kind} is {'another' if name in now else 'missing'}: {name}")

    def no_temporary_files(self) -> None:
        """Nothing that a killed process was writing is left."""
        left = [path for path in self.work.rglob(".*") if _TEMPORARY.search(path.name)]
        if left:
            kind = left[0].name.partition(".")[2].partition(".")[0]
            self.fault(f"temporary files are left, such as one of {kind}: {left[0].name}")

    def read(self, name: str, names: Iterable[str] = ()) -> Ended:
        """A reader must give what it gave of the reference; with `names`, or refuse and name one of them."""
        ended = self.run(READERS[name])
        names = list(names)
        if ended.code != 0:
            if names:
                self.refused(ended, names)
            else:
                self.fault(f"{name}: refuses what is whole: {error_of(ended)[:300]}")
            return ended
        # Of fewer parts, and it says so.
        if not (names and "is not finished" in ended.err):
            self.same_output(name, ended)
        if name == "check" and any(self.changed_parts()):
            self.fault(f"check: finds nothing wrong with {', '.join(self.changed_parts())}")
        return ended

    def changed_parts(self) -> list[str]:
        """Files of parts/ that are not those of the reference."""
        now, was = (
            {k: v for k, v in one.items() if "/" in k}
            for one in (digests(self.work / "run"), self.reference.files)
        )
        return sorted(name for name in now.keys() | was.keys() if now.get(name) != was.get(name))

    def same_output(self, name: str, ended: Ended) -> None:
        """What a reader printed and wrote is what it was of the reference."""
        if printed(ended.out) != self.reference.printed.get(name):
            self.fault(f"{name}: wrong result: prints other numbers")
        for file in WRITTEN.get(name, ()):
            path = self.work / file
            if not path.is_file() or digest_of(path) != self.reference.written[file]:
                self.fault(f"{name}: wrong result: {file} is {'another' if path.is_file() else 'missing'}")

    def same_grown(self) -> None:
        """A synthesis ended with the rows of the reference."""
        for name, content in self.reference.grown.items():
            path = self.work / "grown" / name
            if not path.is_file() or path.read_bytes() != content:
                self.fault(
                    f"synthesize: wrong result: {name} is {'another' if path.is_file() else 'missing'}"
                )

    def _same_json(self, name: str) -> bool:
        try:
            now = json.loads((self.work / "run" / name).read_bytes())
        except ValueError:
            return False
        return now == json.loads((self.reference.folder / "run" / name).read_bytes())


def make_reference(folder: Path, url: str) -> Reference:
    """Run everything once, undisturbed. Raises RuntimeError where that does not work."""
    folder.mkdir(parents=True)
    found = Reference(folder)
    corpus.write(folder / "corpus")
    (folder / "more").mkdir()
    (folder / "more" / "m.jsonl").write_bytes(corpus.as_lines(corpus.rows(14, 1, "m")))

    def run(name: str, argv: Sequence[str]) -> Ended:
        plan = Plan(folder)
        counted = folder.parent / "calls.json"

        def before() -> None:
            import atexit

            install(plan)
            atexit.register(lambda: counted.write_text(json.dumps([plan.done, sorted(sys.modules)])))

        ended = Command(argv, folder, before=before, environment=ENVIRONMENT).end()
        if ended.code != 0:
            raise RuntimeError(f"undisturbed, gvendi {' '.join(argv)} ends with {ended.code}:\n{ended.said}")
        found.calls[name], modules = json.loads(counted.read_text())
        found.modules.update(modules)
        found.seconds[name] = ended.seconds
        return ended

    run("sketch", SKETCH)
    found.files = digests(folder / "run")
    run("more", ("sketch", "more", *SKETCHING, "--out", "other"))
    has_check = "No such command" not in Command(READERS["check"], folder).end().said
    found.readers = tuple(name for name in READERS if has_check or name != "check")
    for name in found.readers:
        found.printed[name] = printed(run(name, READERS[name]).out)
        found.written |= {file: digest_of(folder / file) for file in WRITTEN.get(name, ())}
    from tests.problem_families import seed_rows

    seeds = folder / "seeds.jsonl"
    seeds.write_bytes(corpus.as_lines(seed_rows(4)))
    for name, target in (("half", 54), ("grow", 62)):
        (folder / "grow.yaml").write_text(growing(url, seeds, target))
        run(name, GROW)
        if name == "half":
            shutil.copytree(folder / "grown", folder / "half")
            shutil.rmtree(folder / "grown")
    found.grown = {name: (folder / "grown" / name).read_bytes() for name in GROWN}
    return found


def growing(url: str, seeds: Path, target: int = 62, **generator: Any) -> str:
    """The configuration of a small synthesis from the rows in `seeds`, against the endpoint at `url`."""
    config = {
        "out": "grown",
        # The run records where they lie, and is copied from attempt to attempt.
        "pool": {"data": str(seeds.absolute())},
        "task": {"name": "generic"},
        "generator": {
            "model": "m",
            "base_url": url,
            "key_variable": "SOAK_KEY",
            "send_seed": True,
            "first_delay": 0.01,
            "longest_delay": 0.04,
            "concurrency": 4,
            "max_concurrency": 4,
            **generator,
        },
        "proxy": {"name": "tiny", "dim": 256, "dtype": "float32", "process": False},
        "accept": {"clusters": 12, "round": 0.2},
        "stop": {"target": target},
        "block": 8,
        "ahead": 3,
    }
    # JSON is YAML.
    return json.dumps(config, indent=1)


def printed(out: str) -> Any:
    """The JSON object that a command printed, without times; its text where it printed none."""
    try:
        return _untimed(json.loads(out))
    except ValueError:
        return re.sub(r"\d+(\.\d+)? ?s\b", "TIME", out)


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if not TIMES.search(key)}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file of a run directory that its commands may not change, by its name from there."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    # A score counts seconds.
    return {name: digest_of(folder / name) for name in names if not name.startswith("score")}


def digest_of(path: Path) -> str:
    """BLAKE2b of a file."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def error_of(ended: Ended) -> str:
    """What a command said on its error."""
    return ended.err.rpartition("error: ")[2].strip() if "error: " in ended.err else ended.err.strip()[-300:]


def last_line(said: str) -> str:
    """The line that tells a traceback's error, without what differs from run to run."""
    lines = re.findall(r"^(?:[\w.]+(?:Error|Exception|Interrupt|Exit|Warning)\b).*", said, re.MULTILINE)
    places = re.findall(r'gvendi_fast/([\w/.]+)", line (\d+), in (\w+)', said)
    where = f" in {places[-1][0]}:{places[-1][2]}" if places else ""
    text = lines[-1] if lines else said.strip().rpartition("\n")[2]
    return re.sub(r"'/[^']*'|\d{2,}|0x[0-9a-f]+", "_", text)[:140] + where


def in_child(function: Callable[[], Any]) -> Any:
    """What `function` returns, run in a forked child, so that this process stays without threads."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        with os.fdopen(writing, "wb") as stream:
            try:
                pickle.dump((function(), None), stream)
            except BaseException as error:
                pickle.dump((None, repr(error)), stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        raw = stream.read()
    os.waitpid(pid, 0)
    result, error = pickle.loads(raw)
    if error is not None:
        raise RuntimeError(error)
    return result
