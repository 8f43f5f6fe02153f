"""A run goes on with more rows or files: what is done stays, and the result is that of one run over all of them."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Silent
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.index import Fields
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy

SETTINGS = Settings(spec=SketchSpec(dim=64), unit_rows=4)


class Notes(Silent):
    """Keeps what a run says, and ends it after `most` batches."""

    def __init__(self, most: int | None = None) -> None:
        self.notes, self.most = [], most

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, rows: int, tokens: int, rejected: int) -> None:
        self.most = None if self.most is None else self.most - 1
        if self.most == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


def rows(first: int, count: int, word: str = "one") -> list[dict]:
    """Rows of which every seventh is refused."""
    return [
        {
            "id": f"{word}{i}",
            "prompt": f"{i:02d} {word} " * (i % 3 + 1),
            "completion": "" if i % 7 == 6 else f"is {i}",
        }
        for i in range(first, first + count)
    ]


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=5)
    else:
        path.write_bytes(gzip.compress(lines, 0, mtime=0) if path.suffix == ".gz" else lines)
    return path


def sketched(run: Path | RunDirectory) -> dict[str, np.ndarray]:
    """{id: sketch}, in the order of rows."""
    run = run if isinstance(run, RunDirectory) else RunDirectory.load(run)
    found = {}
    for part in run.iterate(["id", "sketch"]):
        found |= dict(zip(part.ids, part.sketches, strict=True))
    return found


def parts_of(run: Path) -> dict[str, tuple]:
    """What every part and list of rejected rows says, without which corpus its part was made from."""
    found = {}
    for part in RunDirectory.load(run).iterate():
        columns = part.ids, part.groups, part.rows.tolist(), part.sketches.tobytes(), part.loss.tobytes()
        found[f"part {part.unit}"] = columns
    return found | {path.name: path.read_bytes() for path in (run / "parts").glob("rejected-*")}


def is_whole(run: Path, corpus: bool = True) -> None:
    seen = check_run(run, with_corpus=corpus)
    assert seen.findings == []
    assert seen.whole == seen.parts == seen.units_total


def same_to_the_bit(run: Path, whole: Path) -> None:
    assert parts_of(run) == parts_of(whole)
    assert (run / "rejected.jsonl").read_bytes() == (whole / "rejected.jsonl").read_bytes()
    assert score_run(RunDirectory.load(run)).to_dict() == score_run(RunDirectory.load(whole)).to_dict()
    is_whole(run)


@pytest.fixture(scope="module")
def made(proxy, tmp_path_factory):
    """A folder with data.jsonl, of ten rows, and its run directory."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sketch_corpus(write(Path("data.jsonl"), rows(0, 10)), "run", proxy, SETTINGS)
    (folder / "run" / "score.json").write_text("{}")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of the corpus and its run directory, under the names that they had."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return Path("data.jsonl"), Path("run")


def grow_limit(folder: Path):
    data = write(folder / "data.jsonl", rows(0, 30))
    return (
        (data, 10),
        (data, 19),
        (data, 19),
        "10 to 19 rows: 8 of an earlier run kept, 11 to sketch, 2 of them again",
    )


def grow_off_limit(folder: Path):
    data = write(folder / "data.parquet", rows(0, 18))
    return (data, 8), (data, None), (data, None), "8 to 18 rows: 8 of an earlier run kept, 10 to sketch"


def grow_lines(folder: Path):
    data = write(folder / "data.jsonl", rows(0, 10))
    # A line that is still being written is a row that cannot be read.
    data.write_text(data.read_text() + json.dumps(rows(10, 1)[0])[:20])
    return (
        (data, None),
        (write(folder / "next" / "data.jsonl", rows(0, 18)), None),
        None,
        "11 to 18 rows: 8 of an",
    )


def grow_archive(folder: Path):
    data = write(folder / "data.jsonl.gz", rows(0, 10))
    return (
        (data, None),
        (write(folder / "next" / "data.jsonl.gz", rows(0, 17)), None),
        None,
        "10 to 17 rows: 8 of an",
    )


def grow_behind(folder: Path):
    data, more = folder / "data", write(folder / "more.jsonl", rows(3, 9, "two") + rows(2, 2))
    write(data / "a.jsonl", rows(0, 6))
    whole = [data / "a.jsonl", more]
    return (
        ([data], None),
        ([data, more], None),
        (whole, None),
        "6 to 17 rows: 6 of an earlier run kept, 11 to sketch",
    )


