"""Generators against a server that misbehaves by plan: what is kept, what is sent again, when a run ends."""

import asyncio
import json
import logging
import os
import socket
import time
from collections import Counter
from email.utils import formatdate
from itertools import pairwise

import pytest
from chat_server import TRUNCATED, ChatServer, Fault, completion, content
from children import children
from hangs import wait_for

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators.openai import OpenAIGenerator, Pace
from gvendi_fast.synthesis.generators.pacing import AdaptiveLimit, Backoff, retry_after_seconds
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.generators.requests import Request
from gvendi_fast.synthesis.generators.stops import (
    Budget,
    BudgetSpentError,
    EndpointDownError,
    KeyRefusedError,
)

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")

KEY = "sk-test-5f1e9c07d2aa4b"
FAST = {"first_delay": 0.01, "longest_delay": 0.04}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def store(tmp_path):
    with RequestStore(tmp_path / "requests.sqlite") as opened:
        yield opened


def request(name: object = 0, **fields) -> Request:
    return Request([{"role": "user", "content": f"question {name}"}], **fields)


def echo(messages: list, draw: int) -> str:
    return f"answer to {messages[-1]['content']}, draw {draw}"


def faults(plan: dict):
    return lambda arrival, body: plan.get(arrival)


def run(server, store, requests, pace=None, **options):
    """Answers or exceptions of all requests, asked at once; and the generator."""

    async def work():
        async with OpenAIGenerator(
            server.url, "m", store, pace=Pace(**{**FAST, **(pace or {})}), **options
        ) as made:
            found = await asyncio.gather(*(made.generate(r) for r in requests), return_exceptions=True)
        return found, made

    return asyncio.run(work())


def as_sent(written: str) -> str:
    """The content by which the server counts a request of the store."""
    body = json.loads(written)
    limit = {} if body["max_tokens"] is None else {"max_tokens": body["max_tokens"]}
    body = {**{k: body[k] for k in ("model", "messages", "temperature", "top_p")}, **limit, **body["extra"]}
    return content(body)


def paid(store) -> Counter:
    return Counter(as_sent(record.request) for record in store.rows() if record.status in ("ok", "failed"))


def test_answers_come_and_are_kept(store):
    with ChatServer(echo) as server:
        wanted = [request(i, temperature=0.75, max_tokens=50, extra={"stop": ["x"]}) for i in range(20)]
        found, made = run(server, store, wanted, prices=(1.0, 10.0))
        assert [a.text for a in found] == [f"answer to question {i}, draw 0" for i in range(20)]
        assert all(a.ok and a.attempts == 1 and not a.cached for a in found)
        assert (found[0].prompt_tokens, found[0].completion_tokens) == (7, 6)
        assert found[0].cost == pytest.approx((7 * 1 + 6 * 10) / 1e6)
        assert made.cost() == pytest.approx(20 * found[0].cost)
        sent = server.bodies[0]
        assert (sent["temperature"], sent["max_tokens"], sent["stop"], sent["model"]) == (
            0.75,
            50,
            ["x"],
            "m",
        )
        assert paid(store) == server.served

        again, _ = run(server, store, wanted)
        assert [a.text for a in again] == [a.text for a in found]
        assert all(a.cached for a in again)
        assert server.arrived.total() == 20


def test_draws_of_one_prompt_are_paid_each_and_equal_requests_once(store):
    with ChatServer(echo) as server:
        found, _ = run(server, store, [request(sample=s) for s in (0, 1, 2, 0, 1, 2)])
        assert len({a.key for a in found}) == 3
        assert server.served.total() == 3
        assert paid(store) == server.served
        run(server, store, [request(sample=9)], send_seed=True, limit_field="max_completion_tokens")
        assert server.bodies[-1]["seed"] == int(request(sample=9).key("m")[:7], 16)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(body=TRUNCATED), "not JSON"),
        (Fault(body={"choices": []}), "no choices"),
        (Fault(body={"choices": "all"}), "no choices"),
        (Fault(body=[1, 2]), "JSON list"),
        (Fault(body=completion(None)), "no content"),
        (Fault(body=completion({"a": 1})), "type dict"),
        (Fault(body=completion("half an ans", ended="length")), "token limit"),
        (Fault(body=b"\xff\xfe\x00"), "not JSON"),
        (Fault(body=b""), "not JSON"),
    ],
)
def test_a_malformed_answer_is_kept_as_failed_and_not_asked_again(store, fault, reason):
    with ChatServer(echo, faults({0: fault})) as server:
        (found,), _ = run(server, store, [request()])
        assert reason in found.reason
        assert (found.status, found.attempts, found.ok) == ("failed", 1, False)
        (again,), _ = run(server, store, [request()])
        assert (again.reason, again.cached) == (found.reason, True)
        assert paid(store) == server.served == Counter({as_sent(store.get(found.key).request): 1})


