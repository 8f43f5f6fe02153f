"""Small parameters of odd use: dt_bias, A_log, convolutions, sinks, gates, lambdas, gated norms, learned scales.

The gradient g_b of such a parameter is formed for every sample, [B, *its shape], and sketched by the definition
(`reference.sketch_of_gradient`). It takes which sample an entry of an operation's output belongs to:

    d(loss)/dq = J^T e  is linear in e,  so  g_b = J^T e_b  with e_b = e on the entries of sample b, and 0 elsewhere.

For an operation that broadcasts q, J^T e_b is a sum over the axes along which q was repeated. For a convolution it is
one convolution with a group for every sample. What was computed from parameters alone, q = -exp(A_log), is pulled back
to them by a product with its own Jacobian. An operation that is not known here is run anew for each sample by itself,
after a look that it gives for a sample alone what it gives for it in the batch.

Where it is not known which sample an entry belongs to, there is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.layer_sketch import layer_sketch
from gvendi_fast.sketching.gradients.parameter_uses import (
    ANY,
    Pass,
    Side,
    Use,
    Watched,
    handles,
)
from gvendi_fast.sketching.gradients.token_rows import UNKNOWN, Along, Numbers
from gvendi_fast.sketching.gradients.use_nodes import for_probes, is_change, sketch_of_gradients

functional = nn.functional
Known = Along | Numbers
# Gradients are formed whole for at most this share of a model, or for so many parameters of a small one.
SMALL_SHARE, SMALL_COUNT = 0.01, 1 << 20
# By how many roundings an operation may differ for a sample alone; a number's own rounding by its type.
ROUNDINGS = 16
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Entries of all samples' gradients that are pulled back at once; more go one sample after the other.
AT_ONCE = 1 << 22


class BroadcastSide(torch.autograd.Function):
    """A parameter-side tensor broadcast to the shape of an output; its gradient goes to the probes by sample."""

    @staticmethod
    def forward(ctx, value: Tensor, shape: tuple, known: Known, side: Side, current: Pass, *probes: Tensor):
        ctx.known, ctx.side, ctx.current, ctx.home = known, side, current, probes[0].device
        ctx.count, ctx.shape = len(probes) - 1, value.shape
        return value.expand(shape)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        found = sketches(ctx.side, gradient.detach(), ctx.known, ctx.current)
        # Summed as autograd sums what an operation itself has broadcast.
        own = gradient.sum_to_size(ctx.shape) if ctx.needs_input_grad[0] else None
        return own, *[None] * 4, *for_probes(found, ctx.home, ctx.count)


class Beside(torch.autograd.Function):
    """The output of an operation as it is; its gradient goes as well to the same operation done beside it."""

    @staticmethod
    def forward(ctx, output: Tensor, beside: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, gradient


class UseOutput(torch.autograd.Function):
    """The output of an operation as it is; `of_gradient(e, *saved)` are the sketches of a side's parameters."""

    @staticmethod
    def forward(
        ctx,
        out: Tensor,
        of_gradient: Callable,
        saved: tuple[Tensor, ...],
        use: Use,
        side: Side,
        *probes: Tensor,
    ):
        # Without the activations, which a checkpoint would otherwise keep.
        ctx.of_gradient, ctx.use, ctx.side = of_gradient, replace(use, args=(), kwargs={}), side
        ctx.home, ctx.count = probes[0].device, len(probes) - 1
        ctx.save_for_backward(*saved)
        return out.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if not is_change(error):
                raise
            raise ctx.use.unknown(
                "its input was changed in place afterwards, so its gradient is lost"
            ) from error
        found = ctx.of_gradient(gradient.detach(), *saved)
        return gradient, *[None] * 4, *for_probes(found, ctx.home, ctx.count)


