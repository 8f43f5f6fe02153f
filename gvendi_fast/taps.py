"""Taps: where each kind of layer yields the two factors of its weight gradient.

A tap is attached to one module for one batch. It catches the layer's input in the forward pass and the gradient
of its output in the backward pass, hands both to the sketch operations, and lets go of them. No parameter
requires a gradient while taps are attached, so autograd computes input gradients only.
"""

from __future__ import annotations

import fnmatch
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gvendi_fast.errors import GvendiError
from gvendi_fast.norms import affine_input, norm_formula
from gvendi_fast.plan import SketchSpec, Table
from gvendi_fast.sketches import HadamardSketch, RademacherSketch, layer_sketch

LINEAR, CONV1D, EMBEDDING, NORM = "linear", "conv1d", "embedding", "norm"


@dataclass(frozen=True)
class Tap:
    """One module whose own parameters are sketched: parameter names are None where left out."""

    path: str
    module: nn.Module
    kind: str
    weight: str | None
    bias: str | None
    # For norms: "rms" or "layer" where the compiled formula holds, "affine" otherwise; see `norm_formula`.
    norm: str | None = None
    eps: float = 0.0


@dataclass
class Layout:
    """The taps of a model and what they cover, in numbers of parameters."""

    taps: list[Tap]
    sketched: int
    total: int
    transposed: frozenset[str]
    names: list[str] = field(default_factory=list)


