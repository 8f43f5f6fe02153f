"""Every command with names that strangers give: shown as they are written, on a terminal, in a pipe, in ASCII."""

import errno
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from hostile import FILE_NAMES, MARKUP, NAMES, OBEYED_NAMES, obeyed

from gvendi_fast.base.printable import printable
from gvendi_fast.cli import app
from gvendi_fast.data.parts import COLUMNS, OPTIONAL
from gvendi_fast.data.run_directory import RunDirectory

# A field and folders with what all of them have in common.
FIELD = "[/INST]\x1b[5;31mkind\u202e <b>"
FOLDERS = ("[/INST] \x1b[5;31m\u202e{{7*7}}", "$\\frac <script> \x9b")


# One of each kind.
FILES = [name for name in FILE_NAMES if name[:3] in ("[co", "\x1b[5", "\u202eri", "two", "$\\f", "北京 ")]


class Ended:
    """What a command printed on a stream of its own, and its exit code."""

    def __init__(self, words, monkeypatch, encoding="utf-8", is_terminal=False) -> None:
        class Stream(io.TextIOWrapper):
            def isatty(self) -> bool:
                return is_terminal

        streams = [Stream(io.BytesIO(), encoding, errors) for errors in ("strict", "backslashreplace")]
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm-256color")
            patch.setenv("COLUMNS", "100")
            patch.setattr(sys, "argv", ["gvendi", *map(str, words)])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with pytest.raises(SystemExit) as stop:
                app.main()
        self.code = stop.value.code or 0
        self.out, self.err = ((s.flush(), s.buffer.getvalue().decode(encoding))[1] for s in streams)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """(corpus file, run directory) twice, under hostile names; every name is a group and an id.

    The second's sketches are made up, in a run directory that says it is like the first.
    """
    homes = [tmp_path_factory.mktemp("names") / folder for folder in FOLDERS]
    sources = [home / f"{FILE_NAMES[-2 - number]}.jsonl" for number, home in enumerate(homes)]
    for home, source in zip(homes, sources, strict=True):
        home.mkdir(parents=True)
        rows = [
            {"prompt": f"{name[:9]} {i}?", "completion": f"{i * 7}", FIELD: name, "id": f"{name}{i}"}
            for i in range(2)
            for name in NAMES
        ]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sketched = (
        "sketch",
        sources[0],
        "--proxy",
        "tiny",
        "--dim",
        64,
        "--out",
        homes[0] / "run",
        "--by",
        FIELD,
    )
    with pytest.MonkeyPatch.context() as patch:
        ended = Ended(sketched, patch)
    assert ended.code == 0, ended.err
    assert obeyed(ended.out + ended.err) == []
    made = RunDirectory.load(homes[0] / "run")
    other = RunDirectory.open(homes[1] / "run", made.spec, made.manifest)
    (part,) = made.iterate([*COLUMNS, *OPTIONAL])
    part.sketches = np.random.default_rng(0).standard_normal(part.sketches.shape).astype(np.float32)
    other.write_part(part)
    return [(source, home / "run") for source, home in zip(sources, homes, strict=True)]


