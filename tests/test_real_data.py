"""Real text under a small trained model: more tasks score higher, narrow text lower."""

import gzip
import json

import numpy as np
import pytest

from gvendi_fast.analysis.scoring import group_scores
from gvendi_fast.data.index import Fields
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.proxy.load import load_proxy
from gvendi_fast.vendi import gvendi


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    """Every sixth row of 20 tasks, sketched."""
    folder = tmp_path_factory.mktemp("bbh")
    with gzip.open(shared / "bbh_cot" / "bbh_cot.jsonl.gz", "rt") as stream:
        rows = [line for i, line in enumerate(stream) if i % 6 == 0]
    (folder / "rows.jsonl").write_text("".join(rows))
    assert len({json.loads(row)["meta"]["task"] for row in rows}) == 20
    proxy = load_proxy(shared / "models" / "stories260K", dtype="float32")
    return sketch_corpus(
        folder / "rows.jsonl", folder / "run", proxy, Settings(fields=Fields(by="meta.task"))
    )


@pytest.mark.soak
def test_twenty_tasks_score_above_each_single_task_at_equal_n(run):
    groups = group_scores(run)
    single = {task: group.gvendi for task, group in groups.items() if group.gvendi is not None}
    n = max(group.n for group in groups.values())
    assert len(single) >= 10
    assert n >= 20
    sketches = np.concatenate([part.sketches for part in run.iterate(["sketch"])])
    generator = np.random.default_rng(0)
    mixed = [gvendi(sketches[generator.choice(len(sketches), n, replace=False)]) for _ in range(10)]
    assert min(mixed) > max(single.values()), (mixed, single)
    # The band of a group is narrower than the differences that it is there to judge.
    bands = [group.high - group.low for group in groups.values() if group.draws > 1]
    assert bands
    assert max(bands) < max(single.values()) - min(single.values()), (bands, single)


@pytest.mark.soak
def test_sketches_have_a_sensible_scale(run):
    part = next(run.iterate())
    assert np.isfinite(part.sketches).all()
    assert (part.tokens > 0).all()
    assert (part.length >= part.tokens).all()
    # Nats a token of a model with 512 tokens: better than a coin for every one, worse than certain.
    assert 0 < np.median(part.loss / part.tokens) < 4 * np.log(512)
