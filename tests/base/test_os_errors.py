"""What the operating system refuses is one sentence that names the path, in whatever way it was refused."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from gvendi_fast.base.files import atomic_write
from gvendi_fast.base.os_errors import name, named, sentence
from gvendi_fast.vendi import VendiState


def told(call) -> str:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        call()
    return sentence(caught.value)


def write(path):
    def call():
        with atomic_write(path) as stream:
            stream.write(b"x" * 100_000)

    return call


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("words", "path"),
    [
        (("sketch", "DATA", "--proxy", "tiny", "--out", "/proc/x"), "/proc/x"),
        (("score", "DATA", "--proxy", "tiny", "--out", "/proc/x/y"), "/proc/x"),
        (("sketch", "DATA", "--proxy", "tiny", "--out", "/dev/null/run"), "/dev/null/run"),
    ],
)
def test_a_folder_that_the_system_refuses_is_said_with_why(gvendi, tmp_path, words, path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    code, out, err = gvendi(*(str(tmp_path / "data.jsonl") if word == "DATA" else word for word in words))
    why = "a part of the path is a file, not a folder" if "null" in path else "the system does not permit it"
    assert (code, out) == (1, "")
    assert f"error: '{path}" in err
    assert f"cannot be used: {why}; " in err


@pytest.mark.parametrize(("name", "why"), [("nope.yaml", "it does not exist"), ("", "it is a folder")])
def test_a_configuration_that_cannot_be_read_is_named_once(gvendi, tmp_path, name, why):
    pytest.importorskip("yaml")
    path = tmp_path / name
    code, out, err = gvendi("synthesize", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: '{path}' cannot be used: {why}")
    assert err.count(str(path)) == 1
    assert "Errno" not in err


def test_words_of_systems_errors_inside_others_have_no_numbers(tmp_path):
    """Where an error of the system is told within another message, it is the sentence too."""
    from gvendi_fast.base.hub_errors import first_line
    from gvendi_fast.synthesis.run import _warned

    full = OSError(errno.ENOSPC, "No space left", "/cache/x")
    assert first_line(full) == sentence(full)
    assert first_line(ValueError("no\nyes")) == "ValueError: no"
    with (
        pytest.warns(UserWarning, match="^no report: '/cache/x' cannot be used: its disk is full"),
        _warned("no report"),
    ):
        raise full


def test_every_number_has_one_line():
    for number in errno.errorcode:
        for error in (
            OSError(number, os.strerror(number), "/a\n\x1b[31m"),
            OSError(number, os.strerror(number)),
        ):
            text = sentence(error)
            assert text
            assert text.isprintable()
            assert not text.endswith(".")
            assert error.filename is None or "'/a\\n\\x1b[31m'" in text


def test_words_alone_are_told_with_the_path(tmp_path):
    assert sentence(OSError("Can't load the tokenizer\nsee the manual")) == "Can't load the tokenizer"
    arrow = OSError("Failed to open local file '/x'. Detail: [errno 13] Permission denied")
    assert sentence(name(arrow, tmp_path)) == (
        f"'{tmp_path}' cannot be used: permission is denied; change its permissions, or name another path"
    )
    assert arrow.errno == errno.EACCES
    with pytest.raises(OSError, match="Input/output error") as caught, named("/some/file"):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.filename == "/some/file"
    assert "the disk or the mount failed" in sentence(caught.value)
    with pytest.raises(OSError, match="Input/output error") as caught, named("/outer"):
        raise OSError(errno.EIO, "Input/output error", "/inner")
    assert caught.value.filename == "/inner"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("{tmp}/absent/x", "it does not exist"),
        ("{tmp}/file/x", "a part of the path is a file"),
        ("{tmp}/" + "n" * 300, "the name is too long"),
        # The hidden file beside it is longer than what was asked for.
        ("{tmp}/" + "n" * 240, "the name is too long"),
        ("{tmp}/folder", "it is a folder"),
        ("{tmp}/loop/x", "its links go round"),
        ("/proc/x", "the system does not permit it"),
    ],
)
def test_a_file_that_cannot_be_made_is_named_as_it_was_asked_for(tmp_path, path, why):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = path.format(tmp=tmp_path)
    text = told(write(type(tmp_path)(path)))
    assert text.startswith(f"'{path}' cannot be used: {why}"), text
    assert not [item for item in os.listdir(tmp_path) if item.endswith(".tmp")]


def test_a_file_that_grows_past_the_limit_is_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        text = told(write(tmp_path / "large"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert text.startswith(f"'{tmp_path}/large' cannot be used: the file would be larger than")
    assert os.listdir(tmp_path) == []


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path, monkeypatch):
    VendiState(4).save(tmp_path / "state")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "state"))

    # Root may read everything.
    monkeypatch.setattr("builtins.open", refuse)
    assert "permission is denied" in told(lambda: VendiState.load(tmp_path / "state"))


def test_a_current_folder_that_is_gone_is_said(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; os.rmdir(os.getcwd()); sys.argv = ['gvendi', 'info']\n"
        "from gvendi_fast.cli import main\nmain()"
    )
    path = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: the current folder does not exist any more; change to one that does\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ConnectionResetError(errno.ECONNRESET, "x"),
            "a connection failed: the other side broke off the connection",
        ),
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "x"),
            "a connection failed: nothing answers there; check the",
        ),
        (TimeoutError(errno.ETIMEDOUT, "x"), "a connection failed: there was no answer in time"),
        (OSError(errno.ENETUNREACH, "x"), "the operating system refused: the network cannot be reached"),
        (BrokenPipeError(errno.EPIPE, "x"), "the operating system refused: whoever read it has closed it"),
        (OSError(errno.EIO, "x"), "the operating system refused: the disk or the mount failed"),
        (OSError(errno.EOWNERDEAD, "the owner died"), "the operating system refused: the owner died"),
    ],
)
def test_an_error_without_a_path_says_what_failed(error, words):
    assert sentence(error).startswith(words)
