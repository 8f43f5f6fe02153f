"""The soak itself finds what it is there to find: calls fail when planned, and ends that are wrong are called so."""

import errno
import json
import os
import signal

import pytest

from tests.soak.attempt import Attempt, Reference, in_child, printed
from tests.soak.commands import Ended
from tests.soak.os_faults import Plan, install


@pytest.fixture
def attempt(tmp_path):
    reference = Reference(tmp_path / "reference")
    return Attempt("kill", 0, 0, tmp_path / "attempt", reference, "http://127.0.0.1:1", lambda how: None)


def ended(code=0, out="", err="", hung=False):
    return Ended(("sketch",), code, out, err, 1.0, hung)


@pytest.mark.parametrize(
    ("end", "sent", "fault"),
    [
        (ended(1, err="error: 'x' is a file\n"), (), None),
        (ended(130, err="\ninterrupted: nothing is damaged"), (signal.SIGINT,), None),
        (ended(-9), (signal.SIGKILL,), None),
        (ended(-9), (), "exit code -9"),
        (ended(130), (), "interrupted and was not"),
        (ended(120), (), "exit code 120"),
        (ended(1, err="Traceback (most recent call last):\nKeyError: 'x'\n"), (), "traceback: KeyError"),
        (ended(0, err="Exception ignored in: <x>\nOSError: [Errno 28] x\n"), (), "traceback: OSError"),
        (ended(1, err="it went wrong"), (), "without an error in words"),
        (ended(-9, hung=True), (), "hangs"),
    ],
)
def test_an_end_that_is_wrong_is_a_fault(attempt, end, sent, fault):
    attempt.judge(end, sent)
    assert (attempt.faults == []) if fault is None else any(fault in found for found in attempt.faults)


def test_damage_must_be_named_and_nothing_else_called_so(attempt):
    attempt.refused(
        ended(1, err="error: 'run/parts/part-000001.parquet' is damaged"), ["part-000001.parquet"]
    )
    attempt.undamaged(ended(1, err="error: 'run/spec.json' cannot be read: permission denied"))
    assert attempt.faults == []
    attempt.refused(ended(1, err="error: something is damaged"), ["part-000001.parquet"])
    attempt.undamaged(ended(1, err="error: 'x' is damaged; delete this file"))
    assert len(attempt.faults) == 2


def test_another_byte_or_a_file_left_behind_is_a_fault(attempt):
    run = attempt.work / "run"
    run.mkdir()
    (run / "spec.json").write_text("{}")
    attempt.reference.files = {"spec.json": "another digest", "parts/part-000000.parquet": "x"}
    (attempt.reference.folder / "run").mkdir(parents=True)
    (attempt.reference.folder / "run" / "spec.json").write_text('{"a": 1}')
    (run / f".spec.json.host.1.{'0' * 32}.tmp").write_text("")
    attempt.same_run()
    assert [fault.partition(":")[0] for fault in attempt.faults] == [
        "temporary files are left, such as one of spec"
    ] + ["wrong result"] * 2


def test_times_are_not_compared():
    one, two = ({"n": 3, "seconds": seconds, "by": [{"tokens_per_second": seconds}]} for seconds in (1, 2))
    assert printed(json.dumps(one)) == printed(json.dumps(two)) == {"n": 3, "by": [{}]}


@pytest.mark.parametrize("lasting", [False, True])
def test_the_planned_call_fails_and_no_other(tmp_path, lasting):
    def work():
        plan = Plan(tmp_path, "write", 2, draw=0, lasting=lasting)
        install(plan)
        said = []
        for _ in range(4):
            try:
                with open(tmp_path / "file", "wb", buffering=0) as stream:
                    stream.write(b"x")
                said.append("written")
            except OSError as error:
                said.append((error.errno, os.fspath(error.filename)))
        # What lies elsewhere is not concerned.
        with open(os.devnull, "wb", buffering=0) as stream:
            stream.write(b"x")
        return said

    failed = (errno.ENOSPC, str(tmp_path / "file"))
    rest = [failed, failed] if lasting else ["written", "written"]
    assert in_child(work) == ["written", failed, *rest]


@pytest.mark.parametrize("kind", ["look", "make", "flush", "open", "read"])
def test_every_kind_of_call_can_fail(tmp_path, kind):
    def work():
        install(Plan(tmp_path / "at", kind, 1))
        try:
            folder = tmp_path / "at" / "folder"
            folder.parent.mkdir(exist_ok=True)
            folder.mkdir()
            (folder / "one").write_bytes(b"1")
            handle = os.open(folder / "one", os.O_RDONLY)
            os.fsync(handle)
            os.listdir(folder)
            return (folder / "one").read_bytes()
        except OSError as error:
            return error.errno is not None

    assert in_child(work) is True
