"""The sketch of a batch as the gradient of a zero probe [B, K].

Every tapped layer gets a node in autograd's graph that takes the probe beside the layer's tensors and adds nothing to
the forward pass; its backward pass hands the layer's gradient on and returns, as the probe's "gradient", the sketch
of that layer (docs/sketch.md): z = d(loss)/d(probe), and autograd adds the
layers up. So there is no order of registration and no state between passes, and a compiler sees one graph.

A second probe for each group of parameters takes the same tensors and gives the group's own sketch: one more addition
a node, in the same pass. The first probe's sum is the same to the bit with groups and without.

The layers themselves run unchanged: where their weights require a gradient they get it as ever.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients import experts, layer_ops
from gvendi_fast.sketching.gradients.forward import Forward
from gvendi_fast.sketching.gradients.graph import nodes_of
from gvendi_fast.sketching.gradients.layer_sketch import layer_sketch
from gvendi_fast.sketching.gradients.norms import Unhooked, affine_input, normalised
from gvendi_fast.sketching.gradients.parameter_uses import ParameterUses, Pass, Watched, pair_biases, settle
from gvendi_fast.sketching.gradients.taps import CONV1D, EMBEDDING, NORM, WATCHED, Tap
from gvendi_fast.sketching.gradients.token_order import TokenOrder
from gvendi_fast.sketching.gradients.token_rows import Along, Numbers, TokenRows
from gvendi_fast.sketching.gradients.use_nodes import rows_output
from gvendi_fast.sketching.gradients.weight_parts import Part, Steps
from gvendi_fast.sketching.gradients.weight_uses import OwnUses, Place

TRIAL_TOKENS = 4
# In the order in which F.embedding takes them.
_EMBEDDING_ARGUMENTS = (
    "input",
    "weight",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)
# Where a configuration of transformers keeps its choice.
_CHOICE = "_experts_implementation_internal"


@dataclass
class Group:
    """Linear layers that read one input and share its transform; a layer by itself is a group of one.

    keys: of each layer, as `layer_ops.layer_key` gives them. widths: O of every layer. transform: H S a is kept of the
    input. source, version, places: while a pass runs, the input that was read last, and the outputs of `SharedInput`
    that its layers have not taken yet.
    """

    taps: tuple[Tap, ...]
    keys: tuple[Tensor, ...]
    widths: tuple[int, ...]
    spec: str
    transform: bool
    source: Tensor | None = None
    version: int = 0
    places: list[Tensor | None] | None = None

    @property
    def path(self) -> str:
        """Of its first layer, for messages."""
        return self.taps[0].path

    def close(self) -> None:
        """Let go of the input."""
        self.source = self.places = None


class SharedInput(torch.autograd.Function):
    """The input of a group: one output for each layer, without values, whose gradient is that of the layer's output.

    Autograd calls the backward pass when the gradients of all layers have come, so that they are sketched together.
    """

    @staticmethod
    def forward(
        ctx,
        probe: Tensor,
        group_probe: Tensor | None,
        x: Tensor,
        segments: Tensor,
        group: Group,
        *keys: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.home, ctx.is_grouped = group, probe.device, group_probe is not None
        kept = torch.ops.gvendi.transformed_input(x, keys[0], group.spec) if group.transform else x
        ctx.save_for_backward(kept, segments, *keys)
        # One number seen as a whole tensor, and never read: no memory and no work.
        shape, nothing = x.shape[:-1], x.new_empty(())
        return tuple(nothing.expand(*shape, width) for width in group.widths)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        group, none = ctx.group, (None,) * (3 + len(gradients))
        kept, segments, *keys = _saved(ctx, group)
        # The loss need not depend on every layer.
        parts = [(key, e) for key, e in zip(keys, gradients, strict=True) if e is not None]
        if not parts:
            return None, None, *none
        z = torch.ops.gvendi.linear_layers(
            kept, group.transform, [e for _, e in parts], segments, [key for key, _ in parts], group.spec
        )
        return *_for_probes(ctx, z), *none


class LayerOutput(torch.autograd.Function):
    """The output of a linear layer as it is; its gradient also goes to the layer's place in a `SharedInput`."""

    @staticmethod
    def forward(ctx, output: Tensor, place: Tensor, trains: bool) -> Tensor:
        ctx.trains = trains
        # Detached and not a view: what follows may change it in place, as it may change the layer's own output.
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _handed_on(gradient, ctx.trains), gradient, None


class HandedOn(torch.autograd.Function):
    """A gradient as it is, which no second backward pass may go through: the sketch would have no part of it."""

    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:
        return gradient.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise GvendiError(
            "a tapped model's gradient is itself differentiated (create_graph=True, as for a gradient penalty), which "
            "no sketch of the samples follows; detach the tap for such steps"
        )


def _handed_on(gradient: Tensor, trains: bool) -> Tensor:
    """A layer's gradient for what comes before it."""
    if trains and torch.is_grad_enabled() and gradient.requires_grad:
        return HandedOn.apply(gradient)
    return gradient


