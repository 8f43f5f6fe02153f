"""A batch that runs out of memory is halved until it fits, once said; the sketches are those of the whole batch."""

import numpy as np
import pytest
import torch

from gvendi_fast import memory
from gvendi_fast.errors import GvendiError
from gvendi_fast.gradients import GradientSketcher
from gvendi_fast.plan import SketchSpec
from gvendi_fast.proxy import load_proxy
from gvendi_fast.text import Sample, collate


@pytest.fixture(scope="module")
def sketcher():
    return GradientSketcher(load_proxy("tiny", dtype="float32").model, SketchSpec(dim=64))


def samples(count: int) -> list[Sample]:
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 2000, 6 + i).astype(np.int32) for i in range(count)]
    return [Sample(i, f"s{i}", "", "data.jsonl", i + 1, ids, ids.copy()) for i, ids in enumerate(rows)]


def limited(monkeypatch, sketcher, most: int) -> list[int]:
    """Let batches of more than `most` samples run out of memory; returns the sizes that were tried."""
    plain, tried = GradientSketcher.sketch, []

    def sketch(self, input_ids, labels, attention_mask=None):
        tried.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, input_ids, labels, attention_mask)

    monkeypatch.setattr(GradientSketcher, "sketch", sketch)
    monkeypatch.setattr(memory, "_warned", False)
    return tried


def test_halves_until_it_fits_and_says_so_once(monkeypatch, sketcher):
    batch = samples(7)
    whole = sketcher.sketch(*collate(batch, 0))
    tried = limited(monkeypatch, sketcher, 2)
    with pytest.warns(RuntimeWarning, match="7 samples ran out of GPU memory and is halved") as seen:
        got = memory.sketch_batch(sketcher, batch, 0)
    assert len([w for w in seen if "halved" in str(w.message)]) == 1
    assert tried == [7, 3, 1, 2, 4, 2, 2]
    assert got.tokens.tolist() == whole.tokens.tolist()
    torch.testing.assert_close(got.loss, whole.loss, rtol=1e-5, atol=1e-5)
    assert torch.cosine_similarity(got.z, whole.z).min() > 1 - 1e-6


def test_single_sample_that_does_not_fit_is_named(monkeypatch, sketcher):
    limited(monkeypatch, sketcher, 0)
    with pytest.raises(GvendiError, match=r"a sample of 6 tokens \(data\.jsonl:1\) does not fit"):
        memory.sketch_batch(sketcher, samples(1), 0)


def test_other_errors_are_not_swallowed(monkeypatch, sketcher):
    def broken(*_):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(GradientSketcher, "sketch", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        memory.sketch_batch(sketcher, samples(3), 0)


def test_budget_on_a_cpu(sketcher):
    assert memory.choose_batch_tokens(sketcher, None) == memory.CPU_BATCH_TOKENS
    assert memory.choose_batch_tokens(sketcher, 777) == 777