def sketches(side: Side, gradient: Tensor, known: Known, current: Pass) -> list[Tensor]:
    """The sketch float32 [B, K] of each parameter of a side, from the gradient of what it was broadcast to."""
    by_row = _of_rows(side, gradient, known, current)
    if by_row is not None:
        return [by_row]
    shape, samples = side.value.shape, current.samples
    if _has_samples(side.value, gradient, known) or samples * side.value.numel() > AT_ONCE:
        return pulled(side, (part.sum_to_size(shape) for part in _parts(gradient, known, samples)), current)
    return pulled(side, split(gradient, known, samples, shape), current)


def pulled(side: Side, gradients: Tensor | Iterator[Tensor], current: Pass) -> list[Tensor]:
    """The sketch of each parameter of a side, given every sample's gradient of its value.

    gradients: [B, *shape of the value], or one sample's after the other.
    """
    if isinstance(gradients, Tensor) and side.is_leaf:
        return [sketch_of_gradients(side.of[0], gradients, current.spec)]
    value, leaves = side.chain()

    def back(gradient: Tensor, batched: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            value,
            leaves,
            gradient.to(value.dtype),
            is_grads_batched=batched,
            retain_graph=True,
            allow_unused=True,
        )
        lead = (len(gradient),) if batched else ()
        return [
            leaf.new_zeros((*lead, *leaf.shape)) if g is None else g
            for g, leaf in zip(found, leaves, strict=True)
        ]

    if isinstance(gradients, Tensor):
        by_leaf = back(gradients, batched=True)
    else:
        by_leaf = [
            torch.stack(found) for found in zip(*(back(g, batched=False) for g in gradients), strict=True)
        ]
    return [
        sketch_of_gradients(watched, g.detach(), current.spec)
        for watched, g in zip(side.of, by_leaf, strict=True)
    ]


def split(gradient: Tensor, known: Known, samples: int, shape: Sequence[int]) -> Tensor:
    """[B, *shape]: the gradient of an output, summed for each sample to a shape that was broadcast to it."""
    if isinstance(known, Along):
        parts = gradient.unflatten(known.axis, (samples, known.each)).movedim(known.axis, 0)
        return _summed(parts, shape)
    return torch.stack([part.sum_to_size(tuple(shape)) for part in _parts(gradient, known, samples)])