@pytest.mark.parametrize("kind", ["500", "502", "408", "drop before", "drop within", "stall", "trickle"])
def test_failures_on_the_way_are_sent_again(store, kind):
    word, _, rest = kind.partition(" ")
    fault = {
        "drop": Fault(drop=rest),
        "stall": Fault(stall=0.6),
        "trickle": Fault(trickle=1.2),
    }.get(word) or Fault(status=int(word))
    with ChatServer(echo, faults({0: fault, 1: fault})) as server:
        (found,), _ = run(server, store, [request()], {"time_limit": 0.3, "concurrency": 1})
        assert (found.status, found.attempts) == ("ok", 3)
        assert server.arrived.total() == 3
        assert store.counts() == {"ok": 1}


def test_the_time_between_tries_doubles(store):
    with ChatServer(echo, lambda arrival, body: Fault(status=500) if arrival < 4 else None) as server:
        (found,), _ = run(server, store, [request()], {"first_delay": 0.05, "longest_delay": 1.0})
        assert found.attempts == 5
        gaps = [after - before for before, after in pairwise(server.times)]
        # A delay is at least half of the full one.
        assert all(gap >= 0.05 * 2**n / 2 for n, gap in enumerate(gaps))


def test_an_unserved_request_is_asked_again_by_the_next_run(store):
    with ChatServer(echo, lambda arrival, body: Fault(status=500) if arrival < 3 else None) as server:
        (found,), _ = run(server, store, [request()], {"retries": 2})
        assert (found.status, found.attempts, found.text) == ("unserved", 3, None)
        assert "answered 500" in found.reason
        (found,), _ = run(server, store, [request()], {"retries": 2})
        assert (found.status, found.attempts) == ("ok", 4)


def test_a_large_answer_and_a_slow_one_arrive_whole(store):
    with ChatServer(lambda messages, draw: "é" * 500_000, faults({1: Fault(trickle=0.3)})) as server:
        found, _ = run(server, store, [request(0), request(1)])
        assert [a.text for a in found] == ["é" * 500_000] * 2
        assert paid(store) == server.served


@pytest.mark.parametrize("form", ["seconds", "date", "none"])
def test_a_burst_of_429_is_waited_out(store, form):
    def plan(arrival, body):
        # A date has whole seconds, so one in 1 to 2 seconds asks for a wait of at least 1.
        wait = {"seconds": "1", "date": formatdate(time.time() + 2, usegmt=True), "none": None}[form]
        return Fault(status=429, retry_after=wait) if arrival < 4 else None

    with ChatServer(echo, plan) as server:
        found, made = run(server, store, [request(i) for i in range(8)], {"concurrency": 4, "retries": 0})
        assert all(a.ok for a in found)
        assert server.served.total() == 8
        assert server.rejected.total() == 4
        gap = server.times[4] - server.times[3]
        assert gap >= 0.85 or form == "none"
        # One burst halves once, from 4; eight successes add up to two steps again.
        assert 2 <= made.concurrency <= 4


def test_the_limit_holds_at_the_server_falls_and_recovers(store):
    def plan(arrival, body):
        return Fault(status=503, stall=0.01) if 20 <= arrival < 24 else Fault(stall=0.01)

    seen = []

    async def work(server):
        pace = Pace(concurrency=4, max_concurrency=6, **FAST)
        async with OpenAIGenerator(server.url, "m", store, pace=pace) as made:

            async def ask(i):
                await made.generate(request(i))
                seen.append(made.concurrency)

            await asyncio.gather(*(ask(i) for i in range(120)))

    with ChatServer(echo, plan) as server:
        asyncio.run(work(server))
        assert server.most_under_way <= 6
        assert server.served.total() == 120
    peak = max(seen[:24])
    assert min(seen[12:60]) <= (peak + 1) // 2
    assert seen[-1] == 6


