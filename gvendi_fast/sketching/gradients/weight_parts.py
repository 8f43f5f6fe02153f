"""Which part of a parameter a product uses, and its sketch: from the part's tables and the rows that met it.

A part is a matrix, or several that are numbered (experts, heads), read off a view of the parameter by its strides: the
weights W[e] of [E, O, I] or of [E, I, O], rows or columns of a matrix, a flattened [E O, I] seen as [E, O, I]. Each row
r of the product, a_r [I] with e_r [O], meets the matrix `numbers[r]`:
    z_b = K^(-1/2) sum_r (H S_o e_r) * (H S_i a_r),    over the rows of sample b
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gvendi_fast.kernels import ops
from gvendi_fast.kernels.signs import sign_key
from gvendi_fast.kernels.sketch_matrix import (
    RUN,
    ExpertTables,
    SketchSpec,
    column_table,
    expert_column_tables,
    expert_name,
    expert_row_tables,
    row_table,
)


@dataclass(frozen=True)
class Steps:
    """Where an axis of a view goes in the parameter: `size` steps of `step` along its axis `axis`; -1 if it stands."""

    axis: int
    step: int
    size: int


@dataclass(frozen=True)
class Part:
    """A part of a parameter, in its coordinates. Nothing but numbers: equal parts are one entry of a cache.

    name, shape: of the parameter. stacked, transposed: as `Watched` has them.
    begins: where the part begins along each axis.
    numbered: along which the matrices are counted; None for one matrix.
    outputs, inputs: of the product's O and I; None for a bias (no I) and for a dot product (no O).
    """

    name: str
    shape: tuple[int, ...]
    stacked: bool
    transposed: bool
    begins: tuple[int, ...]
    numbered: Steps | None
    outputs: Steps | None
    inputs: Steps | None

    @property
    def count(self) -> int:
        """How many matrices the part has."""
        return 1 if self.numbered is None else self.numbered.size

    def add(
        self, a: Tensor | None, e: Tensor, numbers: Tensor, samples: Tensor, spec: SketchSpec, out: Tensor
    ) -> None:
        """Add the sketch of rows a [R, I] (None for a bias) and e [R, O] to out [B, K]; numbers, samples int64 [R]."""
        # Half precision, as a scaled training step has it, is read by no kernel.
        a, e = (x.float() if x is not None and x.dtype == torch.float16 else x for x in (a, e))
        if self.outputs is None:
            # A dot product's gradient is a vector.
            a, e = None, a * e
        rows, columns = (a, e) if self._is_turned() else (e, a)
        if rows is None:
            rows, columns = columns, None
        if spec.kind == "rademacher":
            self._add_dense(rows, columns, numbers, samples, spec, out)
            return
        row_axis, column_axis = self.axes()
        row_tables, column_tables = part_tables(self, spec)
        rows = self._fitted(rows, row_axis, numbers, spec)
        if columns is not None:
            columns = self._fitted(columns, column_axis, numbers, spec)
        ops.expert_sketch(columns, rows, numbers, samples, column_tables, row_tables, out)

    def axes(self) -> tuple[int, int | None]:
        """The parameter's axes of rows and of columns, as the definition has them: None for a vector's columns."""
        last = len(self.shape) - 1
        first = 1 if self.stacked else 0
        if last <= first:
            return last, None
        return (last, first) if self.transposed else (first, last)

    def _is_turned(self) -> bool:
        """Whether the product's inputs run along the definition's rows."""
        axis = self.axes()[0]
        return self.outputs is not None and self.inputs is not None and self.inputs.axis == axis

    def places(self, axis: int | None) -> np.ndarray | None:
        """int64 [count, size]: the coordinates of each matrix along an axis of the parameter."""
        if axis is None:
            return None
        steps = next((s for s in (self.outputs, self.inputs) if s is not None and s.axis == axis), None)
        places = self.begins[axis] + np.arange(1 if steps is None else steps.size)[None]
        if steps is not None:
            places = self.begins[axis] + steps.step * np.arange(steps.size)[None]
        first = np.zeros((self.count, 1), dtype=np.int64)
        if self.numbered is not None and self.numbered.axis == axis:
            first = self.numbered.step * np.arange(self.count)[:, None]
        return first + places

    def experts(self) -> list[int]:
        """The expert of each matrix of a stacked parameter."""
        step = self.numbered.step if self.numbered is not None and self.numbered.axis == 0 else 0
        return [self.begins[0] + step * n for n in range(self.count)]

    def is_whole(self, axis: int, spec: SketchSpec) -> bool:
        """Whether coordinates along an axis have tables of their own; else rows are put into the whole axis.

        A table moves runs of 16 within blocks of K, which a part of it does only where it begins and ends with them.
        """
        places, width = self.places(axis), self.shape[axis]
        size = places.shape[1]
        if size == width:
            return True
        begins = places[:, 0]
        follow = bool((places == begins[:, None] + np.arange(size)).all())
        within = bool((begins // spec.dim == (begins + size - 1) // spec.dim).all())
        return follow and within and not (begins % RUN).any() and size % RUN == 0

    def _fitted(self, x: Tensor, axis: int, numbers: Tensor, spec: SketchSpec) -> Tensor:
        """Rows [R, n] as the tables of an axis take them."""
        if self.is_whole(axis, spec):
            return x
        places = torch.from_numpy(self.places(axis)).to(x.device)
        at = places[numbers] if len(places) > 1 else places.expand(len(x), -1)
        return x.new_zeros(len(x), self.shape[axis]).scatter_(1, at, x)

    def _add_dense(self, rows, columns, numbers, samples, spec, out) -> None:
        row_axis, column_axis = self.axes()
        places = [self.places(row_axis), self.places(column_axis)]
        for number in range(self.count):
            name = expert_name(self.name, self.experts()[number]) if self.stacked else self.name
            chosen = (numbers == number).nonzero()[:, 0]
            chosen = chosen[samples[chosen].argsort(stable=True)]
            ends = torch.bincount(samples[chosen], minlength=len(out)).cumsum(0).cpu()
            segments = torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], dim=1)
            e = _whole(rows[chosen], places[0][number], self.shape[row_axis])
            if columns is None:
                # Coordinates of a [1, d] matrix have the numbers of those of a vector.
                a, e = e, e.new_ones(len(e), 1)
            else:
                a = _whole(columns[chosen], places[1][number], self.shape[column_axis])
            ops.dense_sketch(a, e, segments, sign_key(spec.seed, name), out)


def _whole(x: Tensor, places: np.ndarray, size: int) -> Tensor:
    """Rows [R, n] at their places among [R, size], zero elsewhere."""
    if len(places) == size and (places == np.arange(size)).all():
        return x.contiguous()
    return x.new_zeros(len(x), size).index_copy(1, torch.from_numpy(places).to(x.device), x)


# Parts recur in every batch; tables that stay the same object stay on their device.
@functools.lru_cache(maxsize=8192)
def part_tables(part: Part, spec: SketchSpec) -> tuple[ExpertTables, ExpertTables | None]:
    """(rows, columns): tables of the definition's two axes for each matrix of a part; no columns for a vector."""
    row_axis, column_axis = part.axes()
    found = []
    for axis, stacked_tables, table in (
        (row_axis, expert_row_tables, row_table),
        (column_axis, expert_column_tables, column_table),
    ):
        if axis is None:
            found.append(None)
            continue
        places, width = part.places(axis), part.shape[axis]
        if not part.is_whole(axis, spec):
            places = np.broadcast_to(np.arange(width), (len(places), width))
        if part.stacked:
            whole, which = stacked_tables(spec, part.name, part.shape[0], width), np.array(part.experts())
            is_all = len(which) == whole.experts and (which == np.arange(whole.experts)).all()
            if is_all and (places == np.arange(width)).all() and places.shape[1] == width:
                found.append(whole)
                continue
            bucket, sign = (x[which[:, None], places] for x in (whole.bucket, whole.sign))
        else:
            one = table(spec, part.name, width)
            bucket, sign = one.bucket[places], one.sign[places]
        found.append(ExpertTables(spec.dim, np.ascontiguousarray(bucket), np.ascontiguousarray(sign)))
    return found[0], found[1]


