"""`--threads` of the commands that compute, and the line that is printed where cores are short."""

import sys

import pytest
import torch
import typer

from gvendi_fast.base.threads import Cores
from gvendi_fast.cli import threads
from gvendi_fast.cli.app import app

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize(
    "name", ["score", "sketch", "select", "cluster", "compare", "measures", "weights", "report"]
)
def test_every_command_that_computes_takes_it(name):
    assert "threads" in {param.name for param in COMMANDS[name].params}


class Busy:
    """A load of two cores, one of which another process has."""

    seconds = 60.0

    def cores(self) -> Cores:
        return Cores(2, 1.0)


@pytest.fixture
def seen(monkeypatch):
    """What a command finds of threads, on a busy machine."""
    monkeypatch.setattr(threads, "LOAD", Busy())
    monkeypatch.setattr(threads, "Load", Busy)
    found = []
    return threads.with_threads(lambda: found.append(torch.get_num_threads())), found


def test_the_number_holds_for_the_command_alone(seen, capsys):
    command, found = seen
    before = torch.get_num_threads()
    command(threads=before + 1)
    assert (found, torch.get_num_threads()) == ([before + 1], before)


def test_too_many_are_said_once(seen, capsys):
    command, _ = seen
    command(threads=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("2 threads on 2 cores of which other processes use 1.0: ")
    assert "--threads 1 may be faster" in err
    command(threads=1)
    assert capsys.readouterr().err == ""


def test_a_program_that_calls_a_command_keeps_its_own(seen, monkeypatch, capsys):
    command, found = seen
    assert "torch" in sys.modules
    command()
    assert found == [torch.get_num_threads()]
    assert capsys.readouterr().err == ""


def test_what_comes_after_the_start_is_said_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads._say_crowded(None, Busy())
    assert "2 threads on 2 cores of which other processes use 1.0" in capsys.readouterr().err
    # Nor is what was said before, nor a short run's.
    threads._say_crowded("said", Busy())
    short = Busy()
    short.seconds = 1.0
    threads._say_crowded(None, short)
    assert capsys.readouterr().err == ""


def test_less_than_one_thread_is_wrong_usage(gvendi):
    code, _, err = gvendi("score", "x.jsonl", "--threads", "0")
    assert code == 2
    assert "--threads" in err
