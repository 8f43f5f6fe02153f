"""The request store: one final answer per key, on disk before anybody has it, and one process at a time."""

import asyncio
import errno
import hashlib
import json
import sqlite3
import threading
import time

import pytest
from children import children

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.generators.request_store import Record, RequestStore, Tokens
from gvendi_fast.synthesis.generators.requests import Request, canonical_json, read_completion

PROMPT = [{"role": "user", "content": "one?"}]


def test_a_row_goes_from_sent_to_final_and_stays(tmp_path):
    with RequestStore(tmp_path / "r.sqlite") as store:
        assert store.get("k") is None
        assert store.begin("k", "{}") == 1
        assert store.get("k").status == "sent"
        assert store.begin("k", "{}") == 2
        store.put("k", "unserved", None, "503")
        record = store.put("k", "ok", '{"a":1}', None, 3, 4)
        assert record == store.get("k")
        assert (record.status, record.answer, record.attempts, record.reason) == ("ok", '{"a":1}', 2, None)
        assert store.put("k", "failed", "other", "late", 9, 9) == record
        assert store.counts() == {"ok": 1}
        assert store.tokens() == Tokens(3, 4, 0)
    with RequestStore(tmp_path / "r.sqlite") as store:
        assert list(store.rows()) == [record]


def test_tokens_sum_final_answers_and_tell_what_was_not_counted(tmp_path):
    with RequestStore(tmp_path / "r.sqlite") as store:
        for key, status, counts in (
            ("a", "ok", (5, 6)),
            ("b", "failed", (1, None)),
            ("c", "unserved", (100, 100)),
            ("d", "ok", (None, None)),
        ):
            store.begin(key, "{}")
            store.put(key, status, None, None, *counts)
        assert store.tokens() == Tokens(6, 6, 1)
        assert store.counts() == {"ok": 2, "failed": 1, "unserved": 1}
        assert [record.key for record in store.rows()] == ["a", "b", "c", "d"]


def test_put_needs_a_request_that_began(tmp_path):
    with RequestStore(tmp_path / "r.sqlite") as store, pytest.raises(GvendiError, match="call begin"):
        store.put("nobody", "ok")


def test_many_threads_and_tasks_write_at_once(tmp_path):
    with RequestStore(tmp_path / "r.sqlite") as store:

        def work(name: int) -> None:
            for i in range(50):
                store.begin(f"{name}-{i}", "{}")
                store.put(f"{name}-{i}", "ok", "x" * i, None, 1, 1)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()

        async def task(i: int) -> Record:
            await store.begin_async(f"t-{i}", "{}")
            return await store.put_async(f"t-{i}", "ok", "y", None, 1, 1)

        async def tasks() -> list:
            return await asyncio.gather(*(task(i) for i in range(50)))

        assert {record.status for record in asyncio.run(tasks())} == {"ok"}
        for thread in threads:
            thread.join()
        assert store.counts() == {"ok": 250}


def test_an_error_of_one_caller_leaves_the_store_alive(tmp_path):
    with RequestStore(tmp_path / "r.sqlite") as store:
        with pytest.raises(GvendiError, match="cannot be used"):
            store.begin("k", "\ud800")
        assert store.begin("k", "{}") == 1


