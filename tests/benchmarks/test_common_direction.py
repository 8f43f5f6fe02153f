"""The study of the common direction: what it reads, one reference for all sources, and its table."""

import numpy as np
import pytest
import torch
from places import ROOT

from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.vendi.centered import RowMean, centered, equal_mean

pytest.importorskip("scipy")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.report import direction as proxies
    from benchmarks.studies import common_direction

    return common_direction, proxies


def run_of(path, rows: np.ndarray) -> str:
    made = RunDirectory.open(path, {"sketch": {"dim": rows.shape[1]}}, {"files": [], "units_total": 1})
    n = len(rows)
    numbers = {name: np.ones(n) for name in ("tokens", "length", "loss", "gradient_norm")}
    ids = [f"r{i:03d}" for i in range(n)]
    made.write_part(Part(0, ids=ids, groups=[""] * n, rows=np.arange(n), sketches=rows, **numbers))
    return str(path)


def test_the_figures_are_those_of_the_library(study, tmp_path):
    common_direction, proxies = study
    draws = np.random.default_rng(0)
    rows = {name: draws.standard_normal((n, 64)).astype(np.float32) + 1 for name, n in (("a", 30), ("b", 9))}
    runs = [f"p/{name}={run_of(tmp_path / name, x)}" for name, x in rows.items()]
    named = common_direction.named(runs)
    assert named == {"p": {name: str(tmp_path / name) for name in rows}}
    found = common_direction.of_proxy(named["p"], 32)
    means = {name: RowMean(32).update(x[:, :32]) for name, x in rows.items()}
    for name, x in rows.items():
        assert found[name]["centred"] == pytest.approx(centered(x[:, :32], means[name]).value, rel=1e-5)
        assert found[name]["n"] == len(x)
    whole = torch.from_numpy(np.concatenate(list(rows.values()))[:, :32].copy())
    wanted = centered(whole, equal_mean(means.values())).value
    assert found["all together"]["centred"] == pytest.approx(wanted, rel=1e-5)
    assert found["all together"]["left_out"] == 0
    with pytest.raises(SystemExit, match="less than --dim 128"):
        common_direction.of_proxy(named["p"], 128)
    with pytest.raises(SystemExit, match="wanted PROXY/SOURCE=RUN_DIRECTORY"):
        common_direction.named(["p=q"])

    def joined(head, lines):
        return "\n".join("|".join(line) for line in [head, *lines])

    lines = proxies.direction_table({"proxies": {"p": found}}, joined).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith(f"p|a|30|{found['a']['mean_cosine']:.3f}|")
    assert proxies.direction_table({}, joined) == ""