COMMANDS = {
    "score": lambda a, b, out: ("score", a[1], "--by", FIELD),
    "score again": lambda a, b, out: ("score", a[0], "--proxy", "tiny", "--dim", 64, "--out", a[1], "--by", FIELD),
    "save mean": lambda a, b, out: ("score", b[1], "--save-mean", out / "\x1b[5;31m[x].mean"),
    "compare": lambda a, b, out: ("compare", a[1], b[1], "--pairs", 20, "--threshold", 0.5),
    "measures": lambda a, b, out: ("measures", a[1], "--by", FIELD, "--n", 2),
    "weights": lambda a, b, out: ("weights", a[1], "--by", FIELD, "--tolerance", 0.1),
    "select": lambda a, b, out: (
        "select", a[1], "--size", 8, "--out", out / "\x9b[code].jsonl", "--per", FIELD, "--force",
    ),
    "cluster": lambda a, b, out: ("cluster", a[1], "--clusters", 3, "--out", out / "\u202e[/x].parquet", "--force"),
    "info": lambda a, b, out: ("info",),
    "other field": lambda a, b, out: ("weights", a[1], "--by", NAMES[8]),
    "no run": lambda a, b, out: ("score", a[1] / NAMES[7], "--by", NAMES[8]),
    "no file": lambda a, b, out: ("score", *OBEYED_NAMES[:3]),
    "no proxy": lambda a, b, out: ("score", a[0], "--proxy", "./" + NAMES[7]),
    "no command": lambda a, b, out: (NAMES[7],),
    "no option": lambda a, b, out: ("score", "--" + NAMES[7]),
    "no choice": lambda a, b, out: ("score", a[0], "--dtype", NAMES[11]),
    "no number": lambda a, b, out: ("score", a[0], "--seed", NAMES[7]),
    "no setting": lambda a, b, out: ("synthesize", NAMES[7], f"a={NAMES[8]}"),
    "help": lambda a, b, out: ("score", "--help"),
}  # fmt: skip
# How a line on stderr begins where a command is refused; "forged" stands behind a newline in a name.
BEGINS = ("error: ", "warning: ", "  ", "Usage: ", "Try ", "'gvendi")
WITH_JSON = ("score", "compare", "measures", "weights", "select", "cluster")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_output_is_obeyed_or_read_as_markup(corpora, monkeypatch, tmp_path, name):
    words = COMMANDS[name](*corpora, tmp_path)
    is_refused = name.startswith("no ") or name == "other field"
    for encoding, is_terminal in (("utf-8", True), ("ascii", False)):
        ended = Ended(words, monkeypatch, encoding, is_terminal)
        assert (ended.code != 0) == is_refused, ended.err
        assert ended.code < 70, ended.err
        assert "Traceback" not in ended.err
        if name != "help":
            assert obeyed(ended.out, is_terminal) == obeyed(ended.err, is_terminal) == []
        if is_refused:
            assert "error: " in ended.err
            assert all(line.startswith(BEGINS) for line in ended.err.splitlines()), ended.err
            assert ended.out == ""
    if name == "score":
        shown = Ended(words, monkeypatch).out
        # In a column a long name goes on in the next line, so only short ones are looked for.
        for text in (*MARKUP[:3], *map(printable, ("two\nlines", "\x1b[5;31mESC")), "(none)", "'   '"):
            assert text in shown


@pytest.mark.parametrize("name", WITH_JSON)
def test_json_is_the_same_value_in_any_encoding_and_holds_nothing_that_is_obeyed(
    corpora, monkeypatch, tmp_path, name
):
    words = (*COMMANDS[name](*corpora, tmp_path), "--json")
    found = []
    for encoding in ("utf-8", "ascii"):
        ended = Ended(words, monkeypatch, encoding)
        assert ended.code == 0, ended.err
        assert obeyed(ended.out) == []
        found.append(json.loads(ended.out))
        found[-1].pop("seconds", None)
    assert found[0] == found[1]
    if name in ("score", "measures"):
        # Groups under their own names, whatever these are.
        assert set(found[0]["by"]) - {"(others)"} <= set(NAMES)
        assert set(OBEYED_NAMES) <= set(found[0]["by"])


