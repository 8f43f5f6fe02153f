"""Answers from any endpoint that speaks OpenAI's chat completions, without paying twice and without running it down.

The official client does the talking; its own retries are off, for they ignore or refuse a Retry-After of some minutes,
keep a place among the requests under way while they wait, and go out before the store has noted them. What to do about
a failure is decided here:

    200, whatever it holds         kept and final; of one that is too long or holds the key, the reason
    429, 503                       the limit of requests under way is halved; sent again after Retry-After or a delay
    no reply within the time limit, connection broken    the same, but `retries` times at most
    other 5xx, 408, 409, 425       sent again, `retries` times at most
    no connection                  all requests wait; after `connection_failures` in a row the run ends
    400, 413, 422                  this request is refused; the run ends if the first such ones come before any answer
    401, 403, 402, no credit       the run ends at once
    404 and other 4xx, redirects   the run ends at once: the address or the model is wrong
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators.endpoint import Endpoint, Kind, Reply
from gvendi_fast.synthesis.generators.pacing import AdaptiveLimit, Backoff
from gvendi_fast.synthesis.generators.request_store import Record, RequestStore
from gvendi_fast.synthesis.generators.requests import FAILED, REFUSED, UNSERVED, Request
from gvendi_fast.synthesis.generators.stops import (
    Budget,
    EndpointDownError,
    GenerationStoppedError,
    KeyRefusedError,
    Spending,
    Stop,
)
from gvendi_fast.synthesis.generators.stored import Generator, StoredGenerator

__all__ = ["Generator", "OpenAIGenerator", "Pace"]

AGAIN = "run the same again to go on"


@dataclass(frozen=True)
class Pace:
    """How an endpoint is treated; times in seconds.

    concurrency, max_concurrency: requests under way at the start and at most. retries: further tries after a server
    error, a broken connection or a time-out; being told to wait and finding nobody there do not count.
    time_limit: of one try.
    patience: how long the endpoint may serve nothing at all while it fails, the longest Retry-After that is obeyed,
    and how long one request is tried while others are served.
    connection_failures: tries in a row without any reply that end the run; tries that were under way together count
    once. first_delay, longest_delay: of the exponential back-off. seed: of its jitter.
    """

    concurrency: int = 8
    max_concurrency: int = 64
    retries: int = 6
    time_limit: float = 600.0
    patience: float = 900.0
    connection_failures: int = 8
    first_delay: float = 0.5
    longest_delay: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("time_limit", "patience", "first_delay", "longest_delay", "connection_failures"):
            value = getattr(self, name)
            if not value > 0:
                raise GvendiError(f"Pace {name}={value!r} must be above 0")
        if self.retries < 0:
            raise GvendiError(f"Pace retries={self.retries!r} must be 0 or more")


class OpenAIGenerator(StoredGenerator):
    """A model behind an endpoint that speaks OpenAI's chat completions.

    base_url: such as "http://localhost:8000/v1". model: its name there. store: where requests and answers are kept.
    key_variable: name of the environment variable with the API key; None for an endpoint without keys. The key is
    read from there only and written nowhere. prices: (prompt, completion) per million tokens, for `cost`.
    limit_field: what the endpoint calls the limit of an answer's tokens ("max_completion_tokens" for some models).
    send_seed: send a `seed` made from the key of each request, for endpoints that sample reproducibly with one.
    answer_mb: megabytes (2^20 bytes) of an answer's body, unpacked; a longer one is refused for good. Memory: about
    three bodies for each request under way.

    `generate` raises EndpointDownError, KeyRefusedError or BudgetSpentError when the run is to end, and
    GvendiError where the store cannot be written. Everything else that may go wrong with a request is an Answer that is
    not `ok`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        store: RequestStore,
        *,
        key_variable: str | None = "OPENAI_API_KEY",
        budget: Budget | None = None,
        pace: Pace | None = None,
        prices: tuple[float, float] | None = None,
        limit_field: str = "max_tokens",
        send_seed: bool = False,
        answer_mb: float = 16,
    ) -> None:
        if not 0 < answer_mb <= 1024:
            raise GvendiError(f"answer_mb={answer_mb!r} must be above 0 and at most 1024 megabytes")
        super().__init__(model, store, prices)
        self.pace = pace or Pace()
        self._limit_field, self._send_seed = limit_field, send_seed
        self._limit = AdaptiveLimit(self.pace.concurrency, self.pace.max_concurrency)
        self._backoff = Backoff(self.pace.first_delay, self.pace.longest_delay, self.pace.seed)
        counts, tokens = store.counts(), store.tokens()
        answered = counts.get("ok", 0) + counts.get("failed", 0)
        self._spending = Spending(
            budget or Budget(), answered, tokens.prompt + tokens.completion, tokens.uncounted
        )
        self._endpoint = Endpoint(base_url, key_variable, self.pace.time_limit, int(answer_mb * 2**20))
        self._stop: Stop | None = None
        self._stopped = asyncio.Event()
        self._not_before = 0.0
        self._failing_since: float | None = None
        self._silent = self._refusals = 0
        self._served = answered > 0

    @property
    def concurrency(self) -> int:
        """Requests that may be under way at once, at present."""
        return self._limit.limit

    def _halt(self) -> None:
        self._end(Stop(GenerationStoppedError, "The generator was closed", AGAIN))

    async def _free(self) -> None:
        await self._endpoint.aclose()

    async def _produce(self, request: Request, key: str, written: str) -> Record:
        # Nothing else is under way: an old failure says nothing about the time since.
        if len(self._under_way) == 1:
            self._failing_since = None
        body = self._wire(request, key)
        failures, failing_since = 0, None
        while True:
            reply = await self._try(body, key, written)
            if isinstance(reply, Record):
                return reply
            if reply.kind is Kind.REFUSED:
                return await self.store.put_async(key, REFUSED, None, reply.reason, None, None)
            failures += 1
            failing_since = failing_since or time.monotonic()
            # No fault of the request, as a rule; but one that is too large for a rate limit hears 429 for ever.
            if reply.kind in (Kind.BUSY, Kind.SILENT):
                failures = min(failures, self.pace.retries)
            if failures > self.pace.retries or time.monotonic() - failing_since > self.pace.patience:
                return await self.store.put_async(key, UNSERVED, None, reply.reason, None, None)
            if reply.kind is not Kind.SILENT:
                await self._sleep(
                    reply.wait if reply.wait is not None else self._backoff.delay(max(failures, 1))
                )

    async def _try(self, body: Mapping[str, Any], key: str, written: str) -> Record | Reply:
        """Send a request once, when its turn has come, and keep what was answered."""
        round_ = await self._limit.acquire()
        try:
            await self._turn()
            stop = self._spending.reserve()
            if stop is not None:
                self._end(stop)
                raise self._error()
            try:
                await self.store.begin_async(key, written)
                reply = await self._endpoint.send(body)
                record = None
                if reply.kind is Kind.ANSWERED:
                    record = await self._keep(key, reply.text)
                elif reply.kind is Kind.UNUSABLE:
                    record = await self.store.put_async(key, FAILED, None, reply.reason, None, None)
                if record is not None:
                    self._spending.settle(record)
            finally:
                self._spending.release()
            self._learn(reply, round_)
            return reply if record is None else record
        finally:
            self._limit.release()

    async def _turn(self) -> None:
        """Wait while the endpoint asks all to wait; raises when the run has ended."""
        while True:
            if self._stop is not None:
                raise self._error()
            wait = self._not_before - time.monotonic()
            if wait <= 0 or self._spending.remaining_seconds() <= 0:
                return
            await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but no longer than the run lasts."""
        seconds = min(seconds, max(self._spending.remaining_seconds(), 0.0))
        # The time-out is the ordinary end of the sleep.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
        if self._stop is not None:
            raise self._error()

    def _learn(self, reply: Reply, round_: int) -> None:
        """What a reply says about the endpoint, for all requests to come."""
        if reply.kind in (Kind.ANSWERED, Kind.UNUSABLE):
            self._served, self._failing_since, self._silent, self._refusals = True, None, 0, 0
            self._limit.succeeded()
            return
        if reply.kind in (Kind.WRONG_KEY, Kind.WRONG_PLACE):
            wrong = KeyRefusedError if reply.kind is Kind.WRONG_KEY else EndpointDownError
            remedy = f"check the {reply.what_to_check}, then {AGAIN}"
            self._end(Stop(wrong, f"{self._endpoint.place} {reply.reason}", remedy))
            raise self._error()
        if reply.kind is Kind.REFUSED:
            self._refuse(reply)
            return
        self._fail(reply, round_)

    def _refuse(self, reply: Reply) -> None:
        self._silent, self._refusals = 0, self._refusals + 1
        if not self._served and self._refusals >= self.pace.connection_failures:
            why = f"{self._endpoint.place} refused the first {self._refusals} requests; the last: {reply.reason}"
            self._end(Stop(EndpointDownError, why, f"check model and sampling parameters, then {AGAIN}"))
            raise self._error()

    def _fail(self, reply: Reply, round_: int) -> None:
        now = time.monotonic()
        self._failing_since = now if self._failing_since is None else self._failing_since
        if reply.kind is Kind.FAULT:
            self._silent = 0
        else:
            news = self._limit.overloaded(round_)
            self._count_silence(reply, news, now)
        if reply.wait is not None:
            self._not_before = max(self._not_before, now + reply.wait)
        told, patience = reply.wait or 0.0, self.pace.patience
        if told > patience or now - self._failing_since > patience:
            why = f"asks to wait {told:g} s" if told > patience else f"has served nothing for {patience:g} s"
            why = f"{self._endpoint.place} {why}, and patience ends at {patience:g} s; the last reply: {reply.reason}"
            self._end(Stop(EndpointDownError, why, f"when it is well again, {AGAIN}"))
            raise self._error()

    def _count_silence(self, reply: Reply, news: bool, now: float) -> None:
        """The circuit breaker: tries without any reply, those that were under way together as one."""
        if reply.kind is Kind.BUSY:
            self._silent = 0
            return
        if not news:
            return
        self._silent += 1
        if self._silent >= self.pace.connection_failures:
            why = f"{self._endpoint.place} gave no reply {self._silent} times in a row; the last: {reply.reason}"
            self._end(Stop(EndpointDownError, why, f"check that it runs and can be reached, then {AGAIN}"))
            raise self._error()
        if reply.kind is Kind.SILENT:
            self._not_before = max(self._not_before, now + self._backoff.delay(self._silent))

    def _end(self, stop: Stop) -> None:
        self._stop = self._stop or stop
        self._stopped.set()
        self._limit.open()

    def _error(self) -> GenerationStoppedError:
        return self._stop.error(self._spending.answered, str(self.store.path))

    def _wire(self, request: Request, key: str) -> dict[str, Any]:
        """The body that is sent."""
        body = request.canonical(self.model)
        del body["sample"], body["extra"], body["max_tokens"]
        extra = dict(request.extra)
        if request.max_tokens is not None:
            extra[self._limit_field] = request.max_tokens
        if self._send_seed:
            extra.setdefault("seed", int(key[:7], 16))
        return {**body, "extra_body": extra}
