"""Checks of the operations' arguments; an error names the argument, what it was and what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import has_direction, no_direction

if TYPE_CHECKING:
    from gvendi_fast.kernels.sketch_matrix import ExpertTables, Table

# Most rows of a group in `entropy`; a larger set is given a VendiState of its own.
MAX_GROUP = 256
# How far a unit centroid's norm may be from 1; float32 rounding leaves less than 1e-6.
UNIT_TOLERANCE = 1e-3


def check_tensor(name: str, x: object) -> None:
    """GvendiError unless x is an ordinary tensor: kernels read its memory by its strides, and nothing else of it."""
    if not isinstance(x, torch.Tensor):
        raise GvendiError(f"{name} must be a torch.Tensor, got {type(x).__name__}; call torch.as_tensor")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise GvendiError(f"{name} must be a dense tensor, got a {kind} one; call .to_dense() or pad it")
    if x.is_neg() or x.is_conj():
        call = "resolve_neg" if x.is_neg() else "resolve_conj"
        raise GvendiError(
            f"{name} is a {'negative' if x.is_neg() else 'conjugate'} view, whose memory holds other numbers; "
            f"call .{call}()"
        )
    if x.is_meta:
        raise GvendiError(f"{name} is on the device 'meta', where tensors have no numbers; give one that has")


def check_groups(rows: torch.Tensor, boundaries: torch.Tensor) -> None:
    check_tensor("boundaries", boundaries)
    ok = boundaries.dtype == torch.int64 and boundaries.dim() == 1 and len(boundaries) > 0
    if not ok or boundaries.device.type != "cpu" or not boundaries.is_contiguous():
        raise GvendiError(
            f"boundaries must be contiguous int64 [G + 1] on the CPU, got {boundaries.dtype} "
            f"{tuple(boundaries.shape)} on {boundaries.device}"
        )
    first, last = int(boundaries[0]), int(boundaries[-1])
    if first < 0 or last > len(rows):
        raise GvendiError(f"boundaries must lie in 0..{len(rows)}, the number of rows, got {first}..{last}")
    counts = boundaries.diff()
    wrong = torch.nonzero((counts < 1) | (counts > MAX_GROUP))
    if len(wrong):
        group = int(wrong[0, 0])
        raise GvendiError(
            f"boundaries gives group {group} {int(counts[group])} rows, wanted 1 to {MAX_GROUP}; leave out empty "
            "groups and put a large one into a VendiState"
        )
    check_norms(rows[first:last], range(first, last))


def check_norms(rows: torch.Tensor, numbers: Sequence[int] | np.ndarray) -> None:
    """GvendiError for the first of rows [N, K] that is zero or not finite; numbers [N]: what the error calls them."""
    # In the rows' own dtype, forty times as fast; a norm that may have left its range is computed again in float64.
    norms = torch.linalg.vector_norm(rows, dim=1)
    for row in torch.nonzero(~has_direction(norms))[:, 0].tolist():
        norm = float(torch.linalg.vector_norm(rows[row], dtype=torch.float64))
        if not has_direction(norm):
            raise no_direction(numbers[row], norm)


def check_rows(name: str, x: torch.Tensor, width: int) -> None:
    check_tensor(name, x)
    if x.dim() != 2 or x.shape[1] != width:
        raise GvendiError(f"{name} must have shape [rows, {width}], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise GvendiError(f"{name} must be floating point, got {x.dtype}")
    if x.shape[0] > 0 and x.stride(1) != 1 and width > 1:
        raise GvendiError(f"{name} must have unit stride in its last dimension; call .contiguous()")


def check_centroids(centroids: torch.Tensor) -> None:
    """GvendiError unless centroids are float32 [C, K] of length 1."""
    check_tensor("centroids", centroids)
    ok = centroids.dim() == 2 and centroids.dtype == torch.float32 and centroids.is_contiguous()
    if not ok or 0 in centroids.shape:
        raise GvendiError(
            f"centroids must be contiguous float32 [C, K] with at least one row, got {centroids.dtype} "
            f"{tuple(centroids.shape)}"
        )
    wrong = torch.nonzero(~((torch.linalg.vector_norm(centroids, dim=1) - 1).abs() <= UNIT_TOLERANCE))
    if len(wrong):
        raise GvendiError(
            f"centroid {int(wrong[0, 0])} has norm {float(centroids[int(wrong[0, 0])].norm()):.6g}; wanted 1: "
            "use torch.nn.functional.normalize"
        )


def check_ids(name: str, ids: torch.Tensor, rows: int, width: int) -> None:
    check_tensor(name, ids)
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.shape[0] != rows or not ids.is_contiguous():
        raise GvendiError(f"{name} must be contiguous int64 [{rows}], got {ids.dtype} {tuple(ids.shape)}")
    if rows and ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < width:
        raise GvendiError(f"{name} must lie in 0..{width - 1}, got {int(ids.min())}..{int(ids.max())}")


def check_sketch(out: torch.Tensor) -> None:
    check_tensor("out", out)
    if out.dim() != 2 or out.dtype != torch.float32 or not out.is_contiguous():
        raise GvendiError(f"out must be contiguous float32 [B, K], got {out.dtype} {tuple(out.shape)}")


def check_out(out: torch.Tensor, segments: torch.Tensor) -> None:
    check_sketch(out)
    check_tensor("segments", segments)
    if segments.dim() and out.shape[0] != segments.shape[0]:
        raise GvendiError(
            f"out has {out.shape[0]} rows, segments has {segments.shape[0]}; wanted one of each per sample"
        )


def check_dim(table: Table | ExpertTables | None, dim: int) -> None:
    if table is not None and table.dim != dim:
        raise GvendiError(f"table has dim {table.dim}, out has dim {dim}; make both with one SketchSpec")


def check_segments(segments: torch.Tensor, rows: int) -> None:
    ok = segments.dtype == torch.int64 and segments.dim() == 2 and segments.shape[1] == 2
    if not ok or segments.device.type != "cpu" or not segments.is_contiguous():
        raise GvendiError(f"segments must be contiguous int64 [B, 2] on the CPU, got {tuple(segments.shape)}")
    # NumPy takes a tenth of torch's time for arrays this small, and every layer checks.
    spans = segments.numpy()
    if len(spans) and (
        spans[:, 0].min() < 0 or spans[:, 1].max() > rows or bool((spans[:, 1] < spans[:, 0]).any())
    ):
        raise GvendiError(f"segments must satisfy 0 <= begin <= end <= {rows} in every row")


def check_basis(rows: torch.Tensor, eigenvalues: torch.Tensor, vectors: torch.Tensor) -> None:
    width = rows.shape[1]
    for name, x, shape in (("eigenvalues", eigenvalues, (width,)), ("vectors", vectors, (width, width))):
        check_tensor(name, x)
        if x.dtype != torch.float64 or x.shape != shape:
            raise GvendiError(f"{name} must be float64 {list(shape)}, got {x.dtype} {list(x.shape)}")
    if not (float(eigenvalues.min()) >= 0 and 0 < float(eigenvalues.max()) < float("inf")):
        raise GvendiError(
            f"eigenvalues must be finite, none negative and not all 0, got {float(eigenvalues.min())}.."
            f"{float(eigenvalues.max())}; if rounding made some negative, clamp them to 0"
        )
