"""Whether a model is fit to be a proxy on this machine: does a row's sketch depend on that row alone, and is it right?

A row's gradient should be the same alone and in a batch, whatever the padding and from run to run, and it should be
the gradient that autograd gives. None of that follows from a model's code being here: experts with a capacity, noise
that eval mode leaves on, a mask that is passed over, kernels that round otherwise. So it is measured, with a few rows,
and so are the model's speed and memory. What is found is for people to read; a run checks nothing of it.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.data.rows import Row
from gvendi_fast.kernels import reference
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.batch_memory import choose_batch_tokens
from gvendi_fast.sketching.gradients.head import autograd_loss
from gvendi_fast.sketching.gradients.names import named_parameters
from gvendi_fast.sketching.gradients.quantised import parameters_by_name, quantised_layers
from gvendi_fast.sketching.gradients.short_attention import short_attention
from gvendi_fast.sketching.gradients.sketcher import Coverage, GradientSketcher
from gvendi_fast.sketching.gradients.taps import blocks_of, find_taps
from gvendi_fast.sketching.proxy.attention import never_packed
from gvendi_fast.sketching.proxy.encode import IGNORED, Encoder, Sample, collate
from gvendi_fast.sketching.proxy.load import Proxy
from gvendi_fast.sketching.proxy.text_config import positions_of

# Rows, tokens of each at most, the rows that are read with padding and with another beginning, and that padding.
ROWS, TOKENS, FEW, PADDING = 6, 96, 3, 16
# Tokens of the row whose gradient is taken by autograd; weights of each kind of layer that are compared with it, and of
# a kind's smallest matrix, which may be larger; numbers of these sketches: the definition takes K^2 operations a layer.
SHORT, WEIGHTS, LARGEST, SMALL_DIM = 24, 1 << 21, 1 << 25, 128
# Rows and tokens of the batch that is timed; it is timed again, the least time counting, for so many seconds.
TRIAL, LONG = (4, 128), 2.0
# Least cosine of two sketches that should be the same. float32: sums in another order. bfloat16: layers of another
# shape round otherwise, by 2^-8 of a number each.
LEAST = {torch.float64: 1 - 1e-6, torch.float32: 1 - 1e-6, torch.bfloat16: 0.98}
# Of one batch, twice: kernels that add in any order round otherwise.
LEAST_AGAIN = {torch.float64: 1 - 1e-6, torch.float32: 1 - 1e-6, torch.bfloat16: 0.999}
PROMPTS = (
    ("What is 17 + 25?", "42"),
    (
        "Name a river that flows through two countries.",
        "The Danube flows through ten, from Germany to the Black Sea.",
    ),
    ("Write a line of Python that reverses a list.", "items = items[::-1]"),
    (
        "Why does ice float on water?",
        "Water expands as it freezes, so ice is less dense than the water around it, and a body that is less dense "
        "than a liquid floats in it.",
    ),
    ("Translate into French: the cat sleeps.", "Le chat dort."),
    (
        "A train leaves at 9:40 and arrives at 11:05. How long does it take?",
        "From 9:40 to 11:00 are 80 minutes, and 5 more make 85 minutes, or one hour and 25 minutes.",
    ),
)


@dataclass(frozen=True)
class Check:
    """One property that a proxy should have.

    name: a word or two.
    passed: None where there is nothing to judge.
    value, least: the measured cosine, the least over rows, and the least that passes; None where it is no cosine.
    said: what was measured, in a sentence.
    remedy: what to do where it failed.
    """

    name: str
    passed: bool | None
    value: float | None
    least: float | None
    said: str
    remedy: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of layer. parameters: sketched ones. norm_share: of the squared gradient norm, the mean over rows."""

    name: str
    parameters: int
    norm_share: float


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a part of a block, or of the whole model (path ""), for the trial batch."""

    path: str
    forward: float
    backward: float
    sketch: float

    @property
    def total(self) -> float:
        """Of all three."""
        return self.forward + self.backward + self.sketch


@dataclass(frozen=True)
class SelfCheck:
    """What a proxy was found to be.

    parameters: of the model. attention: that it runs. rows, row_tokens: that the checks used.
    checks: of what it should be, in order.
    kinds: sketched layers by kind.
    coverage: sketched parameters, of how many, and what no text reaches; None where the model cannot be sketched.
    layers: parts of the blocks and the whole model (the first), the slowest first.
    tokens_per_second: of a trial batch, None where it was not run. trial_tokens: that it had.
    peak_bytes: of a GPU's memory above the model's in that batch; of the process so far, on a CPU.
    batch_tokens: that fit, as a run would choose.
    """

    proxy: str
    revision: str
    dtype: str
    device: str
    parameters: int
    attention: str
    compiled: bool
    rows: int
    row_tokens: int
    checks: tuple[Check, ...]
    kinds: tuple[Kind, ...] = ()
    coverage: Coverage | None = None
    layers: tuple[LayerTime, ...] = ()
    tokens_per_second: float | None = None
    trial_tokens: int | None = None
    peak_bytes: int | None = None
    batch_tokens: int | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi inspect --model P --json` prints."""
        return {"passed": self.passed, **asdict(self)}


