"""A generator belongs to one event loop: another thread's is refused while the first is open."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from hangs import HANG_S

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.generators.requests import Request
from gvendi_fast.synthesis.generators.stored import StoredGenerator

ANSWER = '{"choices": [{"message": {"content": "four"}, "finish_reason": "stop"}]}'


class Fixed(StoredGenerator):
    """Answers everything alike."""

    async def _produce(self, request, key, written):
        await self.store.begin_async(key, written)
        return await self._keep(key, ANSWER)

    def _halt(self):
        pass


def test_another_threads_loop_is_refused_while_the_first_is_open(tmp_path):
    one, other = (Request(({"role": "user", "content": text},)) for text in ("2 + 2", "1 + 3"))
    with RequestStore(tmp_path / "requests.sqlite") as store, ThreadPoolExecutor(1) as pool:
        generator = Fixed("m", store, None)

        async def both():
            first = await generator.generate(one)
            elsewhere = pool.submit(lambda: asyncio.run(generator.generate(other)))
            with pytest.raises(GvendiError, match="used from another event loop"):
                await asyncio.wrap_future(elsewhere)
            return first

        assert asyncio.run(both()).text == "four"
        assert store.counts() == {"ok": 1}
        # That loop is closed now.
        assert pool.submit(lambda: asyncio.run(generator.generate(other))).result(HANG_S).text == "four"
        assert store.counts() == {"ok": 2}
