"""Settings of any size and kind: what no run can bear is one sentence, and a bound costs what is used of it."""

import time

import pytest
from chat_server import ChatServer
from problem_families import seed_rows, writer
from synthesis_runs import run, settings, stored, write_rows

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.config.config import Config, config_from
from gvendi_fast.synthesis.config.schema import inner
from gvendi_fast.synthesis.tasks import make_task

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback", "undrawn")

STRANGE = [
    -1, 0, 1, 10**9, 2**63, 10**30, -(10**30), 1.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), "5", "",
    "nan", True, None, [], [1], {}, {"a": 1}, "x" * 10**6, "\x1b[31m", b"5",
]  # fmt: skip
SECTIONS = [name for name in Config.model_fields if inner(Config, name)]


def keys():
    for name in Config.model_fields:
        section = inner(Config, name)
        if section is None:
            yield (name,)
        else:
            yield from ((name, key) for key in section.model_fields)


def test_every_key_takes_a_value_or_names_itself(tmp_path):
    refused = 0
    for key in keys():
        for value in STRANGE:
            values = settings(tmp_path / "o", "http://localhost/v1", tmp_path / "s")
            place = values
            for step in key[:-1]:
                place = place.setdefault(step, {})
            place[key[-1]] = value
            try:
                config_from(values)
            except GvendiError as error:
                refused += 1
                told = str(error)
                assert key[-1] in told
                assert len(told) < 600
    assert refused > 500


@pytest.mark.parametrize(
    ("section", "key", "most"),
    [
        ("generator", "max_concurrency", 1000),
        ("generator", "answer_mb", 1024),
        ("filter", "workers", 1024),
        ("accept", "recent", 100_000),
        ("", "ahead", 64),
    ],
)
def test_what_is_made_at_once_is_bounded(section, key, most, tmp_path):
    for value in (most, most + 1, 10**9, 10**30):
        change = {section: {key: value}} if section else {key: value}
        values = settings(tmp_path / "o", "http://localhost/v1", tmp_path / "s", **change)
        if value == most:
            config_from(values)
        else:
            with pytest.raises(GvendiError, match=f"{key} is .*and at most {most}"):
                config_from(values)


@pytest.mark.parametrize(("task", "key"), [("math", "solutions"), ("nli", "labels")])
def test_the_requests_about_one_candidate_are_bounded(task, key):
    for value in (1001, 10**9, 10**30):
        with pytest.raises(GvendiError, match=f"{key} is {value}; wanted at most 1000"):
            make_task(task, **{key: value})


def test_a_block_of_a_million_costs_what_is_asked_of_it(tmp_path):
    seeds = write_rows(tmp_path / "seeds.jsonl", seed_rows(1))
    with ChatServer(writer()) as server:
        # What a run needs in any case is loaded by then.
        run(tmp_path / "small", server.url, seeds, stop={"requests": 3})
        begun = time.process_time()
        status = run(tmp_path / "large", server.url, seeds, block=10**9, stop={"requests": 3})
        assert time.process_time() - begun < 30
        assert (status.stopped, status.pool) == ("budget", 12)
        assert server.served.total() == 6
    # Prompts are numbered as ever, whatever the block.
    small, large = (
        sorted(n for n, r in stored(tmp_path / out) if r.status == "ok") for out in ("small", "large")
    )
    assert small == large == [0, 1, 2]