def self_check(
    proxy: Proxy,
    rows: Sequence[Row] = (),
    *,
    spec: SketchSpec | None = None,
    exclude: Sequence[str] = (),
    layers: str = "all",
    compile: bool = False,
) -> SelfCheck:
    """Measure whether a proxy's sketches are right and depend on their rows alone, what it covers and what it costs.

    rows: to measure with, a few of your own; a few built-in questions and answers, if not given.
    spec, exclude, layers, compile: as `GradientSketcher` takes them.
    A model that cannot be sketched, or not compiled, is a failed check with the reason. Raises GvendiError where none
    of the rows can be tokenised.
    """
    spec = spec or SketchSpec()
    samples = _samples(proxy, rows or builtin_rows())
    lengths = [sample.length for sample in samples]
    said: dict[str, Any] = {
        "proxy": proxy.name,
        "revision": proxy.revision,
        "dtype": str(proxy.dtype).removeprefix("torch."),
        "device": str(proxy.device),
        "parameters": proxy.parameters,
        "attention": proxy.attention,
        "compiled": compile,
        "rows": len(samples),
        "row_tokens": sum(lengths),
    }
    try:
        sketcher = GradientSketcher(
            proxy.model, spec, exclude=exclude, layers=layers, groups="kind", compile=compile
        )
        # Parts of a compiled pass cannot be timed by themselves.
        eager = GradientSketcher(proxy.model, spec, exclude=exclude, layers=layers) if compile else sketcher
        trial = _Trial(proxy, sketcher, samples)
        checks = [
            Check("taps", True, None, None, f"every parameter of {len(sketcher.parameters):,} has its sketch")
        ]
        checks += [*trial.checks(), _against_autograd(proxy, sketcher, samples)]
    except GvendiError as error:
        return SelfCheck(**said, checks=(Check("taps", False, None, None, f"{error}"),))
    sizes = dict(zip(sketcher.groups.names, sketcher.groups.sizes, strict=True))
    return SelfCheck(
        **said,
        checks=tuple(checks),
        kinds=tuple(Kind(name, size, trial.norm_shares[name]) for name, size in sizes.items()),
        coverage=sketcher.coverage,
        **_costs(proxy, sketcher, eager),
    )


def builtin_rows() -> list[Row]:
    """A few questions with their answers, of different lengths."""
    pairs = enumerate(PROMPTS, start=1)
    return [
        Row(i - 1, f"{i}", "", "built-in rows", i, prompt=ask, completion=answer)
        for i, (ask, answer) in pairs
    ]


