"""Handlers of products in which a watched parameter is a matrix, or several: layers written out, routers, experts.

Every product is put into one form by its axes: those of the activation x are rows, inputs (I) or numbered (G: the
number of the matrix that a row meets), those of the weight are outputs (O), inputs or numbered. Then
    out_r = W[number of r] x_r,   the gradient of matrix g is the sum of e_r x_r^T over the rows r that met it
and x_r, e_r, their numbers and their samples are what a sketch takes (weight_parts.py).
"""

from __future__ import annotations

import string
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from gvendi_fast.sketching.gradients import layer_ops
from gvendi_fast.sketching.gradients.parameter_uses import (
    Pass,
    Side,
    Use,
    Watched,
    handles,
)
from gvendi_fast.sketching.gradients.use_nodes import ProductOutput, Rows, changed, for_probes, is_change
from gvendi_fast.sketching.gradients.weight_parts import Part, part_of

# Coordinates of a weight that was computed (not a plain part of a parameter), times samples, that are formed whole.
MOST_WHOLE = 1 << 24


class LayerByRows(torch.autograd.Function):
    """The output of a plain linear layer of all tokens, sketched by the operator of tapped ones."""

    @staticmethod
    def forward(
        ctx, output: Tensor, a: Tensor, weight: Watched | None, bias: Watched | None, current: Pass, *probes
    ):
        ctx.set_materialize_grads(False)
        ctx.layers, ctx.current = (weight, bias), current
        ctx.home, ctx.groups = probes[0].device, len(probes) - 1
        ctx.save_for_backward(a)
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor | None):
        none = (None,) * 4
        if gradient is None:
            return None, *none, *(None,) * (1 + ctx.groups)
        weight, bias = ctx.layers
        try:
            (a,) = ctx.saved_tensors
        except RuntimeError as error:
            if not is_change(error):
                raise
            raise changed((weight or bias).name) from error
        text = layer_ops.spec_text(ctx.current.spec)
        sketches = []
        keys = [(weight.name, None)] if weight else []
        keys += [(None, bias.name)] if bias else []
        for names in keys:
            key = layer_ops.layer_key(*names)
            sketches.append(
                torch.ops.gvendi.linear_layers(
                    a, False, [gradient.detach()], ctx.current.segments, [key], text
                )
            )
        return gradient, *none, *for_probes(sketches, ctx.home, ctx.groups)


def product(use: Use, x: Tensor, side: Side, x_axes: str, w_axes: str, out_axes: str, out: Tensor) -> Tensor:
    """The output of a product with its node.

    x_axes, w_axes, out_axes: a letter for each axis, as in an einsum: "I" inputs, "O" outputs, "G" numbered, "." an
    axis of the weight of one entry, others rows.
    """
    if not out.requires_grad:
        return out
    traced = use.rows.samples(x, x_axes.index("I"))
    if traced is None:
        raise use.unknown(f"an input of shape {tuple(x.shape)} has rows that cannot be traced to samples")
    leading = out_axes.replace("O", "")
    sizes = [out.shape[out_axes.index(c)] for c in leading]
    rows_of_x = x_axes.replace("I", "")

    def spread(t: Tensor, axes: str, last: str) -> Tensor:
        # The axes of x in the order of the output's; what x has not, or once for all, is repeated.
        t = t.permute([axes.index(c) for c in (*filter(axes.__contains__, leading), *last)])
        for place, c in enumerate(leading):
            if c not in axes:
                t = t.unsqueeze(place)
        return t.expand(*sizes, *t.shape[len(leading) :])

    shape = [n for n, c in zip(x.shape, x_axes, strict=True) if c != "I"]
    a = spread(_input_of(use, x, out), x_axes, "I").reshape(-1, x.shape[x_axes.index("I")])
    samples = spread(traced.view(shape), rows_of_x, "").reshape(-1)
    numbers = None
    if "G" in w_axes:
        count = side.value.shape[w_axes.index("G")]
        index = torch.arange(count, device=x.device) if side.origin.index is None else side.origin.index
        place = [-1 if c == "G" else 1 for c in leading]
        numbers = index.long().to(x.device).reshape(place).expand(sizes).reshape(-1)
    part = part_of_side(side, w_axes.lower())
    if part is None and (numbers is not None or side.value.dim() != 2 or not _is_small(use, side)):
        raise use.unknown(
            "the weight is no plain part of the parameter, and too large for its gradient to be formed"
        )
    order = [out_axes.index(c) for c in (*leading, *("O" if "O" in out_axes else ""))]
    size = len(a), out.shape[out_axes.index("O")] if "O" in out_axes else 1
    return ProductOutput.apply(
        out, a, Rows(numbers, samples, w_axes == "IO"),
        lambda gradient: gradient.permute(order).reshape(size), side, part, use.current,
        *use.current.probes(side.of),
    )  # fmt: skip


