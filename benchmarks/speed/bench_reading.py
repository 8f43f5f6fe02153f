"""Reading, tokenizing and storing rows, each beside the least that any program must do: ratios of runs in turns.

    pytest benchmarks/speed/bench_reading.py --benchmark-json=out.json

Reading stands beside `json.loads` of every line, tokenizing beside the tokenizer on the bare texts, parts beside their
numbers as plain bytes, written to a folder in memory where there is one. What a change of this package costs there is
measured between two checkouts (`benchmarks/before_after.py`).
"""

from __future__ import annotations

import json
import os
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.corpora.made_up import varied
from benchmarks.speed.bench_sketching import take_turns
from gvendi_fast.data.index import UnitReader, index_corpus
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.proxy.encode import Encoder
from gvendi_fast.sketching.proxy.load import load_proxy

ROWS, TOKENIZED_ROWS, UNIT_ROWS, UNITS, DIM = 8_000, 500, 512, 4, 1024


@pytest.fixture
def folder():
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(folder) -> Path:
    made = varied(1_000)
    rows = ({**made[i % len(made)], "id": f"row-{i}"} for i in range(ROWS))
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list:
    manifest = index_corpus(path, rows_per_unit=UNIT_ROWS)
    with UnitReader(manifest) as reader:
        return [row for unit in manifest.units for row in reader.read(unit)]


def read_plainly(path: Path) -> list:
    with path.open("rb") as stream:
        return [json.loads(line) for line in stream]


def note(benchmark, rows: int) -> None:
    """Rows a turn, and a second."""
    benchmark.extra_info["rows"] = rows
    benchmark.extra_info["rows a second"] = rows / benchmark.extra_info["seconds"]["p50"]


def test_reading_against_json(benchmark, corpus):
    assert [row.prompt for row in read(corpus)] == [row["prompt"] for row in read_plainly(corpus)]
    take_turns(benchmark, lambda: read(corpus), {"json.loads of every line": lambda: read_plainly(corpus)})
    note(benchmark, ROWS)


def test_tokenizing_against_the_bare_tokenizer(benchmark, corpus):
    tokenizer = load_proxy("tiny", dtype="float32").tokenizer
    rows = read(corpus)[:TOKENIZED_ROWS]
    encoder = Encoder(tokenizer, 512)
    assert all(hasattr(sample, "input_ids") for sample in encoder.encode(rows))
    texts = [f"{row.prompt}\n{row.completion}" for row in rows]
    take_turns(
        benchmark,
        lambda: encoder.encode(rows),
        {"the tokenizer alone": lambda: tokenizer(texts, add_special_tokens=False)},
    )
    note(benchmark, TOKENIZED_ROWS)


def parts() -> list[Part]:
    draws = np.random.default_rng(0)
    made = []
    for unit in range(UNITS):
        sketches = draws.standard_normal((UNIT_ROWS, DIM)).astype(np.float32)
        column = np.arange(UNIT_ROWS, dtype=np.int32)
        rows = np.arange(UNIT_ROWS, dtype=np.int64) + unit * UNIT_ROWS
        ones = np.ones(UNIT_ROWS, np.float32)
        made.append(
            Part(
                unit, [f"row-{i}" for i in rows], [""] * UNIT_ROWS, rows, sketches, column, column, ones, ones
            )
        )
    return made


def new_run(path: Path, corpus: Path) -> RunDirectory:
    spec = {"format": 2, "sketch": SketchSpec(dim=DIM).as_dict()}
    return RunDirectory.open(path, spec, index_corpus(corpus, rows_per_unit=UNIT_ROWS).to_dict())


def test_writing_parts_against_plain_bytes(benchmark, folder, corpus):
    made, numbers = parts(), count()
    run = new_run(folder / "run", corpus)

    def plainly() -> None:
        for part in made:
            with (folder / f"{next(numbers) % UNITS}.f32").open("wb") as stream:
                stream.write(part.sketches.tobytes())
                os.fsync(stream.fileno())

    def write() -> None:
        for part in made:
            run.write_part(part)

    take_turns(benchmark, write, {"their sketches as plain bytes": plainly})
    assert all(
        np.array_equal(one.sketches, two.sketches) for one, two in zip(run.iterate(), made, strict=True)
    )
    note(benchmark, UNITS * UNIT_ROWS)


def test_reading_parts_against_plain_bytes(benchmark, folder, corpus):
    made = parts()
    run = new_run(folder / "run", corpus)
    for part in made:
        run.write_part(part)
        part.sketches.tofile(folder / f"{part.unit}.f32")
    take_turns(
        benchmark,
        lambda: sum(len(part.sketches) for part in run.iterate(["sketch"])),
        {
            "their sketches as plain bytes": lambda: [
                np.fromfile(folder / f"{u}.f32", "<f4") for u in range(UNITS)
            ]
        },
    )
    note(benchmark, UNITS * UNIT_ROWS)
