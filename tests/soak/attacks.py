"""The attacks, one function a kind; each takes an `Attempt` and tells it what is wrong."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.soak import corpus
from tests.soak.attempt import (
    ENVIRONMENT,
    GROW,
    KEY,
    READERS,
    SKETCH,
    Attempt,
    digest_of,
    error_of,
    growing,
    in_child,
)
from tests.soak.commands import LIMIT_S, Ended
from tests.soak.os_faults import ERRORS, Plan, install

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
NOBODY = 65534
ROOT = Path(__file__).resolve().parents[2]


def kill(attempt: Attempt) -> None:
    """Signals at random moments of a sketch or a reader, then an undisturbed run."""
    attempt.copy("corpus")
    if attempt.random.random() < 0.25:
        attempt.copy("run", "other")
        name = attempt.random.choice(attempt.reference.readers)
        _killed(attempt, READERS[name], attempt.reference.seconds[name])
        attempt.read(name)
        attempt.same_run()
        attempt.no_temporary_files()
        return
    _killed(attempt, SKETCH, attempt.reference.seconds["sketch"])
    attempt.finish()


def _killed(attempt: Attempt, argv: tuple[str, ...], lasts: float) -> None:
    r = attempt.random
    for _ in range(r.randint(1, 4)):
        command, number = attempt.start(argv), r.choice(SIGNALS)
        command.wait(r.uniform(0, 1.2 * lasts))
        command.signal(number)
        # A second one, as of a user who does not want to wait.
        if number == signal.SIGINT and r.random() < 0.3:
            command.wait(r.uniform(0, 0.05))
            command.signal(number)
        attempt.note(f"signal {number}")
        if attempt.end(command, [number]).code == 0:
            break


def pair(attempt: Attempt) -> None:
    """Two or three processes in one directory, some of them killed, then an undisturbed run."""
    attempt.copy("corpus")
    r, lasts = attempt.random, attempt.reference.seconds["sketch"]
    running = []
    for _ in range(r.randint(2, 3)):
        running.append(attempt.start(SKETCH))
        time.sleep(r.uniform(0, lasts / 2))
    for command in running:
        sent = []
        if r.random() < 0.5:
            command.wait(r.uniform(0, 2 * lasts))
            sent.append(r.choice(SIGNALS))
            command.signal(sent[0])
        ended = attempt.end(command, sent)
        if not sent and ended.code != 0:
            attempt.fault(f"sketch beside another: exit code {ended.code}: {error_of(ended)[:200]}")
    attempt.finish()


def call(attempt: Attempt) -> None:
    """The n-th call of the operating system fails in a sketch or a reader, then an undisturbed run."""
    r = attempt.random
    name = r.choice(("sketch", "sketch", *attempt.reference.readers))
    attempt.copy("corpus", *(() if name == "sketch" else ("run", "other")))
    ended = _failing(attempt, name, SKETCH if name == "sketch" else READERS[name])
    if ended.code == 0 and name != "sketch":
        attempt.same_output(name, ended)
    if name == "sketch":
        if ended.code == 0:
            attempt.same_run(may_leave=True)
        attempt.finish()
    else:
        attempt.read(name)
        attempt.same_run()


def _failing(attempt: Attempt, name: str, argv: tuple[str, ...]) -> Ended:
    r, calls = attempt.random, attempt.reference.calls[name]
    kind = r.choice([kind for kind in ERRORS if calls[kind]])
    plan = Plan(attempt.work, kind, r.randint(1, calls[kind]), r.randrange(60), r.random() < 0.3)
    attempt.note(f"{name}: call {plan.number} of {calls[kind]} of kind {kind} fails, draw {plan.draw}")
    ended = attempt.run(argv, before=lambda: install(plan))
    attempt.undamaged(ended)
    return ended


def full(attempt: Attempt) -> None:
    """A full file system, a limit of a file's size, or a full standard output."""
    r = attempt.random
    kind = r.choice(("disk", "size", "output"))
    attempt.copy("corpus")
    if kind == "output":
        attempt.copy("run", "other")
        name = r.choice(attempt.reference.readers)
        attempt.note(f"{name} into /dev/full")
        ended = attempt.run(READERS[name], before=_full_output)
        if ended.code == 0 and attempt.reference.printed.get(name) not in ("", None):
            attempt.fault(f"{name} into /dev/full: exit code 0")
        attempt.read(name)
        return
    disk = attempt.work / "run"
    if kind == "disk" and _mount(disk, r.choice((8, 16, 24, 32, 48, 64, 80, 96))):
        try:
            ended = attempt.run(SKETCH)
            attempt.undamaged(ended)
            if ended.code == 0:
                attempt.same_run()
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            attempt.finish()
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        return
    limit = int(2 ** r.uniform(4, 14.5))
    attempt.note(f"files of {limit} bytes at most")
    ended = attempt.run(SKETCH, before=lambda: _limit_size(limit))
    attempt.undamaged(ended)
    attempt.finish()


