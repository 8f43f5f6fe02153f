"""The API key stays in the header of requests to its endpoint: in no spelling of an answer, file, log or process."""

import asyncio
import base64
import copy
import json
import logging
import os
import pickle
import random
import sys
import unicodedata
from urllib.parse import quote

import pytest
from chat_server import ChatServer, Fault, completion
from problem_families import seed_rows, writer
from synthesis_runs import run as run_loop
from synthesis_runs import write_rows

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.checks.environment import HUB, without_secrets
from gvendi_fast.synthesis.checks.verifiers import RowVerifier
from gvendi_fast.synthesis.generators.http import is_this_machine
from gvendi_fast.synthesis.generators.key import Key
from gvendi_fast.synthesis.generators.openai import OpenAIGenerator, Pace
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.generators.requests import Request

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback")

KEY = "sk-proj-5f1e9C07d2aA4b/x+Q_z"
FAST = {"first_delay": 0.01, "longest_delay": 0.02, "retries": 0, "concurrency": 1, "max_concurrency": 1}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def ask(server, store, wanted=1, **options):
    async def work():
        async with OpenAIGenerator(server.url, "m", store, pace=Pace(**FAST), **options) as made:
            asked = (made.generate(Request([{"role": "user", "content": f"q{i}"}])) for i in range(wanted))
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(work())


def each(form: str) -> str:
    return "".join(form.format(ord(c), c) for c in KEY)


def twice(text: str) -> str:
    return base64.b64encode(base64.b64encode(text.encode())).decode()


