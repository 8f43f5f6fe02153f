"""Work on Ray: the same bytes as without it, errors as themselves, and what is lost done again."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray_parts import ENVIRONMENT, RAY, Multiply, PoisonedRay, settings, write_corpus
from run_contents import contents
from small_runs import make_sources

import gvendi_fast
from gvendi_fast.base.engine import LocalEngine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data import chunks, index_ahead
from gvendi_fast.data.index import index_files
from gvendi_fast.engines import RayEngine
from gvendi_fast.engines import ray as ray_engine
from gvendi_fast.engines.ray import MOST_TASKS, _check_answers, _reserved
from gvendi_fast.sketching import corpus
from gvendi_fast.sketching.corpus import UnitsFailedError


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}", "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_named(monkeypatch, form):
    monkeypatch.setattr(ray_engine, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if "{" in form:
            _check_answers(form.format(port))
    address = form.format(port)
    with pytest.raises(GvendiError, match=f"Ray of '{address}' cannot be reached"):
        _check_answers(address)
    for other in ("", "auto", "local", "some-name"):
        _check_answers(other)


@pytest.mark.parametrize(
    ("left", "listens", "address"),
    [
        (None, False, None),
        (b"", False, None),
        (b"127.0.0.1:{}\n", True, None),
        (b"127.0.0.1:{}\n", False, "local"),
    ],
    ids=["no cluster", "an empty record", "one that runs", "one that was killed"],
)
def test_a_cluster_that_was_killed_is_not_waited_for(monkeypatch, tmp_path, left, listens, address):
    began = []
    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **given: began.append((given["address"], given["log_to_driver"])),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        if left is not None:
            port = str(server.getsockname()[1]).encode()
            (tmp_path / "ray" / "ray_current_cluster").write_bytes(left.replace(b"{}", port))
        if not listens:
            server.close()
        RayEngine()._ray()
    # What nodes print would stand among the results on stdout.
    assert began == [(address, False)]


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, with two CPUs whatever it has, which sees the tests' own modules."""
    found = pytest.importorskip("ray", reason="the engine 'ray' is an extra")
    pytest.importorskip("ray.data", reason="the engine 'ray' is an extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", str(Path(__file__).parents[1]) + ":" + str(Path(gvendi_fast.__file__).parents[1])
        )
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        found.init("local", logging_level="ERROR", **RAY)
    yield found
    found.shutdown()


def test_two_actors_write_the_bytes_of_one_process_and_leave_poison_out(ray, tmp_path):
    # Poison to the workers that Ray opens alone.
    rows = write_corpus(tmp_path / "poisoned.jsonl", 12, {5: "POISON"})
    gvendi_fast.sketch(rows, out=tmp_path / "alone", proxy="tiny", settings=settings())
    with (
        PoisonedRay(2) as engine,
        pytest.raises(UnitsFailedError, match="work unit 5: RuntimeError: this row is poison") as caught,
    ):
        gvendi_fast.sketch(rows, out=tmp_path / "run", proxy="tiny", settings=settings(), engine=engine)
    assert caught.value.units == [5]
    # One that the program has started stays.
    assert ray.is_initialized()
    alone, run = (contents(tmp_path / name) for name in ("alone", "run"))
    parts = [name for name in alone if name.startswith("parts/") and "000005" not in name]
    assert [name for name in run if name.startswith("parts/")] == parts
    assert len(parts) > 11
    for name in parts:
        assert run[name] == alone[name], name


def test_items_are_mapped_whatever_becomes_of_a_process(ray, tmp_path):
    engine = RayEngine((1, 2))
    items = list(range(9))
    wanted = dict(LocalEngine().map(Multiply(3), items))
    assert dict(engine.map(Multiply(3, str(tmp_path / "mark")), items)) == wanted
    assert (tmp_path / "mark").exists()
    ((place, array),) = engine.map(Multiply(2), [np.arange(3)])
    # Ray's own arrays cannot be written into.
    array += 1
    assert place == 0
    assert array.tolist() == [1, 3, 5]
    assert list(engine.map(Multiply(2), [])) == []


def test_errors_of_a_map_arrive_as_themselves_with_their_node(ray, monkeypatch, tmp_path):
    engine = RayEngine(2, cpus_per_worker=1)
    with pytest.raises(GvendiError, match=r"^on the node '.+': the item is refused$") as caught:
        list(engine.map(Multiply(2), [1, "refused"]))
    assert "in times" in str(caught.value.__cause__)
    with pytest.raises(TypeError):
        list(engine.map(Multiply(2), [None]))
    with pytest.raises(RuntimeError, match="Strange: one and two"):
        list(engine.map(Multiply(2), ["strange"]))
    monkeypatch.chdir(tmp_path)
    ((_, (threads, number, folder)),) = engine.map(Multiply(2), ["threads"])
    assert (threads, number, Path(folder)) == (1, "1", tmp_path)


