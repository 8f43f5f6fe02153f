"""Passes: the same numbers to the bit on every engine, in any order of results, and errors that reach who asked."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from gvendi_fast.analysis.mixture import source_states
from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import unit_floats, unit_rows
from gvendi_fast.clusters.kmeans import SphericalKMeans
from gvendi_fast.data import chunks, passes
from gvendi_fast.data.passes import in_order, over_pool, over_run, taken
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.data.strings import Strings, codes_of, rank_of
from gvendi_fast.selection import select
from gvendi_fast.selection.relaxed import relaxed_weights
from gvendi_fast.vendi.centered_pool import CenteredPool
from gvendi_fast.vendi.state import VendiState

ROWS, DIM, UNIT = 240, 32, 10


class Elsewhere(Engine):
    """Everything is pickled, as for another process, and results come in another order."""

    name, run_id, is_remote = "elsewhere", "0", True

    def __init__(self):
        self.maps, self.largest = 0, 0

    def map(self, make, items):
        self.maps += 1
        content = pickle.dumps(make)
        self.largest = max(self.largest, len(content))
        function = pickle.loads(content)()
        for place in np.random.default_rng(self.maps).permutation(len(items)).tolist():
            item = pickle.loads(pickle.dumps(items[place]))
            yield place, pickle.loads(pickle.dumps(function(item)))

    def work(self, open_worker, items):
        raise NotImplementedError


def _call(make, item):
    return make()(item)


class Processes(Elsewhere):
    """Two processes of their own."""

    def map(self, make, items):
        self.maps += 1
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
            futures = [workers.submit(_call, make, item) for item in items]
            for place in reversed(range(len(items))):
                yield place, futures[place].result()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory of several chunks; its last work unit has no accepted row."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 4 * UNIT)
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((ROWS, DIM)).astype(np.float32)
    rows[::3] += 2 * rows[0]
    units = ROWS // UNIT + 1
    spec = {"sketch": {"dim": DIM}, "coverage": {"sketched": 1, "total": 1}}
    manifest = {
        "units_total": units,
        "rows": units * UNIT,
        "rows_per_unit": UNIT,
        "fields": {"by": "source"},
        "files": [{"path": "d.jsonl", "rows": units * UNIT}],
    }
    made = RunDirectory.open(tmp_path / "run", spec, manifest)
    for unit in range(units):
        here = rows[unit * UNIT : (unit + 1) * UNIT]
        n = len(here)
        numbers = np.arange(unit * UNIT, unit * UNIT + n)
        made.write_part(
            Part(
                unit,
                ids=[f"r{i}" for i in numbers],
                groups=[f"g{i % 3}" for i in numbers],
                rows=numbers,
                sketches=here,
                tokens=np.full(n, 3),
                length=np.full(n, 5),
                loss=1 + numbers.astype(np.float32),
                gradient_norm=np.ones(n),
                norm_shares={"attention": np.full(n, 0.3), "mlp": np.full(n, 0.7)},
            )
        )
    return made


SELECTIONS = (
    {"method": "relaxed", "center": True, "quotas": {"g0": 10}},
    {"method": "two-round"},
    {"method": "relaxed"},
    {"method": "relaxed", "objective": "quality", "quality": "loss"},
    {"method": "relaxed", "must_include": True},
    {"objective": "facility", "must_include": True, "represent": 50},
)


def numbers_of_passes(run, engine, selections):
    """What every pass says, as plain values that can be compared exactly."""
    score = score_run(run, by="source", orders=[2], engine=engine).to_dict()
    model = SphericalKMeans(7, max_iterations=3).fit(run, engine=engine)
    labels = model.assign(run, engine=engine)
    selected = [
        select(
            run,
            20,
            engine=engine,
            draws=2,
            seed=1,
            **{key: run if value is True and key == "must_include" else value for key, value in more.items()},
        )
        for more in selections
    ]
    states = source_states(run, engine)
    return (
        score,
        [model.centroids.numpy().tobytes(), model.counts.tolist(), model.objective, model.iterations],
        [column.numpy().tobytes() for column in labels],
        [(s.to_dict(), s.ids, s.gain.tobytes(), s.surprisal.tobytes()) for s in selected],
        {name: (state.n, state.matrix.numpy().tobytes()) for name, state in states.items()},
    )


@pytest.mark.parametrize(
    "selections", [SELECTIONS[:1], pytest.param(SELECTIONS[1:], marks=pytest.mark.soak)], ids=["one", "all"]
)
def test_numbers_are_the_same_to_the_bit_on_every_engine(run, selections):
    engine = Elsewhere()
    wanted = numbers_of_passes(run, None, selections)
    assert numbers_of_passes(run, engine, selections) == wanted
    assert engine.maps > 15
    # No rows of the pool go to a worker, and no ids.
    assert engine.largest < 4 * ROWS * DIM


@pytest.mark.soak
def test_numbers_are_the_same_to_the_bit_in_two_processes(run):
    model, other = (SphericalKMeans(7, max_iterations=2).fit(run, engine=e) for e in (None, Processes()))
    assert torch.equal(model.centroids, other.centroids)
    assert score_run(run, by="source", engine=Processes()) == score_run(run, by="source")
    one, two = (select(run, 40, method="relaxed", draws=2, engine=e) for e in (None, Processes()))
    assert (one.ids, one.to_dict()) == (two.ids, two.to_dict())


def test_an_engine_reads_a_pool_whose_rows_are_all_weighed(run):
    pool, engine = as_pool(run), Elsewhere()
    # Of so little memory nothing holds the rows of a step.
    said = []
    here, there = (
        relaxed_weights(pool, 40, memory=1, engine=e, progress=said.append) for e in (None, engine)
    )
    assert "0 rows fit in memory and 80 are wanted, two for each one to choose" in said[0]
    assert np.array_equal(here.weights, there.weights)
    assert (here.gap, here.steps) == (there.gap, there.steps)
    assert engine.maps > 2 * there.steps > 0


def test_chunks_are_whole_work_units_and_cover_every_row(run):
    pool = as_pool(run)
    found = pool.chunks()
    assert len(found) == 6
    assert [unit for chunk in found for unit in chunk.units] == run.done()
    assert [chunk.first for chunk in found] == np.cumsum([0, *(c.rows for c in found[:-1])]).tolist()
    assert sum(chunk.rows for chunk in found) == len(pool) == ROWS
    assert [chunk.rows for chunk in passes.at_most(found, 2)] == [120, 120]
    for kind in (pool, CenteredPool(run)):
        rows = torch.cat([block for _, block in kind.blocks()])
        wanted = np.array([239, 0, 3, 3, 100])
        assert torch.equal(kind.take(wanted), rows[wanted])
        assert torch.equal(taken(Elsewhere(), kind, wanted), rows[wanted])


def test_a_run_of_one_chunk_has_the_sums_of_its_parts_in_order(run, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", ROWS)
    state = VendiState(DIM)
    for part in run.iterate(["sketch"]):
        state.update(part.sketches)
    assert score_run(run).gvendi == state.gvendi()


class _Fails:
    def __init__(self, message):
        self.message = message

    def add(self, first, rows):
        if first >= 80:
            raise GvendiError(self.message)

    def result(self):
        return 0


def _fails(parts):
    for part in parts:
        if part.unit == 9:
            raise OSError(5, "lost")
    return 0


@pytest.mark.parametrize("engine", [None, Elsewhere()], ids=["here", "elsewhere"])
def test_the_error_of_a_task_reaches_who_asked(run, engine):
    with pytest.raises(GvendiError, match="rows are odd"):
        list(over_pool(engine, as_pool(run), partial(_Fails, "rows are odd")))
    with pytest.raises(OSError, match="lost"):
        list(over_run(engine, run, ["row"], _fails))
    run.part_path(5).write_bytes(b"PAR1")
    with pytest.raises(GvendiError, match=r"part-000005\.parquet' is damaged"):
        score_run(run, engine=engine)


def test_results_come_in_order_and_few_are_held(monkeypatch):
    monkeypatch.setattr(passes, "_WAITING", 2)
    places = [3, 5, 1, 4, 0, 2, 7, 6]
    assert list(in_order((place, [place] * 3) for place in places)) == [[place] * 3 for place in range(8)]


def test_strings_are_those_of_python():
    values = ["b", "", "Ä", "a", "b", "\U0001f600", "ｚ"]
    strings = Strings.joined([Strings(values[:3]), Strings([]), Strings(values[3:])])
    assert strings == values == list(strings)
    assert (strings[-1], strings[1:3], len(strings)) == ("ｚ", ["", "Ä"], 7)
    assert rank_of(strings).tolist() == rank_of(values).tolist()
    codes, names = codes_of(strings)
    assert (codes.tolist(), names) == (codes_of(values)[0].tolist(), codes_of(values)[1])
    assert strings.take(np.array([3, 0])) == ["a", "b"]


@pytest.mark.parametrize("shape", [(1, 64), (67, 1024), (300, 512), (9, 8192), (5, 3)])
def test_rows_scaled_in_strips_are_the_same_to_the_bit(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(unit_floats(rows), unit_rows(rows).float())
    rows[-1] = 0
    with pytest.raises(GvendiError, match=f"row {shape[0] + 1} of rows has norm 0"):
        unit_floats(rows, first=2)