SPELLINGS = {
    "plain": KEY,
    "upper": KEY.upper(),
    "backwards": KEY[::-1],
    "json": each("\\u{0:04x}"),
    "json, upper": each("\\u{0:04X}"),
    "json in json": each("\\\\u{0:04x}"),
    "javascript": each("\\u{{{0:04x}}}"),
    "python": each("\\x{0:02x}"),
    "octal": each("\\{0:03o}"),
    "slashes": KEY.replace("/", "\\/"),
    "percent": each("%{0:02x}"),
    "percent, upper": each("%{0:02X}"),
    "percent where needed": quote(KEY, safe=""),
    "percent twice": quote(quote(KEY, safe=""), safe=""),
    "percent four times": each("%252525{0:02x}"),
    "html": each("&#{0};"),
    "html, hexadecimal": each("&#x{0:x};"),
    "html, padded": each("&#000{0};"),
    "percent of html": quote(each("&#{0};")),
    "hexadecimal": KEY.encode().hex(),
    "hexadecimal, upper": KEY.encode().hex().upper(),
    "hexadecimal, apart": KEY.encode().hex(" "),
    "hexadecimal, colons": KEY.encode().hex(":"),
    "hexadecimal, C": ", ".join(f"0x{ord(c):02x}" for c in KEY),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of more": base64.b64encode(b"x" + KEY.encode() + b"yz").decode(),
    "base64 of still more": base64.b64encode(b"Bearer: " + KEY.encode() + b"\n").decode(),
    "base64, url": base64.urlsafe_b64encode(b"\xff\xfe" + KEY.encode()).decode(),
    "base64, lines": base64.encodebytes(b"x" * 60 + KEY.encode()).decode(),
    "base64, percent": quote(base64.b64encode(KEY.encode()).decode(), safe=""),
    "base64 twice": twice(KEY),
    "base64 twice of more": twice(f"key={KEY}&"),
    "base32": base64.b32encode(KEY.encode()).decode(),
    "base32 of more": base64.b32encode(b"xyz" + KEY.encode() + b"x").decode().lower(),
    "spaces": " ".join(KEY),
    "line ends": "\n".join(KEY),
    "zero width": "\u200b".join(KEY),
    "joiners": "\u2060\u00ad\ufeff".join(KEY),
    "hyphens": "-".join(KEY),
    "a sum": '" + "'.join(KEY),
    "commas": json.dumps(list(KEY)),
    "full width": "".join(chr(ord(c) + 0xFEE0) for c in KEY),
    "mathematical": "".join(
        unicodedata.lookup(f"MATHEMATICAL BOLD SMALL {c.upper()}") if c.isalpha() else c for c in KEY.lower()
    ),
    "bold": f"**{KEY[:9]}**{KEY[9:]}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_key_is_found_in_any_spelling(spelling):
    key = Key("OPENAI_API_KEY")
    text = f'He said: "{SPELLINGS[spelling]}". And more.'
    assert key.hides_in(text)
    assert key.hides_in(json.dumps(text))
    assert key.hides_in(json.dumps(json.dumps(text, ensure_ascii=False)))
    cleaned = key.clean(text)
    assert not key.hides_in(cleaned)
    assert cleaned == (
        'He said: "[API key]". And more.' if spelling == "plain" else "[a text that holds the API key]"
    )


def test_no_other_text_is_taken_for_the_key():
    key, draw = Key("OPENAI_API_KEY"), random.Random(0)
    for _ in range(300):
        other = "".join(draw.sample(KEY, len(KEY)))
        for text in (
            other,
            base64.b64encode(other.encode()).decode(),
            other.encode().hex(),
            KEY[:-1],
            KEY[1:],
        ):
            assert not key.hides_in(text) or other == KEY
    for row in seed_rows(4):
        assert not key.hides_in(json.dumps(row))


@pytest.mark.parametrize(
    "key",
    [
        "sk-a.*+?[](){}^$|\\x",
        "%41%42%43%44%45",
        "&amp;&amp;&amp;",
        "............",
        'a"b\\"c/d"e<f>g',
    ],
)
def test_a_key_of_marks_is_cut_and_noticed(monkeypatch, key):
    monkeypatch.setenv("MARKS", key)
    held = Key("MARKS")
    assert held.cut(f"<{key}>") == "<[API key]>"
    twice = json.dumps(json.dumps(key))
    percent = "".join(f"%{ord(letter):02x}" for letter in key)
    for spelled in (
        key,
        json.dumps(key),
        twice,
        percent,
        base64.b64encode(key.encode()).decode(),
        "\n".join(key),
    ):
        assert held.hides_in(f"it is {spelled}, is it not?"), spelled
    assert not held.hides_in("an answer that holds no key: sk-abcdefghijkl, %20%20, &amp; and ...........")


@pytest.mark.parametrize("placeholder", ["EMPTY", "none", "sk-no-key", "not-needed-by-vllm"])
def test_a_placeholder_may_be_words_of_an_answer(placeholder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", placeholder)
    key = Key("OPENAI_API_KEY")
    assert not key.hides_in("No key is none of an empty one. It was not needed. By vLLM, sk no key")
    assert key.cut("not-needed-by-vllm") == ("[API key]" if len(placeholder) >= 12 else "not-needed-by-vllm")


@pytest.mark.parametrize(
    "spelling",
    ["upper", "json", "percent twice", "base64 of more", "base64, url", "zero width", "hexadecimal, C"],
)
def test_an_answer_with_the_key_is_refused_and_kept_nowhere(spelling, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    raw = json.dumps(completion("HERE")).replace("HERE", SPELLINGS[spelling].replace('"', "")).encode()
    faults = [Fault(body=raw), Fault(status=500, body=raw), Fault(status=400, body=raw)]
    with (
        RequestStore(tmp_path / "r.sqlite") as store,
        ChatServer(
            lambda messages, draw: "good", lambda arrival, body: dict(enumerate(faults)).get(arrival)
        ) as server,
    ):
        found = ask(server, store, 4)
        assert [answer.status for answer in found] == ["failed", "unserved", "refused", "ok"]
        assert found[0].reason == "the answer holds the API key in another spelling"
        assert found[1].reason == "answered 500: [a text that holds the API key]"
        again = ask(server, store, 1)
        assert (again[0].reason, again[0].cached) == (found[0].reason, True)
    for place in (
        repr(found),
        caplog.text,
        *(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()),
    ):
        for written in (KEY, SPELLINGS[spelling]):
            assert written not in place


def test_the_key_in_headers_of_a_reply_is_in_no_log_and_no_message(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_LOG", "debug")
    lines = (
        f"X-Echo: {KEY}",
        f"x-request-id: {SPELLINGS['base64']}",
        f"Set-Cookie: key={SPELLINGS['percent']}",
    )
    plan = {
        0: Fault(headers=lines, body=completion("a")),
        1: Fault(status=500, headers=(*lines, f"Retry-After: {KEY}"), body=b"{}"),
        2: Fault(status=307, headers=(*lines, f"Location: https://127.0.0.1/{KEY}"), body=b"{}"),
    }
    with (
        RequestStore(tmp_path / "r.sqlite") as store,
        ChatServer(lambda messages, draw: "", lambda arrival, body: plan.get(arrival)) as server,
    ):
        found = ask(server, store, 3)
    assert "points to 'https://127.0.0.1/[API key]'" in str(found[2])
    told = [
        repr(found),
        *(f"{e}{e.__cause__!r}{e.__context__!r}" for e in found if isinstance(e, Exception)),
        caplog.text,
    ]
    told += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert "HTTP Request" in caplog.text
    assert "receive_response_headers" in caplog.text
    for text in told:
        for spelling in ("plain", "base64", "percent"):
            assert SPELLINGS[spelling] not in text
    assert all("cookie" not in map(str.lower, head) for head in server.heads)


def test_a_key_is_neither_shown_nor_copied_to_a_file():
    key = Key("OPENAI_API_KEY")
    assert KEY not in repr(key) + str(key)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(GvendiError, match="not pickled"):
            copied(key)


def test_what_the_client_takes_from_other_variables_goes_to_no_other_host(tmp_path, monkeypatch):
    secrets = {
        "OPENAI_ORG_ID": "org-hidden",
        "OPENAI_PROJECT_ID": "proj-hidden",
        "OPENAI_ADMIN_KEY": "admin-hidden",
        "OPENAI_WEBHOOK_SECRET": "webhook-hidden",
        "OPENAI_CUSTOM_HEADERS": "X-Gateway: custom-hidden\nAuthorization: Bearer other-hidden",
        "AZURE_OPENAI_API_KEY": "azure-hidden",
        "OPENAI_BASE_URL": "http://127.0.0.2:9/v1",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with RequestStore(tmp_path / "r.sqlite") as store, ChatServer(lambda messages, draw: "a") as server:
        for variable in ("OPENAI_API_KEY", None):
            store_ = {"key_variable": variable}
            found = ask(server, store, 1 if variable else 2, **store_)
            assert found[-1].ok
        assert server.keys == [f"Bearer {KEY}", "Bearer none"]
        assert "hidden" not in json.dumps(server.heads) + json.dumps(server.bodies)
        assert {name.lower() for head in server.heads for name in head} <= {
            "host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent",
            "authorization",
        }  # fmt: skip


def test_openais_own_host_is_told_whose_account_it_is(tmp_path, monkeypatch):
    import openai

    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    seen = []

    async def caught(self, request, **options):
        seen.append((request.url.host, dict(request.headers), options["follow_redirects"]))
        raise OSError("nothing is sent by a test")

    monkeypatch.setattr(openai.DefaultAsyncHttpxClient, "send", caught)
    hosts = {
        "https://api.openai.com/v1": True,
        "https://eu.api.openai.com/v1": True,
        "http://api.openai.com/v1": False,
        "https://api.openai.com.example.org/v1": False,
        "https://notapi.openai.com/v1": False,
    }
    for url in hosts:
        with RequestStore(tmp_path / "r.sqlite") as store:
            server = type("Elsewhere", (), {"url": url})
            ask(server, store)
    assert ["openai-organization" in head for _, head, _ in seen] == list(hosts.values())
    assert ["openai-project" in head for _, head, _ in seen] == list(hosts.values())
    assert {(head["authorization"], follow) for _, head, follow in seen} == {(f"Bearer {KEY}", False)}


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_a_proxy_never_stands_before_this_machine(variable, tmp_path, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with (
        ChatServer(lambda messages, draw: "of the proxy") as proxy,
        ChatServer(lambda messages, draw: "of the endpoint") as server,
        RequestStore(tmp_path / "r.sqlite") as store,
    ):
        monkeypatch.setenv(variable, proxy.url.removesuffix("/v1"))
        assert ask(server, store)[0].text == "of the endpoint"
        assert not proxy.arrived


def test_which_hosts_are_this_machine():
    assert all(map(is_this_machine, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "a.localhost")))
    assert not any(map(is_this_machine, ("localhost.example.org", "10.0.0.1", "example.org", "0x7f.1", "")))


def test_a_netrc_gives_no_other_key(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text(
        "machine 127.0.0.1 login me password hidden\ndefault login me password hidden\n"
    )
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with RequestStore(tmp_path / "r.sqlite") as store, ChatServer(lambda messages, draw: "a") as server:
        ask(server, store)
        assert server.keys == [f"Bearer {KEY}"]


SEES = """
import json, os
def environment(row):
    return json.dumps(dict(os.environ))[:290] if row["prompt"] == "all" else os.environ.get(row["prompt"], "not there")
"""


def test_no_child_process_is_given_a_secret(tmp_path, monkeypatch):
    given = {
        "OPENAI_API_KEY": (KEY, False),
        "MY_ENDPOINT": ("a-key-under-another-name-77", False),
        "COPY_OF_IT": ("x a-key-under-another-name-77 x", False),
        "HF_TOKEN": ("t", False),
        "AWS_SECRET_ACCESS_KEY": ("t", False),
        "AWS_SESSION_TOKEN": ("t", False),
        "GITHUB_PAT": ("t", False),
        "DB_PASSWORD": ("t", False),
        "PGPASSWORD": ("t", False),
        "DATABASE_URL": ("postgres://me:word@host/db", False),
        "HTTPS_PROXY": ("http://me:word@proxy:3128", False),
        "http_proxy": ("http://proxy:3128", True),
        "MONKEY": ("m", True),
        "KEYBOARD_LAYOUT": ("m", True),
        "TOKENIZERS_PARALLELISM": ("m", True),
        "MY_RULES": ("https://host:8000/a@b", True),
    }
    for name, (value, _) in given.items():
        monkeypatch.setenv(name, value)
    Key("MY_ENDPOINT")
    (tmp_path / "seeing.py").write_text(SEES)
    with RowVerifier("seeing:environment", folder=tmp_path) as rows:
        found = rows.verify_all([{"prompt": name} for name in given])
    wanted = [value if kept else "not there" for value, kept in given.values()]
    assert [verdict.reason for verdict in found] == wanted
    # The sketching process loads a model, maybe one behind a token of the hub.
    kept = without_secrets(HUB)
    assert kept["HF_TOKEN"] == "t"
    assert not {"OPENAI_API_KEY", "MY_ENDPOINT", "COPY_OF_IT", "AWS_SESSION_TOKEN"} & set(kept)
    assert kept["PATH"] == os.environ["PATH"]


def test_no_file_of_a_run_holds_the_key(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    seeds, out, write = write_rows(tmp_path / "seeds.jsonl", seed_rows(1)), tmp_path / "run", writer()
    spellings, checks = list(SPELLINGS), tmp_path / "checks"
    checks.mkdir()
    (checks / "key_rules.py").write_text(
        "import os\ndef check(row):\n    return os.environ.get('MY_KEY') or True\n"
    )
    monkeypatch.setenv("MY_KEY", KEY)

    def plan(arrival, body):
        if arrival % 3:
            return None
        echoed = SPELLINGS[spellings[arrival // 3 % len(spellings)]]
        raw = completion(f"<prompt>What is {echoed} of {arrival}?</prompt><completion>{echoed}</completion>")
        return Fault(body=raw)

    with ChatServer(write, plan) as server:
        run_loop(
            out,
            server.url,
            seeds,
            generator={"key_variable": "MY_KEY"},
            task={
                "name": "generic",
                "settings": {"verifier": "key_rules:check", "verifier_folder": str(checks)},
            },
            accept={"rule": "all"},
            filter={"near": None},
            stop={"target": 999, "floor": 1.0, "window": 40},
        )
        assert server.arrived.total() > 40
    found = list(filter(os.path.isfile, out.rglob("*")))
    assert {"accepted.jsonl", "requests.sqlite", "report.json", "report.html", "config.yaml"} <= {
        p.name for p in found
    }
    written = [path.read_bytes() for path in found] + [caplog.text.encode()]
    for name, spelling in SPELLINGS.items():
        for text in {spelling, json.dumps(spelling)[1:-1]}:
            assert not any(text.encode() in content for content in written), name
    assert sys.exc_info() == (None, None, None)