def test_adaptive_limit_step_by_step():
    async def work():
        limit = AdaptiveLimit(8, 9)
        rounds = [await limit.acquire() for _ in range(8)]
        waiting = asyncio.ensure_future(limit.acquire())
        await asyncio.sleep(0)
        assert not waiting.done()
        assert [limit.overloaded(r) for r in rounds] == [True] + [False] * 7
        assert limit.limit == 4
        for _ in range(5):
            limit.release()
        await asyncio.sleep(0)
        assert waiting.done()
        assert limit.under_way == 4
        steps = []
        for _ in range(4 + 5 + 6 + 7 + 8 + 9):
            limit.succeeded()
            steps.append(limit.limit)
        assert [steps.index(n) + 1 for n in (5, 6, 7, 8, 9)] == [4, 9, 15, 22, 30]
        assert limit.limit == 9
        for _ in range(6):
            limit.overloaded(limit._round)
        assert limit.limit == 1
        given = asyncio.ensure_future(limit.acquire())
        await asyncio.sleep(0)
        given.cancel()
        await asyncio.gather(given, return_exceptions=True)
        for _ in range(4):
            limit.release()
        assert limit.under_way == 0
        assert await limit.acquire() == limit._round

    asyncio.run(work())
    with pytest.raises(GvendiError, match="concurrency=3"):
        AdaptiveLimit(3, 2)


def test_backoff_doubles_is_capped_and_repeats():
    one, two = (Backoff(0.5, 8, seed=3) for _ in range(2))
    delays = [one.delay(n) for n in range(1, 9)]
    assert delays == [two.delay(n) for n in range(1, 9)]
    for n, delay in enumerate(delays):
        whole = min(0.5 * 2**n, 8)
        assert whole / 2 <= delay <= whole
    assert one.delay(10_000) <= 8


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 0.5 ", 0.5),
        ("soon", None),
        ("-3", None),
        ("1e9", None),
        ("²", None),
        ("9" * 400, None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 -0000", 90.0),
        ("Thu, 99 Jan 1970 00:00:01 GMT", None),
    ],
)
def test_retry_after_in_both_forms(value, seconds):
    assert retry_after_seconds(value, now=10.0) == seconds


def test_a_request_too_large_for_the_rate_limit_is_given_up_while_others_are_served(store):
    def plan(arrival, body):
        return Fault(status=429) if "large" in body["messages"][0]["content"] else Fault(stall=0.02)

    async def work(server):
        async with OpenAIGenerator(server.url, "m", store, pace=Pace(patience=0.4, **FAST)) as made:
            large = asyncio.ensure_future(made.generate(request("large")))
            count = 0
            while not large.done():
                assert (await made.generate(request(count))).ok
                count += 1
            return large.result()

    with ChatServer(echo, plan) as server:
        found = asyncio.run(work(server))
        assert found.status == "unserved"
        assert "answered 429" in found.reason
        assert found.attempts == server.rejected.total() > 2


def test_refused_requests_of_an_earlier_run_do_not_end_the_next(store):
    def plan(arrival, body):
        return Fault(status=400) if "bad" in body["messages"][0]["content"] else None

    wanted = [request(0), *(request(f"bad {i}") for i in range(12)), request(1)]
    with ChatServer(echo, plan) as server:
        for cached in (0, 2):
            found, _ = run(server, store, wanted, {"concurrency": 1, "max_concurrency": 1})
            assert [a.status for a in found] == ["ok", *["refused"] * 12, "ok"]
            assert sum(a.cached for a in found) == cached


def test_a_wait_beyond_patience_ends_the_run(store):
    with ChatServer(echo, lambda arrival, body: Fault(status=429, retry_after="86400")) as server:
        found, _ = run(server, store, [request(0), request(1)])
        assert all(isinstance(e, EndpointDownError) for e in found)
        assert "asks to wait 86400 s" in str(found[0])


