"""One place prints: what it escapes, streams that take nothing, and that no other file prints."""

import ast
import io
import json
import os
import sys

import pytest
from hostile import NAMES, obeyed
from places import PACKAGE

from gvendi_fast.base.printing import console, guarded, json_text, note, put, put_json, put_text, warn

# Who may: the place itself; tables and bars, which get rich's console from it.
PRINTERS = {"base/printing.py": "", "cli/tables.py": "console.print", "base/progress.py": "console.print"}


def prints(text: str) -> list[str]:
    """The calls in a source that write to a person past `gvendi_fast.base.printing`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.split(".")[-1]
            if (
                name in ("print", "Console", "sys.stdout.write", "sys.stderr.write", "rich.print")
                or last in ("print", "print_exc", "print_exception", "echo", "secho", "Console")
                or "sys.stdout.buffer" in name
            ):
                found.append(name)
    return found


def test_no_other_file_prints():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        calls = [call for call in prints(path.read_text()) if not call.endswith(PRINTERS.get(name, "\0"))]
        if calls:
            found[name] = calls
    assert found == {}, "use put, put_text, put_json, note or warn of gvendi_fast.base.printing"


def test_the_scan_finds_every_way_to_print():
    source = (
        "print(x); sys.stderr.write(x); Console(file=f); c.console.print(x); typer.echo(x); fingerprint(x)"
    )
    assert prints(source) == ["print", "sys.stderr.write", "Console", "c.console.print", "typer.echo"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_a_line_is_one_line_in_any_encoding(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    for name in (*NAMES, "half \ud800"):
        put(name)
        console().print(name.split("\n")[0], soft_wrap=True) if "\x1b" not in name else None
    text = stream.buffer.getvalue().decode(encoding)
    assert "\r" not in text
    assert "half \\ud800" in text


def test_texts_keep_their_lines_and_nothing_else(capsys):
    put_text("a\n\tb\r\x1b[31m")
    assert capsys.readouterr().out == "a\n\tb\\r\\x1b[31m\n"


@pytest.mark.parametrize("is_ascii", [False, True])
def test_json_reads_back_as_it_was(is_ascii):
    value = {name + "\ud800": [name, {"x": name}] for name in NAMES}
    text = json_text(value, is_ascii=is_ascii)
    assert json.loads(text) == value
    assert obeyed(text) == []
    text.encode("ascii" if is_ascii else "utf-8")
    assert json.loads(json_text(value, indent=1)) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        json_text(float("nan"))


def test_json_of_a_stream_that_lacks_characters(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    put_json({"北京 🎲": "\x9b"})
    assert json.loads(stream.buffer.getvalue()) == {"北京 🎲": "\x9b"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_stdout_that_takes_nothing_is_an_error_that_names_it_and_stderr_is_passed_over(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w"))  # noqa: SIM115
    for call in (lambda: put("x"), lambda: put_json(1), lambda: console().print("x")):
        with pytest.raises(OSError, match="No space left") as caught:
            call()
        assert caught.value.filename == "standard output"
    note("x")
    warn("x")
    guarded(sys.stderr).write("x")
    # What a failed write leaves in a buffer would fail again at the end.
    for stream in (sys.stdout, sys.stderr):
        with pytest.raises(OSError, match="No space"):
            stream.close()


def test_a_closed_stdout_is_an_error_and_a_closed_stderr_is_not(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        put("x")
    note("x")
