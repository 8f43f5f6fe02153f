"""Small changes of bytes, lines and JSON values, and a tally of what they led to."""

from __future__ import annotations

import json
import random
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gvendi_fast.base.errors import GvendiError

BYTES = (
    b"\x00",
    b"\xff",
    b"\n",
    b"\r\n",
    b'"',
    b"\\",
    b"[",
    b"]",
    b"{",
    b"}",
    b"PAR1",
    b"\x1b[31m",
    b"\xef\xbb\xbf",
)
NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**32,
    2**63,
    -(2**63),
    2**64,
    10**30,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    0.5,
)
TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "[/INST]",
    "[red]",
    "x" * 3000,
    "../..",
    "NaN",
    "{{7*7}}",
    "ß",
)
# Of processor time; a case that takes longer is a fault: a file of a few kilobytes is read.
SLOW_S = 5.0
# More than any case needs, and less than the machine has.
MEMORY_BYTES = 6 << 30


def mutated_bytes(r: random.Random, content: bytes) -> bytes:
    """The content with one to three small changes; seldom the content itself."""
    found = bytearray(content)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        kind, size = r.randrange(10), len(found)
        at = r.randrange(size + 1)
        length = min(r.choice((1, 1, 2, 4, 8, 64, 512)), size - at)
        if kind < 3 and size:
            found[at - 1 if at == size else at] ^= 1 << r.randrange(8)
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            del found[at : at + length]
        elif kind == 5:
            found[at:at] = r.choice(BYTES)
        elif kind == 6:
            found[at:at] = found[at : at + length]
        elif kind == 7:
            found[at : at + length] = bytes(length)
        elif kind == 8:
            found[at : at + length] = r.randbytes(length)
        else:
            other = r.randrange(size + 1)
            found[at : at + length] = found[other : other + length]
    return bytes(found)


def mutated_lines(r: random.Random, content: bytes) -> bytes:
    """The content with a line deleted, doubled, swapped, moved, emptied, joined or cut."""
    lines = content.splitlines(keepends=True)
    if not lines:
        return r.choice(BYTES)
    kind, at, other = r.randrange(7), r.randrange(len(lines)), r.randrange(len(lines))
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        lines.insert(other, lines.pop(at))
    elif kind == 4:
        lines[at] = r.choice((b"\n", b"", b" \n", b"\r\n"))
    elif kind == 5:
        lines[at] = lines[at].rstrip(b"\n")
    else:
        lines[at] = lines[at][: r.randrange(len(lines[at]))] + b"\n"
    return b"".join(lines)


def mutated_value(r: random.Random, value: Any) -> Any:
    """A JSON-able value in which one place holds something else, is missing, or is there twice under two names."""
    places = list(_places(value))
    holder, key = r.choice(places) if places else (None, None)
    if holder is None:
        return strange(r)
    kind = r.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[r.choice(TEXTS)] = holder.pop(key) if r.random() < 0.5 else strange(r)
    elif kind == 1:
        holder.insert(key, holder[key])
    elif kind == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = r.choice(
            (holder[key] + 1, -holder[key], holder[key] * 2, str(holder[key]), r.choice(NUMBERS))
        )
    elif kind == 3 and isinstance(holder[key], str):
        at = r.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:at] + r.choice(TEXTS) + holder[key][at:]
    else:
        holder[key] = strange(r)
    return value


def strange(r: random.Random) -> Any:
    """A value of any type, as nobody would write it."""
    deep: Any = r.choice(NUMBERS[:4])
    for _ in range(r.choice((1, 3, 40, 300))):
        deep = r.choice((lambda x: [x], lambda x: {"a": x}))(deep)
    return r.choice((None, True, False, [], {}, [[]], r.choice(NUMBERS), r.choice(TEXTS), deep, [None] * 50))


def as_json(r: random.Random, value: Any) -> bytes:
    """JSON of a value, spelled in one of the ways that are allowed."""
    text = json.dumps(value, ensure_ascii=r.random() < 0.5, indent=r.choice((None, None, 1)))
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


class Tally:
    """What mutations led to. wrong: each fault in words, with the number of its mutation."""

    def __init__(self, target: str) -> None:
        self.target, self.count = target, 0
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    def take(self, number: int, case: Callable[[], str]) -> None:
        """Run one case: it returns how it was accepted, or raises GvendiError (refused), or `WrongResultError`."""
        self.count += 1
        began = time.process_time()
        try:
            end = case()
        except GvendiError:
            end = "refused"
        except WrongResultError as error:
            end = "wrong result"
            self.wrong.append(f"{number}: {error}")
        except OSError as error:
            # The contract: one of the operating system, told as such.
            end = "OSError"
            if error.errno is None or error.filename is None:
                self.wrong.append(f"{number}: OSError without errno and file name: {error!r:.200}")
        except Exception as error:
            end = type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "gvendi_fast" in frame.filename] or frames
            place = f"{ours[-1].filename.rpartition('gvendi_fast/')[2]}:{ours[-1].name}"
            self.wrong.append(f"{number}: {end} in {place}: {error!s:.160}")
        self.ends[end] += 1
        if time.process_time() - began > SLOW_S:
            self.wrong.append(f"{number}: took {time.process_time() - began:.1f} s")

    def __str__(self) -> str:
        ends = ", ".join(f"{end} {count:,}" for end, count in self.ends.most_common())
        return f"fuzzing {self.target}: {self.count:,} mutations: {ends}; {len(self.wrong)} faults"


class WrongResultError(AssertionError):
    """A result that is neither right nor refused."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    """A case that asks for far too much gets MemoryError in place of the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    target: str, count: int, case: Callable[[int], str], restore: Callable[[], None] = lambda: None
) -> Tally:
    """The tally of the cases 0 .. count - 1; `restore` undoes what a case before has changed."""
    tally = Tally(target)
    with bounded_memory():
        for number in range(count):
            restore()
            tally.take(number, lambda number=number: case(number))
    return tally


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, without those of folders inside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def restore_files(folder: Path, originals: dict[str, bytes]) -> None:
    """Make the files of a folder these again."""
    found = files_of(folder)
    for name in found.keys() - originals.keys():
        (folder / name).unlink()
    for name, content in originals.items():
        if found.get(name) != content:
            (folder / name).write_bytes(content)


def check(tally: Tally, least: int, capsys: Any) -> None:
    """Print the tally, and fail on a fault, on too few mutations, and on a fuzzer that gets nothing refused."""
    with capsys.disabled():
        print(f"\n{tally}")
    kinds = Counter(": ".join(wrong.split(": ")[1:3])[:110] for wrong in tally.wrong)
    assert not tally.wrong, "\n".join(
        [f"{count} x {kind}" for kind, count in kinds.most_common(40)] + tally.wrong[:12]
    )
    assert tally.count >= least
    assert tally.ends["refused"] > 0
