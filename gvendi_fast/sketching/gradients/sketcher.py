"""Sketches of per-sample loss gradients, without forming any weight gradient.

For a linear layer the gradient of one sample is sum_t e_t a_t^T; its sketch needs the inputs a and the output
gradients e alone. So no parameter requires a gradient while a batch runs: autograd does the forward pass and the
input gradients, and the sketch operations do the rest.
"""

from __future__ import annotations

import glob
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.transfer import to_device
from gvendi_fast.base.undoing import undoing
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients import linear_uses, small_parameters  # noqa: F401 (register handlers)
from gvendi_fast.sketching.gradients.adapters import check_choice, has_adapters
from gvendi_fast.sketching.gradients.batch import Batch, on_cpu, prepare
from gvendi_fast.sketching.gradients.compiled import (
    CompileError,
    compiled_blocks,
    compiler_errors,
    find_blocks,
    foreign_compiler_errors,
)
from gvendi_fast.sketching.gradients.forward import MODELS
from gvendi_fast.sketching.gradients.head import autograd_loss, find_head, sum_by_sample
from gvendi_fast.sketching.gradients.layers import (
    check_groups,
    check_preset,
    find_cells,
    find_sketch_groups,
    last_blocks,
    left_out,
    left_out_before,
)
from gvendi_fast.sketching.gradients.names import (
    as_plain,
    by_canonical_name,
    check_causal_lm,
    plain_model,
    written_names,
)
from gvendi_fast.sketching.gradients.probe import HeadLoss, ProbedModel, gradients
from gvendi_fast.sketching.gradients.quantised import (
    check_quantised,
    keep_gradients,
    parameters_by_name,
)
from gvendi_fast.sketching.gradients.reading import other_embeddings, read, start_of
from gvendi_fast.sketching.gradients.short_attention import short_attention
from gvendi_fast.sketching.gradients.sketches import Sketches
from gvendi_fast.sketching.gradients.small_parameters import check_small
from gvendi_fast.sketching.gradients.taps import (
    EMBEDDING,
    excluded,
    find_taps,
    in_groups,
    trainable_parameters,
)
from gvendi_fast.sketching.gradients.text_path import LeftOut, Unvisited, find_text_path
from gvendi_fast.sketching.gradients.weight_uses import Place, check_seen, check_uses, trial_text
from gvendi_fast.sketching.proxy.attention import never_packed

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.training_tap import TrainingTap


@dataclass(frozen=True)
class Coverage:
    """How many parameters the sketch covers, of how many the gradient has.

    left_out: parts of the model that no text reaches, so that they are no part of a gradient (`text_path`).
    """

    sketched: int
    total: int
    left_out: tuple[LeftOut, ...] = ()

    @property
    def share(self) -> float:
        """Sketched parameters over all."""
        return self.sketched / self.total if self.total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """What a run's spec says of it; a model that text reaches whole has no more to say."""
        plain: dict[str, Any] = {"sketched": self.sketched, "total": self.total}
        return plain | ({"left_out": {p.part: p.parameters for p in self.left_out}} if self.left_out else {})


