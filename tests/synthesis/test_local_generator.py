"""A model in this process answers as an endpoint does: by the request alone, whatever shares its batch."""

import asyncio
import random
from collections import Counter

import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.synthesis.generators.local import HFGenerator, KeyedSampler
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.generators.requests import Request

WORDS = "apples cost three dollars each and Tom buys nine of them how many are left".split()


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32", device="cpu")


def requests(count: int, **fields) -> list[Request]:
    generator = random.Random(1)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(3, 30))) for _ in range(count)]
    return [Request([{"role": "user", "content": text}], **{"max_tokens": 24, **fields}) for text in texts]


def ask(proxy, path, wanted, **options):
    async def work(store):
        async with HFGenerator(proxy, store, **options) as made:
            return await asyncio.gather(*(made.generate(r) for r in wanted))

    with RequestStore(path) as store:
        return asyncio.run(work(store))


def test_an_answer_depends_on_its_request_and_not_on_its_batch(proxy, tmp_path):
    wanted = requests(7)
    alone = ask(proxy, tmp_path / "1", wanted, batch=1)
    together = ask(proxy, tmp_path / "4", wanted[::-1], batch=4)[::-1]
    assert [a.text for a in alone] == [a.text for a in together]
    assert [a.completion_tokens for a in alone] == [a.completion_tokens for a in together]
    assert len({a.text for a in alone}) == 7
    again = ask(proxy, tmp_path / "4", wanted)
    assert [a.text for a in again] == [a.text for a in alone]
    assert all(a.cached for a in again)


def test_draws_differ_and_greedy_draws_do_not(proxy, tmp_path):
    one = requests(1)[0]
    draws = [Request(one.messages, sample=s, max_tokens=24) for s in range(4)]
    assert len({a.text for a in ask(proxy, tmp_path / "a", draws)}) > 1
    greedy = [Request(one.messages, sample=s, max_tokens=24, temperature=0) for s in range(3)]
    found = ask(proxy, tmp_path / "b", greedy)
    assert len({a.text for a in found}) == 1
    ids = proxy.tokenizer.apply_chat_template(
        list(one.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        plain = proxy.model.generate(**ids, max_new_tokens=24, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
    assert found[0].text == proxy.tokenizer.decode(plain, skip_special_tokens=True)


def test_limits_tokens_and_reasons(proxy, tmp_path):
    short, *long = requests(6)
    wanted = [
        Request(short.messages, max_tokens=2),
        Request(long[0].messages, max_tokens=10**6),
        *(Request(one.messages, max_tokens=600) for one in long),
    ]
    cut, refused, *whole = ask(proxy, tmp_path / "a", wanted, prices=(0.0, 1e6))
    assert cut.reason == "the answer was cut at the token limit"
    assert cut.completion_tokens == 2 == cut.cost
    # Not every answer of so small a model ends by itself.
    ended = [answer.completion_tokens for answer in whole if answer.ok]
    assert ended
    assert all(2 < tokens < 600 for tokens in ended)
    assert refused.status == "refused"
    assert "exceed the model's" in refused.reason
    assert refused.completion_tokens is None


def test_the_models_own_settings_stay_out_and_stay(proxy, tmp_path, monkeypatch):
    wanted = requests(2, temperature=0)
    plain = ask(proxy, tmp_path / "a", wanted)
    monkeypatch.setattr(proxy.model.generation_config, "repetition_penalty", 5.0)
    assert [a.text for a in ask(proxy, tmp_path / "b", wanted)] == [a.text for a in plain]
    assert proxy.model.generation_config.repetition_penalty == 5.0


def test_settings_are_refused_by_name(proxy, tmp_path):
    with RequestStore(tmp_path / "a") as store:
        with pytest.raises(GvendiError, match="batch=0"):
            HFGenerator(proxy, store, batch=0)
        monkey = pytest.MonkeyPatch()
        monkey.setattr(proxy.tokenizer, "chat_template", None)
        with pytest.raises(GvendiError, match="chat template"):
            HFGenerator(proxy, store)
        monkey.undo()
    with pytest.raises(GvendiError, match="extra="):
        ask(proxy, tmp_path / "b", requests(1, extra={"stop": ["x"]}))


def test_the_sampler_draws_from_the_tempered_nucleus():
    scores = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    count = 4000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (1.0, 0.01)):
        request = Request([{"role": "user", "content": "x"}], temperature=temperature, top_p=top_p)
        keys = [Request(request.messages, sample=i).key("m") for i in range(count)]
        sampler = KeyedSampler([request] * count, keys, torch.device("cpu"))
        picked = sampler(None, scores.expand(count, -1)).argmax(-1)
        share = (scores[0].double() / temperature).softmax(-1)
        kept = {1.0: [0, 1, 2, 3], 0.8: [1, 2, 3], 0.01: [1]}[top_p]
        wanted = torch.zeros(4, dtype=torch.double)
        wanted[kept] = share[kept] / share[kept].sum()
        found = Counter(picked.tolist())
        for token in range(4):
            p = float(wanted[token])
            # Four standard deviations of a binomial count; exact where there is no choice.
            assert abs(found[token] - count * p) <= 4 * (count * p * (1 - p)) ** 0.5
        assert set(found) <= set(kept)
