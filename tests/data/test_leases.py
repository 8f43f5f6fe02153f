"""Leases on work units: what lies in the way of one."""

import json

import pytest

from gvendi_fast.base.files import host_name
from gvendi_fast.data.leases import Leases, Terms
from gvendi_fast.data.worker_records import LEASES, Lease, read_failed, read_leases, unit_file

# Above every process number.
NOBODY = (1 << 31) - 1


@pytest.fixture
def leases(tmp_path):
    found = Leases(tmp_path, Terms(), "run", "local")
    yield found
    found.close()


@pytest.mark.parametrize("content", [b"", b'{"unit": 1, "ho', b"\xff"])
def test_a_damaged_lease_holds_nobody_off(leases, tmp_path, content):
    path = tmp_path / LEASES / unit_file(1)
    path.write_bytes(content)
    assert leases.take(1)
    assert read_leases(tmp_path).found["unit-000001"].worker == leases.name


def test_a_lease_of_another_worker_holds(leases, tmp_path):
    other = Leases(tmp_path, Terms(), "run", "local")
    assert other.take(1)
    assert not leases.take(1)
    other.close()
    assert leases.take(1)


@pytest.mark.parametrize(("host", "expires"), [(host_name(), 1e12), ("elsewhere", 5.0)])
def test_a_work_unit_at_which_another_command_was_lost_is_suspect_and_not_given_up(
    leases, tmp_path, host, expires
):
    gone = Lease(2, host, NOBODY, "gone", "another run", 1, 0.0, expires)
    (tmp_path / LEASES / unit_file(2)).write_text(json.dumps(gone.to_dict()))
    assert leases.is_suspect(2)
    assert leases.take(2)
    assert not read_failed(tmp_path).found


def test_a_record_that_cannot_be_written_is_named_by_what_it_is_called(leases, tmp_path):
    (tmp_path / LEASES).rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        leases.take(3)
    assert caught.value.filename == str(tmp_path / LEASES / unit_file(3))
