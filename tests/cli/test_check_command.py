"""`gvendi check`: one line for everything that is wrong with a run directory, and an exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from damage import ATTACKS, strip

from gvendi_fast.base import files, places
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data import checking
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


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run directory of another corpus and other settings."""
    folder = tmp_path_factory.mktemp("wide")
    rows = [{"prompt": f"{i}", "completion": "" if i % 4 == 3 else f"it is {i}"} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings, proxy = Settings(spec=SketchSpec(dim=128), unit_rows=4), load_proxy("tiny", dtype="float32")
    sketch_corpus(folder / "data.jsonl", folder / "run", proxy, settings)
    return folder / "run"


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


def edit_name(path):
    path.write_text(path.read_text().replace("data.jsonl", "date.jsonl"))


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
    "other units": (
        lambda run: edit_name(run / "units.json"),
        "damaged",
        "units.json",
        "is damaged (its digest does not agree); restore it",
    ),
    "no units": (
        lambda run: (run / "units.json").unlink(),
        "damaged",
        "units.json",
        "it is missing; run the command that made it again",
    ),
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
        "its n is 8 and the run's 9; run the 'gvendi score' command",
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
    "rejected stranger": (
        lambda run: (run / "parts" / "rejected-000009.jsonl").write_bytes(b""),
        "foreign",
        "rejected-000009.jsonl",
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
    assert line.count(name) == 1
    assert words in line
    assert summary.startswith("1 finding in ")
    code, out, _ = gvendi("check", run, "--json")
    assert code == 1
    found = json.loads(out)
    assert [item["kind"] for item in found["findings"]] == [kind]
    assert found["directory"] == str(run)


NOT_OF_THE_PARTS = "it is not the one that the parts were made with; "
SPEC, UNITS = (f"'RUN/{name}'" for name in ("spec.json", "units.json"))
UNKNOWN = "; how many work units the corpus has is not known"
SPEC_REMEDY = "restore it, or sketch the corpus again into another --out"
UNITS_REMEDY = "restore it, or move it away and run the command that made it again"
NO_SPEC = f"damaged: {SPEC} is damaged (it holds a list, not an object); {SPEC_REMEDY}"
FOREIGN_SPEC = f"damaged: {SPEC}: {NOT_OF_THE_PARTS}{SPEC_REMEDY}"
FOREIGN_UNITS = f"damaged: {UNITS}: {NOT_OF_THE_PARTS}{UNITS_REMEDY}"
AGAIN = "run the command that made it again"
ENDS = f"'RUN/parts/part-000001.parquet': it ends after 0 bytes; {AGAIN}"


def break_record(run, _, name="spec.json"):
    (run / name).write_text("[]")


def take_record(run, other, name="spec.json"):
    shutil.copy(other / name, run / name)


def lose_record(run, _, name="spec.json"):
    (run / name).unlink()


def empty_part(run, _):
    (run / "parts" / "part-000001.parquet").write_bytes(b"")


def take_part(run, other):
    for name in ("part-000001.parquet", "rejected-000001.jsonl"):
        shutil.copy(other / "parts" / name, run / "parts" / name)


def swap_parts(run, _):
    attack = next(attack for attack in ATTACKS if attack.__name__ == "swap_whole_units")
    attack(RunDirectory(run, {}, None), None)


def old(run, _):
    for path in (run / "parts").glob("*.parquet"):
        strip(path)


def units_of(name):
    return lambda act: lambda run, other: act(run, other, name)


# What is done, in turn, to a run and another of other settings and corpus: every line, and the summary's counts.
RECORDS = {
    "broken spec": ([break_record], [NO_SPEC], "3 of 3", 9, ""),
    "foreign spec": ([take_record], [FOREIGN_SPEC], "3 of 3", 9, ""),
    "foreign spec and a damaged part": ([take_record, empty_part], [FOREIGN_SPEC, f"damaged: {ENDS}"], "2 of 3", 6, ""),
    "broken spec and a foreign part": (
        [break_record, take_part],
        [
            NO_SPEC,
            "foreign: 'RUN/parts/part-000001.parquet': it was made with other settings than most parts were; "
            "run the command that made it again",
        ],
        "2 of 3",
        6,
        "",
    ),
    "foreign spec of an earlier version": (
        [old, take_record],
        [f"damaged: {SPEC}: sketches of width 64, not 128 as spec.json says; {SPEC_REMEDY}"],
        "3 of 3",
        9,
        "",
    ),
    "foreign units": ([units_of("units.json")(take_record)], [FOREIGN_UNITS], "3 of 3", 9, UNKNOWN),
    "foreign units and a damaged part": (
        [units_of("units.json")(take_record), empty_part],
        [FOREIGN_UNITS, f"damaged: {ENDS}"],
        "2 of 3",
        6,
        UNKNOWN,
    ),
    "lost units and swapped parts": (
        [units_of("units.json")(lose_record), swap_parts],
        [
            f"damaged: {UNITS}: it is missing; run the command that made it again",
            f"foreign: 'RUN/parts/part-000001.parquet': it is the part of work unit 2; {AGAIN}",
            f"foreign: 'RUN/parts/part-000002.parquet': it is the part of work unit 1; {AGAIN}",
        ],
        "1 of 3",
        3,
        UNKNOWN,
    ),
    "both of another run": (
        [take_record, units_of("units.json")(take_record)],
        [FOREIGN_SPEC, FOREIGN_UNITS],
        "3 of 3",
        9,
        UNKNOWN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_the_record_that_is_at_fault_is_named_once(gvendi, wide, run, case):
    acts, lines, whole, rows, rest = RECORDS[case]
    for act in acts:
        act(run, wide)
    before = contents(run)
    code, out, err = gvendi("check", run)
    assert (code, err) == (1, "")
    *said, summary = out.replace(str(run), "RUN").splitlines()
    assert said == lines
    count = f"{len(lines)} finding{'s' * (len(lines) > 1)}"
    assert summary == f"{count} in 'RUN': {whole} parts whole, {rows} rows{rest}"
    assert contents(run) == before


def test_a_damaged_part_does_not_hide_a_foreign_spec(run, wide):
    """Whole parts are not computed again, under the settings of a spec.json of another run."""
    take_record(run, wide)
    empty_part(run, wide)
    with pytest.raises(
        GvendiError, match=r"spec\.json' is not the one that 'part-000000\.parquet' was made with"
    ):
        RunDirectory(run, json.loads((run / "spec.json").read_text()), None).broken()


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

    monkeypatch.setattr(places, "open", refuse, raising=False)
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
    # No synthesis made it, so its own files are wrong; its seeds are not.
    out = gvendi("check", folder)[1]
    assert str(folder / "pool") not in out
    assert f"damaged: '{folder / 'fingerprint.json'}' is damaged" in out
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
