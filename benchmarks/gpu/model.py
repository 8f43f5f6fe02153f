"""A whole model on a GPU: sketching a batch, where its time goes, and the CPU's sketches beside the GPU's.

The model has the shape of Qwen2.5-0.5B and random weights in bfloat16. "cuda" means CUDA C++ where a kernel is written
in it and Triton elsewhere, "triton" Triton alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.checks import BACKENDS
from benchmarks.gpu.timing import Bench, Figure, NotMeasuredError, Span, quantiles
from benchmarks.shapes import BATCHES, QWEN_05B, SHAPES, Shape, build
from gvendi_fast import GradientSketcher, SketchSpec
from gvendi_fast.kernels import backends, ops
from gvendi_fast.kernels.backends import backend, choose, measured

VERBS = ("fold_hadamard", "linear_sketch", "token_sketch", "vector_sketch", "softmax_fold")
DTYPE = torch.bfloat16
# Tokens of a training step's pieces: the model's own loss holds their logits in float32, a few times over.
PIECE_TOKENS = 8192
PROFILE_ROWS = 25
# Between sketches of one sample on two devices: 1 - cosine.
AGREEMENT = 1e-5
TINY = Shape(
    "one small layer", {**SHAPES["qwen2-15m"].config, "num_hidden_layers": 1, "vocab_size": 512}, 4, 16
)


def figures(section: str, bench: Bench) -> Iterator[Figure]:
    """Sketching with each backend, eager and compiled, and a profile of each; or, of "cpu and gpu", one a shape."""
    if section == "cpu and gpu":
        for name in list(SHAPES)[:1] if bench.dry else SHAPES:
            yield Figure(SHAPES[name].name, lambda n=name: devices_agree(bench, n))
        return
    # The backend that is chosen first where nothing was measured goes first, and what compiles most of all goes last.
    first, *others = BACKENDS[bench.device.type][::-1]
    plan = [("64k", name, "eager", sketching) for name in (first, *others)]
    for batch in ("64k", "10k"):
        plan += [
            (batch, first, kind, what) for kind in ("eager", "compiled") for what in (sketching, profiled)
        ]
    for kind in ("eager", "compiled"):
        plan += [(b, n, kind, what) for n in others for b in ("64k", "10k") for what in (sketching, profiled)]
    for batch, name, kind, what in dict.fromkeys(plan):
        yield Figure(
            f"{batch} {name} {kind}{' profile' if what is profiled else ''}",
            lambda w=what, b=batch, n=name, c=kind == "compiled": w(bench, b, n, c),
            seconds=120 if kind == "compiled" else 90,
        )


def sketching(bench: Bench, batch: str, name: str, compiled: bool) -> dict[str, object]:
    """Sketching a batch beside training on it and beside forward + input gradients, all three in turns."""
    model = random_model(bench)
    before = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
    with prefer(name, bench.device):
        chosen = {op: choose(op, bench.device, DTYPE).name for op in VERBS}
        sketcher = kept_sketcher(bench, name, compiled)
        began = time.perf_counter()
        ids = what_fits(bench, sketcher, random_ids(bench, batch))
        first = time.perf_counter() - began
        if compiled:
            wait_for_compilers()
        peak = peak_bytes(bench, lambda: sketcher(ids, ids))
        step = Step(bench, model, ids)
        calls = {
            "sketch": lambda: sketcher(ids, ids),
            "training": step.train,
            "forward + input gradients": step.inputs_only,
        }
        taken = bench.take_turns(calls, 4 if batch == "64k" else 7)
        found = {
            "model": (TINY if bench.dry else QWEN_05B).name,
            "samples": len(ids),
            "length": ids.shape[1],
            "tokens": ids.numel(),
            "dtype": "bf16",
            "attention": model.config._attn_implementation,
            "kernels": chosen,
            "samples a piece of training": step.piece,
            "first call seconds": round(first, 2),
            "milliseconds": {n: quantiles(times) for n, times in taken.items()},
            "tokens per second": {
                n: quantiles([1e3 * ids.numel() / t for t in ts]) for n, ts in taken.items()
            },
            **{f"speed over {n}": ratios(taken[n], taken["sketch"]) for n in calls if n != "sketch"},
            "host milliseconds": quantiles(host_milliseconds(bench, calls["sketch"])),
            "peak memory bytes": None if peak is None else peak - before,
            "weights bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        }
        if not compiled:
            found |= sketch_work(bench, calls["sketch"], quantiles(taken["forward + input gradients"])["p50"])
    return found


def profiled(bench: Bench, batch: str, name: str, compiled: bool) -> dict[str, object]:
    """Device time of one step by kernel, and what part of it is sketching."""
    on_gpu = bench.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with prefer(name, bench.device):
        sketcher = kept_sketcher(bench, name, compiled)
        ids = what_fits(bench, sketcher, random_ids(bench, batch))
        sketcher(ids, ids)
        bench.wait()
        with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])]) as profile:
            began = time.perf_counter()
            sketcher(ids, ids)
            host = time.perf_counter() - began
            bench.wait()
            whole = time.perf_counter() - began
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    taken: dict[str, list[float]] = {}
    for event in profile.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        # An annotation spans kernels that are counted themselves.
        if event.device_type == device and spent and not getattr(event, "is_user_annotation", False):
            entry = taken.setdefault(event.key, [0, 0.0])
            entry[0], entry[1] = entry[0] + event.count, entry[1] + spent / 1e3
    total = sum(spent for _, spent in taken.values())
    ours = sum(spent for kernel, (_, spent) in taken.items() if is_ours(kernel))
    worst = sorted(taken.items(), key=lambda item: -item[1][1])[:PROFILE_ROWS]
    return {
        "tokens": ids.numel(),
        "device milliseconds": total,
        "wall milliseconds, profiler on": 1e3 * whole,
        "host milliseconds, profiler on": 1e3 * host,
        "launches": sum(count for count, _ in taken.values()),
        "sketch kernels milliseconds": ours,
        "sketch kernels, share of device time": ours / total if total else None,
        # [kernel, launches, milliseconds, share of the device's time]
        "profile": [
            [kernel[:100], count, round(spent, 4), round(spent / total, 4)]
            for kernel, (count, spent) in worst
        ],
    }


def is_ours(kernel: str) -> bool:
    """Whether a kernel of a profile is one of this package's."""
    return "gvendi::" in kernel or kernel in triton_kernels()


