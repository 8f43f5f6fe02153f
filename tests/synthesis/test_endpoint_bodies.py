"""Bodies of an endpoint: however long, packed or malformed, they are read up to a bound and asked for once."""

import asyncio
import gzip
import json
import threading
import tracemalloc
import zlib
from functools import lru_cache

import pytest
from chat_server import ChatServer, Fault, completion

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators.openai import OpenAIGenerator, Pace
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.generators.requests import Request, read_completion
from gvendi_fast.synthesis.generators.stops import EndpointDownError

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback")

MB = 1 << 20
FAST = {"first_delay": 0.01, "longest_delay": 0.02, "retries": 1, "time_limit": 60, "connection_failures": 3}


def ask(server, store, wanted=1, answer_mb=1, **pace):
    """Answers or exceptions of so many requests, one at a time."""

    async def work():
        pace_ = Pace(**{**FAST, "concurrency": 1, "max_concurrency": 1, **pace})
        async with OpenAIGenerator(
            server.url, "m", store, pace=pace_, key_variable=None, answer_mb=answer_mb
        ) as made:
            asked = (made.generate(Request([{"role": "user", "content": f"q{i}"}])) for i in range(wanted))
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(work())


def head(*lines: str) -> bytes:
    first = ("HTTP/1.1 200 OK", "Content-Type: application/json", *lines)
    return "\r\n".join(first).encode() + b"\r\n\r\n"


def chunked_without_end(connection):
    connection.sendall(head("Transfer-Encoding: chunked"))
    for _ in range(1000):
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def chunks_of_one_byte(connection):
    connection.sendall(head("Transfer-Encoding: chunked"))
    for _ in range(400):
        connection.sendall(b"1\r\n \r\n" * 8192)


def without_a_length(connection):
    connection.sendall(head("Connection: close"))
    for _ in range(1000):
        connection.sendall(b" " * 65536)


def declared_long(connection):
    connection.sendall(head(f"Content-Length: {2 * MB}") + b"{}")


def declared_longer_than_a_number(connection):
    connection.sendall(head("Content-Length: 99999999999999999999") + b"{}")


@lru_cache
def bomb(packing: str) -> bytes:
    return {"gzip": gzip.compress, "deflate": zlib.compress}[packing](b" " * (200 * MB), 1)


def unpacks_to_200_mb(packing):
    def send(connection):
        raw = bomb(packing)
        connection.sendall(head(f"Content-Encoding: {packing}", f"Content-Length: {len(raw)}") + raw)

    return send


LONG = "the answer was not read: it is longer than 1 MB"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(raw=chunked_without_end), LONG),
        (Fault(raw=without_a_length), LONG),
        (Fault(raw=declared_long), LONG),
        (Fault(raw=declared_longer_than_a_number), LONG),
        (Fault(raw=unpacks_to_200_mb("gzip")), LONG),
        (Fault(raw=unpacks_to_200_mb("deflate")), LONG),
        (Fault(body=completion("x" * MB)), LONG),
        (Fault(body=b"{}", headers=("Content-Encoding: gzip",)), "it cannot be unpacked"),
        (Fault(body=b"{}", headers=("Content-Encoding: br",)), "content-encoding is br"),
        (Fault(body=b"{}", headers=("Content-Encoding: zstd",)), "content-encoding is zstd"),
        (Fault(body=b"{}", headers=("Content-Encoding: gzip, gzip",)), "content-encoding is gzip, gzip"),
    ],
    ids=lambda value: getattr(getattr(value, "raw", None), "__name__", None),
)
def test_a_body_that_is_too_long_is_refused_once_and_for_all(fault, reason, tmp_path):
    # Made before memory is looked at.
    bomb("gzip"), bomb("deflate")
    with (
        RequestStore(tmp_path / "r.sqlite") as store,
        ChatServer(lambda messages, draw: "good", lambda arrival, body: None if arrival else fault) as server,
    ):
        tracemalloc.start()
        found = ask(server, store, 2)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (found[0].status, found[0].text) == ("failed", None)
        assert reason in found[0].reason
        # The sender's pieces and the client's modules among it.
        assert most < 24 * MB
        assert found[1].text == "good"
        again = ask(server, store, 2)
        assert [(a.status, a.cached, a.reason) for a in again] == [
            ("failed", True, found[0].reason),
            ("ok", True, None),
        ]
        assert server.arrived.total() == 2