def test_an_endpoint_that_only_refuses_work_ends_the_run_by_patience(store):
    with ChatServer(echo, lambda arrival, body: Fault(status=503)) as server:
        found, _ = run(server, store, [request(i) for i in range(6)], {"patience": 0.4})
        assert all(isinstance(e, EndpointDownError) for e in found)
        assert "has served nothing" in str(found[0])


def test_no_endpoint_ends_the_run_after_n_failures(store):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"

        class Nobody:
            pass

        Nobody.url = url
        found, made = run(Nobody, store, [request(i) for i in range(30)], {"connection_failures": 3})
    assert all(isinstance(e, EndpointDownError) for e in found)
    text = str(found[0])
    assert "no reply 3 times in a row" in text
    assert "0 answers are kept in" in text
    assert "requests.sqlite" in text
    assert sum(record.attempts for record in store.rows()) <= 3 * made.pace.concurrency


def test_a_pause_of_the_endpoint_is_survived(store):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]

    async def work():
        pace = Pace(first_delay=0.1, longest_delay=0.2, connection_failures=10_000, retries=0)
        async with OpenAIGenerator(f"http://127.0.0.1:{port}/v1", "m", store, pace=pace) as made:
            asked = asyncio.gather(*(made.generate(request(i)) for i in range(5)))
            await asyncio.sleep(0.3)
            assert not asked.done()
            with ChatServer(echo, port=port):
                return await asked

    assert all(a.ok for a in asyncio.run(work()))


def test_silence_within_the_time_limit_ends_the_run_too(store):
    with ChatServer(echo, lambda arrival, body: Fault(stall=1.0)) as server:
        found, _ = run(server, store, [request()], {"time_limit": 0.1, "connection_failures": 3})
        assert isinstance(found[0], EndpointDownError)


@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [
        (Fault(status=401, body={"error": {"message": f"bad key {KEY}"}}), KeyRefusedError, "OPENAI_API_KEY"),
        (Fault(status=403), KeyRefusedError, "OPENAI_API_KEY"),
        (Fault(status=402), KeyRefusedError, "credit"),
        (Fault(status=429, body={"error": {"code": "insufficient_quota"}}), KeyRefusedError, "credit"),
        (Fault(status=404), EndpointDownError, "name of the model"),
    ],
)
def test_what_cannot_get_better_ends_the_run_at_once(store, fault, kind, what):
    with ChatServer(echo, lambda arrival, body: fault if arrival else None) as server:
        alone = {"concurrency": 1, "max_concurrency": 1}
        found, _ = run(server, store, [request(i) for i in range(20)], alone)
        assert found[0].ok
        assert all(isinstance(e, kind) for e in found[1:])
        assert what in str(found[1])
        assert "1 answers are kept" in str(found[1])
        assert server.arrived.total() == 2
        assert all(KEY not in str(e) + repr(e) for e in found)


def test_a_refused_request_is_its_own_but_many_at_the_start_end_the_run(store):
    refusal = Fault(status=400, body={"error": {"message": "too long"}})
    with ChatServer(echo, lambda arrival, body: refusal) as server:
        found, _ = run(server, store, [request(f"b{i}") for i in range(40)], {"connection_failures": 5})
        assert isinstance(found[-1], EndpointDownError)
        assert "too long" in str(found[-1])
        assert server.arrived.total() <= 5 + 8
    with ChatServer(echo, faults({1: refusal})) as server:
        alone = {"concurrency": 1, "max_concurrency": 1}
        found, _ = run(server, store, [request(i) for i in range(4)], alone)
        assert [a.status for a in found] == ["ok", "refused", "ok", "ok"]
        assert "too long" in found[1].reason
        assert server.arrived.total() == 4


def test_budget_of_requests_counts_all_runs(store):
    with ChatServer(echo) as server:
        for limit, cached in ((7, 0), (7, 7), (12, 7)):
            found, _ = run(server, store, [request(i) for i in range(30)], budget=Budget(requests=limit))
            answers = [a for a in found if not isinstance(a, Exception)]
            assert len(answers) == limit == server.served.total()
            assert sum(a.cached for a in answers) == cached
            stopped = [e for e in found if isinstance(e, BudgetSpentError)]
            assert len(stopped) == 30 - limit
            assert f"budget of requests is spent ({limit} answers, those under way included)" in str(
                stopped[0]
            )
        assert paid(store) == server.served