def find_taps(model: nn.Module, exclude: Sequence[str] = ()) -> Layout:
    """The taps of all trainable parameters of `model` (all parameters, if none requires a gradient).

    exclude: shell patterns of parameter names to leave out. Raises GvendiError naming every parameter that no
    tap knows how to sketch, and every pattern that matches nothing.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = {id(p) for p in model.parameters() if p.requires_grad} or set(names)
    for pattern in exclude:
        if not fnmatch.filter(names.values(), pattern):
            raise GvendiError(f"exclude pattern {pattern!r} matches no parameter of the model")
    wanted = {
        key: name
        for key, name in names.items()
        if key in trainable and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
    }
    taps, unknown, transposed = [], [], set()
    for path, module in model.named_modules():
        own = {name: wanted.get(id(p)) for name, p in module._parameters.items() if p is not None}
        kind = module_kind(module)
        if not any(own.values()) and kind != EMBEDDING:
            continue
        if kind is None or set(own) - {"weight", "bias"}:
            unknown += [f"{name} ({type(module).__name__})" for name in own.values() if name]
            continue
        norm, eps = norm_formula(module) if kind == NORM else (None, 0.0)
        taps.append(Tap(path, module, kind, own.get("weight"), own.get("bias"), norm, eps))
        if kind == CONV1D and own.get("weight"):
            transposed.add(own["weight"])
    if unknown:
        raise GvendiError(
            f"no sketch is known for the parameters {', '.join(unknown)}; leave them out with "
            "exclude=[patterns] (the coverage of the result then says how much is sketched)"
        )
    sizes = {id(p): p.numel() for p in model.parameters()}
    return Layout(
        taps=taps,
        sketched=sum(sizes[key] for key in wanted),
        total=sum(sizes[key] for key in trainable),
        transposed=frozenset(transposed),
        names=list(wanted.values()),
    )


def module_kind(module: nn.Module) -> str | None:
    """Which tap fits a module's own parameters; None if there is none."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return LINEAR
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    takes = list(inspect.signature(module.forward).parameters.values())
    required = [
        p for p in takes if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    vectors = all(p is None or p.dim() == 1 for p in module._parameters.values())
    if "Norm" in type(module).__name__ and vectors and len(required) == 1:
        return NORM
    return None


class _Group:
    """The layers that read one input tensor, until the gradients of all their outputs have come."""

    def __init__(
        self, source: torch.Tensor, table: Table | None, sketch: HadamardSketch | RademacherSketch
    ) -> None:
        # A weak reference: the model may drop the tensor when only its transform is kept.
        self.source, self.source_version = weakref.ref(source), source._version
        self.table = table
        self.a, self.a_table = sketch.kept_input(_rows(source.detach()), table)
        # A view shares its version counter with the tensor it looks at.
        self.version = self.a._version
        self.taps: list[Tap] = []
        self.gradients: dict[int, torch.Tensor] = {}

    def reads(self, source: torch.Tensor, table: Table | None) -> bool:
        """Whether a further layer reads the same values through the same table."""
        same = self.source() is source and self.source_version == source._version
        return same and table is not None and self.table is table


class _EmbeddingCalls(TorchFunctionMode):
    """Sees the F.embedding call inside an embedding module's forward, whatever the subclass adds around it."""

    def __init__(self, recorder: Recorder, tap: Tap) -> None:
        super().__init__()
        self.recorder, self.tap = recorder, tap

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.embedding:
            ids = args[0] if args else kwargs["input"]
            padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
            self.recorder.saw_embedding(self.tap, ids, out, padding)
        return out


class Recorder:
    """Taps attached to a model for one batch of B samples of T positions; adds all sketches to `out` [B, K].

    segments int64 [B, 2]: the rows of the flattened [B * T] batch in which a sample's gradient can differ
    from zero. Use as a context manager: attached inside, the model as it was found outside.
    """

    def __init__(self, taps: list[Tap], spec: SketchSpec, shape: tuple[int, int], segments, out) -> None:
        self.taps, self.sketch, self.segments, self.out = taps, layer_sketch(spec), segments, out
        self.batch, self.length = shape
        self.handles: list = []
        self.groups: list[_Group] = []

    def __enter__(self) -> Recorder:
        attach = {LINEAR: self._saw_linear, CONV1D: self._saw_linear, NORM: self._saw_norm}
        for tap in self.taps:
            if tap.kind == EMBEDDING:
                self._wrap_embedding(tap)
            else:
                hook = self._bound(attach[tap.kind], tap)
                self.handles.append(tap.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.groups.clear()

    def finish(self) -> None:
        """Sketch groups of which some outputs got no gradient because the loss does not depend on them."""
        for group in list(self.groups):
            if group.gradients:
                self._sketch(group)
        self.groups.clear()

    @staticmethod
    def _bound(hook, tap: Tap):
        return lambda module, args, kwargs, output: hook(tap, args, kwargs, output)

    def _wrap_embedding(self, tap: Tap) -> None:
        module = tap.module
        own = module.__dict__.get("forward")
        inner = module.forward

        def forward(*args, **kwargs):
            with _EmbeddingCalls(self, tap):
                return inner(*args, **kwargs)

        module.forward = forward
        self.handles.append(_Restore(module, own))

    def saw_embedding(self, tap: Tap, ids: torch.Tensor, out: torch.Tensor, padding_idx: int | None) -> None:
        """Make an embedding's output the place where gradients start, and sketch the gradient it gets."""
        if not out.requires_grad:
            out.requires_grad_()
        if tap.weight is None:
            return
        if ids.numel() != self.batch * self.length:
            raise GvendiError(
                f"embedding {tap.path!r} is looked up {ids.numel()} times for a batch of {self.batch} x "
                f"{self.length} tokens, so its gradient cannot be told apart by sample; exclude {tap.weight!r}"
            )
        vocabulary = tap.module.weight.shape[0]
        flat = ids.detach().reshape(-1).long().contiguous()

        def hook(gradient: torch.Tensor) -> None:
            e = _rows(gradient)
            if padding_idx is not None and padding_idx >= 0:
                # The row of padding_idx gets no gradient, even where it stands for a real token.
                e = e.masked_fill((flat == padding_idx)[:, None], 0)
            self.sketch.token(tap.weight, vocabulary, flat, e, self.segments, self.out)

        out.register_hook(hook)

    def _saw_linear(self, tap: Tap, args, kwargs, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        source = args[0] if args else next(iter(kwargs.values()))
        rows = source.numel() // source.shape[-1]
        if rows != self.batch * self.length or (source.dim() > 2 and source.shape[0] != self.batch):
            raise GvendiError(
                f"layer {tap.path!r} saw an input of shape {tuple(source.shape)} for a batch of {self.batch} x "
                f"{self.length} tokens, so its gradient cannot be told apart by sample; exclude {tap.weight!r}"
            )
        group = self._group_of(source, tap)
        slot = len(group.taps)
        group.taps.append(tap)

        def hook(gradient: torch.Tensor) -> None:
            group.gradients[slot] = _rows(gradient)
            if len(group.gradients) == len(group.taps):
                self._sketch(group)
                self.groups.remove(group)

        output.register_hook(hook)

    def _group_of(self, source: torch.Tensor, tap: Tap) -> _Group:
        table = self.sketch.input_table(tap.weight, source.shape[-1]) if tap.weight else None
        # Layers that share an input are called one after the other, so only the latest group can be shared.
        if self.groups and self.groups[-1].reads(source, table):
            return self.groups[-1]
        self.groups.append(_Group(source, table, self.sketch))
        return self.groups[-1]

    def _sketch(self, group: _Group) -> None:
        if group.a._version != group.version:
            raise GvendiError(
                f"the input of layer {group.taps[0].path!r} was changed in place after the layer read it; "
                f"exclude {group.taps[0].weight!r}"
            )
        parts = []
        for slot, e in sorted(group.gradients.items()):
            tap = group.taps[slot]
            if tap.bias:
                self.sketch.vector(tap.bias, None, e, self.segments, self.out)
            if tap.weight:
                parts.append((tap.weight, e))
        if parts:
            self.sketch.linear(group.a, group.a_table, parts, self.segments, self.out)
        group.gradients.clear()

    def _saw_norm(self, tap: Tap, args, kwargs, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        rows = x.numel() // x.shape[-1]
        if rows % self.batch or (x.dim() > 2 and x.shape[0] != self.batch):
            raise GvendiError(
                f"norm {tap.path!r} saw an input of shape {tuple(x.shape)}, whose rows do not belong to "
                f"{self.batch} samples; exclude {tap.weight!r}"
            )
        # A norm may run once a head, before or after heads and positions change places, so a sample is all
        # of its rows; padding has no gradient.
        starts = torch.arange(self.batch, dtype=torch.int64) * (rows // self.batch)
        segments = torch.stack([starts, starts + rows // self.batch], dim=1)

        def hook(gradient: torch.Tensor) -> None:
            e = _rows(gradient)
            if tap.bias:
                self.sketch.vector(tap.bias, None, e, segments, self.out)
            if tap.weight and tap.norm == "affine":
                product = e * _rows(affine_input(tap.module, x))
                self.sketch.vector(tap.weight, None, product, segments, self.out)
            elif tap.weight:
                self.sketch.vector(tap.weight, _rows(x), e, segments, self.out, tap.norm, tap.eps)

        output.register_hook(hook)


class _Restore:
    """Puts a module's own `forward` attribute back; has the `remove` of a hook handle."""

    def __init__(self, module: nn.Module, own) -> None:
        self.module, self.own = module, own

    def remove(self) -> None:
        if self.own is None:
            del self.module.forward
        else:
            self.module.forward = self.own


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
