"""Data sets of the hub on the command line: scored as files are, resumed, extended, inspected, and given back."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("datasets", reason="needs the package datasets, which the extra hub installs")
from fake_hub import NEW, OLD, FakeHub

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli import inspect as inspect_command
from gvendi_fast.cli.app import app
from gvendi_fast.data.hub_names import HubName

TINY = ["--proxy", "tiny", "--dim", "64", "--unit-rows", "5"]
NAME = f"one/set:default:train@{OLD}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = FakeHub().install(monkeypatch)
    found.sets = {"one/set": {"default": {"train": 12}}}
    return found


def run(*given):
    done = CliRunner().invoke(app, [*map(str, given)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def test_a_data_set_of_the_hub_is_scored_as_its_rows_in_a_file_are(hub, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(hub.row(OLD, n)) + "\n" for n in range(12)))
    wanted = json.loads(run("score", path, *TINY, "--json").stdout)
    done = run("score", "one/set", *TINY, "--json")
    found = json.loads(done.stdout)
    assert (found["gvendi"], found["n"], found["rejected"]) == (wanted["gvendi"], 12, 0)
    assert "fetching all rows of one/set:default:train@a" in done.stderr


def test_a_run_resumes_grows_and_gives_its_rows_back(hub, tmp_path):
    out = tmp_path / "out"
    run("sketch", "one/set", "--out", out, "--limit", "7", *TINY)
    assert hub.read == [*range(7)]
    recorded = json.loads((out / "units.json").read_text())
    assert [(source["path"], source["rows"]) for source in recorded["files"]] == [(NAME, 7)]
    # The hub has moved on, and the run has not.
    hub.revisions["main"] = NEW
    done = run("sketch", "one/set", "--out", out, *TINY)
    assert f"'one/set' is {NAME}, as '{out}' was begun with it" in done.stderr
    assert "the corpus has grown from 7 to 12 rows: 5 of an earlier run kept, 7 to sketch" in done.stderr
    hub.asked.clear()
    assert "nothing is left to do" in run("sketch", "one/set", "--out", out, *TINY).stderr
    assert hub.asked == []
    assert "12 rows" in run("check", out, "--corpus", tmp_path).stdout
    chosen = tmp_path / "chosen.jsonl"
    run("select", out, "--size", "3", "--out", chosen)
    rows = [json.dumps(hub.row(OLD, n)).encode() for n in range(12)]
    assert set(chosen.read_bytes().splitlines()) < set(rows)
    # As a run of all at once.
    whole = tmp_path / "whole"
    run("sketch", NAME, "--out", whole, *TINY)
    assert (
        json.loads(run("score", out, "--json").stdout)["gvendi"]
        == json.loads(run("score", whole, "--json").stdout)["gvendi"]
    )


def test_rows_that_were_fetched_ahead_of_a_run_leave_it_readable(hub, tmp_path):
    out = tmp_path / "out"
    run("sketch", "one/set", "--out", out, "--limit", "7", *TINY)
    hub.breaks_at = 10
    with pytest.raises(GvendiError, match="the line is dead") as caught:
        run("sketch", "one/set", "--out", out, *TINY)
    assert caught.value.kept == f"10 rows of {NAME} are kept in '{out}'; the same command goes on behind them"
    run("select", out, "--size", "3", "--out", tmp_path / "chosen.jsonl")
    run("sketch", "one/set", "--out", out, *TINY)
    assert json.loads(run("score", out, "--json").stdout)["n"] == 12
    HubName("one/set", "default", "train").place_in(out).unlink()
    with pytest.raises(GvendiError, match=f"'{NAME}' was not found .looked for '.*hub-one--set-.*.jsonl'"):
        run("select", out, "--size", "3", "--out", tmp_path / "more.jsonl")


def test_a_fetch_that_broke_off_before_the_first_sketch_goes_on(hub, tmp_path):
    hub.breaks_at = 6
    with pytest.raises(GvendiError, match="try again"):
        run("sketch", "one/set", "--out", tmp_path / "out", *TINY)
    assert hub.read == [*range(6)]
    assert (
        f"fetching all rows of {NAME} from row 7 on"
        in run("sketch", "one/set", "--out", tmp_path / "out", *TINY).stderr
    )


def test_rejected_rows_name_the_data_set(hub, tmp_path):
    hub.row = lambda commit, n: {"prompt": f"{n}?", "completion": None if n == 4 else "yes"}
    run("sketch", "one/set", "--out", tmp_path / "run", *TINY)
    (line,) = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert (json.loads(line)["file"], json.loads(line)["line"]) == (NAME, 5)


def test_inspect_fetches_what_it_looks_at(hub, monkeypatch):
    monkeypatch.setattr(inspect_command, "HUB_ROWS", 6)
    done = run("inspect", "one/set", "--proxy", "tiny", "--rows", "4", "--show", "1")
    assert f"fetching the first 6 rows of {NAME}" in done.stderr
    assert hub.read == [*range(6)]
    assert "4 of 6 rows  looked at, from 'one/set:default:train'\n" in done.stdout
    assert "\none/set:default:train:1: " in done.stdout


@pytest.mark.parametrize("command", [["score"], ["sketch", "--out", "run"], ["inspect"]])
def test_a_wrong_name_is_reported_before_the_proxy_is_looked_for(hub, command, tmp_path):
    with pytest.raises(
        GvendiError, match="'foo/bar' does not exist here, and a data set of this name is unknown"
    ):
        run(*command, "foo/bar", "--proxy", tmp_path / "nowhere")
    with pytest.raises(GvendiError, match=r"'data/tain.jsonl' does not exist$"):
        run(*command, "data/tain.jsonl", "--proxy", tmp_path / "nowhere")
    assert {repo for _, repo in hub.asked} == {"foo/bar"}
