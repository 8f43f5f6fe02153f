"""`gvendi status`: how far a run is, whatever state its directory is in; nothing is changed."""

import json
import os
import shutil
import time
from dataclasses import replace

import pytest

from gvendi_fast.base.files import host_name
from gvendi_fast.cli import status as command
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_status import StatusReader, read_status
from gvendi_fast.data.worker_records import Attempt, FailedUnit, Lease, WorkerRecord, unit_file

# Above every process number.
NOBODY = (1 << 31) - 1
HERE = host_name()


@pytest.fixture
def run(tmp_path):
    """A run directory of four work units of ten rows, of which three are done."""
    source = {"path": "nowhere.jsonl", "kind": "jsonl", "size": 1, "rows": 35, "digest": ""}
    manifest = {"units_total": 4, "rows": 35, "rows_per_unit": 10, "limit": None, "files": [source]}
    made = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": 64}}, manifest)
    for unit in range(3):
        made.part_path(unit).write_bytes(b"")
    return made.path


def _write(path, record):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record.to_dict()))


def _worker(run, name="a", **values):
    now = time.time()
    record = WorkerRecord("node1", 7, "ranks", 0, "cpu", "r", now - 100, now - 1, 2, 20, 4000, 1, 10.0, (3,))
    record = replace(record, **values)
    _write(run / "workers" / f"{name}.json", record)
    return record


def _contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_goes_on(gvendi, run):
    _worker(run, "a")
    _worker(run, "b", rank=1, pid=8, at=(), units=1, rows=10, tokens=1000, seconds=10.0)
    _worker(run, "c", rank=2, pid=NOBODY, host=HERE)
    _worker(run, "d", rank=3, ended=True, units=0, rows=0, tokens=0, rejected=0, seconds=0.0)
    now = time.time()
    _write(run / "leases" / unit_file(3), Lease(3, HERE, NOBODY, "c", "r", 1, now - 9, now + 100))
    # Its part is there, so nobody waits for it.
    _write(run / "leases" / unit_file(1), Lease(1, HERE, NOBODY, "c", "r", 1, now - 9, now - 5))
    attempt = Attempt("node1", 7, now, "error", "Traceback\n  ...\nout of memory\n")
    _write(run / "failed" / unit_file(3), FailedUnit(3, True, (attempt,) * 3))
    before = _contents(run)
    code, out, err = gvendi("status", run)
    assert (code, err) == (0, "")
    assert out.startswith("3 of 4 work units done, 30 of 35 rows (85.7 %)\n")
    assert "3.0 rows/s, 500 tokens/s by 2 workers, since they started" in out
    assert "  left      0:02\n" in out
    assert "9,000 tokens, 3 rows rejected\n" in out
    assert "2 live, 1 lost, 1 ended" in out
    # One host is one word, however many workers it has.
    assert "node1:7 " in out
    assert "node1:8 " in out
    assert "given up: work unit 3 after 3 attempts: out of memory (on node1)" in out
    assert f"lease ended early, as its process is gone: work unit 3 of {HERE}" in out
    assert "work unit 1 " not in out
    assert _contents(run) == before
    found = json.loads(gvendi("status", run, "--json")[1])
    assert [one["state"] for one in found["workers"]] == ["live", "live", "lost", "ended"]
    assert found["rate"] == {"rows": 3.0, "tokens": 500.0}
    assert (found["units_done"], found["rows_done"], found["done"], found["live"]) == (3, 30, False, 2)
    assert [item["unit"] for item in found["failed"]] == [3]


def test_a_silent_worker_with_a_lease_that_holds_is_live(run):
    now = time.time()
    _worker(run, "a", updated=now - 1000)
    assert read_status(run, now).workers[0].state == "lost"
    _write(run / "leases" / unit_file(3), Lease(3, "node1", 7, "a", "r", 1, now - 1000, now + 100))
    assert read_status(run, now).workers[0].state == "live"
    assert read_status(run, now + 100).workers[0].state == "lost"


def test_the_rate_of_parts_needs_no_records(run):
    now = 1_000_000.0
    for unit, ago in ((0, 5000.0), (1, 100.0), (2, 50.0)):
        os.utime(run / "parts" / f"part-{unit:06d}.parquet", (now - ago, now - ago))
    found = read_status(run, now)
    # The rows of the first part of the last ten minutes were made before it was written.
    assert (found.recent.rows, found.recent_parts) == (10 / 100.0, 2)
    assert found.seconds_left == pytest.approx(50.0)
    assert read_status(run, now + 10_000).recent is None
    assert read_status(run, now + 10_000).seconds_left is None


def test_a_directory_of_an_earlier_version_and_a_finished_one(gvendi, run):
    out = gvendi("status", run)[1]
    assert "none has left a record" in out
    (run / "parts" / "part-000003.parquet").write_bytes(b"")
    out = gvendi("status", run)[1]
    assert out == "4 of 4 work units done, 35 of 35 rows (100 %)\n"


