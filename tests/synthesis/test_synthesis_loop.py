"""The Prismatic loop against a real HTTP server and a writer that prefers one family of problems."""

import json
import math
import os
import random
import re
import shutil
import signal
from collections import Counter
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import TRUNCATED, ChatServer, Fault
from hangs import HANG_S
from problem_families import FAMILIES, family_of, seed_rows, writer
from synthesis_runs import FILES, contents, lines, paid, run, settings, write_rows

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.synthesize import view_for
from gvendi_fast.synthesis import run as run_module
from gvendi_fast.synthesis.config.config import AcceptConfig, ProxyConfig, config_from, load_config
from gvendi_fast.synthesis.disk.journal import Journal
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.loop.grown_pool import GrownPool
from gvendi_fast.synthesis.loop.judge import Judge, nearest
from gvendi_fast.synthesis.loop.proposer import shot_rows
from gvendi_fast.synthesis.run import preview, synthesize
from gvendi_fast.synthesis.tasks.generic import GenericTask
from gvendi_fast.vendi import gvendi as score_of

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("seeds") / "seeds.jsonl", seed_rows(4))


@pytest.fixture(scope="module")
def server():
    with ChatServer(writer()) as running:
        yield running


def family_entropy(rows: list[dict]) -> float:
    counts = Counter(family_of(row["prompt"]) for row in rows).values()
    return -sum(n / len(rows) * math.log(n / len(rows)) for n in counts)


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Reports are not drawn, which takes half a second a run; what they show is found out all the same."""
    monkeypatch.setattr(run_module, "write_synthesis_report", lambda data: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, seeds, server):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    return out, run(out, server.url, seeds)


def test_a_run_grows_the_pool_where_it_is_sparse(whole, tmp_path, seeds, server):
    out, status = whole
    accepted, rejected = lines(out / "accepted.jsonl"), lines(out / "rejected.jsonl")
    assert (status.stopped, status.pool, status.accepted) == ("target", 68, 20)
    assert len(accepted) == 20
    assert Counter(row["stage"] for row in rejected) == status.rejected
    assert all(row["reason"] for row in rejected)
    ids = {row["id"] for row in lines(seeds)}
    for row in accepted:
        assert row["sparse"]
        assert len(row["parents"]) == 5
        assert set(row["parents"]) <= ids
        ids.add(row["id"])
    assert len(ids) == 68

    everything = run(tmp_path / "all", server.url, seeds, accept={"rule": "all"})
    plain = lines(tmp_path / "all" / "accepted.jsonl")
    assert len(plain) == 20
    assert everything.start_gvendi == status.start_gvendi
    assert status.gvendi > everything.gvendi
    by_gain = run(tmp_path / "gain", server.url, seeds, accept={"rule": "gain"})
    assert by_gain.gvendi > 1.05 * everything.gvendi
    assert family_entropy(accepted) > family_entropy(plain) + 0.5
    assert len({family_of(row["prompt"]) for row in accepted}) > len(
        {family_of(row["prompt"]) for row in plain}
    )


def test_sketches_and_scores_are_those_of_the_rows(whole, tmp_path, seeds):
    from gvendi_fast.analysis.scoring import score

    out, status = whole
    sketches = torch.from_numpy(np.fromfile(out / "sketches.f32", np.float32).reshape(-1, 256))
    assert torch.allclose(sketches.norm(dim=1), torch.ones(20), atol=1e-6)
    grown = tmp_path / "grown.jsonl"
    shutil.copy(seeds, grown)
    with grown.open("ab") as stream:
        stream.write((out / "accepted.jsonl").read_bytes())
    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.sketching.corpus import Settings
    from gvendi_fast.sketching.proxy.load import load_proxy

    again = score(grown, proxy=load_proxy("tiny", dtype="float32"), settings=Settings(SketchSpec(dim=256)))
    assert again.n == 68
    assert status.gvendi == pytest.approx(again.gvendi, rel=1e-4)


def test_the_same_run_again_asks_nothing_and_changes_nothing(whole, seeds, server, tmp_path):
    out, _ = whole
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    before = server.arrived.total()
    status = run(copy, server.url, seeds)
    assert status.stopped == "target"
    assert server.arrived.total() == before
    assert contents(copy) == contents(out)


@pytest.mark.parametrize(
    "accept",
    [
        pytest.param({}, id="cluster"),
        pytest.param(
            {"rule": "gain", "reference": "candidates", "recent": 100, "quantile": 0.8},
            id="gain",
            marks=pytest.mark.soak,
        ),
        pytest.param({"frozen": True, "from_sparse": True}, id="frozen", marks=pytest.mark.soak),
    ],
)
def test_files_cut_anywhere_are_mended_to_the_same_bytes(accept, tmp_path, seeds, server):
    """What a kill leaves: decided blocks whole, whatever stands behind them, a torn last line."""
    out = tmp_path / "whole"
    run(out, server.url, seeds, accept=accept, stop={"target": 60})
    events = (out / "events.jsonl").read_bytes()
    generator = random.Random(0)
    for number, cut in enumerate(sorted(generator.sample(range(1, len(events)), 2))):
        torn = tmp_path / f"torn-{number}"
        shutil.copytree(out, torn)
        (torn / "events.jsonl").write_bytes(events[:cut])
        # The files of the rows may be ahead of the events, and end within a line.
        for name in FILES:
            with (torn / name).open("ab") as stream:
                stream.write(b'{"torn')
        before = server.arrived.total()
        run(torn, server.url, seeds, accept=accept, stop={"target": 60})
        assert contents(torn) == contents(out), f"cut at byte {cut} of {len(events)}"
        assert server.arrived.total() == before


def test_order_of_the_answers_does_not_matter(whole, tmp_path, seeds):
    delays = random.Random(5)
    with ChatServer(writer(), lambda arrival, body: Fault(stall=delays.uniform(0, 0.05))) as slow:
        run(tmp_path / "run", slow.url, seeds, generator={"concurrency": 3, "max_concurrency": 5})
    assert contents(tmp_path / "run") == contents(whole[0])


# Every day the blocks before a process is ended, below, are a process's own.
@pytest.mark.soak
def test_a_process_of_its_own_sketches_the_same(whole, tmp_path, seeds, server):
    out = tmp_path / "run"
    status = run(out, server.url, seeds, proxy={"process": True})
    assert contents(out) == contents(whole[0])
    assert status.seconds["sketching"] > 0
    assert status.queued >= 0


@pytest.mark.soak
def test_a_sketching_process_that_ends_is_named_and_the_run_goes_on(
    whole, tmp_path, seeds, server, monkeypatch
):
    from gvendi_fast.synthesis.loop.sketch_process import SketchProcess

    plain, blocks = SketchProcess.sketch, []

    def dies_at_the_third(self, rows):
        blocks.append(len(rows))
        if len(blocks) == 3:
            os.kill(self._child._process.pid, signal.SIGKILL)
        return plain(self, rows)

    monkeypatch.setattr(SketchProcess, "sketch", dies_at_the_third)
    out = tmp_path / "run"
    with pytest.raises(GvendiError, match=r"sketching process ended: signal 9.*proxy\.batch_tokens"):
        run(out, server.url, seeds, proxy={"process": True})
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run(out, server.url, seeds)
    assert contents(out) == contents(whole[0])


def test_what_the_sketching_process_refuses_is_told(tmp_path):
    from gvendi_fast.synthesis.loop.sketch_process import SketchProcess

    with SketchProcess(ProxyConfig(name=str(tmp_path / "none")), 128, 2048) as process:
        with pytest.raises(GvendiError, match="none"):
            process.sketch([{"prompt": "a", "completion": "b"}])
        child = process._child
    assert not child.alive
    # It may have ended before anybody asks.
    with SketchProcess(ProxyConfig(name=str(tmp_path / "none")), 128, 2048) as process:
        process._child._process.wait(HANG_S)
        with pytest.raises(GvendiError, match="none"):
            process.sketch([{"prompt": "a" * 1000, "completion": "b"}])


@pytest.mark.parametrize("refresh", [0.0, 0.1])
def test_gains_refer_to_a_pool_that_is_smaller_by_less_than_refresh(refresh):
    rows = torch.nn.functional.normalize(torch.randn(80, 16, generator=torch.Generator().manual_seed(0)))
    records = [{"prompt": f"q{i}", "completion": "a"} for i in range(40)]
    pool = GrownPool([str(i) for i in range(40)], records, rows[:40], GenericTask(), 0.5, refresh)
    judge = Judge(pool, AcceptConfig(clusters=2, refresh=refresh), seed=0)
    for block, first in enumerate(range(40, 76, 2)):
        judge.begin(rows[76:])
        of = pool.recent_state.n
        assert len(pool) < of * (1 + refresh) or len(pool) == of
        gain = math.log(score_of(torch.cat([rows[:of], rows[76:77]])) / score_of(rows[:of]))
        assert judge.judge(0).gain == pytest.approx(gain, abs=2e-6)
        assert judge.gvendi == (pytest.approx(score_of(rows[:of]), rel=1e-6), of)
        for number in (first, first + 1):
            pool.add(str(number), {"prompt": f"q{number}", "completion": "a"}, rows[number])
        pool.settle(block)


@pytest.mark.soak
def test_a_higher_target_goes_on_as_if_it_had_been_there(whole, tmp_path, seeds, server):
    out = tmp_path / "run"
    for target in (60, 68):
        status = run(out, server.url, seeds, stop={"target": target})
        assert status.pool == target
    assert contents(out) == contents(whole[0])


def test_faults_of_the_endpoint_change_nothing(whole, tmp_path, seeds):
    kinds = [Fault(429, "0.01"), Fault(500), Fault(503), Fault(drop="within")]
    generator = random.Random(1)

    def plan(arrival, body):
        return generator.choice(kinds) if generator.random() < 0.3 else None

    with ChatServer(writer(), plan) as server:
        status = run(tmp_path / "run", server.url, seeds, generator={"retries": 20})
        assert server.rejected.total() > 5
    assert status.stopped == "target"
    assert contents(tmp_path / "run") == contents(whole[0])


@pytest.mark.soak
def test_answers_that_are_no_json_are_refused_and_the_run_goes_on(tmp_path, seeds):
    with ChatServer(
        writer(), lambda arrival, body: Fault(body=TRUNCATED) if arrival % 3 == 0 else None
    ) as server:
        damaged = run(tmp_path / "damaged", server.url, seeds, stop={"target": 60})
    assert damaged.stopped == "target"
    assert damaged.rejected["request"] > 5
    reasons = {r["reason"] for r in lines(tmp_path / "damaged" / "rejected.jsonl") if r["stage"] == "request"}
    assert reasons == {"the answer is not JSON (JSONDecodeError)"}


def test_one_cluster_takes_all_and_a_pool_of_five_grows(tmp_path, server):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in seed_rows(1)[:5]))
    status = run(tmp_path / "run", server.url, seeds, accept={"clusters": 0.01}, stop={"target": 20})
    assert (status.stopped, status.clusters) == ("target", 1)
    assert status.rejected.get("dense", 0) == 0
    for row in lines(tmp_path / "run" / "accepted.jsonl"):
        assert (row["cluster"], row["sparse"]) == (0, True)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"requests": 40}, "budget of requests"),
        pytest.param({"tokens": 900}, "budget of tokens", marks=pytest.mark.soak),
        pytest.param({"seconds": 0.3}, "budget of seconds", marks=pytest.mark.soak),
    ],
)
def test_a_spent_budget_ends_the_run_and_more_of_it_goes_on(limit, words, whole, tmp_path, seeds):
    with ChatServer(writer(), lambda arrival, body: Fault(stall=0.01)) as server:
        status = run(tmp_path / "run", server.url, seeds, stop=limit)
        assert status.stopped == "budget"
        assert words in status.why
        assert status.pool < 68
        if "requests" in limit:
            assert status.requests == 40 == server.served.total()
        last = lines(tmp_path / "run" / "events.jsonl")[-1]
        assert (last["event"], last["reason"], last["why"]) == ("stop", "budget", status.why)
        if "requests" in limit:
            assert run(tmp_path / "run", server.url, seeds).stopped == "target"
            assert max(server.served.values()) == 1
            assert contents(tmp_path / "run") == contents(whole[0])


def test_questions_of_tests_and_of_the_pool_are_kept_out(tmp_path, seeds):
    known, test = seed_rows(4)[0], "The quick brown fox jumps over the lazy dog every single day. Why?"
    (tmp_path / "tests.jsonl").write_text(json.dumps({"prompt": test, "completion": "It likes to."}) + "\n")
    texts = [test, known["prompt"].upper(), *(p["prompt"] for p in seed_rows(1, seed=9))]

    def answer(messages, draw):
        return f"<prompt>{texts[draw % len(texts)]}</prompt><completion>I do not know.</completion>"

    with ChatServer(answer) as server:
        status = run(
            tmp_path / "run",
            server.url,
            seeds,
            filter={"tests": str(tmp_path / "tests.jsonl"), "near": None},
            accept={"rule": "all"},
            stop={"target": 48 + 11},
        )
    assert status.rejected["tests"] > 0
    assert status.rejected["copy"] > 0
    reasons = {r["reason"] for r in lines(tmp_path / "run" / "rejected.jsonl") if r["stage"] == "tests"}
    assert [reason.rpartition(" with ")[2] for reason in reasons] == ["tests.jsonl:1"]
    prompts = {row["prompt"] for row in lines(tmp_path / "run" / "accepted.jsonl")}
    assert not prompts & set(texts[:2])


def test_math_asks_for_solutions_and_keeps_the_majority(tmp_path, seeds):
    pytest.importorskip("math_verify", reason="needs the extra 'synthesis'")

    def answer(messages, draw):
        r = random.Random(f"{draw}|{messages[-1]['content']}")
        text = messages[-1]["content"]
        if "<problem>" in text:
            made = [f"<problem>What is {r.randint(2, 99)} times {r.randint(2, 99)}?</problem>" for _ in "ab"]
            return "\n".join(made[: r.randint(1, 2)])
        one, other = (int(word.rstrip("?")) for word in text.split() if word.rstrip("?").isdigit())
        return f"We multiply. \\boxed{{{one * other + (r.random() < 0.4)}}}"

    with ChatServer(answer) as server:
        status = run(
            tmp_path / "run",
            server.url,
            seeds,
            task={"name": "math", "settings": {"problems": 2}},
            accept={"rule": "all"},
            filter={"near": None, "workers": 2},
            stop={"target": 56},
        )
        assert paid(tmp_path / "run") == server.served
    rows = lines(tmp_path / "run" / "accepted.jsonl")
    assert len(rows) == 8
    assert any(row["id"].endswith(".1") for row in rows)
    assert all(row["meta"]["votes"] >= 2 for row in rows)
    assert status.rejected.get("answers", 0) == sum(
        row["stage"] == "answers" for row in lines(tmp_path / "run" / "rejected.jsonl")
    )
    assert status.seconds["checks"] > 0


def test_a_local_model_whose_answers_cannot_be_read_ends_at_the_floor(tmp_path, seeds):
    status = run(
        tmp_path / "run",
        None,
        seeds,
        task={"name": "generic", "settings": {"shots": 1}},
        generator={"kind": "local", "model": "tiny", "max_tokens": 4, "batch": 8},
        stop={"floor": 0.5, "window": 8},
        ahead=1,
    )
    assert (status.stopped, status.accepted) == ("acceptance", 0)
    assert sum(status.rejected.values()) == 8
    assert set(status.rejected) <= {"request", "parse"}
    with pytest.raises(GvendiError, match="are of an endpoint"):
        run(tmp_path / "run", None, seeds, generator={"kind": "local", "model": "tiny"}, stop={"requests": 5})


def test_a_run_that_another_process_holds_is_refused(whole, seeds, server):
    with RequestStore(whole[0] / "requests.sqlite"), pytest.raises(GvendiError, match="open elsewhere"):
        run(whole[0], server.url, seeds)


@pytest.mark.parametrize("terminal", [True, False])
def test_view_tells_pool_reasons_and_scores(whole, terminal):
    stream = StringIO()
    stream.isatty = lambda: terminal
    with view_for(stream) as view:
        view.update(whole[1])
    shown = stream.getvalue()
    for told in (
        "68 rows of 68 wanted",
        "accepted 20",
        f"dense {whole[1].rejected['dense']}",
        "at the start",
    ):
        assert told in shown
    assert f"{whole[1].gvendi:.2f}" in shown


def test_other_settings_in_the_same_directory_are_refused(whole, tmp_path, seeds, server):
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    with pytest.raises(GvendiError, match=r"settings\.accept\.clusters: 12\.0 there, 7\.0 now"):
        run(copy, server.url, seeds, accept={"clusters": 7})
    (copy / "sketches.f32").write_bytes(b"")
    with pytest.raises(GvendiError, match=r"sketches\.f32' has 0 bytes"):
        run(copy, server.url, seeds)


def test_decisions_of_a_block_follow_the_definitions():
    rows = torch.nn.functional.normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)))
    records = [{"prompt": f"q{i}", "completion": "a"} for i in range(40)]
    pool = GrownPool([str(i) for i in range(40)], records, rows[:40], GenericTask(), 0.5)
    judge = Judge(pool, AcceptConfig(clusters=6, quantile=0.25), seed=0)
    judge.begin(rows[40:])
    before, counts, centroids = score_of(rows[:40]), None, None
    others = [score_of(torch.cat([rows[:i], rows[i + 1 : 40]])) for i in range(40)]
    threshold = np.quantile([math.log(before / other) for other in others], 0.25)
    threshold *= math.log(41 / 40) / math.log(40 / 39)
    centroids = judge.kmeans.centroids
    counts = Counter((rows[:40] @ centroids.T).argmax(1).tolist())
    for number, row in enumerate(rows[40:]):
        found = judge.judge(number)
        assert found.cluster == int((centroids @ row).argmax())
        smaller = sorted(range(6), key=lambda c: (counts[c], c))[:3]
        assert found.sparse == (found.cluster in smaller)
        gain = math.log(score_of(torch.cat([rows[:40], row[None]])) / before)
        assert found.gain == pytest.approx(gain, abs=2e-6)
        assert found.above == (found.gain > threshold)
        cosine, place = judge.nearest(number)
        cosines = pool.sketches() @ row
        assert (place, cosine) == (int(cosines.argmax()), pytest.approx(float(cosines.max()), abs=1e-6))
        if found.sparse:
            pool.add(f"new-{number}", {"prompt": f"n{number}", "completion": "a"}, row)
            judge.joined(found)
            counts[found.cluster] += 1
    assert nearest(rows[:2], rows) == [(pytest.approx(1.0), 0), (pytest.approx(1.0), 1)]


def test_journal_keeps_any_text_and_cuts_what_no_block_names(tmp_path):
    event = {
        "block": 0,
        "accepted": 1,
        "rejected": {"verifier": 1},
        "cut_short": False,
        "pool": 2,
        "gains": [],
    }
    row, refused = {"id": "a", "prompt": "\u2028 \r\n é"}, {"id": "b", "reason": "half: \ud800"}
    journal = Journal(tmp_path, {"a": 1}, 5)
    journal.block([row], [refused], np.ones((1, 4), np.float32), event)
    journal.close()
    before = contents(tmp_path)
    for name in FILES:
        with (tmp_path / name).open("ab") as stream:
            stream.write(b"behind\n")
    journal = Journal(tmp_path, {"a": 1}, 5)
    journal.close()
    assert contents(tmp_path) == before
    assert journal.accepted() == [row]
    assert json.loads((tmp_path / "rejected.jsonl").read_bytes()) == refused
    assert journal.sketches(4).tolist() == [[1.0] * 4]
    assert journal.rejections() == {"verifier": 1}


def test_draws_are_distinct_uniform_and_fixed():
    found = Counter()
    for number in range(3000):
        rows = shot_rows(7, 0, number, 20, 5)
        assert len(set(rows)) == 5
        found.update(rows)
    assert set(found) == set(range(20))
    # 15,000 draws of 20: 750 each, standard deviation 24.
    assert all(abs(n - 750) < 5 * 24 for n in found.values())
    assert sorted(shot_rows(0, 0, 0, 3, 5)) == [0, 1, 2]
    assert shot_rows(0, 1, 2, 10**6, 5) == shot_rows(0, 1, 2, 10**6, 5)
    assert len({tuple(shot_rows(0, r, n, 10**6, 5)) for r in range(3) for n in range(3)}) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop": {"taget": 5}}, "stop.taget is not known; did you mean 'target'?"),
        ({"pol": {}}, "pol is not known; did you mean 'pool'?"),
        ({"stop": {"target": "many"}}, 'stop.target is "many"; wanted an integer of at least 1'),
        ({"stop": {"target": True}}, "stop.target is true; wanted an integer"),
        ({"stop": {"target": 0}}, "stop.target is 0; wanted an integer of at least 1"),
        ({"stop": {"floor": 2}}, "stop.floor is 2; wanted a number of at least 0 and at most 1"),
        ({"accept": {"rule": "both"}}, 'accept.rule is "both"; wanted one of cluster, gain, all'),
        (
            {"filter": {"near": "x"}},
            'filter.near is "x"; wanted a number of at least 0 and at most 1 or null',
        ),
        ({"pool": {"data": [1]}}, "pool.data is [1]; wanted a list of texts"),
        ({"generator": {"prices": [1]}}, "generator.prices is [1.0]; wanted two numbers"),
        ({"generator": {"base_url": None}}, "generator.base_url is missing"),
        ({"task": 3}, "task is 3; wanted a section with keys"),
    ],
)
def test_configuration_errors_name_the_key(change, message):
    values = settings(Path("o"), "http://localhost/v1", Path("s.jsonl"), **change)
    with pytest.raises(GvendiError) as error:
        config_from(values)
    assert message in str(error.value)


def test_every_wrong_key_is_named_at_once():
    values = settings(
        Path("o"), "http://localhost/v1", Path("s.jsonl"), stop={"taget": 5}, filter={"paraphrase": 3}
    )
    values = {**values, "seed": "x", 7: None, "pool": {"data": ["a", 1, 2]}}
    del values["stop"]["target"], values["task"]["name"]
    with pytest.raises(GvendiError) as error:
        config_from(values)
    # A missing key beside an unknown one is the unknown one.
    assert [line.split("; ")[0] for line in str(error.value).splitlines()] == [
        'pool.data is ["a", 1, 2]',
        "task.name is missing",
        "stop.taget is not known",
        "filter.paraphrase is 3 but filter.tests names no file",
        'seed is "x"',
        "7 is not known",
    ]
    with pytest.raises(GvendiError, match=r"^the configuration is \[1\]; wanted a section with keys$"):
        config_from([1])


@pytest.mark.parametrize(
    ("section", "key", "wrong"),
    [
        ("stop", "target", "5"),
        ("stop", "target", 5.0),
        ("stop", "floor", True),
        ("stop", "floor", "0.5"),
        ("stop", "seconds", float("nan")),
        ("stop", "seconds", float("inf")),
        ("accept", "clusters", 10**400),
        ("accept", "frozen", 1),
        ("accept", "frozen", "true"),
        ("accept", "rule", ["gain"]),
        ("proxy", "name", 3),
        ("proxy", "process", "no"),
        ("pool", "data", ("a.jsonl",)),
        ("task", "settings", {1: 2}),
        ("generator", "prices", [1, "2"]),
    ],
)
def test_nothing_is_converted_that_is_not_the_type_itself(section, key, wrong):
    values = settings(Path("o"), "http://localhost/v1", Path("s.jsonl"))
    values = {**values, section: {**values.get(section, {}), key: wrong}}
    with pytest.raises(GvendiError, match=rf"^{section}\.{key} is [^\n]*; wanted [^\n]*$"):
        config_from(values)


def test_a_configuration_is_frozen_and_its_numbers_are_plain():
    values = settings(Path("o"), "http://localhost/v1", Path("s.jsonl"))
    config = config_from({**values, "accept": {"clusters": 12, "round": np.float64(0.5)}})
    assert [type(config.accept.clusters), type(config.accept.round)] == [float, float]
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_configuration_from_a_file_with_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "out: o\npool: {data: a.jsonl}\ntask: {name: math}\n"
        "generator: {model: m, base_url: 'http://h/v1'}\nstop: {target: 9}\n"
    )
    config = load_config(path, ["stop.target=12", "accept.frozen=true", "task.settings.problems=2"], out="p")
    assert (config.stop.target, config.accept.frozen, config.out) == (12, True, "p")
    assert config.pool.data == ["a.jsonl"]
    assert config.task.settings == {"problems": 2}
    assert config_from(config.to_dict()) == config
    for wrong, message in [
        ("stop.target", "is no setting"),
        ("out.x=1", "not a section"),
        ("stop.target=[", "the value is not YAML"),
    ]:
        with pytest.raises(GvendiError, match=message):
            load_config(path, [wrong])
    path.write_text("- 1\n")
    with pytest.raises(GvendiError, match=r"holds \[1\]"):
        load_config(path)


def test_a_verifier_that_never_works_ends_the_run(tmp_path, seeds, server):
    (tmp_path / "broken.py").write_text("def check(row, more):\n    return True\n")
    task = {"name": "generic", "settings": {"verifier": "broken:check", "verifier_folder": str(tmp_path)}}
    with pytest.raises(GvendiError, match="first 16 checks all ended in an error, the last: TypeError"):
        run(tmp_path / "run", server.url, seeds, task=task)
    stop = lines(tmp_path / "run" / "events.jsonl")[-1]
    assert (stop["event"], stop["reason"]) == ("stop", "error")
    previews = preview(config_from(settings(tmp_path / "other", server.url, seeds, task=task)), 3)
    checks = [found["check"] for shown in previews for found in shown["candidates"]]
    assert checks
    assert all(check.startswith("verifier error: TypeError") for check in checks)


def test_the_directory_of_a_run_is_no_corpus(whole, tmp_path, server):
    with pytest.raises(GvendiError, match=r"directory of a synthesis run; name its accepted\.jsonl"):
        run(tmp_path / "run", server.url, whole[0])


def test_a_run_of_few_clusters_or_of_less_than_a_block_is_told(tmp_path, seeds, server):
    told = []
    sections = {"accept": {"clusters": 0.01}, "stop": {"target": 49, "requests": 7}}
    synthesize(config_from(settings(tmp_path / "run", server.url, seeds, **sections)), say=told.append)
    assert [line.partition("=")[0] for line in told if "note" in line] == [
        "note: accept.clusters",
        "note: stop.requests",
    ]


def test_all_keys_are_listed_with_their_defaults(gvendi):
    code, shown, _ = gvendi("synthesize", "--keys")
    assert code == 0
    values = config_from(settings(Path("o"), "http://localhost/v1", Path("s.jsonl"))).to_dict()
    for name, section in values.items():
        for key in section if isinstance(section, dict) else (None,):
            line = f"\n  {name}: " if key is None else f"\n  {name}.{key}: "
            # Each stands below what it means, and what it may hold.
            above = shown.partition(line)[0].rpartition("\n\n")[2]
            assert line in shown
            assert re.fullmatch(r"  # [^\[]{10,}\[[^\]]+\]", " ".join(above.split("\n  # ")))
    for line in (
        "accept.round: 0.1",
        "stop.target: (needed)",
        "task.settings.tau: 2",
        "generator.retries: 6",
    ):
        assert f"\n  {line}\n" in shown


def test_command_previews_runs_and_resumes(gvendi, tmp_path, seeds, server, whole):
    from gvendi_fast.synthesis.report.data import synthesis_report_data

    out, path = tmp_path / "run", tmp_path / "c.yaml"
    path.write_text(json.dumps(settings(out, server.url, seeds)))
    code, shown, _ = gvendi("synthesize", path, "--preview", 2)
    assert code == 0
    assert shown.count("--- candidate") + shown.count("--- no candidate") == 2
    assert "Here are 5 examples of a task" in shown
    assert not out.exists()
    assert os.listdir(tmp_path) == ["c.yaml"]

    code, shown, told = gvendi("synthesize", path, "stop.target=56", "generator.prices=[1, 10]")
    assert code == 0
    assert "stopped: the pool has 56 rows" in shown
    assert re.search(r"\n  unlimited K     \d+\.\d\d, \d+\.\d\d at the start; G-Vendi is at K = 256\n", shown)
    assert re.search(
        r"\n  centred         \d+\.\d\d, \d+\.\d\d at the start; both less the mean of the seeds\n", shown
    )
    # Computed once, at the end: no line on the way has them.
    assert "unlimited" not in told
    assert "cost" in shown
    assert "in dense" not in told
    code, shown, _ = gvendi("synthesize", "--resume", out, "stop.target=68", "--json")
    assert code == 0
    found = json.loads(shown)
    assert (found["stopped"], found["pool"]) == ("target", 68)
    report = json.loads(json.dumps(synthesis_report_data(out)))["score"]
    for name, n in (("at_start", 48), ("at_end", 68)):
        assert found[name] == report[name]
        assert (found[name]["n"], found[name]["dim"]) == (n, 256)
    assert found["at_end"]["gvendi"] == found["gvendi"] == report["gvendi"]
    assert found["at_start"]["gvendi"] == pytest.approx(found["start_gvendi"], rel=1e-6)
    assert contents(out) == contents(whole[0])
    code, _, told = gvendi("synthesize", "--resume", out, "out=elsewhere")
    assert code == 1
    assert "out= does not go with --resume" in told
    code, _, told = gvendi("synthesize", "--resume", tmp_path / "none")
    assert code == 1
    assert "holds no run" in told
    code, _, told = gvendi("synthesize", path, "stop.goal=3")
    assert code == 1
    assert "stop.goal is not known" in told


def test_events_tell_the_rounds(whole):
    events = lines(whole[0] / "events.jsonl")
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == list(range(len(rounds)))
    assert rounds[0]["pool"] == 12 * 4 == len(FAMILIES) * 4
    assert all(b["pool"] >= 1.2 * a["pool"] for a, b in pairwise(rounds))
    blocks = [event for event in events if event["event"] == "block"]
    assert [event["block"] for event in blocks] == list(range(len(blocks)))
    assert blocks[-1]["pool"] == 68
    assert events[-1]["event"] == "stop"