def _samples(proxy: Proxy, rows: Sequence[Row]) -> list[Sample]:
    """Up to ROWS of the rows, those that are cut short among them, as the tokenizer reads them."""
    room = min(TOKENS, (positions_of(proxy.model.config) or TOKENS + PADDING) - PADDING)
    encoder = Encoder(proxy.tokenizer, max(room, 2), vocabulary=proxy.vocabulary)
    encoded = encoder.encode(list(rows))
    samples = [one for one in encoded if isinstance(one, Sample)][:ROWS]
    if not samples:
        reasons = "; ".join(dict.fromkeys(one.reason for one in encoded if not isinstance(one, Sample)))
        raise GvendiError(
            f"none of the {len(rows)} rows can be read by the proxy {proxy.name!r}: {reasons[:300]}"
        )
    return samples


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each row; NaN where a row is zero."""
    a, b = a.double().cpu(), b.double().cpu()
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def _padded(samples: Sequence[Sample], pad: int, more: int = 0, is_left: bool = False) -> tuple[Tensor, ...]:
    """A batch with at least `more` positions of padding a row, on the right or the left."""
    ids, labels, mask = (
        nn.functional.pad(x, (0, more), value=value)
        for x, value in zip(collate(samples, pad), (pad, IGNORED, 0), strict=True)
    )
    if is_left:
        shifts = [ids.shape[1] - sample.length for sample in samples]
        ids, labels, mask = (
            torch.stack([row.roll(by) for row, by in zip(x, shifts, strict=True)])
            for x in (ids, labels, mask)
        )
    return ids, labels, mask


class _Trial:
    """Sketches of the same rows in every way that should not matter."""

    def __init__(self, proxy: Proxy, sketcher: GradientSketcher, samples: Sequence[Sample]) -> None:
        self.proxy, self.sketcher, self.samples = proxy, sketcher, samples
        pad = proxy.tokenizer.pad_token_id
        self.pad = 0 if pad is None else pad
        self.alone = torch.cat([sketcher(*_padded([sample], self.pad)) for sample in samples])
        together = sketcher.sketch(*_padded(samples, self.pad))
        self.together = together.z
        squares = together.by_group.double().square().sum(dim=-1).cpu()
        shares = (squares / squares.sum(dim=1, keepdim=True)).mean(dim=0)
        self.norm_shares = dict(zip(sketcher.groups.names, shares.tolist(), strict=True))

    def checks(self) -> list[Check]:
        """All but the one against autograd."""
        few = self.samples[:FEW]
        zero = [
            sample.id for sample, z in zip(self.samples, self.alone, strict=True) if not self._is_direction(z)
        ]
        rows = f"{len(self.samples)} row{'s' * (len(self.samples) != 1)}"
        found = [
            Check(
                "gradients",
                not zero,
                None,
                None,
                f"of {rows}, "
                + ("all have a gradient" if not zero else f"{', '.join(zero)} have none, or no finite one"),
                "check the weights, and --dtype float32 where bfloat16 overflows",
            ),
            self._same(
                "two runs",
                self.sketcher(*_padded(self.samples, self.pad)),
                self.together,
                "one batch, sketched twice",
                "something is drawn at random although the model is in eval mode (dropout that is always on, noise in "
                "a router): turn it off in the model's configuration, or take another proxy",
                LEAST_AGAIN,
            ),
        ]
        if len(self.samples) > 1:
            found.append(
                self._same(
                    "batch",
                    self.together,
                    self.alone,
                    "a row by itself and among the others",
                    "a row's gradient depends on the rows beside it, as where experts have a capacity or a layer takes "
                    "means over a batch: --batch-tokens 1 gives every row a batch of its own, or take another proxy",
                )
            )
        found += [
            self._same(
                "right padding",
                torch.cat([self.sketcher(*_padded([s], self.pad, PADDING)) for s in few]),
                self.alone[: len(few)],
                f"a row by itself and with {PADDING} positions of padding after it",
                "the model reads what follows a row: --batch-tokens 1 leaves no padding, or take another proxy",
            ),
            self._left(few),
            self._bos(),
        ]
        return found

    def _left(self, few: Sequence[Sample]) -> Check:
        """Padding before a row; a model for which the sketcher refuses it is none the worse, as runs pad after rows."""
        try:
            got = torch.cat([self.sketcher(*_padded([s], self.pad, PADDING, is_left=True)) for s in few])
        except GvendiError as error:
            return Check("left padding", None, None, None, f"refused, and runs have none: {error}")
        return self._same(
            "left padding",
            got,
            self.alone[: len(few)],
            f"a row by itself and with {PADDING} positions of padding before it",
            "the model passes over the attention mask or the positions; runs pad on the right, and so should calls of "
            "GradientSketcher with this model",
        )

    @staticmethod
    def _is_direction(z: Tensor) -> bool:
        return bool(z.isfinite().all()) and bool(z.any())

    def _same(
        self,
        name: str,
        got: Tensor,
        wanted: Tensor,
        of: str,
        remedy: str,
        least: Mapping[torch.dtype, float] | None = None,
    ) -> Check:
        value, most = float(_cosines(got, wanted).nan_to_num(0.0).min()), (least or LEAST)[self.proxy.dtype]
        return Check(name, value >= most, value, most, of, remedy)

    def _bos(self) -> Check:
        """What a BOS token changes; nothing says whether it should be there but the model's own training."""
        bos = self.proxy.tokenizer.bos_token_id
        if bos is None:
            return Check("BOS", None, None, None, "the tokenizer has no BOS token")
        few = self.samples[:FEW]
        added = all(sample.input_ids[0] == bos for sample in few)
        others = [_without_first(s) if added else _with_first(s, bos) for s in few]
        # A row of one token before the first supervised one would lose what predicts it.
        pairs = [
            (z, s)
            for z, s in zip(self.alone[: len(few)], others, strict=True)
            if (s.labels[1:] != IGNORED).any()
        ]
        if not pairs:
            return Check("BOS", None, None, None, "every row is added one, and is too short without it")
        got = torch.cat([self.sketcher(*_padded([s], self.pad)) for _, s in pairs])
        value = float(_cosines(got, torch.stack([z for z, _ in pairs])).nan_to_num(0.0).min())
        word = "begins each row, and without it" if added else "does not begin each row, and with it"
        said = f"{self.proxy.tokenizer.bos_token!r} {word} a row's gradient turns to a cosine of {value:.3f} at least"
        return Check("BOS", None, value, None, said)


