"""The records of workers: what is written is read back, and what is none is named."""

from __future__ import annotations

import json
import os

import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import host_name
from gvendi_fast.data.worker_records import (
    LOST_AFTER_S,
    Attempt,
    FailedUnit,
    Lease,
    WorkerRecord,
    read_failed,
    read_leases,
    read_record,
    read_workers,
    unit_file,
)

WORKER = WorkerRecord("node1", 7, "ranks", 3, "cuda:0", "a1b2", 10.0, 20.5, 2, 64, 900, 1, 8.25, (5, 9))
LEASE = Lease(5, "node1", 7, "node1-7-00aa11bb", "a1b2", 2, 10.0, 70.0)
FAILURE = FailedUnit(5, True, (Attempt("node1", 7, 11.0, "error", "first\nlast words\n", "Traceback ..."),))
# Above every process number.
NOBODY = (1 << 31) - 1


def _write(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_each_record_is_read_as_it_was_written(tmp_path):
    _write(tmp_path / "workers", "node1-7-00aa11bb.json", WORKER.to_dict())
    _write(tmp_path / "leases", unit_file(5), LEASE.to_dict())
    # A later version may write more.
    _write(tmp_path / "failed", unit_file(5), {**FAILURE.to_dict(), "later": 1})
    assert read_workers(tmp_path).found == {"node1-7-00aa11bb": WORKER}
    assert read_leases(tmp_path).found == {"unit-000005": LEASE}
    assert read_failed(tmp_path).found == {"unit-000005": FAILURE}
    assert FAILURE.attempts[0].last_line == "last words"


def test_no_folder_and_no_file_are_no_records(tmp_path):
    assert read_workers(tmp_path).found == {}
    assert read_record(tmp_path / "leases" / unit_file(1), Lease) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ([], "it holds a list, not an object"),
        ({**LEASE.to_dict(), "unit": 6}, "it is of work unit 6"),
        ({**LEASE.to_dict(), "expires": 10**400}, "expires is 1000"),
        ({**LEASE.to_dict(), "host": None}, "host is null; wanted a string"),
        ({**LEASE.to_dict(), "attempt": True}, "attempt is true; wanted a count"),
        ({}, "unit is missing; wanted a count"),
    ],
)
def test_what_is_no_record_is_named_and_the_others_are_read(tmp_path, content, said):
    _write(tmp_path / "leases", unit_file(5), content)
    _write(tmp_path / "leases", unit_file(9), {**LEASE.to_dict(), "unit": 9})
    records = read_leases(tmp_path)
    assert list(records.found) == ["unit-000009"]
    assert said in records.unreadable[unit_file(5)]
    with pytest.raises(GvendiError, match="remove it"):
        read_record(tmp_path / "leases" / unit_file(5), Lease)


def test_a_worker_is_lost_with_its_process_or_with_its_silence():
    here = {**WORKER.to_dict(), "host": host_name(), "updated": 1000.0}
    alive, dead = {**here, "pid": os.getpid()}, {**here, "pid": NOBODY}
    assert WorkerRecord.from_dict(alive).state(1000.0 + LOST_AFTER_S) == "live"
    assert WorkerRecord.from_dict(alive).state(1001.0 + LOST_AFTER_S) == "lost"
    assert WorkerRecord.from_dict(dead).state(1000.0) == "lost"
    assert WorkerRecord.from_dict({**dead, "ended": True}).state(1000.0) == "ended"
    assert WorkerRecord.from_dict({**dead, "host": "elsewhere"}).state(1000.0) == "live"


def test_a_lease_ends_with_its_time_or_its_process():
    mine = Lease.from_dict({**LEASE.to_dict(), "host": host_name(), "pid": os.getpid()})
    assert not mine.is_expired(69.0)
    assert mine.is_expired(70.0)
    assert Lease.from_dict({**mine.to_dict(), "pid": NOBODY}).is_expired(11.0)
