"""`--engine` of the commands that read a run directory: the same output whoever reads, and the first rank's alone."""

import pickle

import pytest
import typer
from small_runs import make_sources

from gvendi_fast.base.engine import Engine
from gvendi_fast.cli.app import app
from gvendi_fast.data import chunks
from gvendi_fast.engines import choice

COMMANDS = typer.main.get_command(app).commands


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory of three chunks, with three sources."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 20)
    return make_sources(tmp_path / "run")


class Elsewhere(Engine):
    """Everything is pickled, as for another process, and results come from the last item on."""

    name, run_id, is_remote = "elsewhere", "0", True

    def __init__(self):
        self.items = 0

    def map(self, make, items):
        function = pickle.loads(pickle.dumps(make))()
        self.items += len(items)
        for place in reversed(range(len(items))):
            yield place, pickle.loads(pickle.dumps(function(items[place])))

    def work(self, open_worker, items):
        raise NotImplementedError


@pytest.mark.parametrize("name", ["sketch", "score", "select", "cluster", "weights"])
def test_the_commands_that_take_engines_take_the_same_options(name):
    wanted = {"engine", "workers", "gpus_per_worker", "cpus_per_worker", "ray_address"}
    assert wanted <= {param.name for param in COMMANDS[name].params}


def test_weights_are_the_same_to_the_bit_on_every_engine(gvendi, run, monkeypatch):
    words = ("weights", run, "--by", "source", "--json")
    code, wanted, err = gvendi(*words)
    assert (code, err) == (0, "")
    with monkeypatch.context() as patch:
        elsewhere = Elsewhere()
        patch.setattr(choice, "LocalEngine", lambda: elsewhere)
        assert gvendi(*words) == (0, wanted, "")
        assert elsewhere.items == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, out in (("0", wanted), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert gvendi(*words) == (0, out, "")
    assert "--workers goes with --engine ray" in gvendi(*words, "--engine", "local", "--workers", "2")[2]
    assert "--ray-address goes with --engine ray" in gvendi(*words, "--ray-address", "auto")[2]