def _input_of(use: Use, x: Tensor, out: Tensor) -> Tensor:
    """What is kept of a product's input: under autocast a step's weight gradient is that of the narrow one."""
    return x.detach().to(out.dtype) if use.current.trains else x.detach()


def _is_small(use: Use, side: Side) -> bool:
    whole = max(side.value.numel(), *(leaf.numel() for leaf in side.origin.leaves))
    return whole * use.current.samples <= MOST_WHOLE


def part_of_side(side: Side, roles: str) -> Part | None:
    """The part of a parameter that a side is, axes by roles; sets what its first use shows of the parameter."""
    origin = side.origin
    if len(side.of) != 1 or origin.view is None:
        return None
    # An index of several axes numbers all of them at once.
    if origin.index is not None and (origin.index.dim() != 1 or roles[0] != "g"):
        return None
    watched, parameter = side.of[0], side.of[0].parameter
    stacked = watched.stacked if watched.stacked is not None else parameter.dim() == 3
    part = part_of(watched.name, parameter, stacked, watched.transposed, origin.view, roles)
    if part is None:
        return None
    watched.stacked = stacked
    if watched.transposed is None and part.outputs is not None and part.inputs is not None:
        watched.transposed = part.transposed
    return part


def bias_rows(use: Use, side: Side, out: Tensor) -> Tensor:
    """The output [..., O] of an addition of a bias [O], or of one for each row, with the bias's node."""
    if not out.requires_grad:
        return out
    samples, index = use.rows.samples(out), side.origin.index
    if samples is None:
        raise use.unknown(f"an output of shape {tuple(out.shape)} has rows that cannot be traced to samples")
    part = part_of_side(side, "." * (side.value.dim() - 1) + "o" if index is None else "go")
    if part is None and (index is not None or side.value.dim() != 1 or not _is_small(use, side)):
        raise use.unknown("the bias is no plain part of the parameter")
    width = out.shape[-1]
    numbers = None if index is None else index.long().to(out.device)
    return ProductOutput.apply(
        out, None, Rows(numbers, samples), lambda gradient: gradient.reshape(-1, width), side, part, use.current,
        *use.current.probes(side.of),
    )  # fmt: skip


def _whole_parameter(side: Side | None, dims: int) -> Watched | None:
    """The parameter that a side is as it is stored, or as it is cast; None if it is another part."""
    if side is None or len(side.of) != 1 or side.origin.view is None or side.origin.index is not None:
        return None
    parameter, view = side.of[0].parameter, side.origin.view
    same = view.shape == parameter.shape and view.stride() == parameter.stride()
    return side.of[0] if same and parameter.dim() == dims and not side.of[0].stacked else None


def _is_of_all_tokens(use: Use, x: Tensor) -> bool:
    return x.numel() == use.rows.tokens * x.shape[-1] and use.rows.is_natural(x)


_LETTERS = string.ascii_lowercase


@handles(functional.linear)
def linear(use: Use) -> Tensor:
    """x W^T + b: x [..., I], W [O, I], b [O]."""
    x, w, b = use.argument(0, "input"), use.argument(1, "weight"), use.argument(2, "bias")
    if use.side(x) is not None:
        raise use.unknown("it is what a layer is applied to")
    out = use.run()
    if not out.requires_grad:
        return out
    sides = [use.side(w), use.side(b)]
    weight, bias = sides
    plain = [_whole_parameter(side, dims) for side, dims in zip(sides, (2, 1), strict=True)]
    is_plain = all((p is None) == (s is None) for p, s in zip(plain, sides, strict=True))
    if is_plain and _is_of_all_tokens(use, x) and not any(p is not None and p.transposed for p in plain):
        there = [p for p in plain if p is not None]
        for p in there:
            p.stacked = p.transposed = False
        a = _input_of(use, x, out)
        return LayerByRows.apply(out, a, *plain, use.current, *use.current.probes(there))
    if bias is not None:
        use.rows.follow(functional.linear, (x,), {}, out)
        out = bias_rows(use, bias, out)
    if weight is not None:
        rows = _LETTERS[: x.dim() - 1]
        w_axes = "OI" if w.dim() == 2 else "I"
        out = product(use, x, weight, rows + "I", w_axes, rows + w_axes[:-1], out)
    return out