@pytest.mark.soak
def test_a_body_in_a_million_chunks_is_bounded_in_memory(tmp_path):
    with (
        RequestStore(tmp_path / "r.sqlite") as store,
        ChatServer(lambda messages, draw: "", lambda arrival, body: Fault(raw=chunks_of_one_byte)) as server,
    ):
        assert ask(server, store, time_limit=120.0)[0].reason == LONG


def test_packed_answers_of_an_ordinary_size_are_read(tmp_path):
    raw = json.dumps(completion("grüße")).encode()
    packed = {
        "gzip": gzip.compress(raw),
        "x-gzip": gzip.compress(raw),
        "deflate": zlib.compress(raw),
        "identity": raw,
        "": raw,
    }
    names = list(packed)

    def plan(arrival, body):
        return Fault(body=packed[names[arrival]], headers=(f"Content-Encoding: {names[arrival]}",))

    with RequestStore(tmp_path / "r.sqlite") as store, ChatServer(lambda m, d: "", plan) as server:
        assert [answer.text for answer in ask(server, store, len(names))] == ["grüße"] * len(names)
        assert {head["Accept-Encoding"] for head in server.heads} == {"gzip, deflate"}


def endless_headers(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(20_000):
        connection.sendall(f"X-{number}: {'y' * 100}\r\n".encode())


def one_endless_header(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(100):
        connection.sendall(b"y" * 65536)


def endless_continues(connection):
    for _ in range(10_000):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


def trickles(connection):
    connection.sendall(head("Content-Length: 1000"))
    for _ in range(1000):
        connection.sendall(b" ")
        trickled.wait(0.01)


trickled = threading.Event()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (endless_headers, "RemoteProtocolError"),
        (one_endless_header, "RemoteProtocolError"),
        (endless_continues, "no reply within 0.3 s"),
        (trickles, "no reply within 0.3 s"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"), "RemoteProtocolError"),
        (lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"), "RemoteProtocolError"),
        (
            lambda c: c.sendall(head("Transfer-Encoding: chunked") + b"ffffffffffffffffffffff\r\n{}"),
            "RemoteProtocolError",
        ),
    ],
)
def test_a_reply_that_is_no_answer_is_tried_again_and_ends(raw, reason, tmp_path):
    with (
        RequestStore(tmp_path / "r.sqlite") as store,
        ChatServer(lambda messages, draw: "", lambda arrival, body: Fault(raw=raw)) as server,
    ):
        # What is no HTTP is refused by itself, however slow the machine is.
        (found,) = ask(server, store, time_limit=0.3 if "0.3 s" in reason else 60)
        assert found.status == "unserved"
        assert reason in found.reason
        assert server.arrived.total() == 2


@pytest.mark.parametrize("status", [400, 404, 429, 500, 401, 302])
def test_a_long_body_of_an_error_is_not_read_either(status, tmp_path):
    fault = Fault(status=status, body=b"x" * (4 * MB))
    with (
        RequestStore(tmp_path / "r.sqlite") as store,
        ChatServer(lambda messages, draw: "", lambda arrival, body: fault) as server,
    ):
        (found,) = ask(server, store, answer_mb=16, patience=0.2)
        told = str(found) if isinstance(found, Exception) else found.reason
        assert f"answered {status} (of its body: it is longer than 1 MB)" in told


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"error": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
        b'{"error": ' + b"9" * 100_000 + b"}",
        b'{"error": {"code": ["insufficient_quota"], "message": {"a": 1}, "type": 3, "param": []}}',
        b'{"error": NaN}',
        b"\xff\xfe\x00",
        b"null",
        b"",
    ],
)
@pytest.mark.parametrize("status", [400, 500])
def test_an_error_body_of_any_shape_is_a_reason(status, body, tmp_path):
    fault = Fault(status=status, body=body)
    with (
        RequestStore(tmp_path / "r.sqlite") as store,
        ChatServer(lambda messages, draw: "", lambda arrival, body: fault) as server,
    ):
        (found,) = ask(server, store)
        assert found.status == {400: "refused", 500: "unserved"}[status]
        assert found.reason.startswith(f"answered {status}")
        assert len(found.reason) < 300


CONTENT = b'{"choices": [{"message": {"content": %s}}], "usage": %s}'