class GradientSketcher:
    """Sketch the loss gradient of every sample of a batch under a Hugging Face causal LM.

    The gradient is that of the negative log-likelihood of a sample's supervised tokens (labels other than -100),
    summed, over all parameters that require a gradient (over all, if none does), with the model in eval mode.

    model: a causal LM as `transformers.AutoModelForCausalLM` gives it, on any device, float32 or bfloat16. One on the
        meta device will do where another model of its kind is tapped.
    spec: dimension, kind and seed of the sketch.
    exclude: shell patterns of parameter names to leave out; `coverage` says what is left. Parts that text does not
        reach, such as a vision tower, are left out by themselves, and `coverage.left_out` names them.
    layers: a preset of kinds of layers to sketch, one of `layers.PRESETS`, or "last-N", the last N blocks.
    parameters: "trainable", as above; "adapters", those of a PEFT model's active adapters, which "trainable" means too
        where nothing requires a gradient; or "base", what is no adapter's (adapters are at work, but not sketched).
    groups: also give the sketches of groups of parameters by themselves, in the same pass: one of `layers.GROUPINGS`,
        or {name: shell patterns of parameter names}, where parameters in none are the group "rest". z is the same to
        the bit, unless a group of patterns parts layers that read one input.
    compile: make one graph of the model's blocks, sketches inside, by torch.compile. That takes seconds, once, at the
        first batch of two samples or more; a sample by itself runs eagerly.
        The numbers are those of the eager pass to the rounding of the model's number format.
    Threads: a sketcher, and the sketchers of models that share a layer or a parameter, take turns: a call waits for
        those of other threads. A call from inside a pass over the same model (a hook) raises GvendiError, and so does
        running the model in another thread meanwhile, or changing its weights. However a pass ends, the model is
        as it was before. `copy.deepcopy` and pickle give a sketcher with a model of its own; not while a pass runs.
    Raises GvendiError naming the parameters for which no sketch is known.

        sketcher = GradientSketcher(model, SketchSpec(dim=1024))
        z = sketcher(input_ids, labels, attention_mask)      # float32 [B, 1024]
    """

    @foreign_compiler_errors()
    def __init__(
        self,
        model: nn.Module,
        spec: SketchSpec | None = None,
        *,
        exclude: Sequence[str] = (),
        layers: str = "all",
        groups: str | Mapping[str, Sequence[str]] | None = None,
        parameters: str = "trainable",
        compile: bool = False,
    ) -> None:
        check_choice(parameters)
        given, model = list(model.named_modules()), plain_model(model)
        # To a checker the methods of a model behind nn.Module may be tensors.
        self.model: Any = model
        self.choice = parameters
        # Made of a model without values, to tap another.
        self._is_empty = all(p.is_meta for p in model.parameters())
        check_causal_lm(model)
        self.spec = spec or SketchSpec()
        self._is_safe = False
        check_preset(layers)
        check_groups(groups)
        with _alone(model):
            wanted = list(trainable_parameters(model, parameters))
            written = written_names(given, model)
        # What a gradient was of when the sketcher was made, sketched or not.
        self.wanted = tuple(wanted)
        exclude = by_canonical_name(exclude, written)
        with _frozen(model), never_packed():
            # Gathered anew by every block: sharded weights would stay whole on every rank.
            there = parameters_by_name(model)
            self.left_out_knowingly = excluded(wanted, exclude)
            text = find_text_path(model, {name: there[name] for name in wanted}, self.left_out_knowingly)
            del there
        if len(text.names) == len(wanted):
            raise GvendiError(
                f"no text reaches any of the {len(wanted)} parameters that require a gradient (first: "
                f"{wanted[0]!r}); let those of the language model require one, or none"
            )
        with _alone(model):
            layout = find_taps(model, exclude, text.names, parameters)
        core: Any = getattr(model, "base_model", None) or model
        with _frozen(model), never_packed():
            self._reading = read(model, core, other_embeddings(model, layout), start_of(model, layout))
        if self._reading.shared:
            with _alone(model):
                layout = find_taps(model, exclude, text.names, parameters, self._reading.shared)
        # Of those that are left out too: a gradient goes through them.
        reached = [layer for layer in layout.quantised if layer.weight not in text.names]
        self._coded = frozenset(layer.weight for layer in layout.quantised)
        with _frozen(model):
            check_quantised(reached, _embedding(model).dtype)
        if not layout.names:
            raise GvendiError("exclude leaves no parameter to sketch; give fewer patterns")
        used: set[str] = set()
        if has_adapters(model):
            with _frozen(model), never_packed():
                used = check_uses(model, layout.taps)
        self._unvisited = [Unvisited(path, module) for path, module in text.unvisited.items()]
        blocks = last_blocks(layers)
        if (layers != "all" and blocks is None) or groups is not None:
            with _frozen(model), never_packed():
                cells = find_cells(model, layout)
        if layers != "all":
            with _alone(model):
                away = left_out(layers, cells) if blocks is None else left_out_before(blocks, model, layout)
                out = (*exclude, *map(glob.escape, away))
                layout = find_taps(model, out, text.names, parameters, self._reading.shared)
        self.parameters, self.transposed = tuple(layout.names), layout.transposed
        self.coverage = Coverage(layout.sketched, layout.total, text.parts)
        self.shapes = {name: layout.shapes[name] for name in layout.names}
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        if isinstance(groups, Mapping):
            groups = {name: by_canonical_name(patterns, written) for name, patterns in groups.items()}
        self.groups = None if groups is None else find_sketch_groups(groups, sizes, cells)
        with _frozen(model):
            self._head = find_head(model, layout.taps, layout.names, text.names)
        taps = layout.taps if self.groups is None else in_groups(layout.taps, self.groups.of)
        # A training step runs the head as a layer; a pass of its own does without.
        self._head_taps = [t for t in taps if self._head is not None and t.module is self._head.output]
        taps = [t for t in taps if t not in self._head_taps]
        with _frozen(model), _checkpoint_errors():
            self._probed = ProbedModel(model, taps, self.spec, _places(model, text.names))
        core = self.model if self._head is None else self._head.base
        with _frozen(model), never_packed():
            self._probed.try_uses(core, trial_text(model), self._head_place())
            check_small(self._probed.watched, layout.total)
            check_seen(used, self._probed.met)
            if compile and (self._probed.watched or self._probed.picks):
                names = ", ".join(repr(w.name) for w in self._probed.watched[:3]) or "experts that are layers"
                raise CompileError(
                    f"the uses of parameters of this model ({names}, ...) are followed operation by operation, which "
                    "only the eager pass can do; leave it uncompiled (compile=False, --compile off)"
                )
            self._blocks = compiled_blocks(find_blocks(model, taps), self._probed) if compile else []
        watched = self._probed.watched
        self.transposed |= {w.name for w in watched if w.transposed}
        self.stacked = frozenset(w.name for w in watched if w.stacked)
        # Rotary models place every sample alike; learned positions are looked up and must be distinct.
        looks_up_positions = sum(t.kind == EMBEDDING for t in layout.taps) > 1
        takes_positions = "position_ids" in inspect.signature(core.forward).parameters
        gives = looks_up_positions and takes_positions
        self._gives_positions = gives and not self._reading.numbers_positions

    def tap(
        self,
        model: nn.Module | None = None,
        *,
        tag: str | None = None,
        samples: Callable[[Mapping[str, Any]], Any] | None = None,
        check: bool | None = None,
    ) -> TrainingTap:
        """A tap on a model that is trained: the sketches of its batches come from the step's own backward pass.

        model: the model whose forward the step calls, with its wrappers; this sketcher's own if not given, or another
            of its kind (the same parameters), such as its sharded form.
        tag: the name of an entry of the batch that is no argument of the model: int64 [B] of the rows, or [B, T] of the
            tokens, of which that of a sample's first token counts. It is taken out of the arguments and comes back,
            sample by sample, as `Sketches.tags`.
        samples: a function of the forward's arguments {name: value} that gives (begin, end) of every sample in the
            flattened batch, int64 [S, 2]; by default they are found (`boundaries.find_samples`): rows, or the packed
            samples of a row by position_ids that begin anew, cu_seq_lens_q, seq_idx, or a mask that numbers them.
        check: whether the sum of the first step's sketches is compared with the sketch of its whole gradient, once for
            each setting (train or eval mode, autocast); a warning says what is missing. By default up to 500 million
            sketched parameters, for each is folded once; never where weights are sharded or frozen.
        Raises GvendiError for a model of another kind.
        """
        from gvendi_fast.sketching.gradients.training_tap import TrainingTap

        return TrainingTap(self, model, tag=tag, samples=samples, check=check)

    def is_coded(self, name: str) -> bool:
        """Whether a parameter is a quantised weight, which cannot require a gradient."""
        return name in self._coded

    def _head_place(self) -> list[Place]:
        return [] if self._head is None else [Place(self._head.name, self._head.output, "weight")]

    def __getstate__(self) -> dict[str, Any]:
        modules = list(self.model.modules())
        if MODELS.is_claimed([*modules, *_parameters(modules)]):
            raise GvendiError(
                "this sketcher cannot be copied or pickled while a pass over its model runs, which holds the model's "
                "state; do it before or after"
            )
        return self.__dict__.copy()

    def __call__(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sketches z float32 [B, K] of a batch; see `sketch`."""
        return self.sketch(input_ids, labels, attention_mask).z

    def sketch(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Sketches:
        """Sketch a batch.

        input_ids: int64 [B, T].
        labels: int64 [B, T], -100 where unsupervised, not shifted, as Hugging Face models take them.
        attention_mask: [B, T] of 1 (token) and 0 (padding, on either side), or None.
        Give all on the CPU, even if the model is on a GPU: the batch is inspected before it is moved, and nothing in
        the package waits for the GPU afterwards.
        Raises GvendiError for wrong shapes, labels outside the vocabulary, and a sample without any supervised token;
        CompileError if the pass is to be compiled and cannot be. A gradient that is zero or not finite is returned
        unchanged: the caller decides.
        """
        if torch.is_inference_mode_enabled():
            raise GvendiError("a gradient cannot be taken inside torch.inference_mode(); leave that block")
        if self._is_empty and all(p.is_meta for p in self.model.parameters()):
            raise GvendiError(
                "the model is on the meta device, where weights have no values; such a sketcher serves to tap another "
                "model of its kind (sketcher.tap(model)), or load the weights first"
            )
        ids, given, mask = on_cpu(input_ids, labels, attention_mask)
        count = 1 if self.groups is None else 1 + len(self.groups.names)
        samples = len(ids) if ids.dim() else 0
        # A batch of one would be compiled anew: compilers take a size of 1 for a constant.
        blocks = self._blocks if samples > 1 else []
        errors = compiler_errors() if blocks else foreign_compiler_errors()
        with _frozen(self.model, False), _unchanged(self.model), torch.enable_grad(), never_packed(), errors:
            embedding = self.model.get_input_embeddings().weight
            device = embedding.device
            batch = prepare(ids, given, mask, embedding.shape[0])
            if batch.mask is not None and self._reading.reads_padding:
                raise GvendiError(
                    f"attention_mask has padding on the left, which {type(self.model).__name__} reads as another text "
                    "(its positions count padding, or its states take it in); pad on the right"
                )
            probe, *group_probes = probes = [
                embedding.new_zeros((samples, self.spec.dim), dtype=torch.float32).requires_grad_()
                for _ in range(count)
            ]
            inputs = self._inputs(batch, device)
            targets = self._targets(batch, device)
            if blocks and not self._is_safe:
                with self._probed.attached(self._unvisited):
                    self._look_for_changes(inputs, targets, batch.segments, probe, group_probes)
            with self._probed.attached([*self._unvisited, *blocks]):
                total, loss = self._pass(inputs, targets, batch.segments, probe, group_probes)
                # Attached still: a checkpoint in the model's own code runs its part again.
                with _checkpoint_errors():
                    z, *by_group = gradients(total, probes, self._probed)
        if self._head is not None:
            loss = sum_by_sample(loss, batch.tokens)
        stacked = torch.stack(by_group, dim=1) if by_group else None
        return Sketches(z, loss.to(device).float(), to_device(batch.tokens, device), stacked)

    def _look_for_changes(self, inputs: dict, targets: tuple, segments: torch.Tensor, *probes: Any) -> None:
        """One eager pass before the first compiled one: autograd sees changes in place, a compiler does not."""
        total, _ = self._pass(inputs, targets, segments, *probes)
        torch.autograd.grad(total, probes[0], materialize_grads=True)
        if self._probed.changed_between:
            raise CompileError(
                f"the input of layer {self._probed.changed_between!r} is changed in place before a further layer reads "
                "it, which only the eager pass can follow; leave it uncompiled (compile=False, --compile off)"
            )
        self._is_safe = True

    def _inputs(self, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": to_device(batch.ids, device)}
        if self._gives_positions or (batch.mask is not None and self._reading.takes_positions):
            inputs["position_ids"] = to_device(batch.positions, device)
        if batch.mask is not None:
            inputs["attention_mask"] = to_device(batch.mask, device)
        return inputs

    def _targets(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
        if self._head is None:
            return (to_device(batch.targets, device),)
        rows, labels = (to_device(x, self._head.weight.device) for x in (batch.rows, batch.labels))
        return rows, labels, batch.target_segments

    def _pass(
        self,
        inputs: dict,
        targets: tuple[torch.Tensor, ...],
        segments: torch.Tensor,
        probe: torch.Tensor,
        group_probes: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The forward pass: the loss of the batch, and that of every target (of every sample, without a head)."""
        self._probed.begin(probe, segments, inputs["input_ids"], group_probes)
        with short_attention(self.model), self._probed.following():
            if self._head is None:
                logits = self.model(**inputs, use_cache=False).logits
                loss = autograd_loss(logits, targets[0].to(logits.device))
                total = loss.sum()
            else:
                hidden = self._head.base(**inputs, use_cache=False).last_hidden_state
                total, loss = self._head_loss(hidden, targets, probe, group_probes)
        self._probed.read()
        return total, loss.detach()

    def _head_loss(
        self,
        hidden: torch.Tensor,
        targets: tuple[torch.Tensor, ...],
        probe: torch.Tensor,
        group_probes: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head, (rows, labels, segments) = self._head, targets
        group_probe = group_probes[self.groups.of[head.name]] if group_probes else None
        return HeadLoss.apply(
            hidden.to(head.weight.device), probe, group_probe, head.weight.detach(), rows, labels, segments,
            head.name, head.softcap, head.scale, self._probed.spec,
        )  # fmt: skip


def _places(model: nn.Module, names: Collection[str]) -> list[Place]:
    """Where the parameters of these canonical names are, each once."""
    by_id = {id(p): name for name, p in parameters_by_name(model).items() if name in names}
    found: dict[str, Place] = {}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if id(p) in by_id:
                found.setdefault(by_id[id(p)], Place(by_id[id(p)], module, attribute))
    return list(found.values())


def _embedding(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight


@contextmanager
def _alone(model: nn.Module, stands_in: bool = True) -> Iterator[list[nn.Module]]:
    """The modules of a plain model, which no other thread sketches inside; without its wrappers, see `as_plain`."""
    modules = list(model.modules())
    # Models may share a layer, or a parameter of layers of their own.
    with MODELS.claimed([*modules, *_parameters(modules)], _is_in_backward), as_plain(model, stands_in):
        yield list(model.modules())


@contextmanager
def _frozen(model: nn.Module, stands_in: bool = True) -> Iterator[None]:
    """Eval mode and no parameter that requires a gradient inside, for one thread; flags as they were outside."""
    with _alone(model, stands_in) as modules, undoing() as undo:
        training = [m for m in modules if m.training]
        trainable = [p for p in _parameters(modules) if p.requires_grad]

        def restore() -> None:
            for module in training:
                module.training = True
            for parameter in trainable:
                parameter.requires_grad_(True)

        undo.append(restore)
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        undo.append(keep_gradients(modules))
        yield


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Raises GvendiError where a weight is changed in place inside, by another thread or a hook."""
    before, seen = _versions(model), None
    try:
        yield
    except RuntimeError as error:
        # Autograd refuses to go on with a weight that was changed after the forward pass read it.
        if _versions(model) == before:
            raise
        seen = error
    if _versions(model) != before:
        raise GvendiError(
            "the weights of the model changed while it was sketched, so the sketches are of no one model; let training "
            "steps and hooks that write weights wait until the call has returned"
        ) from seen


@contextmanager
def _checkpoint_errors() -> Iterator[None]:
    """Checkpoints in the code of a model whose part cannot be run again within a pass: GvendiError with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error) and not isinstance(error, CheckpointError):
            raise
        raise GvendiError(
            "the model's own code runs a part of it under torch.utils.checkpoint in eval mode too, and that part "
            f"cannot be run again for its sketches ({str(error).splitlines()[0]}); switch checkpointing off here"
        ) from error


def _versions(model: nn.Module) -> int:
    # Of weights made in inference mode torch counts no changes.
    return sum(p._version for p in _parameters(model.modules()) if not p.is_inference())


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Of all modules; one that several share is there several times."""
    return [p for module in modules for p in module._parameters.values() if p is not None]


def _is_in_backward() -> bool:
    """Whether this thread runs a backward pass: it may be autograd's own, for which the thread of a pass waits."""
    return torch._C._current_graph_task_id() != -1
