"""Sketching a batch against training on it: ratios of runs that take turns in one process.

    pytest benchmarks/speed/bench_sketching.py --benchmark-json=out.json

Every round times, one after the other: a plain training step (forward + full backward), the bare forward + input
gradients that any sketch needs, and the sketch. `extra_info` holds the quantiles of the rounds' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks.shapes import SHAPES, build
from gvendi_fast import GradientSketcher, SketchSpec
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.backends import resolve
from gvendi_fast.kernels.sketch_matrix import column_table, row_table

ROUNDS, WARM_UP = 9, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def take_turns(benchmark, target: Callable, others: dict[str, Callable]) -> None:
    """Time `target` by pytest-benchmark and, in the same rounds, the others; keep the ratios to each of them."""
    for call in [target, *others.values()] * WARM_UP:
        call()
    times: dict[str, list[float]] = {name: [] for name in others}
    own: list[float] = []

    def setup():
        for name, call in others.items():
            times[name].append(seconds(call))

    benchmark.pedantic(lambda: own.append(seconds(target)), setup=setup, rounds=ROUNDS, iterations=1)
    for name, taken in times.items():
        benchmark.extra_info[f"ratio to {name}"] = quantiles([a / b for a, b in zip(own, taken, strict=True)])
        benchmark.extra_info[f"seconds {name}"] = quantiles(taken)
    benchmark.extra_info["seconds"] = quantiles(own)
    benchmark.extra_info["backend"] = resolve("fold_hadamard", torch.zeros(1, 64)).__name__
    benchmark.extra_info["threads"] = torch.get_num_threads()


def training_step(model, ids):
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def bare_input_gradients(model, ids):
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()


class CountSketchPeer:
    """What one does without this package: batch-1 autograd, then CountSketch of the materialised gradient."""

    def __init__(self, model, dim: int = 1024):
        self.model, self.dim = model, dim
        size = sum(p.numel() for p in model.parameters())
        generator = torch.Generator().manual_seed(0)
        self.bucket = torch.randint(0, dim, (size,), generator=generator)
        self.sign = torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).to(torch.int8)

    def __call__(self, ids):
        self.model.requires_grad_(True)
        out = torch.zeros(len(ids), self.dim)
        for row, sample in enumerate(ids):
            self.model(input_ids=sample[None], labels=sample[None], use_cache=False).loss.backward()
            start = 0
            for parameter in self.model.parameters():
                part = slice(start, start + parameter.numel())
                out[row].index_add_(
                    0, self.bucket[part], parameter.grad.reshape(-1).float() * self.sign[part]
                )
                start = part.stop
            self.model.zero_grad(set_to_none=True)
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sketching_against_training(benchmark, shape, dtype):
    model, ids = build(shape, DTYPES[dtype])
    model.requires_grad_(True)
    sketcher = GradientSketcher(model, SketchSpec())
    benchmark.extra_info.update(shape=shape, dtype=dtype, batch=ids.shape[0], length=ids.shape[1])
    take_turns(
        benchmark,
        lambda: sketcher(ids, ids),
        {
            "training step": lambda: training_step(model, ids),
            "bare forward + input gradients": lambda: bare_input_gradients(model, ids),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_sketching_against_eager(benchmark, shape, dtype):
    """The compiled pass beside the eager one and a training step; what the compiler took stands beside it."""
    model, ids = build(shape, DTYPES[dtype])
    model.requires_grad_(True)
    eager, compiled = (GradientSketcher(model, SketchSpec(), compile=on) for on in (False, True))
    benchmark.extra_info.update(shape=shape, dtype=dtype, batch=ids.shape[0], length=ids.shape[1])
    benchmark.extra_info["seconds of the compiler"] = seconds(lambda: compiled(ids, ids))
    # A fast wrong sketch is none.
    cosine = torch.cosine_similarity(compiled(ids, ids).double(), eager(ids, ids).double()).min()
    benchmark.extra_info["smallest cosine to the eager sketch"] = float(cosine)
    assert cosine > (1 - 1e-6 if dtype == "fp32" else 0.99)
    take_turns(
        benchmark,
        lambda: compiled(ids, ids),
        {"eager sketch": lambda: eager(ids, ids), "training step": lambda: training_step(model, ids)},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sketching_against_batch_1_autograd_and_countsketch(benchmark, shape, dtype):
    model, ids = build(shape, DTYPES[dtype])
    sketcher, peer = GradientSketcher(model, SketchSpec()), CountSketchPeer(model)
    benchmark.extra_info.update(shape=shape, dtype=dtype, batch=ids.shape[0], length=ids.shape[1])
    take_turns(benchmark, lambda: sketcher(ids, ids), {"batch-1 autograd + CountSketch": lambda: peer(ids)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sketch_work_of_one_batch(benchmark, shape, dtype):
    """Every sketch operation of a batch and nothing else, against the bare forward + input gradients.

    Takes the operations' own time inside a real run, so that caches are as they are there.
    """
    model, ids = build(shape, DTYPES[dtype])
    sketcher = GradientSketcher(model, SketchSpec())
    benchmark.extra_info.update(shape=shape, dtype=dtype, batch=ids.shape[0], length=ids.shape[1])
    verbs = ("fold_hadamard", "linear_sketch", "token_sketch", "vector_sketch", "softmax_fold")
    spent = dict.fromkeys(verbs, 0.0)
    shares: list[float] = []
    originals = {name: getattr(ops, name) for name in verbs}
    depth = 0

    def timed(name):
        def call(*args, **kwargs):
            nonlocal depth
            depth += 1
            start = time.perf_counter()
            try:
                return originals[name](*args, **kwargs)
            finally:
                depth -= 1
                spent[name] += (time.perf_counter() - start) if depth == 0 else 0.0

        return call

    def run():
        bare = seconds(lambda: bare_input_gradients(model, ids))
        spent.update(dict.fromkeys(verbs, 0.0))
        sketcher(ids, ids)
        shares.append(sum(spent.values()) / bare)
        rounds.append({name: value / bare for name, value in spent.items()})

    rounds: list[dict[str, float]] = []
    for name in verbs:
        setattr(ops, name, timed(name))
    try:
        for _ in range(WARM_UP):
            run()
        shares.clear()
        rounds.clear()
        benchmark.pedantic(run, rounds=ROUNDS, iterations=1)
    finally:
        for name in verbs:
            setattr(ops, name, originals[name])
    benchmark.extra_info["sketch work over bare forward + input gradients"] = quantiles(shares)
    benchmark.extra_info["by operation"] = {
        name: float(np.median([r[name] for r in rounds])) for name in verbs if any(r[name] for r in rounds)
    }
    benchmark.extra_info["threads"] = torch.get_num_threads()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width_in", "width_out"), [(2048, 288, 768), (2048, 896, 4864)])
def test_linear_sketch_against_a_copy_of_its_inputs(benchmark, rows, width_in, width_out, dtype):
    a, e = (torch.randn(rows, width).to(DTYPES[dtype]) for width in (width_in, width_out))
    spec = SketchSpec()
    columns, table = column_table(spec, "m.l.weight", width_in), row_table(spec, "m.l.weight", width_out)
    segments = torch.arange(0, rows + 1, 256).unfold(0, 2, 1).contiguous()
    out = torch.zeros(len(segments), spec.dim)
    benchmark.extra_info.update(dtype=dtype, rows=rows, width_in=width_in, width_out=width_out)
    take_turns(
        benchmark,
        lambda: ops.linear_sketch(a, columns, [(e, table)], segments, out),
        {"copy of its inputs": lambda: (a.clone(), e.clone())},
    )
