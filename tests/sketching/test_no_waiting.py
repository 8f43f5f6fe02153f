"""Nothing waits for the GPU: once a batch is prepared on the CPU, no value of a device tensor is read.

A model on the meta device has shapes and no values, so whatever would make Python wait for a GPU (a truth value, an
integer, a mask as an index, nonzero, a copy to the CPU) raises there.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from small_models import CONFIGS, DENSE, SPEC, build, pad, samples

from gvendi_fast.base.transfer import fetch, to_device
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.backends.triton import runtime
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.batch import prepare
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; torch sees none")


@pytest.fixture
def no_values(monkeypatch):
    """The sketch operations without kernels, which need values; the reads of values that are transformers' own."""
    kernels = SimpleNamespace(
        **{
            name: lambda *_: None
            for name in (
                "fold_hadamard",
                "linear_sketch",
                "expert_sketch",
                "token_sketch",
                "vector_sketch",
                "softmax_fold",
                "dense_sketch",
            )
        }
    )
    monkeypatch.setattr(ops, "resolve", lambda op, *tensors: kernels)
    # transformers looks once a forward pass whether position ids are those of packed sequences.
    monkeypatch.setattr(
        transformers.masking_utils, "find_packed_sequence_indices", lambda _: None, raising=False
    )


def on_meta(model: torch.nn.Module, spec: SketchSpec) -> GradientSketcher:
    """A sketcher made where there are values, since it looks at norms and logits once, then left without them."""
    sketcher = GradientSketcher(model, spec)
    model.to("meta")
    return sketcher


def test_meta_tensors_refuse_what_would_wait():
    x = torch.ones(3, device="meta")
    reads = [
        lambda: bool(x.any()),
        lambda: int(x.sum()),
        lambda: x.tolist(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        x.cpu,
    ]
    for read in reads:
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.parametrize(
    ("name", "spec"),
    [*((name, SPEC) for name in CONFIGS), ("gpt2", DENSE), ("gemma2", DENSE), ("phi_biased_head", DENSE)],
    ids=lambda value: getattr(value, "kind", value),
)
def test_sketching_reads_no_value_of_a_device_tensor(name, spec, no_values):
    sketcher = on_meta(build(name), spec)
    got = sketcher.sketch(*pad(samples()))
    assert {x.device.type for x in (got.z, got.loss, got.tokens)} == {"meta"}
    assert got.z.shape == (5, spec.dim)
    assert got.loss.shape == got.tokens.shape == (5,)


def test_a_read_inside_the_model_is_seen(no_values):
    sketcher = on_meta(build("qwen2_tied"), SPEC)
    norm = sketcher.model.model.norm
    norm.register_forward_hook(lambda module, args, out: out if out.isfinite().all() else None)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        sketcher.sketch(*pad(samples()))


def test_prepared_batch_by_hand():
    ids = torch.tensor([[0, 5, 6, 7], [8, 9, 4, 0]])
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, 4, -100]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    batch = prepare(ids, labels, mask, 10)
    # The first sample's first token follows padding only, so nothing predicts it.
    assert batch.targets.tolist() == [[-100, 6, 7, -100], [-100, 4, -100, -100]]
    assert batch.rows.tolist() == [1, 2, 5]
    assert batch.labels.tolist() == [6, 7, 4]
    assert batch.tokens.tolist() == [2, 1]
    assert batch.target_segments.tolist() == [[0, 2], [2, 3]]
    assert batch.segments.tolist() == [[1, 3], [4, 6]]
    assert batch.positions.tolist() == [[0, 0, 1, 2], [0, 1, 2, 2]]
    assert batch.mask is mask
    assert prepare(ids[1:], labels[1:], mask[1:], 10).mask is None


class Traced:
    """Stands for a CPU tensor and notes how it is copied."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def pin_memory(self):
        self.calls.append(("pin_memory",))
        return self

    def to(self, device, non_blocking=False):
        self.calls.append(("to", device, non_blocking))
        return self


def test_a_copy_to_a_gpu_goes_from_pinned_memory_and_does_not_wait():
    traced, gpu = Traced(), torch.device("cuda", 0)
    assert to_device(traced, gpu) is traced
    assert traced.calls == [("pin_memory",), ("to", gpu, True)]


def test_chunk_lists_are_copied_once_a_stream(monkeypatch):
    copied = []
    monkeypatch.setattr(runtime, "to_device", lambda x, device: copied.append(len(x)) or x)
    runtime._chunks.cache_clear()
    segments, device = torch.tensor([[0, 20], [20, 25]]), torch.device("cpu")
    first = runtime.chunks_of(segments, device)
    assert runtime.chunks_of(segments.clone(), device) is first
    assert copied == [3, 3]
    assert runtime._chunks(segments.numpy().tobytes(), device, 7) is not first
    runtime._chunks.cache_clear()


def test_fetch_hands_on_what_is_on_the_cpu():
    x, y = torch.arange(3), torch.ones(2)
    fetched = fetch(x, y)
    assert fetched.arrived is None
    assert [a is b for a, b in zip(fetched.wait(), (x, y), strict=True)] == [True, True]


@NEEDS_GPU
def test_fetch_from_a_gpu_brings_the_values():
    x = torch.arange(1 << 20, device="cuda")
    (got,) = fetch(x * 2).wait()
    assert got.is_pinned()
    assert torch.equal(got, x.cpu() * 2)


@NEEDS_GPU
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["qwen2_tied", "gpt2", "llama_wide"])
def test_sketching_on_a_gpu_does_not_wait(name, monkeypatch):
    monkeypatch.setattr(
        transformers.masking_utils, "find_packed_sequence_indices", lambda _: None, raising=False
    )
    sketcher, batch = GradientSketcher(build(name).cuda(), SPEC), pad(samples())
    # The first batch compiles kernels and copies tables, which stay; lists of chunks belong to a batch.
    expected = sketcher(*batch)
    runtime._chunks.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fetched = fetch(sketcher(*batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(fetched.wait()[0], expected.cpu(), rtol=1e-3, atol=1e-5)