class NormOutput(torch.autograd.Function):
    """The output of a norm layer as it is; x is the layer's input, or x_hat where no formula is known.

    axis: along which the tokens of a row of the batch run, where a row holds several samples (1 too for the flattened
    batch [B * T, d]); 0 where it holds one.
    """

    @staticmethod
    def forward(
        ctx,
        output: Tensor,
        probe: Tensor,
        group_probe: Tensor | None,
        x: Tensor,
        segments: Tensor,
        key: Tensor,
        of: TappedNorm,
        axis: int,
    ) -> Tensor:
        ctx.of, ctx.home, ctx.is_grouped = of, probe.device, group_probe is not None
        ctx.axis = axis
        ctx.save_for_backward(x, segments, key)
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        of, axis = ctx.of, ctx.axis
        x, segments, key = _saved(ctx, of)
        e = gradient
        if axis > 1:
            x, e = x.transpose(1, axis), e.transpose(1, axis)
        tokens = 0 if axis == 0 else math.prod(e.shape[: 1 if e.dim() == 2 else 2])
        z = torch.ops.gvendi.norm_layer(x, e, segments, key, tokens, of.norm, of.eps, of.probed.spec)
        return _handed_on(gradient, of.probed.trains), *_for_probes(ctx, z), None, None, None, None, None


class RefusedOutput(torch.autograd.Function):
    """The output of a layer whose gradient cannot be split by sample: an error should there be one."""

    @staticmethod
    def forward(ctx, output: Tensor, probe: Tensor, message: str) -> Tensor:
        ctx.message = message
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise GvendiError(ctx.message)


class LookedUp(torch.autograd.Function):
    """What an embedding looked up, as it is. Gradients start here: it depends on the probe, if on nothing else."""

    @staticmethod
    def forward(
        ctx,
        output: Tensor,
        probe: Tensor,
        group_probe: Tensor | None,
        ids: Tensor,
        segments: Tensor,
        key: Tensor,
        padding_idx: int,
        of: TappedEmbedding,
    ) -> Tensor:
        ctx.of, ctx.padding_idx, ctx.home = of, padding_idx, probe.device
        ctx.is_grouped = group_probe is not None
        ctx.save_for_backward(ids, segments, key)
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        sketches, of = (None, None), ctx.of
        if of.is_sketched:
            ids, segments, key = _saved(ctx, of)
            z = torch.ops.gvendi.embedding_layer(
                ids, gradient, segments, key, of.vocabulary, ctx.padding_idx, of.probed.spec
            )
            sketches = _for_probes(ctx, z)
        return _handed_on(gradient, of.probed.trains), *sketches, *[None] * 5


class HeadLoss(torch.autograd.Function):
    """(loss summed over all targets, loss float32 [R] of each) of the head, whose logits live a chunk at a time.

    hidden [B, T, d]; rows int64 [R] of the flattened batch and labels int64 [R] on its device; segments int64 [B, 2] of
    those rows on the CPU. The gradients are worked out with the loss, for the logits are gone afterwards.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, probe: Tensor, group_probe: Tensor | None, weight: Tensor, rows: Tensor, labels: Tensor,
        segments: Tensor, name: str, softcap: float | None, scale: float, spec: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss, gradient, z = torch.ops.gvendi.output_head(
            flat.index_select(0, rows), weight, labels, segments, name, softcap, scale, spec
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, z, rows)
        ctx.shape, ctx.home, ctx.is_grouped = hidden.shape, probe.device, group_probe is not None
        ctx.mark_non_differentiable(loss)
        return loss.sum(), loss

    @staticmethod
    def backward(ctx, upstream: Tensor, _):
        gradient, z, rows = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape).view(-1, ctx.shape[-1])
        whole = whole.index_copy(0, rows, gradient * upstream).view(ctx.shape)
        return whole, *_for_probes(ctx, z * upstream), *[None] * 8


def _for_probes(ctx, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a node returns as the gradients of the probe and of its group's probe."""
    z = z.to(ctx.home)
    return z, z if ctx.is_grouped else None