@functools.cache
def triton_kernels() -> frozenset[str]:
    """Names of the Triton kernels; none without Triton."""
    if backend("triton").triton is None:
        return frozenset()
    # In the folder of the tests, which gpu_checks made importable.
    from triton_builds import builds

    return frozenset(build.kernel.__name__ for build in builds().values())


class Step:
    """A model's own loss with full backward, or with the gradient of its inputs alone, on a batch in pieces."""

    def __init__(self, bench: Bench, model: torch.nn.Module, ids: torch.Tensor) -> None:
        self.model = model
        self.piece = max(1, min(len(ids), PIECE_TOKENS // ids.shape[1]))
        self.pieces = ids.to(bench.device).split(self.piece)

    def train(self) -> None:
        """Forward and full backward, without an optimizer."""
        self.model.requires_grad_(True)
        for part in self.pieces:
            self.model(input_ids=part, labels=part, use_cache=False).loss.backward()
            self.model.zero_grad(set_to_none=True)

    def inputs_only(self) -> None:
        """Forward and the gradients of all layers' inputs, which any sketch needs."""
        self.model.requires_grad_(False)
        for part in self.pieces:
            embedded = self.model.get_input_embeddings()(part).requires_grad_()
            self.model(inputs_embeds=embedded, labels=part, use_cache=False).loss.backward()


@functools.cache
def random_model(bench: Bench) -> torch.nn.Module:
    """The architecture with random weights, made on the device once."""
    import transformers

    shape = TINY if bench.dry else QWEN_05B
    torch.manual_seed(0)
    with bench.device:
        config = transformers.Qwen2Config(**shape.config, tie_word_embeddings=True)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


def random_ids(bench: Bench, batch: str) -> torch.Tensor:
    """Token ids int64 [samples, length] of one of BATCHES, on the CPU, as the corpus gives them."""
    samples, length = (TINY.batch, TINY.length) if bench.dry else BATCHES[batch]
    vocabulary = random_model(bench).config.vocab_size
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))


@functools.cache
def kept_sketcher(bench: Bench, name: str, compiled: bool) -> GradientSketcher:
    """One for each backend: what was compiled serves all figures of a process."""
    return make_sketcher(random_model(bench), compiled)


def make_sketcher(model: torch.nn.Module, compiled: bool) -> GradientSketcher:
    """A sketcher whose pass over the model is compiled, or is not."""
    if "compile" not in inspect.signature(GradientSketcher).parameters:
        if compiled:
            raise NotMeasuredError("this version's GradientSketcher has no `compile`")
        return GradientSketcher(model, SketchSpec())
    return GradientSketcher(model, SketchSpec(), compile=compiled)


