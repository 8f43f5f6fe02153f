"""Runs of the synthesis loop as the tests make them: a small configuration, what a run leaves, what was paid for."""

import json
from collections import Counter
from pathlib import Path

from chat_server import content

from gvendi_fast.synthesis.config.config import config_from
from gvendi_fast.synthesis.generators.request_store import Record, RequestStore
from gvendi_fast.synthesis.run import synthesize

FILES = ("accepted.jsonl", "rejected.jsonl", "sketches.f32")


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(out: Path, url: str, seeds: Path, **sections) -> dict:
    """A configuration as nested dicts; sections go over these key by key."""
    base = {
        "out": str(out),
        "pool": {"data": str(seeds)},
        "task": {"name": "generic"},
        "generator": {
            "model": "m",
            "base_url": url,
            "key_variable": None,
            "send_seed": True,
            "first_delay": 0.01,
            "longest_delay": 0.04,
        },
        # A process of its own takes seconds to start.
        "proxy": {"name": "tiny", "dim": 256, "dtype": "float32", "process": False},
        "accept": {"clusters": 12, "round": 0.2},
        # Of 48 seeds that most tests have; each further row takes twenty candidates and more.
        "stop": {"target": 68},
        "block": 8,
        "ahead": 3,
    }
    for name, value in sections.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) and name in base else value
    return base


def run(out: Path, url: str, seeds: Path, **sections):
    return synthesize(config_from(settings(out, url, seeds, **sections)))


def lines(path: Path) -> list[dict]:
    # Texts may hold other line ends than this one.
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def paid(out: Path, statuses: tuple[str, ...] = ("ok", "failed")) -> Counter:
    """Requests of the run's store with these statuses, by the content that the server counts; final ones as a rule."""
    found = Counter()
    for _, record in stored(out):
        if record.status in statuses:
            body = json.loads(record.request)
            body = {k: body[k] for k in ("model", "messages", "temperature", "top_p")}
            found[content({**body, "seed": int(record.key[:7], 16)})] += 1
    return found


def stored(out: Path) -> list[tuple[int, Record]]:
    """Rows of the run's store, each with the number of its draw: for a new candidate that of its prompt."""
    with RequestStore(out / "requests.sqlite") as store:
        return [(json.loads(record.request)["sample"], record) for record in store.rows()]


def outcomes_of(out: Path, block: int = 8) -> list[dict]:
    """All outcomes in the order of their prompts, each of which is checked to have exactly one."""
    outcomes = lines(out / "accepted.jsonl") + lines(out / "rejected.jsonl")
    ids = [row["id"] for row in outcomes]
    assert len(set(ids)) == len(ids)
    by_number = {int(id_.rpartition("-")[2]): row for id_, row in zip(ids, outcomes, strict=True)}
    events = [event for event in lines(out / "events.jsonl") if event["event"] == "block"]
    assert [event["decided"] for event in events[:-1]] == [block] * (len(events) - 1)
    assert sorted(by_number) == list(range(sum(event["decided"] for event in events)))
    assert events[-1]["decided"] == block or events[-1]["cut_short"]
    return [by_number[number] for number in sorted(by_number)]
