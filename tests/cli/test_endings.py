"""However a command ends: one message, what is kept, the documented code, and no traceback unless asked for."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from hangs import HANG_S
from places import ROOT

from gvendi_fast.analysis import scoring
from gvendi_fast.base.errors import GvendiError, keeping
from gvendi_fast.cli import app, ending
from gvendi_fast.cli import score as score_command
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import read_score


def recurse(depth=0):
    return recurse(depth + 1)


def late_import():
    """As libraries do that catch everything while a module of theirs is imported."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("some.module cannot be imported") from error


def help_into_a_closed_pipe():
    """As rich prints the help."""
    try:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe", "standard output")
    except BrokenPipeError:
        # It says nothing of what is behind it.
        raise SystemExit(1)  # noqa: B904


def raiser(error):
    def call(*_):
        # One object serves several tests.
        vars(error).clear()
        raise error

    return call


ENDINGS = [
    (raiser(GvendiError("n is 0; wanted 1")), 1, "error: n is 0; wanted 1\n"),
    (raiser(OSError(errno.ENOSPC, "No space", "/a\x1b[1m")), 1, "error: '/a\\x1b[1m' cannot be used: its disk is full"),
    (raiser(OSError(errno.EMFILE, "Too many")), 1, "error: the operating system refused: this process has too many"),
    (raiser(BrokenPipeError(errno.EPIPE, "Broken pipe", "standard output")), 141, "error: 'standard output' cannot be"),
    (raiser(ConnectionResetError(errno.ECONNRESET, "Connection reset")), 1, "error: a connection failed: the other"),
    (raiser(MemoryError()), 1, "error: memory ran out; try smaller"),
    (recurse, 70, "internal error: something is nested too deeply (test_endings.py, line"),
    (lambda: 1 / 0, 70, "internal error: ZeroDivisionError: division by zero (test_endings.py, line"),
    (raiser(KeyError("\x1b[1m[/x]\n")), 70, "internal error: KeyError: '\\x1b[1m[/x]\\n' (test_endings.py"),
    (raiser(UnicodeEncodeError("ascii", "é", 0, 1, "no")), 70, "internal error: UnicodeEncodeError"),
    (raiser(KeyboardInterrupt()), 130, "\ninterrupted: files are written whole or not at all"),
    (late_import, 130, "\ninterrupted: "),
    (raiser(EOFError()), 70, "internal error: EOFError"),
    (raiser(SystemExit("stopped by a library \x1b[1m")), 1, "error: stopped by a library \\x1b[1m\n"),
    (raiser(SystemExit(3)), 3, ""),
    (help_into_a_closed_pipe, 141, ""),
    (lambda: signal.raise_signal(signal.SIGTERM), 143, "\nasked to end (SIGTERM): files are written whole"),
    (lambda: signal.raise_signal(signal.SIGHUP), 129, "\nits terminal was closed (SIGHUP): files are"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "code", "said"), ENDINGS, ids=[said[:40].strip() for _, _, said in ENDINGS])
@pytest.mark.parametrize("is_kept", [False, True])
def test_each_end_is_one_message_and_its_code(gvendi, monkeypatch, call, code, said, is_kept):
    def command(words):
        if not is_kept:
            return call()
        with keeping(lambda _: "the rows are in 'x\x1b[1m'"):
            return call()

    monkeypatch.setattr(app, "_invoke", command)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    found, out, err = gvendi("info")
    assert (found, out) == (code, "")
    assert err.startswith(said if code < 128 or code == 141 or not is_kept else said.split(":")[0])
    assert "Traceback" not in err
    assert "\x1b" not in err
    if is_kept and said and "by a library" not in said:
        assert "the rows are in 'x\\x1b[1m'\n" in err
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert str(code) in ending.EXIT_CODES or code == 3


