"""What sketching a batch is compared with: each yardstick takes turns with the sketch in one process.

Training is forward and full backward without an optimizer, on random ids, in pieces of the batch: eager and compiled,
with the model's own loss, which holds all logits in float32, and with one that goes through them in chunks. Forward
and input gradients is what any sketch needs. The others give per-sample gradients without this package. A figure's
"speed over it" is the yardstick's time over the sketch's in the same round: above 1 the sketch is faster.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.corpora.token_ids import load_samples
from benchmarks.gpu.checks import BACKENDS
from benchmarks.gpu.model import (
    Step,
    make_sketcher,
    prefer,
    random_ids,
    random_model,
    ratios,
    wait_for_compilers,
    what_fits,
)
from benchmarks.gpu.timing import Bench, Figure, NotMeasuredError, Span, quantiles
from benchmarks.shapes import TIMED_DIM
from gvendi_fast import GradientSketcher
from gvendi_fast.base.transfer import fetch
from gvendi_fast.kernels import ops
from gvendi_fast.kernels.backends import backend
from gvendi_fast.sketching.batch_memory import choose_batch_tokens, sketch_batch
from gvendi_fast.sketching.gradients.head_chunks import head_chunk_rows
from gvendi_fast.sketching.proxy.encode import Sample, batches, collate
from gvendi_fast.sketching.unit_worker import ROWS_TOGETHER

# Samples of what goes through them one by one, or holds a gradient of the model for each.
FEW = 2
# Of a real corpus: every one has batches of all lengths.
ROUNDS = 4


@dataclass(frozen=True)
class Yardstick:
    """A call, what its time is multiplied with to stand for the whole batch, and a note on what it is."""

    call: Callable[[], object]
    note: str
    scale: float = 1.0


def figures(section: str, bench: Bench) -> Iterator[Figure]:
    """Those of a step at three sizes of the batch, and the slow ones at one."""
    makers = {
        "training, eager": lambda m, i: training(bench, m, i, compiled=False),
        "training, compiled": lambda m, i: training(bench, m, i, compiled=True),
        "forward + input gradients": lambda m, i: Yardstick(
            Step(bench, m, i).inputs_only, "the model's own head and loss"
        ),
        "Kronecker projections": kronecker,
        "training, eager, chunked loss": lambda m, i: chunked(m, i, compiled=False),
        "training, compiled, chunked loss": lambda m, i: chunked(m, i, compiled=True),
        "forward + input gradients, our head": our_head,
        "batch-1 autograd + CountSketch": one_by_one,
        "vmap + CountSketch": by_vmap,
        "bergson": bergson,
    }
    slow = ("batch-1 autograd + CountSketch", "vmap + CountSketch", "bergson")

    def figure(batch: str, name: str) -> Figure:
        # What compiles takes its time.
        limit = 150 if "compiled" in name else 60
        return Figure(f"{batch} {name}", lambda: compare(bench, batch, makers[name]), limit)

    # One shape of a piece serves all sizes; its compilation is the longest of all and comes last.
    last = "training, compiled, chunked loss"
    for batch in ("64k",) if bench.dry else ("64k", "8k", "16k"):
        yield from (figure(batch, name) for name in makers if name not in (last, *slow))
        if batch == "64k":
            yield Figure("real corpus", lambda: real_corpus(bench))
            yield from (figure(batch, name) for name in slow)
    yield from (figure(batch, last) for batch in (("64k",) if bench.dry else ("64k", "8k", "16k")))


def compare(
    bench: Bench, batch: str, make: Callable[[torch.nn.Module, torch.Tensor], Yardstick]
) -> dict[str, object]:
    """Times of the sketch and of a yardstick in turns, and how many times as long the yardstick takes."""
    model, (sketcher, kind) = random_model(bench), best_sketcher(bench)
    with prefer(first_backend(bench), bench.device):
        ids = what_fits(bench, sketcher, random_ids(bench, batch))
        if kind == "compiled":
            wait_for_compilers()
        yardstick = make(model, ids)
        calls = {"sketch": lambda: sketcher(ids, ids), "yardstick": yardstick.call}
        taken = bench.take_turns(calls, 4 if batch == "64k" else 7)
    taken["yardstick"] = [time * yardstick.scale for time in taken["yardstick"]]
    return {
        "tokens": ids.numel(),
        "length": ids.shape[1],
        "sketch": kind,
        "note": yardstick.note,
        "milliseconds": {name: quantiles(times) for name, times in taken.items()},
        "tokens per second": {
            name: quantiles([1e3 * ids.numel() / t for t in times]) for name, times in taken.items()
        },
        "speed over it": ratios(taken["yardstick"], taken["sketch"]),
    }


def first_backend(bench: Bench) -> str:
    """CUDA C++ where it is built, else the other of the device's backends."""
    names = BACKENDS[bench.device.type][::-1]
    probe = torch.empty(1, 64, device=bench.device)
    return next((n for n in names if backend(n).why_not("linear_sketch", probe) is None), names[-1])