def test_budget_of_tokens_and_of_seconds(store):
    with ChatServer(echo) as server:
        found, _ = run(
            server, store, [request(i) for i in range(30)], {"concurrency": 1}, budget=Budget(tokens=50)
        )
        # 13 tokens each: the fourth answer passes 50 and the fifth is not asked for, save for what grows under way.
        tokens = store.tokens()
        assert 50 <= tokens.prompt + tokens.completion <= 50 + 13 * 3
        assert "budget of tokens is spent" in str(found[-1])
    # On a busy machine the first answer may come after the shorter ones.
    for seconds in (0.35, 3.5, 35.0):
        with ChatServer(echo, lambda arrival, body, stall=seconds / 3.5: Fault(stall=stall)) as server:
            wanted = [request(f"s{seconds}-{i}") for i in range(30)]
            found, _ = run(
                server,
                store,
                wanted,
                {"concurrency": 1, "max_concurrency": 1},
                budget=Budget(seconds=seconds),
            )
        answered = sum(not isinstance(a, Exception) for a in found)
        assert answered <= 5
        assert f"budget of seconds is spent ({seconds:g} seconds)" in str(found[-1])
        assert paid(store).total() == store.counts()["ok"]
        if answered:
            break
    assert answered


def test_a_wait_ends_with_the_budget_of_seconds(store):
    with ChatServer(echo, lambda arrival, body: Fault(status=429, retry_after="599")) as server:
        began = time.monotonic()
        found, _ = run(server, store, [request(0), request(1)], budget=Budget(seconds=0.2))
        assert time.monotonic() - began < 599
        assert all(isinstance(e, BudgetSpentError) for e in found)


def test_a_budget_of_tokens_needs_an_endpoint_that_counts(store):
    with ChatServer(echo, lambda arrival, body: Fault(usage=False)) as server:
        found, made = run(
            server, store, [request(i) for i in range(5)], {"concurrency": 1}, budget=Budget(tokens=50)
        )
        assert found[0].ok
        assert found[0].prompt_tokens is None
        assert isinstance(found[-1], BudgetSpentError)
        assert "does not count tokens" in str(found[-1])
        assert made.cost() is None


def test_a_damaged_answer_does_not_end_a_budget_of_tokens(store):
    with ChatServer(echo, faults({0: Fault(body=TRUNCATED)})) as server:
        wanted = [request(i) for i in range(3)]
        found, _ = run(
            server, store, wanted, {"concurrency": 1, "max_concurrency": 1}, budget=Budget(tokens=50)
        )
        assert [a.status for a in found] == ["failed", "ok", "ok"]


def test_what_is_under_way_when_the_block_ends_is_kept(store):
    async def work(server):
        async with OpenAIGenerator(
            server.url, "m", store, pace=Pace(concurrency=2, max_concurrency=2)
        ) as made:
            asked = [asyncio.ensure_future(made.generate(request(i))) for i in range(6)]
            while server.under_way < 2:
                await asyncio.sleep(0.01)
        return await asyncio.gather(*asked, return_exceptions=True)

    with ChatServer(echo, lambda arrival, body: Fault(stall=1.0)) as server:
        found = asyncio.run(work(server))
        assert sum(not isinstance(a, Exception) for a in found) == server.served.total() == 2
        assert "was closed" in str(found[-1])
        assert paid(store) == server.served


