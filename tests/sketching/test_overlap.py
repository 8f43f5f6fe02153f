"""Results are waited for one batch late on a GPU; neither that nor a batch in halves changes what is stored."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from run_contents import contents

from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching import batch_memory, unit_worker
from gvendi_fast.sketching.corpus import Settings, sketch_corpus
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.load import load_proxy

SETTINGS = Settings(spec=SketchSpec(dim=64), unit_rows=4, batch_tokens=96)


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [
        {"prompt": f"{i} plus 4?", "completion": "It is" + f" {i + 4}" * (1 + 5 * i % 7)} for i in range(9)
    ]
    lines = [json.dumps(row) for row in rows]
    # The second unit has no row that can be scored.
    lines[4:4] = ["{broken"] * 4
    path.write_text("\n".join(lines) + "\n")
    return path


def late(monkeypatch) -> None:
    """Treat results as on a GPU: one batch behind."""
    plain = unit_worker._behind
    monkeypatch.setattr(unit_worker, "_behind", lambda items, count: plain(items, 1))


def test_one_batch_behind_gives_the_same_bytes(proxy, data, tmp_path, monkeypatch):
    at_once = contents(sketch_corpus(data, tmp_path / "a", proxy, SETTINGS).path)
    late(monkeypatch)
    run = sketch_corpus(data, tmp_path / "b", proxy, SETTINGS)
    assert contents(run.path) == at_once
    assert run.units_done == run.units_total == 4


def test_a_batch_is_waited_for_when_the_next_is_queued(proxy, tmp_path, monkeypatch):
    data = tmp_path / "whole.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}?", "completion": "{i}."}}\n' for i in range(11)))
    events, queue, plain = [], unit_worker.sketch_batch, unit_worker.fetch

    def queued(*args):
        events.append("queue")
        return queue(*args)

    class Noted:
        def __init__(self, *tensors):
            self.inner = plain(*tensors)

        def wait(self):
            events.append("wait")
            return self.inner.wait()

    monkeypatch.setattr(unit_worker, "sketch_batch", queued)
    monkeypatch.setattr(unit_worker, "fetch", Noted)
    sketch_corpus(data, tmp_path / "a", proxy, SETTINGS)
    assert events == ["queue", "wait"] * (len(events) // 2)
    count = len(events) // 2
    events.clear()
    late(monkeypatch)
    sketch_corpus(data, tmp_path / "b", proxy, SETTINGS)
    assert events == ["queue", *["queue", "wait"] * (count - 1), "wait"]


@pytest.mark.parametrize("behind", [False, True])
def test_running_out_of_memory_while_a_batch_is_under_way(proxy, data, tmp_path, monkeypatch, behind):
    whole = sketch_corpus(data, tmp_path / "a", proxy, SETTINGS)
    if behind:
        late(monkeypatch)
    plain, failed = GradientSketcher.sketch, []

    def sketch(self, input_ids, labels, attention_mask=None):
        # An allocation fails when work is queued, after the batch before it was.
        if len(input_ids) > 1 and len(failed) < 2:
            failed.append(len(input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, input_ids, labels, attention_mask)

    monkeypatch.setattr(GradientSketcher, "sketch", sketch)
    monkeypatch.setattr(batch_memory, "_warned", False)
    with pytest.warns(RuntimeWarning, match="halved"):
        halved = sketch_corpus(data, tmp_path / "b", proxy, SETTINGS)
    assert len(failed) == 2
    for one, other in zip(whole.iterate(), halved.iterate(), strict=True):
        assert one.ids == other.ids
        assert one.tokens.tolist() == other.tokens.tolist()
        z, other_z = torch.tensor(one.sketches), torch.tensor(other.sketches)
        assert (torch.cosine_similarity(z, other_z) > 1 - 1e-6).all()


def test_a_gpu_run_is_one_batch_behind(proxy, data, tmp_path, monkeypatch):
    counts, plain = [], unit_worker._behind
    monkeypatch.setattr(
        unit_worker, "_behind", lambda items, count: counts.append(count) or plain(items, count)
    )
    sketch_corpus(data, tmp_path / "a", proxy, SETTINGS)
    on_gpu = replace(proxy, device=torch.device("cuda"))
    sketch_corpus(data, tmp_path / "b", on_gpu, SETTINGS)
    assert counts == [0, 1]


def test_behind_keeps_order_and_hands_out_all():
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield SimpleNamespace(i=i)

    seen = [(item.i, len(made)) for item in unit_worker._behind(items(), 1)]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