def _without_first(sample: Sample) -> Sample:
    labels = sample.labels[1:].copy()
    labels[:1] = IGNORED
    return Sample(sample.row, sample.id, sample.group, sample.file, sample.line, sample.input_ids[1:], labels)


def _with_first(sample: Sample, token: int) -> Sample:
    ids = np.concatenate([np.asarray([token], sample.input_ids.dtype), sample.input_ids])
    labels = np.concatenate([np.asarray([IGNORED], sample.labels.dtype), sample.labels])
    return Sample(sample.row, sample.id, sample.group, sample.file, sample.line, ids, labels)


def _against_autograd(proxy: Proxy, sketcher: GradientSketcher, samples: Sequence[Sample]) -> Check:
    """The sketch of some weights of every kind of layer against that of autograd's own gradient of them."""
    shortest = min(samples, key=lambda sample: sample.length)
    ids, labels, _ = _padded([shortest], 0)
    ids, labels = ids[:, :SHORT], labels[:, :SHORT]
    if not bool((labels[:, 1:] != IGNORED).any()):
        labels = ids
    chosen, larger = _smallest(sketcher)
    if not chosen:
        return Check(
            "autograd", None, None, None, "every layer is too large for a comparison with autograd's gradient"
        )
    patterns = {kind: [_escaped(name) for name in names] for kind, names in chosen.items()}
    spec = replace(sketcher.spec, dim=min(SMALL_DIM, sketcher.spec.dim))
    small = GradientSketcher(proxy.model, spec, exclude=_others(sketcher), groups=patterns)
    sketches = small.sketch(ids, labels)
    names = [name for group in chosen.values() for name in group]
    gradients = _gradients(proxy.model, names, ids.to(proxy.device), labels.to(proxy.device))
    values: dict[str, float] = {}
    for number, (kind, of) in enumerate(chosen.items()):
        own = {name: gradients[name] for name in of}
        wanted = reference.sketch_of_gradient(own, spec, small.transposed, small.stacked)
        got = sketches.by_group[0, number].double().cpu()
        # Where no token of the row comes by, both are zero.
        both_zero = not bool(wanted.any()) and not bool(got.any())
        values[kind] = 1.0 if both_zero else float(_cosines(got, wanted).nan_to_num(0.0))
    worst = min(values, key=values.__getitem__)
    least = LEAST[proxy.dtype]
    return Check(
        "autograd",
        values[worst] >= least,
        values[worst],
        least,
        f"against autograd's own gradient of {len(names):,} parameters, the smaller of each kind; least for {worst!r}"
        + (f"; too large to compare, or coded: {', '.join(larger)}" if larger else ""),
        "a weight is used in a way that its sketch does not see, such as a second time by a function: leave the kind "
        "out (--layers, --exclude), or take another proxy",
    )


