"""What killed processes leave is removed by the next one, and nothing that a live one needs."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gvendi_fast.base import files, temporary


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A temporary folder of the system."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folders_of_killed_processes_are_removed(here, dead):
    host = files.host_name()

    def leave(name: str) -> Path:
        (here / name / "run" / "parts").mkdir(parents=True)
        (here / name / "run" / "spec.json").write_text("{}")
        return here / name

    gone = leave(f"gvendi-{host}-{dead}-abcd1234")
    kept = [
        leave(f"gvendi-{host}-{os.getpid()}-abcd1234"),
        leave(f"gvendi-elsewhere-{dead}-abcd1234"),
        leave(f"gvendi-{host}-{dead}-results"),
        leave(f"gvendi-{host}-{dead}-abcd1234-mine"),
        leave(f"gvendi-{host}-{10**30}-abcd1234"),
        leave(f"gvendi-{host}-0-abcd1234"),
        leave("gvendi-abcd1234"),
        leave(f"gvendi-{host}-{dead}-abcd5678"),
    ]
    temporary.keep(kept[-1])
    link, target = here / f"gvendi-{host}-{dead}-linklink", leave("target")
    link.symlink_to(target)
    made = temporary.new_folder()
    assert made.is_dir()
    assert made.name.startswith(f"gvendi-{host}-{os.getpid()}-")
    assert not gone.exists()
    assert all((path / "run" / "spec.json").is_file() for path in [*kept, target])
    assert link.is_symlink()


def test_a_folder_survives_until_its_owner_removes_it(here):
    first = temporary.new_folder()
    second = temporary.new_folder()
    assert first != second
    assert first.is_dir()
    assert second.is_dir()


def test_a_killed_score_leaves_nothing_behind_the_next(here):
    """The folder of a process that is killed with -9 goes when the next one makes its own."""
    code = (
        "import os, signal, tempfile; from gvendi_fast.base import temporary;"
        f"tempfile.tempdir = {str(here)!r}; print(temporary.new_folder(), flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    temporary.new_folder()
    assert not left.exists()


def test_a_file_is_written_past_what_a_killed_writer_left(tmp_path, dead):
    host, code = files.host_name(), "0" * 32

    def leave(name: str, pid: int) -> Path:
        path = tmp_path / f".{name}.{host}.{pid}.{code}.tmp"
        path.write_bytes(b"half")
        return path

    own, other, alive = leave("score.json", dead), leave("else.json", dead), leave("score.json", os.getpid())
    with files.atomic_write(tmp_path / "score.json") as stream:
        stream.write(b"whole")
    assert (tmp_path / "score.json").read_bytes() == b"whole"
    assert not own.exists()
    assert other.exists()
    assert alive.exists()
    with files.atomic_write(tmp_path / "else.json", sweep=False):
        pass
    assert other.exists()


def test_whether_something_exists_is_not_guessed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert files.exists(tmp_path / "file")
    assert not files.exists(tmp_path / "none")
    assert not files.exists(tmp_path / "file" / "below")

    def refuse(path):
        raise OSError(files.errno.ESTALE, "stale", str(path))

    monkeypatch.setattr(files.os, "stat", refuse)
    with pytest.raises(OSError, match="stale"):
        files.exists(tmp_path / "file")