def test_before_the_corpus_is_indexed(gvendi, run):
    (run / "units.json").unlink()
    shutil.rmtree(run / "parts")
    _worker(run)
    code, out, _ = gvendi("status", run)
    assert code == 0
    assert out.startswith("0 work units done, of how many is not known yet")


def test_while_the_rest_of_the_corpus_is_indexed(gvendi, run):
    recorded = json.loads((run / "units.json").read_text())
    (run / "units.json").write_text(json.dumps({**recorded, "indexed": False}))
    (run / "parts" / "part-000003.parquet").write_bytes(b"")
    code, out, _ = gvendi("status", run)
    assert code == 0
    assert out.startswith("4 of 4 work units done, 35 of 35 rows (100 %), of the files indexed so far\n")
    found = json.loads(gvendi("status", run, "--json")[1])
    assert (found["done"], found["indexed"], found["seconds_left"]) == (False, False, None)


def test_while_ranks_index_a_corpus_before_anything_is_recorded(gvendi, tmp_path):
    (tmp_path / "passes").mkdir()
    code, out, err = gvendi("status", tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith("0 work units done, of how many is not known yet")
    assert "earlier version" not in out
    assert json.loads(gvendi("status", tmp_path, "--json")[1])["indexed"] is False


def test_records_that_cannot_be_read_are_named_and_the_others_count(gvendi, run):
    _worker(run, "a")
    _worker(run, "b", rank=1)
    (run / "workers" / "a.json").write_text('{"host": "no')
    (run / "failed").mkdir()
    (run / "failed" / unit_file(3)).write_text("[]")
    code, out, err = gvendi("status", run)
    assert (code, err) == (0, "")
    assert "1 live" in out
    assert "a.json' is damaged" in out
    assert f"{unit_file(3)}' is damaged (it holds a list, not an object)" in out


def test_a_run_directory_at_a_url(gvendi, run):
    pytest.importorskip("upath", reason="needs universal_pathlib, which reads URLs")
    import fsspec

    _worker(run, "a")
    store = fsspec.filesystem("memory")
    for path in filter(os.path.isfile, run.rglob("*")):
        store.pipe(f"/status/{path.relative_to(run)}", path.read_bytes())
    code, out, err = gvendi("status", "memory://status")
    assert (code, err) == (0, "")
    assert out.startswith("3 of 4 work units done, 30 of 35 rows")
    assert "2.0 rows/s, 400 tokens/s by 1 worker" in out
    assert gvendi("status", "memory://nothing")[0] == 1
    # A store is not asked when parts were written, and the one worker's rate says nothing any more.
    lost = _worker(run, "a", updated=time.time() - 600)
    store.pipe("/status/workers/a.json", json.dumps(lost.to_dict()).encode())
    assert "rate      not known: no worker is live\n" in gvendi("status", "memory://status")[1]


def test_what_is_no_run_directory(gvendi, tmp_path):
    for path, why in ((tmp_path, "it has neither spec.json nor parts"), (tmp_path / "no", "does not exist")):
        code, _, err = gvendi("status", path)
        assert code == 1
        assert why in err


def test_a_damaged_units_json_is_an_error_with_its_remedy(gvendi, run):
    (run / "units.json").write_text("{}")
    code, _, err = gvendi("status", run)
    assert code == 1
    assert "units.json' is damaged (units_total is null" in err


def test_the_watch_ends_when_all_is_done(gvendi, run, monkeypatch):
    def finish(seconds):
        (run / "parts" / "part-000003.parquet").write_bytes(b"")

    monkeypatch.setattr(command.time, "sleep", finish)
    code, out, _ = gvendi("status", run, "--watch")
    assert code == 0
    assert [line[:6] for line in out.splitlines()] == ["3 of 4", "4 of 4"]


def test_a_directory_that_is_removed_ends_the_watch(gvendi, run, monkeypatch):
    monkeypatch.setattr(command.time, "sleep", lambda seconds: shutil.rmtree(run))
    code, _, err = gvendi("status", run, "--watch")
    assert code == 1
    assert "it does not exist" in err
    assert "goes on" not in err


def test_ctrl_c_ends_the_watch_and_nothing_else(gvendi, run, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupted)
    code, _, err = gvendi("status", run, "--watch", "--json")
    assert code == 130
    assert "the run goes on, only the watch has ended" in err


def test_the_time_of_a_part_is_looked_up_once(run):
    reader, now = StatusReader(run), 1_000_000.0
    for unit in range(3):
        os.utime(run / "parts" / f"part-{unit:06d}.parquet", (now - 100, now - 100))
    first = reader.read(now)
    os.utime(run / "parts" / "part-000000.parquet", (now - 1000, now - 1000))
    assert reader.read(now) == first
    assert first.recent_parts == 3