def grow_between(folder: Path):
    data, after = folder / "data", folder / "after"
    for place in (data, after):
        write(place / "a.jsonl", rows(0, 6))
        write(place / "c.jsonl", rows(6, 7))
    write(after / "b.jsonl", rows(3, 9, "two") + rows(2, 2))
    whole = [after / f"{name}.jsonl" for name in "acb"]
    return (
        (data, None),
        (after, None),
        (whole, None),
        "13 to 24 rows: 13 of an earlier run kept, 11 to sketch",
    )


GROWTHS = (grow_limit, grow_off_limit, grow_lines, grow_archive, grow_behind, grow_between)


@pytest.mark.parametrize("grow", GROWTHS, ids=lambda grow: grow.__name__)
def test_a_grown_corpus_is_sketched_as_one_run_over_it(proxy, tmp_path, grow):
    (before, first), (after, limit), whole, said = grow(tmp_path)
    run, notes = tmp_path / "run", Notes()
    sketch_corpus(before, run, proxy, replace(SETTINGS, limit=first))
    old = {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()}
    if whole is None:
        shutil.copyfile(after, before)
        after, whole = before, (before, None)
    sketch_corpus(after, run, proxy, replace(SETTINGS, limit=limit), notes)
    assert [note for note in notes.notes if said in note]
    kept = [path for path in old if path.exists() and path.stat().st_mtime_ns == old[path]]
    assert len(kept) >= len(old) - 2
    sketch_corpus(whole[0], tmp_path / "whole", proxy, replace(SETTINGS, limit=whole[1]))
    paths = {entry["path"] for entry in RunDirectory.load(run).manifest["files"]}
    if paths == {entry["path"] for entry in RunDirectory.load(tmp_path / "whole").manifest["files"]}:
        same_to_the_bit(run, tmp_path / "whole")
    else:
        assert list(sketched(run)) == list(sketched(tmp_path / "whole"))
        assert all(np.array_equal(z, sketched(run)[i]) for i, z in sketched(tmp_path / "whole").items())
    if grow is grow_between:
        again = Notes()
        sketch_corpus(after, run, proxy, SETTINGS, again)
        assert not any("grown" in note or "work units" in note for note in again.notes)


@pytest.fixture(scope="module")
def made_in_the_middle(proxy, tmp_path_factory):
    """A folder with two files, of which the first was appended to, twice, and their run; notes of the second time."""
    folder, notes = tmp_path_factory.mktemp("middle"), Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        files = [write(Path("a.jsonl"), rows(0, 10)), write(Path("b.jsonl"), rows(10, 6))]
        sketch_corpus(files, "run", proxy, SETTINGS)
        write(files[0], rows(0, 10) + rows(20, 3) + rows(12, 1))
        sketch_corpus(files, "run", proxy, SETTINGS)
        write(files[0], rows(0, 10) + rows(20, 3) + rows(12, 1) + rows(30, 2))
        sketch_corpus(files, "run", proxy, SETTINGS, notes)
    return folder, notes.notes


@pytest.fixture
def middle(made_in_the_middle, tmp_path, monkeypatch):
    """A copy of it: (files, run, notes)."""
    folder, notes = made_in_the_middle
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return [Path("a.jsonl"), Path("b.jsonl")], Path("run"), notes


def test_what_is_appended_to_a_file_before_others_comes_last(middle):
    """The whole last unit of the first growth is not computed again, and a repeated id is found across the two."""
    files, run, notes = middle
    assert "the corpus has grown from 20 to 22 rows: 20 of an earlier run kept, 2 to sketch" in notes
    ids = [f"one{i}" for i in (*range(10), *range(10, 16), *range(20, 23), 12, 30, 31)]
    opened = RunDirectory.load(run)
    pool = as_pool(opened)
    assert [ids[row] for row in pool.numbers("row")] == pool.ids
    assert opened.manifest["pieces"] == [[0, 0, 10], [1, 0, 6], [0, 10, 6]]
    found = list(original_rows(opened, range(22)))
    assert [row.record()["id"] for row in found] == ids
    assert [row.ordinal for row in found] == [*range(22)]
    (repeat,) = [item for item in opened.rejected() if "duplicate" in item.reason]
    assert (repeat.line, repeat.reason) == (14, f"duplicate id 'one12' (first at {files[1]}:3)")
    assert len(pool) + sum(1 for _ in opened.rejected()) == 22
    is_whole(run)


