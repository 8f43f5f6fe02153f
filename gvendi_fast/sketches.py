"""From the factors of a layer's gradient to sketch operations: one class per kind of sketch, with the same methods.

Letters as in `ops`. `parameter` is a parameter's name, from which its tables or its signs are made; `out` [B, K]
collects the sketches of all parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gvendi_fast import ops
from gvendi_fast.plan import SketchSpec, Table, column_table, row_table
from gvendi_fast.signs import sign_key


def layer_sketch(spec: SketchSpec) -> HadamardSketch | RademacherSketch:
    """The operations of the spec's kind."""
    return RademacherSketch(spec) if spec.kind == "rademacher" else HadamardSketch(spec)


def normalised(x: torch.Tensor, norm: str, eps: float) -> torch.Tensor:
    """x_hat in float32 for rows x [..., d]: "rms" x / sqrt(mean(x^2) + eps), "layer" (x - mean) / sqrt(var + eps)."""
    x = x.float()
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


@dataclass(frozen=True)
class HadamardSketch:
    """The Hadamard TensorSketch. Layers with one parent and one input share the input's transform."""

    spec: SketchSpec

    def input_table(self, parameter: str, width: int) -> Table | None:
        """What layers must have in common to share an input; None if none can."""
        return column_table(self.spec, parameter, width)

    def kept_input(self, a: torch.Tensor, table: Table | None) -> tuple[torch.Tensor, Table | None]:
        """What is kept of an input [T, I] until the gradients come: the narrower of a and H S a, and its table."""
        if table is not None and table.width > self.spec.dim:
            return ops.fold_hadamard(a, table), None
        return a, table

    def linear(
        self,
        a: torch.Tensor,
        a_table: Table | None,
        parts: Sequence[tuple[str, torch.Tensor]],
        segments: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Add the weights' sketches: a and a_table from `kept_input`, (parameter, e [T, O]) per layer that reads it."""
        folded = [(e, row_table(self.spec, parameter, e.shape[1])) for parameter, e in parts]
        ops.linear_sketch(a, a_table, folded, segments, out)

    def token(
        self,
        parameter: str,
        vocabulary: int,
        ids: torch.Tensor,
        e: torch.Tensor,
        segments: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Add the sketch of an embedding [vocabulary, d]: ids int64 [T], e [T, d] the gradient of its output."""
        rows = row_table(self.spec, parameter, vocabulary)
        ops.token_sketch(ids, e, segments, rows, column_table(self.spec, parameter, e.shape[1]), out)

    def vector(
        self,
        parameter: str,
        x: torch.Tensor | None,
        e: torch.Tensor,
        segments: torch.Tensor,
        out: torch.Tensor,
        norm: str | None = None,
        eps: float = 0.0,
    ) -> None:
        """Add the sketch of a bias (x and norm None) or of a norm's weight, as `ops.vector_sketch` defines them."""
        ops.vector_sketch(x, e, segments, row_table(self.spec, parameter, e.shape[1]), out, norm, eps)

    def head(
        self,
        parameter: str,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        segments: torch.Tensor,
        out: torch.Tensor,
        softcap: float | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss float32 [T] and gradient of hidden [T, d] of the LM head [V, d], whose sketch is added."""
        columns = column_table(self.spec, parameter, weight.shape[1])
        rows = row_table(self.spec, parameter, weight.shape[0])
        return ops.head_sketch(hidden, weight, labels, segments, columns, rows, out, softcap, scale)


@dataclass(frozen=True)
class RademacherSketch:
    """The dense mode: every entry of every gradient meets K random signs, so nothing is shared between layers."""

    spec: SketchSpec

    def input_table(self, parameter: str, width: int) -> Table | None:
        """None: no two layers share an input."""
        return None

    def kept_input(self, a: torch.Tensor, table: Table | None) -> tuple[torch.Tensor, Table | None]:
        """The input as it is."""
        return a, None

    def linear(self, a, a_table, parts, segments, out) -> None:
        """As `HadamardSketch.linear`."""
        for parameter, e in parts:
            ops.dense_sketch(a, e, segments, self._key(parameter), out)

    def token(self, parameter, vocabulary, ids, e, segments, out) -> None:
        """As `HadamardSketch.token`."""
        ops.dense_sketch(ids, e, segments, self._key(parameter), out)

    def vector(self, parameter, x, e, segments, out, norm=None, eps=0.0) -> None:
        """As `HadamardSketch.vector`."""
        rows = e if norm is None else e.float() * normalised(x, norm, eps)
        # Coordinates of a [1, d] matrix have the numbers of those of a vector.
        ops.dense_sketch(rows, rows.new_ones(len(rows), 1), segments, self._key(parameter), out)

    def head(self, parameter, hidden, weight, labels, segments, out, softcap, scale):
        """As `HadamardSketch.head`."""
        key = self._key(parameter)
        return ops.dense_head_sketch(hidden, weight, labels, segments, key, out, softcap, scale)

    def _key(self, parameter: str) -> tuple[int, int]:
        return sign_key(self.spec.seed, parameter)
