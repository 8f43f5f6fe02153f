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
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.adapters import BASE, TRAINABLE
from gvendi_fast.sketching.gradients.as_written import AsWritten, put_aside
from gvendi_fast.sketching.gradients.boundaries import Samples, find_samples, given_samples
from gvendi_fast.sketching.gradients.crossing import attends_across
from gvendi_fast.sketching.gradients.forward import MODELS, Forward
from gvendi_fast.sketching.gradients.fused_head import find_fused, fused_tokens, watch_fused
from gvendi_fast.sketching.gradients.graph import edges_to_leaves
from gvendi_fast.sketching.gradients.names import check_causal_lm, check_trained, plain_model
from gvendi_fast.sketching.gradients.probe import Tapped
from gvendi_fast.sketching.gradients.quantised import parameters_by_name
from gvendi_fast.sketching.gradients.sketches import Sketches
from gvendi_fast.sketching.gradients.tapped_model import Pass, Running, TappedModel, values_of
from gvendi_fast.sketching.gradients.taps import LINEAR, QUANTISED
from gvendi_fast.sketching.gradients.training_batch import checked_tags, kept_positions, tokens_of
from gvendi_fast.sketching.gradients.watched_training import checkpoint_seen, hidden_use
from gvendi_fast.sketching.gradients.whole_gradient import EXACT, MOST, NARROW, WholeGradient

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher


# Of a parameter that got a gradient: its uses are followed and none was seen; text was found not to reach it.
FOLLOWED, UNREACHED = "followed", "unreached"


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
        self._look_at_model()
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
            replaced: list[Forward] = [*self._tapped.tapped, *self._tapped.again, *self._uncompiled]
            for forward in replaced:
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

    def _look_at_model(self) -> None:
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
            self._tapped.is_narrow = any(p.dtype.itemsize < 4 for p in sketched.values())

    def _stop_comparing(self) -> None:
        whole, self._whole = self._whole, None
        if whole is not None:
            whole.end()

    def _compare(self) -> None:
        """Warn where the sum of the sketches is not the sketch of the gradient."""
        whole = self._whole
        self._stop_comparing()
        missing = whole.difference()
        if missing > (NARROW if self._tapped.is_narrow else EXACT):
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
                self._look_at_model()
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
        ids = tokens_of(arguments)
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
            tags = checked_tags(self._tag, arguments[self._tag], samples)
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
        tapped.running.kept = kept_positions(arguments, length, samples)

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
        return sum(leaf is parameter for _, leaf in edges_to_leaves(values_of(output))) > runs

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


def _check_transforms() -> None:
    """GvendiError inside torch.func's transforms, which nodes of a tap cannot take part in."""
    level = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)()
    if level is not None:
        raise GvendiError(
            "the tapped model runs inside a transform of torch.func (grad, vmap, jvp), which a tap takes no part in; "
            "detach the tap for that, or call loss.backward()"
        )