def test_results_of_other_units_differ_by_rounding_alone(middle, proxy, tmp_path):
    files, run, _ = middle
    one = sketch_corpus(files, tmp_path / "one", proxy, replace(SETTINGS, unit_rows=5))
    whole, grown = sketched(one), sketched(run)
    # Of the two rows of one id another one came first.
    assert whole.keys() == grown.keys()
    worst = max(np.abs(z - grown[i]).max() / np.abs(z).max() for i, z in whole.items())
    assert worst < 1e-5
    ours, theirs = (score_run(r) for r in (RunDirectory.load(run), one))
    assert (ours.n, ours.rejected) == (theirs.n, theirs.rejected)
    assert ours.gvendi == pytest.approx(theirs.gvendi, rel=1e-6)


def test_a_kill_in_the_middle_of_a_growth_leaves_a_run_that_is_read_and_goes_on(proxy, tmp_path):
    data, run = write(tmp_path / "data.jsonl", rows(0, 10)), tmp_path / "run"
    sketch_corpus(data, run, proxy, SETTINGS)
    (run / "score.json").write_text("{}")
    write(data, rows(0, 22))
    with pytest.raises(KeyboardInterrupt):
        sketch_corpus(data, run, proxy, SETTINGS, Notes(most=2))
    opened = RunDirectory.load(run)
    assert (opened.units_done, opened.units_total) == (3, 6)
    assert len(sketched(run)) == score_run(opened).n == 11
    assert check_run(run, with_corpus=True).findings == []
    # Neither counts any more.
    assert not (run / "score.json").exists()
    assert not (run / "rejected.jsonl").exists()
    write(data, rows(0, 26))
    notes = Notes()
    sketch_corpus(data, run, proxy, SETTINGS, notes)
    assert "the corpus has grown from 22 to 26 rows: 12 of an earlier run kept, 14 to sketch" in notes.notes
    sketch_corpus(data, tmp_path / "whole", proxy, SETTINGS)
    same_to_the_bit(run, tmp_path / "whole")


@pytest.mark.parametrize(
    "kept", ["score.json", "rejected.jsonl", "part-000002.parquet", "rejected-000002.jsonl"]
)
def test_a_kill_before_the_new_record_leaves_the_smaller_run(here, proxy, tmp_path, monkeypatch, kept):
    """Whichever of the files that are removed is the last one that still stands."""
    data, run = here
    write(data, rows(0, 22))
    remove = Path.unlink

    def stops(path: Path, missing_ok: bool = False) -> None:
        if path.name == kept:
            raise KeyboardInterrupt
        remove(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stops)
        with pytest.raises(KeyboardInterrupt):
            sketch_corpus(data, run, proxy, SETTINGS)
    opened = RunDirectory.load(run)
    assert opened.units_total == 3
    assert len(sketched(run)) == (7 if kept == "rejected-000002.jsonl" else 9)
    sketch_corpus(data, run, proxy, SETTINGS)
    assert RunDirectory.load(run).units_done == 6
    is_whole(run)


@pytest.mark.parametrize("count", [10, 8], ids=["room", "full"])
@pytest.mark.parametrize("behind", [0, pytest.param(1, marks=pytest.mark.soak), 3])
def test_a_last_line_that_was_half_written_is_completed(proxy, tmp_path, monkeypatch, count, behind):
    monkeypatch.chdir(tmp_path)
    data = write(Path("data.jsonl"), rows(0, count))
    content = data.read_bytes()
    data.write_bytes(content[:-20])
    sketch_corpus(data, "run", proxy, SETTINGS)
    assert b"broken JSON" in Path("run", "rejected.jsonl").read_bytes()
    data.write_bytes(content)
    write(data, rows(0, count + behind))
    before = Path("run", "parts", "part-000000.parquet").stat().st_mtime_ns
    notes = Notes()
    sketch_corpus(data, "run", proxy, SETTINGS, notes)
    again = count % 4 or 4
    assert any(
        f", {again} of them again, as the last work unit was not whole" in note for note in notes.notes
    )
    assert Path("run", "parts", "part-000000.parquet").stat().st_mtime_ns == before
    sketch_corpus(data, "whole", proxy, SETTINGS)
    same_to_the_bit(Path("run"), Path("whole"))


def test_a_blank_line_behind_is_no_work(here, proxy):
    data, run = here
    before = parts_of(run)
    with data.open("ab") as stream:
        stream.write(b"\n")
    notes = Notes()
    sketch_corpus(data, run, proxy, SETTINGS, notes)
    assert "the corpus has grown behind its last row: 10 of an earlier run kept, 0 to sketch" in notes.notes
    assert parts_of(run) == before
    is_whole(run)