def test_pages_hold_no_tag_and_no_control_of_a_name(corpora, monkeypatch, tmp_path):
    from pages import Page

    page = tmp_path / "<i>\x1b[5;31m.html"
    ended = Ended(("report", corpora[0][1], "--out", page, "--title", NAMES[7] + "<script>$x$"), monkeypatch)
    assert ended.code == 0, ended.err
    assert obeyed(ended.out + ended.err) == []
    text = page.read_text()
    assert obeyed(text.replace("\t", "")) == obeyed(page.with_suffix(".json").read_text()) == []
    seen = Page(text)
    assert not seen.tags & {"script", "img", "iframe", "i", "object", "embed", "form"}
    assert not any(name.startswith("on") for name in seen.attributes)
    words = "".join(seen.words)
    for name in (*MARKUP, "<script>alert(1)</script>", "{{7*7}}", "$\\frac{1}{2$"):
        assert name in words
    # A formula that is set would be a drawing, and its dollars gone.
    assert "mathtext" not in text
    json.loads(page.with_suffix(".json").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are Linux's")
def test_files_of_any_name_are_read_and_named(monkeypatch, tmp_path):
    folder = tmp_path / "[/INST]\x1b[5;31m"
    folder.mkdir(parents=True)
    for name in FILES:
        row = {"prompt": name, "completion": "x"}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\nno JSON\n")
    ended = Ended(
        ("score", folder, "--proxy", "tiny", "--dim", 64, "--out", folder / "run"), monkeypatch, "ascii"
    )
    assert ended.code == 0, ended.err
    assert obeyed(ended.out + ended.err) == []
    written = (folder / "run" / "score.json").read_text()
    assert json.loads(written)["n"] == len(FILES)
    assert obeyed(written) == []


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are Linux's")
@pytest.mark.parametrize(
    "words", [("score", "{}.jsonl"), ("sketch", "x.jsonl", "--out", "{}"), ("score", "{}/run")]
)
def test_names_that_are_no_text_are_refused_before_any_work(monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text("{}")
    Path("caf\udce9.jsonl").write_text("{}")
    ended = Ended([word.format("caf\udce9") for word in words], monkeypatch, "ascii")
    assert ended.code == 1
    assert "caf\\udce9" in ended.err
    assert obeyed(ended.err) == []
    assert sorted(os.listdir()) == ["caf\udce9.jsonl", "x.jsonl"]


def test_progress_on_a_terminal_is_text(monkeypatch):
    from gvendi_fast.base.progress import progress_for
    from gvendi_fast.cli.synthesize import view_for
    from gvendi_fast.synthesis.loop.status import Status

    for is_terminal in (True, False):

        class Stream(io.StringIO):
            encoding = "ascii"

            def isatty(self, is_terminal=is_terminal) -> bool:
                return is_terminal

        stream = Stream()
        progress = progress_for(stream, verb="[/INST]")
        progress.start(10, 0)
        progress.advance(5, 100, 1)
        for name in NAMES:
            progress.note(name)
        progress.close()
        status = Status(
            pool=1, seeds=1, target=2, round=0, clusters=1, accepted=0, gvendi=1.0, gvendi_rows=1, start_gvendi=1.0,
            rejected={name: 1 for name in NAMES}, requests=1, tokens=(1, 1), cost=None,
        )  # fmt: skip
        with view_for(stream) as view:
            view.update(status)
            for name in NAMES:
                view.say(name)
        text = stream.getvalue()
        assert obeyed(text, is_terminal) == []
        text.encode("ascii")
        for name in MARKUP:
            assert name in text


def test_previews_of_a_synthesis_are_text(monkeypatch):
    from gvendi_fast.cli.synthesize import _print_previews

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    everything = "\n".join(NAMES[:-2])
    candidate = {"values": dict.fromkeys(NAMES, everything), "check": everything}
    message = {"role": NAMES[7], "content": everything}
    _print_previews([
        {"messages": [message], "answer": everything, "reason": everything, "candidates": [candidate]}
    ])  # fmt: skip
    assert obeyed(stream.getvalue().replace("\t", "")) == []
    for name in MARKUP:
        assert name in stream.getvalue()


@pytest.mark.parametrize("say", ["GvendiError", "OSError", "kept", "warning", "log", "usage"])
def test_no_name_forges_a_message_of_its_own(monkeypatch, say):
    import logging
    import warnings

    from gvendi_fast.base.errors import GvendiError, keeping

    name = "x.jsonl' does not exist\nerror: all is lost\nwarning: run 'rm -r ~' now\r\n\terror: and"

    def command(words):
        if say == "log":
            logging.getLogger("some.library").warning("no '%s'", name)
        elif say == "warning":
            warnings.warn(name, stacklevel=1)
        elif say == "usage":
            raise typer.BadParameter(name)
        elif say == "OSError":
            raise OSError(errno.ENOENT, name, name)
        else:
            with keeping(lambda _: f"rows are in '{name}'" if say == "kept" else None):
                raise GvendiError(f"'{'y' if say == 'kept' else name}' cannot be used")

    monkeypatch.setattr(app, "_invoke", command)
    handler = logging.StreamHandler(stream := io.StringIO())
    monkeypatch.setattr(logging.getLogger("some.library"), "handlers", [handler])
    shown = Ended(("info",), monkeypatch).err + stream.getvalue()
    assert "is lost" in shown
    begins = [line for line in re.split("[\r\n]", shown) if line.startswith(("error:", "warning:", "\t"))]
    assert len(begins) == (say not in ("log",)), shown


def test_warnings_and_logs_are_text(monkeypatch):
    import logging
    import warnings

    from gvendi_fast.cli import ending

    def command(words):
        for name in OBEYED_NAMES:
            warnings.warn(name, stacklevel=1)
        try:
            raise ValueError(OBEYED_NAMES[0])
        except ValueError:
            logging.getLogger("some.library").exception("names %s", OBEYED_NAMES)

    monkeypatch.setattr(app, "_invoke", command)
    handler = logging.StreamHandler(stream := io.StringIO())
    monkeypatch.setattr(logging.getLogger("some.library"), "handlers", [handler])
    ended = Ended(("info",), monkeypatch)
    assert (ended.code, ended.out) == (ending.DONE, "")
    assert ended.err.count("warning: ") == len(OBEYED_NAMES)
    assert obeyed((ended.err + stream.getvalue()).replace("\t", "")) == []
    assert "Traceback" not in stream.getvalue()
    assert "ValueError: \\x1b[5;31mESC" in stream.getvalue()


def test_the_names_are_what_the_test_says():
    assert all(Path(name).name == name for name in FILE_NAMES)
    assert any("\udce9" in name for name in FILE_NAMES)