def _summed(parts: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, *whole] -> [B, *shape] by sums over the axes along which `shape` was broadcast, in float32 or wider."""
    wide = torch.promote_types(parts.dtype, torch.float32)
    lead = parts.dim() - 1 - len(shape)
    axes = [*range(1, 1 + lead), *(1 + lead + a for a, size in enumerate(shape) if size == 1)]
    summed = parts.sum(dim=axes, dtype=wide) if axes else parts.to(wide)
    return summed.reshape(len(parts), *shape)


def _parts(gradient: Tensor, known: Known, samples: int) -> Iterator[Tensor]:
    """The gradient of each sample alone: zero on the entries of the others."""
    for b in range(samples):
        if isinstance(known, Along):
            part = torch.zeros_like(gradient)
            begin = b * known.each
            part.narrow(known.axis, begin, known.each).copy_(gradient.narrow(known.axis, begin, known.each))
            yield part
        else:
            yield gradient * (known.samples == b)


def _has_samples(value: Tensor, gradient: Tensor, known: Known) -> bool:
    """Whether a side runs along samples itself, as one that was masked or repeated for each of them does."""
    shape = (1,) * (gradient.dim() - value.dim()) + tuple(value.shape)
    if isinstance(known, Along):
        return shape[known.axis] != 1
    return any(n != 1 and size != 1 for n, size in zip(known.samples.shape, shape, strict=True))


def _of_rows(side: Side, gradient: Tensor, known: Known, current: Pass) -> Tensor | None:
    """The sketch of a matrix of which rows were looked up by number, the same for all samples; None otherwise.

    So a table of positions needs no gradient of its own size.
    """
    origin, value = side.origin, side.value
    if not _is_table(side) or _has_samples(value, gradient, known):
        return None
    rows = split(gradient, known, current.samples, value.shape).reshape(-1, value.shape[-1])
    count = origin.index.numel()
    segments = torch.arange(current.samples, dtype=torch.int64)[:, None] * count + torch.tensor([0, count])
    out = rows.new_zeros((current.samples, current.spec.dim), dtype=torch.float32)
    ids = origin.index.reshape(-1).repeat(current.samples).to(rows.device)
    layer_sketch(current.spec).token(side.of[0].name, len(origin.view), ids, rows.contiguous(), segments, out)
    return out


def _is_table(side: Side) -> bool:
    """Whether a side is rows of a matrix, looked up by number."""
    origin = side.origin
    if origin.index is None or len(side.of) != 1 or side.of[0].stacked or origin.view.dim() != 2:
        return False
    # Of a square matrix the transpose has the same shape; where a product has shown that outputs run along its
    # columns, its looked-up rows are not the definition's.
    parameter, is_turned = side.of[0].parameter, bool(side.of[0].transposed)
    is_same = origin.view.shape == parameter.shape and origin.view.stride() == parameter.stride()
    return is_same and not is_turned


def compact(side: Side) -> Side:
    """The side before it was expanded: one entry of every axis along which it repeats itself."""
    strides = zip(side.value.shape, side.value.stride(), strict=True)
    repeated = [axis for axis, (size, stride) in enumerate(strides) if stride == 0 and size > 1]

    def one(value: Tensor) -> Tensor:
        for axis in repeated:
            value = value.narrow(axis, 0, 1)
        return value

    return side.then(one) if repeated else side


def known_of(use: Use, x: Tensor) -> Known:
    """Which sample an entry of an activation belongs to. Raises GvendiError where that is not known."""
    if use.current.samples == 1 and not use.rows.is_packed:
        return Numbers(torch.zeros((1,) * x.dim(), dtype=torch.int64, device=x.device))
    known = use.rows.of(x)
    if known is UNKNOWN:
        raise use.unknown(
            f"of an activation of shape {tuple(x.shape)} it is not known which of the {use.current.samples} samples "
            "its entries belong to"
        )
    return known


def _activations(use: Use) -> list[Tensor]:
    found: list[Tensor] = []

    def look(x: Any) -> None:
        if isinstance(x, Tensor):
            if use.rows.moves(x) and use.side(x) is None:
                found.append(x)
        elif isinstance(x, (tuple, list)):
            for item in x:
                look(item)

    look([*use.args, *use.kwargs.values()])
    return found


def _known_of_broadcast(use: Use, shape: Sequence[int]) -> Known:
    """Of an output of this shape, to which activations and parameters were broadcast."""
    for x in sorted(_activations(use), key=lambda x: -x.numel()):
        known, shift = known_of(use, x), len(shape) - x.dim()
        if isinstance(known, Numbers):
            return Numbers(known.samples.view((1,) * shift + tuple(known.samples.shape)))
        if shape[known.axis + shift] == x.shape[known.axis]:
            return Along(known.axis + shift, known.each)
    raise use.unknown("no activation in it tells its samples apart")


def broadcast(use: Use, side: Side, shape: Sequence[int], known: Known) -> Tensor:
    """A side's value, broadcast to the shape of an output, with the node of the probe."""
    return _broadcast(use, side, use.own(side), shape, known)


def _broadcast(use: Use, side: Side, value: Tensor, shape: Sequence[int], known: Known) -> Tensor:
    small = form(use, compact(side))
    return BroadcastSide.apply(value, tuple(shape), known, small, use.current, *use.current.probes(side.of))


def check_small(watched: Iterable[Watched], total: int) -> None:
    """Raises GvendiError where gradients would be formed for more than a small share of `total` parameters."""
    formed = {w.name: w for w in watched if w.formed}
    count = sum(w.parameter.numel() for w in formed.values())
    if count <= max(SMALL_SHARE * total, SMALL_COUNT):
        return
    largest = max(formed.values(), key=lambda w: w.parameter.numel())
    raise GvendiError(
        f"the gradients of {len(formed)} parameters of unusual form, {count:,} of the model's {total:,} numbers "
        f"({count / total:.1%}), would have to be formed for every sample, which is done for {SMALL_SHARE:.0%} at "
        f"most; the largest is {largest.where} with {largest.parameter.numel():,}; leave such parameters out with "
        f"exclude=[{largest.name!r}, ...] (the coverage of the result then says how much is sketched)"
    )


