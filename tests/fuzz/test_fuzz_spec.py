"""spec.json and units.json with small changes: what is read is what was written, or an error."""

import json
import random
import shutil

import pytest
from fuzz.mutations import (
    WrongResultError,
    as_json,
    check,
    files_of,
    fuzz,
    mutated_bytes,
    mutated_value,
    restore_files,
)
from fuzz.test_fuzz_parts import SPEC, contents, make_run

from gvendi_fast.analysis.asked_groups import check_by
from gvendi_fast.data.originals import locate_corpus
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import RunDirectory

NAMES = ("spec.json", "units.json")


def mutate(r, path):
    content = path.read_bytes()
    if r.random() < 0.5:
        path.write_bytes(mutated_bytes(r, content))
    else:
        path.write_bytes(as_json(r, mutated_value(r, json.loads(content))))


def without_paths(manifest):
    """What says which rows a corpus has, wherever it lies."""
    files = [{key: value for key, value in one.items() if key != "path"} for one in manifest["files"]]
    return {**manifest, "files": files}


def fuzz_spec(count, seed, folder):
    whole = make_run(folder / "whole")
    right = contents(whole)
    originals, here = files_of(whole.path), folder / "here"
    shutil.copytree(whole.path, here)

    def case(number):
        r = random.Random(f"{seed}|spec|{number}")
        mutate(r, here / r.choice(NAMES))
        reads = r.random() < 0.6
        run = RunDirectory.load(here) if reads else RunDirectory.open(here, SPEC, whole.manifest)
        if run.sketch_spec != whole.sketch_spec:
            raise WrongResultError("another spec than was written")
        if run.manifest != whole.manifest:
            if without_paths(run.manifest) != without_paths(whole.manifest):
                raise WrongResultError("another manifest than was written")
            # A corpus may lie elsewhere by now; it is looked for before it is read.
            locate_corpus(run, None)
            raise WrongResultError("another path of the corpus, which is found")
        check_by(run, "family")
        if run.missing() is not None or run.units_total != whole.units_total or contents(run) != right:
            raise WrongResultError("other parts than were written")
        if as_pool(run).spec != as_pool(whole).spec:
            raise WrongResultError("a pool has another spec")
        return "as written"

    return fuzz("spec.json and units.json", count, case, lambda: restore_files(here, originals))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [250, pytest.param(6000, marks=pytest.mark.soak)])
def test_a_changed_spec_is_read_as_it_was_written_or_refused(count, tmp_path, capsys):
    check(fuzz_spec(count, count, tmp_path), count, capsys)
