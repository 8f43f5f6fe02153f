"""A corpus that chooses its K: one line says why, a run directory keeps its own, and tiny corpora work."""

import json
from dataclasses import replace

import numpy as np
import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Silent
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching import chosen_dim, corpus
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy

AUTO = Settings(auto_dim=True, unit_rows=8, batch_tokens=512)


class Notes(Silent):
    def __init__(self):
        self.said = []

    def note(self, text):
        # Of the look at some rows, with which every run begins.
        if not text.startswith("looked at "):
            self.said.append(text)


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} * {i % 7}?", "completion": f"It is {i * (i % 7)}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_choice_is_said_in_one_line_and_gives_the_sketches_of_that_dim(data, tmp_path, proxy):
    notes = Notes()
    run = sketch_corpus(data, tmp_path / "auto", proxy, AUTO, notes)
    assert run.spec["sketch"]["dim"] == 512
    (line,) = [text for text in notes.said if text.startswith("K = ")]
    assert "K = 512, the smallest of 512 and above with a bias below 5 %: G-Vendi of 40 rows" in line
    fixed = sketch_corpus(
        data, tmp_path / "fixed", proxy, replace(AUTO, auto_dim=False, spec=SketchSpec(dim=512))
    )
    assert run.spec == fixed.spec
    for mine, theirs in zip(run.iterate(), fixed.iterate(), strict=True):
        assert (mine.sketches == theirs.sketches).all()


def test_a_run_directory_keeps_its_own_k(data, tmp_path, proxy, monkeypatch):
    fixed = replace(AUTO, auto_dim=False, spec=SketchSpec(dim=1024))
    sketch_corpus(data, tmp_path / "run", proxy, fixed)
    (tmp_path / "run" / "parts" / "part-000002.parquet").unlink()

    def never(*_):
        raise AssertionError("K was chosen again")

    monkeypatch.setattr(corpus, "chosen_dim", never)
    notes = Notes()
    run = sketch_corpus(data, tmp_path / "run", proxy, AUTO, notes)
    assert run.spec["sketch"]["dim"] == 1024
    assert run.missing() is None
    assert notes.said == [f"K = 1024, as the sketches in '{tmp_path / 'run'}'"]


def test_other_settings_than_the_directory_are_still_refused(data, tmp_path, proxy):
    sketch_corpus(data, tmp_path / "run", proxy, AUTO)
    with pytest.raises(GvendiError, match="other settings"):
        sketch_corpus(data, tmp_path / "run", proxy, replace(AUTO, mask="released"))


def test_a_corpus_of_one_row(tmp_path, proxy):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "one row alone"}) + "\n")
    notes = Notes()
    assert sketch_corpus(path, tmp_path / "run", proxy, AUTO, notes).spec["sketch"]["dim"] == 512
    assert any("G-Vendi of 1 row has a predicted bias of 0.0 %; from 1 row at" in text for text in notes.said)


def test_a_corpus_without_a_usable_row_keeps_the_default_and_says_so(tmp_path, proxy):
    path = tmp_path / "none.jsonl"
    path.write_text("no json\n" * 3)
    notes = Notes()
    run = sketch_corpus(path, tmp_path / "run", proxy, AUTO, notes)
    assert run.spec["sketch"]["dim"] == 1024
    assert notes.said == ["K = 1024: none of the rows that would choose it has a gradient"]
    assert sum(1 for _ in run.rejected()) == 3


def test_the_choosing_rows_are_spread_over_the_corpus(data, tmp_path, proxy, monkeypatch):
    monkeypatch.setattr(chosen_dim, "CHOOSING_ROWS", 10)
    monkeypatch.setattr(chosen_dim, "CHOOSING_UNITS", 5)
    seen = []
    real = chosen_dim.choose_dim

    def watched(rows, total):
        seen.append((len(rows), total))
        return real(rows, total)

    monkeypatch.setattr(chosen_dim, "choose_dim", watched)
    taken = []
    monkeypatch.setattr(
        chosen_dim,
        "batches",
        lambda samples, tokens, real=chosen_dim.batches: real(_kept(taken, samples), tokens),
    )
    sketch_corpus(data, tmp_path / "run", proxy, AUTO)
    assert seen == [(10, 40)]
    assert [sample.line for sample in taken[0]] == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37]


def _kept(taken, samples):
    taken.append(samples)
    return samples


def test_a_dense_sketch_chooses_by_the_hadamard_one(data, tmp_path, proxy):
    dense = replace(AUTO, spec=SketchSpec(kind="rademacher"), limit=3)
    run = sketch_corpus(data, tmp_path / "run", proxy, dense)
    assert (run.spec["sketch"]["kind"], run.spec["sketch"]["dim"]) == ("rademacher", 512)
    assert all(np.isfinite(part.sketches).all() for part in run.iterate())
