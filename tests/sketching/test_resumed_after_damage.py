"""A resumed run computes damaged and foreign parts again, and notices a corpus that is called otherwise or changes."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import ATTACKS, strip
from run_contents import contents

from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Silent
from gvendi_fast.data.file_index import FileIndex
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy

SETTINGS = Settings(spec=SketchSpec(dim=64), unit_rows=4)
ROWS = 12


class Notes(Silent):
    """Keeps what a run says, and calls `act` when the first batch is done."""

    def __init__(self, at_start=None) -> None:
        self.notes, self.at_start = [], at_start

    def start(self, rows: int, done: int) -> None:
        if self.at_start is not None:
            self.at_start()

    def note(self, text: str) -> None:
        # Of the look at some rows, with which every run begins.
        if not text.startswith("looked at "):
            self.notes.append(text)


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


def rows(word: str = "one") -> list[dict]:
    # One row of each work unit is refused.
    return [
        {"prompt": f"{i:02d} {word}", "completion": "" if i % 4 == 3 else f"is {i:02d}"} for i in range(ROWS)
    ]


def write(path: Path, records: list[dict]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, compression="none", row_group_size=5)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines, 0, mtime=0))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(lines)
    else:
        path.write_bytes(lines)


@pytest.fixture(scope="module")
def made(proxy, tmp_path_factory):
    """(corpus, its run directory, that of another corpus of the same shape)."""
    folder = tmp_path_factory.mktemp("runs")
    for name, word in (("run", "one"), ("other", "two")):
        write(folder / f"{name}.jsonl", rows(word))
        sketch_corpus(folder / f"{name}.jsonl", folder / name, proxy, SETTINGS)
    return folder / "run.jsonl", folder / "run", folder / "other"


def copy_of(run: Path, to: Path) -> Path:
    for name, content in contents(run).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_what_is_damaged_is_computed_again_and_named(proxy, made, tmp_path, attack):
    corpus, whole, other = made
    run = copy_of(whole, tmp_path / "run")
    attack(RunDirectory.load(run), RunDirectory.load(other))
    progress = Notes()
    sketch_corpus(corpus, run, proxy, SETTINGS, progress)
    assert contents(run) == contents(whole)
    (note,) = progress.notes
    units = ATTACKS[attack]
    assert note.startswith(
        f"{len(units)} part{'s are' if len(units) > 1 else ' is'} damaged or of another run"
    )
    for unit in range(3):
        assert (f"part-{unit:06d}.parquet (" in note) == (unit in units)
    progress = Notes()
    sketch_corpus(corpus, run, proxy, SETTINGS, progress)
    assert progress.notes == []


def test_a_directory_of_an_earlier_version_goes_on(proxy, made, tmp_path):
    corpus, whole, _ = made
    run = copy_of(whole, tmp_path / "run")
    for path in (run / "parts").glob("*.parquet"):
        strip(path)
    old = contents(run)
    (run / "parts" / "part-000001.parquet").unlink()
    progress = Notes()
    sketch_corpus(corpus, run, proxy, SETTINGS, progress)
    assert progress.notes == []
    new = contents(run)
    fresh = "parts/part-000001.parquet"
    assert new.pop(fresh) == contents(whole)[fresh]
    old.pop(fresh)
    assert new == old
    assert score_run(RunDirectory.load(run)).gvendi == score_run(RunDirectory.load(whole)).gvendi


def spellings(folder: Path) -> dict[str, str]:
    (folder / "link").symlink_to(folder / "data")
    (folder / "again.jsonl").write_bytes((folder / "data" / "x.jsonl").read_bytes())
    return {
        "dot": "./data/x.jsonl",
        "absolute": str(folder / "data" / "x.jsonl"),
        "folder": "data",
        "glob": "dat?/*.jsonl",
        "up": "data/../data/x.jsonl",
        "link": "link/x.jsonl",
        "copy": "again.jsonl",
    }


@pytest.mark.parametrize("name", ["dot", "absolute", "folder", "glob", "up", "link", "copy"])
def test_a_corpus_is_known_by_its_content(proxy, tmp_path, monkeypatch, name):
    """Rows keep the names that the first command gave them, so that a resumed run ends with the same bytes."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "x.jsonl", rows())
    monkeypatch.chdir(tmp_path)
    spelling = spellings(tmp_path)[name]
    whole = sketch_corpus("data/x.jsonl", "run", proxy, SETTINGS)
    run = copy_of(whole.path, Path("again"))
    (run / "parts" / "part-000001.parquet").unlink()
    (run / "parts" / "rejected-000001.jsonl").unlink()
    link = Path("by-link")
    link.symlink_to("again")
    sketch_corpus(spelling, link if name == "link" else "./again/", proxy, SETTINGS)
    # The look's words name the file as it was called last.
    now, before = contents(run), contents(whole.path)
    del now["warnings.json"], before["warnings.json"]
    assert now == before
    assert next(whole.iterate(["id"], [1])).ids[0] == "data/x.jsonl:5"


