"""Taps: which modules' parameters are sketched, and as what kind of layer."""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.adapters import TRAINABLE, chosen, has_adapters
from gvendi_fast.sketching.gradients.names import named_modules
from gvendi_fast.sketching.gradients.norms import norm_formula
from gvendi_fast.sketching.gradients.quantised import QuantisedLayer, parameters_by_name, quantised_layers

LINEAR, CONV1D, EMBEDDING, NORM = "linear", "conv1d", "embedding", "norm"
# Parameters of a module that no other tap fits: their uses are watched (parameter_uses.py).
WATCHED = "watched"
# A linear layer whose weight is stored in a code.
QUANTISED = "quantised"


@dataclass(frozen=True)
class Tap:
    """One module whose own parameters are sketched.

    path: of the module.
    module: the module.
    kind: of layer.
    weight, bias: names of its parameters, None if left out.
    norm: for norms, "rms" or "layer" if the compiled formula holds, else "affine"; see `norm_formula`.
    eps: for norms, that of the formula.
    group: number of the sketch group that its parameters belong to, None where sketches are not kept by group.
    watched: for the kind "watched", (attribute, name) of its parameters.
    """

    path: str
    module: nn.Module
    kind: str
    weight: str | None
    bias: str | None
    norm: str | None = None
    eps: float = 0.0
    group: int | None = None
    watched: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameters that are sketched."""
        return tuple(name for _, name in self.parameters)

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        """(attribute of the module, name) of its parameters that are sketched."""
        plain = (("weight", self.weight), ("bias", self.bias))
        return (*((attribute, name) for attribute, name in plain if name), *self.watched)


@dataclass
class Layout:
    """The taps of a model and what they cover, in numbers of parameters."""

    taps: list[Tap]
    sketched: int
    total: int
    transposed: frozenset[str]
    names: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    quantised: list[QuantisedLayer] = field(default_factory=list)


def trainable_parameters(model: nn.Module, parameters: str = TRAINABLE) -> dict[str, Tensor]:
    """The parameters of a gradient by name: those that require one, or all if none does; see `adapters.chosen`.

    A coded weight cannot require a gradient, so it counts as if it did, unless the model has adapters to train.
    """
    named = parameters_by_name(model)
    found = chosen(model, named, parameters)
    if parameters == TRAINABLE and not has_adapters(model):
        coded = {id(layer.stored) for layer in quantised_layers(model)}
        found = {name: p for name, p in named.items() if name in found or id(p) in coded}
    return found


def excluded(names: Iterable[str], exclude: Sequence[str]) -> set[str]:
    """The names that one of these shell patterns matches."""
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)}


def find_taps(
    model: nn.Module,
    exclude: Sequence[str] = (),
    unreached: Collection[str] = (),
    parameters: str = TRAINABLE,
    watch: Collection[str] = (),
) -> Layout:
    """The taps of all parameters of a gradient, as `trainable_parameters` gives them.

    exclude: shell patterns of canonical parameter names to leave out. unreached: names of parameters that no text
    reaches, which are no part of the gradient. watch: names of parameters whose uses are watched though a tap would
    fit. Raises GvendiError for a pattern that matches nothing.
    """
    every = parameters_by_name(model)
    coded = {id(layer.module): layer for layer in quantised_layers(model)}
    names = {id(p): name for name, p in every.items()}
    trainable = [name for name in trainable_parameters(model, parameters) if name not in unreached]
    for pattern in exclude:
        if not fnmatch.filter(every, pattern):
            first = next(iter(every), "")
            raise GvendiError(
                f"exclude pattern {pattern!r} matches no parameter of the model, whose names have no wrappers in them, "
                f"such as {first!r}"
            )
    out = excluded(every, exclude)
    wanted = {id(every[name]): name for name in trainable if name not in out}
    misfits = {id(every[name]) for name in watch}
    kinds = [
        (path, m, QUANTISED if id(m) in coded else _tap_kind(m, misfits)) for path, m in named_modules(model)
    ]
    # What is watched is watched wherever it is met, and no part of another tap (BERT's output bias is a layer's).
    watched_ids = {id(p) for _, module, kind in kinds if kind is None for p in module._parameters.values()}
    taps, transposed = [], set()
    for path, module, kind in kinds:
        own = {
            name: wanted.get(id(p)) if kind is None or id(p) not in watched_ids else None
            for name, p in module._parameters.items()
            if p is not None
        }
        if kind == QUANTISED:
            own = {"weight": wanted.get(id(coded[id(module)].stored)), "bias": own.get("bias")}
        # Gradients start at an embedding that is not sketched, unless text does not look anything up in it.
        starts = kind == EMBEDDING and names.get(id(module.weight)) not in unreached
        if not any(own.values()) and not starts:
            continue
        if kind is None:
            watched = tuple((attribute, name) for attribute, name in own.items() if name)
            taps.append(Tap(path, module, WATCHED, None, None, watched=watched))
            continue
        norm, eps = norm_formula(module) if kind == NORM else (None, 0.0)
        taps.append(Tap(path, module, kind, own.get("weight"), own.get("bias"), norm, eps))
        if kind == CONV1D and own.get("weight"):
            transposed.add(own["weight"])
    turned = transposed & {tap.weight for tap in taps if tap.kind == LINEAR}
    if turned:
        raise GvendiError(
            f"the parameters {', '.join(map(repr, sorted(turned)))} are shared by layers that store them as [O, I] "
            f"and as [I, O] (Conv1D), so no one sketch is theirs; leave them out with exclude={sorted(turned)}"
        )
    shapes = {names[id(p)]: tuple(p.shape) for p in every.values()}
    shapes |= {names[id(layer.stored)]: layer.shape for layer in coded.values()}
    return Layout(
        taps=taps,
        sketched=sum(math.prod(shapes[name]) for name in wanted.values()),
        total=sum(math.prod(shapes[name]) for name in trainable),
        transposed=frozenset(transposed),
        names=list(wanted.values()),
        shapes=shapes,
        quantised=list(coded.values()),
    )


def in_groups(taps: Sequence[Tap], group_of: Mapping[str, int]) -> list[Tap]:
    """The taps with the group of their parameters, given by name.

    Where a weight and its bias are of two groups they become two taps of one module, the weight's first.
    """
    found = []
    for tap in taps:
        numbers = [group_of[name] for name in tap.names]
        if len(set(numbers)) < 2:
            found.append(replace(tap, group=numbers[0] if numbers else None))
        elif tap.watched:
            parts = {number: [w for w in tap.watched if group_of[w[1]] == number] for number in numbers}
            found += [replace(tap, watched=tuple(part), group=number) for number, part in parts.items()]
        else:
            found.append(replace(tap, bias=None, group=numbers[0]))
            found.append(replace(tap, weight=None, group=numbers[1]))
    return found


def blocks_of(model: nn.Module, taps: Sequence[Tap]) -> list[nn.Module]:
    """The members of a model's outermost lists of modules that hold layers of `taps`: its blocks, in order."""
    tapped = {id(tap.module) for tap in taps}
    blocks: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            for block in module:
                parts = {id(part) for part in block.modules()}
                inside |= parts
                if parts & tapped:
                    blocks[id(block)] = block
    return list(blocks.values())


def _tap_kind(module: nn.Module, misfits: Collection[int]) -> str | None:
    """The kind of tap that sketches all of a module's own parameters; None where they are watched."""
    kind = module_kind(module)
    if any(id(p) in misfits for p in module._parameters.values()):
        return None
    has = {name for name, p in module._parameters.items() if p is not None}
    return None if has - {"weight", "bias"} else kind


def module_kind(module: nn.Module) -> str | None:
    """Which tap fits a module's own parameters; None if there is none."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        # What takes the place of its forward may do anything; a device map's hook does what the class does.
        return LINEAR if "forward" not in module.__dict__ or hasattr(module, "_hf_hook") else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    takes = list(inspect.signature(module.forward).parameters.values())
    given = [p for p in takes if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # What may be left out, such as a gate, may be given too, and then another formula holds.
    alone = len(given) == 1 and given[0].default is given[0].empty
    # One number for all features is no norm's weight: it is followed as any other parameter.
    vectors = all(p is None or (p.dim() == 1 and len(p) > 1) for p in module._parameters.values())
    has_weight = module._parameters.get("weight") is not None
    if "Norm" in type(module).__name__ and has_weight and vectors and alone:
        return NORM
    return None
