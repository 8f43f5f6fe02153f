"""Mathematics: a problem as hard as those shown or harder, then the answer that most of N solutions agree on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason
from gvendi_fast.synthesis.checks.verifiers import AnswerChecker, majority
from gvendi_fast.synthesis.tasks.prompts import Ask, Template
from gvendi_fast.synthesis.tasks.sections import (
    LONGEST,
    answered_sections,
    boxed_answer,
    clean,
    without_thinking,
)
from gvendi_fast.synthesis.tasks.task import (
    MOST_ASKED,
    Accepted,
    Candidate,
    Refused,
    ask_with,
    check_answers,
    check_counts,
    check_sampling,
    echoes,
    known_settings,
    pair_shot,
)


class MathTask:
    """Problems with one final answer, decided by vote.

    shots: rows of the pool that a prompt shows.
    problems: problems that are taken from one answer, at most.
    solutions: requests that solve each problem.
    tau: solutions that must agree on the final answer.
    temperature: sampling temperature of problems.
    top_p: share of the probability that problems are sampled from, up to 1.
    solution_temperature: sampling temperature of solutions.
    solution_top_p: share of the probability that solutions are sampled from, up to 1.
    problem_template: a Jinja file with the prompt for problems; null takes this package's.
    solution_template: a Jinja file with the prompt for solutions; null takes this package's.
    longest: characters of the model's text, at most; a longer one is refused.
    checks: limits of comparing two answers: {limit_s: 5.0, memory_mb: 2048, longest: 1000}, in seconds, megabytes of
        memory and characters of an answer; what goes beyond is no agreement. null takes these.
    """

    name = "math"

    def __init__(
        self,
        shots: int = 5,
        problems: int = 1,
        solutions: int = 3,
        tau: int = 2,
        temperature: float = 1.0,
        top_p: float = 0.95,
        solution_temperature: float = 0.75,
        solution_top_p: float = 0.95,
        problem_template: str | os.PathLike | None = None,
        solution_template: str | os.PathLike | None = None,
        longest: int = LONGEST,
        checks: Mapping[str, Any] | None = None,
    ) -> None:
        check_counts(
            shots=(shots, 1),
            problems=(problems, 1),
            solutions=(solutions, 1, MOST_ASKED),
            tau=(tau, 1),
            longest=(longest, 1),
        )
        check_sampling(
            temperature=temperature,
            top_p=top_p,
            solution_temperature=solution_temperature,
            solution_top_p=solution_top_p,
        )
        if tau > solutions:
            raise GvendiError(f"tau is {tau} but there are {solutions} solutions; wanted at most {solutions}")
        self.shots, self.problems, self.solutions, self.tau = shots, problems, solutions, tau
        self._generation, self._solving = (temperature, top_p), (solution_temperature, solution_top_p)
        self._problem = Template("math_problem", problem_template)
        self._solution = Template("math_solution", solution_template)
        self._longest, self._checks = longest, known_settings("checks", checks, AnswerChecker)

    def shot(self, row: Mapping[str, Any]) -> dict[str, Any] | Reason:
        """See Task."""
        return pair_shot(row)

    def ask(self, rows: Sequence[Mapping[str, Any]], sample: int = 0) -> Ask:
        """See Task; the template is given shots and problems."""
        shots = [self.shot(row) for row in rows]
        return ask_with(self._problem, shots, sample, *self._generation, problems=self.problems)

    def parse(self, answer: str | None, rows: Sequence[Mapping[str, Any]] = ()) -> list[Candidate] | Refused:
        """See Task. Of several problems those that echo a row are left out; the answer is refused if all do."""
        found = answered_sections(answer, self._longest, ("problem",), self.problems)
        if isinstance(found, Reason):
            return Refused("parse", str(found))
        shown = [shot["prompt"] for row in rows if not isinstance(shot := self.shot(row), Reason)]
        candidates = [Candidate(values) for values in found if not echoes(values["problem"], shown)]
        return candidates or Refused("parse", "echoes a row of the prompt")

    def follow_ups(self, candidate: Candidate) -> list[Ask]:
        """N draws of the solution of one problem."""
        messages = self._solution.messages(candidate.values)
        return [Ask(messages, sample, *self._solving) for sample in range(self.solutions)]

    def checker(self, workers: int = 1) -> AnswerChecker:
        """Compares final answers."""
        return AnswerChecker(workers=workers, **self._checks)

    def decide(
        self, candidate: Candidate, answers: Sequence[str | None], checker: AnswerChecker
    ) -> Accepted | Refused:
        """The first solution of the majority, if at least tau of N give its answer."""
        check_answers(answers, self.solutions)
        texts = [clean(answer, self._longest) for answer in answers]
        finals = [_final_answer(text) for text in texts]
        given = [None if isinstance(final, Reason) else str(final) for final in finals]
        vote = majority(given, checker.compare)
        if vote.winner is None or vote.votes < self.tau:
            faults = [str(final) for final in finals if isinstance(final, Reason)] + list(vote.errors)
            because = f" ({'; '.join(dict.fromkeys(faults))})" if faults else ""
            return Refused(
                "answers", f"no majority: {vote.votes} of {len(answers)} agree, wanted {self.tau}{because}"
            )
        meta = {
            "task": self.name,
            "answer": given[vote.winner],
            "votes": vote.votes,
            "answers": given,
            "errors": list(vote.errors),
        }
        return Accepted({"prompt": self.prompt_of(candidate), "completion": texts[vote.winner], "meta": meta})

    def prompt_of(self, candidate: Candidate) -> str:
        """The problem."""
        return candidate.values["problem"]

    def describe(self) -> dict[str, Any]:
        """See Task."""
        return {
            "task": self.name,
            "shots": self.shots,
            "problems": self.problems,
            "solutions": self.solutions,
            "tau": self.tau,
            "sampling": [*self._generation, *self._solving],
            "longest": self._longest,
            "checks": self._checks,
            "templates": {"problem": self._problem.digest(), "solution": self._solution.digest()},
        }


def _final_answer(text: str | Reason) -> str | Reason:
    if isinstance(text, Reason):
        return text
    # The thinking of a reasoning model stays in the completion, but a box in it is not the answer.
    solution = without_thinking(text)
    return solution if isinstance(solution, Reason) else boxed_answer(solution)