def test_rows_of_another_shape_behind_a_limit_are_read_as_the_directory_has_them(proxy, tmp_path):
    others = [{"instruction": "a", "output": "b"}] * 20
    data = write(tmp_path / "data.jsonl", rows(0, 5) + others)
    sketch_corpus(data, tmp_path / "run", proxy, replace(SETTINGS, limit=5))
    run = sketch_corpus(data, tmp_path / "run", proxy, SETTINGS)
    assert sum("missing fields" in one.reason for one in run.rejected()) == len(others)
    asked = replace(SETTINGS, fields=Fields(format="alpaca"))
    with pytest.raises(GvendiError, match="; --format fields reads rows as the directory has them"):
        sketch_corpus(data, tmp_path / "run", proxy, asked)


def edit_a_row(data: Path) -> None:
    write(data, rows(0, 3) + rows(50, 1) + rows(4, 15))


def fewer_rows(data: Path) -> None:
    write(data, rows(0, 9))


def other_rows(data: Path) -> None:
    write(data, rows(0, 15, "two"))


def a_row_before(data: Path) -> None:
    write(data, rows(90, 1) + rows(0, 15))


def a_blank_line_before(data: Path) -> None:
    data.write_text("\n" + data.read_text() + json.dumps(rows(10, 1)[0]) + "\n")


