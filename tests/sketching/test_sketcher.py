"""The fast path against the full autograd gradient, over the architectures people use."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from children import children
from small_models import (
    BOTH_KINDS,
    FP32_RELATIVE,
    SPEC,
    autograd_sketch,
    build,
    pad,
    samples,
    state_of,
)

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients import layer_ops
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher


@BOTH_KINDS
def test_fast_path_equals_sketch_of_autograd_gradient(name, spec):
    model = build(name)
    sketcher = GradientSketcher(model, spec)
    assert sketcher.coverage.sketched == sketcher.coverage.total == sum(p.numel() for p in model.parameters())
    rows = samples()
    got = sketcher.sketch(*pad(rows))
    for i, (ids, labels) in enumerate(rows):
        wanted, loss = autograd_sketch(model, sketcher, ids, labels)
        error = (got.z[i].double() - wanted).norm() / wanted.norm()
        assert error <= FP32_RELATIVE, (name, i, float(error))
        assert float(got.loss[i]) == pytest.approx(loss, rel=1e-5)
        assert int(got.tokens[i]) == int((labels[1:] != -100).sum())


@BOTH_KINDS
def test_sample_alone_padded_or_in_a_batch_gives_the_same_sketch(name, spec):
    model = build(name)
    sketcher = GradientSketcher(model, spec)
    rows = samples()
    batch = sketcher(*pad(rows))
    left = sketcher(*pad(rows, side="left"))
    for i, row in enumerate(rows):
        alone = sketcher(row[0][None], row[1][None])[0]
        padded = sketcher(*pad([row], to=40))[0]
        for other in (batch[i], left[i], padded):
            assert torch.cosine_similarity(alone.double(), other.double(), dim=0) >= 1 - 1e-6


@pytest.mark.parametrize("name", ["qwen2_tied", "gemma2", "gpt2", "opt"])
def test_chunked_head_is_used_where_it_fits(name):
    assert GradientSketcher(build(name), SPEC)._head is not None


def test_biased_head_is_left_to_autograd():
    assert GradientSketcher(build("phi_biased_head"), SPEC)._head is None


def test_padding_idx_row_gets_no_gradient():
    model = build("phi3")
    sketcher = GradientSketcher(model, SPEC)
    ids = torch.tensor([5, 0, 7, 0, 9])
    wanted, _ = autograd_sketch(model, sketcher, ids, ids)
    got = sketcher(ids[None], ids[None])[0].double()
    assert (got - wanted).norm() <= FP32_RELATIVE * wanted.norm()


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was_found(fails):
    model = build("gpt2").train()
    model.transformer.h[1].eval()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    before = state_of(model)
    sketcher = GradientSketcher(model, SPEC)
    batch = pad(samples())
    if fails:
        handle = model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sketcher(*batch)
        handle.remove()
    else:
        sketcher(*batch)
    assert state_of(model) == before
    assert "transformer.h.0.mlp.c_fc.weight" not in sketcher.parameters
    assert sketcher.coverage.sketched < sum(p.numel() for p in model.parameters())


class Hidden(torch.autograd.Function):
    """x * w as no function of torch, which nothing sees."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w.mean()

    @staticmethod
    def backward(ctx, e):
        x, w = ctx.saved_tensors
        return e * w.mean(), (e * x).sum().expand(w.shape) / len(w)


def test_unknown_parameter_is_named_and_can_be_excluded():
    model = build("llama_untied")
    block = model.model.layers[1]
    block.gate = torch.nn.Parameter(torch.ones(4))
    # A parameter that nothing reads would be left out by itself.
    block.register_forward_hook(lambda block, args, out: Hidden.apply(out, block.gate))
    with pytest.raises(GvendiError, match=r"model\.layers\.1\.gate"):
        GradientSketcher(model, SPEC)
    sketcher = GradientSketcher(model, SPEC, exclude=["model.layers.*.gate"])
    assert sketcher.coverage.total - sketcher.coverage.sketched == 4
    assert torch.isfinite(sketcher(*pad(samples()))).all()


@pytest.mark.parametrize("pattern", ["*embed_tokens*", "*norm*", "lm_head.weight", "*q_proj*"])
def test_excluded_parameters_leave_the_sketch(pattern):
    model = build("llama_untied")
    sketcher = GradientSketcher(model, SPEC, exclude=[pattern])
    assert 0 < sketcher.coverage.share < 1
    ids, labels = samples()[0]
    wanted, _ = autograd_sketch(model, sketcher, ids, labels)
    got = sketcher(ids[None], labels[None])[0].double()
    assert (got - wanted).norm() <= FP32_RELATIVE * wanted.norm()


