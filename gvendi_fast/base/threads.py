"""How many threads compute and how they wait for each other: by what this process may use and what others leave it.

OpenMP's threads meet after every small piece of work, and spin until the last one is there. Where another process has
a core, one thread stands in line for it while all others spin, which makes the line longer: two threads beside a busy
process sketched several times slower than one. So the command line has them spin for microseconds and then sleep, and
takes no more threads than there are cores to spare. Sleeping at once would cost where nothing else runs; both are
measured by benchmarks/threads.py. What the user has set wins, and a program that imports the package is let be.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NUMBER = "OMP_NUM_THREADS"
# What Slurm gives each task that it starts, with or without binding it to as many cores.
GRANTED = "SLURM_CPUS_PER_TASK"
# What says how to wait to GNU's, LLVM's and Intel's OpenMP.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# GNU's own default is 300,000 where every thread has a core.
SPINS = "1000"
# So much of a core is no process worth a thread: the system's own, and errors of counting in ticks.
SPARE = 0.25
_ROOT = Path("/")


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Have GNU's OpenMP, that of PyTorch on Linux, spin for microseconds, not milliseconds: before PyTorch is loaded.

    Whatever the environment says of waiting stays.
    """
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS


@dataclass(frozen=True)
class Cores:
    """allowed: cores that this process may keep busy. others: how many of them others do; None where nothing says."""

    allowed: int
    others: float | None

    @property
    def free(self) -> int:
        """How many threads find a core each."""
        return min(self.allowed, max(1, math.floor(self.allowed - (self.others or 0.0) + SPARE)))


@dataclass(frozen=True)
class Choice:
    """count: threads to set, None to leave them as they are. why: in one clause. said: a line for the user, if any."""

    count: int | None
    why: str
    said: str | None = None


class Load:
    """What other processes take of the cores of this one from now on, by the system's counts (Linux)."""

    def __init__(self, root: Path = _ROOT) -> None:
        self.root = root
        self._cpus = affinity()
        self._before = self._now()

    def cores(self) -> Cores:
        """The cores, and what others took of them since this was made."""
        limit = quota(self.root)
        allowed = len(self._cpus) if limit is None else min(len(self._cpus), max(1, math.floor(limit)))
        before, now = self._before, self._now()
        if before is None or now is None or now[2] <= before[2]:
            return Cores(allowed, None)
        busy, own, passed = (late - early for late, early in zip(now, before, strict=True))
        # A quota is this process's own share, whoever has the rest of the machine.
        beyond = len(self._cpus) - allowed
        return Cores(allowed, max(0.0, (busy - own) / passed - beyond))

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return 0.0 if self._before is None else time.monotonic() - self._before[2]

    def _now(self) -> tuple[float, float, float] | None:
        """(busy seconds of the cores, those of this process and its children, the time); None without the former."""
        busy = busy_seconds(self.root, self._cpus)
        return None if busy is None else (busy, sum(os.times()[:4]), time.monotonic())


def affinity() -> frozenset[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def busy_seconds(root: Path, cpus: frozenset[int]) -> float | None:
    """Seconds that these cores have been busy since the system started; None where it does not say."""
    path = root / "proc/stat"
    if not path.is_file():
        return None
    ticks = 0
    for line in path.read_text().splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
            # user nice system idle iowait irq softirq steal; guests are in user already.
            user, nice, system, _, _, *rest = map(int, counts[:8])
            ticks += user + nice + system + sum(rest)
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else None


def quota(root: Path = _ROOT) -> float | None:
    """How many cores' time the control groups of this process grant it (version 1 or 2), None without a limit."""
    found = [limit for folder in _groups(root) if (limit := _limit(folder)) is not None]
    return min(found, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control groups and those above, as a group's limit holds for all inside."""
    listed = root / "proc/self/cgroup"
    if not listed.is_file():
        return
    base = root / "sys/fs/cgroup"
    for line in listed.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has no names of controllers; beside version 1 it is mounted as "unified".
        mounts = [controllers, "cpu", "cpu,cpuacct", "cpuacct,cpu"] if controllers else ["", "unified"]
        for mount in dict.fromkeys(mounts):
            # In a container the path may be the host's: its own group is then the mount itself.
            inside = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(inside), -1, -1):
                folder = base.joinpath(mount, *inside[:depth])
                if folder.is_dir():
                    yield folder


def _limit(folder: Path) -> float | None:
    whole, first, second = (folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    if whole.is_file():
        parts = whole.read_text().split()
    elif first.is_file() and second.is_file():
        parts = [first.read_text().strip(), second.read_text().strip()]
    else:
        return None
    # "max", or -1 in version 1, is no limit.
    return int(parts[0]) / int(parts[1]) if parts[0].isdecimal() and int(parts[1]) else None


def asked_for(environment: MutableMapping[str, str]) -> int | None:
    """The number of threads that OMP_NUM_THREADS sets ("4", or "4,2" where they nest), None without one."""
    return _count(environment.get(NUMBER, "").partition(",")[0])


def granted(environment: MutableMapping[str, str]) -> int | None:
    """The CPUs of this process as a task of Slurm; None where it is none, or has no number of its own.

    What torchrun or a shell's loop has started within a task shares the CPUs of the task.
    """
    is_task = "SLURM_PROCID" in environment or "SLURM_ARRAY_TASK_ID" in environment
    is_shared = "RANK" in environment or "WORLD_SIZE" in environment
    return _count(environment.get(GRANTED, "")) if is_task and not is_shared else None


def _count(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() and int(text) else None


def choose(asked: int | None, environment: MutableMapping[str, str], cores: Cores) -> Choice:
    """The number of threads: asked (--threads), else OMP_NUM_THREADS, else what Slurm grants a task, else one for each
    core that others leave.
    """
    by_user = asked or asked_for(environment)
    if by_user is not None:
        why = "--threads" if asked else NUMBER
        return Choice(asked, why, crowded(by_user, cores))
    if (of_slurm := granted(environment)) is not None:
        count = min(of_slurm, cores.allowed)
        return Choice(count, GRANTED, crowded(count, cores))
    if cores.free == cores.allowed:
        return Choice(cores.free, f"one for each of {_cores(cores.allowed)}")
    why = f"other processes use {cores.others:.1f} of {_cores(cores.allowed)}"
    return Choice(cores.free, why, f"{_threads(cores.free)}: {why} (--threads {cores.allowed} takes all)")


def crowded(count: int, cores: Cores) -> str | None:
    """What to say of more threads than find a core, None where all do."""
    if count <= cores.free:
        return None
    used = f" of which other processes use {cores.others:.1f}" if cores.free < cores.allowed else ""
    return (
        f"{_threads(count)} on {_cores(cores.allowed)}{used}: threads wait for each other, and --threads "
        f"{cores.free} may be faster"
    )


@contextmanager
def using(count: int | None, environment: MutableMapping[str, str]) -> Iterator[None]:
    """So many threads within the block: in the environment, which PyTorch reads when it is loaded and children inherit.

    None leaves them as they are.
    """
    if count is None:
        yield
        return
    # PyTorch's matrix products have a variable of their own, which would win.
    names = (NUMBER, *({"MKL_NUM_THREADS"} & environment.keys()))
    before = {name: environment.get(name) for name in names}
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    environment.update(dict.fromkeys(names, str(count)))
    if torch:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del environment[name]
            else:
                environment[name] = value
        if torch:
            torch.set_num_threads(threads)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _cores(count: int) -> str:
    return f"{count} core{'s' * (count != 1)}"