def _smallest(sketcher: GradientSketcher) -> tuple[dict[str, list[str]], list[str]]:
    """{kind of layer: its smallest parameters, of WEIGHTS numbers together}, and the kinds without one of LARGEST."""
    by_kind: dict[str, list[tuple[int, str]]] = {kind: [] for kind in sketcher.groups.names}
    # Autograd gives no gradient of a code; such layers were tried one by one.
    coded = {layer.weight for layer in quantised_layers(sketcher.model)}
    for name, number in sketcher.groups.of.items():
        if name in coded:
            continue
        by_kind[sketcher.groups.names[number]].append((math.prod(sketcher.shapes[name]), name))
    chosen: dict[str, list[str]] = {}
    for kind, sizes in by_kind.items():
        sizes.sort()
        totals = accumulate(size for size, _ in sizes)
        fitting = [name for (_, name), total in zip(sizes, totals, strict=True) if total <= WEIGHTS]
        # Vectors alone would say nothing of a kind's matrices.
        first = next(
            (name for size, name in sizes if len(sketcher.shapes[name]) > 1 and size <= LARGEST), None
        )
        if names := dict.fromkeys([*fitting, *([first] if first else [])]):
            chosen[kind] = list(names)
    return chosen, [kind for kind in by_kind if kind not in chosen]


