"""Every use of a parameter for which no tap of a whole module is known.

Such parameters are *watched*. While the model's own forward runs, `ParameterUses` sees every operation. What is
computed from parameters alone (views, W[e], transposes, casts, -exp(A_log)) stays parameter-side: autograd links it to
a leaf that stands for the parameter. Where a parameter-side tensor meets an activation, the handler of that operation
gives the output, with a node of the probe (`probe.py`) in autograd's graph, and no weight gradient is formed.

In a training step (`Pass.trains`) nothing stands for a parameter: every operation runs on the model's own tensors,
whose gradients are formed as ever, and handlers add nodes alone. There other parameters have gradients too; what is
computed from them alone is no activation.

An operation without a handler raises GvendiError. What no handler saw would leave a gradient at a leaf, which the
backward pass asks for, so nothing is missed in silence; a training step looks at autograd's graph (`SeenEdges`).

A handler is registered with `@handles(functions...)` and is a function `handler(use: Use) -> output`: it runs the
operation with what it puts in place of each parameter-side tensor (`use.run`), and the values are those of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.graph import edges, nodes_of
from gvendi_fast.sketching.gradients.token_rows import TokenRows

Handler = Callable[["Use"], Any]
# By function: handlers with a condition first, then the one for every use.
_HANDLERS: dict[Any, list[tuple[Callable[[Use], bool] | None, Handler]]] = {}
# Stands for every function that no handler is registered for.
ANY = object()
# Where a parameter-side tensor keeps what is known of it: it goes with the tensor.
_SIDE = "_gvendi_side"


def handles(*functions: Any, when: Callable[[Use], bool] | None = None) -> Callable[[Handler], Handler]:
    """Registers a handler for functions as a TorchFunctionMode sees them: torch.matmul, Tensor.__matmul__, ...

    An operator of a library that may not be there comes by its name, "library::operator".

    when: which uses of them it is for; all that no other handler is for, if not given.
    """

    def register(handler: Handler) -> Handler:
        for function in functions:
            known = _HANDLERS.setdefault(function, [])
            known.insert(len(known) if when is None else 0, (when, handler))
        return handler

    return register


def _handler(use: Use) -> Handler | None:
    names = use.function, getattr(use.function, "_qualified_op_name", None), ANY
    known = [entry for name in names if name is not None for entry in _HANDLERS.get(name, ())]
    return next((handler for when, handler in known if when is None or when(use)), None)


@dataclass
class Watched:
    """A parameter that is watched.

    name: of the parameter. path, module, attribute: where it is.
    group: number of its sketch group, None where sketches are not kept by group.
    stacked: its first axis numbers experts, each a parameter of its own (`expert_name`). transposed: it is stored as
        [I, O]. Both as the first use shows, which the trial at construction sees; None before.
    formed: a handler forms its gradient for every sample, which is for small parameters.
    """

    name: str
    path: str
    module: nn.Module
    attribute: str
    group: int | None = None
    stacked: bool | None = None
    transposed: bool | None = None
    formed: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor, which may be another one than at the trial."""
        return self.module._parameters[self.attribute]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.name!r} ({type(self.module).__name__})"


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a parameter-side tensor comes from.

    of, leaves: the parameters that it was computed from, and the leaf of autograd's graph that stands for each.
    view: the same coordinates as a view of the parameter itself (of its leaf), None where it is no plain part of one.
    index: int64; the tensor is view[index] along the first axis of `view`, None where it is `view` itself.
    trains: whether it is of a training step. made: how it was computed there, None for a parameter itself.
    """

    of: tuple[Watched, ...]
    leaves: tuple[Tensor, ...]
    view: Tensor | None = None
    index: Tensor | None = None
    trains: bool = False
    made: Made | None = None

    def again(self, leaves: dict[int, Tensor], done: dict[int, Tensor]) -> Tensor:
        """The tensor computed anew; leaves: {id of a leaf: what stands for it}, done: {id of an origin: its tensor}."""
        if self.made is None:
            return leaves[id(self.leaves[0])]
        if id(self) not in done:

            def placed(x: Any) -> Any:
                return x.again(leaves, done) if isinstance(x, Origin) else x

            done[id(self)] = self.made.run(placed)
        return done[id(self)]


@dataclass(frozen=True, eq=False)
class Made:
    """Output number `place` of a function on parameter-side tensors, for each of which its `Origin` stands here."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    place: int = 0

    def run(self, placed: Callable[[Any], Any]) -> Tensor:
        """The output, with placed(x) for every argument."""
        args = (_mapped(x, placed) for x in self.args)
        out = self.function(*args, **{name: _mapped(x, placed) for name, x in self.kwargs.items()})
        return _outputs(out)[self.place]


