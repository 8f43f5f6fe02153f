"""The sketch of a batch as the gradient of a zero probe [B, K].

Every tapped layer gets a node in autograd's graph that takes the probe beside the layer's tensors and adds nothing to
the forward pass; its backward pass hands the layer's gradient on and returns, as the probe's "gradient", the sketch
of that layer (README, "The sketch"): z = d(loss)/d(probe), and autograd adds the
layers up. So there is no order of registration and no state between passes, and a compiler sees one graph.

The layers themselves run unchanged: where their weights require a gradient they get it as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gvendi_fast import layer_ops
from gvendi_fast.errors import GvendiError
from gvendi_fast.norms import affine_input
from gvendi_fast.plan import SketchSpec
from gvendi_fast.sketches import layer_sketch
from gvendi_fast.taps import EMBEDDING, NORM, Tap


@dataclass(frozen=True)
class Group:
    """Linear layers that read one input and share its transform; a layer by itself is a group of one.

    weights, biases: parameter names as `layer_ops.linear_layers` takes them. widths: O of every layer.
    """

    taps: tuple[Tap, ...]
    weights: str
    biases: str
    widths: tuple[int, ...]
    spec: str
    transform: bool

    @property
    def path(self) -> str:
        """Of its first layer, for messages."""
        return self.taps[0].path


class SharedInput(torch.autograd.Function):
    """The input of a group: one output for each layer, without values, whose gradient is that of the layer's output.

    Autograd calls the backward pass when the gradients of all layers have come, so that they are sketched together.
    """

    @staticmethod
    def forward(ctx, probe: Tensor, x: Tensor, segments: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.home = group, probe.device
        kept = x
        if group.transform:
            kept = torch.ops.gvendi.transformed_input(x, group.weights.split("\n")[0], group.spec)
        ctx.save_for_backward(kept, segments)
        # One number seen as a whole tensor, and never read: no memory and no work.
        shape, nothing = x.shape[:-1], x.new_empty(())
        return tuple(nothing.expand(*shape, width) for width in group.widths)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        group = ctx.group
        kept, segments = _saved(ctx, group.path)
        parts = list(zip(group.weights.split("\n"), group.biases.split("\n"), gradients, strict=True))
        # The loss need not depend on every layer.
        parts = [(weight, bias, e) for weight, bias, e in parts if e is not None]
        if not parts:
            return None, None, None, None
        z = torch.ops.gvendi.linear_layers(
            kept,
            group.transform,
            [e for _, _, e in parts],
            segments,
            "\n".join(weight for weight, _, _ in parts),
            "\n".join(bias for _, bias, _ in parts),
            group.spec,
        )
        return z.to(ctx.home), None, None, None


class LayerOutput(torch.autograd.Function):
    """The output of a linear layer as it is; its gradient also goes to the layer's place in a `SharedInput`."""

    @staticmethod
    def forward(ctx, output: Tensor, place: Tensor) -> Tensor:
        # Detached and not a view: what follows may change it in place, as it may change the layer's own output.
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, gradient


class NormOutput(torch.autograd.Function):
    """The output of a norm layer as it is; x is the layer's input, or x_hat where no formula is known."""

    @staticmethod
    def forward(
        ctx, output: Tensor, probe: Tensor, x: Tensor, segments: Tensor, tap: Tap, spec: str
    ) -> Tensor:
        ctx.tap, ctx.spec, ctx.home = tap, spec, probe.device
        ctx.save_for_backward(x, segments)
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        tap = ctx.tap
        x, segments = _saved(ctx, tap.path)
        norm = "given" if tap.norm == "affine" else tap.norm
        z = torch.ops.gvendi.norm_layer(
            x, gradient, segments, tap.weight or "", tap.bias or "", norm, tap.eps, ctx.spec
        )
        return gradient, z.to(ctx.home), None, None, None, None


class LookedUp(torch.autograd.Function):
    """What an embedding looked up, as it is. Gradients start here: it depends on the probe, if on nothing else."""

    @staticmethod
    def forward(
        ctx,
        output: Tensor,
        probe: Tensor,
        ids: Tensor,
        segments: Tensor,
        tap: Tap,
        padding_idx: int,
        spec: str,
    ) -> Tensor:
        ctx.tap, ctx.padding_idx, ctx.spec, ctx.home = tap, padding_idx, spec, probe.device
        ctx.vocabulary = tap.module.weight.shape[0]
        ctx.save_for_backward(ids, segments)
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        z = None
        if ctx.tap.weight is not None:
            ids, segments = _saved(ctx, ctx.tap.path)
            z = torch.ops.gvendi.embedding_layer(
                ids, gradient, segments, ctx.tap.weight, ctx.vocabulary, ctx.padding_idx, ctx.spec
            ).to(ctx.home)
        return gradient, z, None, None, None, None, None