def _others(sketcher: GradientSketcher) -> list[str]:
    """Patterns of the trainable parameters that a sketcher leaves out."""
    named = parameters_by_name(sketcher.model)
    return [_escaped(name) for name in named if name not in sketcher.shapes]


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _gradients(model: nn.Module, names: Sequence[str], ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Autograd's gradients of one row's loss for these parameters, zero for those that the row does not reach."""
    named = named_parameters(model)
    parameters = [named[name] for name in names]
    flags = [p.requires_grad for p in named.values()]

    def restore() -> None:
        for p, flag in zip(named.values(), flags, strict=True):
            p.requires_grad_(flag)

    with undoing() as undo, torch.enable_grad():
        undo.append(restore)
        for p in named.values():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = autograd_loss(logits[:, :-1], labels[:, 1:].to(logits.device)).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }


def _costs(proxy: Proxy, sketcher: GradientSketcher, eager: GradientSketcher) -> dict[str, Any]:
    """Speed, memory and the slowest layers of a trial batch."""
    positions = positions_of(proxy.model.config) or TRIAL[1]
    rows, length = TRIAL[0], min(TRIAL[1], positions)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(proxy.vocabulary, (rows, length), generator=generator)
    is_gpu = proxy.device.type == "cuda"

    def run() -> float:
        return _seconds(lambda: sketcher(batch, batch), proxy.device)

    # The first one compiles kernels.
    times = [run()]
    held = torch.cuda.memory_allocated(proxy.device) if is_gpu else 0
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(proxy.device)
    while (is_gpu and len(times) < 3) or sum(times) < LONG:
        times.append(run())
    seconds = min(times)
    peak = torch.cuda.max_memory_allocated(proxy.device) - held if is_gpu else _process_peak()
    return {
        "tokens_per_second": batch.numel() / seconds,
        "trial_tokens": batch.numel(),
        "peak_bytes": peak,
        "batch_tokens": choose_batch_tokens(sketcher, None),
        "layers": tuple(_layer_times(proxy, eager, batch)),
    }


def _process_peak() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    # Kilobytes on Linux, bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class _Clock:
    """When a part's forward pass, and the backward pass over it, began and ended."""

    device: torch.device
    forward: float = 0.0
    backward: float = 0.0
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        _wait(self.device)
        self.marks[name] = time.perf_counter()

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = _differentiable((*args, *kwargs.values()))
        if x is not None:
            x.register_hook(lambda gradient: self.mark("input gradient"))
        self.mark("begin")

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.mark("end")
        self.forward = self.marks["end"] - self.marks["begin"]
        y = _differentiable(output if isinstance(output, tuple) else (output,))
        if y is not None:
            y.register_hook(lambda gradient: self.mark("output gradient"))

    def read(self) -> tuple[float, float]:
        """(forward, backward), and forget the pass."""
        begin, end = (self.marks.get(f"{name} gradient") for name in ("output", "input"))
        backward = end - begin if begin is not None and end is not None else 0.0
        self.marks.clear()
        return self.forward, backward


def _differentiable(values: Sequence[Any]) -> Tensor | None:
    return next((x for x in values if isinstance(x, Tensor) and x.requires_grad), None)


def _layer_times(proxy: Proxy, eager: GradientSketcher, batch: Tensor) -> list[LayerTime]:
    """The whole model, and then the parts of its blocks, the slowest first: one pass without sketches, one with."""
    model, device = eager.model, proxy.device
    blocks = blocks_of(model, find_taps(model, unreached=_unreached(model, eager)).taps)
    paths = {id(module): path for path, module in model.named_modules()}
    parts = [part for block in blocks for part in block.children() if any(True for _ in part.parameters())]
    parts = [part for part in parts if not isinstance(part, nn.ModuleList)]
    clocks = {paths[id(part)]: _Clock(device) for part in parts}
    with undoing() as undo:
        for part in parts:
            clock = clocks[paths[id(part)]]
            undo.append(part.register_forward_pre_hook(clock.before, with_kwargs=True).remove)
            undo.append(part.register_forward_hook(clock.after).remove)
        there = batch.to(device)
        forward, backward = _plain_pass(model, there, device)
        plain = {path: clock.read() for path, clock in clocks.items()}
        whole = _seconds(lambda: eager(batch, batch), device)
        sketched = {path: clock.read() for path, clock in clocks.items()}
        # The first pass of its kind meets everything cold; a model that takes seconds is not run again for that.
        if forward + backward + whole < LONG:
            forward, backward = _plain_pass(model, there, device)
            plain = {path: _less(clock.read(), plain[path]) for path, clock in clocks.items()}
            whole = min(whole, _seconds(lambda: eager(batch, batch), device))
            sketched = {path: _less(clock.read(), sketched[path]) for path, clock in clocks.items()}
    found = [
        LayerTime(
            path, before, back, max(0.0, sketched[path][1] - back) + max(0.0, sketched[path][0] - before)
        )
        for path, (before, back) in plain.items()
    ]
    found.sort(key=lambda layer: -layer.total)
    return [LayerTime("", forward, backward, max(0.0, whole - forward - backward)), *found]


def _less(times: tuple[float, float], others: tuple[float, float]) -> tuple[float, float]:
    return min(times[0], others[0]), min(times[1], others[1])


def _unreached(model: nn.Module, eager: GradientSketcher) -> list[str]:
    return [name for name in parameters_by_name(model) if name not in eager.shapes]


def _plain_pass(model: nn.Module, batch: Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds of the forward pass and of the backward pass to the embeddings alone, without any sketch."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def restore() -> None:
        for p in parameters:
            p.requires_grad_(True)

    found: list[Tensor] = []

    def start(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    def forward() -> None:
        logits = model(input_ids=batch, use_cache=False).logits
        losses.append(autograd_loss(logits[:, :-1], batch[:, 1:].to(logits.device)).sum())

    losses: list[Tensor] = []
    # As a pass of ours runs, all but the sketches.
    with undoing() as undo, torch.enable_grad(), never_packed(), short_attention(model):
        undo.append(restore)
        for p in parameters:
            p.requires_grad_(False)
        undo.append(model.get_input_embeddings().register_forward_hook(start).remove)
        seconds = _seconds(forward, device)
        backward = _seconds(lambda: torch.autograd.grad(losses[0], found[0], allow_unused=True), device)
    return seconds, backward
