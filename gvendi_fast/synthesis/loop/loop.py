"""The Prismatic loop (arXiv 2505.20161): a pool that grows where it is sparse, the same whenever it is resumed.

    pool -> clusters -> prompts -> candidates -> checks -> sketches -> those in sparse regions -> pool
Prompts are numbered. `block` of them are decided together, in the order of their numbers, and `ahead` blocks are under
way at once; the prompts of block b show the pool as it was at the start of the round that was current when block
b - ahead was decided. So neither prompts nor decisions depend on which answer comes first, and a run that was killed
makes the same requests again, which are answered from disk.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from gvendi_fast.synthesis.config.config import Config
from gvendi_fast.synthesis.disk.digests import CLUSTERS, digest_of_file
from gvendi_fast.synthesis.disk.journal import Journal
from gvendi_fast.synthesis.generators.stops import BudgetSpentError
from gvendi_fast.synthesis.generators.stored import StoredGenerator
from gvendi_fast.synthesis.loop.candidate_sketcher import CandidateSketcher
from gvendi_fast.synthesis.loop.grown_pool import GrownPool
from gvendi_fast.synthesis.loop.judge import Judge
from gvendi_fast.synthesis.loop.pipeline import Block, Pipeline, Sketched
from gvendi_fast.synthesis.loop.proposer import Outcome, Proposal, Proposer, shot_rows
from gvendi_fast.synthesis.loop.sketch_process import SketchProcess
from gvendi_fast.synthesis.loop.status import Spent, Status, Watcher

# Stage and reason of a candidate that the rule refuses.
_NOT_WANTED = {
    "cluster": ("dense", "its cluster is not among the sparse ones"),
    "gain": ("low gain", "it raises the entropy by too little"),
}


class Loop:
    """One run over its parts. `run` returns the final status; the journal stays open.

    Raises EndpointDownError and KeyRefusedError; what is decided by then is on disk.
    """

    def __init__(
        self,
        config: Config,
        pool: GrownPool,
        judge: Judge,
        journal: Journal,
        generator: StoredGenerator,
        proposer: Proposer,
        sketcher: CandidateSketcher | SketchProcess,
        watcher: Watcher,
    ) -> None:
        self.config, self.pool, self.judge, self.journal = config, pool, judge, journal
        self.generator, self.proposer, self.watcher = generator, proposer, watcher
        self.pipeline = Pipeline(proposer, sketcher)
        self._decider = ThreadPoolExecutor(1, thread_name_prefix="decide")
        self.seconds: Counter[str] = Counter()
        self._gvendi, self._gvendi_rows = pool.start_gvendi, pool.seeds
        self._rejected = Counter(journal.rejections())
        self._decided = 0
        # Once, and what is new is added up.
        self._spent = Spent.of(generator)

    def replay(self) -> None:
        """Bring pool and judge to where the journal ends."""
        rows, sketches = self.journal.accepted(), self.journal.sketches(self.pool.state.dim)
        done = 0
        for event in self.journal.blocks:
            before = len(self.pool)
            for row, sketch in zip(rows[done : event["accepted"]], sketches[done:], strict=False):
                self.pool.add(row["id"], row, torch.from_numpy(sketch))
            done = event["accepted"]
            self.judge.recent.extend(event["gains"])
            self.pool.settle(event["block"])
            # Events of earlier versions do not say of how many rows; it was the pool before the block.
            self._gvendi, self._gvendi_rows = event["gvendi"], event.get("gvendi_rows", before)

    async def run(self) -> Status:
        """Go on until a limit is reached."""
        pending: deque[Block] = deque()
        block, stopped = len(self.journal.blocks), None
        following = block
        with self.pipeline:
            async with self.generator:
                try:
                    while (stopped := self._limit()) is None:
                        while len(pending) < self.config.ahead:
                            with self._time("prompts"):
                                proposals = await asyncio.to_thread(self._proposals, following)
                            pending.append(self.pipeline.begin(proposals))
                            following += 1
                        with self._time("answers"):
                            outcomes = await pending[0].outcomes
                        with self._time("sketches"):
                            sketched = await pending[0].sketched
                        pending.popleft()
                        await asyncio.get_running_loop().run_in_executor(
                            self._decider, self._decide, block, outcomes, sketched
                        )
                        block += 1
                        self.watcher.update(self.status())
                except BudgetSpentError as error:
                    stopped = "budget", error.why
                finally:
                    await asyncio.gather(*(begun.cancel() for begun in pending))
        return self.end(*stopped)

    def end(self, reason: str, why: str) -> Status:
        """Note why the run ends and what it took, in events.jsonl; the final status."""
        # Only the end needs what this file brings with it.
        from gvendi_fast.synthesis.loop.pool_numbers import pool_numbers

        # An interrupt does not reach a thread: a block that is being decided is, before the end is noted.
        self._decider.shutdown()
        with self._time("gvendi"):
            # Without the rows of a block that an error broke off.
            at_start, at_end = pool_numbers(self.pool.sketches(self.pool.state.n), self.pool.seeds)
            self._gvendi, self._gvendi_rows = at_end.gvendi, at_end.n
        spent = Spent.of(self.generator)
        final = replace(self.status(), requests=spent.requests, tokens=spent.tokens, cost=spent.cost)
        final.stopped, final.why, final.at_start, final.at_end = reason, why, at_start, at_end
        # Not the pool in memory, which may be within a block where an error ended the run.
        pool = self.journal.blocks[-1]["pool"] if self.journal.blocks else self.pool.seeds
        took = {name: getattr(final, name) for name in ("requests", "tokens", "cost", "seconds")}
        self.journal.note({"event": "stop", "reason": reason, "why": why, "pool": pool, **took})
        return final

    def status(self) -> Status:
        """Where the run stands now."""
        new = self.proposer
        return Status(
            pool=len(self.pool),
            seeds=self.pool.seeds,
            target=self.config.stop.target,
            # Behind the last block of a run the next round may have begun, which nothing is decided in.
            round=max(self.journal.rounds, default=0),
            clusters=self.journal.rounds[max(self.journal.rounds)] if self.journal.rounds else 0,
            accepted=len(self.pool) - self.pool.seeds,
            rejected=dict(self._rejected),
            gvendi=self._gvendi,
            gvendi_rows=self._gvendi_rows,
            start_gvendi=self.pool.start_gvendi,
            requests=self._spent.requests + new.requests,
            tokens=(self._spent.tokens[0] + new.tokens[0], self._spent.tokens[1] + new.tokens[1]),
            cost=None if self._spent.cost is None else self._spent.cost + new.cost,
            queued=new.made - self._decided,
            seconds={**self.seconds, "checks": new.checking, "sketching": self.pipeline.seconds},
        )

    def _limit(self) -> tuple[str, str] | None:
        """The limit that has been reached, and in words."""
        stop = self.config.stop
        if len(self.pool) >= stop.target:
            return "target", f"the pool has {len(self.pool):,} rows, as many as were wanted"
        decided = accepted = 0
        for event in reversed(self.journal.blocks):
            decided, accepted = decided + event["decided"], accepted + event["joined"]
            if decided >= stop.window:
                break
        if decided >= stop.window and accepted < stop.floor * decided:
            return "acceptance", (
                f"of the last {decided:,} candidates {accepted} were accepted, less than {100 * stop.floor:g} %"
            )
        return None

    def _proposals(self, block: int) -> list[Proposal]:
        """The prompts of a block; the rows they show are a function of its round and their numbers."""
        round_ = self.pool.round_of(block - self.config.ahead + 1)
        rows = self.pool.showable(round_.size)
        if self.config.accept.from_sparse:
            sparse = rows[self.judge.sparse_rows(round_)[rows]]
            # Sparse clusters may hold rows only that no prompt can show.
            rows = sparse if len(sparse) else rows
        found = []
        for number in range(block * self.config.block, (block + 1) * self.config.block):
            places = shot_rows(self.config.seed, round_.number, number, len(rows), self.pool.task.shots)
            shown = [int(rows[place]) for place in places]
            found.append(
                Proposal(
                    number,
                    f"{self.pool.prefix}{number}",
                    tuple(self.pool.ids[row] for row in shown),
                    tuple(self.pool.records[row] for row in shown),
                )
            )
        return found

    def _decide(self, block: int, outcomes: list[Outcome], sketched: Sketched) -> None:
        """Decide on a block's outcomes in order and write what was decided."""
        before = len(self.pool)
        with self._time("clusters"):
            self.judge.begin(sketched.sketches, near=self.config.filter.near is not None)
            self._begin_round(block)
        with self._time("decisions"):
            accepted, rejected, decided, gains = self._go_through(outcomes, sketched)
        self._decided += len(outcomes)
        with self._time("writing"):
            self._rejected.update(line["stage"] for line in rejected)
            self._gvendi, self._gvendi_rows = self.judge.gvendi
            event = {
                "block": block,
                "round": self.pool.round.number,
                "pool": len(self.pool),
                "accepted": len(self.pool) - self.pool.seeds,
                "joined": len(accepted),
                "decided": decided,
                "rejected": dict(Counter(line["stage"] for line in rejected)),
                "gvendi": self._gvendi,
                "gvendi_rows": self._gvendi_rows,
                "gains": gains if self.config.accept.reference == "candidates" else [],
                "cut_short": decided < len(outcomes),
            }
            self.journal.block(accepted, rejected, self.pool.sketches()[before:].numpy(), event)
        with self._time("clusters"):
            if self.pool.settle(block):
                self.judge.forget(self.pool.round.number)

    def _begin_round(self, block: int) -> None:
        round_ = self.pool.round
        if round_.number not in self.journal.rounds:
            about = {"block": block, "pool": round_.size, "clusters": len(self.judge.kmeans.centroids)}
            if round_.number == 0:
                self.judge.kmeans.save(self.journal.path / CLUSTERS)
                about["digest"] = digest_of_file(self.journal.path / CLUSTERS)
            self.journal.round(round_.number, {**about, "gvendi": self.pool.round_state.gvendi()})

    def _go_through(
        self, outcomes: list[Outcome], sketched: Sketched
    ) -> tuple[list[dict], list[dict], int, list[float]]:
        """Lines for the two files, how many outcomes were decided (fewer where the target is met), their gains."""
        accepted: list[dict[str, Any]] = []
        rejected: list[dict[str, Any]] = []
        gains: list[float] = []
        for number, outcome in enumerate(outcomes):
            if len(self.pool) >= self.config.stop.target:
                return accepted, rejected, number, gains
            about = {"id": outcome.id, "parents": list(outcome.parents)}
            if outcome.row is None:
                rejected.append(
                    {**about, "stage": outcome.stage, "reason": outcome.reason, "prompt": outcome.prompt}
                )
                continue
            place = sketched.places[outcome.id]
            refusal = self._refusal(outcome, place)
            if refusal is not None:
                rejected.append({**about, "stage": refusal[0], "reason": refusal[1], "row": outcome.row})
                continue
            judged = self.judge.judge(place)
            gains.append(judged.gain)
            if judged.accepted(self.config.accept.rule):
                line = {**outcome.row, **about, **judged.to_dict()}
                self.pool.add(outcome.id, line, sketched.sketches[place])
                self.judge.joined(judged)
                accepted.append(line)
            else:
                stage, why = _NOT_WANTED[self.config.accept.rule]
                rejected.append(
                    {**about, "stage": stage, "reason": why, **judged.to_dict(), "row": outcome.row}
                )
        return accepted, rejected, len(outcomes), gains

    def _refusal(self, outcome: Outcome, place: int | str) -> tuple[str, str] | None:
        if outcome.row["prompt"] in self.pool.seen:
            return "copy", "the pool has this prompt"
        if isinstance(place, str):
            return "sketch", place
        near = self.config.filter.near
        if near is None:
            return None
        cosine, row = self.judge.nearest(place)
        return ("near copy", f"cosine {cosine:.4f} to {self.pool.ids[row]}") if cosine >= near else None

    @contextmanager
    def _time(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began
