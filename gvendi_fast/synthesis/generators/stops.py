"""Why a run of requests ends before its work is done, and how it goes on.

Each of these leaves the request store whole: what was answered is kept, and the same run started again asks only for
the rest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators.request_store import Record
from gvendi_fast.synthesis.generators.requests import OK


class GenerationStoppedError(GvendiError):
    """Base of all: the message says why, what is kept and how to go on; `why` is its first part alone."""

    why = ""


class EndpointDownError(GenerationStoppedError):
    """The endpoint cannot be reached, answers nothing or has no such model."""


class KeyRefusedError(GenerationStoppedError):
    """The endpoint does not accept the API key, or its account has no credit."""


class BudgetSpentError(GenerationStoppedError):
    """The run has reached one of its budgets."""


@dataclass(frozen=True)
class Stop:
    """A decision to end the run; one of these makes the exception of every request that still waits."""

    kind: type[GenerationStoppedError]
    why: str
    remedy: str

    def error(self, kept: int, where: str) -> GenerationStoppedError:
        """The exception, with `kept` answers in the file `where`."""
        error = self.kind(
            f"{self.why}. {kept} answers are kept in {where}, and none of them is asked for again; {self.remedy}"
        )
        error.why = self.why
        return error


@dataclass(frozen=True)
class Budget:
    """Limits of a request store; None is no limit.

    requests: answers that the endpoint has given, over all runs with the same store, those under way included.
    tokens: of prompts and answers together, over all runs; checked before a request is sent, so what is under way
    then comes on top, and a damaged answer without a count costs none. seconds: of this run, from its first request;
    answers under way are waited for.
    """

    requests: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise GvendiError(f"Budget {name}={value!r} must be above 0, or None for no limit")


class Spending:
    """What a run has spent of its budget.

    answered, tokens: what the store holds at the start. uncounted: its usable answers without a count of tokens.
    """

    def __init__(self, budget: Budget, answered: int, tokens: int, uncounted: int) -> None:
        self.budget = budget
        self.answered, self.tokens, self.uncounted = answered, tokens, uncounted
        self.under_way = 0
        self._began: float | None = None

    def reserve(self) -> Stop | None:
        """Count one more request as under way, or say which budget forbids it."""
        if self._began is None:
            self._began = time.monotonic()
        stop = self.refusal()
        if stop is None:
            self.under_way += 1
        return stop

    def release(self) -> None:
        """The request reserved last is over; `settle` it if it was answered."""
        self.under_way -= 1

    def settle(self, record: Record) -> None:
        """Book an answer."""
        self.answered += 1
        self.tokens += (record.prompt_tokens or 0) + (record.completion_tokens or 0)
        # A damaged answer may well lack the count that the endpoint gives with the others.
        self.uncounted += record.status == OK and None in (record.prompt_tokens, record.completion_tokens)

    def refusal(self) -> Stop | None:
        """Which budget forbids one more request, or None."""
        limit = self.budget
        if limit.requests is not None and self.answered + self.under_way >= limit.requests:
            return _spent("requests", f"{limit.requests} answers, those under way included")
        if limit.tokens is not None and self.uncounted:
            return Stop(
                BudgetSpentError,
                "The budget of tokens cannot be kept, because the endpoint does not count tokens (no `usage`)",
                "to go on, set a budget of requests or seconds in its place",
            )
        if limit.tokens is not None and self.tokens >= limit.tokens:
            return _spent(
                "tokens", f"{self.tokens} of {limit.tokens} tokens, and what is under way comes on top"
            )
        if limit.seconds is not None and self.remaining_seconds() <= 0:
            return _spent("seconds", f"{limit.seconds:g} seconds")
        return None

    def remaining_seconds(self) -> float:
        """Until the budget of seconds ends; infinite where there is none."""
        if self.budget.seconds is None:
            return float("inf")
        began = time.monotonic() if self._began is None else self._began
        return began + self.budget.seconds - time.monotonic()


def _spent(name: str, how_much: str) -> Stop:
    return Stop(
        BudgetSpentError,
        f"The budget of {name} is spent ({how_much})",
        f"to go on, run the same again with more {name}"
        if name != "seconds"
        else "to go on, run the same again",
    )
