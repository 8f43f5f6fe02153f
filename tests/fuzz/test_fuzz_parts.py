"""Parts of a run directory with small changes: what is read is what was written, or an error."""

import json
import random
import shutil

import numpy as np
import pytest
from fuzz.mutations import (
    WrongResultError,
    check,
    files_of,
    fuzz,
    mutated_bytes,
    mutated_lines,
    restore_files,
)

from gvendi_fast.data.index import Fields, index_corpus
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_directory import COLUMNS, OPTIONAL, Part, RunDirectory

DIM, ROWS, UNITS = 64, 5, 3
SPEC = {"format": 2, "sketch": {"kind": "hadamard", "dim": DIM, "seed": 0}}


def make_run(folder):
    """A run of three work units of a corpus beside it, without a model."""
    corpus = folder.with_name("corpus.jsonl")
    rows = (
        {"id": f"id{row}", "text": f"row {row}", "family": f"group {row % 2}"} for row in range(UNITS * ROWS)
    )
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = index_corpus(corpus, Fields(by="family"), rows_per_unit=ROWS).to_dict()
    run = RunDirectory.open(folder, SPEC, manifest)
    draws = np.random.default_rng(0)
    for unit in range(UNITS):
        rows = np.arange(ROWS - 1, dtype=np.int64) + unit * ROWS
        part = Part(
            unit,
            ids=[f"id{row}" for row in rows],
            groups=[f"group {row % 2}" for row in rows],
            rows=rows,
            sketches=draws.standard_normal((len(rows), DIM)).astype(np.float32),
            tokens=np.arange(3, 3 + len(rows), dtype=np.int32),
            length=np.arange(9, 9 + len(rows), dtype=np.int32),
            loss=draws.random(len(rows)).astype(np.float32),
            gradient_norm=draws.random(len(rows)).astype(np.float32),
            norm_shares={"head": draws.random(len(rows)).astype(np.float32)},
        )
        run.write_part(part, [Rejected("a.jsonl", unit * ROWS + ROWS, "no row", None)])
    run.finish()
    return run


def contents(run):
    """Everything that its readers give, by work unit."""
    found = {}
    for part in run.iterate([*COLUMNS, *OPTIONAL]):
        columns = {name: getattr(part, name) for name in [*COLUMNS.values(), *OPTIONAL.values()]}
        found[part.unit] = {
            name: {key: item.tobytes() for key, item in value.items()}
            if isinstance(value, dict)
            else value.tobytes()
            if isinstance(value, np.ndarray)
            else value
            for name, value in columns.items()
        }
    return found


def rejects(run):
    return [(item.file, item.line, item.reason, item.id) for item in run.rejected()]


def mutate(r, parts):
    """Change one file, or the places of two."""
    names = sorted(path.name for path in parts.iterdir())
    kinds = (
        [name for name in names if name.startswith("part-")],
        [name for name in names if "rejected" in name],
    )
    path = parts / r.choice(kinds[r.random() < 0.25])
    kind = r.randrange(12)
    other = parts / r.choice(
        [name for name in names if name.partition("-")[0] == path.name.partition("-")[0]]
    )
    if kind < 8:
        path.write_bytes(mutated_bytes(r, path.read_bytes()))
    elif kind == 8:
        path.write_bytes(other.read_bytes())
    elif kind == 9:
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == 10:
        path.write_bytes(mutated_lines(r, path.read_bytes()))
    else:
        path.unlink()


def fuzz_parts(count, seed, folder):
    whole = make_run(folder / "whole")
    right, right_rejects = contents(whole), rejects(whole)
    pool = as_pool(whole).take(range(len(as_pool(whole)))).numpy().tobytes()
    originals, here = files_of(whole.parts), folder / "here"
    shutil.copytree(whole.path, here)

    def case(number):
        r = random.Random(f"{seed}|parts|{number}")
        mutate(r, here / "parts")
        run = RunDirectory.load(here)
        found = contents(run)
        missing = [unit for unit in right if unit not in found]
        if missing and run.missing() is None:
            raise WrongResultError(f"units {missing} are missing and nobody says so")
        if any(found[unit] != right.get(unit) for unit in found):
            raise WrongResultError("a part gives other rows than were written")
        if not missing:
            if rejects(run) != right_rejects:
                raise WrongResultError("other rejected rows than were written")
            if as_pool(run).take(range(len(as_pool(run)))).numpy().tobytes() != pool:
                raise WrongResultError("a pool gives other sketches")
        return "fewer parts" if missing else "as written"

    return fuzz("parts", count, case, lambda: restore_files(here / "parts", originals))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [250, pytest.param(6000, marks=pytest.mark.soak)])
def test_a_changed_part_is_read_as_it_was_written_or_refused(count, tmp_path, capsys):
    check(fuzz_parts(count, count, tmp_path), count, capsys)
