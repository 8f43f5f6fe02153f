"""A run with sketches as int8: gone on with as it was begun, the same bytes, nearly the same score."""

import json

import pytest

from gvendi_fast.analysis.compare import compare
from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy

UNITS = 3


def settings(store: str | None = None) -> Settings:
    return Settings(SketchSpec(64), unit_rows=4, groups="embedding", store=store)


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


@pytest.fixture(scope="module")
def runs(proxy, tmp_path_factory):
    """(corpus, {store: its run directory}); None: the default."""
    folder = tmp_path_factory.mktemp("stored")
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"Count {n}.", "completion": f"{n}, {n * n} it is."} for n in range(4 * UNITS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data, {
        store: sketch_corpus(data, folder / str(store), proxy, settings(store))
        for store in (None, "float32", "int8")
    }


def parts(run: RunDirectory) -> list[bytes]:
    return [run.part_path(unit).read_bytes() for unit in run.done()]


def test_float32_is_the_default_and_is_not_recorded(runs):
    made = runs[1]
    assert "store" not in made["float32"].spec
    assert parts(made[None]) == parts(made["float32"])
    assert made["int8"].spec == {**made["float32"].spec, "store": "int8"}


def test_a_directory_goes_on_as_it_was_begun(runs, proxy):
    data, made = runs
    run = made["int8"]
    whole = parts(run)
    run.part_path(1).unlink()
    sketch_corpus(data, run.path, proxy, settings())
    assert parts(run) == whole
    assert run.broken() == []
    with pytest.raises(GvendiError, match=r'store: "int8" in the directory, \(absent\) now'):
        sketch_corpus(data, run.path, proxy, settings("float32"))


def test_scores_are_nearly_the_same_and_stores_may_be_compared(runs):
    made = runs[1]
    whole, coded = (score_run(RunDirectory.load(made[store].path)) for store in ("float32", "int8"))
    # Rounding spreads a share of about e = 5e-5 of the trace over all K directions: e ln(K / e) = 7e-4 more entropy.
    assert whole.gvendi < coded.gvendi < 1.002 * whole.gvendi
    assert coded.norm_shares == whole.norm_shares
    compare({store: str(made[store].path) for store in ("float32", "int8")})


def test_a_store_that_is_none():
    with pytest.raises(GvendiError, match="store is 'int4'; wanted one of float32, float16, int8"):
        Settings(store="int4")
