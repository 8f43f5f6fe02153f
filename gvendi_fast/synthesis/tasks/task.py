"""What a task of the synthesis loop is: from few-shot rows to prompts, from answers to accepted rows.

A task is a pure function of its inputs: it asks no network and draws nothing at random, so that a run can be
resumed and replayed from the recorded answers. Only `decide` may call a checker, which is deterministic too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Fields, Reason, Rejected, parse_row
from gvendi_fast.data.shapes import recognise
from gvendi_fast.synthesis.checks.verifiers import AnswerChecker, RowVerifier
from gvendi_fast.synthesis.tasks.prompts import Ask, Template
from gvendi_fast.synthesis.tasks.words import normal_form

# Requests about one candidate, which are made together.
MOST_ASKED = 1000
# A longer row is left out of prompts: five of them would not fit a small model's context.
SHOT_CHARS = 8000


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one answer proposed, before it is checked: named texts, such as premise, hypothesis and label."""

    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Accepted:
    """A row that passed its task's check: JSON-able dict with prompt, completion and meta."""

    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an answer or a candidate is no row.

    stage, of a task: "parse", "answers", "verifier" or, where a user's function hung, crashed or gave no verdict,
    "verifier error"; of the comparison with test questions: "tests" or "paraphrase".
    """

    stage: str
    reason: str


class Task(Protocol):
    """The interface between the loop and a task."""

    name: str
    shots: int

    def shot(self, row: Mapping[str, Any]) -> dict[str, Any] | Reason:
        """A pool row as the values a prompt shows, or why it cannot be shown (too long, no label, ...)."""

    def ask(self, rows: Sequence[Mapping[str, Any]], sample: int = 0) -> Ask:
        """The request for new candidates that shows these rows; GvendiError where one cannot be shown."""

    def parse(self, answer: str | None, rows: Sequence[Mapping[str, Any]] = ()) -> list[Candidate] | Refused:
        """The candidates in an answer to `ask`; None is a request that failed. One that echoes a row is refused."""

    def follow_ups(self, candidate: Candidate) -> list[Ask]:
        """The requests whose answers decide about a candidate; empty where nothing is asked."""

    def checker(self, workers: int = 1) -> AnswerChecker | RowVerifier | None:
        """A new checker of the kind that `decide` wants (a context manager), None where it wants none."""

    def decide(self, candidate: Candidate, answers: Sequence[str | None], checker: Any) -> Accepted | Refused:
        """The accepted row, or why not. answers: to `follow_ups`, in their order, None for one that failed."""

    def prompt_of(self, candidate: Candidate) -> str:
        """The prompt that the accepted row would have: what is compared with tests and with earlier rows."""

    def describe(self) -> dict[str, Any]:
        """Every setting and template that decides what the task makes, JSON-able, for the run's fingerprint."""


def text_fields(row: Mapping[str, Any]) -> tuple[str, str] | Reason:
    """(prompt, completion) of a row, the fields that are sketched; of a conversation its last question and answer."""
    record = dict(row)
    parsed = parse_row(record, recognise([record], Fields()).fields, 0, "row", 1)
    if isinstance(parsed, Rejected):
        return Reason(parsed.reason)
    if parsed.prompt is not None:
        return parsed.prompt, parsed.completion
    if parsed.messages is None:
        return Reason("a bare text has no prompt and completion")
    turns = parsed.messages
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    asked = [turn["content"] for turn in turns[:last] if turn["role"] == "user"]
    return (asked[-1], turns[last]["content"]) if asked else Reason("no user turn before the last answer")


def pair_shot(row: Mapping[str, Any]) -> dict[str, Any] | Reason:
    """A row as the shot {prompt, completion, meta}, or why it cannot be one."""
    texts = text_fields(row)
    if isinstance(texts, Reason):
        return texts
    if sum(map(len, texts)) > SHOT_CHARS:
        return Reason(
            f"a row of {sum(map(len, texts))} characters; at most {SHOT_CHARS} are shown in a prompt"
        )
    return {"prompt": texts[0], "completion": texts[1], "meta": row.get("meta") or {}}


def ask_with(
    template: Template,
    shots: Sequence[dict[str, Any] | Reason],
    sample: int,
    temperature: float,
    top_p: float,
    **values: Any,
) -> Ask:
    """The request that `template` makes of `shots`. Raises GvendiError for none and for one that is a Reason."""
    if not shots:
        raise GvendiError("a prompt needs at least one row of the pool to show; got none")
    for number, shot in enumerate(shots, 1):
        if isinstance(shot, Reason):
            raise GvendiError(
                f"row {number} of the prompt cannot be shown: {shot}; choose rows that `shot` takes"
            )
    messages = template.messages({"shots": list(shots), **values})
    return Ask(messages, sample, temperature, top_p)


def echoes(text: str, shown: Sequence[str]) -> bool:
    """Whether `text` is one of the texts that the prompt showed, but for case and white space."""
    return normal_form(text) in {normal_form(other) for other in shown}


def check_answers(answers: Sequence[str | None], wanted: int) -> None:
    """Raises GvendiError where a decision does not get one answer, or None, for every follow-up."""
    if len(answers) != wanted:
        raise GvendiError(
            f"answers holds {len(answers)}; wanted one, or None, for each of {wanted} follow-ups"
        )


def check_counts(**counts: tuple[int, int] | tuple[int, int, int]) -> None:
    """Raises GvendiError for a setting (value, least) or (value, least, most) that is no integer of that range."""
    for name, (value, least, *most) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise GvendiError(f"{name} is {value!r}; wanted an integer of at least {least}")
        if most and value > most[0]:
            raise GvendiError(f"{name} is {value!r}; wanted at most {most[0]}")


def check_sampling(**values: float) -> None:
    """Raises GvendiError for a temperature below 0 or infinite, and for a top_p (by its name) outside of (0, 1]."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name.endswith("top_p") and not (number and 0 < value <= 1):
            raise GvendiError(
                f"{name} is {value!r}; wanted a number above 0 and at most 1, which keeps every token"
            )
        if not (number and 0 <= value < float("inf")):
            raise GvendiError(f"{name} is {value!r}; wanted a finite number of at least 0")


def known_settings(name: str, given: Any, kind: type) -> dict[str, Any]:
    """The section `name` as settings of a checker of this kind; GvendiError for one that it does not have."""
    known = [key for key in inspect.signature(kind).parameters if key not in ("target", "workers", "folder")]
    if not isinstance(given or {}, Mapping):
        raise GvendiError(f"{name} is {given!r}; wanted a section with {', '.join(known)}")
    settings = dict(given or {})
    for key, value in settings.items():
        if key not in known:
            raise GvendiError(f"{name} has no setting {key!r}; it has {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GvendiError(f"{name}.{key} is {value!r}; wanted a number")
    # What is out of range is refused now, not when the run has begun.
    kind(**({} if kind is AnswerChecker else {"target": "a:b"}), **settings).close()
    return settings
