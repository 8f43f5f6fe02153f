"""A synthesis run that is killed again and again ends with the bytes of one that is not, and pays for little twice."""

import json
import random
import shutil
import time
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
from chat_server import ChatServer, Fault
from children import children, grow
from hangs import wait_for
from problem_families import seed_rows, writer
from synthesis_runs import FILES, contents, paid, run, settings, write_rows

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback")
AT_ONCE = 4
PACE = {"concurrency": AT_ONCE, "max_concurrency": AT_ONCE}


@pytest.fixture
def seeds(tmp_path) -> Path:
    return write_rows(tmp_path / "seeds.jsonl", seed_rows(4))


@pytest.fixture
def whole(tmp_path, seeds) -> dict[str, bytes]:
    """What a run leaves that nothing interrupts."""
    with ChatServer(writer()) as server:
        run(tmp_path / "whole", server.url, seeds)
    return contents(tmp_path / "whole")


def start(config: dict):
    process = children().Process(target=grow, args=(config,))
    process.start()
    return process


def finish(config: dict) -> None:
    process = start(config)
    process.join()
    assert process.exitcode == 0


def kill(process, server: ChatServer) -> None:
    process.kill()
    process.join()
    server.let_go()
    wait_for(lambda: server.under_way == 0, "the requests under way")


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_many_times_between_answers_nothing_is_paid_twice(kills, whole, tmp_path, seeds):
    generator, out = random.Random(3), tmp_path / "run"
    with ChatServer(writer()) as server:
        config = settings(out, server.url, seeds, generator=PACE)
        for number in range(kills):
            more = generator.randint(1, 12)
            server.hold_after(more)
            process, wanted = start(config), server.served.total() + more

            def held(process=process, number=number, wanted=wanted):
                assert process.exitcode is None, f"the run ended before kill {number}"
                return server.served.total() == wanted and server.under_way == AT_ONCE

            wait_for(held, "the gate of the server")
            # The last answers are committed; blocks may be sketched and written.
            time.sleep(0.1 + generator.uniform(0, 0.2))
            kill(process, server)
        finish(config)
        assert contents(out) == whole
        assert paid(out) == server.served
        assert max(server.served.values()) == 1


def as_left(out: Path, to: Path) -> tuple[Counter, Counter]:
    """Requests that are answered, and those that were sent only, by content; the killed run's file stays as it is."""
    to.mkdir()
    for path in out.glob("requests.sqlite*"):
        shutil.copy(path, to / path.name)
    return paid(to), paid(to, ("sent",))


def check_blocks(out: Path, whole: dict[str, bytes]) -> int:
    """What the last block on record has written is what the whole run has there; returns the number of blocks."""
    events = (out / "events.jsonl").read_bytes().split(b"\n")[:-1] if (out / "events.jsonl").exists() else []
    blocks = [event for event in map(json.loads, events) if event["event"] == "block"]
    for name, size in zip(FILES, blocks[-1]["bytes"] if blocks else (), strict=False):
        content = (out / name).read_bytes()
        assert len(content) >= size
        assert content[:size] == whole[name][:size]
    return len(blocks)


def killed_run(out: Path, seeds: Path, whole: dict[str, bytes], kills: int, moment) -> list[int]:
    """A run that is killed up to `kills` times, each time `moment()` seconds after its start, and then finished.

    Returns how many blocks were decided at each kill.
    """
    blocks, lost = [], Counter()
    with ChatServer(writer(), lambda arrival, body: Fault(stall=0.004)) as server:
        config = settings(out, server.url, seeds, generator=PACE)
        while len(blocks) < kills:
            process = start(config)
            process.join(moment())
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            kill(process, server)
            answered, sent = as_left(out, out.parent / f"{out.name}-{len(blocks)}")
            # Served, but the kill came before the answer was on disk: of those under way, one a place at most.
            now = server.served - answered - lost
            assert now.total() <= AT_ONCE
            assert not now - sent
            lost += now
            blocks.append(check_blocks(out, whole))
        else:
            finish(config)
        assert contents(out) == whole
        assert server.served == paid(out) + lost
    return blocks


@pytest.mark.soak
def test_killed_ten_times_at_any_moment_only_what_was_under_way_is_paid_again(whole, tmp_path, seeds):
    generator = random.Random(11)
    with ChatServer(writer(), lambda arrival, body: Fault(stall=0.004)) as server:
        began = time.monotonic()
        finish(settings(tmp_path / "timed", server.url, seeds, generator=PACE))
        lasts = time.monotonic() - began
    blocks: list[int] = []
    for number in count():
        # Every other kill comes early: while the process starts or the seed pool is sketched.
        moments = (generator.uniform(0, lasts * share) for share in (0.2, 0.7) * 10)
        blocks += killed_run(tmp_path / f"run-{number}", seeds, whole, 10 - len(blocks), moments.__next__)
        if len(blocks) == 10:
            break
    assert min(blocks) == 0
