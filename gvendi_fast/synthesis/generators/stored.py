"""What every generator shares: ask the store first, ask once for equal requests, keep the answer before giving it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Protocol

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators.request_store import Record, RequestStore
from gvendi_fast.synthesis.generators.requests import (
    FAILED,
    FINAL,
    OK,
    Answer,
    Request,
    canonical_json,
    read_completion,
)


class Generator(Protocol):
    """Whatever writes text for a prompt."""

    model: str

    async def generate(self, request: Request) -> Answer:
        """The answer, from disk where it is there. Raises GenerationStoppedError when the run is to end."""
        ...


class StoredGenerator(ABC):
    """A generator in front of a request store. To be used from one event loop, as an async context manager.

    `generate` in another loop, of another thread say, raises GvendiError while the first one is open.
    Equal requests that are under way together are sent once. What is under way at the end of the block is waited for
    and kept; if the block is cancelled, it is given up. prices: (prompt, completion) per million tokens.
    """

    model: str

    def __init__(self, model: str, store: RequestStore, prices: tuple[float, float] | None) -> None:
        if prices is not None and (len(prices) != 2 or not min(prices) >= 0):
            raise GvendiError(
                f"prices={prices!r} must be two numbers >= 0: per million prompt and completion tokens"
            )
        self.model, self.store, self.prices = model, store, prices
        self._under_way: dict[str, asyncio.Task] = {}
        # {"loop": the one it is used from}; `setdefault` of a dict is one step.
        self._loop: dict[str, asyncio.AbstractEventLoop] = {}

    async def generate(self, request: Request) -> Answer:
        """The answer to a request; cancelling the wait for it does not cancel the request itself."""
        self._check_loop()
        request = self._complete(request)
        key = request.key(self.model)
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.ensure_future(self._answer(request, key))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._over(key, done))
        return await asyncio.shield(task)

    def _check_loop(self) -> None:
        here = asyncio.get_running_loop()
        if self._loop.setdefault("loop", here) is here:
            return
        if not self._loop["loop"].is_closed():
            raise GvendiError(
                f"this {type(self).__name__} is used from another event loop (of another thread?), and its limits and "
                "requests under way belong to that one; give each loop a generator of its own over one store"
            )
        self._loop["loop"] = here

    async def aclose(self) -> None:
        """Send nothing more, wait for what is under way and free what the generator holds. The store stays open."""
        self._halt()
        while self._under_way:
            await asyncio.wait(list(self._under_way.values()))
        await self._free()

    async def __aenter__(self) -> StoredGenerator:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, (asyncio.CancelledError, KeyboardInterrupt)):
            for task in list(self._under_way.values()):
                task.cancel()
        await self.aclose()

    def cost(self) -> float | None:
        """Price of all counted answers in the store; None without prices."""
        tokens = self.store.tokens()
        return self._price(tokens.prompt, tokens.completion)

    def _complete(self, request: Request) -> Request:
        """The request with what this generator sets where it is left open."""
        return request

    @abstractmethod
    async def _produce(self, request: Request, key: str, written: str) -> Record:
        """Get an answer, keep it and return its row. written: the request's canonical JSON."""

    @abstractmethod
    def _halt(self) -> None:
        """Send nothing more."""

    async def _free(self) -> None:
        """Close connections and the like."""
        return None

    async def _answer(self, request: Request, key: str) -> Answer:
        record = await self.store.get_async(key)
        if record is not None and record.status in FINAL:
            return self._read(record, cached=True)
        return self._read(await self._produce(request, key, canonical_json(request.canonical(self.model))))

    async def _keep(self, key: str, body: str) -> Record:
        """Keep the JSON of an answer, usable or not."""
        found = read_completion(body)
        status = OK if found.reason is None else FAILED
        return await self.store.put_async(
            key, status, body, found.reason, found.prompt_tokens, found.completion_tokens
        )

    def _read(self, record: Record, cached: bool = False) -> Answer:
        text = None if record.answer is None else read_completion(record.answer).text
        prompt, completion = record.prompt_tokens, record.completion_tokens
        cost = self._price(prompt, completion)
        return Answer(
            record.key, text, record.reason, record.status, record.attempts, prompt, completion, cost, cached
        )

    def _price(self, prompt: int | None, completion: int | None) -> float | None:
        if self.prices is None or prompt is None or completion is None:
            return None
        return (prompt * self.prices[0] + completion * self.prices[1]) / 1e6

    def _over(self, key: str, task: asyncio.Task) -> None:
        del self._under_way[key]
        # Whoever waits gets the exception; asking for it here keeps asyncio quiet where nobody waits any more.
        if not task.cancelled():
            task.exception()