@functools.cache
def best_sketcher(bench: Bench) -> tuple[GradientSketcher, str]:
    """The sketcher whose compiled pass the end-to-end section measured, or else the eager one; and which it is."""
    name = first_backend(bench)
    measured = [bench.measured("end to end", f"{size} {name} compiled") for size in ("64k", "10k")]
    compiled = any(found is not None for found in measured)
    with prefer(name, bench.device):
        return make_sketcher(random_model(bench), compiled), "compiled" if compiled else "eager"


def training(bench: Bench, model: torch.nn.Module, ids: torch.Tensor, compiled: bool) -> Yardstick:
    """The model's own loss and full backward."""
    step = Step(bench, model, ids)
    if compiled:
        step.model = compiled_once(model)
    return Yardstick(step.train, f"the model's own loss, pieces of {step.piece} samples")


@functools.cache
def compiled_once(module: torch.nn.Module) -> torch.nn.Module:
    """One compiled form for every size of a batch: pieces have one shape."""
    return torch.compile(module, dynamic=False)


def chunked(model: torch.nn.Module, ids: torch.Tensor, compiled: bool) -> Yardstick:
    """Full backward with a loss that never holds all logits."""
    base = compiled_once(model.model) if compiled else model.model
    loss, note = fused_loss()
    pieces = ids.to(model.device).split(max(1, min(len(ids), 16384 // ids.shape[1])))

    def call() -> None:
        model.requires_grad_(True)
        for part in pieces:
            hidden = base(input_ids=part, use_cache=False).last_hidden_state
            flat = hidden[:, :-1].flatten(0, 1)
            loss(model.lm_head.weight, flat, part[:, 1:].flatten()).backward()
            model.zero_grad(set_to_none=True)

    return Yardstick(call, f"{note}, pieces of {len(pieces[0])} samples")


def fused_loss() -> tuple[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], str]:
    """(weight, hidden, labels) -> loss without all logits: Liger's where it is installed, else a few lines of torch."""
    if torch.cuda.is_available():
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            pass
        else:
            return LigerFusedLinearCrossEntropyLoss(), f"loss of Liger {metadata.version('liger-kernel')}"
    return ChunkedCrossEntropy.apply, f"loss in chunks of {ChunkedCrossEntropy.ROWS} rows, plain torch"


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden [T, d] under weight [V, d], its gradients made with it, chunk by chunk."""

    ROWS = 2048

    @staticmethod
    def forward(ctx, weight: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        losses = []
        for rows, target, out in zip(
            *(x.split(ChunkedCrossEntropy.ROWS) for x in (hidden, labels, by_hidden)), strict=True
        ):
            log_p = torch.log_softmax((rows @ weight.T).float(), dim=1)
            losses.append(-log_p.gather(1, target[:, None]).sum())
            p = log_p.exp_()
            p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
            p = (p / len(labels)).to(weight.dtype)
            torch.mm(p, weight, out=out)
            by_weight += p.T @ rows
        ctx.save_for_backward(by_weight.to(weight.dtype), by_hidden)
        return torch.stack(losses).sum() / len(labels)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        by_weight, by_hidden = ctx.saved_tensors
        return grad * by_weight, grad * by_hidden, None


def input_gradients(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Forward + input gradients with this package's head: chunks of logits that become their gradient in place."""
    model.requires_grad_(False)
    weight = model.lm_head.weight
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    flat, labels = hidden.detach()[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    gradient = torch.empty_like(flat)
    step = head_chunk_rows(len(weight), weight.element_size(), weight.device.type)
    for begin in range(0, len(flat), step):
        part = slice(begin, begin + step)
        logits = flat[part] @ weight.T
        ops.softmax_fold(logits, labels[part], None)
        torch.mm(logits, weight, out=gradient[part])
    whole = torch.zeros_like(hidden)
    whole[:, :-1] = gradient.view(len(ids), -1, gradient.shape[1])
    hidden.backward(whole)


def our_head(model: torch.nn.Module, ids: torch.Tensor) -> Yardstick:
    """What is left of sketching when every sketch is left out."""
    there = ids.to(model.device)
    return Yardstick(lambda: input_gradients(model, there), "this package's head, the batch in one piece")


def kronecker(model: torch.nn.Module, ids: torch.Tensor) -> Yardstick:
    """Random projections of a layer's input and of its output's gradient to sqrt(K) each, and their product.

    (P_e e)^T (P_a a) summed over a sample's tokens has K numbers; layers are added up, each with projections of its
    own. The linear layers of the blocks alone, as bergson and LoGra take them; head, embedding and norms are left out.
    """
    side = math.isqrt(TIMED_DIM)
    there = ids.to(model.device)
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    projections = [
        tuple(
            torch.randn(width, side, device=there.device, dtype=m.weight.dtype)
            for width in (m.in_features, m.out_features)
        )
        for m in layers
    ]

    def hook(of_input: torch.Tensor, of_output: torch.Tensor, out: torch.Tensor) -> Callable:
        def forward(module, inputs, output) -> None:
            a = inputs[0].detach() @ of_input

            def backward(e: torch.Tensor) -> None:
                out.add_(((e @ of_output).mT @ a).flatten(1))

            output.register_hook(backward)

        return forward

    def call() -> torch.Tensor:
        out = torch.zeros(len(there), side * side, device=there.device)
        handles = [
            layer.register_forward_hook(hook(*pair, out))
            for layer, pair in zip(layers, projections, strict=True)
        ]
        try:
            input_gradients(model, there)
        finally:
            for handle in handles:
                handle.remove()
        return out

    return Yardstick(call, f"{side} x {side} numbers summed over {len(layers)} layers, this package's head")


class CountSketch:
    """A whole gradient to K numbers, by one random bin and sign for each of its coordinates."""

    def __init__(self, model: torch.nn.Module) -> None:
        sizes = [p.numel() for p in model.parameters()]
        device = model.device
        self.tables = [
            (
                torch.randint(0, TIMED_DIM, (size,), device=device, dtype=torch.int32),
                torch.randint(0, 2, (size,), device=device, dtype=torch.int8).mul_(2).sub_(1),
            )
            for size in sizes
        ]

    def __call__(self, gradients: Iterator[torch.Tensor]) -> torch.Tensor:
        """The sketch of the parameters' gradients, in the model's order."""
        out = torch.zeros(TIMED_DIM, device=self.tables[0][0].device)
        for (bucket, sign), gradient in zip(self.tables, gradients, strict=True):
            out.index_add_(0, bucket, gradient.reshape(-1).float() * sign)
        return out


def one_by_one(model: torch.nn.Module, ids: torch.Tensor) -> Yardstick:
    """A backward pass for every sample, and a CountSketch of its gradient."""
    there, sketch = ids[:FEW].to(model.device), CountSketch(model)

    def call() -> torch.Tensor:
        model.requires_grad_(True)
        found = []
        for sample in there.split(1):
            model(input_ids=sample, labels=sample, use_cache=False).loss.backward()
            found.append(sketch(p.grad for p in model.parameters()))
            model.zero_grad(set_to_none=True)
        return torch.stack(found)

    return scaled(call, there, ids)


def by_vmap(model: torch.nn.Module, ids: torch.Tensor) -> Yardstick:
    """torch.func's per-sample gradients, and a CountSketch of each."""
    there, sketch = ids[:FEW].to(model.device), CountSketch(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    # A mask that is given is not made from the ids, which vmap does not allow.
    length = there.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=there.device).tril()[None, None]

    def loss(values: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": sample[None], "attention_mask": mask, "use_cache": False}
        logits = torch.func.functional_call(model, values, kwargs=given).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), sample[1:])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def call() -> torch.Tensor:
        model.requires_grad_(False)
        found = gradients(parameters, there)
        return torch.stack([sketch(g[i] for g in found.values()) for i in range(len(there))])

    return scaled(call, there, ids)


def scaled(call: Callable[[], object], some: torch.Tensor, ids: torch.Tensor) -> Yardstick:
    """A yardstick of some samples alone that stands for the whole batch."""
    note = f"measured on {len(some)} samples, times {len(ids) / len(some):g}"
    return Yardstick(call, note, len(ids) / len(some))


def bergson(model: torch.nn.Module, ids: torch.Tensor) -> Yardstick:
    """The package bergson, with as many numbers a layer as the sketch has in all."""
    try:
        from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
        from datasets import Dataset
    except ImportError as error:
        raise NotMeasuredError(f"not installed ({error})") from error
    side, folder = math.isqrt(TIMED_DIM), tempfile.mkdtemp()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)})
    config = IndexConfig(run_path=f"{folder}/run", projection_dim=side)
    # It writes a count there.
    Path(config.partial_run_path).mkdir()
    layers = {name for name, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    # Its loss holds all logits.
    piece = max(1, min(len(ids), 8192 // ids.shape[1]))
    parts = [list(range(len(ids))[i : i + piece]) for i in range(0, len(ids), piece)]

    def call() -> None:
        model.requires_grad_(False)
        # Gradients begin where something requires one.
        model.get_input_embeddings().requires_grad_(True)
        collector = InMemoryCollector(
            model=model.model,
            data=data,
            cfg=config,
            target_modules=layers,
            processor=GradientProcessor(projection_dim=side),
        )
        CollectorComputer(
            model, data, collector=collector, batches=parts, cfg=config
        ).run_with_collector_hooks()

    note = f"bergson {metadata.version('bergson')}, {side} x {side} numbers for each of {len(layers)} layers"
    return Yardstick(call, f"{note}, pieces of {piece} samples")


def real_corpus(bench: Bench) -> dict[str, object]:
    """Sketching real text in the batches that `gvendi sketch` makes of it, beside training on the same batches.

    A round is every ROUNDS-th batch of as many rows as share batches on a GPU: it is sketched, then trained on.
    """
    model, (sketcher, kind) = random_model(bench), best_sketcher(bench)
    samples = load_samples(bench.option("corpus"), bench.option("tokenizer"), model.config.vocab_size)
    together = samples[: 64 if bench.dry else ROWS_TOGETHER]
    taken: dict[str, list[float]] = {"sketch": [], "training": []}
    tokens, padded, counts = [], [], []
    with prefer(first_backend(bench), bench.device):
        budget = choose_batch_tokens(sketcher, None)
        made = list(batches(together, budget))
        parts = [made[i::ROUNDS] for i in range(min(ROUNDS, len(made)))]
        for turn in range(-1, len(parts)):
            unit = parts[max(turn, 0)]
            calls = {
                "sketch": lambda u=unit: sketch_unit(sketcher, u),
                "training": lambda u=unit: train_unit(model, u),
            }
            for name, call in calls.items():
                bench.wait()
                with Span(bench.device) as span:
                    call()
                if turn >= 0:
                    taken[name].append(span.milliseconds())
            if turn >= 0:
                tokens.append(sum(s.length for batch in unit for s in batch))
                padded.append(sum(len(batch) * max(s.length for s in batch) for batch in unit))
                counts.append(len(unit))
    return {
        "rows": len(together),
        "tokens": sum(tokens),
        "padded tokens": sum(padded),
        "batches": sum(counts),
        "batch tokens": budget,
        "sketch": kind,
        "tokens per second": {
            name: quantiles([1e3 * n / t for n, t in zip(tokens, times, strict=True)])
            for name, times in taken.items()
        },
        "speed over training": ratios(taken["training"], taken["sketch"]),
    }


def sketch_unit(sketcher: GradientSketcher, unit: list[list[Sample]]) -> None:
    """All batches of a round, each one fetched when the next is queued."""
    waiting: deque = deque()
    for batch in unit:
        got = sketch_batch(sketcher, batch, 0)
        waiting.append(fetch(got.z, got.loss, got.tokens))
        if len(waiting) > 1:
            waiting.popleft().wait()
    waiting.pop().wait()


def train_unit(model: torch.nn.Module, unit: list[list[Sample]]) -> None:
    """The model's own loss and full backward on the same batches, in pieces that its logits allow."""
    model.requires_grad_(True)
    for batch in unit:
        ids, labels, mask = (x.to(model.device) for x in collate(batch, 0))
        for part in torch.arange(len(ids)).split(max(1, 8192 // ids.shape[1])):
            model(
                input_ids=ids[part], labels=labels[part], attention_mask=mask[part], use_cache=False
            ).loss.backward()
            model.zero_grad(set_to_none=True)
