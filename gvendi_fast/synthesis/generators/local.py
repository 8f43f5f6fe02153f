"""Answers from a Hugging Face model in this process.

Each token is drawn by inverting the cumulative distribution at one uniform number, and each request has a stream of
such numbers of its own, seeded by its key. So an answer depends on the request and not on what shares its batch, save
where two sums of probabilities differ by less than the rounding of the logits.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.proxy.chat import ChatTemplate
from gvendi_fast.sketching.proxy.load import Proxy, load_proxy
from gvendi_fast.synthesis.generators.request_store import Record, RequestStore
from gvendi_fast.synthesis.generators.requests import FINAL, REFUSED, Request
from gvendi_fast.synthesis.generators.stops import GenerationStoppedError, Stop
from gvendi_fast.synthesis.generators.stored import StoredGenerator

# Requests that are asked for one after the other reach the first batch within this many seconds.
_GATHER = 0.01


class HFGenerator(StoredGenerator):
    """A causal language model run by transformers, in batches, on a thread beside the event loop.

    proxy: a loaded one, or what `load_proxy` takes. batch: most requests of one batch. max_tokens: limit of an answer
    where the request sets none. Requests with `extra` are refused with GvendiError: its fields belong to endpoints.
    Of the model's generation settings only its end tokens apply; temperature and top_p are the request's.
    """

    def __init__(
        self,
        proxy: Proxy | str | os.PathLike,
        store: RequestStore,
        *,
        batch: int = 8,
        max_tokens: int = 512,
        prices: tuple[float, float] | None = None,
    ) -> None:
        if batch < 1 or max_tokens < 1:
            raise GvendiError(f"batch={batch!r} and max_tokens={max_tokens!r} must both be at least 1")
        self._proxy = proxy if isinstance(proxy, Proxy) else load_proxy(proxy)
        tokenizer = self._proxy.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise GvendiError(
                f"The model {self._proxy.name!r} has no chat template and cannot be asked; give an instruct model"
            )
        super().__init__(self._proxy.identity, store, prices)
        self.batch, self.max_tokens = batch, max_tokens
        self._template = ChatTemplate(tokenizer, self._proxy.name, "completion")
        self._ends = _end_tokens(self._proxy)
        self._waiting: list[tuple[Request, str, torch.Tensor, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None
        self._halted = False

    def _complete(self, request: Request) -> Request:
        if request.extra:
            raise GvendiError(
                f"extra={dict(request.extra)!r} cannot be used with a local model; leave it out"
            )
        return replace(request, max_tokens=request.max_tokens or self.max_tokens)

    def _halt(self) -> None:
        self._halted = True
        for *_, future in self._waiting:
            if not future.done():
                future.set_exception(self._closed())
        self._waiting.clear()

    def _closed(self) -> GenerationStoppedError:
        counts = self.store.counts()
        stop = Stop(GenerationStoppedError, "The generator was closed", "run the same again to go on")
        return stop.error(sum(counts.get(status, 0) for status in FINAL), str(self.store.path))

    async def _free(self) -> None:
        if self._worker is not None:
            await asyncio.wait({self._worker})

    async def _produce(self, request: Request, key: str, written: str) -> Record:
        if self._halted:
            raise self._closed()
        await self.store.begin_async(key, written)
        prompt = self._prompt(request)
        if isinstance(prompt, str):
            return await self.store.put_async(key, REFUSED, None, prompt, None, None)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, key, prompt, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        return await self._keep(key, await future)

    async def _work(self) -> None:
        await asyncio.sleep(_GATHER)
        while self._waiting:
            batch = self._next_batch()
            requests, keys, prompts, _ = zip(*batch, strict=True)
            job = asyncio.get_running_loop().run_in_executor(None, self._write, requests, keys, prompts)
            await asyncio.wait({job})
            for index, (*_, future) in enumerate(batch):
                if future.done():
                    continue
                if job.exception() is not None:
                    future.set_exception(job.exception())
                else:
                    future.set_result(job.result()[index])

    def _next_batch(self) -> list[tuple[Request, str, torch.Tensor, asyncio.Future]]:
        """The request that waits longest, and those after it that share its limit of tokens."""
        limit = self._waiting[0][0].max_tokens
        batch = [entry for entry in self._waiting if entry[0].max_tokens == limit][: self.batch]
        taken = {id(entry) for entry in batch}
        self._waiting = [entry for entry in self._waiting if id(entry) not in taken]
        return batch

    def _prompt(self, request: Request) -> torch.Tensor | str:
        """Token ids [T] that the answer is to follow, or why there are none."""
        from jinja2.exceptions import TemplateError

        try:
            text = self._template.prompt([dict(message) for message in request.messages])
        except TemplateError as error:
            return f"the chat template refused the messages: {str(error)[:120]}"
        ids = self._proxy.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        room = getattr(self._proxy.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(ids) + request.max_tokens > room:
            return f"{len(ids)} prompt tokens and max_tokens={request.max_tokens} exceed the model's {room} positions"
        return ids

    @torch.no_grad()
    def _write(
        self, requests: Sequence[Request], keys: Sequence[str], prompts: Sequence[torch.Tensor]
    ) -> list[str]:
        """One chat completion as JSON per request; all share max_tokens."""
        from transformers import GenerationConfig

        model, tokenizer = self._proxy.model, self._proxy.tokenizer
        pad = self._ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        settings = GenerationConfig(
            max_new_tokens=requests[0].max_tokens, do_sample=False, eos_token_id=self._ends, pad_token_id=pad
        )
        device = self._proxy.device
        # generate fills what the settings leave open from the model's own, such as a repetition penalty.
        own, model.generation_config = model.generation_config, settings
        try:
            out = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=[KeyedSampler(requests, keys, device)],
            )
        finally:
            model.generation_config = own
        written = out[:, longest:].tolist()
        return [
            self._completion(tokens, len(prompt)) for tokens, prompt in zip(written, prompts, strict=True)
        ]

    def _completion(self, tokens: list[int], prompt_tokens: int) -> str:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        count = len(tokens) if end is None else end + 1
        choice = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": self._proxy.tokenizer.decode(tokens[:count], skip_special_tokens=True),
            },
            "finish_reason": "length" if end is None else "stop",
        }
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
        return json.dumps(
            {"object": "chat.completion", "model": self.model, "choices": [choice], "usage": usage}
        )


class KeyedSampler:
    """A logits processor that leaves each row the one token its request's random numbers choose.

    requests, keys: one per row; temperature 0 takes the most likely token. scores [B, V] as transformers gives them.
    """

    def __init__(self, requests: Sequence[Request], keys: Sequence[str], device: torch.device) -> None:
        # MPS has no fp64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        # Python promises the same numbers for the same seed in every release.
        self._streams = [random.Random(int(key, 16)) for key in keys]
        self._temperature = self._column([request.temperature for request in requests], device)
        self._top_p = self._column([request.top_p for request in requests], device)

    def _column(self, values: list[float], device: torch.device) -> torch.Tensor:
        return torch.tensor(values, dtype=self._dtype, device=device)[:, None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = self._column([stream.random() for stream in self._streams], scores.device)
        scaled = scores.to(self._dtype) / torch.where(self._temperature > 0, self._temperature, 1.0)
        share, token = torch.sort(scaled.softmax(-1), dim=-1, descending=True, stable=True)
        before = share.cumsum(-1) - share
        # The nucleus: as many of the most likely tokens as reach top_p together, never none.
        share = torch.where(before < self._top_p, share, 0.0)
        share[:, 1:] *= (self._temperature > 0).to(self._dtype)
        total = share.cumsum(-1)
        place = (total <= uniform * total[:, -1:]).sum(-1, keepdim=True)
        # Rounding may put the number on the last sum itself; the last token with a share is meant.
        place = torch.minimum(place, (share > 0).sum(-1, keepdim=True) - 1)
        chosen = token.gather(1, place)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _end_tokens(proxy: Proxy) -> list[int]:
    ends: Any = getattr(proxy.model.generation_config, "eos_token_id", None)
    ends = proxy.tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise GvendiError(f"The model {proxy.name!r} names no end token, so its answers would never end")
    return list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
