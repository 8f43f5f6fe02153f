"""The head never holds [T, V]: its peak is one chunk of logits, and what it returns, at the real vocabulary.

Every storage that an operation makes is counted from its creation to its end, so the peak is exact and the same on
every machine. What a kernel takes for itself is not seen; kernels are handed their memory.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gvendi_fast.kernels import ops
from gvendi_fast.kernels.signs import sign_key
from gvendi_fast.kernels.sketch_matrix import make_table
from gvendi_fast.sketching.gradients import head_chunks

# Qwen2.5's vocabulary; few dimensions and rows keep the products small (bfloat16 is slow where a CPU lacks it), chunks
# are as in a real run.
V, D, T, K = 151_936, 16, 300, 1024
SIZES = {torch.float32: 4, torch.bfloat16: 2}
# Segments, labels and the like, and a kernel's scratch row a thread.
SMALL = 4 << 20


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside and not yet gone, and their highest sum; what goes in does not count."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {x.untyped_storage().data_ptr() for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self._known or size == 0:
            return
        self._known.add(at)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, at, size)

    def _gone(self, at: int, size: int) -> None:
        self._known.discard(at)
        self.live -= size


def inputs(dtype: torch.dtype, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) / D**0.5
    labels = torch.randint(0, V, (T,), generator=generator)
    segments = torch.tensor([[0, T // 3], [T // 3, T]])
    out = torch.zeros(2, K, device=device)
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device), segments, out


def returned_bytes(dtype: torch.dtype) -> int:
    """Loss float32 [T] and the gradient of hidden [T, d]."""
    return 4 * T + T * D * SIZES[dtype]


def tables():
    return make_table(0, "model/", D, K), make_table(0, "model.embed_tokens.weight", V, K)


def test_the_counter_counts():
    x = torch.zeros(1000)
    with LiveBytes(x) as memory:
        x.add_(1)
        y = x.view(10, 100) + 1
        z = y[:5] * 2
        del y
        w = torch.zeros(100)
    assert memory.live == 4 * 500 + 4 * 100
    assert memory.peak == 4 * 1000 + 4 * 500
    assert z.shape == (5, 100)
    assert w.sum() == 0


@pytest.mark.parametrize("dtype", SIZES, ids=str)
def test_head_sketch_holds_one_chunk_of_logits(dtype):
    hidden, weight, labels, segments, out = inputs(dtype)
    columns, rows = tables()
    chunk = head_chunks.head_chunk_rows(V, SIZES[dtype], "cpu")
    assert chunk < T
    allowed = chunk * V * SIZES[dtype] + returned_bytes(dtype) + (T + chunk) * K * 4 + SMALL
    # The bound leaves room neither for a second chunk nor for [T, V].
    assert allowed < 2 * chunk * V * SIZES[dtype]
    assert allowed < T * V * SIZES[dtype]
    with LiveBytes(hidden, weight, labels, segments, out) as memory:
        loss, gradient = head_chunks.head_sketch(hidden, weight, labels, segments, columns, rows, out)
    assert memory.peak <= allowed
    assert memory.peak >= chunk * V * SIZES[dtype]
    assert loss.shape == (T,)
    assert gradient.shape == (T, D)


@pytest.mark.parametrize("dtype", SIZES, ids=str)
def test_dense_head_sketch_holds_one_chunk_of_logits(dtype, monkeypatch):
    hidden, weight, labels, segments, out = inputs(dtype)
    # The sums of the dense mode over 151,936 x 64 entries take minutes here; its memory is not in question.
    monkeypatch.setattr(ops, "dense_sketch", lambda a, e, *_: None)
    monkeypatch.setattr(head_chunks, "DENSE_HEAD_CHUNK_BYTES", T // 2 * V * 4)
    monkeypatch.setattr(head_chunks, "HEAD_CHUNK_MIN_ROWS", 1)
    chunk_bytes = T // 2 * V * 4
    # bfloat16 needs the logits in its own format too, as the products take and give them.
    allowed = chunk_bytes * (1 if dtype == torch.float32 else 1.5) + returned_bytes(dtype) + SMALL
    with LiveBytes(hidden, weight, labels, segments, out) as memory:
        head_chunks.dense_head_sketch(hidden, weight, labels, segments, sign_key(0, "w"), out)
    assert chunk_bytes <= memory.peak <= allowed


# GiB of memory, bytes a number, rows of Qwen2.5's logits: 4,096, or 1/16 of the memory in whole tiles of 128 rows.
@pytest.mark.parametrize(
    ("gib", "element_size", "rows"),
    [
        (141, 2, 4096),
        (80, 4, 4096),
        (24, 2, 4096),
        (24, 4, 2560),
        (16, 2, 3456),
        (16, 4, 1664),
        (8, 2, 1664),
        (1, 4, 256),
    ],
)
def test_a_gpus_chunk_is_its_stated_size(gib, element_size, rows):
    memory, row = gib << 30, V * element_size
    assert head_chunks.head_chunk_rows(V, element_size, "cuda", memory) == rows
    assert rows == head_chunks.HEAD_CHUNK_MIN_ROWS or rows * row <= memory / 16
    assert rows == 4096 or (rows + 128) * row > memory / 16


def test_a_gpus_rows_of_logits_are_aligned():
    # GPT-2's vocabulary; in 16-bit numbers and 4 GiB, 2,669 rows of 50,272 fit.
    assert head_chunks._pitch(50_257, torch.device("cuda")) == 50_272
    assert head_chunks._pitch(50_257, torch.device("cpu")) == 50_257
    assert head_chunks.head_chunk_rows(50_257, 2, "cuda", 4 << 30) == 2560


@pytest.mark.filterwarnings("error")
def test_head_sketch_with_rows_of_logits_apart(monkeypatch):
    # As on a GPU: the buffer's rows are further apart than V, in chunks whose last one is shorter.
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=generator) for n in (70, 101))
    labels, segments = torch.arange(70), torch.tensor([[0, 30], [30, 70]])
    tables = make_table(0, "hidden", 24, 64), make_table(0, "vocabulary", 101, 64)
    monkeypatch.setattr(head_chunks, "head_chunk_rows", lambda *_: 32)
    found = []
    for pitch in (101, 112):
        monkeypatch.setattr(head_chunks, "_pitch", lambda *_, pitch=pitch: pitch)
        out = torch.zeros(2, 64)
        found.append((*head_chunks.head_sketch(hidden, weight, labels, segments, *tables, out), out))
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart)


def test_a_cpus_chunk_does_not_depend_on_memory():
    assert (
        head_chunks.head_chunk_rows(V, 2, "cpu")
        == head_chunks.head_chunk_rows(V, 4, torch.device("cpu"), 1 << 40)
        == 256
    )
    assert head_chunks.head_chunk_rows(32_000, 4, "cpu") == 524


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; torch sees none")
@pytest.mark.parametrize("dtype", SIZES, ids=str)
def test_head_sketch_on_a_gpu_holds_one_chunk_of_logits(dtype, monkeypatch):
    monkeypatch.setattr(head_chunks, "HEAD_CHUNK_GPU_ROWS", 256)
    args, chosen = inputs(dtype, "cuda"), tables()
    chunk = head_chunks.head_chunk_rows(V, SIZES[dtype], "cuda")
    hidden, weight, labels, segments, out = args
    # The first call compiles kernels, and brings tables and the product's workspace, which stay.
    head_chunks.head_sketch(hidden, weight, labels, segments, *chosen, out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head_chunks.head_sketch(hidden, weight, labels, segments, *chosen, out)
    # Partial sums of the sketch: K numbers for every 16 rows, and the softmax's two for every part of a row.
    allowed = chunk * V * SIZES[dtype] + returned_bytes(dtype) + (T + chunk) * K * 4 + T * K + SMALL
    assert torch.cuda.max_memory_allocated() - before <= allowed