@dataclass(frozen=True, eq=False)
class Side:
    """A parameter-side tensor in an operation: its value, differentiable back to the leaves, and its origin."""

    value: Tensor
    origin: Origin

    @property
    def is_leaf(self) -> bool:
        """Whether it is one parameter itself."""
        origin = self.origin
        if origin.trains:
            return origin.made is None
        return len(origin.leaves) == 1 and self.value is origin.leaves[0]

    @property
    def is_trained(self) -> bool:
        """Whether the step forms a gradient of it; a parameter that it does not train has a leaf of its own."""
        return self.origin.trains and any(isinstance(leaf, nn.Parameter) for leaf in self.origin.leaves)

    def chain(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The value, and the leaves back to which a gradient of it may be taken.

        In a training step it is computed anew: the step's own graph has hooks of others, and may be gone or be run
        again by a checkpoint.
        """
        if not self.origin.trains:
            return self.value, self.origin.leaves
        with torch.enable_grad():
            leaves = {id(leaf): leaf.detach().requires_grad_() for leaf in self.origin.leaves}
            return self.origin.again(leaves, {}), tuple(leaves.values())

    def then(self, function: Callable[[Tensor], Tensor]) -> Side:
        """What a function makes of it."""
        value = function(self.value)
        if not self.origin.trains:
            return Side(value, self.origin)
        return Side(value.detach(), replace(self.origin, made=Made(function, (self.origin,), {})))

    @property
    def of(self) -> tuple[Watched, ...]:
        """The parameters that it was computed from."""
        return self.origin.of


@dataclass(frozen=True)
class Pass:
    """What a pass over a batch of B samples of T positions gives to nodes.

    probe float32 [B, K]; group_probes: of each sketch group, empty where sketches are not kept by group.
    segments int64 [B, 2] on the CPU: the rows of the flattened batch in which a gradient can differ from zero.
    trains: whether it is a training step's, which forms the gradients of its weights. owners: as `TokenRows` has them.
    """

    spec: SketchSpec
    probe: Tensor
    group_probes: tuple[Tensor, ...]
    segments: Tensor
    samples: int
    length: int
    trains: bool = False
    owners: Tensor | None = None

    def probes(self, watched: Sequence[Watched]) -> tuple[Tensor, ...]:
        """The probe, then that of the group of each of these parameters where sketches are kept by group."""
        if not self.group_probes:
            return (self.probe,)
        return self.probe, *(self.group_probes[w.group] for w in watched)


@dataclass(frozen=True, eq=False)
class Use:
    """An operation in which parameter-side tensors meet an activation.

    function, args, kwargs: the call, in which parameter-side tensors are the values of `sides`.
    sides: the parameter-side arguments in the order of the call; what was computed from several is one of them.
    current: the pass. rows: which sample a row of an activation belongs to (`rows.samples(x)`).
    """

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    sides: tuple[Side, ...]
    current: Pass
    rows: TokenRows

    def side(self, x: Any) -> Side | None:
        """The side whose value x is; None for an activation, a number and None."""
        return next((side for side in self.sides if side.value is x), None)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument that comes by place or by name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @staticmethod
    def own(side: Side) -> Tensor:
        """What takes part in the operation: detached, so that no gradient is formed that the model does not want."""
        return side.value if side.is_trained else side.value.detach()

    def run(self, put: Callable[[Side], Tensor] | None = None) -> Any:
        """The operation with put(side) in place of each side, `own` if not given."""
        put = put or self.own

        def placed(x: Any) -> Any:
            side = self.side(x) if isinstance(x, Tensor) else None
            return x if side is None else put(side)

        args = tuple(_mapped(x, placed) for x in self.args)
        return self.function(*args, **{name: _mapped(x, placed) for name, x in self.kwargs.items()})

    def unknown(self, why: str) -> GvendiError:
        """The error for a use that cannot be sketched."""
        names = ", ".join(w.where for side in self.sides for w in side.of)
        patterns = list(dict.fromkeys(w.name for side in self.sides for w in side.of))
        packed = (
            "give each sample a row of its own instead of packing them, or " if self.rows.is_packed else ""
        )
        return GvendiError(
            f"no sketch is known for the parameters {names} as {name_of(self.function)} uses them: {why}; {packed}"
            f"leave them out with exclude={patterns} (the coverage of the result then says how much is sketched)"
        )


def pair_biases(watched: Sequence[Watched]) -> None:
    """Before a trial: a bias [E, O] beside a weight [E, ...] of its module is stacked as that is."""
    for w in watched:
        if w.parameter.dim() == 2 and "bias" in w.attribute:
            # The weight need not be sketched itself.
            beside = [p for p in w.module._parameters.values() if p is not None and p.dim() == 3]
            w.stacked = any(len(p) == len(w.parameter) for p in beside)


def settle(watched: Sequence[Watched]) -> None:
    """After a trial: what it did not reach is used as it is used in another module of the same class."""
    for w in watched:
        alike = [v for v in watched if type(v.module) is type(w.module) and v.attribute == w.attribute]
        for v in alike:
            w.stacked = v.stacked if w.stacked is None else w.stacked
            w.transposed = v.transposed if w.transposed is None else w.transposed
    for w in watched:
        # What the trial has not shown, no later batch may change: sketches of all batches have one definition.
        w.transposed = bool(w.transposed)


# Operations whose output has the coordinates of its input in their own order: a cast, a copy.
_COPIES = {
    torch.clone, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double,
    Tensor.half, Tensor.bfloat16, Tensor.cuda, Tensor.cpu,
}  # fmt: skip
# Property reads that are operations, and those that give a tensor without its gradient; most give no tensor.
_GETTERS = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__}
_GETS_NO_PART = {Tensor.data.__get__, Tensor.grad.__get__}
_GATHERS = {Tensor.__getitem__, torch.index_select, Tensor.index_select, nn.functional.embedding}


# Parts of the names of functions that give something else each time.
_RANDOM = ("dropout", "bernoulli", "rand", "multinomial", "normal_")


class SeenEdges:
    """The edges of autograd's graph to watched parameters, and to what was computed from them, that were seen.

    Another edge to them is a use that nothing sees: by an autograd function of a model's own, by a fused kernel.
    leaves: {id of a parameter: its name}.
    """

    def __init__(self, leaves: dict[int, str]) -> None:
        self._leaves = leaves
        # Nodes, not their ids: what is not held may be made anew.
        self._sides: dict[Any, list[str]] = {}
        self._edges: set[tuple[Any, Any]] = set()

    def leaf(self, parameter: Tensor, name: str) -> None:
        """A parameter is another tensor than at the beginning of the pass."""
        self._leaves[id(parameter)] = name

    def side(self, x: Tensor, names: list[str]) -> None:
        """x was computed from the parameters of these names."""
        if x.grad_fn is not None:
            self._sides[x.grad_fn] = names

    def note(self, outputs: Any, ends: Set[Any]) -> None:
        """An operation that was seen gave outputs; ends: the nodes that its arguments came from."""
        self._edges.update(edge for edge in edges(outputs, ends) if self._names(edge[1]))

    def hidden(self, outputs: Any) -> list[str]:
        """Names of the parameters that outputs depend on by an edge that was not seen."""
        found = {name for edge in edges(outputs) if edge not in self._edges for name in self._names(edge[1])}
        return sorted(found)

    def _names(self, node: Any) -> Sequence[str]:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return (self._leaves[id(leaf)],) if id(leaf) in self._leaves else ()
        return self._sides.get(node, ())


class ParameterUses(TorchFunctionMode):
    """Inside this block every operation of a pass is seen; see the top of this file."""

    def __init__(self, watched: Sequence[Watched], current: Pass) -> None:
        super().__init__()
        self.current = current
        self.rows = TokenRows(
            current.samples, current.length, has_parameters=current.trains, owners=current.owners
        )
        # Names of the parameters of which an operation that may pass a gradient was seen.
        self.met: set[str] = set()
        self._watched = {id(w.parameter): w for w in watched}
        self._all = tuple(watched)
        # Parameters that are not watched, held so that nothing else gets their ids, and those that are out of sight.
        self._others: dict[int, Tensor] = {}
        self._hidden: set[int] = set()
        # Of one that requires a gradient a use out of sight is seen by its gradient, even if no operation took it.
        self.leaves = {w.name: w.parameter for w in watched if w.parameter.requires_grad}
        # Ids of tensors are those of this pass alone.
        self._mark = object()
        # In a training step, where it is looked at which edges of autograd's graph are known.
        self.seen: SeenEdges | None = None
        # Threads in which operations are seen.
        self._inside: list[int] = []

    @property
    def is_on(self) -> bool:
        """Whether operations of this thread are seen."""
        return threading.get_ident() in self._inside

    def __enter__(self) -> ParameterUses:
        super().__enter__()
        self._inside.append(threading.get_ident())
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.remove(threading.get_ident())
        super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "__get__" and function not in _GETTERS:
            out = function(*args, **kwargs)
            if not isinstance(out, Tensor) or function in _GETS_NO_PART:
                return out
        sides = list(self._sides((args, kwargs))) if self._watched else []
        if not sides or not torch.is_grad_enabled():
            out = function(*args, **kwargs)
            if self.current.trains and self._is_still((args, kwargs)):
                for x in _tensors(out):
                    self.rows.keep_still(x)
            else:
                self.rows.follow(function, args, kwargs, out)
            return out
        ends = None if self.seen is None else nodes_of((args, kwargs))
        out = self._used(function, args, kwargs, sides)
        if ends is not None:
            # What was written to is among the arguments.
            self.seen.note((out, args, kwargs), ends)
        return out

    def _used(self, function, args: tuple, kwargs: dict[str, Any], sides: list[tuple[Tensor, Side]]) -> Any:
        """What an operation gives that parameter-side tensors take part in."""
        found = {id(given): side for given, side in sides}
        self.met.update(w.name for _, side in sides for w in side.origin.of)

        def placed(x: Any) -> Any:
            return found[id(x)].value if id(x) in found else x

        args = tuple(_mapped(x, placed) for x in args)
        kwargs = {name: _mapped(x, placed) for name, x in kwargs.items()}
        values = [side for _, side in sides]
        if not self._meets_activation(values, (args, kwargs)):
            out = function(*args, **kwargs)
            for place, x in enumerate(_outputs(out)):
                if isinstance(x, Tensor) and x.requires_grad:
                    self._note(x, self._origin(function, args, kwargs, values, out, place, x))
            return out
        use = Use(function, args, kwargs, tuple(values), self.current, self.rows)
        handler = _handler(use)
        if handler is None:
            out = function(*args, **kwargs)
            # A comparison or a shape passes no gradient.
            if any(isinstance(x, Tensor) and x.requires_grad for x in _outputs(out)):
                raise use.unknown("an operation that is not known here")
            return out
        out = handler(use)
        self.rows.follow(function, args, kwargs, out)
        return out

    @contextmanager
    def out_of_sight(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside, uses of these parameters are not looked at: a tap of a whole module sketches them."""
        before, self._hidden = self._hidden, self._hidden | {id(p) for p in parameters if p is not None}
        try:
            yield
        finally:
            self._hidden = before

    def missed(self, gradients: Sequence[Tensor | None]) -> None:
        """Raises GvendiError if a leaf got a gradient: `gradients` of the loss for `leaves`, in their order."""
        names = [name for name, g in zip(self.leaves, gradients, strict=True) if g is not None]
        if names:
            raise GvendiError(
                f"the parameters {', '.join(map(repr, names))} are used by an operation that hides what it does (an "
                "autograd function of its own), so their sketch would not be whole; leave them out with "
                f"exclude={names}"
            )

    def _sides(self, values: Any) -> Iterator[tuple[Tensor, Side]]:
        """Every parameter-side tensor of a call, once, as given and as a side."""
        seen: set[int] = set()
        for x in _tensors(values):
            if id(x) in seen:
                continue
            seen.add(id(x))
            side = self._side(x)
            if side is not None:
                yield x, side

    def _side(self, x: Tensor) -> Side | None:
        watched = self._of(x)
        if watched is not None:
            leaf = self.leaves.get(watched.name)
            if self.current.trains and x.requires_grad:
                leaf = self.leaves[watched.name] = x
            elif leaf is None:
                # Inside inference mode tensors are made that no gradient goes to.
                own = x.clone() if x.is_inference() else x.detach()
                leaf = self.leaves[watched.name] = own.requires_grad_()
            return Side(leaf, Origin((watched,), (leaf,), leaf.detach(), trains=self.current.trains))
        note = x.__dict__.get(_SIDE)
        return Side(x, note[1]) if note is not None and note[0] is self._mark else None

    def _of(self, x: Tensor) -> Watched | None:
        """The watched parameter that x is, None for another tensor and where it is out of sight."""
        key = id(x)
        if key in self._hidden:
            return None
        if key not in self._watched and self.current.trains and isinstance(x, nn.Parameter):
            if key in self._others:
                return None
            # Sharded weights are gathered into other tensors while their layers run.
            found = next((w for w in self._all if w.parameter is x), None)
            if found is None:
                self._others[key] = x
                return None
            self._watched[key] = found
            if self.seen is not None:
                self.seen.leaf(x, found.name)
        return self._watched.get(key)

    def _note(self, x: Tensor, origin: Origin) -> None:
        x.__dict__[_SIDE] = self._mark, origin
        if self.current.trains:
            self.rows.keep_still(x)
            if self.seen is not None:
                self.seen.side(x, [w.name for w in origin.of])

    def _meets_activation(self, sides: Sequence[Side], values: Any) -> bool:
        own = {id(side.value) for side in sides}
        return any(self.rows.moves(x) and id(x) not in own for x in _tensors(values))

    def _is_still(self, values: Any) -> bool:
        """Whether an operation takes other parameters and no activation."""
        given = [x for x in _tensors(values) if x.requires_grad]
        return bool(given) and not any(map(self.rows.moves, given))

    def _origin(
        self, function, args, kwargs, sides: Sequence[Side], out: Any, place: int, x: Tensor
    ) -> Origin:
        """The origin of what an operation on parameter-side tensors alone gave."""
        leaf_of = {w.name: (w, leaf) for s in sides for w, leaf in zip(s.of, s.origin.leaves, strict=True)}
        of, leaves = zip(*leaf_of.values(), strict=True)
        view, index = self._place(function, args, kwargs, sides, place, x)
        if not self.current.trains:
            return Origin(of, leaves, view, index)
        given = {id(side.value): side.origin for side in sides}

        def placed(y: Any) -> Any:
            return given.get(id(y), y)

        name = name_of(function)
        if any(word in name for word in _RANDOM) and not torch.equal(x, sides[0].value):
            raise GvendiError(
                f"{name} makes something random of the parameters {', '.join(w.where for w in of)}, which cannot be "
                f"computed again for their sketch; leave them out with exclude={[w.name for w in of]}"
            )
        again = Made(
            function,
            tuple(_mapped(y, placed) for y in args),
            {n: _mapped(y, placed) for n, y in kwargs.items()},
            place,
        )
        return Origin(of, leaves, view, index, True, again)

    def _place(self, function, args, kwargs, sides: Sequence[Side], place: int, x: Tensor):
        """(view, index) of `Origin` for output number `place`, x, of an operation."""
        own, origin = sides[0].value, sides[0].origin
        if len(sides) > 1 or origin.view is None:
            return None, None
        if function in _COPIES and x.shape == own.shape:
            return origin.view, origin.index
        if origin.index is not None:
            return None, None
        if _share(x, origin.view):
            return x.detach(), None
        if _share(x, own):
            return _replayed(function, args, kwargs, own, origin.view, place), None
        return _gathered(function, args, kwargs, origin.view) if function in _GATHERS else (None, None)


def _replayed(function, args, kwargs, own: Tensor, view: Tensor, place: int) -> Tensor | None:
    """What a view of a cast parameter is of the parameter itself: the same function, done to its coordinates."""

    def placed(x: Any) -> Any:
        return view if x is own else x

    out = function(*(_mapped(x, placed) for x in args), **{n: _mapped(x, placed) for n, x in kwargs.items()})
    x = _outputs(out)[place]
    return x if _share(x, view) else None


def _gathered(function, args, kwargs, view: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(view, index) where integers pick along the first axis; (None, None) for another pick."""
    if function is nn.functional.embedding:
        index = args[0] if args else kwargs["input"]
    elif function is Tensor.__getitem__:
        index, *others = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(not isinstance(k, slice) or k != slice(None) for k in others):
            return None, None
    elif (args[1] if len(args) > 1 else kwargs["dim"]) in (0, -view.dim()):
        index = args[2] if len(args) > 2 else kwargs["index"]
    else:
        return None, None
    is_number = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    return (view, index) if is_number else (None, None)


def _share(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are parts of one memory. By the storage, for on the meta device all addresses are 0."""
    return x.untyped_storage()._cdata == other.untyped_storage()._cdata


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors of a call, also inside its lists, tuples and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for x in values:
            yield from _tensors(x)
    elif isinstance(values, dict):
        for x in values.values():
            yield from _tensors(x)


def _mapped(x: Any, change: Callable[[Any], Any]) -> Any:
    """A call's argument with its tensors changed, also inside lists and tuples."""
    if isinstance(x, (tuple, list)):
        items = [_mapped(item, change) for item in x]
        if all(new is old for new, old in zip(items, x, strict=True)):
            return x
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return change(x)


def _outputs(out: Any) -> Sequence[Any]:
    return out if isinstance(out, (tuple, list)) else (out,)


def name_of(function: Any) -> str:
    """A function's name for messages."""
    return resolve_name(function) or getattr(function, "__qualname__", None) or str(function)
