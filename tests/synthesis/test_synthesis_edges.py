"""Pools at the edge: one row, equal rows, equal clusters, more clusters than rows. The sparse set is never empty."""

import pytest
import torch
from chat_server import ChatServer
from problem_families import seed_rows, writer
from synthesis_runs import contents, lines, run, write_rows

from gvendi_fast.synthesis.config.config import AcceptConfig
from gvendi_fast.synthesis.loop.grown_pool import GrownPool
from gvendi_fast.synthesis.loop.judge import Judge
from gvendi_fast.synthesis.tasks.generic import GenericTask

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback", "undrawn")


@pytest.fixture(scope="module")
def server():
    with ChatServer(writer(favour=0.3)) as running:
        yield running


def judge_of(rows: torch.Tensor, **accept) -> tuple[Judge, GrownPool]:
    records = [{"prompt": f"q{i}", "completion": "a"} for i in range(len(rows))]
    pool = GrownPool([str(i) for i in range(len(rows))], records, rows, GenericTask(), 0.5)
    return Judge(pool, AcceptConfig(**accept), seed=0), pool


def directions(number: int, copies: int, noise: float = 0.0) -> torch.Tensor:
    """`copies` rows along each of `number` orthogonal directions [number * copies, 32]."""
    rows = torch.eye(32)[:number].repeat(copies, 1)
    around = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(rows + noise * around)


def test_of_equal_clusters_the_smaller_half_by_rank_is_sparse():
    for clusters in (1, 2, 3, 7, 12):
        rows = directions(clusters, 4, noise=0.01)
        judge, pool = judge_of(rows, clusters=clusters, frozen=True)
        judge.begin(directions(clusters, 1))
        found = [judge.judge(number) for number in range(clusters)]
        # Orthogonal directions: each candidate has a cluster of its own.
        assert sorted(judged.cluster for judged in found) == list(range(clusters))
        half = max(1, clusters // 2)
        assert {judged.cluster for judged in found if judged.sparse} == set(range(half))
        assert judge.sparse_rows(pool.round).sum() == 4 * half


def test_while_it_accepts_the_tie_moves_on_and_no_cluster_runs_ahead():
    judge, pool = judge_of(directions(6, 4, noise=0.01), clusters=6)
    for block in range(8):
        judge.begin(directions(6, 1))
        for number in range(6):
            judged = judge.judge(number)
            if judged.sparse:
                pool.add(
                    f"{block}-{number}",
                    {"prompt": f"{block}-{number}", "completion": "a"},
                    directions(6, 1)[number],
                )
                judge.joined(judged)
        pool.settle(block)
        counts = judge._of(pool.round).kmeans.assign(pool.sketches()).label.bincount(minlength=6)
        assert counts.max() - counts.min() <= 1
    assert len(pool) >= 24 + 8


@pytest.mark.parametrize(("number", "copies"), [(1, 48), (5, 10), (3, 16), (30, 4)])
def test_equal_rows_make_no_clusters_that_no_candidate_can_reach(number, copies):
    judge, pool = judge_of(directions(number, copies), clusters=40)
    candidates = torch.nn.functional.normalize(
        torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    )
    judge.begin(torch.cat([directions(number, 1), candidates]))
    assert len(judge.kmeans.centroids) == number
    own = [judge.judge(i) for i in range(number)]
    assert sorted(judged.cluster for judged in own) == list(range(number))
    assert sum(judged.sparse for judged in own) == max(1, number // 2)
    assert any(judge.judge(number + i).sparse for i in range(400))
    assert judge.sparse_rows(pool.round).any()


@pytest.mark.parametrize(
    ("rule", "size"),
    [
        ("cluster", 1),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (("cluster", 5), ("gain", 1), ("gain", 5), ("all", 1), ("all", 5))
        ),
    ],
)
def test_a_tiny_pool_grows_with_more_clusters_and_columns_than_rows(rule, size, tmp_path, server):
    seeds = write_rows(tmp_path / "seeds.jsonl", seed_rows(1)[:size])
    sections = {
        # The rows are of as many families, so what repeats one adds less than the median of them does.
        "accept": {"rule": rule, "clusters": 100, "reference": "candidates", "recent": 100},
        "filter": {"near": None},
    }
    status = run(tmp_path / "run", server.url, seeds, stop={"target": 10}, **sections)
    assert (status.stopped, status.pool, status.seeds) == ("target", 10, size)
    events = [e for e in lines(tmp_path / "run" / "events.jsonl") if e["event"] == "round"]
    assert events[0]["clusters"] == size
    assert all(1 <= event["clusters"] <= event["pool"] for event in events)
    rows = lines(tmp_path / "run" / "accepted.jsonl")
    assert all({"cluster": row["sparse"], "gain": row["above"], "all": True}[rule] for row in rows)
    assert len(rows[0]["parents"]) == size
    # And again in two steps.
    for target in (size + 3, 10):
        run(tmp_path / "again", server.url, seeds, stop={"target": target}, **sections)
    assert contents(tmp_path / "again") == contents(tmp_path / "run")


@pytest.mark.parametrize(
    "accept",
    [
        {"rule": "gain"},
        pytest.param({"rule": "cluster"}, marks=pytest.mark.soak),
        pytest.param({"frozen": True, "from_sparse": True}, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_a_pool_of_equal_rows_grows(accept, tmp_path, server):
    row = seed_rows(1)[0]
    seeds = write_rows(tmp_path / "seeds.jsonl", [{**row, "id": f"s{i}"} for i in range(30)])
    status = run(tmp_path / "run", server.url, seeds, accept={"clusters": 12, **accept}, stop={"target": 50})
    assert (status.stopped, status.pool) == ("target", 50)
    assert status.start_gvendi == pytest.approx(1.0, abs=1e-4)
    assert status.gvendi > 2
    start = status.at_start.centered
    assert (start.value, start.left_out) == (None, 30)
    assert status.at_end.centered.value > 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "none at the start; both less the mean of the seeds" in page
    assert "30 rows equal the mean and count only in the plain value" in page
    first = next(e for e in lines(tmp_path / "run" / "events.jsonl") if e["event"] == "round")
    assert (first["clusters"], first["pool"]) == (1, 30)


@pytest.mark.parametrize(
    ("rule", "near"),
    [
        ("cluster", 0.98),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (("cluster", None), ("gain", 0.98), ("gain", None), ("all", 0.98), ("all", None))
        ),
    ],
)
def test_candidates_that_are_all_equal_join_at_most_once(rule, near, tmp_path):
    seeds = write_rows(tmp_path / "seeds.jsonl", seed_rows(2))
    same = "<prompt>How many legs has a spider?</prompt><completion>Eight.</completion>"
    with ChatServer(lambda messages, draw: same) as server:
        status = run(
            tmp_path / "run",
            server.url,
            seeds,
            accept={"rule": rule},
            filter={"near": near},
            stop={"target": 80, "floor": 0.2, "window": 30},
        )
    assert status.stopped == "acceptance"
    refused = lines(tmp_path / "run" / "rejected.jsonl")
    accepted = lines(tmp_path / "run" / "accepted.jsonl")
    assert len(accepted) + len(refused) == 32
    # Until it is taken each one is judged alike; from then on all are copies of it.
    by_rule = {"cluster": "dense", "gain": "low gain", "all": None}[rule]
    assert status.accepted == len(accepted) <= 1
    assert {row["stage"] for row in refused} == ({"copy"} if accepted else {by_rule})
    assert rule != "all" or accepted