def read_steps(view: Tensor, parameter: Tensor) -> tuple[tuple[int, ...], list[Steps]] | None:
    """(begins, steps of each axis of the view) in the parameter's coordinates; None where strides do not tell."""
    strides, shape = parameter.stride(), parameter.shape
    order = sorted((a for a in range(len(shape)) if shape[a] > 1), key=lambda a: -strides[a])
    begins, left = [0] * len(shape), view.storage_offset() - parameter.storage_offset()
    for axis in order:
        begins[axis], left = divmod(left, strides[axis])
    if left:
        return None
    found: list[Steps | None] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        axis = next((a for a in order if stride and stride % strides[a] == 0), None)
        if size > 1 and stride and axis is None:
            return None
        is_moving = size > 1 and stride > 0
        found.append(Steps(axis, stride // strides[axis], size) if is_moving else None)
    # An axis of one entry has any stride: it is one that no other axis of the view is, if there is one.
    spare = [a for a in range(len(shape)) if all(s is None or s.axis != a for s in found)]
    steps = []
    for size, moving in zip(view.shape, found, strict=True):
        steps.append(
            moving or Steps(spare.pop(0) if spare and size == 1 else -1, 1 if size == 1 else 0, size)
        )
    return tuple(begins), steps


def part_of(
    name: str, parameter: Tensor, stacked: bool, transposed: bool | None, view: Tensor, roles: str
) -> Part | None:
    """The part that a view of a parameter is; None where it is none that can be sketched by rows.

    roles: of each axis of the view, "g" numbered, "o" outputs, "i" inputs, "." of one entry. transposed None: the
    product tells.
    """
    read = read_steps(view, parameter)
    if read is None or len(roles) != view.dim() or parameter.dim() > (3 if stacked else 2):
        return None
    begins, steps = read
    by_role = {role: s for role, s in zip(roles, steps, strict=True) if role != "."}
    outputs, inputs = by_role.get("o"), by_role.get("i")
    inner = [s.axis for s in (outputs, inputs) if s is not None]
    if any(axis < (1 if stacked else 0) for axis in inner) or len(set(inner)) < len(inner):
        return None
    if transposed is None:
        transposed = len(inner) == 2 and outputs.axis > inputs.axis
    numbered = by_role.get("g")
    if numbered is not None and numbered.axis < 0:
        # The same matrix for every number.
        return None
    return Part(name, tuple(parameter.shape), stacked, transposed, begins, numbered, outputs, inputs)