def _saved(ctx, of: Group | Tapped) -> tuple[Tensor, ...]:
    """The tensors that a node keeps; autograd refuses those that were changed since."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        # What a checkpoint raises, as its part runs again for these tensors, is no change in place.
        if "inplace operation" not in str(error):
            raise
        # Read here alone: a path would make a compiled graph that of one layer.
        path = of.path
        raise GvendiError(
            f"the input of layer {path!r} was changed in place after the layer read it, so its gradient is lost; "
            f"leave the layer's parameters out with exclude=[{path + '.*'!r}]"
        ) from error


def trial_ids(model: nn.Module) -> Tensor:
    """ids [1, 4] by which a model is looked at."""
    embedding = model.get_input_embeddings().weight
    return torch.arange(1, 1 + TRIAL_TOKENS, device=embedding.device)[None] % embedding.shape[0]


@dataclass(frozen=True)
class Look:
    """What four tokens showed.

    calls: of linear layers in order, each (tap, its input, the input's version).
    picks: whether layers may see other rows than the batch's, as an expert that is a layer of its own does, or in
        another order.
    outside: names of tapped parameters that something else than their own module takes.
    """

    calls: list[tuple[Tap, Tensor, int]]
    picks: bool
    outside: frozenset[str]


def look_at(model: nn.Module, taps: Sequence[Tap]) -> Look:
    """Watch the model read four tokens."""
    linear, _ = _linear_taps(taps)
    calls: list[tuple[Tap, Tensor, int]] = []
    rows, moved, order = TokenRows(1, TRIAL_TOKENS, True), set(), TokenOrder(TRIAL_TOKENS)

    def watch_norm(tap: Tap) -> Callable:
        def hook(module, args, kwargs, output):
            # Other sizes are natural here: a head's norm sees several rows a token.
            source = _first(args, kwargs)
            if isinstance(rows.of(source), (Along, Numbers)) and not rows.is_natural(source):
                moved.add(id(tap))

        return hook

    def watch(tap: Tap) -> Callable:
        def hook(module, args, kwargs, output):
            source = _first(args, kwargs)
            calls.append((tap, source, source._version))
            if source.numel() != TRIAL_TOKENS * source.shape[-1] or not rows.is_natural(source):
                moved.add(id(tap))

        return hook

    owners = {}
    for tap in taps:
        for name, attribute in ((tap.weight, "weight"), (tap.bias, "bias")):
            # Of a coded weight there may be buffers alone.
            if name and (own := tap.module._parameters.get(attribute)) is not None:
                owners[id(own)] = name
    outside = _OutsideUses(owners, rows)
    # Rows are followed where gradients are.
    with undoing() as undo, torch.enable_grad():
        start = model.get_input_embeddings().register_forward_hook(lambda module, args, out: order.begin(out))
        undo.append(start.remove)
        for tap in linear:
            undo.append(tap.module.register_forward_hook(watch(tap), with_kwargs=True).remove)
            undo.append(tap.module.register_forward_hook(order.watch).remove)
        for tap in taps:
            if tap.kind == NORM:
                undo.append(tap.module.register_forward_hook(watch_norm(tap), with_kwargs=True).remove)
        for module in model.modules():
            own = {id(p) for p in module._parameters.values() if p is not None} & set(owners)
            if own:
                undo.append(module.register_forward_pre_hook(outside.entering(own)).remove)
                undo.append(module.register_forward_hook(outside.leaving(own)).remove)
        with outside:
            out = model(input_ids=trial_ids(model), use_cache=False)
    met = {id(tap) for tap, _, _ in calls}
    picks = len(met) < len(linear) or bool(moved) or not order.is_kept(out.logits)
    return Look(calls, picks, frozenset(outside.names))


class _OutsideUses(TorchFunctionMode):
    """Sees which parameters are taken by an operation outside the modules that have them, and where rows go.

    owners: {id of a parameter: its name}.
    """

    def __init__(self, owners: dict[int, str], rows: TokenRows) -> None:
        super().__init__()
        self.owners, self.names, self.rows = owners, set(), rows
        self._inside: list[set[int]] = []

    def entering(self, own: set[int]) -> Callable:
        """The hook before a module with these parameters."""
        return lambda module, args: self._inside.append(own)

    def leaving(self, own: set[int]) -> Callable:
        """The hook after it."""
        return lambda module, args, output: self._inside.remove(own)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.rows.follow(func, args, kwargs or {}, out)
        # To ask for its shape, its type or its device is no use of a parameter.
        if any(isinstance(y, Tensor) for y in tree_leaves(out)):
            for x in tree_leaves((args, kwargs)):
                if id(x) in self.owners and not any(id(x) in own for own in self._inside):
                    self.names.add(self.owners[id(x)])
        return out


def _linear_taps(taps: Sequence[Tap]) -> tuple[list[Tap], list[Tap]]:
    """The linear layers among taps, and biases whose weight is of another sketch group and tapped by itself."""
    linear: list[Tap] = []
    biases: list[Tap] = []
    met: set[int] = set()
    for tap in taps:
        if tap.kind not in (EMBEDDING, NORM, WATCHED):
            (biases if id(tap.module) in met else linear).append(tap)
            met.add(id(tap.module))
    return linear, biases


def find_groups(
    model: nn.Module, taps: Sequence[Tap], spec: SketchSpec, look: Look | None = None
) -> list[Group]:
    """The groups of the linear layers among `taps`, found by watching the model read four tokens.

    Layers are in one group if they were called one after the other with the same tensor, their tables allow it, and
    they belong to one sketch group. look: what `look_at` gave for the same model and taps.
    """
    linear, biases = _linear_taps(taps)
    sketch, text = layer_sketch(spec), layer_ops.spec_text(spec)
    seen = (look or look_at(model, taps)).calls
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
        joins = joins and tap.group == first.group and bool(tap.weight and first.weight)
        if joins and sketch.shares_input(tap.weight, first.weight):
            together[-1].append(tap)
        else:
            together.append([tap])
        last = source, version
    # A layer that four tokens did not reach, such as an expert's, is a group of its own.
    together += [[tap] for tap in (*linear, *biases) if id(tap) not in placed]
    return [linear_group(taps, sketch, text) for taps in together]


def linear_group(taps: Sequence[Tap], sketch, text: str) -> Group:
    """A group of linear layers that read one input."""
    sizes = [layer_widths(tap.module) for tap in taps]
    return Group(
        taps=tuple(taps),
        keys=_keys(taps),
        widths=tuple(out for _, out in sizes),
        spec=text,
        transform=bool(taps[0].weight) and sketch.keeps_transform(sizes[0][0]),
    )


def find_watched(taps: Sequence[Tap], outside: Collection[str] = ()) -> list[Watched]:
    """The parameters whose uses are watched: those that no other tap fits, and those `outside` their modules."""
    found = {}
    for tap in taps:
        for attribute, name in tap.watched:
            # One that modules share is watched wherever it is met.
            found.setdefault(name, Watched(name, tap.path, tap.module, attribute, tap.group))
        for attribute, name in (("weight", tap.weight), ("bias", tap.bias)):
            if name in outside:
                is_turned = tap.kind == CONV1D and attribute == "weight"
                watched = Watched(name, tap.path, tap.module, attribute, tap.group, False, is_turned)
                found.setdefault(name, watched)
    pair_biases(list(found.values()))
    return list(found.values())


def _keys(taps: Sequence[Tap]) -> tuple[Tensor, ...]:
    return tuple(layer_ops.layer_key(tap.weight, tap.bias) for tap in taps)


def layer_parts(tap: Tap) -> tuple[Part | None, Part | None]:
    """The weight and the bias of a linear layer as parts of parameters, None for one that is not sketched."""
    inputs, outputs = layer_widths(tap.module)
    is_turned = tap.kind == CONV1D
    shape = (inputs, outputs) if is_turned else (outputs, inputs)
    of_outputs, of_inputs = Steps(int(is_turned), 1, outputs), Steps(int(not is_turned), 1, inputs)
    weight = bias = None
    if tap.weight:
        weight = Part(tap.weight, shape, False, is_turned, (0, 0), None, of_outputs, of_inputs)
    if tap.bias:
        bias = Part(tap.bias, (outputs,), False, False, (0,), None, Steps(0, 1, outputs), None)
    return weight, bias


def norm_parts(tap: Tap) -> tuple[Part | None, Part | None]:
    """The weight of a norm, by which its normalised input is multiplied, and the bias as parts of parameters."""
    width = tap.module.weight.shape[0]
    steps = Steps(0, 1, width)
    weight = Part(tap.weight, (width,), False, False, (0,), None, None, steps) if tap.weight else None
    return weight, Part(tap.bias, (width,), False, False, (0,), None, steps, None) if tap.bias else None


def layer_widths(module: nn.Module) -> tuple[int, int]:
    """(I, O) of a linear layer or of transformers' Conv1D, whose weight is stored transposed."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def gradients(total: Tensor, probes: Sequence[Tensor], probed: ProbedModel) -> Sequence[Tensor]:
    """The sketches, d(total)/d(probe), of a pass that runs.

    GvendiError where a watched parameter was used out of sight, or one that no text was found to reach was used.
    """
    uses, unreached = probed.uses, {place.name: place.parameter for place in probed.unreached}
    unreached = {name: p for name, p in unreached.items() if p is not None and p.requires_grad}
    leaves = [] if uses is None else list(uses.leaves.values())
    found = torch.autograd.grad(total, [*probes, *unreached.values(), *leaves], allow_unused=True)
    end = len(probes) + len(unreached)
    late = [name for name, g in zip(unreached, found[len(probes) : end], strict=True) if g is not None]
    if late:
        raise GvendiError(
            f"the parameters {', '.join(map(repr, late))} were left out as ones that text does not reach, but this "
            "batch uses them, so their gradient would be missing; leave them out knowingly with "
            f"exclude={late}, or drop the row"
        )
    if uses is not None:
        uses.missed(found[end:])
    # A loss that no sketched parameter takes part in has a zero gradient.
    return [torch.zeros_like(p) if z is None else z for p, z in zip(probes, found, strict=False)]


class ProbedModel:
    """A model with taps; inside `attached`, and between `begin` and `end`, its forward pass has the probe's nodes.

    taps: of the layers to sketch. unreached: parameters left out as ones that text does not reach.
    Raises GvendiError, in the backward pass, where the samples of a batch cannot be
    separated in a layer, and where a layer's input was changed in place.
    """

    def __init__(
        self, model: nn.Module, taps: Sequence[Tap], spec: SketchSpec, unreached: Sequence[Place] = ()
    ) -> None:
        self.unreached = tuple(unreached)
        self.spec, self._spec = layer_ops.spec_text(spec), spec
        look = look_at(model, taps)
        self.groups, self.picks = find_groups(model, taps, spec, look), look.picks
        self.outside = look.outside
        self.watched = find_watched(taps, look.outside)
        # Names of those of which `try_uses` has seen a use.
        self.met: frozenset[str] = frozenset()
        self.choices = experts.choices({id(w.module): w.module for w in self.watched}.values())
        # Of the pass that runs, where uses of parameters or rows of tokens are followed.
        self.uses: ParameterUses | None = None
        # While `try_uses` runs.
        self.own_uses: OwnUses | None = None
        # Of the pass that runs.
        self.thread: int | None = None
        # The backward pass inside which the pass was begun, -1 where it was in none.
        self.outer = -1
        # A layer whose input an eager pass has seen changed before the next layer of its group read it.
        self.changed_between: str | None = None
        self.tapped: list[Tapped] = [
            TappedLinear(self, group, slot) for group in self.groups for slot in range(len(group.taps))
        ]
        for tap in taps:
            if tap.kind in (EMBEDDING, NORM):
                self.tapped.append((TappedNorm if tap.kind == NORM else TappedEmbedding)(self, tap))
        self.end()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A key is a number of the process that gave it; read elsewhere it would stand for another layer.
        self.__dict__.update(state)
        for group in self.groups:
            group.keys = _keys(group.taps)
        for tapped in self.tapped:
            (tapped.key,) = _keys([tapped.tap])

    def try_uses(self, core: nn.Module, ids: Tensor, others: Sequence[Place] = ()) -> None:
        """Let the model read a few tokens, which shows how it uses its watched parameters, and the others.

        core: the part of the model that a pass runs. ids [1, T] of a text. others: parameters that
        are sketched without a tap.
        Raises GvendiError naming a parameter for whose use no sketch is known, or that is used out of sight.
        """
        probe = torch.zeros(1, self._spec.dim, device=ids.device, requires_grad=True)
        segments = torch.tensor([[0, ids.shape[1]]])
        count = 1 + max((t.tap.group for t in self.tapped if t.tap.group is not None), default=-1)
        count = max(count, 1 + max((w.group for w in self.watched if w.group is not None), default=-1))
        with undoing() as undo, self.attached(), torch.enable_grad():
            undo.append(functools.partial(setattr, self, "own_uses", None))
            self.begin(probe, segments, ids, [probe] * count)
            # From here on, so that watched parameters among them have leaves beside.
            self.own_uses = OwnUses(self._require(undo, others))
            with self.following():
                out = core(input_ids=ids, use_cache=False)
            reached = [
                x for x in tree_leaves(list(out.values())) if isinstance(x, Tensor) and x.requires_grad
            ]
            self.own_uses.check(reached)
            if self.uses is not None:
                self.met = frozenset(self.uses.met)
                # A use out of sight is known by its gradient.
                gradients(sum(x.float().sum() for x in reached), [probe], self)
        settle(self.watched)

    def _require(self, undo: list[Callable[[], object]], others: Sequence[Place]) -> dict[int, str]:
        """{id: name} of the parameters that have a tap, and of others, which require a gradient until undone."""
        taps = (tapped.tap for tapped in self.tapped)
        own = [Place(name, tap.module, attribute) for tap in taps for attribute, name in tap.parameters]
        return {id(p): place.name for place in (*own, *others) if (p := place.require(undo)) is not None}

    def begin(
        self, probe: Tensor, segments: Tensor, ids: Tensor, group_probes: Sequence[Tensor] = ()
    ) -> None:
        """Start a pass: probe float32 [B, K], segments int64 [B, 2] on the CPU, ids [B, T] of the batch.

        segments: the rows of the flattened [B * T] batch in which a sample's gradient can differ from zero.
        group_probes: one float32 [B, K] for each sketch group, none where sketches are not kept by group.
        """
        self.give_group_probes(group_probes)
        self.probe, self.segments, self.ids = probe, segments, ids
        self.uses = None
        if self.watched or self.picks:
            # Tokens may change places within their sample, so that those with a gradient are not known beforehand.
            starts = torch.arange(ids.shape[0]) * ids.shape[1]
            self.segments = segments = torch.stack([starts, starts + ids.shape[1]], dim=1)
            current = Pass(self._spec, probe, tuple(group_probes), segments, *ids.shape)
            self.uses = ParameterUses(self.watched, current)

    def outside_of_passes(self, tapped: Tapped, output: Any) -> None:
        """A layer gave this while no pass ran; GvendiError where it should belong to one."""

    def runs(self, tapped: Tapped, output: Any = None) -> bool:
        """Whether a layer that runs now belongs to the pass; output: what it gave, where that is known."""
        return self.runs_here()

    # Whether the pass is a training step: inputs may be kept in the narrower number format of a layer's output, and
    # gradients may be differentiated themselves.
    trains = False
    # Where the model may be compiled by others: a function (run, args, kwargs) that no compiler traces.
    breaking: Callable[..., Any] | None = None

    def segments_of(self, shape: torch.Size) -> Tensor | None:
        """int64 [B, 2]: each sample's rows of an input [..., I] of a linear layer; None if they cannot be told."""
        batch, length = self.ids.shape
        is_whole = math.prod(shape[:-1]) == batch * length and (len(shape) <= 2 or shape[0] == batch)
        return self.segments if is_whole else None

    def token_axis(self, shape: torch.Size) -> int | None:
        """The `axis` of `NormOutput` for an input [..., d] of a norm; None if its samples cannot be told apart."""
        batch = self.probe.shape[0]
        is_apart = not (math.prod(shape[:-1]) % batch or (len(shape) > 2 and shape[0] != batch))
        return 0 if is_apart else None

    def every_row(self, ids: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """What an embedding looked up, and was asked for: for every row of the batch, as given here."""
        return ids, out

    def carried(self, output: Tensor, result: Tensor) -> Tensor:
        """The result, a layer's output with its node: its rows are those of the output."""
        if self.uses is not None:
            self.uses.rows.carry(output, result)
        return result

    def following(self) -> AbstractContextManager:
        """Around the model's forward: sees the uses of watched parameters, where there are any."""
        return self.uses or nullcontext()

    def give_group_probes(self, probes: Sequence[Tensor]) -> None:
        """Let every layer have the probe of its sketch group; none where sketches are not kept by group."""
        for tapped in self.tapped:
            group = tapped.tap.group
            tapped.group_probe = probes[group] if probes and group is not None else None

    def read(self) -> None:
        """The forward pass is over: inputs of layers are let go, for a part that is run again has others."""
        for group in self.groups:
            group.close()

    def end(self) -> None:
        """Let go of the pass's tensors; the graph holds what the backward pass needs."""
        self.probe = self.segments = self.ids = None
        self.give_group_probes(())
        self.read()

    @contextmanager
    def attached(self, others: Sequence[Forward] = ()) -> Iterator[None]:
        """Taps attached inside, and then `others`; the model as it was before outside."""
        with undoing() as undo:
            undo.append(self._leave)
            self.thread, self.outer = threading.get_ident(), torch._C._current_graph_task_id()
            for forward in (*self.tapped, *others):
                undo.append(forward.remove)
                forward.attach()
            for place in self.unreached:
                place.require(undo)
            for watched in self.watched:
                if watched.name not in self.outside and not watched.parameter.is_inference():
                    undo.append(functools.partial(watched.parameter.requires_grad_, False))
                    watched.parameter.requires_grad_(True)
            for config, choice in self.choices:
                undo.append(functools.partial(setattr, config, _CHOICE, getattr(config, _CHOICE)))
                setattr(config, _CHOICE, choice)
            yield

    def _leave(self) -> None:
        self.end()
        self.thread = self.uses = None

    def runs_here(self) -> bool:
        """Whether a pass of this thread runs; False for one that was kept from a pass that has ended.

        Raises GvendiError in another thread than that of the pass: the model is changed, and its sketches would be.
        """
        # A compiler reads what its own block is given, in the thread of the pass.
        if torch.compiler.is_dynamo_compiling():
            return True
        if self.thread is None:
            return False
        # A checkpoint runs a part of the pass again: in its backward pass, on a GPU in autograd's own thread.
        task = torch._C._current_graph_task_id()
        if task not in (-1, self.outer):
            if self.uses is not None:
                raise GvendiError(
                    "the model's own code runs a part of it under torch.utils.checkpoint in eval mode too, and which "
                    "rows are whose is not followed a second time; switch checkpointing off for this call"
                )
            return True
        if self.thread == threading.get_ident():
            return True
        raise GvendiError(
            "this model cannot be run while another thread sketches with it (or did when this process was forked): it "
            "is in eval mode and takes no gradients for so long; wait for that call, or give the sketcher a copy "
            "(copy.deepcopy)"
        )


class Tapped(Forward):
    """A module with a tap, whose parameters the operators know by `key`."""

    def __init__(self, probed: ProbedModel, tap: Tap) -> None:
        super().__init__(tap.module)
        (self.probed, self.tap), (self.key,) = (probed, tap), _keys([tap])
        # Of the pass that runs, that of the sketch group of its parameters.
        self.group_probe: Tensor | None = None
        # Whether its parameters are used outside the module too.
        self.is_watched = bool({tap.weight, tap.bias} & probed.outside)

    @property
    def path(self) -> str:
        """The module's, for messages."""
        return self.tap.path

    @property
    def stands(self) -> Callable[..., Any]:
        """As `Forward.stands`; outside of every graph where the model may be compiled by others."""
        return self.run if self.probed.breaking is None else self._run_uncompiled

    def _run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.probed.breaking(self.run, args, kwargs)
        return self.run(*args, **kwargs)

    def own_parameters(self) -> list[Tensor]:
        """The module's parameters that are sketched here, in the order of `tap.parameters`."""
        return [getattr(self.module, attribute) for attribute, _ in self.tap.parameters]

    def own(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the module gives."""
        uses, trial = self.probed.uses, self.probed.own_uses
        # Before the module runs, which may change its input in place.
        ends = None if trial is None else nodes_of((args, kwargs))
        if uses is None or not self.is_watched:
            output = self.inner(*args, **kwargs)
        else:
            before = None if uses.seen is None else nodes_of((args, kwargs))
            with uses.out_of_sight(self.module._parameters.values()):
                output = self.inner(*args, **kwargs)
            if before is not None:
                uses.seen.note(output, before)
        if trial is not None and self.tap.kind != EMBEDDING:
            trial.note(self.module, ends, output)
        return output

    def is_followed(self, x: Tensor) -> bool:
        """Whether it is known whose rows an input has: those of a constant are not followed where rows may move."""
        return x.requires_grad or self.probed.uses is None or self.probed.probe.shape[0] == 1

    def refused(self, output: Tensor, message: str) -> Tensor:
        """The output; GvendiError once a gradient comes, for some layers are asked for a number (DoRA's for a norm)."""
        return RefusedOutput.apply(output, self.probed.probe, message)

    def by_rows(self, output: Tensor, a: Tensor, samples: Tensor, parts: Sequence[Part | None]) -> Tensor:
        """The output with nodes for rows that are not the batch's: of an expert that is a layer of its own.

        a [..., I]; samples int64 [R] of its rows. parts: of the weight and of the bias, None for one left out.
        """
        current, device = self.probed.uses.current, output.device
        probes = (current.probe,) if self.group_probe is None else (current.probe, self.group_probe)
        result, rows = output, a.to(device).reshape(-1, a.shape[-1])
        for factor, part in zip((rows, None), parts, strict=True):
            if part is not None:
                result = rows_output(result, factor, samples.to(device), part, current, probes)
        return self.probed.carried(output, result)


class TappedLinear(Tapped):
    """A linear layer, the `slot`-th of its group."""

    def __init__(self, probed: ProbedModel, group: Group, slot: int) -> None:
        super().__init__(probed, group.taps[slot])
        self.group, self.slot = group, slot

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, whose gradient is sketched."""
        output = self.own(args, kwargs)
        # The input may be a constant: the output has a gradient all the same, and the weight with it.
        if not self.probed.runs(self, output) or not torch.is_grad_enabled():
            return output
        x, uses = _first(args, kwargs), self.probed.uses
        shape = x.shape
        segments = self.probed.segments_of(shape)
        is_natural = uses is None or (uses.rows.is_natural(x) and self.is_followed(x))
        samples = None
        if uses is not None and (segments is None or not is_natural) and self.is_followed(x):
            samples = uses.rows.samples(x)
        if samples is not None:
            return self.by_rows(output, x.detach(), samples, layer_parts(self.tap))
        if segments is None or not is_natural:
            tap, (batch, length) = self.tap, self.probed.ids.shape
            return self.refused(
                output,
                f"layer {tap.path!r} saw an input of shape {tuple(shape)} for a batch of {batch} x {length} "
                f"tokens, so its gradient cannot be split by sample; exclude {tap.weight or tap.bias!r}",
            )
        return self.probed.carried(
            output, LayerOutput.apply(output, self._place(x, output, segments), self.probed.trains)
        )

    def _place(self, x: Tensor, output: Tensor, segments: Tensor) -> Tensor:
        """The layer's output of the group's `SharedInput`, which the first layer to read x makes."""
        group, probed, slot, version = self.group, self.probed, self.slot, _version(x)
        if group.source is x and group.version != version:
            probed.changed_between = group.path
        if group.source is not x or group.version != version or group.places[slot] is None:
            # A device map may leave it to the layer to fetch its input.
            source = x.detach().to(output.device)
            if probed.trains and source.dtype != output.dtype and not group.transform:
                # Under autocast the weight's gradient is that of the narrow input, which takes half the memory too.
                source = source.to(output.dtype)
            group.source, group.version = x, version
            places = SharedInput.apply(probed.probe, self.group_probe, source, segments, group, *group.keys)
            group.places = list(places)
        places = group.places
        place, places[slot] = places[slot], None
        # The input is held until the last layer has read it, no longer.
        if all(p is None for p in places):
            group.close()
        return place


class TappedNorm(Tapped):
    """A norm layer. norm: the formula of x_hat as `layer_ops.norm_layer` takes it, "given" where none is known."""

    def __init__(self, probed: ProbedModel, tap: Tap) -> None:
        super().__init__(probed, tap)
        self.unhooked = Unhooked(tap.module)
        self.norm, self.eps = "given" if tap.norm == "affine" else tap.norm, tap.eps

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """The norm's output, whose gradient is sketched."""
        output = self.own(args, kwargs)
        if not self.probed.runs(self, output) or not torch.is_grad_enabled():
            return output
        probed, given = self.probed, _first(args, kwargs)
        x = given.detach().to(output.device)
        shape = x.shape
        followed = self.is_followed(given)
        picked = probed.uses is not None and not (followed and probed.uses.rows.is_natural(given))
        samples = probed.uses.rows.samples(given) if picked and followed else None
        axis = probed.token_axis(shape)
        if samples is None and (picked or axis is None):
            tap, batch = self.tap, probed.probe.shape[0]
            return self.refused(
                output,
                f"norm {tap.path!r} saw an input of shape {tuple(shape)}, whose rows do not belong to "
                f"{batch} samples; exclude {tap.weight or tap.bias!r}",
            )
        if self.norm == "given":
            with torch.no_grad():
                x = affine_input(self.unhooked, x)
        if samples is not None:
            x_hat = x if self.norm == "given" else normalised(x, self.norm, self.eps)
            return self.by_rows(output, x_hat, samples, norm_parts(self.tap))
        result = NormOutput.apply(
            output, probed.probe, self.group_probe, x, probed.segments, self.key, self, axis
        )
        return probed.carried(output, result)


class TappedEmbedding(Tapped):
    """An embedding module: what the F.embedding call inside its forward looks up."""

    def __init__(self, probed: ProbedModel, tap: Tap) -> None:
        super().__init__(probed, tap)
        self.vocabulary, self.is_sketched = tap.module.weight.shape[0], tap.weight is not None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, with a gradient at what it looked up."""
        if not self.probed.runs(self):
            out = self.inner(*args, **kwargs)
            self.probed.outside_of_passes(self, out)
            return out
        calls = _EmbeddingCalls(
            self._looked_up, self.module._parameters.get("weight") if self.is_sketched else None
        )
        with calls:
            out = self.own(args, kwargs)
        if self.is_sketched and not calls.count and torch.is_grad_enabled():
            raise self.no_look_up("is run without a call of F.embedding with its weight itself")
        return out

    def no_look_up(self, why: str) -> GvendiError:
        """The error for a look-up that cannot be sketched."""
        tap = self.tap
        return GvendiError(
            f"embedding {tap.path!r} {why}, so its gradient is not that of plain look-ups; leave it out with "
            f"exclude=[{tap.weight!r}]"
        )

    def _looked_up(self, ids: Tensor, out: Tensor, padding_idx: int | None, by_frequency: bool) -> Tensor:
        probed = self.probed
        batch, length = probed.ids.shape
        if self.is_sketched and by_frequency:
            raise self.no_look_up("divides its gradient by how often a token occurs (scale_grad_by_freq)")
        if self.is_sketched:
            ids, out = probed.every_row(ids, out)
        shape = ids.shape
        if self.is_sketched and (
            math.prod(shape) != batch * length or (len(shape) > 1 and shape[0] != batch)
        ):
            tap = self.tap
            raise GvendiError(
                f"embedding {tap.path!r} is looked up by ids of shape {tuple(shape)} for a batch of {batch} x {length} "
                "tokens, so its gradient cannot be split by sample; give the model the rows that it reads, where it or "
                f"a hook changes the batch, or exclude {tap.weight!r}"
            )
        if probed.own_uses is not None:
            probed.own_uses.note(self.module, frozenset(), out)
        padding = -1 if padding_idx is None else padding_idx
        return LookedUp.apply(
            out,
            probed.probe,
            self.group_probe,
            ids.to(out.device),
            probed.segments,
            self.key,
            padding,
            self,
        )


class _EmbeddingCalls(TorchFunctionMode):
    """Sees the F.embedding call inside an embedding module's forward, whatever the subclass adds around it.

    weight: what is looked up in, None for whatever is. count: of the calls seen.
    """

    def __init__(self, hook: Callable, weight: Tensor | None) -> None:
        super().__init__()
        self.hook, self.weight, self.count = hook, weight, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.embedding:
            given = dict(zip(_EMBEDDING_ARGUMENTS, args, strict=False)) | kwargs
            if self.weight is None or given["weight"] is self.weight:
                self.count += 1
                by_frequency = bool(given.get("scale_grad_by_freq"))
                out = self.hook(given["input"], out, given.get("padding_idx"), by_frequency)
        return out


def _first(args: tuple, kwargs: dict) -> Tensor:
    """The tensor that a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def _version(x: Tensor) -> int:
    # A compiler knows no versions: an eager pass has looked before it compiles.
    return 0 if torch.compiler.is_dynamo_compiling() else x._version