def test_the_key_is_in_the_header_and_nowhere_else(store, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    echoed = f"your key is {KEY}"
    plan = faults(
        {0: Fault(status=500, body={"error": {"message": echoed}}), 2: Fault(status=400, body=[echoed])}
    )
    with ChatServer(lambda messages, draw: echoed, plan) as server:
        found, made = run(server, store, [request(i) for i in range(4)], {"concurrency": 1, "retries": 0})
        assert server.keys == [f"Bearer {KEY}"] * len(server.keys)
    assert [a.status for a in found] == ["unserved", "ok", "refused", "ok"]
    assert found[1].text == "your key is [API key]"
    store.close()
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    assert KEY not in repr(found) + repr(made) + str(vars(made)) + str(vars(made._endpoint._client).keys())
    assert KEY not in caplog.text


def test_keys_and_addresses_are_checked_without_showing_them(store, monkeypatch):
    def make(url="http://127.0.0.1:1/v1", **options):
        return OpenAIGenerator(url, "m", store, **options)

    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nmore")
    with pytest.raises(GvendiError, match="white space") as raised:
        make()
    assert KEY not in str(raised.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(GvendiError, match="OPENAI_API_KEY holds no API key"):
        make()
    with pytest.raises(GvendiError, match="MY_KEY holds no API key"):
        make(key_variable="MY_KEY")
    make(key_variable=None)
    for url in ("localhost:8000", "ftp://a/b", "http://", "http://a:b/v1", "http://[a/v1"):
        with pytest.raises(GvendiError, match="base_url"):
            make(url, key_variable=None)
    with pytest.raises(GvendiError, match="user name") as raised:
        make("http://me:hunter2@host/v1", key_variable=None)
    assert "hunter2" not in str(raised.value)
    for wrong in ({"retries": -1}, {"patience": 0}, {"time_limit": float("nan")}):
        with pytest.raises(GvendiError, match="Pace"):
            Pace(**wrong)
    with pytest.raises(GvendiError, match="Budget tokens=0"):
        Budget(tokens=0)
    with pytest.raises(GvendiError, match="prices"):
        make(key_variable=None, prices=(1.0,))


COUNT = 60


def ask_all(url: str, path: str, pipe) -> None:
    os.environ["OPENAI_API_KEY"] = KEY
    os.environ["NO_PROXY"] = "127.0.0.1"

    async def work(store):
        pace = Pace(concurrency=4, max_concurrency=4, **FAST)
        async with OpenAIGenerator(url, "m", store, pace=pace) as made:

            async def ask(i):
                answer = await made.generate(request(i % 40, sample=i // 40))
                if not answer.cached:
                    pipe.send(i)

            await asyncio.gather(*(ask(i) for i in range(COUNT)))

    with RequestStore(path) as store:
        asyncio.run(work(store))


@pytest.fixture(scope="module")
def child():
    context = children()

    def start(url, path):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=ask_all, args=(url, str(path), theirs))
        process.start()
        theirs.close()
        return process, ours

    return start


@pytest.mark.parametrize(
    "moments", [(9, 30), pytest.param((1, 9, 17, 30, 41), marks=pytest.mark.soak)], ids=len
)
def test_killed_in_full_flight_every_request_is_answered_once(moments, tmp_path, child):
    with ChatServer(echo, lambda arrival, body: Fault(stall=0.02)) as server:
        path = tmp_path / "r.sqlite"
        for moment in moments:
            process, _ = child(server.url, path)
            wait_for(lambda moment=moment: server.served.total() >= moment, f"{moment} answers")
            assert process.exitcode is None
            process.kill()
            process.join()
        process, _ = child(server.url, path)
        process.join()
        assert process.exitcode == 0
        with RequestStore(path) as store:
            assert store.counts() == {"ok": COUNT}
            attempts = Counter()
            for record in store.rows():
                attempts[as_sent(record.request)] += record.attempts
            # A reply that a killed client had not yet committed is paid again; each kill can lose those under way.
            assert not paid(store) - server.served
            assert (server.served - paid(store)).total() <= 4 * len(moments)
            # Tries are noted before they are sent, so the file explains every request that the server has seen.
            assert not server.arrived - attempts
            assert (attempts - server.arrived).total() <= 4 * len(moments)


def test_killed_between_answers_nothing_is_paid_twice(tmp_path, child):
    with ChatServer(echo) as server:
        path = tmp_path / "r.sqlite"
        for more in (3, 1, 10, 4, 20):
            server.hold_after(more)
            process, answers = child(server.url, path)
            for _ in range(more):
                answers.recv()
            # As many as the server lets through have been handed on, and four more wait at its gate.
            wait_for(lambda: server.under_way == 4, "four requests at the gate")
            process.kill()
            process.join()
            server.let_go()
            wait_for(lambda: server.under_way == 0, "the requests under way")
        process, _ = child(server.url, path)
        process.join()
        assert process.exitcode == 0
        with RequestStore(path) as store:
            assert store.counts() == {"ok": COUNT}
            assert paid(store) == server.served
