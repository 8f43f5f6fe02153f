"""A whole model on a GPU: sketching a batch beside training on it, and the CPU's sketches beside the GPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from gpu_checks import verdict
from gpu_timing import Bench, Span, quantiles
from shapes import QWEN_05B, SHAPES, Shape, build

from gvendi_fast import GradientSketcher, SketchSpec, ops
from gvendi_fast.backends import choose

VERBS = ("fold_hadamard", "linear_sketch", "token_sketch", "vector_sketch", "softmax_fold")
DTYPE = torch.bfloat16
# Smallest piece that a training step takes the batch in, and the share of the memory that a larger one, or the whole
# batch of the sketch, may take.
LEAST_PIECE, MEMORY_SHARE = 8, 0.9
TINY = Shape(
    "one small layer", {**SHAPES["qwen2-15m"].config, "num_hidden_layers": 1, "vocab_size": 512}, 4, 16
)


class Step:
    """A model's own loss with full backward, or with the gradient of its inputs alone, on a batch in pieces."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, piece: int) -> None:
        self.model, self.piece = model, piece
        self.pieces = ids.to(model.device).split(piece)

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


def end_to_end(bench: Bench, checked: dict[str, dict]) -> dict[str, object]:
    """Sketching a batch of 64 k tokens beside plain training and beside forward + input gradients on the same batch."""
    chosen = {op: choose(op, bench.device, DTYPE).name for op in VERBS}
    for op, name in chosen.items():
        if name in checked and (reason := verdict(checked[name], op, "bf16")):
            return {"not measured": f"{op} on {name}: {reason}"}
    shape = TINY if bench.dry else QWEN_05B
    before = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
    model = random_model(shape, bench.device)
    # On the CPU, as the corpus gives batches.
    ids = torch.randint(0, shape.config["vocab_size"], (shape.batch, shape.length))
    sketcher = GradientSketcher(model, SketchSpec())
    ids = ids[: samples_that_fit(bench, sketcher, ids)]
    peak = peak_bytes(bench, lambda: sketcher(ids, ids))
    step, pieces = fastest_step(bench, model, ids)
    calls = {
        "sketch": lambda: sketcher(ids, ids),
        "training": step.train,
        "forward + input gradients": step.inputs_only,
    }
    taken = bench.take_turns(calls, 9)
    turns = range(len(taken["sketch"]))
    work, by_operation = sketch_work(bench, sketcher, ids)
    bare = taken["forward + input gradients"]
    return {
        "model": shape.name,
        "samples": len(ids),
        "length": shape.length,
        "tokens": ids.numel(),
        "dtype": "bf16",
        "attention": model.config._attn_implementation,
        "backends": chosen,
        "samples a piece of training": step.piece,
        "training milliseconds by piece": pieces,
        "milliseconds": {name: quantiles(times) for name, times in taken.items()},
        "tokens per second": {n: quantiles([1e3 * ids.numel() / t for t in ts]) for n, ts in taken.items()},
        "speed over training": quantiles([taken["training"][i] / taken["sketch"][i] for i in turns]),
        "speed over forward + input gradients": quantiles([bare[i] / taken["sketch"][i] for i in turns]),
        "sketch work milliseconds": quantiles(work),
        "sketch work by operation milliseconds": by_operation,
        "sketch work over forward + input gradients": quantiles([t / quantiles(bare)["p50"] for t in work]),
        "peak memory bytes": None if peak is None else peak - before,
        "weights bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def random_model(shape: Shape, device: torch.device) -> torch.nn.Module:
    """The architecture with random weights, made on the device."""
    import transformers

    torch.manual_seed(0)
    with device:
        config = transformers.Qwen2Config(**shape.config, tie_word_embeddings=True)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


def samples_that_fit(bench: Bench, sketcher: GradientSketcher, ids: torch.Tensor) -> int:
    """The batch, or a half, quarter, ... of it that by a small one's peak takes at most MEMORY_SHARE of the memory."""
    few, count, memory = ids[: 2 * LEAST_PIECE], len(ids), total_memory(bench)
    if memory is None:
        return count
    # The first run also makes what stays, such as tables.
    sketcher(few, few)
    before = torch.cuda.memory_allocated()
    taken = peak_bytes(bench, lambda: sketcher(few, few)) - before
    while count > len(few) and before + taken * count / len(few) > MEMORY_SHARE * memory:
        count //= 2
    return count


def fastest_step(bench: Bench, model: torch.nn.Module, ids: torch.Tensor) -> tuple[Step, dict[str, float]]:
    """Training in the pieces that make it fastest, and the median milliseconds for each size of piece.

    The model's own loss holds all logits in float32, so that a whole batch may not fit; a piece of twice the size is
    tried where, by the peak of the one before, it takes at most MEMORY_SHARE of the memory.
    """
    tried: dict[int, float] = {}
    piece = min(LEAST_PIECE, len(ids))
    memory = total_memory(bench)
    while True:
        step = Step(model, ids, piece)
        peak = peak_bytes(bench, step.train)
        tried[piece] = quantiles(bench.take_turns({"training": step.train}, 3)["training"])["p50"]
        if 2 * piece > len(ids) or memory is None or 2 * peak > MEMORY_SHARE * memory:
            break
        piece *= 2
    best = min(tried, key=tried.__getitem__)
    return Step(model, ids, best), {str(size): time for size, time in tried.items()}


def sketch_work(
    bench: Bench, sketcher: GradientSketcher, ids: torch.Tensor
) -> tuple[list[float], dict[str, float]]:
    """Milliseconds of all sketch operations inside real runs, and the median of each operation."""
    totals, each = [], {name: [] for name in VERBS}
    for turn in range(-1, 2 if bench.dry else 7):
        with spans_of(bench.device) as spans:
            sketcher(ids, ids)
        spent = {name: sum(span.milliseconds() for span in found) for name, found in spans.items()}
        if turn >= 0:
            totals.append(sum(spent.values()))
            for name, value in spent.items():
                each[name].append(value)
    return totals, {name: quantiles(values)["p50"] for name, values in each.items()}


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


def total_memory(bench: Bench) -> int | None:
    """Bytes of the GPU; None on a CPU."""
    if bench.device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(bench.device).total_memory


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


def devices_agree(bench: Bench) -> dict[str, object]:
    """{shape: largest 1 - cosine between a sample's sketch on the CPU and on the device}, float32 weights."""
    found: dict[str, object] = {}
    for name in SHAPES if not bench.dry else list(SHAPES)[:1]:
        model, ids = build(name, torch.float32)
        ids = ids[:2, :32] if bench.dry else ids
        on_cpu = GradientSketcher(model, SketchSpec())(ids, ids).double()
        there = GradientSketcher(model.to(bench.device), SketchSpec())(ids, ids).cpu().double()
        unit = [torch.nn.functional.normalize(z, dim=1) for z in (on_cpu, there)]
        # 1 - cosine = |u - v|^2 / 2 without cancellation.
        apart = (unit[0] - unit[1]).square().sum(dim=1) / 2
        found[SHAPES[name].name] = {
            "samples": len(ids),
            "largest 1 - cosine": float(apart.max()),
            "CPU backend": choose("linear_sketch", torch.device("cpu"), torch.float32).name,
        }
    return found
