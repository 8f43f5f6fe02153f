"""The layers of a model that is trained with the nodes of a tap, and the passes that run through them."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.as_written import breaking
from gvendi_fast.sketching.gradients.boundaries import Samples
from gvendi_fast.sketching.gradients.forward import MODELS
from gvendi_fast.sketching.gradients.graph import nodes_of
from gvendi_fast.sketching.gradients.layer_sketch import layer_sketch
from gvendi_fast.sketching.gradients.names import named_modules
from gvendi_fast.sketching.gradients.parameter_uses import ParameterUses, SeenEdges
from gvendi_fast.sketching.gradients.parameter_uses import Pass as UsePass
from gvendi_fast.sketching.gradients.probe import (
    ProbedModel,
    Tapped,
    TappedEmbedding,
    TappedLinear,
    TappedNorm,
    linear_group,
)
from gvendi_fast.sketching.gradients.quantised import parameters_by_name
from gvendi_fast.sketching.gradients.small_parameters import check_small
from gvendi_fast.sketching.gradients.taps import EMBEDDING, NORM, WATCHED, Tap
from gvendi_fast.sketching.gradients.watched_training import RunAgain, around, hidden_use

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher


# Under what name a node of autograd's graph knows its pass, and how far from a layer's output it is looked for.
_PASS = "gvendi_fast pass"
_NEAR = 64
# Operations between hidden states and a head that leave rows and tokens in their order.
_IN_ORDER = (
    *(
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "ToCopy",
        "Clone",
        "Alias",
        "Mul",
        "Div",
        "Add",
        "Sub",
        "Neg",
        "Tanh",
    ),
    *(
        "NativeDropout",
        "FusedDropout",
        "NativeLayerNorm",
        "FusedRmsNorm",
        "Addmm",
        "Mm",
        "Mv",
        "Linear",
        "TBackward",
    ),
    *("Gelu", "Silu", "Relu"),
)


@dataclass(eq=False)
class Pass:
    """One forward pass under a tap, and what its backward pass has given so far.

    z: the gradients of its probes, the first of all parameters, then of every sketch group; None before. met: how often
    layers ran, by the id of their module. missed: parameters of which autograd's graph shows a use that no layer saw.
    followed: names of those whose uses are followed and of which one was seen. tokens int64 [S] and tags int64 [S],
    None where the batch does not say.
    """

    number: int
    samples: Samples
    tokens: Tensor | None
    tags: Tensor | None
    z: list[Tensor | None]
    met: Counter[int] = field(default_factory=Counter)
    missed: dict[str, Tapped] = field(default_factory=dict)
    followed: set[str] = field(default_factory=set)
    has_come: bool = False

    def add(self, place: int, z: Tensor) -> None:
        """Add what a backward pass gave to probe number `place`."""
        self.has_come = True
        before = self.z[place]
        self.z[place] = z.detach() if before is None else before + z.detach().to(before.device)


@dataclass(eq=False)
class Running:
    """The probes of a pass, which its forward pass needs, and a checkpoint that runs a part of it again."""

    by: TappedModel
    of: Pass
    probes: list[Tensor]
    ids: Tensor
    given: Tensor
    labels: Tensor | None = None
    shifted: Tensor | None = None
    uses: ParameterUses | None = None
    # Positions of a row, in order, that a head is asked for; None for all.
    kept: Tensor | None = None
    thread: int = field(default_factory=threading.get_ident)


class TappedModel(ProbedModel):
    """The taps of a sketcher on the layers of a model that is trained: the sketcher's own, or another of its kind."""

    trains = True

    def __init__(self, sketcher: GradientSketcher, model: nn.Module) -> None:
        probed = sketcher._probed
        self.sketcher, self.model = sketcher, model
        self.breaking = breaking()
        self.spec, self._spec = probed.spec, probed._spec
        modules = _modules_of(sketcher, model)
        bound = functools.partial(_bound, modules)
        self.picks = probed.picks
        self.follows = bool(probed.watched or probed.picks)
        # Rows are followed from the embedding on.
        starts = self.follows or _needs_start(sketcher, model)
        sketch = layer_sketch(self._spec)
        together = [group.taps for group in probed.groups] + [(tap,) for tap in sketcher._head_taps]
        self.groups = [linear_group([bound(tap) for tap in taps], sketch, self.spec) for taps in together]
        self.outside, self.own_uses, self.changed_between = probed.outside, None, None
        there = parameters_by_name(model)
        self.unreached_parameters = {
            place.name: there[place.name]
            for place in probed.unreached
            if place.name in there and place.name not in sketcher.left_out_knowingly
        }
        self.watched = [replace(w, module=modules[id(w.module)]) for w in probed.watched]
        self.tapped: list[Tapped] = [
            TappedLinear(self, group, slot) for group in self.groups for slot in range(len(group.taps))
        ]
        for tapped in probed.tapped:
            tap = tapped.tap
            if tap.kind == NORM or (tap.kind == EMBEDDING and (tap.weight or starts)):
                self.tapped.append((TappedNorm if tap.kind == NORM else TappedEmbedding)(self, bound(tap)))
        self.thread: int | None = None
        base = getattr(model, "base_model", None)
        self.core: nn.Module = base if isinstance(base, nn.Module) else model
        inside = {id(module) for module in self.core.modules()}
        # Layers that may be run after the model under them, by themselves.
        self.above = {id(tapped.module) for tapped in self.tapped} - inside
        self._running: Running | None = None
        # Those whose graph lives.
        self.alive: weakref.WeakSet[Running] = weakref.WeakSet()
        # In what settings autograd's graph was looked at for uses out of sight.
        self.looked: set[tuple] = set()
        linear = [tapped.module for tapped in self.tapped if isinstance(tapped, TappedLinear)]
        followed = [w.module for w in self.watched] + (linear if self.picks else [])
        taps = [tapped.module for tapped in self.tapped]
        self.again = [RunAgain(m, self.seeing_again) for m in around(self.core, followed, taps)]
        # The pass that the backward pass at work came from.
        self.backward: Running | None = None
        # Whether a layer gave numbers of a format narrower than float32, as under an autocast inside the model.
        self.is_narrow = False
        # How many calls of the model this thread is inside.
        self.depth = 0

    @property
    def probe(self) -> Tensor:
        """Of the pass that runs."""
        return self.running.probes[0]

    @property
    def running(self) -> Running | None:
        """The pass that runs."""
        return self._running

    @running.setter
    def running(self, running: Running | None) -> None:
        if running is not self._running:
            self._running = running
            if self.sketcher.groups is not None:
                self.give_group_probes(() if running is None else running.probes[1:])

    @property
    def uses(self) -> ParameterUses | None:
        """Of the pass that runs, where uses of parameters or rows of tokens are followed."""
        return None if self.running is None else self.running.uses

    def follow(self, running: Running) -> None:
        """Have the uses of watched parameters, and the rows of tokens, followed in a pass."""
        samples = running.of.samples
        owners = samples.owners().to(running.ids.device) if samples.is_packed else None
        probe, *group_probes = running.probes
        length = samples.shape[1]
        current = UsePass(
            self._spec, probe, tuple(group_probes), samples.segments, len(samples), length, True, owners
        )
        running.uses = uses = ParameterUses(self.watched, current)
        running.of.followed = uses.met
        trained = {id(w.parameter): w.name for w in self.watched if w.parameter.requires_grad}
        if trained and self.settings() not in self.looked:
            uses.seen = SeenEdges(trained)
        uses.__enter__()

    def stop_following(self) -> None:
        """The forward pass is over, or has failed."""
        uses = self.uses
        if uses is not None and uses.is_on:
            uses.__exit__(None, None, None)

    def look_for_hidden(self, running: Running, output: Any) -> None:
        """GvendiError where autograd's graph shows a use of a watched parameter that was not seen."""
        uses = running.uses
        seen, uses.seen = uses.seen, None
        if seen is None:
            return
        names = seen.hidden(values_of(output))
        if names:
            raise hidden_use(self.watched, names)
        check_small(self.watched, self.sketcher.coverage.total)
        self.looked.add(self.settings())

    def seeing_again(self) -> AbstractContextManager:
        """What a part of the pass that is run again runs in."""
        if torch.compiler.is_dynamo_compiling() or not self.runs_here():
            return nullcontext()
        uses = self.uses
        return nullcontext() if uses is None or uses.is_on else uses

    def settings(self) -> tuple:
        """What may change how a model computes."""
        config = getattr(self.model, "config", None)
        names = "_attn_implementation", "_experts_implementation"
        return self.model.training, *(getattr(config, name, None) for name in names)

    @property
    def segments(self) -> Tensor:
        """Of the pass that runs."""
        return self.running.of.samples.segments

    @property
    def ids(self) -> Tensor:
        """Of the pass that runs."""
        return self.running.ids

    def segments_of(self, shape: torch.Size) -> Tensor | None:
        """As `ProbedModel.segments_of`; rows of a batch may also have lost some of their tokens, as many in each."""
        samples = self.running.of.samples
        batch, length = samples.shape
        count = math.prod(shape[:-1])
        if count == batch * length and (len(shape) <= 2 or shape[0] == batch):
            return samples.segments
        kept = self.running.kept
        if samples.is_packed and kept is not None and tuple(shape[:-1]) == (batch, len(kept)):
            tokens = (torch.arange(batch)[:, None] * length + kept).reshape(-1)
            return torch.searchsorted(tokens, samples.segments).contiguous()
        # A head by itself, which has been found to read slices in their order.
        is_head = self.depth == 0 and count % batch == 0
        if samples.is_packed or not (batch == 1 or is_head or (len(shape) > 2 and shape[0] == batch)):
            return None
        begins = torch.arange(batch) * (count // batch)
        return torch.stack([begins, begins + count // batch], dim=1)

    def outside_of_passes(self, tapped: Tapped, output: Any) -> None:
        """As `ProbedModel.outside_of_passes`: `runs` raises the error."""
        self.runs(tapped, output)

    def token_axis(self, shape: torch.Size) -> int | None:
        """As `ProbedModel.token_axis`; with several samples in a row it must be known where the tokens run."""
        samples = self.running.of.samples
        batch, length = samples.shape
        if not samples.is_packed:
            is_apart = not (math.prod(shape[:-1]) % batch or (len(shape) > 2 and shape[0] != batch))
            return 0 if is_apart else None
        if len(shape) == 2:
            # The flattened batch: one row a token, or nothing that is known.
            return 1 if shape[0] == batch * length else None
        along = [axis for axis in range(1, len(shape) - 1) if shape[axis] == length]
        return along[0] if shape[0] == batch and len(along) == 1 else None

    def every_row(self, ids: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Positions that are looked up once for all rows are looked up for each: values are the same."""
        batch, length = self.running.of.samples.shape
        if batch > 1 and math.prod(ids.shape) == length and ids.shape[-1] == length and ids.dim() <= 2:
            return ids.reshape(1, length).expand(batch, length), out.reshape(1, length, -1).expand(
                batch, length, -1
            )
        return ids, out

    def runs_here(self) -> bool:
        """Whether a layer that runs now belongs to a pass: of this call, or of a checkpoint's part run again."""
        if self.depth == 0 and torch._C._current_graph_task_id() != -1:
            self.running = self.backward or self._only_one_waiting()
            return self.running is not None
        return self.depth > 0 and self.running is not None and threading.get_ident() == self.running.thread

    def _only_one_waiting(self) -> Running | None:
        """The pass that a part belongs to which runs by itself, where autograd's graph does not tell."""
        waiting = [running for running in self.alive if not running.of.has_come]
        if len(waiting) > 1:
            raise GvendiError(
                "a part of the tapped model runs by itself (a head on hidden states whose graph was cut, a part that "
                f"a checkpoint runs again), and of which of {len(waiting)} forward passes is not known; run a "
                "backward pass for each forward pass before the next one, or keep the part within the graph and out "
                "of the checkpoint"
            )
        return waiting[0] if waiting else self.running

    def backward_ends(self) -> None:
        """The backward pass at work is through."""
        self.backward = None

    def end(self) -> None:
        """Let go of the pass's tensors; the graph holds what its backward pass needs."""
        for group in self.groups:
            group.close()
        self.running = self.backward = None

    def runs(self, tapped: Tapped, output: Any = None) -> bool:
        """As `ProbedModel.runs`; GvendiError for a layer with a gradient that no forward pass of the model runs."""
        is_above = id(tapped.module) in self.above and isinstance(output, Tensor)
        if is_above and self.depth == 0 and (found := self._pass_near(output)) is not None:
            # A head that is called by itself, after the model under it, or that a checkpoint runs again.
            self.running, unlike = found
            if unlike is not None:
                raise GvendiError(
                    f"layer {tapped.path!r} was called by itself on tokens that are not told apart ({unlike}): give it "
                    "the model's hidden states [B, T, d] as they are, or a slice of them along the tokens"
                )
            self.running.of.met[id(tapped.module)] += 1
            return True
        if self.runs_here():
            # What a pass without gradients runs, for its metrics, makes no node.
            if torch.is_grad_enabled():
                self.running.of.met[id(tapped.module)] += 1
                self.is_narrow |= isinstance(output, Tensor) and output.dtype.itemsize < 4
            return True
        if not torch.is_grad_enabled() or not (isinstance(output, Tensor) and output.requires_grad):
            return False
        if MODELS.is_claimed([tapped.module]):
            # A sketcher's own pass over the same model.
            return False
        if is_above and (running := self._only_one_waiting()) is not None:
            # Of what it read no pass is told by the graph, as where a loss in chunks cuts it.
            self.running = running
            self.running.of.met[id(tapped.module)] += 1
            return True
        where = "in another thread than the tap's" if self.thread != threading.get_ident() else "by itself"
        raise GvendiError(
            f"layer {tapped.path!r} of the tapped model was run outside of a forward pass of the model, {where} or by "
            "another model that shares it, so whose samples its gradient is of is not known; detach the tap for that, "
            "run it under torch.no_grad(), or leave the layer out with exclude="
        )

    def _pass_near(self, output: Tensor) -> tuple[Running, str | None] | None:
        """The pass whose result a layer above the model read, by autograd's graph, and what was done to it in between.

        None where no result is near. The second is None where all of it leaves rows and tokens in their order.
        """
        waiting: list[tuple[Any, str | None]] = [(node, None) for node in nodes_of(output)]
        several = sum(not running.of.has_come for running in self.alive) > 1
        found: dict[int, tuple[Running, str | None]] = {}
        seen: set[Any] = set()
        while waiting and (several or len(seen) < _NEAR):
            node, unlike = waiting.pop(0)
            if node is None or node in seen:
                continue
            seen.add(node)
            running = node.metadata.get(_PASS)
            if isinstance(running, Running) and running.by is self:
                found.setdefault(id(running), (running, unlike))
                continue
            waiting += [(following, unlike or _reorders(node)) for following, _ in node.next_functions]
        if len(found) > 1:
            return next(iter(found.values()))[0], f"they come from {len(found)} forward passes"
        return next(iter(found.values()), None)

    def note_result(self, output: Any, running: Running) -> None:
        """Let autograd's graph tell which pass a result is of, for as long as it lives."""
        for x in tree_leaves(values_of(output)):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                x.grad_fn.metadata[_PASS] = running
                x.register_hook(functools.partial(_reach, self, running))


def _reorders(node: Any) -> str | None:
    """The name of an operation that may leave tokens in another order or out, None for one that does not."""
    name = node.name()
    if name.startswith("SliceBackward"):
        return f"{name} of rows" if getattr(node, "_saved_dim", 1) == 0 else None
    kept = name.startswith(_IN_ORDER) or name.startswith(("LayerOutput", "NormOutput", "HandedOn"))
    return None if kept else name


def values_of(output: Any) -> Any:
    """What a model gave, as nested lists and mappings: a class of one's own by its attributes."""
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, (Tensor, tuple, list)) or not hasattr(output, "__dict__"):
        return output
    return list(vars(output).values())


def _reach(tapped: TappedModel, running: Running, gradient: Tensor) -> None:
    """A backward pass has reached the output of a forward pass: what checkpoints run again is of that pass."""
    if tapped.backward is None:
        Variable._execution_engine.queue_callback(tapped.backward_ends)
    tapped.backward = running


def _modules_of(sketcher: GradientSketcher, model: nn.Module) -> dict[int, nn.Module]:
    """{id of a module of the sketcher's model: the module of `model` in its place}."""
    taps = [tapped.tap for tapped in sketcher._probed.tapped] + list(sketcher._head_taps)
    taps += [Tap(w.path, w.module, WATCHED, None, None) for w in sketcher._probed.watched]
    own = {id(module) for module in model.modules()}
    there = parameters_by_name(model)
    wrong = [
        name
        for name, shape in sketcher.shapes.items()
        if name not in there or (tuple(there[name].shape) != shape and not sketcher.is_coded(name))
    ]
    if wrong:
        found = tuple(there[wrong[0]].shape) if wrong[0] in there else "none"
        raise GvendiError(
            f"the model to tap is not of the sketcher's kind: the sketcher has {wrong[0]!r} of shape "
            f"{sketcher.shapes[wrong[0]]}, the model {found}; make a sketcher of this model"
        )
    if all(id(tap.module) in own for tap in taps):
        return {id(tap.module): tap.module for tap in taps}
    at: dict[str, list[nn.Module]] = {}
    for path, module in named_modules(model):
        at.setdefault(path, []).append(module)
    found = {}
    for tap in taps:
        fits = [m for m in at.get(tap.path, []) if _has(m, tap)]
        if len(fits) != 1:
            raise GvendiError(
                f"the model to tap has no layer {tap.path!r} like the sketcher's ({type(tap.module).__name__}); make a "
                "sketcher of this model"
            )
        found[id(tap.module)] = fits[0]
    return found


def _has(module: nn.Module, tap: Tap) -> bool:
    """Whether a module has the parameters of a tap, and those alone."""
    own = {name for name, p in module._parameters.items() if p is not None}
    return own == {name for name, p in tap.module._parameters.items() if p is not None}


def _bound(modules: Mapping[int, nn.Module], tap: Tap) -> Tap:
    return replace(tap, module=modules[id(tap.module)])


def _needs_start(sketcher: GradientSketcher, model: nn.Module) -> bool:
    """Whether gradients must begin at the embedding: below a sketched parameter there may be none to train."""
    there = parameters_by_name(model)
    return any(not there[name].requires_grad for name in sketcher.parameters)