@contextlib.contextmanager
def prefer(name: str, device: torch.device) -> Iterator[None]:
    """A backend first, for every operation that it has, whatever was measured before."""
    if device.type == "cuda":
        probe = torch.empty(1, 64, dtype=DTYPE, device=device)
        if reason := backend(name).why_not("linear_sketch", probe):
            raise NotMeasuredError(reason)
    names = {"cuda": ("cuda", "triton", "reference")}.get(name, (name, "reference"))
    before = backends.order
    backends.order = lambda op, device: measured.Ranking(names)
    try:
        yield
    finally:
        backends.order = before


def wait_for_compilers() -> None:
    """Until Inductor's processes for compiling are up, if it has any.

    They start behind the first compiled call, and on an H200's machine the calls of the seconds until then took 650 ms
    in place of 375: a process that finds everything compiled would measure nothing else.
    """
    from torch._inductor import async_compile

    wait = getattr(async_compile.AsyncCompile, "wait_pool_ready", None)
    if wait is not None:
        wait()


def what_fits(bench: Bench, sketcher: GradientSketcher, ids: torch.Tensor) -> torch.Tensor:
    """The batch, or the half, quarter, ... of it that the device's memory takes; it has then been sketched once."""
    while True:
        try:
            sketcher(ids, ids)
            bench.wait()
        except torch.OutOfMemoryError:
            if len(ids) == 1:
                raise
        else:
            return ids
        # Outside the except clause, so that the failed batch's tensors are free.
        torch.cuda.empty_cache()
        ids = ids[: len(ids) // 2]


def ratios(times: list[float], of: list[float]) -> dict[str, float]:
    """Quantiles of the rounds' ratios: how many times as long something took in the same round."""
    return quantiles([a / b for a, b in zip(times, of, strict=True)])


def host_milliseconds(bench: Bench, call: Callable[[], object]) -> list[float]:
    """How long a call takes to return, with nothing queued before it."""
    found = []
    for _ in range(2 if bench.dry else 5):
        bench.wait()
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    bench.wait()
    return found


def sketch_work(bench: Bench, call: Callable[[], object], bare: float) -> dict[str, object]:
    """Milliseconds of all sketch operations inside real runs, over `bare` milliseconds, and of each operation."""
    totals, each = [], {name: [] for name in VERBS}
    for _ in range(2 if bench.dry else 4):
        with spans_of(bench.device) as spans:
            call()
        spent = {name: sum(span.milliseconds() for span in found) for name, found in spans.items()}
        totals.append(sum(spent.values()))
        for name, value in spent.items():
            each[name].append(value)
    if not any(totals):
        return {"sketch work": "no operation was seen"}
    return {
        "sketch work milliseconds": quantiles(totals),
        "sketch work by operation milliseconds": {n: quantiles(v)["p50"] for n, v in each.items()},
        "sketch work over forward + input gradients": quantiles([t / bare for t in totals]),
    }


@contextlib.contextmanager
def spans_of(device: torch.device) -> Iterator[dict[str, list[Span]]]:
    """{operation: the span of every call} of the block; no operation of VERBS calls another."""
    spans: dict[str, list[Span]] = {name: [] for name in VERBS}
    originals = {name: getattr(ops, name) for name in VERBS}

    def timed(name: str) -> Callable:
        def call(*args, **kwargs):
            with Span(device) as span:
                result = originals[name](*args, **kwargs)
            spans[name].append(span)
            return result

        return call

    for name in VERBS:
        setattr(ops, name, timed(name))
    try:
        yield spans
    finally:
        for name, original in originals.items():
            setattr(ops, name, original)


def peak_bytes(bench: Bench, call: Callable[[], object]) -> int | None:
    """Largest sum of allocated tensors while `call` runs, what lived before included; None on a CPU."""
    if bench.device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def devices_agree(bench: Bench, name: str) -> dict[str, object]:
    """Largest 1 - cosine between a sample's sketch on the CPU and on the device, float32 weights."""
    if bench.dry:
        model, ids = copy.deepcopy(random_model(bench)).cpu().float(), random_ids(bench, "10k")
    else:
        model, ids = build(name, torch.float32)
    on_cpu = GradientSketcher(model, SketchSpec())(ids, ids).double()
    there = GradientSketcher(model.to(bench.device), SketchSpec())(ids, ids).cpu().double()
    unit = [torch.nn.functional.normalize(z, dim=1) for z in (on_cpu, there)]
    # 1 - cosine = |u - v|^2 / 2 without cancellation.
    apart = float(((unit[0] - unit[1]).square().sum(dim=1) / 2).max())
    return {
        "samples": len(ids),
        "largest 1 - cosine": apart,
        "CPU backend": choose("linear_sketch", torch.device("cpu"), torch.float32).name,
        "check": "passed" if apart <= AGREEMENT else f"failed: 1 - cosine is {apart:.1e}",
    }
