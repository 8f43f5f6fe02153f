"""Ranks of one command in one run directory: the bytes of one process, whoever is lost."""

import os
import random
import signal
import time

import pytest
from rank_runs import sketch, sketch_and_score, start, write_corpus
from run_contents import contents

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.leases import Terms
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.worker_records import read_failed, read_leases, read_workers
from gvendi_fast.engines import RanksEngine
from gvendi_fast.sketching.corpus import sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy

KILLED, HUNG = -signal.SIGKILL, 75
ROWS, UNITS = 32, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data.jsonl", ROWS)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """What one process makes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sketch(corpus, out)
    return contents(out)


def ended(processes) -> list[int]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def rows_counted(out) -> int:
    return sum(worker.rows for worker in read_workers(out).found.values())


def test_two_ranks_that_start_at_once_share_work_and_passes_and_end_with_the_bytes_of_one(
    corpus, whole, tmp_path
):
    out = tmp_path / "run"
    ranks = [start(corpus, out, rank, 2, tmp_path, target=sketch_and_score) for rank in range(2)]
    assert ended(ranks) == [0, 0]
    assert contents(out) == whole
    # A pass that ranks know by different names is made by each of them.
    assert len((tmp_path / "passes-0").read_text().split()) == 2
    for name in ("passes", "score"):
        assert (tmp_path / f"{name}-0").read_text() == (tmp_path / f"{name}-1").read_text()
    workers = read_workers(out).found.values()
    assert {worker.rank for worker in workers if worker.units} == {0, 1}
    assert {worker.run for worker in workers} == {"one command"}
    assert all(worker.ended for worker in workers)
    assert rows_counted(out) == ROWS
    assert not read_leases(out).found


@pytest.mark.soak
def test_a_rank_alone_of_many_does_everything(corpus, whole, tmp_path):
    sketch(corpus, tmp_path / "run", 1, 3)
    assert contents(tmp_path / "run") == whole
    assert rows_counted(tmp_path / "run") == ROWS


@pytest.mark.soak
def test_a_damaged_part_is_found_by_the_rank_whose_share_it_is(corpus, whole, tmp_path):
    out = tmp_path / "run"
    sketch(corpus, out)
    part = RunDirectory.load(out).part_path(4)
    part.write_bytes(part.read_bytes()[:-50])
    sketch(corpus, out, 1, 3)
    assert contents(out) == whole


def test_rows_in_memory_and_standard_input_are_refused(tmp_path):
    proxy = load_proxy("tiny", dtype="float32")
    for data, said in (([{"text": "a b"}], "data holds rows"), ("-", "standard input")):
        with pytest.raises(GvendiError, match=said):
            sketch_corpus(data, tmp_path / "run", proxy, engine=RanksEngine(0, 2))


@pytest.mark.soak
@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_killed_at_any_time_costs_its_work_units_alone(corpus, whole, world, tmp_path):
    draw, hits = random.Random(world), 0
    for attempt in range(8):
        out = tmp_path / f"run-{attempt}"
        ranks = [start(corpus, out, rank, world) for rank in range(world)]
        victim = ranks[draw.randrange(world)]
        victim.join(timeout=draw.uniform(0, 6))
        if victim.exitcode is None:
            victim.kill()
        codes = ended(ranks)
        hits += KILLED in codes
        assert sorted(codes)[1:] == [0] * (world - 1)
        assert contents(out) == whole
    print(f"\n{world} ranks: {hits} of 8 kills hit")
    assert hits


@pytest.mark.soak
def test_a_rank_that_stands_still_is_gone_around_and_harms_nothing_when_it_goes_on(corpus, whole, tmp_path):
    out = tmp_path / "run"
    still, other = start(corpus, out, 0, 2, stops_at=2), start(corpus, out, 1, 2)
    assert ended([other]) == [0]
    assert len(RunDirectory.load(out).done()) == UNITS
    os.kill(still.pid, signal.SIGCONT)
    assert ended([still]) == [0]
    assert contents(out) == whole


@pytest.mark.soak
def test_a_poisoned_work_unit_is_left_out_and_named_by_the_first_rank(corpus, tmp_path):
    out = tmp_path / "run"
    codes = ended([start(corpus, out, rank, 2, poison="error") for rank in range(2)])
    assert codes == [1, 0]
    assert [unit.quarantined for unit in read_failed(out).found.values()] == [True]
    assert set(range(UNITS)) - set(RunDirectory.load(out).done()) == {1}


@pytest.mark.soak
def test_a_work_unit_that_kills_its_rank_is_given_up_after_so_many_losses(corpus, tmp_path):
    out = tmp_path / "run"
    terms = Terms(lease_s=1.0, max_losses=2)
    codes = ended([start(corpus, out, rank, 3, terms, "kill") for rank in range(3)])
    assert codes.count(KILLED) == 2
    assert {a.kind for unit in read_failed(out).found.values() for a in unit.attempts} == {"lost"}
    assert set(range(UNITS)) - set(RunDirectory.load(out).done()) == {1}


@pytest.mark.soak
def test_a_work_unit_that_hangs_ends_its_rank_and_is_given_up(corpus, tmp_path):
    out = tmp_path / "run"
    terms = Terms(lease_s=1.0, max_attempts=2, hang_after_s=10.0)
    codes = ended([start(corpus, out, rank, 3, terms, "hang") for rank in range(3)])
    assert codes.count(HUNG) == 2
    assert {a.kind for unit in read_failed(out).found.values() for a in unit.attempts} == {"hung"}
    assert set(range(UNITS)) - set(RunDirectory.load(out).done()) == {1}


@pytest.mark.soak
def test_where_the_corpus_changes_every_rank_ends_by_itself(corpus, tmp_path):
    mine, out = write_corpus(tmp_path / "data.jsonl", ROWS), tmp_path / "run"
    ranks = [start(mine, out, rank, 2) for rank in range(2)]
    while not (out / "parts").is_dir() or not list((out / "parts").glob("*.parquet")):
        time.sleep(0.01)
    mine.write_text(mine.read_text().replace("alpha", "ALPHA"))
    codes = ended(ranks)
    assert set(codes) == {1}, codes
