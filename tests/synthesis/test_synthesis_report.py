"""The report of a synthesis run: numbers against their definitions, every way a run ends, hostile texts, the page."""

import datetime
import json
import math
import random
import shutil
import signal
from collections import Counter
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import synthesis_runs
import torch
from chat_server import ChatServer, Fault
from pages import Page, check_in_browser
from problem_families import FAMILIES, seed_rows
from synthesis_runs import FILES, contents, lines

from gvendi_fast.analysis.equal_n import draws
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.shown import number
from gvendi_fast.cli.synthesize import view_for
from gvendi_fast.clusters.kmeans import SphericalKMeans, sparse_clusters
from gvendi_fast.data.pool import as_pool
from gvendi_fast.synthesis.config.config import config_from, load_config
from gvendi_fast.synthesis.disk.digests import summed_line, whole_events
from gvendi_fast.synthesis.disk.journal import Journal
from gvendi_fast.synthesis.disk.record import RunRecord
from gvendi_fast.synthesis.generators.stops import EndpointDownError, KeyRefusedError
from gvendi_fast.synthesis.report import data as report_data
from gvendi_fast.synthesis.report import examples
from gvendi_fast.synthesis.report import page as report_page
from gvendi_fast.synthesis.report.data import synthesis_report_data
from gvendi_fast.synthesis.report.page import render, write_synthesis_report
from gvendi_fast.synthesis.run import synthesize
from gvendi_fast.vendi import RowMean, VendiState, centered, gvendi
from gvendi_fast.vendi.unlimited_k import unlimited_k

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
DAY = datetime.date(2020, 2, 29)
FIGURES = {"equal", "growth", "acceptance", "stages", "clusters", "rules", "seconds"}
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>",
    "{{ 7 * 191 }} {% for x in y %} {# gone? #} ${7 * 191}",
    "\u202eright to left\u202c, bell \x07, escape \x1b[31m",
    "</p></section></main></body></html> &amp; \"quoted\" 'too'",
    "x" * 5000,
)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("seeds") / "seeds.jsonl"
    rows = [*seed_rows(2), {"id": f"<b>{HOSTILE[1]}", "prompt": HOSTILE[0], "completion": HOSTILE[2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(messages: list, draw: int) -> str:
    """Problems of two families for the most part, some hostile, some that cannot be read."""
    r = random.Random(f"{draw}|{messages[-1]['content']}")
    if r.random() < 0.1:
        return HOSTILE[0]
    kinds = ["addition", "binary"] if r.random() < 0.5 else list(FAMILIES)
    prompt, completion = FAMILIES[r.choice(kinds)](r)
    if r.random() < 0.2:
        prompt, completion = f"{r.choice(HOSTILE)} {r.random()}", r.choice(HOSTILE)
    return f"<prompt>{prompt}</prompt><completion>{completion}</completion>"


def settings(out: Path, url: str, seeds: Path, **sections) -> dict:
    """A smaller run with prices, over which sections go key by key."""
    own = {
        "generator": {"prices": [1, 10], "first_delay": 0.001, "longest_delay": 0.002, "retries": 20},
        "proxy": {"dim": 128, "max_tokens": 400},
        "accept": {"round": 0.3},
        "stop": {"target": 50},
        "ahead": 2,
    }
    for name, value in sections.items():
        own[name] = {**own.get(name, {}), **value} if isinstance(value, dict) else value
    return synthesis_runs.settings(out, url, seeds, **own)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums that are the same in a run and in a report made later, to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, seeds):
    """A run to its end: its directory, its status and the requests that were answered."""
    patch = pytest.MonkeyPatch()
    patch.setenv("NO_PROXY", "127.0.0.1")
    out = tmp_path_factory.mktemp("whole") / "run"
    with ChatServer(answer) as server:
        status = synthesize(config_from(settings(out, server.url, seeds)))
        served = server.served.total()
    patch.undo()
    return out, status, served


@pytest.fixture(scope="module")
def data(whole) -> dict:
    return synthesis_report_data(whole[0])


@pytest.fixture(scope="module")
def sketches(whole) -> tuple[np.ndarray, np.ndarray]:
    """Unit sketches of the seeds and of the accepted rows."""
    old = np.concatenate([rows.numpy() for _, rows in as_pool(whole[0] / "pool").blocks()])
    return old, np.fromfile(whole[0] / "sketches.f32", np.float32).reshape(-1, 128)


def test_a_run_leaves_its_report(whole, data):
    out, status, served = whole
    found = json.loads((out / "report.json").read_text())
    assert found == json.loads(json.dumps(data))
    assert (data["stop"], status.stopped) == ({"reason": "target", "why": status.why}, "target")
    page = (out / "report.html").read_text()
    assert {name for name in FIGURES if f'data-figure="{name}"' in page} == FIGURES
    spent, stop = data["spent"], lines(out / "events.jsonl")[-1]
    assert spent["requests"] == status.requests == served
    assert [spent["prompt_tokens"], spent["completion_tokens"]] == list(status.tokens) == stop["tokens"]
    assert spent["cost"] == status.cost > 0
    assert spent["seconds"] == stop["seconds"]
    assert spent["seconds"] == pytest.approx(status.seconds)
    assert (spent["runs"], spent["later"]) == (1, False)


def test_unlimited_k_and_centred_are_of_one_reference_at_the_start_and_the_end(whole, data, sketches):
    """Those of the sketches in all K coordinates, the seeds' mean taken out of both; the status has the same."""
    status, score = whole[1], data["score"]
    reference = RowMean(sketches[0].shape[1]).update(sketches[0])
    both = {"at_start": sketches[0], "at_end": np.concatenate(sketches)}
    for name, rows in both.items():
        found, state = score[name], VendiState(rows.shape[1]).update(rows)
        wanted = unlimited_k(state, distinct=len(np.unique(rows, axis=0)))
        assert (found["n"], found["dim"]) == (len(rows), rows.shape[1])
        assert found["gvendi"] == pytest.approx(gvendi(rows), rel=1e-6)
        for key in ("value", "low", "high"):
            assert found["unlimited_k"][key] == pytest.approx(getattr(wanted, key), rel=1e-5)
        assert found["centered"]["value"] == pytest.approx(centered(rows, reference).value, rel=1e-5)
        assert found == json.loads(json.dumps(getattr(status, name).to_dict()))
    assert score["at_start"]["centered"]["value"] != score["at_end"]["centered"]["value"]
    text = " ".join(" ".join(Page(render(data)).words).split())
    end, start = score["at_end"], score["at_start"]
    of, was = (number(numbers["unlimited_k"]["value"]) for numbers in (end, start))
    assert f"Unlimited K {of} {was} at the start: what exact gradients" in text
    of, was = (number(numbers["centered"]["value"]) for numbers in (end, start))
    assert f"Centred {of} {was} at the start; both less the mean of the seeds" in text


def test_scores_are_those_of_the_sketches_at_equal_n(whole, data, sketches):
    old, new = sketches
    rows, score = np.concatenate(sketches), data["score"]
    assert (score["seeds"], score["accepted"], score["rows"]) == (25, 25, 50)
    assert score["gvendi_start"] == pytest.approx(gvendi(old), rel=1e-6)
    assert score["gvendi"] == pytest.approx(gvendi(rows), rel=1e-6)
    assert score["gvendi"] == pytest.approx(whole[1].gvendi, rel=1e-6)
    pool, alone = score["equal"]["pool"], score["equal"]["alone"]
    values = [gvendi(rows[numbers]) for numbers in draws(np.arange(50), 25, "synthesis|0|grown")]
    assert (len(values), len(set(values))) == (20, 20)
    assert pool["grown"]["gvendi"] == pytest.approx(np.mean(values), rel=1e-6)
    assert [pool["grown"]["low"], pool["grown"]["high"]] == pytest.approx(np.percentile(values, (20, 80)))
    assert (pool["n"], pool["seeds"]["gvendi"], pool["seeds"]["draws"]) == (25, score["gvendi_start"], 1)
    assert (alone["n"], alone["accepted"]["gvendi"]) == (25, pytest.approx(gvendi(new), rel=1e-6))
    fewer = report_data._at_equal_n(torch.from_numpy(old), new[:10], 1.0, 3)["alone"]
    values = [gvendi(old[numbers]) for numbers in draws(np.arange(25), 10, "synthesis|3|seeds alone")]
    assert (fewer["n"], fewer["seeds"]["draws"]) == (10, 20)
    assert fewer["seeds"]["gvendi"] == pytest.approx(np.mean(values), rel=1e-6)
    assert fewer["accepted"]["gvendi"] == pytest.approx(gvendi(new[:10]), rel=1e-6)
    assert report_data._at_equal_n(torch.from_numpy(old), new[:7], 1.0, 3)["alone"] is None


def test_growth_goes_through_the_pool_before_every_block(whole, data, sketches):
    blocks = RunRecord(whole[0]).blocks
    rows, points = np.concatenate(sketches), data["growth"]["points"]
    decided = np.cumsum([0, *(event["decided"] for event in blocks)]).tolist()
    sizes = [25, *(event["pool"] for event in blocks)]
    known = list(zip(decided, sizes, strict=True))
    assert {(point["decided"], point["rows"]) for point in points} <= set(known)
    assert [(points[i]["decided"], points[i]["rows"]) for i in (0, -1)] == [known[0], known[-1]]
    assert len(points) > 5
    for point in points:
        assert point["gvendi"] == pytest.approx(gvendi(rows[: point["rows"]]), rel=1e-5)
    rounds = data["growth"]["rounds"]
    assert [mark["round"] for mark in rounds] == list(range(len(rounds)))
    assert len(rounds) == data["score"]["rounds"] > 1
    assert {(mark["decided"], mark["rows"]) for mark in rounds} <= set(known)


def test_stages_and_rules_are_counted(whole, data):
    accepted, rejected = (lines(whole[0] / name) for name in FILES[:2])
    counts, total = Counter(line["stage"] for line in rejected), len(accepted) + len(rejected)
    stages = data["acceptance"]["stages"]
    assert {entry["stage"]: entry["count"] for entry in stages} == counts
    assert [entry["share"] * total for entry in stages] == pytest.approx(
        sorted(counts.values(), reverse=True)
    )
    for entry in stages:
        here = [line for line in rejected if line["stage"] == entry["stage"]]
        wanted = here if len(here) < 3 else [*here[:2], here[-1]]
        assert [(e["id"], e["reason"]) for e in entry["examples"]] == [(e["id"], e["reason"]) for e in wanted]
    assert data["score"]["decided"] == total == sum(w["decided"] for w in data["acceptance"]["windows"])
    assert sum((Counter(w["rejected"]) for w in data["acceptance"]["windows"]), Counter()) == counts
    judged = [line for line in (*accepted, *rejected) if "sparse" in line]
    cells = Counter((line["sparse"], line["above"]) for line in judged)
    rules = data["rules"]
    assert rules["judged"] == len(judged) > 25
    assert (rules["sparse_above"], rules["sparse_below"]) == (cells[True, True], cells[True, False])
    assert (rules["dense_above"], rules["dense_below"]) == (cells[False, True], cells[False, False])


def test_clusters_are_those_that_the_run_had_found(whole, data, sketches):
    old = sketches[0]
    model, found = SphericalKMeans(12, seed=0).fit(old), data["clusters"]
    label = model.assign(np.concatenate(sketches)).label.numpy()
    before, after = np.bincount(label[:25], minlength=12), np.bincount(label, minlength=12)
    assert (found["before"], found["after"], found["elsewhere"]) == (before.tolist(), after.tolist(), 0)
    for counts, entropy in ((before, found["entropy_before"]), (after, found["entropy_after"])):
        p = counts[counts > 0] / counts.sum()
        assert entropy == pytest.approx(-(p * np.log(p)).sum())
    sparse = sparse_clusters(before).numpy()
    assert found["sparse_before"] == pytest.approx(before[sparse].sum() / 25)
    assert found["sparse_after"] == pytest.approx(after[sparse].sum() / 50)
    assert found["sparse_joined"] == pytest.approx((after - before)[sparse].sum() / 25)
    shown = [*found["largest"], *found["smallest"]]
    assert len(shown) == 10
    assert [c["sparse"] for c in shown] == [False] * 5 + [True] * 5
    sizes = [c["before"] for c in shown]
    assert sizes == sorted(sizes, reverse=True)
    texts = [json.loads(line) for line in seeds_of(whole).read_text().splitlines()] + lines(
        whole[0] / FILES[0]
    )
    for cluster in shown:
        members = np.flatnonzero(label == cluster["cluster"])
        cosine = np.concatenate(sketches)[members] @ model.centroids[cluster["cluster"]].numpy()
        assert [row["cosine"] for row in cluster["rows"]] == pytest.approx(
            np.sort(cosine)[::-1][:3], rel=1e-5
        )
        for row in cluster["rows"]:
            assert row["number"] in members
            assert (row["id"], row["new"]) == (texts[row["number"]]["id"], row["number"] >= 25)
            assert row["text"][0]["text"] == texts[row["number"]]["prompt"][:4000]


def seeds_of(whole) -> Path:
    return Path(load_config(whole[0] / "config.yaml").pool.data[0])


def test_accepted_rows_that_are_shown(whole, data):
    rows, shown = lines(whole[0] / FILES[0]), data["accepted"]
    assert [e["id"] for e in shown["first"]] == [row["id"] for row in rows[:3]]
    assert [e["id"] for e in shown["last"]] == [row["id"] for row in rows[-3:]]
    scaled = [row["gain"] / math.log1p(1 / (whole[1].seeds + i)) for i, row in enumerate(rows)]
    highest = sorted(range(len(rows)), key=lambda i: -scaled[i])[:3]
    assert [e["id"] for e in shown["gain"]] == [rows[i]["id"] for i in highest]
    assert shown["first"][0]["parents"] == rows[0]["parents"]
    assert shown["first"][0]["text"][1]["text"] == rows[0]["completion"][:4000]
    assert shown["first"][0]["votes"] is None
    voted = {**rows[0], "meta": {"votes": 2, "answers": ["1", "1", None]}}
    assert examples._accepted(voted)["votes"] == [2, 3]


def test_the_command_writes_the_same_and_refuses_what_does_not_apply(undrawn, whole, gvendi, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    code, said, steps = gvendi("report", out)
    assert (code, said) == (0, f"{out}/report.html, numbers in {out}/report.json\n"), steps
    assert "report: clusters" in steps
    found, before = (json.loads((path / "report.json").read_text()) for path in (out, whole[0]))
    assert {**found, "run": before["run"]} == before
    assert contents(out) == contents(whole[0])
    for option in ("--by", "--clusters"):
        code, _, error = gvendi("report", out, option, "3")
        assert code == 1
        assert f"{option} does not go with the directory of a synthesis" in error
    page = tmp_path / "pages" / "mine.html"
    assert gvendi("report", out, "--out", page, "--title", "<Mine>", "--seed", 5)[0] == 0
    assert "<title>&lt;Mine&gt;</title>" in page.read_text()
    mine = json.loads(page.with_suffix(".json").read_text())
    assert mine["score"]["gvendi"] == found["score"]["gvendi"]
    assert mine["score"]["equal"]["pool"]["grown"] != found["score"]["equal"]["pool"]["grown"]
    code, _, error = gvendi("report", out, "--out", page)
    assert (code, "already exists" in error) == (1, True)
    assert gvendi("report", out / "pool", "--out", tmp_path / "pool.html")[0] == 0


def test_a_run_that_was_killed_shows_what_was_decided(undrawn, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    events = (out / "events.jsonl").read_bytes()
    (out / "events.jsonl").write_bytes(events[: len(events) // 2])
    for name in FILES:
        with (out / name).open("ab") as stream:
            stream.write(b'{"torn')
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    found = synthesis_report_data(out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    last = [
        e for e in map(json.loads, events[: len(events) // 2].split(b"\n")[:-1]) if e["event"] == "block"
    ][-1]
    assert (found["score"]["rows"], found["stop"]) == (last["pool"], None)
    assert found["score"]["accepted"] == last["accepted"] == sum(found["clusters"]["after"]) - 25
    assert (found["spent"]["requests"], found["spent"]["runs"]) == (None, 0)
    page = render(found)
    assert "The run has not ended" in page
    assert "A run notes this when it ends" in page


def broken_after(last: int, fault: Fault):
    """Every request behind the first `last` meets the fault."""
    return lambda arrival, body: fault if arrival > last else None


# What ends a run, the error, and the reason on record.
FAULTS = [
    (broken_after(30, Fault(drop="before")), EndpointDownError, "endpoint"),
    (broken_after(15, Fault(status=401, body={"error": {"message": "no"}})), KeyRefusedError, "key"),
]


def test_a_fault_that_ends_the_run_is_noted_and_the_run_goes_on(undrawn, whole, tmp_path, seeds):
    out, served, decided = tmp_path / "run", 0, 0
    for plan, error, reason in FAULTS:
        with ChatServer(answer, plan) as server:
            with pytest.raises(error) as raised:
                synthesize(config_from(settings(out, server.url, seeds)))
            served += server.served.total()
        stop = lines(out / "events.jsonl")[-1]
        assert (stop["event"], stop["reason"], stop["why"]) == ("stop", reason, raised.value.why)
        assert (stop["requests"], stop["pool"]) == (served, 25 + len(lines(out / FILES[0])))
        found = json.loads((out / "report.json").read_text())
        assert found["stop"] == {"reason": reason, "why": raised.value.why}
        assert decided < found["score"]["decided"] < 60
        decided = found["score"]["decided"]
        words = "".join(Page((out / "report.html").read_text()).words)
        assert f"It ended before its target: {raised.value.why}" in words
    with ChatServer(answer) as server:
        synthesize(config_from(settings(out, server.url, seeds)))
    assert contents(out) == contents(whole[0])
    found = json.loads((out / "report.json").read_text())
    assert (found["stop"]["reason"], found["spent"]["runs"]) == ("target", 3)
    assert found["score"] == json.loads((whole[0] / "report.json").read_text())["score"]
    assert found["spent"]["requests"] == served + server.served.total()


@pytest.mark.soak
def test_an_interrupt_and_a_full_disk_are_noted_and_the_run_goes_on(
    monkeypatch, undrawn, whole, tmp_path, seeds
):
    class Stopper:
        def update(self, status):
            if status.accepted > 3:
                signal.raise_signal(signal.SIGINT)

    out, said, plain = tmp_path / "run", [], Journal.block
    with ChatServer(answer) as server:
        with pytest.raises(KeyboardInterrupt):
            synthesize(config_from(settings(out, server.url, seeds)), Stopper(), say=said.append)
        assert json.loads((out / "report.json").read_text())["stop"]["reason"] == "interrupted"
        assert 3 < json.loads((out / "report.json").read_text())["score"]["accepted"] < 25
        assert said == [f"writing {out / 'report.html'}"]

        written = len([event for event in lines(out / "events.jsonl") if event["event"] == "block"])

        def full(self, *arguments):
            if len(self.blocks) == written + 1:
                raise OSError(28, "No space left on device")
            plain(self, *arguments)

        monkeypatch.setattr(Journal, "block", full)
        with pytest.raises(OSError, match="No space left"):
            synthesize(config_from(settings(out, server.url, seeds)))
        stop = lines(out / "events.jsonl")[-1]
        assert (stop["event"], stop["reason"]) == ("stop", "error")
        assert "its disk is full" in stop["why"]
        assert "Errno" not in stop["why"]
        assert "It ended before its target" in (out / "report.html").read_text()
        monkeypatch.setattr(Journal, "block", plain)
        synthesize(config_from(settings(out, server.url, seeds)))
    assert contents(out) == contents(whole[0])


@pytest.mark.parametrize("kind", [GvendiError, pytest.param(ValueError, marks=pytest.mark.soak)])
def test_a_report_that_fails_hides_neither_result_nor_error(kind, monkeypatch, whole, tmp_path, seeds):
    def fails(folder):
        raise kind("no report today")

    monkeypatch.setattr(report_data, "synthesis_report_data", fails)
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    with (
        ChatServer(answer) as server,
        pytest.warns(UserWarning, match=r"no report was written.*no report today"),
    ):
        assert synthesize(config_from(settings(out, server.url, seeds))).pool == 50
    refuse = Fault(status=401, body={"error": {"message": "no"}})
    with (
        ChatServer(answer, lambda arrival, body: refuse) as server,
        pytest.warns(UserWarning, match="no report"),
        pytest.raises(KeyRefusedError),
    ):
        synthesize(config_from(settings(out, server.url, seeds, stop={"target": 60})))


@pytest.mark.parametrize(("new", "shift"), [(300, 0.0), (300, 1.0)])
def test_more_or_less_is_said_of_rows_of_another_kind_only(new, shift):
    """Rows of the seeds' kind are told apart in 5 of 100 cases; of 40 runs at most 7 is 0.9987 of the binomial."""
    generator, told = torch.Generator().manual_seed(0), 0
    for seed in range(40):
        rows = torch.randn(300 + new, 32, generator=generator) * torch.arange(1, 33) ** -0.5
        rows[300:, 4:] /= 1 + shift
        rows = torch.nn.functional.normalize(rows)
        found = report_data._at_equal_n(rows[:300], rows[300:].numpy(), gvendi(rows[:300]), seed)
        told += found["pool"]["told_apart"]
    assert told == 40 if shift else told <= 7


def test_nothing_accepted_and_nothing_decided(undrawn, tmp_path, seeds):
    with ChatServer(lambda messages, draw: HOSTILE[1]) as server:
        synthesize(config_from(settings(tmp_path / "a", server.url, seeds, stop={"floor": 0.5, "window": 8})))
    refuse = Fault(status=401, body={"error": {"message": "no"}})
    with ChatServer(answer, lambda arrival, body: refuse) as server, pytest.raises(KeyRefusedError):
        synthesize(config_from(settings(tmp_path / "b", server.url, seeds)))
    for name, decided, figures in (
        ("a", 8, {"growth", "acceptance", "stages", "clusters", "seconds"}),
        ("b", 0, {"growth", "clusters", "seconds"}),
    ):
        found = json.loads((tmp_path / name / "report.json").read_text())
        score = found["score"]
        assert (score["accepted"], score["decided"], score["gvendi"]) == (0, decided, score["gvendi_start"])
        assert score["equal"]["alone"] is None
        assert (found["rules"]["judged"], found["clusters"]["before"]) == (0, found["clusters"]["after"])
        page = (tmp_path / name / "report.html").read_text()
        assert {figure for figure in FIGURES if f'data-figure="{figure}"' in page} == figures
        assert "No row has been accepted" in page


def test_what_a_model_wrote_is_text_and_nothing_else(undrawn, whole, data):
    spoiled = json.loads(json.dumps(data))
    for entry, text in zip(examples.shown_rows(spoiled), HOSTILE * 99, strict=False):
        entry["text"] = [{"role": "prompt", "text": text, "length": len(text)}]
        entry["id"], entry["parents"] = text, [text]
        if "reason" in entry:
            entry["reason"] = text
    spoiled["stop"]["why"] = "".join(HOSTILE[:4])
    spoiled["settings"]["generator"]["model"] = spoiled["generator"] = HOSTILE[0]
    spoiled["acceptance"]["stages"][0]["stage"] = HOSTILE[0]
    shown = ("\\u202eright to left\\u202c, bell \\x07, escape \\x1b[31m", *HOSTILE[:2])
    # Which rows the run's own page shows depends on the last place of their sketches.
    texts = [part["text"] for entry in examples.shown_rows(data) for part in entry["text"] or ()]
    raw = (HOSTILE[2], *HOSTILE[:2])
    written = [text for text, one in zip(shown, raw, strict=True) if any(one in other for other in texts)]
    assert written
    pages = {render(spoiled, title=HOSTILE[3]): shown, (whole[0] / "report.html").read_text(): written}
    for page, wanted in pages.items():
        seen = Page(page)
        assert not seen.tags & {"script", "img", "iframe", "object", "embed", "form", "b onclick"}
        assert not any(name.startswith("on") for name in seen.attributes)
        words = "".join(seen.words)
        for text in wanted:
            assert text in words
        assert "1337" not in words
        assert "script-src" not in page
        assert "default-src 'none'" in page


def many_blocks(count: int, frozen: bool = False) -> SimpleNamespace:
    """A record of `count` blocks of 20 candidates, of which one joins; a round for each tenth of them."""
    stages = [
        "dense",
        "low gain",
        "copy",
        "near copy",
        "parse",
        "request",
        "tests",
        "answers",
        "sketch",
        "other",
    ]
    kinds = [Counter(stages[i % 10] for i in range(k, k + 19)) for k in range(10)]
    blocks = [
        {
            "block": i,
            "pool": 101 + i,
            "joined": 1,
            "decided": 20,
            "rejected": dict(kinds[i % 10]),
            "gvendi": 9 + i / count,
        }
        for i in range(count)
    ]
    rounds = [{"round": i, "block": b} for i, b in enumerate(range(0, count, max(1, count // 10)))]
    config = SimpleNamespace(accept=SimpleNamespace(frozen=frozen))
    return SimpleNamespace(seeds=100, blocks=blocks, rounds=rounds, config=config)


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_figures_hold_any_number_of_blocks(count, data):
    record = many_blocks(count)
    found = report_data._acceptance(record, {})
    assert len(found["windows"]) == min(count, 60) or 50 <= len(found["windows"]) <= 60
    assert sum(window["decided"] for window in found["windows"]) == 20 * count
    for window in found["windows"]:
        assert window["decided"] == window["accepted"] + sum(window["rejected"].values())
    growth = report_data._growth(record, 11.0)
    assert [p["decided"] for p in growth["points"]] == [20 * i for i in range(count + 1)]
    frozen = many_blocks(count, True)
    for block in record.blocks[1::2]:
        # Gains that refer to a smaller pool have no point of their own.
        block["gvendi_rows"] = 99
    assert [p["decided"] for p in report_data._growth(record, 11.0)["points"]][:-1] == list(
        range(0, 20 * count, 40)
    )
    frozen = report_data._growth(frozen, 11.0)
    assert len(frozen["points"]) == len(frozen["rounds"]) + 1 == len(record.rounds) + 1
    many = np.random.default_rng(0).integers(1, 50, 3 * count)
    clusters = {"before": many.tolist(), "after": (2 * many).tolist(), "sparse": len(many) // 2}
    for drawn in (
        report_page.figures.acceptance_figure(found),
        report_page.figures.growth_figure(growth),
        report_page.figures.clusters_figure(clusters),
    ):
        for svg in drawn.values():
            assert svg.startswith("<svg")
            assert len(svg) < 100_000


def test_what_cannot_be_read_is_refused_by_name(undrawn, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    with pytest.raises(GvendiError, match=r"holds no synthesis run \(fingerprint.json is not there\)"):
        synthesis_report_data(tmp_path)
    (out / "accepted.jsonl").write_bytes(b"")
    with pytest.raises(GvendiError, match=r"accepted.jsonl' has 0 bytes"):
        synthesis_report_data(out)
    shutil.copy(whole[0] / "accepted.jsonl", out)
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config.replace("limit: null", "limit: 20"))
    with pytest.raises(GvendiError, match=r"has 20 rows and the run .* grew from 25"):
        synthesis_report_data(out)
    address = "http://name:secret@host:1/v1?key=secret"
    url = load_config(whole[0] / "config.yaml").generator.base_url
    (out / "config.yaml").write_text(config.replace(url, f"'{address}'"))
    with (out / "events.jsonl").open("a") as stream:
        raw = (out / "events.jsonl").read_bytes()
        _, digest = whole_events(out / "events.jsonl", raw)
        stop = {"event": "stop", "reason": "endpoint", "why": f"{address} is down"}
        stream.write(summed_line(stop, digest).decode())
    seeds = seeds_of(whole)
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(seeds, moved / seeds.name)
    try:
        found = synthesis_report_data(out)
        assert "is not where it was" in found["texts_missing"]
        assert "The seeds have no texts here" in (page := render(found))
        assert "secret" not in page + json.dumps(found)
        assert found["settings"]["generator"]["base_url"] == "http://host:1/v1"
        assert found["stop"]["why"] == "http://host:1/v1 is down"
        assert synthesis_report_data(out, corpus=moved)["texts_missing"] is None
    finally:
        shutil.move(moved / seeds.name, seeds)
    spec = json.loads((out / "pool" / "spec.json").read_text())
    (out / "pool" / "spec.json").write_text(json.dumps({**spec, "dtype": "bfloat16"}))
    with pytest.raises(GvendiError, match=r"spec.json. is not the one that .* was made with"):
        synthesis_report_data(out)
    shutil.rmtree(out / "pool")
    with pytest.raises(GvendiError, match=r"sketches of the seed pool of .* are not there"):
        synthesis_report_data(out)


def test_a_pool_of_another_run_directory_is_read_where_it_lies(undrawn, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.move(tmp_path / "run" / "pool", tmp_path / "seeds")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(
        config.replace(str(seeds_of(whole)), str(tmp_path / "seeds"))
    )
    found = synthesis_report_data(tmp_path / "run")
    assert found["score"] == json.loads((whole[0] / "report.json").read_text())["score"]
    assert found["texts_missing"] is None


def test_a_page_can_be_drawn_again_from_its_json(whole, data, tmp_path):
    one, numbers = write_synthesis_report(data, tmp_path / "one.html", date=DAY)
    assert render(json.loads(numbers.read_text()), date=DAY) == one.read_text()
    assert "2020-02-29" in one.read_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_stands_below_the_view(whole, terminal):
    stream = StringIO()
    stream.isatty = lambda: terminal
    with view_for(stream) as view:
        view.update(whole[1])
        view.say("writing the report")
    # A terminal's cursor is shown again before the line.
    shown = stream.getvalue().replace("\x1b[?25h", "")
    assert shown.endswith("\nwriting the report\n")
    assert "50 rows of 50 wanted" in shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(browser, whole, width, scheme):
    check_in_browser(browser, whole[0] / "report.html", width, scheme, FIGURES)