def test_the_file_refuses_a_second_run_and_opens_after_it(tmp_path):
    path = tmp_path / "r.sqlite"
    first = RequestStore(path)
    with pytest.raises(GvendiError, match="open elsewhere"):
        RequestStore(path)
    first.close()
    first.close()
    with pytest.raises(GvendiError, match="closed"):
        first.get("k")
    RequestStore(path).close()


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "text").write_text("no database, though long enough to have a header of one " * 40)
    with pytest.raises(GvendiError, match="no SQLite file"):
        RequestStore(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE t (a)")
    other.close()
    with pytest.raises(GvendiError, match="not a request store of this version"):
        RequestStore(tmp_path / "other")
    with pytest.raises(FileNotFoundError) as raised:
        RequestStore(tmp_path / "absent" / "r.sqlite")
    assert raised.value.filename == str(tmp_path / "absent" / "r.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        RequestStore(tmp_path / "folder")


def test_a_damaged_file_is_one_sentence_and_what_was_committed_is_read_up_to_it(tmp_path):
    path = tmp_path / "r.sqlite"
    with RequestStore(path) as store:
        for i in range(300):
            store.begin(f"{i:03}", "{}")
            store.put(f"{i:03}", "ok", "\0\u2028]]>" + "z" * 500, None, 1, 1)
        assert store.get("007").answer.startswith("\0\u2028]]>z")
    raw = bytearray(path.read_bytes())
    raw[4096 * 3 : 4096 * 20] = bytes(4096 * 17)
    path.write_bytes(raw)
    with (
        pytest.raises(GvendiError, match=r"is damaged .*restore it from a copy"),
        RequestStore(path) as store,
    ):
        list(store.rows())


@pytest.mark.parametrize(
    ("told", "number"),
    [
        ("database or disk is full", errno.ENOSPC),
        ("disk I/O error", errno.EIO),
        ("attempt to write a readonly database", errno.EACCES),
    ],
)
def test_what_the_system_refuses_is_an_error_of_the_system(told, number, tmp_path, monkeypatch):
    from gvendi_fast.synthesis.generators import request_table

    with RequestStore(tmp_path / "r.sqlite") as store:
        store.begin("k", "{}")
        begin = request_table.begin

        def refuse(connection, *arguments):
            begin(connection, *arguments)
            raise sqlite3.OperationalError(told)

        monkeypatch.setattr(request_table, "begin", refuse)
        with pytest.raises(OSError, match="SQLite") as raised:
            store.begin("l", "{}")
        assert (raised.value.errno, raised.value.filename) == (number, str(tmp_path / "r.sqlite"))
        monkeypatch.undo()
        # Nothing of it is kept, and the store goes on.
        assert store.get("l") is None
        assert store.begin("l", "{}") == 1


def test_a_full_disk_is_told_by_sqlite_itself(tmp_path):
    with RequestStore(tmp_path / "r.sqlite") as store:
        store.begin("k", "{}")
    connection = sqlite3.connect(tmp_path / "r.sqlite", isolation_level=None)
    connection.execute("PRAGMA max_page_count=4")
    with pytest.raises(sqlite3.OperationalError, match="is full"):
        connection.execute("UPDATE requests SET answer = ?", ("z" * 100_000,))
    connection.close()


def write_until_killed(path: str, pipe) -> None:
    with RequestStore(path) as store:
        for i in range(10**6):
            store.begin(f"{i:06}", "{}")
            store.put(f"{i:06}", "ok", "z" * 500, None, 1, 1)
            pipe.send(i)


@pytest.mark.parametrize(
    "counts", [(0, 40), pytest.param((0, 1, 7, 40, 90), marks=pytest.mark.soak)], ids=len
)
def test_what_was_handed_on_survives_kill_at_any_moment(counts, tmp_path):
    context = children()
    for attempt, wanted in enumerate(counts):
        path = tmp_path / f"{attempt}.sqlite"
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(str(path), theirs))
        process.start()
        theirs.close()
        seen = -1
        while seen < wanted:
            seen = ours.recv()
        time.sleep(0.002 * attempt)
        process.kill()
        process.join()
        try:
            while True:
                seen = ours.recv()
        # A message that the kill cut in two is an OSError.
        except (EOFError, OSError):
            ours.close()
        with RequestStore(path) as store:
            records = list(store.rows())
            assert len(records) >= seen + 1
            assert all(store.get(f"{i:06}").answer == "z" * 500 for i in range(seen + 1))
            assert {r.status for r in records[:-1]} <= {"ok"}
            assert records[-1].status in ("ok", "sent")


def test_the_key_is_the_content_and_nothing_else():
    one = Request(PROMPT)
    assert one.key("m") == Request(tuple(PROMPT), temperature=1, extra={}).key("m")
    others = [
        Request([{"role": "user", "content": "two?"}]),
        Request(PROMPT, sample=1),
        Request(PROMPT, temperature=0.75),
        Request(PROMPT, top_p=1.0),
        Request(PROMPT, max_tokens=9),
        Request(PROMPT, extra={"stop": ["x"]}),
    ]
    assert len({request.key("m") for request in [one, *others]} | {one.key("n")}) == 8
    # Another form of the key would make everybody pay again for what is on disk.
    written = (
        '{"extra":{},"max_tokens":null,"messages":[{"content":"one?","role":"user"}],"model":"m","sample":0,'
        '"temperature":1.0,"top_p":0.95}'
    )
    assert canonical_json(one.canonical("m")) == written
    assert one.key("m") == hashlib.sha256(written.encode()).hexdigest()


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"messages": []}, "non-empty"),
        ({"messages": "hi"}, "non-empty"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"sample": -1}, "sample=-1"),
        ({"extra": {"n": 2}}, "extra holds n"),
    ],
)
def test_requests_refuse_by_name(fields, what):
    with pytest.raises(GvendiError, match=what):
        Request(**{"messages": PROMPT, **fields})


def test_a_request_that_json_cannot_hold_is_refused():
    with pytest.raises(GvendiError, match="as JSON"):
        Request(PROMPT, extra={"x": object()}).key("m")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON|JSON int"),
        ("[]", "JSON list"),
        ("{}", "no choices"),
        ('{"choices": {}}', "no choices"),
        ('{"choices": [3]}', "no message"),
        ('{"choices": [{"message": null}]}', "no message"),
        ('{"choices": [{"message": {}}]}', "no content"),
        ('{"choices": [{"message": {"content": ["a"]}}]}', "type list"),
        ('{"choices": [{"message": {"content": "\\ud800"}}]}', "surrogate"),
        ('{"choices": [{"message": {"content": " "}}]}', "empty"),
        ('{"choices": [{"message": {"content": "a"}, "finish_reason": "length"}]}', "token limit"),
        ('{"choices": [{"message": {"content": "a"}, "finish_reason": "content_filter"}]}', "filter"),
    ],
)
def test_unusable_completions_say_why(raw, reason):
    found = read_completion(raw)
    assert found.reason is not None
    assert any(part in found.reason for part in reason.split("|"))


@pytest.mark.parametrize("count", [-1, 2**60, 1.5, True, "7", None])
def test_counts_that_are_none_are_none(count):
    raw = json.dumps({"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": count}})
    found = read_completion(raw)
    assert (found.text, found.reason, found.prompt_tokens) == ("a", None, None)
