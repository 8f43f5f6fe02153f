"""One thing has one number: in score, measures, compare, cluster, weights, the report and JSON."""

import json

import numpy as np
import pytest

from gvendi_fast.base.shown import number
from gvendi_fast.data.index import Fields
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.report.data import report_data
from gvendi_fast.vendi import gvendi as score_of

K = 32


def made(path, rows, groups):
    spec = {
        "sketch": {"dim": K, "kind": "hadamard"},
        "coverage": {"sketched": 1, "total": 1},
        "proxy": {"name": "none"},
        "dtype": "float32",
    }
    n = len(rows)
    source = {"path": "nowhere.jsonl", "kind": "jsonl", "size": 1, "rows": n, "digest": ""}
    fields = vars(Fields(by="kind"))
    run = RunDirectory.open(
        path, spec, {"units_total": 1, "rows": n, "limit": None, "fields": fields, "files": [source]}
    )
    ones = {name: np.ones(n) for name in ("tokens", "length", "loss", "gradient_norm")}
    ids = [f"{path.name} {i}" for i in range(n)]
    run.write_part(Part(0, ids=ids, groups=groups, rows=np.arange(n), sketches=rows, **ones))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of 80 rows, one group of 40 and one of 40 in each."""
    folder, rng = tmp_path_factory.mktemp("same"), np.random.default_rng(0)
    decay = np.arange(1, K + 1) ** -0.5
    groups = ["a"] * 40 + ["b"] * 40
    return [
        made(folder / name, (rng.standard_normal((80, K)) * decay).astype(np.float32), groups)
        for name in "xy"
    ]


def values_of(gvendi, *words):
    code, out, err = gvendi(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_g_vendi_of_a_run(gvendi, runs):
    first, second = (run.path for run in runs)
    rows = next(runs[0].iterate(["sketch"])).sketches
    found = {
        "score": values_of(gvendi, "score", first)["gvendi"],
        "measures": values_of(gvendi, "measures", first, "--no-text")["whole"]["gvendi"],
        "compare": values_of(gvendi, "compare", first, second, "--no-text")["sets"]["x"]["gvendi"],
        "weights": values_of(gvendi, "weights", first, "--by", "kind")["gvendi"]["as it is"],
        "report": report_data(runs[0])["score"]["gvendi"],
        "growth": report_data(runs[0])["growth"]["points"][-1]["mean"],
    }
    assert list(found.values()) == pytest.approx([score_of(rows)] * len(found), rel=1e-6)
    value = f"{found['score']:.2f}"
    for words in (("score", first), ("measures", first, "--no-text")):
        assert f"G-Vendi {value}  (n = 80, K = {K})" in gvendi(*words)[1]
    assert f" {value} " in gvendi("compare", first, second, "--no-text")[1]
    assert f"as it is        {value}" in gvendi("weights", first, "--by", "kind")[1]
    assert number(found["report"]) == number(found["score"])


def test_g_vendi_of_groups_of_one_size(gvendi, runs):
    """Where a group has exactly n rows nothing is drawn, so that every command scores the same rows."""
    path = runs[0].path
    by = values_of(gvendi, "score", path, "--by", "kind")["by"]
    measured = values_of(gvendi, "measures", path, "--by", "kind", "--no-text")["by"]
    sources = values_of(gvendi, "weights", path, "--by", "kind")["sources"]
    reported = {group["group"]: group["gvendi"] for group in report_data(runs[0])["groups"]["groups"]}
    for name in "ab":
        found = [by[name]["gvendi"], measured[name]["gvendi"], sources[name]["gvendi"], reported[name]]
        assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def test_clusters_and_mean_cosines(gvendi, runs, tmp_path):
    path = runs[0].path
    found = values_of(gvendi, "cluster", path, "--clusters", 3, "--out", tmp_path / "c.parquet")
    shown = report_data(runs[0], clusters=3)["clusters"]
    assert found["sizes"] == shown["sizes"]
    assert (found["sparse"], found["sparse_rows"]) == (shown["sparse"], shown["sparse_rows"])
    assert found["mean_cosine"] == pytest.approx(shown["mean_cosine"], abs=1e-6)


def test_the_json_of_a_report_has_what_its_page_shows(gvendi, runs, tmp_path):
    code, _, err = gvendi("report", runs[0].path, "--out", tmp_path / "r.html")
    assert code == 0, err
    data, text = json.loads((tmp_path / "r.json").read_text()), (tmp_path / "r.html").read_text()
    assert f'<dd class="value">{number(data["score"]["gvendi"])}</dd>' in text
    assert f"for another 80 rows; at most {data['score']['limit']}" in text
    assert data["score"]["limit"] == K