@pytest.mark.parametrize("change", [edit_a_row, fewer_rows, other_rows, a_row_before, a_blank_line_before])
def test_rows_that_changed_are_refused_with_what_differs(here, proxy, tmp_path, change):
    data, run = here
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change(data)
    with pytest.raises(
        GvendiError, match=r"was made from another corpus:\n  file '.*' changed: digest"
    ) as caught:
        sketch_corpus(data, run, proxy, SETTINGS)
    assert "earlier" not in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 9}, "limit: null in the directory, 9 now"),
        ({"fields": Fields(by="id")}, 'fields.by: null in the directory, "id" now'),
        ({"max_row_bytes": 999}, r"max_row_bytes: \(absent\) in the directory, 999 now"),
        ({"spec": SketchSpec(dim=128)}, "made with other settings:\n  sketch.dim: 64"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_other_settings_are_refused_though_the_corpus_has_grown(here, proxy, tmp_path, settings, message):
    data, run = here
    write(data, rows(0, 15))
    with pytest.raises(GvendiError, match=message):
        sketch_corpus(data, run, proxy, replace(SETTINGS, **settings))
    assert RunDirectory.load(run).units_total == RunDirectory.load(run).units_done == 3
    assert (run / "score.json").exists()


def test_files_that_are_gone_or_in_another_order_are_refused(proxy, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    files = [write(data / f"{name}.jsonl", rows(i, 2)) for i, name in ((0, "a"), (4, "b"), (2, "c"))]
    sketch_corpus(files[:2], run, proxy, SETTINGS)
    with pytest.raises(GvendiError, match=r"file '.*a.jsonl' is missing now\n"):
        sketch_corpus(files[1:], run, proxy, SETTINGS)
    with pytest.raises(GvendiError, match="the same files in another order"):
        sketch_corpus(files[1::-1], run, proxy, SETTINGS)
    with pytest.raises(GvendiError, match=r"another corpus:\n  file '.*c.jsonl' is new"):
        sketch_corpus([files[1], files[2], files[0]], run, proxy, SETTINGS)
    sketch_corpus(files, run, proxy, SETTINGS)
    with pytest.raises(GvendiError, match=r"file '.*c.jsonl' is missing now\n(?s:.*)  units_total: 3"):
        sketch_corpus(files[:2], run, proxy, SETTINGS)


def test_an_edited_record_is_no_growth(here, proxy, tmp_path):
    data, run = here
    record = json.loads((run / "units.json").read_text())
    (run / "units.json").write_text(json.dumps(record | {"limit": 10}))
    write(data, rows(0, 15))
    with pytest.raises(GvendiError, match=r"units\.json' is damaged \(its digest does not agree"):
        sketch_corpus(data, run, proxy, SETTINGS)
    assert (run / "score.json").exists()


def test_a_run_goes_on_with_the_work_units_that_it_was_begun_with(here, proxy, tmp_path):
    data, run = here
    notes = Notes()
    sketch_corpus(data, run, proxy, replace(SETTINGS, unit_rows=512), notes)
    assert f"work units have 4 rows, as '{run}' was begun with (unit_rows is 512)" in notes.notes
    write(data, rows(0, 13))
    notes = Notes()
    sketch_corpus(data, run, proxy, replace(SETTINGS, unit_rows=512), notes)
    assert [note for note in notes.notes if "8 of an earlier run kept, 5 to sketch, 2 of them again" in note]
    sketch_corpus(data, tmp_path / "whole", proxy, SETTINGS)
    same_to_the_bit(run, tmp_path / "whole")


def test_a_corpus_that_was_moved_grows_and_keeps_its_names(here, proxy, tmp_path):
    data, run = here
    moved, names = (
        tmp_path / "moved" / "data.jsonl",
        {entry.file for entry in RunDirectory.load(run).rejected()},
    )
    moved.parent.mkdir()
    data.rename(moved)
    write(moved, rows(0, 15))
    sketch_corpus(moved, run, proxy, SETTINGS)
    assert {entry.file for entry in RunDirectory.load(run).rejected()} == names
    assert len(list(original_rows(RunDirectory.load(run), [14], corpus=moved.parent))) == 1


def shapes_of_rows(count: int, *names: str) -> list[dict]:
    return [{name: f"{i} {name}" for name in names} for i in range(count)]


@pytest.mark.parametrize(
    "first", [("instruction", "output"), ("prompt", "completion")], ids=lambda names: names[0]
)
def test_rows_of_another_shape_behind_do_not_change_that_of_the_first(proxy, tmp_path, first):
    """Most of the first 64 rows are of the other shape in the end, and so refused."""
    other = ("question", "answer")
    data, run = write(tmp_path / "data.jsonl", shapes_of_rows(4, *first)), tmp_path / "run"
    sketch_corpus(data, run, proxy, SETTINGS)
    write(data, shapes_of_rows(4, *first) + shapes_of_rows(9, *other))
    grown = sketch_corpus(data, run, proxy, SETTINGS)
    assert (len(sketched(run)), sum(1 for _ in grown.rejected())) == (4, 9)
    is_whole(run)


def test_a_damaged_archive_stays_one_entry_of_a_grown_run(proxy, tmp_path):
    files = [write(tmp_path / "a.jsonl.gz", rows(0, 24)), write(tmp_path / "b.jsonl", rows(40, 3))]
    whole = files[0].read_bytes()
    run = tmp_path / "run"
    files[0].write_bytes(whole[: len(whole) // 3])
    first = sketch_corpus(files, run, proxy, SETTINGS)
    assert len(first.manifest["damaged"]) == 1
    before = first.manifest["files"][0]["rows"]
    sketch_corpus([*files, write(tmp_path / "c.jsonl", rows(50, 2))], run, proxy, SETTINGS)
    assert len(RunDirectory.load(run).manifest["damaged"]) == 1
    assert RunDirectory.load(run).manifest["files"][0]["rows"] == before
    is_whole(run)


def test_a_damaged_part_of_a_grown_run_is_computed_again(middle, proxy, tmp_path):
    files, run, _ = middle
    before = parts_of(run)
    for unit in (0, 5):
        part = run / "parts" / f"part-{unit:06d}.parquet"
        part.write_bytes(part.read_bytes()[:-100])
    (run / "parts" / "part-000001.parquet").write_bytes((run / "parts" / "part-000003.parquet").read_bytes())
    damaged = {Path(finding.path).name for finding in check_run(run).findings}
    assert damaged == {f"part-{unit:06d}.parquet" for unit in (0, 1, 5)}
    sketch_corpus(files, run, proxy, SETTINGS)
    assert parts_of(run) == before
    is_whole(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pieces": [[0, 0, 10], [1, 0, 6], [0, 9, 6]]}, "the rows of a file one piece behind the other"),
        ({"pieces": [[0, 0, 10], [1, 0, 6]]}, "all rows of the files"),
        ({"pieces": [[0, 0, 10], [2, 0, 6]]}, r"a list of \[file, first row, rows\]"),
        ({"earlier": [{"corpus": 3}]}, "a list of objects with corpus and units"),
        ({"earlier": []}, "units.json' is damaged .its digest does not agree"),
    ],
)
def test_an_edited_record_of_a_growth_is_named(middle, change, message):
    _, run, _ = middle
    record = json.loads((run / "units.json").read_text())
    (run / "units.json").write_text(json.dumps(record | change))
    with pytest.raises(GvendiError, match=message):
        RunDirectory.load(run)
