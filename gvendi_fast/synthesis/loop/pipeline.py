"""Blocks of prompts under way: asked, checked, sketched, beside the decisions on the blocks before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gvendi_fast.synthesis.loop.proposer import Outcome, Proposal, Proposer
from gvendi_fast.synthesis.loop.sketch_process import SketchProcess

if TYPE_CHECKING:
    from gvendi_fast.synthesis.loop.candidate_sketcher import CandidateSketcher

# Prompts of a block that are under way; a generator has fewer requests under way, and a block may have a million.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Sketched:
    """The unit sketches [m, K] of a block's rows; places: by an outcome's id its row there, or why it has none."""

    sketches: torch.Tensor
    places: dict[str, int | str]


@dataclass(frozen=True)
class Block:
    """What became of a block's prompts, and the sketches of the rows among it; both may be under way."""

    outcomes: asyncio.Task[list[Outcome]]
    sketched: asyncio.Task[Sketched]

    async def cancel(self) -> None:
        """Give up what is under way, and wait until it is."""
        tasks = self.outcomes, self.sketched
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Pipeline:
    """Begins blocks; a context manager. seconds: spent in sketching, which takes one block after the other."""

    def __init__(self, proposer: Proposer, sketcher: CandidateSketcher | SketchProcess) -> None:
        self.proposer, self.sketcher, self.seconds = proposer, sketcher, 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sketch")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def begin(self, proposals: Iterable[Proposal], number: int) -> Block:
        """Ask for a block of so many, and sketch it when all of it is answered; from the event loop's thread."""
        waiting, answered = enumerate(proposals), {}

        async def work() -> None:
            for place, proposal in waiting:
                answered[place] = await self.proposer.propose(proposal)

        async def ask() -> list[Outcome]:
            await asyncio.gather(*(work() for _ in range(min(number, _AT_ONCE))))
            return [outcome for place in sorted(answered) for outcome in answered[place]]

        async def sketch() -> Sketched:
            # Cancelling this wait must not cancel the outcomes, which others wait for.
            outcomes = await asyncio.shield(asked)
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._sketch, outcomes)

        asked = asyncio.ensure_future(ask())
        return Block(asked, asyncio.ensure_future(sketch()))

    def _sketch(self, outcomes: Sequence[Outcome]) -> Sketched:
        began = time.perf_counter()
        # All rows, copies too: batches, on which roundings depend, must not depend on the pool as it is now.
        rows = [outcome for outcome in outcomes if outcome.row is not None]
        sketches, faults = self.sketcher.sketch([outcome.row for outcome in rows])
        usable = [number for number, fault in enumerate(faults) if fault is None]
        places: dict[str, int | str] = {o.id: fault for o, fault in zip(rows, faults, strict=True) if fault}
        places.update({rows[number].id: place for place, number in enumerate(usable)})
        self.seconds += time.perf_counter() - began
        return Sketched(sketches[usable], places)