@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_traceback_is_shown_where_it_is_asked_for(gvendi, monkeypatch, way):
    monkeypatch.setattr(app, "_invoke", lambda words: 1 / 0)
    if way == "variable":
        monkeypatch.setenv("GVENDI_TRACEBACK", "1")
    code, _, err = gvendi(*(["--traceback"] if way == "option" else []), "info")
    assert code == 70
    assert err.startswith("Traceback (most recent call last)")
    assert "internal error: ZeroDivisionError" in err
    monkeypatch.setenv("GVENDI_TRACEBACK", "0")
    assert not ending.wants_traceback(["score", "--traceback"])


def test_exit_codes_are_in_the_help_and_in_the_guide(gvendi):
    code, out, _ = gvendi("--help")
    assert code == 0
    guide = (ROOT / "docs" / "guide.md").read_text()
    for number in ("0", "1", "2", "70", "129", "130", "141", "143"):
        assert number in out
        assert f"| {number} |" in guide
    assert "--traceback" in out
    assert "--traceback" in guide
    assert gvendi("--version")[0] == 0
    assert gvendi()[0] == 2
    assert gvendi("no-command")[0] == 2


def test_threads_and_finalizers_leave_no_traceback(gvendi, monkeypatch):
    import threading

    class Bad:
        def __del__(self):
            raise ValueError("in a finalizer \x1b[1m")

    def command(words):
        Bad()
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()

    monkeypatch.setattr(app, "_invoke", command)
    code, _, err = gvendi("info")
    assert code == 0
    assert err == (
        "warning: ValueError: in a finalizer \\x1b[1m (while something was cleaned up)\n"
        "warning: a thread ended by ZeroDivisionError: division by zero\n"
    )


def test_ctrl_c_that_meets_a_finalizer_still_ends_the_command(gvendi, monkeypatch):
    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    def command(words):
        Interrupted()
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            time.sleep(0.005)

    monkeypatch.setattr(app, "_invoke", command)
    code, _, err = gvendi("info")
    assert code == 130
    assert err.splitlines()[-1].startswith("interrupted: ")
    assert "Exception ignored" not in err


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def quick(monkeypatch, run):
    """`gvendi score DATA` that writes the made up sketches in place of real ones; returns its folders."""
    folders = []

    def sketch(data, out, *_, **__):
        made = RunDirectory.open(out, run.spec, run.manifest)
        made.write_part(*run.iterate())
        folders.append(made.path)
        return made

    # What is kept goes with the test.
    monkeypatch.setattr(tempfile, "tempdir", str(run.path.parent))
    monkeypatch.setattr(scoring, "sketch_corpus", sketch)
    monkeypatch.setattr(scoring, "load_proxy", lambda name, **_: name)
    monkeypatch.setattr(score_command.CorpusOptions, "load_proxy", lambda self, engine: "tiny")
    return folders


