"""Any prompt and completion: the user's own prompt, sections to read, and a function of the user's that accepts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason
from gvendi_fast.synthesis.checks.verifiers import RowVerifier, source_digest
from gvendi_fast.synthesis.tasks.prompts import Ask, Template
from gvendi_fast.synthesis.tasks.sections import LONGEST, answered_sections
from gvendi_fast.synthesis.tasks.task import (
    Accepted,
    Candidate,
    Refused,
    ask_with,
    check_counts,
    check_sampling,
    echoes,
    known_settings,
    pair_shot,
)

_PARTS = ("prompt", "completion")


class GenericTask:
    """Rows in the sections <prompt> and <completion>, accepted by the user's check or, without one, as they are.

    shots: rows of the pool that a prompt shows.
    template: a Jinja file with the prompt, which is given shots (each with prompt, completion, meta); null takes this
        package's.
    verifier: a function of yours, "module:function", that takes a row (a dict with prompt, completion, meta) and
        returns True, False or the reason why it is refused; null accepts every row.
    temperature: sampling temperature.
    top_p: share of the probability that rows are sampled from, up to 1.
    longest: characters of the model's text, at most; a longer one is refused.
    checks: limits of the verifier, which runs in a process of its own: {limit_s: 5.0, memory_mb: 2048}, in seconds of
        one row and megabytes of memory; what goes beyond refuses the row. null takes these.
    verifier_folder: the folder with the verifier's module, if Python does not find it.
    """

    name = "generic"

    def __init__(
        self,
        shots: int = 5,
        template: str | os.PathLike | None = None,
        verifier: str | None = None,
        temperature: float = 1.0,
        top_p: float = 0.95,
        longest: int = LONGEST,
        checks: Mapping[str, Any] | None = None,
        verifier_folder: str | os.PathLike | None = None,
    ) -> None:
        check_counts(shots=(shots, 1), longest=(longest, 1))
        check_sampling(temperature=temperature, top_p=top_p)
        if verifier is not None:
            RowVerifier(verifier).close()
        self.shots, self.verifier, self._folder = shots, verifier, verifier_folder
        self._sampling = (temperature, top_p)
        self._template = Template("generic_row", template)
        self._longest, self._checks = longest, known_settings("checks", checks, RowVerifier)

    def shot(self, row: Mapping[str, Any]) -> dict[str, Any] | Reason:
        """See Task."""
        return pair_shot(row)

    def ask(self, rows: Sequence[Mapping[str, Any]], sample: int = 0) -> Ask:
        """See Task; the template is given shots."""
        return ask_with(self._template, [self.shot(row) for row in rows], sample, *self._sampling)

    def parse(self, answer: str | None, rows: Sequence[Mapping[str, Any]] = ()) -> list[Candidate] | Refused:
        """See Task."""
        found = answered_sections(answer, self._longest, _PARTS)
        if isinstance(found, Reason):
            return Refused("parse", str(found))
        shown = [shot["prompt"] for row in rows if not isinstance(shot := self.shot(row), Reason)]
        if echoes(found[0]["prompt"], shown):
            return Refused("parse", "echoes a row of the prompt")
        return [Candidate(found[0])]

    def follow_ups(self, candidate: Candidate) -> list[Ask]:
        """Nothing further is asked."""
        return []

    def checker(self, workers: int = 1) -> RowVerifier | None:
        """Runs the user's function, if there is one."""
        if self.verifier is None:
            return None
        return RowVerifier(self.verifier, workers=workers, folder=self._folder, **self._checks)

    def decide(
        self, candidate: Candidate, answers: Sequence[str | None] = (), checker: RowVerifier | None = None
    ) -> Accepted | Refused:
        """The candidate as a row, if the user's function accepts it; an error of the function refuses it."""
        row = {**candidate.values, "meta": {"task": self.name}}
        if self.verifier is None:
            return Accepted(row)
        if checker is None:
            raise GvendiError(
                f"checker is None; the verifier '{self.verifier}' wants the one that `checker` makes"
            )
        verdict = checker.verify(row)
        if verdict.outcome == "accepted":
            return Accepted({**row, "meta": {**row["meta"], "verifier": self.verifier}})
        if verdict.outcome == "error":
            return Refused("verifier error", verdict.reason)
        return Refused("verifier", verdict.reason)

    def prompt_of(self, candidate: Candidate) -> str:
        """The section <prompt>."""
        return candidate.values["prompt"]

    def describe(self) -> dict[str, Any]:
        """See Task."""
        source = None if self.verifier is None else source_digest(self.verifier, self._folder)
        return {
            "task": self.name,
            "shots": self.shots,
            "verifier": self.verifier,
            "verifier_source": source,
            "sampling": list(self._sampling),
            "longest": self._longest,
            "checks": self._checks,
            "templates": {"row": self._template.digest()},
        }
