"""Batch samplers that ranks share and that resume in the midst of an epoch: what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.errors import GvendiError


class BatchChooser(Sampler[list[int]]):
    """A batch sampler of `steps` batches an epoch. Every rank makes the same batches and takes its part of each.

    Iterators have `state_dict` and `load_state_dict` too, as torchdata's StatefulDataLoader asks for them.
    """

    # Of an epoch; set by the subclass.
    steps: int

    def __init__(self, batch_size: int, seed: int, rank: int, world: int, drop_last: bool) -> None:
        self.batch_size = whole(batch_size, "batch_size", "the number of rows of a batch, at least 1", 1)
        self.seed = whole(seed, "seed", "an integer")
        self.world = whole(world, "world", "the number of processes, at least 1", 1)
        self.rank = whole(rank, "rank", "this process's number, at least 0", 0)
        if self.rank >= self.world:
            raise GvendiError(f"rank is {rank}; wanted 0 to {self.world - 1}, as world is {world}")
        self.drop_last, self.epoch = bool(drop_last), 0
        self._running: BatchEpoch | None = None
        self._resumed: BatchEpoch | None = None

    @abstractmethod
    def _begin(self, epoch: int) -> BatchEpoch:
        """The epoch of this number, at its beginning."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the batches; a state of other ones does not fit."""

    @property
    def sampler(self) -> BatchChooser:
        """Itself: where accelerate shares out the batches, it sets the epoch of a batch sampler's `sampler`."""
        return self

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that the next iteration gives; a position loaded for another one is forgotten."""
        self.epoch = whole(epoch, "epoch", "the number of an epoch, at least 0", 0)
        if self._resumed is not None and self._resumed.epoch != self.epoch:
            self._resumed = None

    def __iter__(self) -> Iterator[list[int]]:
        self._running, self._resumed = self._resumed or self._begin(self.epoch), None
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch under way stands, as tensors and plain values."""
        running = self._resumed or self._running
        if running is None or running.epoch != self.epoch:
            running = self._begin(self.epoch)
        return running.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on where the state was taken. One of other arguments or rows raises GvendiError."""
        resumed = self._begin(self.epoch)
        resumed.load_state_dict(state)
        self._resumed = resumed

    def _ended(self, epoch: BatchEpoch) -> None:
        if epoch is self._running and epoch.epoch == self.epoch:
            self.epoch += 1


class BatchEpoch(Iterator[list[int]]):
    """The batches of one epoch, and where it stands."""

    def __init__(self, sampler: BatchChooser, epoch: int) -> None:
        self._sampler, self.epoch, self.step = sampler, epoch, 0

    @abstractmethod
    def _batch(self) -> list[int]:
        """The next batch of all ranks together."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What the next batches depend on, beside epoch and step."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from `_state()`; epoch and step are set."""

    def __next__(self) -> list[int]:
        sampler = self._sampler
        if self.step == sampler.steps:
            sampler._ended(self)
            raise StopIteration
        rows = self._batch()
        self.step += 1
        # More than once around, where there are fewer rows than ranks.
        rows = rows + [rows[i % len(rows)] for i in range(-len(rows) % sampler.world)]
        return rows[sampler.rank :: sampler.world]

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch."""
        return {
            "settings": self._sampler.settings(),
            "epoch": self.epoch,
            "step": self.step,
            "place": self._state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; GvendiError for the state of other settings."""
        check_state(state, self._sampler.settings(), type(self._sampler).__name__)
        # A loader that resumes the iterator alone goes on to the epoch after it.
        self.epoch, self.step = state["epoch"], state["step"]
        self._sampler.epoch = self.epoch
        self._restore(state["place"])


def check_state(state: dict[str, Any], settings: dict[str, Any], kind: str) -> None:
    """GvendiError unless the state is of the kind and of these settings; None is what was not known yet."""
    parts = ("settings", "epoch", "step", "place")
    if not isinstance(state, dict) or any(part not in state for part in parts):
        raise GvendiError(f"state is not one of a {kind}; give what its state_dict() returned")
    theirs = state["settings"]
    if set(theirs) != set(settings):
        raise GvendiError(f"state is of another sampler than {kind}; give what its own state_dict() returned")
    for name, value in settings.items():
        if theirs[name] != value and None not in (theirs[name], value):
            raise GvendiError(
                f"state was taken with {name} = {theirs[name]!r}, and this sampler has {value!r}; resume with the same "
                "data set and arguments, or begin an epoch by set_epoch"
            )
