"""The README is true: its example runs, its tables are those of the results, its commands exist."""

import re
import subprocess
import sys

import pytest
from places import ROOT

from gvendi_fast.cli import app

README = (ROOT / "README.md").read_text()


def test_python_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert len(example.strip().splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    first, second = map(float, capsys.readouterr().out.split())
    assert 1 < second <= first <= 3


def test_the_example_on_rows_runs(capsys):
    example = re.findall(r"```python\n(.*?)```", README, re.S)[1]
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "Interval(" in capsys.readouterr().out
    assert names["gain"].shape == (1000,)
    assert float(names["surprisal"].mean()) == pytest.approx(names["state"].entropy(), abs=1e-5)
    assert len(names["best"]) == 100


def test_commands_that_it_names_exist():
    named = set(re.findall(r"^    gvendi ([a-z]+)", README, re.M)) | set(
        re.findall(r"`gvendi ([a-z]+)", README)
    )
    known = {command.name or command.callback.__name__ for command in app.app.registered_commands}
    assert named <= known


def test_tables_are_rendered_from_the_results():
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_targets_that_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
