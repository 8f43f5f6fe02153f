"""From the factors of a layer's gradient to sketch operations: one class per kind of sketch, with the same methods.

Letters as in `ops`. `parameter` is a parameter's name, from which its tables or its signs are made; `out` [B, K]
collects the sketches of all parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gvendi_fast.kernels import ops
from gvendi_fast.kernels.signs import sign_key
from gvendi_fast.kernels.sketch_matrix import SketchSpec, column_table, parent_path, row_table
from gvendi_fast.sketching.gradients import head_chunks
from gvendi_fast.sketching.gradients.norms import normalised


def layer_sketch(spec: SketchSpec) -> HadamardSketch | RademacherSketch:
    """The operations of the spec's kind."""
    return RademacherSketch(spec) if spec.kind == "rademacher" else HadamardSketch(spec)


@dataclass(frozen=True)
class HadamardSketch:
    """The Hadamard TensorSketch. Layers with one parent and one input share the input's transform."""

    spec: SketchSpec

    def shares_input(self, parameter: str, other: str) -> bool:
        """Whether layers that read one input can share its transform: their tables are keyed by the parent alone."""
        return parent_path(parameter) == parent_path(other)

    def keeps_transform(self, width: int) -> bool:
        """Whether H S a is kept of an input [T, width] until the gradients come, being the narrower of the two."""
        return width > self.spec.dim

    def transform(self, parameter: str, a: torch.Tensor) -> torch.Tensor:
        """H S a, float32 [T, K], of the input [T, I] of a layer."""
        return ops.fold_hadamard(a, column_table(self.spec, parameter, a.shape[1]))

    def linear(
        self,
        a: torch.Tensor,
        parts: Sequence[tuple[str, torch.Tensor]],
        segments: torch.Tensor,
        out: torch.Tensor,
        transformed: bool,
    ) -> None:
        """Add the sketches of weights that read one input: (parameter, e [T, O]) a layer.

        a [T, I], or, if `transformed`, what `transform` gave for any of the parameters.
        """
        table = None if transformed else column_table(self.spec, parts[0][0], a.shape[1])
        folded = [(e, row_table(self.spec, parameter, e.shape[1])) for parameter, e in parts]
        ops.linear_sketch(a, table, folded, segments, out)

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
        return head_chunks.head_sketch(hidden, weight, labels, segments, columns, rows, out, softcap, scale)


@dataclass(frozen=True)
class RademacherSketch:
    """The dense mode: every entry of every gradient meets K random signs, so nothing is shared between layers."""

    spec: SketchSpec

    def shares_input(self, parameter: str, other: str) -> bool:
        """False: no two layers have anything in common."""
        return False

    def keeps_transform(self, width: int) -> bool:
        """False: inputs are kept as they are."""
        return False

    def linear(self, a, parts, segments, out, transformed=False) -> None:
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
        return head_chunks.dense_head_sketch(hidden, weight, labels, segments, key, out, softcap, scale)

    def _key(self, parameter: str) -> tuple[int, int]:
        return sign_key(self.spec.seed, parameter)