def form(use: Use, side: Side) -> Side:
    """The side, of whose parameters the gradients will be formed: they are counted among the small ones."""
    if _is_table(side):
        # A product that comes later finds it settled that rows are the definition's.
        side.of[0].transposed = False
        return side
    for watched in side.of:
        watched.formed = True
    return side


def _both(*names: str) -> list[Any]:
    return [getattr(place, name) for name in names for place in (torch, Tensor) if hasattr(place, name)]


_BINARY = ("add", "sub", "mul", "div", "pow")
_ELEMENTWISE = _both(
    *_BINARY, *(f"{name}_" for name in _BINARY), *(f"__{name}__" for name in _BINARY),
    *(f"__r{name}__" for name in _BINARY), *(f"__i{name}__" for name in _BINARY),
    "__truediv__", "__rtruediv__", "__itruediv__", "subtract", "multiply", "divide", "true_divide", "rsub",
    "subtract_", "multiply_", "divide_", "maximum", "minimum", "fmax", "fmin", "max", "min", "where", "lerp", "lerp_",
    "addcmul", "addcmul_", "addcdiv", "addcdiv_", "atan2", "logaddexp", "xlogy", "hypot", "masked_fill",
    "masked_fill_", "clamp", "clip", "clamp_min", "clamp_max",
)  # fmt: skip


