"""Corpora that grow at random: every row is read once, keeps its number, and is found again in its file."""

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gvendi_fast.data.checking import check_run
from gvendi_fast.data.growth import growing_index_for, index_for
from gvendi_fast.data.index import Fields, Manifest, UnitReader, index_corpus, index_files
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_directory import Part, RunDirectory

SPEC = {"sketch": {"kind": "hadamard", "dim": 8, "seed": 0}}
NAMES = ["b.jsonl", "a.jsonl.gz", "d.jsonl", "c.jsonl", "e.json"]


class Growing:
    """A folder whose files get rows behind, and its run directory, of which work units are done at random."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw, self.folder, self.run = random.Random(seed), folder / "data", folder / "run"
        self.files: dict[str, list[dict]] = {}
        self.count = 0
        self.limit: int | None = self.draw.choice([None, 3, 7])
        self.unit_bytes: int | None = self.draw.choice([None, 90])
        self.is_old = self.draw.random() < 0.3
        self.folder.mkdir()

    def grow(self) -> None:
        for _ in range(self.draw.randint(1, 3)):
            name = self.draw.choice(NAMES)
            for _ in range(self.draw.randint(1, 7)):
                # Some ids repeat.
                number = self.count if self.draw.random() < 0.9 else self.draw.randint(0, self.count)
                self.files.setdefault(name, []).append({"id": f"r{number}", "text": f"row {self.count}"})
                self.count += 1
            self.write(name)
        if self.limit is not None:
            self.limit = self.draw.choice([self.limit, self.limit + self.draw.randint(0, 9), None])

    def write(self, name: str) -> None:
        rows, path = self.files[name], self.folder / name
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if name.endswith(".json"):
            path.write_text(json.dumps(rows))
        else:
            path.write_bytes(gzip.compress(lines, mtime=0) if name.endswith(".gz") else lines)

    def sketch(self, share: float) -> RunDirectory:
        """Do about this share of the work units that are left, as a run that is killed leaves them."""
        run = None
        for manifest in self.manifests():
            if run is None:
                run = RunDirectory.open(self.run, SPEC, manifest.to_dict())
            else:
                run.extend(manifest.to_dict())
            manifest = manifest.recorded_as(run.manifest)
            digests = {unit.ordinal: unit.digest for unit in manifest.units}
            done = [unit for unit in run.done() if unit in digests]
            assert run.broken(digests, done) == []
            self.work(run, manifest, share)
            if not manifest.is_whole and self.draw.random() < (1 - share) / 2:
                # Killed while it was indexed.
                break
        return run

    def manifests(self) -> Iterator[Manifest]:
        """The corpus as one manifest, or as it is indexed; at first perhaps as earlier versions had it."""
        settings = Fields(), self.draw.choice([4, 5]), self.limit, self.unit_bytes
        is_new = not self.run.exists()
        if self.draw.random() < 0.5 and not (is_new and self.is_old):
            yield from growing_index_for(self.run, partial(index_files, self.folder), *settings)
            return
        manifest = index_for(self.run, partial(index_corpus, self.folder), *settings)
        yield replace(manifest, by_file=False) if is_new and self.is_old else manifest

    def work(self, run: RunDirectory, manifest: Manifest, share: float) -> None:
        """Write the parts of about this share of the work units that are left."""
        with UnitReader(manifest) as reader:
            for unit in manifest.units:
                if run.has_part(unit.ordinal) or self.draw.random() > share:
                    continue
                rows = list(reader.read(unit))
                kept = [row for row in rows if not isinstance(row, Rejected)]
                ones = {name: np.ones(len(kept)) for name in ("tokens", "length", "loss", "gradient_norm")}
                numbers = np.array([unit.first_row + row.row for row in kept], np.int64)
                sketches = np.array([[len(row.text), int(row.text[4:])] * 4 for row in kept], np.float32)
                part = Part(
                    unit.ordinal,
                    [row.id for row in kept],
                    [""] * len(kept),
                    numbers,
                    sketches.reshape(-1, 8),
                    **ones,
                )
                run.write_part(part, [row for row in rows if isinstance(row, Rejected)], unit.digest)


@pytest.mark.parametrize("seed", range(16))
def test_rows_of_a_corpus_that_grows(tmp_path, seed):
    growing = Growing(tmp_path, seed)
    numbers: dict[int, str] = {}
    for _ in range(5):
        growing.grow()
        run = growing.sketch(growing.draw.choice([0.0, 0.5, 1.0]))
        for part in run.iterate(["row", "sketch"]):
            for row, text in zip(part.rows.tolist(), part.sketches[:, 1].astype(int).tolist(), strict=True):
                # What had a number once keeps it.
                assert numbers.setdefault(row, text) == text
    growing.limit = None
    run = growing.sketch(1.0)
    run.finish()
    total = sum(map(len, growing.files.values()))
    assert run.manifest["rows"] == total
    assert ("format" in run.manifest) != growing.is_old
    assert check_run(run.path, with_corpus=True).findings == []
    found = {original.ordinal: original.record() for original in original_rows(run, range(total))}
    wanted = [json.dumps(row) for rows in growing.files.values() for row in rows]
    assert sorted(map(json.dumps, found.values())) == sorted(wanted)
    accepted = 0
    for part in run.iterate(["id", "row", "sketch"]):
        accepted += len(part.ids)
        for id_, row, sketch in zip(part.ids, part.rows.tolist(), part.sketches, strict=True):
            assert found[row] == {"id": id_, "text": f"row {int(sketch[1])}"}
    rejected = list(run.rejected())
    assert accepted + len(rejected) == total
    assert accepted == len({row["id"] for rows in growing.files.values() for row in rows})
