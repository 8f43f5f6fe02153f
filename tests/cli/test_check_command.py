"""`gvendi check`: one line for everything that is wrong with a run directory, and an exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from damage import ATTACKS, strip

from gvendi_fast.base import files
from gvendi_fast.data import checking, parts
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data.jsonl, its run directory, and that of another corpus of the same shape."""
    folder = tmp_path_factory.mktemp("check")
    settings, proxy = Settings(spec=SketchSpec(dim=64), unit_rows=4), load_proxy("tiny", dtype="float32")
    for name, run in (("data", "run"), ("more", "other")):
        rows = [
            {"prompt": f"{i} {name}", "completion": "" if i % 4 == 3 else f"it is {i}"} for i in range(12)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sketch_corpus(folder / f"{name}.jsonl", folder / run, proxy, settings)
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("corpus", [(), ("--corpus", "."), ("--corpus", "FOLDER")])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_whole_directory(gvendi, made, run, corpus, is_old):
    for path in (run / "parts").glob("*.parquet") if is_old else ():
        strip(path)
    before = contents(run)
    corpus = [str(made) if word == "FOLDER" else word for word in corpus]
    code, out, err = gvendi("check", run, *corpus)
    assert (code, err) == (0, "")
    assert out == f"nothing is wrong in '{run}': 3 of 3 parts whole, 9 rows\n"
    assert contents(run) == before


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_every_damaged_part_is_a_line(gvendi, made, run, attack):
    attack(RunDirectory.load(run), RunDirectory.load(made / "other"))
    before = contents(run)
    code, out, err = gvendi("check", run)
    assert (code, err) == (1, "")
    *lines, summary = out.splitlines()
    units = ATTACKS[attack]
    assert [f"part-{unit:06d}.parquet': " in line for unit, line in zip(units, lines, strict=True)] == [
        True
    ] * len(units)
    assert all(line.split(":")[0] in ("damaged", "foreign") for line in lines)
    found = f"{len(units)} finding{'s' * (len(units) > 1)}"
    assert summary.startswith(f"{found} in '{run}': {3 - len(units)} of 3 parts whole, ")
    assert contents(run) == before


def test_an_unfinished_run_is_not_wrong(gvendi, run):
    (run / "parts" / "part-000001.parquet").unlink()
    code, out, _ = gvendi("check", run)
    assert code == 0
    assert (
        out
        == f"nothing is wrong in '{run}': 2 of 2 parts whole, 6 rows; 1 of 3 work units are not done yet\n"
    )


def stale(folder: Path, name: str) -> Path:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = folder / f".{name}.{files.host_name()}.{dead.pid}.{'0' * 32}.tmp"
    path.write_bytes(b"half")
    return path


def edit_spec(run: Path) -> None:
    spec = json.loads((run / "spec.json").read_text())
    (run / "spec.json").write_text(json.dumps({**spec, "mask": "released"}))


def edit_units(run: Path) -> None:
    units = json.loads((run / "units.json").read_text())
    (run / "units.json").write_text(json.dumps({**units, "rows": 11}))


FAULTS = {
    "spec": (
        edit_spec,
        "damaged",
        "spec.json",
        "it is not the one that the parts were made with; restore it",
    ),
    "no spec": (lambda run: (run / "spec.json").unlink(), "damaged", "spec.json", "it is missing"),
    "broken spec": (lambda run: (run / "spec.json").write_text("{"), "damaged", "spec.json", "is damaged ("),
    "units": (edit_units, "damaged", "units.json", "do not add up to its 3 work units and 11 rows"),
    "rejected": (
        lambda run: (run / "rejected.jsonl").write_text(""),
        "damaged",
        "rejected.jsonl",
        "it does not list the rejected rows of the parts",
    ),
    "score": (
        lambda run: (run / "score.json").write_text('{"n": 8, "units_done": 3}'),
        "damaged",
        "score.json",
        "its n is 8 and the run's 9; score the run again",
    ),
    "broken score": (
        lambda run: (run / "score.json").write_text("[1"),
        "damaged",
        "score.json",
        "is damaged",
    ),
    "stranger": (
        lambda run: shutil.copy(run / "parts" / "part-000001.parquet", run / "parts" / "part-000009.parquet"),
        "foreign",
        "part-000009.parquet",
        "it belongs to no work unit of the corpus",
    ),
    "left": (lambda run: stale(run / "parts", "part-000001.parquet"), "left over", ".tmp", "killed left it"),
    "left above": (
        lambda run: stale(run, "score.json"),
        "left over",
        ".tmp",
        "the next run into the directory",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_a_line(gvendi, run, fault):
    act, kind, name, words = FAULTS[fault]
    act(run)
    code, out, err = gvendi("check", run)
    assert (code, err) == (1, "")
    line, summary = out.splitlines()
    assert line.startswith(f"{kind}: '{run}")
    assert name in line
    assert words in line
    assert summary.startswith("1 finding in ")
    code, out, _ = gvendi("check", run, "--json")
    assert code == 1
    found = json.loads(out)
    assert [item["kind"] for item in found["findings"]] == [kind]
    assert found["directory"] == str(run)


def test_a_corpus_that_is_not_what_was_sketched(gvendi, made, run, tmp_path):
    lines = (made / "data.jsonl").read_bytes()
    (tmp_path / "data.jsonl").write_bytes(lines.replace(b"it is 5", b"it is 6"))
    code, out, _ = gvendi("check", run, "--corpus", tmp_path)
    assert code == 1
    assert out.startswith(
        f"changed: '{made / 'data.jsonl'}': '{tmp_path / 'data.jsonl'}' has changed since it was sketched"
    )
    code, out, _ = gvendi("check", run, "--corpus", run)
    assert code == 1
    assert "is not where it was" in out.splitlines()[0]


def test_what_the_system_refuses_is_no_damage(gvendi, run, monkeypatch):
    path = run / "parts" / "part-000001.parquet"
    plain = open

    def refuse(name, *args, **more):
        if Path(name) == path:
            raise OSError(files.errno.EIO, "broken disk", str(path))
        return plain(name, *args, **more)

    monkeypatch.setattr(parts, "open", refuse, raising=False)
    code, out, _ = gvendi("check", run)
    assert code == 1
    assert (
        out.splitlines()[0]
        == f"unreadable: '{path}': {os.strerror(files.errno.EIO)}; its content may be whole"
    )


def test_names_are_shown_and_not_obeyed(gvendi, made, tmp_path):
    run = tmp_path / "run\x1b[31m[bold]"
    shutil.copytree(made / "run", run)
    (run / "parts" / "part-000001.parquet").write_bytes(b"")
    code, out, _ = gvendi("check", run)
    assert code == 1
    assert "\x1b" not in out
    assert "\\x1b[31m[bold]" in out


def test_what_is_no_run_directory(gvendi, tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        code, _, err = gvendi("check", path)
        assert code == 1
        assert err.startswith(f"error: '{path}' is not a run directory")


def test_the_seeds_of_a_synthesis_are_checked(gvendi, made, tmp_path):
    folder = tmp_path / "synthesis"
    shutil.copytree(made / "run", folder / "pool")
    (folder / "fingerprint.json").write_text("{}")
    # Its own files are missing or empty; nothing is wrong with the seeds.
    assert "/pool/" not in gvendi("check", folder)[1]
    left = stale(folder, "events.jsonl")
    (folder / "pool" / "parts" / "part-000000.parquet").write_bytes(b"PAR1")
    code, out, _ = gvendi("check", folder)
    assert code == 1
    assert str(left) in out
    assert "part-000000.parquet': it ends after 4 bytes" in out


def test_nothing_is_changed_by_the_function(run):
    before = contents(run)
    assert check_run(run).findings == []
    (run / "parts" / "part-000001.parquet").write_bytes(b"")
    assert [item.kind for item in check_run(run).findings] == [checking.DAMAGED]
    assert set(contents(run)) == set(before)
