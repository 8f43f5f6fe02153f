"""Work begins while a corpus is indexed: the directory has the first files, then more, and its parts are the same."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from small_runs import SPEC

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.growth import growing_index_for, index_for
from gvendi_fast.data.index import Fields, UnitReader, index_corpus, index_files
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.data.run_files import begins, piece_digests


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "abcd":
        write(folder / f"{name}.jsonl", name, 9)
    (folder / "c.jsonl").write_text("")
    return folder


def write(path, name, count):
    rows = [{"text": f"{name} {number}", "id": f"{number % 7}{name}"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def growing(run, folder, unit_bytes=60):
    return growing_index_for(run, partial(index_files, folder, growth=0.0), Fields(), 4, None, unit_bytes)


def work(run, manifest):
    """Write the parts that are missing; how many."""
    manifest = manifest.recorded_as(run.manifest)
    todo = [unit for unit in manifest.units if not run.has_part(unit.ordinal)]
    with UnitReader(manifest) as reader:
        for unit in todo:
            rows = [row for row in reader.read(unit) if hasattr(row, "text")]
            ones = {name: np.ones(len(rows)) for name in ("tokens", "length", "loss", "gradient_norm")}
            numbers = np.array([unit.first_row + row.row for row in rows], np.int64)
            sketches = np.ones((len(rows), 8), np.float32)
            part = Part(unit.ordinal, [row.id for row in rows], [""] * len(rows), numbers, sketches, **ones)
            run.write_part(part, (), unit.digest)
    return len(todo)


def sketch(path, folder, most=99):
    """As a command does; one that is killed after `most` manifests."""
    run = None
    for manifest, _ in zip(growing(path, folder), range(most), strict=False):
        if run is None:
            run = RunDirectory.open(path, SPEC, manifest.to_dict())
        else:
            run.extend(manifest.to_dict())
        work(run, manifest)
    return run


def content(path):
    return {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_manifests_of_some_files_begin_that_of_all(folder):
    whole = index_corpus(folder)
    *some, last = index_files(folder, growth=0.0)
    assert last == whole
    assert [manifest.rows for manifest in some] == [9, 18, 27]
    for manifest in some:
        assert manifest.units == whole.units[: len(manifest.units)]
        assert begins(manifest.to_dict(), whole.to_dict())
        assert not manifest.is_whole
    # Together they cost little beside the last one.
    assert [manifest.rows for manifest in index_files(folder, growth=1.5)] == [9, 27, 27]


def test_parts_are_those_of_a_corpus_that_is_indexed_first(folder, tmp_path):
    path = tmp_path / "whole"
    found = index_for(path, partial(index_corpus, folder), Fields(), 4, None, 60)
    whole = RunDirectory.open(path, SPEC, found.to_dict())
    work(whole, found)
    run = sketch(tmp_path / "run", folder)
    for each in (whole, run):
        each.finish()
        assert check_run(each.path).findings == []
    assert content(run.path) == content(whole.path)


@pytest.mark.parametrize("killed", [1, 2, 3])
def test_a_command_that_was_killed_while_it_indexed_goes_on(folder, tmp_path, killed):
    run = sketch(tmp_path / "run", folder, killed)
    before = content(run.parts)
    assert "still being indexed" in RunDirectory.load(run.path).missing()
    with pytest.raises(GvendiError, match="still being indexed"):
        run.finish()
    assert check_run(run.path).findings == []
    again = sketch(tmp_path / "run", folder)
    assert again.missing() is None
    assert before.items() <= content(again.parts).items()
    sketch(tmp_path / "other", folder)
    assert content(tmp_path / "run") == content(tmp_path / "other")
    # A third one finds all of it done.
    (*_, manifest) = growing(run.path, folder)
    assert work(RunDirectory.open(run.path, SPEC, manifest.to_dict()), manifest) == 0


def test_a_second_command_that_is_ahead_stays_ahead(folder, tmp_path):
    path = tmp_path / "run"
    first, *more, last = [manifest.to_dict() for manifest in growing(path, folder)]
    behind = RunDirectory.open(path, SPEC, first)
    ahead = RunDirectory.open(path, SPEC, first)
    ahead.extend(last)
    for manifest in more:
        behind.extend(manifest)
        assert behind.manifest == ahead.manifest == RunDirectory.load(path).manifest
    assert behind.is_indexed


def test_files_that_were_moved_keep_their_recorded_names(folder, tmp_path):
    sketch(tmp_path / "run", folder, 2)
    moved = shutil.move(folder, tmp_path / "moved")
    run = sketch(tmp_path / "run", moved)
    names = [entry["path"] for entry in run.manifest["files"]]
    assert names == [f"{folder}/a.jsonl", f"{folder}/b.jsonl", f"{moved}/c.jsonl", f"{moved}/d.jsonl"]
    assert check_run(run.path).findings == []


def test_another_corpus_is_refused_while_it_is_indexed(folder, tmp_path):
    run = sketch(tmp_path / "run", folder, 2)
    write(folder / "a.jsonl", "x", 9)
    (*_, manifest) = growing(run.path, folder)
    with pytest.raises(GvendiError, match=r"made from another corpus:\n(.*\n)*  file '.*a\.jsonl' changed"):
        RunDirectory.open(run.path, SPEC, manifest.to_dict())


def test_a_file_that_grew_after_the_kill_is_a_corpus_that_has_grown(folder, tmp_path):
    sketch(tmp_path / "run", folder, 2)
    write(folder / "a.jsonl", "a", 12)
    write(folder / "0.jsonl", "0", 5)
    run = sketch(tmp_path / "run", folder)
    assert run.manifest["rows"] == 9 * 3 + 3 + 5
    assert "earlier" in run.manifest
    assert check_run(run.path, with_corpus=True).findings == []


def test_a_part_of_another_file_is_foreign(folder, tmp_path):
    run = sketch(tmp_path / "run", folder)
    digests = piece_digests(run.manifest)
    assert len(set(digests)) == 4
    # Of a corpus whose last file is another one, all parts before are the same.
    write(folder / "d.jsonl", "other", 9)
    other = sketch(tmp_path / "other", folder)
    assert piece_digests(other.manifest)[:3] == digests[:3]
    last = run.units_total - 1
    shutil.copy(run.part_path(0), other.part_path(0))
    assert other.broken() == []
    shutil.copy(run.part_path(last), other.part_path(last))
    assert [(damage.unit, damage.other) for damage in other.broken()] == [(last, "corpus")]


def test_parts_without_their_units_json_are_compared_with_one_another(folder, tmp_path):
    run = sketch(tmp_path / "run", folder)
    (run.path / "units.json").unlink()
    assert [finding.path for finding in check_run(run.path).findings] == [str(run.path / "units.json")]


def test_a_digest_of_the_record_notices_what_no_part_would(folder, tmp_path):
    run = sketch(tmp_path / "run", folder)
    record = json.loads((run.path / "units.json").read_text())
    for edit in ({"duplicates": 0}, {"digest": "0"}, {"indexed": False}, {"format": 3}, {"format": True}):
        (run.path / "units.json").write_text(json.dumps(record | edit))
        with pytest.raises(GvendiError, match=r"units\.json' is damaged"):
            RunDirectory.load(run.path)
