"""Nodes of products with parameters in autograd's graph, and the sketches that they return to the probe.

As in `probe.py`: the forward pass adds nothing; the backward pass hands the gradient on and returns, as that of the
probe, the sketch float32 [B, K] of the part of a parameter that the product used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import SketchSpec, expert_name
from gvendi_fast.sketching.gradients.layer_sketch import layer_sketch
from gvendi_fast.sketching.gradients.weight_parts import Part

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.parameter_uses import Pass, Side, Watched


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a product.

    numbers: int64 [R] of the matrices that they meet, None if all meet one. samples: int64 [R].
    turned: the weight is stored as [I, O].
    """

    numbers: Tensor | None
    samples: Tensor
    turned: bool = False


class ProductOutput(torch.autograd.Function):
    """The output of a product as it is. to_rows: from the shape of the output to [R, O]; a [R, I], None for a bias."""

    @staticmethod
    def forward(
        ctx, output: Tensor, a: Tensor | None, rows, to_rows, side, part, current, *probes: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.to_rows, ctx.part, ctx.current = rows, to_rows, part, current
        # The value of a side, such as the weights of every row's expert, is not to be held for a part's sake.
        ctx.side = side if part is None else None
        ctx.home, ctx.groups = probes[0].device, len(probes) - 1
        ctx.save_for_backward(*(() if a is None else (a,)))
        return output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor | None):
        none = (None,) * 6
        if gradient is None:
            return None, *none, *(None,) * (1 + ctx.groups)
        try:
            # Read once: a checkpoint gives what it keeps no second time.
            kept = ctx.saved_tensors
        except RuntimeError as error:
            if not is_change(error):
                raise
            raise changed(ctx.part.name if ctx.part else ctx.side.of[0].name) from error
        a = kept[0] if kept else None
        e = ctx.to_rows(gradient.detach()).contiguous()
        if ctx.part is None:
            whole = _whole_gradient(ctx.rows, ctx.current.samples, a, e)
            sketches = sketch_by_sample(ctx.side, whole, ctx.current.spec)
        else:
            sketches = [sketch_of_rows(ctx.part, a, e, ctx.rows, ctx.current)]
        return gradient, *none, *for_probes(sketches, ctx.home, ctx.groups)


def sketch_of_rows(part: Part, a: Tensor | None, e: Tensor, rows: Rows, current: Pass) -> Tensor:
    """The sketch float32 [B, K] of a part of a parameter by the rows that met it."""
    # Rows of tokens of no sample go to one more.
    count = current.samples + (current.owners is not None)
    out = e.new_zeros((count, current.spec.dim), dtype=torch.float32)
    numbers = rows.numbers
    if numbers is None:
        numbers = torch.zeros_like(rows.samples)
    numbers, samples = numbers.contiguous(), rows.samples.contiguous()
    part.add(None if a is None else a.contiguous(), e, numbers, samples, current.spec, out)
    return out[: current.samples]


def rows_output(
    output: Tensor, a: Tensor | None, samples: Tensor, part: Part, current: Pass, probes: tuple[Tensor, ...]
) -> Tensor:
    """A layer's output [..., O] with the node of a part that its rows a [R, I] met (None for a bias)."""
    width = output.shape[-1]
    rows = Rows(None, samples)
    return ProductOutput.apply(
        output, a, rows, lambda gradient: gradient.reshape(-1, width), None, part, current, *probes
    )


def is_change(error: RuntimeError) -> bool:
    """Whether autograd refuses a tensor that was changed since; a checkpoint may raise something else there."""
    return "inplace operation" in str(error)


def changed(name: str) -> GvendiError:
    """The error where what a parameter was multiplied with is no longer there."""
    return GvendiError(
        f"what the parameter {name!r} was multiplied with was changed in place afterwards, so its gradient is lost; "
        f"leave it out with exclude=[{name!r}]"
    )


def _whole_gradient(rows: Rows, count: int, a: Tensor | None, e: Tensor) -> Tensor:
    """Each sample's gradient [B, *side's shape] of a weight, or of a bias where a is None, formed whole."""
    each = e if a is None else a[:, :, None] * e[:, None, :] if rows.turned else e[:, :, None] * a[:, None, :]
    return each.new_zeros((count + 1, *each.shape[1:])).index_add_(0, rows.samples, each)[:count]


def for_probes(sketches: Sequence[Tensor], home: torch.device, groups: int) -> tuple[Tensor, ...]:
    """What a node returns for `Pass.probes`: the sum of its parameters' sketches, and each by itself if grouped."""
    sketches = [z.to(home) for z in sketches]
    total = sketches[0] if len(sketches) == 1 else torch.stack(sketches).sum(dim=0)
    return total, *(sketches if groups else ())


def sketch_by_sample(side: Side, gradient: Tensor, spec: SketchSpec) -> list[Tensor]:
    """The sketch float32 [B, K] of each parameter of a side; gradient [B, *side's shape] of its value by each sample.

    Pulled back to the parameters by one batched product, and sketched as `reference.sketch_of_gradient` defines.
    """
    gradient, leaves = gradient.to(side.value.dtype), side.origin.leaves
    if side.is_leaf:
        pulled: Sequence[Tensor] = [gradient]
    else:
        value, leaves = side.chain()
        pulled = torch.autograd.grad(
            value, leaves, gradient, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
    found = []
    for watched, leaf, own in zip(side.of, leaves, pulled, strict=True):
        whole = own if own is not None else leaf.new_zeros((len(gradient), *leaf.shape))
        found.append(sketch_of_gradients(watched, whole.detach(), spec))
    return found


def sketch_of_gradients(watched: Watched, gradient: Tensor, spec: SketchSpec) -> Tensor:
    """The sketch float32 [B, K] of a parameter's gradients [B, *its shape], formed whole: for small parameters."""
    out = gradient.new_zeros((len(gradient), spec.dim), dtype=torch.float32)
    if not watched.stacked:
        _add_sketch(watched.name, gradient, bool(watched.transposed), spec, out)
        return out
    for expert in range(gradient.shape[1]):
        _add_sketch(
            expert_name(watched.name, expert), gradient[:, expert], bool(watched.transposed), spec, out
        )
    return out


def _add_sketch(name: str, gradient: Tensor, transposed: bool, spec: SketchSpec, out: Tensor) -> None:
    sketch, samples = layer_sketch(spec), len(gradient)
    if gradient.dim() <= 2:
        rows = gradient.reshape(samples, -1).contiguous()
        sketch.vector(name, None, rows, _spans(samples, 1), out)
        return
    matrix = gradient.transpose(1, 2) if transposed else gradient.flatten(2)
    height, width = matrix.shape[1:]
    # Row o of a gradient is what an embedding's gradient is for token o.
    ids = torch.arange(height, device=gradient.device).repeat(samples)
    rows = matrix.reshape(samples * height, width).contiguous()
    sketch.token(name, height, ids, rows, _spans(samples, height), out)


def _spans(samples: int, rows: int) -> Tensor:
    begins = torch.arange(samples, dtype=torch.int64) * rows
    return torch.stack([begins, begins + rows], dim=1)
