"""The examples of pipelines that sketch in passing run, and show what they say."""

import runpy

import pytest
from places import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def test_a_step_of_datatrove_sketches_documents_in_passing():
    pytest.importorskip("datatrove", reason="needs datatrove, whose pipeline it is a step of")
    found = runpy.run_path(str(EXAMPLES / "datatrove_step.py"))["main"]()
    assert [len(document.metadata.get("sketch", ())) for document in found] == [256, 256, 0, 256]
    assert found[2].metadata["sketch_rejected"] == "empty text"


@pytest.mark.soak
def test_a_stage_of_nemo_curator_adds_columns():
    pytest.importorskip("nemo_curator", reason="needs nemo-curator, which brings 40 packages")
    found = runpy.run_path(str(EXAMPLES / "curator_stage.py"))["main"]()
    assert found.schema.names == ["text", "url", "sketch", "sketch_rejected"]
    assert found.column("sketch_rejected").to_pylist() == [None, None, "empty text"]


@pytest.mark.soak
def test_a_data_set_of_ray_gets_a_column_of_sketches(monkeypatch):
    ray = pytest.importorskip("ray", reason="the engine 'ray' is an extra")
    pytest.importorskip("ray.data", reason="the engine 'ray' is an extra")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    try:
        assert 2 < runpy.run_path(str(EXAMPLES / "ray_map_batches.py"))["main"]() < 36
    finally:
        ray.shutdown()