class HeadLoss(torch.autograd.Function):
    """(loss summed over all targets, loss float32 [R] of each) of the head, whose logits live a chunk at a time.

    hidden [B, T, d]; rows int64 [R] of the flattened batch and labels int64 [R] on its device; segments int64 [B, 2] of
    those rows on the CPU. The gradients are worked out with the loss, for the logits are gone afterwards.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, probe: Tensor, weight: Tensor, rows: Tensor, labels: Tensor, segments: Tensor,
        name: str, softcap: float | None, scale: float, spec: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss, gradient, z = torch.ops.gvendi.output_head(
            flat.index_select(0, rows), weight, labels, segments, name, softcap, scale, spec
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, z, rows)
        ctx.shape, ctx.home = hidden.shape, probe.device
        ctx.mark_non_differentiable(loss)
        return loss.sum(), loss

    @staticmethod
    def backward(ctx, upstream: Tensor, _):
        gradient, z, rows = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape).view(-1, ctx.shape[-1])
        whole = whole.index_copy(0, rows, gradient * upstream).view(ctx.shape)
        return whole, (z * upstream).to(ctx.home), *[None] * 8


def _saved(ctx, path: str) -> tuple[Tensor, ...]:
    """The tensors that a node keeps; autograd refuses those that were changed since."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        raise GvendiError(
            f"the input of layer {path!r} was changed in place after the layer read it, so its gradient is lost; "
            f"leave the layer's parameters out with exclude=[{path + '.*'!r}]"
        ) from error


def find_groups(model: nn.Module, taps: Sequence[Tap], spec: SketchSpec) -> list[Group]:
    """The groups of the linear layers among `taps`, found by watching the model read four tokens.

    Layers are in one group if they were called one after the other with the same tensor, and their tables allow it.
    """
    linear = [tap for tap in taps if tap.kind not in (EMBEDDING, NORM)]
    sketch, text = layer_sketch(spec), layer_ops.spec_text(spec)
    seen: list[tuple[Tap, Tensor, int]] = []

    def watch(tap: Tap) -> Callable:
        def hook(module, args, kwargs, output):
            source = _first(args, kwargs)
            seen.append((tap, source, source._version))

        return hook

    handles = [tap.module.register_forward_hook(watch(tap), with_kwargs=True) for tap in linear]
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, 5, device=embedding.device)[None] % embedding.shape[0]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    together: list[list[Tap]] = []
    placed: set[int] = set()
    last: tuple[Tensor, int] | None = None
    for tap, source, version in seen:
        if id(tap) in placed:
            last = None
            continue
        placed.add(id(tap))
        joins = last is not None and last[0] is source and last[1] == version
        first = together[-1][0] if joins else None
        if joins and tap.weight and first.weight and sketch.shares_input(tap.weight, first.weight):
            together[-1].append(tap)
        else:
            together.append([tap])
        last = source, version
    # A layer that four tokens did not reach, such as an expert's, is a group of its own.
    together += [[tap] for tap in linear if id(tap) not in placed]
    return [_group(taps, sketch, text) for taps in together]


def _group(taps: Sequence[Tap], sketch, text: str) -> Group:
    sizes = [layer_widths(tap.module) for tap in taps]
    return Group(
        taps=tuple(taps),
        weights="\n".join(tap.weight or "" for tap in taps),
        biases="\n".join(tap.bias or "" for tap in taps),
        widths=tuple(out for _, out in sizes),
        spec=text,
        transform=bool(taps[0].weight) and sketch.keeps_transform(sizes[0][0]),
    )


