"""Work begins with the first files of a corpus while others are indexed, and nothing else depends on it."""

import json
import threading
from dataclasses import replace

import pytest
from run_contents import contents

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Silent
from gvendi_fast.data import index_ahead
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.index import Fields, index_corpus, index_files
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching import corpus as corpus_module
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy

SETTINGS = Settings(spec=SketchSpec(dim=64), unit_rows=4)
ROWS = 9


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "abc":
        write(folder / f"{name}.jsonl", name)
    return folder


def write(path, name, **more):
    """Nine rows, of which one is empty and one has the same id in every file."""
    rows = [
        {
            "id": f"{name}{i}" if i else "one",
            "prompt": f"{name} {i}",
            "completion": f"is {i}" if i != 5 else "",
            **more,
        }
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Watched(Silent):
    """Lets the index go on when so many rows are done; keeps what a run says."""

    def __init__(self, gate, rows=1, most=None):
        self.gate, self.rows, self.most = gate, rows, most
        self.notes, self.totals, self.done = [], [], 0

    def note(self, text):
        self.notes.append(text)

    def start(self, rows, done):
        self.totals.append((rows, done))

    def advance(self, rows, tokens, rejected):
        self.done += rows
        if self.most is not None and self.done >= self.most:
            raise KeyboardInterrupt
        if self.done >= self.rows:
            self.gate.set()


@pytest.fixture
def gate(monkeypatch):
    """The index stops behind the first file until this is set."""
    gate = threading.Event()

    def gated(*arguments, **settings):
        for found in index_files(*arguments, **settings):
            yield found
            if not found.is_whole:
                gate.wait()

    monkeypatch.setattr(corpus_module, "index_files", gated)
    monkeypatch.setattr(index_ahead, "PATIENCE_S", 0.0)
    yield gate
    gate.set()


def test_the_first_file_is_sketched_before_the_second_is_read(folder, proxy, gate, tmp_path):
    watched = Watched(gate, rows=ROWS)
    run = sketch_corpus(folder, tmp_path / "run", proxy, SETTINGS, watched)
    assert watched.totals[0] == (ROWS, 0)
    assert watched.totals[-1][0] == 3 * ROWS
    # All of the first file was done by then.
    assert watched.totals[1][1] >= ROWS
    assert watched.done == 3 * ROWS
    (note,) = [note for note in watched.notes if note.startswith("work begins")]
    assert note == "work begins with the first 1 file (9 rows); the others are indexed meanwhile"
    assert run.is_indexed
    assert not check_run(run.path, with_corpus=True).findings
    same(run, folder, proxy)


def same(run, folder, proxy, settings=SETTINGS, but=frozenset()):
    """Whether a run that waits for its index holds the same, but for these files."""
    whole = sketch_corpus([folder], run.path.parent / "whole", proxy, replace(settings, max_rejected=0.9))
    wanted, found = contents(whole.path), contents(run.path)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name] and name not in but] == []


@pytest.mark.parametrize("change", [{"limit": 12}, {"unit_rows": None, "unit_bytes": 120}])
def test_part_of_a_file_and_units_by_bytes(folder, proxy, gate, tmp_path, change):
    settings = replace(SETTINGS, **change)
    watched = Watched(gate, rows=ROWS)
    run = sketch_corpus(folder, tmp_path / "run", proxy, settings, watched)
    assert [rows for rows, _ in watched.totals][:1] == [ROWS]
    same(run, folder, proxy, settings)


def test_one_that_is_killed_meanwhile_goes_on(folder, proxy, gate, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sketch_corpus(folder, tmp_path / "run", proxy, SETTINGS, Watched(gate, rows=99, most=4))
    gate.set()
    begun = RunDirectory.load(tmp_path / "run")
    assert not begun.is_indexed
    assert "still being indexed" in begun.missing()
    watched = Watched(gate)
    run = sketch_corpus(folder, tmp_path / "run", proxy, SETTINGS, watched)
    assert run.missing() is None
    same(run, folder, proxy)


def test_a_file_that_cannot_be_read_ends_the_run_and_what_is_done_stays(folder, proxy, gate, tmp_path):
    (folder / "c.jsonl").rename(tmp_path / "c.jsonl")
    (folder / "c.parquet").write_bytes(b"none")
    with pytest.raises(GvendiError, match=r"c\.parquet"):
        sketch_corpus(folder, tmp_path / "run", proxy, SETTINGS, Watched(gate))
    assert RunDirectory.load(tmp_path / "run").units_done
    (folder / "c.parquet").unlink()
    (tmp_path / "c.jsonl").rename(folder / "c.jsonl")
    same(sketch_corpus(folder, tmp_path / "run", proxy, SETTINGS), folder, proxy)


def test_a_file_behind_that_cannot_be_read_is_passed_over_where_that_is_asked_for(
    folder, proxy, gate, tmp_path
):
    (folder / "c.parquet").write_bytes(b"none")
    watched = Watched(gate)
    run = sketch_corpus(folder, tmp_path / "run", proxy, replace(SETTINGS, skip_unreadable=True), watched)
    assert run.manifest["rows"] == 3 * ROWS
    assert sum("c.parquet" in note for note in watched.notes) == 1


def test_a_field_that_only_later_files_have_is_waited_for(folder, proxy, gate, tmp_path):
    write(folder / "c.jsonl", "c", kind="one")
    gate.set()
    watched = Watched(gate)
    settings = replace(SETTINGS, fields=Fields(by="kind"))
    run = sketch_corpus(folder, tmp_path / "run", proxy, settings, watched)
    assert [total for total, _ in watched.totals] == [3 * ROWS]
    assert run.missing() is None


@pytest.mark.parametrize("change", [{"auto_dim": True}, {"max_rejected": 0.9}])
def test_what_needs_all_rows_waits_for_them(folder, proxy, gate, tmp_path, change):
    watched = Watched(gate)
    sketch_corpus(folder, tmp_path / "run", proxy, replace(SETTINGS, **change), watched)
    assert [total for total, _ in watched.totals] == [3 * ROWS]


def test_strict_is_about_all_rows(folder, proxy, gate, tmp_path):
    with pytest.raises(GvendiError, match="strict is set, and the look at 27 rows"):
        sketch_corpus(folder, tmp_path / "run", proxy, replace(SETTINGS, strict=True))


def test_too_many_rejected_rows_end_a_run_before_all_is_read(folder, proxy, gate, tmp_path):
    with pytest.raises(GvendiError, match="rejected"):
        sketch_corpus(
            folder, tmp_path / "run", proxy, replace(SETTINGS, max_rejected=0), Watched(gate, rows=99)
        )


def test_a_command_with_fewer_files_that_ends_first_is_named(folder, proxy, gate, tmp_path):
    class Meanwhile(Watched):
        def advance(self, rows, tokens, rejected):
            if not self.gate.is_set():
                self.gate.set()
                for thread in threading.enumerate():
                    if thread.name == "index":
                        thread.join()
                other = replace(index_corpus(folder / "a.jsonl", rows_per_unit=4), by_file=True)
                RunDirectory.load(tmp_path / "run").extend(other.to_dict())

    with pytest.raises(GvendiError, match="with the first 1 of these files meanwhile; run the same command"):
        sketch_corpus(folder, tmp_path / "run", proxy, SETTINGS, Meanwhile(gate))
    same(sketch_corpus(folder, tmp_path / "run", proxy, SETTINGS), folder, proxy, but={"units.json"})
