"""Are two answers the same, which answer has the majority, and does the user's own check accept a row?"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.checks.workers import Verdict, Workers
from gvendi_fast.synthesis.config.modules import find_module

if TYPE_CHECKING:
    from typing_extensions import Self

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
# Between the digits of a thousand; LaTeX sets a space in them as nothing or as a gap.
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\{,\}| )(?=\d{3}(?!\d))")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

Compare = Callable[[Sequence[tuple[str, str]]], list[Verdict]]


class _Checker:
    """Worker processes that end with a block, as a context manager."""

    _workers: Workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start a worker now; raises GvendiError where what it checks with cannot be imported."""
        self._workers.start()

    def close(self) -> None:
        """End the processes."""
        self._workers.close()


class AnswerChecker(_Checker):
    """Compares final answers by math-verify (extra `synthesis`), each comparison in a process that can be killed.

    workers: processes. limit_s: wall-clock seconds for one comparison. memory_mb: address space of a process.
    longest: characters; an answer above it is an error without a comparison. Thread-safe. A context manager.
    """

    def __init__(
        self, workers: int = 1, limit_s: float = 5.0, memory_mb: int = 2048, longest: int = 1000
    ) -> None:
        if longest < 1:
            raise GvendiError(f"longest is {longest}; wanted at least 1 character")
        self.longest = longest
        self._workers = Workers("math", workers, limit_s, memory_mb)

    def same(self, one: str, other: str) -> Verdict:
        """ "same", "different" or "error" of two final answers: LaTeX without \\boxed and without dollars.

        Symmetric: math-verify's order matters, so "same" in one order is enough. Identical texts are the same without
        a comparison; gaps between thousands and a final period count for nothing. An error is a comparison that took
        too long, crashed or raised, or an answer that is empty, too long or has unbalanced braces. Memory that runs
        out inside SymPy may also show as "different".
        """
        return self.compare([(one, other)])[0]

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """`same` of every pair, in order, as many at a time as there are workers."""
        pairs = [tuple(map(_plain, pair)) for pair in pairs]
        verdicts = [self._without_asking(*pair) for pair in pairs]
        # The order of a pair must not change the verdict, not even by the order of the two trials.
        asked = [sorted(pair) for pair, known in zip(pairs, verdicts, strict=True) if not known]
        answers = iter(self._workers.ask_all(asked))
        return [known or next(answers) for known in verdicts]

    def _without_asking(self, one: str, other: str) -> Verdict | None:
        for answer in (one, other):
            if not answer:
                return Verdict("error", "empty answer")
            if len(answer) > self.longest:
                return Verdict(
                    "error", f"answer of {len(answer)} characters; at most {self.longest} are compared"
                )
            if not _balanced(answer):
                return Verdict("error", "unbalanced braces")
        return Verdict("same") if one == other else None


class RowVerifier(_Checker):
    """The user's function "module:function", called in a process that can be killed.

    The function takes a row (dict with "prompt", "completion" and "meta", JSON values) and returns True, False, or the
    reason it refuses the row for. limit_s and memory_mb as for AnswerChecker. folder: comes first on the Python path
    of the process. Thread-safe. A context manager.
    """

    def __init__(
        self,
        target: str,
        workers: int = 1,
        limit_s: float = 5.0,
        memory_mb: int = 2048,
        folder: str | os.PathLike | None = None,
    ) -> None:
        if not isinstance(target, str) or not _TARGET.fullmatch(target):
            raise GvendiError(
                f"verifier is '{target}'; wanted 'module:function', such as 'my_checks:is_good'"
            )
        self._workers = Workers(target, workers, limit_s, memory_mb, folder)

    def verify(self, row: Mapping[str, Any]) -> Verdict:
        """ "accepted", "rejected" (with the function's reason) or "error" (it raised, hung, crashed)."""
        return self.verify_all([row])[0]

    def verify_all(self, rows: Iterable[Mapping[str, Any]]) -> list[Verdict]:
        """`verify` of every row, in order, as many at a time as there are workers."""
        return self._workers.ask_all([dict(row) for row in rows])


@dataclass(frozen=True, slots=True)
class Vote:
    """The outcome of a vote: index of the winning answer (None where nobody answered), how many answers are the same
    as it, itself included, and the reasons of comparisons that failed."""

    winner: int | None
    votes: int
    errors: tuple[str, ...] = ()


def source_digest(target: str, folder: str | os.PathLike | None = None) -> str | None:
    """BLAKE2b (8 bytes, hex) of the file of a "module:function"; None where no file of Python source is found.

    Another check keeps other rows. What the module imports is not part of it.
    """
    spec = find_module(target.partition(":")[0], folder)
    if spec is None or not spec.has_location:
        return None
    return hashlib.blake2b(Path(spec.origin).read_bytes(), digest_size=8).hexdigest()


def majority(answers: Sequence[str | None], compare: Compare) -> Vote:
    """The answer that most answers are the same as; ties go to the lowest index.

    votes_i = #{j : answers i and j are the same, j = i included}: sameness need not be transitive (50\\% is both 50
    and 1/2). None, no answer, has no vote; a comparison that failed counts for nothing.
    compare: pairs of answers -> verdicts, such as `AnswerChecker.compare`; it is asked once for every two texts.
    """
    given = [index for index, answer in enumerate(answers) if answer is not None]
    # Two answers of one text are compared too: where the text cannot be compared they do not count as the same.
    between = {(i, j): tuple(sorted((answers[i], answers[j]))) for i, j in combinations(given, 2)}
    pairs = list(dict.fromkeys(between.values()))
    verdicts = dict(zip(pairs, compare(pairs), strict=True))
    same = {place for place, pair in between.items() if verdicts[pair].outcome == "same"}
    votes = [1 + sum(i in place for place in same) for i in given]
    errors = tuple(verdict.reason for verdict in verdicts.values() if verdict.outcome == "error")
    if not given:
        return Vote(None, 0, errors)
    best = max(votes)
    return Vote(given[votes.index(best)], best, errors)


def _plain(answer: str) -> str:
    """The answer without what math-verify stumbles over: gaps between thousands and the period of a sentence."""
    answer = _THOUSANDS.sub("", answer.strip())
    return answer[:-1] if answer[-2:-1].isdigit() and answer.endswith(".") else answer


def _balanced(text: str) -> bool:
    depth = 0
    for match in _BRACES.finditer(text):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth < 0:
            return False
    return depth == 0