def layer_widths(module: nn.Module) -> tuple[int, int]:
    """(I, O) of a linear layer or of transformers' Conv1D, whose weight is stored transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


class ProbedModel:
    """A model with taps; inside `attached`, and between `begin` and `end`, its forward pass has the probe's nodes.

    taps: of the layers to sketch. Raises GvendiError, in the forward pass, where the samples of a batch cannot be
    told apart in a layer, and in the backward pass where a layer's input was changed in place.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], spec: SketchSpec) -> None:
        self.taps, self.spec = list(taps), layer_ops.spec_text(spec)
        self._hooks: list[tuple[nn.Module, Callable]] = []
        self._embeddings: list[_EmbeddingTap] = []
        # A layer whose input an eager pass has seen changed before the next layer of its group read it.
        self.changed_between: str | None = None
        for number, group in enumerate(find_groups(model, taps, spec)):
            for slot, tap in enumerate(group.taps):
                self._hooks.append((tap.module, self._linear_hook(group, number, slot, tap)))
        for tap in taps:
            if tap.kind == NORM:
                self._hooks.append((tap.module, self._norm_hook(tap)))
            elif tap.kind == EMBEDDING:
                self._embeddings.append(_EmbeddingTap(tap.module, self._embedding_hook(tap)))
        self.end()

    def begin(self, probe: Tensor, segments: Tensor, length: int) -> None:
        """Start a pass: probe float32 [B, K], segments int64 [B, 2] on the CPU, length T of the batch [B, T].

        segments: the rows of the flattened [B * T] batch in which a sample's gradient can differ from zero.
        """
        self._probe, self._segments = probe, segments
        self._batch, self._length = probe.shape[0], length
        self._open: dict[int, tuple[Tensor, int, list[Tensor | None]] | None] = {}

    def end(self) -> None:
        """Let go of the pass's tensors; the graph holds what the backward pass needs."""
        self._probe = self._segments = self._batch = self._length = None
        self._open = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Taps attached inside, the model as it was found outside."""
        handles = []
        try:
            for module, hook in self._hooks:
                # First, so that what hooks of others make of an output comes after the layer's own.
                handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            for embedding in self._embeddings:
                handles.append(embedding)
                embedding.attach()
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.end()

    def _linear_hook(self, group: Group, number: int, slot: int, tap: Tap) -> Callable:
        def hook(module, args, kwargs, output: Tensor) -> Tensor | None:
            if not output.requires_grad:
                return None
            x, batch, length = _first(args, kwargs), self._batch, self._length
            shape = x.shape
            if math.prod(shape[:-1]) != batch * length or (len(shape) > 2 and shape[0] != batch):
                raise GvendiError(
                    f"layer {tap.path!r} saw an input of shape {tuple(shape)} for a batch of {batch} x {length} "
                    f"tokens, so its gradient cannot be told apart by sample; exclude {tap.weight!r}"
                )
            return LayerOutput.apply(output, self._place(group, number, slot, x, output.device))

        return hook

    def _place(self, group: Group, number: int, slot: int, x: Tensor, device: torch.device) -> Tensor:
        """The layer's output of the group's `SharedInput`, which the first layer to read x makes."""
        version = _version(x)
        known = self._open.get(number)
        if known is not None and known[0] is x and known[1] != version:
            self.changed_between = group.path
        if known is None or known[0] is not x or known[1] != version or known[2][slot] is None:
            # A device map may leave it to the layer to fetch its input.
            source = x.detach().to(device)
            known = x, version, list(SharedInput.apply(self._probe, source, self._segments, group))
        places = known[2]
        place, places[slot] = places[slot], None
        # The input is held until the last layer has read it, no longer.
        self._open[number] = known if any(p is not None for p in places) else None
        return place

    def _norm_hook(self, tap: Tap) -> Callable:
        def hook(module, args, kwargs, output: Tensor) -> Tensor | None:
            if not output.requires_grad:
                return None
            x, batch = _first(args, kwargs).detach().to(output.device), self._batch
            shape = x.shape
            if math.prod(shape[:-1]) % batch or (len(shape) > 2 and shape[0] != batch):
                raise GvendiError(
                    f"norm {tap.path!r} saw an input of shape {tuple(shape)}, whose rows do not belong to "
                    f"{batch} samples; exclude {tap.weight!r}"
                )
            if tap.norm == "affine":
                with torch.no_grad():
                    x = affine_input(module, x)
            return NormOutput.apply(output, self._probe, x, self._segments, tap, self.spec)

        return hook

    def _embedding_hook(self, tap: Tap) -> Callable:
        def hook(ids: Tensor, out: Tensor, padding_idx: int | None) -> Tensor:
            batch, length = self._batch, self._length
            if tap.weight is not None and ids.numel() != batch * length:
                raise GvendiError(
                    f"embedding {tap.path!r} is looked up {ids.numel()} times for a batch of {batch} x {length} "
                    f"tokens, so its gradient cannot be told apart by sample; exclude {tap.weight!r}"
                )
            padding = -1 if padding_idx is None else padding_idx
            return LookedUp.apply(
                out, self._probe, ids.to(out.device), self._segments, tap, padding, self.spec
            )

        return hook


class _EmbeddingCalls(TorchFunctionMode):
    """Sees the F.embedding call inside an embedding module's forward, whatever the subclass adds around it."""

    def __init__(self, hook: Callable) -> None:
        super().__init__()
        self.hook = hook

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.embedding:
            ids = args[0] if args else kwargs["input"]
            padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
            out = self.hook(ids, out, padding)
        return out


class _EmbeddingTap:
    """An embedding module whose forward pass calls `hook` with what it looks up; has the `remove` of a hook handle."""

    def __init__(self, module: nn.Module, hook: Callable) -> None:
        self.module, self.hook = module, hook
        self._own = self._forward = None

    def attach(self) -> None:
        """Put the tapped forward in the module's own attribute, where others may have put theirs."""
        own = self.module.__dict__.get("forward")
        # The same function as last time, so that a compiler knows it again.
        if self._forward is None or own is not self._own:
            self._own, self._forward = own, self._tapped(self.module.forward)
        self.module.forward = self._forward

    def remove(self) -> None:
        """Put back what was there."""
        if self._own is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self._own

    def _tapped(self, inner: Callable) -> Callable:
        def forward(*args, **kwargs):
            with _EmbeddingCalls(self.hook):
                return inner(*args, **kwargs)

        return forward


def _first(args: tuple, kwargs: dict) -> Tensor:
    """The tensor that a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def _version(x: Tensor) -> int:
    # A compiler knows no versions: an eager pass has looked before it compiles.
    return 0 if torch.compiler.is_compiling() else x._version