def test_the_score_is_on_disk_before_it_is_printed_and_the_same(gvendi, quick, data, tmp_path, monkeypatch):
    seen = []
    real = score_command._show
    monkeypatch.setattr(
        score_command,
        "_show",
        lambda *given: (seen.append((tmp_path / "out/score.json").read_text()), real(*given)),
    )
    code, out, err = gvendi("score", data, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    written = json.loads(seen[0])
    assert list(written)[-2:] == ["format", "digest"]
    assert json.loads(out) == read_score(tmp_path / "out/score.json") == dict(list(written.items())[:-2])
    assert gvendi("score", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("has_out", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space", "standard output"), KeyboardInterrupt(), KeyError(1)]
)
def test_what_fails_while_it_is_printed_is_kept_and_named(
    gvendi, quick, data, tmp_path, monkeypatch, has_out, error
):
    monkeypatch.setattr(score_command, "_show", raiser(error))
    code, _, err = gvendi("score", data, *(["--out", tmp_path / "out"] if has_out else []))
    assert code in (1, 70, 130)
    monkeypatch.undo()
    (folder,) = quick
    assert f"the score is in '{folder / 'score.json'}'" in err
    assert json.loads((folder / "score.json").read_text())["n"] == 10
    code, out, err = gvendi("score", folder)
    assert (code, "n = 10" in out) == (0, True), err


@pytest.mark.parametrize(
    "error", [GvendiError("no"), KeyboardInterrupt(), KeyError(1), OSError(errno.EIO, "io")]
)
def test_what_fails_after_sketching_names_the_folder_and_how_to_score_it(
    gvendi, quick, data, monkeypatch, error
):
    monkeypatch.setattr(scoring, "numbers_of", raiser(error))
    code, out, err = gvendi("score", data)
    assert (code in (1, 70, 130), out) == (True, "")
    (folder,) = quick
    assert f"kept in '{folder}': 'gvendi score {folder}' scores them" in err
    monkeypatch.undo()
    assert RunDirectory.load(folder).units_done == 1
    with pytest.raises(type(error)) as caught, scoring.temporary_run() as other:
        raise type(error)("no")
    assert not other.parent.exists()
    assert getattr(caught.value, "kept", None) is None or "nothing is kept" in caught.value.kept


def test_a_temporary_run_is_gone_where_all_went_well_and_where_nothing_was_finished(
    gvendi, quick, data, monkeypatch
):
    assert gvendi("score", data)[0] == 0
    assert not quick[0].parent.exists()
    monkeypatch.setattr(scoring, "sketch_corpus", lambda *_, **__: 1 / 0)
    code, _, err = gvendi("score", data)
    assert code == 70
    assert "no work unit was finished, so nothing is kept; with --out DIR a run can be resumed" in err


def test_a_score_that_cannot_be_written_is_printed_all_the_same(gvendi, quick, data, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.ENOSPC, "No space", str(path))

    monkeypatch.setattr(score_command, "atomic_write", refuse)
    code, out, err = gvendi("score", data, "--out", tmp_path / "out")
    assert (code, "G-Vendi " in out) == (1, True)
    assert f"error: '{tmp_path}/out/score.json' cannot be used: its disk is full" in err
    assert (
        f"the sketches are kept in '{tmp_path}/out': 'gvendi score {tmp_path}/out' scores them again" in err
    )


def test_what_a_command_wrote_is_named_where_stdout_takes_nothing(gvendi, run, data, tmp_path, monkeypatch):
    from gvendi_fast.base import printing

    def refuse(self, text):
        if not self._is_note:
            raise OSError(errno.ENOSPC, "No space", printing.STDOUT)
        return len(text)

    import gvendi_fast.sketching.corpus as corpus

    monkeypatch.setattr(corpus, "sketch_corpus", lambda *_, **__: run)
    monkeypatch.setattr(score_command.CorpusOptions, "load_proxy", lambda self, engine: "tiny")
    for words, kept in (
        (("sketch", data, "--out", run.path), f"the sketches are whole, in '{run.path}'"),
        (("cluster", run.path, "--clusters", 1, "--out", tmp_path / "c.parquet"), "the clusters are in"),
        (("score", run.path, "--save-mean", tmp_path / "m"), None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(printing._Guarded, "write", refuse)
            found = []
            patch.setattr(ending, "put_error", found.append)
            assert gvendi(*words)[0] == 1
        assert found[0].startswith("error: 'standard output' cannot be used: its disk is full")
        assert kept is None or kept in found[1]
    assert (tmp_path / "c.parquet").is_file()
    assert (tmp_path / "m").is_file()


def test_home_is_written_as_a_tilde(gvendi, run, quick, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "run")
    for words in (
        ("score", "~/data.jsonl", "--out", "~/new", "--save-mean", "~/m"),
        ("score", "~/run", "--mean", "~/m"),
        ("cluster", "~/run", "--clusters", 1, "--out", "~/c.parquet"),
        ("measures", "~/run", "--no-text", "--corpus", "~/"),
        ("compare", "~/run", "~/new", "--no-text"),
        ("report", "~/run", "--clusters", "~/c.parquet", "--out", "~/r.html"),
    ):
        code, _, err = gvendi(*words)
        assert code == 0, err
    assert f"error: '{tmp_path / 'run'}" in gvendi("weights", "~/run", "--by", "x")[2]
    assert f"'{tmp_path}/absent.yaml'" in gvendi("synthesize", "~/absent.yaml")[2]
    assert {"new", "m", "c.parquet", "r.html"} <= set(os.listdir(tmp_path))
    assert not os.path.exists("~")
    absolute = pytest.importorskip("gvendi_fast.synthesis.config.paths").absolute
    config = pytest.importorskip("gvendi_fast.synthesis.config.config").config_from(
        {
            "out": "~/o",
            "pool": {"data": ["~/d*.jsonl"], "corpus": "~/c"},
            "task": {"name": "math"},
            "generator": {"base_url": "http://localhost/v1", "model": "m", "key_variable": None},
            "filter": {"tests": "~/t.jsonl"},
            "stop": {"target": 2, "requests": 2},
        }
    )
    found = absolute(config)
    assert (found.out, found.pool.corpus) == (f"{tmp_path}/o", f"{tmp_path}/c")
    assert list(found.pool.data) == [f"{tmp_path}/d*.jsonl"]
    assert list(found.filter.tests) == [f"{tmp_path}/t.jsonl"]


# A command that says when it has begun, and then waits.
WAITING = """
import sys, time
from gvendi_fast.cli import app, main
def command(words):
    print("begun", flush=True)
    time.sleep(86400)
app._invoke = command
sys.argv = ["gvendi", "info"]
main()
"""
# As the console script: what is imported before `main` runs takes no longer than Python's own start.
IMPORTING = """
import sys
import tempfile
from gvendi_fast.cli import main
print("begun", flush=True)
sys.argv = ["gvendi", "info"]
main()
"""


def child(code, **more):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted: files are written whole"),
        (signal.SIGTERM, 143, "asked to end (SIGTERM): files"),
        (signal.SIGHUP, 129, "its terminal was closed (SIGHUP): files"),
    ],
    ids=lambda value: str(value),
)
def test_a_signal_ends_a_command_that_would_go_on_for_a_day(number, code, said):
    started = child(WAITING)
    assert started.stdout.readline() == "begun\n"
    started.send_signal(number)
    _, err = started.communicate(timeout=HANG_S)
    assert (started.returncode, said in err, err.count("\n")) == (code, True, 2), err


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.2, 0.6])
def test_ctrl_c_during_imports_leaves_no_traceback(wait):
    started = child(IMPORTING)
    assert started.stdout.readline() == "begun\n"
    time.sleep(wait)
    started.send_signal(signal.SIGINT)
    # A second one, while the first is told.
    time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=HANG_S)
    assert "Traceback" not in err, err
    assert started.returncode in (130, -signal.SIGINT), err


@pytest.mark.parametrize(
    "shell",
    [
        "{} --version | true",
        "{} sketch --help | true",
        "{} --version >&-",
        "{} --version > /dev/full",
        "{} --version 2>&- | cat",
    ],
)
def test_a_stdout_that_is_gone_is_one_sentence(shell, tmp_path):
    command = f"{sys.executable} -m gvendi_fast.cli"
    script = f"set -o pipefail; {shell.format(command)}; echo $? > {tmp_path}/code"
    ended = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    code = int((tmp_path / "code").read_text())
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    if "2>&-" in shell:
        assert (code, ended.stderr) == (0, "")
    elif "--help" in shell:
        assert (code, ended.stderr) == (141, "")
    else:
        assert code == (141 if "true" in shell else 1)
        assert ended.stderr.startswith("error: 'standard output' cannot be used: ")
        assert ended.stderr.count("\n") == 1