def test_another_corpus_is_refused_as_before(proxy, made, tmp_path):
    _, whole, other = made
    run = copy_of(whole, tmp_path / "run")
    with pytest.raises(GvendiError, match="was made from another corpus"):
        sketch_corpus(other.with_suffix(".jsonl"), run, proxy, SETTINGS)
    assert contents(run) == contents(whole)


KINDS = ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"]


def change(path: Path) -> None:
    """Other content in the last row but one of work unit 1; size and times stay."""
    was = path.stat()
    records = rows()
    for number in range(99, 0, -1):
        records[6]["completion"] = f"is {number:02d}"
        beside = path.with_name(f"beside-{path.name}")
        write(beside, records)
        if beside.stat().st_size == was.st_size:
            # In place, as an editor or rsync --inplace does.
            with path.open("r+b") as stream:
                stream.write(beside.read_bytes())
            beside.unlink()
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
            return
    raise AssertionError("no content of the same size was found")


# A file of each kind is changed in place every day, and replaced by another in one kind; the rest in soak.
@pytest.mark.parametrize(
    ("name", "is_replaced"),
    [
        *((name, False) for name in KINDS),
        (KINDS[0], True),
        *(pytest.param(name, True, marks=pytest.mark.soak) for name in KINDS[1:]),
    ],
)
def test_a_corpus_that_changes_under_a_run_is_named(proxy, tmp_path, name, is_replaced):
    path = tmp_path / name
    write(path, rows())
    whole = path.read_bytes()
    expected = contents(sketch_corpus(path, tmp_path / "whole", proxy, SETTINGS).path)

    def act() -> None:
        change(path)
        if is_replaced:
            path.with_name("new").write_bytes(path.read_bytes())
            path.with_name("new").replace(path)

    with pytest.raises(GvendiError) as caught:
        sketch_corpus(path, tmp_path / "run", proxy, SETTINGS, Notes(act))
    assert str(caught.value).startswith(
        f"corpus: '{path}' has changed since it was indexed: its rows from line "
    )
    # Nothing of the changed rows is stored: what is stored is as it was.
    kept = contents(tmp_path / "run")
    assert {part: kept[part] for part in kept if part.startswith("parts/")}.items() <= expected.items()
    assert "parts/part-000001.parquet" not in kept
    if name.startswith("x.jsonl"):
        assert "from line 5 on (work unit 1, 4 rows)" in str(caught.value)
        assert "parts/part-000000.parquet" in kept
    path.write_bytes(whole)
    sketch_corpus(path, tmp_path / "run", proxy, SETTINGS)
    assert contents(tmp_path / "run") == expected


def test_a_touched_parquet_file_of_the_same_content_is_no_change(proxy, tmp_path):
    path = tmp_path / "x.parquet"
    write(path, rows())

    def act() -> None:
        path.with_name("new").write_bytes(path.read_bytes())
        path.with_name("new").replace(path)
        path.chmod(0o600)

    sketch_corpus(path, tmp_path / "run", proxy, SETTINGS, Notes(act))
    assert RunDirectory.load(tmp_path / "run").missing() is None


def test_a_part_made_from_other_rows_is_computed_again(proxy, made, tmp_path):
    corpus, whole, _ = made
    run = copy_of(whole, tmp_path / "run")
    opened = RunDirectory.load(run)
    (part,) = opened.iterate(units=[1])
    opened.write_part(part, list(opened.rejected([1])), "another digest")
    progress = Notes()
    sketch_corpus(corpus, run, proxy, SETTINGS, progress)
    assert "part-000001.parquet (it was made from other rows than the corpus has)" in progress.notes[0]
    assert contents(run) == contents(whole)


def test_names_of_files_in_a_note_obey_nothing(proxy, tmp_path):
    folder = tmp_path / "run\x1b[31m"
    write(tmp_path / "x.jsonl", rows())
    sketch_corpus(tmp_path / "x.jsonl", folder, proxy, SETTINGS)
    (folder / "parts" / "part-000001.parquet").write_bytes(b"")
    progress = Notes()
    sketch_corpus(tmp_path / "x.jsonl", folder, proxy, SETTINGS, progress)
    assert "\\x1b[31m" in progress.notes[0]
    assert "\x1b" not in progress.notes[0]


def test_a_place_that_can_hold_no_run_is_refused_before_the_corpus_is_read(tmp_path, monkeypatch):
    proxy = load_proxy("tiny", dtype="float32")
    monkeypatch.setattr(FileIndex, "scan", None)
    (tmp_path / "file").write_text("x")
    (tmp_path / "data.jsonl").write_text('{"text": "a b"}\n')
    with pytest.raises(GvendiError, match="is a file, but a run needs a folder"):
        sketch_corpus(tmp_path / "data.jsonl", tmp_path / "file", proxy, SETTINGS)
    pytest.importorskip("aiohttp", reason="http:// is read through aiohttp")
    with pytest.raises(GvendiError, match=r"http://127\.0\.0\.1:9/run' cannot be written"):
        sketch_corpus(tmp_path / "data.jsonl", "http://127.0.0.1:9/run", proxy, SETTINGS)
