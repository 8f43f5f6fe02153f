"""Sketches of the samples of a training step, from the step's own backward pass.

While a tap is attached, the layers of a model have the same nodes in autograd's graph that a sketcher's own pass gives
them (`probe.py`): each hands the layer's gradient on and returns the layer's sketch as the gradient of a zero probe.
Nothing else of the step is changed. The model keeps its mode, its wrappers and its weights' gradients, and the loss is
whatever scalar the user calls backward on.

A forward pass of the model makes a probe of its own, [S, K] for the S samples of its batch, so gradient accumulation
and several forward passes before one backward pass need no more. A part that an activation checkpoint runs again
belongs to the pass whose output autograd came from.

What is kept from the forward to the backward pass is, for layers that read one input, that input where it is not wider
than K numbers a token (which autograd keeps for the weight's gradient as well), or K float32 numbers a token. Under an
activation checkpoint nothing is.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.adapters import BASE, TRAINABLE
from gvendi_fast.sketching.gradients.as_written import AsWritten, breaking, put_aside
from gvendi_fast.sketching.gradients.boundaries import Samples, find_samples, given_samples
from gvendi_fast.sketching.gradients.crossing import attends_across
from gvendi_fast.sketching.gradients.forward import MODELS
from gvendi_fast.sketching.gradients.fused_head import find_fused, fused_tokens, watch_fused
from gvendi_fast.sketching.gradients.graph import edges_to_leaves, nodes_of
from gvendi_fast.sketching.gradients.layer_sketch import layer_sketch
from gvendi_fast.sketching.gradients.names import check_causal_lm, check_trained, named_modules, plain_model
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
from gvendi_fast.sketching.gradients.sketches import Sketches
from gvendi_fast.sketching.gradients.small_parameters import check_small
from gvendi_fast.sketching.gradients.taps import EMBEDDING, LINEAR, NORM, QUANTISED, WATCHED, Tap
from gvendi_fast.sketching.gradients.watched_training import RunAgain, around, checkpoint_seen, hidden_use
from gvendi_fast.sketching.gradients.whole_gradient import EXACT, MOST, NARROW, WholeGradient

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
# Of a parameter that got a gradient: its uses are followed and none was seen; text was found not to reach it.
FOLLOWED, UNREACHED = "followed", "unreached"


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
        self.thread, self.outer = None, -1
        base = getattr(model, "base_model", None)
        self.core: nn.Module = base if isinstance(base, nn.Module) else model
        inside = {id(module) for module in self.core.modules()}
        # Layers that may be run after the model under them, by themselves.
        self.above = {id(tapped.module) for tapped in self.tapped} - inside
        self.running: Running | None = None
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
        # How many calls of the model this thread is inside.
        self.depth = 0

    @property
    def probe(self) -> Tensor:
        """Of the pass that runs."""
        return self.running.probes[0]

    @property
    def group_probes(self) -> Sequence[Tensor]:
        """Of the pass that runs."""
        return () if self.running is None else self.running.probes[1:]

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
        names = seen.hidden(_values(output))
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
                "a part of the tapped model runs by itself (a head on hidden states whose graph was cut, a part that an "
                f"activation checkpoint runs again), and of which of {len(waiting)} forward passes is not known; run a "
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
        for x in tree_leaves(_values(output)):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                x.grad_fn.metadata[_PASS] = running
                x.register_hook(functools.partial(_reach, self, running))


class PackingWarning(UserWarning):
    """Samples of a packed row are not kept apart by the model, or that is not known."""


class IncompleteWarning(UserWarning):
    """The sketches of a step's samples do not add up to the sketch of the step's gradient."""


class CompiledWarning(UserWarning):
    """A step of a compiled model runs eagerly."""


class TrainingTap:
    """Sketches of every sample of a training step, from the step's own forward and backward passes.

    Made by `GradientSketcher.tap`. While it is attached, run the step as ever: any loss of the model's outputs, any
    number of forward and backward passes, under autocast, a gradient scaler, activation checkpoints, DDP or
    fully_shard. The values of the step, the weights' gradients among them, are those without the tap, to the bit.

        with sketcher.tap(model) as tap:
            for batch in loader:
                model(**batch).loss.backward()
                z = tap.take().z                      # float32 [S, K]
                optimizer.step()
                optimizer.zero_grad()

    A sketch is that of the gradient of the user's own scalar by the sample's tokens: its length is the scalar's scale
    (a mean over the batch divides it, a gradient scaler multiplies it), and only its direction is a sample's own. A
    sample that the loss does not depend on has z = 0. An auxiliary loss over the whole batch, as routers have, is part
    of the scalar: a sample's share of its gradient is that through its own tokens.
    Threads: a tap belongs to the thread that attached it; a forward pass with gradients in another one is refused.
    """

    def __init__(
        self,
        sketcher: GradientSketcher,
        model: nn.Module | None = None,
        *,
        tag: str | None = None,
        samples: Callable[[Mapping[str, Any]], Any] | None = None,
        check: bool | None = None,
    ) -> None:
        given = sketcher.model if model is None else model
        self.sketcher, self.model = sketcher, given
        self._plain: Any = plain_model(given, stays=True)
        check_causal_lm(self._plain)
        check_trained(given)
        self._tag, self._samples, self._looks = tag, samples, check
        self._whole: WholeGradient | None = None
        # In what settings sums were compared.
        self._compared: set[tuple] = set()
        self._tapped = TappedModel(sketcher, self._plain)
        self._checked: list[tuple[int, bool]] | None = None
        self._arrived: list[Pass] = []
        self._forwards = 0
        self._undo: Any = None
        self._looked_across = self._warned_of_compiling = False
        self._uncompiled = [AsWritten(module, self._failed) for module in self._entries()]
        # Passes whose graph lives, and how many began since the last take.
        self._begun: weakref.WeakSet[Pass] = weakref.WeakSet()
        self._since = 0
        # By id, what ends the watch over a parameter whose layer did not run, and by name what the watches saw: the
        # layer, FOLLOWED for a parameter whose uses are followed, or UNREACHED for one that text does not reach.
        self._watches: dict[int, Callable[[], object]] = {}
        self._seen: dict[str, Tapped | str] = {}
        self._parameters = tuple(inspect.signature(type(self._plain).forward).parameters)

    @property
    def is_attached(self) -> bool:
        """Whether forward passes are sketched."""
        return self._undo is not None

    def attach(self) -> TrainingTap:
        """Sketch the forward passes from here on. Raises GvendiError where this or another tap is at a layer."""
        if self.is_attached:
            raise GvendiError(
                "this tap is attached already; detach() it first, or enter it once around the whole loop"
            )
        self._check()
        for tapped in self._tapped.tapped:
            other = getattr(tapped.module.__dict__.get("forward"), "__self__", None)
            if isinstance(other, Tapped):
                raise GvendiError(
                    f"layer {tapped.path!r} has a tap attached already (of this model, or of another one that shares "
                    "the layer); detach that tap first"
                )
        stack = undoing()
        undo = stack.__enter__()
        self._undo = stack
        try:
            self._tapped.thread = threading.get_ident()
            undo.append(self._tapped.end)
            undo.append(self._tapped.stop_following)
            if put_aside(self.model, undo) and not self._warned_of_compiling:
                self._warned_of_compiling = True
                warnings.warn(
                    "the tapped model is compiled; while the tap is attached it runs as it is written, eagerly, and "
                    "compiled again after detach()",
                    CompiledWarning,
                    stacklevel=2,
                )
            for forward in self._tapped.again:
                undo.append(checkpoint_seen(forward.module, self._tapped.seeing_again))
            for forward in (*self._tapped.tapped, *self._tapped.again, *self._uncompiled):
                undo.append(forward.remove)
                forward.attach()
            for module in self._entries():
                undo.append(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                undo.append(module.register_forward_hook(self._leave, always_call=True).remove)
            for name, parameter in self._tapped.unreached_parameters.items():
                if parameter.requires_grad and type(parameter) is nn.Parameter:
                    self._watch(parameter, name, UNREACHED)
        except BaseException:
            self.detach()
            raise
        return self

    def _check(self) -> None:
        """GvendiError where the model is not what the tap was made for, looked at anew where it has changed."""
        state = [(id(p), p.requires_grad) for p in self.model.parameters()]
        if state != self._checked:
            check_trained(self.model)
            _check_frozen(self.sketcher, self._plain)
            self._checked = state

    def detach(self) -> None:
        """Leave the model as it was; what has come and was not taken is forgotten. Nothing where not attached."""
        stack, self._undo = self._undo, None
        self._arrived = []
        self._tapped.depth = 0
        for end in self._watches.values():
            end()
        self._watches, self._seen = {}, {}
        self._stop_comparing()
        self._begun, self._since = weakref.WeakSet(), 0
        if stack is not None:
            stack.__exit__(None, None, None)

    def __enter__(self) -> TrainingTap:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def take(self) -> Sketches:
        """The sketches of all samples whose backward pass has come since the last call, in the order of the forward
        passes; they are forgotten here.

        Raises GvendiError where no forward pass ran under the tap, where none of them was in a backward pass, and where
        a parameter got a gradient that its layer did not see.
        """
        if not self.is_attached and not self._arrived:
            raise GvendiError(
                "this tap is not attached; enter it ('with tap:', or tap.attach()) before the step"
            )
        passes = sorted(self._arrived, key=lambda p: p.number)
        begun, seen, since = list(self._begun), self._seen, self._since
        self._arrived, self._seen, self._since = [], {}, 0
        for group in self._tapped.groups:
            group.close()
        if not passes:
            raise GvendiError(
                "no backward pass has come: call loss.backward() before take(), on a loss of the model's own outputs "
                f"({since} forward passes ran under the tap; torch.autograd.grad() reaches weights alone)"
                if since
                else "no forward pass of the model ran under the tap with gradients; attach the tap before the "
                "forward pass, and run it on the model that is tapped (a compiler that is told not to look at its "
                "guards runs the graph of before; tap the compiled module itself)"
            )
        try:
            self._check_seen(seen, passes, begun)
        except GvendiError:
            self._stop_comparing()
            raise
        found = _sketches(passes)
        if self._whole is not None:
            self._whole.take(found.z)
            if not any(not one.has_come for one in begun):
                self._compare()
        return found

    def _look_at_sum(self) -> None:
        """Have the first step of a setting compared with the gradient that autograd forms of it."""
        settings = (*self._tapped.settings(), torch.is_autocast_enabled(), torch.is_autocast_enabled("cpu"))
        if self._whole is not None or settings in self._compared or self._looks is False:
            return
        self._compared.add(settings)
        there = parameters_by_name(self._plain)
        sketched = {name: there[name] for name in self.sketcher.parameters}
        plain = all(type(p) is nn.Parameter and p.requires_grad and not p.is_meta for p in sketched.values())
        if plain and (self._looks or self.sketcher.coverage.sketched <= MOST):
            self._whole = WholeGradient(self.sketcher, sketched)
            narrow = any(settings[-2:]) or any(p.dtype != torch.float32 for p in sketched.values())
            self._least = NARROW if narrow else EXACT

    def _stop_comparing(self) -> None:
        whole, self._whole = self._whole, None
        if whole is not None:
            whole.end()

    def _compare(self) -> None:
        """Warn where the sum of the sketches is not the sketch of the gradient."""
        whole = self._whole
        self._stop_comparing()
        missing = whole.difference()
        if missing > self._least:
            warnings.warn(
                f"the sketches of this step's samples do not add up to the sketch of its gradient: {missing:.1%} of "
                "its length is missing. A part of it went past the layers (a penalty on weights, a loss that takes a "
                "weight itself beside its layer, such as a fused one) or is of no sample, and no sketch has it; leave "
                "such a weight out with exclude=, or switch this check off with tap(check=False)",
                IncompleteWarning,
                stacklevel=3,
            )

    def _check_seen(
        self, seen: Mapping[str, Tapped | str], passes: Sequence[Pass], begun: Sequence[Pass]
    ) -> None:
        """GvendiError where a parameter got a gradient that neither its layer nor anything else saw."""
        # Another pass may have run what one has left out (a layer that is dropped at random, a head).
        ran = set().union(*(one.met for one in (*passes, *begun)))
        followed = set().union(*(one.followed for one in (*passes, *begun)))
        late = sorted(name for name, part in seen.items() if part == UNREACHED)
        if late:
            raise GvendiError(
                f"the parameters {', '.join(map(repr, late[:3]))} ({len(late)} of them) were left out as ones that "
                "text does not reach, but this step trains them, so their part of the sketches would be missing; leave "
                f"them out knowingly with exclude=, such as {late[:1]}"
            )
        hidden = sorted(name for name, part in seen.items() if part == FOLLOWED and name not in followed)
        if hidden:
            raise hidden_use(self._tapped.watched, hidden)
        missed = {
            name: part
            for name, part in seen.items()
            if isinstance(part, Tapped) and id(part.module) not in ran
        }
        for one in passes:
            missed |= {name: part for name, part in one.missed.items() if id(part.module) not in one.met}
        for name, part in missed.items():
            raise GvendiError(
                f"the parameter {name!r} is trained without running its layer {part.path!r} (by a fused loss that "
                "takes the weight itself, or by code of one's own), so its part of the sketches would be missing; "
                f"switch the fused loss off, or leave it out with exclude=[{name!r}]"
            )

    def __getstate__(self) -> dict[str, Any]:
        raise GvendiError(
            "a tap cannot be copied or pickled, nor a model that it is attached to: detach the tap first, or copy the "
            "model's state_dict()"
        )

    def _entries(self) -> list[nn.Module]:
        """The modules by whose call a pass begins: the causal LM, and the model inside it."""
        core = self._tapped.core
        return [self._plain] if core is self._plain else [self._plain, core]

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before the model runs: the batch is looked at and gets a probe."""
        tapped = self._tapped
        if torch.compiler.is_dynamo_compiling():
            return tapped.breaking(self._enter, (module, args, kwargs), {})
        given = kwargs
        if self._tag is not None and self._tag in kwargs:
            given = {name: value for name, value in kwargs.items() if name != self._tag}
        changed = None if given is kwargs else (args, given)
        if not torch.is_grad_enabled() or MODELS.is_claimed([module]):
            return changed
        if torch._C._current_graph_task_id() == -1:
            if threading.get_ident() != tapped.thread:
                return changed
        elif tapped.depth == 0:
            # Run again by a checkpoint around the whole model, with the tensors of the first time.
            again = [one for one in tapped.alive if any(one.given is x for x in (*args, *kwargs.values()))]
            if again:
                tapped.backward = again[0]
                Variable._execution_engine.queue_callback(tapped.backward_ends)
            if tapped.backward or any(not one.of.has_come for one in tapped.alive):
                # A re-entrant one has run it without gradients: its pass begins here.
                return changed
        _check_transforms()
        tapped.depth += 1
        if tapped.depth == 1:
            arguments = {**dict(zip(self._parameters[1:], args, strict=False)), **kwargs}
            try:
                self._check()
                self._begin(arguments)
            except BaseException:
                tapped.depth = 0
                raise
        return changed

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        """A pass of its own for a call of the model."""
        tapped = self._tapped
        tapped.running = tapped.backward = None
        self._look_at_sum()
        ids = _tokens(arguments)
        rows, length = ids.shape[:2]
        if self._samples is not None:
            samples = given_samples(self._samples(arguments), rows, length)
        else:
            samples = find_samples(arguments, rows, length)
        if samples.is_packed and not self._looked_across:
            self._looked_across = True
            self._look_across(arguments, samples)
        labels = arguments.get("labels")
        tokens = None
        if isinstance(labels, Tensor) and labels.shape == (rows, length):
            tokens = samples.targets(labels)
        tags = None
        if self._tag is not None:
            if self._tag not in arguments:
                raise GvendiError(
                    f"the batch has no {self._tag!r}, the tag that the tap was made with; pass it to the model with "
                    "every batch (int64 [B] of the rows, or [B, T] of the tokens), or make the tap without tag="
                )
            tags = _checked_tags(self._tag, arguments[self._tag], samples)
        groups = self.sketcher.groups
        count = 1 if groups is None else 1 + len(groups.names)
        home = self._plain.get_input_embeddings().weight.device
        one = Pass(self._forwards, samples, tokens, tags, [None] * count)
        self._forwards += 1
        self._since += 1
        self._begun.add(one)
        probes = []
        for place in range(count):
            probe = torch.zeros(len(samples), self.sketcher.spec.dim, device=home, requires_grad=True)
            probe.register_post_accumulate_grad_hook(
                functools.partial(self._came, weakref.ref(self), one, place)
            )
            probes.append(probe)
        tapped.running = Running(tapped, one, probes, ids[..., 0] if ids.dim() > 2 else ids, ids)
        tapped.alive.add(tapped.running)
        if tapped.follows:
            tapped.follow(tapped.running)
        for name in ("labels", "shift_labels"):
            given = arguments.get(name)
            if isinstance(given, Tensor) and given.shape == (rows, length):
                setattr(tapped.running, name if name == "labels" else "shifted", given)
        tapped.running.kept = _kept(arguments, length, samples)

    @staticmethod
    def _came(of: weakref.ref[TrainingTap], one: Pass, place: int, probe: Tensor) -> None:
        """A backward pass has reached a probe."""
        one.add(place, probe.grad)
        # Further backward passes over the same graph give more.
        probe.grad = None
        TrainingTap._arrive(of, one)

    @staticmethod
    def _arrive(of: weakref.ref[TrainingTap], one: Pass) -> None:
        tap = of()
        if tap is not None and tap.is_attached and one not in tap._arrived:
            tap._arrived.append(one)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the model has run, or has failed."""
        tapped = self._tapped
        if torch.compiler.is_dynamo_compiling():
            tapped.breaking(self._leave, (module, args, output), {})
            return
        if tapped.depth == 0 or not torch.is_grad_enabled() or MODELS.is_claimed([module]):
            return
        tapped.depth -= 1
        if tapped.depth:
            return
        for group in tapped.groups:
            group.close()
        running = tapped.running
        if running is None:
            return
        if running.uses is not None:
            tapped.stop_following()
            tapped.look_for_hidden(running, output)
            self._watch_unseen(running)
        self._look_after(running, output)
        tapped.note_result(output, running)

    def _failed(self) -> None:
        """A forward pass was ended by an error or an interrupt."""
        if torch._C._current_graph_task_id() == -1 and threading.get_ident() == self._tapped.thread:
            self._tapped.stop_following()
            self._tapped.depth, self._tapped.running = 0, None

    def _look_after(self, running: Running, output: Any) -> None:
        """Watch the parameters of layers that did not run: they must get no gradient."""
        self._watch_head(running, output)
        parts = [part for part in self._tapped.tapped if id(part.module) not in running.of.met]
        seen = {
            id(p)
            for part in self._tapped.tapped
            if id(part.module) in running.of.met
            for p in part.own_parameters()
        }
        followed = {w.name for w in self._tapped.watched}
        for part in parts:
            for (_, name), parameter in zip(part.tap.parameters, part.own_parameters(), strict=True):
                # Uses of a watched one are seen elsewhere too.
                if not parameter.requires_grad or name in followed:
                    continue
                if id(parameter) not in seen and type(parameter) is nn.Parameter:
                    self._watch(parameter, name, part)
                elif id(part.module) in self._tapped.above and self._takes_more(parameter, output):
                    running.of.missed[name] = part

    def _takes_more(self, parameter: Tensor, output: Any) -> bool:
        """Whether what a model gave depends on a parameter by more than the layers that ran; True if it is sharded."""
        if type(parameter) is not nn.Parameter:
            return True
        running = self._tapped.running
        layers = {
            id(part.module)
            for part in self._tapped.tapped
            if any(parameter is p for p in part.own_parameters())
        }
        runs = sum(running.of.met[layer] for layer in layers)
        return sum(leaf is parameter for _, leaf in edges_to_leaves(_values(output))) > runs

    def _watch(self, parameter: Tensor, name: str, part: Tapped | str) -> None:
        """Note whether a parameter gets a gradient, until the tap is detached."""
        if id(parameter) not in self._watches:
            of = weakref.ref(self)

            def saw(_: Tensor) -> None:
                tap = of()
                if tap is not None:
                    tap._seen[name] = part

            self._watches[id(parameter)] = parameter.register_hook(saw).remove

    def _watch_unseen(self, running: Running) -> None:
        """Watch the watched parameters that no operation took: without a part run again they must get no gradient."""
        for w in self._tapped.watched:
            parameter = w.parameter
            is_met = w.name in running.uses.met
            if not is_met and parameter.requires_grad and type(parameter) is nn.Parameter:
                self._watch(parameter, w.name, FOLLOWED)

    def _look_across(self, arguments: Mapping[str, Any], samples: Samples) -> None:
        """Warn, once, where the samples of a packed row attend to one another."""
        crosses = attends_across(self._plain, self._tapped.core, arguments, samples)
        if crosses is not False:
            kind = getattr(getattr(self._plain, "config", None), "_attn_implementation", None)
            what = (
                "was not checked (its weights are sharded)"
                if crosses is None
                else f"crosses samples (attention implementation {kind!r})"
            )
            warnings.warn(
                f"attention in packed rows {what}: where it does, a sample's gradient holds what its tokens do for the "
                "losses of later samples in the row, and its sketch is of that; pack with an implementation that keeps "
                "samples apart (flash_attention_2 with position_ids, use_cache=False and no attention_mask)",
                PackingWarning,
                stacklevel=5,
            )

    def _watch_head(self, running: Running, output: Any) -> None:
        """Sketch a head in whose place a fused loss stands, if it is one that is known."""
        heads = [part for part in self._tapped.tapped if id(part.module) in self._tapped.above]
        heads = [
            part
            for part in heads
            if id(part.module) not in running.of.met and part.tap.kind in (LINEAR, QUANTISED)
        ]
        node = find_fused(output) if heads else None
        if node is None:
            return
        tap, one = heads[0].tap, running.of
        tokens = fused_tokens(node, running.labels, running.shifted, one.samples)
        if len(heads) > 1 or tokens is None or node.saved_tensors[1].shape != tap.module.weight.shape:
            return
        of = weakref.ref(self)

        def found(z: Tensor) -> None:
            one.add(0, z)
            if tap.group is not None:
                one.add(1 + tap.group, z)
            TrainingTap._arrive(of, one)

        watch_fused(node, tokens, one.samples, tap, self.sketcher.spec, found)
        running.of.met[id(tap.module)] += 1


def _reorders(node: Any) -> str | None:
    """The name of an operation that may leave tokens in another order or out, None for one that does not."""
    name = node.name()
    if name.startswith("SliceBackward"):
        return f"{name} of rows" if getattr(node, "_saved_dim", 1) == 0 else None
    kept = name.startswith(_IN_ORDER) or name.startswith(("LayerOutput", "NormOutput", "HandedOn"))
    return None if kept else name


def _values(output: Any) -> Any:
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


def _check_frozen(sketcher: GradientSketcher, model: nn.Module) -> None:
    """GvendiError where what is trained is not what the sketcher was made for."""
    there = parameters_by_name(model)
    trained = {name for name, p in there.items() if p.requires_grad}
    if sketcher.choice == BASE or not trained:
        return
    frozen = [name for name in sketcher.parameters if name not in trained and not sketcher.is_coded(name)]
    if frozen:
        raise GvendiError(
            f"the sketcher sketches {frozen[0]!r}, which is frozen in the tapped model ({len(frozen)} such parameters)"
            "; freeze first and make the sketcher then, leave it out with exclude=, or ask for what is frozen with "
            'parameters="base"'
        )
    late = [] if sketcher.choice != TRAINABLE else sorted(trained - set(sketcher.wanted))
    if late:
        raise GvendiError(
            f"{late[0]!r} is trained, but was frozen when the sketcher was made ({len(late)} such parameters), so it "
            "is in no sketch; make the sketcher after the model is set up for training"
        )


def _tokens(arguments: Mapping[str, Any]) -> Tensor:
    """input_ids [B, T], or inputs_embeds [B, T, d]."""
    for name, axes in (("input_ids", 2), ("inputs_embeds", 3)):
        given = arguments.get(name)
        if isinstance(given, Tensor):
            if given.dim() == axes and given.numel():
                return given
            raise GvendiError(
                f"{name} of shape {tuple(given.shape)} cannot be told apart by sample; wanted {axes} axes, [B, T"
                f"{', d' if axes == 3 else ''}], with at least one token"
            )
    raise GvendiError(
        "the tapped model was called without input_ids and inputs_embeds, so its samples are not known; pass one "
        "of them"
    )


def _checked_tags(name: str | None, tags: Any, samples: Samples) -> Tensor:
    rows, length = samples.shape
    if (
        not isinstance(tags, Tensor)
        or tags.is_floating_point()
        or tuple(tags.shape) not in ((rows,), (rows, length))
    ):
        what = f"{tags.dtype} {tuple(tags.shape)}" if isinstance(tags, Tensor) else type(tags).__name__
        raise GvendiError(
            f"{name!r}, the tag of the batch, is {what}; wanted whole numbers, [{rows}] of the rows or [{rows}, "
            f"{length}] of the tokens"
        )
    return samples.at_first_tokens(tags).to(torch.int64)


def _sketches(passes: Sequence[Pass]) -> Sketches:
    """The sketches of passes, which forget them."""
    parts = []
    for one in passes:
        first = next(z for z in one.z if z is not None)
        parts.append([torch.zeros_like(first) if z is None else z for z in one.z])
        one.z = [None] * len(one.z)
    z, *by_group = [torch.cat(column) for column in zip(*parts, strict=True)]
    tokens, tags = ([getattr(one, name) for one in passes] for name in ("tokens", "tags"))
    return Sketches(
        z,
        None,
        None if any(x is None for x in tokens) else torch.cat(tokens),
        torch.stack(by_group, dim=1) if by_group else None,
        None if any(x is None for x in tags) else torch.cat(tags),
    )


def _kept(arguments: Mapping[str, Any], length: int, samples: Samples) -> Tensor | None:
    """Positions of a row, int64 in order on the CPU, that the head is asked for; None for all, or if rows are whole."""
    given = next(
        (arguments[name] for name in ("logits_to_keep", "num_logits_to_keep") if name in arguments), None
    )
    if given is None or not samples.is_packed:
        return None
    if not isinstance(given, Tensor):
        return torch.arange(length)[-int(given) :] if given else None
    kept = torch.arange(length)[given.detach().cpu()]
    if kept.dim() != 1 or bool((kept[1:] <= kept[:-1]).any()):
        raise GvendiError(
            "logits_to_keep picks positions out of order, or one twice, in rows of packed samples, so whose tokens the "
            "head sees is not known; give them in order"
        )
    return kept


def _check_transforms() -> None:
    """GvendiError inside torch.func's transforms, which nodes of a tap cannot take part in."""
    level = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)()
    if level is not None:
        raise GvendiError(
            "the tapped model runs inside a transform of torch.func (grad, vmap, jvp), which a tap takes no part in; "
            "detach the tap for that, or call loss.backward()"
        )
