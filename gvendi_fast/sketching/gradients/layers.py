"""Kinds of layers: which parameters a preset leaves in a sketch, and the groups that sketches are kept by.

A parameter belongs to the cell (kind of layer, half of the blocks). A preset is a set of cells, and so is a group, so
that what a preset would have sketched can be added up from groups afterwards. Kinds are read from the model: an
embedding and a norm by their modules, the head by what the model says of itself, and attention by what it does: the
modules inside a block whose output at a position depends on other positions. Experts and their router are known by
their number: E modules alike, or tensors [E, ...], beside a matrix of E rows. Small parameters (a mixer's decays and
convolutions, sinks, gates) belong to the part that they are in, so they are no kinds of their own.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.taps import EMBEDDING, NORM, WATCHED, Layout, Tap, blocks_of

EMBEDDINGS, HEAD, TIED, ATTENTION, MLP, EXPERT, ROUTER, NORMS, OTHER = KINDS = (
    "embedding",
    "head",
    "embedding and head",
    "attention",
    "mlp",
    "expert",
    "router",
    "norm",
    "other",
)
FIRST, LAST = "first half", "last half"
# Of parameters that no group of a mapping names.
REST = "rest"


@dataclass(frozen=True, order=True)
class Cell:
    """Where a parameter is. kind: one of KINDS. half: of the blocks, "first half", "last half", or "" outside."""

    kind: str
    half: str = ""

    @property
    def name(self) -> str:
        """As messages and columns have it."""
        return f"{self.kind}, {self.half}" if self.half else self.kind


# What a preset sketches.
PRESETS: dict[str, Callable[[Cell], bool]] = {
    "all": lambda cell: True,
    "no-embedding": lambda cell: cell.kind != EMBEDDINGS,
    "no-head": lambda cell: cell.kind != HEAD,
    "no-embedding-or-head": lambda cell: cell.kind not in (EMBEDDINGS, HEAD, TIED),
    "no-norm": lambda cell: cell.kind != NORMS,
    "attention": lambda cell: cell.kind == ATTENTION,
    # Experts and their routers stand in an MLP's place.
    "mlp": lambda cell: cell.kind in (MLP, EXPERT, ROUTER),
    "expert": lambda cell: cell.kind == EXPERT,
    "no-expert": lambda cell: cell.kind != EXPERT,
    "no-router": lambda cell: cell.kind != ROUTER,
    "first-half": lambda cell: cell.half == FIRST,
    "last-half": lambda cell: cell.half == LAST,
}
# A preset of blocks by number, "last-4": the last four alone, norms included, without what comes after them.
_LAST_BLOCKS = re.compile(r"last-([1-9][0-9]*)")
# Which cells a group of each grouping holds together.
GROUPINGS: dict[str, Callable[[Cell], str]] = {
    "kind": lambda cell: cell.kind,
    "kind-and-half": lambda cell: cell.name,
    "embedding": lambda cell: EMBEDDINGS if cell.kind in (EMBEDDINGS, HEAD, TIED) else REST,
}


def check_preset(layers: str) -> None:
    """GvendiError for a word that is no preset."""
    if layers not in PRESETS and last_blocks(layers) is None:
        raise GvendiError(
            f"layers is {layers!r}; wanted one of {', '.join(PRESETS)}, or last-N for the last N blocks (last-4)"
        )


def last_blocks(layers: str) -> int | None:
    """N of the preset "last-N"; None for another one."""
    found = _LAST_BLOCKS.fullmatch(layers)
    return int(found[1]) if found else None


def check_groups(groups: str | Mapping[str, Sequence[str]] | None) -> None:
    """GvendiError for a word that is no grouping, and for a mapping that cannot be one."""
    if isinstance(groups, str) and groups not in GROUPINGS:
        raise GvendiError(
            f"groups is {groups!r}; wanted one of {', '.join(GROUPINGS)}, or {{name: [patterns of parameter names]}}"
        )
    if isinstance(groups, Mapping):
        if REST in groups:
            raise GvendiError(f"groups has a group {REST!r}, the name of what no pattern matches; rename it")
        for name, patterns in groups.items():
            if isinstance(patterns, str) or not patterns:
                raise GvendiError(
                    f"groups[{name!r}] is {patterns!r}; wanted a list of patterns of parameter names"
                )


def find_cells(model: nn.Module, layout: Layout) -> dict[str, Cell]:
    """The cell of every sketched parameter, by its name, found by running the model on four tokens.

    The layers of a block are of its attention where they lie in a module whose output at the last position depends on
    another one (a Mamba's mixer is among them), else of its MLP, unless they are experts or a router. With D blocks
    the last half are the last D // 2.
    """
    blocks = blocks_of(model, layout.taps)
    half_of = {
        id(part): i >= len(blocks) - len(blocks) // 2 for i, b in enumerate(blocks) for part in b.modules()
    }
    mixing = _mixing(model, blocks, layout.taps)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    experts, routers = find_experts(blocks)
    cells: dict[str, Cell] = {}
    for tap in layout.taps:
        module = tap.module
        half = "" if id(module) not in half_of else LAST if half_of[id(module)] else FIRST
        for attribute, name in tap.parameters:
            parameter = id(getattr(module, attribute, None))
            if module is head:
                kind = HEAD
            elif tap.kind in (EMBEDDING, NORM):
                kind = EMBEDDINGS if tap.kind == EMBEDDING else NORMS
            elif parameter in experts or parameter in routers:
                kind = EXPERT if parameter in experts else ROUTER
            elif half:
                kind = ATTENTION if id(module) in mixing else MLP
            else:
                kind = OTHER
            before = cells.setdefault(name, Cell(kind, half))
            if {before.kind, kind} == {EMBEDDINGS, HEAD}:
                cells[name] = Cell(TIED)
    return cells


def find_experts(blocks: Sequence[nn.Module]) -> tuple[set[int], set[int]]:
    """Ids of the parameters of experts, and of those of their routers, in the blocks of a model.

    Experts are E >= 2 members of one list that are alike, or what a module holds in tensors [E, ...] of three axes.
    Their router is a matrix of E rows, with its bias, in the nearest module around them that has one outside. Where
    there is none they are no experts: heads of block-diagonal layers are stacked, too.
    """
    experts: set[int] = set()
    routers: set[int] = set()
    for block in blocks:
        modules = dict(block.named_modules())
        for path, module in modules.items():
            count = _alike(module) or _stacked(module)
            inside = {id(p) for p in module.parameters()}
            router: set[int] = set()
            place: str | None = path
            while count and not router and place is not None:
                router = _matrices_of(modules[place], count, inside)
                place = None if not place else place.rpartition(".")[0]
            if router:
                experts |= inside
                routers |= router
    return experts, routers - experts


def left_out_before(count: int, model: nn.Module, layout: Layout) -> list[str]:
    """The names of the sketched parameters that lie outside of a model's last `count` blocks.

    Raises GvendiError where there are not so many blocks, and where a parameter lies inside and outside.
    """
    blocks = blocks_of(model, layout.taps)
    if count > len(blocks):
        raise GvendiError(
            f"layers is 'last-{count}', but the model has {len(blocks)} blocks with parameters to sketch; give no more"
        )
    inside = {id(part) for block in blocks[-count:] for part in block.modules()}
    names: dict[bool, list[str]] = {True: [], False: []}
    for tap in layout.taps:
        names[id(tap.module) in inside] += tap.names
    both = [name for name in names[True] if name in names[False]]
    if both:
        raise GvendiError(
            f"layers is 'last-{count}', but the parameter {both[0]!r} is shared with a layer outside of these blocks; "
            "give another number, or 'all'"
        )
    if not names[True]:
        raise GvendiError(f"layers='last-{count}' leaves no parameter of the model; give more blocks")
    return names[False]


def _alike(module: nn.Module) -> int:
    """How many members a list has, all of one class and sizes; 0 for what is no such list."""
    members = list(module) if isinstance(module, nn.ModuleList) else []
    kinds = {(type(m), tuple((name, p.shape) for name, p in m.named_parameters())) for m in members}
    return len(members) if len(members) > 1 and len(kinds) == 1 and next(iter(kinds))[1] else 0


def _stacked(module: nn.Module) -> int:
    """E of a module's tensors [E, I, O], I and O above 1; 0 where it has none, or they differ in it."""
    counts = {
        p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3 and min(p.shape) > 1
    }
    is_stack = len(counts) == 1 and not isinstance(module, nn.modules.conv._ConvNd)
    return counts.pop() if is_stack else 0


def _matrices_of(module: nn.Module, count: int, inside: set[int]) -> set[int]:
    """Ids of the matrices of `count` rows in a module, with their biases, that are not among those `inside`."""
    found: set[int] = set()
    for part in module.modules():
        own = [p for p in part._parameters.values() if p is not None and id(p) not in inside]
        if any(p.dim() == 2 and p.shape[0] == count for p in own):
            found |= {id(p) for p in own if p.shape[:1] == (count,) and p.dim() < 3}
    return found


def left_out(layers: str, cells: Mapping[str, Cell]) -> list[str]:
    """The names of the parameters that a preset does not sketch.

    Raises GvendiError where nothing is left, and where a tied parameter is both what goes and what stays.
    """
    check_preset(layers)
    _check_tied(layers, cells.values())
    out = [name for name, cell in cells.items() if not PRESETS[layers](cell)]
    if len(out) == len(cells):
        there = ", ".join(dict.fromkeys(cell.name for cell in cells.values()))
        raise GvendiError(
            f"layers={layers!r} leaves no parameter of the model, which has: {there}; give another"
        )
    return out


def _check_tied(layers: str, cells: Any) -> None:
    if layers in ("no-embedding", "no-head") and any(cell.kind == TIED for cell in cells):
        raise GvendiError(
            f"layers is {layers!r}, but the embedding and the head of this model are one parameter (tied); give "
            "'no-embedding-or-head', which leaves it out"
        )


@dataclass(frozen=True)
class SketchGroups:
    """Groups of parameters.

    names: of the groups, in order. of: {parameter: number}. cells: of each group. sizes: coordinates of each.
    """

    names: tuple[str, ...]
    of: dict[str, int]
    cells: tuple[tuple[Cell, ...], ...]
    sizes: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """What a run's spec says of them."""
        cells = [[[cell.kind, cell.half] for cell in group] for group in self.cells]
        return {"names": list(self.names), "cells": cells, "sketched": list(self.sizes)}


def find_sketch_groups(
    groups: str | Mapping[str, Sequence[str]], parameters: Mapping[str, int], cells: Mapping[str, Cell]
) -> SketchGroups:
    """The groups of the sketched parameters.

    groups: a grouping by cells, or {name: shell patterns of parameter names}; parameters that no pattern matches are
        the group "rest", which comes last.
    parameters: {name: its size}.
    Raises GvendiError for a parameter in two groups and for a group without any.
    """
    check_groups(groups)
    if isinstance(groups, str):
        of = {name: GROUPINGS[groups](cells[name]) for name in parameters}
        kinds = {GROUPINGS[groups](cell): None for cell in sorted(set(cells.values()), key=_order)}
        names = tuple(name for name in kinds if name in set(of.values()))
    else:
        of = {}
        for name, patterns in groups.items():
            found = [p for p in parameters if any(fnmatch.fnmatchcase(p, pattern) for pattern in patterns)]
            if not found:
                raise GvendiError(
                    f"groups[{name!r}] = {list(patterns)!r} matches no sketched parameter; leave it out"
                )
            for parameter in found:
                if parameter in of:
                    raise GvendiError(
                        f"the parameter {parameter!r} is in two groups, {of[parameter]!r} and {name!r}; give "
                        "patterns that do not overlap"
                    )
                of[parameter] = name
        of = {parameter: of.get(parameter, REST) for parameter in parameters}
        names = (*groups, REST) if REST in of.values() else tuple(groups)
    number = {name: i for i, name in enumerate(names)}
    inside = tuple(
        tuple(sorted({cells[p] for p in parameters if of[p] == name}, key=_order)) for name in names
    )
    sizes = tuple(sum(parameters[p] for p in parameters if of[p] == name) for name in names)
    return SketchGroups(names, {p: number[of[p]] for p in parameters}, inside, sizes)


def _order(cell: Cell) -> tuple[int, str]:
    return KINDS.index(cell.kind), cell.half


def choose_groups(layers: str, cells: Sequence[Sequence[Cell]], names: Sequence[str]) -> list[int]:
    """Which groups add up to what a preset sketches, by the cells of each.

    Raises GvendiError where a group holds both what the preset sketches and what it leaves out.
    """
    check_preset(layers)
    if last_blocks(layers) is not None:
        raise GvendiError(
            f"layers={layers!r} is no sum of sketch groups, which know the halves of a model alone; sketch again with "
            f"--layers {layers}"
        )
    _check_tied(layers, [cell for group in cells for cell in group])
    chosen = []
    for i, group in enumerate(cells):
        kept = {PRESETS[layers](cell) for cell in group}
        if len(kept) == 2:
            raise GvendiError(
                f"layers={layers!r} would split the sketch group {names[i]!r}; sketch again with --layers {layers}, "
                "or with --sketch-groups kind-and-half, from which every preset can be chosen afterwards"
            )
        if kept == {True}:
            chosen.append(i)
    if not chosen:
        raise GvendiError(
            f"layers={layers!r} leaves none of the sketch groups {', '.join(names)}; give another"
        )
    return chosen


def _mixing(model: nn.Module, blocks: Sequence[nn.Module], taps: Sequence[Tap]) -> set[int]:
    """Ids of all modules that lie in a part of a block which mixes positions.

    A part mixes them if the gradient of its output at the last position is not zero at another position of its input.
    """
    tapped = {id(tap.module) for tap in taps}
    # A mixer with parameters of its own is a part; a layer is none.
    layers = {id(tap.module) for tap in taps if tap.kind != WATCHED}
    parts = [
        part
        for block in blocks
        for part in block.modules()
        if part is not block
        and id(part) not in layers
        and not isinstance(part, nn.ModuleList)
        and any(id(module) in tapped for module in part.modules())
    ]
    mixing: set[int] = set()

    def look(part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x, y = _hidden((*args, *kwargs.values())), _hidden(output if isinstance(output, tuple) else (output,))
        if id(part) in mixing or x is None or y is None:
            return
        last = y.reshape(-1, y.shape[-1])[-1].float()
        # Numbers that differ, for a norm's outputs add up to a constant.
        total = last @ torch.linspace(1, 2, last.shape[0], device=last.device)
        (gradient,) = torch.autograd.grad(total, x, retain_graph=True, allow_unused=True)
        if gradient is not None and bool(gradient.reshape(-1, x.shape[-1])[:-1].any()):
            mixing.update(id(module) for module in part.modules())

    embedding = model.get_input_embeddings()
    ids = torch.arange(1, 5, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    with undoing() as undo, torch.enable_grad():
        for part in parts:
            undo.append(part.register_forward_hook(look, with_kwargs=True).remove)
        start = embedding.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
        undo.append(start.remove)
        model(input_ids=ids, use_cache=False)
    return mixing


def _hidden(values: Sequence[Any]) -> Tensor | None:
    """The first tensor of hidden states among these: it depends on what the embedding gave."""
    return next((x for x in values if isinstance(x, Tensor) and x.requires_grad and x.dim() > 1), None)