_MATMULS = [
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv,
    torch.dot, Tensor.dot,
]  # fmt: skip


@handles(*_MATMULS)
def matmul(use: Use) -> Tensor:
    """x W or W x, by rows, by numbered matrices, or both."""
    return _matmul(use, *use.args[:2], use.run())


@handles(Tensor.__rmatmul__)
def rmatmul(use: Use) -> Tensor:
    """As `matmul`, the factors the other way."""
    return _matmul(use, use.args[1], use.args[0], use.run())


def _matmul(use: Use, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    first = use.side(left) is not None
    x, side = (right, use.side(left)) if first else (left, use.side(right))
    if use.side(x) is not None or len(use.sides) != 1:
        raise use.unknown("both factors are of parameters")
    w = side.value
    # Axes of the matrices: W [O, I] by x [I, N], or x [N, I] by W [I, O]; a vector has inputs alone.
    w_axes = ("OI" if first else "IO") if w.dim() > 1 else "I"
    x_axes = ("In" if first else "nI") if x.dim() > 1 else "I"
    n, o = ("n" if x.dim() > 1 else ""), ("O" if w.dim() > 1 else "")
    out_axes = o + n if first else n + o
    depth = out.dim() - len(out_axes)
    batch, numbered = "", 0
    for place in range(depth):
        # Leading axes are aligned at their ends.
        at = place - depth
        size = w.shape[w.dim() - len(w_axes) + at] if w.dim() - len(w_axes) + at >= 0 else 1
        numbered += size > 1
        batch += "G" if size > 1 else _LETTERS[place]
    if numbered > 1:
        raise use.unknown("matrices numbered along several axes")
    w_batch = batch[depth - (w.dim() - len(w_axes)) :] if w.dim() > len(w_axes) else ""
    x_batch = batch[depth - (x.dim() - len(x_axes)) :] if x.dim() > len(x_axes) else ""
    w_batch = "".join("G" if c == "G" else "." for c in w_batch)
    return product(use, x, side, x_batch + x_axes, w_batch + w_axes, batch + out_axes, out)


@handles(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.addbmm, Tensor.addbmm)
def addmm(use: Use) -> Tensor:
    """b + x W, as transformers' Conv1D has it, and the same of numbered matrices."""
    name = use.function.__name__
    if name == "addbmm" or any(use.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or len(use.args) != 3:
        raise use.unknown("factors of a sum of products")
    out = use.run()
    if not out.requires_grad:
        return out
    b, left, right = use.args
    bias, factors = use.side(b), [use.side(left), use.side(right)]
    if bias is not None:
        use.rows.follow(torch.matmul, (left, right), {}, out)
        if bias.value.dim() == 3 and bias.value.shape[0] > 1:
            out = _numbered_bias(use, bias, out)
        else:
            out = bias_rows(use, bias, out)
    if any(f is not None for f in factors):
        only = replace(use, sides=tuple(f for f in factors if f is not None))
        out = _matmul(only, left, right, out)
    return out


def _numbered_bias(use: Use, side: Side, out: Tensor) -> Tensor:
    """A bias [G, 1, O] added to outputs [G, N, O]."""
    samples, part = use.rows.samples(out), part_of_side(side, "g.o")
    if samples is None or part is None:
        raise use.unknown("a bias of numbered matrices that is no plain part of the parameter")
    numbers = torch.arange(out.shape[0], device=out.device)[:, None].expand(out.shape[:-1]).reshape(-1)
    width = out.shape[-1]
    return ProductOutput.apply(
        out, None, Rows(numbers, samples), lambda gradient: gradient.reshape(-1, width), side, part, use.current,
        *use.current.probes(side.of),
    )  # fmt: skip


@handles(torch.einsum)
def einsum(use: Use) -> Tensor:
    """An einsum of two factors that is a product by rows, or by numbered matrices."""
    equation, *factors = use.args
    if len(factors) == 1 and isinstance(factors[0], (tuple, list)):
        factors = list(factors[0])
    if not isinstance(equation, str) or len(factors) != 2 or len(use.sides) != 1 or "." in equation:
        raise use.unknown("an einsum of another form than two factors and letters")
    given, _, result = equation.replace(" ", "").partition("->")
    axes = given.split(",")
    side = use.sides[0]
    at = 0 if use.side(factors[0]) is not None else 1
    x, w_axes, x_axes = factors[1 - at], axes[at], axes[1 - at]
    letters = {}
    for c in w_axes:
        letters[c] = (
            "G" if c in x_axes and c in result else "I" if c in x_axes else "O" if c in result else "?"
        )
    roles = sorted(letters.values())
    summed = [c for c in x_axes if c not in w_axes and c not in result]
    is_plain = roles in (["I"], ["I", "O"], ["G", "I"], ["G", "I", "O"]) and not summed
    if not is_plain or len(set(w_axes)) < len(w_axes) or len(set(x_axes)) < len(x_axes):
        raise use.unknown(f"the einsum {equation!r} is no product of a layer")
    others = dict(zip((c for c in x_axes if c not in letters), _LETTERS, strict=False))
    named = {**others, **letters}
    x_axes, w_axes, result = ("".join(named[c] for c in text) for text in (x_axes, w_axes, result))
    return product(use, x, side, x_axes, w_axes, result, use.run())


def _grouped(use: Use, x: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    """Rows [R, I] sorted by matrix, W [G, I, O], offsets int32 [G] where each matrix's rows end."""
    out, side = use.run(), use.side(w)
    if not out.requires_grad:
        return out
    samples = use.rows.samples(x)
    if side is None or len(use.sides) != 1 or x.dim() != 2 or w.dim() != 3 or offsets is None:
        raise use.unknown("a grouped product of another form than rows [R, I] by weights [G, I, O]")
    if samples is None:
        raise use.unknown(f"an input of shape {tuple(x.shape)} has rows that cannot be traced to samples")
    part = part_of_side(side, "gio")
    if part is None:
        raise use.unknown("the weight is no plain part of the parameter")
    places = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
    numbers = torch.searchsorted(offsets, places, right=True)
    return ProductOutput.apply(
        out, _input_of(use, x, out), Rows(numbers, samples), lambda gradient: gradient, side, part, use.current,
        *use.current.probes(side.of),
    )  # fmt: skip


_GROUPED = [
    getattr(place, name)
    for place, name in ((torch, "_grouped_mm"), (functional, "grouped_mm"))
    if hasattr(place, name)
]


@handles(*_GROUPED, "transformers::grouped_mm_fallback")
def grouped_mm(use: Use) -> Tensor:
    """torch's product of sorted rows, and transformers' where torch has none."""
    if use.argument(3, "bias") is not None:
        raise use.unknown("a grouped product with a bias of its own")
    return _grouped(use, use.args[0], use.args[1], use.argument(2, "offs"))


_ADDS = [torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__]


def _adds_picked_rows(use: Use) -> bool:
    """Whether one row of a stacked bias is added to each row of an output."""
    if len(use.sides) != 1 or use.kwargs.get("alpha", 1) != 1:
        return False
    # A row of an embedding is no bias of an expert's.
    side = use.sides[0]
    return side.origin.index is not None and not any(isinstance(w.module, nn.Embedding) for w in side.of)


@handles(*_ADDS, when=_adds_picked_rows)
def add_picked_rows(use: Use) -> Tensor:
    """out + b[ids]: the biases of the experts that rows were sent to, also in place."""
    side = use.sides[0]
    x = next(x for x in use.args[:2] if isinstance(x, Tensor) and use.side(x) is None)
    samples, part = use.rows.samples(x), part_of_side(side, "go")
    if samples is None or part is None or x.shape != side.value.shape:
        raise use.unknown(f"added to a tensor of shape {tuple(x.shape)} whose rows cannot be told apart")
    rows = Rows(side.origin.index.long().to(x.device), samples)
    # The bias has the node, and not the sum, which may be written over x.
    node = ProductOutput.apply(
        use.own(side), None, rows, lambda gradient: gradient, side, part, use.current,
        *use.current.probes(side.of),
    )  # fmt: skip
    return use.run(lambda _: node)
