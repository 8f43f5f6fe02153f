"""Which process of a command this one is, by what torchrun, accelerate and Slurm set in its environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import host_name

_NO_ID = "none"
# A process' start time, in ticks, among the numbers behind its name in /proc/PID/stat.
_STARTED = 19


@dataclass(frozen=True)
class Numbers:
    """rank, of `world` processes; local: among those of its machine, None where nothing says.

    said: the variables that say so. run_id: of the command. is_unique: whether no other command has this run_id.
    own_gpus: whether the process may be shown its own GPUs alone. is_array: whether it is a job of an array.
    again: how often it was started again under this run_id.
    """

    rank: int
    world: int
    local: int | None
    said: str
    run_id: str
    is_unique: bool
    own_gpus: bool = False
    is_array: bool = False
    again: str = ""


def numbers(environment: Mapping[str, str]) -> Numbers | None:
    """RANK and WORLD_SIZE, else an array of Slurm, its tasks, or both; None where none of them is set.

    Raises GvendiError, with the variable's name, where one is missing, no number, or does not agree with the others.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _of_torch(environment)
    if "SLURM_ARRAY_TASK_ID" in environment or "SLURM_PROCID" in environment:
        return _of_slurm(environment)
    return None


def _of_torch(environment: Mapping[str, str]) -> Numbers:
    rank, world = _count(environment, "RANK"), _count(environment, "WORLD_SIZE", least=1)
    _check("RANK", rank, "WORLD_SIZE", world)
    local = _count(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else None
    given = environment.get("TORCHELASTIC_RUN_ID", _NO_ID)
    parts = [given, *(environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))]
    is_unique = given != _NO_ID
    if "TORCHELASTIC_RUN_ID" in environment and environment.get("LOCAL_WORLD_SIZE") == str(world):
        # All processes have one parent, torchrun, which starts them again too.
        parts += [host_name(), str(os.getppid()), _started(os.getppid())]
        is_unique = True
    again = environment.get("TORCHELASTIC_RESTART_COUNT", "")
    run_id = _id("ranks", *parts)
    return Numbers(rank, world, local, "RANK and WORLD_SIZE", run_id, is_unique, again=again)


def _of_slurm(environment: Mapping[str, str]) -> Numbers:
    rank, world, said = 0, 1, []
    is_array = "SLURM_ARRAY_TASK_ID" in environment
    if is_array:
        rank, world = _of_array(environment)
        said.append("SLURM_ARRAY_TASK_ID")
    if "SLURM_PROCID" in environment:
        task, tasks = _count(environment, "SLURM_PROCID"), _count(environment, "SLURM_NTASKS", least=1)
        _check("SLURM_PROCID", task, "SLURM_NTASKS", tasks)
        # Each job of an array may have several tasks.
        rank, world = rank * tasks + task, world * tasks
        if tasks > 1 or not is_array:
            said.append("SLURM_PROCID")
    local = _count(environment, "SLURM_LOCALID") if "SLURM_LOCALID" in environment else None
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID", "")
    # Slurm starts a job again as a whole, but each job of an array by itself.
    again = environment.get("SLURM_RESTART_COUNT", "")
    run_id = _id("slurm", job, environment.get("SLURM_STEP_ID", ""), "" if is_array else again)
    named = " and ".join(said)
    return Numbers(
        rank, world, local, named, run_id, bool(job), own_gpus=True, is_array=is_array, again=again
    )


def _of_array(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world) of a job of an array, whose numbers may start anywhere and have steps or gaps."""
    task = _count(environment, "SLURM_ARRAY_TASK_ID")
    count = _count(environment, "SLURM_ARRAY_TASK_COUNT", least=1)
    first, step = (
        _count(environment, f"SLURM_ARRAY_TASK_{name}")
        if f"SLURM_ARRAY_TASK_{name}" in environment
        else other
        for name, other in (("MIN", 0), ("STEP", 1))
    )
    last = _count(environment, "SLURM_ARRAY_TASK_MAX") if "SLURM_ARRAY_TASK_MAX" in environment else None
    if task < first or (last is not None and task > last):
        raise GvendiError(
            f"SLURM_ARRAY_TASK_ID is {task}, and SLURM_ARRAY_TASK_MIN to SLURM_ARRAY_TASK_MAX are {first} to "
            f"{last}; wanted one of them: unset what is not Slurm's own, or give --engine local"
        )
    # Of a list such as 1,3,7 the numbers between count too: nobody has them first, and whoever is done takes them.
    if step < 1 or (task - first) % step or (last is not None and (last - first) % step):
        step = 1
    world = count if last is None else (last - first) // step + 1
    rank = (task - first) // step
    _check("SLURM_ARRAY_TASK_ID less SLURM_ARRAY_TASK_MIN", rank, "SLURM_ARRAY_TASK_COUNT", world)
    return rank, world


def _count(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    text = environment.get(name)
    if text is None:
        raise GvendiError(
            f"{name} is not set, though what goes with it is; wanted all that torchrun, accelerate or srun sets: start "
            "the command with one of them, or give --engine local"
        )
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < least:
        raise GvendiError(
            f"{name} is {text[:40]!r}; wanted a whole number from {least}, as torchrun, accelerate and Slurm set it; "
            "unset it, or give --engine local"
        )
    return int(text)


def _check(name: str, rank: int, of: str, world: int) -> None:
    if rank >= world:
        raise GvendiError(
            f"{name} is {rank}, and {of} is {world}; wanted one below it: unset both, or give --engine local"
        )


def _id(*parts: str) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part)[:80] for part in parts if part)


def _started(pid: int) -> str:
    """When a process has started, by the system's clock; "" where it does not say."""
    stat = Path(f"/proc/{pid}/stat")
    # The name, in brackets, may hold blanks and brackets itself.
    return stat.read_text().rpartition(")")[2].split()[_STARTED] if stat.is_file() else ""
