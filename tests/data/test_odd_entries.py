"""FIFOs, sockets and links among the files of results: named, and nobody waits for them."""

import errno
import os
import shutil
import socket
import sys

import pytest
from small_runs import MANIFEST, SPEC

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import names_in
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.synthesis.disk.check import check_directory
from gvendi_fast.synthesis.disk.folder import open_run
from gvendi_fast.synthesis.disk.record import RunRecord

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFOs")
OF_RUN = ("spec.json", "units.json", "score.json", "parts/part-000001.parquet", "parts/rejected-000001.jsonl")
OF_SYNTHESIS = ("fingerprint.json", "config.yaml", "events.jsonl", "accepted.jsonl", "clusters.safetensors")


def put_odd(path, kind, monkeypatch):
    path.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        # The name of a socket has at most 108 bytes.
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
@pytest.mark.parametrize("name", OF_RUN)
def test_nobody_waits_for_an_entry_of_a_run_directory(made, tmp_path, monkeypatch, name, kind):
    shutil.copytree(made[False], tmp_path / "run")
    put_odd(tmp_path / "run" / name, kind, monkeypatch)
    wanted = f"{name}' is {kind}, not a file"
    with pytest.raises(GvendiError, match=wanted):
        list(RunDirectory.load(tmp_path / "run").iterate())
    with pytest.raises(GvendiError, match=wanted):
        RunDirectory.open(tmp_path / "run", SPEC, MANIFEST).done()
    if name.startswith("parts"):
        assert [wanted in finding.what for finding in check_run(tmp_path / "run").findings] == [True]
    else:
        with pytest.raises(GvendiError, match=wanted):
            check_run(tmp_path / "run")


def test_parts_that_cannot_be_listed_are_one_finding(made, tmp_path, monkeypatch):
    shutil.copytree(made[False], tmp_path / "run")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("parts"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = check_run(tmp_path / "run").findings
    assert [(item.kind, item.path) for item in found] == [("unreadable", str(tmp_path / "run" / "parts"))]


@pytest.mark.parametrize("there", ["{}", '{"n": 8}', '{"n": 8, "units_done": 2, "units_total": 3}'])
def test_a_score_that_lacks_what_it_is_of_is_found(made, tmp_path, there):
    shutil.copytree(made[False], tmp_path / "run")
    (tmp_path / "run" / "score.json").write_text('{"n": 8, "units_done": 2, "units_total": 2}')
    assert check_run(tmp_path / "run").findings == []
    (tmp_path / "run" / "score.json").write_text(there)
    assert {item.path for item in check_run(tmp_path / "run").findings} == {
        str(tmp_path / "run" / "score.json")
    }


@pytest.mark.parametrize("name", OF_SYNTHESIS)
def test_nobody_waits_for_an_entry_of_a_synthesis(tmp_path, monkeypatch, name):
    (tmp_path / "fingerprint.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("{}")
    put_odd(tmp_path / name, "a FIFO", monkeypatch)
    for act in (check_directory, RunRecord, lambda path: open_run(path).__enter__()):
        with pytest.raises(GvendiError, match=f"{name}' is a FIFO, not a file"):
            act(tmp_path)


def test_links_to_nothing_and_in_a_circle_are_names_like_others(tmp_path):
    (tmp_path / "a").symlink_to("nowhere")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert names_in(tmp_path) == ["a", "b", "c"]
    assert names_in(tmp_path / "none") == []
