"""A work unit at which a worker was lost is tried again with nothing else in hand: others are not blamed with it."""

import json
import subprocess
import sys
from dataclasses import replace

from ray_parts import settings, write_corpus
from run_contents import contents

import gvendi_fast
from gvendi_fast.base.engine import LocalEngine
from gvendi_fast.base.files import host_name
from gvendi_fast.base.progress import Silent
from gvendi_fast.data.leases import Leases, Terms
from gvendi_fast.data.worker_records import Attempt, FailedUnit, Lease, read_failed, read_leases, unit_file
from gvendi_fast.sketching.corpus import sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.sketching.unit_worker import DONE, UnitWorker


class Kept(LocalEngine):
    def work(self, open_worker, items):
        self.job = open_worker
        return super().work(open_worker, items)


def test_units_of_a_lost_worker_are_tried_alone_and_the_others_together(tmp_path):
    corpus, engine, lost = write_corpus(tmp_path / "a.jsonl", 6), Kept(), (1, 3)
    run = gvendi_fast.sketch(corpus, out=tmp_path / "run", proxy="tiny", settings=settings(), engine=engine)
    whole = contents(run.path)
    for part in run.parts.iterdir():
        part.unlink()
    # The number of a process that has ended.
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    for unit in lost:
        lease = Lease(unit, host_name(), gone.pid, "gone", engine.run_id, 1, 0.0, 1e12)
        (run.path / "leases" / unit_file(unit)).write_text(json.dumps(lease.to_dict()))
    worker = UnitWorker(replace(engine.job, settings=replace(engine.job.settings, rows_together=1000)))
    held, encode = [], worker.encoder.stream

    class Watching:
        def stream(self, rows):
            held.append(
                sorted(unit for unit, lease in read_leases(run.path).found.items() if lease.pid != gone.pid)
            )
            return encode(rows)

    worker.encoder = Watching()
    receipts = list(worker.run(range(6)))
    assert {receipt.outcome for receipt in receipts} == {DONE}
    units = [receipt.unit for receipt in receipts]
    assert sorted(units[:4]) == [0, 2, 4, 5]
    assert units[4:] == [1, 3]
    names = [[unit_file(unit).removesuffix(".json") for unit in units] for units in ([1], [3])]
    assert held[-2:] == names
    worker.close()
    assert not read_failed(run.path).found
    assert not read_leases(run.path).found
    after = contents(run.path)
    # Those that shared batches are the same but for rounding.
    assert after.keys() == whole.keys()
    for unit in lost:
        assert after[f"parts/part-{unit:06d}.parquet"] == whole[f"parts/part-{unit:06d}.parquet"]


class Counted(Silent):
    def __init__(self):
        self.rows = self.tokens = 0

    def advance(self, rows, tokens, rejected):
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens


def test_rows_that_are_tried_again_are_told_once(tmp_path, monkeypatch):
    corpus, small = write_corpus(tmp_path / "a.jsonl", 3), replace(settings(), batch_tokens=32)
    sketch, counts = UnitWorker._sketched, [Counted() for _ in range(3)]

    def sketched(out, count):
        proxy = load_proxy("tiny", dtype="float32")
        return sketch_corpus(str(corpus), out, proxy, small, progress=count)

    sketched(tmp_path / "plain", counts[0])
    # A work unit whose second batch fails once, when the first one is told.
    calls = []

    def fails_once(worker, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("once")
        return sketch(worker, batch)

    monkeypatch.setattr(UnitWorker, "_sketched", fails_once)
    run = sketched(tmp_path / "fails", counts[1])
    assert len(calls) > 4
    # One at which a worker was lost.
    run.remove_part(1)
    failed = FailedUnit(1, attempts=(Attempt("elsewhere", 1, 1.0, "lost", "gone"),))
    (run.path / "failed").mkdir(exist_ok=True)
    (run.path / "failed" / unit_file(1)).write_text(json.dumps(failed.to_dict()))
    sketched(run.path, counts[2])
    assert [count.rows for count in counts] == [12, 12, 4]
    assert counts[1].tokens == counts[0].tokens > counts[2].tokens > 0


def test_a_unit_that_is_given_up_is_not_taken_again(tmp_path):
    leases = Leases(tmp_path, Terms(max_attempts=2), "run", "local")
    assert leases.take(4)
    assert not leases.is_suspect(4)
    assert not leases.failed(4, RuntimeError("once"))
    assert leases.failed(4, RuntimeError("twice"))
    leases.release([4])
    assert leases.is_suspect(4)
    # As when an engine repeats, by itself, what ended with its process.
    assert not leases.take(4)
    assert leases.take(5)
    leases.close()