@pytest.mark.parametrize(
    ("raw", "text", "reason"),
    [
        (b"[" * 100_000, None, "not JSON (RecursionError)"),
        (b'{"choices": ' + b"9" * 1_000_000 + b"}", None, "not JSON (ValueError)"),
        (b'{"a": -' + b"9" * 4000 + b', "choices": [{"message": {"content": "a"}}]}', "a", None),
        (b"NaN", None, "a JSON float, not an object"),
        (b'"text"', None, "a JSON str, not an object"),
        (b"{}" * 2, None, "not JSON"),
        (b'{"choices": [' + b"{}," * 999_999 + b"{}]}", None, "no message"),
        (b'{"choices": [null]}', None, "no message"),
        (b'{"choices": [[]]}', None, "no message"),
        (b'{"choices": [{"message": "text"}]}', None, "no message"),
        (
            b'{"choices": [{"message": {}, "finish_reason": ' + b"[" * 900 + b"]" * 900 + b"}]}",
            None,
            "no content",
        ),
        (CONTENT % (b"null", b"{}"), None, "no content"),
        (CONTENT % (b"1e999", b"{}"), None, "type float"),
        (CONTENT % (b'"\\ud83d"', b"{}"), None, "half a surrogate pair"),
        (CONTENT % (b'"\\u0000"', b"{}"), "\0", None),
        (CONTENT % (b'"' + b" " * 10_000_000 + b'"', b"{}"), " " * 10_000_000, "the content is empty"),
        (CONTENT % (b'"\\u2028]]>"', b'"no"'), "\u2028]]>", None),
        (CONTENT % (b'"a"', b'{"prompt_tokens": -1, "completion_tokens": "7"}'), "a", None),
        (CONTENT % (b'"a"', b'{"prompt_tokens": true, "completion_tokens": 1e3}'), "a", None),
        (CONTENT % (b'"a"', b'{"prompt_tokens": 1' + b"0" * 30 + b', "completion_tokens": NaN}'), "a", None),
    ],
)
def test_a_completion_of_any_shape_is_a_text_or_a_reason(raw, text, reason, tmp_path):
    with (
        RequestStore(tmp_path / "r.sqlite") as store,
        ChatServer(lambda messages, draw: "", lambda arrival, body: Fault(body=raw)) as server,
    ):
        (found,) = ask(server, store, answer_mb=16)
        assert found.text == text
        assert reason is None if found.reason is None else reason in found.reason
        assert (found.prompt_tokens, found.completion_tokens) == (None, None)
        (again,) = ask(server, store)
        assert (again.text, again.reason, again.cached) == (found.text, found.reason, True)
        assert server.arrived.total() == 1


def test_no_number_of_an_answer_is_read_beyond_what_a_count_can_be():
    counts = '{"choices": [], "usage": {"prompt_tokens": %s, "completion_tokens": 2}}'
    assert read_completion(counts % 9007199254740991).prompt_tokens == 2**53 - 1
    for number in ("9007199254740992", "9" * 19, "9" * 20, "9" * 5000, "-1"):
        assert read_completion(counts % number).prompt_tokens is None


def elsewhere(status, place):
    return Fault(status=status, body=b"{}", headers=(f"Location: {place}",))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "place", ["other host", "other port", "https://127.0.0.1/v1", "/v1/chat/completions", "//127.0.0.2/v1"]
)
def test_no_redirect_is_followed(status, place, tmp_path):
    with ChatServer(lambda messages, draw: "stolen") as other:
        place = {
            "other host": other.url.replace("127.0.0.1", "localhost") + "/chat/completions",
            "other port": f"{other.url}/chat/completions",
        }.get(place, place)
        with (
            RequestStore(tmp_path / "r.sqlite") as store,
            ChatServer(lambda messages, draw: "", lambda arrival, body: elsewhere(status, place)) as server,
        ):
            (found,) = ask(server, store)
            assert isinstance(found, EndpointDownError)
            assert f"answered {status}: {{}} and points to {place!r}" in str(found)
            assert "check the base_url, for no redirect is followed" in str(found)
            assert server.arrived.total() == 1
        assert other.arrived.total() == 0


@pytest.mark.parametrize("size", [0, -1, 2000, float("nan"), float("inf")])
def test_a_bound_out_of_range_is_refused_by_name(size, tmp_path):
    with RequestStore(tmp_path / "r.sqlite") as store, pytest.raises(GvendiError, match="answer_mb="):
        OpenAIGenerator("http://127.0.0.1:1/v1", "m", store, key_variable=None, answer_mb=size)