def test_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(GvendiError, match="matches no parameter"):
        GradientSketcher(build("gpt2"), SPEC, exclude=["nothing.*"])


def test_bad_batches_are_refused_by_name():
    sketcher = GradientSketcher(build("gpt2"), SPEC)
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(GvendiError, match=r"labels must have shape"):
        sketcher(ids, ids[:, :2])
    with pytest.raises(GvendiError, match=r"input_ids must lie in 0\.\.60"):
        sketcher(ids + 60, ids)
    with pytest.raises(GvendiError, match=r"labels must be int64"):
        sketcher(ids, ids.float())
    with pytest.raises(GvendiError, match=r"labels\[0\] has no supervised token"):
        sketcher(ids, torch.tensor([[3, -100, -100]]))
    with torch.inference_mode(), pytest.raises(GvendiError, match="inference_mode"):
        sketcher(ids, ids)


def sketch_again(path: str) -> None:
    """In a process of its own, whose layers have other numbers."""
    for i in range(40):
        layer_ops.layer_key(f"other.{i}.weight", None)
    with open(path, "rb") as stream:
        sketcher, batch, wanted = pickle.load(stream)
    got = sketcher(*batch)
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-6


def test_a_pickled_sketcher_is_right_in_a_process_that_numbers_layers_otherwise(tmp_path):
    model = build("qwen2_tied")
    sketcher, batch = GradientSketcher(model, SPEC), pad(samples())
    wanted, path = sketcher(*batch), tmp_path / "sketcher.pickle"
    path.write_bytes(pickle.dumps((sketcher, batch, wanted)))
    # From a server that has sketched nothing; what it raises is on stderr.
    process = children().Process(target=sketch_again, args=(str(path),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(copy.deepcopy(sketcher)(*batch), wanted)


def test_a_forward_that_its_class_is_given_after_the_first_batch_is_the_one_that_runs(monkeypatch):
    model, (ids, labels) = build("llama_untied"), samples()[0]
    sketcher, forward = GradientSketcher(model, SPEC), torch.nn.Embedding.forward
    plain = sketcher(ids[None], labels[None])[0].double()
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, x: forward(self, x) + 1)
    wanted, _ = autograd_sketch(model, sketcher, ids, labels)
    assert (plain - wanted).norm() / wanted.norm() > 0.1
    got = sketcher(ids[None], labels[None])[0].double()
    assert (got - wanted).norm() / wanted.norm() <= FP32_RELATIVE


@pytest.mark.parametrize("name", ["llama_untied", "qwen2_tied"])
def test_weights_that_are_assigned_after_the_first_batch_are_those_of_the_sketch(name):
    model, (ids, labels) = build(name), samples()[0]
    sketcher = GradientSketcher(model, SPEC)
    sketcher(ids[None], labels[None])
    model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()}, assign=True)
    model.tie_weights()
    wanted, _ = autograd_sketch(model, sketcher, ids, labels)
    got = sketcher(ids[None], labels[None])[0].double()
    assert (got - wanted).norm() / wanted.norm() <= FP32_RELATIVE


@pytest.mark.parametrize("count", [1, 2])
def test_threads_that_sketch_one_model_take_turns(count):
    model, batch = build("qwen2_tied").requires_grad_(True), pad(samples())
    before = state_of(model)
    sketchers = [GradientSketcher(model, SPEC), GradientSketcher(model, replace(SPEC, seed=9))][:count]
    wanted = [sketcher(*batch) for sketcher in sketchers]
    runs = 2 * [pair for pair in zip(sketchers, wanted, strict=True) for _ in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda run: torch.equal(run[0](*batch), run[1]), runs))
    finally:
        sys.setswitchinterval(interval)
    assert all(results)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        (None, "input_ids must be a torch.Tensor, got NoneType"),
        ([[1, 2]], "input_ids must be a torch.Tensor, got list"),
        (torch.zeros((0, 4), dtype=torch.int64), r"input_ids is empty, \(0, 4\)"),
        (torch.zeros((2, 0), dtype=torch.int64), r"input_ids is empty, \(2, 0\)"),
        (torch.zeros((2, 4), dtype=torch.int64, device="meta"), "input_ids is on the device 'meta'"),
        (torch.zeros((2, 4), dtype=torch.int64).to_sparse(), "input_ids must be a dense tensor"),
    ],
)
def test_what_is_no_batch_is_refused_by_name(ids, what):
    sketcher = GradientSketcher(build("llama_untied"))
    labels = torch.zeros(ids.shape if isinstance(ids, torch.Tensor) else (1, 2), dtype=torch.int64)
    with pytest.raises(GvendiError, match=what):
        sketcher(ids, labels)