def _full_output() -> None:
    handle = os.open("/dev/full", os.O_WRONLY)
    os.dup2(handle, 1)
    os.close(handle)


def _limit_size(limit: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _mount(folder: Path, kib: int) -> bool:
    """A file system of so many KiB; False where this user may not mount one."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "soak", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        folder.rmdir()
        return False
    return True


def permission(attempt: Attempt) -> None:
    """A file or folder that the user of the command may not read or write."""
    r = attempt.random
    attempt.copy("corpus", "run", "other")
    name = r.choice(("sketch", *attempt.reference.readers))
    if name == "sketch":
        for path in r.sample(sorted((attempt.work / "run" / "parts").glob("part-*.parquet")), 4):
            path.unlink()
    places = [attempt.work, *attempt.work.rglob("*")]
    as_user = None
    if os.geteuid() == 0:
        as_user = _become_nobody
        for path in places:
            os.chown(path, NOBODY, NOBODY)
    path = r.choice(places)
    mode = r.choice((0o000, 0o400, 0o500, 0o100))
    attempt.note(f"{name}: mode {mode:o} of {path.relative_to(attempt.work)}")
    argv = SKETCH if name == "sketch" else READERS[name]
    before_mode = path.stat().st_mode
    path.chmod(mode)
    try:
        ended = attempt.run(argv, before=as_user)
    finally:
        path.chmod(before_mode)
    attempt.undamaged(ended)
    if ended.code == 0 and name != "sketch":
        attempt.same_output(name, ended)
    ended = attempt.run(argv, before=as_user)
    if ended.code != 0:
        attempt.fault(f"{name}, with permission again: exit code {ended.code}: {error_of(ended)[:200]}")
    attempt.same_run()


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def damage(attempt: Attempt) -> None:
    """Files of a run that are flipped, cut, emptied, swapped, copied over one another, added to or removed."""
    r = attempt.random
    attempt.copy("corpus", "run", "other")
    run = attempt.work / "run"
    if r.random() < 0.4:
        for path in r.sample(sorted((run / "parts").glob("part-*.parquet")), r.randint(1, 4)):
            path.unlink()
    hurt: set[Path] = set()
    for _ in range(r.choice((1, 1, 2))):
        hurt |= _damage(attempt, run)
    names = sorted(path.name for path in hurt)
    # What depends on two files may name either.
    names += [name.replace("rejected", "part").replace("jsonl", "parquet") for name in names if "-" in name]
    if any(path.parent == run for path in hurt):
        names.append("run directory")
    complete = len(list((run / "parts").glob("part-*.parquet"))) >= sum(
        "part-" in n for n in attempt.reference.files
    )
    if complete:
        for name in r.sample(attempt.reference.readers, 2):
            attempt.read(name, names)
    ended = attempt.run(SKETCH)
    attempt.refused(ended, names)
    # What it says to delete is deleted, one file after the other.
    for _ in range(8):
        named = re.search(r"'([^']*parts/[^'/]+)' is damaged", ended.said)
        if ended.code == 0 or named is None or "delete" not in error_of(ended):
            break
        (attempt.work / named[1]).unlink(missing_ok=True)
        ended = attempt.run(SKETCH)
        attempt.refused(ended, names)
    else:
        attempt.fault(f"sketch, after what it named was deleted: {error_of(ended)[:200]}")
    if ended.code == 0:
        attempt.same_run()
        attempt.read("score")


def _damage(attempt: Attempt, folder: Path) -> set[Path]:
    """Damage one or two files below the folder; which."""
    r = attempt.random
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    parts = [path for path in files if path.name.startswith("part-")]
    path = r.choice(parts if parts and r.random() < 0.5 else files)
    alike = [other for other in files if other.suffix == path.suffix and other != path]
    what = r.choice(
        ("flip", "flip", "flip", "cut", "empty", "swap", "copy", "add", "remove", "zero", "double")
    )
    content = bytearray(path.read_bytes())
    other = r.choice(alike) if alike else None
    attempt.note(f"{what} {path.relative_to(folder)}{f' with {other.name}' if other else ''}")
    hurt = {path}
    if what == "flip" and content:
        for _ in range(r.choice((1, 1, 1, 8))):
            content[r.randrange(len(content))] ^= 1 << r.randrange(8)
        path.write_bytes(content)
    elif what == "cut":
        path.write_bytes(content[: r.randrange(len(content) + 1)])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "swap" and other:
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        hurt.add(other)
    elif what == "copy" and other:
        path.write_bytes(other.read_bytes())
    elif what == "add":
        path.write_bytes(bytes(content) + r.randbytes(r.randint(1, 60)))
    elif what == "zero" and content:
        start = r.randrange(len(content))
        size = min(r.choice((1, 16, 512)), len(content) - start)
        content[start : start + size] = bytes(size)
        path.write_bytes(content)
    elif what == "double":
        place = re.sub(r"\d+", lambda found: str(int(found[0]) + 40).zfill(len(found[0])), path.name, count=1)
        path.with_name(place).write_bytes(content)
        hurt.add(path.with_name(place))
    else:
        path.unlink()
    return hurt


def hostile(attempt: Attempt) -> None:
    """Rows and files of strangers in the corpus: ordinary rows are sketched as ever, nobody else is hurt."""
    r = attempt.random
    attempt.copy("corpus", "other")
    folder = attempt.work / "corpus"
    lines = corpus.hostile_lines(r)[: r.choice((1, 1, 2, 4, 8, 16))]
    names = []
    if r.random() < 0.3:
        names = [corpus.hostile_file(r, folder).name]
        attempt.note(f"hostile file {names[0]}")
    else:
        attempt.note(f"hostile lines {[line[:60] for line in lines]}")
        ordinary = (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
        for line in lines:
            place = r.randrange(len(ordinary) + 1)
            ordinary[place:place] = [line.replace(b"\n", b" ") + b"\n"]
        (folder / "a.jsonl").write_bytes(b"".join(ordinary))
    if r.random() < 0.3:
        _killed(attempt, SKETCH, attempt.reference.seconds["sketch"])
    ended = attempt.run(SKETCH)
    if ended.code != 0:
        if names:
            attempt.refused(ended, names)
        else:
            attempt.fault(f"sketch: hostile rows end the run: {error_of(ended)[:200]}")
        return
    _ordinary_rows(attempt)
    for name in r.sample(attempt.reference.readers, 2):
        ended = attempt.run(READERS[name])
        if ended.code != 0:
            attempt.fault(f"{name}: refuses a run with hostile rows: {error_of(ended)[:200]}")
    first = {path.name: digest_of(path) for path in sorted((attempt.work / "run" / "parts").iterdir())}
    if r.random() < 0.3:
        shutil.rmtree(attempt.work / "run")
        attempt.run(SKETCH)
        again = {path.name: digest_of(path) for path in sorted((attempt.work / "run" / "parts").iterdir())}
        if again != first:
            attempt.fault("sketch: wrong result: a second run has other parts")


def _rows_of(folder: Path) -> dict[str, list[Any]]:
    """{id: its sketches} of all parts of a run."""
    import pyarrow.parquet as pq

    found: dict[str, list[Any]] = {}
    for path in sorted((folder / "parts").glob("part-*.parquet")):
        table = pq.ParquetFile(path).read(["id", "sketch"], use_threads=False)
        for name, sketch in zip(table["id"].to_pylist(), table["sketch"].to_numpy(), strict=True):
            found.setdefault(name, []).append(sketch)
    return found


def _ordinary_rows(attempt: Attempt) -> None:
    """Rows of the reference are there once, with sketches that differ by rounding at most."""

    def differing() -> list[str]:
        import numpy as np

        was, now = _rows_of(attempt.reference.folder / "run"), _rows_of(attempt.work / "run")
        wrong = []
        for name, (sketch,) in was.items():
            others = now.get(name, [])
            if len(others) != 1:
                wrong.append(f"an ordinary row is there {len(others)} times")
            elif np.linalg.norm(others[0] - sketch) > 1e-4 * np.linalg.norm(sketch):
                wrong.append("the sketch of an ordinary row differs")
        return sorted(set(wrong))

    for what in in_child(differing):
        attempt.fault(f"sketch: wrong result: {what}")


def changed(attempt: Attempt) -> None:
    """A corpus whose bytes change under a run, its sizes and times kept."""
    r = attempt.random
    kind = r.choice(("resumed", "running", "read"))
    attempt.copy("corpus", "other", *(() if kind == "running" else ("run",)))
    path = r.choice(sorted((attempt.work / "corpus").iterdir()))
    attempt.note(f"{kind}: {path.name}")
    content, status = path.read_bytes(), path.stat()
    other = _other_bytes(r, path.name, content)

    def put(what: bytes) -> None:
        path.write_bytes(what)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    if kind == "resumed":
        for part in r.sample(
            sorted((attempt.work / "run" / "parts").glob("part-*.parquet")), r.randint(1, 6)
        ):
            part.unlink()
        put(other)
        ended = attempt.run(SKETCH)
        if ended.code == 0:
            attempt.fault("sketch: goes on with another corpus")
        attempt.refused(ended, [path.name])
    elif kind == "running":
        command = attempt.start(SKETCH)
        command.wait(r.uniform(0, attempt.reference.seconds["sketch"]))
        put(other)
        ended = attempt.end(command)
        attempt.refused(ended, [path.name])
        put(content)
        ended = attempt.run(SKETCH)
        attempt.refused(ended, [path.name, "made from another corpus"])
        if ended.code == 0:
            attempt.same_run()
        return
    else:
        put(other)
        for name in r.sample([name for name in ("select", "compare", "report", "measures")], 2):
            ended = attempt.run(READERS[name])
            attempt.refused(ended, [path.name])
            if ended.code == 0 and name == "select":
                attempt.same_output(name, ended)
    put(content)
    attempt.finish()


def _other_bytes(r: Any, name: str, content: bytes) -> bytes:
    """As many bytes of the same kind with other words in some rows."""
    if name.endswith(".jsonl"):
        lines = content.splitlines(keepends=True)
        places = r.sample(range(len(lines)), 4)
        for place in places:
            lines[place] = lines[place].translate(bytes.maketrans(b"aeiou", b"ouaei"))
        # Keys are spelled as they were.
        turned = b"".join(lines)
        for was in (b'"id"', b'"family"', b'"prompt"', b'"completion"'):
            turned = turned.replace(was.translate(bytes.maketrans(b"aeiou", b"ouaei")), was)
        return turned
    # In an archive and in Parquet a changed byte is a damaged file, which is a change as well.
    turned = bytearray(content)
    for _ in range(3):
        turned[r.randrange(len(turned))] ^= 1 << r.randrange(8)
    return bytes(turned)


def start(attempt: Attempt) -> None:
    """Ctrl-C or SIGTERM while an interpreter of its own imports what the command needs."""
    r = attempt.random
    attempt.copy("corpus")
    module, name = re.search(
        r'^gvendi = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text(), re.M
    ).groups()
    code = f"import sys; from {module} import {name}; sys.exit({name}())"
    number = r.choice((signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    argv = [sys.executable, "-c", code, *SKETCH]
    began = time.monotonic()
    process = subprocess.Popen(
        argv,
        cwd=attempt.work,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that waits for a command lets it have the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    delay = r.uniform(0.05, 6)
    attempt.note(f"signal {number} after {delay:.2f} s")
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    try:
        out, err = process.communicate(timeout=LIMIT_S)
        hung = False
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        hung = True
    ended = Ended(tuple(SKETCH), process.returncode, out, err, time.monotonic() - began, hung)
    attempt.ended.append(ended)
    # Before the package is reached the interpreter itself is interrupted.
    if "gvendi_fast" in err or "Traceback" not in err:
        attempt.judge(ended, [number])
    attempt.finish()


def grow_kill(attempt: Attempt) -> None:
    """Signals at random moments of a synthesis, then an undisturbed run."""
    _configure(attempt)
    _killed(attempt, GROW, attempt.reference.seconds["grow"])
    _finish_growing(attempt)


def grow_call(attempt: Attempt) -> None:
    """The n-th call of the operating system fails in a synthesis, then an undisturbed run."""
    _configure(attempt)
    ended = _failing(attempt, "grow", GROW)
    if ended.code == 0:
        attempt.same_grown()
    _finish_growing(attempt)


def grow_damage(attempt: Attempt) -> None:
    """Files of a synthesis that are flipped, cut or edited; then it goes on."""
    r = attempt.random
    _configure(attempt)
    name = r.choice(("half", "half", "grown"))
    attempt.copy(name)
    grown = attempt.work / "grown"
    if name == "half":
        (attempt.work / "half").rename(grown)
    hurt = {path for path in _edited(attempt, grown)} if r.random() < 0.5 else _damage(attempt, grown)
    names = sorted(path.name for path in hurt)
    names += [name.replace("rejected", "part").replace("jsonl", "parquet") for name in names if "-" in name]
    if any(path.name in ("spec.json", "units.json") for path in hurt):
        names += ["run directory", "pool"]
    attempt.run(("report", "grown"))
    ended = attempt.run(GROW)
    attempt.refused(ended, names)
    if ended.code == 0:
        attempt.same_grown()


def _edited(attempt: Attempt, grown: Path) -> set[Path]:
    """A line of a journal's file deleted, doubled, swapped with the next one, or with another digit."""
    r = attempt.random
    path = grown / r.choice(
        ("events.jsonl", "accepted.jsonl", "rejected.jsonl", "fingerprint.json", "config.yaml")
    )
    lines = path.read_bytes().splitlines(keepends=True)
    what, place = r.choice(("delete", "double", "swap", "digit", "letter")), r.randrange(len(lines) - 1)
    attempt.note(f"{what} line {place} of {path.name}")
    if what == "delete":
        del lines[place]
    elif what == "double":
        lines.insert(place, lines[place])
    elif what == "swap":
        lines[place], lines[place + 1] = lines[place + 1], lines[place]
    else:
        wanted = rb"\d" if what == "digit" else rb"[a-z]"
        found = [match.start() for match in re.finditer(wanted, lines[place])]
        if found:
            line = bytearray(lines[place])
            at = r.choice(found)
            line[at] = r.choice(b"0123456789" if what == "digit" else b"abcdefghijklmnopqrstuvwxyz")
            lines[place] = bytes(line)
    path.write_bytes(b"".join(lines))
    return {path}


def endpoint(attempt: Attempt) -> None:
    """An endpoint that fails for a while; what it says in the end is what counts."""
    # More than may fail: a request that is given up is a candidate less.
    (attempt.work / "grow.yaml").write_text(growing(attempt.url, attempt.seeds, retries=40))
    attempt.steer(("failing", attempt.random.randrange(10**9)))
    try:
        ended = attempt.run(GROW)
    finally:
        attempt.steer(("well", 0))
    if ended.code == 0:
        attempt.same_grown()
    _finish_growing(attempt)
    _no_key(attempt)


def answers(attempt: Attempt) -> None:
    """An endpoint whose answers are made to crash, fill or fool; the run ends in words and goes on as it began."""
    _configure(attempt)
    (attempt.work / "grow.yaml").write_text(
        growing(attempt.url, attempt.seeds, 60, retries=1, patience=2.0, time_limit=5.0)
    )
    attempt.steer(("hostile", attempt.random.randrange(10**9)))
    try:
        attempt.run(GROW)
        accepted = attempt.work / "grown" / "accepted.jsonl"
        before = accepted.read_bytes() if accepted.exists() else b""
        attempt.run(("report", "grown"))
        attempt.run(GROW)
        after = accepted.read_bytes() if accepted.exists() else b""
        if not after.startswith(before):
            attempt.fault("synthesize: wrong result: accepted rows changed when it went on")
    finally:
        attempt.steer(("well", 0))
    _no_key(attempt)


def _configure(attempt: Attempt) -> None:
    (attempt.work / "grow.yaml").write_text(growing(attempt.url, attempt.seeds))


def _finish_growing(attempt: Attempt) -> None:
    ended = attempt.run(GROW)
    if ended.code != 0:
        attempt.fault(f"synthesize, undisturbed again: exit code {ended.code}: {error_of(ended)[:300]}")
        return
    attempt.same_grown()


def _no_key(attempt: Attempt) -> None:
    """No file and no output holds the key, however it was spelled."""
    # A part of it that none of the spellings changes, and the whole in those that change all of it.
    spelled = (KEY[1:17].encode(), base64.b64encode(KEY.encode()).rstrip(b"="), quote(KEY, safe="").encode())
    said = {f"the output of {ended.argv[0]}": ended.said.encode() for ended in attempt.ended}
    files = {path.name: path.read_bytes() for path in attempt.folder.rglob("*") if path.is_file()}
    for name, content in (files | said).items():
        if any(one in content for one in spelled):
            attempt.fault(f"synthesize: the key is in {name}")


# Kind -> its attack and how often it comes, for one of the rarest.
ATTACKS: dict[str, tuple[Callable[[Attempt], None], int]] = {
    "kill": (kill, 4),
    "pair": (pair, 2),
    "call": (call, 8),
    "full": (full, 4),
    "permission": (permission, 4),
    "damage": (damage, 8),
    "hostile": (hostile, 6),
    "changed": (changed, 3),
    "start": (start, 1),
    "grow-kill": (grow_kill, 2),
    "grow-call": (grow_call, 3),
    "grow-damage": (grow_damage, 4),
    "endpoint": (endpoint, 2),
    "answers": (answers, 2),
}