@handles(*_ELEMENTWISE)
def elementwise(use: Use) -> Tensor:
    """An operation entry by entry, in which a parameter is broadcast (x * q, x + q, where(mask, x, q))."""
    shapes = [x.shape for x in [*use.args, *use.kwargs.values()] if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes(*shapes)
    known = _known_of_broadcast(use, shape)
    if not _is_mixed(use):
        return use.run(lambda side: broadcast(use, side, shape, known))
    if not _writes(use):
        return _beside(use, shape, known)
    # As the operation itself widens it; of a number alone it takes the digits that the others have room for.
    given = next(x for x in use.args if isinstance(x, Tensor))
    if any(side.value.dim() == 0 for side in use.sides):
        raise use.unknown(f"it is a single number of another type than {given.dtype}, which it is written to")
    wide = [torch.promote_types(given.dtype, side.value.dtype) for side in use.sides]
    by_side = dict(zip(map(id, use.sides), wide, strict=True))
    return use.run(lambda side: _broadcast(use, side, use.own(side).to(by_side[id(side)]), shape, known))


def _is_mixed(use: Use) -> bool:
    """Whether a training step's operation is on several number formats, whose sums must not be rounded otherwise."""
    given = [x for x in [*use.args, *use.kwargs.values()] if isinstance(x, Tensor) and x.is_floating_point()]
    return use.current.trains and len({x.dtype for x in given}) > 1


def _writes(use: Use) -> bool:
    """Whether an operation writes to its input."""
    name = getattr(use.function, "__name__", "")
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place or name in _WRITES or use.kwargs.get("out") is not None


def _beside(use: Use, shape: Sequence[int], known: Known) -> Tensor:
    """The model's own operation, and beside it one on the same values whose gradients are the samples'."""
    out = use.run()

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        side = use.side(x)
        return x.detach() if side is None else _broadcast(use, side, side.value.detach(), shape, known)

    again = use.function(*map(placed, use.args), **{name: placed(x) for name, x in use.kwargs.items()})
    return Beside.apply(out, again)


@handles(Tensor.__setitem__)
def written(use: Use) -> None:
    """x[key] = q."""
    x, key, given = use.args
    side = use.side(given)
    if side is None or use.side(x) is not None:
        raise use.unknown("it is written to, or numbers what is written")
    known, target = known_of(use, x), x.detach()[key]
    if isinstance(known, Along):
        view = [1] * x.dim()
        view[known.axis] = -1
        numbers = (torch.arange(x.shape[known.axis], device=x.device) // known.each).view(view)
    else:
        numbers = known.samples
    placed = Numbers(numbers.expand(x.shape)[key])
    x[key] = broadcast(use, side, target.shape, placed)


@handles(*_both("copy_", "fill_"))
def copied(use: Use) -> Tensor:
    """x.copy_(q)."""
    x = use.args[0]
    if use.side(x) is not None:
        raise use.unknown("it is written to")
    return use.run(lambda side: broadcast(use, side, x.shape, known_of(use, x)))


@handles(*_both("type_as", "expand_as", "view_as", "reshape_as"))
def shaped(use: Use) -> Tensor:
    """x.type_as(q) and the like take no more of q than its type or its shape."""
    if use.side(use.args[0]) is not None:
        return one_by_one(use)
    return use.run()


@handles(*_both("cat", "concat", "concatenate"))
def joined(use: Use) -> Tensor:
    """cat of parameters that were expanded, such as attention's sinks, with activations of the same samples."""
    parts = use.argument(0, "tensors")
    dim = use.argument(1, "dim", use.kwargs.get("axis", 0))
    x = next(x for x in _activations(use))
    known = known_of(use, x)
    if use.current.samples > 1 or use.rows.is_packed:
        along = (
            [known.axis]
            if isinstance(known, Along)
            else [a for a, n in enumerate(known.samples.shape) if n > 1]
        )
        if dim % x.dim() in along:
            raise use.unknown("it is joined to activations along the axis of their samples")
    if any(part.dim() != x.dim() for part in parts):
        raise use.unknown("parts of unlike dimensions are joined")
    return use.run(lambda side: broadcast(use, side, side.value.shape, known))


@handles(*_both("stack"))
def stacked(use: Use) -> Tensor:
    """stack of parameters that were expanded with activations."""
    known = known_of(use, _activations(use)[0])
    return use.run(lambda side: broadcast(use, side, side.value.shape, known))


def _along_first(use: Use, x: Tensor) -> bool:
    """Whether x [B, ...] or [B * m, ...] has its samples one after the other."""
    return not use.rows.is_packed and (use.current.samples == 1 or use.rows.is_natural(x))


@handles(
    functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d,
)  # fmt: skip
def convolved(use: Use) -> Tensor:
    """A convolution of x [B, I, ...] by a weight [O, I / groups, ...]; bias [O]."""
    x, weight, bias = use.argument(0, "input"), use.argument(1, "weight"), use.argument(2, "bias")
    if use.side(x) is not None:
        return one_by_one(use)
    stride, padding, dilation = (use.argument(3 + i, n, d) for i, (n, d) in enumerate(
        [("stride", 1), ("padding", 0), ("dilation", 1)]
    ))  # fmt: skip
    groups, space, current, samples = (
        use.argument(6, "groups", 1), weight.dim() - 2, use.current, use.current.samples
    )  # fmt: skip
    shape = weight.shape
    batched = x.dim() == weight.dim()
    if not batched or isinstance(padding, str) or not _along_first(use, x):
        return one_by_one(use)

    def each(value: Any) -> list[int]:
        return list(value) if isinstance(value, (tuple, list)) else [value] * space

    out = use.run()
    side = use.side(weight)
    if side is not None:
        is_pointwise = (
            weight.shape[2:].numel() == 1
            and groups == 1
            and set(each(stride)) == {1}
            and not any(each(padding))
            and len(side.of) == 1
            and side.origin.view is not None
            and side.origin.view.shape == side.of[0].parameter.shape
        )

        def of_weight(e: Tensor, given: Tensor) -> list[Tensor]:
            if is_pointwise:
                return [_pointwise(side, given, e, current)]
            gradient = _convolution_gradient(
                given, e, shape, samples, each(stride), each(padding), each(dilation), groups
            )
            return pulled(side, gradient, current)

        if not is_pointwise:
            form(use, side)
        out = UseOutput.apply(out, of_weight, (x.detach(),), use, side, *use.current.probes(side.of))
    shift = use.side(bias) if bias is not None else None
    if shift is not None:

        def of_bias(e: Tensor) -> list[Tensor]:
            by_sample = e.unflatten(0, (samples, -1))
            axes = [1, *range(3, by_sample.dim())]
            return pulled(
                shift, by_sample.sum(axes, dtype=torch.promote_types(e.dtype, torch.float32)), current
            )

        out = UseOutput.apply(out, of_bias, (), use, form(use, shift), *use.current.probes(shift.of))
    return out


def _convolution_gradient(x, e, shape, samples: int, stride, padding, dilation, groups: int) -> Tensor:
    """[B, *shape]: every sample's gradient of a convolution's weight, by one convolution with B times the groups."""
    each = len(x) // samples
    # A sample of several rows: its channels stand side by side with those of the others, row by row.
    x, e = (t.unflatten(0, (samples, each)).transpose(0, 1).flatten(1, 2) for t in (x, e))
    wide = x.dtype if x.dtype == e.dtype else torch.promote_types(x.dtype, e.dtype)
    weight = x.new_empty((samples * shape[0], *shape[1:]), dtype=wide)
    nothing = [0] * len(stride)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        e.to(wide).contiguous(), x.to(wide).contiguous(), weight, None, stride, padding, dilation, False, nothing,
        samples * groups, [False, True, False],
    )  # fmt: skip
    return gradient.view(samples, *shape)


def _pointwise(side: Side, x: Tensor, e: Tensor, current: Pass) -> Tensor:
    """The sketch of a convolution of width 1, which is a linear layer at every position."""
    a, e = (t.movedim(1, -1).reshape(-1, t.shape[1]).contiguous() for t in (x, e))
    step = len(a) // current.samples
    begins = torch.arange(current.samples, dtype=torch.int64) * step
    out = e.new_zeros((current.samples, current.spec.dim), dtype=torch.float32)
    segments = torch.stack([begins, begins + step], dim=1)
    layer_sketch(current.spec).linear(a, [(side.of[0].name, e)], segments, out, False)
    return out


@handles(functional.layer_norm, torch.layer_norm, functional.rms_norm, torch.rms_norm)
def normed(use: Use) -> Tensor:
    """layer_norm and rms_norm of x by a weight and a bias of its last axes."""
    x, shape = use.argument(0, "input"), use.argument(1, "normalized_shape")
    weight, bias = use.argument(2, "weight"), None
    is_layer = use.function in (functional.layer_norm, torch.layer_norm)
    place = 3
    if is_layer:
        bias, place = use.argument(3, "bias"), 4
    eps = use.argument(place, "eps", 1e-5 if is_layer else None)
    if use.side(x) is not None:
        return one_by_one(use)
    known, out, current, samples = known_of(use, x), use.run(), use.current, use.current.samples
    number, of_shape = x.dtype, None if weight is None else tuple(weight.shape)

    def of_weight(e: Tensor, given: Tensor) -> list[Tensor]:
        given = given.to(torch.promote_types(given.dtype, torch.float32))
        if is_layer:
            x_hat = functional.layer_norm(given, shape, None, None, eps)
        else:
            x_hat = functional.rms_norm(given, shape, None, torch.finfo(number).eps if eps is None else eps)
        return pulled(side, split(e * x_hat, known, samples, of_shape), current)

    side = use.side(weight) if weight is not None else None
    if side is not None:
        out = UseOutput.apply(
            out, of_weight, (x.detach(),), use, form(use, side), *use.current.probes(side.of)
        )
    shift = use.side(bias) if bias is not None else None
    if shift is not None:
        bias_shape = tuple(bias.shape)

        def of_bias(e: Tensor) -> list[Tensor]:
            return pulled(shift, split(e, known, samples, bias_shape), current)

        out = UseOutput.apply(out, of_bias, (), use, form(use, shift), *use.current.probes(shift.of))
    return out


@handles(ANY)
def one_by_one(use: Use) -> Any:
    """Any other operation: run anew for each sample by itself in the backward pass, where that is the same.

    Its activations [B, ...] must have their samples along their first axis. That an output's entries are those of its
    sample is seen by running it for every sample alone.
    """
    samples, current = use.current.samples, use.current
    if _writes(use):
        raise use.unknown("it writes to its input")
    if use.rows.is_packed or any(not use.rows.is_natural(x) for x in _activations(use)):
        raise use.unknown("of its activations it is not known which sample each row belongs to")
    out = use.run()
    if not isinstance(out, Tensor):
        raise use.unknown("it gives more than a tensor, and how is not known here")
    alone = _run_alone(use, out)
    given = tuple(x.detach() for x in _tensors_of(use))
    for side in use.sides:

        def of_gradient(e: Tensor, *_: Tensor, side: Side = side) -> list[Tensor]:
            def gradients() -> Iterator[Tensor]:
                step = len(e) // samples
                for b in range(samples):
                    with torch.enable_grad():
                        q = side.value.detach().requires_grad_()
                        y = alone(b, {id(side.value): q})
                        (g,) = torch.autograd.grad(y, q, e[b * step : (b + 1) * step])
                    yield g

            return pulled(side, gradients(), current)

        out = UseOutput.apply(out, of_gradient, given, use, form(use, side), *use.current.probes(side.of))
    return out


_WRITES = {"__setitem__", *(f"__i{n}__" for n in (*_BINARY, "truediv", "matmul", "and", "or"))}


def _tensors_of(use: Use) -> list[Tensor]:
    found: list[Tensor] = []

    def look(x: Any) -> None:
        if isinstance(x, Tensor):
            if use.side(x) is None:
                found.append(x)
        elif isinstance(x, (tuple, list)):
            for item in x:
                look(item)

    look([*use.args, *use.kwargs.values()])
    return found


def _run_alone(use: Use, out: Tensor) -> Callable[[int, dict[int, Tensor]], Tensor]:
    """How the operation runs for one sample: `alone(b, {id of a side's value: what stands for it})`.

    Raises GvendiError where no cut of its arguments gives for each sample what the batch gave.
    """
    samples = use.current.samples

    def of(cuts_sides: bool) -> Callable[[int, dict[int, Tensor]], Tensor]:
        def alone(b: int, instead: dict[int, Tensor]) -> Tensor:
            def placed(x: Any) -> Any:
                if isinstance(x, (tuple, list)):
                    return type(x)(placed(item) for item in x)
                if not isinstance(x, Tensor):
                    return x
                is_side = use.side(x) is not None
                y = instead.get(id(x), x.detach()) if is_side else x.detach()
                cuts = cuts_sides if is_side else True
                is_cut = cuts and x.dim() == out.dim() and x.shape[0] == len(out) and samples > 1
                step = len(x) // samples if is_cut else 0
                return y[b * step : (b + 1) * step] if is_cut else y

            return use.function(*map(placed, use.args), **{n: placed(x) for n, x in use.kwargs.items()})

        return alone

    for cuts_sides in (False, True):
        alone = of(cuts_sides)
        if _is_same(alone, out, samples):
            return alone
    raise use.unknown("run for a sample by itself it does not give what it gives in a batch")


def _is_same(alone: Callable[[int, dict[int, Tensor]], Tensor], out: Tensor, samples: int) -> bool:
    """Whether the operation gives for each sample by itself what it gave in the batch, up to rounding."""
    if out.dim() == 0 or len(out) % samples:
        return samples == 1
    step, wanted = len(out) // samples, out.detach()
    with torch.no_grad():
        for b in range(samples):
            part = wanted[b * step : (b + 1) * step]
            try:
                got = alone(b, {})
            # Sizes that do not go together are the answer sought.
            except RuntimeError:
                return False
            if got.shape != part.shape:
                return False
            # Two orders of summation; what depends on another sample differs by as much as the samples do.
            size = part.float().nan_to_num(posinf=0, neginf=0).abs().max() if part.numel() else 0.0
            difference = (got.float() - part.float()).nan_to_num().abs().max() if part.numel() else 0.0
            if float(difference) > ROUNDINGS * UNIT[out.dtype] * (1e-30 + float(size)):
                return False
    return True
