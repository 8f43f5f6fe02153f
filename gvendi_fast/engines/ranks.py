"""Several processes that run the same command at once: the ranks of torchrun, accelerate, Slurm or of a shell's loop.

They know of each other by the run directory alone; there is no process group. Of the work units each does first those
that are its own by number, then what is left of the others' and nobody is at, from the end, where their own are not
yet. So a rank that is lost, late or slow costs time, and a single rank of many does everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gvendi_fast.base.engine import Engine, Item, Result, Worker
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.leases import Terms
from gvendi_fast.engines.rank_numbers import Numbers, numbers
from gvendi_fast.engines.shared_passes import SharedPasses


class RanksEngine(Engine):
    """This process as one rank of a command.

    rank, world: which one of how many; None for what RANK and WORLD_SIZE say, else SLURM_ARRAY_TASK_ID and
        SLURM_ARRAY_TASK_COUNT, SLURM_PROCID and SLURM_NTASKS.
    run_id: of the command, the same in all its ranks and in no other command; None for one of what the launcher sets.
    environment: where those variables are; None for the process' own.
    folder: the run directory of a pass, through which ranks share it (`Engine.folder`); `sketch` and `score` set it.
    lease_s: after so long the items of a lost rank's passes are done by others.
    Of a pass each rank does its share where it knows a run_id and a run directory, and everything elsewhere.
    LOCAL_RANK, else SLURM_LOCALID, is the number of its GPU. Raises GvendiError where variables are missing or do not
    agree, and where a machine has more ranks than GPUs.
    """

    name = "ranks"

    def __init__(
        self,
        rank: int | None = None,
        world: int | None = None,
        *,
        run_id: str | None = None,
        environment: Mapping[str, str] | None = None,
        folder: str | os.PathLike | None = None,
        lease_s: float = Terms.lease_s,
    ) -> None:
        if (rank is None) != (world is None):
            raise GvendiError(f"rank is {rank} and world is {world}; give both, or neither")
        if rank is not None and world is not None:
            if not 0 <= rank < world:
                raise GvendiError(f"rank is {rank} and world is {world}; wanted a rank from 0 to below world")
            found = Numbers(rank, world, None, "rank and world", run_id or "ranks", run_id is not None)
        else:
            found = self._found(os.environ if environment is None else environment)
        self.said, self.is_array = found.said, found.is_array
        self.rank: int = found.rank
        self.world = found.world
        self.is_first = found.rank == 0
        self.run_id = run_id or found.run_id
        self.is_unique = found.is_unique or run_id is not None
        self.device = _device(found)
        self.folder = folder
        self._lease_s, self._again = lease_s, found.again
        self._passes: SharedPasses | None = None
        self._folder: str | os.PathLike | None = None

    def _found(self, environment: Mapping[str, str]) -> Numbers:
        found = numbers(environment)
        if found is None:
            raise GvendiError(
                "engine is 'ranks', and neither RANK and WORLD_SIZE nor SLURM_ARRAY_TASK_ID nor SLURM_PROCID are set; "
                "start the command with torchrun, accelerate launch, srun or a Slurm array, or set RANK and WORLD_SIZE "
                "of each process"
            )
        return found

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """See `Engine.share`; by the numbers themselves, so that ranks agree whatever each has listed."""
        return [item for item in items if item % self.world == self.rank]

    def map(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """See `Engine.map`."""
        if self.world > 1 and self.is_unique and self.folder is not None:
            if self._passes is None or self._folder != self.folder:
                self._folder = self.folder
                # A rank that is started again begins with the first pass again.
                run_id = f"{self.run_id} {self._again}"
                self._passes = SharedPasses(self.folder, run_id, self.rank, self.world, self._lease_s)
            yield from self._passes.map(make, items, list(self._in_turn(range(len(items)))))
            return
        function = make()
        for place, item in enumerate(items):
            yield place, function(item)

    def work(self, open_worker: Callable[[], Worker], items: Sequence[int]) -> Iterator[Any]:
        """See `Engine.work`."""
        worker = open_worker()
        try:
            yield from worker.run(self._in_turn(items))
        finally:
            worker.close()
        if self._passes is not None:
            self._passes.forget()

    def _in_turn(self, items: Sequence[int]) -> Iterator[int]:
        """Its own in their order; then, of the next rank on, those of each other one from the end."""
        yield from (item for item in items if item % self.world == self.rank)
        others = [item for item in items if item % self.world != self.rank]
        others.sort(key=lambda item: ((item - self.rank) % self.world, -item))
        # They may be done by the time that it is their turn.
        yield from (item for item in others if item in items)


def _device(found: Numbers) -> str:
    """The GPU of a rank, as `load_proxy` takes it; "auto" where there is none to choose."""
    if found.local is None:
        return "auto"
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        return "auto"
    # Slurm shows each task its own where it is asked for GPUs a task.
    if gpus == 1 and found.own_gpus:
        return "cuda:0"
    if found.local >= gpus:
        raise GvendiError(
            f"rank {found.rank} is number {found.local} of this machine, counted from 0, and {gpus} "
            f"GPU{'s are' if gpus > 1 else ' is'} to be seen; start at most one rank a GPU (--nproc-per-node {gpus}), "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to work on the CPU"
        )
    return f"cuda:{found.local}"
