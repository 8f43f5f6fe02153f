"""From a prompt to checked candidates: ask, read, keep tests and known questions out, ask on, check.

Whatever happens here depends on the prompt and the answers alone, not on the pool as it has grown meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gvendi_fast.base.draws import a_few, stream
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.filters.decontaminate import Decontaminator, Question
from gvendi_fast.synthesis.filters.paraphrase import ParaphraseCheck
from gvendi_fast.synthesis.generators.requests import FINAL, Answer, Request
from gvendi_fast.synthesis.generators.stored import Generator
from gvendi_fast.synthesis.tasks.prompts import Ask
from gvendi_fast.synthesis.tasks.task import Accepted, Candidate, Refused, Task

# Checks that may all end in an error before the check is taken for broken.
_BROKEN = 16


@dataclass(frozen=True)
class Proposal:
    """One prompt: its number, the id of its first candidate, and the rows it shows with their ids."""

    number: int
    id: str
    parents: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate, or of an answer without any: a row, or the stage and the reason that refused it.

    stage: "request", or as in `Refused`. prompt: the candidate's question, where there is one.
    """

    id: str
    parents: tuple[str, ...]
    prompt: str | None = None
    row: dict[str, Any] | None = None
    stage: str = ""
    reason: str = ""


class Proposer:
    """Makes outcomes of proposals. checker: as the task's `checker` gives it. threads: that wait for it.

    paraphrase: asks about the test questions most like a candidate; None asks nothing.
    checking: seconds spent in the task's decisions and in looking for test questions, all threads together.
    made: outcomes so far.
    requests, tokens, cost: of answers that were not on disk before (see `Answer`).
    """

    def __init__(
        self,
        task: Task,
        generator: Generator,
        checker: Any,
        threads: ThreadPoolExecutor,
        tests: Decontaminator | None,
        max_tokens: int | None,
        paraphrase: ParaphraseCheck | None = None,
    ) -> None:
        self.task, self.generator, self.checker, self.threads = task, generator, checker, threads
        self.tests, self.max_tokens, self.paraphrase = tests, max_tokens, paraphrase
        self.checking = self.cost = 0.0
        self._working, self._failures = False, 0
        self.made, self.requests, self.tokens = 0, 0, (0, 0)

    async def propose(self, proposal: Proposal) -> list[Outcome]:
        """The outcomes of one prompt, in the order of its answer."""
        outcomes = await self._propose(proposal)
        self.made += len(outcomes)
        return outcomes

    async def _propose(self, proposal: Proposal) -> list[Outcome]:
        # The number makes every request one of its own, also where a small pool gives the same rows again.
        answer = await self._answer(self.task.ask(proposal.rows, sample=proposal.number))
        id_ = proposal.id
        if not answer.ok:
            return [Outcome(id_, proposal.parents, stage="request", reason=answer.reason or answer.status)]
        found = self.task.parse(answer.text, proposal.rows)
        if isinstance(found, Refused):
            return [Outcome(id_, proposal.parents, stage=found.stage, reason=found.reason)]
        ids = [id_, *(f"{id_}.{number}" for number in range(1, len(found)))]
        return await asyncio.gather(
            *(self._examine(i, proposal, candidate) for i, candidate in zip(ids, found, strict=True))
        )

    async def _examine(self, id_: str, proposal: Proposal, candidate: Candidate) -> Outcome:
        prompt = self.task.prompt_of(candidate)
        # The cheapest first; the follow-ups cost the most.
        refused = self._in_tests(prompt) or await self._paraphrases(prompt)
        if refused is None:
            answers = await asyncio.gather(*map(self._answer, self.task.follow_ups(candidate)))
            texts = [answer.text if answer.ok else None for answer in answers]
            loop = asyncio.get_running_loop()
            decided = await loop.run_in_executor(self.threads, self._decide, candidate, texts)
            if not isinstance(decided, Refused):
                return Outcome(id_, proposal.parents, prompt, decided.row)
            refused = decided
        return Outcome(id_, proposal.parents, prompt, stage=refused.stage, reason=refused.reason)

    def _decide(self, candidate: Candidate, answers: Sequence[str | None]) -> Accepted | Refused:
        began = time.perf_counter()
        decided = self.task.decide(candidate, answers, self.checker)
        self._look_at_checks(decided)
        if not isinstance(decided, Refused):
            decided = self._in_tests(decided.row["prompt"], decided.row["completion"]) or decided
        self.checking += time.perf_counter() - began
        return decided

    def _look_at_checks(self, decided: Accepted | Refused) -> None:
        """A verifier that never works would spend the whole budget."""
        failed = isinstance(decided, Refused) and decided.stage == "verifier error"
        if not failed:
            self._working = True
        elif not self._working:
            self._failures += 1
            if self._failures >= _BROKEN:
                raise GvendiError(
                    f"the first {_BROKEN} checks all ended in an error, the last: {decided.reason}; mend the verifier "
                    "(--preview shows what it says of single candidates)"
                )

    def _in_tests(self, prompt: str, completion: str = "") -> Refused | None:
        match = None if self.tests is None else self.tests.check(prompt, completion)
        return None if match is None else Refused("tests", str(match))

    async def _paraphrases(self, prompt: str) -> Refused | None:
        if self.paraphrase is None:
            return None
        # Its time grows with the tests, so it keeps off the event loop.
        loop = asyncio.get_running_loop()
        similar = await loop.run_in_executor(self.threads, self._similar, prompt)
        asks = [self.paraphrase.ask(prompt, question) for question in similar]
        answers = await asyncio.gather(*map(self._answer, asks))
        return self.paraphrase.decide(similar, answers)

    def _similar(self, prompt: str) -> list[Question]:
        began = time.perf_counter()
        found = self.paraphrase.similar(prompt)
        self.checking += time.perf_counter() - began
        return found

    async def _answer(self, ask: Ask) -> Answer:
        answer = await self.generator.generate(request_of(ask, self.max_tokens))
        if answer.status in FINAL and not answer.cached:
            prompt, completion = self.tokens
            self.tokens = prompt + (answer.prompt_tokens or 0), completion + (answer.completion_tokens or 0)
            self.requests, self.cost = self.requests + 1, self.cost + (answer.cost or 0.0)
        return answer


def shot_rows(seed: int, round_: int, number: int, rows: int, count: int) -> list[int]:
    """Which `count` of the rows below `rows` prompt `number` of a round shows, in random order; all where no more."""
    return a_few(stream("shots", seed, round_, number), rows, count)


def request_of(ask: Ask, max_tokens: int | None) -> Request:
    """The request for what a task asks."""
    return Request(
        ask.messages,
        temperature=ask.temperature,
        top_p=ask.top_p,
        max_tokens=max_tokens,
        sample=ask.sample,
    )
