"""The record of results: what differs is reported, and the same tree gives the same record."""

import json
import subprocess
import sys

import pytest
from places import BENCHMARKS

SCRIPT = BENCHMARKS / "unchanged.py"


def unchanged(*arguments, cwd=None):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def record(folder, sections):
    """A record of some sections, made in a folder."""
    done = unchanged("record", folder / "record.json", "--only", sections, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "record.json"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two records of the fastest section, made in different folders."""
    return [record(tmp_path_factory.mktemp(name), "scores") for name in ("one", "two")]


def names_of_the_same(recorded):
    one, other = (json.loads(path.read_text()) for path in recorded)
    assert one == other
    names = set(one["entries"])
    done = unchanged("compare", *recorded)
    assert (done.returncode, done.stdout) == (0, f"{len(names)} results, all the same\n")
    return names


@pytest.mark.soak
def test_the_same_tree_gives_the_same_record(recorded):
    assert {"scores/tall/jackknife", "scores/groups/labels", "scores/between sources"} <= names_of_the_same(
        recorded
    )


@pytest.mark.soak
def test_the_same_tree_gives_the_same_record_of_selections(tmp_path_factory):
    names = names_of_the_same([record(tmp_path_factory.mktemp(name), "selection") for name in ("one", "two")])
    for method in ("lazy", "stochastic", "two-round", "relaxed"):
        assert {f"selection/{method}/vendi", f"selection/{method}/quality/quotas"} <= names


def test_a_planted_difference_is_reported(recorded, tmp_path):
    changed = json.loads(recorded[0].read_text())
    entries = changed["entries"]
    entries["scores/wide/orders"]["shows"] = entries["scores/wide/orders"]["shows"].replace("19.", "20.", 1)
    entries["scores/wide/orders"]["sha256"] = "0" * 64
    del entries["scores/between sources"]
    entries["scores/new"] = {"sha256": "1" * 64, "shows": "1"}
    changed["made with"]["torch"] = "0.0"
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    done = unchanged("compare", recorded[0], path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "torch" in lines[0]
    assert lines[1] == "scores/wide/orders:"
    assert "19." in lines[2]
    assert "20." in lines[3]
    assert lines[4:6] == [
        "scores/between sources: only in the old record",
        "scores/new: only in the new record",
    ]
    assert lines[6].startswith("3 of ")
    done = unchanged("compare", recorded[0], path, "--ignore", "scores/")
    assert done.returncode == 0, done.stdout


def test_an_unknown_section_is_refused(tmp_path):
    done = unchanged("record", tmp_path / "x.json", "--only", "scores,nothing")
    assert done.returncode == 2
    assert "no section nothing; there are sketches, scores" in done.stderr
