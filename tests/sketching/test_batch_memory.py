"""A batch that runs out of memory is halved until it fits, once said; the sketches are those of the whole batch."""

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching import batch_memory
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher, Sketches
from gvendi_fast.sketching.proxy.encode import Sample, collate
from gvendi_fast.sketching.proxy.load import load_proxy


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
    monkeypatch.setattr(batch_memory, "_warned", False)
    return tried


def test_halves_until_it_fits_and_says_so_once(monkeypatch, sketcher):
    batch = samples(7)
    whole = sketcher.sketch(*collate(batch, 0))
    tried = limited(monkeypatch, sketcher, 2)
    with pytest.warns(RuntimeWarning, match="7 samples ran out of GPU memory and is halved") as seen:
        got = batch_memory.sketch_batch(sketcher, batch, 0)
    assert len([w for w in seen if "halved" in str(w.message)]) == 1
    assert tried == [7, 3, 1, 2, 4, 2, 2]
    assert got.tokens.tolist() == whole.tokens.tolist()
    torch.testing.assert_close(got.loss, whole.loss, rtol=1e-5, atol=1e-5)
    assert torch.cosine_similarity(got.z, whole.z).min() > 1 - 1e-6


def test_single_sample_that_does_not_fit_is_named(monkeypatch, sketcher):
    limited(monkeypatch, sketcher, 0)
    with pytest.raises(GvendiError, match=r"a sample of 6 tokens \(data\.jsonl:1\) does not fit"):
        batch_memory.sketch_batch(sketcher, samples(1), 0)


def test_other_errors_are_not_swallowed(monkeypatch, sketcher):
    def broken(*_):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(GradientSketcher, "sketch", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        batch_memory.sketch_batch(sketcher, samples(3), 0)


def test_budget_on_a_cpu(sketcher):
    assert batch_memory.choose_batch_tokens(sketcher, None) == batch_memory.CPU_BATCH_TOKENS
    assert batch_memory.choose_batch_tokens(sketcher, 777) == 777


class FakeMemory:
    """A GPU on which a batch of t tokens takes fixed + slope t bytes, and none fits that takes more than `most`."""

    def __init__(self, monkeypatch, fixed: int, slope: int, free: int, most: float = float("inf")) -> None:
        self.fixed, self.slope, self._free, self.most, self.batches = fixed, slope, free, most, []
        monkeypatch.setattr(GradientSketcher, "sketch", self._sketch)

    def _sketch(self, input_ids, labels, attention_mask=None):
        self.batches.append(tuple(input_ids.shape))
        self.taken = self.fixed + self.slope * input_ids.numel()
        if self.taken > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Sketches(*torch.zeros(3, 1))

    def peak_of(self, run) -> int:
        run()
        return self.taken

    def free(self) -> int:
        return self._free


def test_a_fixed_overhead_is_not_counted_for_every_token(monkeypatch, sketcher):
    # 256 MiB whatever the batch, and 100 KB a token, of 10 GB: (0.6 * 10e9 - 268e6) / 1e5 = 57,315 tokens.
    gpu = FakeMemory(monkeypatch, 256 << 20, 100_000, 10**10)
    assert batch_memory.choose_batch_tokens(sketcher, None, gpu) == 32768
    assert gpu.batches == [(2, 512), (2, 512), (8, 512), (16, 512)]
    # The first trial alone would have said 362 KB a token, and 16,384 tokens.
    assert 8192 < 0.6 * 10**10 / ((256 << 20) / 1024 + 100_000) < 32768


def test_trials_are_no_longer_than_the_model_reads(monkeypatch, sketcher):
    monkeypatch.setattr(sketcher.model.config, "max_position_embeddings", 300)
    gpu = FakeMemory(monkeypatch, 0, 1000, 10**9)
    assert batch_memory.choose_batch_tokens(sketcher, None, gpu) == batch_memory.MOST_BATCH_TOKENS
    assert gpu.batches == [(4, 300), (4, 300), (14, 300), (28, 300)]


def test_trials_that_do_not_fit(monkeypatch, sketcher):
    gpu = FakeMemory(monkeypatch, 0, 1000, 10**9, most=2_000_000)
    assert batch_memory.choose_batch_tokens(sketcher, None, gpu) == 1024
    gpu = FakeMemory(monkeypatch, 0, 1000, 10**9, most=5_000_000)
    assert batch_memory.choose_batch_tokens(sketcher, None, gpu) == 4096
    gpu = FakeMemory(monkeypatch, 0, 1000, 10**9, most=1_000_000)
    with pytest.raises(GvendiError, match=r"a batch of 1024 tokens does not fit.*--batch-tokens"):
        batch_memory.choose_batch_tokens(sketcher, None, gpu)


@pytest.mark.parametrize(
    ("small", "large", "free", "tokens"),
    [
        # Slope 1000, nothing fixed: 6,000,000 / 1000 = 6000.
        (1_024_000, 4_096_000, 10**7, 4096),
        # Slope 1000 and 2,000,000 fixed: 4,000,000 / 1000 = 4000.
        (3_024_000, 6_096_000, 10**7, 2048),
        # Grows faster than in proportion: slope 2000, and no credit for a fixed part below zero: 3000.
        (1_024_000, 7_168_000, 10**7, 2048),
        # No growth seen: 4,096,000 / 4096 = 1000 bytes a token, 6000.
        (4_096_000, 4_096_000, 10**7, 4096),
        (4_096_000, 4_096_000, 10**12, 1 << 17),
        # Nothing left: the smallest budget, which the halving of batches still protects.
        (3_024_000, 6_096_000, 10**6, 1024),
        (0, 0, 10**6, 1 << 17),
    ],
)
def test_the_line_through_two_trials(small, large, free, tokens):
    assert batch_memory.fitting_tokens([(1024, small), (4096, large)], free) == tokens