def test_a_driver_that_stops_early_lets_go_of_what_is_under_way(ray):
    engine = RayEngine(2)
    found = engine.map(Multiply(2), list(range(50)))
    next(found)
    found.close()
    assert dict(engine.map(Multiply(5), [1])) == {0: 5}


@pytest.mark.soak
def test_work_begins_with_the_first_files(ray, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    for name in "abc":
        write_corpus(tmp_path / "data" / f"{name}.jsonl", 5)
    parts = tmp_path / "run" / "parts"
    seen = []

    def waiting(*arguments, **named):
        for found in index_files(*arguments, **named, growth=0.0):
            yield found
            while not found.is_whole and not list(parts.glob("*.parquet")):
                time.sleep(0.05)
            seen.append(found.rows)

    monkeypatch.setattr(corpus, "index_files", waiting)
    monkeypatch.setattr(index_ahead, "PATIENCE_S", 0.0)
    run = gvendi_fast.sketch(
        tmp_path / "data", out=tmp_path / "run", proxy="tiny", settings=settings(), engine=RayEngine(2)
    )
    assert len(seen) > 1
    assert run.is_indexed
    gvendi_fast.sketch(tmp_path / "data", out=tmp_path / "alone", proxy="tiny", settings=settings())
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")


@pytest.mark.soak
def test_a_refused_row_of_a_worker_ends_the_run_by_its_own_words(ray, tmp_path):
    rows = write_corpus(tmp_path / "refused.jsonl", 3, {1: "REFUSED"})
    with pytest.raises(GvendiError, match=r"^on the node '.+': this row is refused$"):
        gvendi_fast.sketch(
            rows, out=tmp_path / "run", proxy="tiny", settings=settings(), engine=PoisonedRay(1)
        )


@pytest.mark.soak
def test_weights_are_the_same_to_the_bit(ray, gvendi, monkeypatch, tmp_path):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 20)
    words = ("weights", make_sources(tmp_path / "run"), "--by", "source", "--json")
    alone = gvendi(*words)
    assert alone[0] == 0
    assert gvendi(*words, "--engine", "ray", "--workers", "2") == alone


def test_arguments_that_cannot_be_used_are_refused_by_name():
    for workers in (0, (2, 1), (1, 2, 3), (1.5, 2)):
        with pytest.raises(GvendiError, match="workers is"):
            RayEngine(workers)
    with pytest.raises(GvendiError, match="gpus_per_worker is -1"):
        RayEngine(gpus_per_worker=-1)
    with pytest.raises(GvendiError, match="cpus_per_worker is 0"):
        RayEngine(cpus_per_worker=0)
    with pytest.raises(GvendiError, match="units_a_task is 0"):
        RayEngine(units_a_task=0)
    assert RayEngine(3).fewest == RayEngine(3).most == 3
    assert RayEngine(cpus_per_worker=2.5).threads == 2
    assert RayEngine(cpus_per_worker=0.5).threads == 1


def test_a_large_machine_keeps_a_cpu_for_what_reads():
    assert [_reserved(1, 64, room) for room in (1, 2, 3, 4, 16, 100)] == [1, 2, 3, 3, 15, 64]
    assert _reserved(16, 16, 16) == 16


def test_tasks_are_small_enough_to_share_and_large_enough_to_count():
    assert RayEngine()._tasks(1000, 64) == 1000
    assert RayEngine()._tasks(1_000_000, 64) == MOST_TASKS
    gpus = RayEngine(gpus_per_worker=1)
    assert gpus._tasks(16_000, 8) == 1000
    # Four for each worker.
    assert gpus._tasks(64, 8) == 32
    assert RayEngine(units_a_task=5)._tasks(1000, 2) == 200


def test_ray_is_loaded_by_work_alone():
    code = (
        "import sys, gvendi_fast.cli; from gvendi_fast.engines import RayEngine; RayEngine(); "
        "print('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GvendiError, match=r"pip install 'gvendi-fast\[ray\]'"):
        next(RayEngine().map(Multiply(1), [1]))


def test_a_run_directory_that_a_worker_does_not_see_is_named(tmp_path):
    from gvendi_fast.sketching.unit_worker import UnitWorker

    rows = write_corpus(tmp_path / "clean.jsonl", 2)
    jobs = []

    class Elsewhere(LocalEngine):
        def work(self, open_worker, items):
            jobs.append(open_worker)
            return super().work(open_worker, items)

    gvendi_fast.sketch(rows, out=tmp_path / "run", proxy="tiny", settings=settings(), engine=Elsewhere())
    (job,) = jobs
    with pytest.raises(GvendiError, match="is not the run directory here"):
        UnitWorker(replace(job, path=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
